"""The gated delta rule (Gated DeltaNet, Yang et al., arXiv 2412.06464) and its short convolution.

Letters: H is the width of a key, V of a value; a row of T tokens is cut into M chunks of I tokens,
and J stands for the same tokens as I where a pair of them is meant.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.model.ops.product import product


def gated_delta(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNV: jax.Array,
    log_decay_BTN: jax.Array,
    beta_BTN: jax.Array,
    starts_BT: jax.Array,
    state_BNHV: jax.Array,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """A memory S (H, V) per head that is written and read token by token; (B, T, N, V) and S.

        S = 0 if starts, S = exp(log_decay) S, S = S + beta k (v - S^T k)^T, y = S^T q

    The result has the type of v, the state is fp32. Products of many tokens take the type of q, k
    and v and are summed in fp32; decays and the inverse of a chunk are fp32.

    Args:
        q_BTNH, k_BTNH: queries and keys, normalised and scaled.
        v_BTNV: values.
        log_decay_BTN: at most 0, finite.
        beta_BTN: how much of what the key recalls is replaced, 0 to 2. A token whose beta and
            log_decay are 0, such as padding, leaves the state as it is.
        starts_BT: bool; a document begins here, and what was before is forgotten.
        state_BNHV: S before the first token.
        chunk: tokens that are computed at once. One token alone takes the rule as it is written.
    """
    B, T, N, V = v_BTNV.shape
    state_BNHV, log_decay_BTN, beta_BTN = (
        x.astype(jnp.float32) for x in (state_BNHV, log_decay_BTN, beta_BTN)
    )
    tokens = q_BTNH, k_BTNH, v_BTNV, log_decay_BTN, beta_BTN, starts_BT[..., None]
    if T == 1:
        y_BNV, state_BNHV = _step(state_BNHV, *(x[:, 0] for x in tokens))
        return y_BNV[:, None], state_BNHV
    q, k, v, log_decay, beta, starts = (_cut(x, min(chunk, T)) for x in tokens)
    chunks = q, k, v, *_pairs(q, k, log_decay, beta, starts)
    # Kept for the backward pass are the states between chunks, and not what a chunk makes of them.
    state_BNHV, y_MBNIV = lax.scan(jax.checkpoint(_chunk, prevent_cse=False), state_BNHV, chunks)
    return jnp.moveaxis(y_MBNIV, (0, 2), (1, 3)).reshape(B, -1, N, V)[:, :T], state_BNHV


def _step(state_BNHV, q_BNH, k_BNH, v_BNV, log_decay_BN, beta_BN, starts_B1):
    """The rule for one token, in fp32."""
    q_BNH, k_BNH, v32_BNV = (x.astype(jnp.float32) for x in (q_BNH, k_BNH, v_BNV))
    decayed_BNHV = jnp.exp(log_decay_BN)[..., None, None] * state_BNHV
    decayed_BNHV = jnp.where(starts_B1[:, :, None, None], 0, decayed_BNHV)
    change_BNV = beta_BN[..., None] * (v32_BNV - _read(decayed_BNHV, k_BNH))
    state_BNHV = decayed_BNHV + k_BNH[..., None] * change_BNV[..., None, :]
    return _read(state_BNHV, q_BNH).astype(v_BNV.dtype), state_BNHV


def _read(state_BNHV: jax.Array, key_BNH: jax.Array) -> jax.Array:
    """S^T key; (B, N, V)."""
    return _matmul(key_BNH[..., None, :], state_BNHV)[..., 0, :]


def _cut(x: jax.Array, size: int) -> jax.Array:
    """(B, T, N, ...) as (chunks, B, N, size, ...), the last chunk filled with zeros."""
    B, T, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -T % size), *((0, 0) for _ in rest)])
    return jnp.moveaxis(x.reshape(B, -1, size, *rest), (1, 3), (0, 2))


def _pairs(q_MBNIH, k_MBNIH, log_decay_MBNI, beta_MBNI, starts_MB1I):
    """What of the chunks does not depend on the state, for all of them at once.

    Its tokens write u = writes (v - from_state k S), where S is the state before the chunk and
    writes = (1 + diag(beta) tril(decay k k^T, -1))^-1 diag(beta): the paper's chunkwise form with
    one product fewer, since its W = writes k is not formed.

    Returns:
        writes and scores = tril(decay q k^T), both (I, J) in the type of q, and the fp32 decays
        from the state before to each token, and from each token to the end of the chunk, (I,).
    """
    size = log_decay_MBNI.shape[-1]
    earlier_IJ = np.tri(size, dtype=bool)
    # A difference of running sums would lose the decays that follow a strong one to rounding.
    until_MBNIJ = jnp.where(earlier_IJ, log_decay_MBNI[..., None, :], 0)
    between_MBNIJ = _matmul(until_MBNIJ, jnp.tri(size, k=-1))
    document_MB1I = jnp.cumsum(starts_MB1I, axis=-1)
    seen = earlier_IJ & (document_MB1I[..., None] == document_MB1I[..., None, :])
    decay_MBNIJ = jnp.exp(jnp.where(seen, between_MBNIJ, -jnp.inf))
    since_MBNI = between_MBNIJ[..., 0] + log_decay_MBNI[..., :1]
    from_state_MBNI = jnp.exp(jnp.where(document_MB1I == 0, since_MBNI, -jnp.inf))

    recall_MBNIJ = product("MBNIH,MBNJH->MBNIJ", k_MBNIH, k_MBNIH, jnp.float32) * decay_MBNIJ
    inverse_MBNIJ = _inverse(beta_MBNI[..., None] * jnp.tril(recall_MBNIJ, -1))
    writes_MBNIJ = inverse_MBNIJ * beta_MBNI[..., None, :]
    scores_MBNIJ = product("MBNIH,MBNJH->MBNIJ", q_MBNIH, k_MBNIH, jnp.float32) * decay_MBNIJ
    writes_MBNIJ, scores_MBNIJ = (x.astype(q_MBNIH.dtype) for x in (writes_MBNIJ, scores_MBNIJ))
    return writes_MBNIJ, scores_MBNIJ, from_state_MBNI, decay_MBNIJ[..., -1, :]


def _chunk(state_BNHV, chunk):
    """The state after a chunk, and the chunk's results (B, N, I, V)."""
    q_BNIH, k_BNIH, v_BNIV, writes_BNIJ, scores_BNIJ, from_state_BNI, to_end_BNI = chunk
    dtype = v_BNIV.dtype
    from_state, to_end = from_state_BNI[..., None], to_end_BNI[..., None]
    recalled_BNIV = from_state * product("BNIH,BNHV->BNIV", k_BNIH, state_BNHV, jnp.float32)
    change_BNIV = (v_BNIV.astype(jnp.float32) - recalled_BNIV).astype(dtype)
    u_BNIV = product("BNIJ,BNJV->BNIV", writes_BNIJ, change_BNIV, jnp.float32)
    y_BNIV = from_state * product("BNIH,BNHV->BNIV", q_BNIH, state_BNHV, jnp.float32)
    y_BNIV += product("BNIJ,BNJV->BNIV", scores_BNIJ, u_BNIV, jnp.float32)
    state_BNHV = from_state[..., -1:, :] * state_BNHV
    state_BNHV += product("BNIH,BNIV->BNHV", k_BNIH, to_end * u_BNIV, jnp.float32)
    return state_BNHV, y_BNIV.astype(dtype)


