"""The counting baselines against distributions whose entropy is known."""

import numpy as np
import pytest

from llama_jax.evaluate.ngram import bigram_loss, unigram_loss


def test_uniform_tokens_cost_their_entropy():
    tokens = np.random.default_rng(0).integers(0, 8, 200_000)
    train, held_out = tokens[:100_000], tokens[100_000:]
    assert unigram_loss(train, held_out, 8) == pytest.approx(np.log(8), abs=1e-3)
    assert bigram_loss(train, held_out, 8) == pytest.approx(np.log(8), abs=1e-3)


def test_bigram_finds_a_markov_chain_that_unigram_cannot_see():
    # From every state: the next one with probability 3/4, itself with 1/4.
    rng = np.random.default_rng(1)
    tokens = np.cumsum(rng.random(200_000) < 0.75) % 5
    train, held_out = tokens[:100_000], tokens[100_000:]
    chain_entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert bigram_loss(train, held_out, 5) == pytest.approx(chain_entropy, abs=5e-3)
    assert unigram_loss(train, held_out, 5) == pytest.approx(np.log(5), abs=5e-3)


def test_unseen_tokens_and_pairs_keep_the_loss_finite():
    train = np.array([1, 2, 1, 2, 1])
    assert np.isfinite(unigram_loss(train, np.array([3, 0]), 4))
    assert np.isfinite(bigram_loss(train, np.array([3, 0]), 4))
