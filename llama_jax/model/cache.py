"""The cache: an explicit pytree that goes into `Llama.apply` and comes out of it.

A token's place in it follows from its position, so a row needs no other bookkeeping: a query at
position p sees what is stored of positions up to p, and what was stored beyond is either unwritten
or about to be overwritten.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.model.attention import ATTENTION
from llama_jax.model.layer_cache import Arrays, CacheArray, Int8, LayerCache, Slab


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, or what else its attention remembers.

    layers: for each place of the pattern the arrays of its layers, with a leading layer axis; or
        unstacked, those of every layer. The layout follows that of the parameters: stacked layers
        are scanned, a tuple is unrolled.
    config: the model.
    max_length: tokens of a row.
    stacked: whether an array holds several layers.
    spare: tokens of a row that may be taken back at a time.
    """

    layers: tuple[Arrays, ...]
    config: ModelConfig = field(metadata={"static": True})
    max_length: int = field(metadata={"static": True})
    stacked: bool = field(metadata={"static": True})
    spare: int = field(metadata={"static": True})

    @staticmethod
    def init(
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: Any = jnp.float32,
        stacked: bool = True,
        spare: int = 0,
    ) -> "KVCache":
        """An empty cache for `batch` rows of at most `max_length` tokens; dtype may be int8.

        `spare` is how many of the last tokens of a row may be written anew with others.
        """

        def zeros(array: CacheArray, *layers: int) -> Slab:
            kind = jnp.dtype(dtype if array.dtype is None else array.dtype)
            slab = jnp.zeros((*layers, *array.shape), kind)
            return Int8(slab, jnp.zeros(slab.shape[:-1])) if kind == jnp.int8 else slab

        declared = _declared(config, batch, max_length, spare)
        if stacked:
            layers = tuple(
                {name: zeros(array, _layers_at(config, place)) for name, array in arrays.items()}
                for place, arrays in enumerate(declared)
            )
        else:
            layers = tuple(
                {name: zeros(array) for name, array in declared[depth % len(declared)].items()}
                for depth in range(config.n_layers)
            )
        return KVCache(layers, config, max_length, stacked, spare)

    @property
    def axes(self) -> "KVCache":
        """The logical axis names of the arrays, in the same tree."""
        first = ("layers",) if self.stacked else ()

        def names(array: CacheArray, slab: Slab) -> Any:
            axes = first + array.axes
            return Int8(axes, axes[:-1]) if isinstance(slab, Int8) else axes  # type: ignore[arg-type]

        declared = _declared(self.config, 1, self.max_length, self.spare)
        layers = tuple(
            {
                name: names(declared[number % len(declared)][name], slab)
                for name, slab in arrays.items()
            }
            for number, arrays in enumerate(self.layers)
        )
        return KVCache(layers, self.config, self.max_length, self.stacked, self.spare)

    @property
    def row_axis(self) -> int:
        """The dimension of an array that counts rows."""
        return 1 if self.stacked else 0

    def layer(
        self,
        depth: jax.Array | int,
        place: int,
        positions_BT: jax.Array,
        real_BT: jax.Array | None,
        rows_B: jax.Array | None,
    ) -> LayerCache:
        """One layer's part, for these tokens of these rows (None: of all).

        Args:
            depth: number of the layer; stacked, among those of its place in the pattern.
        """
        if self.stacked:
            arrays, number = self.layers[place], depth
        else:
            assert isinstance(depth, int)
            arrays, number = self.layers[depth], None
        return LayerCache(arrays, number, positions_BT, real_BT, rows_B, self.max_length)

    def with_layer(self, place: int, layer: LayerCache) -> "KVCache":
        """This cache, stacked, with what the layers at a place hold now."""
        layers = (*self.layers[:place], layer.arrays, *self.layers[place + 1 :])
        return replace(self, layers=layers)


def forgets(config: ModelConfig) -> bool:
    """Whether some layer remembers less than every token: then a row's cache after some text does
    not serve for the beginning of that text."""
    return any(
        place.reach is not None or ATTENTION[place.attention].recurrent for place in config.places
    )


def cache_bytes(config: ModelConfig, batch: int, max_length: int, dtype: Any) -> int:
    """Bytes of a cache, by its declared shapes."""
    cache = jax.eval_shape(lambda: KVCache.init(config, batch, max_length, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _declared(
    config: ModelConfig, batch: int, max_length: int, spare: int
) -> tuple[dict[str, CacheArray], ...]:
    """The arrays of a layer at each place of the pattern."""
    return tuple(
        {} if place.shares_kv else ATTENTION[place.attention].cache(place, batch, max_length, spare)
        for place in config.places
    )


def _layers_at(config: ModelConfig, place: int) -> int:
    """How many layers are at a place of the pattern."""
    return len(range(place, config.n_layers, len(config.places)))
