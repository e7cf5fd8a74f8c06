"""Attention in numpy, one head and one document at a time: what the definitions are made of.

It is slow and shares nothing with what it is compared with.
"""

import math

import numpy as np

from llama_jax.config import ModelConfig


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """Over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def rope(x: np.ndarray, config: ModelConfig, width: int | None = None) -> np.ndarray:
    """(..., T, H) at positions 0, 1, ...: pair i of the first `width` numbers, (i, i + width / 2),
    turned as a complex number. Without rope as it is."""
    if config.position != "rope":
        return x
    width = config.rotary_width if width is None else width
    half = width // 2
    result = x.copy()
    for position in range(x.shape[-2]):
        for pair in range(half):
            angle = position * config.rope_theta ** (-2 * pair / width)
            z = (x[..., position, pair] + 1j * x[..., position, pair + half]) * np.exp(1j * angle)
            result[..., position, pair], result[..., position, pair + half] = z.real, z.imag
    return result


def slope(head: int, heads: int) -> float:
    """ALiBi's slope of a head, from 0 (arXiv 2108.12409, section 3 and its published code)."""
    if math.log2(heads).is_integer():
        return float(2.0 ** (-8.0 / heads * (head + 1)))
    lower = 2 ** int(math.log2(heads))
    if head < lower:
        return slope(head, lower)
    return slope(2 * (head - lower), 2 * lower)


def is_seen(query: int, key: int, config: ModelConfig) -> bool:
    """Whether the query at one position sees the key at another."""
    if key > query:
        return False
    if key < config.keep_first:
        return True
    if config.window is not None:
        return query - key < config.window
    if config.chunk is not None:
        return query // config.chunk == key // config.chunk
    return True


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    config: ModelConfig,
    head: int,
    sink: float | None = None,
) -> np.ndarray:
    """One head: q, k (T, H), v (T, W) -> (T, W), query by query."""
    rows = []
    for t in range(len(q)):
        seen = [s for s in range(t + 1) if is_seen(t, s, config)]
        scores = np.array([q[t] @ k[s] / math.sqrt(q.shape[1]) for s in seen])
        if config.score_cap is not None:
            scores = config.score_cap * np.tanh(scores / config.score_cap)
        if config.position == "alibi":
            scores = scores - slope(head, config.n_heads) * np.array([t - s for s in seen])
        weights = np.exp(scores - scores.max())
        total = weights.sum()
        if sink is not None:
            total += np.exp(sink - scores.max())
        rows.append(weights @ v[seen] / total)
    return np.stack(rows)
