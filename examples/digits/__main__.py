"""Distillation methods compared on real data: scikit-learn's handwritten digits.

python -m examples.digits                     # all experiments
python -m examples.digits teacher_student     # one of them

Each trains its networks for every seed, prints a table of means and standard errors, and writes
NAME.json and NAME.png. --update-readme puts the tables of all saved results into README.md beside
this file, and draws the plots anew; without a NAME it runs nothing.
"""

import argparse
import time
from importlib import import_module
from pathlib import Path

import torch

from .report import ROOT, save, table, update_readme
from .training import Settings

EXPERIMENTS = (
    "teacher_student",
    "omitted_digit",
    "few_labels",
    "ensembles",
    "decoupled",
    "variations",
    "staged_pruning",
    "sparse_teacher",
    "specialists",
)
RESULTS = ROOT / "benchmarks" / "results" / "digits"
README = Path(__file__).with_name("README.md")


def at_least(low: int):
    def parse(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = "int"
    return parse


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits", description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*EXPERIMENTS, "all")))
    parser.add_argument("--seeds", type=at_least(2), default=Settings.seeds, help="splits, weights")
    parser.add_argument("--epochs", type=at_least(1), default=Settings.epochs, help="of a student")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are saved")
    parser.add_argument(
        "--update-readme", action="store_true", help="tables and plots, from all results"
    )
    args = parser.parse_args(arguments)
    names = args.names or ([] if args.update_readme else ["all"])
    if unknown := [name for name in names if name not in (*EXPERIMENTS, "all")]:
        parser.error(f"no experiment {', '.join(unknown)}: {', '.join(EXPERIMENTS)} or all")
    if "all" in names:
        names = list(EXPERIMENTS)

    torch.set_num_threads(1)  # these networks are too small to share
    settings = Settings(seeds=args.seeds, epochs=args.epochs)
    for name in names:
        started = time.perf_counter()
        experiment = import_module(f".{name}", __package__).run(settings)
        seconds = time.perf_counter() - started
        save(name, experiment, settings, seconds, args.out)
        print(f"\n{experiment.title} ({seconds:.0f} s)\n\n{table(experiment)}\n", flush=True)
    if args.update_readme:
        update_readme(README, EXPERIMENTS, args.out)


if __name__ == "__main__":
    main()
