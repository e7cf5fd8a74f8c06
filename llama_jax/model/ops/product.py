"""The product of two arrays: every matrix product of the model is `product`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """einsum(subscripts, a, b), computed in the type of a, summed in fp32 and rounded once.

    The gradient of b has the type b is stored in: that of an fp32 master weight is summed in fp32
    and never rounded to bf16 on its way, as differentiating through a cast would.

    Args:
        subscripts: "A,B->C", where each letter is in two of the three terms or in all.
        a: activations, in the compute type.
        b: weights or activations, in any type.
        dtype: type of the result; None for that of a.
    """
    dtype = dtype or a.dtype

    def rounded_within(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)

    def rounded_after(a: jax.Array, b: jax.Array) -> jax.Array:
        wide = jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
        return lax.optimization_barrier(wide).astype(dtype)

    b = b.astype(a.dtype)
    if a.dtype == jnp.float32:
        return rounded_within(a, b)
    # XLA's CPU backend is fast at bf16 products with fp32 results only, and fails at those that a
    # transposition follows (hence the barrier). Elsewhere, a result that is bf16 at once halves
    # what tensor parallelism sends.
    return lax.platform_dependent(a, b, cpu=rounded_after, default=rounded_within)


def _forward(subscripts, a, b, dtype):
    return product(subscripts, a, b, dtype), (a, b)


def _backward(subscripts, dtype, operands, gradient):
    a, b = operands
    inputs, c_letters = subscripts.split("->")
    a_letters, b_letters = inputs.split(",")
    gradient = gradient.astype(a.dtype)
    return (
        product(f"{c_letters},{b_letters}->{a_letters}", gradient, b),
        product(f"{a_letters},{c_letters}->{b_letters}", a, gradient, b.dtype),
    )


product.defvjp(_forward, _backward)
