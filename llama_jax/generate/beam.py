"""Beam search: the likeliest continuations of one prompt, as far as a beam of them can see.

The beams are rows of one decoder state. A step extends every beam by every token; the best of these
candidates that end are kept as finished hypotheses, the best of those that do not are the next
beams, and the cache's rows follow their parents. A hypothesis scores the mean log-probability of
its new tokens, the end id among them. The search ends when no beam's mean is above that of the
worst of the finished ones, of which there are then as many as beams, or at the request's limit.

These are the rules of transformers' `generate(num_beams=..., do_sample=False)` with its defaults
(length_penalty 1, early_stopping False); they give the same tokens.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.generate.decode import Decoder, Reason, Rows, State, place_cache
from llama_jax.generate.request import (
    FINISHED,
    Answer,
    Request,
    logprobs_of,
    not_finite,
    prefill,
    row_of,
)
from llama_jax.generate.sampling import Report, allow, report
from llama_jax.model.cache import KVCache
from llama_jax.model.stack import Params
from sharding.constrain import constrain

STEPS = 128  # of one call, which Ctrl-C may have to wait for
# The log-probability of what is forbidden: worse than everything else, yet there when a text has
# nothing else left.
FORBIDDEN = -1e9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """W beams of one request, of which the first `count` are in use.

    rows: the beams' texts, all of one length.
    cache: of all their tokens but the last.
    totals: (W,) fp32, log-probability of each beam's new tokens, best first; -inf: no beam.
    done: finished hypotheses; the end id is not kept.
    scores: (W,) fp32, of `done`, best first; -inf: none yet.
    count: () int32.
    searching: () bool, whether a better hypothesis may still come.
    finite: () bool, whether all logits were.
    """

    rows: Rows
    cache: KVCache
    totals: jax.Array
    done: Rows
    scores: jax.Array
    count: jax.Array
    searching: jax.Array
    finite: jax.Array


def search(
    decoder: Decoder,
    params: Params,
    request: Request,
    limit: int,
    *,
    number: int,
    width: int,
    slots: int,
    ends: int,
    cache_dtype: str,
) -> list[Answer]:
    """The sampling.n best hypotheses of a request, best first.

    The log-probabilities are those that the penalties and the ban on n-grams leave; temperature and
    the other settings of sampling play no part. What compiles anew: another width, number of slots
    or of end ids.

    Args:
        limit: length of prompt and answer at which a hypothesis ends.
        number: names the request in errors.
        width: rows to compute, at least sampling.num_beams.
        slots, ends: room for tokens and for end ids.
        cache_dtype: type of keys and values.

    Raises:
        FloatingPointError: logits are not finite.
    """
    stacked = not isinstance(params["layers"], tuple)
    state = decoder.start(width, slots, ends, cache_dtype, stacked)
    state = prefill(decoder, params, state, 0, request)
    row = row_of(request, 0, limit, Rows.free(1, slots, ends))
    beams = begin(decoder, state, row, np.int32(request.sampling.num_beams))
    while beams.searching:
        beams = advance(decoder, params, beams, np.int32(STEPS))
    if not beams.finite:
        raise not_finite(number, int(beams.rows.lengths[0]))

    done = beams.done
    tokens, lengths, reasons = jax.device_get((done.tokens, done.lengths, done.reasons))
    answers = []
    for k in range(request.sampling.n):
        new = tokens[k, len(request.tokens) : lengths[k]].tolist()
        logprobs = logprobs_of(request, done.report, k, len(new))
        answers.append(Answer(new, FINISHED[reasons[k]], logprobs))
    return answers


@partial(jax.jit, static_argnames=("decoder",), donate_argnames=("state",))
def begin(decoder: Decoder, state: State, request: Rows, count: jax.Array) -> Beams:
    """One beam: the request (Rows of one row), whose context is in row 0 of the state."""
    W = state.rows.lengths.shape[0]
    rows = jax.tree.map(lambda one: jnp.repeat(one, W, axis=0), request)
    none = jnp.full(W, -jnp.inf)
    return Beams(
        rows=rows,
        cache=_gather(decoder, state.cache, jnp.zeros(W, jnp.int32)),
        totals=none.at[0].set(0.0),
        done=rows,
        scores=none,
        count=count,
        searching=jnp.array(True),
        finite=jnp.array(True),
    )


@partial(jax.jit, static_argnames=("decoder",), donate_argnames=("beams",))
def advance(decoder: Decoder, params: Params, beams: Beams, steps: jax.Array) -> Beams:
    """Extends the beams until the search is over, at most `steps` (int32) times."""

    def unfinished(carry: tuple[jax.Array, Beams]) -> jax.Array:
        step, beams = carry
        return (step < steps) & beams.searching

    def body(carry: tuple[jax.Array, Beams]) -> tuple[jax.Array, Beams]:
        step, beams = carry
        return step + 1, _step(decoder, params, beams)

    return lax.while_loop(unfinished, body, (jnp.int32(0), beams))[1]


def _step(decoder: Decoder, params: Params, beams: Beams) -> Beams:
    """All beams one token longer."""
    rows = beams.rows
    last_B1 = rows.lengths[:, None] - 1
    output = decoder.model.apply(
        params, jnp.take_along_axis(rows.tokens, last_B1, axis=1), last_B1, cache=beams.cache
    )
    assert output.cache is not None  # one went in
    # Whole along the vocabulary, of which the candidates are picked.
    logits_BV = constrain(output.value[:, 0], ("batch", None), decoder.model.rules)
    is_beam_B = beams.totals > -jnp.inf
    finite = jnp.all(jnp.isfinite(jnp.max(logits_BV, axis=-1)) | ~is_beam_B)
    own_BV = jax.nn.log_softmax(logits_BV[:, : decoder.n_ids])
    allowed_BV = allow(own_BV, rows.settings, rows.tokens, rows.lengths, rows.prompts)
    totals_BV = beams.totals[:, None] + jnp.maximum(allowed_BV, FORBIDDEN)

    new_length = rows.lengths[0] + 1
    count = (new_length - rows.prompts[0]).astype(jnp.float32)
    at_limit = new_length >= rows.limits[0]
    in_use_B = jnp.arange(beams.totals.shape[0]) < beams.count
    ends_V = jnp.any(jnp.arange(decoder.n_ids)[:, None] == rows.ends[0], axis=-1)

    totals_B, parents_B, tokens_B = _best(totals_BV)
    ends_B = ends_V[tokens_B]
    finished_B = in_use_B & (ends_B | at_limit) & (totals_B > -jnp.inf)
    candidates = _extend(rows, own_BV, parents_B, tokens_B)
    candidates = replace(
        candidates,
        lengths=candidates.lengths - ends_B,
        reasons=jnp.where(ends_B, Reason.EOS, Reason.LENGTH),
    )
    scores_B = jnp.where(finished_B, totals_B / count, -jnp.inf)
    scores_B, done = _merge(beams.scores, beams.done, scores_B, candidates)
    scores_B = jnp.where(in_use_B, scores_B, -jnp.inf)

    totals_B, parents_B, tokens_B = _best(jnp.where(ends_V, -jnp.inf, totals_BV))
    totals_B = jnp.where(in_use_B, totals_B, -jnp.inf)
    worst = jnp.min(jnp.where(in_use_B, scores_B, jnp.inf))  # -inf while there are fewer than beams
    return Beams(
        rows=_extend(rows, own_BV, parents_B, tokens_B),
        cache=_gather(decoder, output.cache, parents_B),
        totals=totals_B,
        done=done,
        scores=scores_B,
        count=beams.count,
        searching=finite & ~at_limit & (totals_B[0] / count > worst),
        finite=finite,
    )


def _best(totals_BV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The B best candidates, best first: their totals, parents and tokens, each (B,)."""
    B, V = totals_BV.shape
    totals_B, places_B = lax.top_k(totals_BV.reshape(-1), B)
    return totals_B, places_B // V, places_B % V


