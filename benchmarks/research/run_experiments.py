"""Tunes and tests optimizers on small networks and real data: one pair, some, or the whole suite.

    PYTHONPATH=examples python benchmarks/research/run_experiments.py --task digits_vgg --optimizer rf_rmsprop
    PYTHONPATH=examples python benchmarks/research/run_experiments.py
    PYTHONPATH=examples python benchmarks/research/run_experiments.py --images cifar-10-batches-py --task images_resnet

Every pair's record is written when it is done, as results/experiments/TASK/OPTIMIZER.json; a pair that has one is
skipped. Trials train side by side as one program. Then: report_experiments.py
"""

import argparse
import json
import pathlib
import platform

import jax
import numpy as np
import progress
from experiments.methods import ABSENT, METHODS
from experiments.tasks import IMAGE_NETWORKS, TASKS, Task, image_task
from experiments.trials import Runner, run_defaults, run_pair
from rich.progress import Progress
from searching import to_json

RECORDS = pathlib.Path("results", "experiments")  # of every pair, which are too many to be kept with the code
OUTPUT = pathlib.Path(__file__).parent / "experiments"  # summary, tables and figure, which are kept


def record_of(task: str, tasks: dict[str, Task], name: str, options: argparse.Namespace) -> dict:
    """Returns the record of a pair, with what it was run with."""
    method, budget = METHODS[name], ("trials", "finalists", "final_seeds", "fresh_seeds")
    sizes = {key: getattr(options, key) for key in budget}
    record = {"task": task, "optimizer": name, "steps": tasks[task].steps, **sizes}
    del record["trials"]  # all of them follow
    record |= {"batch_size": tasks[task].terms(tasks[task].load()), "reported": tasks[task].reported}
    record["parameters"] = tasks[task].parameters()
    record |= {"python": platform.python_version(), "jax": jax.__version__, "device": jax.devices()[0].platform}
    record["ranges"] = {key: str(limits) for key, limits in method.ranges.items()}
    return record | run_pair(tasks[task], method, **sizes)


def write(path: pathlib.Path, record: dict) -> None:
    """Writes a pair's record, whole or not at all."""
    jax.clear_caches()  # no other pair has this program, and many of them exhaust the memory for code
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(to_json(record))
    unfinished.replace(path)


def run_suite(tasks: dict[str, Task], options: argparse.Namespace, bar: Progress) -> None:
    """Runs every pair that has no record yet, or the defaults alone of those that have."""
    counted = bar.add_task("pairs", total=len(options.task) * len(options.optimizer), status="")
    for task in options.task:
        for name in options.optimizer:
            path = options.records / task / f"{name}.json"
            bar.update(counted, status=f"{tasks[task].label}: {METHODS[name].label}")
            if options.defaults_alone and path.is_file():
                record = json.loads(path.read_text())
                record["defaults"] = run_defaults(Runner(tasks[task], METHODS[name]), options.fresh_seeds)
                write(path, record)
            elif not options.defaults_alone and not path.is_file():
                record = record_of(task, tasks, name, options)
                write(path, record)
                value = np.array(record["tested"][f"test_{record['reported']}"], float).mean()
                bar.console.print(
                    f"{task:23}{name:26}{record['reported']} {value:.4f}{record['seconds']:7.1f} s"
                    f"{record['trials_per_minute']:6.0f} trials/min"
                )
            bar.advance(counted)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    image_tasks = [f"images_{name}" for name in IMAGE_NETWORKS]
    known, names = [*TASKS, *image_tasks], [name for name in METHODS if name not in ABSENT]
    parser.add_argument("--task", nargs="+", choices=known, metavar="TASK", help=", ".join(known))
    parser.add_argument("--optimizer", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--trials", type=int, default=64, help="of one seed each")
    parser.add_argument("--finalists", type=int, default=4, help="trials that get more seeds")
    parser.add_argument("--final-seeds", type=int, default=4, help="how many more")
    parser.add_argument("--fresh-seeds", type=int, default=5, help="of the chosen setting and of untuned ones")
    parser.add_argument(
        "--images", type=pathlib.Path, metavar="DIR", help="CIFAR-10/100's files, or ImageWoof's folder"
    )
    parser.add_argument("--image-steps", type=int, default=2000, help="on those images, a multiple of ten")
    parser.add_argument(
        "--defaults-alone", action="store_true", help="train untuned settings again where there is a record"
    )
    parser.add_argument("--records", type=pathlib.Path, metavar="FOLDER", default=RECORDS, help="(%(default)s)")
    options = parser.parse_args(arguments)
    tasks = dict(TASKS)
    if options.images is not None:
        tasks |= {f"images_{name}": image_task(options.images, name, options.image_steps) for name in IMAGE_NETWORKS}
    options.task = list(tasks) if options.task is None else options.task
    if missing := [name for name in options.task if name not in tasks]:
        parser.error(f"--images must name a folder of images for {' '.join(missing)}")
    if ABSENT:
        progress.console.print(f"absent, for want of an optional package or a newer Optax: {', '.join(ABSENT)}")
    with progress.progress_bar() as bar:
        run_suite(tasks, options, bar)


if __name__ == "__main__":
    main()
