"""Which structure and how many layer axes a rule gives, and what is refused."""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.layout import flatten
from rootfree_optax._src.layout.rules import freeze
from rootfree_optax._src.structures.names import block_diagonal

PARAMS = {
    "conv": jax.ShapeDtypeStruct((3, 3, 5, 8), jnp.float32),
    "matrix": jax.ShapeDtypeStruct((1, 6, 9), jnp.float32),
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "vector": jax.ShapeDtypeStruct((7,), jnp.float32),
}


def structures(params: object = PARAMS, **arguments: object) -> dict[str, str]:
    """Returns each parameter's structures, as one string."""
    plan = whole(**arguments).plan(params)
    return {unit.name: " ".join(s.name for s in unit.stacks[0].structures) for unit in plan.units}


def test_by_default_tensors_are_dense_up_to_a_bound_and_vectors_diagonal() -> None:
    expected = {"conv": "dense dense dense dense", "matrix": "dense dense", "scalar": "diagonal", "vector": "diagonal"}
    assert structures() == expected
    assert structures(max_dense_dim=8) == expected | {"matrix": "dense diagonal"}
    assert structures(max_dense_dim=2)["conv"] == "diagonal diagonal diagonal diagonal"


def test_the_bound_is_on_the_length_of_blocks() -> None:
    assert structures(max_dense_dim=5, block_size=5)["matrix"] == "dense dense"
    assert structures(max_dense_dim=5, block_size=6)["matrix"] == "diagonal dense"
    assert structures(max_dense_dim=4, block_size=6)["matrix"] == "diagonal diagonal"


def test_a_matrix_keeps_its_two_axes_when_merged_and_is_diagonal_when_flattened() -> None:
    assert structures(merge_dims=54)["matrix"] == "dense dense"
    assert structures(merge_dims=54, group=(flatten("matrix"),))["matrix"] == "diagonal"


def test_a_name_is_for_every_axis() -> None:
    assert structures(structure="triltoeplitz")["conv"] == " ".join(["triltoeplitz"] * 4)
    assert structures(structure="dense")["vector"] == "dense"


def test_a_tuple_names_each_axis() -> None:
    matrix = {"matrix": PARAMS["matrix"]}
    assert structures(matrix, structure=("dense", "diagonal")) == {"matrix": "dense diagonal"}
    assert structures(matrix, structure=("diagonal", block_diagonal(2))) == {"matrix": "diagonal block2diagonal"}


def test_a_mapping_goes_by_the_number_of_axes() -> None:
    found = structures(structure={1: "dense", 2: ["diagonal", "dense"], 4: block_diagonal(3)})
    assert found == {
        "conv": "dense dense block3diagonal block3diagonal",
        "matrix": "diagonal dense",
        "scalar": found["scalar"],
        "vector": "dense",
    }
    assert structures(structure={1: "diagonal", 2: "diagonal", 3: "dense"}, merge_dims=9)["conv"] == "dense dense dense"


def test_a_callable_decides_per_parameter_or_leaves_it_to_the_default() -> None:
    seen = {}

    def rule(path: str, shape: tuple[int, ...]) -> object:
        seen[path] = shape
        return {"matrix": ("diagonal", "dense"), "vector": block_diagonal(3)}.get(path)

    found = structures(structure=rule, merge_dims=9)
    assert found["matrix"] == "diagonal dense"
    assert found["vector"] == "block3diagonal"
    assert found["conv"] == "dense dense dense"
    assert seen == {"conv": (9, 5, 8), "matrix": (6, 9), "scalar": (1,), "vector": (7,)}


