"""The feed-forward layer, with a gate (Shazeer, arXiv 2002.05202) or without."""

import flax.linen as nn
import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.model.ops.activation import activate
from llama_jax.model.ops.product import product
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain
from sharding.rules import Rules


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)).

    width: of the layer; None for d_ff.
    """

    config: ModelConfig
    rules: Rules | None
    width: int | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        D, F = self.config.d_model, self.width or self.config.d_ff
        kind = self.config.feed_forward
        residual = (2 * self.config.n_layers) ** -0.5
        gate = None
        if is_gated(self.config):
            w_gate = param(self, "gate", fan_in_normal(D), (D, F), ("embed", "mlp"))
            gate = self._inner(product("BTD,DF->BTF", x_BTD, w_gate), "gate")
        w_up = param(self, "up", fan_in_normal(D), (D, F), ("embed", "mlp"))
        w_down = param(self, "down", fan_in_normal(F, residual), (F, D), ("mlp", "embed"))
        up = self._inner(product("BTD,DF->BTF", x_BTD, w_up), "up")
        return product("BTF,FD->BTD", activate(kind, gate, up), w_down)

    def _inner(self, x_BTF: jax.Array, name: str) -> jax.Array:
        return checkpoint_name(constrain(x_BTF, ("batch", "seq", "act_mlp"), self.rules), name)


def is_gated(config: ModelConfig) -> bool:
    """Whether the layer has a gate."""
    return config.feed_forward != "relu2"


def reference(config: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The definition in numpy: (T, D) -> (T, D)."""
    up = x @ weights["up"]
    match config.feed_forward:
        case "swiglu":
            gate = x @ weights["gate"]
            inner = gate / (1 + np.exp(-gate)) * up
        case "geglu":
            gate = x @ weights["gate"]
            inner = (
                0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
            )
        case "relu2":
            inner = np.maximum(up, 0) ** 2
    return inner @ weights["down"]
