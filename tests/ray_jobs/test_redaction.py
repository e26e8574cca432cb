"""Planted secrets do not come out again: not on the terminal, not in errors, not in what is stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ray_jobs import cli, config
from ray_jobs.commands import validate
from ray_jobs.errors import ConfigError, RunError, first_line
from ray_jobs.redaction import is_secret, known_secrets, redacted, redacted_output, without_secrets
from ray_jobs.sweep.config import dump_sweep, load_sweep
from ray_jobs.tracking import Tracker

PLANTED = "hunter2-and-more"


@pytest.mark.parametrize(
    "key",
    """password passwords db_password dbPassword api_key apiKey x-api-key APIKey token HF_TOKEN tracking.tags.hf_token
    secret PGPASSWORD dbpassword DB_PASS SMTP_PASS OPENAI_KEY SSH_KEY GITHUB_PAT jwt
    client_secret Authorization AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN MLFLOW_TRACKING_PASSWORD
    DB_PWD aws_credentials private_key""".split(),  # noqa: SIM905
)
def test_what_looks_like_a_secret(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    """n_tokens token_embedding tokenizer pad_token max_token class_token tokens_per_second key keys phisam.key monkey
    forward_pass one_pass sort_key
    passes bypass secret_name token_path RAY_AUTH_TOKEN_PATH author AWS_REGION MLFLOW_TRACKING_USERNAME PWD OLDPWD
    optimizer.every accuracy/test""".split(),  # noqa: SIM905
)
def test_what_does_not(key: str) -> None:
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("MLflow at http://bob:hunter2@host:5000/x", "MLflow at http://***@host:5000/x"),
        ("Authorization: Bearer hunter2.abc", "Authorization: ***"),
        ("curl -H 'Bearer hunter2.abc'", "curl -H 'Bearer ***'"),
        ('{"api_key": "hunter 2", "n": 1}', '{"api_key": "***", "n": 1}'),
        (r'{"password": "hun\"ter2", "n": 1}', '{"password": "***", "n": 1}'),
        ("password='hun\\'ter2'", "password='***'"),
        (
            "+-----BEGIN RSA PRIVATE KEY-----\n+MIIhunter2\n+-----END RSA PRIVATE KEY-----\n+x",
            "+-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\n+x",
        ),
        ('+api_key: str = "hunter2"', "+api_key: ***"),
        ('+os.environ["OPENAI_API_KEY"] = "hunter2"', '+os.environ["OPENAI_API_KEY"] = "***"'),
        ('+PASSWORD = b"hunter2"', "+PASSWORD = ***"),
        ('+TOKEN = """hunter2\n+hunter2"""\n+x = 1', "+TOKEN = ***\n+x = 1"),
        ("token = ('hunter2')\nx = 1", "token = ***\nx = 1"),
        ('"api_keys": ["hunter2", "hunter2"], "n": 1', '"api_keys": ***, "n": 1'),
        ("+password: a hunter2 c\n+n: 1", "+password: ***\n+n: 1"),
        ("run --password hunter2 --api-key 'hunter 2' -n 1", "run --password *** --api-key '***' -n 1"),
        ('jwt = "hunter2"', 'jwt = "***"'),
        ('GITHUB_PAT = "hunter2"', 'GITHUB_PAT = "***"'),
        ('path = "hunter2"; pattern: hunter2', 'path = "hunter2"; pattern: hunter2'),
        ("pass  token: the cluster asks for it", "pass  token: the cluster asks for it"),
        ("--path hunter2 --key NAME\nmax_tokens = [1, 2]", "--path hunter2 --key NAME\nmax_tokens = [1, 2]"),
        ("--set tracking.tags.api_token=hunter2: unknown", "--set tracking.tags.api_token=***: unknown"),
        ("https://host/x?n=1&token=hunter2&m=2", "https://host/x?n=1&token=***&m=2"),
        ("  api_token: hunter2  # mine\n  rho: 0.1\n", "  api_token: ***  # mine\n  rho: 0.1\n"),
        ("password: must be text, not 5", "password: must be text, not 5"),
        ("loss per token: 0.5", "loss per token: 0.5"),
        ("n_tokens=512, pad_token='<pad>'", "n_tokens=512, pad_token='<pad>'"),
    ],
)
def test_a_text(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_settings_in_settings() -> None:
    told = {"n": 1, "runs": [{"env": {"DB_PASSWORD": PLANTED, "N_TOKENS": 5}}], "secrets": {"a": PLANTED}}
    shown = {"n": 1, "runs": [{"env": {"DB_PASSWORD": "***", "N_TOKENS": 5}}], "secrets": "***"}
    assert without_secrets(told) == shown


def test_a_known_secret_is_one_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("rays-own-token\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("SERVICE_TOKEN", PLANTED)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))  # where a secret lies is none
    monkeypatch.setenv("SHORT_TOKEN", "on")
    assert {"rays-own-token", PLANTED} <= set(known_secrets())
    error = RuntimeError(f"[{PLANTED}] and rays-own-token on {tmp_path}")
    assert first_line(error) == f"[***] and *** on {tmp_path}"


RUN = f"""\
tracking: {{tags: {{api_token: {PLANTED}, team: red}}}}
description: "with https://bob:{PLANTED}@host"
"""


@pytest.fixture
def described(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    cli_text = config.dump_yaml(config.load("digits-sgd"))
    kept = [line for line in cli_text.splitlines() if not line.startswith("description")]
    before, _, after = "\n".join(kept).partition("tracking:\n")
    rest = after.partition("checkpoint:")[2]
    path.write_text(f"{before}{RUN}checkpoint:{rest}\n")
    return str(path)


def test_a_description_does_not_keep_its_secrets(
    described: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.load(described)
    assert run.tracking.tags == {"api_token": "***", "team": "red"}
    assert PLANTED not in json.dumps(run.model_dump(mode="json"))  # which workers are sent
    assert cli.main(["validate", described]) == 0
    assert cli.main(["validate", described, "--set", f"tracking.password={PLANTED}"]) == 2
    assert cli.main(["validate", described, "--set", "tracking.tags.pin_password=123456789"]) == 2
    told = capsys.readouterr()
    assert "team: red" in told.out
    assert "tracking.password=***: tracking.password: unknown key (value '***')" in told.err
    assert PLANTED not in told.out + told.err
    assert "123456789" not in told.err


def test_mlflow_is_not_told_either(described: str, tmp_path: Path) -> None:
    tracker = Tracker.start(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path, config.load(described), {})
    tracker.log_texts({"code.diff": f"+API_KEY = '{PLANTED}'\n"})  # as `phisam submit` carries what git does not have
    data = MlflowClient(tracker.uri).get_run(tracker.run_id).data
    assert data.tags["api_token"] == data.params["tracking.tags.api_token"] == "***"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and str(path) != described]
    assert {"run.yaml", "mlflow.db"} <= {path.name for path in files}
    assert not [path for path in files if PLANTED.encode() in path.read_bytes()]


def test_a_sweep_keeps_none_and_has_none_to_search(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    text = f"name: s\nrun: digits-sgd\nset: {{tracking.tags.api_token: {PLANTED}}}\n"
    path.write_text(f"{text}space: {{optimizer.base.lr: {{grid: [1, 2]}}}}\n")
    assert PLANTED not in dump_sweep(load_sweep(str(path)))
    path.write_text(f"name: s\nrun: digits-sgd\nspace: {{tracking.tags.api_token: {{grid: [{PLANTED}, b]}}}}\n")
    with pytest.raises(ConfigError, match=r"space\.tracking\.tags\.api_token: looks like a secret") as caught:
        load_sweep(str(path))
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("error", [RunError, KeyError], ids=["told", "a defect"])
def test_a_traceback(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: Any) -> int:
        arguments.verbose = True
        print(f"password={PLANTED}")
        print(f"password={PLANTED}", file=sys.stderr)
        raise error(f"http://bob:{PLANTED}@host")

    monkeypatch.setattr(validate, "run", fails)
    assert cli.main(["validate", "digits-sgd"]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.splitlines()[:2]) == (
        "password=***\n",
        ["password=***", "Traceback (most recent call last):"],
    )
    assert "http://***@host" in told.err
    assert PLANTED not in told.err


def test_a_function_of_ones_own_is_given_no_secret() -> None:
    overrides = ["data.name=my_pkg.data:load", f"data.options.db_password={PLANTED}"]
    with pytest.raises(ConfigError, match=r"data\.options\.db_password: looks like a secret") as caught:
        config.load("digits-sgd", overrides)
    assert f"={PLANTED}" not in redacted(str(caught.value))


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("data.options.auth={password: hunter2}", "data.options.auth.password"),
        ("data.options.dsn='postgres://bob:hunter2@h/db'", "data.options.dsn"),
        ("data.options.hosts=[{api_token: hunter2}]", "data.options.hosts.0.api_token"),
        ("model={name: my_pkg.nets:make, options: {api_key: hunter2}}", "model.options.api_key"),
        ("optimizer.measure={name: my_pkg.m:make, options: {api_key: hunter2}}", "optimizer.measure.options.api_key"),
    ],
)
def test_nor_one_that_lies_deeper(option: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: looks like a secret") as caught:
        config.load("digits-sgd", ["data.name=my_pkg.data:load", option])
    assert "hunter2" not in redacted(str(caught.value)), "as the command prints it"


@pytest.mark.parametrize("words", [["--api-key=hunter2"], ["--api-key", "hunter2"]])
def test_a_mistyped_argument_is_not_repeated(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "digits-sgd", *words])
    said = capsys.readouterr().err
    assert "unrecognized arguments: --api-key" in said
    assert "hunter2" not in said


def test_a_password_with_an_at_sign_is_masked_whole() -> None:
    assert redacted("mysql://u:p@ss@host/db is away") == "mysql://***@host/db is away"


def test_what_is_printed_in_parts_is_read_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with redacted_output():
        print("password:", "hunter22xx")
        print("api_key=", "hunter33xx", sep="")
        print("begun ", end="", flush=True)
        print("token=hunter44xx", end="")
    assert capsys.readouterr().out == "password: ***\napi_key=***\nbegun token=***"
