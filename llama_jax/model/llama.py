"""The LLaMA family: one forward for training, prefill, decoding and verification.

Decoder-only, pre-norm (arXiv 2302.13971, section 2.2; 2307.09288, section 2.2):

    x = x + attention(norm(x));  x = x + feed_forward(norm(x));  logits = norm(x) @ head

What differs between these uses is only which arguments are given: no cache (training), an empty
cache and T tokens (prefill), a cache and one token (decode), a cache and k tokens (verify).
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.config import ComputeConfig, ModelConfig
from llama_jax.model.attention.grouped_query import GroupedQueryAttention
from llama_jax.model.cache import KVCache, LayerCache
from llama_jax.model.feed_forward import FeedForward
from llama_jax.model.ops.attend import Visibility
from llama_jax.model.ops.kernels import Kernel, chosen
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.ops.product import Weight, product
from llama_jax.model.ops.rope import rotations
from llama_jax.model.ops.weight import take
from llama_jax.model.param import box, fan_in_normal, param, split, stack_boxes
from sharding.constrain import constrain, parts
from sharding.rules import Rules

Params = dict[str, Any]
Head = Literal["lm", "scalar", "none"]
Carry = tuple[jax.Array, KVCache | None]
RESIDUAL = ("batch", "residual_seq", "act_embed")  # axes of the stream between blocks
LOGITS = ("batch", "seq", "act_vocab")


class Output(NamedTuple):
    """What `Llama.apply` returns.

    value: fp32 logits (B, T, V), fp32 scores (B, T) or hidden states (B, T, D), by `head`.
    cache: the cache with this call's tokens in it, or None.
    aux: auxiliary losses by name (none for a dense model).
    """

    value: jax.Array
    cache: KVCache | None
    aux: dict[str, jax.Array]


class Layer(nn.Module):
    """One block: attention and feed-forward, each on a normed copy of the residual stream."""

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
        """(B, T, D) -> (B, T, D), and the layer's cache."""
        D, eps = self.config.d_model, self.config.norm_eps
        parts = (self.config, self.rules)
        ones = nn.initializers.ones
        attention_norm = param(self, "attention_norm", ones, (D,), ("embed",))
        feed_forward_norm = param(self, "feed_forward_norm", ones, (D,), ("embed",))

        y, cache = GroupedQueryAttention(*parts, self.kernel, name="attention")(
            rms_norm(x_BTD, attention_norm, eps), rotation, visibility, cache
        )
        x = constrain(x_BTD + y, RESIDUAL, self.rules)
        y = FeedForward(*parts, name="feed_forward")(rms_norm(x, feed_forward_norm, eps))
        return constrain(x + y, RESIDUAL, self.rules), cache


