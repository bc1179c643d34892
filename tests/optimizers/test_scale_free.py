"""What the five scale-free optimizers promise, from one table: no dependence on sizes, silence, spikes, bad input.

Every optimizer is one program here, run on many histories of gradients at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import in_contract
from sklearn.datasets import load_digits

import rootfree_optax as rf

KRONECKER = {"sirf_muon": rf.sirf_muon, "sirf_shampoo": rf.sirf_shampoo, "kl_shampoo": rf.kl_shampoo}
DIAGONAL = {"rf_adamw": rf.rf_adamw, "rf_rmsprop": rf.rf_rmsprop}
OPTIMIZERS = {**KRONECKER, **DIAGONAL}
SHAPES = {"up": (10, 6), "down": (10, 6), "bias": (6,)}
STEPS, BEGIN, END = 340, 20, 320
SCALES = (1e-7, 1e-4, 1e3, 1e6)


def make(name, **settings):
    return OPTIMIZERS[name](1.0, weight_decay=0.0, **settings)


def draw_histories():
    """Returns histories of gradients by name, of noise with a mean, in which something happens to `up`."""
    rng = np.random.default_rng(0)
    noise = {name: 0.3 + rng.standard_normal((STEPS, *shape)) for name, shape in SHAPES.items()}
    index = np.arange(STEPS)[:, None, None]
    in_pause = (index >= BEGIN) & (index < END)
    with_up = lambda factor: {**noise, "up": noise["up"] * factor}
    times = lambda factor: {name: factor * leaf for name, leaf in noise.items()}
    return {
        "usual": noise,
        **{f"times {scale}": times(scale) for scale in SCALES},
        "silence": with_up(~in_pause),
        "whisper": with_up(np.where(in_pause, 1e-4, 1)),
        "tiny first": with_up(np.where(index == 0, 1e-6, 1)),
        "late": with_up(index >= BEGIN),
        "rare rows": with_up(rng.random((STEPS, 10, 1)) < 0.01),
        "large spike": with_up(np.where(index == BEGIN, 1e20, 1)),
        "small spike": with_up(np.where(index == BEGIN, 1e-20, 1)),
        "30 apart": with_up(30),
        "zeros": times(0),
        "tiny": times(1e-30),
        "nan": with_up(np.where(index == BEGIN, np.nan, 1)),
        "infinite": with_up(np.where((index == BEGIN) & (np.arange(6) == 2), np.inf, 1)),
    }


@functools.cache
def run(name, **settings):
    """Returns the updates of every history, each {parameter: [steps, …]}, and the last states."""
    histories = draw_histories()
    gradients = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *histories.values())
    tx = make(name, **settings)
    params = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}

    def one(gradients):
        def step(state, gradient):
            updates, state = tx.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), gradients)

    states, updates = jax.device_get(jax.jit(jax.vmap(one))(gradients))
    pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), updates)
    return {key: (pick(wide, i), pick(states, i)) for i, key in enumerate(histories)}


def rms(array):
    return np.sqrt(np.mean(np.square(array), axis=tuple(range(1, array.ndim))))


@pytest.fixture(params=[in_contract(n) if n in ("sirf_muon", "kl_shampoo") else n for n in OPTIMIZERS])
def name(request):
    return request.param


@pytest.fixture
def updates(name):
    return {history: tree for history, (tree, _) in run(name).items()}


@pytest.fixture
def states(name):
    return {history: state for history, (_, state) in run(name).items()}


def test_a_multiple_of_the_loss_has_the_same_updates(updates):
    for scale in SCALES:
        for key, usual in updates["usual"].items():
            error = np.abs(updates[f"times {scale}"][key] - usual).max()
            assert error <= 2e-3 * np.abs(usual).max(), (scale, key)


def test_updates_are_as_long_as_adamws(updates):
    for key, usual in updates["usual"].items():
        lengths = rms(usual)[1:]
        assert 0.05 <= lengths.min() <= lengths.max() <= 1.2, key


def test_two_layers_30_apart_have_updates_of_like_sizes(updates):
    ratio = rms(updates["30 apart"]["up"]) / rms(updates["30 apart"]["down"])
    assert 1 / 5 <= ratio.min() <= ratio.max() <= 5


def by_default(*names):
    """Runs a test, which takes `name`, on these optimizers by default, and on all of them as research."""
    marks = {name: () if name in names else pytest.mark.research for name in OPTIMIZERS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def usual_length(updates):
    return rms(updates["usual"]["up"])[BEGIN:].mean()


def test_a_block_returns_from_silence_with_steps_of_the_usual_length(updates):
    assert rms(updates["silence"]["up"])[END:].max() <= 4 * usual_length(updates)
    assert rms(updates["whisper"]["up"])[END:].max() <= 4 * usual_length(updates)


def test_a_block_hardly_moves_during_a_pause(updates):
    silence, whisper = updates["silence"]["up"][BEGIN:END], updates["whisper"]["up"][BEGIN:END]
    assert rms(silence.sum(0, keepdims=True)) <= 12
    assert np.all(np.diff(rms(silence)) <= 0)
    assert rms(silence)[-1] < 1e-5
    # As long as the momentum is of the gradients before.
    assert rms(whisper[:40].sum(0, keepdims=True)) <= 12


def test_a_tiny_first_gradient_is_harmless(updates):
    for history in ("tiny first", "late"):
        lengths = rms(updates[history]["up"])
        assert lengths.max() <= 8 * usual_length(updates), history
        assert lengths[-100:].min() > 0.5 * usual_length(updates), history


def test_rows_seen_in_one_step_of_a_hundred_have_no_long_steps(updates):
    assert np.abs(updates["rare rows"]["up"]).max() <= 60


def test_a_spike_moves_a_block_by_a_few_steps_alone(updates):
    after = {kind: updates[f"{kind} spike"]["up"][BEGIN:] for kind in ("large", "small")}
    for lengths in map(rms, after.values()):
        assert lengths.max() <= 4 * usual_length(updates)
    assert rms(after["large"].sum(0, keepdims=True)) <= 12
    assert rms(after["small"])[1:].min() > 0.3 * usual_length(updates)


def test_zero_gradients_from_the_start_have_updates_of_zero(updates, states):
    for update in updates["zeros"].values():
        np.testing.assert_array_equal(update, 0)
    for leaf in jax.tree.leaves(states["zeros"]):
        assert np.all(np.isfinite(leaf))
    np.testing.assert_array_equal(updates["late"]["up"][:BEGIN], 0)


def test_gradients_of_1e_30_leave_all_finite(name, updates, states):
    for leaf in jax.tree.leaves((updates["tiny"], states["tiny"])):
        assert np.all(np.isfinite(leaf))
    if name in KRONECKER:
        np.testing.assert_allclose(rms(updates["tiny"]["up"]), rms(updates["usual"]["up"]), rtol=1e-4)


@pytest.mark.parametrize("history", ["nan", "infinite"])
def test_a_non_finite_gradient_shows_once_and_leaves_the_state_finite(updates, states, history):
    update = updates[history]["up"]
    assert not np.isfinite(update[BEGIN]).all()
    assert np.isfinite(np.delete(update, BEGIN, 0)).all()
    for other in ("down", "bias"):
        np.testing.assert_allclose(updates[history][other], updates["usual"][other], rtol=0, atol=2e-5)
    for leaf in jax.tree.leaves(states[history]):
        assert np.all(np.isfinite(leaf))
    # What the bad step did not change: the next update is what it would have been one step later or so.
    before, after = update[BEGIN - 1].ravel(), update[BEGIN + 1].ravel()
    assert before @ after > 0.5 * np.linalg.norm(before) * np.linalg.norm(after)


@pytest.mark.research
@pytest.mark.parametrize("name", KRONECKER)
@pytest.mark.parametrize("settings", [{"refresh_every": 1}, {"refresh_every": 50}, {"damping": 0.0}, {"b1": 0.0}])
def test_the_same_with_other_settings(name, settings):
    histories = run(name, **settings)
    updates = {history: tree for history, (tree, _) in histories.items()}
    states = {history: state for history, (_, state) in histories.items()}
    test_a_multiple_of_the_loss_has_the_same_updates(updates)
    test_two_layers_30_apart_have_updates_of_like_sizes(updates)
    test_a_block_returns_from_silence_with_steps_of_the_usual_length(updates)
    test_a_block_hardly_moves_during_a_pause(updates)
    test_a_tiny_first_gradient_is_harmless(updates)
    test_rows_seen_in_one_step_of_a_hundred_have_no_long_steps(updates)
    test_a_spike_moves_a_block_by_a_few_steps_alone(updates)
    test_zero_gradients_from_the_start_have_updates_of_zero(updates, states)
    test_gradients_of_1e_30_leave_all_finite(name, updates, states)


@pytest.mark.contract
@pytest.mark.parametrize("name", ["sirf_muon", "sirf_shampoo", "kl_shampoo"])
def test_newtons_steps_are_of_the_usual_length_where_one_gradient_among_others_is_tiny(name):
    """The momentum of others, divided by a curvature that is as small as its square, would be 1e10 steps long."""
    params = jnp.zeros(SHAPES["up"])
    gradients = jnp.asarray(draw_histories()["usual"]["up"][:60], jnp.float32).at[40].multiply(1e-6)
    tx = make(name, step_size="newton", batch_size=1)
    step = lambda state, gradient: tx.update(gradient, state, params)[::-1]
    lengths = rms(jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])(gradients))
    assert lengths[40:].max() <= 1.2 * lengths[10:40].max()
    assert lengths[40:].min() >= 0.6 * lengths[10:40].min()


@pytest.mark.contract
def test_a_tiny_first_gradient_makes_no_long_newton_steps_of_kl_shampoo():
    """Its size is not counted: the next gradient, beside it, is not a surprise."""
    params = jnp.zeros(SHAPES["up"])
    usual = jnp.asarray(draw_histories()["usual"]["up"][:30], jnp.float32)
    tx = make("kl_shampoo", step_size="newton", batch_size=1)
    step = lambda state, gradient: tx.update(gradient, state, params)[::-1]
    lengths_of = jax.jit(jax.vmap(lambda g: jax.lax.scan(step, tx.init(params), g)[1]))
    expected, found = map(rms, lengths_of(jnp.stack([usual, usual.at[0].multiply(1e-6)])))
    assert found.max() <= 1.2 * expected.max()


DECOMPOSITIONS = ("eigh", "svd", "qr", "cholesky", "solve", "lu", "householder", "geqrf", "gesdd", "syevd", "potrf")


def test_no_program_has_a_decomposition(name):
    tx = make(name)
    params = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}
    jaxpr = str(jax.make_jaxpr(lambda g, s: tx.update(g, s, params))(params, tx.init(params)))
    found = [word for word in DECOMPOSITIONS if f" {word}[" in jaxpr or f"= {word} " in jaxpr]
    assert found == []
    assert "custom_call" not in jaxpr
    assert "pure_callback" not in jaxpr


@by_default("rf_adamw")
def test_learning_rate_and_damping_may_be_mapped_over(name):
    params = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}
    gradients = {key: jnp.asarray(leaf[:3], jnp.float32) for key, leaf in draw_histories()["usual"].items()}

    def last_update(rate, damping):
        tx = OPTIMIZERS[name](rate, weight_decay=0.0, damping=damping)
        step = lambda state, gradient: tx.update(gradient, state, params)[::-1]
        return jax.tree.map(lambda leaf: leaf[-1], jax.lax.scan(step, tx.init(params), gradients)[1])

    rates, dampings = jnp.asarray([1.0, 0.5, 1.0]), jnp.asarray([0.125, 0.125, 4.0])
    mapped = jax.jit(jax.vmap(last_update))(rates, dampings)["up"]
    np.testing.assert_allclose(mapped[1], 0.5 * mapped[0], rtol=1e-5)
    assert np.abs(mapped[2] - mapped[0]).max() > 1e-2
    injected = optax.inject_hyperparams(OPTIMIZERS[name])(0.5, weight_decay=0.0, damping=0.125)
    step = lambda state, gradient: injected.update(gradient, state, params)[::-1]
    alone = jax.jit(lambda g: jax.lax.scan(step, injected.init(params), g)[1])(gradients)["up"][-1]
    np.testing.assert_allclose(alone, mapped[1], rtol=0, atol=2e-5)


@pytest.mark.contract
@by_default("kl_shampoo", "rf_adamw", "rf_rmsprop")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.research)])
def test_parameters_in_half_precision_follow_those_in_single(name, dtype):
    histories = draw_histories()["usual"]
    # float16 holds neither the squares of the smallest of these nor those of the largest.
    for size in (1e-4, 1.0, 1e3) if dtype == jnp.float16 else (1.0,):
        gradients = {key: jnp.asarray(size * leaf[:40], dtype) for key, leaf in histories.items()}
        _, state, updates = half_precision_run(name, dtype)(gradients)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.all(np.isfinite(np.asarray(leaf, np.float32)))
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        usual = run(name)["usual"][0]["up"][39].ravel()
        found = np.asarray(updates["up"][39], np.float64).ravel()
        cosine = found @ usual / np.linalg.norm(found) / np.linalg.norm(usual)
        assert cosine > 0.95, (size, cosine)
        np.testing.assert_allclose(rms(found[None]), rms(usual[None]), rtol=0.1)


@functools.cache
def half_precision_run(name, dtype):
    tx = make(name)
    params = {key: jnp.zeros(shape, dtype) for key, shape in SHAPES.items()}

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    return jax.jit(lambda gradients: (None, *jax.lax.scan(step, tx.init(params), gradients)))


@pytest.mark.contract
@by_default("sirf_shampoo", "rf_adamw")
def test_clipping_by_the_norm_changes_nothing_but_clipped_steps(name):
    """A clipped gradient still counts, at its clipped length, in the averages: those forget it."""
    gradients = {key: jnp.asarray(leaf[:120], jnp.float32) for key, leaf in draw_histories()["usual"].items()}
    norms = np.sqrt(sum(np.sum(np.square(leaf.reshape(120, -1)), axis=1) for leaf in gradients.values()))
    gradients = jax.tree.map(lambda leaf: (leaf / norms.max()).at[3].multiply(20), gradients)
    params = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}

    clip, tx = optax.clip_by_global_norm(1.0), make(name)
    step = lambda state, gradient: tx.update(gradient, state, params)[::-1]
    updates_of = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])
    by_the_norm = jax.jit(jax.vmap(lambda g: clip.update(g, clip.init(params))[0]))(gradients)
    plain, clipped = jax.device_get((updates_of(gradients), updates_of(by_the_norm)))
    for key in SHAPES:
        np.testing.assert_array_equal(plain[key][:3], clipped[key][:3])
        error = rms(plain[key] - clipped[key]) / rms(plain[key])
        # An average of squares remembers one 400 times as large for six more of its memories.
        assert error[-1] < 0.2, key


# Trainings on digits. Slow: marked as research.

DIGITS = 64


@functools.cache
def digits():
    data = load_digits()
    return jnp.asarray(data.data / 16 - 0.3, jnp.float32), jnp.asarray(data.target)


def draw_network(seed, *sizes):
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    draw = lambda key, rows, columns: jax.random.normal(key, (rows, columns)) / rows**0.5
    return [
        {"kernel": draw(key, rows, columns), "bias": jnp.zeros(columns)}
        for key, rows, columns in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply_network(network, x):
    *hidden, last = network
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def losses(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def train(tx, loss, params, batches, measure, state=None):
    """Returns the parameters, the state, and what is measured after every step."""

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), measure(params)

    state = tx.init(params) if state is None else state
    (params, state), measured = jax.jit(lambda *carry: jax.lax.scan(step, carry, batches))(params, state)
    return params, state, np.asarray(measured)


def train_two_experts(tx):
    """Returns the odd expert's loss after every step; its samples are held back from step 100 to 404."""
    x, y = digits()
    is_odd = y % 2 == 1
    params = {"even": draw_network(0, DIGITS, DIGITS, 10), "odd": draw_network(1, DIGITS, DIGITS, 10)}
    choices = jax.random.randint(jax.random.key(2), (604, 64), 0, len(x))
    steps = jnp.arange(604)

    def each(params, x, y):
        logits = [apply_network(params[name], x) for name in ("odd", "even")]
        return losses(jnp.where((y % 2 == 1)[:, None], *logits), y)

    def loss(params, chosen, step):
        is_held = is_odd[chosen] & (step >= 100) & (step < 404)
        return jnp.sum(jnp.where(is_held, 0.0, each(params, x[chosen], y[chosen]))) / 64

    measure = lambda params: jnp.sum(jnp.where(is_odd, each(params, x, y), 0.0)) / jnp.sum(is_odd)
    return train(tx, loss, params, (choices, steps), measure)[2]


