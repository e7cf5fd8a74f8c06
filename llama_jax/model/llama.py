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
from llama_jax.model.attention import ATTENTION, check, wanted
from llama_jax.model.attention.interface import Keys, Tokens
from llama_jax.model.cache import KVCache
from llama_jax.model.layer import RESIDUAL, Layer, Passed, Scalars
from llama_jax.model.layer_cache import LayerCache
from llama_jax.model.ops.attend import Visibility
from llama_jax.model.ops.kernels import chosen
from llama_jax.model.ops.norm import rms_norm
from llama_jax.model.ops.product import Weight, product
from llama_jax.model.ops.rope import rotations
from llama_jax.model.ops.weight import take
from llama_jax.model.param import box, fan_in_normal, split, stack_boxes
from llama_jax.model.stack import Params, by_place, joined, split_layers
from sharding.constrain import constrain, parts
from sharding.rules import Rules

Head = Literal["lm", "scalar", "none"]
LOGITS = ("batch", "seq", "act_vocab")


class Output(NamedTuple):
    """What `Llama.apply` returns.

    value: fp32 logits (B, T, V), fp32 scores (B, T) or hidden states (B, T, D), by `head`.
    cache: the cache with this call's tokens in it, or None.
    aux: auxiliary values by name, summed over the layers (none for a dense model).
    """

    value: jax.Array
    cache: KVCache | None
    aux: dict[str, jax.Array]


