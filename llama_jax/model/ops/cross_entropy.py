"""Next-token cross-entropy that never holds more than a chunk of the (tokens x vocab) logits.

With 32,000 pieces the logits of a batch are by far its largest array, and their gradient is as
large again. Here the sequence is cut into chunks: logits, losses and, when a gradient is wanted,
the gradients of `hidden` and `head` are formed for one chunk before the next one begins. The loss
is linear in its cotangent, so the backward pass only has to scale what the forward pass kept.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.model.ops.product import Weight, product


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunks: int,
    z_loss: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of weight * (-log p(target) + z_loss * log(Z)^2), in nats.

    Products take the type of `hidden` and are summed in fp32; log-sum-exp, losses and the gradient
    of `head` are fp32. The z-loss is PaLM's (arXiv 2204.02311, section 5). Nothing is gathered
    along the vocabulary, so `head` may be sharded along it.

    Args:
        hidden_BTD: states after the final norm.
        head_DV: output matrix (of a tied model the embedding, transposed).
        targets_BT: ids in [0, V), also where the weight is 0.
        weights_BT: what each token counts; 0 leaves it out.
        chunks: parts of T whose logits exist one after the other; divides T.
        z_loss: weight of log(Z)^2; 0 leaves it out.

    Returns:
        The summed loss (fp32), and sums to report through which no gradient flows: `loss` without
        the z-loss, `z_loss` times its weight, `correct` (weight of the tokens whose target has
        the largest logit) and `weight`.

    Raises:
        ValueError: chunks does not divide T.
    """
    length = hidden_BTD.shape[1]
    if length % chunks:
        raise ValueError(
            f"the sequence length ({length}) must be a multiple of the chunks of the loss "
            f"({chunks}); change loss_chunks"
        )
    total, sums = _summed(hidden_BTD, head_DV, targets_BT, weights_BT, chunks, z_loss)
    return total, lax.stop_gradient(sums)


def token_losses(
    hidden_BTD: jax.Array, head_DV: jax.Array | Weight, targets_BT: jax.Array, chunks: int
) -> jax.Array:
    """-log p(target) of every token in nats, (B, T) fp32: what evaluation reports.

    Args:
        hidden_BTD, targets_BT: as for `cross_entropy`.
        head_DV: as for `cross_entropy`, or in a layout of model.ops.weight.
        chunks: parts of T whose logits exist one after the other; divides T.
    """

    def chunk(_, inputs):
        hidden_BTD, targets_BT = inputs
        ones_BT = jnp.ones(targets_BT.shape)
        return None, _losses(_logits(hidden_BTD, head_DV), targets_BT, ones_BT, 0.0)[1]

    return _join(lax.scan(chunk, None, _cut((hidden_BTD, targets_BT), chunks))[1])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(hidden_BTD, head_DV, targets_BT, weights_BT, chunks, z_loss):
    """The loss alone: what evaluation compiles."""
    head_DV = head_DV.astype(hidden_BTD.dtype)

    def chunk(sums, inputs):
        hidden_BTD, targets_BT, weights_BT = inputs
        logits_BTV = _logits(hidden_BTD, head_DV)
        parts, _, _ = _losses(logits_BTV, targets_BT, weights_BT, z_loss)
        return jax.tree.map(jnp.add, sums, parts), None

    sums, _ = lax.scan(chunk, _zero(), _cut((hidden_BTD, targets_BT, weights_BT), chunks))
    return sums["loss"] + sums["z_loss"], sums


def _forward(hidden_BTD, head_DV, targets_BT, weights_BT, chunks, z_loss):
    """The loss and, as residuals, its gradients for a cotangent of 1."""
    dtype = hidden_BTD.dtype
    head = head_DV.astype(dtype)

    def chunk(carry, inputs):
        sums, head_gradient_DV = carry
        hidden_BTD, targets_BT, weights_BT = inputs
        logits_BTV = _logits(hidden_BTD, head)
        parts, losses_BT, log_z_BT = _losses(logits_BTV, targets_BT, weights_BT, z_loss)
        sums = jax.tree.map(jnp.add, sums, parts)

        softmax_BTV = jnp.exp(logits_BTV - log_z_BT[..., None])
        scaled_BTV = softmax_BTV * (1 + 2 * z_loss * log_z_BT)[..., None]
        hit_BTV = _is_target(logits_BTV, targets_BT)
        gradient_BTV = ((scaled_BTV - hit_BTV) * weights_BT[..., None]).astype(dtype)
        hidden_gradient_BTD = product("BTV,DV->BTD", gradient_BTV, head)
        head_gradient_DV += product("BTD,BTV->DV", hidden_BTD, gradient_BTV, jnp.float32)
        return (sums, head_gradient_DV), (hidden_gradient_BTD, losses_BT)

    carry = _zero(), jnp.zeros(head_DV.shape, jnp.float32)
    carry, kept = lax.scan(chunk, carry, _cut((hidden_BTD, targets_BT, weights_BT), chunks))
    sums, head_gradient_DV = carry
    hidden_gradient_BTD, losses_BT = (_join(x) for x in kept)
    gradients = hidden_gradient_BTD, head_gradient_DV.astype(head_DV.dtype), losses_BT
    return (sums["loss"] + sums["z_loss"], sums), gradients


def _backward(chunks, z_loss, gradients, cotangents):
    hidden_gradient_BTD, head_gradient_DV, losses_BT = gradients
    cotangent, _ = cotangents  # the sums are behind a stop_gradient
    return (
        (cotangent * hidden_gradient_BTD).astype(hidden_gradient_BTD.dtype),
        (cotangent * head_gradient_DV).astype(head_gradient_DV.dtype),
        None,
        cotangent * losses_BT,
    )


_summed.defvjp(_forward, _backward)


def _logits(hidden_BTD, head_DV):
    return product("BTD,DV->BTV", hidden_BTD, head_DV, jnp.float32)


def _is_target(logits_BTV, targets_BT):
    """True at the target of each token; compares ids, because V may be sharded."""
    return lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2) == targets_BT[..., None]


def _losses(logits_BTV, targets_BT, weights_BT, z_loss):
    """Sums over the tokens, unweighted losses_BT (with z-loss) and log_z_BT of one chunk."""
    largest_BT = jnp.max(logits_BTV, axis=-1)
    z_BT = jnp.sum(jnp.exp(logits_BTV - largest_BT[..., None]), axis=-1)
    log_z_BT = largest_BT + jnp.log(z_BT)
    target_BT = jnp.sum(jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0), axis=-1)
    nll_BT = log_z_BT - target_BT
    penalty_BT = z_loss * log_z_BT**2
    sums = {
        "loss": jnp.sum(weights_BT * nll_BT),
        "z_loss": jnp.sum(weights_BT * penalty_BT),
        "correct": jnp.sum(weights_BT * (target_BT >= largest_BT)),
        "weight": jnp.sum(weights_BT, dtype=jnp.float32),
    }
    return sums, nll_BT + penalty_BT, log_z_BT


def _zero():
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "z_loss", "correct", "weight")}


def _cut(arrays, chunks):
    """(B, T, ...) -> (chunks, B, T / chunks, ...), for each array.

    A chunk is every chunks-th token, so that devices that split T have a share of each of them.
    """

    def cut(x):
        batch, length, *rest = x.shape
        return jnp.moveaxis(x.reshape(batch, length // chunks, chunks, *rest), 2, 0)

    return tuple(cut(x) for x in arrays)


def _join(x):
    """(chunks, B, T / chunks, ...) -> (B, T, ...)."""
    chunks, batch, length, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, length * chunks, *rest)
