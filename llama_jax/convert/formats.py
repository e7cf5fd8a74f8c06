"""The formats: how each is recognised, opened and written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llama_jax.config import ConfigError
from llama_jax.convert import gguf, huggingface, meta, native
from llama_jax.convert.names import Format
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import Advance, Source
from llama_jax.tokenizer import load as load_tokenizer


class Way(NamedTuple):
    """What can be done with a format.

    recognises: whether a path looks like one.
    open: path -> Source; checks all it can without reading the arrays.
    write: writes a model to a path that does not exist.
    """

    recognises: Callable[[Path], bool]
    open: Callable[[Path], Source]
    write: Callable[[Source, Path, ConvertConfig, Advance], None]


FORMATS: dict[Format, Way] = {
    "gguf": Way(lambda path: path.is_file(), gguf.open_file, gguf.write),
    "huggingface": Way(
        lambda path: (path / "config.json").is_file(), huggingface.open_folder, huggingface.write
    ),
    "meta": Way(lambda path: (path / meta.PARAMS).is_file(), meta.open_folder, meta.write),
    "llama_jax": Way(lambda path: path.is_dir(), native.open_folder, native.write),
}


def open_source(path: str | Path, tokenizer: str | Path | None = None) -> Source:
    """Opens a model of any format: a .gguf file, or a folder known by the files in it.

    Args:
        path: the file or folder; one that looks like no other format is one of our checkpoints.
        tokenizer: file or folder of a tokenizer to take instead of the model's own.

    Raises:
        ConfigError, CheckpointError or TokenizerError: what is there cannot be used; nothing of the
            arrays has been read or allocated.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such folder or file; give a run, a checkpoint, a Hugging Face or Meta "
            "folder, or a .gguf file."
        )
    way = next(way for way in FORMATS.values() if way.recognises(path))
    source = way.open(path)
    if tokenizer is not None:
        other = load_tokenizer(tokenizer)
        source = replace(source, tokenizer=other, end_ids=source.end_ids or other.eos_ids)
    _check_vocabulary(source)
    return source


def _check_vocabulary(source: Source) -> None:
    """A model may have more rows than its tokenizer (padding), never fewer."""
    rows = source.config.vocab_size
    pieces = source.tokenizer.vocab_size if source.tokenizer else 0
    if pieces > rows:
        raise ConfigError(
            f"{source.path}: the tokenizer has {pieces} pieces and the model only {rows} rows; "
            "it is the tokenizer of another model."
        )
    if outside := [id for id in source.end_ids if not 0 <= id < rows]:
        raise ConfigError(
            f"{source.path}: end id {outside[0]} is outside the vocabulary of {rows} rows."
        )
