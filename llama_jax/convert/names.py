"""One table of every tensor: its place in our parameter tree, and its name and layout elsewhere.

Axes are letters: V vocab, D d_model, N heads, K kv heads, H d_head, F d_ff. A matrix that another
format stores with merged axes is written "NH D": rows run over heads and their widths, columns over
the model width. Reshape and transpose follow from the letters, so each layout is written once.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.config import ModelConfig


class Tensor(NamedTuple):
    """One tensor: a single one, or one per layer where the Hugging Face name has a {layer}."""

    path: tuple[str, ...]
    """Keys into our parameter tree."""
    axes: str
    """Our axes, without the leading axis of stacked layers."""
    hugging_face: str
    """Name in a Hugging Face LlamaForCausalLM checkpoint."""
    hugging_face_axes: str
    """Its axes there, merged ones side by side. Matrices are stored (out, in)."""

    @property
    def is_layered(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.hugging_face


# Rotary pairs are (i, i + H/2) in both formats, so queries and keys need no permutation.
TENSORS = (
    Tensor(("embed",), "VD", "model.embed_tokens.weight", "V D"),
    Tensor(("layers", "attention_norm"), "D", "model.layers.{layer}.input_layernorm.weight", "D"),
    Tensor(
        ("layers", "attention", "q"), "DNH", "model.layers.{layer}.self_attn.q_proj.weight", "NH D"
    ),
    Tensor(
        ("layers", "attention", "k"), "DKH", "model.layers.{layer}.self_attn.k_proj.weight", "KH D"
    ),
    Tensor(
        ("layers", "attention", "v"), "DKH", "model.layers.{layer}.self_attn.v_proj.weight", "KH D"
    ),
    Tensor(
        ("layers", "attention", "o"), "NHD", "model.layers.{layer}.self_attn.o_proj.weight", "D NH"
    ),
    Tensor(
        ("layers", "feed_forward_norm"),
        "D",
        "model.layers.{layer}.post_attention_layernorm.weight",
        "D",
    ),
    Tensor(
        ("layers", "feed_forward", "gate"), "DF", "model.layers.{layer}.mlp.gate_proj.weight", "F D"
    ),
    Tensor(
        ("layers", "feed_forward", "up"), "DF", "model.layers.{layer}.mlp.up_proj.weight", "F D"
    ),
    Tensor(
        ("layers", "feed_forward", "down"), "FD", "model.layers.{layer}.mlp.down_proj.weight", "D F"
    ),
    Tensor(("final_norm",), "D", "model.norm.weight", "D"),
    Tensor(("head",), "DV", "lm_head.weight", "V D"),
)


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """The rows of the table that a model has: a tied one has no head of its own."""
    return tuple(t for t in TENSORS if not (config.tie_embeddings and t.path == ("head",)))


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Axis letter -> length."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.n_heads,
        "K": config.n_kv_heads,
        "H": config.d_head,
        "F": config.d_ff,
    }


def hugging_face_names(tensor: Tensor, config: ModelConfig) -> Iterator[str]:
    """The tensor's name, or its name in each layer, in order."""
    layers = range(config.n_layers) if tensor.is_layered else range(1)
    return (tensor.hugging_face.format(layer=layer) for layer in layers)


def our_shape(tensor: Tensor, config: ModelConfig) -> tuple[int, ...]:
    """Shape in our parameter tree: (L, ...) for a layered tensor, whose layers are stacked."""
    sizes = axis_sizes(config)
    stacked = (config.n_layers,) if tensor.is_layered else ()
    return stacked + tuple(sizes[axis] for axis in tensor.axes)


def hugging_face_shape(tensor: Tensor, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one stored tensor (of one layer) in a Hugging Face checkpoint."""
    sizes = axis_sizes(config)
    groups = tensor.hugging_face_axes.split()
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)


def from_hugging_face(stored: np.ndarray, tensor: Tensor, config: ModelConfig) -> np.ndarray:
    """A view of one stored tensor (of one layer) with our axes; shapes must already be checked."""
    sizes = axis_sizes(config)
    order = tensor.hugging_face_axes.replace(" ", "")
    apart = stored.reshape([sizes[axis] for axis in order])
    return apart.transpose([order.index(axis) for axis in tensor.axes])
