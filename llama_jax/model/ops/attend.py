"""Scaled dot-product attention over grouped heads, and who may see whom."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.ops.kernels import Kernel, fused
from llama_jax.model.ops.product import product
from sharding.constrain import constrain, parts
from sharding.rules import Rules

# Blocks of queries: 4 leave 5/8 of the work; more would save little, copy keys and compile longer.
BLOCKS, SHORTEST_BLOCK = 4, 128


class Visibility(NamedTuple):
    """What decides which keys a query sees; a mask is made of it where it is used.

    positions: (B, T), rising along a row within a document.
    segments: (B, T) documents of a row; 0 is padding, which sees only itself. None when every key
        belongs to the query's document.
    key_positions: (B or 1, S). None when the keys are the queries' own tokens, in the same order.
    balanced: the tokens of a row lie in the order of `balanced_order`, not in their own.
    window: how many keys a query sees at most, its own among them; None: all.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    key_positions: jax.Array | None = None
    balanced: bool = False
    window: int | None = None

    def mask(self) -> jax.Array:
        """(B, T, S) bool: the key is of the same document, not later than the query and not before
        its window."""
        keys = self.positions if self.key_positions is None else self.key_positions
        distance = self.positions[:, :, None] - keys[:, None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.segments is not None:
            seen &= self.segments[:, None, :] == self.segments[:, :, None]
        return seen


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    kernel: Kernel = "xla",
    rules: Rules | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with N / K query heads per key head; (B, T, N, H).

    Scores and softmax are fp32. Every query must see at least one key (its own), which holds for
    padding too. Where the keys are the queries' own tokens, blocks of queries are computed against
    the keys from their window up to their end, which leaves out most of the scores that are hidden;
    or a kernel of `model.ops.kernels` does it all.

    Where the rules split the tokens of a row over devices (context parallelism), queries stay where
    they are and all keys come to them.
    """
    is_split = visibility.key_positions is None and parts("seq", rules) > 1
    if is_split:
        whole = ("batch", "act_kv_heads", None, "head_dim")
        k_BKSH, v_BKSH = constrain(k_BKSH, whole, rules), constrain(v_BKSH, whole, rules)
    if kernel != "xla" and visibility.key_positions is None:
        segments, balanced = visibility.segments, visibility.balanced
        return fused(kernel, q_BTNH, k_BKSH, v_BKSH, segments, rules, balanced, visibility.window)
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    mask_BTS = visibility.mask()
    if visibility.key_positions is not None or is_split:
        return _attend(q_BTKGH, k_BKSH, v_BKSH, mask_BTS).reshape(q_BTNH.shape)
    size = max(SHORTEST_BLOCK, -(-T // BLOCKS))
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        # Positions rise by one or more, so what is out of the window by place is so by position.
        first = 0 if visibility.window is None else max(0, start - visibility.window + 1)
        mine, seen = slice(start, end), slice(first, end)
        blocks.append(
            _attend(
                q_BTKGH[:, mine], k_BKSH[:, :, seen], v_BKSH[:, :, seen], mask_BTS[:, mine, seen]
            )
        )
    return jnp.concatenate(blocks, axis=1).reshape(q_BTNH.shape)


@jax.custom_vjp
def _attend(q_BTKGH, k_BKSH, v_BKSH, mask_BTS):
    return _forward(q_BTKGH, k_BKSH, v_BKSH, mask_BTS)[0]


def _forward(q_BTKGH, k_BKSH, v_BKSH, mask_BTS):
    """The result is divided by the sum of the weights, T x H numbers, not the weights, T x S.

    Axes of results are in the order of the operands', so that none is transposed on the way, and
    queries of a token and of its group are one axis: with two, XLA's CPU backend copies the keys
    transposed for every decoded token.
    """
    B, T, K, G, H = q_BTKGH.shape
    q_BKQH = jnp.moveaxis(q_BTKGH, 1, 2).reshape(B, K, T * G, H)
    scores_BKTGS = product("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, jnp.float32).reshape(B, K, T, G, -1)
    scores_BKTGS = jnp.where(mask_BTS[:, None, :, None], scores_BKTGS, jnp.finfo(jnp.float32).min)
    largest = jnp.max(scores_BKTGS, axis=-1, keepdims=True)
    weights = jnp.exp((scores_BKTGS - largest) * q_BTKGH.shape[-1] ** -0.5)
    inverse = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v_BKSH.dtype)
    y_BKQH = product("BKQS,BKSH->BKQH", weights.reshape(B, K, T * G, -1), v_BKSH, jnp.float32)
    y_BKTGH = y_BKQH.reshape(B, K, T, G, H) * inverse
    y_BTKGH = checkpoint_name(jnp.moveaxis(y_BKTGH, 2, 1).astype(q_BTKGH.dtype), "attended")
    return y_BTKGH, (q_BTKGH, k_BKSH, v_BKSH, weights, inverse, y_BTKGH)


def _backward(residuals, g_BTKGH):
    """d weight = weight (g v - g y), as in FlashAttention (arXiv 2205.14135, appendix B.2)."""
    q_BTKGH, k_BKSH, v_BKSH, weights, inverse, y_BTKGH = residuals
    dtype = q_BTKGH.dtype
    g32 = g_BTKGH.astype(jnp.float32)
    shift = jnp.sum(g32 * y_BTKGH.astype(jnp.float32), axis=-1, keepdims=True)
    gv = product("BTKGH,BKSH->BKTGS", g_BTKGH, v_BKSH, jnp.float32)
    scale = q_BTKGH.shape[-1] ** -0.5
    g_scores = weights * ((gv - jnp.moveaxis(shift, 1, 2)) * (inverse * scale))
    g_scores = g_scores.astype(dtype)
    g_y = (g32 * jnp.moveaxis(inverse, 2, 1)).astype(dtype)
    q_gradient = product("BKTGS,BKSH->BKTGH", g_scores, k_BKSH)
    k_gradient = product("BTKGH,BKTGS->BKHS", q_BTKGH, g_scores)
    v_gradient = product("BTKGH,BKTGS->BKHS", g_y, weights)
    return (
        jnp.moveaxis(q_gradient, 2, 1),
        jnp.moveaxis(k_gradient, 3, 2),
        jnp.moveaxis(v_gradient, 3, 2),
        None,
    )


_attend.defvjp(_forward, _backward)
