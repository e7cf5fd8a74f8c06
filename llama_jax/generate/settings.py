"""What generation reads: how tokens are chosen, and the generate command. Needs no jax."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llama_jax.config import MeshConfig, Schema

ALTERNATIVES = 5  # most likeliest tokens whose log-probabilities can be asked for


class SamplingConfig(Schema):
    """How the next token is chosen. In a prompts file, every line may have settings of its own."""

    max_new_tokens: int = Field(default=128, gt=0)
    """Most tokens to add to a prompt."""
    temperature: float = Field(default=0.6, ge=0)
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Keep the likeliest tokens up to and including the one that reaches this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, makes tokens of prompt and answer less likely to come again (CTRL)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens once for each time that the answer holds them."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """No sequence of this many tokens comes twice; 0 allows all."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the draws: same seed, same text."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer (and are cut from it)."""
    n: int = Field(default=1, ge=1)
    """Answers to each prompt."""
    num_beams: int = Field(default=1, ge=1, le=64)
    """Above 1: beam search with this many beams, which draws nothing; n of them are given."""
    logprobs: int | None = Field(default=None, ge=0, le=ALTERNATIVES)
    """Report the log-probability of each token, and of this many of the likeliest beside it."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if "" in self.stop:
            raise ValueError("a stop string is empty: remove it, or give it characters")
        if self.num_beams > 1 and self.n > self.num_beams:
            raise ValueError(f"n ({self.n}) must be at most num_beams ({self.num_beams})")
        return self


class GenerateConfig(Schema):
    """Batch generation: prompts from flags or a JSONL file, answers to the screen or a file."""

    checkpoint: str
    """Run, checkpoint, Hugging Face or Meta folder, or .gguf file."""
    prompts: tuple[str, ...] = ()
    """Texts to continue; or one name that ends in .jsonl: a file with a "prompt" or "messages" in
    each line, and settings of its own where it wants any."""
    out: str | None = None
    """JSONL to write, a line for each prompt, in order; the same command continues a stopped one.
    Without it, answers are printed."""
    stream: bool = True
    """Print text as it comes (one prompt, one answer, no out)."""
    sampling: SamplingConfig = SamplingConfig()
    """How the next token is chosen, where a line does not say."""
    chat_format: Literal["llama2", "llama3"] | None = None
    """How messages are written; none: as the tokenizer can."""
    batch_size: int = Field(default=32, ge=1)
    """Most answers computed at a time."""
    max_length: int | None = Field(default=None, gt=1)
    """Most tokens of a prompt and its answer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and, but for int8, weights."""
    weights: Literal["as_dtype", "int8"] = "as_dtype"
    """int8: every matrix in int8, with a scale for each output."""
    cache: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of keys and values; auto is that of dtype, but float32 on a CPU."""
    draft: str | None = None
    """A smaller model of the same tokenizer that proposes tokens (speculative decoding)."""
    draft_tokens: int = Field(default=4, ge=1, le=32)
    """Tokens that the draft proposes at a time."""
    mesh: MeshConfig = MeshConfig(rules="decode")
    """How devices are arranged."""

    @model_validator(mode="after")
    def _prompts_are_given(self) -> Self:
        if not self.prompts:
            raise ValueError("give prompts: texts, or the name of a .jsonl file")
        return self

    @property
    def prompts_file(self) -> str | None:
        """The file that `prompts` names, if it does."""
        is_file = len(self.prompts) == 1 and self.prompts[0].endswith(".jsonl")
        return self.prompts[0] if is_file else None
