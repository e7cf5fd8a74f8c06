"""From requests to answers, tokens in and tokens out: checks, sizes, and continuous batching.

An `Engine` has a fixed number of rows. A row is given to a request, its prompt is prefilled, all
rows advance together, and a row that ends is given to the next request at once, while the others go
on. What a row computes depends on its own request alone.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

from llama_jax.generate.decode import Decoder, Reason, Rows
from llama_jax.generate.sampling import Settings
from llama_jax.generate.settings import SamplingConfig
from llama_jax.model.llama import Llama, Params

FinishReason = Literal["eos", "stop", "length"]
# (request, which of its answers, its new tokens, whether they are its last) -> None, or how many of
# these tokens the answer keeps, which then ends.
Watch = Callable[[int, int, list[int], bool], int | None]
# (request, its answers), as soon as all of them have ended.
OnDone = Callable[[int, "list[Answer]"], None]

FINISHED: dict[int, FinishReason] = {Reason.EOS: "eos", Reason.LENGTH: "length"}
LEAST_SLOTS = 16
# Prompts are prefilled in pieces of these lengths: a program for each. The longest bounds the
# memory of the scores (heads x piece x slots).
PREFILL = (512, 64, 16)
# What a piece costs, in tokens: at least as much as reading the weights, and a call.
CALL_COST = 8
LEAST_COST = {"cpu": 16, "gpu": 256, "tpu": 256}
WATCHED_STEPS = 8  # steps between looks at watched answers: latency of text against calls
UNWATCHED_STEPS = 128  # steps that Ctrl-C may have to wait for


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    ends: ids that end an answer.
    index: tells apart requests of one seed: equal requests with different indices draw different
        answers.
    """

    tokens: Sequence[int]
    sampling: SamplingConfig
    ends: Sequence[int] = ()
    index: int = 0


