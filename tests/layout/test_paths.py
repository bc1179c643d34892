"""Which key paths EMBEDDINGS finds, and what is said of patterns that find none."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.layout.paths import plain_paths, require_match

FOUND = """
    embed_tokens/weight pos_embedding tok_embeddings/weight token_embedder/embedding position_embeddings/weight
    Embed_0/embedding embed2/w embeddings[0] shared/embedding patch_embed/proj/kernel tok_emb/weight unembed/kernel
    UnEmbed unembedding tokenEmbedding posEmbed/x PosEmbed VocabParallelEmbedding/w PositionalEncoding_0/pos EMBED
    wte/embedding transformer.wte.weight wpe vocab/kernel logits_dense/kernel cls_token tokens/w position/table
    lm_head/kernel LMHead/kernel LMHead_0/kernel LM_HEAD mlm-head/w head/kernel head.weight head_1/kernel head[0]/w
    heads_0/head/kernel classifier_head/kernel ClassifierHead/Dense_0/kernel transformer/~/lm_head/w
"""
NOT_FOUND = """
    header_norm/kernel Header/w overhead/kernel ahead/w headroom/kernel HeadNorm/scale head_dim/kernel heads/kernel
    attention_head_proj/kernel multihead_attention/kernel multi_head/kernel MultiHead/kernel
    MultiHeadDotProductAttention_0/query/kernel MultiHeadAttention_0/out/kernel positive/kernel POSITIVE/w post/kernel
    Post/w compose/kernel Composition/kernel position_wise_ffn/kernel tokenizer/kernel token_mixing/Dense_0/kernel
    TokenMixer/kernel embedded/kernel member/kernel remember/w layers_0/mlp/kernel conv_1/kernel
"""


@pytest.mark.parametrize("path", FOUND.split())
def test_embeddings_and_heads_are_found(path: str) -> None:
    assert re.search(rf.EMBEDDINGS, path)


@pytest.mark.parametrize("path", NOT_FOUND.split())
def test_hidden_layers_are_not_taken_for_embeddings(path: str) -> None:
    assert not re.search(rf.EMBEDDINGS, path)


@pytest.mark.parametrize(
    ("paths", "plain"),
    [
        (["params/a/kernel", "params/a/bias"], ["a/kernel", "a/bias"]),
        (["a/kernel/value", "b/value/array"], ["a/kernel", "b"]),
        (["params/a/kernel/value", "params/a/bias"], ["a/kernel", "a/bias"]),
        # A value among others is a name.
        (["a/query", "a/value"], ["a/query", "a/value"]),
        (["a/value", "a/b/c"], ["a/value", "a/b/c"]),
        (["a/value/value", "a/key/value"], ["a/value", "a/key"]),
        # A box that names no keys, and a list.
        (["a/weight/0", "b/0", "b/1"], ["a/weight", "b/0", "b/1"]),
        (["value", "params"], ["value", "params"]),
        (["params/x", "x"], ["params/x", "x"]),
        (["my_params/x", "params_2/x"], ["my_params/x", "params_2/x"]),
        ([""], [""]),
    ],
)
def test_patterns_see_one_path_in_every_framework(paths: list, plain: list) -> None:
    assert plain_paths(paths) == dict(zip(paths, plain, strict=True))


@jax.tree_util.register_pytree_node_class
class NamedArray:
    """A box that names no keys, as Haliax's."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array

    def tree_flatten(self) -> tuple[tuple[jax.Array], None]:
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, names: None, arrays: tuple[jax.Array]) -> "NamedArray":
        return cls(*arrays)


def test_a_tree_of_levanters() -> None:
    """Layers and experts lead; grouped queries are [groups, queries, head features, features]."""
    box = lambda *shape: {"weight": NamedArray(jnp.zeros(shape))}
    layers = {"q_proj": box(3, 2, 2, 4, 8), "o_proj": box(3, 8, 4, 4), "experts": {"w1": box(3, 2, 8, 16)}}
    params = {"layers": layers | {"norm": box(3, 8)}, "lm_head": box(64, 8)}
    rows = {"experts/w1/weight$": (0, 1), "^layers/": 0}
    layout = rf.Layout(layer_axes=rows, group=(rf.as_matrix("q_proj/weight$", 3), rf.as_matrix("o_proj/weight$", 1)))
    plan = layout.plan(params)
    assert [(stack.count, stack.shape) for stack in plan.stacks] == [(9, (8, 16)), (3, (16, 8))]
    described = rf.describe(rf.sirf_muon(1e-3, layout=layout), params)
    names = ["experts/w1", "norm", "o_proj", "q_proj"]
    assert [row.name for row in described.rows] == [*(f"layers/{name}/weight" for name in names), "lm_head/weight"]
    assert [rest.name for rest in plan.rest] == ["layers/norm/weight", "lm_head/weight"]


def test_every_rule_sees_plain_paths() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(6, 4, rngs=rngs)
            self.linear = nnx.Linear(4, 4, rngs=rngs)

    seen = []

    def structure(path: str, shape: tuple[int, ...]) -> None:
        seen.append(path)

    def layer_axes(path: str, shape: tuple[int, ...]) -> None:
        seen.append(path)

    layout = whole(structure, layer_axes=layer_axes, group=(rf.as_matrix("^linear/kernel$", 1),))
    plan = layout.plan({"params": nnx.state(Model(nnx.Rngs(0)), nnx.Param)})
    assert set(seen) == {"embed/embedding", "linear/kernel", "linear/bias"}
    assert [block.name for block in plan.blocks] == [
        "params/embed/embedding/value",
        "params/linear/bias/value",
        "params/linear/kernel/value",
    ]
    plan = whole(diagonal="embedding$", layer_axes={"^linear/kernel$": 0}).plan(
        {"params": nnx.state(Model(nnx.Rngs(0)), nnx.Param)}
    )
    assert [rest.path for rest in plan.rest] == [
        "params/embed/embedding/value",
        "params/linear/bias/value",
        "params/linear/kernel/value",
    ]


def test_patterns_speak_of_the_parameters_that_an_optimizer_is_given() -> None:
    params = {"head": jnp.ones((3, 3)), "layers": jnp.ones((2, 3, 3))}
    make = lambda layout: optax.partition(
        {"ours": rf.scale_by_sirf_shampoo(layout=layout), "other": optax.sgd(0.1)},
        {"head": "other", "layers": "ours"},
    )
    make(whole(layer_axes={"^layers": 0})).init(params)
    with pytest.raises(ValueError, match=r"a key of layer_axes must match .* got '\^head'. The nearest .* 'layers'"):
        make(whole(layer_axes={"^layers": 0, "^head": None})).init(params)
    make(whole(layer_axes={"^head": None})).init({"head": params["head"], "layers": {}})


def test_a_pattern_without_a_match_is_an_error_that_names_the_nearest_paths() -> None:
    paths = ["decoder/layers_0/kernel", "decoder/embedding", "unrelated"]
    require_match("pattern", "layers_.*kernel", paths)
    require_match("pattern", "anything", [])
    with pytest.raises(ValueError, match=r"pattern must match.*got 'embeding'. The nearest key paths are 'decoder/emb"):
        require_match("pattern", "embeding", paths)
