"""An opened model: the one thing that every reader gives and every writer takes.

Whatever the format, a `Source` says what the model is and gives one tensor at a time with our axes,
mapped from the file where the layouts allow it, so that only touched pages are read.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from llama_jax.config import ConfigError, ModelConfig
from llama_jax.convert import names
from llama_jax.model.ops.weight import OutputMajor
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizer import load as load_tokenizer

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

# Bytes of a JSON file; the largest, the index of the 405B model, takes 0.1 MB. Longer ones are
# refused, because parsing them alone could fill the memory.
LARGEST_JSON = 4 * 2**20

Advance = Callable[[int], None]


class Stored(NamedTuple):
    """One tensor of a file, or one to be written.

    shape: as the format counts axes.
    type: a name of DTYPES, or the file's own word for what is not there.
    read: gives the array; nothing is read before.
    """

    shape: tuple[int, ...]
    type: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array; its type is one of DTYPES."""
        return math.prod(self.shape) * DTYPES[self.type].itemsize


@dataclass(frozen=True)
class Source:
    """An opened model.

    config: the architecture.
    tokenizer: None where the files hold none.
    end_ids: ids that end a text; empty where the files do not say and there is no tokenizer.
    context_length: positions it was trained for; None where the files do not say.
    dtype: the narrowest type that holds every stored value (quantised ones count as float32).
    tensor: (row of the table, layer) -> the array as stored, with our axes, unstacked.
    stacked: (row, ShapeDtypeStruct with a sharding) -> all layers at once, laid out and cast; None
        where the format keeps layers apart.
    variant_rows: rows of a model that differs from LLaMA; empty: those of the table.
    int8: (row of a matrix, its tree of shardings) -> all its layers as model.layout.quantize makes
        them; None where matrices are not stored so. `tensor` then gives their values in fp32.
    """

    format: names.Format
    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    context_length: int | None
    dtype: np.dtype
    tensor: Callable[[names.Tensor, int], np.ndarray]
    stacked: Callable[[names.Tensor, jax.ShapeDtypeStruct], jax.Array] | None = None
    int8: Callable[[names.Tensor, OutputMajor], OutputMajor] | None = None
    variant_rows: tuple[names.Tensor, ...] = ()

    @property
    def rows(self) -> tuple[names.Tensor, ...]:
        """Every tensor of the model."""
        return self.variant_rows or names.tensors(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(names.our_shape(row, self.config)) for row in self.rows)


def elsewhere(config: ModelConfig) -> str:
    """Where a model can be kept that a format cannot hold."""
    if names.variants(config) == ["window"]:
        return "choose huggingface"
    return "such a model is kept in our own format only"


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a model's folder, or None. Raises TokenizerError where it is damaged."""
    has_one = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return load_tokenizer(folder) if has_one else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object without its null keys (null is how the format says absent)."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > LARGEST_JSON:
        raise ConfigError(
            f"{path}: larger than {LARGEST_JSON} bytes, too large for a model's JSON."
        )
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object.")
    return {key: value for key, value in values.items() if value is not None}


def check_tensors(
    stored: Mapping[str, Stored],
    expected: Iterable[tuple[str, tuple[int, ...]]],
    types: Iterable[str],
    origin: str,
) -> None:
    """Refuses a file whose tensors are not those of the model.

    Args:
        stored: what the file holds, but for what may be ignored.
        expected: name and shape of each tensor; may be endless, is read until three are wrong.
        types: those that can be read.
        origin: names the file in the error.

    Raises:
        ConfigError: naming the first three tensors that are missing, left over or of another shape
            or type, with what was expected and what was found.
    """
    problems = list(islice(_problems(stored, expected, tuple(types)), 3))
    if problems:
        raise ConfigError(f"{origin} does not hold this model: {'; '.join(problems)}.")


def _problems(
    stored: Mapping[str, Stored],
    expected: Iterable[tuple[str, tuple[int, ...]]],
    types: tuple[str, ...],
) -> Iterator[str]:
    known = set()
    for name, shape in expected:
        known.add(name)
        if name not in stored:
            yield f"{name} is missing, expected shape {shape}"
            continue
        found = stored[name]
        if found.shape != shape:
            yield f"{name} has shape {found.shape}, expected {shape}"
        if found.type not in types:
            yield f"{name} has type {found.type}, expected one of {', '.join(types)}"
    for name in sorted(stored.keys() - known):
        yield f"{name} is not part of the model that the configuration describes"


def equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two matrices have the same bits, compared in slices: most differ in the first."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    rows = range(0, len(first), 1024)
    return all(_same_bits(first[i : i + 1024], second[i : i + 1024]) for i in rows)


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    here, there = (np.ascontiguousarray(part).view(np.uint8) for part in (first, second))
    return np.array_equal(here, there)


