"""`convert`: a model from one format into another. The destination is complete or absent."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama_jax.config import ConfigError
from llama_jax.convert.formats import FORMATS, open_source
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import DTYPES


def convert(settings: ConvertConfig) -> int:
    """Writes the destination beside its final place, flushes it to the disk and renames it.

    Raises ConfigError, before anything is written, where the source cannot be read, the destination
    exists or its format cannot say what the model is.
    """
    started = time.monotonic()
    destination = Path(settings.destination)
    _check_paths(Path(settings.source), destination)
    source = open_source(settings.source, settings.tokenizer)
    if settings.context_length is not None:
        source = replace(source, context_length=settings.context_length)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    _remove(partial)  # of a conversion that was killed
    width = DTYPES[settings.dtype].itemsize if settings.dtype in DTYPES else source.dtype.itemsize
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
    )
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(
                f"{source.format} to {settings.to}",
                total=source.parameters * width,
            )
            FORMATS[settings.to].write(
                source, partial, settings, lambda done: progress.advance(task, done)
            )
        _flush(partial)
        partial.rename(destination)
        _flush(destination.parent, deep=False)
    except BaseException:
        _remove(partial)
        raise
    size = sum(path.stat().st_size for path in [destination, *destination.rglob("*")])
    print(
        f"wrote {destination} ({settings.to}, {size / 1e6:,.1f} MB) in "
        f"{time.monotonic() - started:.1f} s; `llama-jax verify {settings.source} {destination}` "
        "compares the two"
    )
    return 0


def _check_paths(source: Path, destination: Path) -> None:
    if source.exists() and destination.exists() and source.samefile(destination):
        raise ConfigError(f"{destination}: source and destination are one; choose another.")
    if destination.exists() or destination.is_symlink():
        raise ConfigError(
            f"{destination} exists already; remove it, or choose another destination."
        )
    if source.resolve() in destination.resolve().parents:
        raise ConfigError(
            f"{destination} lies inside the source ({source}); choose a place beside it."
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path, deep: bool = True) -> None:
    """Waits until a file, or a folder and all in it, is on the disk."""
    for part in [path, *(path.rglob("*") if deep else ())]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
