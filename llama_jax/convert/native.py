"""Our own checkpoints as a source and a destination: a run, a checkpoint of it, or a converted one.

A converted one is the folder of a single step: parameters, the tokenizer's file, and a config.yaml
with `model`, `end_ids` and `context_length`. Whatever reads the checkpoint of a run reads it too.
"""

import functools
from pathlib import Path

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
    saved = checkpoint.shapes(found, TREE)
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    @functools.lru_cache(maxsize=1)  # layers are asked for in order, and lie in one array
    def whole(path: str) -> np.ndarray:
        target = jax.ShapeDtypeStruct(saved[path].shape, saved[path].dtype, sharding=cpu)
        return np.asarray(checkpoint.load_array(found, TREE, saved, path, target))

    def tensor(row: names.Tensor, layer: int) -> np.ndarray:
        array = whole("/".join(row.path))
        return array[layer] if row.is_layered else array

    stored = {
        path: Stored(leaf.shape, np.dtype(leaf.dtype).name, functools.partial(whole, path))
        for path, leaf in saved.items()
    }
    expected = (("/".join(r.path), names.our_shape(r, config)) for r in names.tensors(config))
    check_tensors(stored, expected, DTYPES, origin)
    tokenizer = find_tokenizer(found.folder)
    if "data" in values:
        # Of a run, maybe of another version: only what is needed is looked at.
        ends, length = None, parse(RunData, values["data"], origin).sequence_length
    else:
        converted = parse(Converted, values, origin)
        ends, length = converted.end_ids, converted.context_length
    return Source(
        format="llama_jax",
        path=folder,
        config=config,
        tokenizer=tokenizer,
        end_ids=(tokenizer.eos_ids if tokenizer else ()) if ends is None else ends,
        context_length=length,
        dtype=narrowest(stored.values()),
        tensor=tensor,
        stacked=lambda row, target: checkpoint.load_array(
            found, TREE, saved, "/".join(row.path), target
        ),
    )


def write(source: Source, folder: Path, settings: ConvertConfig, advance: Advance) -> None:
    """Writes a model as a checkpoint; the host holds all of it once, in the type written."""
    dtype = DTYPES[settings.dtype] if settings.dtype else source.dtype
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    params = load_params(source, dtype, cpu, advance)
    converted = Converted(
        model=source.config, end_ids=source.end_ids, context_length=source.context_length
    )
    text = yaml.safe_dump(converted.model_dump(mode="json"), sort_keys=False)
    files = {checkpoint.CONFIG: text.encode()}
    if source.tokenizer is not None:
        files[source.tokenizer.file_name] = source.tokenizer.model
    progress = {"validation_loss": None}
    checkpoint.write_parameters(folder, params, progress, files)
