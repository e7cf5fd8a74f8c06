"""What `evaluate` is told; imports no jax, so that `--help` answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llama_jax.config import MeshConfig, Schema


class EvaluateConfig(Schema):
    """How well a model predicts a text."""

    checkpoint: str
    """A run, a checkpoint, a Hugging Face or Meta folder, or a .gguf file."""
    perplexity: str
    """File to predict: a text, or JSON lines or Parquet with a document in each row."""
    text_field: str = "text"
    """Key (JSON lines) or column (Parquet) that holds the text."""
    window: int | None = Field(default=None, ge=1)
    """Tokens the model sees at once; none: what it was trained for, at most 2048."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from one window to the next: all but the first tokens of a document are predicted from
    at least window - stride others, where there are so many; none: half a window."""
    extrapolate: bool = False
    """Allow windows longer than the model was trained for."""
    batch_size: int = Field(default=8, ge=1)
    """Windows computed at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and, but for int8, weights."""
    weights: Literal["as_dtype", "int8"] = "as_dtype"
    """int8: every matrix in int8, with a scale for each output."""
    cache: Literal["none", "float32", "bfloat16", "int8"] = "none"
    """Type of a key-value cache to predict through, as generation does; none: without one."""
    out: str | None = None
    """JSON file to write (an existing one is replaced)."""
    as_json: bool = Field(default=False, alias="json")
    """Print JSON instead of a table."""
    mesh: MeshConfig = MeshConfig(rules="decode")
    """How devices are arranged."""

    @model_validator(mode="after")
    def _windows_touch(self) -> Self:
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(
                f"stride ({self.stride}) must be at most window ({self.window}), or tokens between "
                "two windows would be left out"
            )
        return self
