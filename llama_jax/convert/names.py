"""One table of every tensor: its place in our parameter tree, and its name and layout elsewhere.

Axes are letters: V vocab, D d_model, N heads, K kv heads, H d_head, F d_ff. Merged axes stand side
by side: of a matrix "NH D", rows run over heads and their widths, columns over the model width.
Where the order inside a head matters, its width is written as P rotary pairs of C = 2 numbers. Ours
and Hugging Face's is "CP": pair i is (i, i + H/2). In Meta's and GGUF's files it is "PC": pair i is
(2i, 2i + 1). Reshapes, transposes and permutations all follow from the letters, so each layout is
written once, and reading and writing are one function.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.config import ModelConfig

Format = Literal["llama_jax", "huggingface", "meta", "gguf"]


class Place(NamedTuple):
    """A tensor's name in a format, with a {layer} where every layer has one, and its axes there."""

    name: str
    axes: str


class Tensor(NamedTuple):
    """One tensor of the model, or of each of its layers."""

    path: tuple[str, ...]
    """Keys into our parameter tree."""
    axes: str
    """Our axes, without the leading axis of stacked layers."""
    huggingface: Place
    """In a LlamaForCausalLM checkpoint; matrices are (out, in), as in the other two."""
    meta: Place
    """In a consolidated.pth, once its shards are joined."""
    gguf: Place
    """In a GGUF file of the architecture llama (dimensions are stored in the other order)."""
    shape: tuple[int, ...] | None = None
    """In our tree, of a variant's tensor, which has no names elsewhere; None: as the axes say."""

    @property
    def is_layered(self) -> bool:
        """Whether every layer has one."""
        return self.path[0] == "layers"


# fmt: off
TENSORS = (
    Tensor(
        ("embed",), "V D",
        Place("model.embed_tokens.weight", "V D"),
        Place("tok_embeddings.weight", "V D"),
        Place("token_embd.weight", "V D"),
    ),
    Tensor(
        ("layers", "attention_norm"), "D",
        Place("model.layers.{layer}.input_layernorm.weight", "D"),
        Place("layers.{layer}.attention_norm.weight", "D"),
        Place("blk.{layer}.attn_norm.weight", "D"),
    ),
    Tensor(
        ("layers", "attention", "q"), "D N CP",
        Place("model.layers.{layer}.self_attn.q_proj.weight", "NCP D"),
        Place("layers.{layer}.attention.wq.weight", "NPC D"),
        Place("blk.{layer}.attn_q.weight", "NPC D"),
    ),
    Tensor(
        ("layers", "attention", "k"), "D K CP",
        Place("model.layers.{layer}.self_attn.k_proj.weight", "KCP D"),
        Place("layers.{layer}.attention.wk.weight", "KPC D"),
        Place("blk.{layer}.attn_k.weight", "KPC D"),
    ),
    Tensor(
        ("layers", "attention", "v"), "D K H",
        Place("model.layers.{layer}.self_attn.v_proj.weight", "KH D"),
        Place("layers.{layer}.attention.wv.weight", "KH D"),
        Place("blk.{layer}.attn_v.weight", "KH D"),
    ),
    Tensor(
        ("layers", "attention", "o"), "N H D",
        Place("model.layers.{layer}.self_attn.o_proj.weight", "D NH"),
        Place("layers.{layer}.attention.wo.weight", "D NH"),
        Place("blk.{layer}.attn_output.weight", "D NH"),
    ),
    Tensor(
        ("layers", "feed_forward_norm"), "D",
        Place("model.layers.{layer}.post_attention_layernorm.weight", "D"),
        Place("layers.{layer}.ffn_norm.weight", "D"),
        Place("blk.{layer}.ffn_norm.weight", "D"),
    ),
    Tensor(
        ("layers", "feed_forward", "gate"), "D F",
        Place("model.layers.{layer}.mlp.gate_proj.weight", "F D"),
        Place("layers.{layer}.feed_forward.w1.weight", "F D"),
        Place("blk.{layer}.ffn_gate.weight", "F D"),
    ),
    Tensor(
        ("layers", "feed_forward", "up"), "D F",
        Place("model.layers.{layer}.mlp.up_proj.weight", "F D"),
        Place("layers.{layer}.feed_forward.w3.weight", "F D"),
        Place("blk.{layer}.ffn_up.weight", "F D"),
    ),
    Tensor(
        ("layers", "feed_forward", "down"), "F D",
        Place("model.layers.{layer}.mlp.down_proj.weight", "D F"),
        Place("layers.{layer}.feed_forward.w2.weight", "D F"),
        Place("blk.{layer}.ffn_down.weight", "D F"),
    ),
    Tensor(
        ("final_norm",), "D",
        Place("model.norm.weight", "D"),
        Place("norm.weight", "D"),
        Place("output_norm.weight", "D"),
    ),
    Tensor(
        ("head",), "D V",
        Place("lm_head.weight", "V D"),
        Place("output.weight", "V D"),
        Place("output.weight", "V D"),
    ),
)
# fmt: on

