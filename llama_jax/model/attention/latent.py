"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are made of one narrow latent per token, and a key has a second part, the same for
all heads, that rope turns. The cache holds the latent and that part. Keys and values need not be
made of it: a query through the keys' projection scores latents directly, and attended latents go
through the values' projection after that ("absorbed").
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from llama_jax.config import ConfigError, ModelConfig, Schema
from llama_jax.model.attention import plain
from llama_jax.model.attention.interface import (
    Attended,
    Attention,
    Keys,
    Tokens,
    Weights,
    read_settings,
)
from llama_jax.model.attention.scores import SCORES, area_seen, scoring, sinks
from llama_jax.model.layer_cache import CacheArray, LayerCache, slot_count
from llama_jax.model.ops.attend import attend
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.ops.product import product
from llama_jax.model.ops.rope import rotate
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain

HEADS = ("batch", "seq", "act_heads", "head_dim")


class LatentSettings(Schema):
    """Widths of latent attention; d_head is that of the keys' part which rope leaves alone, and of
    values."""

    kv_rank: int = Field(gt=0)
    """Width of the latent that keys and values are made of."""
    rope_width: int = Field(gt=0, multiple_of=2)
    """Width of the keys' part that rope turns."""
    query_rank: int = Field(default=0, ge=0)
    """Width of the latent that queries are made of; 0: none, queries come from the input."""


