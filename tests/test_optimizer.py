"""AdamW against its definition, what decays, and the schedules at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ComputeConfig, OptimizerConfig, load_model
from llama_jax.model.llama import Llama
from llama_jax.train.optimizer import adamw, decayed, learning_rate
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

AXES = {"matrix": ("layers", "embed", "mlp"), "norm": ("layers", "embed")}
SHAPES = {"matrix": (2, 3, 5), "norm": (2, 3)}


def normal(seed, scale=1.0):
    numbers = np.random.default_rng(seed)
    return {name: scale * numbers.normal(size=shape) for name, shape in SHAPES.items()}


def as_fp32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def on_host(state):
    """The optimizer's state with its moments where training with `offload` keeps them."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return state._replace(mu=jax.device_put(state.mu, host), nu=jax.device_put(state.nu, host))


def adamw_by_sums(params, gradients, rates, config):
    """AdamW in float64, the moments written out as weighted sums of all gradients so far."""
    clipped = []
    for tree in gradients:
        norm = np.sqrt(sum(np.sum(x**2) for x in tree.values()))
        clipped.append({name: x * min(1, config.clip_norm / norm) for name, x in tree.items()})
    params = dict(params)
    for t, rate in enumerate(rates, start=1):
        for name in params:
            history = [tree[name] for tree in clipped[:t]]
            ages = np.arange(t - 1, -1, -1)
            first = sum(config.beta1**a * g for a, g in zip(ages, history, strict=True))
            second = sum(config.beta2**a * g**2 for a, g in zip(ages, history, strict=True))
            # The bias corrections are the sums of the same weights.
            first = first / sum(config.beta1**a for a in ages)
            second = second / sum(config.beta2**a for a in ages)
            decay = config.weight_decay * params[name] if name == "matrix" else 0
            params[name] = params[name] - rate * (first / (np.sqrt(second) + config.eps) + decay)
    return params


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "moments on the host"])
@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["below the clip", "clipped"])
def test_adamw_is_its_definition(scale, offload):
    config = OptimizerConfig(
        peak_lr=0.05, warmup_steps=3, eps=1e-3, weight_decay=0.3, offload=offload
    )
    optimizer = adamw(config, 8, AXES)
    gradients = [normal(seed, scale) for seed in range(1, 7)]
    params, state = as_fp32(normal(0)), optimizer.init(as_fp32(normal(0)))
    state = on_host(state) if offload else state
    rates = []
    for step, gradient in enumerate(gradients):
        params, state, metrics = jax.jit(optimizer.update)(as_fp32(gradient), state, params, step)
        rates.append(float(metrics["learning_rate"]))

    expected = adamw_by_sums(normal(0), gradients, rates, config)
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)
    assert int(state.count) == len(gradients)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((state.mu, state.nu))}
    assert kinds == {"pinned_host" if offload else "device"}


@pytest.mark.parametrize("offload", [False, True])
def test_an_unwanted_update_keeps_every_bit(offload):
    optimizer = adamw(OptimizerConfig(warmup_steps=0, offload=offload), 8, AXES)
    params = as_fp32(normal(0))
    state = optimizer.init(params)._replace(mu=as_fp32(normal(1)), nu=as_fp32(normal(2)))
    state = on_host(state) if offload else state
    gradients = jax.tree.map(lambda x: x * jnp.nan, params)
    moved = jax.jit(optimizer.update)(gradients, state, params, 3, jnp.asarray(False))[:2]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(((params, state), moved)))


def test_matrices_decay_and_norms_do_not():
    model = Llama(load_model("tiny"))
    flat, _ = jax.tree_util.tree_flatten_with_path(decayed(model.axes("scalar") | model.axes()))
    kept = {jax.tree_util.keystr(p, simple=True, separator="/") for p, decays in flat if not decays}
    norms = {"final_norm", "layers/attention_norm", "layers/feed_forward_norm"}
    assert kept == norms | {"scalar_head"}


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        # After 4 warmup steps, 12 remain: halfway is update 10, index 9.
        ("cosine", {0: 0.25, 2: 0.75, 3: 1.0, 9: 0.55, 15: 0.1, 99: 0.1}),
        ("linear", {0: 0.25, 3: 1.0, 9: 0.55, 15: 0.1, 99: 0.1}),
        ("constant", {0: 0.25, 3: 1.0, 9: 1.0, 15: 1.0, 99: 1.0}),
        # Falls over the last quarter, four updates.
        ("wsd", {0: 0.25, 3: 1.0, 11: 1.0, 13: 0.55, 15: 0.1, 99: 0.1}),
    ],
)
def test_schedule(schedule, points):
    config = OptimizerConfig(
        peak_lr=2.0, schedule=schedule, warmup_steps=4, final_fraction=0.1, decay_fraction=0.25
    )
    for step, part in points.items():
        assert float(learning_rate(config, 16, step)) == pytest.approx(2.0 * part, rel=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    config = OptimizerConfig(peak_lr=0.5, schedule="wsd", warmup_steps=0)
    assert float(learning_rate(config, 10, 0)) == 0.5


def test_changed_hyperparameters_act_on_an_old_state():
    """OPT-175B once trained on with the betas of its checkpoint; nothing of the kind is in ours."""
    params, gradient = as_fp32(normal(0)), as_fp32(normal(1, 0.01))
    old = adamw(OptimizerConfig(warmup_steps=0), 10, AXES)
    _, state, _ = old.update(gradient, old.init(params), params, 0)
    results = set()
    changes = [
        {"peak_lr": 1.0},
        {"beta1": 0.5},
        {"beta2": 0.5},
        {"eps": 1.0},
        {"weight_decay": 0.0},
        {"clip_norm": 1e-3},
        {"schedule": "constant"},
        {"final_fraction": 0.9},
    ]
    for change in ({}, *changes):
        new = adamw(OptimizerConfig(**{"warmup_steps": 0, **change}), 10, AXES)
        moved, _, _ = new.update(as_fp32(normal(2, 0.01)), state, params, 1)
        results.add(np.asarray(moved["matrix"]).tobytes())
    assert len(results) == 1 + len(changes)


def test_state_lies_where_its_parameters_lie():
    model = Llama(load_model("tiny"), ComputeConfig(), PRESETS["train"])
    optimizer = adamw(OptimizerConfig(), 3000, model.axes())
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2})
    shapes = jax.eval_shape(optimizer.init, model.shapes())
    placed = shardings(shapes, optimizer.axes, mesh, PRESETS["train"])
    params = shardings(model.shapes(), model.axes(), mesh, PRESETS["train"])
    assert placed.mu == params
    assert placed.nu == params
    assert placed.count.is_fully_replicated
    assert not placed.mu["layers"]["attention"]["q"].is_fully_replicated
