"""Batches for training and validation. The batch at step n is a pure function of (seed, n).

Sample i of a run is found by arithmetic alone (`order`): the sources take turns by weight, and a
source gives the next row of its current epoch, a permutation drawn from (seed, source, epoch).
Step n is samples [nB, (n + 1)B), and a process reads those rows of them that its devices hold.
Hosts, workers and restarts therefore cannot change the order, and the only state to save is the
step.
"""

import bisect
import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator, Sequence

import grain
import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.order import MAX_ROWS, shuffled, turn, whole_weights
from llama_jax.data.pack import PackedRows, PaddedRows, Row, Rows, padding_row
from llama_jax.data.pool import ordered_map
from llama_jax.data.shards import DataError, Split, Stream

Batch = dict[str, np.ndarray]

_READ_AHEAD = 4  # batches made before they are asked for


class Loader:
    """The batches of one split, or some rows of each; iterable, picklable.

    A batch is a dict of arrays (rows, sequence_length), see `pack`. `wanted` are the rows this
    process reads, by their number in the batch; None for all of them. Training is endless.
    Validation has `steps` batches in an order that no seed changes: all rows once, those of all
    sources mixed, the last batch filled up with rows of weight 0.

    `vocab_size` is the model's, `fingerprint` the tokenizer's. Raises DataError for a corpus that
    is unfinished, damaged, empty or of another tokenizer.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        seed: int,
        vocab_size: int,
        fingerprint: str | None = None,
        wanted: Sequence[int] | np.ndarray | None = None,
        start_step: int = 0,
    ):
        self._config = config
        self._split = split
        self._seed = seed
        self._start_step = start_step
        self._wanted = range(config.batch_size) if wanted is None else wanted
        streams = [Stream(source.path, split) for source in config.sources]
        for stream in streams:
            _check_tokenizer(stream, vocab_size, fingerprint or streams[0].meta.tokenizer)
        self._sources = [_rows(stream, config) for stream in streams]
        self._weights = whole_weights([source.weight for source in config.sources])
        self._ends = list(itertools.accumulate(len(rows) for rows in self._sources))
        self.rows = self._ends[-1]
        """Rows of the split, of all sources together."""
        if self.rows == 0:
            raise DataError(
                f"{', '.join(source.path for source in config.sources)}: no documents for "
                f"{split}; prepare with a larger validation_fraction, or more documents"
            )
        shuffled_as_one = self._ends if split == "validation" else map(len, self._sources)
        if (largest := max(shuffled_as_one)) > MAX_ROWS:
            raise DataError(
                f"{largest:,} rows are too many to shuffle; use a larger sequence_length, or "
                "several sources"
            )
        self.steps = None if split == "train" else -(-self.rows // config.batch_size)
        """Batches there are; None without end."""

    def batch(self, step: int) -> Batch:
        """The wanted rows of one step. Raises IndexError outside [0, steps)."""
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise IndexError(f"step {step} of {self.steps}")
        start = step * self._config.batch_size
        rows = [self._sample(start + int(row)) for row in self._wanted]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def batches(self, start: int, stop: int | None = None) -> Generator[Batch]:
        """The batches of steps [start, stop), made ahead in threads or processes."""
        end = stop if stop is not None else self.steps if self.steps is not None else sys.maxsize
        if start >= end:
            return
        if self._config.workers:
            yield from ordered_map(self.batch, range(start, end), self._config.workers)
            return
        threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_READ_AHEAD)
        steps = grain.MapDataset.range(start, end).map(self.batch)
        with contextlib.closing(iter(steps.to_iter_dataset(threads))) as ahead:
            yield from ahead

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self._start_step)

    def _sample(self, sample: int) -> Row:
        if self._split == "validation":
            if sample >= self.rows:
                return padding_row(self._config.sequence_length)
            place = shuffled(sample, self.rows, "validation")
            source = bisect.bisect_right(self._ends, place)
            rows = self._sources[source]
            return rows[place - self._ends[source] + len(rows)]
        source, given = turn(sample, self._weights)
        rows = self._sources[source]
        epoch, place = divmod(given, len(rows))
        if self._config.shuffle:
            place = shuffled(place, len(rows), f"{self._seed}/{source}/{epoch}")
        return rows[place]


def _rows(stream: Stream, config: DataConfig) -> Rows:
    make = PackedRows if config.packing == "packed" else PaddedRows
    rows = make(stream, config.sequence_length)
    if stream.split == "train" and len(rows) == 0:
        raise DataError(f"{stream.folder}: no documents to learn from")
    return rows


def _check_tokenizer(stream: Stream, vocab_size: int, fingerprint: str) -> None:
    meta = stream.meta
    if meta.vocab_size > vocab_size:
        raise DataError(
            f"{stream.folder}: its ids go up to {meta.vocab_size - 1}, but the model has "
            f"vocab_size {vocab_size}"
        )
    if meta.tokenizer != fingerprint:
        raise DataError(
            f"{stream.folder}: prepared with another tokenizer ({meta.tokenizer[:12]}) than this "
            f"run's ({fingerprint[:12]}); use the one in {stream.folder}, or prepare anew"
        )