@dataclass(frozen=True)
class Llama:
    """A model as a value: hashable, without state, a legal static argument of jit."""

    config: ModelConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    rules: Rules | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError where attention does not read what the config says."""
        check(self.config)

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
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        layer_keys = jax.random.split(layers_key, c.n_layers)
        ones = nn.initializers.ones
        wide = fan_in_normal(c.d_model)
        params = {
            "embed": box(wide, embed_key, (c.vocab_size, c.d_model), ("vocab", "embed")),
            "layers": joined(
                tuple(
                    stack_boxes(
                        functools.partial(_init_layer, place), layer_keys[i :: len(c.places)]
                    )
                    for i, place in enumerate(c.places)
                )
            ),
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
        padding. With a cache the row is one document, whose tokens come one after the other from
        position 0 on: segments only mark padding, which is not stored, and rows_B are the cache's
        rows that are meant (None: all of them, in order). Ids, positions and rows must be in range:
        the host checks, since jax does not. `balanced` says that the tokens of each row lie in the
        order of `balanced_order`, and so will the results.

        params["layers"] stacked is scanned; a tuple of layers (`unstack`) is unrolled, as the cache
        must then be.
        """
        if cache is None:
            model, visibility = self, Visibility(positions_BT, segments_BT, balanced=balanced)
        else:
            model, visibility = self._with_whole_rows(), Visibility(positions_BT)
        real_BT = None if segments_BT is None else segments_BT != 0
        tokens = model._tokens(visibility, segments_BT, real_BT, cache)
        x = take(params["embed"], tokens_BT, self.compute.dtype)
        x = constrain(x, RESIDUAL, model.rules)
        x, cache, aux = model._layers(params["layers"], x, tokens, cache, rows_B)
        x = rms_norm(x, params["final_norm"], self.config.norm_eps)
        return Output(model._head(params, x, head), cache, aux)

    def _with_whole_rows(self) -> "Llama":
        """This model with rules that leave the tokens of a row together: a decoded token is one."""
        if self.rules is None:
            return self
        return replace(self, rules=self.rules.replace(seq=None, residual_seq=None))

    def _tokens(
        self,
        visibility: Visibility,
        segments_BT: jax.Array | None,
        real_BT: jax.Array | None,
        cache: KVCache | None,
    ) -> tuple[Tokens, ...]:
        """What the layers at each place of the pattern are told of the tokens."""
        length = None if cache is None else cache.max_length
        known: dict[Any, Any] = {}  # equal frequencies are computed once

        def told(place: ModelConfig) -> Tokens:
            width = ATTENTION[place.attention].rotary_width(place)
            kind = width, place.rope_theta, place.rope_scaling
            if width and kind not in known:
                known[kind] = rotations(place, visibility.positions, segments_BT, length, width)
            seen = visibility._replace(
                window=place.window, chunk=place.chunk, keep_first=place.keep_first
            )
            return Tokens(seen, known[kind] if width else None, 0, real_BT, length)

        return tuple(told(place) for place in self.config.places)

    def _layers(
        self,
        layers: Any,
        x: jax.Array,
        tokens: tuple[Tokens, ...],
        cache: KVCache | None,
        rows_B: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None, Scalars]:
        stacked = not isinstance(layers, tuple)
        if cache and stacked != cache.stacked:
            raise ValueError(
                "layers and cache must both be stacked, or both be unstacked: KVCache.init takes "
                f"stacked={stacked} for these parameters"
            )
        places, count = self.config.places, self.config.n_layers
        period = len(places)
        positions_BT, real_BT = tokens[0].visibility.positions, tokens[0].real

        @functools.cache  # equal layers are one function, which jax traces once
        def block(place: int, inside_scan: bool = False) -> Any:
            return _rematerialise(self._block(place, tokens[place]), self.compute, inside_scan)

        def mine(cache: KVCache | None, depth: Any, place: int) -> LayerCache | None:
            return cache.layer(depth, place, positions_BT, real_BT, rows_B) if cache else None

        if stacked and (self.compute.scan_layers or cache is not None):
            # The cache is carried and updated in place: as scan input and output it would exist
            # twice.
            def run(x: jax.Array, cache: KVCache | None, all_weights: Any, turn: Any) -> Any:
                """One period, or its beginning: as many places as there are weights."""
                keys: Keys | None = None
                sums: Scalars = {}
                for place, weights in enumerate(all_weights):
                    depth = turn * period + place
                    layer_cache = mine(cache, turn, place)
                    passed = block(place, True)(x, weights, layer_cache, keys, depth)
                    x, keys = passed.stream, passed.keys or keys
                    sums = _added(sums, passed.aux)
                    if cache:
                        cache = cache.with_layer(place, passed.cache)
                return x, cache, sums

            def body(carry: Any, xs: Any) -> tuple[Any, Scalars]:
                x, cache, sums = run(*carry, *xs)
                return (x, cache), sums

            turns, rest = divmod(count, period)
            stacks = by_place(layers)
            whole = stacks if not rest else jax.tree.map(lambda w: w[:turns], stacks)
            (x, cache), sums = jax.lax.scan(body, (x, cache), (whole, jnp.arange(turns)))
            aux = jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)
            if rest:
                last = jax.tree.map(lambda w: w[turns], stacks[:rest])
                x, cache, sums = run(x, cache, last, turns)
                aux = _added(aux, sums)
            return x, cache, aux

        keys, aux, stored = None, {}, []
        for depth, weights in enumerate(split_layers(layers) if stacked else layers):
            place = depth % period
            layer_cache = mine(cache, depth, place)
            passed = block(place)(x, weights, layer_cache, keys, jnp.int32(depth))
            x, keys = passed.stream, passed.keys or keys
            aux = _added(aux, passed.aux)
            if passed.cache:
                stored.append(passed.cache.arrays)
        return x, cache and replace(cache, layers=tuple(stored)), aux

    def _block(self, place: int, tokens: Tokens) -> Any:
        """(x, weights, cache of the layer, keys to share, depth) -> Passed."""
        places = self.config.places
        wants = wanted(self.config)
        kernel = chosen(self.compute.attention, devices=parts("seq", self.rules), wanted=wants)
        lends = any(later.shares_kv for later in places[place + 1 :])
        layer = Layer(places[place], self.rules, kernel, lends and not places[place].shares_kv)

        def block(
            x: jax.Array,
            weights: Any,
            layer_cache: LayerCache | None,
            keys: Keys | None,
            depth: jax.Array,
        ) -> Passed:
            told = tokens._replace(depth=depth)
            return layer.apply({"params": weights}, x, told, layer_cache, keys)

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


def _added(sums: Scalars, more: Scalars) -> Scalars:
    return sums | {name: sums.get(name, 0.0) + value for name, value in more.items()}


def _init_layer(place: ModelConfig, key: jax.Array) -> Any:
    """New parameters of one layer, in their boxes."""
    # A row of one token, and no rules: no mesh could split it.
    visibility = Visibility(jnp.zeros((1, 1), jnp.int32))
    (tokens,) = Llama(place)._tokens(visibility, None, None, None)
    keys = jnp.zeros((1, place.n_kv_heads, 1, place.d_head))
    shared = Keys(keys, keys, None) if place.shares_kv else None
    x = jnp.zeros((1, 1, place.d_model))
    return Layer(place, None).init(key, x, tokens, None, shared)["params"]
