"""The command line: what it prints, its exit codes, and what it does without a part of the installation."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ray_jobs import cli, config


def test_recipes_lists_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in config.recipe_names() if not name.startswith("paper/"))
    assert cli.main(["recipes", "digits-frob"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert config.load(str(tmp_path / "mine.yaml")) == config.load("digits-frob")


def test_validate_prints_the_resolved_description_and_the_strength(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["validate", "digits-frob", "--set", "optimizer.lam=0.1"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("# strength s = lam rho^2 = 9e-05\n")
    (tmp_path / "mine.yaml").write_text(printed)
    assert config.load(str(tmp_path / "mine.yaml")) == config.load("digits-frob", ["optimizer.lam=0.1"])


def test_validate_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "phisam: train: name a recipe or a file, or an unfinished run with --resume RUN_ID"),
        (["train", "digits-sgd", "--resume", "x"], "phisam: train: name a recipe or a file"),
        (["train", "--resume", "x", "--set", "a=1"], "phisam: train --resume goes on with the run as it was"),
        (["train", "digits-sdg"], "Did you mean 'digits-sgd'?"),
        (["train", "digits-sgd", "--set", "optimizer.roh=1"], "--set optimizer.roh=1: optimizer.roh: unknown key"),
        (["validate"], "phisam: validate: name a recipe or a file"),
        (["recipes", "digits"], "phisam: there is no recipe 'digits'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_ui_without_runs_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    assert cli.main(["ui"]) == 1
    assert "does not exist: train a run first" in capsys.readouterr().err


def test_ui_listens_on_loopback_and_checks_who_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHISAM_HOME", str(tmp_path))
    (tmp_path / "mlflow.db").touch()
    became: list[str] = []
    monkeypatch.setattr("os.execve", lambda program, command, environment: became.extend(command))
    cli.main(["ui", "--port", "50123"])
    settings = dict(pairwise(became))
    assert (settings["--host"], settings["--allowed-hosts"]) == ("127.0.0.1", "127.0.0.1:50123,localhost:50123")


def test_a_port_beyond_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["ui", "--port", "70000"])
    assert "'70000' is no port" in capsys.readouterr().err


def test_num_workers_must_be_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "digits-sgd", "--num-workers", "0"])
    assert caught.value.code == 2
    assert "'0' is not a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["validate", "--help"], ["ui", "--help"]])
def test_help_needs_neither_torch_nor_ray_nor_mlflow(command: list[str]) -> None:
    """The help of a program that takes seconds to appear is not read."""
    code = f"""
import sys
from itertools import pairwise
from ray_jobs import cli
try:
    cli.main({command!r})
except SystemExit:
    pass
print([name for name in ("torch", "ray", "mlflow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "phisam" in done.stdout


@pytest.mark.parametrize("missing", ["yaml", "pydantic"])
def test_without_the_service_extra_the_command_names_it(missing: str) -> None:
    code = f"""
import sys
from itertools import pairwise
sys.modules[{missing!r}] = None
from ray_jobs import cli
sys.exit(cli.main(["recipes"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"phisam: the package {missing} is missing: pip install 'phisam[service]'\n"


def test_the_library_imports_torch_alone() -> None:
    code = """
import sys
from itertools import pairwise
import phisam
others = ("ray", "mlflow", "pydantic", "yaml", "rich", "torchvision", "ray_jobs")
print([name for name in others if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_clone_in_the_working_directory_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """As in the folder that one has cloned into; Ray's workers look into the driver's first, as `python -c` does."""
    for name in ("phisam", "ray_jobs"):
        (tmp_path / name).mkdir()
    code = "import phisam, ray_jobs.cli; print(phisam.PhiSAM.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "PhiSAM\n"


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """`phisam sweep ... --dry-run | head -1`: of 144 lines and more."""
    command = [sys.executable, "-m", "ray_jobs.cli", "recipes", "mnist5k-frob"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
