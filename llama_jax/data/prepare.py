"""`data prepare`: text to token shards, in several processes, resumable at any moment.

One process reads records and hands them out in batches of about a megabyte; others parse and
tokenise them; the first writes the results, in the order of the records. So neither the number of
processes nor an interruption changes a byte of the output. A shard is written under temporary
names, renamed, and then recorded in progress/; a run that was killed continues behind the last
recorded shard. meta.json ends the work and progress/ goes away.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama_jax.config import ConfigError, DataPrepareConfig, Schema, parse
from llama_jax.data import sources
from llama_jax.data.pool import ordered_map
from llama_jax.data.shards import (
    META,
    QUARANTINE,
    SPLITS,
    DataError,
    Meta,
    Part,
    PartWriter,
    Split,
    read_meta,
    to_json,
    token_type,
    write_atomic,
)
from llama_jax.data.sources import Dropped, Record
from llama_jax.tokenizer import Tokenizer, load

STOPPED = 75

_BATCH_BYTES = 2**20
_BATCH_RECORDS = 10_000
_WORTH_A_WORKER = 16 * 2**20  # bytes; starting a process takes a second or more
_LISTED = 100_000  # dropped records that the report lists; beyond that it counts
_PROGRESS = "progress"
_SETTINGS = "settings.json"


class Quarantined(Schema):
    """A record that was left out."""

    file: str
    """Its file."""
    record: int
    """Which of the file it was, from 1; for JSON lines this is the line."""
    reason: str
    """One of a few."""
    detail: str
    """More."""


class Shard(Schema):
    """The entry of a finished shard in progress/."""

    train: Part | None
    """Its part of the training split."""
    validation: Part | None
    """Its part of the validation split."""
    records: int
    """Records read for it."""
    dropped: dict[str, int]
    """Records left out, by reason."""
    quarantined: tuple[Quarantined, ...]
    """The first of those."""
    next_file: int
    """Where reading continues: number of the file ..."""
    next_record: int
    """... and records of it already taken."""


class Tokenised(NamedTuple):
    """What became of a batch of records."""

    tokens: np.ndarray
    """(n,) tokens of the documents, one after another."""
    lengths: np.ndarray
    """(documents,) tokens of each, <s> and </s> included."""
    validates: np.ndarray
    """(documents,) bool: whether it belongs to the validation split."""
    dropped: list[tuple[int, int, Dropped]]
    """File, record and reason of each record left out."""
    records: int
    """Records in the batch."""
    last: tuple[int, int, int]
    """File, record and bytes on disk of the last one."""


def prepare(config: DataPrepareConfig) -> int:
    """Prepares a corpus, or continues; returns 0, or 75 when Ctrl-C stopped it.

    Raises ConfigError, TokenizerError or DataError with what is wrong.
    """
    tokenizer = load(config.tokenizer)
    out = Path(config.out)
    files = [f for f in sources.find(config.paths) if out.resolve() not in f.resolve().parents]
    try:
        settings = _settings(config, tokenizer, files)
        with _locked(out):
            if (out / META).exists():
                _refuse_other(settings, read_meta(out).settings, out, "a corpus made")
                shutil.rmtree(out / _PROGRESS, ignore_errors=True)
                print(f"{out}: already prepared from these files; delete it to prepare anew")
                return 0
            done = _start_or_continue(out, settings, tokenizer)
            if done:
                print(f"continuing after {len(done)} finished shards")
            meta = _finish(out, _tokenise(config, tokenizer, files, done), tokenizer, settings)
    except KeyboardInterrupt:
        print("stopped; the same command continues after the last finished shard")
        return STOPPED
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: {error.strerror or error}; the finished shards are safe, "
            "and the same command continues"
        ) from error
    _summarise(out, meta)
    return 0


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone.

    Equal documents therefore go the same way, and more data never moves an old document.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def tokenise(
    records: list[Record], tokenizer: Tokenizer, text_field: str, validation_fraction: float
) -> Tokenised:
    """Documents of a batch of records as <s> tokens </s>, and the records that give none."""
    documents: list[np.ndarray] = []
    validates: list[bool] = []
    dropped: list[tuple[int, int, Dropped]] = []
    for record in records:
        text = sources.document(record, text_field)
        if isinstance(text, Dropped):
            dropped.append((record.file, record.number, text))
            continue
        ids = tokenizer.encode(text, bos=True, eos=True)
        documents.append(np.array(ids, np.int32))
        validates.append(is_validation(text, validation_fraction))
    return Tokenised(
        tokens=np.concatenate([*documents, np.empty(0, np.int32)]),
        lengths=np.array([len(ids) for ids in documents], np.int64),
        validates=np.array(validates, bool),
        dropped=dropped,
        records=len(records),
        last=(records[-1].file, records[-1].number, records[-1].position),
    )


class _ShardWriter:
    """Takes the results of batches until `commit` makes them a finished shard."""

    def __init__(self, out: Path, number: int, vocab_size: int, files: list[Path]):
        self._out = out
        self._number = number
        self._dtype = token_type(vocab_size)
        self._files = files
        self._parts: dict[Split, PartWriter] = {}
        self._dropped: Counter[str] = Counter()
        self._quarantined: list[Quarantined] = []
        self._next = (0, 0)
        self.records = 0
        self.tokens = 0

    def add(self, result: Tokenised) -> None:
        is_validation_token = np.repeat(result.validates, result.lengths)
        self._add("train", result.tokens[~is_validation_token], result.lengths[~result.validates])
        self._add(
            "validation", result.tokens[is_validation_token], result.lengths[result.validates]
        )
        for file, record, (reason, detail) in result.dropped:
            self._dropped[reason] += 1
            if len(self._quarantined) < _LISTED:
                name = sources.printable(self._files[file])
                self._quarantined.append(
                    Quarantined(file=name, record=record, reason=reason, detail=detail[:200])
                )
        self._next = result.last[:2]
        self.records += result.records
        self.tokens += len(result.tokens)

    def _add(self, split: Split, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if len(lengths):
            if split not in self._parts:
                self._parts[split] = PartWriter(self._out, split, self._number, self._dtype)
            self._parts[split].add(tokens, lengths)

    def commit(self) -> Shard:
        """Puts the shard on the disk, then its entry: from here on it is never made again."""
        parts = {split: writer.commit() for split, writer in self._parts.items()}
        shard = Shard(
            train=parts.get("train"),
            validation=parts.get("validation"),
            records=self.records,
            dropped=dict(self._dropped),
            quarantined=tuple(self._quarantined),
            next_file=self._next[0],
            next_record=self._next[1],
        )
        write_atomic(_entry(self._out, self._number), to_json(shard.model_dump()))
        return shard


def _tokenise(
    config: DataPrepareConfig, tokenizer: Tokenizer, files: list[Path], done: list[Shard]
) -> list[Shard]:
    """Makes the shards that are missing; returns all."""
    work = functools.partial(
        tokenise,
        tokenizer=tokenizer,
        text_field=config.text_field,
        validation_fraction=config.validation_fraction,
    )
    out, shards = Path(config.out), list(done)
    start = (done[-1].next_file, done[-1].next_record) if done else (0, 0)
    batches = _batches(sources.read(files, config, start))
    before = list(itertools.accumulate((file.stat().st_size for file in files), initial=0))
    tokens = sum(part.tokens for shard in done for part in _parts(shard))
    workers = config.workers or min(os.cpu_count() or 1, 1 + before[-1] // _WORTH_A_WORKER)
    alone = (work(batch) for batch in batches)
    results = ordered_map(work, batches, workers) if workers > 1 else alone
    with _progress_bar() as bar, contextlib.closing(results):
        task = bar.add_task("tokenising", total=before[-1], completed=before[start[0]], note="")
        writer = _ShardWriter(out, len(shards), tokenizer.vocab_size, files)
        for result in results:
            writer.add(result)
            tokens += len(result.tokens)
            file, _, position = result.last
            bar.update(task, completed=before[file] + position, note=f"{tokens:,} tokens")
            if writer.tokens >= config.shard_tokens:
                shards.append(writer.commit())
                writer = _ShardWriter(out, len(shards), tokenizer.vocab_size, files)
        if writer.records:
            shards.append(writer.commit())
        bar.update(task, completed=before[-1])
    return shards


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records in batches of one size in bytes. Where a batch ends depends on nothing else."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.content) if isinstance(record.content, bytes) else 0
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(shard: Shard) -> list[Part]:
    return [part for part in (shard.train, shard.validation) if part]


def _entry(out: Path, number: int) -> Path:
    return out / _PROGRESS / f"{number:05d}.json"


def _settings(config: DataPrepareConfig, tokenizer: Tokenizer, files: list[Path]) -> dict[str, Any]:
    """All that decides the output."""
    sizes = [[sources.printable(file), file.stat().st_size] for file in files]
    return {
        "paths": list(config.paths),
        "files": len(files),
        "bytes": sum(size for _, size in sizes),
        "files_sha256": hashlib.sha256(to_json(sizes)).hexdigest(),
        "text_field": config.text_field,
        "separator": config.separator,
        "max_document_mb": config.max_document_mb,
        "validation_fraction": config.validation_fraction,
        "shard_tokens": config.shard_tokens,
        "tokenizer": tokenizer.fingerprint,
    }


def _refuse_other(settings: dict[str, Any], found: dict[str, Any], out: Path, state: str) -> None:
    other = [key for key in settings if settings[key] != found.get(key)]
    if other:
        raise ConfigError(
            f"{out} holds {state} with other settings ({', '.join(other)}); choose another out, "
            "or delete that folder"
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other `data prepare` out of it; a killed holder frees it."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another `data prepare` is at work in this folder") from error
        yield
    finally:
        os.close(folder)


def _start_or_continue(out: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> list[Shard]:
    """The shards that are finished already; of a new corpus, none."""
    progress = out / _PROGRESS
    if (progress / _SETTINGS).exists():
        found = json.loads((progress / _SETTINGS).read_text(encoding="utf-8"))
        _refuse_other(settings, found, out, "an unfinished corpus made")
    else:
        progress.mkdir(exist_ok=True)
        write_atomic(out / tokenizer.file_name, tokenizer.model)
        write_atomic(progress / _SETTINGS, to_json(settings))
    done: list[Shard] = []
    while (entry := _entry(out, len(done))).exists():
        values = json.loads(entry.read_text(encoding="utf-8"))
        done.append(parse(Shard, values, str(entry)))
    return done


def _finish(out: Path, shards: list[Shard], tokenizer: Tokenizer, settings: dict[str, Any]) -> Meta:
    """Writes the report and, last, the manifest; then forgets the progress."""
    dropped: Counter[str] = Counter()
    for shard in shards:
        dropped.update(shard.dropped)
    records = sum(shard.records for shard in shards)
    kept = sum(part.documents for shard in shards for part in _parts(shard))
    by_reason = dict(sorted(dropped.items()))
    listed = [item.model_dump() for shard in shards for item in shard.quarantined][:_LISTED]
    report = {
        "records": records,
        "kept": kept,
        "dropped": by_reason,
        "unlisted": dropped.total() - len(listed),
        "list": listed,
    }
    write_atomic(out / QUARANTINE, to_json(report))
    meta = Meta(
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        records=records,
        kept=kept,
        dropped=by_reason,
        train=tuple(shard.train for shard in shards if shard.train),
        validation=tuple(shard.validation for shard in shards if shard.validation),
        settings=settings,
    )
    if not meta.train:
        raise DataError(
            f"no document to learn from among {records:,} records (left out: "
            f"{_reasons(meta.dropped) or 'none'}); {out / QUARANTINE} lists them"
        )
    write_atomic(out / META, to_json(meta.model_dump()))
    shutil.rmtree(out / _PROGRESS)
    return meta


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )


def _summarise(out: Path, meta: Meta) -> None:
    print(f"{meta.records:,} records: {meta.kept:,} kept, {sum(meta.dropped.values()):,} left out")
    for split in SPLITS:
        parts = meta.parts(split)
        documents, tokens = sum(p.documents for p in parts), sum(p.tokens for p in parts)
        print(f"{split:10} {documents:,} documents, {tokens:,} tokens, {len(parts)} shards")
    if meta.settings["validation_fraction"] and not meta.validation:
        print(
            "caution: no document fell to validation; raise validation_fraction, or cut the text "
            "into more documents (separator)"
        )
    if meta.dropped:
        print(f"left out: {_reasons(meta.dropped)}; listed in {out / QUARANTINE}, for example")
        report = json.loads((out / QUARANTINE).read_text(encoding="utf-8"))
        examples = {item["reason"]: item for item in reversed(report["list"])}
        for reason, item in sorted(examples.items()):
            print(f"  {item['file']}:{item['record']}: {reason}: {item['detail']}")
    print(f"corpus {out}")
