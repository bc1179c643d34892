"""Names and factories of structures."""

import pytest

from rootfree_optax._src.structures.names import (
    STRUCTURE_NAMES,
    block_diagonal,
    corner_diagonal,
    dense,
    diagonal,
    hierarchical,
    structure_factory,
    triangular_toeplitz,
)


@pytest.mark.parametrize("name", STRUCTURE_NAMES)
def test_a_structure_bears_the_name_it_was_made_by(name):
    structure = structure_factory(name)(100)
    assert structure.name == name
    assert repr(structure) == f"{name}(100)"


@pytest.mark.parametrize(
    ("name", "part_shapes"),
    [
        ("dense", ((100, 100),)),
        ("diagonal", ((100,),)),
        ("block30diagonal", ((3, 30, 30), (10, 10))),
        ("block50diagonal", ((2, 50, 50),)),
        ("block99diagonal", ((99, 99), (1,))),
        ("hierarchical15_15", ((15, 15), (70,), (15, 15), (15, 70), (15, 15), (15, 70))),
        ("triltoeplitz", ((100,),)),
        ("triutoeplitz", ((100,),)),
        ("trilbottomrightdiag", ((1,), (99,), (99, 1))),
        ("triltopleftdiag", ((99,), (1,), (1, 99))),
        ("triubottomrightdiag", ((1,), (99,), (1, 99))),
        ("triutopleftdiag", ((99,), (1,), (99, 1))),
        ("tril4bottomrightdiag", ((4, 4), (96,), (96, 4))),
        ("triu4topleftdiag", ((96,), (4, 4), (96, 4))),
    ],
)
def test_part_shapes(name, part_shapes):
    assert structure_factory(name)(100).part_shapes == part_shapes


def test_names_and_factories_with_sizes_agree():
    for name, factory in {
        "block7diagonal": block_diagonal(7),
        "hierarchical3_2": hierarchical(3, 2),
        "tril4bottomrightdiag": corner_diagonal(4, lower=True, corner_first=True),
        "triltopleftdiag": corner_diagonal(lower=True, corner_first=False),
        "triu2bottomrightdiag": corner_diagonal(2, lower=False, corner_first=True),
        "triutopleftdiag": corner_diagonal(1, lower=False, corner_first=False),
        "triltoeplitz": triangular_toeplitz(lower=True),
        "triutoeplitz": triangular_toeplitz(lower=False),
    }.items():
        assert structure_factory(name)(20) == factory(20)
        assert structure_factory(name)(20).name == factory(20).name == name
        assert structure_factory(factory) is factory


@pytest.mark.parametrize(
    ("name", "dim", "factory"),
    [
        ("block30diagonal", 30, dense),
        ("block1diagonal", 8, diagonal),
        ("hierarchical15_15", 15, dense),
        ("tril4bottomrightdiag", 4, dense),
        *((name, 1, dense) for name in STRUCTURE_NAMES),
        *((name, 1, diagonal) for name in STRUCTURE_NAMES),
    ],
)
def test_structures_of_the_same_matrices_are_equal(name, dim, factory):
    structure = structure_factory(name)(dim)
    assert structure == factory(dim)
    assert hash(structure) == hash(factory(dim))
    assert structure.name == factory(dim).name
    assert structure != factory(dim + 1)


@pytest.mark.parametrize("name", STRUCTURE_NAMES)
@pytest.mark.parametrize("dim", [1, 2, 20])
def test_which_structures_are_dense_and_which_diagonal(name, dim):
    structure = structure_factory(name)(dim)
    assert structure.is_dense == (structure == dense(dim))
    assert structure.is_diagonal == (structure == diagonal(dim))


def test_corners_coincide_for_two_rows():
    lower = {structure_factory(name)(2) for name in ("trilbottomrightdiag", "triltopleftdiag")}
    upper = {structure_factory(name)(2) for name in ("triubottomrightdiag", "triutopleftdiag", "hierarchical1_1")}
    assert len(lower) == len(upper) == 1
    assert lower != upper


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown structure 'blockdiagonal'.*dense, diagonal, block30diagonal"):
        structure_factory("blockdiagonal")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block0diagonal", r"'block0diagonal'.*block_size must be at least one, got 0"),
        ("block-3diagonal", r"'block-3diagonal'.*block_size must be at least one, got -3"),
        ("hierarchical0_5", r"'hierarchical0_5'.*leading must be at least one, got 0"),
        ("hierarchical5_0", r"'hierarchical5_0'.*trailing must be at least one, got 0"),
        ("tril0topleftdiag", r"'tril0topleftdiag'.*corner must be at least one, got 0"),
    ],
)
def test_a_size_below_one_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        structure_factory(name)


def test_what_is_neither_a_name_nor_a_factory_is_an_error():
    with pytest.raises(TypeError, match=r"a name or a callable.*got 3"):
        structure_factory(3)