EMBED, HEAD = TENSORS[0], TENSORS[-1]


class Field(NamedTuple):
    """A number of the architecture, and its key in other formats (None: it follows from others)."""

    ours: str
    huggingface: str
    meta: str | None
    gguf: str | None
    """Behind "llama."."""


FIELDS = (
    Field("d_model", "hidden_size", "dim", "embedding_length"),
    Field("n_layers", "num_hidden_layers", "n_layers", "block_count"),
    Field("n_heads", "num_attention_heads", "n_heads", "attention.head_count"),
    Field("n_kv_heads", "num_key_value_heads", "n_kv_heads", "attention.head_count_kv"),
    Field("d_head", "head_dim", None, "attention.key_length"),
    Field("d_ff", "intermediate_size", None, "feed_forward_length"),
    Field("vocab_size", "vocab_size", "vocab_size", "vocab_size"),
    Field("norm_eps", "rms_norm_eps", "norm_eps", "attention.layer_norm_rms_epsilon"),
    Field("rope_theta", "rope_theta", "rope_theta", "rope.freq_base"),
    Field("tie_embeddings", "tie_word_embeddings", None, None),
)

# What any LLaMA may have its own way.
LLAMA = ("rope_scaling", *(field.ours for field in FIELDS))


def variants(config: ModelConfig) -> list[str]:
    """Fields in which a model differs from what LLaMA is, besides its sizes."""
    return [name for name in ModelConfig.model_fields if name not in LLAMA and config.differs(name)]


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """The rows of the table that a model has: a tied one has no head of its own."""
    return TENSORS[:-1] if config.tie_embeddings else TENSORS


def only_ours(path: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """A row for a tensor that other formats do not know."""
    place = Place("/".join(path) + (" {layer}" if path[0] == "layers" else ""), "")
    return Tensor(path, "", place, place, place, shape)


def layers(tensor: Tensor, config: ModelConfig) -> range:
    """The layers that have one of these, in order; of a single tensor just 0."""
    return range(our_shape(tensor, config)[0] if tensor.is_layered else 1)


def entries(
    config: ModelConfig, rows: Sequence[Tensor] | None = None
) -> Iterator[tuple[Tensor, int]]:
    """Every (tensor, layer) of a model, all layers of a tensor together; rows: None for those of
    the table."""
    rows = tensors(config) if rows is None else rows
    return ((row, layer) for row in rows for layer in layers(row, config))


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Axis letter -> length."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.n_heads,
        "K": config.n_kv_heads,
        "H": config.d_head,
        "C": 2,
        "P": config.d_head // 2,
        "F": config.d_ff,
    }


def shape(axes: str, config: ModelConfig) -> tuple[int, ...]:
    """Lengths of merged axes: "NH D" -> (n_heads * d_head, d_model)."""
    sizes = axis_sizes(config)
    return tuple(math.prod(sizes[axis] for axis in group) for group in axes.split())


def our_shape(tensor: Tensor, config: ModelConfig) -> tuple[int, ...]:
    """Shape in our parameter tree: (L, ...) for a layered tensor, whose layers are stacked."""
    if tensor.shape is not None:
        return tensor.shape
    stacked = (config.n_layers,) if tensor.is_layered else ()
    return stacked + shape(tensor.axes, config)


def rearrange(array: np.ndarray, given: str, wanted: str, config: ModelConfig) -> np.ndarray:
    """One tensor (of one layer) from one layout to another: "NCP D" to "D N CP", say.

    A view where the layouts allow one; shapes must already be checked.
    """
    sizes = axis_sizes(config)
    order = given.replace(" ", "")
    apart = array.reshape([sizes[axis] for axis in order])
    turned = apart.transpose([order.index(axis) for axis in wanted.replace(" ", "")])
    return turned.reshape(shape(wanted, config))
