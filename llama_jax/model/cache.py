"""The key-value cache: an explicit pytree that goes into `Llama.apply` and comes out of it.

A token's slot is its position, so a row needs no other bookkeeping: a query at position p sees
slots 0..p, and whatever lies beyond is either unwritten or about to be overwritten.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig

Slab = Any  # an array, or Int8
Slabs = Any  # one stacked Slab, or a tuple of one Slab per layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Vectors (..., H) as int8, each with an fp32 scale (...): a head's key or value of a token."""

    values: jax.Array
    scale: jax.Array

    @staticmethod
    def of(vectors: jax.Array) -> "Int8":
        """Each vector rounded to 127 steps of its largest number."""
        vectors = vectors.astype(jnp.float32)
        largest = jnp.max(jnp.abs(vectors), axis=-1)
        scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny * 127) / 127
        return Int8(jnp.round(vectors / scale[..., None]).astype(jnp.int8), scale)

    def to(self, dtype: Any) -> jax.Array:
        """The vectors again."""
        return (self.values * self.scale[..., None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer: one (L, B, K, S, H) slab each, or L slabs (B, K, S, H).

    The layout follows that of the parameters: stacked layers are scanned, a tuple is unrolled.
    """

    key: Slabs
    value: Slabs

    @staticmethod
    def init(
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: Any = jnp.float32,
        stacked: bool = True,
    ) -> "KVCache":
        """An empty cache for `batch` rows of at most `max_length` tokens; dtype may be int8."""
        shape = (batch, config.n_kv_heads, max_length, config.d_head)

        def slab(*layers: int) -> Slab:
            zeros = jnp.zeros((*layers, *shape), dtype)
            return Int8(zeros, jnp.zeros(zeros.shape[:-1])) if zeros.dtype == jnp.int8 else zeros

        def slabs() -> Slabs:
            return (
                slab(config.n_layers) if stacked else tuple(slab() for _ in range(config.n_layers))
            )

        return KVCache(key=slabs(), value=slabs())

    @property
    def axes(self) -> "KVCache":
        """The logical axis names of the arrays, in the same tree."""
        names = ("layers", "batch", "kv_heads", "kv_seq", "head_dim")
        missing = 0 if self.stacked else 1

        def slab_axes(slab: Slab) -> Any:
            if isinstance(slab, Int8):
                return Int8(names[missing:], names[missing:-1])  # type: ignore[arg-type]
            return names[missing:]

        if self.stacked:
            return KVCache(slab_axes(self.key), slab_axes(self.value))
        return KVCache(tuple(map(slab_axes, self.key)), tuple(map(slab_axes, self.value)))

    @property
    def stacked(self) -> bool:
        """Whether a slab holds all layers."""
        return not isinstance(self.key, tuple)

    @property
    def row_axis(self) -> int:
        """The dimension of an array that counts rows."""
        return 1 if self.stacked else 0

    @property
    def max_length(self) -> int:
        """Slots of a row."""
        return jax.tree.leaves(self.key)[0].shape[3 if self.stacked else 2]

    def layer(
        self, index: jax.Array | int, slots_BT: jax.Array, rows_B: jax.Array | None = None
    ) -> "LayerCache":
        """One layer's part, to be written at `slots_BT` of these rows (None: of all)."""
        if self.stacked:
            return LayerCache(self.key, self.value, index, slots_BT, rows_B)
        return LayerCache(self.key[index], self.value[index], None, slots_BT, rows_B)


class LayerCache(NamedTuple):
    """What one layer reads and writes.

    key, value: its own slab, or the whole stacked slabs with its number in `depth`.
    slots: (B, T), where this call's tokens go; a slot beyond the end drops its token.
    rows: (B,), the cache's rows that this call's are; None when they are all of them, in order.
    """

    key: Slab
    value: Slab
    depth: jax.Array | int | None
    slots: jax.Array
    rows: jax.Array | None

    def write(self, k_BKTH: jax.Array, v_BKTH: jax.Array) -> "LayerCache":
        """Stores this call's keys and values; in place once compiled."""
        return self._replace(key=self._put(self.key, k_BKTH), value=self._put(self.value, v_BKTH))

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every slot, each (B, K, S, H): as stored, or int8 ones in `dtype`."""
        return self._get(self.key, dtype), self._get(self.value, dtype)

    def _put(self, slab: Slab, new: jax.Array) -> Slab:
        if isinstance(slab, Int8):
            rounded = Int8.of(new)
            return Int8(
                self._scatter(slab.values, rounded.values), self._scatter(slab.scale, rounded.scale)
            )
        return self._scatter(slab, new.astype(slab.dtype))

    def _scatter(self, slab: jax.Array, new: jax.Array) -> jax.Array:
        """`new` (B, K, T, H) or (B, K, T) into the slab."""
        # Rows and heads are batching dimensions of the scatter: with their numbers as indices, XLA
        # would gather every row's tokens onto every device of a mesh that splits the batch. Heads
        # also keep it from making slices of a single row's scatter, which are not in place.
        first = 0 if self.depth is None else 1
        shape = new.shape[:3]
        slots = jnp.broadcast_to(self.slots[:, None], shape)
        indices = {first + 2: slots}  # dimension of the slab -> index along it
        batching = [first, first + 1]
        if self.depth is not None:
            indices[0] = jnp.full(shape, self.depth)
        if self.rows is not None:
            indices[first] = jnp.broadcast_to(self.rows[:, None, None], shape)
            batching.remove(first)
        fixed = tuple(sorted(indices))
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(3,) if new.ndim == 4 else (),
            inserted_window_dims=fixed,
            scatter_dims_to_operand_dims=fixed,
            operand_batching_dims=tuple(batching),
            scatter_indices_batching_dims=tuple(axis - first for axis in batching),
        )
        index = jnp.stack([indices[dimension] for dimension in fixed], axis=-1)
        return jax.lax.scatter(slab, index, new, dimensions, mode="drop")

    def _get(self, slab: Slab, dtype: Any) -> jax.Array:
        if self.depth is not None:
            slab = jax.tree.map(lambda x: x[self.depth], slab)
        if self.rows is not None:
            slab = jax.tree.map(lambda x: x[self.rows], slab)
        return slab.to(dtype) if isinstance(slab, Int8) else slab
