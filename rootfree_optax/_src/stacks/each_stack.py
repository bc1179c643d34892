"""Functions of one block, mapped over whole stacks: their arrays have a leading axis of blocks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rootfree_optax._src.layout.stack import Stack

Stacks = Any  # a tuple over the stacks of a plan
Given = Stacks | Callable[[], Stacks]  # or what makes it where it is needed


def made(given: Given) -> Stacks:
    """Returns the stacks that are given, or made here."""
    return given() if callable(given) else given


def each_stack(
    function: Callable[..., tuple[Any, ...]], stacks: Sequence[Stack], inputs: Sequence[Any], state: tuple[Stacks, ...]
) -> tuple[Stacks, ...]:
    """Returns the state that a function of (stack, its input, its state) makes of each stack's.

    Args:
      function: returns a new state for one stack.
      stacks: the stacks.
      inputs: one per stack.
      state: tuples over the stacks, or empty, and then passed for each stack and returned as that.
    """
    filled = [of_stacks or ((),) * len(stacks) for of_stacks in state]
    each = [function(stack, given, tuple(old)) for stack, given, *old in zip(stacks, inputs, *filled, strict=True)]
    new = zip(*each, strict=True)
    return tuple(of_stacks and tuple(result) for of_stacks, result in zip(state, new, strict=True))


def of_stack(block_function: Any, stack: Stack) -> Callable[..., Any]:
    """Returns what a function of one block, as `as_tree` takes it apart, does for a whole stack."""
    function, arguments, keywords = block_function
    return jax.vmap(functools.partial(function, *arguments, structures=stack.structures, **keywords))


def as_tree(function: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Returns a function, its bound arguments and its bound keywords."""
    if isinstance(function, functools.partial):
        return function.func, function.args, function.keywords
    return function, (), {}
