"""The characters of the Python standard library's sources: every installation of Python carries them."""

import pathlib
import sysconfig
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # any other character counts as one more
VOCABULARY = len(ALPHABET) + 1
# Tests, tables of encodings and generated texts repeat themselves; what else is installed is no part of the library.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
VALIDATION_FILES = 10  # one file in this many
VALIDATION_SEQUENCES = 1024


class Corpus(NamedTuple):
    """Text to train on, uint8[characters], and validation sequences, uint8[n, sequence + 1]."""

    train: jax.Array
    validation: jax.Array


def load(sequence: int, validation_sequences: int = VALIDATION_SEQUENCES) -> Corpus:
    """Returns the corpus of the running Python, split by file."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts):
            is_validation = zlib.crc32(name.as_posix().encode()) % VALIDATION_FILES == 0
            texts[is_validation].append(encode(path.read_text(encoding="utf-8", errors="replace")))
    train, validation = (np.concatenate(parts) for parts in texts)
    starts = np.linspace(0, len(validation) - sequence - 1, validation_sequences).astype(int)
    sequences = validation[starts[:, np.newaxis] + np.arange(sequence + 1)]
    return Corpus(jnp.asarray(train), jnp.asarray(sequences))


def encode(text: str) -> np.ndarray:
    """Returns each character's index in the alphabet, uint8[characters]."""
    table = np.full(128, len(ALPHABET), np.uint8)
    table[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    return table[np.frombuffer(text.encode("ascii", errors="replace").replace(b"\0", b"?"), np.uint8)]