def narrowest(stored: Iterable[Stored]) -> np.dtype:
    """The narrowest type that holds every value.

    Norms are often stored in fp32 beside matrices in half precision; where they fit into that, they
    do not count.
    """
    tensors = list(stored)
    matrices = {tensor.type for tensor in tensors if len(tensor.shape) > 1}
    half = matrices.pop() if len(matrices) == 1 else "float32"
    if half not in ("bfloat16", "float16"):
        return DTYPES["float32"]
    dtype = DTYPES[half]
    for tensor in tensors:
        if tensor.type != half:
            values = tensor.read().astype(np.float32)
            with np.errstate(over="ignore"):
                if not np.array_equal(values.astype(dtype).astype(np.float32), values):
                    return DTYPES["float32"]
    return dtype


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another type. Raises ConfigError where a number is too large for it."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    infinite = np.isinf(result)
    if infinite.any() and not np.isinf(array[infinite]).all():
        raise ConfigError(
            f"{name} holds numbers too large for {dtype.name}; choose a dtype of a wider range "
            "(float32 or bfloat16)."
        )
    return result


def outgoing(
    source: Source, format: names.Format, dtype: np.dtype, advance: Advance
) -> dict[str, Stored]:
    """Every tensor of a model as another format names and lays it out, to be read when written.

    Args:
        source: the model.
        format: huggingface, meta or gguf.
        dtype: type to write.
        advance: called with the bytes of each tensor as it is read.
    """
    config = source.config

    def stored(row: names.Tensor, layer: int, place: names.Place) -> Stored:
        def read() -> np.ndarray:
            array = cast(source.tensor(row, layer), dtype, "/".join(row.path))
            advance(array.nbytes)
            return names.rearrange(array, row.axes, place.axes, config)

        return Stored(names.shape(place.axes, config), dtype.name, read)

    places = ((row, layer, getattr(row, format)) for row, layer in names.entries(config))
    return {
        place.name.format(layer=layer): stored(row, layer, place) for row, layer, place in places
    }


def load_params(
    source: Source,
    dtype: np.dtype | None = None,
    shardings: Any = None,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """The parameters of a model as our tree, layers stacked, one tensor at a time.

    Args:
        source: the model.
        dtype: type of every array; None for the source's.
        shardings: the tree with a sharding for each array, or one for all: every device then gets
            its slice, and only that is read. None gives numpy arrays. Of a source with int8 the
            tree may be that of model.layout.int8_shapes: its matrices are then loaded in int8.
        advance: called with the bytes of each tensor when it is read.

    Raises:
        ConfigError: a number is too large for dtype.
    """
    dtype = source.dtype if dtype is None else np.dtype(dtype)
    params: dict[str, Any] = {}
    for row in source.rows:
        branch, place = params, shardings
        for key in row.path[:-1]:
            branch = branch.setdefault(key, {})
        if isinstance(shardings, dict):
            for key in row.path:
                place = place[key]
        leaf = _load(source, row, dtype, place)
        branch[row.path[-1]] = leaf
        if advance:
            advance(sum(array.nbytes for array in jax.tree.leaves(leaf)))
    return params


def _load(source: Source, row: names.Tensor, dtype: np.dtype, sharding: Any) -> Any:
    """One array of our tree: numpy without a sharding. Or a matrix in int8."""
    if isinstance(sharding, OutputMajor):
        assert source.int8 is not None  # or nobody may ask for it
        return source.int8(row, sharding)
    shape = names.our_shape(row, source.config)
    whole = (slice(None),) * len(shape)
    if sharding is None:
        return _slice(source, row, dtype, whole)
    if source.stacked is not None:
        return source.stacked(row, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    parts: dict[str, np.ndarray] = {}  # replicas hold the same slice: it is read once

    def part(index: Any) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = _slice(source, row, dtype, index)
        return parts[str(index)]

    array = jax.make_array_from_callback(shape, sharding, part)
    return array.block_until_ready()  # so that what was read may go before the next is


def _slice(
    source: Source, row: names.Tensor, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """A slice of one array of our tree, layers stacked; a copy, which no longer needs the file."""
    shape = names.our_shape(row, source.config)
    result = np.empty([len(range(n)[part]) for n, part in zip(shape, index, strict=True)], dtype)
    layers = range(shape[0])[index[0]] if row.is_layered else range(1)
    parts = result if row.is_layered else result[None]
    inner = index[1:] if row.is_layered else index
    for part, layer in zip(parts, layers, strict=True):
        part[...] = cast(source.tensor(row, layer)[inner], dtype, "/".join(row.path))
    return result