def test_explicit_dense_may_exceed_the_bound() -> None:
    assert structures(structure="dense", max_dense_dim=1)["matrix"] == "dense dense"


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (("dense", "dense"), r"for each axis of 'conv', which has 4 axes \(3, 3, 5, 8\); got \('dense', 'dense'\)"),
        ({1: "dense", 2: "dense"}, r"an entry for 'conv', of 4 axes \(3, 3, 5, 8\); it has \[1, 2\]"),
        (lambda path, shape: "dance", r"unknown structure 'dance'.*It was given for 'conv'"),
        (lambda path, shape: ("dense",) * 4, r"for each axis of 'matrix', which has 2 axes \(6, 9\)"),
    ],
)
def test_a_rule_that_does_not_fit_a_parameter_names_its_path(structure: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structures(structure=structure)


def layers(layer_axes: object, params: object = PARAMS) -> dict[str, tuple[int, ...]]:
    return {unit.name: unit.layer_axes[0] for unit in whole(layer_axes=layer_axes).plan(params).units}


def test_layer_axes() -> None:
    tensors = {"a": {"x": PARAMS["conv"]}, "b": {"x": PARAMS["conv"]}}
    assert layers(None, tensors) == {"a/x": (), "b/x": ()}
    assert layers(0, tensors) == {"a/x": (0,), "b/x": (0,)}
    assert layers(-1, tensors) == {"a/x": (3,), "b/x": (3,)}
    assert layers((0, -2), tensors) == {"a/x": (0, 2), "b/x": (0, 2)}
    assert layers({"a/": 1, "x": [2, 0]}, tensors) == {"a/x": (1,), "b/x": (2, 0)}
    assert layers({"^b": 0}, tensors) == {"a/x": (), "b/x": (0,)}
    assert layers({"^b": None, "x": 0}, tensors) == {"a/x": (0,), "b/x": ()}
    assert layers(lambda path, shape: [len(shape) - 1] if path == "b/x" else None, tensors) == {"a/x": (), "b/x": (3,)}


@pytest.mark.parametrize(
    ("layer_axes", "message"),
    [
        (0, r"axes of 'scalar', of shape \(\): none, as it has no axes; got 0"),
        ((0, 1), r"axes of 'scalar', of shape \(\): none, as it has no axes; got \(0, 1\)"),
        ({"vec": 1}, r"axes of 'vector', of shape \(7,\): integers from -1 to 0; got 1"),
        ({"conv": (0, -5)}, r"axes of 'conv', of shape \(3, 3, 5, 8\): integers from -4 to 3; got \(0, -5\)"),
        ({"conv": (1, -3)}, r"distinct axes of 'conv', of shape \(3, 3, 5, 8\), got \(1, -3\)"),
        (lambda path, shape: "0", r"axes of 'conv', of shape \(3, 3, 5, 8\): integers from -4 to 3; got '0'"),
    ],
)
def test_layer_axes_that_a_parameter_does_not_have_are_an_error(layer_axes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers(layer_axes)


def dtypes(factor_dtype: object, params: object = PARAMS) -> dict[str, str]:
    """Returns the dtypes of each parameter's factors, as one string."""
    plan = whole(factor_dtype=factor_dtype).plan(params)
    return {unit.name: " ".join(str(d and d.name) for d in unit.stacks[0].factor_dtypes) for unit in plan.units}


def test_factor_dtypes() -> None:
    params = {"matrix": PARAMS["matrix"], "vector": PARAMS["vector"]}
    assert dtypes(None, params) == {"matrix": "None None", "vector": "None"}
    assert dtypes(jnp.bfloat16, params) == {"matrix": "bfloat16 bfloat16", "vector": "bfloat16"}
    assert dtypes({2: ["bfloat16", None]}, params) == {"matrix": "bfloat16 None", "vector": "None"}
    assert dtypes((None, "float32"), {"matrix": PARAMS["matrix"]}) == {"matrix": "None float32"}
    with pytest.raises(ValueError, match=r"factor_dtype must have one dtype per axis of a block with 1.*to 'vector'"):
        dtypes(("bfloat16", None), params)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"max_dense_dim": 0},
            ValueError,
            "max_dense_dim must be a whole number of at least 1, as a Python int, got 0",
        ),
        (
            {"max_dense_dim": None},
            ValueError,
            "max_dense_dim must be a whole number of at least 1, as a Python int, got None",
        ),
        ({"block_size": 0}, ValueError, "block_size must be a whole number of at least 1, as a Python int, got 0"),
        (
            {"block_size": 2.0},
            ValueError,
            r"block_size must be a whole number of at least 1, as a Python int, got 2\.0",
        ),
        ({"merge_dims": -1}, ValueError, "merge_dims must be a whole number of at least 1, as a Python int, got -1"),
        ({"structure": "dance"}, ValueError, "unknown structure 'dance'"),
        ({"structure": ("dense", "dance")}, ValueError, "unknown structure 'dance'"),
        ({"structure": {2: "dance"}}, ValueError, "unknown structure 'dance'.*given for parameters of 2 axes"),
        ({"structure": {2: ("dense",)}}, ValueError, r"name 2 structures for parameters of 2 axes, got \('dense',\)"),
        ({"structure": {"matrix": "dense"}}, ValueError, "got the key 'matrix'"),
        ({"structure": 3}, TypeError, "structure must be None, a name, a tuple, a mapping or a callable, got 3"),
        ({"layer_axes": {"(": 1}}, ValueError, r"a key of layer_axes must be a regular expression, got '\('"),
        (
            {"layer_axes": {"a": "b"}},
            TypeError,
            "a tuple of positions, or None, got 'b' for 'a'",
        ),
        ({"layer_axes": "layers"}, TypeError, "layer_axes must be None, an integer, a tuple .* got 'layers'"),
        ({"layer_axes": True}, TypeError, "layer_axes must be None, an integer, a tuple .* got True"),
        ({"diagonal": "("}, ValueError, r"diagonal must be a regular expression, got '\('"),
        ({"diagonal": True}, TypeError, "diagonal must be None, a regular expression or a callable, got True"),
        ({"factor_dtype": "int32"}, ValueError, "factor_dtype must be None or a real floating-point dtype.* got int32"),
        ({"factor_dtype": {2: "int8"}}, ValueError, "factor_dtype must be None or .* got int8"),
        ({"factor_dtype": {"2": "bfloat16"}}, ValueError, r"factor_dtype must map numbers of axes.* got the keys"),
        ({"group": flatten("x")}, TypeError, "group must be a tuple of Group rules, got Group"),
        ({"group": ("kernel",)}, TypeError, r"group must be a tuple of Group rules, got \('kernel',\)"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        whole(**arguments)


def test_layouts_are_hashable_values() -> None:
    structure = {2: ["dense", "diagonal"]}
    make = lambda: whole(structure=structure, layer_axes={"a": 1, "b": [0, 2]}, group=[flatten("x")])
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != whole(structure=structure, layer_axes={"b": [0, 2], "a": 1}, group=[flatten("x")])
    assert "structure={2: ('dense', 'diagonal')}" in repr(make())


def test_a_layout_from_another_process_equals_its_like() -> None:
    make = "rf.Layout(structure={2: ('dense', 'diagonal')}, layer_axes={'^layers': 0}, group=(rf.weight_and_bias(),))"
    program = f"import pickle, sys, rootfree_optax as rf; sys.stdout.buffer.write(pickle.dumps({make}))"
    # Strings have another hash in a process with another seed.
    environment = {**os.environ, "PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}
    pickled = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment).stdout
    here = eval(make, {"rf": rf})
    assert pickle.loads(pickled) == here
    assert {here: "found"}[pickle.loads(pickled)] == "found"


def test_a_frozen_mapping_is_a_copy() -> None:
    original = {1: "a"}
    frozen = freeze(original)
    original[1] = "b"
    assert dict(frozen) == {1: "a"}
