"""How long a person waits: seconds from the command to the line of the first epoch, beside a bare Ray Train."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time

from ray_jobs.errors import RunError

RECIPE = "digits-frob"

# Two workers that do nothing but report once: what Ray itself takes, from the start of Python on, with the settings
# that `phisam train` gives it. Ray starts as in `cluster.connected`.
BARE = """
from ray_jobs.commands.arguments import set_environment
set_environment(None, False)
import os, threading, time, ray, ray.train
from ray.train.torch import TorchTrainer
from ray_jobs.loopback import LoopbackTorchConfig
cpus = max(os.cpu_count(), 2)
ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

mark = os.environ["PHISAM_HOME"] + "/reported"

def loop():
    ray.train.report({})
    open(mark, "w").close()

def tell():
    while not os.path.exists(mark):
        time.sleep(0.01)
    print("REPORTED", flush=True)

threading.Thread(target=tell, daemon=True).start()
TorchTrainer(
    loop,
    torch_config=LoopbackTorchConfig(),
    scaling_config=ray.train.ScalingConfig(num_workers=2),
    run_config=ray.train.RunConfig(name="bare", storage_path=os.environ["PHISAM_HOME"]),
).fit()
"""


def measure() -> dict[str, float]:
    """Seconds of `phisam train` to its first epoch's line, and of bare Ray Train to its worker's first report."""
    train = [sys.executable, "-m", "ray_jobs.cli", "train", RECIPE, "--set", "training.epochs=1"]
    return {
        f"phisam train {RECIPE}": seconds_to(train, "epoch 1/1"),
        "bare Ray Train": seconds_to([sys.executable, "-c", BARE], "REPORTED"),
    }


def seconds_to(command: list[str], word: str, limit: float = 300.0) -> float:
    """From the start of the command to the first line with the word; the command then runs to its end.

    Raises:
        RunError: it ended, or was ended after `limit` seconds, without such a line.
    """
    seconds, said = None, []
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "PHISAM_HOME": home, "PYTHONUNBUFFERED": "1"}
        started = time.perf_counter()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            too_long = threading.Timer(limit, process.terminate)
            too_long.start()
            for line in process.stdout:
                said.append(line)
                if seconds is None and word in line:
                    seconds = time.perf_counter() - started
            too_long.cancel()
    if seconds is None:
        raise RunError(f"{' '.join(command[:4])} ended without {word!r}:\n{''.join(said[-20:])}")
    return seconds


def text(seconds: dict[str, float]) -> str:
    """A line each."""
    lines = [f"{seconds:6.1f} s  {name}" for name, seconds in seconds.items()]
    return "\n".join(
        ["Seconds from the command to the end of the first epoch (23 steps), and of a bare report:", *lines]
    )
