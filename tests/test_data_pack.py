"""Shards and rows: against slow plain Python, and at sizes that no memory holds."""

import json
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from corpora import numbered_documents, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.pack import PackedRows, PaddedRows, padding_row
from llama_jax.data.shards import META, DataError, Stream, read_meta, to_json

LENGTHS = st.lists(st.lists(st.integers(2, 13), min_size=1, max_size=8), min_size=1, max_size=4)


def corpus(folder, lengths_of_shards):
    flat = numbered_documents([n for shard in lengths_of_shards for n in shard])
    shards = [[flat.pop(0) for _ in shard] for shard in lengths_of_shards]
    return write_corpus(folder, shards, vocab_size=10_000), [
        ids for shard in shards for ids in shard
    ]


def plain_row(tokens, documents, length):
    """A row from ids and the number of the document of each, one position at a time."""
    row = {name: [0] * length for name in ("tokens", "targets", "positions", "segments", "weights")}
    segment = position = 0
    for i in range(len(tokens) - 1):
        new = i == 0 or documents[i] != documents[i - 1]
        segment, position = (segment + 1, 0) if new else (segment, position + 1)
        row["tokens"][i] = tokens[i]
        row["targets"][i] = tokens[i + 1]
        row["segments"][i] = segment
        row["positions"][i] = position
        row["weights"][i] = float(documents[i] == documents[i + 1])
    return row


def plain_packed(documents, length):
    tokens = [i for ids in documents for i in ids]
    owners = [n for n, ids in enumerate(documents) for _ in ids]
    return [
        plain_row(tokens[a : a + length + 1], owners[a : a + length + 1], length)
        for a in range(0, len(tokens) - 1, length)
    ]


def plain_padded(documents, length):
    return [
        plain_row(ids[a : a + length + 1], [0] * (length + 1), length)
        for ids in documents
        for a in range(0, len(ids) - 1, length)
    ]


def as_lists(rows):
    return [{name: rows[i][name].tolist() for name in rows[i]} for i in range(len(rows))]


@pytest.mark.parametrize(
    ("rows", "plain"), [(PackedRows, plain_packed), (PaddedRows, plain_padded)]
)
@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, length=st.integers(1, 9))
def test_rows_equal_plain_python(tmp_path_factory, rows, plain, lengths, length):
    folder, documents = corpus(tmp_path_factory.mktemp("corpus"), lengths)
    assert as_lists(rows(Stream(folder, "train"), length)) == plain(documents, length)


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
def test_each_token_is_predicted_exactly_once(tmp_path, kind):
    folder, documents = corpus(tmp_path / "c", [[5, 2, 17, 3], [40], [2, 2, 9]])
    rows = kind(Stream(folder, "train"), 8)
    predicted = Counter()
    for i in range(len(rows)):
        row = rows[i]
        predicted.update(row["targets"][row["weights"] == 1].tolist())
        assert (row["segments"][row["weights"] == 1] > 0).all()
    assert predicted == Counter(i for ids in documents for i in ids[1:])


def test_rows_have_the_agreed_types(tmp_path):
    folder, _ = corpus(tmp_path / "c", [[5, 9]])
    for row in (PackedRows(Stream(folder, "train"), 4)[0], padding_row(4)):
        assert {name: (x.dtype, x.shape) for name, x in row.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segments"), (np.int32, (4,))),
            "weights": (np.float32, (4,)),
        }
    assert not any(x.any() for x in padding_row(4).values())


def test_padded_rows_beyond_one_block_of_the_index(tmp_path):
    lengths = [2 + i % 7 for i in range(700)]
    folder, documents = corpus(tmp_path / "c", [lengths[:300], lengths[300:301], lengths[301:]])
    assert as_lists(PaddedRows(Stream(folder, "train"), 3)) == plain_padded(documents, 3)


def test_a_wide_vocabulary_is_read_back(tmp_path):
    folder = write_corpus(tmp_path / "c", [[[1, 100_000, 2]]], vocab_size=100_001)
    assert Stream(folder, "train").read(0, 3)[0].tolist() == [1, 100_000, 2]
    assert (folder / "train-00000.tokens").stat().st_size == 12


def test_a_stream_can_be_pickled(tmp_path):
    folder, documents = corpus(tmp_path / "c", [[5, 9], [4]])
    stream = Stream(folder, "train")
    stream.read(0, 5)
    again = pickle.loads(pickle.dumps(stream))
    assert again.read(0, again.tokens)[0].tolist() == [i for ids in documents for i in ids]


