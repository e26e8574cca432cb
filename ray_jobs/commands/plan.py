"""`phisam plan`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import add_set, add_traceback, command, counts, number, positive, set_environment


def add(commands: Any) -> None:
    """Declares the command."""
    parser = command(
        commands,
        "plan",
        run,
        "predict a step's time, memory and traffic on many GPUs, and the best S",
        """\
  phisam plan cifar10-frob --gpus 64
  phisam plan my-run.yaml --gpus 8,64,512 --n 1,3,7 --link ethernet
  phisam plan my-run.yaml --gpus 64 --seconds-per-evaluation 1.9      a time that you measured
  phisam plan my-run.yaml --gpus 64 --parameters 1e9 --flops-per-example 1.2e13      in place of the model

S is the number of ranks that share the points of a step. One W and one n: all S; several: the best of each. Nothing is
started, and no data is read but by a function of your own. How it is computed, and how far it is from measured steps:
docs/plan.md.""",
    )
    parser.add_argument("run", metavar="RECIPE_OR_FILE")
    parser.add_argument("--gpus", type=counts, required=True, metavar="W[,W]")
    parser.add_argument("--n", type=counts, default=[], metavar="n[,n]", help="in place of optimizer.n_samples")
    parser.add_argument("--link", default="nvlink", metavar="NAME", help="nvlink (default), ethernet, or gloo")
    parser.add_argument("--tflops", type=number, metavar="T", help="peak of a GPU in the run's precision")
    parser.add_argument("--utilisation", type=number, metavar="U", help="part of it that is reached, e.g. 0.3")
    parser.add_argument("--gbps", type=number, metavar="G", help="Gb/s between nodes, of a node's adapters together")
    parser.add_argument("--gpus-per-node", type=positive, metavar="N")
    parser.add_argument("--memory-gb", type=number, metavar="GB", help="of a GPU")
    parser.add_argument("--seconds-per-evaluation", type=number, metavar="S", help="of the global batch on one GPU")
    parser.add_argument("--parameters", type=number, metavar="D")
    parser.add_argument("--flops-per-example", type=number, metavar="F", help="of a forward and a backward")
    parser.add_argument("--activations-gb", type=number, metavar="GB", help="with --parameters: of one example")
    add_set(parser)
    add_traceback(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs.plan_hardware import profile

    hardware = profile(
        arguments.link,
        arguments.tflops,
        arguments.utilisation,
        arguments.gbps,
        arguments.gpus_per_node,
        arguments.memory_gb,
    )
    set_environment(None, False)
    from ray_jobs.plan_table import plan_text

    text = plan_text(
        arguments.run,
        arguments.set,
        arguments.gpus,
        arguments.n,
        hardware,
        arguments.parameters,
        arguments.flops_per_example,
        arguments.activations_gb,
        arguments.seconds_per_evaluation,
    )
    print(text)
    return 0
