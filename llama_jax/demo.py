"""The `demo` command: from raw text to a model that writes, in minutes on two cores.

The corpus is already on every machine that can run this: the sources of Python's standard library.
Each stage is a command that could be typed by hand, and the demo prints it; each leaves complete
files, so that the demo too goes on where it was stopped.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llama_jax.api import LanguageModel, load
from llama_jax.config import (
    ConfigError,
    DataPrepareConfig,
    DemoConfig,
    TokenizerTrainConfig,
    TrainConfig,
    configs_folder,
    parse,
    read_yaml,
)
from llama_jax.data.prepare import prepare
from llama_jax.data.python_sources import corpus_globs
from llama_jax.data.shards import META, Split, Stream
from llama_jax.evaluate.ngram import bigram_loss, unigram_loss
from llama_jax.generate.settings import SamplingConfig
from llama_jax.tokenizer.train import train_tokenizer
from llama_jax.train.checkpoint import find
from llama_jax.train.loop import train
from llama_jax.train.metrics import METRICS, PLOT, read_metrics

DONE = 0
SAMPLING = SamplingConfig(temperature=0.5, top_p=0.95, max_new_tokens=96, seed=1)
PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n",
    "class Counter:\n",
    "    for i in range(",
    "    try:\n        ",
    'if __name__ == "__main__":\n',
)


def demo(config: DemoConfig) -> int:
    """Trains a tokenizer and a small Llama on Python sources, and lets it write.

    Returns 0, or 75 when a signal stopped the training: the same command goes on.
    """
    console = Console(highlight=False)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run = _recipe(config, out)
    texts = corpus_globs(config.corpus)

    console.rule(f"1/4  a tokenizer of {run.model.vocab_size:,} pieces")
    if not Path(run.tokenizer).exists():
        tokenizer = TokenizerTrainConfig(
            paths=texts, out=run.tokenizer, vocab_size=run.model.vocab_size, sample_mb=8
        )
        if code := train_tokenizer(tokenizer):
            return code
    console.rule("2/4  the corpus as tokens")
    corpus = run.data.sources[0].path
    if not (Path(corpus) / META).exists():
        data = DataPrepareConfig(
            paths=texts, out=corpus, tokenizer=run.tokenizer, validation_fraction=0.05
        )
        if code := prepare(data):
            return code
    if Stream(corpus, "validation").tokens < 2:
        raise ConfigError(f"{config.corpus}: too few files to keep one in twenty for validation")
    console.rule("3/4  training")
    if code := train(run):
        return code
    console.rule("4/4  what it writes")
    _write_samples(load(out), out / "samples.txt", console)
    console.rule("what it learned")
    console.print(_report(run, out))
    for name, path in (
        ("checkpoint", find(out, ["params"]).folder),
        ("loss curve", out / PLOT),
        ("samples", out / "samples.txt"),
    ):
        console.print(f"{name:12}{path}")
    console.print(f"\ngo on:      python main.py generate --checkpoint {out} --prompts 'def main('")
    return DONE


def _recipe(config: DemoConfig, out: Path) -> TrainConfig:
    """The run of the recipe, its files placed in the demo's folder."""
    named = configs_folder() / "runs" / f"{config.recipe}.yaml"
    path = named if named.exists() else Path(config.recipe)
    values = read_yaml(path)
    values["out"] = str(out)
    values["tokenizer"] = str(out / "tokenizer" / "tokenizer.model")
    values["data"] = {**values["data"], "sources": [str(out / "corpus")]}
    if config.steps is not None:
        values["steps"] = config.steps
    return parse(TrainConfig, values, str(path))


def _write_samples(model: LanguageModel, path: Path, console: Console) -> None:
    answers = model.generate(PROMPTS, SAMPLING)
    samples = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        console.print(f"[bold]{'-' * 20}[/]")
        console.print(prompt, style="bold", end="", markup=False)
        console.print(answer.text, markup=False)
        samples.append(f"{'-' * 20}\n{prompt}{answer.text}\n")
    path.write_text("".join(samples), encoding="utf-8")


def _report(run: TrainConfig, out: Path) -> Table:
    """The model's validation loss beside that of counting, and the speed of training."""
    corpus, vocab = run.data.sources[0].path, run.model.vocab_size
    train_tokens, held_out = (_tokens(corpus, split) for split in ("train", "validation"))
    lines = read_metrics(out / METRICS)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    measured = [line["validation_loss"] for line in lines if "validation_loss" in line]
    table = Table(box=None, show_header=False)
    for name, value in (
        ("single tokens counted", f"{unigram_loss(train_tokens, held_out, vocab):.3f}"),
        ("pairs of tokens counted", f"{bigram_loss(train_tokens, held_out, vocab):.3f}"),
        ("this model", f"[bold]{measured[-1]:.3f}[/]"),
    ):
        table.add_row(f"validation loss, {name}", value, "nats per token")
    table.add_row("training speed", f"{np.median(speeds):,.0f}", "tokens per second")
    return table


def _tokens(corpus: str, split: Split) -> np.ndarray:
    stream = Stream(corpus, split)
    return stream.read(0, stream.tokens)[0]