def _extend(rows: Rows, own_BV: jax.Array, parents_B: jax.Array, tokens_B: jax.Array) -> Rows:
    """The parents' rows, each with a token more; own_BV is the model's own distribution."""

    def reported() -> Report:
        return report(own_BV[parents_B], tokens_B)

    def unreported() -> Report:
        return Report.empty(tokens_B.shape)

    asked = jnp.any(rows.settings.logprobs >= 0)
    rows = jax.tree.map(lambda x: x[parents_B], rows)
    here_BS = jnp.arange(rows.tokens.shape[1]) == rows.lengths[:, None]
    return replace(
        rows,
        tokens=jnp.where(here_BS, tokens_B[:, None], rows.tokens),
        lengths=rows.lengths + 1,
        report=rows.report.put(here_BS, lax.cond(asked, reported, unreported)),
    )


def _merge(
    scores_B: jax.Array, done: Rows, new_scores_B: jax.Array, new: Rows
) -> tuple[jax.Array, Rows]:
    """The B best of both, best first."""
    scores_B, places_B = lax.top_k(jnp.concatenate([scores_B, new_scores_B]), scores_B.size)
    return scores_B, jax.tree.map(lambda a, b: jnp.concatenate([a, b])[places_B], done, new)


def _gather(decoder: Decoder, cache: KVCache, parents_B: jax.Array) -> KVCache:
    """The cache whose rows are those of the parents."""

    def gather(slab: jax.Array) -> jax.Array:
        return jnp.take(slab, parents_B, axis=cache.row_axis)

    return place_cache(jax.tree.map(gather, cache), decoder.model.rules)
