"""The mixture of experts: values, gradients, auxiliary values, meshes."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ExpertsConfig, MeshConfig, ModelConfig
from llama_jax.model.moe import MixtureOfExperts, reference, route
from llama_jax.model.ops.activation import activate
from llama_jax.model.ops.grouped import block_size, grouped_product, times_at_once, times_in_blocks
from llama_jax.model.param import split
from llama_jax.plan.compile import devices_of
from llama_jax.plan.hardware import parse_topology
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

SMALL = ModelConfig(
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_head=8,
    d_ff=24,
    vocab_size=32,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_embeddings=False,
)


def config_of(count=4, per_token=2, feed_forward="swiglu", **experts):
    experts = ExpertsConfig(count=count, per_token=per_token, **experts)
    return SMALL.model_copy(update={"experts": experts, "feed_forward": feed_forward})


@functools.cache
def boxes_of(config):
    layer = MixtureOfExperts(config, None)
    return split(jax.eval_shape(layer.init, jax.random.key(0), some_x(1, 1))["params"])


def layer_of(config, rules=None):
    """The layer, weights that route unevenly, and their axes."""
    random = np.random.default_rng(0)
    shapes, axes = boxes_of(config)
    draw = lambda w: jnp.asarray(random.normal(0, w.shape[-2] ** -0.5, w.shape), jnp.float32)  # noqa: E731
    weights = jax.tree.map(draw, shapes)
    return MixtureOfExperts(config, rules), weights | {"router": 3 * weights["router"]}, axes


@functools.partial(jax.jit, static_argnums=0)
def run(layer, weights, x, real=None):
    return layer.apply({"params": weights}, x, real)


def some_x(rows, length, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, length, SMALL.d_model)).astype(np.float32)


def close(found, expected, tolerance=1e-5):
    """Equal to within a part of the largest number, in every array of two trees."""
    found, expected = jax.tree.leaves_with_path(found), jax.tree.leaves(expected)
    for (path, a), b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=path)


# the layer


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (config_of(), 9),
        (config_of(count=8, per_token=3, score="sigmoid", feed_forward="geglu"), 11),
        (config_of(normalise=False, feed_forward="relu2"), 9),
        (config_of(count=5, per_token=1, normalise=False, score="sigmoid", shared_d_ff=20), 7),
        (config_of(count=16, per_token=4, shared_d_ff=8), 1),
        (config_of(count=3, per_token=3, feed_forward="relu2", shared_d_ff=40), 50),
    ],
    ids=lambda value: value.feed_forward if isinstance(value, ModelConfig) else value,
)
def test_layer_is_its_definition(config, length):
    layer, weights, _ = layer_of(config)
    x = some_x(2, length)
    y, _ = run(layer, weights, x)
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    close(y, np.stack([reference(config, wide, row) for row in x.astype(np.float64)]))


def dense(config, weights, x):
    """Every expert for every token, of which the chosen are kept: for differentiation."""
    chosen, weight, _ = route(config.experts, x @ weights["router"])
    gate = jnp.einsum("BTD,EDF->BTEF", x, weights.get("expert_gate", weights["expert_up"]))
    up = jnp.einsum("BTD,EDF->BTEF", x, weights["expert_up"])
    y = jnp.einsum(
        "BTEF,EFD->BTED", activate(config.feed_forward, gate, up), weights["expert_down"]
    )
    full = jnp.sum(jax.nn.one_hot(chosen, y.shape[2]) * weight[..., None], axis=2)
    return jnp.einsum("BTED,BTE->BTD", y, full)


@pytest.mark.parametrize(
    ("score", "normalise", "feed_forward"),
    [
        ("softmax", True, "swiglu"),
        ("softmax", False, "relu2"),
        ("sigmoid", True, "relu2"),
        ("sigmoid", False, "geglu"),
    ],
)
def test_gradients_are_those_of_the_dense_form(score, normalise, feed_forward):
    config = config_of(5, 2, feed_forward, score=score, normalise=normalise)
    layer, weights, _ = layer_of(config)
    x, cotangent = some_x(2, 7), some_x(2, 7, seed=1)

    def gradients(of):
        return jax.jit(jax.grad(lambda w, x: jnp.sum(of(w, x) * cotangent), (0, 1)))(weights, x)

    found = gradients(lambda w, x: layer.apply({"params": w}, x)[0])
    expected = gradients(lambda w, x: dense(config, w, x))
    assert set(found[0]) == {"router", "expert_up", "expert_down"} | (
        set() if feed_forward == "relu2" else {"expert_gate"}
    )
    close(found, expected)
    assert np.abs(expected[0]["router"]).max() > 1e-3


def test_an_expert_that_nothing_chooses_has_no_gradient():
    config = config_of(4, 2)
    layer, weights, _ = layer_of(config)
    x = np.abs(some_x(1, 6))
    weights["router"] = weights["router"].at[:, 2].set(-10)
    grad = jax.jit(jax.grad(lambda w: jnp.sum(layer.apply({"params": w}, x)[0] ** 2)))(weights)
    norms = jnp.sum(grad["expert_up"] ** 2, axis=(1, 2))
    assert norms[2] == 0
    assert jnp.all(norms[jnp.array([0, 1, 3])] > 0)
    assert jnp.all(jnp.isfinite(grad["router"]))


def test_scores_that_underflow_give_finite_weights():
    experts = ExpertsConfig(count=4, per_token=2, score="sigmoid")
    chosen, weight, share = route(experts, jnp.array([[-300.0, -301, -400, -500]]))
    np.testing.assert_array_equal(chosen, [[0, 1]])
    close(weight[0], 1 / (1 + np.exp([-1.0, 1.0])))
    close(jnp.sum(share), 1.0)


def test_bf16_is_near_fp32():
    layer, weights, _ = layer_of(config_of(4, 4, shared_d_ff=8))  # all chosen: rounding moves none
    x = some_x(2, 64)
    expected, _ = run(layer, weights, x)
    found, aux = run(layer, weights, jnp.bfloat16(x))
    assert found.dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for value in aux.values())
    close(found, expected, 0.02)


# what is said of the routing


def aux_of(config, weights, x, real=None):
    layer = MixtureOfExperts(config, None)
    return {k: float(v) for k, v in run(layer, weights, x, real)[1].items()}


def test_equal_scores_are_balanced_and_their_z_loss_is_known():
    config = config_of(8, 8)
    _, weights, _ = layer_of(config)
    weights["router"] = jnp.zeros_like(weights["router"])
    aux = aux_of(config, weights, some_x(2, 5))
    close(aux, {"balance": 1.0, "load": 1.0, "router_z": math.log(8) ** 2})


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_collapsed_routing_costs_the_number_of_experts(score):
    config = config_of(8, 1, score=score)
    _, weights, _ = layer_of(config)
    weights["router"] = jnp.zeros_like(weights["router"]).at[0].set(-50).at[0, 3].set(50)
    x = np.ones((2, 5, SMALL.d_model), np.float32)
    close(aux_of(config, weights, x), {"balance": 8.0, "load": 8.0, "router_z": 2500.0})


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_values_are_their_definition(score):
    config = config_of(4, 2, score=score)
    _, weights, _ = layer_of(config)
    x = some_x(2, 8)
    logits = x.reshape(-1, SMALL.d_model) @ np.asarray(weights["router"])
    scores = np.exp(logits) if score == "softmax" else 1 / (1 + np.exp(-logits))
    shares = scores / scores.sum(1, keepdims=True)
    f = np.bincount(np.argsort(-scores)[:, :2].reshape(-1), minlength=4) / 32
    expected = {
        "balance": 4 * (f * shares.mean(0)).sum(),
        "load": 4 * f.max(),
        "router_z": (np.log(np.exp(logits).sum(1)) ** 2).mean(),
    }
    close(aux_of(config, weights, x), expected)
    assert expected["load"] > 1


def test_padding_is_not_counted():
    config = config_of(4, 2)
    layer, weights, _ = layer_of(config)
    x = some_x(1, 12)
    real = np.arange(12)[None] < 7
    padded = aux_of(config, weights, x, real)
    close(padded, aux_of(config, weights, x[:, :7]))
    assert abs(padded["router_z"] - aux_of(config, weights, x, ~real)["router_z"]) > 1e-3
    none = aux_of(config, weights, x, np.zeros_like(real))
    assert none == {"balance": 0, "load": 0, "router_z": 0}
    found, _ = run(layer, weights, x, real)
    np.testing.assert_array_equal(found, run(layer, weights, x, np.ones_like(real))[0])


# the grouped product

CASES = [
    ([3, 0, 5, 4], 12, 1),
    ([3, 0, 5, 4], 12, 4),
    ([0, 12, 0, 0], 12, 8),
    ([0, 0, 0, 12], 12, 4),
    ([2, 1, 0, 3], 12, 4),  # six rows beyond the groups
    ([0, 0, 0, 0], 12, 4),
    ([1, 0, 0, 0], 1, 1),
]


def exact(sizes, rows, dtype):
    """Rows, matrices, cotangent: multiples of 1/64 that bf16 holds; NaN beyond the groups."""
    random = np.random.default_rng(0)
    x, w, g = (
        random.integers(-128, 128, shape) / 64
        for shape in ((rows, 6), (len(sizes), 6, 5), (rows, 5))
    )
    x[sum(sizes) :], g[sum(sizes) :] = np.nan, np.nan
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(g, dtype)


def groups_of(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@functools.partial(jax.jit, static_argnums=4)
def product_and_gradients(x, w, g, sizes, block):
    y, pull = jax.vjp(lambda x, w: grouped_product(x, w, sizes, block), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("sizes", "rows", "block"), CASES)
def test_grouped_product_and_its_gradients_are_those_of_the_groups(sizes, rows, block, dtype):
    x, w, g = exact(sizes, rows, dtype)
    y, of_x, of_w = product_and_gradients(x, w, g, jnp.array(sizes), block)
    assert y.dtype == of_x.dtype == x.dtype
    assert of_w.dtype == jnp.float32
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    wanted, wanted_of_x = np.zeros((rows, 5)), np.zeros((rows, 6))
    for e, group in enumerate(groups_of(sizes)):
        wanted[group], wanted_of_x[group] = x[group] @ w[e], g[group] @ w[e].T
        np.testing.assert_array_equal(of_w[e], (x[group].T @ g[group]).astype(np.float32))
    np.testing.assert_array_equal(y, wanted.astype(dtype))
    np.testing.assert_array_equal(of_x, wanted_of_x.astype(dtype))
    if sum(sizes) == rows == 12:  # fp32 sums, also of bf16
        assert jnp.any(of_w != of_w.astype(jnp.bfloat16))


@pytest.mark.parametrize("summed", [1, 2])
def test_the_instruction_and_the_blocks_agree(summed):
    """A TPU takes the instruction, all others the blocks."""
    x, w, g = exact([2, 1, 0, 3], 12, "float32")
    operands = (x if summed == 1 else g, w, jnp.array([2, 1, 0, 3]))
    at_once = times_at_once(*operands, summed=summed)
    np.testing.assert_array_equal(at_once, times_in_blocks(*operands, block=4, summed=summed))
    assert jnp.any(at_once != 0)


def test_blocks_are_as_large_as_the_mean_group():
    assert [block_size(rows, 8) for rows in (1, 8, 15, 16, 100, 10**6)] == [1, 1, 1, 2, 8, 512]


def test_blocks_keep_the_work_independent_of_the_number_of_experts():
    """XLA's instruction on CPUs would multiply each row by every matrix."""
    M, D, F = 64, 32, 32

    def flops(E):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((M, D), (E, D, F))]
        sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
        run = jax.jit(lambda x, w, sizes: grouped_product(x, w, sizes, 8))
        return run.lower(*shapes, sizes).compile().cost_analysis()["flops"]

    assert flops(64) < 2 * M * D * F  # one block of the loop is counted, and some bookkeeping


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parity
def test_on_tpus_a_step_multiplies_each_row_by_one_matrix():
    device = devices_of(parse_topology("v5e:2x2"))[0]
    place = jax.sharding.SingleDeviceSharding(device)
    M, E, D, F = 2048, 16, 256, 512

    def shape(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(x, w, sizes, g):
        y, pull = jax.vjp(lambda x, w: grouped_product(x, w, sizes, block_size(M, E)), x, w)
        return y, *pull(g)

    operands = shape(M, D), shape(E, D, F, dtype=jnp.float32), shape(E, dtype=jnp.int32)
    compiled = jax.jit(step).lower(*operands, shape(M, F)).compile()
    # Value and gradient of x, and one block of the loop over those of w.
    assert compiled.cost_analysis()["flops"] < 2.5 * 2 * M * D * F


# meshes


def mesh_of(**sizes):
    named = MeshConfig(**{"data": 1, **sizes}).sizes
    return make_mesh(named, jax.devices()[: math.prod(named.values())])


def place(tree, axes, mesh, rules):
    return jax.device_put(tree, shardings(tree, axes, mesh, rules))


def everything(layer, weights, x, real):
    """Outputs, and the gradients of a number that depends on each of them but load."""

    def number(weights, x):
        y, aux = layer.apply({"params": weights}, x, real)
        total = jnp.sum(jnp.sin(y) * y) + 0.5 * aux["balance"] + 0.1 * aux["router_z"]
        return total, (y, aux)

    gradients, outputs = jax.grad(number, (0, 1), has_aux=True)(weights, x)
    return outputs, gradients


@functools.cache
def alone(config):
    """All of it on one device, of a batch with padding and an empty row."""
    layer, weights, _ = layer_of(config)
    return jax.jit(functools.partial(everything, layer))(weights, *some_batch())


def some_batch():
    return some_x(4, 8), np.arange(8)[None] < np.array([[8], [3], [0], [5]])


WHOLE_ROWS = PRESETS["train"].replace(residual_seq="context")


@pytest.mark.parametrize(
    ("sizes", "rules", "feed_forward"),
    [
        ({"expert": 2}, PRESETS["train"], "swiglu"),
        ({"expert": 4}, PRESETS["train"], "swiglu"),
        ({"data": 2, "expert": 2}, PRESETS["train"], "swiglu"),
        ({"fsdp": 2, "tensor": 2}, PRESETS["train"], "relu2"),
        ({"fsdp": 2, "tensor": 2}, WHOLE_ROWS, "swiglu"),
        ({"expert": 2, "tensor": 2}, PRESETS["train"], "swiglu"),
        ({"fsdp": 2, "context": 2}, PRESETS["train"], "swiglu"),
        ({"expert": 2, "tensor": 2}, PRESETS["decode"], "swiglu"),
        ({"data": 2, "expert": 2}, PRESETS["decode"].replace(batch=None), "swiglu"),
        ({"expert": 4}, PRESETS["train"].replace(expert=None), "swiglu"),
    ],
)
def test_values_and_gradients_on_a_mesh_are_those_of_one_device(sizes, rules, feed_forward):
    config = config_of(4, 2, feed_forward, shared_d_ff=8)
    layer, weights, axes = layer_of(config, rules)
    mesh, tokens = mesh_of(**sizes), ("batch", "residual_seq", None)
    weights = place(weights, axes, mesh, rules)
    inputs = [place(a, tokens[: a.ndim], mesh, rules) for a in some_batch()]
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(everything, layer))
        found = jax.block_until_ready(step(weights, *inputs))
    close(found, alone(config))


