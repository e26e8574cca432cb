"""`phisam render`."""

from __future__ import annotations

import argparse
from typing import Any

from ray_jobs.commands.arguments import add_set, command, positive

TEXT = """\
Prints what `kubectl apply -f -` takes: a ConfigMap with the description and a RayJob of KubeRay, or a RayCluster.

  phisam render k8s mnist5k-frob --image registry.example.com/phisam:0.1.0 | kubectl apply -f -
  phisam render k8s my-run.yaml --workers 8 --gpus 1 --spot --queue team-a
  phisam render k8s my-sweep.yaml --kind sweep --workers 8 --gpus 1
  phisam render k8s --kind cluster --workers 2 --gpus 1 --max-workers 8      a RayCluster to work on

MLflow, claims and secrets are those of deploy/base; deploy/README.md has all of it."""


def add(commands: Any) -> None:
    """Declares the command."""
    targets = command(commands, "render", run, "print a run, a sweep or a cluster as Kubernetes objects", TEXT)
    parser = targets.add_subparsers(metavar="k8s", required=True).add_parser(
        "k8s", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", metavar="RECIPE_OR_FILE")
    parser.add_argument("--kind", choices=["train", "sweep", "cluster"], default="train", help="default: train")
    parser.add_argument("--image", metavar="IMAGE", help="of docker/Dockerfile (default: phisam:VERSION)")
    parser.add_argument("--workers", type=positive, metavar="N", help="pods, a Ray Train worker each")
    parser.add_argument(
        "--max-workers", type=positive, metavar="N", help="--kind cluster: let Ray's autoscaler add pods up to N"
    )
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, metavar="N", help="GPUs of a pod, 0 or 1")
    parser.add_argument("--cpus", type=positive, default=4, metavar="N", help="CPUs of a pod (default: 4)")
    parser.add_argument("--memory", type=positive, default=16, metavar="GiB", help="of a pod (default: 16)")
    parser.add_argument("--head-memory", type=positive, default=8, metavar="GiB", help="of the head (default: 8)")
    parser.add_argument("--namespace", default="phisam")
    parser.add_argument(
        "--queue", metavar="NAME", help="a LocalQueue of Kueue, which starts the run when there is room"
    )
    parser.add_argument("--deadline", type=positive, default=86_400, metavar="SECONDS", help="default: 86400, a day")
    parser.add_argument(
        "--retries", type=positive, default=3, metavar="N", help="new clusters after a failure (default: 3)"
    )
    parser.add_argument("--secret", default="phisam", metavar="PREFIX", help="of the secrets' names (default: phisam)")
    parser.add_argument("--spot", action="store_true", help="workers may run on nodes that can be taken away")
    add_set(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code."""
    from ray_jobs import config, render
    from ray_jobs.errors import ConfigError

    if (arguments.run is None) != (arguments.kind == "cluster"):
        raise ConfigError("render: --kind train and --kind sweep take a recipe or a file, --kind cluster takes none")
    if arguments.max_workers and arguments.kind != "cluster":
        raise ConfigError(
            "render: a run has a fixed number of workers, so --max-workers goes with --kind cluster alone"
        )
    if arguments.max_workers and arguments.queue:
        raise ConfigError("render: Kueue starts no cluster that Ray's autoscaler changes: --queue or --max-workers")
    name, description, workers = arguments.kind, "", arguments.workers or 1
    if arguments.kind == "train":
        told = [*arguments.set, *([f"scaling.num_workers={arguments.workers}"] if arguments.workers else [])]
        resolved = config.load(arguments.run, told)
        name, description, workers = resolved.name, config.dump_yaml(resolved), resolved.scaling.most_workers
    elif arguments.kind == "sweep":
        from ray_jobs.sweep.config import dump_sweep, load_sweep

        sweep = load_sweep(arguments.run, arguments.set)
        name, description = sweep.name, dump_sweep(sweep)
    cluster = render.Cluster(
        image=arguments.image or render.default_image(),
        workers=workers,
        max_workers=max(arguments.max_workers or workers, workers),
        gpus=arguments.gpus,
        cpus=arguments.cpus,
        memory_gib=arguments.memory,
        head_memory_gib=arguments.head_memory,
        namespace=arguments.namespace,
        queue=arguments.queue,
        deadline_seconds=arguments.deadline,
        retries=arguments.retries,
        secret=arguments.secret,
        spot=arguments.spot,
    )
    if arguments.kind == "cluster":
        objects = render.interactive("phisam", cluster)
    else:
        # A cluster that replaces a lost one goes on with the run that was begun.
        go_on = f"--key {render.object_name(name)}" if arguments.kind == "train" else "--go-on"
        asked = f"{arguments.kind} {render.RUN_FILE} --address auto {go_on}"
        objects = render.run_job(name, description, asked, cluster)
    print(render.as_yaml(objects), end="")
    return 0