def with_adamws_settings(name, rate, **settings):
    return {**OPTIMIZERS, "adamw": optax.adamw}[name](rate, weight_decay=1e-4, **settings)


@pytest.mark.research
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("seed", [0])
def test_an_expert_returns_from_a_pause_in_training_as_adamws_does(name, seed):
    excess = {}
    for method in ("adamw", name):
        measured = train_two_experts(with_adamws_settings(method, 3e-3))
        excess[method] = max(measured[404:].max(), measured[100:404].max()) - measured[99]
        assert measured[-1] < measured[99]
    assert excess[name] < 2 * max(excess["adamw"], 0.01)


def train_digits(tx, params, batches, state=None):
    x, y = digits()
    loss = lambda params, chosen: jnp.mean(losses(apply_network(params, x[chosen]), y[chosen]))
    measure = lambda params: jnp.mean(losses(apply_network(params, x), y))
    return train(tx, loss, params, (batches,), measure, state)


@pytest.mark.research
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("begin", [200, 450])
def test_switching_from_adamw_in_mid_schedule_causes_no_jump(name, begin):
    schedule = optax.cosine_decay_schedule(1e-3, 600)
    batches = jax.random.randint(jax.random.key(9), (600, 64), 0, len(digits()[0]))
    adamw = with_adamws_settings("adamw", schedule)
    params, state, _ = train_digits(adamw, draw_network(0, DIGITS, DIGITS, DIGITS, 10), batches[:begin])
    _, _, going_on = train_digits(adamw, params, batches[begin : begin + 50], state)
    switched = with_adamws_settings(name, lambda count: schedule(count + begin))
    _, _, after = train_digits(switched, params, batches[begin : begin + 50])
    assert np.mean(after / going_on) < 1.01
    assert np.max(after / going_on) < 1.03