def test_a_row_costs_no_memory_however_many_documents(tmp_path):
    count = 500_000
    documents = np.tile(np.array([1, 7, 2]), count)
    folder = write_corpus(tmp_path / "c", [[documents]], vocab_size=10)
    (folder / "train-00000.starts").write_bytes(np.arange(0, 3 * count + 1, 3).astype("<i8"))
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    meta["train"][0]["documents"] = count
    (folder / META).write_bytes(to_json(meta))
    stream = Stream(folder, "train")
    packed = PackedRows(stream, 64)
    padded = PaddedRows(stream, 64)
    for rows, place in ((packed, len(packed) - 2), (padded, len(padded) - 2)):
        rows[0]
        tracemalloc.start()
        row = rows[place]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert row["weights"].sum() > 1
        assert peak < 50_000  # the starts alone are 4 MB


def test_a_hundred_billion_tokens(tmp_path):
    count = 10**11
    folder = write_corpus(tmp_path / "c", [[[1, 5, 2]]])
    with (folder / "train-00000.tokens").open("r+b") as sparse:
        sparse.truncate(2 * count)
        sparse.seek(2 * (count - 3))
        sparse.write(np.array([1, 5, 2], "<u2").tobytes())
    starts = np.array([0, count - 3, count], "<i8")
    (folder / "train-00000.starts").write_bytes(starts.tobytes())
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    meta["train"][0] |= {"documents": 2, "tokens": count}
    (folder / META).write_bytes(to_json(meta))
    rows = PackedRows(Stream(folder, "train"), 4096)
    assert len(rows) == -(-(count - 1) // 4096)
    last = rows[len(rows) - 1]
    n = (count - 1) % 4096
    assert last["tokens"][n - 3 : n + 1].tolist() == [0, 1, 5, 0]
    assert last["targets"][n - 1] == 2
    assert last["segments"][n - 3 : n + 1].tolist() == [1, 2, 2, 0]
    padded = PaddedRows(Stream(folder, "train"), 4096)
    assert padded[len(padded) - 1]["tokens"][:3].tolist() == [1, 5, 0]


def test_an_id_outside_the_vocabulary_is_refused_when_it_is_met(tmp_path):
    for vocab_size, dtype, bad in ((1000, "<u2", 1000), (70_000, "<u4", 2**32 - 1)):
        folder = write_corpus(tmp_path / dtype[1:], [[[1, 5, 6, 2], [1, 7, 2]]], vocab_size)
        with (folder / "train-00000.tokens").open("r+b") as file:
            file.seek(5 * np.dtype(dtype).itemsize)
            file.write(np.array([bad], dtype).tobytes())
        rows = PackedRows(Stream(folder, "train"), 3)
        assert rows[0]["tokens"].tolist() == [1, 5, 6]
        with pytest.raises(DataError, match=f"token 5 of train is id {bad}, outside the vocab"):
            rows[1]


def damage(folder, name, change):
    path = folder / name
    change(path)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta.json", lambda f: f.unlink(), "no finished corpus .*run `data prepare`"),
        ("meta.json", lambda f: f.write_text("{"), "not the manifest of a corpus"),
        ("meta.json", lambda f: f.write_text("[]"), "not the manifest of a corpus"),
        ("meta.json", lambda f: f.write_text('{"format": 2}'), "not the manifest of a corpus"),
        ("meta.json", lambda f: f.write_bytes(b"\xff"), "not the manifest of a corpus"),
        ("train-00001.tokens", lambda f: f.unlink(), r"00001\.tokens: cannot be read"),
        ("train-00001.tokens", lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes instead of"),
        ("train-00000.starts", lambda f: f.write_bytes(f.read_bytes() + b"0" * 8), "bytes instead"),
    ],
)
def test_a_damaged_corpus_is_refused_when_it_is_opened(tmp_path, name, change, message):
    folder, _ = corpus(tmp_path / "c", [[5, 9], [4]])
    change(folder / name)
    with pytest.raises(DataError, match=message):
        Stream(folder, "train")


def test_verify_finds_every_changed_byte(tmp_path):
    folder, _ = corpus(tmp_path / "c", [[5, 9], [4]])
    assert list(Stream(folder, "train").verify()) == []
    for part in read_meta(folder).train:
        for kind in ("tokens", "starts"):
            path = folder / f"train-{part.number:05d}.{kind}"
            whole = path.read_bytes()
            path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
            (problem,) = Stream(folder, "train").verify()
            assert path.name in problem
            path.write_bytes(whole)
