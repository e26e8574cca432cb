"""The paper's seven methods side by side, at equal epochs and at equal gradient evaluations, over seeds.

    python benchmarks/methods.py
    python benchmarks/methods.py --set data.name=fashion_mnist --set data.root=FOLDER --set data.fraction=0.1

Each method is the recipe mnist5k-NAME with the settings that it ships with; none is tuned to the data. Equal
evaluations: every method trains until it has spent what the costliest one spends in --epochs epochs. Numbers are those
of the last epoch, mean ± standard deviation over seeds. Prints Markdown.
"""

from __future__ import annotations

import argparse

from training import Run, cost, table, train_all

METHODS = ("sgd", "frob", "det", "trace", "sam", "asam", "ssam")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of every method, and of the costliest one's budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run description")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    settings, seeds = tuple(arguments.set), range(arguments.seeds)

    costs = {method: cost(f"mnist5k-{method}", settings) for method in METHODS}
    equal = arguments.epochs * max(costs.values())
    budgets = {
        "equal epochs": {method: arguments.epochs * costs[method] for method in METHODS},
        "equal evaluations": dict.fromkeys(METHODS, equal),
    }

    def runs(method: str, budget: float) -> list[Run]:
        return [Run(f"mnist5k-{method}", settings, budget, seed) for seed in seeds]

    wanted = {run for of in budgets.values() for method, budget in of.items() for run in runs(method, budget)}
    results = train_all(sorted(wanted), arguments.processes)
    print("| method | evaluations a step | epochs | cost | training loss | test loss | test accuracy | ‖H‖_F² |")
    print("|---|---|---|---|---|---|---|---|")
    for title, of in budgets.items():
        print(f"| **{title}** | | | | | | | |")
        rows = {method: [results[run] for run in runs(method, budget)] for method, budget in of.items()}
        leading = {
            method: [f"{costs[method]:g}", f"{budget / costs[method]:.0f}", f"{budget:g}"]
            for method, budget in of.items()
        }
        print("\n".join(table(rows, leading)))


if __name__ == "__main__":
    main()
