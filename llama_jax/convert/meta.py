"""Meta's own folders as a source and a destination: params.json and consolidated.NN.pth.

A matrix is split over the files along the axis of heads, feed-forward width or vocabulary; norms
are in every file. Where the files outnumber the kv heads, each kv head is repeated in neighbouring
files. Llama 1 and 2 split the embedding along the model width, Llama 3 along the vocabulary.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ConfigError, ModelConfig, RopeScaling, Schema, parse
from llama_jax.convert import names, torch_file
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import (
    DTYPES,
    Advance,
    Source,
    Stored,
    check_tensors,
    elsewhere,
    equal,
    find_tokenizer,
    narrowest,
    outgoing,
    read_json,
)

PARAMS = "params.json"
SHARD = "consolidated.{:02}.pth"
EMBED, HEAD = names.EMBED.meta.name, names.HEAD.meta.name
# What Meta's code fixes for `use_scaled_rope` (llama-models, models/llama3/model.py). It says 8 for
# every model; Llama 3.2, whose embeddings are tied, was trained with 32.
SCALED_ROPE = {"original_context": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTOR, FACTOR_TIED = 8.0, 32.0
OLDER_THETA = 10000.0  # of Llama 1 and 2, whose code has no key for it
# Values of published files, tried in this order for the width of the feed-forward layer.
MULTIPLES = (256, 1024, 4096, 512, 128, 64, 32, 1)
MULTIPLIERS = (None, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)


class Params(Schema, strict=True, extra="ignore"):
    """params.json; what it leaves out follows from the code that reads it."""

    dim: int
    """d_model."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int | None = None
    """Absent means as many as heads."""
    vocab_size: int = -1
    """-1 in Llama 1 and 2: as many as the embedding has rows."""
    multiple_of: int = 256
    """d_ff is a multiple of it."""
    ffn_dim_multiplier: float | None = None
    """Scales d_ff."""
    norm_eps: float
    """Differs within a generation: the first Llama-2-7b-chat had 1e-6, its base 1e-5."""
    rope_theta: float = OLDER_THETA
    """Absent in Llama 1 and 2."""
    use_scaled_rope: bool = False
    """Llama 3.1 and 3.2."""
    rope_scaling_factor: float | None = None
    """Read where present; Meta's code for Llama 3 passes it over."""


# Reading ------------------------------------------------------------------------------------------


def open_folder(folder: Path) -> Source:
    """Opens a folder with params.json and any number of consolidated.NN.pth.

    Raises:
        ConfigError: params.json is not understood, or the tensors are not those it describes.
        TokenizerError: there is a tokenizer.model and it is damaged.
    """
    origin = str(folder / PARAMS)
    file = parse(Params, read_json(folder / PARAMS), origin)
    shards = [torch_file.read(path) for path in _shards(folder)]
    for shard in shards:
        shard.pop("rope.freqs", None)  # follows from the rest
    tied = _is_tied(shards)
    config = _config(file, shards, tied, origin)
    splits = {row.path: _split(row, shards, config) for row in names.tensors(config)}
    for number, shard in enumerate(shards):
        held = {n: t for n, t in shard.items() if not (tied and n == HEAD)}
        expected = _expected(config, splits, len(shards))
        check_tensors(held, expected, DTYPES, str(folder / SHARD.format(number)))

    def tensor(row: names.Tensor, layer: int) -> np.ndarray:
        name = row.meta.name.format(layer=layer)
        array = _join([shard[name] for shard in shards], splits[row.path], row, config, name)
        return names.rearrange(array, row.meta.axes, row.axes, config)

    tokenizer = find_tokenizer(folder)
    return Source(
        format="meta",
        path=folder,
        config=config,
        tokenizer=tokenizer,
        end_ids=tokenizer.eos_ids if tokenizer else (),
        context_length=None,
        dtype=narrowest(tensor for shard in shards for tensor in shard.values()),
        tensor=tensor,
    )


def _shards(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if re.fullmatch(r"consolidated\.\d+\.pth", p.name))
    if not found:
        raise ConfigError(f"{folder} has a {PARAMS} and no {SHARD.format(0)}.")
    numbers = [int(path.name.split(".")[1]) for path in found]
    if numbers != list(range(len(found))):
        missing = next(n for n, number in enumerate([*numbers, -1]) if n != number)
        raise ConfigError(f"{folder}: {SHARD.format(missing)} is missing.")
    return found


def _is_tied(shards: Sequence[Mapping[str, Stored]]) -> bool:
    """Whether the output matrix is absent, or the embedding once more, as Llama 3.2 stores it."""
    for shard in shards:
        if HEAD in shard:
            pair = shard.get(EMBED), shard[HEAD]
            if any(t is None or t.type not in DTYPES for t in pair):
                return False
            if not equal(*(t.read() for t in pair if t)):
                return False
    return True