def test_a_device_holds_and_computes_its_experts_only():
    config, rules, mesh = config_of(8, 2), PRESETS["decode"].replace(batch=None), mesh_of(expert=4)
    layer, weights, axes = layer_of(config, rules)
    weights = place(weights, axes, mesh, rules)
    assert weights["expert_up"].addressable_shards[0].data.shape == (2, 16, 24)
    with jax.set_mesh(mesh):
        text = run.lower(layer, weights, some_x(1, 1)).compile().as_text()
    assert " all-reduce" in text
    assert " all-gather" not in text  # one row, and weights, stay where they are


def test_the_tokens_of_other_experts_are_gathered_and_their_sums_scattered():
    config, rules, mesh = config_of(8, 2), PRESETS["decode"], mesh_of(expert=2)
    layer, weights, axes = layer_of(config, rules)
    with jax.set_mesh(mesh):
        x = place(some_x(4, 2), ("batch", None, None), mesh, rules)
        text = run.lower(layer, place(weights, axes, mesh, rules), x).compile().as_text()
    assert " reduce-scatter" in text
    assert " all-gather" in text
    assert "f32[8,16,24]" not in text  # the experts of both


def test_gradients_pass_a_scan_over_rematerialised_layers_on_a_mesh():
    config, rules, mesh = config_of(4, 2), PRESETS["train"], mesh_of(expert=2, tensor=2)
    single, weights, axes = layer_of(config)
    layer = MixtureOfExperts(config, rules)
    policy = jax.checkpoint_policies.save_only_these_names("gate", "up")
    weights = jax.tree.map(lambda w: jnp.stack([w, w[..., ::-1]]), weights)

    def total(layer, weights, x):
        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def body(x, weights):
            y, aux = layer.apply({"params": weights}, x)
            return x + y, aux["balance"]

        x, balance = jax.lax.scan(body, x, weights)
        return jnp.sum(x**2) + jnp.sum(balance)

    x = some_x(4, 4)
    expected = jax.jit(jax.grad(functools.partial(total, single)))(weights, x)
    stacked = {name: ("layers", *names) for name, names in axes.items()}
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(functools.partial(total, layer)))
        found = jax.block_until_ready(step(place(weights, stacked, mesh, rules), x))
    close(found, expected)


