"""The batch at step n is a function of (seed, n): hosts, workers and restarts change nothing."""

import itertools
import multiprocessing
import threading
from collections import Counter

import numpy as np
import pytest
from corpora import numbered_documents, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import DataConfig, DataSource
from llama_jax.data import loader as loading
from llama_jax.data.loader import Loader
from llama_jax.data.order import MAX_ROWS, shuffled, turn, whole_weights
from llama_jax.data.shards import DataError, Stream

LENGTH, BATCH = 8, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two corpora; each token id occurs once, so that a row tells which it is."""
    root = tmp_path_factory.mktemp("corpora")
    first = numbered_documents([7, 30, 3, 12, 25, 9, 4, 40, 11, 6] * 2)
    second = numbered_documents([20, 5, 14, 8, 33], first=500)
    held = numbered_documents([9, 21, 6, 12], first=700)
    write_corpus(root / "a", [first[:7], first[7:]], validation=[held[:2]])
    write_corpus(root / "b", [second], validation=[held[2:]])
    return root


def config(folders, names="a", weights=(1.0, 1.0), **settings):
    found = zip(names, weights, strict=False)
    sources = tuple(DataSource(path=str(folders / n), weight=w) for n, w in found)
    values = {"sequence_length": LENGTH, "batch_size": BATCH, **settings}
    return DataConfig(sources=sources, **values)


def loader(folders, *args, split="train", seed=3, **settings):
    own = ("fingerprint", "wanted", "start_step", "vocab_size")
    given = {key: settings.pop(key) for key in own if key in settings}
    given.setdefault("vocab_size", 1000)
    return Loader(config(folders, *args, **settings), split, seed, **given)


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


def rows_of(batches):
    """What identifies a row: its tokens and targets."""
    return [
        (tuple(t), tuple(u))
        for batch in batches
        for t, u in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True)
    ]


PACKINGS = pytest.mark.parametrize("packing", ["packed", "padded"])


@PACKINGS
@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_restart_changes_nothing(folders, packing, names):
    whole = take(loader(folders, names, (3.0, 1.0), packing=packing), 48)
    again = take(loader(folders, names, (3.0, 1.0), packing=packing), 40)
    rest = take(loader(folders, names, (3.0, 1.0), packing=packing, start_step=40), 8)
    equal(whole, again + rest)
    # These steps cross epochs of every source, or the test would show little.
    assert 2 * loader(folders, names, packing=packing).rows < 40 * BATCH


@PACKINGS
def test_any_batch_can_be_asked_for(folders, packing):
    data = loader(folders, "ab", packing=packing)
    whole = take(data, 30)
    equal([data.batch(n) for n in (29, 3, 11)], [whole[n] for n in (29, 3, 11)])
    equal(list(data.batches(7, 12)), whole[7:12])
    assert list(data.batches(7, 7)) == []


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_hosts_share_the_batch_and_do_not_change_it(folders, count, split):
    whole = take(loader(folders, "ab", split=split), 20)
    hosts = [
        take(loader(folders, "ab", split=split, wanted=range(BATCH)[rows]), 20)
        for rows in (slice(i * BATCH // count, (i + 1) * BATCH // count) for i in range(count))
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]
    equal(joined, whole)


def test_worker_processes_change_nothing_and_end(folders):
    whole = take(loader(folders, "ab"), 24)
    data = iter(loader(folders, "ab", workers=2, start_step=10))
    equal(take(data, 14), whole[10:])
    assert len(multiprocessing.active_children()) == 2
    data.close()
    assert multiprocessing.active_children() == []


def test_reading_ahead_ends_with_the_reader(folders):
    data = loader(folders).batches(0)
    next(data)
    ahead = [thread for thread in threading.enumerate() if "prefetch" in thread.name]
    assert ahead
    data.close()
    for thread in ahead:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in ahead)


@PACKINGS
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_a_permutation_and_each_a_new_one(folders, packing, shuffle):
    data = loader(folders, packing=packing, shuffle=shuffle, batch_size=1)
    epochs = [
        rows_of([data.batch(n) for n in range(e * data.rows, (e + 1) * data.rows)])
        for e in range(3)
    ]
    assert len(set(epochs[0])) == data.rows
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == (3 if shuffle else 1)
    stream = Stream(folders / "a", "train")
    everything = {i for tokens, targets in epochs[0] for i in tokens + targets}
    assert everything >= set(stream.read(0, stream.tokens)[0].tolist())
    if not shuffle:
        assert epochs[0][0][0][:3] == (1, 10, 11)


def test_the_seed_decides(folders):
    first, other = (rows_of(take(loader(folders, seed=seed), 10)) for seed in (0, 1))
    assert first != other
    assert rows_of(take(loader(folders, seed=0), 10)) == first


def test_each_source_keeps_its_own_epochs(folders):
    data = loader(folders, "ab", (3.0, 1.0), batch_size=1)
    drawn = rows_of(data.batch(n) for n in range(200))
    of_second = [row for row in drawn if max(row[0] + row[1]) >= 500]
    assert len(of_second) == 50
    size = loader(folders, "b").rows
    for start in range(0, 50 - size, size):
        assert len(set(of_second[start : start + size])) == size


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), samples=st.integers(1, 400))
def test_turns_follow_the_weights_at_every_moment(weights, samples):
    whole, given_by = whole_weights(weights), Counter()
    for sample in range(samples):
        source, given_before = turn(sample, whole)
        assert given_before == given_by[source]  # no row of a source is skipped or repeated
        given_by[source] += 1
        share = weights[source] / sum(weights)
        assert abs(given_by[source] - share * (sample + 1)) <= len(weights)


def test_weights_hold_in_the_long_run():
    weights = whole_weights([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02])  # LLaMA, table 1
    far = 10**12
    before = {turn(n, weights)[0]: turn(n, weights)[1] for n in range(far, far + 400)}
    assert before[0] == pytest.approx(0.67 * far, rel=1e-8)
    assert before[6] == pytest.approx(0.02 * far, rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 600), key=st.text("0123456789/", max_size=8))
def test_shuffled_is_a_permutation(rows, key):
    assert {shuffled(i, rows, key) for i in range(rows)} == set(range(rows))


def test_the_order_is_that_of_the_first_release():
    # A change here gives every resumed run other data than the run it continues.
    assert [shuffled(i, 100, "0/0/0") for i in range(8)] == [99, 83, 92, 81, 35, 61, 23, 66]
    assert [shuffled(i, 2**31, "7/1/2") for i in range(3)] == [2108871883, 1833539089, 1826114089]
    turns = [turn(i, whole_weights([0.5, 0.3, 0.2]))[0] for i in range(12)]
    assert turns == [0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


def test_too_many_rows_to_shuffle_are_refused(folders, monkeypatch):
    assert shuffled(5, MAX_ROWS, "x") < MAX_ROWS
    monkeypatch.setattr(loading, "MAX_ROWS", 3)
    for split in ("train", "validation"):
        with pytest.raises(DataError, match="too many to shuffle"):
            loader(folders, split=split)


@PACKINGS
def test_validation_is_every_row_once_then_padding(folders, packing):
    data = loader(folders, "ab", split="validation", packing=packing, batch_size=4)
    batches = list(data)
    assert len(batches) == data.steps == -(-data.rows // 4)
    assert data.rows % 4, "choose sizes that leave a remainder"
    rows = rows_of(batches)
    assert len(set(rows[: data.rows])) == data.rows
    padding = 4 - data.rows % 4
    assert not any(batches[-1][name][-padding:].any() for name in batches[-1])
    weighted = sum(int(batch["weights"].sum()) for batch in batches)
    streams = [Stream(folders / name, "validation") for name in "ab"]
    assert weighted == sum(stream.tokens - stream.documents for stream in streams)
    with pytest.raises(IndexError):
        data.batch(data.steps)
    with pytest.raises(IndexError):
        data.batch(-1)


def test_validation_does_not_depend_on_the_seed(folders):
    first, other = (list(loader(folders, "ab", split="validation", seed=s)) for s in (0, 9))
    equal(first, other)
    assert max(rows_of(first)[0][0]) != max(rows_of(first)[1][0])


def test_a_corpus_smaller_than_a_batch_is_repeated_within_it(folders):
    batch = loader(folders, "b", batch_size=32).batch(0)
    size = loader(folders, "b").rows
    counts = Counter(rows_of([batch]))
    assert len(counts) == size
    assert set(counts.values()) <= {32 // size, 32 // size + 1}


def test_another_tokenizer_is_refused(folders, tmp_path):
    with pytest.raises(DataError, match=r"prepared with another tokenizer \(ffffffffffff\) than"):
        loader(folders, fingerprint="0" * 64)
    loader(folders, fingerprint="f" * 64)
    other = write_corpus(tmp_path / "o", [[[1, 5, 2]]], fingerprint="e" * 64)
    mixed = (DataSource(path=str(folders / "a")), DataSource(path=str(other)))
    values = DataConfig(sources=mixed, sequence_length=LENGTH, batch_size=BATCH)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        Loader(values, "train", 0, vocab_size=1000)


def test_a_vocabulary_larger_than_the_models_is_refused(folders):
    with pytest.raises(DataError, match="ids go up to 999, but the model has vocab_size 999"):
        loader(folders, vocab_size=999)
    loader(folders, vocab_size=1024)


def test_a_split_without_documents_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "c", [[[1, 5, 2]]])
    with pytest.raises(DataError, match="no documents for validation; prepare with"):
        loader(folder.parent, "c", split="validation")
    empty = write_corpus(tmp_path / "e", [], validation=[[[1, 5, 2]]])
    with pytest.raises(DataError, match="no documents to learn from"):
        loader(empty.parent, "e")
