"""Where layers lie in the tree of parameters.

Layers that are alike are stacked, on a leading axis. Where a pattern makes them differ, each place
of the pattern has a stack of its own, under its number: what a scan over periods takes is there
without a copy. Unstacked, `layers` is a tuple of one tree per layer.
"""

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def by_place(layers: Any) -> tuple[Any, ...]:
    """The stacks of a tree, one for each place of the pattern."""
    if "0" not in layers:
        return (layers,)
    return tuple(layers[str(place)] for place in range(len(layers)))


def joined(stacks: tuple[Any, ...]) -> Any:
    """The inverse of `by_place`."""
    return stacks[0] if len(stacks) == 1 else {str(place): x for place, x in enumerate(stacks)}


def unstack(params: Params) -> Params:
    """The same parameters with `layers` as a tuple of per-layer trees (for unrolled programs)."""
    return {**params, "layers": split_layers(params["layers"])}


def split_layers(layers: Any) -> tuple[Any, ...]:
    """Stacked layers as L trees, in the order of the model."""
    return in_turn(tuple(_split(stack) for stack in by_place(layers)))


def in_turn(places: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    """The layers of every place of the pattern, in the order of the model."""
    count, period = sum(map(len, places)), len(places)
    return tuple(places[depth % period][depth // period] for depth in range(count))


def stack(params: Params, period: int = 1) -> Params:
    """The inverse of `unstack`, for a pattern of so many places."""
    layers = params["layers"]
    stacks = tuple(
        jax.tree.map(lambda *a: jnp.stack(a), *layers[place::period]) for place in range(period)
    )
    return {**params, "layers": joined(stacks)}


def _split(stack: Any) -> tuple[Any, ...]:
    """The gradient of a split is one concatenation, not L scatters."""
    leaves, tree = jax.tree.flatten(stack)
    count = leaves[0].shape[0]
    parts = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    return tuple(
        jax.tree.unflatten(tree, [part[i].squeeze(0) for part in parts]) for i in range(count)
    )
