"""Images from a folder: CIFAR-10/100's files, or pictures as ImageWoof has them.

Everything is kept in memory, as float32 of shape [n, height, width, channels] with mean zero and variance one.
"""

import pathlib
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from digits.data import ImageData, standardize
from PIL import Image

SPLIT_SEED = 0
CIFAR_SHAPE = (3, 32, 32)
CIFAR_PIXELS = 3 * 32 * 32
PICTURE_FOLDERS = ("train", "val")  # as ImageWoof has them, with one folder per class in each


Arrays = tuple[np.ndarray, np.ndarray]  # images and labels


def load(directory: pathlib.Path, train_size: int | None = None) -> ImageData:
    """Returns the CIFAR data or the pictures in `directory`; `train_size` limits the images to train on."""
    if all((directory / part).is_dir() for part in PICTURE_FOLDERS):
        return load_pictures(directory, train_size)
    return load_cifar(directory, train_size)


def load_cifar(directory: pathlib.Path, train_size: int | None = None) -> ImageData:
    """Returns CIFAR-10 or CIFAR-100 from a folder with the files of its public Python or binary archive.

    A tenth of the training images, drawn once and for all, is the validation split. CIFAR-100 has its fine labels.

    Raises:
      FileNotFoundError: if the folder holds the files of none of the four archives.
    """
    complete = [layout for layout in CIFAR_LAYOUTS if all((directory / file).is_file() for file in layout.files)]
    if not complete:
        expected = " or ".join(", ".join(layout.files) for layout in CIFAR_LAYOUTS)
        raise FileNotFoundError(f"{directory} must hold all files of a CIFAR archive: {expected}.")
    name, classes, (*train_files, test_file), read = complete[0]
    batches = [read(directory / file) for file in train_files]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return _with_validation(name, classes, (images, labels), read(directory / test_file), train_size)


def load_pictures(directory: pathlib.Path, train_size: int | None = None, size: int = 32) -> ImageData:
    """Returns pictures from train/CLASS/ and val/CLASS/, cut to their middle square and scaled to `size` pixels.

    What is in val/ is the test split; a tenth of train/, drawn once and for all, is the validation split.
    """
    classes = sorted(path.name for path in (directory / "train").iterdir() if path.is_dir())

    def read(part: str) -> Arrays:
        paths = [(path, label) for label, name in enumerate(classes) for path in (directory / part / name).iterdir()]
        images = np.stack([_middle_square(path, size) for path, _ in sorted(paths)])
        return images, np.array([label for _, label in sorted(paths)])

    return _with_validation(directory.name, len(classes), *(read(part) for part in PICTURE_FOLDERS), train_size)


def _with_validation(name: str, classes: int, training: Arrays, test: Arrays, train_size: int | None) -> ImageData:
    images, labels = training
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    validation, train = np.split(order, [len(images) // 10])
    train = train[:train_size]
    return standardize(name, classes, [(images[train], labels[train]), (images[validation], labels[validation]), test])


def _middle_square(path: pathlib.Path, size: int) -> np.ndarray:
    with Image.open(path) as picture:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what the CIFAR files hold, NumPy arrays in plain containers, and nothing that could run other code."""

    admitted: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"A CIFAR file holds only NumPy arrays, got {module}.{name}.")
        return self.admitted[module, name]


def _to_images(rows: np.ndarray) -> np.ndarray:
    """Returns [n, 32, 32, 3] images of [n, 3072] rows that hold one colour plane after the other."""
    return np.moveaxis(rows.reshape(-1, *CIFAR_SHAPE), 1, -1)


def _read_pickle(label_key: bytes) -> Callable[[pathlib.Path], Arrays]:
    def read(path: pathlib.Path) -> Arrays:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()  # written by Python 2
        return _to_images(batch[b"data"]), np.asarray(batch[label_key])

    return read


def _read_binary(label_bytes: int) -> Callable[[pathlib.Path], Arrays]:
    def read(path: pathlib.Path) -> Arrays:
        content = np.fromfile(path, np.uint8)
        if content.size % (label_bytes + CIFAR_PIXELS):
            raise ValueError(f"{path} must hold records of {label_bytes} + {CIFAR_PIXELS} bytes, got {content.size}.")
        records = content.reshape(-1, label_bytes + CIFAR_PIXELS)
        return _to_images(records[:, label_bytes:]), records[:, label_bytes - 1]  # the fine label comes last

    return read


class _Layout(NamedTuple):
    """One of the public archives: its files, the test images last, and how to read one."""

    name: str
    classes: int
    files: tuple[str, ...]
    read: Callable[[pathlib.Path], Arrays]


_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR_LAYOUTS = (
    _Layout("cifar10", 10, _CIFAR10, _read_pickle(b"labels")),
    _Layout("cifar10", 10, tuple(f"{file}.bin" for file in _CIFAR10), _read_binary(label_bytes=1)),
    _Layout("cifar100", 100, ("train", "test"), _read_pickle(b"fine_labels")),
    _Layout("cifar100", 100, ("train.bin", "test.bin"), _read_binary(label_bytes=2)),
)
