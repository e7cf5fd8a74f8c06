"""Our own checkpoints as a source and a destination: a run, a checkpoint of it, or a converted one.

A converted one is the folder of a single step: parameters, the tokenizer's file, and a config.yaml
with `model`, `end_ids`, `context_length` and `weights`. With floats, whatever reads the checkpoint
of a run reads it too. A matrix in int8 is two arrays: `values` (layers, out..., in...) int8, and
`scale` (layers, out...) fp32.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import yaml

from llama_jax.config import ConfigError, ModelConfig, Schema, parse, read_yaml
from llama_jax.convert import names
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import (
    DTYPES,
    Advance,
    Source,
    Stored,
    check_tensors,
    find_tokenizer,
    load_params,
    narrowest,
)
from llama_jax.model.layout import INPUTS, OUTPUTS, int8_order, int8_shapes, quantize
from llama_jax.model.llama import Llama
from llama_jax.model.ops.weight import OutputMajor
from llama_jax.train import checkpoint

TREE = "params"


class Converted(Schema):
    """The config.yaml of a checkpoint that no run has made."""

    model: ModelConfig
    """The architecture."""
    end_ids: tuple[int, ...]
    """Ids that end a text."""
    context_length: int | None = None
    """Positions it was trained for."""
    weights: Literal["floats", "int8"] = "floats"
    """How matrices are stored."""


class RunData(Schema, extra="ignore"):
    """Section `data` of a run's config.yaml."""

    sequence_length: int | None
    """Tokens of a row."""


def open_folder(folder: Path) -> Source:
    """Opens a run, a checkpoints folder or one step, whose files are compared with its manifest.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: it does not hold the model that its configuration describes.
    """
    found = checkpoint.find(folder, [TREE])
    origin = str(found.folder)
    values = read_yaml(found.folder / checkpoint.CONFIG)
    if "model" not in values:
        raise ConfigError(f"{origin}/{checkpoint.CONFIG}: has no section `model`.")
    config = parse(ModelConfig, values["model"], origin)
    converted = None if "data" in values else parse(Converted, values, origin)
    is_int8 = converted is not None and converted.weights == "int8"
    saved = checkpoint.shapes(found, TREE)
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def load(path: str, sharding: Any, dtype: Any = None) -> jax.Array:
        kind = saved[path]
        target = jax.ShapeDtypeStruct(kind.shape, dtype or kind.dtype, sharding=sharding)
        return checkpoint.load_array(found, TREE, saved, path, target)

    # Layers are asked for in order, and lie in one array; a matrix in int8 is two.
    @functools.lru_cache(maxsize=2 if is_int8 else 1)
    def whole(path: str) -> np.ndarray:
        return np.asarray(load(path, cpu))

    def tensor(row: names.Tensor, layer: int) -> np.ndarray:
        path, part = "/".join(row.path), layer if row.is_layered else ...
        if path in saved:
            return whole(path)[part]
        return _floats(row, whole(f"{path}/values")[part], whole(f"{path}/scale")[part])

    def load_int8(row: names.Tensor, places: OutputMajor) -> OutputMajor:
        path = "/".join(row.path)
        return OutputMajor(
            load(f"{path}/values", places.values), load(f"{path}/scale", places.scale)
        )

    stored = {
        path: Stored(leaf.shape, np.dtype(leaf.dtype).name, functools.partial(whole, path))
        for path, leaf in saved.items()
    }
    rows = _rows(config)
    _check(stored, config, rows, is_int8, origin)
    tokenizer = find_tokenizer(found.folder)
    if converted is None:
        # Of a run, maybe of another version: only what is needed is looked at.
        ends, length = None, parse(RunData, values["data"], origin).sequence_length
    else:
        ends, length = converted.end_ids, converted.context_length
    return Source(
        format="llama_jax",
        path=folder,
        config=config,
        tokenizer=tokenizer,
        end_ids=(tokenizer.eos_ids if tokenizer else ()) if ends is None else ends,
        context_length=length,
        dtype=DTYPES["float32"] if is_int8 else narrowest(stored.values()),
        tensor=tensor,
        stacked=None
        if is_int8
        else lambda row, to: load("/".join(row.path), to.sharding, to.dtype),
        int8=load_int8 if is_int8 else None,
        variant_rows=rows,
    )


