"""What the chat command reads; needs no jax."""

from typing import Literal

from pydantic import Field

from llama_jax.config import MeshConfig, Schema
from llama_jax.generate.settings import SamplingConfig


class ChatConfig(Schema):
    """A conversation in the terminal."""

    checkpoint: str
    """Run folder, checkpoint or Hugging Face folder."""
    format: Literal["llama2", "llama3"] | None = None
    """How dialogs are written; none: as the tokenizer can (llama3 where it has <|eot_id|>)."""
    system: str = ""
    """What the model is told before the conversation (/system changes it)."""
    max_length: int = Field(default=4096, gt=1)
    """Most tokens of the conversation; give what the model was trained for."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=1024)
    """How the next token is chosen."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights, activations and cache."""
    mesh: MeshConfig = MeshConfig(rules="decode")
    """How devices are arranged."""
