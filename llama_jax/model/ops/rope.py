"""Rotary position embeddings (Su et al., arXiv 2104.09864) and their scalings.

Pair i of a head is (x[i], x[i + H/2]), the layout of Hugging Face checkpoints; Meta's own files
interleave the pairs and are permuted when they are converted.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.config import ModelConfig, RopeScaling

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines


def inverse_frequencies(config: ModelConfig, width: int | None = None) -> np.ndarray:
    """Radians per position of each pair, (width / 2,) float64, with every scaling but dynamic
    applied; width: of what is turned, None for config.rotary_width."""
    width = config.rotary_width if width is None else width
    pairs = np.arange(0, width, 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-pairs / width)
    scaling = config.rope_scaling
    match scaling.type:
        case "none" | "dynamic":
            return frequencies
        case "linear":
            return frequencies / scaling.factor
        case "llama3":
            return _llama3(frequencies, scaling)
        case "yarn":
            return _yarn(frequencies, config, width)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """LLaMA 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    original, low, high = _given(
        scaling.original_context, scaling.low_freq_factor, scaling.high_freq_factor
    )
    wavelengths = 2 * np.pi / frequencies
    keep = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn(frequencies: np.ndarray, config: ModelConfig, width: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): pairs that turn often are kept, slow ones stretched."""
    scaling = config.rope_scaling
    original, fast, slow = _given(scaling.original_context, scaling.beta_fast, scaling.beta_slow)

    def pair_that_turns(times: float) -> float:
        wavelength = original / times
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(fast)), 0)
    last = min(math.ceil(pair_that_turns(slow)), width - 1)
    # Equal ends would divide by zero; the reference widens the ramp by the same small amount.
    ramp = (np.arange(width // 2) - first) / (last - first if last > first else 1e-3)
    stretch = np.clip(ramp, 0, 1)
    return frequencies * (1 - stretch) + frequencies / scaling.factor * stretch


def _given(*values: float | None) -> tuple[float, ...]:
    """Values that the schema has already required."""
    return tuple(value for value in values if value is not None)


def attention_factor(scaling: RopeScaling) -> float:
    """Scale of cos and sin: 1, but for YaRN (section 3.3), which sharpens attention by it."""
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def rotations(
    config: ModelConfig,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    cache_length: int | None,
    width: int | None = None,
) -> Rotation:
    """Cosines and sines of every position and pair, each (B, T, width / 2) fp32.

    Dynamic scaling depends on a length. Without a cache it is the document's own (largest position
    of its segment + 1); with one it is the cache's, fixed at its creation, so that keys stored
    early agree with late ones.
    """
    frequencies = jnp.asarray(inverse_frequencies(config, width), jnp.float32)
    if config.rope_scaling.type == "dynamic":
        if cache_length is None:
            lengths_BT = _document_lengths(positions_BT, segments_BT)
        else:
            lengths_BT = jnp.full_like(positions_BT, cache_length)
        frequencies = _dynamic(config, lengths_BT, width)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    factor = attention_factor(config.rope_scaling)
    # The barrier keeps XLA from computing them once more in every layer, for every head.
    return lax.optimization_barrier((jnp.cos(angles) * factor, jnp.sin(angles) * factor))


def _document_lengths(positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Largest position + 1 of each token's document, (B, T)."""
    if segments_BT is None:
        return jnp.broadcast_to(positions_BT.max(axis=1, keepdims=True) + 1, positions_BT.shape)
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return jnp.where(same_BTT, positions_BT[:, None, :], 0).max(axis=2) + 1


def _dynamic(config: ModelConfig, lengths_BT: jax.Array, width: int | None) -> jax.Array:
    """NTK-aware scaling: the base grows beyond the original context; (B, T, H/2) frequencies."""
    scaling = config.rope_scaling
    width = config.rotary_width if width is None else width
    (original,) = _given(scaling.original_context)
    length = jnp.maximum(lengths_BT[..., None].astype(jnp.float32), original)
    growth = scaling.factor * length / original - (scaling.factor - 1)
    base = config.rope_theta * growth ** (width / (width - 2))
    return base ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Turns each pair of the first 2 R numbers of each head by its angle, in fp32; the result has
    the type of x."""
    width = 2 * cos_BTR.shape[-1]
    turning, still = x_BTNH[..., :width], x_BTNH[..., width:]
    pairs = turning.astype(jnp.float32).reshape(*turning.shape[:-1], 2, -1)
    cos, sin = cos_BTR[:, :, None, None, :], sin_BTR[:, :, None, :]
    turned = pairs * cos + pairs[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    turned = turned.reshape(turning.shape).astype(x_BTNH.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned
