"""Cheaper steps at equal cost: pairs, every k-th step and a part of the batch against plain draws, over seeds.

    python benchmarks/cheaper.py --set data.name=fashion_mnist --set data.root=FOLDER --set data.fraction=0.1

Every variant trains until it has spent the same number of gradient evaluations (--budget, in epochs of the base
optimizer), with rho and lam of the recipes mnist5k-trace and mnist5k-frob. Prints Markdown.
"""

from __future__ import annotations

import argparse

from training import Run, cost, table, train_all

N = "optimizer.n_samples={}".format
VARIANTS = {
    "plain, n = 2": (N(2),),
    "plain, n = 4": (N(4),),
    "plain, n = 8": (N(8),),
    "antithetic, n = 4": (N(4), "optimizer.noise={name: gaussian, antithetic: true}"),
    "symmetric, n = 2": (N(2), "optimizer.noise={name: gaussian, symmetric: true}"),
    "symmetric, n = 4": (N(4), "optimizer.noise={name: gaussian, symmetric: true}"),
    "every = 2, n = 4": (N(4), "optimizer.every=2"),
    "every = 4, n = 4": (N(4), "optimizer.every=4"),
    "perturb_fraction = 1/4, n = 4": (N(4), "optimizer.perturb_fraction=0.25"),
    "perturb_fraction = 1/2, n = 4": (N(4), "optimizer.perturb_fraction=0.5"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run description")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    common = tuple(arguments.set)

    for recipe, baseline in (("mnist5k-trace", False), ("mnist5k-frob", True)):
        variants = {name: (*common, *settings) for name, settings in VARIANTS.items()}
        runs = {
            name: [Run(recipe, settings, arguments.budget, seed) for seed in range(arguments.seeds)]
            for name, settings in variants.items()
        }
        if baseline:
            runs["base optimizer alone"] = [
                Run("mnist5k-sgd", common, arguments.budget, seed) for seed in range(arguments.seeds)
            ]
        results = train_all([run for each in runs.values() for run in each], arguments.processes)
        print(f"\n**{recipe}**, {arguments.budget:g} epochs' worth of gradient evaluations\n")
        print("| variant | evaluations a step | epochs | training loss | test loss | test accuracy | ‖H‖_F² |")
        print("|---|---|---|---|---|---|---|")
        leading = {
            name: [f"{cost(each[0].recipe, each[0].settings):g}", str(each[0].described().training.epochs)]
            for name, each in runs.items()
        }
        print("\n".join(table({name: [results[run] for run in each] for name, each in runs.items()}, leading)))


if __name__ == "__main__":
    main()
