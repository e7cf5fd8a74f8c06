"""The gated delta rule and its convolution against the rule itself, token by token in float64."""

import functools
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.model.ops.delta import gated_delta, short_convolution
from sharding.mesh import make_mesh

B, N, H, V, C = 2, 4, 3, 6, 5  # C: channels of the convolution

run = jax.jit(gated_delta, static_argnums=7)
convolve = jax.jit(short_convolution)


def places(starts, length):
    """Which tokens of which rows begin a document."""
    begins = np.zeros((B, length), bool)
    for row, token in starts:
        begins[row, token] = True
    return begins


def example(length, starts=(), decay=0.3, alike=False):
    """Arguments of gated_delta in fp32; every third decay is 0 and every fourth up to `decay`."""
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, B, length, N, H))
    if alike:
        k = k[:, :1] + 0.05 * k
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = random.normal(size=(B, length, N, V))
    log_decay = random.uniform(-0.2, 0, (B, length, N))
    log_decay[:, 2::4] = random.uniform(-decay, -decay / 2, log_decay[:, 2::4].shape)
    log_decay[:, ::3] = 0
    beta = random.uniform(0, 2, (B, length, N))
    state = random.normal(size=(B, N, H, V))
    q, k, v, log_decay, beta, state = map(np.float32, (q, k, v, log_decay, beta, state))
    return q, k, v, log_decay, beta, places(starts, length), state


def by_token(q, k, v, log_decay, beta, starts, state):
    """The recurrence as it is written, in float64."""
    q, k, v, log_decay, beta, state = map(np.float64, (q, k, v, log_decay, beta, state))
    y = np.zeros(v.shape)
    for b, t, n in np.ndindex(*v.shape[:3]):
        S = state[b, n]
        S *= 0 if starts[b, t] else np.exp(log_decay[b, t, n])
        S += beta[b, t, n] * np.outer(k[b, t, n], v[b, t, n] - S.T @ k[b, t, n])
        y[b, t, n] = S.T @ q[b, t, n]
    return y, state


def assert_close(ours, theirs, tolerance=2e-6):
    """Each array to this part of its largest number."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=tolerance * np.abs(b).max())


SOME_STARTS = ((0, 0), (0, 3), (1, 2), (1, 4))
MANY_STARTS = (*SOME_STARTS, (0, 15), (0, 16), (0, 40), (1, 32), (1, 63), (1, 64))


@pytest.mark.parametrize("decay", [0.3, 20.0])
@pytest.mark.parametrize(
    ("length", "chunk", "starts"),
    [
        (1, 64, ()),
        (1, 64, ((1, 0),)),
        (5, 64, SOME_STARTS),
        (5, 1, SOME_STARTS),
        (64, 64, ()),
        (64, 16, SOME_STARTS),
        (65, 64, MANY_STARTS),
        (65, 16, MANY_STARTS),
        (200, 64, MANY_STARTS),
        (200, 24, MANY_STARTS),
        (200, 64, ()),
    ],
)
def test_values_and_state_are_the_rule(length, chunk, starts, decay):
    inputs = example(length, starts, decay)
    y, state = run(*inputs, chunk)
    assert y.dtype == state.dtype == jnp.float32
    assert_close((y, state), by_token(*inputs))


def test_keys_that_are_alike():
    """Powers of the matrix that is inverted would grow beyond fp32."""
    inputs = example(128, decay=0.0, alike=True)
    assert_close(run(*inputs, 64), by_token(*inputs))


@pytest.mark.parametrize("cuts", [(64, 65), (1, 2, 40), (31, 32, 33)])
def test_pieces_are_the_whole(cuts):
    """A state carries over from chunks to single tokens and back, also where a piece starts."""
    *tokens, state = example(80, (*SOME_STARTS, (0, 64), (0, 65)))
    whole = run(*tokens, state, 64)
    parts = []
    for start, end in pairwise((0, *cuts, 80)):
        y, state = run(*(x[:, start:end] for x in tokens), state, 64)
        parts.append(y)
    assert_close((np.concatenate(parts, axis=1), state), whole)


@pytest.mark.parametrize("kept", [(33, 40), (0, 1)])
def test_padding_leaves_the_state(kept):
    """Rows padded on the right, one of them wholly."""
    q, k, v, log_decay, beta, starts, state = example(40, ((0, 20),))
    padded = np.arange(40) >= np.array(kept)[:, None]
    log_decay[padded], beta[padded], starts[padded] = 0, 0, False
    inputs = q, k, v, log_decay, beta, starts
    y, after = run(*inputs, state, 16)
    for row, count in enumerate(kept):
        one = slice(row, row + 1)
        expected = by_token(*(x[one, :count] for x in inputs), state[one])
        assert_close((after[one],), expected[1:])
        if count:
            assert_close((y[one, :count],), expected[:1])
        else:
            np.testing.assert_array_equal(after[row], state[row])


def scanned(q, k, v, log_decay, beta, starts, state):
    """The recurrence as a scan over tokens, whose gradients are autodiff's."""

    def token(S, inputs):
        q, k, v, log_decay, beta, starts = inputs
        S = jnp.where(starts[:, None, None, None], 0, jnp.exp(log_decay)[..., None, None] * S)
        change = beta[..., None] * (v - jnp.einsum("bnhv,bnh->bnv", S, k))
        S = S + k[..., None] * change[..., None, :]
        return S, jnp.einsum("bnhv,bnh->bnv", S, q)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta, starts)]
    state, y = jax.lax.scan(token, state, tokens)
    return jnp.moveaxis(y, 0, 1), state


