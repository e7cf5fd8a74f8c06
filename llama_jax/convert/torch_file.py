"""The container of Meta's weights: a zip of a pickle and raw arrays, as torch.save writes it.

Nothing here runs what a file says. Its pickle is read by an interpreter of the few opcodes that a
dictionary of tensors needs, in which a global is a word out of a short list and never an object;
there is no torch, no `pickle.load` and no second attempt by other means. Arrays are mapped from the
file, once their ranges are known to lie inside it.
"""

import itertools
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.convert.source import DTYPES, Stored

# Bytes of the pickle and of the zip's directory, and steps of the pickle. A file of the 405B model
# takes 0.3 MB and 40,000 steps.
LARGEST_LIST, MOST_STEPS = 2**20, 2**18
STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
# Parts of a zip: the header before an entry, an entry of the directory, and the directory's end in
# three forms. Of LOCAL the last two fields are the lengths of name and extra field.
LOCAL, ENTRY = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
END, LOCATOR, END64 = (
    struct.Struct("<4s4H2IH"),
    struct.Struct("<4sIQI"),
    struct.Struct("<4sQ2H2I4Q"),
)
ALIGNMENT = 64  # of arrays, as torch writes them


class Word(NamedTuple):
    """A global of the pickle: nothing but its name."""

    module: str
    name: str


class Storage(NamedTuple):
    """An array of numbers in the file."""

    type: str
    key: str
    length: int


class View(NamedTuple):
    """A tensor: part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


REBUILD = Word("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Word("collections", "OrderedDict")


# Reading ------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, mapped: nothing of them is read.

    Raises ConfigError for a file that is anything but a dictionary of tensors saved by torch 1.6 or
    newer, uncompressed, every array inside it.
    """
    entries, content = _entries(path)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ConfigError(f"{path}: not a file of torch.save: it holds {len(pickles)} data.pkl.")
    folder = pickles[0].removesuffix("data.pkl")
    start, size = entries[pickles[0]]
    if size > LARGEST_LIST:
        raise ConfigError(f"{path}: a pickle of {size} bytes is too large for a list of tensors.")
    order = entries.get(f"{folder}byteorder")
    if order and content[order[0] : order[0] + min(order[1], 8)].tobytes() != b"little":
        raise ConfigError(f"{path}: its numbers are big-endian; only little-endian is read.")
    state = _unpickle(content[start : start + size].tobytes(), path)
    if not isinstance(state, dict) or not all(isinstance(t, View) for t in state.values()):
        raise ConfigError(f"{path}: not a dictionary of tensors; save the model's state_dict.")
    return {
        name: _stored(view, name, folder, entries, content, path) for name, view in state.items()
    }


