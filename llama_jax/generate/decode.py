"""The decoding loop as a value: a frozen object of statics, a state, one compiled while_loop.

A row is a prompt and its growing answer, kept at their positions in one array. The step feeds the
last token of every row and writes the next one behind it; `prefill` stores the tokens before the
last one. So every row is at a length of its own, all sampling happens in one place, and a batch of
ragged prompts needs no special case.

Everything that a request may choose is an array. What compiles anew: another model, another number
of rows, of slots or of stop ids, another chunk of prefill, another mesh.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.generate.sampling import Settings, sample
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama, Params
from sharding.constrain import constrain


class Reason(IntEnum):
    """Why a row no longer grows."""

    RUNNING = 0
    EOS = 1  # it drew one of its end ids, which is not kept
    LENGTH = 2  # it reached its limit
    NOT_FINITE = 3  # its logits were NaN or infinite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """B rows of at most S tokens.

    tokens: (B, S) int32, prompt and answer; what lies beyond a row's length means nothing.
    lengths: (B,) int32, tokens so far, at least 1.
    limits: (B,) int32, the length at which a row ends, at most S.
    reasons: (B,) int32, a Reason.
    ends: (B, E) int32, ids that end a row.
    settings: how tokens are chosen.
    """

    tokens: jax.Array
    lengths: jax.Array
    limits: jax.Array
    reasons: jax.Array
    ends: jax.Array
    settings: Settings

    @property
    def running(self) -> jax.Array:
        """(B,) bool."""
        return self.reasons == Reason.RUNNING


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step takes and gives: the rows, and the cache of all their tokens but the last."""

    rows: Rows
    cache: KVCache


@dataclass(frozen=True)
class Decoder:
    """The compiled functions of generation; hashable, so it is its own key of compilation.

    Under `jax.set_mesh` the state is laid out as the model's rules say.
    """

    model: Llama

    @partial(jax.jit, static_argnames=("self", "chunk"))
    def prefill(self, params: Params, rows: Rows, chunk: int) -> State:
        """Stores all tokens but each row's last in a new cache, `chunk` positions at a time.

        Parameters unstacked get an unstacked cache. Memory for scores is that of one chunk, however
        long the prompts are.
        """
        B, S = rows.tokens.shape
        stacked = not isinstance(params["layers"], tuple)
        cache = KVCache.init(self.model.config, B, S, self.model.compute.dtype, stacked)
        context_B = rows.lengths - 1

        def fill(i: jax.Array, cache: KVCache) -> KVCache:
            positions_T = i * chunk + jnp.arange(chunk)
            tokens_BT = rows.tokens.at[:, positions_T].get(mode="fill", fill_value=0)
            segments_BT = (positions_T < context_B[:, None]).astype(jnp.int32)
            positions_BT = jnp.broadcast_to(positions_T, (B, chunk))
            output = self.model.apply(
                params, tokens_BT, positions_BT, segments_BT, cache, head="none"
            )
            assert output.cache is not None  # one went in
            return output.cache

        state = self._placed(State(rows, cache))
        chunks = -(-jnp.max(context_B) // chunk)
        return replace(state, cache=lax.fori_loop(0, chunks, fill, state.cache))

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def advance(self, params: Params, state: State, steps: jax.Array) -> State:
        """Runs until every row has ended, at most `steps` steps (int32).

        `state` is donated: its memory becomes the result's.
        """

        def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
            step, state = carry
            return (step < steps) & jnp.any(state.rows.running)

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            step, state = carry
            return step + 1, self._step(params, state)

        return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]

    def _step(self, params: Params, state: State) -> State:
        """One more token for every running row, or the reason why there is none."""
        rows = state.rows
        B, S = rows.tokens.shape
        last_B1 = rows.lengths[:, None] - 1
        output = self.model.apply(
            params,
            jnp.take_along_axis(rows.tokens, last_B1, axis=1),
            last_B1,
            # Padding is not stored: rows that have ended leave their cache alone.
            segments_BT=rows.running[:, None].astype(jnp.int32),
            cache=state.cache,
        )
        assert output.cache is not None  # one went in
        # Whole along the vocabulary: sampling reduces over it many times.
        logits_BV = constrain(output.value[:, 0], ("batch", None), self.model.rules)
        next_B = sample(logits_BV, rows.settings, rows.lengths)

        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))  # a NaN is the largest of all
        ends_B = jnp.any(next_B[:, None] == rows.ends, axis=-1)
        grows_B = rows.running & finite_B & ~ends_B
        lengths_B = rows.lengths + grows_B

        reasons_B = jnp.full(B, Reason.RUNNING)
        reasons_B = jnp.where(lengths_B >= rows.limits, Reason.LENGTH, reasons_B)
        reasons_B = jnp.where(ends_B, Reason.EOS, reasons_B)
        reasons_B = jnp.where(~finite_B, Reason.NOT_FINITE, reasons_B)
        reasons_B = jnp.where(rows.running, reasons_B, rows.reasons)

        is_next_BS = jnp.arange(S) == rows.lengths[:, None]  # beyond an ended row: means nothing
        tokens_BS = jnp.where(is_next_BS, next_B[:, None], rows.tokens)
        rows = replace(rows, tokens=tokens_BS, lengths=lengths_B, reasons=reasons_B)
        return State(rows, output.cache)

    def _placed(self, state: State) -> State:
        """The state, laid out over the mesh in force."""
        rules = self.model.rules

        def place_row(x: jax.Array) -> jax.Array:
            return constrain(x, ("batch", *(None,) * (x.ndim - 1)), rules)

        def place_slab(x: jax.Array, axes: Sequence[str]) -> jax.Array:
            return constrain(x, tuple(axes), rules)

        stacked = not isinstance(state.cache.key, tuple)
        axes: Any = KVCache.axes(self.model.config, stacked)
        return State(
            jax.tree.map(place_row, state.rows), jax.tree.map(place_slab, state.cache, axes)
        )
