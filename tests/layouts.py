"""Layouts for tests: every parameter has factors over whole axes, unless a test says otherwise."""

from typing import Any

import rootfree_optax as rf


def whole(structure: Any = None, **options: Any) -> rf.Layout:
    """Returns a layout that neither leaves parameters out nor cuts or merges axes, but for what the options say."""
    return rf.Layout(structure, **{"diagonal": None, "block_size": None, "merge_dims": None, **options})
