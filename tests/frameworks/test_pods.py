"""The recipes of docs/pods.md run as they are, on the parameters of the packages that they are for."""

import functools
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rootfree_optax as rf

PODS = pathlib.Path(__file__).parents[2] / "docs" / "pods.md"
WIDTH, LAYERS, LENGTH, VOCABULARY = 64, 2, 64, 256


@functools.cache  # Levanter registers a name once
def recipe(name: str) -> dict[str, Any]:
    """Returns what the code of a recipe defines."""
    [code] = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", PODS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 30
    names: dict[str, Any] = {"__name__": name}
    exec(compile(code, str(PODS), "exec"), names)
    return names


def shardings_by_stack(state: Any) -> set[Any]:
    """Returns what divides the momentum of the stacks in a state of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = [leaf for path, leaf in leaves if "stacks" in str(path) and "momentum" in str(path) and leaf.ndim == 3]
    assert len(found) > 0
    return {leaf.sharding.spec[0] for leaf in found}


@pytest.mark.frameworks
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ("decoder_block=llama2", LAYERS * 7),
        ("decoder_block=mixtral num_experts=4 num_experts_per_tok=2 sparse_matmul=false base_moe_mlp_dim=128",
         LAYERS * (4 + 1 + 4 * 3)),
    ],
)  # fmt: skip
def test_maxtext(options: str, matrices: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maxtext = pytest.importorskip("maxtext")
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
    from maxtext.utils import max_logging, maxtext_utils

    monkeypatch.setattr(optimizers, "get_optimizer", optimizers.get_optimizer)
    setup, seen = maxtext_utils.setup_initial_state, {}

    def set_up(*args: Any, **kwargs: Any) -> Any:
        found = setup(*args, **kwargs)
        seen["shardings"] = shardings_by_stack(found[0].optimizer)
        return found

    def note(tx: Any, params: Any) -> Any:
        seen["description"] = describe(tx, params)
        return seen["description"]

    describe, lines = rf.describe, []
    monkeypatch.setattr(rf, "describe", note)
    monkeypatch.setattr(optimizers, "get_optimizer", recipe("maxtext")["sirf_muon"])
    monkeypatch.setattr(maxtext_utils, "setup_initial_state", set_up)
    monkeypatch.setattr(max_logging, "log", lambda text, *args, **kwargs: lines.append(str(text)))
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    config = f"""run_name=test base_output_directory={tmp_path} hardware=cpu dataset_type=synthetic steps=20
        enable_checkpointing=false base_emb_dim={WIDTH} base_num_query_heads=4 base_num_kv_heads=2 base_mlp_dim=128
        base_num_decoder_layers={LAYERS} head_dim=16 vocab_size={VOCABULARY} max_target_length={LENGTH}
        per_device_batch_size=1 attention=dot_product learning_rate=3e-3 ici_fsdp_parallelism=4
        ici_tensor_parallelism=2 enable_goodput_recording=false monitor_goodput=false log_config=false
        skip_jax_distributed_system=true {options}"""
    train.main(["train", base, *config.split()])
    assert seen["description"].blocks == matrices
    assert seen["description"].received_bytes is not None
    assert seen["shardings"] == {("fsdp", "tensor")}
    losses = [float(loss) for line in lines for loss in re.findall(r"completed step.* loss: ([\d.]+), lm_loss", line)]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.frameworks
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("experts", [0, 4])
def test_levanter(experts: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("levanter")
    import haliax as hax
    import levanter
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import LmExample
    from levanter.models.mixtral import MixtralConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig
    from levanter.utils.mesh import MeshConfig

    # Mixtral's metrics are an IO callback under jax.grad, which JAX refuses whatever the optimizer.
    monkeypatch.setattr(levanter.tracker, "jit_log", lambda *args, **kwargs: None)
    optimizer = recipe("levanter")["SirfMuonConfig"](learning_rate=3e-3).build(30)
    sizes: Any = {"max_seq_len": LENGTH, "hidden_dim": WIDTH, "intermediate_dim": 128, "num_layers": LAYERS}
    sizes |= {"num_heads": 4, "num_kv_heads": 2}
    make: Any = MixtralConfig if experts else LlamaConfig
    model = make(**sizes, **({"n_routed_experts": experts, "num_experts_per_tok": 2} if experts else {}))
    named = {"data": "data", "model": "model", "data+model": ["data", "model"]}
    mesh = MeshConfig(axes={"data": -1, "model": 2}, shared_mapping={"mlp": "model", "kv_head": "model", **named})
    config = TrainerConfig(
        id="test", tracker=NoopConfig(), num_train_steps=30, train_batch_size=8, require_accelerator=False, mesh=mesh,
        log_jaxprs=False, log_xla_hlo=False, load_checkpoint=False, log_dir=tmp_path,
    )  # fmt: skip
    loss_of = lambda model, example, *, key=None: model.compute_next_token_loss(example, key=key)
    tokens = np.cumsum(np.random.default_rng(0).integers(1, 4, (8, LENGTH)), axis=1) % VOCABULARY
    with Trainer(config, optimizer, loss_of, add_default_hooks=False) as trainer:
        build = lambda: model.build(hax.Axis("vocab", VOCABULARY), key=jax.random.key(1))
        state = trainer.initial_state(jax.random.key(0), model_init=build)
        batch = hax.vmap(LmExample.causal, "batch")(hax.named(jnp.asarray(tokens), ("batch", "position")))
        losses = []
        for _ in range(30):
            info = trainer.train_step(state, batch)
            state = info.state
            losses.append(float(info.loss))
    arrays = hax.tree_util.tree_map(lambda leaf: leaf.array, state.opt_state)
    assert sum(int(jnp.sum(stack.size > 0)) for stack in arrays[0].stacks) == LAYERS * (
        5 + 3 * experts if experts else 7
    )
    assert shardings_by_stack(arrays) == {("data", "model")}
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.frameworks
@pytest.mark.usefixtures("standard_promotion")
def test_big_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optax, "rootfree", None, raising=False)
    recipe("big_vision")
    shapes = {
        "embedding": {"kernel": (4, 4, 3, 8)},
        "pos_embedding": (1, 4, 8),
        "Transformer": {"encoderblock": {"query": {"kernel": (3, 8, 2, 4)}, "bias": (3, 8)}},
        "head": {"kernel": (8, 5)},
        "cls": (1, 1, 8),
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))
    tx = optax.masked(optax.rootfree.sirf_muon(b2=0.95), jax.tree.map(lambda _: True, params))
    assert rf.describe(tx, params).blocks == 3
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(jnp.all(leaf > 0) for leaf in jax.tree.leaves(updates))  # big_vision multiplies by the rate and −1
