"""Trains a decoder, or a convolutional network, by every method, at any size, batch and horizon: table, figure, JSON.

    python benchmarks/ladder.py                                   # 0.2 million parameters, 20 bytes per parameter
    python benchmarks/ladder.py --size 0.6M --steps 500 --methods adamw muon:rms=0.2/0.4 sirf_muon --seeds 3
    python benchmarks/ladder.py --size 0.2M --batch 8192 --tokens-per-parameter 40
    python benchmarks/ladder.py --methods adamw:lr=3e-3 "sirf_muon:power=0.125,damping=0.01/0.1,lr=3e-3"
    python benchmarks/ladder.py --size conv --methods adamw sirf_muon:merge=9 --learning-rates 1e-3 3e-3
    python benchmarks/ladder.py --size 33M --steps 600 --text tokens.npz --learning-rates 3e-3       # on a GPU
    python benchmarks/ladder.py --probe --steps 1000 --methods adamw muon sirf_muon     # compares directions alone

Text is the .py files of this environment's packages, or the C files of a folder or an archive, such as that of Debian's
package `linux-source-6.1`: `--text /usr/src/linux-source-6.1.tar.xz`. Validation files are no training files.

Learning rates, seeds and options with several values train side by side in one program for each method. The same
batches and first parameters serve every method, so compare methods seed by seed. Where text is seen less than once, the
training loss of the run's last tenth decides; for images the validation loss does.

On processors the sizes to 3M are sensible: a run of 0.2M takes some minutes of one core, one of 0.6M at 20 tokens per
parameter half an hour. A baseline's best rate at the edge of the grid asks for a wider grid.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from harness import machine
from harness.report import table, write_json
from ladder import data, probe, report
from ladder.methods import parse
from ladder.models import MODELS, Decoder, Model
from ladder.train import PIECES, Program, Task
from rich.console import Console
from rich.progress import Progress

METHODS = ("adamw", "muon:rms=0.2/0.4", "sirf_muon", "sirf_shampoo", "kl_shampoo", "rf_adamw", "rf_rmsprop")


def make_task(options: argparse.Namespace) -> tuple[Task, dict[str, Any]]:
    """Returns what is trained, and its description for the record."""
    model: Model = MODELS[options.size]
    if isinstance(model, Decoder):
        text = data.read_text(options.text)
        model = dataclasses.replace(model, vocabulary=text.vocabulary)
        train, valid, source, examples = text.train, text.valid, text.source, len(text.train)
    else:
        train, valid = data.read_images(options.images)
        source, examples = "Fashion-MNIST", len(train.labels)
    batch = options.batch or model.batch
    steps = options.steps or round(options.tokens_per_parameter * model.hidden_size / batch)
    steps = PIECES * max(1, round(steps / PIECES))
    on_device = lambda tree: jax.tree.map(jnp.asarray, tree)
    task = Task(model, on_device(train), model.validation(valid, batch), steps, batch, options.weight_decay)
    sizes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    settings = {
        "size": options.size,
        "parameters": sum(leaf.size for leaf in sizes),
        "hidden_parameters": model.hidden_size,
        "steps": steps,
        "batch": batch,
        "tokens_per_hidden_parameter": steps * batch / model.hidden_size,
        "passes": (passes := steps * batch / examples),
        # The training loss of data that is seen once is of unseen data, and of more of it than a validation set has.
        "decisive_loss": "train_loss" if passes < 1 else "valid_loss",
        "seeds": options.seeds,
        "weight_decay": options.weight_decay,
        "data": source,
        "float32_products": jax.config.jax_default_matmul_precision or "the backend's default",
        "arguments": " ".join(sys.argv[1:]),
    }
    return task, settings


def run(options: argparse.Namespace, console: Console) -> None:
    """Trains, prints the table, writes record and figure; both are written anew after each method."""
    task, settings = make_task(options)
    description = machine.describe()
    name = options.name or f"{options.size}_{task.batch}x{task.steps}"
    title = "{size}, {steps} steps of {batch}, {data}".format(**settings)
    results = []
    with Progress(console=console, transient=True) as progress:
        for method in map(parse, options.methods):
            bar = progress.add_task(f"{method.spelling}: compiling", total=PIECES)
            program = Program(task, method, tuple(options.learning_rates), options.seeds)
            progress.update(bar, description=method.spelling)
            results.append(program.train(lambda: progress.advance(bar)))  # noqa: B023  # called within the loop alone
            progress.remove_task(bar)
            records = report.summarize(results, settings["decisive_loss"])
            path = options.output / f"{name}.json"
            write_json(path, machine=description, settings=settings, records=records)
            report.draw(options.output / f"{name}.png", title, settings, records)
    caption = report.CAPTION.format(**settings) + "\n" + machine.summary(description)
    Console().print(table(title, caption, report.COLUMNS, records))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the ladder, or the probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.2M", choices=MODELS, help="of the model (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="such as muon:rms=0.2/0.4")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1.5e-3, 3e-3, 6e-3], metavar="RATE")
    parser.add_argument("--seeds", type=int, default=1, help="how many (%(default)s)")
    parser.add_argument("--batch", type=int, help="tokens or images of a step (the size's own)")
    parser.add_argument("--tokens-per-parameter", type=float, default=20.0, help="of hidden layers (%(default)s)")
    parser.add_argument("--steps", type=int, help="instead of tokens per parameter; rounded to a multiple of 40")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of every method (%(default)s)")
    parser.add_argument("--text", type=pathlib.Path, help="folder or archive of C files, or .npz file of tokens")
    parser.add_argument(
        "--images", type=pathlib.Path, default=data.IMAGES, help="folder of Fashion-MNIST (%(default)s)"
    )
    default_output = pathlib.Path(__file__).parent / "ladder" / "records"
    parser.add_argument("--output", type=pathlib.Path, default=default_output, help="folder (ladder/records)")
    parser.add_argument("--name", help="of record and figure (size, batch and steps)")
    parser.add_argument("--probe", action="store_true", help="compare directions along the first method's run")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        for spelling in options.methods:
            parse(spelling)
        if options.probe:
            probe.run(*make_task(options), options)
        else:
            run(options, console)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