class TokenReport(NamedTuple):
    """The log-probability of a token, and (id, log-probability) of the likeliest beside it."""

    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Answer:
    """Tokens that continue a prompt, without the id that ended them, and why they end.

    logprobs: one for each token, where they were asked for.
    """

    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenReport] | None = None


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
    watch: Watch | None = None,
    on_done: OnDone | None = None,
) -> list[list[Answer]]:
    """Continues every prompt: for each request, in order, as many answers as its sampling.n says.

    A request's answers depend on it alone, up to the rounding of sums that are as long as the
    engine's sizes decide. Stop strings are not looked at here: see text.generate.

    Args:
        params: stacked, or in the layout of model.layout.for_decoding; in the compute dtype.
        requests: prompts of any lengths, each with its settings.
        n_ids: ids below this may be drawn; None for the whole vocabulary.
        max_length: most tokens of a prompt and its answer; with dynamic rope scaling also the
            length that decides the frequencies, and so required.
        batch_size: most rows computed at a time.
        cache_dtype: type of keys and values; int8 halves the memory of bf16. None: that of the
            compute dtype, but fp32 on a CPU, which computes narrow ones slowly.
        watch: sees the tokens of every answer as they come, and may end it.
        on_done: gets the answers of a request when the last of them has ended.

    Raises:
        ValueError: a prompt is empty, does not leave room within max_length or holds an id outside
            the vocabulary; `ends` does; max_length or batch_size is not positive.
        FloatingPointError: logits are not finite.
    """
    n_ids = n_ids or model.config.vocab_size
    check(model, requests, max_length, batch_size)
    answers: list[list[Answer | None]] = [[None] * request.sampling.n for request in requests]
    if not requests:
        return []
    engine = Engine(
        model, params, requests, n_ids, max_length, batch_size, cache_dtype or _cache_dtype(model)
    )
    for job, found in engine.run(watch):
        answers[job.request][job.answer] = found
        if on_done and None not in answers[job.request]:
            on_done(job.request, [a for a in answers[job.request] if a])
    return [[a for a in group if a] for group in answers]


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
        continuous: bool = True,
    ):
        """Args as for `answer`. Not continuous: rows are given out when all have ended."""
        self._params = params
        self._requests = requests
        self._continuous = continuous
        self._limits = [_limit(request, max_length) for request in requests]
        jobs = [Job(i, k) for i, r in enumerate(requests) for k in range(r.sampling.n)]
        self._waiting = deque(jobs)
        rows = _row_count(model, min(len(jobs), batch_size))
        # Dynamic scaling turns keys by angles that depend on the slots: their number is not ours.
        fixed = max_length if model.config.rope_scaling.type == "dynamic" else None
        self.slots = fixed or _slots(max(self._limits))
        self._ends = max((len(request.ends) for request in requests), default=0)
        self.decoder = Decoder(model, n_ids)
        self._free = Rows.free(1, self.slots, self._ends)
        stacked = not isinstance(params["layers"], tuple)
        self._state = self.decoder.start(rows, self.slots, self._ends, cache_dtype, stacked)
        self._jobs: list[Job | None] = [None] * rows
        self._contexts: list[int | None] = [None] * rows  # request whose prompt a row's cache holds
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
                self._prefill(row, request.tokens[:-1])
            self._contexts[row] = job.request
        self._state = self.decoder.admit(self._state, np.int32(row), self._row_of(request, job))
        self._jobs[row], self._seen[row], self._answers[row] = job, len(request.tokens), []

    def _prefill(self, row: int, context: Sequence[int]) -> None:
        start = 0
        for size in pieces(len(context), LEAST_COST[jax.default_backend()]):
            piece = np.zeros(size, np.int32)
            part = context[start : start + size]
            piece[: len(part)] = part
            self._state = self.decoder.prefill(
                self._params, self._state, np.int32(row), piece, np.int32(start)
            )
            start += size

    def _row_of(self, request: Request, job: Job) -> Rows:
        tokens = np.zeros((1, self.slots), np.int32)
        tokens[0, : len(request.tokens)] = request.tokens
        ends = np.full((1, self._ends), -1, np.int32)
        ends[0, : len(request.ends)] = request.ends
        length = np.array([len(request.tokens)], np.int32)
        return Rows(
            tokens=tokens,  # type: ignore[arg-type]
            lengths=length,  # type: ignore[arg-type]
            prompts=length,  # type: ignore[arg-type]
            limits=np.array([self._limits[job.request]], np.int32),  # type: ignore[arg-type]
            reasons=np.array([Reason.RUNNING], np.int32),  # type: ignore[arg-type]
            ends=ends,  # type: ignore[arg-type]
            settings=Settings.of([request.sampling], [request.index], [job.answer]),
            report=self._free.report,
        )

    def _advance(self, watch: Watch | None) -> Iterator[tuple[Job, Answer]]:
        """Some steps, and what has ended in them."""
        running = sum(job is not None for job in self._jobs)
        # With others waiting, the first row that ends is worth coming back for.
        least = running if self._waiting and self._continuous else 1
        steps = WATCHED_STEPS if watch else UNWATCHED_STEPS
        self._state = self.decoder.advance(
            self._params, self._state, np.int32(steps), np.int32(least)
        )
        rows = self._state.rows
        tokens, lengths, reasons = jax.device_get((rows.tokens, rows.lengths, rows.reasons))
        for row, job in enumerate(self._jobs):
            if job is None:
                continue
            if reasons[row] == Reason.NOT_FINITE:
                raise FloatingPointError(
                    f"prompt {job.request}: the logits after {lengths[row]} tokens are not finite; "
                    f"the parameters are damaged, or too large for the compute dtype"
                )
            new = tokens[row, self._seen[row] : lengths[row]].tolist()
            self._seen[row] = int(lengths[row])
            reason = FINISHED.get(reasons[row])
            kept = watch(job.request, job.answer, new, reason is not None) if watch else None
            if kept is not None:
                if reason is None:
                    self._release(row)
                new, reason = new[:kept], "stop"
            self._answers[row] += new
            if reason is not None:
                self._jobs[row] = None
                yield job, Answer(self._answers[row], reason, self._logprobs(row, job))

    def _release(self, row: int) -> None:
        """Makes a row stop that would go on."""
        self._state = self.decoder.admit(self._state, np.int32(row), self._free)

    def _logprobs(self, row: int, job: Job) -> list[TokenReport] | None:
        request = self._requests[job.request]
        wanted = request.sampling.logprobs
        if wanted is None:
            return None
        start = len(request.tokens)
        places = slice(start, start + len(self._answers[row]))
        report = self._state.rows.report
        chosen, ids, values = (
            np.asarray(x)[row, places].tolist() for x in (report.chosen, report.ids, report.values)
        )
        likeliest = [list(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
        return [
            TokenReport(one, some[:wanted]) for one, some in zip(chosen, likeliest, strict=True)
        ]


def pieces(length: int, least_cost: int) -> Iterator[int]:
    """Lengths out of PREFILL that cover a context: next that which costs least for each token."""
    while length > 0:
        costs = {size: max(size, least_cost) + CALL_COST for size in PREFILL}
        size = min(PREFILL, key=lambda size: costs[size] / min(size, length))
        yield size
        length -= size


def _limit(request: Request, max_length: int | None) -> int:
    """The length at which an answer to the request ends."""
    limit = len(request.tokens) + request.sampling.max_new_tokens
    return limit if max_length is None else min(limit, max_length)


def _cache_dtype(model: Llama) -> str:
    return "float32" if jax.default_backend() == "cpu" else model.compute.dtype


def _row_count(model: Llama, requests: int) -> int:
    """Rows to compute: a power of two, and a multiple of what the mesh splits the batch into."""
    rules, mesh = model.rules, jax.sharding.get_abstract_mesh()
    parts = 1
    if rules is not None and not mesh.empty:
        parts = int(np.prod([mesh.shape[axis] for axis in rules.mesh_axes("batch")]))
    return -(-_power_of_two(requests) // parts) * parts


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _slots(length: int) -> int:
    """`length` rounded up to one of four sizes per doubling: few programs, at most a fifth idle."""
    step = max(_power_of_two(length) // 8, LEAST_SLOTS // 4)
    return max(-(-length // step) * step, LEAST_SLOTS)


def check(
    model: Llama, requests: Sequence[Request], max_length: int | None, batch_size: int
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
