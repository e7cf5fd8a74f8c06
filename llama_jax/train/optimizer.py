"""AdamW with a warmed-up schedule, as LLaMA is trained (arXiv 2307.09288, section 2.2).

Rates and decays are arguments of the update, never part of its state: a resumed run obeys the
configuration it is given now. The schedule is a function of the step alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import OptimizerConfig
from sharding.partition import on_devices, on_hosts

Arrays = tuple[jax.Array, ...]


class Optimizer(NamedTuple):
    """An optimizer as plain functions.

    init: params -> state.
    update: (gradients, state, params, step, wanted) -> (params, state, metrics), where step counts
        the updates before this one and metrics are scalars by name. Unless `wanted` (a bool on the
        device), parameters and state keep every bit.
    axes: the tree of `init`'s state, with a tuple of logical axis names for each array.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
    axes: Any


def adamw(config: OptimizerConfig, steps: int, axes: Any) -> Optimizer:
    """AdamW (arXiv 1711.05101) on gradients clipped to a global norm.

    With `config.offload` the moments are in the hosts' memory, before and after; those of one layer
    at a time are on the devices.

    Args:
        config: rates, decays, clipping and schedule.
        steps: updates of the whole run, which the schedule spans.
        axes: the tree of the parameters, with a tuple of logical axis names for each array; it
            decides which arrays decay.

    Its metric is `learning_rate`.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    decays, is_stacked = decayed(axes), stacked(axes)

    def update(
        gradients: Any, state: Any, params: Any, step: jax.Array, wanted: jax.Array | bool = True
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        rate = learning_rate(config, steps, step)
        # A product, not optax's quotient: XLA would keep quotients as a second tree of gradients.
        factor = jnp.minimum(1.0, config.clip_norm / optax.tree.norm(gradients))

        def move(decays: bool, gradient: jax.Array, *old: jax.Array) -> Arrays:
            param, first, second = old
            moments = optax.ScaleByAdamState(state.count, first, second)
            direction, moments = adam.update(gradient * factor, moments)
            pull = config.weight_decay * param if decays else 0.0
            param = (param - rate * (direction + pull)).astype(param.dtype)
            new = (param, moments.mu, moments.nu)
            return tuple(jnp.where(wanted, x, y) for x, y in zip(new, old, strict=True))

        def move_from_host(is_stacked: bool, decays: bool, *arrays: jax.Array) -> Arrays:
            def move_some(gradient: jax.Array, param: jax.Array, *moments: jax.Array) -> Arrays:
                param, *moved = move(decays, gradient, param, *on_devices(moments))
                return param, *on_hosts(moved)

            return _by_layer(move_some, *arrays) if is_stacked else move_some(*arrays)

        trees = (decays, gradients, params, state.mu, state.nu)
        if config.offload:
            moved = jax.tree.map(move_from_host, is_stacked, *trees)
        else:
            moved = jax.tree.map(move, *trees)
        params, mu, nu = jax.tree.transpose(
            jax.tree.structure(params), jax.tree.structure((0, 0, 0)), moved
        )
        count = jnp.where(wanted, optax.safe_increment(state.count), state.count)
        return params, optax.ScaleByAdamState(count, mu, nu), {"learning_rate": rate}

    return Optimizer(adam.init, update, optax.ScaleByAdamState(count=(), mu=axes, nu=axes))


def _by_layer(move: Callable[..., Arrays], gradient: jax.Array, *arrays: jax.Array) -> Arrays:
    """move(gradient, *arrays) of one layer after the other, written over the arrays: what it brings
    to the devices is there for one layer only."""

    def body(layer: jax.Array, arrays: Arrays) -> Arrays:
        parts = [jax.lax.dynamic_slice_in_dim(x, layer, 1) for x in (gradient, *arrays)]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, part, layer, 0)
            for x, part in zip(arrays, move(*parts), strict=True)
        )

    return jax.lax.fori_loop(0, gradient.shape[0], body, arrays)


def decayed(axes: Any) -> Any:
    """The tree of parameters with True for each matrix: two axes or more besides `layers`."""
    return _by_axes(lambda names: len([name for name in names if name != "layers"]) >= 2, axes)


def stacked(axes: Any) -> Any:
    """The tree of parameters with True for each array that holds all layers."""
    return _by_axes(lambda names: names[0] == "layers", axes)


def _by_axes(test: Callable[[tuple[str, ...]], bool], axes: Any) -> Any:
    return jax.tree.map(test, axes, is_leaf=lambda node: isinstance(node, tuple))


def learning_rate(config: OptimizerConfig, steps: int, step: jax.Array | int) -> jax.Array:
    """The rate (fp32) of the update that `step` updates came before.

    Warmup rises from zero, so that update number `warmup_steps` is the first at the peak. The last
    of the `steps` updates has final_fraction of the peak; later ones keep it.
    """
    number = jnp.asarray(step, jnp.float32) + 1
    warmup = config.warmup_steps
    warmed = jnp.minimum(1.0, number / warmup) if warmup else 1.0
    final = config.final_fraction
    past_warmup = jnp.clip((number - warmup) / (steps - warmup), 0.0, 1.0)
    match config.schedule:
        case "cosine":
            level = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * past_warmup))
        case "linear":
            level = 1 - (1 - final) * past_warmup
        case "constant":
            level = jnp.ones(())
        case "wsd":  # warmup, stable, decay (arXiv 2404.06395, section 4), falling linearly
            falling = config.decay_fraction * steps
            level = 1 - (1 - final) * jnp.clip((number - steps + falling) / falling, 0.0, 1.0)
    return config.peak_lr * warmed * level
