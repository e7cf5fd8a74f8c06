"""The product of a mixture of experts: rows that lie sorted by group, each times the matrix of its
group, without padding (Gale et al., arXiv 2211.15841, section 4)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.model.ops.weight import OutputMajor

LARGEST_BLOCK = 512  # rows that are multiplied at once

Update = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def block_size(rows: int, groups: int) -> int:
    """Rows to multiply at once: a power of two, at most the mean group."""
    return min(LARGEST_BLOCK, 1 << max(0, (rows // groups).bit_length() - 1))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_product(
    x_MI: jax.Array,
    w_EIO: jax.Array,
    sizes_E: jax.Array,
    block: int,
    mesh_axes: tuple[str, ...] = (),
    dimension: int = 1,
) -> jax.Array:
    """The first sizes_E[0] rows times w_EIO[0], the next times w_EIO[1], ...: (M, I) -> (M, O).

    Types and sums are those of `product`: computed in the type of x, summed in fp32 and rounded
    once; the gradient of w has the type of w and is summed in fp32, over mesh_axes too. Rows
    beyond the groups give 0, and have no part in any gradient.

    Args:
        x_MI: rows, in the compute type.
        w_EIO: matrices, in any type.
        sizes_E: rows of each group, int32; at most M together.
        block: rows to multiply at once, at most M: `block_size`.
        mesh_axes: inside shard_map, those that split a dimension of w, which is gathered.
        dimension: the one that they split, 1 or 2.
    """
    return _times(x_MI, _whole(w_EIO, x_MI.dtype, mesh_axes, dimension), sizes_E, block, 1)


def _forward(x_MI, w_EIO, sizes_E, block, mesh_axes, dimension):
    y_MO = grouped_product(x_MI, w_EIO, sizes_E, block, mesh_axes, dimension)
    return y_MO, (x_MI, w_EIO, sizes_E)


def _backward(block, mesh_axes, dimension, operands, gradient_MO):
    x_MI, w_EIO, sizes_E = operands
    whole = _whole(w_EIO, x_MI.dtype, mesh_axes, dimension)
    of_x = _times(gradient_MO, whole, sizes_E, block, 2)
    of_w = _outer(x_MI, gradient_MO, sizes_E, block)
    if mesh_axes:
        of_w = lax.psum_scatter(of_w, mesh_axes, scatter_dimension=dimension, tiled=True)
    return of_x, of_w.astype(w_EIO.dtype), None


grouped_product.defvjp(_forward, _backward)


def output_major_product(
    x_MI: jax.Array,
    weight: OutputMajor,
    sizes_E: jax.Array,
    block: int,
    mesh_axes: tuple[str, ...] = (),
    dimension: int = 1,
) -> jax.Array:
    """`grouped_product` with matrices laid out for inference, (E, O, I), maybe in int8, whose scale
    is applied to the sums."""
    values = _whole(weight.values, weight.values.dtype, mesh_axes, 3 - dimension)
    y_MO = _times(x_MI, values, sizes_E, block, 2)
    if weight.scale is None:
        return y_MO
    scale_EO = _whole(weight.scale, weight.scale.dtype, mesh_axes if dimension == 2 else (), 1)
    group_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(y_MO)), side="right")
    return (y_MO * scale_EO.at[group_M].get(mode="clip")).astype(x_MI.dtype)


def _whole(w: jax.Array, dtype: Any, mesh_axes: tuple[str, ...], dimension: int) -> jax.Array:
    """w, or what the devices along mesh_axes hold of it together, sent as `dtype`."""
    if not mesh_axes:
        return w
    return lax.all_gather(w.astype(dtype), mesh_axes, axis=dimension, tiled=True)


def _times(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, block: int, summed: int
) -> jax.Array:
    """Each row of x times its group's matrix, summed over dimension 1 or 2 of w."""
    # XLA's instruction is a kernel on TPUs only: elsewhere it multiplies every row by every matrix,
    # and masks.
    return lax.platform_dependent(
        *(x_MI, w_EIO, sizes_E),
        tpu=partial(times_at_once, summed=summed),
        default=partial(times_in_blocks, block=block, summed=summed),
    )


