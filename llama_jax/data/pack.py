"""Rows of a batch from the token stream of a split: packed windows, or one document a row.

A row of length T is a dict of (T,) arrays: tokens, targets, positions, segments int32 and weights
float32. targets[i] is the token that follows tokens[i]; its weight is 1, or 0 where it belongs to
another document or is padding. segments count the documents of a row from 1 (0: padding), positions
count from 0 in each. Every token but the first of a document is the target of exactly one row.
"""

from typing import Protocol

import numpy as np

from llama_jax.data.shards import Stream

Row = dict[str, np.ndarray]

_BLOCK = 256  # documents between two entries of the index of padded rows


class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Row: ...


class PackedRows:
    """Windows of the stream at distance T: row i predicts tokens iT + 1 to iT + T.

    A window starts and ends where it happens to; the last is padded. Finding the documents in one
    takes two binary searches in a memory map, however long the stream.
    """

    def __init__(self, stream: Stream, length: int):
        self._stream = stream
        self._length = length

    def __len__(self) -> int:
        return -(-max(self._stream.tokens - 1, 0) // self._length)

    def __getitem__(self, number: int) -> Row:
        start = number * self._length
        stop = min(start + self._length + 1, self._stream.tokens)
        return make_row(*self._stream.read(start, stop), self._length)


class PaddedRows:
    """One document a row, padded; a document above T + 1 tokens fills several, with none lost.

    Keeps a row count for every 256 documents: 10 MB for a hundred million of them.
    """

    def __init__(self, stream: Stream, length: int):
        self._stream = stream
        self._length = length
        shards, documents, counts = [], [], []
        for shard in range(len(stream.parts)):
            rows = self._rows_of(shard, 0, stream.parts[shard].documents)
            first = np.arange(0, len(rows), _BLOCK)
            shards.append(np.full(len(first), shard))
            documents.append(first)
            counts.append(np.add.reduceat(rows, first))
        # Block b holds the rows [ends[b - 1], ends[b]) and begins at a document of a shard.
        self._ends = np.cumsum(np.concatenate([*counts, np.zeros(0, np.int64)]))
        self._shards = np.concatenate([*shards, np.zeros(0, np.int64)])
        self._documents = np.concatenate([*documents, np.zeros(0, np.int64)])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Row:
        block = int(np.searchsorted(self._ends, number, side="right"))
        shard, document = int(self._shards[block]), int(self._documents[block])
        last = min(document + _BLOCK, self._stream.parts[shard].documents)
        ends = np.cumsum(self._rows_of(shard, document, last))
        number -= int(self._ends[block] - ends[-1])
        within = int(np.searchsorted(ends, number, side="right"))
        piece = number - (int(ends[within - 1]) if within else 0)
        starts = self._stream.starts(shard)[document + within : document + within + 2]
        begin, end = self._stream.offset(shard) + starts.astype(int)
        start = int(begin) + piece * self._length
        return make_row(
            *self._stream.read(start, min(start + self._length + 1, int(end))), self._length
        )

    def _rows_of(self, shard: int, first: int, last: int) -> np.ndarray:
        """Rows of each of the documents [first, last) of a shard."""
        targets = np.diff(self._stream.starts(shard)[first : last + 1]) - 1
        return -(-targets // self._length)


def make_row(tokens: np.ndarray, begins: np.ndarray, length: int) -> Row:
    """A row of `length` from up to length + 1 tokens, and which of them begin a document."""
    n = len(tokens) - 1
    row = padding_row(length)
    place = np.arange(n)
    row["tokens"][:n] = tokens[:-1]
    row["targets"][:n] = tokens[1:]
    row["weights"][:n] = ~begins[1:]
    inside = begins[:n] & (place > 0)  # a document that began before the window counts from it
    row["segments"][:n] = 1 + np.cumsum(inside)
    row["positions"][:n] = place - np.maximum.accumulate(np.where(inside, place, 0))
    return row


def padding_row(length: int) -> Row:
    """A row without a token."""
    row = {
        name: np.zeros(length, np.int32) for name in ("tokens", "targets", "positions", "segments")
    }
    row["weights"] = np.zeros(length, np.float32)
    return row
