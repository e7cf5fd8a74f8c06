"""From requests to answers, tokens in and tokens out: checks, sizes, batches, the host's loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import SamplingConfig
from llama_jax.generate.decode import Decoder, Reason, Rows
from llama_jax.generate.sampling import Settings
from llama_jax.model.llama import Llama, Params

FinishReason = Literal["eos", "stop", "length"]
# (number of the request, its new tokens, whether they are its last) -> None, or how many of these
# tokens the answer keeps, which then ends.
Watch = Callable[[int, list[int], bool], int | None]

FINISHED: dict[int, FinishReason] = {Reason.EOS: "eos", Reason.LENGTH: "length"}
LEAST_SLOTS = 16
LARGEST_CHUNK = 512  # positions of prefill computed at a time: scores are rows x heads x this x S
WATCHED_STEPS = 8  # steps between looks at watched answers: latency of text against calls
UNWATCHED_STEPS = 128  # steps that Ctrl-C may have to wait for


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    index tells apart requests of one seed: equal requests with different indices draw different
    answers.
    """

    tokens: Sequence[int]
    sampling: SamplingConfig
    index: int = 0


@dataclass(frozen=True)
class Answer:
    """Tokens that continue a prompt, without the id that ended them, and why they end."""

    tokens: list[int]
    finish_reason: FinishReason


def answer(
    model: Llama,
    params: Params,
    requests: Sequence[Request],
    ends: Sequence[int] = (),
    max_length: int | None = None,
    batch_size: int = 32,
    watch: Watch | None = None,
) -> list[Answer]:
    """Continues every prompt; the answers are in the order of the requests.

    A row's answer depends on its own request alone, up to the rounding of sums that are as long as
    the batch decides. Stop strings are not looked at here: see text.generate.

    Args:
        model: its compute dtype is that of the cache too.
        params: stacked or unstacked; in the compute dtype, or they are cast at every step.
        requests: prompts of any lengths, each with its settings.
        ends: ids that end an answer.
        max_length: most tokens of a prompt and its answer; with dynamic rope scaling also the
            length that decides the frequencies, and so required.
        batch_size: most rows computed at a time.
        watch: sees the tokens of every answer as they come, and may end it.

    Raises:
        ValueError: a prompt is empty, does not leave room within max_length or holds an id outside
            the vocabulary; `ends` does; max_length or batch_size is not positive.
        FloatingPointError: logits are not finite.
    """
    _check(model, requests, ends, max_length, batch_size)
    answers: list[Answer] = []
    for start in range(0, len(requests), batch_size):
        group = range(start, min(start + batch_size, len(requests)))
        answers += _answer_group(model, params, requests, group, ends, max_length, watch)
    return answers


def _answer_group(
    model: Llama,
    params: Params,
    requests: Sequence[Request],
    group: range,
    ends: Sequence[int],
    max_length: int | None,
    watch: Watch | None,
) -> list[Answer]:
    """The answers to requests[i] for i in group, all in one batch."""
    decoder = Decoder(model)
    rows = _rows(model, [requests[i] for i in group], ends, max_length)
    seen = [len(requests[i].tokens) for i in group]
    chunk = min(_power_of_two(max(*seen, LEAST_SLOTS)), LARGEST_CHUNK)
    state = decoder.prefill(params, rows, chunk)

    answers: list[list[int]] = [[] for _ in group]
    finished: list[FinishReason | None] = [None] * len(group)
    steps = np.int32(WATCHED_STEPS if watch else UNWATCHED_STEPS)
    while not all(finished):
        state = decoder.advance(params, state, steps)
        tokens, lengths, reasons = jax.device_get(
            (state.rows.tokens, state.rows.lengths, state.rows.reasons)
        )
        for row, number in enumerate(group):
            if finished[row]:
                continue  # a stopped row goes on beside the others, unseen
            if reasons[row] == Reason.NOT_FINITE:
                raise FloatingPointError(
                    f"prompt {number}: the logits after {lengths[row]} tokens are not finite; the "
                    f"parameters are damaged, or too large for {model.compute.dtype}"
                )
            new = tokens[row, seen[row] : lengths[row]].tolist()
            finished[row] = FINISHED.get(reasons[row])
            kept = watch(number, new, finished[row] is not None) if watch else None
            if kept is not None:
                new, finished[row] = new[:kept], "stop"
            answers[row] += new
        seen = lengths
    return [Answer(ids, reason) for ids, reason in zip(answers, finished, strict=True) if reason]


def _rows(
    model: Llama, requests: Sequence[Request], ends: Sequence[int], max_length: int | None
) -> Rows:
    """The requests as rows, filled up with rows that have ended already."""
    lengths = [len(request.tokens) for request in requests]
    limits = [
        length + request.sampling.max_new_tokens
        for length, request in zip(lengths, requests, strict=True)
    ]
    if max_length is not None:
        limits = [min(limit, max_length) for limit in limits]
    # Dynamic scaling turns keys by angles that depend on the slots: their number is not ours then.
    fixed = max_length if model.config.rope_scaling.type == "dynamic" else None
    slots = fixed or _slots(max(limits))

    count, real = _row_count(model, len(requests)), len(requests)
    idle = SamplingConfig(temperature=0)
    spare = count - real
    tokens = np.zeros((count, slots), np.int32)
    for row, request in enumerate(requests):
        tokens[row, : lengths[row]] = request.tokens
    return Rows(
        tokens=jnp.asarray(tokens),
        lengths=jnp.array([*lengths, *[1] * spare], jnp.int32),
        limits=jnp.array([*limits, *[1] * spare], jnp.int32),
        reasons=jnp.array([Reason.RUNNING] * real + [Reason.LENGTH] * spare, jnp.int32),
        ends=jnp.broadcast_to(jnp.array(ends, jnp.int32), (count, len(ends))),
        settings=Settings.of(
            [request.sampling for request in requests] + [idle] * spare,
            [request.index for request in requests] + [0] * spare,
        ),
    )


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


def _check(
    model: Llama,
    requests: Sequence[Request],
    ends: Sequence[int],
    max_length: int | None,
    batch_size: int,
) -> None:
    """Raises ValueError for what jax would clamp, wrap or allocate without a word."""
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}: a prompt and an answer need at least 2")
    if max_length is None and model.config.rope_scaling.type == "dynamic":
        raise ValueError(
            "rope scaling 'dynamic' depends on the length of the whole text: give max_length"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    _check_ids("the end ids", ends, model.config.vocab_size)
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
        _check_ids(name, request.tokens, model.config.vocab_size)
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
