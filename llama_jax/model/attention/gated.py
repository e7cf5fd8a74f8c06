"""Gated attention: what a head attends to passes a gate (Qiu et al., arXiv 2505.06708).

The gate is the sigmoid of a projection of the layer's input, one number for each of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.model.attention import plain
from llama_jax.model.attention.grouped_query import GroupedQueryAttention, reference_heads
from llama_jax.model.attention.interface import Weights
from llama_jax.model.ops.product import product
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain


class GatedAttention(GroupedQueryAttention):
    """Grouped-query attention with a gate before the output projection."""

    def _before_output(self, x_BTD: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
        D, N, H = self.config.d_model, self.config.n_heads, self.config.d_head
        weight = param(
            self, "head_gate", fan_in_normal(D), (D, N, H), ("embed", "heads", "head_dim")
        )
        gate = product("BTD,DNH->BTNH", x_BTD, weight, jnp.float32)
        gate = constrain(gate, ("batch", "seq", "act_heads", "head_dim"), self.rules)
        return (jax.nn.sigmoid(gate) * attended_BTNH).astype(attended_BTNH.dtype)

    @staticmethod
    def reference(
        config: ModelConfig, weights: Weights, x: np.ndarray, depth: int, shared: Any
    ) -> tuple[np.ndarray, Any]:
        """Heads times their gates, projected."""
        heads, lent = reference_heads(config, weights, x, shared)
        gates = plain.sigmoid(np.einsum("td,dnh->nth", x, weights["head_gate"]))
        return np.einsum("nth,nhd->td", heads * gates, weights["o"]), lent
