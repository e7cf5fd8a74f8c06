"""Grouped-query attention (Ainslie et al., arXiv 2305.13245).

Multi-head attention is the case n_kv_heads = n_heads, multi-query the case n_kv_heads = 1.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.model.cache import LayerCache
from llama_jax.model.ops.attend import Visibility, attend
from llama_jax.model.ops.kernels import Kernel
from llama_jax.model.ops.product import product
from llama_jax.model.ops.rope import rotate
from llama_jax.model.param import fan_in_normal, param
from sharding.constrain import constrain
from sharding.rules import Rules


class GroupedQueryAttention(nn.Module):
    """Queries, keys, values, rotation, attention, output projection."""

    config: ModelConfig
    rules: Rules | None
    kernel: Kernel = "xla"

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        visibility: Visibility,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """(B, T, D) -> (B, T, D), and the cache with this call's keys and values in it."""
        D, N, K, H = (
            self.config.d_model,
            self.config.n_heads,
            self.config.n_kv_heads,
            self.config.d_head,
        )
        # Both writers into the residual stream are scaled down by its 2 L additions (GPT-2, 2.3).
        residual = (2 * self.config.n_layers) ** -0.5
        wq = param(self, "q", fan_in_normal(D), (D, N, H), ("embed", "heads", "head_dim"))
        wk = param(self, "k", fan_in_normal(D), (D, K, H), ("embed", "kv_heads", "head_dim"))
        wv = param(self, "v", fan_in_normal(D), (D, K, H), ("embed", "kv_heads", "head_dim"))
        wo = param(
            self, "o", fan_in_normal(N * H, residual), (N, H, D), ("heads", "head_dim", "embed")
        )
        q = product("BTD,DNH->BTNH", x_BTD, wq)
        k = product("BTD,DKH->BTKH", x_BTD, wk)
        v = product("BTD,DKH->BTKH", x_BTD, wv)
        q = constrain(q, ("batch", "seq", "act_heads", "head_dim"), self.rules)
        k = constrain(k, ("batch", "seq", "act_kv_heads", "head_dim"), self.rules)
        v = constrain(v, ("batch", "seq", "act_kv_heads", "head_dim"), self.rules)
        q = checkpoint_name(rotate(q, *rotation), "query")
        k = checkpoint_name(rotate(k, *rotation), "key")
        v = checkpoint_name(v, "value")
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if cache is not None:
            cache = cache.write(k, v)
            k, v = cache.read(x_BTD.dtype)
        attended = attend(q.astype(k.dtype), k, v, visibility, self.kernel, self.rules)
        attended = attended.astype(x_BTD.dtype)
        y = product("BTNH,NHD->BTD", attended, wo)
        return checkpoint_name(y, "attention_out"), cache
