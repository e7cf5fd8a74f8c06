"""The step: accumulation equals one large batch, and a bad gradient changes nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import ComputeConfig, ModelConfig, OptimizerConfig
from llama_jax.model.llama import Llama
from llama_jax.train.optimizer import Optimizer, adamw
from llama_jax.train.step import init_state, lm_loss, make_step
from sharding.mesh import make_mesh

MODEL = ModelConfig(
    d_model=32,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=48,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tie_embeddings=False,
)
ROWS, LENGTH = 8, 16


def lm_batch(seed=0):
    """Rows of which some count much, some little, some not at all."""
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = (numbers.random((ROWS, LENGTH)) < np.linspace(0, 1, ROWS)[:, None]).astype(np.float32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segments": np.ones_like(positions),
        "weights": weights,
    }


# A toy whose gradient is whatever the batch says: loss = sum of rows . w.
TOY_AXES = {"w": ("embed",)}


def toy_loss(params, batch):
    total = jnp.sum(batch["x"] @ params["w"])
    return total, {"weight": jnp.sum(batch["n"]), "positive": jnp.sum(batch["x"] > 0)}


def toy(accumulate=1):
    optimizer = adamw(OptimizerConfig(warmup_steps=0, peak_lr=0.1), 10, TOY_AXES)
    state = init_state({"w": jnp.array([1.0, -2.0, 3.0])}, optimizer)
    return state, jax.jit(make_step(toy_loss, optimizer, accumulate))


def toy_batch(seed=0):
    numbers = np.random.default_rng(seed)
    return {
        "x": numbers.normal(size=(8, 3)).astype(np.float32),
        "n": np.ones(8, np.float32),
    }


def test_accumulation_is_one_large_batch():
    """The parts carry unequal weights, so a mean of their means would differ."""
    model = Llama(MODEL, ComputeConfig(scan_layers=False, loss_chunks=1))
    gradient_as_state = Optimizer(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda gradients, state, params, step, wanted: (params, gradients, {}),
        axes=model.axes(),
    )
    state = init_state(jax.jit(model.init)(jax.random.key(0)), gradient_as_state)
    batch = lm_batch()
    whole, whole_metrics = jax.jit(make_step(lm_loss(model), gradient_as_state, 1))(state, batch)
    cut, cut_metrics = jax.jit(make_step(lm_loss(model), gradient_as_state, 4))(state, batch)
    assert set(cut_metrics) == set(whole_metrics)
    for name in ("loss", "weight", "correct", "grad_norm"):
        np.testing.assert_allclose(cut_metrics[name], whole_metrics[name], rtol=1e-6)
    gradients = zip(jax.tree.leaves(cut.optimizer), jax.tree.leaves(whole.optimizer), strict=True)
    for a, b in gradients:
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_gradients_of_bf16_parameters_are_summed_in_fp32():
    """A thousand parts of 1/1024 each: in bf16 the sum would stop growing at 1/4."""
    optimizer = adamw(OptimizerConfig(warmup_steps=0), 10, TOY_AXES)
    state = init_state({"w": jnp.ones(3, jnp.bfloat16)}, optimizer)
    batch = {
        "x": np.full((1024, 3), 1 / 1024, np.float32),
        "n": np.full(1024, 1 / 1024, np.float32),
    }
    _, metrics = jax.jit(make_step(toy_loss, optimizer, 1024))(state, batch)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3), rtol=1e-6)


def test_metrics_are_means_over_the_weight():
    state, step = toy()
    batch = toy_batch()
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(batch["x"] @ [1.0, -2.0, 3.0]), rtol=1e-6)
    np.testing.assert_allclose(metrics["positive"], np.sum(batch["x"] > 0) / 8, rtol=1e-6)
    gradient = batch["x"].mean(0)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    assert int(metrics["skipped"]) == 0


def hashes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_a_bad_gradient_changes_no_bit(poison, accumulate):
    state, step = toy(accumulate)
    state, _ = step(state, toy_batch(1))
    before = hashes((state.params, state.optimizer))
    bad = toy_batch(2)
    bad["x"][5, 1] = poison
    after, metrics = step(state, bad)
    assert hashes((after.params, after.optimizer)) == before
    assert int(after.step) == 2
    assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == 1
    good, _ = step(after, toy_batch(3))
    assert hashes(good.params) != before[:1]
    assert np.isfinite(good.params["w"]).all()


def test_bad_steps_are_counted_in_all_and_in_a_row():
    state, step = toy()
    counts = []
    for poison in (np.nan, None, np.nan, np.inf, None):
        batch = toy_batch()
        if poison is not None:
            batch["x"][0, 0] = poison
        state, metrics = step(state, batch)
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_row"])))
    assert counts == [(1, 1), (1, 0), (2, 1), (3, 2), (3, 0)]
    assert int(state.step) == 5


def test_a_batch_in_which_nothing_counts_is_skipped():
    state, step = toy()
    batch = toy_batch() | {"n": np.zeros(8, np.float32)}
    after, metrics = step(state, batch)
    assert hashes(after.params) == hashes(state.params)
    assert int(metrics["skipped"]) == 1


def test_accumulation_moves_no_rows_between_devices():
    """The parts are strided over the rows, so that each device keeps its own."""
    mesh = make_mesh({"data": 4})
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    optimizer = adamw(OptimizerConfig(), 3000, TOY_AXES)
    state = init_state({"w": jnp.ones(3)}, optimizer)
    program = jax.jit(
        make_step(toy_loss, optimizer, 2), in_shardings=(whole, rows), out_shardings=whole
    )
    text = program.lower(state, toy_batch()).compile().as_text()
    assert re.findall(r"all-to-all|all-gather|collective-permute", text) == []
    assert "all-reduce" in text  # of the gradients: the batch is split
