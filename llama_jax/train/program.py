"""The training step of a configuration, with every shape and placement, and nothing allocated.

`train` runs it and `plan` compiles it for devices that are not there: one function, so that what is
planned is what will run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import ConfigError, TrainConfig
from llama_jax.model.attention import check_order, rules_for, wanted
from llama_jax.model.layer import RESIDUAL
from llama_jax.model.llama import LOGITS, Llama
from llama_jax.model.ops.kernels import Kernel, check_able, chosen
from llama_jax.train.optimizer import Optimizer, adamw
from llama_jax.train.step import (
    Batch,
    Scalars,
    TrainState,
    init_state,
    lm_loss,
    make_step,
    state_axes,
)
from sharding.mesh import make_mesh
from sharding.partition import divided_spec, in_host_memory, placed, shardings
from sharding.rules import PRESETS

BATCH_TYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segments": jnp.int32,
    "weights": jnp.float32,
}


class Program(NamedTuple):
    """A step and what it takes.

    state, batch: trees of ShapeDtypeStructs with the shardings the arrays will have.
    step: jitted (state, batch) -> (state, metrics), the old state given up; to be lowered and run
        under `jax.set_mesh(mesh)`. Several processes add to the batch what each wants (`wishes`);
        the sum of each is among the metrics.
    """

    model: Llama
    optimizer: Optimizer
    mesh: Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Any


def make_program(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Program:
    """Lays a run out over devices, by default those of all processes; compiles nothing yet.

    Raises:
        ConfigError: mesh, model and batch do not fit together or do not fit the devices.
    """
    try:
        mesh = make_mesh(config.mesh.sizes, devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rules = rules_for(config.model, config.mesh.rules, mesh.shape)
    check_rows(config, mesh.shape)
    kernel = check_tokens(config, mesh.shape, mesh.devices.flat[0].platform)
    compute = config.compute.model_copy(update={"attention": kernel})
    model = Llama(config.model, compute, rules)
    optimizer = adamw(config.optimizer, config.steps, model.axes())
    state = jax.eval_shape(lambda params: init_state(params, optimizer), model.shapes())
    rows, length = config.data.batch_size, config.data.sequence_length
    batch = {name: jax.ShapeDtypeStruct((rows, length), kind) for name, kind in BATCH_TYPES.items()}
    batch_axes = dict.fromkeys(batch, ("batch", "seq"))
    try:
        state_places = shardings(state, state_axes(model.axes(), optimizer), mesh, rules)
        batch_places = shardings(batch, batch_axes, mesh, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.optimizer.offload:
        state_places = state_places._replace(optimizer=in_host_memory(state_places.optimizer))
    train_step = make_step(lm_loss(model, config.z_loss), optimizer, config.accumulate)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        wanted = {name: jnp.sum(batch[name]) for name in batch.keys() - BATCH_TYPES.keys()}
        state, metrics = train_step(state, {name: batch[name] for name in BATCH_TYPES})
        return state, metrics | wanted

    everywhere = NamedSharding(mesh, PartitionSpec())
    return Program(
        model,
        optimizer,
        mesh,
        placed(state, state_places),
        placed(batch, batch_places),
        jax.jit(step, donate_argnums=0, out_shardings=(state_places, everywhere)),
    )


def check_rows(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Refuses a batch whose parts the devices cannot share.

    Args:
        config: the run.
        sizes: mesh axis -> devices along it.

    Raises:
        ConfigError: naming the numbers.
    """
    rows = config.data.batch_size // config.accumulate
    shares = PRESETS[config.mesh.rules].parts("batch", sizes)
    if rows % shares:
        raise ConfigError(
            f"data.batch_size / accumulate ({rows}) must be a multiple of mesh.data x mesh.fsdp "
            f"x mesh.expert ({shares} on these devices), which split the batch"
        )


def check_tokens(config: TrainConfig, sizes: Mapping[str, int], platform: str) -> Kernel:
    """The kernel of attention, once it is known that the devices can share the tokens of a row.

    Args:
        config: the run.
        sizes: mesh axis -> devices along it.
        platform: of the devices.

    Raises:
        ConfigError: naming the numbers.
    """
    rules = PRESETS[config.mesh.rules]
    rows, length = config.data.batch_size // config.accumulate, config.data.sequence_length
    devices = rules.parts("seq", sizes)
    wants = wanted(config.model)
    kernel = chosen(config.compute.attention, platform, devices, wants)
    stream = (rows, length, config.model.d_model)
    logits = (rows, length // config.compute.loss_chunks, config.model.vocab_size)
    try:
        check_able(kernel, length, devices, wants)
        check_order(config.model, devices)
        divided_spec(stream, RESIDUAL, sizes, rules, "the stream between blocks")
        divided_spec(logits, LOGITS, sizes, rules, "the logits of one of compute.loss_chunks")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return kernel