class LatentAttention(Attention):
    """Low-rank keys and values, compressed in the cache."""

    Settings: ClassVar[type[Schema]] = LatentSettings
    settings: ClassVar[frozenset[str]] = SCORES | {"rope_scaling"}

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None, shared: Keys | None
    ) -> Attended:
        """(B, T, D) -> (B, T, D), and the cache with this call's latents in it."""
        c, s = self.config, settings_of(self.config)
        N, H, R, P = c.n_heads, c.d_head, s.kv_rank, s.rope_width
        residual = (2 * c.n_layers) ** -0.5
        w_down = param(
            self, "kv_down", fan_in_normal(c.d_model), (c.d_model, R + P), ("embed", "rank")
        )
        norm = param(self, "kv_norm", nn.initializers.ones, (R,), ("rank",))
        per_head = ("rank", "heads", "head_dim")
        w_key = param(self, "key_up", fan_in_normal(R), (R, N, H), per_head)
        w_value = param(self, "value_up", fan_in_normal(R), (R, N, H), per_head)
        wo = param(
            *(self, "o", fan_in_normal(N * H, residual)),
            *((N, H, c.d_model), ("heads", "head_dim", "embed")),
        )
        assert tokens.rotation is not None  # it has no other positions
        q = self._queries(x_BTD, s)
        q_plain, q_turned = q[..., :H], rotate(q[..., H:], *tokens.rotation)
        down = product("BTD,DR->BTR", x_BTD, w_down)
        latent = checkpoint_name(rms_norm(down[..., :R], norm, c.norm_eps), "value")
        turned = checkpoint_name(rotate(down[:, :, None, R:], *tokens.rotation), "key")
        # One key head for all: a latent, and behind it its turned part.
        both = jnp.concatenate([latent[:, None], jnp.swapaxes(turned, 1, 2)], axis=-1)
        positions = None
        if cache is not None:
            cache, read, positions = cache.append({"latent": both}, c.keep_first, x_BTD.dtype)
            both = read["latent"]
        visibility = tokens.visibility.of_keys(positions)
        scale, sink = (H + P) ** -0.5, sinks(self, c)
        if absorbs(s, c, x_BTD.shape[1], cache is not None):
            q_latent = product("BTNH,RNH->BTNR", q_plain, w_key)
            q = jnp.concatenate([q_latent, q_turned], axis=-1).astype(both.dtype)
            # Values with their turned part, which is dropped from the sums: a slice of the cache
            # would be a copy of it, for every token.
            y = attend(*(q, both, both, visibility, "xla", self.rules, scoring(c, scale), sink))
            y = product("BTNR,RNH->BTNH", y[..., :R].astype(x_BTD.dtype), w_value)
        else:
            latents, turned_keys = jnp.split(both.astype(x_BTD.dtype), [R], axis=-1)
            k = product("BSR,RNH->BNSH", latents[:, 0], w_key)
            v = product("BSR,RNH->BNSH", latents[:, 0], w_value)
            k = jnp.concatenate([k, jnp.broadcast_to(turned_keys, (*k.shape[:3], P))], axis=-1)
            q = jnp.concatenate([q_plain, q_turned], axis=-1)
            y = attend(*(q, k, v, visibility, "xla", self.rules, scoring(c, scale), sink))
        y = product("BTNH,NHD->BTD", constrain(y.astype(x_BTD.dtype), HEADS, self.rules), wo)
        return Attended(checkpoint_name(y, "attention_out"), cache)

    def _queries(self, x_BTD: jax.Array, s: LatentSettings) -> jax.Array:
        """(B, T, N, H + P), the last P numbers to be turned."""
        c = self.config
        shape, axes = (c.n_heads, c.d_head + s.rope_width), ("heads", "head_dim")
        if not s.query_rank:
            D = c.d_model
            wq = param(self, "q", fan_in_normal(D), (D, *shape), ("embed", *axes))
            q = product("BTD,DNH->BTNH", x_BTD, wq)
        else:
            D, Q = c.d_model, s.query_rank
            w_down = param(self, "q_down", fan_in_normal(D), (D, Q), ("embed", "rank"))
            norm = param(self, "q_norm", nn.initializers.ones, (Q,), ("rank",))
            w_up = param(self, "q_up", fan_in_normal(Q), (Q, *shape), ("rank", *axes))
            down = rms_norm(product("BTD,DQ->BTQ", x_BTD, w_down), norm, c.norm_eps)
            q = product("BTQ,QNH->BTNH", down, w_up)
        return checkpoint_name(constrain(q, HEADS, self.rules), "query")

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Every query head has its own keys."""
        if config.n_kv_heads != config.n_heads:
            raise ConfigError(
                f"attention latent has no key heads to share: n_kv_heads ({config.n_kv_heads}) "
                f"must be n_heads ({config.n_heads})"
            )

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """That of the turned part."""
        return settings_of(config).rope_width

    @staticmethod
    def cache(
        config: ModelConfig, batch: int, max_length: int, spare: int
    ) -> dict[str, CacheArray]:
        """A latent and a turned part per slot, whatever the number of heads."""
        s, slots = settings_of(config), slot_count(config, max_length, spare)
        axes = ("batch", None, "kv_seq", "head_dim")
        return {"latent": CacheArray((batch, 1, slots, s.kv_rank + s.rope_width), axes)}

    @staticmethod
    def mixing_flops(config: ModelConfig, length: int) -> int:
        """As trained: keys of d_head + rope_width numbers, values of d_head."""
        wide = 2 * config.d_head + settings_of(config).rope_width
        return config.n_heads * wide * area_seen(config, length) // 2

    @staticmethod
    def reference(
        config: ModelConfig, weights: Weights, x: np.ndarray, depth: int, shared: Any
    ) -> tuple[np.ndarray, Any]:
        """Keys and values of every head, as in equations 9 to 19."""
        s = settings_of(config)
        H, R, P = config.d_head, s.kv_rank, s.rope_width
        if s.query_rank:
            down = plain.rms_norm(x @ weights["q_down"], weights["q_norm"], config.norm_eps)
            q = np.einsum("tq,qnh->nth", down, weights["q_up"])
        else:
            q = np.einsum("td,dnh->nth", x, weights["q"])
        down = x @ weights["kv_down"]
        latent = plain.rms_norm(down[:, :R], weights["kv_norm"], config.norm_eps)
        turned = plain.rope(down[:, R:], config, P)
        total = np.zeros_like(x)
        for n in range(config.n_heads):
            query = np.concatenate([q[n, :, :H], plain.rope(q[n, :, H:], config, P)], axis=1)
            key = np.concatenate([latent @ weights["key_up"][:, n], turned], axis=1)
            value = latent @ weights["value_up"][:, n]
            sink = weights["sinks"][n] if config.sinks else None
            total += plain.attention(query, key, value, config, n, sink) @ weights["o"][n]
        return total, None


def settings_of(config: ModelConfig) -> LatentSettings:
    """The settings, read."""
    return read_settings(config, LatentSettings)


def absorbs(s: LatentSettings, config: ModelConfig, queries: int, cached: bool) -> bool:
    """Whether scoring latents is less work than making keys and values of them: for few queries.

    Per latent, keys and values take kv_rank x 2 d_head products a head; each query of it takes
    kv_rank - d_head more for its score, and rope_width more than that for its value.
    """
    more = 2 * (s.kv_rank - config.d_head) + s.rope_width
    return cached and queries * more <= s.kv_rank * 2 * config.d_head
