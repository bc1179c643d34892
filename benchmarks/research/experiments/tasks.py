"""The tasks: a network, three splits of real data, how many examples a step averages, and what is reported.

An input is an image, a sequence of characters or a node's number; targets are classes, one or more per input.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import images
import jax
import jax.numpy as jnp
import networkx
import numpy as np
from characters import corpus
from characters.transformer import Transformer
from digits import data as digits_data
from flax import nnx

from experiments.models import LSTM, VGG, GraphNetwork, ResNet, VisionTransformer

SEQUENCE = 32
TRAIN_SEQUENCES = 100_000
HELD_OUT_SEQUENCES = 256
GRAPHS = (networkx.karate_club_graph, networkx.les_miserables_graph, networkx.davis_southern_women_graph)
GRAPH_SEED = 0


class Split(NamedTuple):
    """Inputs [n, …] and their classes, int[n] or int[n, …]."""

    inputs: jax.Array
    targets: jax.Array


class Data(NamedTuple):
    """What is trained on, what settings are chosen on, what is reported."""

    train: Split
    validation: Split
    test: Split


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that it can be static
class Task:
    """A network on a data set; `model(rngs)` makes a network that maps inputs to logits."""

    label: str
    model: Callable[[nnx.Rngs], nnx.Module]
    load: Callable[[], Data]
    batch_size: int | None  # None: all that there is to train on
    steps: int
    reported: str = "error"  # or "loss"
    extra: Callable[[], tuple[jax.Array, ...]] = tuple  # further arguments of the network

    def parameters(self) -> int:
        """Returns how many numbers the network has."""
        state = nnx.state(nnx.eval_shape(lambda: self.model(nnx.Rngs(0))), nnx.Param)
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    def terms(self, data: Data) -> int:
        """Returns how many examples the loss averages, B; sequences count as one each."""
        return len(data.train.inputs) if self.batch_size is None else self.batch_size


@functools.cache
def digits() -> Data:
    """Returns scikit-learn's digits: 300 to train on, 300 to validate, 1197 to test."""
    data = digits_data.load(train_size=300, validation_size=300)
    return Data(*(Split(*split) for split in (data.train, data.validation, data.test)))


@functools.cache
def characters() -> Data:
    """Returns sequences of the standard library's sources; those to validate and to test are of other files."""
    text = corpus.load(SEQUENCE, validation_sequences=2 * HELD_OUT_SEQUENCES)
    train = np.asarray(text.train)
    starts = np.linspace(0, len(train) - SEQUENCE - 1, TRAIN_SEQUENCES).astype(int)
    sequences = train[starts[:, np.newaxis] + np.arange(SEQUENCE + 1)]
    held_out = text.validation
    parts = (jnp.asarray(sequences), held_out[::2], held_out[1::2])
    return Data(*(Split(part[:, :-1], part[:, 1:].astype(jnp.int32)) for part in parts))


@functools.cache
def graphs() -> tuple[Data, np.ndarray, int]:
    """Returns nodes of three graphs with a third to train on, their normalised adjacency, and the number of classes.

    The karate club's nodes have its two factions as classes; those of the other graphs have communities found by
    modularity, which no single node shows.
    """
    union, labels = networkx.Graph(), []
    for make in GRAPHS:
        graph, first = networkx.convert_node_labels_to_integers(make()), len(union)
        clubs = networkx.get_node_attributes(graph, "club")
        groups = (
            [[node for node in clubs if clubs[node] == club] for club in sorted(set(clubs.values()))]
            if clubs
            else networkx.community.greedy_modularity_communities(graph, weight=None)
        )
        classes = max(labels, default=-1) + 1
        group_of = {node: classes + index for index, group in enumerate(groups) for node in group}
        labels += [group_of[node] for node in range(len(graph))]
        union = networkx.union(union, networkx.relabel_nodes(graph, {node: first + node for node in graph}))
    adjacency = networkx.to_numpy_array(union, nodelist=range(len(union)), weight=None) + np.eye(len(union))
    scale = 1 / np.sqrt(adjacency.sum(axis=1))
    targets = np.array(labels)
    order = np.random.default_rng(GRAPH_SEED).permutation(len(targets))
    parts = np.array_split(order, 3)
    data = Data(*(Split(jnp.asarray(part), jnp.asarray(targets[part], jnp.int32)) for part in parts))
    return data, (scale[:, np.newaxis] * adjacency * scale).astype(np.float32), int(targets.max()) + 1


def graph_network(rngs: nnx.Rngs) -> nnx.Module:
    """Returns a graph network for the nodes of all graphs."""
    _, adjacency, classes = graphs()
    return GraphNetwork(len(adjacency), classes, width=16, rngs=rngs)


TASKS: dict[str, Task] = {
    "digits_vgg": Task(
        "digits, VGG-like", lambda rngs: VGG(1, 10, (8, 8, 16), rngs=rngs), digits, batch_size=32, steps=200
    ),
    "digits_resnet": Task(
        "digits, ResNet-like", lambda rngs: ResNet(1, 10, 8, blocks=2, rngs=rngs), digits, batch_size=32, steps=150
    ),
    "digits_vit": Task(
        "digits, vision transformer",
        lambda rngs: VisionTransformer(8, 1, 10, patch=2, width=16, layers=2, heads=2, rngs=rngs),
        digits,
        batch_size=32,
        steps=120,
    ),
    "characters_lstm": Task(
        "characters, LSTM",
        lambda rngs: LSTM(corpus.VOCABULARY, 16, 32, rngs=rngs),
        characters,
        batch_size=16,
        steps=150,
        reported="loss",
    ),
    "characters_transformer": Task(
        "characters, transformer",
        lambda rngs: Transformer(32, 1, SEQUENCE, expansion=2, rngs=rngs),
        characters,
        batch_size=16,
        steps=200,
        reported="loss",
    ),
    "graphs": Task(
        "networkx graphs, graph network",
        graph_network,
        lambda: graphs()[0],
        batch_size=None,
        steps=100,
        extra=lambda: (jnp.asarray(graphs()[1]),),
    ),
}


IMAGE_NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "vgg": lambda size, channels, classes, rngs: VGG(channels, classes, (32, 64, 128), rngs=rngs),
    "resnet": lambda size, channels, classes, rngs: ResNet(channels, classes, 32, blocks=3, rngs=rngs),
    "vit": lambda size, channels, classes, rngs: VisionTransformer(
        size, channels, classes, patch=4, width=64, layers=4, heads=4, rngs=rngs
    ),
}


def image_task(directory: pathlib.Path, network: str, steps: int) -> Task:
    """Returns a task on the images in a folder."""
    data = images.load(directory)
    _, size, _, channels = data.train.images.shape
    make = functools.partial(IMAGE_NETWORKS[network], size, channels, data.classes)
    splits = Data(*(Split(*split) for split in (data.train, data.validation, data.test)))
    return Task(f"{data.name}, {network}", make, lambda: splits, batch_size=128, steps=steps)
