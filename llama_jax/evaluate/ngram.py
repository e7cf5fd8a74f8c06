"""What counting alone achieves: the loss a language model has to beat.

The models are as strong as counting gets without a search over designs: they are fitted on the
training tokens, smoothed, and the smoothing is chosen on the very text they are scored on.
"""

import numpy as np

SMOOTHING = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Pseudo-counts tried for the back-off from pairs to single tokens."""


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats per token of the token frequencies of `train` (add-one smoothed) on `held_out`."""
    return float(-np.log(_unigram(train, vocab_size)[held_out]).mean())


def bigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Nats per token of the token-pair frequencies of `train` on `held_out` (all but its first).

    p(b | a) = (count(ab) + m p(b)) / (count(a) + m), with the m of SMOOTHING that does best.
    """
    unigram = _unigram(train, vocab_size)
    pairs, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    wanted = _pairs(held_out, vocab_size)
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    together = np.where(pairs[place] == wanted, counts[place], 0)
    before = np.bincount(train[:-1], minlength=vocab_size)[held_out[:-1]]
    after = unigram[held_out[1:]]
    losses = [-np.log((together + m * after) / (before + m)).mean() for m in SMOOTHING]
    return float(min(losses))


def _unigram(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.bincount(tokens, minlength=vocab_size) + 1
    return counts / counts.sum()


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Each neighbouring pair as one number."""
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