def _config(
    file: Params, shards: Sequence[Mapping[str, Stored]], tied: bool, origin: str
) -> ModelConfig:
    values = file.model_dump()
    if file.n_heads < 1 or file.dim % file.n_heads:
        raise ConfigError(f"{origin}: dim ({file.dim}) is not a multiple of n_heads.")
    if file.n_kv_heads is None:
        values["n_kv_heads"] = file.n_heads
    if file.vocab_size == -1:
        values["vocab_size"] = _rows(shards, file.dim, origin)
    if not 0 < file.multiple_of < 2**31 or not 0 < (file.ffn_dim_multiplier or 1) < 1e6:
        raise ConfigError(f"{origin}: multiple_of or ffn_dim_multiplier is out of range.")
    scaling = RopeScaling()
    if file.use_scaled_rope:
        factor = file.rope_scaling_factor or (FACTOR_TIED if tied else FACTOR)
        scaling = parse(RopeScaling, {"type": "llama3", "factor": factor, **SCALED_ROPE}, origin)
    given = {field.ours: values[field.meta] for field in names.FIELDS if field.meta}
    derived = {
        "d_head": file.dim // file.n_heads,
        "d_ff": feed_forward_width(file.dim, file.multiple_of, file.ffn_dim_multiplier),
        "tie_embeddings": tied,
        "rope_scaling": scaling,
    }
    return parse(ModelConfig, {**given, **derived}, origin)


def _rows(shards: Sequence[Mapping[str, Stored]], dim: int, origin: str) -> int:
    """Rows of the joined embedding, which may be split along either axis."""
    shapes = [shard[EMBED].shape for shard in shards if EMBED in shard]
    if len(shapes) < len(shards) or any(len(shape) != 2 for shape in shapes):
        raise ConfigError(f"{origin}: vocab_size is -1 and a shard has no {EMBED} to count.")
    return shapes[0][0] if shapes[0][1] != dim else sum(shape[0] for shape in shapes)


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """d_ff by the rule of Meta's code (llama, model.py, FeedForward)."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return math.ceil(width / multiple_of) * multiple_of


def _split(
    row: names.Tensor, shards: Sequence[Mapping[str, Stored]], config: ModelConfig
) -> int | None:
    """The axis along which a matrix lies over the files; None for a norm, which is in each."""
    if row is names.EMBED:
        found = shards[0].get(EMBED)
        whole = found is None or found.shape[1:] == (config.d_model,)
        return 0 if whole else 1
    return _split_axis(row.meta.axes, "NKFV")


def _split_axis(axes: str, letters: str) -> int | None:
    """The axis of a matrix whose merged axes begin with one of the letters."""
    groups = axes.split()
    found = [axis for axis, group in enumerate(groups) if group[0] in letters]
    return found[0] if found and len(groups) > 1 else None


def _expected(
    config: ModelConfig, splits: Mapping[tuple[str, ...], int | None], count: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of one file."""
    for row, layer in names.entries(config):
        shape = list(names.shape(row.meta.axes, config))
        axis = splits[row.path]
        if axis is not None:
            # A length that does not divide gives a shape that no file has.
            shape[axis] = shape[axis] * _repeats(row, config, count) // count
        yield row.meta.name.format(layer=layer), tuple(shape)


