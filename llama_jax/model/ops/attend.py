"""Scaled dot-product attention over grouped heads, and who may see whom."""

from functools import partial
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
        NOWHERE stands for a key that nobody sees.
    balanced: the tokens of a row lie in the order of `balanced_order`, not in their own.
    window: how many keys a query sees at most, its own among them; None: all.
    chunk: a query sees the keys of its own stretch of so many positions; None: all.
    keep_first: first positions that a window or chunk does not hide.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    key_positions: jax.Array | None = None
    balanced: bool = False
    window: int | None = None
    chunk: int | None = None
    keep_first: int = 0

    def distance(self) -> jax.Array:
        """(B, T, S) int32: how far each key lies before each query."""
        keys = self.positions if self.key_positions is None else self.key_positions
        return self.positions[:, :, None] - keys[:, None, :]

    def mask(self) -> jax.Array:
        """(B, T, S) bool: the key is of the same document, not later than the query and in its
        window or chunk, or among the first."""
        keys = self.positions if self.key_positions is None else self.key_positions
        distance = self.distance()
        seen = distance >= 0
        near = None
        if self.window is not None:
            near = distance < self.window
        if self.chunk is not None:
            near = self.positions[:, :, None] // self.chunk == keys[:, None, :] // self.chunk
        if near is not None:
            seen &= near | (keys[:, None, :] < self.keep_first) if self.keep_first else near
        if self.segments is not None:
            seen &= self.segments[:, None, :] == self.segments[:, :, None]
        return seen

    def of_keys(self, positions_BS: jax.Array | None) -> "Visibility":
        """The same queries, and keys of a cache at these positions; None: no cache."""
        if positions_BS is None:
            return self
        return self._replace(segments=None, key_positions=positions_BS)

    @property
    def reach(self) -> int | None:
        """Keys, a query's own the last, beyond which it sees none; None: there may be some."""
        return None if self.keep_first else self.window or self.chunk


NOWHERE = jnp.iinfo(jnp.int32).max


class Scoring(NamedTuple):
    """How a product of query and key becomes a score.

    scale: its factor; None: one over the root of the key's width.
    cap: scores become cap x tanh(score / cap); None: they stay.
    slopes: (N) what a score loses per position of distance (ALiBi); None: nothing.
    """

    scale: float | None = None
    cap: float | None = None
    slopes: tuple[float, ...] | None = None


PLAIN = Scoring()


