"""`llama_jax.load(path)`: a trained model as one object, from files of any format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ComputeConfig, ConfigError, MeshConfig, ModelConfig, parse
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import load_params
from llama_jax.generate.settings import GenerateConfig, SamplingConfig
from llama_jax.generate.speculative import Draft
from llama_jax.generate.text import Completion, OnDone, OnText, Prompt, generate
from llama_jax.model.attention import rules_for
from llama_jax.model.layout import for_decoding, int8_axes, int8_shapes, quantize
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params
from llama_jax.tokenizer import Tokenizer
from sharding.mesh import make_mesh
from sharding.partition import shardings

ONE_DEVICE = MeshConfig(data=1, rules="decode")


@dataclass(frozen=True)
class LanguageModel:
    """Parameters, what they mean, and where they lie.

    model: the architecture as a function; config is its ModelConfig.
    params: in the compute dtype or int8, laid out over `mesh` and for decoding on its platform
        (model.layout).
    tokenizer: text to ids and back.
    end_ids: ids that end a text.
    context_length: positions it was trained for; None where the files do not say.
    """

    model: Llama
    params: Params
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    mesh: Mesh
    context_length: int | None

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

    @property
    def chat_end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer in a dialog: a base model's own ends lack the end of a turn."""
        return tuple(dict.fromkeys((*self.end_ids, *self.tokenizer.eos_ids)))

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
                With n answers to a prompt, they follow each other.
            max_length: most tokens of prompt and answer together.
            batch_size: most answers computed at a time.
            on_text: called with (number of the answer, new text) as text comes.

        Raises:
            ConfigError: a setting is unknown or out of range.
            ValueError: a prompt is empty, too long or holds an id outside the vocabulary.
        """
        chosen = parse(
            SamplingConfig, {**(sampling or SamplingConfig()).model_dump(), **settings}, "sampling"
        )
        texts = [prompts] if isinstance(prompts, str) else prompts
        show = (lambda i, k, text: on_text(i * chosen.n + k, text)) if on_text else None
        config = GenerateConfig(
            checkpoint="", prompts=("",), max_length=max_length, batch_size=batch_size
        )
        asked = [Prompt(text, chosen, self.end_ids, i) for i, text in enumerate(texts)]
        return [one for group in self.answer(asked, config, on_text=show) for one in group]

    def answer(
        self,
        prompts: Sequence[Prompt],
        settings: GenerateConfig,
        on_text: OnText | None = None,
        on_done: OnDone | None = None,
        draft: "LanguageModel | None" = None,
    ) -> list[list[Completion]]:
        """Continues every prompt, each with settings of its own: see generate.text.generate.

        Raises:
            ConfigError: the draft has another tokenizer.
        """
        proposer = None
        if draft is not None:
            if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise ConfigError(
                    f"the draft's tokenizer ({draft.tokenizer.path}) is not the model's "
                    f"({self.tokenizer.path}); a draft proposes token ids, so they must be one"
                )
            proposer = Draft(draft.model, draft.params, settings.draft_tokens)
        with jax.set_mesh(self.mesh):
            return generate(
                self.model,
                self.params,
                self.tokenizer,
                prompts,
                on_text=on_text,
                on_done=on_done,
                max_length=settings.max_length,
                batch_size=settings.batch_size,
                cache_dtype=None if settings.cache == "auto" else settings.cache,
                draft=proposer,
            )


@jax.jit(static_argnums=0)
def _forward(
    model: Llama, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    return model.apply(params, tokens_BT, positions_BT).value


def load(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: MeshConfig = ONE_DEVICE,
    *,
    weights: Literal["as_dtype", "int8"] = "as_dtype",
    rows: int = 8,
) -> LanguageModel:
    """A trained model: a run, a checkpoint, a Hugging Face or Meta folder, or a .gguf file.

    Arrays are read one at a time, each device its own part.

    Args:
        path: the file or folder.
        dtype: of parameters, activations and cache.
        mesh: devices to lay the parameters out over; by default the first one holds all.
        weights: int8 rounds every matrix to 8 bits and a scale for each output. A checkpoint that
            was converted so is loaded so.
        rows: how many rows will be decoded at a time, which a CPU's layout is chosen for.

    Raises:
        ConfigError, CheckpointError or TokenizerError: saying what is missing or wrong.
    """
    source = open_source(path)
    if source.tokenizer is None:
        raise ConfigError(f"{path} has no tokenizer; put the model's own file there.")
    devices = make_mesh(mesh.sizes, jax.devices()[:1] if mesh == ONE_DEVICE else None)
    rules = rules_for(source.config, mesh.rules, devices.shape)
    model = Llama(source.config, ComputeConfig(dtype=dtype), rules)
    shapes, axes = model.shapes(), model.axes()
    if source.int8 is not None:
        shapes, axes = int8_shapes(shapes), int8_axes(axes)
    # Rounded to int8 from what is stored: to bf16 first would double the error of large weights.
    read_as = source.dtype if weights == "int8" else jnp.dtype(dtype)
    params = load_params(source, read_as, shardings(shapes, axes, devices, rules))
    with jax.set_mesh(devices):
        if weights == "int8":
            params = quantize(params, consume=True)
        params = for_decoding(params, rows, consume=True)
    return LanguageModel(
        model, params, source.tokenizer, source.end_ids, devices, source.context_length
    )
