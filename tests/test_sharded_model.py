"""The model on a mesh: same numbers as on one device, and each device holds its share only."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ComputeConfig, Frozen, ModelConfig, OptimizerConfig
from llama_jax.model.attention import rules_for
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.stack import unstack
from llama_jax.train.optimizer import adamw
from llama_jax.train.step import init_state, lm_loss, make_step, state_axes
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS, Rules

# Three layers, so that no other dimension is 3; 4 kv heads, so that tensor=4 divides them.
CONFIG = ModelConfig(
    d_model=32,
    n_layers=3,
    n_heads=8,
    n_kv_heads=4,
    d_head=8,
    d_ff=48,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_embeddings=False,
)
TIED = CONFIG.model_copy(update={"tie_embeddings": True})
ROWS, LENGTH = 4, 8
TOLERANCE = 1e-5

Sizes = tuple[int, ...]


class Result(NamedTuple):
    logits: Any
    loss: Any
    gradients: Any


def mesh_of(sizes: Sizes) -> jax.sharding.Mesh:
    """data x fsdp x tensor (x context), on as many devices as that takes."""
    data, fsdp, tensor, *context = sizes
    named = {
        "data": data,
        "fsdp": fsdp,
        "expert": 1,
        "context": math.prod(context),
        "tensor": tensor,
    }
    return make_mesh(named, jax.devices()[: math.prod(sizes)])


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Rows of two packed documents and some padding."""
    random = np.random.default_rng(0)
    ids = random.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    first = random.integers(2, LENGTH - 2, (ROWS, 1))
    column = np.arange(LENGTH)[None]
    segments = np.where(column < first, 1, np.where(column < LENGTH - 1, 2, 0)).astype(np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.where(column < first, column, column - first).astype(np.int32),
        "segments": segments,
        "weights": (segments > 0).astype(np.float32),
    }


