"""Silent corruption: one flipped bit in one replica is found, and its device named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.train.checksum import difference, make_checksums
from sharding.mesh import make_mesh

SPECS = {"matrix": P("fsdp"), "norm": P(), "half": P(None, "fsdp"), "step": P()}


def values():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    half = draw(6, 8).astype(jnp.bfloat16)
    return {"matrix": draw(8, 5), "norm": draw(5), "half": half, "step": np.int32(7)}


def placed(sizes, flipped=None):
    """The arrays on a mesh; flipped: (name, number of the device, bit) of one buffer."""
    devices = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    state = {}
    for name, value in values().items():
        place = NamedSharding(mesh, SPECS[name])
        parts = []
        for number, device in enumerate(mesh.devices.flat):
            index = place.devices_indices_map(np.shape(value))[device]
            part = np.array(value[index] if np.ndim(value) else value)
            if flipped and flipped[:2] == (name, number):
                part.reshape(-1).view(np.uint8)[flipped[2] // 8] ^= 1 << (flipped[2] % 8)
            parts.append(jax.device_put(part, device))
        state[name] = jax.make_array_from_single_device_arrays(np.shape(value), place, parts)
    return mesh, state


def found(sizes, flipped=None):
    mesh, state = placed(sizes, flipped)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    sums, groups = make_checksums(shapes, mesh)
    return difference(np.asarray(jax.jit(sums)(state)), groups, mesh)


@pytest.mark.parametrize(
    "sizes", [{"data": 4, "fsdp": 1}, {"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 4}]
)
def test_healthy_devices_agree(sizes):
    assert found(sizes) is None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bit", [0, 7, 13, 30])
def test_any_flipped_bit_is_found_and_its_device_named(name, bit):
    """Three replicas are right, so the fourth is wrong."""
    text = found({"data": 4, "fsdp": 1}, (name, 2, bit))
    right = "device 0 (process 0), 1 (process 0), 3 (process 0)"
    assert text == f"device 2 (process 0) holds other bits than {right}"


@pytest.mark.parametrize("name", ["matrix", "half"])
def test_two_replicas_are_both_named(name):
    """Devices 1 and 3 hold the second part; the first part is compared apart from it."""
    text = found({"data": 2, "fsdp": 2}, (name, 3, 40))
    expected = "device 1 (process 0), 3 (process 0) hold different bits, and one of them is wrong"
    assert text == expected


def test_what_is_split_over_all_devices_cannot_be_compared():
    """With fsdp alone only what every device holds can."""
    assert found({"data": 1, "fsdp": 4}, ("matrix", 1, 3)) is None
    assert "device 1 (process 0) holds other bits" in found({"data": 1, "fsdp": 4}, ("norm", 1, 3))


def test_one_device_has_nothing_to_compare():
    mesh, state = placed({"data": 1, "fsdp": 1})
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert make_checksums(shapes, mesh) is None
