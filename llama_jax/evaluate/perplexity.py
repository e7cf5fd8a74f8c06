"""The loss of a model on texts, by sliding windows: every token is predicted exactly once.

A model sees only so many tokens, a text may be longer. A window moves over each document by a
stride, and in each only the tokens that the window before did not have are scored; the others are
their context. A small stride costs more and gives every token more context (a large one gives the
first tokens of each window almost none, which makes the loss look higher).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.ops.cross_entropy import token_losses
from llama_jax.model.stack import Params
from sharding.constrain import constrain, parts

# Tokens that go through a cache at once; they bound the memory of the scores (heads x PIECE x
# window). Batches are padded to a power of two of tokens, or to a multiple of this.
PIECE = 512
LOGITS_AT_ONCE = 1024  # tokens whose logits exist at one time
LEAST_WIDTH = 16


class Window(NamedTuple):
    """A stretch of a document's tokens: [begin, end - 1) are read, [first, end) are scored."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class Score:
    """The summed loss of some texts.

    nll: negative log-likelihood of all tokens but each document's first (BOS), in nats.
    tokens: how many these are.
    bytes: of the texts, in UTF-8.
    """

    nll: float
    tokens: int
    bytes: int

    @property
    def nll_per_token(self) -> float:
        """Nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nll per token); depends on the tokenizer."""
        loss = self.nll_per_token
        return math.exp(loss) if loss < 709 else math.inf

    @property
    def nll_per_byte(self) -> float:
        """Nats; comparable between tokenizers."""
        return self.nll / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """What a compressor by this model would take."""
        return self.nll_per_byte / math.log(2)


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `length` tokens, BOS included.

    Each reads at most `window` tokens; together they score tokens 1 to length - 1 once each.
    """
    first, begin = 1, 0
    while first < length:
        end = min(begin + window + 1, length)
        yield Window(begin, first, end)
        first, begin = end, begin + stride


def losses(
    model: Llama,
    params: Params,
    documents: Sequence[Sequence[int]],
    window: int,
    stride: int,
    batch_size: int = 8,
    cache_dtype: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """The loss of every token but the first, in nats: for each document (tokens - 1,) fp32.

    Under `jax.set_mesh` the batch is laid out as the model's rules say.

    Args:
        model, params: parameters stacked or unstacked, in any layout.
        documents: token ids, BOS first.
        window: most tokens the model sees at once.
        stride: tokens from one window to the next, at most `window`.
        batch_size: windows computed at a time, rounded up to what the mesh splits them into.
        cache_dtype: the type of a cache that keys and values go through; None for no cache.
        advance: called with the number of tokens scored, after each batch.

    Raises:
        ValueError: an id outside the vocabulary, or a stride that leaves tokens out.
        FloatingPointError: a loss is not finite.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}: give 1 to {window} (window)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    arrays = [_checked(number, ids, model) for number, ids in enumerate(documents)]
    found = [np.full(max(len(ids) - 1, 0), np.nan, np.float32) for ids in arrays]
    jobs = [(n, w) for n, ids in enumerate(arrays) for w in windows(len(ids), window, stride)]
    # Windows of similar length together, the longest first: little padding, and what memory does
    # not suffice for fails at once.
    jobs.sort(key=lambda job: job[1].begin - job[1].end)
    count = _row_count(model, min(batch_size, len(jobs)))
    for at in range(0, len(jobs), count):
        batch = jobs[at : at + count]
        rows = [arrays[n][w.begin : w.end] for n, w in batch]
        loss_BT = _batch_losses(model, params, rows, count, window, cache_dtype)
        for (n, w), row in zip(batch, loss_BT, strict=False):
            # Place t of a row predicts token begin + t + 1, whose loss is number begin + t.
            found[n][w.first - 1 : w.end - 1] = row[w.first - 1 - w.begin : w.end - 1 - w.begin]
            if not np.isfinite(found[n][w.first - 1 : w.end - 1]).all():
                raise FloatingPointError(
                    f"document {n}: the loss of tokens {w.first} to {w.end - 1} is not finite; the "
                    "parameters are damaged, or too large for the compute dtype"
                )
        if advance:
            advance(sum(w.end - w.first for _, w in batch))
    return found


