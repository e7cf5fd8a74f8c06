"""What `convert` and `verify` are told; imports no jax, so that `--help` answers at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llama_jax.config import Schema, positional


class ConvertConfig(Schema):
    """Turn a model into another format, bit for bit where its type allows."""

    source: str = positional()
    """A run, a checkpoint, a Hugging Face folder, Meta's folder, or a .gguf file."""
    destination: str = positional()
    """Folder (gguf: file) to write; must not exist, and is complete or absent afterwards."""
    to: Literal["llama_jax", "huggingface", "meta", "gguf"]
    """Format to write."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "q8_0"] | None = None
    """Type to write; none keeps the stored one. int8 (llama_jax): 8 bits a weight and a scale for
    each output of a matrix. q8_0 (gguf): 8 bits a weight and a scale for 32."""
    shards: int = Field(default=1, ge=1)
    """meta: number of consolidated.NN.pth files, one for each of the GPUs that will read them."""
    context_length: int | None = Field(default=None, gt=0)
    """Positions the model was trained for, where the source does not say (Meta's do not)."""
    tokenizer: str | None = None
    """Tokenizer file or folder, instead of the source's."""

    @model_validator(mode="after")
    def _settings_suit_the_format(self) -> Self:
        only = {"int8": "llama_jax", "q8_0": "gguf"}.get(self.dtype or "", self.to)
        if only != self.to:
            raise ValueError(
                f"dtype {self.dtype} is of {only}; {self.to} takes float32, bfloat16 or float16"
            )
        if self.shards != 1 and self.to != "meta":
            raise ValueError(f"shards is read only with to: meta, not {self.to}")
        return self


class VerifyConfig(Schema):
    """Compare two models: architecture, tokenizer, every tensor, and the logits of a prompt."""

    source: str = positional()
    """The model as it was, in any format."""
    destination: str = positional()
    """The model as it was converted."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest difference of logits that passes where tensors are quantised and cannot be equal."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which logits are computed; memory for one model in it is needed."""
