"""The model: one forward for every use, whatever the layout, padding, packing and number type.

What the model computes is compared with Hugging Face in test_huggingface.py, across meshes in
test_sharded_model.py, and here with itself; test_program.py reads the program without running it.
Sizes are tiny, and no two that could be confused are alike.
"""

import functools
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ComputeConfig, ModelConfig, RopeScaling
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.ops.activation import swiglu
from llama_jax.model.ops.attend import Visibility, attend
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.stack import stack, unstack
from sharding.rules import PRESETS

CONFIG = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=10,
    d_ff=48,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    tie_embeddings=False,
)
MODEL = Llama(CONFIG)
LAYOUTS = pytest.mark.parametrize("layout", ["stacked", "unrolled"])

# The model is a static argument, its head too.
apply = jax.jit(Llama.apply, static_argnums=0, static_argnames="head")


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**CONFIG.model_dump(), **changes})


def parameters(model: Llama = MODEL, head: str = "lm") -> dict[str, Any]:
    """Random parameters, faster than `init`, none of them 0 or 1: norms must not cancel."""
    numbers = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        norm = "norm" in jax.tree_util.keystr(path)
        values = numbers.uniform(0.5, 1.5, leaf.shape) if norm else numbers.normal(size=leaf.shape)
        return jnp.asarray(values if norm else 0.18 * values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes(head))


def some_tokens(batch: int, length: int, seed: int = 1) -> np.ndarray:
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)


def rising(batch: int, length: int) -> np.ndarray:
    return np.tile(np.arange(length, dtype=np.int32), (batch, 1))


def logits_of(params: Any, tokens: np.ndarray, model: Llama = MODEL) -> np.ndarray:
    """The reference: every row whole, without padding or cache."""
    return np.asarray(apply(model, params, tokens, rising(*tokens.shape)).value)


def in_layout(layout: str, params: Any) -> Any:
    return unstack(params) if layout == "unrolled" else params


def dirty_cache(layout: str, batch: int, length: int, model: Llama = MODEL) -> KVCache:
    """A cache that was used before: slots not yet written hold something large."""
    fresh = KVCache.init(model.config, batch, length, stacked=layout == "stacked")
    return jax.tree.map(lambda slab: jnp.full_like(slab, 30.0), fresh)


def per_layer(cache: KVCache) -> list[np.ndarray]:
    """Every layer's keys and values as (B, S, K, H), whatever the layout."""
    slabs = [
        layer if cache.stacked else layer[None]
        for name in ("key", "value")
        for layer in (arrays[name] for arrays in cache.layers)
    ]
    return [np.swapaxes(layer, 1, 2) for slab in slabs for layer in slab]


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal but for the order of fp32 sums: to 5e-6 of each array's largest number."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