def _rows(config: ModelConfig) -> tuple[names.Tensor, ...]:
    """Every tensor of a model: those of the table, or of a variant as its modules declare them."""
    if not names.variants(config):
        return names.tensors(config)
    leaves, _ = jax.tree_util.tree_flatten_with_path(Llama(config).shapes())
    return tuple(
        names.only_ours(tuple(key.key for key in path), leaf.shape) for path, leaf in leaves
    )


def _check(
    stored: Mapping[str, Stored],
    config: ModelConfig,
    rows: Sequence[names.Tensor],
    is_int8: bool,
    origin: str,
) -> None:
    """Raises ConfigError where the arrays are not those of the model."""
    expected: dict[str, dict[str, tuple[int, ...]]] = {"values": {}, "scale": {}, "": {}}
    for row in rows:
        path, shape = "/".join(row.path), names.our_shape(row, config)
        if is_int8 and row.path[-1] in INPUTS:
            values, scale = int8_order(row.path[-1], shape)
            expected["values"][f"{path}/values"] = values
            expected["scale"][f"{path}/scale"] = scale
        else:
            expected[""][path] = shape
    types = {"values": ("int8",), "scale": ("float32",), "": tuple(DTYPES)}
    for part, tensors in expected.items():
        mine = {path: tensor for path, tensor in stored.items() if _part(path) == part}
        check_tensors(mine, tensors.items(), types[part], origin)


def _part(path: str) -> str:
    """What an array is of a matrix in int8, if it is of one."""
    name = path.rpartition("/")[2]
    return name if name in ("values", "scale") else ""


def _floats(row: names.Tensor, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A matrix of one layer in fp32 with our axes, from values (out..., in...) and their scale; of
    experts all matrices."""
    floats = values * scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))
    if row.path == names.EMBED.path:
        return floats
    outputs = OUTPUTS[row.path[-1]]
    return np.moveaxis(floats, range(scale.ndim - outputs, scale.ndim), range(-outputs, 0))


def write(source: Source, folder: Path, settings: ConvertConfig, advance: Advance) -> None:
    """Writes a model as a checkpoint; the host holds all of it once, in the type written."""
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    is_int8 = settings.dtype == "int8" or (settings.dtype is None and source.int8 is not None)
    if is_int8:
        params = _int8_params(source, cpu, advance)
    else:
        dtype = DTYPES[settings.dtype] if settings.dtype else source.dtype
        params = load_params(source, dtype, cpu, advance)
    converted = Converted(
        model=source.config,
        end_ids=source.end_ids,
        context_length=source.context_length,
        weights="int8" if is_int8 else "floats",
    )
    text = yaml.safe_dump(converted.model_dump(mode="json"), sort_keys=False)
    files = {checkpoint.CONFIG: text.encode()}
    if source.tokenizer is not None:
        files[source.tokenizer.file_name] = source.tokenizer.model
    progress = {"validation_loss": None}
    checkpoint.write_parameters(folder, params, progress, files)


def _int8_params(source: Source, place: jax.sharding.Sharding, advance: Advance) -> Any:
    """The parameters in int8, each matrix as a dict of its values and their scale."""
    if source.int8 is not None:
        shapes = int8_shapes(Llama(source.config).shapes())
        places = jax.tree.map(lambda _: place, shapes)
        params = load_params(source, DTYPES["float32"], places, advance)
    else:
        params = quantize(load_params(source, None, place, advance), consume=True)
    is_matrix = lambda leaf: isinstance(leaf, OutputMajor)  # noqa: E731
    return jax.tree.map(
        lambda leaf: {"values": leaf.values, "scale": leaf.scale} if is_matrix(leaf) else leaf,
        params,
        is_leaf=is_matrix,
    )
