"""Parameters and their logical axes: declared together, told apart here and nowhere else.

Inside the modules a parameter travels in a box that carries its axis names; `split` opens all boxes
and gives two plain trees, arrays and names.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.model.ops.product import Weight

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


class Boxed(struct.PyTreeNode, nn.meta.AxisMetadata):
    """An array with one logical axis name per dimension.

    Flax's own `Partitioned` constrains the array to the mesh when it is read; here the names wait
    for the rules table instead.
    """

    value: Any
    axes: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The array."""
        return self.value

    def replace_boxed(self, val: Any) -> "Boxed":
        """The same axes around another array."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Boxed":
        """Required by Flax's transformations; layers are stacked by `stack_boxes` instead."""
        raise TypeError("boxes are stacked by stack_boxes, not by Flax")

    remove_axis = add_axis


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan_in): outputs as large as inputs."""
    return nn.initializers.normal(stddev=scale * fan_in**-0.5)


def box(init: Initializer, key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> Boxed:
    """A new fp32 parameter in its box."""
    return Boxed(init(key, shape, jnp.float32), axes)


def param(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> Any:
    """Declares a parameter of a Linen module: name, distribution, shape and axes on one line.

    Where a weight in a layout of model.ops.weight has been given, it is returned as it is.
    """
    given = module.get_variable("params", name)
    if isinstance(given, Weight):
        return given
    return module.param(name, lambda key: box(init, key, shape, axes))


def stack_boxes(init: Callable[[jax.Array], Any], keys: jax.Array) -> Any:
    """One tree of boxes with a leading `layers` axis from an initializer and one key per layer."""
    stacked = jax.vmap(init)(keys)
    return jax.tree.map(
        lambda b: b.replace(axes=("layers", *b.axes)),
        stacked,
        is_leaf=lambda x: isinstance(x, Boxed),
    )


def split(boxes: Any) -> tuple[Any, Any]:
    """Opens every box: (tree of arrays, same tree of axis-name tuples)."""
    is_box = lambda x: isinstance(x, Boxed)  # noqa: E731
    return (
        jax.tree.map(lambda b: b.value, boxes, is_leaf=is_box),
        jax.tree.map(lambda b: b.axes, boxes, is_leaf=is_box),
    )
