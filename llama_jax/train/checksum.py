"""Silent corruption: what several devices hold alike is compared, bit by bit, every so often.

Each device adds up the bits of what it holds, every word times an odd number of its own, modulo
2^32; a single flipped bit always changes such a sum. One gather of these sums, a few bytes for each
device, shows which device differs. All arrays are read once, and nothing is written.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sharding.partition import on_devices

WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of an element

Axes = frozenset[str]
Checksums = Callable[[Any], jax.Array]


def make_checksums(state: Any, mesh: Mesh) -> tuple[Checksums, tuple[Axes, ...]] | None:
    """(sums, groups); None where no two devices hold the same.

    sums(state) -> (devices, groups) uint32: for each device, in the order of the mesh, a sum for
    each group of arrays. A group are the arrays split over the same mesh axes: its sum must be
    equal on devices that differ only along other axes.

    Args:
        state: tree of ShapeDtypeStructs with NamedShardings.
        mesh: the devices.
    """
    leaves: dict[Axes, list[int]] = defaultdict(list)
    several = {axis for axis, size in mesh.shape.items() if size > 1}
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state)]
    for number, spec in enumerate(specs):
        if split_axes := frozenset(_axes(spec)) & several:
            if split_axes != several:
                leaves[split_axes].append(number)
        elif several:
            leaves[frozenset()].append(number)
    if not leaves:
        return None

    def local(arrays: list[jax.Array]) -> jax.Array:
        sums = [_joined([_checksum(arrays[n]) for n in numbers]) for numbers in leaves.values()]
        return jax.lax.all_gather(jnp.stack(sums), mesh.axis_names)

    # check_vma: what should be equal on all devices may differ here, which is the point.
    everywhere = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
    )
    return lambda state: everywhere(jax.tree.leaves(on_devices(state))), tuple(leaves)


def difference(sums: np.ndarray, groups: tuple[Axes, ...], mesh: Mesh) -> str | None:
    """Which devices hold other bits than their equals, in words; None where all agree.

    Args:
        sums: (devices, groups), of `make_checksums`.
        groups: likewise.
        mesh: the devices.
    """
    for column, split in enumerate(groups):
        alike: Mapping[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for number, place in enumerate(np.ndindex(mesh.devices.shape)):
            at = zip(mesh.axis_names, place, strict=True)
            shard = tuple(index for axis, index in at if axis in split)
            alike[shard][number] = int(sums[number, column])
        for values in alike.values():
            common, votes = Counter(values.values()).most_common(1)[0]
            wrong = [n for n, value in values.items() if value != common]
            if wrong and votes > len(values) / 2:
                right = _names(mesh, [n for n in values if n not in wrong])
                return f"{_names(mesh, wrong)} holds other bits than {right}"
            if wrong:
                return f"{_names(mesh, list(values))} hold different bits, and one of them is wrong"
    return None


def _names(mesh: Mesh, numbers: list[int]) -> str:
    devices = [mesh.devices.flat[number] for number in numbers]
    names = [f"{d.id} (process {d.process_index})" for d in devices[:8]]
    return f"device {', '.join(names)}{' ...' if len(devices) > 8 else ''}"


def _axes(spec: PartitionSpec) -> set[str]:
    """Mesh axes that split an array."""
    return {
        axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)
    }


def _checksum(x: jax.Array) -> jax.Array:
    """uint32: the words of an array, each times its own odd number, added modulo 2^32."""
    words = jax.lax.bitcast_convert_type(x, WORD[x.dtype.itemsize]).reshape(-1).astype(jnp.uint32)
    odd = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(words * odd, dtype=jnp.uint32)


def _joined(sums: list[jax.Array]) -> jax.Array:
    """One sum of several, each times its own odd number."""
    return _checksum(jnp.stack(sums))