def _checked(number: int, ids: Sequence[int], model: Llama) -> np.ndarray:
    """The ids as an array; raises ValueError for what jax would clamp without a word."""
    array = np.asarray(ids if len(ids) else np.zeros(0, np.int32))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"document {number}: expected a list of token ids (whole numbers)")
    outside = array[(array < 0) | (array >= model.config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"document {number}: token id {outside[0]} is not in the model's vocabulary of "
            f"{model.config.vocab_size}; was it made with another tokenizer?"
        )
    return array.astype(np.int32)


def _batch_losses(
    model: Llama,
    params: Params,
    rows: Sequence[np.ndarray],
    count: int,
    window: int,
    cache_dtype: str | None,
) -> np.ndarray:
    """Losses (count, T): at t the loss of token t + 1 of the row, which those up to t predict.

    There may be fewer and shorter rows than that; what lies beyond them means nothing.
    """
    width = _width(max(map(len, rows)) - 1, window)
    tokens_BT, targets_BT, segments_BT = np.zeros((3, count, width), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row) - 1] = row[:-1]
        targets_BT[b, : len(row) - 1] = row[1:]
        segments_BT[b, : len(row) - 1] = 1
    positions_BT = np.broadcast_to(np.arange(width, dtype=np.int32), tokens_BT.shape)

    cache, piece = None, width
    if cache_dtype is not None:
        # Dynamic rope scaling turns keys by angles that depend on the slots.
        slots = window if model.config.rope_scaling.type == "dynamic" else width
        stacked = not isinstance(params["layers"], tuple)
        cache = _empty_cache(model, count, slots, cache_dtype, stacked)
        piece = min(PIECE, width)
    found = []
    for begin in range(0, width, piece):
        part = np.s_[:, begin : begin + piece]
        arrays = tokens_BT[part], targets_BT[part], positions_BT[part], segments_BT[part]
        losses_BT, cache = _piece_losses(model, params, *arrays, cache)
        found.append(losses_BT)
    return np.concatenate(jax.device_get(found), axis=1)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def _piece_losses(
    model: Llama,
    params: Params,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """Losses of the next tokens of a batch, and the cache with the tokens in it."""
    output = model.apply(params, tokens_BT, positions_BT, segments_BT, cache, head="none")
    B, T = tokens_BT.shape
    # Powers of two, so that the chunks divide a width that is a multiple of LEAST_WIDTH.
    chunk = math.gcd(T, _power_of_two_below(max(LOGITS_AT_ONCE // B, 1)))
    head = model.output_weight(params)
    return token_losses(output.value, head, targets_BT, T // chunk), output.cache


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_cache(model: Llama, rows: int, slots: int, dtype: str, stacked: bool) -> KVCache:
    """A cache, laid out over the mesh in force."""
    cache = KVCache.init(model.config, rows, slots, dtype, stacked)

    def place(slab: jax.Array, axes: Sequence[str]) -> jax.Array:
        return constrain(slab, tuple(axes), model.rules)

    axes: Any = cache.axes
    return jax.tree.map(place, cache, axes)


def _row_count(model: Llama, rows: int) -> int:
    """`rows` (at least 1), rounded up to a multiple of what the mesh splits the batch into."""
    devices = parts("batch", model.rules)
    return -(-max(rows, 1) // devices) * devices


def _width(longest: int, window: int) -> int:
    """Tokens of a batch's rows: few different numbers, as each is a program to compile."""
    power = max(1 << (longest - 1).bit_length(), LEAST_WIDTH)
    step = min(power, PIECE)
    return min(power, -(-window // step) * step)


def _power_of_two_below(n: int) -> int:
    """The largest that is at most n."""
    return 1 << (n.bit_length() - 1)
