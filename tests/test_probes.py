"""Probes: what defines each task, at any size, and that only solving it gives the answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ablate.probes import (
    BLANK,
    FIRST,
    MARK,
    PROBES,
    SPLITS,
    Rows,
    accuracy,
    batch,
    chance,
)
from llama_jax.config.section import ConfigError


def each(rows):
    """Per row: its tokens, and the place and label of each answer, as plain numbers."""
    for tokens, weights, places in zip(*rows, strict=True):
        at = [int(i) + 1 for i in np.flatnonzero(weights)]
        yield tokens.tolist(), at, [int(places[i - 1]) for i in at]


def octave(n):
    return next(2**k for k in range(40) if 2**k >= n)


def recall_asks_once_for_each_pair(row, at, labels, n, vocab):
    pairs = dict(zip(row[: 2 * n : 2], row[1 : 2 * n : 2], strict=True))
    middle = FIRST + (vocab - FIRST) // 2
    assert len(at) == len(pairs) == len(set(pairs.values())) == n
    assert FIRST <= min(pairs) <= max(pairs) < middle <= min(pairs.values())
    assert min(at) > 2 * n
    assert {row[i - 1]: row[i] for i in at} == pairs
    assert {row[i] for i in range(2 * n, len(row)) if i not in at and i + 1 not in at} <= {BLANK}
    assert labels == [octave(i - 1 - row.index(row[i - 1])) for i in at]


def copying_asks_for_the_whole_string_again(row, at, labels, n, vocab):
    size = row.index(MARK)
    assert 1 <= size <= n
    assert min(row[:size]) >= FIRST
    assert row[size + 1 : 2 * size + 1] == row[:size]
    assert set(row[2 * size + 1 :]) <= {BLANK}
    assert at == list(range(size + 1, 2 * size + 1))
    assert labels == [octave(size)] * size


def induction_has_one_completion(row, at, labels, n, vocab):
    cues = {row[i - 1] for i in at}
    assert min(row) >= FIRST
    assert len(at) == len(cues) == n
    for i, label in zip(at, labels, strict=True):
        first, again = (k for k, token in enumerate(row) if token == row[i - 1])
        assert again == i - 1
        assert row[first + 1] == row[i]
        assert row[i] not in cues
        assert label == octave(again - first)


def needle_has_its_key_nowhere_else(row, at, labels, n, vocab):
    needle, depth, depths = row[-n - 2 :], row.index(MARK), len(row) - 2 * (n + 2) + 1
    assert depth < depths
    assert row[depth : depth + n + 2] == needle
    assert needle[0] == MARK
    assert row.count(MARK) == row.count(needle[1]) == 2
    assert BLANK not in row
    assert at == list(range(len(row) - n, len(row)))
    assert labels == [10 * depth // depths] * n


DEFINED = {
    "recall": recall_asks_once_for_each_pair,
    "copying": copying_asks_for_the_whole_string_again,
    "induction": induction_has_one_completion,
    "needle": needle_has_its_key_nowhere_else,
}


@pytest.mark.parametrize("name", PROBES)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    more=st.tuples(st.integers(0, 70), st.integers(0, 40)),
    seed=st.integers(0, 2**40),
    split=st.sampled_from(SPLITS),
)
def test_every_row_has_what_defines_its_task(name, n, more, seed, split):
    length, vocab = np.add(PROBES[name].needs(n), more).tolist()
    rows = batch(name, seed, 1, 5, length, vocab, n, split)
    assert [a.shape for a in rows] == [(5, length + 1), (5, length), (5, length)]
    assert [a.dtype for a in rows] == [np.int32, np.float32, np.int32]
    assert 0 <= rows.tokens.min() <= rows.tokens.max() < vocab
    np.testing.assert_array_equal(rows.weights, rows.places >= 0)
    assert rows.places.min() >= -1
    for row in each(rows):
        DEFINED[name](*row, n, vocab)


def after_the_same(seen):
    return seen[seen.index(seen[-1]) + 1]


def after_the_mark(seen):
    first, last = (i for i, token in enumerate(seen) if token == MARK)
    return seen[first + len(seen) - last]


SOLVED = {
    "recall": after_the_same,
    "copying": lambda seen: seen[len(seen) - 1 - seen.index(MARK)],
    "induction": after_the_same,
    "needle": after_the_mark,
}
SIZES = [("recall", 60, 40, 6), ("copying", 40, 12, 20), ("induction", 40, 12, 4)]
SIZES += [("needle", 30, 9, 3), ("needle", 11, 7, 1)]


@pytest.mark.parametrize(("name", "length", "vocab", "n"), SIZES)
def test_what_has_been_read_gives_the_answer(name, length, vocab, n):
    rows = batch(name, 0, 0, 20, length, vocab, n)
    correct = np.zeros(rows.weights.shape, bool)
    for b, (row, at, _) in enumerate(each(rows)):
        for i in at:
            correct[b, i - 1] = SOLVED[name](row[:i]) == row[i]
    overall, of_place = accuracy(correct, rows)
    assert overall == 1
    assert set(of_place.values()) == {1}


@pytest.mark.parametrize(("name", "length", "vocab", "n"), SIZES)
def test_a_guess_among_the_tokens_of_the_row_is_right_by_chance(name, length, vocab, n):
    shares = []
    for row, at, _ in each(batch(name, 1, 0, 3000, length, vocab, n)):
        keys = {"recall": row[: 2 * n : 2], "needle": [row[-n - 1]], "copying": []}
        never = {BLANK, MARK, *keys.get(name, [row[i - 1] for i in at])}
        bag = [token for token in row if token not in never]
        shares += [bag.count(row[i]) / len(bag) for i in at]
    expected = chance(name, length, vocab, n)
    deviation = np.std(shares) / np.sqrt(3000)  # at least: the answers of a row are not independent
    assert np.mean(shares) == pytest.approx(expected, abs=3 * deviation + 1e-9)
    assert deviation < 0.02 * expected


def assert_in_shares(drawn, shares):
    """What was drawn, numbers from 0, has these probabilities (chi-squared, 5 deviations)."""
    counts, expected = np.bincount(drawn, minlength=len(shares)), len(drawn) * np.array(shares)
    degrees = len(shares) - 1
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)


def test_nothing_but_the_task_tells_the_answer():
    rows = list(each(batch("recall", 0, 0, 3000, 31, 18, 4)))
    assert_in_shares([row.index(row[at[0] - 1]) // 2 for row, at, _ in rows], [1 / 4] * 4)
    for k in range(8):  # keys and values of the four pairs
        assert_in_shares([(row[k] - FIRST) % 8 for row, _, _ in rows], [1 / 8] * 8)
    rows = list(each(batch("induction", 0, 0, 3000, 11, 10, 1)))
    assert_in_shares([row[at[0]] - FIRST for row, at, _ in rows], [1 / 8] * 8)
    ways = [(i, k) for i in range(9) for k in range(i + 2, 11)]  # to lay two bigrams in 12 tokens
    laid = [ways.index((row.index(row[at[0] - 1]), at[0] - 1)) for row, at, _ in rows]
    assert_in_shares(laid, [1 / len(ways)] * len(ways))
    rows = list(each(batch("induction", 0, 0, 3000, 20, 10, 2)))
    cues = [[t for t in row if t in {row[i - 1] for i in at}] for row, at, _ in rows]
    assert_in_shares([four.index(four[0], 1) - 1 for four in cues], [1 / 3] * 3)
    rows = list(each(batch("needle", 0, 0, 3000, 60, 10, 1)))
    for k in (-1, -2, 0):  # value, key, filler
        kept = [row[k] - FIRST for row, _, _ in rows if row[k] != MARK]
        assert_in_shares(kept, [1 / 8] * 8)
    assert_in_shares([row.index(MARK) for row, _, _ in rows], [1 / 56] * 56)
    rows = list(each(batch("copying", 0, 0, 3000, 20, 10, 10)))
    assert_in_shares([row.index(MARK) - 1 for row, _, _ in rows], [1 / 10] * 10)
    assert_in_shares([row[0] - FIRST for row, _, _ in rows], [1 / 8] * 8)


def test_recall_asks_soon_more_often_than_late():
    rows = each(batch("recall", 0, 0, 3000, 41, 10, 1))
    law = 1 / np.arange(1, 21) ** 0.99
    assert_in_shares([(at[0] - 3) // 2 for _, at, _ in rows], law / law.sum())


@pytest.mark.parametrize("name", PROBES)
def test_rows_depend_on_the_arguments_alone(name):
    def made(seed=3, step=5, split="train"):
        return batch(name, seed, step, 50, 80, 500, 20, split)

    for one, other in zip(made(), made(), strict=True):
        np.testing.assert_array_equal(one, other)
    # To numpy a seed from 2^32 on is two numbers, and zeros at the end of a seed are lost.
    seeds = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2**32, 0), (2**32, 1))
    streams = [made(*at, split).tokens for at in seeds for split in SPLITS]
    distinct = {tuple(row) for tokens in streams for row in tokens.tolist() if row[20] != BLANK}
    assert len(distinct) == sum(int((tokens[:, 20] != BLANK).sum()) for tokens in streams) > 100


def test_accuracy_counts_answers_alone():
    weights = np.array([[0, 1, 1], [1, 0, 1]], np.float32)
    rows = Rows(np.zeros((2, 4), np.int32), weights, np.array([[-1, 4, 8], [4, -1, 4]], np.int32))
    correct = np.array([[True, True, False], [False, True, True]])
    assert accuracy(correct, rows) == (0.5, {4: pytest.approx(2 / 3), 8: 0.0})


LEAST = [("recall", 31, 18, 8), ("copying", 16, 4, 8)]
LEAST += [("induction", 31, 12, 8), ("needle", 9, 5, 3)]


@pytest.mark.parametrize(("name", "length", "vocab", "n"), LEAST)
def test_too_small_is_refused_with_the_number_that_suffices(name, length, vocab, n):
    batch(name, 0, 0, 2, length, vocab, n)
    message = f"must be {{}} or more for {name} with {n} .*; raise it or lower difficulty"
    with pytest.raises(ConfigError, match=f"length is {length - 1} and {message.format(length)}"):
        batch(name, 0, 0, 2, length - 1, vocab, n)
    with pytest.raises(ConfigError, match=f"vocab_size is {vocab - 1} and {message.format(vocab)}"):
        chance(name, length, vocab - 1, n)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "recal"}, "'recal' is no probe; did you mean 'recall'"),
        ({"name": "x"}, "'x' is no probe; there is recall, copying, induction, needle"),
        ({"split": "valid"}, "'valid' is no split; there is train and test"),
        ({"difficulty": 0}, r"difficulty \(key-value pairs\) is 0 and must be 1 or more"),
        ({"seed": -1}, "seed is -1 and must be 0 or more"),
        ({"step": -1}, "step is -1 and must be 0 or more"),
        ({"rows": 0}, "rows is 0 and must be 1 or more"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    good = {"name": "recall", "seed": 0, "step": 0, "rows": 1, "length": 40}
    with pytest.raises(ConfigError, match=message):
        batch(**(good | {"vocab_size": 40, "difficulty": 4} | wrong))