@jax.custom_vjp
def _inverse(a: jax.Array) -> jax.Array:
    """(1 + a)^-1 of strictly lower triangular matrices (..., I, J) fp32.

    From the inverses p, r of the diagonal blocks of [[P, 0], [Q, R]], that of all is
    [[p, 0], [-r Q p, r]]: blocks are joined in pairs until there is one.
    """
    # The product (1 - a)(1 + a^2)(1 + a^4)... costs as much, but its powers grow, where keys are
    # alike, until nothing is left of fp32: an error of 1e11 where this one's is 4e-7. Products of
    # the whole size are mostly of zeros, yet XLA expects blocks cut out of it to take TPUs twice
    # as long.
    at = np.arange(a.shape[-1])
    inverse, width = jnp.eye(len(at), dtype=a.dtype), 1
    while width < len(at):
        block = at // width
        joined = (block[:, None] // 2 == block // 2) & (block[:, None] != block)
        off = jnp.where(joined, a, 0)
        inverse -= off if width == 1 else _matmul(_matmul(inverse, off), inverse)
        width *= 2
    return inverse


def _inverse_forward(a):
    inverse = _inverse(a)
    return inverse, inverse


def _inverse_backward(inverse, gradient):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-_matmul(_matmul(transposed, gradient), transposed),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b of fp32, which a TPU or a GPU would else round to fewer bits."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def short_convolution(
    x_BTC: jax.Array,
    weight_WC: jax.Array,
    starts_BT: jax.Array,
    tail_BWC: jax.Array,
    real_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal convolution of each channel, which sees its own document only; (B, T, C) and the tail.

    Args:
        x_BTC: inputs.
        weight_WC: weights of the last W inputs, the oldest first.
        starts_BT: bool; a document begins here, and inputs before it count as zeros.
        tail_BWC: the last W - 1 inputs before these.
        real_BT: which inputs are no padding, in each row the first ones; None: all are. The new
            tail is of real inputs, with zeros for those of documents before the last.
    """
    T, W = x_BTC.shape[1], len(weight_WC)
    inputs = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    document = jnp.pad(jnp.cumsum(starts_BT, axis=1), ((0, 0), (W - 1, 0)))
    weight_WC, y_BTC = weight_WC.astype(jnp.float32), jnp.zeros(x_BTC.shape, jnp.float32)
    for w in range(W):
        seen = document[:, w : w + T] == document[:, W - 1 :]
        y_BTC += weight_WC[w] * jnp.where(seen[..., None], inputs[:, w : w + T], 0)
    if real_BT is None:
        tail, of_tail = inputs[:, T:], document[:, T:]
    else:
        last = jnp.sum(real_BT, axis=1)[:, None] + np.arange(W - 1)
        tail = jnp.take_along_axis(inputs, last[..., None], axis=1, mode="clip")
        of_tail = jnp.take_along_axis(document, last, axis=1, mode="clip")
    tail = jnp.where((of_tail == of_tail[:, -1:])[..., None], tail, 0)
    return y_BTC.astype(x_BTC.dtype), tail.astype(tail_BWC.dtype)
