"""Generated tasks that tell attention variants apart at small scale.

Train a small model on one from scratch, then see how many answers it gets right, and how far back.

A row is T + 1 tokens, of which a model reads the first T and predicts the last T. Token 0 is blank,
token 1 marks, the rest are ordinary. Only the answers carry weight: what leads up to them is random
and cannot be predicted. Imports no jax.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from llama_jax.config.section import ConfigError

BLANK, MARK = 0, 1
FIRST = 2  # the smallest ordinary token

# p(gap) ~ gap^(a - 1) in the MQAR of Zoology: pairs come up again soon more often than late.
POWER = 0.01

SPLITS = ("train", "test")


class Rows(NamedTuple):
    """Rows of a probe: B of T + 1 tokens.

    tokens: (B, T + 1) int32.
    weights: (B, T) float32; 1 where the next token is an answer, else 0.
    places: (B, T) int32; the label that an answer is grouped by, -1 where none is asked for.
    """

    tokens: np.ndarray
    weights: np.ndarray
    places: np.ndarray


class Probe(NamedTuple):
    """One task.

    description: in one line.
    difficulty: what the number of that name counts.
    place: what the label of an answer says.
    make: (numbers, rows, length, vocab_size, difficulty) to Rows; unlike `batch` it checks nothing.
    chance: (length, vocab_size, difficulty) to the accuracy of guessing.
    needs: difficulty to the least length and the least vocab_size.
    """

    name: str
    description: str
    difficulty: str
    place: str
    make: Callable[[Generator, int, int, int, int], Rows]
    chance: Callable[[int, int, int], float]
    needs: Callable[[int], tuple[int, int]]


def batch(
    name: str,
    seed: int,
    step: int,
    rows: int,
    length: int,
    vocab_size: int,
    difficulty: int,
    split: str = "train",
) -> Rows:
    """The rows of a step: the same for the same arguments, others in the other of SPLITS.

    Raises:
        ConfigError: there is no such probe or split, or a number is too small for the others.
    """
    probe = _checked(name, length, vocab_size, difficulty)
    if split not in SPLITS:
        raise ConfigError(f"'{split}' is no split; there is {' and '.join(SPLITS)}")
    for what, number, least in (("seed", seed, 0), ("step", step, 0), ("rows", rows, 1)):
        _at_least(least, what, number)
    # In a plain tuple a seed from 2^32 on is two words, and the same as some smaller seed and step.
    state = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), step))
    return probe.make(np.random.default_rng(state), rows, length, vocab_size, difficulty)


def chance(name: str, length: int, vocab_size: int, difficulty: int) -> float:
    """The expected accuracy of answering with any token of the row that could be an answer.

    Each token counts as often as the row holds it, wherever it stands; keys, cues and markers never
    answer. It is no bound: who leaves out the values given already gets (1 + 1/2 + ... + 1/n) / n
    of n pairs in recall, and the most frequent token is right up to twice as often in the others.

    Raises:
        ConfigError: as for `batch`.
    """
    return _checked(name, length, vocab_size, difficulty).chance(length, vocab_size, difficulty)


def accuracy(correct: np.ndarray, rows: Rows) -> tuple[float, dict[int, float]]:
    """The share of the answers that are correct: of all, and of each place that occurs.

    Args:
        correct: (B, T) bool, whether each next token was predicted; only the answers are looked at.
        rows: those of several batches may be put together, as `correct` is.
    """
    asked = rows.weights > 0
    right, places = correct[asked], rows.places[asked]
    of_place = {int(place): float(right[places == place].mean()) for place in np.unique(places)}
    return float(right.mean()), of_place


def _checked(name: str, length: int, vocab_size: int, difficulty: int) -> Probe:
    if name not in PROBES:
        near = difflib.get_close_matches(name, PROBES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there is {', '.join(PROBES)}"
        raise ConfigError(f"'{name}' is no probe; {hint}")
    probe = PROBES[name]
    _at_least(1, f"difficulty ({probe.difficulty})", difficulty)
    length_needed, vocab_needed = probe.needs(difficulty)
    remedy = f" for {name} with {difficulty} {probe.difficulty}; raise it or lower difficulty"
    _at_least(length_needed, "length", length, remedy)
    _at_least(vocab_needed, "vocab_size", vocab_size, remedy)
    return probe


def _at_least(least: int, what: str, number: int, remedy: str = "") -> None:
    if number < least:
        raise ConfigError(f"{what} is {number} and must be {least} or more{remedy}")


def _recall(numbers: Generator, rows: int, length: int, vocab_size: int, difficulty: int) -> Rows:
    """Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927).

    Pairs of a key and a value, then each key once more, its value the answer, among blanks. Keys
    come from the lower half of the ordinary tokens, values from the upper; both are distinct.
    """
    half = (vocab_size - FIRST) // 2
    keys = FIRST + _shuffled(numbers, rows, half, difficulty)[:, :difficulty]
    values = FIRST + half + _shuffled(numbers, rows, half, difficulty)[:, :difficulty]
    context = 2 * difficulty
    slots = (length + 1 - context) // 2
    # The largest of log p + Gumbel noise are a draw without replacement with probabilities p.
    score = (POWER - 1) * np.log(np.arange(1, slots + 1)) + numbers.gumbel(size=(rows, slots))
    slot = np.argpartition(-score, difficulty - 1, axis=1)[:, :difficulty]
    asked = context + 2 * numbers.permuted(slot, axis=1)  # (rows, difficulty), the place of a query

    tokens = np.full((rows, length + 1), BLANK, np.int32)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    np.put_along_axis(tokens, asked, keys, 1)
    np.put_along_axis(tokens, asked + 1, values, 1)
    return _asking(tokens, asked, _octave(asked - np.arange(0, context, 2)))


def _copy(numbers: Generator, rows: int, length: int, vocab_size: int, difficulty: int) -> Rows:
    """Copying (Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032).

    A string of 1 to `difficulty` random tokens, a marker, the string again, blanks. To see how a
    model generalises in length, ask for a higher difficulty than it was trained with: the places
    tell the lengths it has seen from those it has not.
    """
    string = numbers.integers(FIRST, vocab_size, (rows, difficulty), dtype=np.int32)
    size = numbers.integers(1, difficulty + 1, (rows, 1))
    place = np.arange(length + 1)
    source = np.where(place < size, place, place - size - 1)
    tokens = np.take_along_axis(string, source.clip(0, difficulty - 1), 1)
    tokens[place == size] = MARK
    tokens[place > 2 * size] = BLANK
    asked = (place[:-1] >= size) & (place[:-1] < 2 * size)
    places = np.where(asked, _octave(size), -1)
    return Rows(tokens, asked.astype(np.float32), places.astype(np.int32))


def _induce(numbers: Generator, rows: int, length: int, vocab_size: int, difficulty: int) -> Rows:
    """Completing a bigram seen once before (Olsson et al. 2022, arXiv 2209.11895, induction heads).

    Random tokens in which each of `difficulty` cues stands twice, followed by the same token both
    times; that token may stand anywhere else too, so only the cue tells it.
    """
    ordinary = FIRST + _shuffled(numbers, rows, vocab_size - FIRST, difficulty)
    cues, others = ordinary[:, :difficulty], ordinary[:, difficulty:]
    filler = numbers.integers(0, others.shape[1], (rows, length + 1))
    tokens = np.take_along_axis(others, filler, 1)

    # Any way to lay bigrams without overlap is as likely: draw places as if each were one token
    # long, then shift each by the number of bigrams before it.
    count = 2 * difficulty
    drawn = _shuffled(numbers, rows, length + 1 - count, count)[:, :count]
    begins = (drawn + drawn.argsort(1).argsort(1)).reshape(rows, difficulty, 2)
    first, again = begins.min(2), begins.max(2)
    np.put_along_axis(tokens, first, cues, 1)
    np.put_along_axis(tokens, again, cues, 1)
    np.put_along_axis(tokens, again + 1, np.take_along_axis(tokens, first + 1, 1), 1)
    return _asking(tokens, again, _octave(again - first))


def _hide(numbers: Generator, rows: int, length: int, vocab_size: int, difficulty: int) -> Rows:
    """A needle in a haystack: a marker, a key and its value of `difficulty` tokens.

    It stands at a random depth of random tokens and again at the end, where the value is the
    answer; the key is nowhere else. Decile 0 of the depths begins the row, 9 is by the question.
    """
    tokens = numbers.integers(FIRST, vocab_size - 1, (rows, length + 1), dtype=np.int32)
    key = numbers.integers(FIRST, vocab_size, (rows, 1))
    tokens += tokens >= key
    size = difficulty + 2
    needle = np.concatenate([np.full_like(key, MARK), key, tokens[:, -difficulty:]], 1)
    depths = length + 2 - 2 * size
    depth = numbers.integers(0, depths, (rows, 1))
    np.put_along_axis(tokens, depth + np.arange(size), needle, 1)
    tokens[:, -size:] = needle
    asked = np.tile(np.arange(length - difficulty, length), (rows, 1))
    return _asking(tokens, asked, np.broadcast_to(10 * depth // depths, asked.shape))


def _asking(tokens: np.ndarray, asked: np.ndarray, labels: np.ndarray) -> Rows:
    """Rows whose answers follow the places `asked`, (B, answers), with a label each."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    weights = np.zeros((rows, length), np.float32)
    places = np.full((rows, length), -1, np.int32)
    np.put_along_axis(weights, asked, 1, 1)
    np.put_along_axis(places, asked, labels, 1)
    return Rows(tokens, weights, places)


