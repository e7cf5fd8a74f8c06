"""The container of llama.cpp's weights: GGUF 2 and 3, mapped when read, streamed when written.

Layout: a head of counts, metadata (key, type, value), a list of tensors (name, dimensions fastest
first, type, offset), and the arrays, each at a multiple of the alignment. The reader believes no
number before the bytes it promises are known to be there; the limits are those of ggml's own.
"""

import itertools
import math
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.convert.source import DTYPES, Stored

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
# Bytes of head, metadata and list of tensors: a tokenizer of 128,000 pieces takes 8 MB. Texts
# become Python objects, some ten times as large as short ones are in the file, so their number is
# bound; Llama 3 has 408,000 pieces and merges.
LARGEST_HEAD = 32 * 2**20
MOST_TEXTS, MOST_ENTRIES = 750_000, 2**16
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 65535, 63, 4

# Type of metadata -> its code, the same for struct and numpy.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Kind(NamedTuple):
    """A type of tensor: its name, and blocks of so many numbers in so many bytes."""

    name: str
    numbers: int
    width: int


KINDS = {
    0: Kind("float32", 1, 4),
    1: Kind("float16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    30: Kind("bfloat16", 1, 2),
}
NUMBERS = {kind.name: number for number, kind in KINDS.items()}


class File(NamedTuple):
    """What a file holds: metadata by key (arrays of numbers as numpy), tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Stored]


# Reading ------------------------------------------------------------------------------------------


def read(path: Path) -> File:
    """Metadata, and the tensors mapped: nothing of them is read. Shapes are slowest first.

    Raises ConfigError for a file that breaks the format or a limit, or whose tensors do not all lie
    inside it, apart from each other.
    """
    try:
        content = np.memmap(path, np.uint8, mode="r")
        return _File(content).read()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error


class _File:
    """A position in the head of a file, moved by whatever is read there."""

    def __init__(self, content: np.ndarray) -> None:
        self._content = content
        self._head = content[:LARGEST_HEAD].data  # a view
        self._at = 0
        self._texts = 0

    def read(self) -> File:
        if bytes(self._take(4, "its first bytes")) != MAGIC:
            raise ConfigError("not a GGUF file: it does not begin with GGUF.")
        version = self._number("I")
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            found = "a big-endian file" if big_endian else f"version {version}"
            raise ConfigError(f"{found}; GGUF versions 2 and 3, little-endian, are read.")
        tensor_count, field_count = self._number("Q"), self._number("Q")
        # The shortest field: an empty key, a type, a byte. The shortest tensor: no name, no axes.
        self._check_count(field_count, 8 + 4 + 1, "fields", MOST_ENTRIES)
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string("a key", LONGEST_KEY)
            if key in fields:
                raise ConfigError(f"the key {key!r:.80} stands twice.")
            fields[key] = self._value(key)
        self._check_count(tensor_count, 8 + 4 + 4 + 8, "tensors", MOST_ENTRIES)
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment % 8:
            raise ConfigError(f"its alignment is {alignment!r:.80}, expected a multiple of 8.")
        infos = [self._info() for _ in range(tensor_count)]
        start = -(-self._at // alignment) * alignment
        return File(fields, self._tensors(infos, start, alignment))

    def _take(self, count: int, what: str) -> memoryview:
        if count > len(self._head) - self._at:
            where = "the file" if len(self._head) == len(self._content) else "a head of 32 MiB"
            raise ConfigError(f"{what:.80} ends beyond {where}: {count} bytes from {self._at}.")
        self._at += count
        return self._head[self._at - count : self._at]

    def _check_count(self, count: int, least: int, what: str, most: int) -> None:
        if count > most or count * least > len(self._head) - self._at:
            raise ConfigError(
                f"it promises {count} {what:.80}, more than its bytes can hold or than {most}."
            )

    def _number(self, code: str, what: str = "its head") -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), what))[0]

    def _string(self, what: str, longest: int = LARGEST_HEAD) -> str:
        length = self._number("Q", what)
        if length > longest:
            raise ConfigError(f"{what:.80} of {length} bytes is too long, at most {longest}.")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{what:.80} is not UTF-8 ({error.reason}).") from error

    def _value(self, key: str) -> Any:
        kind = self._number("I", key)
        if kind == STRING:
            return self._string(key)
        if kind == ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise ConfigError(f"{key:.80} has type {kind}, which GGUF does not have.")
        value = self._number(SCALARS[kind], key)
        # The decimal that was meant: 1e-5 in fp32 is 9.99999974...e-06.
        return float(str(np.float32(value))) if SCALARS[kind] == "f" else value

    def _array(self, key: str) -> Any:
        kind, count = self._number("I", key), self._number("Q", key)
        if kind == STRING:
            self._texts += count
            self._check_count(self._texts, 0, "texts", MOST_TEXTS)
            return self._strings(count, key)
        if kind not in SCALARS:
            raise ConfigError(f"{key:.80} is an array of type {kind}, which is not read.")
        dtype = np.dtype(f"<{SCALARS[kind]}")
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _strings(self, count: int, key: str) -> list[str]:
        """Texts one behind the other: `_string` in one loop, for there are many."""
        head, at, end, values = self._head, self._at, len(self._head), []
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + (length_at(head, at)[0] if start <= end else 0)
                if at > end:
                    raise ConfigError(f"a text of {key:.80} ends beyond the file.")
                values.append(str(head[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"a text of {key:.80} is not UTF-8 ({error.reason}).") from error
        self._at = at
        return values

    def _info(self) -> tuple[str, tuple[int, ...], Kind, int]:
        """Name, shape, type and offset of one tensor."""
        name = self._string("the name of a tensor", LONGEST_NAME)
        dimensions = self._number("I", name)
        if dimensions > MOST_DIMENSIONS:
            raise ConfigError(f"{name} has {dimensions} dimensions, at most {MOST_DIMENSIONS}.")
        shape = tuple(self._number("Q", name) for _ in range(dimensions))[::-1]
        kind, offset = self._number("I", name), self._number("Q", name)
        if kind not in KINDS:
            known = ", ".join(k.name for k in KINDS.values())
            raise ConfigError(f"{name} has type {kind}; read are {known}.")
        return name, shape, KINDS[kind], offset

    def _tensors(
        self, infos: list[tuple[str, tuple[int, ...], Kind, int]], start: int, alignment: int
    ) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        ranges = []
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ConfigError(f"the tensor {name} stands twice.")
            numbers = math.prod(shape)  # Python's integers do not overflow
            if (shape and shape[-1] % kind.numbers) or not numbers:
                raise ConfigError(f"{name} of shape {shape} does not fill blocks of {kind.name}.")
            size = numbers // kind.numbers * kind.width
            if offset % alignment:
                raise ConfigError(f"{name} lies at {offset}, not a multiple of {alignment}.")
            if start + offset + size > len(self._content):
                raise ConfigError(
                    f"{name} of shape {shape} needs {size} bytes at {start + offset}, and the file "
                    f"has {len(self._content)}."
                )
            ranges.append((offset, offset + size, name))
            place = slice(start + offset, start + offset + size)
            tensors[name] = Stored(
                shape, kind.name, partial(_array, self._content[place], shape, kind)
            )
        ranges.sort()
        for before, after in itertools.pairwise(ranges):
            if after[0] < before[1]:
                raise ConfigError(f"the tensors {before[2]} and {after[2]} overlap.")
        return tensors


def _array(content: np.ndarray, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """The numbers of a tensor: a view of the file, or fp32 where it is quantised."""
    if kind.name in DTYPES:
        return content.view(DTYPES[kind.name]).reshape(shape)
    quants = _quants()
    rows = content.reshape(*shape[:-1], -1)
    return quants.dequantize(rows, quants.GGMLQuantizationType[kind.name])


def _quants() -> Any:
    try:
        from gguf import quants
    except ImportError as error:
        raise ConfigError(
            "quantised GGUF tensors need the gguf library: pip install 'llama-jax[convert]'."
        ) from error
    return quants


# Writing ------------------------------------------------------------------------------------------


def write(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Writes metadata and tensors, one at a time.

    Args:
        path: the file.
        fields: key -> text, bool, int (u32), float (f32), or a list of texts, ints (i32) or floats.
        tensors: name -> tensor; type Q8_0 quantises what `read` gives.
    """
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
        for key, value in fields.items():
            file.write(_text(key) + _typed(value))
        offset = 0
        for name, tensor in tensors.items():
            kind = KINDS[NUMBERS[tensor.type]]
            shape = tensor.shape[::-1]
            file.write(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            file.write(struct.pack("<IQ", NUMBERS[tensor.type], offset))
            offset += _padded(math.prod(shape) // kind.numbers * kind.width)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for tensor in tensors.values():
            array = tensor.read()
            for part in _quantised(array) if tensor.type == "Q8_0" else [array]:
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
            file.write(bytes(-file.tell() % ALIGNMENT))


def _quantised(array: np.ndarray) -> Iterator[np.ndarray]:
    """Q8_0 of a matrix, some rows at a time: the library makes several copies."""
    quants = _quants()
    for start in range(0, len(array), 1024):
        rows = array[start : start + 1024]
        yield quants.quantize(rows, quants.GGMLQuantizationType.Q8_0)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def _typed(value: Any) -> bytes:
    """The number of a value's type, and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    items = list(value)
    head = struct.pack("<I", ARRAY)
    if items and isinstance(items[0], str):
        return head + struct.pack("<IQ", STRING, len(items)) + b"".join(map(_text, items))
    kind = 6 if items and isinstance(items[0], float) else 5
    return (
        head
        + struct.pack("<IQ", kind, len(items))
        + np.asarray(items, f"<{SCALARS[kind]}").tobytes()
    )
