"""Gated DeltaNet (Yang et al., arXiv 2412.06464): linear time, and a state instead of keys.

A head's state is a matrix that maps keys to values. Each token lets it decay, takes from it the
value that its key has there, and writes its own. Heads of queries and keys are n_kv_heads, each
for n_heads / n_kv_heads heads of values; what comes before it and what a head is normed by follow
the paper's section 3.4, with a gate on the output.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from llama_jax.config import ModelConfig, Schema
from llama_jax.model.attention import plain
from llama_jax.model.attention.interface import (
    Attended,
    Attention,
    Keys,
    Tokens,
    Weights,
    read_settings,
)
from llama_jax.model.layer_cache import CacheArray, LayerCache
from llama_jax.model.ops.delta import gated_delta, short_convolution
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.ops.product import product
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain

TINY = 1e-6  # added to a squared length before its root is taken
DECAYS = (1.0, 16.0)  # range of the first decays' rates
STEPS = (1e-3, 0.1)  # range of the first steps, on a logarithmic scale


class GatedDeltaSettings(Schema):
    """Widths of the gated delta rule; d_head is that of queries and keys."""

    value_width: int | None = Field(default=None, gt=0)
    """Width of a head's values; none: d_head."""
    convolution: int = Field(default=4, ge=2)
    """Tokens that the short convolution of queries, keys and values reaches over."""


