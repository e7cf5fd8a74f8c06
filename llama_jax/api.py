"""`llama_jax.load(path)`: a trained model as one object, from files of any format."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from llama_jax.config import (
    ComputeConfig,
    ConfigError,
    GenerateConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
    parse,
)
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import load_params
from llama_jax.generate.text import Completion, generate
from llama_jax.model.layout import int8_axes, int8_shapes, quantize
from llama_jax.model.llama import Llama, Params, unstack
from llama_jax.tokenizer import Tokenizer
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

ONE_DEVICE = MeshConfig(data=1, rules="decode")


@dataclass(frozen=True)
class LanguageModel:
    """Parameters, what they mean, and where they lie.

    model: the architecture as a function; config is its ModelConfig.
    params: layers stacked, in the compute dtype, laid out over `mesh`.
    tokenizer: text to ids and back.
    end_ids: ids that end a text.
    context_length: positions it was trained for; None where the files do not say.
    """

    model: Llama
    params: Params
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    mesh: Mesh
    context_length: int | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray) -> jax.Array:
        """fp32 logits (batch, length, vocab) of token ids (batch, length).

        Raises:
            ValueError: rows of different lengths, or an id outside the vocabulary.
        """
        try:
            tokens_BT = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            tokens_BT = np.zeros(0)
        if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu":
            raise ValueError("tokens must be rows of equally many ids: (batch, length) integers")
        if tokens_BT.size and not 0 <= tokens_BT.min() <= tokens_BT.max() < self.config.vocab_size:
            raise ValueError(
                f"a token id is outside the vocabulary of {self.config.vocab_size}: the smallest "
                f"is {tokens_BT.min()}, the largest {tokens_BT.max()}"
            )
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        with jax.set_mesh(self.mesh):
            return _forward(
                self.model, self.params, tokens_BT.astype(np.int32), positions_BT.astype(np.int32)
            )

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        on_text: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Continues one prompt or several; each answer has tokens, text and finish_reason.

        Args:
            prompts: a text, texts, or token ids.
            sampling: how tokens are chosen; or give its fields: temperature=0.8, stop=("\\n",).
            max_length: most tokens of prompt and answer together.
            batch_size: most prompts computed at a time.
            on_text: called with (number of the prompt, new text) as text comes.

        Raises:
            ConfigError: a setting is unknown or out of range.
            ValueError: a prompt is empty, too long or holds an id outside the vocabulary.
        """
        chosen = {**(sampling or SamplingConfig()).model_dump(), **settings}
        with jax.set_mesh(self.mesh):
            return generate(
                self.model,
                self._decoding_params,
                self.tokenizer,
                [prompts] if isinstance(prompts, str) else prompts,
                parse(SamplingConfig, chosen, "sampling"),
                ends=self.end_ids,
                max_length=max_length,
                batch_size=batch_size,
                on_text=on_text,
            )

    @cached_property
    def _decoding_params(self) -> Params:
        """Unstacked on a CPU, where a scan would copy every layer's weights for every token."""
        return unstack(self.params) if jax.default_backend() == "cpu" else self.params


@jax.jit(static_argnums=0)
def _forward(
    model: Llama, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    return model.apply(params, tokens_BT, positions_BT).value


def load(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: MeshConfig = ONE_DEVICE,
    weights: Literal["as_stored", "int8"] = "as_stored",
) -> LanguageModel:
    """A trained model: a run, a checkpoint, a Hugging Face or Meta folder, or a .gguf file.

    Arrays are read one at a time, each device its own part.

    Args:
        path: the file or folder.
        dtype: of parameters, activations and cache.
        mesh: devices to lay the parameters out over; by default the first one holds all.
        weights: int8 rounds every matrix to 8 bits and a scale for each output. A checkpoint that
            was converted so stays so.

    Raises:
        ConfigError, CheckpointError or TokenizerError: saying what is missing or wrong.
    """
    source = open_source(path)
    if source.tokenizer is None:
        raise ConfigError(f"{path} has no tokenizer; put the model's own file there.")
    compute, rules = ComputeConfig(dtype=dtype), PRESETS[mesh.rules]
    model = Llama(source.config, compute, rules)
    devices = make_mesh(mesh.sizes, jax.devices()[:1] if mesh == ONE_DEVICE else None)
    shapes, axes = model.shapes(), model.axes()
    if source.int8 is not None:
        shapes, axes = int8_shapes(shapes), int8_axes(axes)
    params = load_params(source, jnp.dtype(dtype), shardings(shapes, axes, devices, rules))
    if weights == "int8":
        params = quantize(params, consume=True)
    return LanguageModel(
        model, params, source.tokenizer, source.end_ids, devices, source.context_length
    )


def generate_command(config: GenerateConfig) -> int:
    """`generate`: prompts from flags or a JSONL file, answers to the screen or a JSONL file."""
    prompts = list(config.prompts) or _read_prompts(Path(config.prompts_file or ""))
    language_model = load(config.checkpoint, config.dtype, config.mesh)
    console = Console(highlight=False, soft_wrap=True)
    streams = config.stream and len(prompts) == 1 and config.out is None
    if streams:
        console.print(prompts[0], end="", markup=False, style="bold")
    completions = language_model.generate(
        prompts,
        config.sampling,
        on_text=(lambda _, text: console.print(text, end="", markup=False)) if streams else None,
    )
    if config.out is not None:
        _write_answers(Path(config.out), prompts, completions)
        print(f"{len(completions)} answers in {config.out}")
        return 0
    for prompt, completion in zip(prompts, completions, strict=True):
        if not streams:
            console.rule()
            console.print(prompt, end="", markup=False, style="bold")
            console.print(completion.text, end="", markup=False)
        console.print(f"\n({len(completion.tokens)} tokens, {completion.finish_reason})")
    return 0


def _read_prompts(path: Path) -> list[str]:
    """The "prompt" of every line; raises ConfigError naming file and line."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(f'{path}, line {number}: expected {{"prompt": "a text"}}')
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts")
    return prompts


def _write_answers(path: Path, prompts: Sequence[str], completions: Sequence[Completion]) -> None:
    """One JSON line per prompt, in order; the file is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            line = {
                "index": index,
                "prompt": prompt,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.tokens),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
