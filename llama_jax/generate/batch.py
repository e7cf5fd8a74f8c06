"""From requests to answers, tokens in and tokens out: checks, sizes, and continuous batching.

An `Engine` has a fixed number of rows. A row is given to a request, its prompt is prefilled, all
rows advance together, and a row that ends is given to the next request at once, while the others go
on. What a row computes depends on its own request alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.generate import beam
from llama_jax.generate.decode import Decoder, Reason, Rows
from llama_jax.generate.request import (
    FINISHED,
    Answer,
    FinishReason,
    Request,
    logprobs_of,
    not_finite,
    prefill,
    row_of,
)
from llama_jax.generate.speculative import Draft, SpeculativeDecoder
from llama_jax.model.cache import forgets
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params
from sharding.constrain import parts

# (request, which of its answers, its new tokens, whether they are its last) -> None, or how many of
# these tokens the answer keeps, which then ends.
Watch = Callable[[int, int, list[int], bool], int | None]
# (request, its answers), as soon as all of them have ended.
OnDone = Callable[[int, list[Answer]], None]

LEAST_SLOTS = 16
WATCHED_STEPS = 8  # steps between looks at watched answers: latency of text against calls
UNWATCHED_STEPS = 128  # steps that Ctrl-C may have to wait for


class Job(NamedTuple):
    """One answer to one request."""

    request: int
    answer: int


def answer(
    model: Llama,
    params: Params,
    requests: Sequence[Request],
    *,
    n_ids: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    cache_dtype: str | None = None,
    draft: Draft | None = None,
    watch: Watch | None = None,
    on_done: OnDone | None = None,
) -> list[list[Answer]]:
    """Continues every prompt: for each request, in order, as many answers as its sampling.n says.

    A request's answers depend on it alone, up to the rounding of sums that are as long as the
    engine's sizes decide. Requests for beam search follow those for sampling. Stop strings are not
    looked at here: see text.generate.

    Args:
        params: stacked, or in the layout of model.layout.for_decoding; in the compute dtype.
        requests: prompts of any lengths, each with its settings.
        n_ids: ids below this may be drawn; None for the whole vocabulary.
        max_length: most tokens of a prompt and its answer; with dynamic rope scaling also the
            length that decides the frequencies, and so required.
        batch_size: most rows computed at a time.
        cache_dtype: type of keys and values; int8 halves the memory of bf16. None: that of the
            compute dtype, but fp32 on a CPU, which computes narrow ones slowly.
        draft: proposes tokens that the model verifies several at a time: greedy answers stay the
            same, sampled ones are other draws from the same distributions. Beam search goes
            without.
        watch: sees the tokens of every answer as they come, and may end it.
        on_done: gets the answers of a request when the last of them has ended.

    Raises:
        ValueError: a prompt is empty, does not leave room within max_length or holds an id outside
            the vocabulary; `ends` does; max_length or batch_size is not positive; the draft's
            vocabulary is of another size.
        FloatingPointError: logits are not finite.
    """
    n_ids = n_ids or model.config.vocab_size
    check(model, requests, n_ids, max_length, batch_size)
    if not requests:
        return []
    cache_dtype = cache_dtype or _cache_dtype(model)
    answers: list[list[Answer | None]] = [[None] * request.sampling.n for request in requests]

    def keep(job: Job, found: Answer) -> None:
        group = answers[job.request]
        group[job.answer] = found
        if on_done and None not in group:
            on_done(job.request, [a for a in group if a])

    if any(request.sampling.num_beams == 1 for request in requests):
        engine = Engine(model, params, requests, n_ids, max_length, batch_size, cache_dtype, draft)
        for job, found in engine.run(watch):
            keep(job, found)
    for job, found in _search(model, params, requests, n_ids, max_length, cache_dtype):
        kept = watch(job.request, job.answer, found.tokens, True) if watch else None
        keep(job, found if kept is None else found.cut(kept))
    return [[a for a in group if a] for group in answers]


def _search(
    model: Llama,
    params: Params,
    requests: Sequence[Request],
    n_ids: int,
    max_length: int | None,
    cache_dtype: str,
) -> Iterator[tuple[Job, Answer]]:
    """The answers to the requests for beam search, one request after the other."""
    searches = {i: request for i, request in enumerate(requests) if request.sampling.num_beams > 1}
    limits = {i: _limit(request, max_length) for i, request in searches.items()}
    slots = _slot_count(model, limits.values(), max_length)
    ends = max((len(request.ends) for request in searches.values()), default=0)
    for i, request in searches.items():
        found = beam.search(
            Decoder(model, n_ids),
            params,
            request,
            limits[i],
            number=i,
            width=_row_count(model, request.sampling.num_beams),
            slots=slots,
            ends=ends,
            cache_dtype=cache_dtype,
        )
        yield from ((Job(i, k), one) for k, one in enumerate(found))


class Engine:
    """Rows on the device, and which job each of them has."""

    def __init__(
        self,
        model: Llama,
        params: Params,
        requests: Sequence[Request],
        n_ids: int,
        max_length: int | None,
        batch_size: int,
        cache_dtype: str,
        draft: Draft | None = None,
        continuous: bool = True,
    ):
        """Args as for `answer`; requests for beam search are left out. Not continuous: rows are
        given out when all have ended."""
        self.decoder: Decoder | SpeculativeDecoder
        self._params: Any
        if draft is None:
            self.decoder, self._params = Decoder(model, n_ids), params
        else:
            self.decoder = SpeculativeDecoder(model, draft.model, n_ids, draft.tokens)
            self._params = params, draft.params
        self._requests = requests
        self._continuous = continuous
        self._limits = [_limit(request, max_length) for request in requests]
        jobs = [
            Job(i, k)
            for i, request in enumerate(requests)
            for k in range(request.sampling.n)
            if request.sampling.num_beams == 1
        ]
        self._waiting = deque(jobs)
        rows = _row_count(model, min(len(jobs), batch_size))
        limits = [self._limits[job.request] for job in jobs]
        self.slots = _slot_count(model, limits, max_length)
        self._ends = max((len(request.ends) for request in requests), default=0)
        self._free = Rows.free(1, self.slots, self._ends)
        stacked = not isinstance(params["layers"], tuple)
        self._state = self.decoder.start(rows, self.slots, self._ends, cache_dtype, stacked)
        self._jobs: list[Job | None] = [None] * rows
        self._contexts: list[int | None] = [None] * rows  # request whose prompt a row's cache holds
        models = (model, draft.model) if draft else (model,)
        self._forgets = any(forgets(each.config) for each in models)
        self._seen = [0] * rows
        self._answers: list[list[int]] = [[] for _ in range(rows)]

    def run(self, watch: Watch | None = None) -> Iterator[tuple[Job, Answer]]:
        """Every job with its answer, as they end."""
        while self._waiting or any(self._jobs):
            self._fill()
            yield from self._advance(watch)

    def _fill(self) -> None:
        """Gives free rows to waiting jobs."""
        if not self._continuous and any(self._jobs):
            return
        for row, held in enumerate(self._jobs):
            if held is None and self._waiting:
                self._begin(row, self._waiting.popleft())

    def _begin(self, row: int, job: Job) -> None:
        request = self._requests[job.request]
        if self._contexts[row] != job.request:
            if job.request in self._contexts:
                source = self._contexts.index(job.request)
                self._state = self.decoder.copy_context(
                    self._state, np.int32(source), np.int32(row)
                )
            else:
                self._state = prefill(self.decoder, self._params, self._state, row, request)
            self._contexts[row] = job.request
        self._state = self.decoder.admit(self._state, np.int32(row), self._row_of(job))
        self._jobs[row], self._seen[row], self._answers[row] = job, len(request.tokens), []

    def _row_of(self, job: Job) -> Rows:
        request, limit = self._requests[job.request], self._limits[job.request]
        return row_of(request, job.answer, limit, self._free)

    def _advance(self, watch: Watch | None) -> Iterator[tuple[Job, Answer]]:
        """Some steps, and what has ended in them."""
        running = sum(job is not None for job in self._jobs)
        # With others waiting, the first row that ends is worth coming back for.
        least = running if self._waiting and self._continuous else 1
        steps = WATCHED_STEPS if watch else UNWATCHED_STEPS
        self._state = self.decoder.advance(
            self._params, self._state, np.int32(steps), np.int32(least)
        )
        if self._forgets:  # what came after a prompt has taken the place of some of it
            self._contexts = [None] * len(self._contexts)
        rows = self._state.rows
        tokens, lengths, reasons = jax.device_get((rows.tokens, rows.lengths, rows.reasons))
        for row, job in enumerate(self._jobs):
            if job is None:
                continue
            if reasons[row] == Reason.NOT_FINITE:
                raise not_finite(job.request, lengths[row])
            new = tokens[row, self._seen[row] : lengths[row]].tolist()
            self._seen[row] = int(lengths[row])
            reason = FINISHED.get(reasons[row])
            kept = watch(job.request, job.answer, new, reason is not None) if watch else None
            if kept is not None:
                new, reason = new[:kept], "stop"
            self._answers[row] += new
            if reason is not None:
                found = self._answer(row, job, reason)
                if reasons[row] == Reason.RUNNING:
                    self._release(row, job)
                self._jobs[row] = None
                yield job, found

    def _answer(self, row: int, job: Job, reason: FinishReason) -> Answer:
        state, tokens = self._state, self._answers[row]
        request = self._requests[job.request]
        logprobs = logprobs_of(request, state.rows.report, row, len(tokens))
        speculative = isinstance(self.decoder, SpeculativeDecoder)
        return Answer(tokens, reason, logprobs, int(state.rounds[row]) if speculative else None)

    def _release(self, row: int, job: Job) -> None:
        """Makes a row stop that would go on."""
        # An idle row stores its last token again and again: with the prompt as its text, that does
        # no harm to the prompt's context, which another answer may need.
        prompt = replace(self._row_of(job), reasons=np.array([Reason.FREE], np.int32))  # type: ignore[arg-type]
        self._state = self.decoder.admit(self._state, np.int32(row), prompt)


def _limit(request: Request, max_length: int | None) -> int:
    """The length at which an answer to the request ends."""
    limit = len(request.tokens) + request.sampling.max_new_tokens
    return limit if max_length is None else min(limit, max_length)


def _cache_dtype(model: Llama) -> str:
    return "float32" if jax.default_backend() == "cpu" else model.compute.dtype


def _row_count(model: Llama, requests: int) -> int:
    """Rows to compute: a power of two, and a multiple of what the mesh splits the batch into."""
    devices = parts("batch", model.rules)
    return -(-_power_of_two(requests) // devices) * devices


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _slot_count(model: Llama, limits: Iterable[int], max_length: int | None) -> int:
    """Slots for rows that end at these lengths."""
    # Dynamic scaling turns keys by angles that depend on the slots: their number is not ours.
    fixed = max_length if model.config.rope_scaling.type == "dynamic" else None
    return fixed or _slots(max(limits, default=1))


def _slots(length: int) -> int:
    """`length` rounded up to one of four sizes per doubling: few programs, at most a fifth idle."""
    step = max(_power_of_two(length) // 8, LEAST_SLOTS // 4)
    return max(-(-length // step) * step, LEAST_SLOTS)


def check(
    model: Llama,
    requests: Sequence[Request],
    n_ids: int,
    max_length: int | None,
    batch_size: int,
) -> None:
    """Raises ValueError for what jax would clamp, wrap or allocate without a word."""
    vocab = model.config.vocab_size
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}: a prompt and an answer need at least 2")
    if max_length is None and model.config.rope_scaling.type == "dynamic":
        raise ValueError(
            "rope scaling 'dynamic' depends on the length of the whole text: give max_length"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    most = np.iinfo(np.int32).max if max_length is None else max_length
    for number, request in enumerate(requests):
        name = f"prompt {number}"
        if len(request.tokens) == 0:
            raise ValueError(f"{name} is empty: give at least one token, the tokenizer's BOS say")
        if len(request.tokens) >= most:
            raise ValueError(
                f"{name} has {len(request.tokens)} tokens, which leaves no room for an answer "
                f"within max_length {most}; shorten it, or raise max_length"
            )
        if request.sampling.num_beams > 1 and request.sampling.n > n_ids:
            raise ValueError(
                f"{name}: n is {request.sampling.n}, but beam search over {n_ids} ids may find no "
                "more hypotheses than that"
            )
        _check_ids("the end ids", request.ends, vocab)
        _check_ids(name, request.tokens, vocab)
        total = len(request.tokens) + request.sampling.max_new_tokens
        if max_length is None and total > most:
            raise ValueError(
                f"{name}: max_new_tokens {request.sampling.max_new_tokens} is beyond what can be "
                "indexed; lower it, or give max_length"
            )


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    array = np.asarray(ids if len(ids) else np.zeros(0, np.int32))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected a list of token ids (whole numbers)")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{name}: token id {outside[0]} is not in the model's vocabulary of {vocab_size} "
            f"(0 to {vocab_size - 1}); was it made with another tokenizer?"
        )
