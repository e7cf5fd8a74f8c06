"""Placement of whole trees: parameters, optimizer state, caches, batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.rules import Rules


def shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules) -> Any:
    """Where each array of a tree lies: the tree of `shapes` with a NamedSharding for every leaf.

    Args:
        shapes: any tree of arrays or ShapeDtypeStructs.
        axes: the same tree with a tuple of logical axis names (or None) per leaf, one for each
            dimension: () for a scalar.
        mesh: the devices.
        rules: which mesh axes split which logical axis.

    Raises:
        ValueError: the trees differ, or a leaf cannot be split as the rules say; the message names
            the leaf by its path, the number, the axes and the remedies.
    """
    tree: Any  # a PyTreeDef, whose methods jax leaves untyped
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    try:
        # Guided by the tree of shapes: axis names are tuples, which alone would look like nodes.
        names = tree.flatten_up_to(axes)
    except ValueError as error:
        raise ValueError(f"the trees of shapes and of axis names differ: {error}") from error
    specs = [
        divided_spec(leaf.shape, leaf_axes, mesh.shape, rules, _name(path))
        for (path, leaf), leaf_axes in zip(leaves, names, strict=True)
    ]
    return tree.unflatten([NamedSharding(mesh, spec) for spec in specs])


def placed(shapes: Any, places: Any) -> Any:
    """The tree of shapes as ShapeDtypeStructs that lie where the tree of shardings says."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def in_host_memory(places: Any) -> Any:
    """The shardings of a tree as `shardings` made them, with the arrays, not the scalars, in the
    memory of the hosts."""
    return jax.tree.map(
        lambda place: place.with_memory_kind("pinned_host") if place.spec else place, places
    )


def on_devices(tree: Any) -> Any:
    """A tree, inside jit, with every array in the memory of the devices."""
    return jax.device_put(tree, jax.memory.Space.Device)


def on_hosts(tree: Any) -> Any:
    """A tree, inside jit, with every array in the memory of the hosts."""
    return jax.device_put(tree, jax.memory.Space.Host)


def divided_spec(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh_sizes: Mapping[str, int],
    rules: Rules,
    name: str,
) -> PartitionSpec:
    """The PartitionSpec of one array, once its dimensions are known to divide.

    In a compiled program XLA would pad what does not, which costs memory and time in silence.

    Args:
        shape: the array's.
        axes: one logical axis, or None, for each dimension.
        mesh_sizes: mesh axis -> number of devices along it.
        rules: which mesh axes split which logical axis.
        name: what the array is called in an error.

    Raises:
        ValueError: naming the array, the number, the axes and the remedies.
    """
    if not _are_names(axes) or len(axes) != len(shape):
        raise ValueError(
            f"{name} has shape {tuple(shape)} but logical axes {axes!r}; "
            "give a tuple with one name, or None, for each dimension"
        )
    spec = rules.spec(axes)
    for dimension, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        split_by = rules.mesh_axes(axis)
        missing = [mesh_axis for mesh_axis in split_by if mesh_axis not in mesh_sizes]
        if missing:
            raise ValueError(
                f"the sharding rules split '{axis}' over mesh axis '{missing[0]}', which the mesh "
                f"({', '.join(mesh_sizes)}) does not have; give the mesh that axis (its size may "
                "be 1), or change the rule"
            )
        parts = rules.parts(axis, mesh_sizes)
        if size % parts:
            sizes = " x ".join(f"{mesh_axis}={mesh_sizes[mesh_axis]}" for mesh_axis in split_by)
            raise ValueError(
                f"{name}: dimension {dimension} ({axis}) is {size}, which {sizes} of the mesh does "
                f"not divide. Use a mesh whose {' x '.join(split_by)} divides {size}, "
                f"a multiple of {parts} in place of {size}, or rules that leave {axis} whole"
            )
    return spec


def _are_names(axes: Any) -> bool:
    return isinstance(axes, tuple) and all(axis is None or isinstance(axis, str) for axis in axes)


def _name(path: tuple[Any, ...]) -> str:
    """layers/attention/k, say."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
