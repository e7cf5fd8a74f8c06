"""The steps that are planned, with abstract arguments: those of training and of generation."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import (
    ComputeConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from llama_jax.generate.decode import Decoder, Rows, State
from llama_jax.model.attention import rules_for
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.plan.memory import declared
from llama_jax.plan.settings import PlanConfig
from llama_jax.train.optimizer import adamw
from llama_jax.train.program import BATCH_TYPES, make_program
from llama_jax.train.step import init_state, lm_loss, make_step
from sharding.mesh import make_mesh
from sharding.partition import placed, shardings

ENDS = 4  # ids that end a row; costs nothing
DECODED = jnp.bfloat16


class Step(NamedTuple):
    """A jitted function, the mesh it is laid out over, and ShapeDtypeStructs to trace it with."""

    function: Any
    mesh: Mesh
    arguments: tuple[Any, ...]


def training_step(config: TrainConfig, devices: Sequence[jax.Device]) -> Step:
    """What `train` runs: the very same function.

    Raises:
        ConfigError: mesh, model and batch do not fit together or do not fit the devices.
    """
    program = make_program(config, devices)
    return Step(program.step, program.mesh, (program.state, program.batch))


def decoding_step(config: PlanConfig, devices: Sequence[jax.Device]) -> Step:
    """What `generate` runs for each token: one pass of `Decoder.advance`, with stacked layers.

    Raises:
        ConfigError: mesh, model and rows do not fit together or do not fit the devices.
    """
    mesh_config = decoding_mesh(config, len(devices))
    try:
        mesh = make_mesh(mesh_config.sizes, devices)
        rules = rules_for(config.model, mesh_config.rules, mesh.shape)
        model = Llama(config.model, ComputeConfig(dtype="bfloat16"), rules)
        decoder = Decoder(model, config.model.vocab_size)
        params = _as_decoded(decoder.model.shapes())
        params = placed(params, shardings(params, decoder.model.axes(), mesh, rules))
        cache = jax.eval_shape(
            lambda: KVCache.init(config.model, config.batch, config.context, config.cache)
        )
        rows = jax.eval_shape(lambda: Rows.free(config.batch, config.context, ENDS))
        row_axes = jax.tree.map(lambda x: ("batch", *(None,) * (x.ndim - 1)), rows)
        state = State(
            placed(rows, shardings(rows, row_axes, mesh, rules)),
            placed(cache, shardings(cache, cache.axes, mesh, rules)),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    number = jax.ShapeDtypeStruct((), jnp.int32)
    # A method that jax has wrapped takes its object as the first, static argument.
    return Step(Decoder.advance, mesh, (decoder, params, state, number, number))


def decoding_mesh(config: PlanConfig, devices: int) -> MeshConfig:
    """The mesh of a configuration that is made for decoding; else heads over as many devices as
    share them without a rest, and the rows over the others."""
    if config.mesh.rules == "decode":
        return config.mesh
    heads = {
        size
        for _, shape, axes in declared(config.model)
        for size, axis in zip(shape, axes, strict=True)
        if axis in ("heads", "kv_heads")
    }
    return MeshConfig(data=-1, fsdp=1, tensor=math.gcd(devices, *heads), rules="decode")


def training_jaxpr(config: TrainConfig) -> Any:
    """The jaxpr of the step for one row of the batch, on no devices: enough to count FLOPs."""
    compute = config.compute.model_copy(update={"attention": "xla"})
    return _training_jaxpr(config.model, compute, config.data.sequence_length)


@cache
def _training_jaxpr(model_config: ModelConfig, compute: ComputeConfig, length: int) -> Any:
    model = Llama(model_config, compute)
    optimizer = adamw(OptimizerConfig(), 10**6, model.axes())  # has no matrix products
    state = jax.eval_shape(lambda params: init_state(params, optimizer), model.shapes())
    batch = {name: jax.ShapeDtypeStruct((1, length), kind) for name, kind in BATCH_TYPES.items()}
    step = make_step(lm_loss(model), optimizer)
    return jax.make_jaxpr(step)(state, batch).jaxpr


def decoding_jaxpr(config: PlanConfig) -> Any:
    """The jaxpr of a decoding step for one row, on no devices."""
    decoder = Decoder(Llama(config.model, ComputeConfig(dtype="bfloat16")), config.model.vocab_size)
    params = _as_decoded(decoder.model.shapes())
    cache = jax.eval_shape(lambda: KVCache.init(config.model, 1, config.context, config.cache))
    rows = jax.eval_shape(lambda: Rows.free(1, config.context, ENDS))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    advance = jax.make_jaxpr(Decoder.advance, static_argnums=0)
    return advance(decoder, params, State(rows, cache), number, number).jaxpr


def _as_decoded(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DECODED), shapes)
