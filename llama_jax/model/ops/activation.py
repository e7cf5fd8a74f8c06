"""Activations of the feed-forward layer: SwiGLU and GeGLU (Shazeer, arXiv 2002.05202), squared ReLU
(So et al., arXiv 2109.08668)."""

import jax
import jax.numpy as jnp


def activate(kind: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """A product with a gate (swiglu, geglu), or the square of relu (relu2): in fp32, and rounded
    once to the type of `up`."""
    if kind == "relu2":
        return jnp.square(jax.nn.relu(up.astype(jnp.float32))).astype(up.dtype)
    assert gate is not None
    if kind == "swiglu":
        return swiglu(gate, up)
    wide = jax.nn.gelu(gate.astype(jnp.float32), approximate=True) * up.astype(jnp.float32)
    return wide.astype(up.dtype)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in fp32 and rounded once to the type of gate.

    The gradient needs `gate` and `up` alone; autodiff would keep the sigmoid and silu(gate) too.
    """
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up32).astype(gate.dtype)


def _forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _backward(operands, gradient):
    gate, up, g = (x.astype(jnp.float32) for x in (*operands, gradient))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    gate_gradient = g * up * (sigmoid + silu * (1 - sigmoid))
    return gate_gradient.astype(gradient.dtype), (g * silu).astype(gradient.dtype)


swiglu.defvjp(_forward, _backward)
