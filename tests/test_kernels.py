"""The accelerators' attention kernels, interpreted on a CPU: numbers and gradients as reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.ops.attend import Scoring, Visibility, attend
from llama_jax.model.ops.balance import balanced_order
from llama_jax.model.ops.kernels import chosen, fused
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

RULES = PRESETS["train"]
QUERIES = ("batch", "seq", "act_heads", None)
KEYS = ("batch", "act_kv_heads", "seq", None)
TOKENS = ("batch", "seq")


def operands(B=2, T=256, N=4, K=2, H=64, documents=3):
    """q, k, v, and each token's segment and its position in it; the last tokens are padding."""
    random = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H)
    q, k, v = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    cuts = np.sort(random.choice(np.arange(1, T - 8), (B, documents - 1), replace=False), axis=1)
    places = np.arange(T)
    segments = np.array([np.searchsorted(row, places, side="right") + 1 for row in cuts])
    segments[:, T - 8 :] = 0
    starts = np.array([[np.argmax(row == one) for one in row] for row in segments])
    return q, k, v, jnp.asarray(segments, jnp.int32), jnp.asarray(places - starts, jnp.int32)


def value_and_gradients(function, q, k, v, real):
    """The result where it matters, and the gradients of a sum of it with weights of its own."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def total(q, k, v):
        y = function(q, k, v) * real[..., None, None]
        return jnp.sum(y * weights), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


def assert_close(found, wanted):
    for name, one, other in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        difference = float(jnp.max(jnp.abs(one - other)))
        assert difference < 2e-5 * max(1, float(jnp.max(jnp.abs(other)))), (name, difference)


@functools.cache
def wanted(window=None, **sizes):
    q, k, v, segments, positions = operands(**sizes)
    visibility = Visibility(positions, segments, window=window)
    reference = functools.partial(attend, visibility=visibility)
    return value_and_gradients(reference, q, k, v, segments > 0)


@pytest.mark.parametrize("kernel", ["splash", "flash"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="grouped"),
        pytest.param({"K": 4}, id="multi-head"),
        pytest.param({"K": 1}, id="multi-query"),
        pytest.param({"T": 200}, id="a length between blocks"),
        pytest.param({"H": 128, "T": 128, "documents": 1}, id="wide heads"),
    ],
)
def test_a_kernel_gives_the_numbers_and_gradients_of_the_reference(kernel, sizes):
    q, k, v, segments, _ = operands(**sizes)

    def function(q, k, v):
        return fused(kernel, q, k, v, segments, interpret=True)

    assert_close(value_and_gradients(function, q, k, v, segments > 0), wanted(**sizes))


@pytest.mark.parametrize("window", [1, 40, 128, 300])
def test_splash_has_sliding_windows(window):
    q, k, v, segments, _ = operands()

    def function(q, k, v):
        return fused("splash", q, k, v, segments, window=window, interpret=True)

    found = value_and_gradients(function, q, k, v, segments > 0)
    assert_close(found, wanted(window))


def test_splash_has_scales_and_soft_caps():
    q, k, v, segments, positions = operands()
    scoring = Scoring(scale=0.3, cap=0.8)

    def function(q, k, v):
        return fused("splash", q, k, v, segments, scale=0.3, cap=0.8, interpret=True)

    def reference(q, k, v):
        return attend(q, k, v, Visibility(positions, segments), scoring=scoring)

    real = segments > 0
    found, expected = (value_and_gradients(f, q, k, v, real) for f in (function, reference))
    assert_close(found, expected)
    plain = value_and_gradients(
        lambda q, k, v: attend(q, k, v, Visibility(positions, segments)), q, k, v, real
    )
    assert np.abs(plain[0] - expected[0]).max() > 1e-2


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_without_segments_a_row_is_one_document(kernel):
    q, k, v, _, _ = operands()
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    reference = attend(q, k, v, Visibility(positions))
    found = jax.jit(lambda: fused(kernel, q, k, v, None, interpret=True))()
    np.testing.assert_allclose(found, reference, atol=2e-5)


@pytest.mark.parametrize("kernel", ["splash", "flash"])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_key_heads_that_devices_cannot_share_are_computed_with_their_queries(kernel, K):
    sizes = {"T": 128, "N": 12, "K": K}
    q, k, v, segments, _ = operands(**sizes)
    axes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 4}
    mesh = make_mesh(axes, jax.devices()[:4])
    rules = RULES.replace(kv_heads=None, act_kv_heads=None)

    def function(q, k, v):
        return fused(kernel, q, k, v, segments, rules, interpret=True)

    with jax.set_mesh(mesh):
        found = value_and_gradients(function, q, k, v, np.asarray(segments) > 0)
    assert_close(found, wanted(**sizes))


@pytest.mark.parametrize(
    ("kernel", "mesh_sizes", "balanced", "window"),
    [
        ("splash", {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}, False, None),
        ("flash", {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}, False, None),
        ("splash", {"data": 1, "fsdp": 1, "expert": 1, "context": 2, "tensor": 2}, False, None),
        ("splash", {"data": 1, "fsdp": 1, "expert": 1, "context": 2, "tensor": 2}, True, None),
        ("splash", {"data": 1, "fsdp": 1, "expert": 1, "context": 2, "tensor": 2}, True, 150),
        ("xla", {"data": 1, "fsdp": 2, "expert": 1, "context": 2, "tensor": 1}, False, None),
        ("xla", {"data": 1, "fsdp": 1, "expert": 1, "context": 4, "tensor": 1}, True, 150),
    ],
)
def test_on_a_mesh_every_device_computes_its_part(kernel, mesh_sizes, balanced, window):
    sizes = {"T": 512}
    q, k, v, segments, positions = operands(**sizes)
    mesh = make_mesh(mesh_sizes, jax.devices()[:4])
    order = balanced_order(512, mesh_sizes["context"]) if balanced else np.arange(512)
    natural = np.argsort(order)

    def function(q, k, v):
        q, k, v = q[:, order], k[:, :, order], v[:, :, order]
        if kernel == "xla":
            visibility = Visibility(positions[:, order], segments[:, order], None, balanced, window)
            y = attend(q, k, v, visibility, "xla", RULES)
        else:
            how = {"balanced": balanced, "window": window, "interpret": True}
            y = fused(kernel, q, k, v, segments[:, order], RULES, **how)
        return y[:, natural]

    places = shardings((q, k, v), (QUERIES, KEYS, KEYS), mesh, RULES)
    with jax.set_mesh(mesh):
        found = value_and_gradients(
            function, *jax.device_put((q, k, v), places), np.asarray(segments) > 0
        )
    assert_close(found, wanted(window, **sizes))


def test_a_kernel_that_cannot_split_the_tokens_says_so():
    q, k, v, segments, _ = operands(T=256)
    mesh = make_mesh(
        {"data": 1, "fsdp": 1, "expert": 1, "context": 2, "tensor": 1}, jax.devices()[:2]
    )
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="multiple of 512"):
            fused("splash", q, k, v, segments, RULES, interpret=True)
        with pytest.raises(ValueError, match=r"mesh\.context 1"):
            fused("flash", q, k, v, segments, RULES, interpret=True)
    with pytest.raises(ValueError, match=r"flash kernel has no window"):
        fused("flash", q, k, v, segments, window=8, interpret=True)


WINDOW = frozenset({"window"})


def test_auto_is_the_kernel_of_the_platform():
    assert [chosen("auto", name) for name in ("tpu", "gpu", "cuda", "cpu")] == [
        *("splash", "flash", "flash", "xla")
    ]
    assert chosen("xla", "tpu") == "xla"
    # Splash splits a row's tokens over devices and has windows, flash does neither.
    assert [chosen("auto", name, devices=2) for name in ("tpu", "gpu")] == ["splash", "xla"]
    assert [chosen("auto", name, wanted=WINDOW) for name in ("tpu", "gpu")] == ["splash", "xla"]
    assert [chosen("auto", name, wanted=WINDOW | {"sinks"}) for name in ("tpu", "gpu")] == [
        "xla"
    ] * 2


def test_a_balanced_order_gives_every_device_the_same_work():
    for devices in (1, 2, 4, 8):
        order = balanced_order(64, devices)
        assert sorted(order) == list(range(64))
        work = (order + 1).reshape(devices, -1).sum(axis=1)  # keys that its queries see
        assert len(set(work.tolist())) == 1


def test_a_row_that_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 2 x mesh.context \(8\)"):
        balanced_order(12, 4)
