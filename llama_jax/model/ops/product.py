"""The product of two arrays: every matrix product of the model is `product`."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax


@runtime_checkable
class Weight(Protocol):
    """A weight that is laid out otherwise than its letters say, and so multiplies by itself."""

    def times(self, subscripts: str, a: jax.Array, dtype: Any) -> jax.Array:
        """As `product` with this weight as b."""


def product(subscripts: str, a: jax.Array, b: jax.Array | Weight, dtype: Any = None) -> jax.Array:
    """einsum(subscripts, a, b), computed in the type of a, summed in fp32 and rounded once.

    The gradient of b has the type b is stored in: that of an fp32 master weight is summed in fp32
    and never rounded to bf16 on its way, as differentiating through a cast would.

    Args:
        subscripts: "A,B->C", where each letter is in two of the three terms or in all.
        a: activations, in the compute type.
        b: weights or activations, in any type; or a weight in a layout of model.ops.weight.
        dtype: type of the result; None for that of a.
    """
    dtype = dtype or a.dtype
    if isinstance(b, Weight):
        return b.times(subscripts, a, dtype)
    return _product(subscripts, a, b, dtype)


def letters(subscripts: str) -> tuple[str, str, str]:
    """The letters of a, of b and of the result."""
    operands, result = subscripts.split("->")
    a, b = operands.split(",")
    return a, b, result


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
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
    return _product(subscripts, a, b, dtype), (a, b)


def _backward(subscripts, dtype, operands, gradient):
    a, b = operands
    of_a, of_b, of_c = letters(subscripts)
    gradient = gradient.astype(a.dtype)
    return (
        _product(f"{of_c},{of_b}->{of_a}", gradient, b, a.dtype),
        _product(f"{of_a},{of_c}->{of_b}", a, gradient, b.dtype),
    )


_product.defvjp(_forward, _backward)