def alibi_slopes(n_heads: int) -> tuple[float, ...]:
    """The slope of each head (Press et al., arXiv 2108.12409, section 3): 2^(-8 i / N), and for N
    that is no power of two those of the next lower power, and every second one of the next higher.
    """
    lower = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2 ** (-4 * (2 * i + 1) / lower) for i in range(n_heads - lower)]
    return tuple(slopes + between)


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSW: jax.Array,
    visibility: Visibility,
    kernel: Kernel = "xla",
    rules: Rules | None = None,
    scoring: Scoring = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(scores) v with N / K query heads per key head; (B, T, N, W).

    Scores and softmax are fp32. Every query must see at least one key (its own), which holds for
    padding too. Where the keys are the queries' own tokens, blocks of queries are computed against
    the keys from their window up to their end, which leaves out most of the scores that are hidden;
    or a kernel of `model.ops.kernels` does it all. sinks_N is one more score per head in the
    softmax, of a key whose value is zero.

    Where the rules split the tokens of a row over devices (context parallelism), queries stay where
    they are and all keys come to them.
    """
    is_split = visibility.key_positions is None and parts("seq", rules) > 1
    if is_split:
        whole = ("batch", "act_kv_heads", None, "head_dim")
        k_BKSH, v_BKSW = constrain(k_BKSH, whole, rules), constrain(v_BKSW, whole, rules)
    if kernel != "xla" and visibility.key_positions is None:
        segments, balanced = visibility.segments, visibility.balanced
        return fused(
            *(kernel, q_BTNH, k_BKSH, v_BKSW, segments, rules, balanced),
            window=visibility.window,
            scale=scoring.scale,
            cap=scoring.cap,
        )
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    mask_BTS = visibility.mask()
    distance_BTS = visibility.distance() if scoring.slopes else None
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)
    result = (B, T, N, v_BKSW.shape[-1])
    if visibility.key_positions is not None or is_split:
        y_BTKGW = _attend(scoring, q_BTKGH, k_BKSH, v_BKSW, mask_BTS, distance_BTS, sinks_KG)
        return y_BTKGW.reshape(result)
    size = max(SHORTEST_BLOCK, -(-T // BLOCKS))
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        # Positions rise by one or more, so what is out of reach by place is so by position.
        first = 0 if visibility.reach is None else max(0, start - visibility.reach + 1)
        mine, seen = slice(start, end), slice(first, end)
        blocks.append(
            _attend(
                scoring,
                q_BTKGH[:, mine],
                k_BKSH[:, :, seen],
                v_BKSW[:, :, seen],
                mask_BTS[:, mine, seen],
                None if distance_BTS is None else distance_BTS[:, mine, seen],
                sinks_KG,
            )
        )
    return jnp.concatenate(blocks, axis=1).reshape(result)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scoring, q_BTKGH, k_BKSH, v_BKSW, mask_BTS, distance_BTS, sinks_KG):
    return _forward(scoring, q_BTKGH, k_BKSH, v_BKSW, mask_BTS, distance_BTS, sinks_KG)[0]


def _forward(scoring, q_BTKGH, k_BKSH, v_BKSW, mask_BTS, distance_BTS, sinks_KG):
    """The result is divided by the sum of the weights, T x W numbers, not the weights, T x S.

    Axes of results are in the order of the operands', so that none is transposed on the way, and
    queries of a token and of its group are one axis: with two, XLA's CPU backend copies the keys
    transposed for every decoded token.
    """
    B, T, K, G, H = q_BTKGH.shape
    q_BKQH = jnp.moveaxis(q_BTKGH, 1, 2).reshape(B, K, T * G, H)
    scores_BKTGS = product("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, jnp.float32).reshape(B, K, T, G, -1)
    # A plain scale is applied to what is left of the scores in the exponent.
    scale = _scale(scoring, H)
    late, capped = scale, None
    if scoring.cap or scoring.slopes or sinks_KG is not None:
        late, scores_BKTGS = 1.0, scores_BKTGS * scale
    if scoring.cap:
        capped = jnp.tanh(scores_BKTGS / scoring.cap)
        scores_BKTGS = capped * scoring.cap
    if distance_BTS is not None:
        slopes_KG = jnp.asarray(scoring.slopes, jnp.float32).reshape(K, 1, G, 1)
        scores_BKTGS -= slopes_KG * distance_BTS[:, None, :, None].astype(jnp.float32)
    scores_BKTGS = jnp.where(mask_BTS[:, None, :, None], scores_BKTGS, jnp.finfo(jnp.float32).min)
    largest = jnp.max(scores_BKTGS, axis=-1, keepdims=True)
    if sinks_KG is not None:
        largest = jnp.maximum(largest, sinks_KG[:, None, :, None])
    weights = jnp.exp((scores_BKTGS - largest) * late)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    sunk = None
    if sinks_KG is not None:
        sunk = jnp.exp(sinks_KG[:, None, :, None] - largest)
        total += sunk
    inverse = 1 / total
    weights = weights.astype(v_BKSW.dtype)
    y_BKQW = product("BKQS,BKSW->BKQW", weights.reshape(B, K, T * G, -1), v_BKSW, jnp.float32)
    y_BKTGW = y_BKQW.reshape(B, K, T, G, -1) * inverse
    y_BTKGW = checkpoint_name(jnp.moveaxis(y_BKTGW, 2, 1).astype(q_BTKGH.dtype), "attended")
    return y_BTKGW, (q_BTKGH, k_BKSH, v_BKSW, weights, inverse, y_BTKGW, capped, sunk)


def _backward(scoring, residuals, g_BTKGW):
    """d weight = weight (g v - g y), as in FlashAttention (arXiv 2205.14135, appendix B.2).

    A sink is a score whose g v is 0; d tanh = 1 - tanh^2.
    """
    q_BTKGH, k_BKSH, v_BKSW, weights, inverse, y_BTKGW, capped, sunk = residuals
    dtype = q_BTKGH.dtype
    g32 = g_BTKGW.astype(jnp.float32)
    shift = jnp.moveaxis(jnp.sum(g32 * y_BTKGW.astype(jnp.float32), axis=-1, keepdims=True), 1, 2)
    gv = product("BTKGW,BKSW->BKTGS", g_BTKGW, v_BKSW, jnp.float32)
    g_scores = weights * ((gv - shift) * (inverse * _scale(scoring, q_BTKGH.shape[-1])))
    if capped is not None:
        g_scores *= 1 - capped**2
    g_scores = g_scores.astype(dtype)
    g_y = (g32 * jnp.moveaxis(inverse, 2, 1)).astype(dtype)
    q_gradient = product("BKTGS,BKSH->BKTGH", g_scores, k_BKSH)
    k_gradient = product("BTKGH,BKTGS->BKHS", q_BTKGH, g_scores)
    v_gradient = product("BTKGW,BKTGS->BKWS", g_y, weights)
    sink_gradient = None if sunk is None else -jnp.sum(sunk * inverse * shift, axis=(0, 2, 4))
    return (
        jnp.moveaxis(q_gradient, 2, 1),
        jnp.moveaxis(k_gradient, 3, 2),
        jnp.moveaxis(v_gradient, 3, 2),
        None,
        None,
        sink_gradient,
    )


_attend.defvjp(_forward, _backward)


def _scale(scoring: Scoring, width: int) -> float:
    return width**-0.5 if scoring.scale is None else scoring.scale