class GatedDelta(Attention):
    """A recurrent state, computed in chunks where there are many tokens."""

    Settings: ClassVar[type[Schema]] = GatedDeltaSettings
    recurrent: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None, shared: Keys | None
    ) -> Attended:
        """(B, T, D) -> (B, T, D), and the cache with the state after this call's tokens."""
        c = self.config
        D, N, K, H, V = c.d_model, c.n_heads, c.n_kv_heads, c.d_head, value_width(c)
        if tokens.visibility.balanced:
            raise ValueError("attention gated_delta reads tokens in order: use mesh.context 1")
        residual = (2 * c.n_layers) ** -0.5
        starts_BT = _starts(tokens, cache is not None)
        new: dict[str, jax.Array] = {}

        def mixed(name: str, heads: int, width: int, axis: str) -> jax.Array:
            """A projection and its short convolution, (B, T, heads, width) fp32."""
            weight = param(
                *(self, name, fan_in_normal(D), (D, heads, width)), ("embed", axis, "head_dim")
            )
            reach = read_settings(c, GatedDeltaSettings).convolution
            filters = param(
                *(self, f"{name}_filter", fan_in_normal(reach), (reach, heads, width)),
                ("place", axis, "head_dim"),
            )
            y = product("BTD,DNH->BTNH", x_BTD, weight)
            y = constrain(y, ("batch", "seq", f"act_{axis}", "head_dim"), self.rules)
            y = y.astype(jnp.float32).reshape(*y.shape[:2], -1)
            tail = jnp.zeros((y.shape[0], reach - 1, y.shape[2]), jnp.float32)
            if cache is not None:
                tail = cache.get(f"{name}_tail").reshape(tail.shape)
            filters = filters.astype(jnp.float32).reshape(reach, -1)
            y, tail = short_convolution(y, filters, starts_BT, tail, tokens.real)
            new[f"{name}_tail"] = tail.reshape(*tail.shape[:2], heads, width)
            return jax.nn.silu(y).reshape(*x_BTD.shape[:2], heads, width)

        q = _unit(mixed("q", K, H, "kv_heads")) * H**-0.5
        k = _unit(mixed("k", K, H, "kv_heads"))
        v = mixed("v", N, V, "heads")
        q, k = (jnp.repeat(x, N // K, axis=2).astype(x_BTD.dtype) for x in (q, k))
        q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
        v = checkpoint_name(v.astype(x_BTD.dtype), "value")
        log_decay, beta = self._rates(x_BTD, tokens.real)
        state = jnp.zeros((x_BTD.shape[0], N, H, V), jnp.float32)
        if cache is not None:
            state = cache.get("state")
        y, new["state"] = gated_delta(q, k, v, log_decay, beta, starts_BT, state)
        norm = param(self, "head_norm", nn.initializers.ones, (V,), ("head_dim",))
        w_gate = param(
            self, "head_gate", fan_in_normal(D), (D, N, V), ("embed", "heads", "head_dim")
        )
        gate = product("BTD,DNV->BTNV", x_BTD, w_gate, jnp.float32)
        y = rms_norm(y.astype(jnp.float32), norm, c.norm_eps) * jax.nn.silu(gate)
        wo = param(
            self, "o", fan_in_normal(N * V, residual), (N, V, D), ("heads", "head_dim", "embed")
        )
        y = product("BTNV,NVD->BTD", checkpoint_name(y.astype(x_BTD.dtype), "attended"), wo)
        if cache is not None:
            for name, value in new.items():
                cache = cache.put(name, value)
        return Attended(checkpoint_name(y, "attention_out"), cache)

    def _rates(self, x_BTD: jax.Array, real_BT: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Logarithm of the decay and strength of the writing, each (B, T, N) fp32; padding neither
        decays nor writes."""
        D, N = self.config.d_model, self.config.n_heads
        w_decay = param(self, "decay", fan_in_normal(D), (D, N), ("embed", "heads"))
        w_beta = param(self, "beta", fan_in_normal(D), (D, N), ("embed", "heads"))
        rate = param(self, "decay_rate", _log_rates, (N,), ("heads",))
        bias = param(self, "decay_bias", _step_bias, (N,), ("heads",))
        step = jax.nn.softplus(product("BTD,DN->BTN", x_BTD, w_decay, jnp.float32) + bias)
        log_decay = -jnp.exp(rate.astype(jnp.float32)) * step
        beta = jax.nn.sigmoid(product("BTD,DN->BTN", x_BTD, w_beta, jnp.float32))
        if real_BT is None:
            return log_decay, beta
        real_BT1 = real_BT[..., None]
        return jnp.where(real_BT1, log_decay, 0.0), jnp.where(real_BT1, beta, 0.0)

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        """The order of tokens is in the recurrence."""
        return 0

    @staticmethod
    def cache(
        config: ModelConfig, batch: int, max_length: int, spare: int
    ) -> dict[str, CacheArray]:
        """A state per head, and the last inputs of the convolutions, whatever the length."""
        K, N, H, V = config.n_kv_heads, config.n_heads, config.d_head, value_width(config)
        before = read_settings(config, GatedDeltaSettings).convolution - 1
        kv, own = (("batch", None, f"act_{axis}", "head_dim") for axis in ("kv_heads", "heads"))
        return {
            "q_tail": CacheArray((batch, before, K, H), kv, jnp.float32),
            "k_tail": CacheArray((batch, before, K, H), kv, jnp.float32),
            "v_tail": CacheArray((batch, before, N, V), own, jnp.float32),
            "state": CacheArray(
                (batch, N, H, V), ("batch", "act_heads", "head_dim", None), jnp.float32
            ),
        }

    @staticmethod
    def mixing_flops(config: ModelConfig, length: int) -> int:
        """Of the recurrence: what the state has for the key, the change of it, the result."""
        return 3 * length * config.n_heads * config.d_head * value_width(config)

    @staticmethod
    def reference(
        config: ModelConfig, weights: Weights, x: np.ndarray, depth: int, shared: Any
    ) -> tuple[np.ndarray, Any]:
        """Head by head and token by token (equation 10)."""

        def mixed(name: str, head: int) -> np.ndarray:
            y, filters = x @ weights[name][:, head], weights[f"{name}_filter"][:, head]
            padded = np.concatenate([np.zeros((len(filters) - 1, y.shape[1])), y])
            y = np.stack([(padded[t : t + len(filters)] * filters).sum(0) for t in range(len(x))])
            return y * plain.sigmoid(y)

        def unit(y: np.ndarray) -> np.ndarray:
            return y / np.sqrt((y * y).sum(-1, keepdims=True) + TINY)

        total = np.zeros_like(x)
        for n in range(config.n_heads):
            g = n // config.n_groups
            q = unit(mixed("q", g)) / np.sqrt(config.d_head)
            k, v = unit(mixed("k", g)), mixed("v", n)
            step = np.log1p(np.exp(x @ weights["decay"][:, n] + weights["decay_bias"][n]))
            decay = np.exp(-np.exp(weights["decay_rate"][n]) * step)
            beta = plain.sigmoid(x @ weights["beta"][:, n])
            state, rows = np.zeros((k.shape[1], v.shape[1])), []
            for t in range(len(x)):
                state = decay[t] * state
                state = state + beta[t] * np.outer(k[t], v[t] - k[t] @ state)
                rows.append(q[t] @ state)
            y = plain.rms_norm(np.stack(rows), weights["head_norm"], config.norm_eps)
            gate = x @ weights["head_gate"][:, n]
            total += (y * gate * plain.sigmoid(gate)) @ weights["o"][n]
        return total, None


def value_width(config: ModelConfig) -> int:
    """Width of a head's values."""
    return read_settings(config, GatedDeltaSettings).value_width or config.d_head


def _starts(tokens: Tokens, cached: bool) -> jax.Array:
    """(B, T) bool: the token is the first of its document."""
    positions_BT, segments_BT = tokens.visibility.positions, tokens.visibility.segments
    if cached:
        starts_BT = positions_BT == 0
        return starts_BT if tokens.real is None else starts_BT & tokens.real
    first_BT = jnp.broadcast_to(jnp.arange(positions_BT.shape[1]) == 0, positions_BT.shape)
    if segments_BT is None:
        return first_BT
    return first_BT | (segments_BT != jnp.roll(segments_BT, 1, axis=1))


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length one."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + TINY)


def _log_rates(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAYS))


def _step_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What softplus makes a step of, as in Mamba-2's published code."""
    low, high = np.log(STEPS[0]), np.log(STEPS[1])
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))
