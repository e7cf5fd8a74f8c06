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


class Optimizer(NamedTuple):
    """An optimizer as plain functions.

    init: params -> state.
    update: (gradients, state, params, step) -> (params, state, metrics), where step counts the
        updates before this one and metrics are scalars by name.
    axes: the tree of `init`'s state, with a tuple of logical axis names for each array.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, dict[str, jax.Array]]]
    axes: Any


def adamw(config: OptimizerConfig, steps: int, axes: Any) -> Optimizer:
    """AdamW (arXiv 1711.05101) on gradients clipped to a global norm.

    Args:
        config: rates, decays, clipping and schedule.
        steps: updates of the whole run, which the schedule spans.
        axes: the tree of the parameters, with a tuple of logical axis names for each array; it
            decides which arrays decay.

    Its metric is `learning_rate`.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    decays = decayed(axes)

    def update(gradients: Any, state: Any, params: Any, step: jax.Array) -> tuple[Any, Any, dict]:
        rate = learning_rate(config, steps, step)
        # A product, not optax's quotient: XLA would keep quotients as a second tree of gradients.
        factor = jnp.minimum(1.0, config.clip_norm / optax.tree.norm(gradients))
        clipped = jax.tree.map(lambda gradient: gradient * factor, gradients)
        directions, state = adam.update(clipped, state)

        def move(param: jax.Array, direction: jax.Array, decay: bool) -> jax.Array:
            pull = config.weight_decay * param if decay else 0.0
            return (param - rate * (direction + pull)).astype(param.dtype)

        params = jax.tree.map(move, params, directions, decays)
        return params, state, {"learning_rate": rate}

    return Optimizer(adam.init, update, optax.ScaleByAdamState(count=(), mu=axes, nu=axes))


def decayed(axes: Any) -> Any:
    """The tree of parameters with True for each matrix: two axes or more besides `layers`."""
    return jax.tree.map(
        lambda names: len([name for name in names if name != "layers"]) >= 2,
        axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


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
