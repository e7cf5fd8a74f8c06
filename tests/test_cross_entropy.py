"""The chunked loss against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.ops.cross_entropy import cross_entropy

B, T, D, V = 2, 12, 8, 40


def example():
    random = np.random.default_rng(1)
    hidden = random.normal(size=(B, T, D))
    head = random.normal(size=(D, V))
    targets = random.integers(0, V, (B, T))
    weights = random.integers(0, 3, (B, T)) / 2
    return hidden, head, targets, weights


def reference(hidden, head, targets, weights, z_loss):
    """Sum, and its gradients by the softmax formula, in float64."""
    logits = hidden @ head
    log_z = np.log(np.exp(logits).sum(-1))
    hit = np.eye(V)[targets]
    losses = log_z - (logits * hit).sum(-1) + z_loss * log_z**2
    softmax = np.exp(logits - log_z[..., None])
    g = (softmax * (1 + 2 * z_loss * log_z[..., None]) - hit) * weights[..., None]
    gradients = g @ head.T, np.einsum("btd,btv->dv", hidden, g), losses
    correct = (logits.argmax(-1) == targets) * weights
    return (weights * losses).sum(), gradients, correct.sum()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunks", [1, 2, 3, 12])
def test_loss_and_gradients_are_the_formula(chunks, z_loss):
    hidden, head, targets, weights = example()
    expected, expected_gradients, correct = reference(hidden, head, targets, weights, z_loss)

    def loss(hidden, head, weights):
        return cross_entropy(hidden, head, jnp.asarray(targets), weights, chunks, z_loss)

    inputs = (jnp.float32(hidden), jnp.float32(head), jnp.float32(weights))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (total, sums), gradients = run(*inputs)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"] + sums["z_loss"], expected, rtol=1e-6)
    assert sums["correct"] == correct
    assert sums["weight"] == weights.sum()
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    alone, _ = jax.jit(loss)(*inputs)  # without a gradient another program runs
    np.testing.assert_allclose(alone, expected, rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 4])
def test_bf16_with_a_tied_head(chunks):
    """Products of bf16 numbers, summed in fp32: as far from float64 as bf16 logits' gradient."""
    hidden, head, targets, weights = example()
    hidden, head = (np.float64(jnp.bfloat16(x)) for x in (hidden, head))
    expected, (_, expected_head, _), _ = reference(hidden, head, targets, weights, 0.0)

    def loss(hidden, embedding):
        arguments = (jnp.asarray(targets), jnp.float32(weights))
        return cross_entropy(hidden, embedding.T, *arguments, chunks, 0.0)[0]

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    total, (of_hidden, of_embedding) = run(jnp.bfloat16(hidden), jnp.float32(head.T))
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert of_hidden.dtype == jnp.bfloat16
    assert of_embedding.dtype == jnp.float32
    error = np.abs(of_embedding.T - expected_head).max()
    assert error < 2**-8 * np.abs(expected_head).max()


def test_no_gradient_flows_through_the_reports():
    hidden, head, targets, weights = example()
    report = lambda h: cross_entropy(  # noqa: E731
        h, jnp.float32(head), jnp.asarray(targets), jnp.float32(weights), 1, 0.0
    )[1]["loss"]
    assert not jax.grad(report)(jnp.float32(hidden)).any()


def test_chunks_must_divide_the_length():
    hidden, head, targets, weights = example()
    with pytest.raises(ValueError, match=r"length \(12\) must be a multiple .* \(5\)"):
        cross_entropy(hidden, head, targets, weights, 5, 0.0)
