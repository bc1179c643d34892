"""The shardings of an optimizer's state.

Sharding is part of an array's type on a mesh of explicit axes. So the state's shardings need no rules of their own:
`init` is traced once on such a mesh, and what its results' types say is what they are.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rootfree_optax._src.common.meshes import axes_of_type, mesh_in_use, named_sharding, only_typed


def use_mesh_of(params: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which the parameters' mesh is in use: tracers do not show it on automatic axes."""
    mesh = mesh_in_use(params)
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh)


def sharding_beside(params: Any) -> Any:
    """Returns a sharding that replicates over the parameters' devices; None if they are committed to none."""
    first = next(iter(jax.tree.leaves(params)), None)
    sharding = None if isinstance(first, jax.core.Tracer) else getattr(first, "sharding", None)
    if sharding is None or not getattr(first, "committed", True):
        return None
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is None else NamedSharding(mesh, PartitionSpec())


def on_devices_of(params: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that makes arrays on the parameters' device, if they are on a single one."""
    device = getattr(sharding_beside(params), "device_set", ())
    return jax.default_device(next(iter(device))) if len(device) == 1 else contextlib.nullcontext()


def state_shardings(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """Returns the sharding of every array of `tx.init(params)`, for any chain of transformations.

    What is like a parameter is sharded as the parameter is, stacks of blocks over their `mesh_axes`, and step counts
    are on every device. Nothing is allocated. Use the result as `out_shardings` of `jax.jit(tx.init)`, whose zeros
    the compiler would otherwise lay out as it likes, or as the target of a restored checkpoint.

    Args:
      tx: a transformation.
      params: arrays or `jax.ShapeDtypeStruct`s with `jax.sharding.NamedSharding`s on one mesh, with axes of any type;
        one without a sharding counts as replicated.

    Returns:
      A tree like the state, of `jax.sharding.NamedSharding`s on that mesh.

    Raises:
      ValueError: if no parameter has a sharding over a mesh, or they are on several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> spec = jax.sharding.PartitionSpec(None, "data")
      >>> params = jax.device_put(jnp.zeros((2, 4)), jax.sharding.NamedSharding(mesh, spec))
      >>> tx = rf.sirf_shampoo(1e-3, mesh_axes="data")
      >>> shardings = rf.state_shardings(tx, params)
      >>> preconditioner, *_ = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> preconditioner.stacks[0].momentum.sharding == shardings[0].stacks[0].momentum
      True
      >>> preconditioner.count.sharding.is_fully_replicated
      True
    """
    leaves = [named_sharding(leaf) for leaf in jax.tree.leaves(params)]
    meshes = list(dict.fromkeys(sharding.mesh for sharding in leaves if sharding is not None))
    if len(meshes) != 1:
        raise ValueError(
            f"the parameters must be on one mesh, got {len(meshes)}. Place them with jax.device_put(params, "
            "shardings), or give jax.ShapeDtypeStructs with sharding=, each a jax.sharding.NamedSharding on the mesh."
        )
    [mesh] = meshes
    explicit = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    specs = []

    def init(params: optax.Params) -> Any:
        state = tx.init(params)
        specs.append(jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, state))
        return state

    def on_explicit_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
        found = named_sharding(leaf)
        spec = PartitionSpec() if found is None else found.spec
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=NamedSharding(explicit, spec))

    with jax.sharding.use_abstract_mesh(explicit), only_typed(axes_of_type(mesh, AxisType.Explicit)):
        jax.eval_shape(init, jax.tree.map(on_explicit_mesh, params))
    is_spec = lambda node: isinstance(node, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs[0], is_leaf=is_spec)
