"""The SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202)."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.model.ops.product import product
from llama_jax.model.ops.swiglu import swiglu
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain
from sharding.rules import Rules


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    config: ModelConfig
    rules: Rules | None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        D, F = self.config.d_model, self.config.d_ff
        residual = (2 * self.config.n_layers) ** -0.5
        w_gate = param(self, "gate", fan_in_normal(D), (D, F), ("embed", "mlp"))
        w_up = param(self, "up", fan_in_normal(D), (D, F), ("embed", "mlp"))
        w_down = param(self, "down", fan_in_normal(F, residual), (F, D), ("mlp", "embed"))
        gate = product("BTD,DF->BTF", x_BTD, w_gate)
        up = product("BTD,DF->BTF", x_BTD, w_up)
        gate = checkpoint_name(constrain(gate, ("batch", "seq", "act_mlp"), self.rules), "gate")
        up = checkpoint_name(constrain(up, ("batch", "seq", "act_mlp"), self.rules), "up")
        return product("BTF,FD->BTD", swiglu(gate, up), w_down)
