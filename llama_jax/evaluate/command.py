"""`evaluate`: from files to a report."""

import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from llama_jax.api import LanguageModel, load
from llama_jax.config import ConfigError, TextConfig
from llama_jax.data import sources
from llama_jax.evaluate.perplexity import Score, losses
from llama_jax.evaluate.settings import EvaluateConfig
from llama_jax.model.layout import is_quantized
from sharding.mesh import machine

LONGEST_WINDOW = 2048  # where none is asked for
LARGEST_DOCUMENT_MB = 1024


class Sizes(NamedTuple):
    """The windows, with nothing left open."""

    window: int
    stride: int


def evaluate(config: EvaluateConfig) -> int:
    """Prints how well a model predicts a text, and writes it to a file; returns the exit code.

    Raises ConfigError, before the model is loaded where that can be known, for a text that cannot
    be read or is empty, and for windows that do not suit the model.
    """
    texts = read_texts(Path(config.perplexity), config.text_field)
    out = Path(config.out) if config.out else None
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise ConfigError(f"{out} is a folder; give a file (out).")
    model = load(config.checkpoint, config.dtype, config.mesh, weights=config.weights)
    sizes = resolve(config, model.context_length)
    ids = [model.tokenizer.encode(text, bos=True) for text in texts]
    tokens = sum(len(document) - 1 for document in ids)
    if tokens == 0:
        raise ConfigError(f"{config.perplexity}: the tokenizer makes no tokens of this text.")

    started = time.monotonic()
    nll = _summed_losses(config, model, ids, sizes, tokens)
    seconds = time.monotonic() - started
    score = Score(nll, tokens, sum(len(text.encode()) for text in texts))
    record = _record(config, model, sizes, len(texts), score, seconds)
    if out is not None:
        _write(out, record)
    if config.as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print(config, record, out)
    return 0


def read_texts(path: Path, text_field: str) -> list[str]:
    """The documents of a file, none of them empty.

    A loss over part of a text is another number, so nothing is left out but empty rows.

    Raises:
        ConfigError: the file cannot be read, a document of it cannot (naming its line or row), or
            there is no text in it.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a text or JSON lines (perplexity).")
    settings = TextConfig(
        paths=(str(path),), text_field=text_field, max_document_mb=LARGEST_DOCUMENT_MB
    )
    texts = []
    for record in sources.read(sources.find([str(path)]), settings):
        text = sources.document(record, text_field)
        if isinstance(text, str):
            texts.append(text)
        elif text.reason not in ("empty line", "empty text", "empty file"):
            detail = f" ({text.detail})" if text.detail else ""
            raise ConfigError(
                f"{path}, document {record.number}: {text.reason}{detail}; mend it, or remove it."
            )
    if not texts:
        raise ConfigError(f"{path}: holds no text; there is nothing to predict.")
    return texts


def resolve(config: EvaluateConfig, context_length: int | None) -> Sizes:
    """Window and stride for a model that was trained for so many positions (None: not known).

    Raises:
        ConfigError: the window is longer than that, or shorter than the stride.
    """
    window = config.window or min(LONGEST_WINDOW, context_length or LONGEST_WINDOW)
    if context_length is not None and window > context_length and not config.extrapolate:
        raise ConfigError(
            f"window is {window}, and the model was trained for {context_length} positions: give "
            f"--window {context_length}, or --extrapolate to see what it does beyond them."
        )
    stride = config.stride or max(window // 2, 1)
    if stride > window:
        raise ConfigError(
            f"stride ({stride}) must be at most window ({window}), or tokens between two windows "
            "would be left out."
        )
    return Sizes(window, stride)


def _summed_losses(
    config: EvaluateConfig,
    model: LanguageModel,
    ids: Sequence[Sequence[int]],
    sizes: Sizes,
    tokens: int,
) -> float:
    """The loss of all tokens in nats, with progress on the screen."""
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), TaskProgressColumn()),
        *(TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn()),
    )
    started = time.monotonic()
    with (
        jax.set_mesh(model.mesh),
        Progress(*columns, transient=True, disable=config.as_json) as bar,
    ):
        task = bar.add_task("predicting", total=tokens, rate=0.0)

        def advance(count: int) -> None:
            bar.advance(task, count)
            bar.update(task, rate=bar.tasks[task].completed / (time.monotonic() - started))

        cache = None if config.cache == "none" else config.cache
        found = losses(model.model, model.params, ids, *sizes, config.batch_size, cache, advance)
    return float(sum(part.sum(dtype=np.float64) for part in found))


def _record(
    config: EvaluateConfig,
    model: LanguageModel,
    sizes: Sizes,
    documents: int,
    score: Score,
    seconds: float,
) -> dict[str, Any]:
    """Everything worth keeping of an evaluation, as JSON values."""
    return {
        "perplexity": score.perplexity,
        "nll_per_token": score.nll_per_token,
        "nll_per_byte": score.nll_per_byte,
        "bits_per_byte": score.bits_per_byte,
        "nll": score.nll,
        "documents": documents,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "window": sizes.window,
        "stride": sizes.stride,
        "int8_weights": is_quantized(model.params),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "tokenizer": model.tokenizer.fingerprint,
        "seconds": round(seconds, 3),
        "device": machine(),
        "versions": {name: version(name) for name in ("llama-jax", "jax")},
        "settings": config.model_dump(mode="json", by_alias=True),
    }


def _print(config: EvaluateConfig, record: dict[str, Any], out: Path | None) -> None:
    title = escape(f"{config.checkpoint} on {config.perplexity}")
    table = Table(box=SIMPLE_HEAD, title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    weights = "int8" if record["int8_weights"] else config.dtype
    rows: Sequence[tuple[str, str]] = [
        ("perplexity", f"{record['perplexity']:,.4f}"),
        ("nats per token", f"{record['nll_per_token']:.5f}"),
        ("nats per byte", f"{record['nll_per_byte']:.5f}"),
        ("bits per byte", f"{record['bits_per_byte']:.5f}"),
        ("tokens, bytes", f"{record['tokens']:,}, {record['bytes']:,}"),
        ("documents", f"{record['documents']:,}"),
        ("window, stride", f"{record['window']:,}, {record['stride']:,}"),
        ("weights, activations, cache", f"{weights}, {config.dtype}, {config.cache}"),
        ("time", f"{record['seconds']:,.1f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    if out is not None:
        console.print(f"written to {escape(str(out))}")


def _write(path: Path, record: dict[str, Any]) -> None:
    """The record as a JSON file, complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
