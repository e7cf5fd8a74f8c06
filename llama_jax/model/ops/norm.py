"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis.

    The statistics are fp32 whatever x is; the result is cast back before it is scaled, as in the
    reference code of LLaMA, so that bf16 results agree with it too.
    """
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms).astype(x.dtype) * scale_D.astype(x.dtype)
