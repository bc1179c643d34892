"""What a state belongs to: the options and the parameters that it was made for.

A state that meets another optimizer or other parameters must not train. So it says twice what it belongs to. Once as
static data, a part of its tree's structure, which is compared whenever an update is called or traced. And once as an
array, because that is what a checkpoint keeps: restored into a template, the static data are the template's. The array
is compared where its values are known; where they are traced, a wrong one makes updates NaN.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common import trees
from rootfree_optax._src.layout.paths import plain_paths
from rootfree_optax._src.mesh.state_shardings import sharding_beside

FORMAT = 1  # of the states of this version; a change of what a state means takes the next number
_DIGEST, _LENGTH = 8, 1024  # bytes: of the digest; the array's are a multiple, so that few changes change its shape
_SHOWN = 4  # how many differences a message names
# What an option of a layout is called in a message, where another one may be the cause.
_ASPECTS = {"structure": "structure (or max_dense_dim)", "diagonal": "diagonal (no factors)"}


class _Code(NamedTuple):
    code: jax.Array


class Origin(_Code):
    """What a state belongs to.

    Its one field is its one leaf, as `optax.tree.set` and flax's serialization ask of named tuples.

    Attributes:
      code: the text as an array of bytes: eight of a digest, the others compressed. They are stored as integers of four
        bytes, so that sums and averages of states keep them.
      text: JSON of the state's format, and of the options and parameters that it was made for. Static.
    """

    text: str

    def __new__(cls, code: jax.Array, text: str | None = None) -> "Origin":
        """Returns an origin; without a text, which flax's serialization does not keep, that of the code."""
        if text is None and (text := _decode(code)) is None:
            raise ValueError(_explain(None, ""))
        origin = super().__new__(cls, code)
        origin.text = text
        return origin

    def _replace(self, **changes: Any) -> "Origin":
        """Returns an origin with another code, and the same text."""
        return Origin(changes.get("code", self.code), self.text)

    def __repr__(self) -> str:
        """Returns a short representation: the text has a line for each parameter."""
        return f"Origin({_digest(self.text).hex()})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Text:
    """The static part of an `Origin`, with a short representation, for messages that show the structure of trees."""

    text: str

    def __repr__(self) -> str:
        return _digest(self.text).hex()


def _unflatten(static: _Text, children: Iterable[Any]) -> Origin:
    [code] = children
    return Origin(code, static.text)


jax.tree_util.register_pytree_with_keys(
    Origin,
    lambda origin: (((jax.tree_util.GetAttrKey("code"), origin.code),), _Text(origin.text)),
    _unflatten,
)


def describe_origin(options: Mapping[str, Any], parameters: str) -> str:
    """Returns the text of an `Origin`; nothing for a state without parameters, which fits everywhere.

    Args:
      options: those that change what a state means, by name: texts, numbers, Booleans and None.
      parameters: a JSON object with a key for each parameter.
    """
    if parameters == "{}":
        return ""
    return f'{{"format": {FORMAT}, "options": {json.dumps(options)}, "parameters": {parameters}}}'


def describe_tree(options: Mapping[str, Any], tree: Any) -> str:
    """Returns the text of an `Origin` for a state that is a tree like the parameters, which tells their shapes."""
    paths = [path for path, leaf in trees.named_leaves(tree).items() if leaf is not None]
    return describe_origin(options, json.dumps({path: {} for path in plain_paths(paths, prefix="").values()}))


def dtype_name(dtype: DTypeLike | None) -> str | None:
    """Returns a dtype's name."""
    return None if dtype is None else jnp.dtype(dtype).name