@functools.cache
def parameters(config: ModelConfig) -> dict[str, Any]:
    """Random numbers of the size `init` gives, but norms that differ from 1."""
    random = np.random.default_rng(0)

    def number(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(random.normal(0, config.d_model**-0.5, shape), jnp.float32)

    return jax.tree.map(lambda array: number(array.shape), Llama(config).shapes())


def place(tree: Any, axes: Any, mesh: jax.sharding.Mesh, rules: Rules) -> Any:
    return jax.device_put(tree, shardings(tree, axes, mesh, rules))


def place_batch(mesh: jax.sharding.Mesh, rules: Rules) -> dict[str, jax.Array]:
    return place(batch(), dict.fromkeys(batch(), ("batch", "seq")), mesh, rules)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model: Llama, params: Any, batch: dict[str, jax.Array]) -> Result:
    """Logits, mean cross-entropy and its gradients, written out from the logits."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, batch["tokens"], batch["positions"], batch["segments"]).value
        likelihoods = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(likelihoods, batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(chosen * batch["weights"]) / jnp.sum(batch["weights"]), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return Result(logits, value, gradients)


@functools.cache
def alone(config: ModelConfig, compute: ComputeConfig) -> Result:
    """On one device, without mesh or rules."""
    return jax.block_until_ready(evaluate(Llama(config, compute), parameters(config), batch()))


def on_mesh(config: ModelConfig, compute: ComputeConfig, sizes: Sizes, rules: Rules) -> Result:
    mesh = mesh_of(sizes)
    model = Llama(config, compute, rules)
    params = place(parameters(config), model.axes(), mesh, rules)
    with jax.set_mesh(mesh):
        return jax.block_until_ready(evaluate(model, params, place_batch(mesh, rules)))


def assert_same(result: Any, expected: Any) -> None:
    """Every array within the tolerance, relative to its own largest entry."""
    compared = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()),
        result,
        expected,
    )
    worst = {
        jax.tree_util.keystr(path): difference
        for path, difference in jax.tree_util.tree_leaves_with_path(compared)
        if not difference <= TOLERANCE
    }
    assert not worst


SCANNED, UNROLLED = ComputeConfig(scan_layers=True), ComputeConfig(scan_layers=False)
MESHES = {
    "data 2": (2, 1, 1),
    "data 4": (4, 1, 1),
    "fsdp 2": (1, 2, 1),
    "fsdp 4": (1, 4, 1),
    "tensor 2": (1, 1, 2),
    "tensor 4": (1, 1, 4),
    "data x fsdp": (2, 2, 1),
    "fsdp x tensor": (1, 2, 2),
    "context 2": (1, 1, 1, 2),
    "context 4": (1, 1, 1, 4),
    "fsdp x context": (1, 2, 1, 2),
    "context x tensor": (1, 1, 2, 2),
}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_sharded_equals_alone(sizes):
    result = on_mesh(CONFIG, SCANNED, sizes, PRESETS["train"])
    assert len(result.logits.sharding.device_set) == math.prod(sizes)
    assert_same(result, alone(CONFIG, SCANNED))


@pytest.mark.parametrize(
    ("config", "compute"),
    [(CONFIG, UNROLLED), (TIED, SCANNED)],
    ids=["unrolled", "tied"],
)
def test_sharded_equals_alone_unrolled_or_tied(config, compute):
    result = on_mesh(config, compute, MESHES["fsdp x tensor"], PRESETS["train"])
    assert_same(result, alone(config, compute))


@pytest.mark.parametrize("preset", ["train", "decode"])
@pytest.mark.parametrize(("kv_heads", "sizes"), [(1, (1, 1, 2)), (2, (1, 1, 4))])
def test_key_heads_that_tensor_cannot_share_are_whole(preset, kv_heads, sizes):
    """Multi-query attention on tensor=2, two key heads on tensor=4."""
    config = CONFIG.model_copy(update={"n_kv_heads": kv_heads})
    mesh = mesh_of(sizes)
    with pytest.raises(ValueError, match=r"layers/attention/k: dimension 2 \(kv_heads\) is"):
        shardings(Llama(config).shapes(), Llama(config).axes(), mesh, PRESETS[preset])
    rules = rules_for(config, preset, mesh.shape)
    assert rules == PRESETS[preset].replace(kv_heads=None, act_kv_heads=None)
    assert_same(on_mesh(config, SCANNED, sizes, rules), alone(config, SCANNED))


def test_key_heads_that_tensor_can_share_are_shared():
    sizes = mesh_of((1, 1, 2)).shape
    assert rules_for(CONFIG, "train", sizes) == PRESETS["train"]
    one_of_two = CONFIG.model_copy(update={"pattern": (Frozen(), Frozen({"n_kv_heads": 1}))})
    assert rules_for(one_of_two, "train", sizes).mesh_axes("kv_heads") == ()


def test_init_on_a_mesh_is_init():
    """Parameters are made where they belong, and are the same bits wherever that is."""
    mesh, rules = mesh_of((1, 2, 2)), PRESETS["train"]
    model = Llama(CONFIG, SCANNED, rules)
    with jax.set_mesh(mesh):
        placed = shardings(model.shapes(), model.axes(), mesh, rules)
        params = jax.jit(model.init, out_shardings=placed)(jax.random.key(0))
    expected = jax.jit(Llama(CONFIG).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def bytes_per_device(tree: Any) -> set[int]:
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize(
    ("sizes", "preset", "of_matrices", "of_norms"),
    [
        ((4, 1, 1), "train", 1, 1),
        ((1, 4, 1), "train", 4, 4),
        ((1, 2, 2), "train", 4, 2),
        ((1, 1, 4), "train", 4, 1),
        ((1, 2, 2), "decode", 2, 1),
    ],
)
def test_each_device_holds_its_share(sizes, preset, of_matrices, of_norms):
    """fsdp splits everything, tensor all but the norms; decode does not split along fsdp."""
    params, axes = parameters(CONFIG), Llama(CONFIG).axes()
    placed = place(params, axes, mesh_of(sizes), PRESETS[preset])
    norms = (2 * CONFIG.n_layers + 1) * CONFIG.d_model * 4
    matrices = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - norms
    assert bytes_per_device(placed) == {matrices // of_matrices + norms // of_norms}


def test_a_training_step_keeps_its_state_split():
    """fsdp=4: state in and out is a quarter, and no more than one layer is gathered at a time."""
    accumulate = 2
    mesh, rules = mesh_of((1, 4, 1)), PRESETS["train"]
    compute = ComputeConfig(loss_chunks=2)
    axes = Llama(CONFIG).axes()
    optimizer = adamw(OptimizerConfig(), 10, axes)
    rows = {name: np.tile(x, (accumulate, 1)) for name, x in batch().items()}
    batch_axes = dict.fromkeys(rows, ("batch", "seq"))
    step = make_step(lm_loss(Llama(CONFIG, compute, rules)), optimizer, accumulate)
    plain_step = make_step(lm_loss(Llama(CONFIG, compute)), optimizer, accumulate)
    start = init_state(parameters(CONFIG), optimizer)

    state = place(start, state_axes(axes, optimizer), mesh, rules)
    share = bytes_per_device(state)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(state, place(rows, batch_axes, mesh, rules)).compile()
        state, metrics = jax.block_until_ready(
            compiled(state, place(rows, batch_axes, mesh, rules))
        )
    assert bytes_per_device(state) == share
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather" in line]
    assert gathers
    assert not [line for line in gathers if re.search(rf"\[{CONFIG.n_layers},", line)]

    expected = jax.block_until_ready(jax.jit(plain_step)(start, rows))
    assert_same(metrics["loss"], expected[1]["loss"])
    assert_same(metrics["grad_norm"], expected[1]["grad_norm"])


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(sizes, id=name) for name, sizes in MESHES.items() if name.find("data") < 0],
)
def test_the_loss_and_its_gradients_are_those_of_one_device(sizes):
    """With the order that balances causal attention, and every chunk of the loss on all devices."""
    mesh, rules = mesh_of(sizes), PRESETS["train"]
    compute = ComputeConfig(loss_chunks=2)

    def gradients(model: Llama, params: Any, batch: Any) -> Any:
        return jax.jit(jax.value_and_grad(lm_loss(model), has_aux=True))(params, batch)

    expected = jax.block_until_ready(gradients(Llama(CONFIG, compute), parameters(CONFIG), batch()))
    model = Llama(CONFIG, compute, rules)
    params = place(parameters(CONFIG), model.axes(), mesh, rules)
    with jax.set_mesh(mesh):
        found = jax.block_until_ready(gradients(model, params, place_batch(mesh, rules)))
    assert_same(found[0][0], expected[0][0])
    assert_same(found[1], expected[1])


@pytest.mark.parametrize("stacked", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(
    ("sizes", "preset"),
    [((1, 1, 2), "decode"), ((1, 2, 2), "decode"), ((1, 1, 2, 2), "decode"), ((1, 1, 2), "train")],
    ids=str,
)
def test_sharded_decoding_equals_the_full_forward_alone(sizes, preset, stacked):
    """Ragged prompts are prefilled, then three tokens are fed one by one."""
    mesh, rules = mesh_of(sizes), PRESETS[preset]
    slots, prompt, steps = 12, 5, 3
    lengths = np.array([5, 2, 4, 3], np.int32)
    random = np.random.default_rng(1)
    tokens = random.integers(0, CONFIG.vocab_size, (ROWS, prompt + steps), dtype=np.int32)
    positions = np.broadcast_to(np.arange(prompt + steps, dtype=np.int32), tokens.shape)
    expected = np.asarray(Llama(CONFIG).apply(parameters(CONFIG), tokens, positions).value)

    model = Llama(CONFIG, SCANNED, rules)
    params = place(parameters(CONFIG), model.axes(), mesh, rules)
    params = params if stacked else unstack(params)
    cache = KVCache.init(CONFIG, ROWS, slots, jnp.float32, stacked)
    cache = place(cache, cache.axes, mesh, rules)
    share = bytes_per_device(cache)

    @jax.jit
    def forward(params, tokens, positions, segments, cache):
        output = model.apply(params, tokens, positions, segments, cache)
        return output.value, output.cache

    with jax.set_mesh(mesh):
        segments = (positions[:, :prompt] < lengths[:, None]).astype(np.int32)
        logits, cache = jax.block_until_ready(
            forward(params, tokens[:, :prompt], positions[:, :prompt], segments, cache)
        )
        for row, length in enumerate(lengths):
            assert_same(logits[row, :length], expected[row, :length])
        for i in range(steps):
            at = (lengths + i)[:, None]
            new = np.take_along_axis(tokens, at, 1)
            logits, cache = jax.block_until_ready(
                forward(params, new, at, np.ones_like(new), cache)
            )
            wanted = np.take_along_axis(expected, at[..., None], 1)
            assert_same(logits, wanted)
            assert bytes_per_device(cache) == share
        text = forward.lower(params, new, at, np.ones_like(new), cache).compile().as_text()
    assert " all-reduce" in text
    assert " all-gather" not in text  # weights and cache stay where they are
