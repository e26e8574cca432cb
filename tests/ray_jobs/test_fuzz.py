"""Readers of files meet any bytes: an answer or an error in words, no other exception, no code run, no file lost.

A few cases here; `pytest -m fuzz` runs ten thousand of each.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_jobs import checkpoint, config
from ray_jobs.errors import ConfigError, RunError
from ray_jobs.journal import TORN, Journal, read_journal
from ray_jobs.tracking.models import _weights

cases = pytest.mark.parametrize("cases", [150, pytest.param(10_000, marks=pytest.mark.fuzz)])
EXECUTED: list[str] = []


def each(cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=slow)(
        given(strategy)(check)
    )()


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Truncated, a bit flipped, a piece put in, taken out, or there twice."""
    place = st.integers(0, len(content))
    flip = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7)).map(
        lambda at: content[: at[0]] + bytes([content[at[0]] ^ 1 << at[1]]) + content[at[0] + 1 :]
    )
    cut = place.map(lambda end: content[:end])
    put = st.tuples(place, st.binary(max_size=20)).map(lambda at: content[: at[0]] + at[1] + content[at[0] :])
    out = st.tuples(place, place).map(lambda at: content[: min(at)] + content[max(at) :])
    twice = st.tuples(place, place).map(lambda at: content[: max(at)] + content[min(at) :])
    return st.one_of(cut, flip, put, out, twice)


# descriptions

NODES = """data model optimizer measure name tracking tags uri training epochs noise rho frobenius mlp null true 1e-3
.inf -1 [] {} !!python/object/apply:os.system &a *a << ? | > ~ 0x1f 1_000 '' "\\x00" 2**99 mlp: [[ }"""
WORDS = st.sampled_from(NODES.split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | WORDS, inner, max_size=3),
    max_leaves=8,
)


@cases
def test_a_description(cases: int, tmp_path: Path) -> None:
    recipes = [config.recipe_text(name) for name in ("digits-frob", "mnist5k-asam")]
    whole = yaml.safe_load(recipes[0])
    keys = st.sampled_from([("data",), ("optimizer",), ("optimizer", "measure"), ("tracking", "tags"), ("sharpness",)])

    def changed(at: tuple[tuple[str, ...], Any]) -> bytes:
        settings = json.loads(json.dumps(whole))
        section = settings
        for key in at[0][:-1]:
            section = section.setdefault(key, {})
        section[at[0][-1]] = at[1]
        return yaml.safe_dump(settings).encode(errors="surrogatepass")

    lines = st.lists(WORDS | st.sampled_from(recipes[0].splitlines()), max_size=12).map(lambda w: "\n".join(w).encode())
    texts = [st.binary(), st.text().map(lambda text: text.encode(errors="surrogatepass")), lines]
    texts += [damaged(recipe.encode()) for recipe in recipes] + [st.tuples(keys, VALUES).map(changed)]
    path = tmp_path / "run.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            run = config.load(str(path))
        except ConfigError:
            return
        assert config.changed(run, []) == run

    each(cases, st.one_of(texts), check)


# journals


@cases
def test_a_journal(cases: int, tmp_path: Path) -> None:
    path, aside = tmp_path / "journal.jsonl", tmp_path / f"journal.jsonl{TORN}"
    journal = Journal(path)
    for epoch in range(6):
        journal.append({"event": "epoch", "metrics": {"epoch": epoch, "loss/train": float("nan"), "note": "é\u2028\n"}})
    whole, events = path.read_bytes(), repr(journal.events)
    ends = [at for at in range(len(whole) + 1) if whole[:at].endswith(b"\n")]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        aside.unlink(missing_ok=True)
        try:
            read = read_journal(path)
        except RunError as error:
            assert str(error).startswith(f"{path}:")  # noqa: PT017
            with pytest.raises(RunError, match="damaged"):
                Journal(path)
            assert path.read_bytes() == content
            return
        assert path.read_bytes() == content
        if whole.startswith(content):
            assert repr(read) == repr(journal.events[: sum(end <= len(content) for end in ends)])
        opened = Journal(path)
        assert repr(opened.events) == repr(read)
        kept = path.read_bytes()
        assert kept + (aside.read_bytes()[:-1] if aside.exists() else b"") == content  # each byte is somewhere
        opened.append({"event": "next"})
        assert repr(read_journal(path)) == repr([*read, {"event": "next"}])

    each(cases, st.one_of(st.binary(), damaged(whole)), check)
    assert events == repr(journal.events)


# checkpoints


def boom(*_: object) -> None:
    EXECUTED.append("boom")


PIECES = [f"c{__name__}\nboom\n".encode(), b"cposix\nsystem\n", b"cbuiltins\nexec\n", b"ccollections\nOrderedDict\n"]
PIECES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b")", b"t", b"R", b"]", b"}", b"N", b"o", b"b", b"\x81", b"u"]
PIECES += [b"K\x01", b"X\x04\x00\x00\x00name", b"q\x00", b"h\x00", b"Q", b"s", b"e", b"a", b"0", b"2", b"1", b"\x93"]
PIECES += [f"(i{__name__}\nboom\n".encode(), f"X\x17\x00\x00\x00{__name__}X\x04\x00\x00\x00boom".encode(), b"\x80\x02"]


def archive(program: bytes) -> bytes:
    """As torch.save writes it, with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", b"\0" * 64)
    return buffer.getvalue()


@cases
def test_a_checkpoint(cases: int, tmp_path: Path) -> None:
    folder, state = tmp_path / "checkpoint_1", {"epoch": 1, "model": {"w": torch.arange(6.0)}, "best": None}
    checkpoint.save(folder, state, [{"epoch": 1.0, "loss/train": 0.5}])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    programs = st.lists(st.sampled_from(PIECES), max_size=24).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")
    torn = [st.tuples(st.just(name), damaged(content)) for name, content in before.items()]
    made = [st.binary(), programs, programs.map(archive), damaged(before["state.pt"])]
    damages = st.one_of(*torn, *(st.tuples(st.just("state.pt"), content) for content in made))

    def check(damage: tuple[str, bytes], with_sums: bool) -> None:
        name, content = damage
        shutil.rmtree(folder)
        folder.mkdir()
        for other, whole in before.items():
            (folder / other).write_bytes(whole)
        (folder / name).write_bytes(content)
        if with_sums and name != checkpoint.SUMS:  # somebody who makes a file makes its checksum too
            lines = (
                f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in before if n != "SHA256SUMS"
            )
            (folder / checkpoint.SUMS).write_text("".join(lines))
        same = content == before[name]
        for read in (checkpoint.load, checkpoint.load_history, lambda folder: _weights(folder / "state.pt")):
            try:
                read(folder)
            except RunError:
                assert not same or read not in (checkpoint.load, checkpoint.load_history)
        if not with_sums and not same and name == "state.pt":
            with pytest.raises(RunError, match="by its checksum"):
                checkpoint.load(folder)
        assert (folder / name).read_bytes() == content
        assert EXECUTED == []

    each(cases, st.tuples(damages, st.booleans()), lambda case: check(*case))


def test_what_is_planted_would_be_executed_by_a_reader_of_pickles(tmp_path: Path) -> None:
    program = b"\x80\x02" + PIECES[0] + b")R."
    (tmp_path / "state.pt").write_bytes(archive(program))
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert EXECUTED == ["boom"]
    EXECUTED.clear()
    with pytest.raises(RunError, match="could not be read without executing code"):
        _weights(tmp_path / "state.pt")
    assert EXECUTED == []