def assert_equal(ours: Any, theirs: Any) -> None:
    """Equal in every bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- parameters are plain dicts --------------------------------------------------------------

L, D, N, K, H, F, V = 2, 32, 4, 2, 10, 48, 64
TREE = {
    "embed": ((V, D), ("vocab", "embed")),
    "layers": {
        "attention": {
            "q": ((L, D, N, H), ("layers", "embed", "heads", "head_dim")),
            "k": ((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim")),
            "v": ((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim")),
            "o": ((L, N, H, D), ("layers", "heads", "head_dim", "embed")),
        },
        "feed_forward": {
            "gate": ((L, D, F), ("layers", "embed", "mlp")),
            "up": ((L, D, F), ("layers", "embed", "mlp")),
            "down": ((L, F, D), ("layers", "mlp", "embed")),
        },
        "attention_norm": ((L, D), ("layers", "embed")),
        "feed_forward_norm": ((L, D), ("layers", "embed")),
    },
    "final_norm": ((D,), ("embed",)),
}
HEADS = {
    "lm": {"head": ((D, V), ("embed", "vocab"))},
    "scalar": {"scalar_head": ((D,), ("embed",))},
    "none": {},
}


def plain(tree: Any, index: int) -> Any:
    """The shapes (0) or the axes (1) of a tree like TREE."""
    if isinstance(tree, dict):
        return {name: plain(value, index) for name, value in tree.items()}
    return tree[index]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_axes_are_two_plain_trees(head, tied):
    model = Llama(config(tie_embeddings=tied))
    expected = TREE | ({} if tied and head == "lm" else HEADS[head])
    shapes = model.shapes(head)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    # Equality with nested dicts of tuples also says that no box or FrozenDict is left.
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == plain(expected, 0)
    assert model.axes(head) == plain(expected, 1)


def test_the_rules_know_every_axis_of_parameters_and_cache():
    named = {axis for leaf in jax.tree.leaves(MODEL.axes()) for axis in [leaf]}
    named |= set(KVCache.init(CONFIG, 1, 1).axes.layers[0]["key"])
    for rules in PRESETS.values():
        assert named <= {axis for axis, _ in rules.table}


@LAYOUTS
def test_the_cache_names_its_axes(layout):
    stacked = layout == "stacked"
    cache = jax.eval_shape(lambda: KVCache.init(CONFIG, 5, 7, jnp.bfloat16, stacked=stacked))
    axes = KVCache.init(CONFIG, 5, 7, jnp.bfloat16, stacked=stacked).axes
    sizes = {"layers": L, "batch": 5, "kv_seq": 7, "kv_heads": K, "head_dim": H}
    assert len(cache.layers) == (1 if stacked else L)
    for slabs, names in zip(cache.layers, axes.layers, strict=True):
        assert set(slabs) == {"key", "value"}
        for name, slab in slabs.items():
            assert slab.shape == tuple(sizes[axis] for axis in names[name])
            assert slab.dtype == jnp.bfloat16
    assert cache.max_length == 7


def test_new_parameters_are_drawn_as_they_are_declared():
    """Standard deviation 1 / sqrt(fan in), what writes into the residual stream by its 2 L
    additions smaller; norms 1; no two arrays and no two layers alike."""
    init = jax.jit(MODEL.init)
    params = init(jax.random.key(3))
    assert jax.tree.structure(params) == jax.tree.structure(MODEL.shapes())
    assert isinstance(params["layers"]["attention"]["q"], jax.Array)
    residual = (2 * L) ** -0.5
    deviations = {
        "embed": D**-0.5,
        "head": D**-0.5,
        "q": D**-0.5,
        "k": D**-0.5,
        "v": D**-0.5,
        "o": (N * H) ** -0.5 * residual,
        "gate": D**-0.5,
        "up": D**-0.5,
        "down": F**-0.5 * residual,
    }
    draws = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        assert leaf.dtype == jnp.float32
        if "norm" in name:
            assert (leaf == 1).all()
            continue
        assert np.std(leaf) == pytest.approx(deviations[name], rel=0.06), name
        assert abs(np.mean(leaf)) < 0.1 * deviations[name], name
        draws |= {layer.ravel()[0].item() for layer in (leaf if leaf.ndim > 2 else [leaf])}
    assert len(draws) == 7 * L + 2
    assert_equal(init(jax.random.key(3)), params)
    assert (init(jax.random.key(4))["embed"] != params["embed"]).all()


def test_a_model_is_a_value():
    same, other = Llama(config()), Llama(config(norm_eps=1e-6))
    rules = Llama(CONFIG, ComputeConfig(), PRESETS["train"])
    assert same == MODEL
    assert hash(same) == hash(MODEL)
    assert len({MODEL, same, other, rules}) == 3
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def program(model, x):
        traced.append(model)
        return x * model.config.norm_eps

    for model in (MODEL, same, other, MODEL):
        program(model, 1.0)
    assert traced == [MODEL, other]


# --- attention and who sees whom --------------------------------------------------------------


def test_the_mask_of_a_packed_row():
    """Two documents and padding: causal, apart, and every token sees itself at least."""
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 1]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    seen = [
        "x......",
        "xx.....",
        "xxx....",
        "...x...",
        "...xx..",
        ".....x.",
        ".....xx",
    ]
    mask = Visibility(positions, segments).mask()[0]
    assert ["".join("x" if key else "." for key in row) for row in mask.tolist()] == seen


def test_attention_is_softmax_attention():
    """Query head n reads key head n // (N / K); in float64, head by head."""
    numbers = np.random.default_rng(3)
    q = numbers.normal(size=(1, 5, N, H))
    k, v = numbers.normal(size=(2, 1, K, 5, H))
    positions = np.arange(5)[None]
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    ours = attend(*arrays, Visibility(positions))
    for n in range(N):
        scores = q[0, :, n] @ k[0, n // (N // K)].T / np.sqrt(H)
        weights = np.exp(scores) * np.tri(5)
        weights /= weights.sum(axis=1, keepdims=True)
        assert_close(ours[0, :, n], weights @ v[0, n // (N // K)])


@pytest.mark.parametrize("window", [None, 1, 50, 400])
@pytest.mark.parametrize("length", [128, 129, 300, 1100])
def test_attention_in_blocks_of_queries_is_attention(length, window):
    """Values and gradients against jax's own, with packed documents and padding."""
    numbers = np.random.default_rng(4)
    q = jnp.asarray(numbers.normal(size=(1, length, N, H)), jnp.float32)
    k, v = jnp.asarray(numbers.normal(size=(2, 1, K, length, H)), jnp.float32)
    direction = jnp.asarray(numbers.normal(size=q.shape), jnp.float32)
    first = length // 3
    positions = jnp.concatenate([jnp.arange(first), jnp.arange(length - first)])[None]
    segments = jnp.where(jnp.arange(length) < first, 1, 2).at[-5:].set(0)[None]
    visibility = Visibility(positions, segments, window=window)
    far = jnp.arange(length)[:, None] - jnp.arange(length)[None] >= (window or length)

    def theirs(q, k, v):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        mask = Visibility(positions, segments).mask()[:, None] & ~far
        return jnp.sum(direction * jax.nn.dot_product_attention(q, k, v, mask=mask))

    def ours(q, k, v):
        return jnp.sum(direction * attend(q, k, v, visibility))

    got, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (ours, theirs)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, expected)


def test_swiglu_and_its_gradient_are_those_of_the_formula():
    numbers = np.random.default_rng(5).normal(size=(3, 4, F)) * 3
    gate, up, direction = jnp.asarray(numbers, jnp.float32)
    formula = lambda gate, up: jax.nn.silu(gate) * up  # noqa: E731
    for f in (lambda f: f(gate, up), lambda f: jax.vjp(f, gate, up)[1](direction)):
        jax.tree.map(assert_close, f(swiglu), f(formula))
    rounded = swiglu(jnp.bfloat16(gate), jnp.bfloat16(up))
    expected = formula(jnp.bfloat16(gate).astype(jnp.float32), jnp.bfloat16(up).astype(jnp.float32))
    np.testing.assert_array_equal(rounded, expected.astype(jnp.bfloat16))


def test_rms_norm_is_its_formula():
    x = np.random.default_rng(3).normal(size=(2, 3, D))
    scale = np.linspace(0.5, 2, D)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale
    assert_close(rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale), 0.1), expected)


