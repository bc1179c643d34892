"""A step function compiled ahead of time, and what its program costs before it ever runs."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step and the cost of its program.

    Attributes:
      run: carry -> carry. The carry is donated: the old one must not be used again.
      compile_seconds: time of tracing, lowering and compiling.
      compile_process_seconds: the CPU time of the same, over all threads; other work on the machine changes it less.
      stablehlo_lines: length of the traced program, which grows with what is traced and not with the arrays' sizes.
      bytes_accessed: bytes that the compiled program reads and writes, by the compiler's own count. A step of an
        elementwise optimizer takes as long as these take to move, so this is its speed free of a machine's noise. None
        where the backend cannot say.
      temporary_bytes: memory that the step needs besides its inputs and outputs, None where the backend cannot say.
    """

    run: Callable[[Any], Any]
    compile_seconds: float
    compile_process_seconds: float
    stablehlo_lines: int
    bytes_accessed: int | None
    temporary_bytes: int | None

    def cost(self) -> dict[str, float | None]:
        """Returns the costs by name, ready for a record."""
        return {name: value for name, value in vars(self).items() if name != "run"}


def compile_step(step: Callable[..., Any], carry: Any, *constants: Any) -> Program:
    """Compiles `step(carry, *constants) -> carry` with the carry donated.

    Args:
      step: a traceable function that returns a carry of the same shapes and dtypes.
      carry: what is donated, as arrays or `jax.ShapeDtypeStruct`s.
      *constants: arrays that every call receives, not donated (the gradients, for one).
    """
    start, process_start = time.perf_counter(), time.process_time()
    lowered = jax.jit(step, donate_argnums=0).lower(carry, *constants)
    compiled = lowered.compile()
    process_seconds, seconds = time.process_time() - process_start, time.perf_counter() - start
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    accessed = None if cost is None else cost.get("bytes accessed")
    return Program(
        run=lambda current: compiled(current, *constants),
        compile_seconds=seconds,
        compile_process_seconds=process_seconds,
        stablehlo_lines=lowered.as_text().count("\n"),
        bytes_accessed=None if accessed is None else int(accessed),
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def optimizer_step(tx: optax.GradientTransformation, carry: tuple[Any, Any], gradients: Any) -> tuple[Any, Any]:
    """Returns parameters and state after one step."""
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or ShapeDtypeStructs) in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
