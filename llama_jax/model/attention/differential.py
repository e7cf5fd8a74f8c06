"""Differential attention (Ye et al., arXiv 2410.05258): one softmax less a part of another.

Query and key heads come in pairs. A pair has one value, twice as wide as a key, and attends to it
with the weights of its first head less lambda times those of its second. Noise that both see
cancels out. n_heads and n_kv_heads count the heads of a pair singly.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ConfigError, ModelConfig
from llama_jax.model.attention import plain
from llama_jax.model.attention.interface import Attended, Attention, Keys, Tokens, Weights
from llama_jax.model.attention.scores import SCORES, area_seen, scoring
from llama_jax.model.layer_cache import CacheArray, LayerCache, slot_count
from llama_jax.model.ops.attend import attend
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.ops.product import product
from llama_jax.model.ops.rope import rotate
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain


class DifferentialAttention(Attention):
    """softmax(q1 k1) v - lambda softmax(q2 k2) v, normed head by head."""

    settings: ClassVar[frozenset[str]] = (SCORES - {"sinks"}) | {"rotary_fraction", "rope_scaling"}

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None, shared: Keys | None
    ) -> Attended:
        """(B, T, D) -> (B, T, D), and the cache with this call's keys and values in it."""
        c = self.config
        D, N, K, H = c.d_model, c.n_heads // 2, c.n_kv_heads // 2, c.d_head
        residual = (2 * c.n_layers) ** -0.5
        pairs = ("embed", "pair", "heads", "head_dim")
        kv_pairs = ("embed", "pair", "kv_heads", "head_dim")
        wq = param(self, "q_pair", fan_in_normal(D), (D, 2, N, H), pairs)
        wk = param(self, "k_pair", fan_in_normal(D), (D, 2, K, H), kv_pairs)
        wv = param(self, "v", fan_in_normal(D), (D, K, 2 * H), ("embed", "kv_heads", "head_dim"))
        wo = param(
            *(self, "o", fan_in_normal(2 * N * H, residual)),
            *((N, 2 * H, D), ("heads", "head_dim", "embed")),
        )
        norm = param(self, "head_norm", nn.initializers.ones, (2 * H,), ("head_dim",))
        some = nn.initializers.normal(stddev=0.1)
        parts = [param(self, f"lambda_{n}", some, (2, H), ("pair", "head_dim")) for n in "qk"]

        assert tokens.rotation is not None  # it has no other positions
        q = product("BTD,DPNH->BTPNH", x_BTD, wq)
        k = product("BTD,DPKH->BTPKH", x_BTD, wk)
        v = product("BTD,DKW->BTKW", x_BTD, wv)
        first, second = (
            checkpoint_name(rotate(self._split(q[:, :, p], "act_heads"), *tokens.rotation), "query")
            for p in (0, 1)
        )
        keys = [
            checkpoint_name(
                rotate(self._split(k[:, :, p], "act_kv_heads"), *tokens.rotation), "key"
            )
            for p in (0, 1)
        ]
        v = checkpoint_name(self._split(v, "act_kv_heads"), "value")
        stored = {"key_1": keys[0], "key_2": keys[1], "value": v}
        stored = {name: jnp.swapaxes(x, 1, 2) for name, x in stored.items()}
        positions = None
        if cache is not None:
            cache, stored, positions = cache.append(stored, c.keep_first, x_BTD.dtype)
        visibility = tokens.visibility.of_keys(positions)
        maps = [
            attend(
                *(query.astype(stored[key].dtype), stored[key], stored["value"], visibility),
                *("xla", self.rules, scoring(c)),
            ).astype(jnp.float32)
            for query, key in ((first, "key_1"), (second, "key_2"))
        ]
        start = lambda_init(tokens.depth)
        dots = jnp.exp(jnp.sum(parts[0].astype(jnp.float32) * parts[1].astype(jnp.float32), axis=1))
        difference = maps[0] - (dots[0] - dots[1] + start) * maps[1]
        heads = rms_norm(difference, norm, c.norm_eps) * (1 - start)
        y = product("BTNW,NWD->BTD", heads.astype(x_BTD.dtype), wo)
        return Attended(checkpoint_name(y, "attention_out"), cache)

    def _split(self, heads: jax.Array, axis: str) -> jax.Array:
        return constrain(heads, ("batch", "seq", axis, "head_dim"), self.rules)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Heads must come in pairs."""
        if config.n_heads % 2 or config.n_kv_heads % 2:
            raise ConfigError(
                f"attention differential pairs heads: n_heads ({config.n_heads}) and n_kv_heads "
                f"({config.n_kv_heads}) must be even"
            )

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """As the configuration says."""
        return config.rotary_width

    @staticmethod
    def cache(
        config: ModelConfig, batch: int, max_length: int, spare: int
    ) -> dict[str, CacheArray]:
        """Two keys and a value of twice their width per slot and pair."""
        slots, pairs, H = (
            slot_count(config, max_length, spare),
            config.n_kv_heads // 2,
            config.d_head,
        )
        axes = ("batch", "kv_heads", "kv_seq", "head_dim")
        key = CacheArray((batch, pairs, slots, H), axes)
        return {
            "key_1": key,
            "key_2": key,
            "value": CacheArray((batch, pairs, slots, 2 * H), axes),
        }

    @staticmethod
    def mixing_flops(config: ModelConfig, length: int) -> int:
        """Of every head and pair of tokens d_head products for the score, twice that for values."""
        return 3 * config.n_heads * config.d_head * area_seen(config, length) // 2

    @staticmethod
    def reference(
        config: ModelConfig, weights: Weights, x: np.ndarray, depth: int, shared: Any
    ) -> tuple[np.ndarray, Any]:
        """Pair by pair, as in the paper's section 2.1."""
        q = plain.rope(np.einsum("td,dpnh->pnth", x, weights["q_pair"]), config)
        k = plain.rope(np.einsum("td,dpkh->pkth", x, weights["k_pair"]), config)
        v = np.einsum("td,dkw->ktw", x, weights["v"])
        start = 0.8 - 0.6 * np.exp(-0.3 * depth)
        one, two = (np.exp(weights["lambda_q"][p] @ weights["lambda_k"][p]) for p in (0, 1))
        total = np.zeros_like(x)
        for n in range(config.n_heads // 2):
            g = n // config.n_groups
            first = plain.attention(q[0, n], k[0, g], v[g], config, n)
            second = plain.attention(q[1, n], k[1, g], v[g], config, n)
            head = first - (one - two + start) * second
            head = plain.rms_norm(head, weights["head_norm"], config.norm_eps) * (1 - start)
            total += head @ weights["o"][n]
        return total, None


def lambda_init(depth: jax.Array | int) -> jax.Array:
    """0.8 - 0.6 exp(-0.3 depth), layers counted from 0 (section 2.1)."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(depth, jnp.float32))
