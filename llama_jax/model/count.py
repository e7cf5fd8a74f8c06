"""The arithmetic of a model: parameters, FLOPs, bytes of cache.

Parameters are counted in the tree of their shapes; what is not a product with one of them, each
variant of attention tells of itself.
"""

import math
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.model.attention import ATTENTION
from llama_jax.model.cache import cache_bytes
from llama_jax.model.llama import Llama
from llama_jax.model.stack import by_place


class Parameters(NamedTuple):
    """How many there are.

    total: of the language model.
    embeddings: of the embedding, and of a head that is another matrix.
    active: that one token passes, embeddings included: of a mixture, its experts alone.
    products: weights that one token is multiplied with: matrices, the head, not the embedding.
    """

    total: int
    embeddings: int
    active: int
    products: int


@cache
def parameters(config: ModelConfig) -> Parameters:
    """Parameters of the language model, by use."""
    model = Llama(config)
    stacks = (by_place(tree["layers"]) for tree in (model.shapes(), model.axes()))
    vocabulary = config.vocab_size * config.d_model
    embeddings = vocabulary * (1 if config.tie_embeddings else 2)
    total = active = products = 0
    for place, shapes, axes in zip(config.places, *stacks, strict=True):
        all_names = jax.tree.leaves(axes, is_leaf=lambda names: isinstance(names, tuple))
        for leaf, names in zip(jax.tree.leaves(shapes), all_names, strict=True):
            size = math.prod(leaf.shape)
            used = _used(size, names, place)
            total, active = total + size, active + used
            # Of a matrix there are two axes or more besides the layers'.
            products += used if len(names) > 2 else 0
    outside = embeddings + config.d_model  # the final norm
    return Parameters(total + outside, embeddings, active + outside, products + vocabulary)


def _used(size: int, names: tuple[str, ...], place: ModelConfig) -> int:
    """How many of an array's numbers a token passes."""
    if "expert" not in names:
        return size
    assert place.experts
    return size * place.experts.per_token // place.experts.count


def n_parameters(config: ModelConfig) -> int:
    """Parameters of the language model."""
    return parameters(config).total


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Training FLOPs (forward and backward, no recomputation) of one token in a row of `length`.

    Two per weight forward and four backward, for every matrix a token passes (the head, not the
    embedding table); and what mixes tokens: scores and values with the keys a query sees, say.
    """
    mixed = sum(
        ATTENTION[layer.attention].mixing_flops(layer, length)
        for layer in map(config.layer, range(config.n_layers))
    )
    return 6 * (parameters(config).products + mixed // length)


def forward_flops_per_token(config: ModelConfig, length: int) -> int:
    """The forward third of `flops_per_token`."""
    return flops_per_token(config, length) // 3


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that a token adds to the cache (bf16 by default), while no window is full: those of
    layers that keep every token, or of any as long as the row is shorter than their windows."""
    kind = {1: jnp.int8, 2: jnp.bfloat16, 4: jnp.float32}[bytes_per_value]
    return cache_bytes(config, 1, 2, kind) - cache_bytes(config, 1, 1, kind)


def cache_bytes_per_row(config: ModelConfig, length: int, bytes_per_value: int = 2) -> int:
    """Bytes of the cache of one row of `length` tokens: windows, once full, and states stay."""
    kind = {1: jnp.int8, 2: jnp.bfloat16, 4: jnp.float32}[bytes_per_value]
    return cache_bytes(config, 1, length, kind)