def _shuffled(numbers: Generator, rows: int, size: int, count: int) -> np.ndarray:
    """(rows, size) int32: the numbers below `size`, of which the first `count` were drawn."""
    order = np.tile(np.arange(size, dtype=np.int32), (rows, 1))
    row = np.arange(rows)
    for i, j in enumerate(numbers.integers(np.arange(count), size, (rows, count)).T):
        order[:, i], order[row, j] = order[row, j], order[:, i].copy()
    return order


def _octave(number: np.ndarray) -> np.ndarray:
    """The smallest power of two that is not below each number."""
    return 2 ** np.ceil(np.log2(number)).astype(np.int32)


def _guess(share: float, others: int) -> float:
    """The chance to be right by drawing an answer itself, or by luck one like it among `others`."""
    return share + (1 - share) / others


PROBES: dict[str, Probe] = {
    "recall": Probe(
        name="recall",
        description="give the value of each key that was shown earlier (MQAR)",
        difficulty="key-value pairs",
        place="distance from the pair to its query, up to this power of two",
        make=_recall,
        chance=lambda length, vocab, n: 1 / n,
        needs=lambda n: (4 * n - 1, FIRST + 2 * n),
    ),
    "copying": Probe(
        name="copying",
        description="write a random string once more",
        difficulty="tokens of the longest string",
        place="length of the string, up to this power of two",
        make=_copy,
        # Strings of k tokens, k uniform to n, give k answers each: over those, 1/k is 2 / (n + 1).
        chance=lambda length, vocab, n: _guess(2 / (n + 1), vocab - FIRST),
        needs=lambda n: (2 * n, FIRST + 2),
    ),
    "induction": Probe(
        name="induction",
        description="complete a bigram that was seen once before",
        difficulty="bigrams that come again",
        place="distance between the two, up to this power of two",
        make=_induce,
        chance=lambda length, vocab, n: _guess(2 / (length + 1 - 2 * n), vocab - FIRST - n),
        needs=lambda n: (4 * n - 1, FIRST + n + 2),
    ),
    "needle": Probe(
        name="needle",
        description="find the value of one marked key in a long row",
        difficulty="tokens of the value",
        place="depth of the needle, in tenths of the row",
        make=_hide,
        chance=lambda length, vocab, n: _guess(2 / (length - 3), vocab - FIRST - 1),
        needs=lambda n: (2 * n + 3, FIRST + 3),
    ),
}
