"""Chooses hyperparameters of the character transformer by random search, with the same budget for every optimizer.

    PYTHONPATH=examples python benchmarks/research/tune_characters.py
    PYTHONPATH=examples python benchmarks/research/tune_characters.py --optimizer sirf_exact --trials 32 --width 64
    PYTHONPATH=examples python benchmarks/research/tune_characters.py \\
        --optimizer sirf_exact_bfloat16 --setting-of sirf_exact

Every trial is trained from one seed, the best few from some more; among these the lowest mean validation loss wins,
and its setting is trained from fresh seeds, whose curves are kept. A trial that diverges counts as one. All trials of
an optimizer run the same compiled program, which is possible because every hyperparameter may be a traced array.
"""

import argparse
import json
import pathlib
import platform
import time
from typing import Any

import progress
from characters import corpus
from characters.corpus import Corpus
from characters.methods import METHODS, RECORDS
from characters.training import SEGMENT, SEQUENCE, Network, Run
from characters.trials import Budget, choose, finite, train
from searching import Hyperparameters, print_search, to_json


def search(run: Run, data: Corpus, budget: Budget, fresh_seeds: int, known: Hyperparameters | None) -> dict[str, Any]:
    """Returns the record of a search, unless its result is known, and the curves of its chosen setting."""
    with progress.progress_bar() as bar:
        without_trials = {"chosen": known, "non_finite": 0, "trials": [], "finalists": []}
        record = without_trials if known else choose(run, data, budget, bar)
        task = bar.add_task("its fresh seeds", total=fresh_seeds, status="")
        curves = []
        for seed in range(fresh_seeds):
            curves.append(train(run, data, budget.steps, record["chosen"], seed, every_segment=True))
            bar.update(task, advance=1, status=f"loss {curves[-1].validation_loss[-1]:.3f}")
    return record | {
        "validation_loss": [finite(curve.validation_loss[-1]) for curve in curves],
        "train_curves": [[finite(value) for value in curve.train_loss] for curve in curves],
        "validation_curves": [[finite(value) for value in curve.validation_loss] for curve in curves],
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--trials", type=int, default=32, help="of one seed each")
    parser.add_argument("--finalists", type=int, default=4, help="trials that get more seeds")
    parser.add_argument("--final-seeds", type=int, default=2, help="how many more")
    parser.add_argument("--fresh-seeds", type=int, default=5, help="of the chosen setting")
    parser.add_argument("--steps", type=int, default=600, help=f"a multiple of {SEGMENT}")
    parser.add_argument("--batch-size", type=int, default=32, help=f"sequences of {SEQUENCE} characters")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--setting-of", choices=METHODS, metavar="NAME", help="in place of a search, what one chose")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", default=RECORDS, help="NAME.json goes there")
    options = parser.parse_args(arguments)
    if options.steps % SEGMENT:
        parser.error(f"--steps must be a multiple of {SEGMENT}, got {options.steps}")

    known = None
    if options.setting_of is not None:
        known = json.loads((options.output / f"{options.setting_of}.json").read_text())["chosen"]
    data = corpus.load(SEQUENCE)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.optimizer:
        begin = time.perf_counter()
        run = Run(METHODS[name], Network(options.width, options.layers), options.batch_size)
        budget = Budget(*(getattr(options, field) for field in Budget._fields))
        record = {"optimizer": name, "python": platform.python_version(), "train_characters": data.train.size}
        record |= {key: getattr(options, key) for key in ("width", "layers", "batch_size", "fresh_seeds")}
        record |= budget._asdict()
        record["ranges"] = {key: str(limits) for key, limits in METHODS[name].ranges.items()}
        record |= {"setting_of": options.setting_of} if known else {}
        record |= search(run, data, budget, options.fresh_seeds, known)
        (options.output / f"{name}.json").write_text(to_json(record))
        print_search(METHODS[name], record, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
