"""What a variant of attention is: one class in one file, for training, prefill and decoding alike.

`docs/add_a_variant.md` leads through it.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import flax.linen as nn
import jax
import numpy as np

from llama_jax.config import ModelConfig, Schema, parse
from llama_jax.model.layer_cache import CacheArray, LayerCache
from llama_jax.model.ops.attend import Visibility
from llama_jax.model.ops.kernels import Kernel
from llama_jax.model.ops.rope import Rotation
from sharding.rules import Rules

Weights = dict[str, Any]
S = TypeVar("S", bound=Schema)


class Tokens(NamedTuple):
    """What a layer is told of a call's tokens.

    visibility: positions, documents, and who sees whom.
    rotation: of the tokens' queries and keys; None without rope.
    depth: number of the layer, from 0.
    real: (B, T) bool, tokens that are not padding; None: all.
    cache_length: tokens of a row of the cache; None without one.
    """

    visibility: Visibility
    rotation: Rotation | None
    depth: jax.Array | int
    real: jax.Array | None
    cache_length: int | None


class Keys(NamedTuple):
    """Keys and values (B, K, S, H), for later layers too that share them.

    positions: (B or 1, S), as Visibility.key_positions: None without a cache.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array | None


class Attended(NamedTuple):
    """The result (B, T, D), the layer's cache, and what later layers may share."""

    value: jax.Array
    cache: LayerCache | None
    keys: Keys | None = None


class NoSettings(Schema):
    """A variant without settings of its own."""


@cache
def read_settings(config: ModelConfig, schema: type[S]) -> S:
    """config.attention_settings. Raises ConfigError where they are not those of the schema."""
    return parse(schema, config.attention_settings.plain(), "attention_settings")


class Attention(nn.Module, ABC):
    """The parts that every variant has; those that are abstract must be its own.

    config: of the layer; kernel: of what can be computed by one, as `fused` says.

    Settings: schema of config.attention_settings.
    settings: fields of ModelConfig besides LLaMA's that it reads; others are refused.
    fused: whether the kernels of model.ops.kernels can compute it.
    recurrent: whether it remembers a state instead of tokens, which cannot be taken back.
    """

    config: ModelConfig
    rules: Rules | None
    kernel: Kernel = "xla"

    Settings: ClassVar[type[Schema]] = NoSettings
    settings: ClassVar[frozenset[str]] = frozenset()
    fused: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None, shared: Keys | None
    ) -> Attended:
        """Attention of the tokens to what they may see among themselves and in the cache.

        Without a cache in training; with one for prefill, decoding and verification: the result of
        a token does not depend on which. Padding changes nothing.
        """

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ConfigError where the settings do not fit the model."""

    @staticmethod
    @abstractmethod
    def rotary_width(config: ModelConfig) -> int:
        """Numbers of a head that rope turns; 0: none."""

    @staticmethod
    @abstractmethod
    def cache(
        config: ModelConfig, batch: int, max_length: int, spare: int
    ) -> dict[str, CacheArray]:
        """What a layer remembers. Also says the cache's bytes."""

    @staticmethod
    @abstractmethod
    def mixing_flops(config: ModelConfig, length: int) -> int:
        """Multiplications of the forward pass besides those with parameters, for a row of `length`
        tokens: of scores and values, say."""

    @staticmethod
    @abstractmethod
    def reference(
        config: ModelConfig, weights: Weights, x: np.ndarray, depth: int, shared: Any
    ) -> tuple[np.ndarray, Any]:
        """The definition in numpy, as plain as can be, for one document.

        Args:
            weights: parameters of one layer by name, float64.
            x: (T, D) float64, tokens at positions 0, 1, ...
            depth: number of the layer.
            shared: what the last layer before it lent, for shares_kv.

        Returns:
            (T, D), and what this layer lends.
        """