def _entries(path: Path) -> tuple[dict[str, tuple[int, int]], np.ndarray]:
    """Name -> (start, size) of each entry of the zip, and the mapped file."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    if content[:4].tobytes() != b"PK\x03\x04":
        raise ConfigError(
            f"{path}: not a zip, so not of torch 1.6 or newer; load it with torch and save it "
            "again (torch.save), or take safetensors."
        )
    entries: dict[str, tuple[int, int]] = {}
    try:
        for name, header_at, size in _directory(content):
            if name in entries:
                raise ConfigError(f"the entry {name!r:.80} stands twice.")
            header = content[header_at : header_at + LOCAL.size].tobytes()
            signature, *_, name_length, extra_length = LOCAL.unpack(header)
            start = header_at + LOCAL.size + name_length + extra_length
            if signature != b"PK\x03\x04" or start + size > len(content):
                raise ConfigError(f"the entry {name!r:.80} reaches beyond the file.")
            entries[name] = start, size
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: a damaged zip ({error}).") from error
    ends = 0
    for start, size in sorted(entries.values()):
        if start < ends:
            raise ConfigError(f"{path}: entries of the zip overlap.")
        ends = start + size
    return entries, content


def _directory(content: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Name, place of the header and size of each entry that the zip's directory lists."""
    tail = content[-(END.size + 2**16) :].tobytes()
    if (place := tail.rfind(b"PK\x05\x06")) < 0:
        raise ConfigError("a damaged zip: it has no directory, so its end is missing.")
    *_, size, offset, _ = END.unpack(tail[place : place + END.size])
    if tail[place - LOCATOR.size : place][:4] == b"PK\x06\x07" and place >= LOCATOR.size:
        _, _, at, _ = LOCATOR.unpack(tail[place - LOCATOR.size : place])
        *_, size, offset = END64.unpack(content[at : at + END64.size].tobytes())
    if size > LARGEST_LIST or offset + size > len(content):
        raise ConfigError(f"a damaged zip: its directory of {size} bytes is not inside the file.")
    listed = content[offset : offset + size].tobytes()
    at = 0
    while at < len(listed):
        fields = ENTRY.unpack(listed[at : at + ENTRY.size])
        signature, method, stored, header_at = fields[0], fields[4], fields[8], fields[16]
        size, name_length, extra_length, comment_length = fields[9:13]
        name_at = at + ENTRY.size
        extra_at = name_at + name_length
        name = listed[name_at:extra_at].decode()
        extra = listed[extra_at : extra_at + extra_length]
        if signature != b"PK\x01\x02" or extra_at + extra_length > len(listed):
            raise ConfigError("a damaged zip: its directory is cut off.")
        size, stored, header_at = _wide(extra, [size, stored, header_at])
        if method != 0 or stored != size:
            raise ConfigError(f"the entry {name!r:.80} is compressed; torch.save never does that.")
        yield name, header_at, size
        at = extra_at + extra_length + comment_length


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """The values with those of 2^32 - 1 replaced by the 64-bit ones in the extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, value) if value == 2**32 - 1 else value for value in values]
        at += 4 + length
    return values


def _stored(
    view: View,
    name: str,
    folder: str,
    entries: Mapping[str, tuple[int, int]],
    content: np.ndarray,
    path: Path,
) -> Stored:
    storage = view.storage
    kind = STORAGES.get(storage.type, storage.type)
    if kind not in DTYPES:  # told by the check of all tensors, unless this one is ignored
        return Stored(view.shape, kind, lambda: np.empty(0))
    width = DTYPES[kind].itemsize
    start, size = entries.get(f"{folder}data/{storage.key}", (0, -1))
    if size != storage.length * width:
        found = "missing" if size < 0 else f"of {size} bytes"
        raise ConfigError(
            f"{path}: the array of {name:.80} is {found}, expected {storage.length * width} bytes."
        )
    steps = ((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    last = view.offset + sum(steps)
    repeats = any(n > 1 and not s for n, s in zip(view.shape, view.strides, strict=True))
    if repeats or not all(view.shape) or last >= storage.length:
        raise ConfigError(
            f"{path}: {name:.80} of shape {view.shape} and strides {view.strides} from "
            f"{view.offset} does not fit its array of {storage.length} numbers."
        )
    strides = tuple(width * stride for stride in view.strides)
    begin = start + width * view.offset
    array = lambda: np.ndarray(view.shape, DTYPES[kind], content, begin, strides)  # noqa: E731
    return Stored(view.shape, kind, array)


def _unpickle(content: bytes, path: Path) -> Any:
    """What a pickle of tensors describes; anything else in it is refused by name."""
    try:
        return _Machine().run(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    # What wrong types and an empty stack give, and what pickletools says of damaged bytes.
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: a damaged pickle ({type(error).__name__}).") from error


class _Machine:
    """Runs a pickle on a stack of plain values, Words, Storages and Views."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # one for each open mark
        self._memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            name = opcode.name
            if number == MOST_STEPS:
                raise ConfigError("its pickle is too long for a list of tensors.")
            if name == "STOP":
                break
            if name in PUSHED:
                self._stack.append(PUSHED[name] if argument is None else argument)
            elif name in TUPLES:
                self._stack.append(tuple(self._pop(TUPLES[name])))
            else:
                step = STEPS.get(name)
                if step is None:
                    raise ConfigError(f"its pickle uses {name}, which no list of tensors needs.")
                step(self, argument)
        (result,) = self._stack
        return result

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError
        values = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return values

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def make_tuple(self, _: Any) -> None:
        values = self._since_mark()
        self._stack.append(tuple(values))

    def dictionary(self, _: Any) -> None:
        self._stack.append({})

    def set_item(self, _: Any) -> None:
        self._put(self._pop(2))

    def set_items(self, _: Any) -> None:
        self._put(self._since_mark())

    def _put(self, items: list[Any]) -> None:
        target = self._stack[-1]
        keys = items[::2]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
            raise TypeError
        for key, value in zip(keys, items[1::2], strict=True):
            if key in target:
                raise ConfigError(f"{key:.80} stands twice in its pickle.")
            target[key] = value

    def word(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        word = Word(module, name)
        storage = module == "torch" and name.isidentifier() and name.endswith("Storage")
        if word not in (REBUILD, ORDERED_DICT) and not storage:
            raise ConfigError(
                f"its pickle names {module:.80}.{name:.80}, which no list of tensors needs."
            )
        self._stack.append(word)

    def persistent(self, _: Any) -> None:
        kind, word, key, place, length = self._pop(1)[0]
        if kind != "storage" or not isinstance(word, Word) or word.module != "torch":
            raise ValueError
        if not (isinstance(key, str) and isinstance(place, str) and _is_count(length)):
            raise TypeError
        self._stack.append(Storage(word.name, key, length))

    def call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if function == ORDERED_DICT and arguments == ():
            self._stack.append({})
        elif function == REBUILD:
            storage, offset, shape, strides = arguments[:4]
            counts = (offset, *shape, *strides)
            if not isinstance(storage, Storage) or not all(map(_is_count, counts)):
                raise TypeError
            if len(shape) != len(strides):
                raise ValueError
            self._stack.append(View(storage, offset, tuple(shape), tuple(strides)))
        else:
            raise ConfigError("its pickle calls what no list of tensors needs.")

    def drop_state(self, _: Any) -> None:
        """Attributes of a dictionary (the versions of a state_dict's modules) mean nothing here."""
        target, _state = self._pop(2)
        if not isinstance(target, dict):
            raise TypeError
        self._stack.append(target)

    def remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def remember_next(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def recall(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def nothing(self, _: Any) -> None:
        pass


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


# Opcodes: those that push their argument or a constant, tuples of the top values, and the rest.
_ARGUMENT = (
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1"),
    "BINFLOAT",
)
PUSHED = {**dict.fromkeys(_ARGUMENT), "NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.make_tuple,
    "EMPTY_DICT": _Machine.dictionary,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.word,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.drop_state,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember_next,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
}


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def writing(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> Iterator[Callable[[np.ndarray], None]]:
    """A file as torch.load(weights_only=True) reads it, written one array at a time.

    Args:
        path: the file.
        shapes: name -> shape of every tensor.
        dtype: their type, a name of DTYPES.

    Yields:
        the function to call with each array, in the order of `shapes`.
    """
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", b"".join(_pickle(shapes, dtype)))
        archive.writestr(f"{path.stem}/byteorder", b"little")
        numbers = itertools.count()

        def add(array: np.ndarray) -> None:
            info = zipfile.ZipInfo(f"{path.stem}/data/{next(numbers)}")
            info.file_size = array.nbytes
            zip64 = 20  # bytes of the field that force_zip64 puts beside ours
            start = file.tell() + LOCAL.size + len(info.filename) + zip64 + 4
            gap = -start % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
            with archive.open(info, "w", force_zip64=True) as entry:
                entry.write(np.ascontiguousarray(array).view(np.uint8).data)

        yield add
        archive.writestr(f"{path.stem}/version", b"3\n")


def _pickle(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Iterator[bytes]:
    """{name: _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}, protocol 2."""
    storage = next(theirs for theirs, ours in STORAGES.items() if ours == dtype)
    yield b"\x80\x02}("
    for number, (name, shape) in enumerate(shapes.items()):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        yield _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield _text("storage") + f"ctorch\n{storage}\n".encode()
        yield _text(str(number)) + _text("cpu") + _integer(math.prod(shape)) + b"tQ"
        yield _integer(0)
        for counts in (shape, strides):
            yield b"(" + b"".join(map(_integer, counts)) + b"t"
        yield b"\x89ccollections\nOrderedDict\n)RtR"
    yield b"u."


def _text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _integer(value: int) -> bytes:
    """BININT where it fits, else LONG1."""
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content