def _repeats(row: names.Tensor, config: ModelConfig, count: int) -> int:
    """In how many neighbouring files the same part of a tensor lies."""
    heads = names.axis_sizes(config)["K"]
    return max(count // heads, 1) if row.meta.axes.startswith("K") else 1


def _join(
    parts: list[Stored], axis: int | None, row: names.Tensor, config: ModelConfig, name: str
) -> np.ndarray:
    """One tensor out of its parts: a view where there is one file."""
    repeats = len(parts) if axis is None else _repeats(row, config, len(parts))
    arrays = [part.read() for part in parts]
    for number, array in enumerate(arrays):
        if not equal(array, arrays[number - number % repeats]):
            raise ConfigError(f"{name} should be the same in {repeats} files, and is not.")
    distinct = arrays[::repeats]
    return distinct[0] if axis is None or len(distinct) == 1 else np.concatenate(distinct, axis)


# Writing ------------------------------------------------------------------------------------------


def write(source: Source, folder: Path, settings: ConvertConfig, advance: Advance) -> None:
    """Writes params.json, consolidated.NN.pth and the tokenizer; each tensor is read once.

    Raises ConfigError where Meta's code cannot compute the model, or it does not split into so many
    files.
    """
    dtype = DTYPES[settings.dtype] if settings.dtype else source.dtype
    config = source.config
    values = params_values(config)
    tensors = outgoing(source, "meta", dtype, advance)
    if config.tie_embeddings:
        tensors[HEAD] = tensors[EMBED]  # Meta's loader wants it
    parts = {
        row.meta.name.format(layer=layer): _parts(row, config, settings.shards)
        for row in names.TENSORS
        for layer in names.layers(row, config)
    }
    folder.mkdir()
    (folder / PARAMS).write_text(json.dumps(values) + "\n", encoding="utf-8")
    if source.tokenizer is not None:
        (folder / source.tokenizer.file_name).write_bytes(source.tokenizer.model)
    with ExitStack() as files:
        writers = []
        for number in range(settings.shards):
            shapes = {n: _shape(t.shape, parts[n][number]) for n, t in tensors.items()}
            file = torch_file.writing(folder / SHARD.format(number), shapes, dtype.name)
            writers.append(files.enter_context(file))
        for name, tensor in tensors.items():
            array = tensor.read()
            for add, part in zip(writers, parts[name], strict=True):
                add(array[part])


def params_values(config: ModelConfig) -> dict[str, Any]:
    """params.json of an architecture. Raises ConfigError for one that Meta's code does not know.

    Keys that the code of Llama 1 and 2 would refuse are left out where that changes nothing.
    """
    if config.d_head * config.n_heads != config.d_model:
        raise ConfigError(
            f"Meta's code has heads of d_model / n_heads numbers, not d_head = {config.d_head}; "
            "choose another format."
        )
    if found := names.variants(config):
        raise ConfigError(f"Meta's code has no {found[0]} (model.{found[0]}); {elsewhere(config)}.")
    tied, scaling = config.tie_embeddings, config.rope_scaling
    scaled = scaling.model_dump() | SCALED_ROPE == scaling.model_dump()
    if scaling.type not in ("none", "llama3") or (scaling.type == "llama3" and not scaled):
        fixed = ", ".join(f"{key} {value:g}" for key, value in SCALED_ROPE.items())
        raise ConfigError(
            f"Meta's code knows one rope scaling, llama3 with {fixed}, and the model has "
            f"{scaling.model_dump(exclude_none=True)}; choose another format."
        )
    ours = config.model_dump()
    values = {field.meta: ours[field.ours] for field in names.FIELDS if field.meta}
    if config.n_groups == 1:
        del values["n_kv_heads"]
    if config.rope_theta == OLDER_THETA:
        del values["rope_theta"]
    values |= _feed_forward_values(config)
    if scaling.type == "llama3":
        values["use_scaled_rope"] = True
        if scaling.factor != (FACTOR_TIED if tied else FACTOR):
            values["rope_scaling_factor"] = scaling.factor
    return values


def _feed_forward_values(config: ModelConfig) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier that give d_ff: published values, else an exact ratio."""
    exact = (config.d_ff + 0.5) / feed_forward_width(config.d_model, 1, None)
    for multiplier in (*MULTIPLIERS, exact):
        for multiple in MULTIPLES:
            if feed_forward_width(config.d_model, multiple, multiplier) == config.d_ff:
                given = {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
                return {"multiple_of": multiple, **given}
    raise ConfigError(f"no multiple_of and ffn_dim_multiplier give a d_ff of {config.d_ff}.")


def _parts(row: names.Tensor, config: ModelConfig, count: int) -> list[tuple[slice, ...]]:
    """The part of a tensor that each file holds. Raises ConfigError where it does not divide."""
    # Llama 1 and 2 split the embedding along its width; none of them is tied.
    older = row is names.EMBED and config.rope_theta == OLDER_THETA and not config.tie_embeddings
    axis = _split_axis(row.meta.axes, "D" if older else "NKFV")
    if axis is None:
        return [()] * count
    repeats = _repeats(row, config, count)
    units = names.axis_sizes(config)[row.meta.axes.split()[axis][0]]
    if units * repeats % count:
        raise ConfigError(
            f"{row.meta.name} has {units} equal parts (heads, widths or rows), which {count} files "
            "cannot share; give --shards a number that divides it."
        )
    length = names.shape(row.meta.axes, config)[axis] * repeats // count
    starts = [number // repeats * length for number in range(count)]
    return [(slice(None),) * axis + (slice(start, start + length),) for start in starts]


def _shape(whole: tuple[int, ...], part: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of a part."""
    taken = part + (slice(None),) * (len(whole) - len(part))
    return tuple(len(range(size)[piece]) for size, piece in zip(whole, taken, strict=True))
