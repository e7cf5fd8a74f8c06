"""One block of the model."""

from typing import NamedTuple

import flax.linen as nn
import jax

from llama_jax.config import ModelConfig
from llama_jax.model.attention import ATTENTION
from llama_jax.model.attention.interface import Keys, Tokens
from llama_jax.model.feed_forward import FeedForward
from llama_jax.model.layer_cache import LayerCache
from llama_jax.model.moe import MixtureOfExperts
from llama_jax.model.ops.kernels import Kernel
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.param import param
from sharding.constrain import constrain
from sharding.rules import Rules

RESIDUAL = ("batch", "residual_seq", "act_embed")  # axes of the stream between blocks
Scalars = dict[str, jax.Array]


class Passed(NamedTuple):
    """What a block hands on: the stream (B, T, D), its cache, keys to lend, and of a mixture of
    experts `router_loss`, which training adds, and what it is made of."""

    stream: jax.Array
    cache: LayerCache | None
    keys: Keys | None
    aux: Scalars


class Layer(nn.Module):
    """Attention and feed-forward, each on a normed copy of the residual stream.

    config: of the layer, as `ModelConfig.places` gives it.
    lends: whether a later layer shares its keys and values.
    """

    config: ModelConfig
    rules: Rules | None
    kernel: Kernel = "xla"
    lends: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None, shared: Keys | None
    ) -> Passed:
        """(B, T, D) -> (B, T, D)."""
        c = self.config
        normed = self._norm("attention_norm", x_BTD)
        attention = ATTENTION[c.attention](c, self.rules, self.kernel, name="attention")
        attended = attention(normed, tokens, cache, shared)
        x = constrain(x_BTD + attended.value, RESIDUAL, self.rules)
        if not c.parallel_block:
            normed = self._norm("feed_forward_norm", x)
        y, aux = self._feed_forward(normed, tokens)
        x = constrain(x + y, RESIDUAL, self.rules)
        return Passed(x, attended.cache, attended.keys if self.lends else None, aux)

    def _norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        scale = param(self, name, nn.initializers.ones, (self.config.d_model,), ("embed",))
        return rms_norm(x_BTD, scale, self.config.norm_eps)

    def _feed_forward(self, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Scalars]:
        experts = self.config.experts
        if experts is None:
            return FeedForward(self.config, self.rules, name="feed_forward")(x_BTD), {}
        mixture = MixtureOfExperts(self.config, self.rules, name="feed_forward")
        y, aux = mixture(x_BTD, tokens.real)
        loss = experts.balance * aux["balance"] + experts.z_loss * aux["router_z"]
        return y, {**aux, "router_loss": loss}
