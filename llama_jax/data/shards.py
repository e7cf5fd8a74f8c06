"""Prepared corpora on disk: token shards, read through memory maps.

A corpus is a folder:

    meta.json            what it holds; written last, so a folder without it is unfinished
    tokenizer.model      the tokenizer of these ids (or tokenizer.json)
    quarantine.json      records that were left out, with file, line and reason
    train-00000.tokens   token ids, little-endian uint16 (uint32 above 65,536 pieces)
    train-00000.starts   int64: where each document starts, and behind the last the count of tokens
    validation-00000...

Each document is <s> ... </s>. The shards of a split, one after another, are one long stream.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llama_jax.config import Schema, parse

Split = Literal["train", "validation"]
Kind = Literal["tokens", "starts"]
SPLITS: tuple[Split, ...] = get_args(Split)
META = "meta.json"
QUARANTINE = "quarantine.json"

_OPEN_FILES = 128  # mapped at one time: a map holds a file handle, and 1,024 are often the limit
_STARTS = np.dtype("<i8")


class DataError(ValueError):
    """A prepared corpus that is unfinished, damaged or made for something else."""


class Part(Schema):
    """The part of a shard that belongs to one split: two files."""

    number: int
    """Number of the shard, from 0."""
    documents: int
    """Documents in it."""
    tokens: int
    """Tokens in it."""
    tokens_sha256: str
    """Hash of the .tokens file."""
    starts_sha256: str
    """Hash of the .starts file."""


class Meta(Schema):
    """meta.json."""

    format: Literal[1] = 1
    """Version of this layout."""
    tokenizer: str
    """Fingerprint (SHA-256) of the tokenizer."""
    vocab_size: int
    """Every id is below this."""
    records: int
    """Records read: kept + dropped."""
    kept: int
    """Documents, of all splits."""
    dropped: dict[str, int]
    """Records left out, by reason."""
    train: tuple[Part, ...]
    """Shards to learn from."""
    validation: tuple[Part, ...]
    """Shards to measure with."""
    settings: dict[str, Any]
    """What the corpus was made from."""

    def parts(self, split: Split) -> tuple[Part, ...]:
        """Shards of a split, in order."""
        return self.train if split == "train" else self.validation


def token_type(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def file_name(split: Split, number: int, kind: Kind) -> str:
    """Name of one file of a shard."""
    return f"{split}-{number:05d}.{kind}"


def write_atomic(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file that is either absent, or the old one, or whole, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, outlasts a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> bytes:
    """JSON of a value: ASCII, so that any file name fits; same value, same bytes."""
    return (json.dumps(value, indent=1) + "\n").encode("ascii")


class PartWriter:
    """Writes the part of a shard that belongs to one split; it has its names after `commit`."""

    def __init__(self, folder: Path, split: Split, number: int, dtype: np.dtype):
        self._tokens_path = folder / file_name(split, number, "tokens")
        self._starts_path = folder / file_name(split, number, "starts")
        self._temporary = self._tokens_path.with_suffix(".tokens.tmp")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._number = number
        self._dtype = dtype
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: their tokens one after another, and how many belong to each."""
        content = tokens.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._lengths.append(lengths)

    def commit(self) -> Part:
        """Sees both files safely on the disk under their names; gives their manifest entry."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        lengths = np.concatenate(self._lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(_STARTS).tobytes()
        self._temporary.replace(self._tokens_path)
        write_atomic(self._starts_path, starts)
        return Part(
            number=self._number,
            documents=len(lengths),
            tokens=int(lengths.sum()),
            tokens_sha256=self._hash.hexdigest(),
            starts_sha256=hashlib.sha256(starts).hexdigest(),
        )


def read_meta(folder: str | Path) -> Meta:
    """The manifest of a corpus. Raises DataError where there is none, or it is damaged."""
    path = Path(folder) / META
    try:
        return parse(Meta, json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no finished corpus ({META} is missing); run `data prepare` with out "
            f"{folder}, which also continues an unfinished one"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not the manifest of a corpus ({error})") from error


class Stream:
    """One split of a corpus as one stream of tokens with random access; picklable, thread-safe.

    Raises DataError for a missing or wrongly sized file, and when a token id is out of range.
    """

    def __init__(self, folder: str | Path, split: Split):
        self.folder = Path(folder)
        self.split = split
        self.meta = read_meta(folder)
        self._dtype = token_type(self.meta.vocab_size)
        self.parts = self.meta.parts(split)
        self._ends = list(itertools.accumulate(part.tokens for part in self.parts))
        self.tokens: int = self._ends[-1] if self.parts else 0
        self._document_ends = list(itertools.accumulate(part.documents for part in self.parts))
        self.documents: int = self._document_ends[-1] if self.parts else 0
        for index, part in enumerate(self.parts):
            self._check_size(index, "tokens", part.tokens * self._dtype.itemsize)
            self._check_size(index, "starts", (part.documents + 1) * _STARTS.itemsize)
        self._mapped = functools.lru_cache(maxsize=_OPEN_FILES)(self._map)

    def __reduce__(self) -> tuple[type["Stream"], tuple[Path, Split]]:
        return Stream, (self.folder, self.split)

    def path(self, index: int, kind: Kind) -> Path:
        """One of the two files of a shard."""
        return self.folder / file_name(self.split, self.parts[index].number, kind)

    def starts(self, index: int) -> np.ndarray:
        """(documents + 1,) int64: where the documents of a shard start, and its end."""
        return self._mapped(index, "starts")

    def offset(self, index: int) -> int:
        """Where a shard starts in the stream."""
        return self._ends[index] - self.parts[index].tokens

    def document(self, number: int) -> tuple[int, int]:
        """First token of a document in the stream, and the first behind it."""
        index = bisect.bisect_right(self._document_ends, number)
        within = number - (self._document_ends[index] - self.parts[index].documents)
        start, stop = self.starts(index)[within : within + 2]
        return self.offset(index) + int(start), self.offset(index) + int(stop)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) as int32, and which of them begin a document (bool, same shape)."""
        tokens = np.empty(stop - start, np.int32)
        begins = np.zeros(stop - start, bool)
        index = bisect.bisect_right(self._ends, start)
        done = start
        while done < stop:
            offset = self.offset(index)
            first, last = done - offset, min(stop - offset, self.parts[index].tokens)
            here = slice(done - start, done - start + last - first)
            tokens[here] = self._mapped(index, "tokens")[first:last]
            starts = self.starts(index)
            # Keys of the same type: others would make searchsorted copy the whole array.
            low, high = np.searchsorted(starts, np.array([first, last], _STARTS))
            begins[here][starts[low:high] - first] = True
            done, index = offset + last, index + 1
        ids = tokens.view(np.uint32)  # as which a damaged id above 2^31 is large, not negative
        if ids.max(initial=0) >= self.meta.vocab_size:
            raise DataError(
                f"{self.folder}: token {start + int(ids.argmax())} of {self.split} is id "
                f"{ids.max()}, outside the vocabulary of {self.meta.vocab_size}; the file is "
                "damaged (`data inspect --verify` finds which)"
            )
        return tokens, begins

    def verify(self) -> Iterator[str]:
        """Reads everything; one line for each file that is not what the manifest says."""
        for index, part in enumerate(self.parts):
            hashes: dict[Kind, str] = {"tokens": part.tokens_sha256, "starts": part.starts_sha256}
            for kind, expected in hashes.items():
                path = self.path(index, kind)
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        yield f"{path}: its SHA-256 differs from {META}"

    def _map(self, index: int, kind: Kind) -> np.ndarray:
        dtype = self._dtype if kind == "tokens" else _STARTS
        return np.asarray(np.memmap(self.path(index, kind), dtype, mode="r"))

    def _check_size(self, index: int, kind: Kind, expected: int) -> None:
        path = self.path(index, kind)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); prepare anew") from error
        if size != expected:
            raise DataError(f"{path}: has {size:,} bytes instead of {expected:,}; prepare anew")
