"""The key-value cache: an explicit pytree that goes into `Llama.apply` and comes out of it.

A token's slot is its position, so a row needs no other bookkeeping: a query at position p sees slots
0..p, and whatever lies beyond is either unwritten or about to be overwritten.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig

Slabs = jax.Array | tuple[jax.Array, ...]


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
        dtype: jnp.dtype | type = jnp.float32,
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
        return KVCache(key=slabs, value=slabs)  # type: ignore[arg-type]

    @property
    def max_length(self) -> int:
        """Slots of a row."""
        slab = self.key if isinstance(self.key, jax.Array) else self.key[0]
        return slab.shape[-3]


def write(
    slab: jax.Array, layer: jax.Array | None, slots_BT: jax.Array, new: jax.Array
) -> jax.Array:
    """Puts new (B, T, K, H) into the rows' slots, in place once compiled.

    `layer` picks one layer of a stacked slab. A slot beyond the end drops its token.
    """
    rows = jnp.arange(slots_BT.shape[0])[:, None]
    where = (rows, slots_BT) if layer is None else (layer, rows, slots_BT)
    return slab.at[where].set(new.astype(slab.dtype), mode="drop")


def read(slab: jax.Array, layer: jax.Array | None) -> jax.Array:
    """One layer's (B, S, K, H)."""
    return slab if layer is None else jax.lax.dynamic_index_in_dim(slab, layer, keepdims=False)
