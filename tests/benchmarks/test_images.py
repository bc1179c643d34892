"""CIFAR files are read that are laid out byte by byte as the public archives are, and folders of pictures."""

import pathlib
import pickle
import struct
from collections.abc import Callable
from typing import Any

import images
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.research


def python2_string(text: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(text)) + text


def python2_integers(values: list[int]) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def python2_rows(rows: np.ndarray) -> bytes:
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in rows.shape) + b"t"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2_string(rows.tobytes()) + b"tb"


def python2_pickle(entries: dict[bytes, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(python2_string(key) + value for key, value in entries.items()) + b"u."


Writer = Callable[[pathlib.Path, np.ndarray, np.ndarray], None]


def write_cifar10_pickle(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    entries = {b"batch_label": python2_string(b"a batch"), b"labels": python2_integers(labels.tolist())}
    path.write_bytes(python2_pickle(entries | {b"data": python2_rows(rows)}))


def write_cifar100_pickle(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    entries = {b"coarse_labels": python2_integers((labels // 5).tolist()), b"data": python2_rows(rows)}
    path.write_bytes(python2_pickle(entries | {b"fine_labels": python2_integers(labels.tolist())}))


def write_cifar10_binary(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    path.with_suffix(".bin").write_bytes(np.column_stack([labels, rows]).tobytes())


def write_cifar100_binary(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    path.with_suffix(".bin").write_bytes(np.column_stack([labels // 5, labels, rows]).tobytes())


CIFAR10_FILES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
ARCHIVES: dict[str, tuple[Writer, list[str], int]] = {
    "cifar10_pickle": (write_cifar10_pickle, CIFAR10_FILES, 10),
    "cifar10_binary": (write_cifar10_binary, CIFAR10_FILES, 10),
    "cifar100_pickle": (write_cifar100_pickle, ["train", "test"], 100),
    "cifar100_binary": (write_cifar100_binary, ["train", "test"], 100),
}


def write_archive(directory: pathlib.Path, archive: str, images_per_file: int) -> dict[str, tuple[Any, Any]]:
    """Writes random images into all files of an archive; returns the images as [n, channel, row, column] and labels."""
    write, files, classes = ARCHIVES[archive]
    rng = np.random.default_rng(0)
    written = {}
    for file in files:
        rows = rng.integers(0, 256, (images_per_file, 3072), np.uint8)
        labels = rng.integers(0, classes, images_per_file, np.uint8)
        write(directory / file, rows, labels)
        written[file] = rows.reshape(-1, 3, 32, 32), labels
    return written


@pytest.mark.parametrize("archive", ARCHIVES)
def test_reads_cifar(archive: str, tmp_path: pathlib.Path) -> None:
    written = write_archive(tmp_path, archive, images_per_file=10)
    data = images.load(tmp_path)
    classes = ARCHIVES[archive][2]
    assert (data.name, data.classes) == (f"cifar{classes}", classes)
    test_images, test_labels = written.popitem()[1]
    np.testing.assert_array_equal(data.test.labels, test_labels)
    train_count = 9 * len(written)
    assert (data.train.images.shape, data.validation.images.shape) == (
        (train_count, 32, 32, 3),
        (len(written), 32, 32, 3),
    )
    np.testing.assert_allclose(data.train.images.mean((0, 1, 2)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(data.train.images.std((0, 1, 2)), np.ones(3), atol=1e-5)

    found = (
        np.concatenate([data.train.images, data.validation.images]),
        np.concatenate([data.train.labels, data.validation.labels]),
    )
    pixels = np.empty(found[0].shape, np.uint8)
    for channel in range(3):
        standardized = np.asarray(data.test.images[..., channel])
        slope, offset = np.polyfit(standardized.ravel(), test_images[:, channel].ravel(), 1)
        np.testing.assert_allclose(slope * standardized + offset, test_images[:, channel], atol=0.01)
        pixels[..., channel] = np.rint(slope * found[0][..., channel] + offset)
    expected = {
        (int(y), x.transpose(1, 2, 0).tobytes()) for xs, ys in written.values() for x, y in zip(xs, ys, strict=True)
    }
    assert {(int(y), x.tobytes()) for x, y in zip(pixels, found[1], strict=True)} == expected


def test_refuses_a_pickle_that_runs_code_and_incomplete_archives(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path, "cifar10_pickle", images_per_file=2)
    (tmp_path / "data_batch_3").write_bytes(b"\x80\x02cos\nsystem\n(U\x04truetR.")
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        images.load(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        images.load(tmp_path)
    write_archive(tmp_path, "cifar10_binary", images_per_file=2)
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x00" * 3074)
    with pytest.raises(ValueError, match=r"records of 1 \+ 3072 bytes, got 3074"):
        images.load(tmp_path)


def test_reads_a_folder_of_pictures(tmp_path: pathlib.Path) -> None:
    for part in ("train", "val"):
        for label, color in enumerate([(255, 90, 0), (0, 80, 255)]):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(5):
                Image.new("RGB", (40 + index, 50), color).save(folder / f"{index}.png")
    data = images.load(tmp_path)
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [9, 1, 10]
    assert data.test.images.shape == (10, 32, 32, 3)
    red, blue = (data.test.images[data.test.labels == label] for label in range(2))
    assert (red[..., 0] > blue[..., 0]).all()