def test_later_tokens_change_nothing():
    tokens = some_tokens(1, 9)
    changed = tokens.copy()
    changed[0, 5] += 1
    params = parameters()
    before, after = logits_of(params, tokens), logits_of(params, changed)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (np.abs(after - before)[:, 5:].max(axis=-1) > 1e-3).all()


@LAYOUTS
@pytest.mark.parametrize(
    ("windows", "n_layers", "reach"),
    [
        ((4,), 1, 3),
        ((4, 2), 3, 3 + 1 + 3),
        ((2, 4), 3, 1 + 3 + 1),
        ((4, 2, 3), 5, 3 + 1 + 2 + 3 + 1),
        ((2, None), 3, 13),
    ],
)
def test_a_token_reaches_as_far_as_the_windows_of_the_layers_together(
    layout, windows, n_layers, reach
):
    """Each hands it on to the tokens whose window it is in; also token by token, with a cache."""
    model = Llama(config(pattern=[{"window": each} for each in windows], n_layers=n_layers))
    params = in_layout(layout, parameters(model))
    tokens = some_tokens(1, 14)
    other = tokens.copy()
    other[0, 0] = (tokens[0, 0] + 1) % CONFIG.vocab_size
    logits = logits_of(params, tokens, model)
    moved = np.abs(logits_of(params, other, model) - logits).max(axis=-1)[0] > 0
    assert moved.tolist() == [place <= reach for place in range(14)]

    cache = dirty_cache(layout, 1, 16, model)
    parts = []
    for start, end in pairwise((0, 6, 7, 8, 14)):
        positions = np.arange(start, end)[None]
        output = apply(model, params, tokens[:, start:end], positions, None, cache)
        cache = output.cache
        parts.append(output.value)
    assert_close(np.concatenate(parts, axis=1), logits)


