"""Weights laid out for inference: what they hold, and how they are multiplied.

A parameter is stored with its input axes first, (in..., out...), as training likes it. Decoding
streams every weight once for a few tokens, and there the layout decides the speed (figures:
docs/benchmarks).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.model.ops.product import letters

FEW_ROWS = 8  # up to here int8 products are faster than widening the weights
PARTS = 128  # what the second int8 of an activation counts, in parts of the first
INPUTS_AT_ONCE = 16  # summed by one loop; more are more streams of words than a core follows


def take(embedding: Any, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding (vocab, width), in any layout: (*ids.shape, width)."""
    if isinstance(embedding, OutputMajor | Words):
        return embedding.take(ids, dtype)
    return embedding.at[ids].get(mode="clip").astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputMajor:
    """A weight with its output axes first: values (out..., in...), maybe int8.

    scale: (out...) fp32, what the int8 values of each output are multiplied by; None for floats.
    """

    values: jax.Array
    scale: jax.Array | None = None

    def times(self, subscripts: str, a: jax.Array, dtype: Any) -> jax.Array:
        """As `product`, with this weight as b. The scale is applied to the sums."""
        of_a, _, of_c = letters(subscripts)
        ins, outs = _inputs_and_outputs(subscripts)

        values = self.values

        def anywhere(a: jax.Array) -> jax.Array:
            y = _sums(f"{of_a},{outs + ins}->{of_c}", a, values.astype(a.dtype))
            return y if self.scale is None else y * _spread(self.scale, outs, of_c)

        def on_cpu(a: jax.Array) -> jax.Array:
            rows, shape = _rows(subscripts, a, values.shape[: len(outs)])
            y = _cpu_product(rows, values.reshape(-1, rows.shape[1]), self.scale)
            return jnp.einsum(f"{shape.letters}->{of_c}", y.reshape(shape.sizes))

        return lax.platform_dependent(a, cpu=on_cpu, default=anywhere).astype(dtype)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """As the function `take`, of an embedding, which has one input and one output axis."""
        return _scaled(take(self.values, ids, jnp.float32), self.scale, ids).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Words:
    """A bf16 or int8 weight for one row at a time on a CPU: words (in / p, out...) uint32.

    A word holds p = 2 bf16 or 4 int8 values of consecutive inputs, the first one lowest; input axes
    are merged. XLA's CPU backend has no product of one row with narrow weights that is faster than
    with fp32. A loop over outputs that adds up a few words at a time is, because the compiler turns
    it into vector instructions that read nothing but words.

    scale: (out...) fp32 for int8; None for bf16.
    """

    words: jax.Array
    scale: jax.Array | None = None

    @staticmethod
    def can_hold(weight: OutputMajor, outputs: int) -> bool:
        """Whether the numbers are narrow, and the inputs of an output fill words."""
        size = weight.values.dtype.itemsize
        return size < 4 and math.prod(weight.values.shape[outputs:]) * size % 4 == 0

    @staticmethod
    def of(weight: OutputMajor, outputs: int) -> "Words":
        """The numbers of a weight that words `can_hold`, with this many output axes."""
        outs = weight.values.shape[:outputs]
        count = 4 // weight.values.dtype.itemsize
        values = weight.values.reshape(math.prod(outs), -1)
        words = lax.bitcast_convert_type(values.reshape(len(values), -1, count), jnp.uint32)
        return Words(words.T.reshape(-1, *outs), weight.scale)

    def times(self, subscripts: str, a: jax.Array, dtype: Any) -> jax.Array:
        """As `product`, with this weight as b."""
        x, shape = _rows(subscripts, a, self.words.shape[1:])
        y = self._one_row(x[0])[None] if len(x) == 1 else self._many_rows(x)
        y = y if self.scale is None else y * self.scale.reshape(-1)
        y = jnp.einsum(f"{shape.letters}->{letters(subscripts)[2]}", y.reshape(shape.sizes))
        return y.astype(dtype)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """As OutputMajor.take."""
        words = jnp.moveaxis(self.words.at[:, ids].get(mode="clip"), 0, -1)
        rows = lax.bitcast_convert_type(words, self._type).reshape(*ids.shape, -1)
        return _scaled(rows.astype(jnp.float32), self.scale, ids).astype(dtype)

    @property
    def _type(self) -> Any:
        return jnp.bfloat16 if self.scale is None else jnp.int8

    @property
    def _count(self) -> int:
        """Values of a word."""
        return 2 if self.scale is None else 4

    def _one_row(self, x: jax.Array) -> jax.Array:
        """x (in) times the words: (out merged) fp32."""
        # Tied to x, lest XLA unpack the words once before a loop over steps, as fp32. No reshape
        # before it: two, on both sides of the barrier, become a copy of the words at every call.
        words, x = lax.optimization_barrier((self.words, x))
        together = math.gcd(len(words), INPUTS_AT_ONCE // self._count)
        blocks = words.reshape(len(words) // together, together, -1)
        x = x.astype(jnp.float32).reshape(-1, together, self._count, 1)
        terms = (
            _value(blocks[:, j], i, self._count) * x[:, j, i]
            for j in range(together)
            for i in range(self._count)
        )
        # Without the barrier the last sum would be merged into the loop, which then runs over
        # inputs and no longer along the outputs.
        sums = lax.optimization_barrier(functools.reduce(jnp.add, terms))
        return jnp.ones(len(sums), jnp.float32) @ sums

    def _many_rows(self, x: jax.Array) -> jax.Array:
        """x (rows, in) times the words, unpacked for the occasion: (rows, out merged) fp32."""
        values = lax.bitcast_convert_type(self.words.reshape(len(self.words), -1), self._type)
        dense = jnp.moveaxis(values, 2, 1).reshape(x.shape[1], -1)
        return jnp.matmul(x, dense.astype(x.dtype), preferred_element_type=jnp.float32)


def _value(words: jax.Array, i: int, count: int) -> jax.Array:
    """The i-th of the values of each word, as fp32."""
    if count == 2:  # bf16 is the upper half of fp32
        bits = words & jnp.uint32(0xFFFF0000) if i else words << 16
        return lax.bitcast_convert_type(bits, jnp.float32)
    signed = lax.bitcast_convert_type(words, jnp.int32)
    return ((signed << (24 - 8 * i)) >> 24).astype(jnp.float32)


class _Shape(NamedTuple):
    """Letters and sizes of a product before its axes are put in the order that is asked for."""

    letters: str
    sizes: list[int]


def _rows(subscripts: str, a: jax.Array, out_sizes: tuple[int, ...]) -> tuple[jax.Array, _Shape]:
    """`a` as (rows, in), and the shape that (rows, out) stands for.

    The CPU products are of plain matrices: XLA copies a weight of more axes at every call.
    """
    of_a, _, _ = letters(subscripts)
    ins, outs = _inputs_and_outputs(subscripts)
    rest = "".join(x for x in of_a if x not in ins)
    sizes = dict(zip(of_a, a.shape, strict=True))
    inputs = math.prod(sizes[x] for x in ins)
    shape = _Shape(rest + outs, [*(sizes[x] for x in rest), *out_sizes])
    return jnp.einsum(f"{of_a}->{rest + ins}", a).reshape(-1, inputs), shape


def _cpu_product(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """x (rows, in) times weight (out, in): (rows, out) fp32.

    XLA's CPU backend rearranges the second operand at every call, so that must be the smaller one,
    except in its product of one fp32 row. The barriers keep it from swapping them to save the
    transposition.
    """
    if scale is None and len(x) == 1 and x.dtype == jnp.float32:
        return _sums("ri,oi->ro", x, weight.astype(x.dtype))
    if scale is None:
        return lax.optimization_barrier(_sums("oi,ri->or", weight.astype(x.dtype), x)).T
    if len(x) > FEW_ROWS:
        y = lax.optimization_barrier(_sums("oi,ri->or", weight.astype(x.dtype), x))
        return y.T * scale.reshape(-1)
    # Activations to 15 bits, as two int8: their products are faster than widening the weights.
    x = x.astype(jnp.float32)
    unit = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
    x = x / jnp.where(unit > 0, unit, 1)
    high = jnp.round(x)
    low = jnp.clip(jnp.round((x - high) * PARTS), -127, 127)
    both = jnp.concatenate([high, low]).astype(jnp.int8)
    y = lax.optimization_barrier(_sums("oi,ri->or", weight, both, jnp.int32)).T
    high, low = jnp.split(y.astype(jnp.float32), 2)
    return (high + low / PARTS) * unit * scale.reshape(-1)


def _scaled(rows: jax.Array, scale: jax.Array | None, ids: jax.Array) -> jax.Array:
    """Rows of an embedding (*ids.shape, width) fp32, times the scale of each."""
    return rows if scale is None else rows * take(scale, ids, jnp.float32)[..., None]


def _sums(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _inputs_and_outputs(subscripts: str) -> tuple[str, str]:
    """Letters of a weight b that the product sums over, and those of the result."""
    _, of_b, of_c = letters(subscripts)
    return "".join(x for x in of_b if x not in of_c), "".join(x for x in of_b if x in of_c)


def _spread(scale: jax.Array, outs: str, of_y: str) -> jax.Array:
    """The scale with an axis for each letter of the result."""
    shape = iter(scale.shape)
    return scale.reshape([next(shape) if x in outs else 1 for x in of_y])