@pytest.mark.research
@pytest.mark.usefixtures("standard_promotion")
def test_any_rate_trains_at_an_interval_of_five(name):
    batches = jax.random.randint(jax.random.key(9), (600, 64), 0, len(digits()[0]))
    interval = {"refresh_every": 5} if name in KRONECKER else {}
    for rate in (3e-3, 1e-2, 5e-2):
        tx = with_adamws_settings(name, optax.warmup_cosine_decay_schedule(0.0, rate, 60, 600), **interval)
        _, _, measured = train_digits(tx, draw_network(0, DIGITS, DIGITS, DIGITS, 10), batches)
        assert measured[-1] < 0.1


def apply_residual_network(network, x):
    first, *hidden, last = network
    x = x @ first["kernel"] + first["bias"]
    for up, down in zip(hidden[::2], hidden[1::2], strict=True):
        x = x + jax.nn.gelu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
    return x @ last["kernel"] + last["bias"]


NETWORKS = {
    "plain": (apply_network, (DIGITS, DIGITS, DIGITS, 10)),
    "residual": (apply_residual_network, (DIGITS, DIGITS, 128, DIGITS, 128, DIGITS, 10)),
}


@functools.cache
def mean_loss_at_the_end(method, network, rate, is_constant):
    """Returns the mean of five seeds' losses after 600 steps."""
    apply, sizes = NETWORKS[network]
    tx = with_adamws_settings(method, rate if is_constant else optax.cosine_decay_schedule(rate, 600))
    x, y = digits()

    def train_one(seed):
        batches = jax.random.randint(jax.random.fold_in(jax.random.key(seed), 9), (600, 64), 0, len(x))
        params = draw_network(seed, *sizes)
        loss = lambda params, chosen: jnp.mean(losses(apply(params, x[chosen]), y[chosen]))

        def step(carry, chosen):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, chosen), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return loss(params, jnp.arange(len(x)))

    return float(jnp.mean(jax.jit(jax.vmap(train_one))(jnp.arange(5))))


@pytest.mark.research
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("rate", [1e-3, 3e-3])
@pytest.mark.parametrize("is_constant", [True, False], ids=["constant", "cosine"])
def test_at_adamws_settings_no_training_on_digits_ends_above_its_loss(name, network, rate, is_constant):
    found, adamw = (mean_loss_at_the_end(method, network, rate, is_constant) for method in (name, "adamw"))
    assert found <= 1.05 * adamw + 0.01


@pytest.mark.research
@pytest.mark.usefixtures("standard_promotion")
def test_a_constant_rate_converges_on_a_quadratic(name):
    rng = np.random.default_rng(0)
    target, left = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((12, 8), (12, 12)))
    loss = lambda x: jnp.mean(jnp.square(left @ (x - target)))
    tx = OPTIMIZERS[name](1e-2, weight_decay=0.0)
    x = jnp.zeros((12, 8))
    _, _, measured = train(tx, lambda x, _: loss(x), x, (jnp.arange(4000),), loss)
    assert measured[-200:].max() < 1e-3 * float(loss(jnp.zeros((12, 8))))
