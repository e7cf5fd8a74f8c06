"""Raw text on disk as a stream of records, and each record as a document or a reason against it.

A record is a line of JSON, a row of Parquet, a text file or a part of one. Nothing is skipped in
silence: what cannot be read is a record too, with the reason, so that records = kept + dropped.
Text is taken as it is; only a byte order mark at the start of a file is left away.
"""

import glob
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config import ConfigError, TextConfig

MEBIBYTE = 2**20

_JSON = (".jsonl", ".json", ".ndjson")
_ARCHIVES = (".gz", ".zst")
_PARQUET = ".parquet"
_BLOCK_BYTES = 2**15  # small, as a block of a hostile archive can grow 30,000 times
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Dropped(NamedTuple):
    """A record that is left out: `reason` is one of a few, `detail` says more."""

    reason: str
    detail: str = ""


class Record(NamedTuple):
    """One raw record; `number` counts those of its file from 1 (for JSON lines: the line)."""

    file: int
    number: int
    content: bytes | Dropped
    is_json: bool
    position: int
    """Bytes of the file read so far, as it lies on disk."""


def find(paths: Iterable[str]) -> list[Path]:
    """The files that paths, folders (all below them) and globs name, each once.

    In the order of `paths`, those of one folder or glob sorted by name. Hidden files of a folder
    are left out. Raises ConfigError for a path that names no file, a folder that cannot be listed,
    or a format whose library is not installed.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        found = [file for match in matches for file in _files(Path(match))]
        if not found:
            raise ConfigError(f"'{path}' names no file; give files, folders or globs ('a/*.txt')")
        for file in found:
            files.setdefault(file.resolve(), file)
    suffixes = {file.suffix.lower() for file in files.values()}
    if _PARQUET in suffixes:
        _pyarrow()
    if ".zst" in suffixes:
        _zstandard()
    return list(files.values())


def read(
    files: list[Path], config: TextConfig, start: tuple[int, int] = (0, 0)
) -> Iterator[Record]:
    """Every record of the files in order; `start` is (file, records of it already taken)."""
    first_file, taken = start
    for file in range(first_file, len(files)):
        for record in _read_file(files[file], file, config):
            if file > first_file or record.number > taken:
                yield record


def document(record: Record, text_field: str) -> str | Dropped:
    """The text of a record, unchanged, or why it holds none."""
    if isinstance(record.content, Dropped):
        return record.content
    try:
        content = record.content.decode()
    except UnicodeDecodeError as error:
        return Dropped("bad UTF-8", f"byte {error.start}: {error.reason}")
    text = _text_of_json(content, text_field) if record.is_json else content
    return text or Dropped("empty text")


def printable(path: Path) -> str:
    """A file name that can be printed and written, even where it is not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _files(path: Path) -> list[Path]:
    """The file itself, or the files below a folder, sorted."""
    if path.is_file():
        return [path]

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: the folder cannot be listed ({error.strerror})")

    found, seen = [], {os.path.realpath(path)}
    for folder, inner, names in os.walk(path, onerror=refuse, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(inner)}
        inner[:] = [n for n in places if not n.startswith(".") and places[n] not in seen]
        seen.update(places[name] for name in inner)  # or a link to a parent would never end
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _text_of_json(line: str, field: str) -> str | Dropped:
    if not line.strip():
        return Dropped("empty line")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Dropped("not JSON", str(error))
    if not isinstance(row, dict):
        return Dropped("not a JSON object", f"a {type(row).__name__}; expected one object a line")
    text = row.get(field)
    if not isinstance(text, str):
        found = f"a {type(text).__name__}" if field in row else f"only {sorted(row)[:8]}"
        return Dropped("no text", f"'{field}' should be a text; found {found}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Dropped("lone surrogate", f"half a character, {text[error.start]!a}")
    return text


def _read_file(path: Path, file: int, config: TextConfig) -> Iterator[Record]:
    """Every record of one file; what stops the reading is its last record."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() in _ARCHIVES else path.suffix
    is_json = suffix.lower() in _JSON
    separator = "\n" if is_json else config.separator.replace("\\n", "\n")
    limit = config.max_document_mb * MEBIBYTE
    number = position = 0
    try:
        if path.suffix.lower() == _PARQUET:
            contents = _rows(path, config.text_field, limit)
        else:
            contents = _pieces(_blocks(path), separator.encode(), limit)
        for content, position in contents:
            number += 1
            yield Record(file, number, content, is_json, position)
        if number == 0:
            yield Record(file, 1, Dropped("empty file"), is_json, position)
    except (OSError, ValueError) as error:
        # The generator that raised is over, and what it held of an unfinished record with it.
        lost = Dropped("cannot be read", f"{error}; what follows in this file is lost")
        yield Record(file, number + 1, lost, is_json, position)


def _too_large(limit: int) -> Dropped:
    return Dropped("too large", f"more than max_document_mb ({limit // MEBIBYTE})")


def _pieces(
    blocks: Iterator[tuple[bytes, int]], separator: bytes, limit: int
) -> Iterator[tuple[bytes | Dropped, int]]:
    """What stands between separators (all in one without), each with the bytes read from disk.

    Holds at most `limit` bytes and a block; a larger piece is dropped.
    """
    held, searched, position = bytearray(), 0, 0
    is_first, is_too_large = True, False

    def piece(length: int) -> bytes | Dropped:
        if is_too_large or length > limit:
            return _too_large(limit)
        return bytes(held[:length]).removeprefix(_BYTE_ORDER_MARK if is_first else b"")

    for block, position in blocks:
        held += block
        while separator and (end := held.find(separator, searched)) >= 0:
            yield piece(end), position
            del held[: end + len(separator)]
            searched, is_first, is_too_large = 0, False, False
        if len(held) > limit:  # keeps only what may be the beginning of a separator
            is_too_large = True
            del held[: len(held) - len(separator)]
        searched = max(0, len(held) - len(separator))
    if held or is_too_large:
        yield piece(len(held)), position


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The bytes of a file, decompressed, each block with the bytes read from disk so far.

    Raises ValueError where an archive is damaged or ends too early, after what came before.
    """
    with path.open("rb") as file:
        raw = ((block, file.tell()) for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
        if path.suffix.lower() == ".gz":
            yield from _decompressed(raw, lambda: zlib.decompressobj(wbits=31), zlib.error)
        elif path.suffix.lower() == ".zst":
            zstandard = _zstandard()
            start = zstandard.ZstdDecompressor().decompressobj
            yield from _decompressed(raw, start, zstandard.ZstdError)
        else:
            yield from raw


def _decompressed(
    raw: Iterator[tuple[bytes, int]], start: Callable[[], Any], damage: type[Exception]
) -> Iterator[tuple[bytes, int]]:
    """One archive after another, as `cat` joins them; zlib and zstandard share this interface."""
    stream = start()
    for block, position in raw:
        while block:
            if stream.eof:
                stream = start()
            try:
                content = stream.decompress(block)
            except damage as error:
                raise ValueError(f"damaged archive ({error})") from error
            block = stream.unused_data
            yield content, position
    if not stream.eof:
        raise ValueError("the archive ends too early")


def _rows(path: Path, column: str, limit: int) -> Iterator[tuple[bytes | Dropped, int]]:
    """The texts of a Parquet column. Raises ValueError for a damaged file or no such column."""
    pyarrow, parquet = _pyarrow()
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            columns = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            if not _is_text(columns.get(column)):
                found = columns.get(column, f"only {sorted(columns)[:8]}")
                raise ValueError(f"'{column}' should be a column of text; found {found}")
            done = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                # As bytes: they are decoded, and refused, where those of all sources are.
                for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    done += 1
                    content = Dropped("no text", "null") if text is None else text
                    if isinstance(content, bytes) and len(content) > limit:
                        content = _too_large(limit)
                    yield content, size * done // file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"not Parquet, or damaged ({error})") from error


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type (None: there is no such column) is text, plain or by dictionary."""
    plain = re.fullmatch(r"(large_)?(string|binary)(_view)?", str(kind))
    return bool(plain) or str(kind).startswith("dictionary<values=string")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'llama-jax[data]'") from error
    return pyarrow, pyarrow.parquet


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(".zst needs zstandard: pip install 'llama-jax[data]'") from error
    return zstandard