@dataclass(frozen=True)
class Llama:
    """A model as a value: hashable, without state, a legal static argument of jit."""

    config: ModelConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    rules: Rules | None = None

    def init(self, key: jax.Array, head: Head = "lm") -> Params:
        """New fp32 parameters, layers stacked on a leading axis."""
        return split(self._boxes(key, head))[0]

    def shapes(self, head: Head = "lm") -> Params:
        """The tree of `init` as ShapeDtypeStructs; nothing is allocated."""
        return split(jax.eval_shape(lambda: self._boxes(jax.random.key(0), head)))[0]

    def axes(self, head: Head = "lm") -> Params:
        """The tree of `init` with the logical axis names of each array."""
        return split(jax.eval_shape(lambda: self._boxes(jax.random.key(0), head)))[1]

    def _boxes(self, key: jax.Array, head: Head) -> Params:
        c = self.config
        layer = Layer(c, None)  # a row of one token, which no mesh could split
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        some_x = jnp.zeros((1, 1, c.d_model))
        some_positions = jnp.zeros((1, 1), jnp.int32)
        some_rotation = rotations(c, some_positions, None, None)
        some_visibility = Visibility(some_positions)

        def init_layer(key: jax.Array) -> Any:
            return layer.init(key, some_x, some_rotation, some_visibility, None)["params"]

        ones = nn.initializers.ones
        wide = fan_in_normal(c.d_model)
        params = {
            "embed": box(wide, embed_key, (c.vocab_size, c.d_model), ("vocab", "embed")),
            "layers": stack_boxes(init_layer, jax.random.split(layers_key, c.n_layers)),
            "final_norm": box(ones, head_key, (c.d_model,), ("embed",)),
        }
        if head == "lm" and not c.tie_embeddings:
            params["head"] = box(wide, head_key, (c.d_model, c.vocab_size), ("embed", "vocab"))
        if head == "scalar":
            params["scalar_head"] = box(wide, head_key, (c.d_model,), ("embed",))
        return params

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        head: Head = "lm",
        rows_B: jax.Array | None = None,
        balanced: bool = False,
    ) -> Output:
        """The forward pass.

        positions rise along a row within a document. segments tell documents of a row apart; 0 is
        padding. With a cache the row is one document: segments only mark padding, which is not
        stored, and rows_B are the cache's rows that are meant (None: all of them, in order). Ids,
        positions and rows must be in range: the host checks, since jax does not. `balanced` says
        that the tokens of each row lie in the order of `balanced_order`, and so will the results.

        params["layers"] stacked is scanned; a tuple of layers (`unstack`) is unrolled, as the cache
        must then be.
        """
        visibility = Visibility(positions_BT, segments_BT, balanced=balanced)
        slots_BT = positions_BT
        if cache is not None:
            visibility = Visibility(positions_BT, None, jnp.arange(cache.max_length)[None])
            if segments_BT is not None:
                slots_BT = jnp.where(segments_BT == 0, cache.max_length, positions_BT)
        cache_length = None if cache is None else cache.max_length
        rotation = rotations(self.config, positions_BT, segments_BT, cache_length)

        model = self if cache is None else self._with_whole_rows()
        x = take(params["embed"], tokens_BT, self.compute.dtype)
        x = constrain(x, RESIDUAL, model.rules)
        x, cache = model._layers(params["layers"], x, rotation, visibility, cache, slots_BT, rows_B)
        x = rms_norm(x, params["final_norm"], self.config.norm_eps)
        return Output(model._head(params, x, head), cache, {})

    def _with_whole_rows(self) -> "Llama":
        """This model with rules that leave the tokens of a row together: a decoded token is one."""
        if self.rules is None:
            return self
        return replace(self, rules=self.rules.replace(seq=None, residual_seq=None))

    def _layers(
        self,
        layers: Any,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        visibility: Visibility,
        cache: KVCache | None,
        slots_BT: jax.Array,
        rows_B: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        stacked = not isinstance(layers, tuple)
        if cache and stacked != cache.stacked:
            raise ValueError(
                "layers and cache must both be stacked, or both be unstacked: KVCache.init takes "
                f"stacked={stacked} for these parameters"
            )
        scan = stacked and (self.compute.scan_layers or cache is not None)
        # What layers differ in comes again after a period of them, which is what is looped over.
        windows = self.config.period
        period = len(windows)

        @functools.cache  # equal layers are one function, which jax traces once
        def block(place: int, inside_scan: bool = False) -> Any:
            seen = visibility._replace(window=windows[place])
            return _rematerialise(self._block(rotation, seen), self.compute, inside_scan)

        if scan:
            # The cache is carried and updated in place: as scan input and output it would exist
            # twice.
            def run(block: Any, carry: Carry, weights: Any, depth: jax.Array | int) -> Carry:
                x, cache = carry
                x, mine = block(x, weights, cache.layer(depth, slots_BT, rows_B) if cache else None)
                return x, KVCache(mine.key, mine.value) if mine else None

            def body(carry: Carry, xs: Any) -> tuple[Carry, None]:
                weights, depth = xs
                for place in range(period):
                    own = weights if period == 1 else _at(weights, place)
                    carry = run(block(place, True), carry, own, depth + place)
                return carry, None

            whole = self.config.n_layers - self.config.n_layers % period
            periods = layers if period == 1 else _grouped(layers, whole, period)
            carry, _ = jax.lax.scan(body, (x, cache), (periods, jnp.arange(0, whole, period)))
            for depth in range(whole, self.config.n_layers):
                carry = run(block(depth % period), carry, _at(layers, depth), depth)
            return carry

        per_layer = _split_layers(layers) if stacked else layers
        stored = []
        for depth, weights in enumerate(per_layer):
            mine = cache.layer(depth, slots_BT, rows_B) if cache else None
            x, mine = block(depth % period)(x, weights, mine)
            if mine:
                stored.append(mine)
        if cache:
            cache = KVCache(tuple(c.key for c in stored), tuple(c.value for c in stored))
        return x, cache

    def _block(self, rotation: tuple[jax.Array, jax.Array], visibility: Visibility) -> Any:
        """(x, weights, cache of the layer) -> (x, cache of the layer)."""
        devices, windowed = parts("seq", self.rules), visibility.window is not None
        kernel = chosen(self.compute.attention, devices=devices, windowed=windowed)
        layer = Layer(self.config, self.rules, kernel)

        def block(
            x: jax.Array, weights: Any, layer_cache: LayerCache | None
        ) -> tuple[jax.Array, LayerCache | None]:
            return layer.apply({"params": weights}, x, rotation, visibility, layer_cache)

        return block

    def _head(self, params: Params, x: jax.Array, head: Head) -> jax.Array:
        match head:
            case "none":
                return x
            case "scalar":
                return product("BTD,D->BT", x, params["scalar_head"], jnp.float32)
            case "lm":
                if self.config.tie_embeddings:
                    logits = product("BTD,VD->BTV", x, params["embed"], jnp.float32)
                else:
                    logits = product("BTD,DV->BTV", x, params["head"], jnp.float32)
                return constrain(logits, LOGITS, self.rules)

    def output_weight(self, params: Params) -> Any:
        """The (D, V) matrix that turns hidden states into logits, in the layout it is given in."""
        if not self.config.tie_embeddings:
            return params["head"]
        embed = params["embed"]
        return embed if isinstance(embed, Weight) else embed.T


def _rematerialise(block: Any, compute: ComputeConfig, inside_scan: bool) -> Any:
    """The block with its activations recomputed in the backward pass, as `compute.remat` says."""
    if compute.remat == "none":
        return block
    policy = None
    if compute.remat == "named":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=compute.remat_save,
            names_which_can_be_offloaded=compute.remat_offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
    # A scan already keeps the recomputation apart; unrolled layers need the barrier against CSE.
    return jax.checkpoint(block, policy=policy, prevent_cse=not inside_scan)


def _grouped(layers: Any, count: int, period: int) -> Any:
    """The first `count` of stacked layers, (count / period, period, ...); when training, XLA makes
    a copy of them."""
    return jax.tree.map(lambda w: w[:count].reshape(-1, period, *w.shape[1:]), layers)


def _at(layers: Any, index: int) -> Any:
    """The weights of one of several stacked layers."""
    return jax.tree.map(lambda w: w[index], layers)


def _split_layers(layers: Any) -> tuple[Any, ...]:
    """Stacked layers as L trees. The gradient of a split is one concatenation, not L scatters."""
    leaves, tree = jax.tree.flatten(layers)
    count = leaves[0].shape[0]
    parts = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    return tuple(
        jax.tree.unflatten(tree, [part[i].squeeze(0) for part in parts]) for i in range(count)
    )


def unstack(params: Params) -> Params:
    """The same parameters with `layers` as a tuple of per-layer trees (for unrolled programs)."""
    return {**params, "layers": _split_layers(params["layers"])}


def stack(params: Params) -> Params:
    """The inverse of `unstack`."""
    return {**params, "layers": jax.tree.map(lambda *a: jnp.stack(a), *params["layers"])}
