"""The decoding loop as a value: a frozen object of statics, a state, and its compiled functions.

A row is a prompt and its growing answer, kept at their positions in one array. The step feeds the
last token of every row and writes the next one behind it; `prefill` stores the tokens before the
last one. So every row is at a length of its own, all sampling happens in one place, and rows begin
and end at any time, beside rows that go on.

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

from llama_jax.generate.sampling import Report, Settings, choose
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params
from sharding.constrain import constrain
from sharding.rules import Rules


class Reason(IntEnum):
    """Why a row does not grow."""

    RUNNING = 0
    EOS = 1  # it drew one of its end ids, which is not kept
    LENGTH = 2  # it reached its limit
    NOT_FINITE = 3  # its logits were NaN or infinite
    FREE = 4  # no request has it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """B rows of at most S tokens.

    tokens: (B, S) int32, prompt and answer; what lies beyond a row's length means nothing.
    lengths: (B,) int32, tokens so far, at least 1.
    prompts: (B,) int32, how many of them are the prompt.
    limits: (B,) int32, the length at which a row ends, at most S.
    reasons: (B,) int32, a Reason.
    ends: (B, E) int32, ids that end a row; unused places hold -1.
    settings: how tokens are chosen.
    report: (B, S, ...), log-probabilities of the tokens of rows that ask for them.
    """

    tokens: jax.Array
    lengths: jax.Array
    prompts: jax.Array
    limits: jax.Array
    reasons: jax.Array
    ends: jax.Array
    settings: Settings
    report: Report

    @staticmethod
    def free(count: int, slots: int, ends: int) -> "Rows":
        """Rows without requests."""
        ones = jnp.ones(count, jnp.int32)
        return Rows(
            tokens=jnp.zeros((count, slots), jnp.int32),
            lengths=ones,
            prompts=ones,
            limits=ones,
            # As an IntEnum it would be weakly typed, and compile all that takes it twice.
            reasons=jnp.full(count, int(Reason.FREE), jnp.int32),
            ends=jnp.full((count, ends), -1, jnp.int32),
            settings=Settings.idle(count),
            report=Report.empty((count, slots)),
        )

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

    Under `jax.set_mesh` the state is laid out as the model's rules say. Every function that takes a
    state donates it: its memory becomes the result's.

    n_ids: ids that may be drawn, the tokenizer's; a model's vocabulary may be padded beyond them.
    """

    model: Llama
    n_ids: int

    @partial(jax.jit, static_argnames=("self", "rows", "slots", "ends", "cache_dtype", "stacked"))
    def start(self, rows: int, slots: int, ends: int, cache_dtype: str, stacked: bool) -> State:
        """A state without requests; `stacked` as the parameters' layers are."""
        cache = KVCache.init(self.model.config, rows, slots, cache_dtype, stacked)
        rules = self.model.rules
        return State(place_rows(Rows.free(rows, slots, ends), rules), place_cache(cache, rules))

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def prefill(
        self, params: Params, state: State, row: jax.Array, tokens_T: jax.Array, start: jax.Array
    ) -> State:
        """Stores the tokens at positions start, start + 1, ... of one row; -1 is no token."""
        return replace(state, cache=store(self.model, params, state.cache, row, tokens_T, start))

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def admit(self, state: State, row: jax.Array, request: Rows) -> State:
        """Gives a row to a request (Rows of one row), whose context is or will be prefilled."""
        return replace(state, rows=put_row(state.rows, row, request))

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def copy_context(self, state: State, source: jax.Array, row: jax.Array) -> State:
        """Makes the cache of `row` that of `source`."""
        return replace(state, cache=copy_row(state.cache, source, row))

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def advance(self, params: Params, state: State, steps: jax.Array, least: jax.Array) -> State:
        """Runs while at least `least` rows (int32) are running, at most `steps` steps (int32)."""

        def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
            step, state = carry
            return (step < steps) & (jnp.sum(state.rows.running) >= least)

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            step, state = carry
            return step + 1, self._step(params, state)

        return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]

    def _step(self, params: Params, state: State) -> State:
        """One more token for every running row, or the reason why there is none."""
        rows = state.rows
        B, S = rows.tokens.shape
        last_B1 = rows.lengths[:, None] - 1
        # A row that has ended stores its last token again, where nobody sees it.
        output = self.model.apply(
            params, jnp.take_along_axis(rows.tokens, last_B1, axis=1), last_B1, cache=state.cache
        )
        assert output.cache is not None  # one went in
        # Whole along the vocabulary: sampling reduces over it many times.
        logits_BV = constrain(output.value[:, 0], ("batch", None), self.model.rules)
        next_B, report = choose(
            logits_BV[:, : self.n_ids], rows.settings, rows.tokens, rows.lengths, rows.prompts
        )

        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))  # a NaN is the largest of all
        ends_B = jnp.any(next_B[:, None] == rows.ends, axis=-1)
        grows_B = rows.running & finite_B & ~ends_B
        lengths_B = rows.lengths + grows_B

        reasons_B = jnp.full(B, Reason.RUNNING)
        reasons_B = jnp.where(lengths_B >= rows.limits, Reason.LENGTH, reasons_B)
        reasons_B = jnp.where(ends_B, Reason.EOS, reasons_B)
        reasons_B = jnp.where(~finite_B, Reason.NOT_FINITE, reasons_B)
        reasons_B = jnp.where(rows.running, reasons_B, rows.reasons)

        here_BS = jnp.arange(S) == rows.lengths[:, None]  # beyond an ended row: means nothing
        tokens_BS = jnp.where(here_BS, next_B[:, None], rows.tokens)
        rows = replace(
            rows,
            tokens=tokens_BS,
            lengths=lengths_B,
            reasons=reasons_B,
            report=rows.report.put(here_BS, report),
        )
        return State(rows, output.cache)


