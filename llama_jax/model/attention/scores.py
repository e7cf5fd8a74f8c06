"""What variants whose scores are those of `attend` have in common."""

import flax.linen as nn
import jax
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.model.ops.attend import Scoring, alibi_slopes
from llama_jax.model.param import param

# Fields of ModelConfig that say how queries see keys and what becomes of their scores.
SCORES = frozenset({"window", "chunk", "keep_first", "sinks", "score_cap"})


def scoring(config: ModelConfig, scale: float | None = None) -> Scoring:
    """How products of queries and keys become scores; `scale` as for Scoring."""
    slopes = alibi_slopes(config.n_heads) if config.position == "alibi" else None
    return Scoring(scale, config.score_cap, slopes)


def sinks(module: nn.Module, config: ModelConfig) -> jax.Array | None:
    """The sink of every head (N), a parameter that begins as a score of 0; None without."""
    if not config.sinks:
        return None
    return param(module, "sinks", nn.initializers.zeros, (config.n_heads,), ("heads",))


def area_seen(config: ModelConfig, length: int) -> int:
    """Twice the pairs of a query and a key that it sees in a row of `length`, half the diagonal
    counted: the area of a triangle, less what lies beyond the reach, and what is kept of it."""
    area, reach = length**2, config.reach
    if reach is None:
        return area
    tokens = np.arange(length)
    if config.window:
        area -= max(0, length - config.window) ** 2
        beyond = tokens - config.window + 1
    else:
        whole, rest = divmod(length, reach)
        area = whole * reach**2 + rest**2
        beyond = tokens // reach * reach
    return area + 2 * int(np.clip(beyond, 0, config.keep_first).sum())
