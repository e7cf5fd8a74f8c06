"""What `plan` is told; imports no jax, so that `--help` answers at once."""

from typing import Literal

from pydantic import Field

from llama_jax.config import TrainConfig


class PlanConfig(TrainConfig):
    """A training run as `train` reads it, and the machine it is planned for."""

    out: str = ""
    """Not used: nothing is written."""
    tokenizer: str = ""
    """Not used: nothing is read."""
    topology: str
    """Chips to plan for: a slice (v5p:4x4x4), its name in the shop (v5p-128, v5litepod-16), or a
    number of GPUs (h100:8)."""
    slices: int = Field(default=1, ge=1)
    """Such slices, joined by the data-centre network; the first mesh axes cross it."""
    decode: bool = False
    """Plan one step of decoding with bf16 parameters, instead of training."""
    batch: int = Field(default=16, ge=1)
    """With decode: rows decoded at a time."""
    context: int = Field(default=2048, ge=1)
    """With decode: slots of each row's cache."""
    cache: Literal["bfloat16", "int8"] = "bfloat16"
    """With decode: type of keys and values."""
    compiled: bool = True
    """Compile the real step for the topology; false answers at once, in closed form."""
    search: bool = False
    """Try meshes, rematerialisation and parts of the batch, and rank what fits; of mesh only
    context is then read, and neither compute.remat nor accumulate."""
    candidates: int = Field(default=3, ge=0)
    """With search: how many of the best are compiled."""
    tokens: float | None = Field(default=None, gt=0)
    """Tokens of the whole run (2e12); none: steps x batch."""
    watts: float | None = Field(default=None, gt=0)
    """Power of a chip; none: the maker's figure, where there is one."""
    pue: float = Field(default=1.1, ge=1)
    """Energy of the data centre for each unit that a chip uses (LLaMA, table 15: 1.1)."""
    carbon: float = Field(default=0.385, ge=0)
    """kg of CO2 for each kWh (LLaMA, table 15: the US average, 0.385)."""
    as_json: bool = Field(default=False, alias="json")
    """Print JSON instead of a report."""
