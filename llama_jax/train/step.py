"""One training step as a pure function, for any loss.

Every training stage is a loss function given to `make_step`:

    loss_fn(params, batch) -> (total, sums)

total is the loss summed over whatever the batch holds (tokens, pairs), sums are further scalars
summed the same way, and sums["weight"] is what all of them are divided by.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import ModelConfig
from llama_jax.model.llama import Llama
from llama_jax.model.ops.balance import balanced_order
from llama_jax.model.ops.cross_entropy import cross_entropy
from llama_jax.train.optimizer import Optimizer
from sharding.constrain import parts

Batch = dict[str, jax.Array]
Scalars = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Scalars]]


class TrainState(NamedTuple):
    """What changes from step to step, all of it on the devices.

    step: batches consumed (int32); the next one is batch number `step`.
    params: the parameters.
    optimizer: the optimizer's state.
    skipped: updates left out because loss or gradient was not finite (int32).
    skipped_in_row: those since the last update (int32).
    """

    step: Any
    params: Any
    optimizer: Any
    skipped: Any
    skipped_in_row: Any


def init_state(params: Any, optimizer: Optimizer) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def state_axes(param_axes: Any, optimizer: Optimizer) -> TrainState:
    """The tree of `init_state` with a tuple of logical axis names for each array."""
    return TrainState((), param_axes, optimizer.axes, (), ())


def lm_loss(model: Llama, z_loss: float = 0.0) -> LossFn:
    """Next-token cross-entropy in nats, summed over the weighted tokens.

    A mixture of experts adds, for every such token, what its routers lose in a layer on average.
    The batch holds tokens, targets, positions, segments (int32) and weights (fp32), each (B, T).
    """

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, Scalars]:
        devices = parts("seq", model.rules)
        if devices > 1:
            order = balanced_order(batch["tokens"].shape[1], devices)
            batch = {name: x[:, order] for name, x in batch.items()}
        hidden_BTD, _, aux = model.apply(
            params,
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            head="none",
            balanced=devices > 1,
        )
        total, sums = cross_entropy(
            hidden_BTD,
            model.output_weight(params),
            batch["targets"],
            batch["weights"],
            model.compute.loss_chunks,
            z_loss,
        )
        if aux:
            each = sums["weight"] / mixtures(model.config)
            total += aux["router_loss"] * each
            sums |= {name: jax.lax.stop_gradient(value * each) for name, value in aux.items()}
        return total, sums

    return loss


def mixtures(config: ModelConfig) -> int:
    """How many layers are mixtures of experts."""
    return sum(config.layer(depth).experts is not None for depth in range(config.n_layers))


def make_step(
    loss_fn: LossFn, optimizer: Optimizer, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """step(state, batch) -> (state, metrics): one update from one batch.

    The gradient is that of the whole batch, sum over its parts / total weight, in fp32, whatever
    `accumulate` is. If it or the loss is not finite, the update is left out: parameters and
    optimizer state keep every bit, and only the counters move.

    metrics: `loss` (total / weight, or the loss the sums name); the other sums divided by weight;
    `weight`; `grad_norm` before clipping; the optimizer's; `skipped` and `skipped_in_row`.

    Args:
        loss_fn: see the top of this file.
        optimizer: makes the update.
        accumulate: parts computed one after the other; divides the rows of the batch.
    """
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        def compute(part: Batch) -> tuple[tuple[jax.Array, Scalars], Any]:
            values, gradients = gradient_fn(state.params, part)
            return values, jax.tree.map(lambda gradient: gradient.astype(jnp.float32), gradients)

        (total, sums), gradients = _summed(compute, batch, accumulate)
        weight = sums["weight"]
        share = 1 / weight  # a product is fused into its uses, a quotient is a second tree
        gradients = jax.tree.map(lambda gradient: gradient * share, gradients)
        # One bad entry, or one so large that its square overflows, makes the norm infinite or NaN.
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        params, optimizer_state, report = optimizer.update(
            gradients, state.optimizer, state.params, state.step, finite
        )
        missed = 1 - finite.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            skipped=state.skipped + missed,
            skipped_in_row=(state.skipped_in_row + missed) * missed,
        )
        means = {name: value / weight for name, value in sums.items() if name != "weight"}
        metrics = {
            "loss": total / weight,
            **means,
            "weight": weight,
            "grad_norm": norm,
            **report,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
        }
        return state, metrics

    return step


def make_evaluation(loss_fn: LossFn, accumulate: int = 1) -> Callable[[Any, Batch], Scalars]:
    """evaluate(params, batch) -> the sums of the loss function, without a gradient."""

    def evaluate(params: Any, batch: Batch) -> Scalars:
        return _summed(lambda part: loss_fn(params, part)[1], batch, accumulate)

    return evaluate


def _summed(compute: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """compute(part), a tree of arrays, summed over the parts of the batch."""
    if parts == 1:
        return compute(batch)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, compute(part)), None

    cut = jax.tree.map(lambda x: _interleaved(x, parts), batch)
    one_part = jax.tree.map(lambda x: x[0], cut)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, one_part))
    return jax.lax.scan(add, zeros, cut)[0]


def _interleaved(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...), part p taking rows p, p + parts, ...

    Each device holds neighbouring rows of the batch, so every part has rows of every device and
    none of them moves; cut into blocks, a part would lie on a few devices only.
    """
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
