"""Regular expressions that select parameters by their key paths."""

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
        # The last word of a component: what follows may be a number, but no other word.
        r"(?<!multi)(?<!multi[_-])head(?=[\d_\[\]-]*(?:[/.]|$))",
    ]
)
# A word begins after anything but a letter, or with a capital before a small letter. It ends before anything but a
# small letter, and after a capital before anything but a letter.
EMBEDDINGS = rf"(?:(?<![A-Za-z])|(?=[A-Z][a-z]))(?i:{_WORDS})(?![a-z]|(?<=[A-Z])[A-Z])"
"""A regular expression for the key paths of embeddings, position tables and output heads.

It finds embed, embedding, embedder, unembed, emb, wte, wpe, pos, position, head, logits, vocab and token, most of them
with a plural s, as whole words of a path in the spelling of any framework: in `embed_tokens`, `tok_embeddings`,
`Embed_0`, `posEmbed`, `LMHead`, `transformer.wte.weight`, but not in `header`, `overhead` or `positive`. A head counts
only as the last word of a path's component, as in `lm_head` and `classifier_head_0`, so that `heads`,
`attention_head_proj`, `MultiHeadAttention` and `multi_head` are hidden layers, as are `token_mixing` and
`position_wise`. Extend it with `|`, as in `rf.EMBEDDINGS + "|^router/"`.
"""


def require_expression(name: str, pattern: str) -> None:
    """Raises a ValueError if `pattern` is not a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} must be a regular expression, got {pattern!r}: {error}.") from None


def require_match(name: str, pattern: str, paths: Iterable[str]) -> None:
    """Raises a ValueError that names the nearest key paths if `pattern` is found in none of some paths.

    A tree without parameters is no error: an optimizer may have been given none of the parameters of a model.
    """
    paths = list(paths)
    if paths and not any(re.search(pattern, path) for path in paths):
        raise ValueError(f"{name} must match the key path of a parameter, got {pattern!r}. {nearest(pattern, paths)}")


def nearest(text: str, paths: Iterable[str]) -> str:
    """Returns a sentence that names the key paths nearest to a text."""
    found = difflib.get_close_matches(text, list(paths), n=3, cutoff=0.0)
    return f"The nearest key paths are {', '.join(map(repr, found))}."
