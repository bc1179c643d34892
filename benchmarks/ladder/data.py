"""What the ladder trains on: real text, split by file, and Fashion-MNIST's images.

Debian's package `linux-source-6.1` has 300 MB of C, `dataset-fashion-mnist` all 70,000 images.
"""

import gzip
import hashlib
import pathlib
import sysconfig
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

IMAGES = pathlib.Path("/usr/share/datasets/fashion-mnist")
VALIDATION_BYTES = 500_000
_LARGEST_TRAINING = 100_000_000
_LARGEST_FILE = 50_000  # so that no file is more than a tenth of the validation set
_PART_HELD_BACK = 1 / 20


class Text(NamedTuple):
    """Tokens for training and, of other files, for validation.

    Attributes:
      train: integers, [tokens].
      valid: integers, [tokens].
      vocabulary: above every token.
      source: where it comes from, in words.
    """

    train: np.ndarray
    valid: np.ndarray
    vocabulary: int
    source: str


def read_text(path: pathlib.Path | None = None) -> Text:
    """Returns the bytes of source files, in an order that depends on their names alone.

    Args:
      path: a folder or an archive, of which the C files are read, such as /usr/src/linux-source-6.1.tar.xz; or an .npz
        file that holds `train`, `valid` and `vocabulary`, for tokens that were made elsewhere. None: the .py files of
        the packages of this environment.

    Raises:
      ValueError: for less text than a validation set needs.
    """
    if path is not None and path.suffix == ".npz":
        with np.load(path) as arrays:
            return Text(arrays["train"], arrays["valid"], int(arrays["vocabulary"]), path.name)
    folder = pathlib.Path(sysconfig.get_paths()["purelib"])
    files = _files(folder, ".py") if path is None else _files(path, ".c")
    source = "the .py files of the environment's packages" if path is None else f"the .c files of {path.name}"
    train, valid, sizes = [], [], [0, 0]
    for position, text in sorted((_position(name), text) for name, text in files):
        held_back = position < _PART_HELD_BACK
        limit = VALIDATION_BYTES if held_back else _LARGEST_TRAINING
        if sizes[held_back] < limit:
            (valid if held_back else train).append(text)
            sizes[held_back] += len(text)
    if sizes[True] < VALIDATION_BYTES // 2:
        raise ValueError(
            f"text must have at least {VALIDATION_BYTES // 2:,} bytes to hold back for validation, got {sizes[True]:,} "
            f"of {source}. Give a larger folder."
        )
    join = lambda texts: np.frombuffer(b"".join(texts), np.uint8)
    return Text(join(train), join(valid), 256, source)


def _position(name: str) -> float:
    """Returns a number in [0, 1) that only the file's name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def _files(path: pathlib.Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields names, relative to the folder or archive, and the beginnings of the files."""
    if path.is_dir():
        for file in path.rglob(f"*{suffix}"):
            if file.is_file():
                with file.open("rb") as opened:
                    yield file.relative_to(path).as_posix(), opened.read(_LARGEST_FILE)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(suffix) and (opened := archive.extractfile(member)) is not None:
                yield member.name.partition("/")[2], opened.read(_LARGEST_FILE)


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
      pixels: [images, 28, 28] in [0, 255], uint8.
      labels: [images] in [0, 10), uint8.
    """

    pixels: np.ndarray
    labels: np.ndarray


def read_images(folder: pathlib.Path = IMAGES) -> tuple[Images, Images]:
    """Returns Fashion-MNIST's 60,000 images for training and 10,000 for validation.

    Raises:
      FileNotFoundError: if they are not installed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the convolutional rung needs Fashion-MNIST in {folder}. Install Debian's package dataset-fashion-mnist "
            "(`apt-get install dataset-fashion-mnist`), or give the folder of its four .gz files by --images."
        )

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)

    def images(part: str) -> Images:
        pixels = read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        return Images(pixels, read(f"{part}-labels-idx1-ubyte.gz", 8))

    return images("train"), images("t10k")
