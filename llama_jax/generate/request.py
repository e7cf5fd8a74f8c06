"""Requests and answers, and how both lie in the rows of a decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from llama_jax.generate.decode import Reason, Rows
from llama_jax.generate.sampling import Report, Settings
from llama_jax.generate.settings import SamplingConfig

FinishReason = Literal["eos", "stop", "length"]

FINISHED: dict[int, FinishReason] = {Reason.EOS: "eos", Reason.LENGTH: "length"}
# Prompts are prefilled in pieces of these lengths: a program for each. The longest bounds the
# memory of the scores (heads x piece x slots).
PREFILL = (512, 64, 16)
# What a piece costs, in tokens: at least as much as reading the weights, and a call.
CALL_COST = 8
LEAST_COST = {"cpu": 16, "gpu": 256, "tpu": 256}


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
    rounds: with a draft model, how often the model verified: len(tokens) / rounds is the gain.
    """

    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenReport] | None = None
    rounds: int | None = None

    def cut(self, count: int) -> "Answer":
        """The answer stopped after `count` tokens."""
        logprobs = None if self.logprobs is None else self.logprobs[:count]
        return replace(self, tokens=self.tokens[:count], finish_reason="stop", logprobs=logprobs)


def row_of(request: Request, answer: int, limit: int, free: Rows) -> Rows:
    """One row, of the sizes of `free`, in which the request waits to be continued."""
    tokens, ends = np.zeros(free.tokens.shape, np.int32), np.full(free.ends.shape, -1, np.int32)
    tokens[0, : len(request.tokens)] = request.tokens
    ends[0, : len(request.ends)] = request.ends
    length = np.array([len(request.tokens)], np.int32)
    return Rows(
        tokens=tokens,  # type: ignore[arg-type]
        lengths=length,  # type: ignore[arg-type]
        prompts=length,  # type: ignore[arg-type]
        limits=np.array([limit], np.int32),  # type: ignore[arg-type]
        reasons=np.array([Reason.RUNNING], np.int32),  # type: ignore[arg-type]
        ends=ends,  # type: ignore[arg-type]
        settings=Settings.of([request.sampling], [request.index], [answer]),
        report=free.report,
    )


def logprobs_of(request: Request, report: Report, row: int, count: int) -> list[TokenReport] | None:
    """What the request asked to know about the first `count` tokens of its answer in this row."""
    wanted = request.sampling.logprobs
    if wanted is None:
        return None
    mine = jax.device_get(_report_of(report, np.int32(row)))
    first = len(request.tokens)
    chosen, ids, values = (
        array[first : first + count].tolist() for array in (mine.chosen, mine.ids, mine.values)
    )
    return [
        TokenReport(one, list(zip(i[:wanted], v[:wanted], strict=True)))
        for one, i, v in zip(chosen, ids, values, strict=True)
    ]


@jax.jit
def _report_of(report: Report, row: jax.Array) -> Report:
    # Compiled once: a slice of the answer's length would be a program for each length.
    return jax.tree.map(lambda x: x[row], report)


def prefill(decoder: Any, params: Any, state: Any, row: int, request: Request) -> Any:
    """The state with the request's context, its prompt but for the last token, in this row.

    decoder: a Decoder or a SpeculativeDecoder, whose params and state these are.
    """
    context = request.tokens[:-1]
    start = 0
    for size in pieces(len(context), LEAST_COST[jax.default_backend()]):
        piece = np.full(size, -1, np.int32)
        part = context[start : start + size]
        piece[: len(part)] = part
        state = decoder.prefill(params, state, np.int32(row), piece, np.int32(start))
        start += size
    return state


def pieces(length: int, least_cost: int) -> Iterator[int]:
    """Lengths out of PREFILL that cover a context: next that which costs least for each token."""
    while length > 0:
        costs = {size: max(size, least_cost) + CALL_COST for size in PREFILL}
        size = min(PREFILL, key=lambda size: costs[size] / min(size, length))
        yield size
        length -= size


def not_finite(number: int, length: int) -> FloatingPointError:
    """The error of a request whose logits are NaN or infinite."""
    return FloatingPointError(
        f"prompt {number}: the logits after {length} tokens are not finite; the parameters are "
        "damaged, or too large for the compute dtype"
    )
