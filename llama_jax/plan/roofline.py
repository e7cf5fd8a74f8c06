"""How long a step takes at least: arithmetic, memory and interconnect, each at its full speed.

A bound, not a promise: kernels do not run at the peak, and networks have latency. The estimate that
stands beside it divides the arithmetic by what a published run reached on the same chip.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import TrainConfig
from llama_jax.model.attention import rules_for
from llama_jax.model.count import cache_bytes_per_token
from llama_jax.plan.hardware import GPUS_PER_NODE, Topology
from llama_jax.plan.memory import BF16, MASTER, MOMENTS, Memory
from sharding.collectives import BETWEEN, Collective


class Times(NamedTuple):
    """Seconds of one step on one device.

    compute: executed FLOPs at the peak. memory: least traffic of its memory.
    interconnect: within slices or nodes; network: between them.
    """

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self._asdict(), key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """All at the same time: no step is shorter."""
        return max(self)

    @property
    def serial(self) -> float:
        """What is sent is waited for: neither links nor network hide behind arithmetic."""
        return max(self.compute, self.memory) + self.interconnect + self.network

    def calibrated(self, share: float) -> float:
        """With arithmetic at a share of the peak that a published run reached."""
        return max(self.compute / share, self.memory, self.interconnect, self.network)


class Wire(NamedTuple):
    """Bytes that a device sends in a step, and what that takes: within slices or nodes, between."""

    interconnect_bytes: float
    network_bytes: float
    interconnect_seconds: float
    network_seconds: float


def wire(found: Sequence[Collective], topology: Topology, devices: Sequence[Any]) -> Wire:
    """The traffic of a compiled step.

    Args:
        found: its collectives.
        topology: the machine.
        devices: of the mesh, in its order: partition n is devices[n].
    """
    amounts, seconds = [0.0, 0.0], [0.0, 0.0]
    for one in found:
        members = [devices[number] for number in one.group if number < len(devices)]
        places = [place_of(device) for device in members]
        slices = [getattr(device, "slice_index", 0) for device in members]
        outside = one.kind.endswith(BETWEEN)
        crosses = outside or _crosses(topology, places, slices)
        speed = topology.chip.network if outside else topology.bandwidth(places, slices)
        amount = one.executions * one.wire_bytes
        amounts[crosses] += amount
        seconds[crosses] += amount / speed
    return Wire(*amounts, *seconds)


def place_of(device: Any) -> tuple[int, ...]:
    """Coordinates of a TPU on its torus; (node, number) of a GPU."""
    coordinates = getattr(device, "coords", None)
    return tuple(coordinates) if coordinates else divmod(device.id, GPUS_PER_NODE)


def _crosses(topology: Topology, places: Sequence[tuple[int, ...]], slices: Sequence[int]) -> bool:
    if topology.chip.is_gpu:
        return len({place[0] for place in places}) > 1
    return len(set(slices)) > 1


def training_wire(
    config: TrainConfig, sizes: Mapping[str, int], held: int, topology: Topology
) -> Wire:
    """The same in closed form: what the rules make XLA send.

    Weights are gathered over fsdp x context in the compute type for the forward pass, the backward
    pass and, where it is recomputed, once more; fp32 gradients are summed over these and data (a
    TPU's compiler writes all-reduces); each layer's sums over tensor are two in every such pass,
    and its keys and values are gathered over context.

    Args:
        config: the run.
        sizes: of the mesh axes.
        held: parameters that a device holds.
        topology: the machine.
    """
    wide = BF16 if config.compute.dtype == "bfloat16" else MASTER
    passes = 2 if config.compute.remat == "none" else 3
    split = sizes["fsdp"] * sizes["context"]
    gathered = held * split  # what a device computes with
    shares = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    rows = config.data.batch_size // config.accumulate // shares
    tokens = rows * config.data.sequence_length
    summed = tokens // sizes["context"] * config.model.d_model * wide
    rules = rules_for(config.model, config.mesh.rules, sizes)
    heads = rules.parts("act_kv_heads", sizes)
    keys_and_values = tokens * cache_bytes_per_token(config.model, wide) // heads
    amounts = {
        ("fsdp", "context"): config.accumulate * passes * gathered * wide * _ring(split),
        ("data", "fsdp", "context"): config.accumulate
        * 2
        * (gathered * _ring(split) + held * _ring(sizes["data"]))
        * MASTER,
        ("context",): config.accumulate * passes * keys_and_values * _ring(sizes["context"]),
        ("tensor",): config.accumulate
        * passes
        * config.model.n_layers
        * 4
        * summed
        * _ring(sizes["tensor"]),
    }
    parts, seconds = [0.0, 0.0], [0.0, 0.0]
    for axes, amount in amounts.items():
        places, slices = _places(axes, sizes, topology)
        crosses = _crosses(topology, places, slices)
        parts[crosses] += amount
        seconds[crosses] += amount / topology.bandwidth(places, slices)
    return Wire(*parts, *seconds)


def _ring(members: int) -> float:
    """Share of an array that passes through each member of a ring."""
    return (members - 1) / members


def _places(
    axes: Sequence[str], sizes: Mapping[str, int], topology: Topology
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Where the group of device 0 along some mesh axes lies, were devices numbered in the order of
    the mesh: that of the torus, its last axis first."""
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    group = numbers[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel().tolist()
    per_slice = topology.devices // topology.slices
    slices = [n // per_slice for n in group]
    if topology.chip.is_gpu:
        return [divmod(n, GPUS_PER_NODE) for n in group], slices
    chips = [n % per_slice * math.prod(topology.shape) // per_slice for n in group]
    places = np.stack(np.unravel_index(chips, topology.shape), axis=-1).tolist()
    return [tuple(place) for place in places], slices


def training_traffic(config: TrainConfig, sizes: Mapping[str, int], memory: Memory) -> float:
    """Bytes that a device's memory moves in a training step, at the least.

    Optimizer and gradients are read and written once; gathered weights are written and read in each
    pass; what a layer computes is written and read once in each pass, and scores, which reference
    attention keeps, with it.
    """
    held = memory.kinds["parameters"] / MASTER
    update = held * (2 * (MASTER + MOMENTS) + 2 * MASTER * config.accumulate)
    passes = 2 if config.compute.remat == "none" else 3
    wide = BF16 if config.compute.dtype == "bfloat16" else MASTER
    weights = 2 * passes * held * sizes["fsdp"] * sizes["context"] * wide
    layers = config.model.n_layers * memory.kinds["working set"] * 2 * passes
    loss = config.compute.loss_chunks * memory.kinds["logits"] * 2
    return update + config.accumulate * (weights + layers + loss)


def decoding_traffic(memory: Memory) -> float:
    """Bytes of a decoding step: all parameters and all slots of the cache are read."""
    return memory.kinds["parameters"] + memory.kinds["cache"]
