"""Meshes: how devices are arranged along named axes. No other file constructs one."""

import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices along named axes; work runs on them inside `with jax.set_mesh(mesh):`.

    The axis that communicates most comes last: it gets neighbours on the interconnect. Where the
    devices lie in several slices, joined by a slower network, the first axes cross that network.

    The axes are of type Auto: XLA completes the layouts that `partition` and `constrain` state.
    (jax.make_mesh would make them Explicit, and every operation would have to state its own.)

    Args:
        sizes: axis name -> number of devices along it, outermost first; one may be -1, which takes
            what the others leave.
        devices: the devices to arrange, all of which are used; by default those of all processes.

    Raises:
        ValueError: a size is neither positive nor -1, two are -1, or the sizes do not multiply to
            the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(resolve(sizes, len(devices)).values())
    arranged = _arrange(shape, devices)
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def resolve(sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """The sizes in order, -1 replaced by what is left of the devices; raises as `make_mesh`."""
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"mesh axis {name} is {size}: give a positive size, or -1 for all remaining devices"
            )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {' and '.join(open_axes)} are -1: only one may be")

    known = {name: size for name, size in sizes.items() if size != -1}
    product = math.prod(known.values())
    text = " x ".join(f"{name}={size}" for name, size in known.items())
    if open_axes and n_devices % product:
        raise ValueError(
            f"the mesh axes {text} multiply to {product}, which does not divide the {n_devices} "
            f"devices; change a size, so that {open_axes[0]}=-1 can take what is left"
        )
    if not open_axes and n_devices != product:
        raise ValueError(
            f"the mesh axes {text} multiply to {product}, but there are {n_devices} devices; "
            "change a size, or set one of them to -1 for all remaining devices"
        )
    return {name: n_devices // product if size == -1 else size for name, size in sizes.items()}


def machine() -> str:
    """What computes here, in words: `4 x TPU v5 lite`; of a CPU, which may pose as several devices,
    its cores."""
    if jax.default_backend() == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of this shape, in an order that suits their interconnect."""
    # Only TPUs and GPUs have slices; those of a GPU cluster are its NVLink domains.
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = _across_slices(shape, n_slices)
    within = tuple(size // slices for size, slices in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def _across_slices(shape: tuple[int, ...], n_slices: int) -> tuple[int, ...]:
    """Spreads the slices over the axes, the first axes taking as many as divide them."""
    across = []
    for size in shape:
        across.append(math.gcd(size, n_slices))
        n_slices //= across[-1]
    return tuple(across)