def make_origin(text: str, params: Any) -> Origin | jax.Array:
    """Returns an origin, beside the parameters; an empty array for no text.

    `optax.tree.map_params` initialises on a tree without parameters, and takes a leaf of that for one that stands for
    all that a real state has in its place.
    """
    if not text:
        return jnp.zeros([0], jnp.uint8)
    content = _digest(text) + zlib.compress(text.encode())
    padded = content.ljust(-(-len(content) // _LENGTH) * _LENGTH, b"\0")
    code = np.frombuffer(padded, np.uint8).astype(np.int32)
    return Origin(jnp.asarray(code, device=sharding_beside(params)), text)


def require_origin(origin: Any, text: str) -> jax.Array | None:
    """Checks that a state belongs to what a text describes.

    Args:
      origin: the state's.
      text: of what the state is used for.

    Returns:
      None where that is certain; where the code is traced, a scalar that tells whether it is the text's.

    Raises:
      ValueError: if the state belongs to something else. The message names what differs.
    """
    found = origin.text if isinstance(origin, Origin) else ""
    if found != text:
        raise ValueError(_explain(found, text))
    if not text:
        return None
    [code] = jax.tree.leaves(origin.code)  # frameworks wrap arrays in classes of their own
    own = np.frombuffer(_digest(text), np.uint8).astype(np.float32)
    if isinstance(code, jax.core.Tracer) or not _is_readable(code):
        return jnp.all(jnp.abs(jax.lax.slice_in_dim(code, 0, _DIGEST).astype(jnp.float32) - own) < 0.5)
    for row in np.asarray(code).reshape(-1, code.shape[-1]):  # of a population, one for each member
        if not np.array_equal(np.rint(row[:_DIGEST]), own):
            raise ValueError(_explain(_decode(row), text))
    return None


def nan_unless(is_own: jax.Array | None, number: Any) -> ArrayLike:
    """Returns a number or an array, or NaN where a state turns out to belong to something else."""
    return number if is_own is None else jnp.where(is_own, number, jnp.nan)


def is_of(origin: Any, parameters: str) -> bool:
    """Returns whether a state was made for the parameters that a JSON object describes, see `describe_origin`."""
    return isinstance(origin, Origin) and origin.text.endswith(f'"parameters": {parameters}}}')


def find_origins(tree: Any) -> Iterator[Origin]:
    """Yields all origins in a tree, in order."""
    is_origin = lambda node: isinstance(node, Origin)
    return (node for node in jax.tree.leaves(tree, is_leaf=is_origin) if is_origin(node))


def _is_readable(code: Any) -> bool:
    return not isinstance(code, jax.Array) or code.is_fully_addressable or code.is_fully_replicated


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()


def _decode(code: Any) -> str | None:
    """Returns the text of a code, or None if it is damaged."""
    content = np.rint(np.asarray(code)).astype(np.uint8).tobytes()
    try:
        text = zlib.decompressobj().decompress(content[_DIGEST:]).decode()
    except (zlib.error, UnicodeDecodeError):
        return None
    return text if _digest(text) == content[:_DIGEST] else None


def _explain(found: str | None, wanted: str) -> str:
    """Returns the message for a state that belongs to something else.

    Args:
      found: what the state belongs to, or None for a damaged code.
      wanted: what it is used for.
    """
    if found is None:
        return (
            "the state's `origin`, which says what it belongs to, is unreadable: the checkpoint is damaged, or was not "
            "restored to its own shapes. Restore another checkpoint, or start from tx.init(params)."
        )
    nothing = {"format": FORMAT, "options": {}, "parameters": {}}
    old, new = (json.loads(text) if text else nothing for text in (found, wanted))
    if old["format"] != FORMAT:
        return (
            f"the state has format {old['format']}, and this version of rootfree_optax reads format {FORMAT}. Update "
            "with the version that saved it, or start from tx.init(params)."
        )
    differences = list(_differences(old, new))
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return (
        "the state must come from init of an optimizer with these options, for these parameters, but "
        f"{'; '.join(differences[:_SHOWN])}{more}. Go back to those, carry over what still fits with "
        "rf.migrate(state, tx, params), or start from tx.init(params)."
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yields what differs between two origins, in words."""
    before, after = old["parameters"], new["parameters"]
    if before and after:
        for name, was, now in _changes(old["options"], new["options"]):
            yield f"{name} was {was!r} and is {now!r}"
    yield from (f"{path!r} is no longer a parameter" for path in before if path not in after)
    yield from (f"{path!r} is new" for path in after if path not in before)
    for path in after:
        for name, was, now in list(_changes(before.get(path, {}), after[path]))[:1] if path in before else ():
            yield f"{_ASPECTS.get(name, name)} of {path!r} was {was!r} and is {now!r}"
    if before.keys() == after.keys() and [*before] != [*after]:
        yield "the order of the parameters has changed"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the names whose values differ, with both values."""
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)
