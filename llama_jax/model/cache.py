"""The key-value cache: an explicit pytree that goes into `Llama.apply` and comes out of it.

A token's slot is its position, so a row needs no other bookkeeping: a query at position p sees
slots 0..p, and whatever lies beyond is either unwritten or about to be overwritten.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig

Slabs = Any  # one stacked jax.Array, or a tuple of one jax.Array per layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer: one (L, B, S, K, H) array each, or L arrays (B, S, K, H).

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
        """An empty cache for `batch` rows of at most `max_length` tokens."""
        shape = (batch, max_length, config.n_kv_heads, config.d_head)

        def slabs() -> Slabs:
            if stacked:
                return jnp.zeros((config.n_layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))

        return KVCache(key=slabs(), value=slabs())

    @staticmethod
    def axes(config: ModelConfig, stacked: bool = True) -> "KVCache":
        """The logical axis names of `init`'s arrays, in the same tree."""
        axes = ("batch", "kv_seq", "kv_heads", "head_dim")
        slabs = ("layers", *axes) if stacked else (axes,) * config.n_layers
        return KVCache(key=slabs, value=slabs)

    @property
    def max_length(self) -> int:
        """Slots of a row."""
        slab = self.key[0] if isinstance(self.key, tuple) else self.key
        return slab.shape[-3]

    def layer(self, index: jax.Array | int, slots_BT: jax.Array) -> "LayerCache":
        """One layer's part, to be written at `slots_BT`."""
        if isinstance(self.key, tuple):
            return LayerCache(self.key[index], self.value[index], None, slots_BT)
        return LayerCache(self.key, self.value, index, slots_BT)


class LayerCache(NamedTuple):
    """What one layer reads and writes.

    key, value: its own (B, S, K, H), or the whole stacked slabs with its number in `depth`.
    slots: (B, T), where this call's tokens go; a slot beyond the end drops its token.
    """

    key: jax.Array
    value: jax.Array
    depth: jax.Array | int | None
    slots: jax.Array

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "LayerCache":
        """Stores this call's keys and values; in place once compiled."""
        return self._replace(key=self._put(self.key, k_BTKH), value=self._put(self.value, v_BTKH))

    def _put(self, slab: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        # The batch is a batching dimension of the scatter: with row numbers as indices, XLA would
        # gather every row's tokens onto every device of a mesh that splits the batch.
        fixed: tuple[int, ...]  # dimensions that an index names
        if self.depth is None:
            index, fixed, batch = self.slots[..., None], (1,), 0
        else:
            depths = jnp.full_like(self.slots, self.depth)
            index, fixed, batch = jnp.stack([depths, self.slots], -1), (0, 2), 1
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=fixed,
            scatter_dims_to_operand_dims=fixed,
            operand_batching_dims=(batch,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(slab, index, new_BTKH.astype(slab.dtype), dimensions, mode="drop")

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every slot, each (B, S, K, H)."""
        if self.depth is None:
            return self.key, self.value
        return self.key[self.depth], self.value[self.depth]
