"""Regular expressions that select parameters by their key paths."""

import collections
import difflib
import re
from collections.abc import Iterable

_WORDS = "|".join(
    [
        "(?:un)?emb(?:ed(?:ding|der)?)?s?",
        "wte",
        "wpe",
        "pos",
        "positions?(?![_-]?wise)",
        "logits",
        "vocabs?",
        "tokens?(?![_-]?mix)",
        # The last word of a component: a number may follow, another word may not.
        r"(?<!multi)(?<!multi[_-])head(?=[\d_\[\]-]*(?:[/.]|$))",
    ]
)
# A word starts after a character that is not a letter, or with a capital followed by a small letter. The next character
# is not a small letter, nor a capital if the word ends with one.
EMBEDDINGS = rf"(?:(?<![A-Za-z])|(?=[A-Z][a-z]))(?i:{_WORDS})(?![a-z]|(?<=[A-Z])[A-Z])"
"""A regular expression for the key paths of embeddings, position tables and output heads.

It matches these words in the spelling of any framework: emb, embed, embedding, embedder, unembed, wte, wpe, pos,
position, head, logits, vocab, token, most of them with a plural s. They are found in `embed_tokens`,
`tok_embeddings`, `Embed_0`, `posEmbed`, `LMHead` and `transformer.wte.weight`, but not in `header`, `overhead` or
`positive`. A head must be the last word of a path's component, as in `lm_head` and `classifier_head_0`, so `heads`,
`attention_head_proj`, `MultiHeadAttention` and `multi_head` do not match. Nor do `token_mixing` and `position_wise`.
Extend the pattern with `|`: `rf.EMBEDDINGS + "|^router/"`.
"""


def plain_paths(paths: Iterable[str], *, prefix: str = "params/") -> dict[str, str]:
    """Returns each key path as patterns and callables see it, the same in every framework.

    Drops a leading `prefix`, and a trailing '/value', '/array' or '/0' with nothing beside it: the box of
    `nnx.Variable` or `nn.Partitioned`, or one that names no keys, such as Haliax's `NamedArray`. If that would make two
    paths equal, all paths stay as they are.
    """
    names = {path: path.removeprefix(prefix) for path in paths}
    below = collections.Counter(name[: slash.start()] for name in names.values() for slash in re.finditer("/", name))
    for path, name in names.items():
        while name.endswith(("/value", "/array", "/0")) and below[name[: name.rindex("/")]] == 1:
            name = name[: name.rindex("/")]
        names[path] = name
    return names if len(set(names.values())) == len(names) else {path: path for path in names}


def require_expression(name: str, pattern: str) -> None:
    """Raises a ValueError if `pattern` is not a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} must be a regular expression, got {pattern!r}: {error}.") from None


def require_match(name: str, pattern: str, paths: Iterable[str]) -> None:
    """Raises a ValueError with the nearest key paths if `pattern` matches none of the paths, unless there are none.

    An optimizer may be given no parameters, for example by `optax.partition`.
    """
    paths = list(paths)
    if paths and not any(re.search(pattern, path) for path in paths):
        nearest = ", ".join(map(repr, difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)))
        raise ValueError(
            f"{name} must match the key path of a parameter, got {pattern!r}. The nearest key paths are {nearest}."
        )