def test_layers_with_windows_of_their_own_have_equal_gradients_in_every_layout():
    windowed = config(pattern=({"window": 4}, {}, {"window": 2}), n_layers=5)
    params = parameters(Llama(windowed))
    expected = gradient_and_logits(Llama(windowed, ComputeConfig(scan_layers=False)), params)
    for compute in (ComputeConfig(), ComputeConfig(remat="full")):
        assert_close(gradient_and_logits(Llama(windowed, compute), params), expected)


def test_only_distances_between_positions_count():
    params, tokens = parameters(), some_tokens(1, 9)
    moved = apply(MODEL, params, tokens, rising(1, 9) + 20).value
    assert_close(moved, logits_of(params, tokens))
    stretched = apply(MODEL, params, tokens, 2 * rising(1, 9)).value
    assert np.abs(stretched - logits_of(params, tokens)).max() > 1e-2


# --- the cache -------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize(
    "pieces",
    [(1,) * 9, (4, 1, 4)],
    ids=["token by token", "prefill, decode, verify"],
)
def test_with_a_cache_the_logits_are_those_of_the_whole_row(layout, pieces):
    params, tokens = parameters(), some_tokens(2, 9)
    expected = logits_of(params, tokens)
    params, cache = in_layout(layout, params), dirty_cache(layout, 2, 12)
    ends = np.cumsum((0, *pieces))
    for start, end in pairwise(ends):
        positions = rising(2, 9)[:, start:end]
        output = apply(MODEL, params, tokens[:, start:end], positions, None, cache)
        assert_close(output.value, expected[:, start:end])
        cache = output.cache
    assert all((layer[:, 9:] == 30).all() for layer in per_layer(cache))


def test_dynamic_rope_with_a_cache_is_that_of_a_row_as_long_as_the_cache():
    scaling = RopeScaling(type="dynamic", factor=2, original_context=4)
    model = Llama(config(rope_scaling=scaling))
    params, tokens = parameters(), some_tokens(2, 9)
    expected = logits_of(params, tokens, model)
    assert np.abs(expected - logits_of(params, tokens)).max() > 1e-2
    cache = dirty_cache("stacked", 2, 9)
    for t in range(9):
        output = apply(model, params, tokens[:, [t]], np.full((2, 1), t), None, cache)
        assert_close(output.value[:, 0], expected[:, t])
        cache = output.cache


@LAYOUTS
def test_rows_of_a_ragged_batch_are_as_if_alone(layout):
    """Prompts of 5, 2 and 7 tokens, padded on the right; each then goes on from its own end."""
    lengths, new = np.array([5, 2, 7]), 2
    params, tokens = parameters(), some_tokens(3, 9)
    alone = [
        logits_of(params, tokens[[row], : length + new])[0] for row, length in enumerate(lengths)
    ]
    params, cache = in_layout(layout, params), dirty_cache(layout, 3, 10)
    real = rising(3, 7) < lengths[:, None]
    prompts = np.where(real, tokens[:, :7], 0)
    prefilled = apply(MODEL, params, prompts, rising(3, 7), real.astype(np.int32), cache)
    for row, length in enumerate(lengths):
        assert_close(prefilled.value[row, :length], alone[row][:length])
    for layer in per_layer(prefilled.cache):
        written = (layer != 30).all(axis=(-1, -2))
        np.testing.assert_array_equal(written.sum(axis=1), lengths)

    cache = prefilled.cache
    for step in range(new):
        ends = (lengths + step)[:, None]
        nexts = np.take_along_axis(tokens, ends, axis=1)
        output = apply(MODEL, params, nexts, ends, np.ones((3, 1), np.int32), cache)
        for row in range(3):
            assert_close(output.value[row, 0], alone[row][lengths[row] + step])
        cache = output.cache


@LAYOUTS
def test_a_slot_beyond_the_cache_and_padding_are_dropped(layout):
    """Neither wrapped to the first slots nor clipped to the last one."""
    positions = np.array([[6], [7], [100], [2], [2]], np.int32)
    segments = np.array([[1], [1], [1], [1], [0]], np.int32)
    before = dirty_cache(layout, 5, 6)
    params = in_layout(layout, parameters())
    after = apply(MODEL, params, some_tokens(5, 1), positions, segments, before).cache
    for old, new in zip(per_layer(before), per_layer(after), strict=True):
        changed = (old != new).all(axis=(-1, -2))
        assert changed.sum() == 1
        assert changed[3, 2]
        np.testing.assert_array_equal(new[~changed], old[~changed])