def test_layers_can_be_stacked():
    def init(key):
        return MixtureOfExperts(config_of(shared_d_ff=8), None).init(key, some_x(1, 1))["params"]

    boxes = jax.eval_shape(jax.vmap(init), jax.random.split(jax.random.key(0), 3))
    assert split(boxes)[0]["expert_down"].shape == (3, 4, 24, 16)


# Hugging Face


@pytest.mark.parity
def test_mixtral_of_hugging_face_gives_the_same():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = config_of(8, 2)
    theirs = mixtral.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2
    )
    theirs._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(theirs)
    layer, weights, _ = layer_of(config)
    gate, up, down = (
        np.swapaxes(weights[f"expert_{name}"], 1, 2) for name in ("gate", "up", "down")
    )
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(np.asarray(weights["router"]).T))
        block.experts.gate_up_proj.copy_(torch.tensor(np.concatenate([gate, up], axis=1)))
        block.experts.down_proj.copy_(torch.tensor(down))
    x = some_x(3, 21)
    found, aux = run(layer, weights, x)
    with torch.no_grad():
        close(found, block(torch.tensor(x)).numpy())
        logits = block.gate(torch.tensor(x))[0]
        balance = mixtral.load_balancing_loss_func((logits,), 8, 2).item()
    close(aux["balance"], balance / 2)  # theirs sums the shares of both choices to 2
