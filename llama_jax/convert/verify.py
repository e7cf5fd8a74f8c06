"""`verify`: whether two models, of any formats, are the same model."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from llama_jax.config import ComputeConfig
from llama_jax.convert import names
from llama_jax.convert.formats import open_source
from llama_jax.convert.settings import VerifyConfig
from llama_jax.convert.source import Source, cast, equal, load_params
from llama_jax.model.llama import Llama
from llama_jax.tokenizer import Tokenizer

PROMPT_LENGTH = 32
TEXT = "Hello world! Llamas hum 1,234 songs.\n\n  héllo \U0001f999 <s> [INST] def f(x):\treturn x"


class Finding(NamedTuple):
    """One line of the report: what was compared, how it went, whether that is as it should be."""

    subject: str
    result: str
    good: bool


def verify(settings: VerifyConfig) -> int:
    """Prints what is equal and what is not; returns 0 where nothing differs, else 1.

    Tensors count as equal where the destination's bits are the source's, rounded to the type of the
    destination. Quantised ones cannot be; they pass where the logits differ by at most
    `tolerance`. The two models are never in memory together.
    """
    source, destination = open_source(settings.source), open_source(settings.destination)
    findings = [_config(source, destination), _tokenizer(source, destination)]
    findings.append(_end_ids(source, destination))
    if findings[0].good:
        tensors, rounded = _tensors(source, destination)
        off = float(np.abs(_logits(source, settings) - _logits(destination, settings)).max())
        within = settings.tolerance > 0 and off <= settings.tolerance
        # What rounding to the destination's type does to the logits is no fault of a conversion.
        good = within or (tensors.good and (rounded or off == 0))
        findings.append(tensors._replace(good=tensors.good or within))
        findings.append(Finding("logits", f"largest difference {off:.3g}", good))
    _report(source, destination, findings)
    return 0 if all(finding.good for finding in findings) else 1


def _config(source: Source, destination: Source) -> Finding:
    here, there = source.config.model_dump(), destination.config.model_dump()
    different = [
        f"{name} {here[name]} / {there[name]}" for name in here if here[name] != there[name]
    ]
    return Finding("architecture", "; ".join(different) or "equal", not different)


def _tokenizer(source: Source, destination: Source) -> Finding:
    here, there = source.tokenizer, destination.tokenizer
    if here is None or there is None:
        result = "neither has one" if here is there else "only one has one"
        return Finding("tokenizer", result, here is there)
    if here.fingerprint == there.fingerprint:
        return Finding("tokenizer", "equal", True)
    difference = next(_differences(here, there), None)
    result = difference or f"another file, the same {here.vocab_size:,} pieces"
    return Finding("tokenizer", result, difference is None)


def _differences(here: Tokenizer, there: Tokenizer) -> Iterator[str]:
    for name in ("vocab_size", "bos_id", "eos_ids"):
        if getattr(here, name) != getattr(there, name):
            yield f"{name} {getattr(here, name)} / {getattr(there, name)}"
    for token in range(here.vocab_size):
        if here.spelling(token) != there.spelling(token):
            yield f"id {token} is {here.spelling(token)!r} / {there.spelling(token)!r}"
    if here.encode(TEXT) != there.encode(TEXT):
        yield "they cut the same text differently"


def _end_ids(source: Source, destination: Source) -> Finding:
    if "meta" in (source.format, destination.format):
        return Finding("end ids", "not compared: Meta's format holds none", True)
    good = source.end_ids == destination.end_ids
    result = "equal" if good else f"{source.end_ids} / {destination.end_ids}"
    return Finding("end ids", result, good)


def _tensors(source: Source, destination: Source) -> tuple[Finding, bool]:
    """Compares tensor by tensor, in the destination's types; whether that meant rounding, too."""
    different, largest, where, rounded = 0, -1.0, "", ""
    entries = list(names.entries(source.config, source.rows))
    for row, layer in track(entries, "comparing", transient=True):
        here, there = source.tensor(row, layer), destination.tensor(row, layer)
        name = row.huggingface.name.format(layer=layer)
        if there.dtype not in (here.dtype, np.float32):
            rounded = f", rounded to {there.dtype.name}"
        here = cast(here, there.dtype, name)
        if equal(here, there):
            continue
        different += 1
        off = float(np.abs(here.astype(np.float32) - there.astype(np.float32)).max())
        if not off <= largest:  # NaN is the largest
            largest, where = off, name
    count = len(entries)
    result = f"{count} of {count} equal{rounded}"
    if different:
        result = f"{different} of {count} differ, most by {largest:.3g} in {where}"
    return Finding("tensors", result, not different), bool(rounded)


def _logits(source: Source, settings: VerifyConfig) -> np.ndarray:
    """Logits of a fixed prompt; the parameters are then given up."""
    model = Llama(source.config, ComputeConfig(dtype=settings.dtype))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(source, jnp.dtype(settings.dtype), here)
    places = np.arange(PROMPT_LENGTH, dtype=np.int32)
    tokens = (places * 7919 % source.config.vocab_size).astype(np.int32)
    return np.asarray(jax.jit(model.apply)(params, tokens[None], places[None]).value)


def _report(source: Source, destination: Source, findings: list[Finding]) -> None:
    table = Table(box=SIMPLE_HEAD, title=escape(f"{source.path} / {destination.path}"))
    for heading in ("", f"{source.format} / {destination.format}", ""):
        table.add_column(heading)
    for subject, result, good in findings:
        table.add_row(subject, escape(result), "[green]ok[/]" if good else "[red]DIFFERS[/]")
    Console(highlight=False).print(table)
