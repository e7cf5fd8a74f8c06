"""What one layer remembers of the tokens before: arrays that it declares, reads and writes.

Keys and values lie in slots. A layer that sees all keys has a slot for every position. One with a
window or chunk has as many slots as it reaches back, and a token takes that of the token which has
gone out of reach: its cache does not grow with the text.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.model.ops.attend import NOWHERE

Slab = Any  # an array, or Int8
Arrays = dict[str, Slab]


class CacheArray(NamedTuple):
    """An array of a layer's cache, as a variant of attention declares it.

    shape, axes: rows first; of vectors in slots (B, K, S, H), with the axis name kv_seq for S.
    dtype: None for that of the cache, which may be int8.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = None


def slot_count(config: ModelConfig, max_length: int, spare: int = 0) -> int:
    """Slots of a layer that remembers what its queries may still see.

    Args:
        config: of the layer.
        max_length: tokens of a row.
        spare: tokens that may be taken back and written anew.
    """
    if config.reach is None:
        return max_length
    return min(max_length, config.keep_first + config.reach + spare)


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
class LayerCache:
    """One layer's arrays, for the rows and tokens of a call.

    arrays: its own (B, ...), or those of all layers like it (L, B, ...) with its number in `depth`.
    positions: (B, T) of this call's tokens.
    real: (B, T) bool, tokens that are not padding; None: all. Padding is not remembered.
    rows: (B), the cache's rows that this call's are; None when they are all of them, in order.
    max_length: tokens of a row.
    """

    arrays: Arrays
    depth: jax.Array | int | None
    positions: jax.Array
    real: jax.Array | None
    rows: jax.Array | None
    max_length: int = field(metadata={"static": True})

    def get(self, name: str) -> jax.Array:
        """An array of these rows, (B, ...)."""
        return self._rows_of(self.arrays[name])

    def put(self, name: str, value: jax.Array) -> "LayerCache":
        """An array of these rows replaced; in place once compiled."""
        old = self.arrays[name]
        place = tuple(index for index in (self.depth, self.rows) if index is not None)
        new = old.at[place].set(value.astype(old.dtype)) if place else value.astype(old.dtype)
        return replace(self, arrays={**self.arrays, name: new})

    def append(
        self, new: dict[str, jax.Array], kept: int, dtype: Any
    ) -> tuple["LayerCache", dict[str, jax.Array], jax.Array]:
        """Stores vectors (B, K, T, H) of this call's tokens by name, in place once compiled.

        Args:
            new: the vectors.
            kept: keep_first of the layer.
            dtype: in which int8 vectors are read.

        Returns:
            The cache; by name the vectors (B, K, S, H) that the queries may see, as stored; and
            their positions (B or 1, S), NOWHERE for what holds none.
        """
        slots = jax.tree.leaves(self.arrays[next(iter(new))])[0].shape[-2]
        if slots == self.max_length:
            slots_BT = self._only_real(self.positions, slots)
            cache = self._write(new, slots_BT)
            keys_BS = jnp.arange(slots)[None]
            return cache, cache._read(new, dtype), keys_BS
        ring = slots - kept
        turning = kept + (self.positions - kept) % ring
        slots_BT = jnp.where(self.positions < kept, self.positions, turning)
        if self.positions.shape[1] == 1:
            cache = self._write(new, self._only_real(slots_BT, slots))
            keys_BS = _held(self.positions, kept, ring)
            return cache, cache._read(new, dtype), keys_BS
        # Of several tokens the first may need what the last ones overwrite: they see what was there
        # before and each other.
        positions_BT = self._only_real(self.positions, NOWHERE)
        before_B1 = jnp.min(positions_BT, axis=1, keepdims=True) - 1
        last_B1 = jnp.max(jnp.where(positions_BT == NOWHERE, -1, positions_BT), axis=1)[:, None]
        stays = (self.positions > last_B1 - ring) | (self.positions < kept)
        cache = self._write(new, self._only_real(jnp.where(stays, slots_BT, slots), slots))
        old = self._read(new, dtype)
        both = {
            name: jnp.concatenate([old[name], self._as_stored(name, vectors, dtype)], axis=2)
            for name, vectors in new.items()
        }
        keys_BS = jnp.concatenate([_held(before_B1, kept, ring), positions_BT], axis=1)
        return cache, both, keys_BS

    def _only_real(self, numbers_BT: jax.Array, otherwise: int) -> jax.Array:
        return numbers_BT if self.real is None else jnp.where(self.real, numbers_BT, otherwise)

    def _write(self, new: dict[str, jax.Array], slots_BT: jax.Array) -> "LayerCache":
        """A slot beyond the end drops its token."""
        written = {name: self._put(self.arrays[name], x, slots_BT) for name, x in new.items()}
        return replace(self, arrays={**self.arrays, **written})

    def _read(self, names: dict[str, Any], dtype: Any) -> dict[str, jax.Array]:
        return {name: _floats(self._rows_of(self.arrays[name]), dtype) for name in names}

    def _as_stored(self, name: str, vectors: jax.Array, dtype: Any) -> jax.Array:
        """Vectors with the rounding of those in the cache."""
        slab = self.arrays[name]
        if isinstance(slab, Int8):
            return _floats(Int8.of(vectors), dtype)
        return vectors.astype(slab.dtype)

    def _rows_of(self, slab: Slab) -> Slab:
        if self.depth is not None:
            slab = jax.tree.map(lambda x: x[self.depth], slab)
        if self.rows is not None:
            slab = jax.tree.map(lambda x: x[self.rows], slab)
        return slab

    def _put(self, slab: Slab, new: jax.Array, slots_BT: jax.Array) -> Slab:
        if isinstance(slab, Int8):
            rounded = Int8.of(new)
            return Int8(
                self._scatter(slab.values, rounded.values, slots_BT),
                self._scatter(slab.scale, rounded.scale, slots_BT),
            )
        return self._scatter(slab, new.astype(slab.dtype), slots_BT)

    def _scatter(self, slab: jax.Array, new: jax.Array, slots_BT: jax.Array) -> jax.Array:
        """`new` (B, K, T, H) or (B, K, T) into the slab."""
        # Rows and heads are batching dimensions of the scatter: with their numbers as indices, XLA
        # would gather every row's tokens onto every device of a mesh that splits the batch. Heads
        # also keep it from making slices of a single row's scatter, which are not in place.
        first = 0 if self.depth is None else 1
        if math.prod(new.shape[:3]) == 1 and jax.default_backend() == "cpu":
            # Of a single vector XLA would make the update of a slice, and repeat that on copies of
            # the slab wherever it is read: a second one, which is dropped, keeps it from that.
            new = jnp.concatenate([new, new], axis=2)
            slots_BT = jnp.pad(slots_BT, ((0, 0), (0, 1)), constant_values=slab.shape[first + 2])
        shape = new.shape[:3]
        slots = jnp.broadcast_to(slots_BT[:, None], shape)
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


def _floats(slab: Slab, dtype: Any) -> jax.Array:
    return slab.to(dtype) if isinstance(slab, Int8) else slab


def _held(newest_B1: jax.Array, kept: int, ring: int) -> jax.Array:
    """Which position each slot holds once the newest is stored, (B, kept + ring); NOWHERE: none.

    Slots before `kept` hold the first positions; behind them, positions go round a ring.
    """
    first = jnp.arange(kept)[None]
    newest = newest_B1 - kept
    turning = newest - (newest - jnp.arange(ring)) % ring
    return jnp.concatenate(
        [
            jnp.where(first <= newest_B1, first, NOWHERE),
            jnp.where((newest >= 0) & (turning >= 0), turning + kept, NOWHERE),
        ],
        axis=1,
    )
