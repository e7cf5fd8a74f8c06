"""The matrix product: values, gradients and the types they are summed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.ops.product import product

pytestmark = pytest.mark.optimized  # else XLA multiplies bf16 slowly, or not at all on a CPU
SUBSCRIPTS = ["BTD,DF->BTF", "BTD,DKH->BTKH", "BTNH,NHD->BTD", "BTKGH,BSKH->BKTGS"]
SIZES = dict(zip("BTSDFKGHN", (2, 3, 5, 4, 6, 2, 3, 7, 8), strict=True))


def numbers(subscripts):
    """Operands and a cotangent in float64, all of them exact in bf16."""
    terms = subscripts.replace("->", ",").split(",")
    random = np.random.default_rng(0)
    return [random.integers(-128, 128, [SIZES[x] for x in term]) / 64 for term in terms]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("subscripts", SUBSCRIPTS)
def test_value_and_gradients_are_those_of_the_sum(subscripts, dtype):
    """Sums of exact products: fp32 holds them exactly, and bf16 rounds each of them once."""
    a, b, cotangent = numbers(subscripts)
    out, pull = jax.vjp(lambda a, b: product(subscripts, a, b), a.astype(dtype), jnp.float32(b))
    a_gradient, b_gradient = pull(cotangent.astype(dtype))

    letters, result = subscripts.split("->")
    a_letters, b_letters = letters.split(",")
    expected = np.einsum(subscripts, a, b)
    of_a = np.einsum(f"{result},{b_letters}->{a_letters}", cotangent, b)
    of_b = np.einsum(f"{a_letters},{result}->{b_letters}", a, cotangent)
    assert out.dtype == a_gradient.dtype == dtype
    np.testing.assert_array_equal(out, expected.astype(dtype))
    np.testing.assert_array_equal(a_gradient, of_a.astype(dtype))
    assert b_gradient.dtype == jnp.float32
    np.testing.assert_array_equal(b_gradient, of_b.astype(np.float32))  # not rounded to bf16
    assert (of_b != of_b.astype(jnp.bfloat16)).any()


def test_bf16_product_may_be_transposed_or_be_asked_for_in_fp32():
    """Large enough that XLA's CPU backend calls its library, which lacks some layouts."""
    random = np.random.default_rng(0)
    a, b = random.integers(-128, 128, (32, 64)) / 64, random.integers(-128, 128, (64, 128)) / 64
    run = jax.jit(lambda a, b: product("TD,DF->TF", a, b, jnp.float32).T)
    np.testing.assert_array_equal(run(jnp.bfloat16(a), jnp.bfloat16(b)), (a @ b).T)


def test_second_derivatives_exist():
    a, b, _ = numbers("BTD,DF->BTF")
    total = lambda a: jnp.sum(product("BTD,DF->BTF", a * a, jnp.float32(b)))  # noqa: E731
    second = jax.grad(lambda a: jnp.sum(jax.grad(total)(a)))(jnp.float32(a))
    np.testing.assert_allclose(second, np.broadcast_to(2 * b.sum(1), a.shape))
