"""`phisam bench`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ray_jobs.commands.arguments import add_traceback, command, counts, positive, words

MEASURES = ("trace", "frobenius", "determinant", "log_determinant")


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "bench",
        run,
        "measure what a step costs on this machine, beside the limit and other packages",
        """\
Times one step of SGD, PhiSAM and their peers in turns, in about five minutes, and prints Markdown tables.

  phisam bench
  phisam bench --model resnet18 --n 1,3 --workers 2 --csv speed.csv --plot speed.png
  phisam bench --model torchvision/resnet50 --device cuda --batch 64

Let nothing else run meanwhile. What the columns mean: docs/speed.md.""",
    )
    parser.add_argument(
        "--model", type=words, default=["mlp", "resnet18"], metavar="NAME,...", help="as in run descriptions"
    )
    parser.add_argument(
        "--image", type=counts, metavar="C,H,W", help="of all models, in place of a model's usual images"
    )
    parser.add_argument("--n", type=counts, default=[1, 2, 4, 8], metavar="N,...", help="n_samples (default: 1,2,4,8)")
    parser.add_argument("--workers", type=counts, metavar="W,...", help="processes, or GPUs (default: 1,2)")
    parser.add_argument("--batch", type=positive, help="examples that the workers share, in place of a model's usual")
    parser.add_argument(
        "--measure",
        type=measure_name,
        metavar="NAME",
        help=f"{', '.join(MEASURES)}, or a function package.module:function; default: frobenius, and trace for n = 1",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=positive, default=300, help="about what it may take (default: 300)")
    add_traceback(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write ratios against n: .png, .svg or .pdf")
    parser.add_argument("--first-step", action="store_true", help="also time `phisam train` up to its first epoch")


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is used to count, and is not to talk
    from ray_jobs.bench import command

    return command.run(arguments)


def measure_name(text: str) -> str:
    """One of MEASURES, or package.module:function."""
    if text not in MEASURES and ":" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MEASURES)}, nor package.module:function")
    return text