def store(
    model: Llama,
    params: Params,
    cache: KVCache,
    row: jax.Array,
    tokens_T: jax.Array,
    start: jax.Array,
) -> KVCache:
    """The cache with these tokens at positions start, start + 1, ... of one row; -1 is none."""
    # One row cannot be split as a batch is: each part of the mesh computes all of it.
    model = replace(model, rules=model.rules and model.rules.replace(batch=None))
    positions_BT = start + jnp.arange(tokens_T.shape[0])[None]
    real_BT = (tokens_T >= 0)[None]
    tokens_BT = jnp.maximum(tokens_T, 0)[None]
    segments_BT = real_BT.astype(jnp.int32)
    output = model.apply(
        params, tokens_BT, positions_BT, segments_BT, cache, head="none", rows_B=row[None]
    )
    assert output.cache is not None  # one went in
    return output.cache


def put_row(rows: Rows, row: jax.Array, request: Rows) -> Rows:
    """The rows with one of them replaced."""

    def put(all_rows: jax.Array, one: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(all_rows, one, row, 0)

    return jax.tree.map(put, rows, request)


def copy_row(cache: KVCache, source: jax.Array, row: jax.Array) -> KVCache:
    """The cache with what `source` holds in `row` too."""

    def copy(slab: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(slab, source, 1, cache.row_axis)
        return lax.dynamic_update_slice_in_dim(slab, part, row, cache.row_axis)

    return jax.tree.map(copy, cache)


def place_rows(rows: Rows, rules: Rules | None) -> Rows:
    """The rows, laid out over the mesh in force."""

    def place(x: jax.Array) -> jax.Array:
        return constrain(x, ("batch", *(None,) * (x.ndim - 1)), rules)

    return jax.tree.map(place, rows)


def place_cache(cache: KVCache, rules: Rules | None) -> KVCache:
    """The cache, laid out over the mesh in force."""

    def place(slab: jax.Array, axes: Sequence[str]) -> jax.Array:
        return constrain(slab, tuple(axes), rules)

    axes: Any = cache.axes
    return jax.tree.map(place, cache, axes)
