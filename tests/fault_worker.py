"""A small training run that compares its states with those of an uninterrupted one: what test_faults.py kills."""

import functools
import hashlib
import pathlib
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import rootfree_optax as rf

SAVE_EVERY = 2


def optimizer() -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer, with everything that is kept in its state."""
    return rf.sirf_muon(0.02, refresh_every=3, weight_decay=0.1, layout=rf.Layout(block_size=8))


def start() -> Any:
    """Returns parameters and state before the first step."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (16, 8), "up": (8, 24), "down": (24, 8), "bias": (8,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return params, optimizer().init(params)


@functools.cache
def compiled_step() -> Any:
    """Returns one step of training, donating what it takes."""
    tx = optimizer()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, seed: Any) -> Any:
        params, state = carry
        noise = lambda p: jax.random.normal(jax.random.key(seed), p.shape)
        gradients = jax.grad(lambda p: sum(jnp.sum(jnp.sin(p[n]) * noise(p[n]) + p[n] ** 2) for n in p))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def digest(tree: Any) -> str:
    """Returns a digest of all bits of a tree."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def uninterrupted(steps: int) -> list[str]:
    """Returns the digests of parameters and state before and after each step."""
    carry = start()
    digests = [digest(carry)]
    for number in range(1, steps + 1):
        carry = compiled_step()(carry, number)
        digests.append(digest(carry))
    return digests


def restore(folder: pathlib.Path, step: int) -> Any:
    """Returns the checked parameters and state of a step."""
    abstract = jax.eval_shape(lambda: (carry := start(), rf.checksum(carry)))
    with ocp.CheckpointManager(folder) as manager:
        (params, state), checksum = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    rf.check(state, optimizer(), params, checksum)
    return params, state


def answer_restores(folder: pathlib.Path, step: int, link: Connection) -> None:
    """Restores whenever the link asks, until it sends False, and answers with the digest, or None for an error."""
    while link.recv():
        try:
            answer = digest(restore(folder, step))
        except Exception:  # of many kinds, by where the damage is
            answer = None
        link.send(answer)


def train(folder: pathlib.Path, steps: int, expected: list[str], *, asynchronous: bool, link: Connection) -> None:
    """Trains from the last checkpoint on, for ever or for so many steps, and reports every step before it is saved.

    The link gets the step that training goes on from, whether all bits of it are the expected ones, then each step.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(folder, options=options) as manager:
        first = manager.latest_step() or 0
        carry = restore(folder, first) if first else start()
        link.send((first, digest(carry) == expected[first]))
        for number in range(first + 1, first + steps + 1):
            carry = compiled_step()(carry, number)
            link.send((number, digest(carry) == expected[number]))
            if number % SAVE_EVERY == 0:
                manager.save(number, args=ocp.args.StandardSave((carry, rf.checksum(carry))))