def times_at_once(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, summed: int) -> jax.Array:
    """`_times` by XLA's instruction, which does not say what it gives beyond the groups."""
    dimensions = lax.RaggedDotDimensionNumbers((((1,), (summed,)), ((), ())), [0], [0])
    y = lax.ragged_dot_general(
        *(x_MI, w_EIO.astype(x_MI.dtype), sizes_E, dimensions), preferred_element_type=x_MI.dtype
    )
    return jnp.where(jnp.arange(len(y))[:, None] < jnp.sum(sizes_E), y, 0)


def times_in_blocks(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, block: int, summed: int
) -> jax.Array:
    """`_times` by plain products, one block of a group after another."""
    dtype, dimensions = x_MI.dtype, (((1,), (summed - 1,)), ((), ()))
    x_bits = _bits(x_MI)

    def update(y: jax.Array, group: jax.Array, start: jax.Array, mine: jax.Array) -> jax.Array:
        # Tied to this step, lest XLA make bits of all matrices before the loop.
        matrices, group = lax.optimization_barrier((w_EIO, group))
        matrix = _floats(_bits(matrices)[group], w_EIO.dtype).astype(dtype)
        x = _floats(lax.dynamic_slice_in_dim(x_bits, start, block), dtype)
        new = lax.dot_general(x, matrix, dimensions, preferred_element_type=jnp.float32)
        old = lax.dynamic_slice_in_dim(y, start, block)
        changed = jnp.where(mine[:, None], _bits(new.astype(dtype)), old)
        return lax.dynamic_update_slice_in_dim(y, changed, start, 0)

    y_bits = _bits(jnp.zeros((len(x_MI), w_EIO.shape[3 - summed]), dtype))
    return _floats(_over_blocks(update, y_bits, sizes_E, len(x_MI), block), dtype)


def _outer(x_MI: jax.Array, y_MO: jax.Array, sizes_E: jax.Array, block: int) -> jax.Array:
    """Sum of the outer products of a group's rows, for each group: (E, I, O) fp32.

    In blocks everywhere: here XLA's instruction masks on TPUs too.
    """
    x_bits, y_bits = _bits(x_MI), _bits(y_MO)

    def update(sums: jax.Array, group: jax.Array, start: jax.Array, mine: jax.Array) -> jax.Array:
        x = _floats(lax.dynamic_slice_in_dim(x_bits, start, block), x_MI.dtype)
        y = _floats(lax.dynamic_slice_in_dim(y_bits, start, block), y_MO.dtype)
        x, y = (jnp.where(mine[:, None], rows, 0) for rows in (x, y))
        new = lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return sums.at[group].add(new)

    sums = jnp.zeros((len(sizes_E), x_MI.shape[1], y_MO.shape[1]), jnp.float32)
    return _over_blocks(update, sums, sizes_E, len(x_MI), block)


def _bits(x: jax.Array) -> jax.Array:
    """bf16 as uint16: of a bf16 slice XLA's CPU backend widens the whole array, at every step."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(bits: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)


def _over_blocks(
    update: Update, carry: jax.Array, sizes_E: jax.Array, rows: int, block: int
) -> jax.Array:
    """carry = update(carry, group, start, mine) for the blocks of each group in turn.

    mine: which of the rows from `start` on are the group's, and not in an earlier block of it.
    """
    ends_E = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // block)
    last_E = jnp.cumsum(blocks_E)

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        group = jnp.searchsorted(last_E, i, side="right")
        first = ends_E[group] - sizes_E[group] + (i - last_E[group] + blocks_E[group]) * block
        start = jnp.minimum(first, rows - block)
        row = start + jnp.arange(block)
        return update(carry, group, start, (first <= row) & (row < ends_E[group]))

    return lax.fori_loop(0, last_E[-1], body, carry)