@LAYOUTS
def test_a_decode_step_updates_the_cache_in_place(layout):
    """A donated cache becomes the new one; beside it only a layer's share is ever held."""
    model = Llama(config(n_layers=6))
    cache = jax.eval_shape(lambda: KVCache.init(model.config, 2, 1024, stacked=layout == "stacked"))
    params = jax.eval_shape(functools.partial(in_layout, layout), model.shapes())
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(model.apply, donate_argnames="cache")
    memory = step.lower(params, token, token, None, cache).compile().memory_analysis()
    cache_bytes = sum(slab.size * slab.dtype.itemsize for slab in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


@LAYOUTS
def test_the_cache_keeps_its_type(layout):
    params = jax.eval_shape(functools.partial(in_layout, layout), MODEL.shapes())
    cache = KVCache.init(CONFIG, 2, 6, jnp.bfloat16, stacked=layout == "stacked")
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    output = jax.eval_shape(MODEL.apply, params, token, token, None, cache)
    assert jax.tree.structure(output.cache) == jax.tree.structure(cache)
    for new, old in zip(jax.tree.leaves(output.cache), jax.tree.leaves(cache), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


# --- padding and packing ---------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 0), (6, 0), (0, 6), (2, 4)])
def test_padding_changes_nothing(left, right):
    """On either side, however much, and whatever ids and positions the padding has."""
    params, tokens = parameters(), some_tokens(2, 7)
    expected = logits_of(params, tokens)
    pad = functools.partial(np.pad, pad_width=((0, 0), (left, right)))
    padded, segments = pad(tokens, constant_values=9), pad(np.ones_like(tokens))
    for pad_position in (0, 3):
        positions = pad(rising(2, 7), constant_values=pad_position)
        logits = apply(MODEL, params, padded, positions, segments).value[:, left : left + 7]
        assert_close(logits, expected)
        assert_close(jax.nn.log_softmax(logits), jax.nn.log_softmax(expected))


def test_packed_documents_are_as_if_separate():
    """Three documents of four tokens in one row: logits, and gradients of something made of them.
    A second row is padding and nothing else."""
    params, tokens = parameters(), some_tokens(3, 4)
    direction = np.random.default_rng(2).normal(size=(3, 4, V)).astype(np.float32)

    def separate(params):
        logits = MODEL.apply(params, tokens, rising(3, 4)).value
        return jnp.sum(logits * direction), logits

    def packed(params):
        row = functools.partial(np.pad, pad_width=((0, 1), (0, 2)))  # (1, 12) -> (2, 14)
        segments = row(np.repeat([[1, 2, 3]], 4, axis=1))
        ids = row(tokens.reshape(1, 12), constant_values=9)
        logits = MODEL.apply(params, ids, row(rising(3, 4).reshape(1, 12)), segments).value
        documents = logits[0, :12].reshape(3, 4, V)
        return jnp.sum(documents * direction), documents

    gradient, logits = jax.jit(jax.grad(packed, has_aux=True))(params)
    expected_gradient, expected = jax.jit(jax.grad(separate, has_aux=True))(params)
    assert_close(logits, expected)
    assert_close(gradient, expected_gradient)


# --- how it is computed changes nothing ------------------------------------------------------

TOKENS = some_tokens(2, 9)
DIRECTION = np.random.default_rng(2).normal(size=(2, 9, V)).astype(np.float32)


def loss_and_logits(model: Llama, params: Any) -> tuple[jax.Array, jax.Array]:
    """A scalar whose gradient reaches everything; simple, so that it compiles quickly."""
    logits = model.apply(params, TOKENS, rising(2, 9)).value
    return jnp.sum(logits * DIRECTION), logits


gradient_and_logits = jax.jit(jax.grad(loss_and_logits, argnums=1, has_aux=True), static_argnums=0)


@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig(scan_layers=False),
        ComputeConfig(remat="full"),
        ComputeConfig(remat="named", remat_save=("query", "gate")),
        ComputeConfig(remat="named", remat_save=("query", "gate"), scan_layers=False),
        ComputeConfig(remat="named", remat_save=("query",), remat_offload=("gate", "up")),
    ],
    ids=lambda c: f"{c.remat}-{'scanned' if c.scan_layers else 'unrolled'}",
)
def test_scan_and_remat_give_equal_gradients(compute):
    expected = gradient_and_logits(MODEL, parameters())
    assert_close(gradient_and_logits(Llama(CONFIG, compute), parameters()), expected)


