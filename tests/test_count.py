"""Every published size, exactly: its configuration, parameters, bytes of cache and FLOPs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from llama_jax.config import (
    ComputeConfig,
    Frozen,
    ModelConfig,
    RopeScaling,
    load_model,
    model_names,
)
from llama_jax.model import count
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama


@dataclass(frozen=True)
class Published:
    """What the papers, model cards and params.json files print; the counts follow from it."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    multiple_of: int  # of the feed-forward width
    multiplier: float | None  # of the feed-forward width
    d_ff: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # Llama 3.1's scaling; low 1, high 4, original context 8192
    tied: bool
    parameters: int


# fmt: off
PUBLISHED = {
    "llama_7b": Published(
        4096, 32, 32, 32, 128, 256, None, 11008, 32000, 1e-6, 1e4, None, False, 6_738_415_616),
    "llama_13b": Published(
        5120, 40, 40, 40, 128, 256, None, 13824, 32000, 1e-6, 1e4, None, False, 13_015_864_320),
    "llama_33b": Published(
        6656, 60, 52, 52, 128, 256, None, 17920, 32000, 1e-6, 1e4, None, False, 32_528_943_616),
    "llama_65b": Published(
        8192, 80, 64, 64, 128, 256, None, 22016, 32000, 1e-5, 1e4, None, False, 65_285_660_672),
    "llama2_7b": Published(
        4096, 32, 32, 32, 128, 256, None, 11008, 32000, 1e-5, 1e4, None, False, 6_738_415_616),
    "llama2_13b": Published(
        5120, 40, 40, 40, 128, 256, None, 13824, 32000, 1e-5, 1e4, None, False, 13_015_864_320),
    "llama2_34b": Published(
        8192, 48, 64, 8, 128, 256, 1.0, 22016, 32000, 1e-5, 1e4, None, False, 33_743_970_304),
    "llama2_70b": Published(
        8192, 80, 64, 8, 128, 4096, 1.3, 28672, 32000, 1e-5, 1e4, None, False, 68_976_648_192),
    "llama3_8b": Published(
        4096, 32, 32, 8, 128, 1024, 1.3, 14336, 128256, 1e-5, 5e5, None, False, 8_030_261_248),
    "llama3_70b": Published(
        8192, 80, 64, 8, 128, 4096, 1.3, 28672, 128256, 1e-5, 5e5, None, False, 70_553_706_496),
    "llama3.1_8b": Published(
        4096, 32, 32, 8, 128, 1024, 1.3, 14336, 128256, 1e-5, 5e5, 8, False, 8_030_261_248),
    "llama3.1_70b": Published(
        8192, 80, 64, 8, 128, 4096, 1.3, 28672, 128256, 1e-5, 5e5, 8, False, 70_553_706_496),
    "llama3.1_405b": Published(
        16384, 126, 128, 8, 128, 4096, 1.2, 53248, 128256, 1e-5, 5e5, 8, False, 405_853_388_800),
    "llama3.2_1b": Published(
        2048, 16, 32, 8, 64, 256, 1.5, 8192, 128256, 1e-5, 5e5, 32, True, 1_235_814_400),
    "llama3.2_3b": Published(
        3072, 28, 24, 8, 128, 256, 1.0, 8192, 128256, 1e-5, 5e5, 32, True, 3_212_749_824),
}
# fmt: on

CACHE_BYTES_BF16 = {
    "llama2_7b": 524_288,
    "llama2_13b": 819_200,
    "llama_65b": 2_621_440,
    "llama2_70b": 327_680,
    "llama3_8b": 131_072,
    "llama3.1_405b": 516_096,
    "llama3.2_1b": 32_768,
    "llama3.2_3b": 114_688,
}


