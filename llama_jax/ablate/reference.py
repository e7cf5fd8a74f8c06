"""The model in numpy, in float64, token by token and head by head: what every variant must compute.

Each variant of attention, each feed-forward layer and the mixture of experts bring their own
definition along; here they are put together (arXiv 2302.13971, section 2.2).
"""

from typing import Any

import jax
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.model import feed_forward, moe
from llama_jax.model.attention import ATTENTION, plain
from llama_jax.model.stack import by_place


def logits(config: ModelConfig, params: Any, ids: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one document (T), from stacked parameters."""
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    stacks = by_place(weights["layers"])
    x, lent = weights["embed"][ids], None
    for depth in range(config.n_layers):
        c, (turn, place) = config.layer(depth), divmod(depth, len(stacks))
        layer = jax.tree.map(lambda w: w[turn], stacks[place])  # noqa: B023
        normed = plain.rms_norm(x, layer["attention_norm"], c.norm_eps)
        attention = ATTENTION[c.attention]
        y, lent = attention.reference(c, layer["attention"], normed, depth, lent)
        x = x + y
        if not c.parallel_block:
            normed = plain.rms_norm(x, layer["feed_forward_norm"], c.norm_eps)
        kind = feed_forward if c.experts is None else moe
        x = x + kind.reference(c, layer["feed_forward"], normed)
    head = weights["embed"].T if config.tie_embeddings else weights["head"]
    return plain.rms_norm(x, weights["final_norm"], config.norm_eps) @ head
