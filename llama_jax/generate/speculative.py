"""Speculative decoding: a small draft model proposes tokens, the model verifies them all at once.

In a round the draft draws k tokens one after the other. One pass of the model over all of them
gives its own distributions at their places; each proposal is accepted with probability
min(1, p / q), the first that is not is replaced by a draw from the normalised positive part of
p - q, and where all are accepted one more token is drawn from p. What comes out is distributed as
without the draft (Leviathan et al., arXiv 2211.17192, appendix A.1; Chen et al., arXiv 2302.01318,
theorem 1), p and q being those of the row's own settings. Greedy rows are the case of
distributions with one token.

Every row accepts its own number. What both caches hold beyond a row's text is overwritten before it
is seen: there is nothing to roll back.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.config import ModelConfig
from llama_jax.generate.decode import (
    Reason,
    Rows,
    copy_row,
    place_cache,
    place_rows,
    put_row,
    store,
)
from llama_jax.generate.sampling import (
    Report,
    Settings,
    allow,
    distribution,
    draw,
    likeliest,
    report,
    uniforms,
)
from llama_jax.model.attention import ATTENTION
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params
from sharding.constrain import constrain

# Draws of one position that must not depend on each other; 0 is that of decoding without a draft.
PROPOSAL, ACCEPTANCE, REPLACEMENT = 1, 2, 3


class Draft(NamedTuple):
    """What proposes tokens: a model with the same vocabulary, its params, and how many at a time.

    params: in the compute dtype; stacked if those of the model are, unstacked if not.
    """

    model: Llama
    params: Params
    tokens: int = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeculativeState:
    """What a round takes and gives.

    rows: as in decode.State.
    cache, draft_cache: of the model and of the draft, of all tokens but the last; the draft's may
        lack the one before it too.
    rounds: (B,) int32, how often each row has been verified since it was admitted.
    """

    rows: Rows
    cache: KVCache
    draft_cache: KVCache
    rounds: jax.Array


@dataclass(frozen=True)
class SpeculativeDecoder:
    """Decoder's functions with the same meaning, where params are those of (model, draft).

    n_ids: as for Decoder.
    k: tokens that the draft proposes in a round.

    Raises:
        ValueError: the vocabularies differ in size, k is not positive, or a model remembers a state
            from which rejected tokens cannot be taken back.
    """

    model: Llama
    draft: Llama
    n_ids: int
    k: int

    def __post_init__(self) -> None:
        own, other = self.model.config.vocab_size, self.draft.config.vocab_size
        if own != other:
            raise ValueError(
                f"the draft has a vocabulary of {other} ids, the model one of {own}: they are "
                "compared id by id, so give a draft with the same tokenizer"
            )
        for model in (self.model, self.draft):
            check_takes_back(model.config)
        if self.k < 1:
            raise ValueError(f"the draft proposes {self.k} tokens: give at least 1")

    @partial(jax.jit, static_argnames=("self", "rows", "slots", "ends", "cache_dtype", "stacked"))
    def start(
        self, rows: int, slots: int, ends: int, cache_dtype: str, stacked: bool
    ) -> SpeculativeState:
        """A state without requests; `stacked` as the layers of both are."""

        def cache_of(model: Llama) -> KVCache:
            spare = self.k + 1  # proposals, and the token that is fed with the first of them
            cache = KVCache.init(model.config, rows, slots, cache_dtype, stacked, spare)
            return place_cache(cache, model.rules)

        return SpeculativeState(
            rows=place_rows(Rows.free(rows, slots, ends), self.model.rules),
            cache=cache_of(self.model),
            draft_cache=cache_of(self.draft),
            rounds=jnp.zeros(rows, jnp.int32),
        )

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def prefill(
        self,
        params: tuple[Params, Params],
        state: SpeculativeState,
        row: jax.Array,
        tokens_T: jax.Array,
        start: jax.Array,
    ) -> SpeculativeState:
        """As Decoder.prefill, for both models."""
        own, drafts = params
        return replace(
            state,
            cache=store(self.model, own, state.cache, row, tokens_T, start),
            draft_cache=store(self.draft, drafts, state.draft_cache, row, tokens_T, start),
        )

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def admit(self, state: SpeculativeState, row: jax.Array, request: Rows) -> SpeculativeState:
        """As Decoder.admit."""
        rounds = state.rounds.at[row].set(0)
        return replace(state, rows=put_row(state.rows, row, request), rounds=rounds)

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def copy_context(
        self, state: SpeculativeState, source: jax.Array, row: jax.Array
    ) -> SpeculativeState:
        """As Decoder.copy_context, for both caches."""
        return replace(
            state,
            cache=copy_row(state.cache, source, row),
            draft_cache=copy_row(state.draft_cache, source, row),
        )

    @partial(jax.jit, static_argnames=("self",), donate_argnames=("state",))
    def advance(
        self,
        params: tuple[Params, Params],
        state: SpeculativeState,
        steps: jax.Array,
        least: jax.Array,
    ) -> SpeculativeState:
        """As Decoder.advance; a step is a round, of up to k + 1 tokens for each row."""

        def unfinished(carry: tuple[jax.Array, SpeculativeState]) -> jax.Array:
            step, state = carry
            return (step < steps) & (jnp.sum(state.rows.running) >= least)

        def body(
            carry: tuple[jax.Array, SpeculativeState],
        ) -> tuple[jax.Array, SpeculativeState]:
            step, state = carry
            return step + 1, self._round(params, state)

        return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]

    def _round(self, params: tuple[Params, Params], state: SpeculativeState) -> SpeculativeState:
        """Up to k + 1 more tokens for every running row, or the reason why there are fewer."""
        own, drafts = params
        before = state.rows
        B, T = before.lengths.shape[0], self.k + 1
        rows, q_BkV, draft_cache = self._propose(drafts, before, state.draft_cache)
        logits_BTV, cache = self._verify(own, rows, state.cache)

        lengths_BT = rows.lengths[:, None] + jnp.arange(T)
        settings_BT = _repeat(rows.settings, T)
        tokens_BTS, prompts_BT = _repeat((rows.tokens, rows.prompts), T)
        flat_logits = logits_BTV[..., : self.n_ids].reshape(B * T, self.n_ids)
        flat_lengths = lengths_BT.reshape(-1)
        # Places differ in their lengths alone: of the proposals each sees those before it.
        allowed = allow(flat_logits, settings_BT, tokens_BTS, flat_lengths, prompts_BT)
        p_BTV = distribution(allowed, settings_BT).reshape(B, T, self.n_ids)

        proposed_Bk = _get(rows.tokens, lengths_BT[:, :-1])
        chances_Bk = uniforms(settings_BT, flat_lengths, ACCEPTANCE).reshape(B, T)[:, :-1]
        finite_BT = jnp.isfinite(jnp.max(logits_BTV, axis=-1))
        accepted_Bk = accept(p_BTV[:, :-1], q_BkV, proposed_Bk, chances_Bk)
        count_B = jnp.sum(jnp.cumprod(accepted_Bk, axis=1), axis=1)

        replacement_B = _pick(
            excess(p_BTV, q_BkV, count_B),
            rows.settings,
            uniforms(rows.settings, rows.lengths + count_B, REPLACEMENT),
        )
        tokens_BS = _put(rows.tokens, (rows.lengths + count_B)[:, None], replacement_B[:, None])
        new_BT = _get(tokens_BS, lengths_BT)
        rows = grow(replace(rows, tokens=tokens_BS), new_BT, count_B, finite_BT)

        def reported() -> Report:
            flat = report(flat_logits, new_BT.reshape(-1))
            return jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), flat)

        def unreported() -> Report:
            return Report.empty((B, T))

        reports = lax.cond(jnp.any(rows.settings.logprobs >= 0), reported, unreported)
        written = jax.tree.map(lambda old, new: _put(old, lengths_BT, new), rows.report, reports)
        return SpeculativeState(
            rows=replace(rows, report=written),
            cache=cache,
            draft_cache=draft_cache,
            rounds=state.rounds + before.running,
        )

    def _propose(
        self, params: Params, rows: Rows, cache: KVCache
    ) -> tuple[Rows, jax.Array, KVCache]:
        """The rows with k proposals behind their texts, the (B, k, V) distributions they are drawn
        from, and the draft's cache."""

        def propose(
            i: jax.Array | int, fed: int, carry: tuple[jax.Array, jax.Array, KVCache]
        ) -> tuple[jax.Array, jax.Array, KVCache]:
            """The i-th proposal, after a pass over the last `fed` tokens."""
            tokens_BS, q_kBV, cache = carry
            lengths_B = rows.lengths + i
            # A text of one token is fed it twice, to the same slot.
            places_BT = jnp.maximum(lengths_B[:, None] + jnp.arange(-fed, 0), 0)
            output = self.draft.apply(params, _get(tokens_BS, places_BT), places_BT, cache=cache)
            assert output.cache is not None  # one went in
            logits_BV = constrain(output.value[:, -1], ("batch", None), self.draft.rules)
            allowed_BV = allow(
                logits_BV[:, : self.n_ids], rows.settings, tokens_BS, lengths_B, rows.prompts
            )
            q_BV = distribution(allowed_BV, rows.settings)
            chosen_B = _pick(q_BV, rows.settings, uniforms(rows.settings, lengths_B, PROPOSAL))
            tokens_BS = _put(tokens_BS, lengths_B[:, None], chosen_B[:, None])
            return tokens_BS, q_kBV.at[i].set(q_BV), output.cache

        # After a round in which all were accepted, the draft has not seen the last of its own
        # proposals: the first pass feeds two tokens.
        q_kBV = jnp.zeros((self.k, rows.lengths.shape[0], self.n_ids))
        carry = propose(0, 2, (rows.tokens, q_kBV, cache))
        tokens_BS, q_kBV, cache = lax.fori_loop(1, self.k, lambda i, c: propose(i, 1, c), carry)
        return replace(rows, tokens=tokens_BS), jnp.moveaxis(q_kBV, 0, 1), cache

    def _verify(self, params: Params, rows: Rows, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Logits (B, k + 1, V) of the tokens behind the last and behind each proposal."""
        places_BT = rows.lengths[:, None] + jnp.arange(-1, self.k)
        output = self.model.apply(params, _get(rows.tokens, places_BT), places_BT, cache=cache)
        assert output.cache is not None  # one went in
        return constrain(output.value, ("batch", None, None), self.model.rules), output.cache


def check_takes_back(config: ModelConfig) -> None:
    """Raises ValueError where some layer keeps a state instead of tokens."""
    for place in config.places:
        if ATTENTION[place.attention].recurrent:
            raise ValueError(
                f"attention {place.attention} cannot take back tokens that are rejected: generate "
                "without a draft"
            )


def accept(
    p_BkV: jax.Array, q_BkV: jax.Array, proposed_Bk: jax.Array, chances_Bk: jax.Array
) -> jax.Array:
    """Which proposals pass: each with probability min(1, p / q), (B, k) bool.

    chances are random numbers in [0, 1). A q that is not finite passes nothing.
    """
    p_Bk = jnp.take_along_axis(p_BkV, proposed_Bk[..., None], axis=-1)[..., 0]
    q_Bk = jnp.take_along_axis(q_BkV, proposed_Bk[..., None], axis=-1)[..., 0]
    return chances_Bk * q_Bk < p_Bk


def excess(p_BTV: jax.Array, q_BkV: jax.Array, count_B: jax.Array) -> jax.Array:
    """Weights (B, V) of the token behind the accepted ones: the positive part of p - q there.

    Behind the last proposal there is no q. Where nothing is left, which takes a rounding, p.
    """
    nothing = ((0, 0), (0, 1), (0, 0))
    at_B11 = count_B[:, None, None]
    p_BV = jnp.take_along_axis(p_BTV, at_B11, axis=1)[:, 0]
    q_BV = jnp.take_along_axis(jnp.pad(q_BkV, nothing), at_B11, axis=1)[:, 0]
    left_BV = jnp.maximum(p_BV - q_BV, 0.0)
    return jnp.where(jnp.sum(left_BV, axis=-1, keepdims=True) > 0, left_BV, p_BV)


def grow(rows: Rows, new_BT: jax.Array, count_B: jax.Array, finite_BT: jax.Array) -> Rows:
    """The rows after their first count + 1 new tokens, or up to the one that ends them.

    As if one came after the other: logits that are not finite, an end id, the limit.
    """
    B, T = new_BT.shape
    lengths_BT = rows.lengths[:, None] + jnp.arange(1, T + 1)  # with each token
    ends_BT = jnp.any(new_BT[:, :, None] == rows.ends[:, None, :], axis=-1)
    reasons_BT = jnp.full((B, T), Reason.RUNNING)
    reasons_BT = jnp.where(lengths_BT >= rows.limits[:, None], Reason.LENGTH, reasons_BT)
    reasons_BT = jnp.where(ends_BT, Reason.EOS, reasons_BT)
    reasons_BT = jnp.where(~finite_BT, Reason.NOT_FINITE, reasons_BT)

    stops_BT = (reasons_BT != Reason.RUNNING) | (jnp.arange(T) == count_B[:, None])
    last_B1 = jnp.argmax(stops_BT, axis=1)[:, None]  # the first that stops
    reasons_B = jnp.take_along_axis(reasons_BT, last_B1, axis=1)[:, 0]
    kept_B = (reasons_B == Reason.RUNNING) | (reasons_B == Reason.LENGTH)
    return replace(
        rows,
        lengths=jnp.where(rows.running, rows.lengths + last_B1[:, 0] + kept_B, rows.lengths),
        reasons=jnp.where(rows.running, reasons_B, rows.reasons),
    )


def _pick(w_BV: jax.Array, settings: Settings, uniform_B: jax.Array) -> jax.Array:
    """`draw`; the likeliest where no row samples, which is less work."""
    return lax.cond(
        jnp.any(settings.temperature > 0), lambda: draw(w_BV, uniform_B), lambda: likeliest(w_BV)
    )


def _get(tokens_BS: jax.Array, places_BT: jax.Array) -> jax.Array:
    """What stands at these places; beyond the slots, which no row keeps, any token."""
    return jnp.take_along_axis(tokens_BS, places_BT, axis=1, mode="clip")


def _put(array_BS: jax.Array, places_BT: jax.Array, new_BT: jax.Array) -> jax.Array:
    """The array (B, S, ...) with `new` (B, T, ...) at these places; beyond the slots, nothing."""

    def put(array_S: jax.Array, places_T: jax.Array, new_T: jax.Array) -> jax.Array:
        return array_S.at[places_T].set(new_T, mode="drop")

    return jax.vmap(put)(array_BS, places_BT, new_BT)


def _repeat(tree: Any, count: int) -> Any:
    """Every row `count` times."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)
