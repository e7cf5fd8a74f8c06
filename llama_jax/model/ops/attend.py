"""Scaled dot-product attention over grouped heads, and who may see whom."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visibility(NamedTuple):
    """Positions and segments of queries and keys; a mask is made of them where it is used.

    query_positions (B, T), key_positions (B or 1, S); segments likewise, or None when every key
    belongs to the query's document. Segment 0 is padding, which sees only itself.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None

    def mask(self) -> jax.Array:
        """(B, T, S) bool: the key is not later than the query and of the same document."""
        seen = self.key_positions[:, None, :] <= self.query_positions[:, :, None]
        if self.query_segments is not None and self.key_segments is not None:
            seen &= self.key_segments[:, None, :] == self.query_segments[:, :, None]
        return seen


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visibility: Visibility
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with N / K query heads per key head; (B, T, N, H).

    Scores and softmax are fp32. Every query must see at least one key (its own), which holds for
    padding too.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = scores * H**-0.5
    scores = jnp.where(visibility.mask()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)