@functools.cache
def gradients(rule, *chunk):
    """Of a sum of the results, each with its own weight, with respect to all that is a number."""

    def loss(q, k, v, log_decay, beta, state, starts):
        results = rule(q, k, v, log_decay, beta, starts, state, *chunk)
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in results)

    return jax.jit(jax.grad(loss, argnums=range(6)))


@pytest.mark.parametrize("decay", [0.3, 50.0])
@pytest.mark.parametrize(
    ("length", "chunk", "starts"),
    [(1, 64, ((1, 0),)), (70, 64, ()), (70, 64, MANY_STARTS), (70, 16, MANY_STARTS)],
)
def test_gradients_are_those_of_the_rule(length, chunk, starts, decay):
    *tokens, starts, state = example(length, starts, decay)
    ours = gradients(gated_delta, chunk)(*tokens, state, starts)
    theirs = gradients(scanned)(*tokens, state, starts)
    assert_close(ours, theirs, 1e-5)


def test_nothing_but_decay():
    """Every token forgets all: no number or gradient is lost to 0 times infinity."""
    q, k, v, log_decay, beta, starts, state = example(70)
    log_decay[:] = -50
    inputs = q, k, v, log_decay, beta
    assert_close(run(*inputs, starts, state, 64), by_token(*inputs, starts, state))
    ours = gradients(gated_delta, 64)(*inputs, state, starts)
    assert_close(ours, gradients(scanned)(*inputs, state, starts), 1e-5)


@pytest.mark.parametrize("length", [1, 130])
def test_bf16(length):
    """As far from float64 on the same numbers as a few roundings to 8 bits; the state is fp32."""
    q, k, v, *rest = example(length, MANY_STARTS[: 1 if length == 1 else None])
    q, k, v = (jnp.bfloat16(x) for x in (q, k, v))
    y, state = run(q, k, v, *rest, 64)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert_close((y, state), by_token(*(np.float32(x) for x in (q, k, v)), *rest), 2**-6)


def convolved(x, weight, starts, tail, counts):
    """Loops over the inputs; the tail is of the first `counts` of each row."""
    x, weight, tail = np.float64(x), np.float64(weight), np.float64(tail)
    y, tails = np.zeros(x.shape), np.zeros(tail.shape)
    for row, (new, old, begins) in enumerate(zip(x, tail, starts, strict=True)):
        past = list(old)
        for t, now in enumerate(new):
            if begins[t]:
                past = [np.zeros_like(now)] * len(old)
            past.append(now)
            y[row, t] = sum(w * one for w, one in zip(weight, past[-len(weight) :], strict=True))
            if t + 1 == counts[row]:
                tails[row] = np.reshape(past[len(past) - len(old) :], old.shape)
        if counts[row] == 0:
            tails[row] = old
    return y, tails


def convolution(length, width, starts=()):
    random = np.random.default_rng(0)
    sizes = (B, length, C), (width, C), (B, width - 1, C)
    x, weight, tail = (random.normal(size=size).astype(np.float32) for size in sizes)
    return x, weight, places(starts, length), tail


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "starts", "counts"),
    [
        (1, (), None),
        (1, ((1, 0),), None),
        (1, ((1, 0),), (0, 1)),
        (2, ((0, 1),), (2, 1)),
        (9, ((0, 0), (0, 7), (1, 4)), None),
        (9, ((0, 0), (0, 4), (1, 8)), (6, 9)),
        (9, ((1, 1),), (0, 2)),
    ],
)
def test_convolution_is_the_loop(length, starts, counts, width):
    inputs = convolution(length, width, starts)
    real = None if counts is None else np.arange(length) < np.array(counts)[:, None]
    y, tail = convolve(*inputs, real)
    expected, expected_tail = convolved(*inputs, counts or (length, length))
    for row, count in enumerate(counts or (length, length)):
        np.testing.assert_allclose(y[row, :count], expected[row, :count], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(tail, np.float32(expected_tail))


@pytest.mark.parametrize("cuts", [(1, 2, 3), (2, 7), (5, 6)])
def test_convolution_in_pieces(cuts):
    x, weight, starts, tail = convolution(10, 4, ((0, 2), (1, 5), (1, 6)))
    whole = convolve(x, weight, starts, tail)
    parts = []
    for start, end in pairwise((0, *cuts, 10)):
        y, tail = convolve(x[:, start:end], weight, starts[:, start:end], tail)
        parts.append(y)
    assert_close((np.concatenate(parts, axis=1), tail), whole)


def test_devices_that_share_rows_and_heads_send_nothing():
    mesh = make_mesh({"rows": 2, "heads": 2}, jax.devices()[:4])
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    tokens, state = place("rows", None, "heads"), place("rows", "heads")
    shardings = (*[tokens] * 5, place("rows"), state)
    sharded = jax.jit(gated_delta, in_shardings=shardings, static_argnums=7)
    program = sharded.lower(*example(40), 16).compile().as_text()
    assert not re.search("all-|collective-|reduce-scatter", program)