def test_every_published_size_has_a_file():
    assert set(PUBLISHED) == {name for name in model_names() if name.startswith("llama")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_is_the_published_one(name):
    row = PUBLISHED[name]
    scaling = RopeScaling()
    if row.rope_factor:
        scaling = RopeScaling(
            type="llama3",
            factor=row.rope_factor,
            original_context=8192,
            low_freq_factor=1,
            high_freq_factor=4,
        )
    assert load_model(name) == ModelConfig(
        d_model=row.d_model,
        n_layers=row.n_layers,
        n_heads=row.n_heads,
        n_kv_heads=row.n_kv_heads,
        d_head=row.d_head,
        d_ff=row.d_ff,
        vocab_size=row.vocab_size,
        norm_eps=row.norm_eps,
        rope_theta=row.rope_theta,
        rope_scaling=scaling,
        tie_embeddings=row.tied,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_feed_forward_width_follows_metas_rule(name):
    row = PUBLISHED[name]
    width = int(2 * (4 * row.d_model) / 3)
    if row.multiplier is not None:
        width = int(row.multiplier * width)
    assert math.ceil(width / row.multiple_of) * row.multiple_of == load_model(name).d_ff


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_by_shape_inference_and_in_closed_form(name):
    config = load_model(name)
    by_shapes = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(Llama(config).shapes()))
    assert by_shapes == PUBLISHED[name].parameters
    assert count.n_parameters(config) == PUBLISHED[name].parameters


@pytest.mark.parametrize("name", CACHE_BYTES_BF16)
def test_cache_bytes_of_the_closed_form_and_of_a_cache(name):
    config = load_model(name)
    assert count.cache_bytes_per_token(config) == CACHE_BYTES_BF16[name]
    assert count.cache_bytes_per_token(config, bytes_per_value=4) == 2 * CACHE_BYTES_BF16[name]
    batch, length = 3, 7
    cache = jax.eval_shape(lambda: KVCache.init(config, batch, length, jnp.bfloat16))
    n_bytes = sum(math.prod(slab.shape) * slab.dtype.itemsize for slab in jax.tree.leaves(cache))
    assert n_bytes == batch * length * CACHE_BYTES_BF16[name]


# --- FLOPs, counted product by product in the program itself ---------------------------------

BATCH, LENGTH = 2, 16


def flops_model(**changes) -> Llama:
    """Sizes of which no two are alike, so that no mistake cancels."""
    sizes = {
        "d_model": 24,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_head": 10,
        "d_ff": 40,
        "vocab_size": 56,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_embeddings": False,
    }
    return Llama(ModelConfig(**sizes | changes), ComputeConfig(scan_layers=False))


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation, those of inner programs too; the layers here are unrolled, so each runs
    once."""
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("scan", "while"), "would run more than once"
        yield equation
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from equations(getattr(value, "jaxpr", value))


def flops(program, *args) -> int:
    """Two per multiplication of every matrix product.

    Products of activations with activations (scores and values; they have batch dimensions, which
    a product with a weight has not) count half: a causal program needs no more of them, though
    this one computes all and masks.
    """
    total = 0
    for equation in equations(jax.make_jaxpr(program)(*args).jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            made = math.prod(equation.outvars[0].aval.shape)
            both = 2 * made * math.prod(left[axis] for axis in contracted)
            total += both // 2 if batched else both
    return total


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 6}, {"n_kv_heads": 1}, {"tie_embeddings": True}]
)
def test_flops_are_those_of_the_program(changes):
    model = flops_model(**changes)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(params, tokens, positions):
        return jnp.sum(model.apply(params, tokens, positions).value ** 2)

    per_token = count.flops_per_token(model.config, LENGTH)
    forward = flops(loss, model.shapes(), tokens, tokens)
    assert forward == BATCH * LENGTH * count.forward_flops_per_token(model.config, LENGTH)
    training = flops(jax.value_and_grad(loss), model.shapes(), tokens, tokens)
    assert training == BATCH * LENGTH * per_token
    assert 3 * forward == training


def test_flops_of_a_7b_model_by_hand():
    """6 x (the parameters that multiply) + 6 x 32 layers x 4096 wide x length for attention."""
    config = load_model("llama2_7b")
    multiplying = 6_738_415_616 - 32000 * 4096 - (2 * 32 + 1) * 4096  # no embedding, no norms
    assert count.flops_per_token(config, 4096) == 6 * multiplying + 6 * 32 * 4096 * 4096
    assert count.flops_per_token(config, 4096) == 42_863_689_728


def test_flops_of_windows_are_those_of_the_pairs_their_masks_leave():
    """Layers with windows 3 and none in turn; the area of a mask is its pairs less half a diagonal,
    and, where a window ends, half another."""
    length, plain = 16, load_model("tiny")
    layers = [(3, None)[i % 2] for i in range(plain.n_layers)]
    windowed = plain.model_copy(update={"pattern": (Frozen({"window": 3}), Frozen())})
    hidden = sum(
        sum(query - key >= window for query in range(length) for key in range(query + 1))
        - (length - window) / 2
        for window in layers
        if window
    )
    less = count.flops_per_token(plain, length) - count.flops_per_token(windowed, length)
    per_pair = 6 * 2 * plain.n_heads * plain.d_head
    assert hidden > 0
    assert less == pytest.approx(per_pair * hidden / length, rel=1e-6)
