"""Memory of a device in closed form: by kind, and by tensor with the settings that shrink it.

State is exact: it is the tree that training holds, divided by the rules. What the compiler keeps
besides is estimated from what the backward pass must have; the compiled peak decides.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax

from llama_jax.config import ConfigError, ModelConfig, TrainConfig
from llama_jax.model.attention import rules_for
from llama_jax.model.cache import KVCache
from llama_jax.model.layer import RESIDUAL
from llama_jax.model.llama import LOGITS, Llama
from llama_jax.plan.settings import PlanConfig
from sharding.partition import divided_spec
from sharding.rules import Rules

MASTER, MOMENTS, BF16 = 4, 8, 2  # bytes: an fp32 number, two of them, one in bf16
LESS_STATE = "a larger mesh.fsdp or mesh.tensor"
LESS_MOMENTS = f"{LESS_STATE}, or optimizer.offload"
LESS_ROWS = "a smaller data.batch_size or a larger accumulate"
LESS_KEPT = f"compute.remat: full, compute.remat_offload, {LESS_ROWS}"


class Tensor(NamedTuple):
    """Something large on one device: its name, bytes, and which settings would shrink it."""

    name: str
    bytes: int
    remedy: str


class Memory(NamedTuple):
    """Bytes of one device.

    kinds: what for -> bytes. The working set of a layer and the logits are not there at one time.
    tensors: the largest first.
    host: bytes besides, in the memory of its host.
    moved: bytes that go to the host and come back in a step, counted once.
    """

    kinds: dict[str, int]
    tensors: tuple[Tensor, ...]
    host: int = 0
    moved: int = 0

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        sometimes = ("working set", "logits")
        always = sum(size for kind, size in self.kinds.items() if kind not in sometimes)
        return always + max(self.kinds.get(kind, 0) for kind in sometimes)


def local(shape: Any, axes: Any, sizes: Mapping[str, int], rules: Rules, name: str = "") -> int:
    """Elements of an array that one device holds.

    Raises:
        ConfigError: the mesh does not divide it.
    """
    try:
        divided_spec(shape, axes, sizes, rules, name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return math.prod(
        size // rules.parts(axis, sizes) for size, axis in zip(shape, axes, strict=True)
    )


def parameters_by_name(model: Llama, sizes: Mapping[str, int]) -> dict[str, int]:
    """Parameter -> elements that one device holds."""
    assert model.rules
    return {
        name: local(shape, axes, sizes, model.rules, name)
        for name, shape, axes in declared(model.config)
    }


@cache
def declared(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]:
    """Name, shape and logical axes of every parameter."""
    model = Llama(config)
    tree: Any
    leaves, tree = jax.tree_util.tree_flatten_with_path(model.shapes())
    return tuple(
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, axes)
        for (path, leaf), axes in zip(leaves, tree.flatten_up_to(model.axes()), strict=True)
    )


def training_memory(config: TrainConfig, sizes: Mapping[str, int]) -> Memory:
    """What a training step holds on a device of a mesh with these axis sizes.

    Raises:
        ConfigError: the mesh does not divide the model or the batch.
    """
    rules = rules_for(config.model, config.mesh.rules, sizes)
    model = Llama(config.model, config.compute, rules)
    held = parameters_by_name(model, sizes)
    count = sum(held.values())
    copies = 2 if config.accumulate > 1 else 1  # the sum, and what one part adds to it
    rows, length = config.data.batch_size // config.accumulate, config.data.sequence_length
    tokens = local((rows, length), ("batch", "seq"), sizes, rules, "the batch")
    wide = BF16 if config.compute.dtype == "bfloat16" else MASTER

    widths = _layer_widths(config, sizes, rules)
    kept = {"input": widths["input"]}
    if config.compute.remat == "named":
        kept |= {name: widths[name] for name in config.compute.remat_save}
    if config.compute.remat == "none":
        kept = widths
    layers = config.model.n_layers
    saved = {name: layers * tokens * width * wide for name, width in kept.items()}
    sent = sum(layers * tokens * widths[name] * wide for name in config.compute.remat_offload)
    moments = count * MOMENTS
    on_device = 0 if config.optimizer.offload else MOMENTS
    # The last of four blocks of queries sees every key; a kernel keeps no scores.
    block = tokens // 4 * widths["scores"] * 8 // 5
    working = tokens * sum(widths.values()) * wide + block * MASTER
    logits = _logits(config, sizes, rules, wide)

    tensors = [
        *(
            Tensor(
                f"{kind} {name}", size * each, LESS_MOMENTS if kind == "optimizer" else LESS_STATE
            )
            for kind, each in (
                ("parameters", MASTER),
                ("optimizer", on_device),
                ("gradients", MASTER * copies),
            )
            for name, size in held.items()
        ),
        *(
            Tensor(f"kept by every layer: {name}", size, LESS_KEPT)
            for name, size in saved.items()
            if name != "input"
        ),
        Tensor("kept by every layer: its input", saved["input"], LESS_ROWS),
        Tensor("one layer's attention scores (fp32)", block * MASTER, LESS_ROWS),
        Tensor("logits of one chunk", logits, "a larger compute.loss_chunks"),
    ]
    kinds = {
        "parameters": count * MASTER,
        "optimizer": count * on_device,
        "gradients": count * MASTER * copies,
        "activations": sum(saved.values()),
        "working set": working,
        "logits": logits,
    }
    return Memory(
        kinds,
        tuple(sorted(tensors, key=lambda tensor: -tensor.bytes)),
        host=sent + moments - count * on_device,
        moved=sent * config.accumulate + moments - count * on_device,
    )


def _layer_widths(config: TrainConfig, sizes: Mapping[str, int], rules: Rules) -> dict[str, int]:
    """What the backward pass of one layer needs, in numbers per token of a device.

    Scores are those of four blocks of queries, each against the keys up to its end: 5/8 of them;
    none where a kernel computes attention. Between blocks a token is on one device of `tensor`.
    """
    model, length = config.model, config.data.sequence_length
    scores = length * 5 // 8 if config.compute.attention == "xla" else 0
    stream = local((length, model.d_model), RESIDUAL[1:], sizes, rules)
    stream //= local((length,), ("seq",), sizes, rules)

    def width(count: int, axis: str) -> int:
        return local((count,), (axis,), sizes, rules)

    queries = width(model.n_heads, "act_heads") * model.d_head
    keys = width(model.n_kv_heads, "act_kv_heads") * model.d_head
    experts = model.experts.per_token if model.experts else 1
    inner = width(model.d_ff, "act_mlp") * experts
    return {
        "input": stream,
        "attention norm": stream,
        "query": queries,
        "key": keys,
        "value": keys,
        "scores": width(model.n_heads, "act_heads") * scores,
        "attended": queries,
        "attention_out": stream,
        "feed-forward norm": stream,
        "gate": inner,
        "up": inner,
        "activated": inner,
    }


def _logits(config: TrainConfig, sizes: Mapping[str, int], rules: Rules, wide: int) -> int:
    """A chunk's logits and their gradient, and the head: gathered, and its gradient before it is
    summed over the devices."""
    rows = config.data.batch_size // config.accumulate
    chunk = config.data.sequence_length // config.compute.loss_chunks
    shape = (rows, chunk, config.model.vocab_size)
    logits = local(shape, LOGITS, sizes, rules, "the logits")
    head = config.model.d_model * local((config.model.vocab_size,), ("vocab",), sizes, rules)
    return (logits + head) * (MASTER + wide)


def decoding_memory(config: PlanConfig, sizes: Mapping[str, int], rules: Rules) -> Memory:
    """What a decoding step holds on a device of a mesh with these axis sizes.

    Raises:
        ConfigError: the mesh does not divide the model or the rows.
    """
    held = parameters_by_name(Llama(config.model, rules=rules), sizes)
    slabs = jax.eval_shape(
        lambda: KVCache.init(config.model, config.batch, config.context, config.cache)
    )
    tree: Any
    leaves, tree = jax.tree.flatten(slabs)
    stored = sum(
        local(leaf.shape, axes, sizes, rules, "the cache") * leaf.dtype.itemsize
        for leaf, axes in zip(leaves, tree.flatten_up_to(slabs.axes), strict=True)
    )
    shape = (config.batch, config.model.vocab_size)
    # As the head makes them, and whole along the vocabulary, which sampling reduces over.
    logits = local(shape, ("batch", "act_vocab"), sizes, rules, "the logits")
    logits = (logits + local(shape, ("batch", None), sizes, rules)) * MASTER
    fewer = "a smaller batch or context, cache: int8, or more devices"
    tensors = [
        *(
            Tensor(f"parameters {n}", size * BF16, "a larger mesh.tensor")
            for n, size in held.items()
        ),
        Tensor("keys and values", stored, fewer),
        Tensor("logits", logits, "a smaller batch"),
    ]
    kinds = {"parameters": sum(held.values()) * BF16, "cache": stored, "logits": logits}
    return Memory(kinds, tuple(sorted(tensors, key=lambda tensor: -tensor.bytes)))
