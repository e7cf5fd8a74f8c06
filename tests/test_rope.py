"""Rotary embeddings: golden frequencies, each scaling against its formula, and what turning means.

The golden values are derived in float64 from the published config.json files (Llama 3.1 8B, Llama
3.2 1B and 3B) and the rule of Meta's llama-models; the counts say how many of a head's pairs each
rule keeps, blends and divides.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ModelConfig, RopeScaling, load_model
from llama_jax.model.ops.rope import attention_factor, inverse_frequencies, rotate, rotations

LINEAR = RopeScaling(type="linear", factor=4)
DYNAMIC = RopeScaling(type="dynamic", factor=2, original_context=16)
YARN = RopeScaling(type="yarn", factor=8, original_context=256, beta_fast=32, beta_slow=1)


def config(d_head: int = 16, theta: float = 1e4, scaling: RopeScaling | None = None) -> ModelConfig:
    return ModelConfig(
        d_model=32,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        d_head=d_head,
        d_ff=32,
        vocab_size=32,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling or RopeScaling(),
        tie_embeddings=False,
    )


def unscaled(d_head: int, theta: float) -> list[float]:
    """Radians per position of each pair, one by one."""
    return [theta ** -(2 * pair / d_head) for pair in range(d_head // 2)]


def whole_row(length: int) -> jax.Array:
    return jnp.arange(length)[None]


# --- golden values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bands", "pairs"),
    [
        (
            "llama3.1_8b",
            (29, 6, 29),
            {
                29: 2.1665707635e-3,
                30: 1.3718935678e-3,
                31: 8.5675141292e-4,
                32: 5.2484616099e-4,
                33: 3.1269375038e-4,
                34: 1.7850781277e-4,
                63: 3.0689259889e-7,
            },
        ),
        (
            "llama3.2_1b",
            (15, 3, 14),
            {15: 1.2905479282e-3, 16: 4.2955679656e-4, 17: 9.7082878026e-5, 31: 9.4183067254e-8},
        ),
        ("llama3.2_3b", (29, 6, 29), {63: 7.6723149723e-8}),
    ],
)
def test_llama3_scaling_has_the_golden_values(name, bands, pairs):
    model = load_model(name)
    scaled = inverse_frequencies(model)
    plain = np.array(unscaled(model.d_head, model.rope_theta))
    assert scaled.dtype == np.float64
    assert scaled.shape == (model.d_head // 2,)
    for pair, expected in pairs.items():
        assert scaled[pair] == pytest.approx(expected, rel=1e-10)

    kept = np.isclose(scaled, plain, rtol=1e-12, atol=0)
    divided = np.isclose(scaled, plain / model.rope_scaling.factor, rtol=1e-12, atol=0)
    between = ~kept & ~divided
    assert (kept.sum(), between.sum(), divided.sum()) == bands
    # The fast pairs are the kept ones, the slow ones are divided: three bands in this order.
    assert kept[: bands[0]].all()
    assert divided[-bands[2] :].all()


@pytest.mark.parametrize("name", ["llama_7b", "llama2_7b"])
def test_unscaled_frequencies_have_the_golden_values(name):
    frequencies = inverse_frequencies(load_model(name))
    assert frequencies[0] == 1.0
    assert frequencies[16] == pytest.approx(0.1, rel=1e-12)
    assert frequencies[63] == pytest.approx(1.1547819847e-4, rel=1e-10)


# --- scalings against formulas written here --------------------------------------------------


def test_no_scaling_is_the_plain_formula():
    np.testing.assert_allclose(inverse_frequencies(config(16, 5e5)), unscaled(16, 5e5), rtol=1e-12)


def test_linear_scaling_divides_positions():
    stretched = config(scaling=LINEAR)
    np.testing.assert_allclose(
        inverse_frequencies(stretched), np.array(unscaled(16, 1e4)) / 4, rtol=1e-12
    )
    for ours, plain in zip(
        rotations(stretched, 4 * whole_row(20), None, None),
        rotations(config(), whole_row(20), None, None),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def yarn_reference(d_head: int, theta: float, scaling: RopeScaling) -> list[float]:
    """YaRN by search: from the last pair that turns beta_fast times within the original context to
    the first that turns beta_slow times, the stretch grows in equal steps."""
    plain = unscaled(d_head, theta)

    def turns(pair: int) -> float:
        return scaling.original_context * theta ** -(2 * pair / d_head) / (2 * math.pi)

    often = [pair for pair in range(d_head) if turns(pair) >= scaling.beta_fast]
    rarely = [pair for pair in range(d_head) if turns(pair) <= scaling.beta_slow]
    first = often[-1] if often else 0
    last = rarely[0] if rarely else d_head - 1
    frequencies = []
    for pair, frequency in enumerate(plain):
        if pair <= first:
            stretched = 0.0
        elif pair >= last:
            stretched = 1.0
        else:
            stretched = (pair - first) / (last - first)
        frequencies.append((1 - stretched) * frequency + stretched * frequency / scaling.factor)
    return frequencies


@pytest.mark.parametrize(
    ("d_head", "theta", "original", "fast", "slow", "bands"),
    [
        (16, 1e4, 256, 32, 1, (1, 3, 4)),
        (128, 1e4, 4096, 32, 1, (21, 25, 18)),
        (64, 5e5, 8192, 32, 1, (10, 8, 14)),
        (16, 1e4, 64, 32, 1, (1, 2, 5)),  # no pair turns 32 times in 64 positions
        (16, 1e4, 8192, 8, 2, (5, 1, 2)),
        (16, 1e4, 300_000, 32, 1, (7, 1, 0)),  # no pair turns less than once
    ],
)
def test_yarn_is_its_formula(d_head, theta, original, fast, slow, bands):
    scaling = RopeScaling(
        type="yarn", factor=8, original_context=original, beta_fast=fast, beta_slow=slow
    )
    ours = inverse_frequencies(config(d_head, theta, scaling))
    np.testing.assert_allclose(ours, yarn_reference(d_head, theta, scaling), rtol=1e-12)
    ratio = ours / unscaled(d_head, theta)
    kept, divided = np.isclose(ratio, 1, rtol=1e-12), np.isclose(ratio, 1 / 8, rtol=1e-12)
    assert (kept.sum(), (~kept & ~divided).sum(), divided.sum()) == bands


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (YARN, 0.1 * math.log(8) + 1),
        (YARN.model_copy(update={"attention_factor": 1.5}), 1.5),
        (LINEAR, 1.0),
        (DYNAMIC, 1.0),
        (RopeScaling(), 1.0),
    ],
)
def test_only_yarn_scales_cosine_and_sine(scaling, expected):
    assert attention_factor(scaling) == pytest.approx(expected, rel=1e-12)
    cos, sin = rotations(config(scaling=scaling), whole_row(20), None, None)
    np.testing.assert_allclose(np.hypot(cos, sin), expected, rtol=1e-6)


def dynamic_reference(d_head: int, theta: float, scaling: RopeScaling, length: int) -> list[float]:
    """NTK-aware scaling as it was posed: stretch the slowest pair by `stretch`, keep the fastest,
    and let the base between them follow."""
    stretch = 1.0
    if length > scaling.original_context:
        stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    steps = d_head // 2 - 1  # from the fastest pair to the slowest
    return [f / stretch ** (pair / steps) for pair, f in enumerate(unscaled(d_head, theta))]


def angles(cos: jax.Array, sin: jax.Array) -> np.ndarray:
    return np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))


def assert_turns_by(ours: np.ndarray, expected: np.ndarray) -> None:
    """Angles equal but for whole turns."""
    difference = (np.asarray(ours) - expected + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(difference, 0, atol=2e-5)


@pytest.mark.parametrize("length", [5, 16, 17, 40])
def test_dynamic_scaling_follows_the_length_of_each_row(length):
    """Rows of one batch have their own lengths; up to the original context nothing changes."""
    positions = jnp.stack([jnp.arange(40) % length, jnp.arange(40) % 16])
    ours = angles(*rotations(config(scaling=DYNAMIC), positions, None, None))
    for row, row_length in enumerate((length, 16)):
        frequencies = dynamic_reference(16, 1e4, DYNAMIC, row_length)
        assert_turns_by(ours[row], np.outer(positions[row], frequencies))
    if length <= 16:
        assert_turns_by(ours[0], np.outer(positions[0], unscaled(16, 1e4)))


def test_dynamic_scaling_with_a_cache_follows_the_length_of_the_cache():
    """Keys stored at the first step must agree with queries of the last."""
    ours = angles(*rotations(config(scaling=DYNAMIC), whole_row(20), None, cache_length=64))
    frequencies = dynamic_reference(16, 1e4, DYNAMIC, 64)
    assert_turns_by(ours[0], np.outer(np.arange(20), frequencies))


def test_angles_are_fp32():
    for table in rotations(config(), whole_row(3), None, None):
        assert table.shape == (1, 3, 8)
        assert table.dtype == jnp.float32


# --- turning ---------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rotate_multiplies_complex_numbers():
    """Pair i is the complex number x[i] + x[i + H/2] j, turned by exp(position * frequency j)."""
    x = normal(0, 2, 5, 3, 16)
    positions = np.array([[0, 1, 2, 3, 4], [7, 3, 50, 0, 9]])
    ours = np.asarray(rotate(x, *rotations(config(16), positions, None, None)))
    turns = np.exp(1j * positions[..., None] * np.array(unscaled(16, 1e4)))
    turned = (x[..., :8] + 1j * x[..., 8:]) * turns[:, :, None]
    np.testing.assert_allclose(ours[..., :8] + 1j * ours[..., 8:], turned, atol=2e-5)


@pytest.mark.parametrize("scaling", [RopeScaling(), LINEAR, YARN], ids=lambda s: s.type)
def test_scores_depend_on_the_distance_alone(scaling):
    q, k = normal(1, 1, 1, 1, 16), normal(2, 1, 1, 1, 16)

    def score(query: int, key: int) -> float:
        turned = [
            rotate(x, *rotations(config(scaling=scaling), jnp.array([[position]]), None, None))
            for x, position in ((q, query), (k, key))
        ]
        return float(jnp.vdot(*turned))

    expected = score(9, 4)
    assert score(5, 0) == pytest.approx(expected, abs=1e-5)
    assert score(105, 100) == pytest.approx(expected, abs=1e-4)
    assert abs(score(9, 5) - expected) > 1e-2
    assert abs(score(4, 9) - expected) > 1e-2


def test_position_zero_is_not_turned():
    x = normal(3, 1, 1, 2, 16)
    np.testing.assert_array_equal(rotate(x, *rotations(config(), jnp.array([[0]]), None, None)), x)


def test_rotate_computes_in_fp32_and_keeps_the_type():
    x = normal(4, 1, 6, 2, 16).astype(jnp.bfloat16)
    turns = rotations(config(), 100 * whole_row(6), None, None)
    ours = rotate(x, *turns)
    assert ours.dtype == jnp.bfloat16
    rounded_once = np.asarray(rotate(x.astype(np.float32), *turns)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(ours), rounded_once)


def test_dynamic_scaling_knows_no_neighbours_and_no_padding():
    positions = jnp.concatenate([jnp.arange(4), jnp.arange(8), jnp.arange(8, 12)])[None]
    segments = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([4, 8, 4]))[None]
    scaling = DYNAMIC.model_copy(update={"original_context": 4})
    scaled = config(scaling=scaling)
    packed = angles(*rotations(scaled, positions, segments, None))
    for part, length in ((slice(0, 4), 4), (slice(4, 12), 8)):
        alone = angles(*rotations(scaled, whole_row(length), None, None))
        np.testing.assert_array_equal(packed[:, part], alone)