def test_per_layer_parameters_give_equal_logits():
    params = parameters()
    assert_close(logits_of(unstack(params), TOKENS), logits_of(params, TOKENS))


def test_stack_is_the_inverse_of_unstack():
    params = parameters()
    apart = unstack(params)
    assert isinstance(apart["layers"], tuple)
    np.testing.assert_array_equal(
        apart["layers"][1]["attention"]["k"], params["layers"]["attention"]["k"][1]
    )
    assert_equal(stack(apart), params)


def test_layers_of_a_pattern_are_stacked_by_their_places():
    """A stack for each place, on whose leading axis the layers of that place lie in order."""
    pattern = ({"n_kv_heads": 1}, {"attention": "gated"}, {"feed_forward": "relu2"})
    model = Llama(config(n_layers=5, pattern=pattern))
    params = parameters(model)
    assert set(params["layers"]) == {"0", "1", "2"}
    counts = [len(params["layers"][str(place)]["attention_norm"]) for place in range(3)]
    assert counts == [2, 2, 1]
    apart = unstack(params)
    for depth, layer in enumerate(apart["layers"]):
        stack_of_place = params["layers"][str(depth % 3)]
        assert_equal(layer, jax.tree.map(lambda w: w[depth // 3], stack_of_place))  # noqa: B023
    assert_equal(stack(apart, period=3), params)
    assert_close(logits_of(apart, TOKENS, model), logits_of(params, TOKENS, model))


# --- number types ----------------------------------------------------------------------------

BF16 = Llama(CONFIG, ComputeConfig(dtype="bfloat16"))


def test_bf16_is_near_fp32():
    """Rounding activations too costs at most three times what rounding the parameters does."""
    params = parameters()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)

    def off(ours: jax.Array, exact: jax.Array) -> float:
        assert ours.dtype == jnp.float32
        return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))

    exact = gradient_and_logits(MODEL, params)
    in_bf16 = jax.tree.leaves(jax.tree.map(off, gradient_and_logits(BF16, params), exact))
    inevitable = jax.tree.leaves(jax.tree.map(off, gradient_and_logits(MODEL, rounded), exact))
    assert max(inevitable) < 0.05
    assert (np.array(in_bf16) < 3 * np.array(inevitable)).all()


# --- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("head", "shape"), [("lm", (2, 9, V)), ("scalar", (2, 9)), ("none", (2, 9, D))]
)
def test_output_types(head, shape, dtype):
    model = Llama(CONFIG, ComputeConfig(dtype=dtype))
    program = functools.partial(model.apply, head=head)
    value, cache, aux = jax.eval_shape(program, model.shapes(head), TOKENS, rising(2, 9))
    assert value.shape == shape
    assert value.dtype == (dtype if head == "none" else "float32")
    assert cache is None
    assert aux == {}


def test_heads_are_products_of_the_final_normed_hidden_states():
    params = parameters()
    hidden = np.asarray(apply(MODEL, params, TOKENS, rising(2, 9), head="none").value)
    np.testing.assert_allclose(
        np.sqrt(np.mean((hidden / params["final_norm"]) ** 2, axis=-1)), 1, rtol=1e-4
    )
    assert_close(logits_of(params, TOKENS), hidden @ params["head"])
    direction = parameters(head="scalar")["scalar_head"]
    scores = apply(
        MODEL, params | {"scalar_head": direction}, TOKENS, rising(2, 9), head="scalar"
    ).value
    assert_close(scores, hidden @ direction)


def test_tied_embeddings_are_the_head_and_learn_from_both_ends():
    tied = Llama(config(tie_embeddings=True))
    params = parameters()
    del params["head"]
    untied = params | {"head": params["embed"].T}
    expected, expected_logits = gradient_and_logits(MODEL, untied)
    expected["embed"] = expected["embed"] + expected.pop("head").T
    assert_close(gradient_and_logits(tied, params), (expected, expected_logits))


def test_layers_and_cache_of_different_layouts_are_refused():
    tokens, positions = jnp.ones((1, 2), jnp.int32), jnp.arange(2)[None]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), MODEL.shapes())
    for params, stacked in ((zeros, False), (unstack(zeros), True)):
        cache = KVCache.init(CONFIG, 1, 4, stacked=stacked)
        with pytest.raises(ValueError, match="both be stacked, or both be unstacked"):
            MODEL.apply(params, tokens, positions, None, cache)
