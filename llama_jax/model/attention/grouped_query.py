"""Grouped-query attention (Ainslie et al., arXiv 2305.13245).

Multi-head attention is the case n_kv_heads = n_heads, multi-query the case n_kv_heads = 1.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.model.attention import plain
from llama_jax.model.attention.interface import Attended, Attention, Keys, Tokens, Weights
from llama_jax.model.attention.scores import SCORES, area_seen, scoring, sinks
from llama_jax.model.layer_cache import CacheArray, LayerCache, slot_count
from llama_jax.model.ops.attend import attend
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.ops.product import product
from llama_jax.model.ops.rope import Rotation, rotate, rotations
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain


class GroupedQueryAttention(Attention):
    """Queries, keys, values, rotation, attention, output projection."""

    settings: ClassVar[frozenset[str]] = SCORES | {
        *("position", "rotary_fraction", "rope_scaling"),
        *("qk_norm", "keys_are_values", "shares_kv"),
    }
    fused: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None, shared: Keys | None
    ) -> Attended:
        """(B, T, D) -> (B, T, D), and the cache with this call's keys and values in it."""
        c = self.config
        D, N, H = c.d_model, c.n_heads, c.d_head
        # Both writers into the residual stream are scaled down by its 2 L additions (GPT-2, 2.3).
        residual = (2 * c.n_layers) ** -0.5
        wq = param(self, "q", fan_in_normal(D), (D, N, H), ("embed", "heads", "head_dim"))
        q = self._heads(x_BTD, wq, "q")
        if tokens.rotation:
            q = rotate(q, *tokens.rotation)
        q = checkpoint_name(q, "query")
        if c.shares_kv:
            assert shared is not None  # or the config would have been refused
            keys = shared
        else:
            keys, cache = self._keys(x_BTD, tokens, cache)
        wo = param(
            self, "o", fan_in_normal(N * H, residual), (N, H, D), ("heads", "head_dim", "embed")
        )
        k, v, visibility = keys.key, keys.value, tokens.visibility.of_keys(keys.positions)
        score = scoring(c), sinks(self, c)
        attended = attend(q.astype(k.dtype), k, v, visibility, self.kernel, self.rules, *score)
        attended = attended.astype(x_BTD.dtype)
        y = product("BTNH,NHD->BTD", self._before_output(x_BTD, attended), wo)
        return Attended(checkpoint_name(y, "attention_out"), cache, keys)

    def _heads(self, x_BTD: jax.Array, weight: Any, name: str) -> jax.Array:
        """Queries or keys before they are turned, (B, T, heads, H)."""
        of, axis = ("N", "act_heads") if name == "q" else ("K", "act_kv_heads")
        heads = product(f"BTD,D{of}H->BT{of}H", x_BTD, weight)
        heads = constrain(heads, ("batch", "seq", axis, "head_dim"), self.rules)
        if self.config.qk_norm:
            ones = nn.initializers.ones
            scale = param(self, f"{name}_norm", ones, (self.config.d_head,), ("head_dim",))
            heads = rms_norm(heads, scale, self.config.norm_eps)
        return heads

    def _keys(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Keys, LayerCache | None]:
        """Keys and values (B, K, S, H) that the queries may see, those in the cache among them."""
        c, dtype = self.config, x_BTD.dtype
        D, K, H = c.d_model, c.n_kv_heads, c.d_head
        axes = ("embed", "kv_heads", "head_dim")
        k = self._heads(x_BTD, param(self, "k", fan_in_normal(D), (D, K, H), axes), "k")
        if c.keys_are_values:
            # Only what is not turned is both: the cache holds that, and keys are turned when read.
            k = checkpoint_name(jnp.swapaxes(k, 1, 2), "key")
            if cache is None:
                return Keys(_turned(k, tokens.rotation), k, None), None
            cache, read, positions = cache.append({"key": k}, c.keep_first, dtype)
            k, rotation = read["key"], None
            if tokens.rotation:
                rotation = rotations(c, positions, None, tokens.cache_length)
            return Keys(_turned(k, rotation), k, positions), cache
        v = product("BTD,DKH->BTKH", x_BTD, param(self, "v", fan_in_normal(D), (D, K, H), axes))
        v = constrain(v, ("batch", "seq", "act_kv_heads", "head_dim"), self.rules)
        if tokens.rotation:
            k = rotate(k, *tokens.rotation)
        k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if cache is None:
            return Keys(k, v, None), None
        cache, read, positions = cache.append({"key": k, "value": v}, c.keep_first, dtype)
        return Keys(read["key"], read["value"], positions), cache

    def _before_output(self, x_BTD: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
        """What goes into the output projection."""
        return attended_BTNH

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """As the configuration says."""
        return config.rotary_width if config.position == "rope" else 0

    @staticmethod
    def cache(
        config: ModelConfig, batch: int, max_length: int, spare: int
    ) -> dict[str, CacheArray]:
        """A key and a value per slot and key head, or what is both."""
        slots = slot_count(config, max_length, spare)
        heads = CacheArray(
            (batch, config.n_kv_heads, slots, config.d_head),
            ("batch", "kv_heads", "kv_seq", "head_dim"),
        )
        return {"key": heads} if config.keys_are_values else {"key": heads, "value": heads}

    @staticmethod
    def mixing_flops(config: ModelConfig, length: int) -> int:
        """Scores and values, each of d_head products, for every pair and query head."""
        return config.n_heads * config.d_head * area_seen(config, length)

    @staticmethod
    def reference(
        config: ModelConfig, weights: Weights, x: np.ndarray, depth: int, shared: Any
    ) -> tuple[np.ndarray, Any]:
        """Heads side by side, projected."""
        heads, lent = reference_heads(config, weights, x, shared)
        return np.einsum("nth,nhd->td", heads, weights["o"]), lent


def reference_heads(
    config: ModelConfig, weights: Weights, x: np.ndarray, shared: Any
) -> tuple[np.ndarray, Any]:
    """What each head attends to (N, T, H), head by head: query head n reads key head n // (N / K).
    And keys and values."""
    q = np.einsum("td,dnh->nth", x, weights["q"])
    if config.qk_norm:
        q = plain.rms_norm(q, weights["q_norm"], config.norm_eps)
    if not config.shares_kv:
        k = np.einsum("td,dkh->kth", x, weights["k"])
        if config.qk_norm:
            k = plain.rms_norm(k, weights["k_norm"], config.norm_eps)
        v = k if config.keys_are_values else np.einsum("td,dkh->kth", x, weights["v"])
        shared = plain.rope(k, config), v
    k, v = shared
    q, groups = plain.rope(q, config), config.n_groups
    sink = weights.get("sinks", [None] * config.n_heads)
    heads = [
        plain.attention(q[n], k[n // groups], v[n // groups], config, n, sink[n])
        for n in range(config.n_heads)
    ]
    return np.stack(heads), shared


def _turned(k_BKSH: jax.Array, rotation: Rotation | None) -> jax.Array:
    if rotation is None:
        return k_BKSH
    return jnp.swapaxes(rotate(jnp.swapaxes(k_BKSH, 1, 2), *rotation), 1, 2)
