"""Chips, the slices they are sold in, and how fast groups of them can talk. Imports no jax.

Figures are the makers': Google Cloud's page of each TPU version, NVIDIA's datasheets. What was not
published is said to be an assumption beside the number.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llama_jax.config import ConfigError

GIB = 2**30
SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
SLICES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
GPUS_PER_NODE = 8


class Calibration(NamedTuple):
    """A published training run, and what it says about a chip.

    run: what was run, and where it is published.
    mfu: as published.
    recomputed: executed FLOPs over model FLOPs of its rematerialisation, by our arithmetic.
    """

    run: str
    mfu: float
    recomputed: float

    @property
    def share(self) -> float:
        """Of the peak, counting all FLOPs it executed."""
        return self.mfu * self.recomputed


@dataclass(frozen=True)
class Chip:
    """One device as jax sees it.

    name: as in `v5p:4x4x4`. sold_as: what else its slices are called.
    flops: peak dense bf16 FLOP/s.
    memory: bytes that a program may use: on a TPU the compiler's own limit.
    memory_bandwidth: bytes/s of its memory.
    links: bytes/s that it can send over all its links to neighbours.
    network: bytes/s of its share of the data-centre network.
    watts: power while training; None where the maker gives none.
    calibration: a published run, or None.
    source: of the figures.
    """

    name: str
    sold_as: tuple[str, ...]
    flops: float
    memory: int
    memory_bandwidth: float
    links: float
    network: float
    watts: float | None
    calibration: Calibration | None
    source: str
    cores_in_name: int = 1  # v4-32 counts TensorCores, two to a chip
    largest: tuple[int, ...] = ()  # of a 3-D torus; () for a 2-D one

    @property
    def is_gpu(self) -> bool:
        """Whether it is sold in nodes of eight on NVLink."""
        return self.name.startswith("h")

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The slices it is sold in, smallest first; none for GPUs, which come in any number."""
        if self.is_gpu:
            return ()
        return tuple(_cubes(self.largest)) if self.largest else SLICES_2D


def _cubes(largest: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Slices of a 3-D torus: parts of a 4x4x4 cube, then whole cubes side by side."""
    sides = [range(4, most + 1, 4) for most in largest]
    whole = [(a, b, c) for a in sides[0] for b in sides[1] for c in sides[2] if a <= b <= c]
    yield from SMALL_3D
    yield from sorted(whole, key=lambda shape: (math.prod(shape), shape[2]))


MAXTEXT = "MaxText, Llama 2 70B"
CHIPS = (
    Chip(
        "v4",
        (),
        flops=275e12,
        memory=int(30.75 * GIB),
        memory_bandwidth=1228e9,
        links=300e9,
        network=3.125e9,  # assumed: that of v5e
        watts=192,  # the largest that was measured
        calibration=Calibration(f"{MAXTEXT} on v4-128", 0.57, 4 / 3),
        source="Google Cloud, TPU v4 (arXiv 2304.01433, table 4); network assumed",
        cores_in_name=2,
        largest=(12, 16, 16),
    ),
    Chip(
        "v5e",
        ("v5litepod",),
        flops=197e12,
        memory=int(15.75 * GIB),
        memory_bandwidth=819e9,
        links=200e9,
        network=3.125e9,
        watts=None,
        calibration=Calibration(f"{MAXTEXT} on v5e-256, qkv_proj offloaded", 0.57, 1.30),
        source="Google Cloud, TPU v5e",
    ),
    Chip(
        "v5p",
        (),
        flops=459e12,
        memory=int(95.74 * GIB),
        memory_bandwidth=2765e9,
        links=600e9,
        network=6.25e9,
        watts=None,
        calibration=Calibration(f"{MAXTEXT} on v5p, save_dot_except_mlpwi", 0.654, 1.19),
        source="Google Cloud, TPU v5p",
        cores_in_name=2,
        largest=(16, 16, 24),
    ),
    Chip(
        "v6e",
        (),
        flops=918e12,
        memory=int(31.25 * GIB),
        memory_bandwidth=1638e9,
        links=400e9,
        network=12.5e9,
        watts=None,
        calibration=Calibration(f"{MAXTEXT} on v6e-256, qkv_proj offloaded", 0.438, 1.30),
        source="Google Cloud, TPU v6e",
    ),
    Chip(  # a device is one of the chip's two TensorCores, with half of all it has
        "tpu7x",
        ("v7x",),
        flops=2307e12 / 2,
        memory=int(94.75 * GIB),
        memory_bandwidth=7380e9 / 2,
        links=600e9 / 2,
        network=12.5e9 / 2,
        watts=None,
        calibration=None,
        source="Google Cloud, TPU7x; bandwidths from memory",
        cores_in_name=2,
        largest=(16, 16, 16),
    ),
    Chip(
        "h100",
        (),
        flops=989e12,
        memory=int(0.95 * 79.1 * GIB),  # the rest is CUDA's and NCCL's
        memory_bandwidth=3350e9,
        links=450e9,
        network=50e9,  # one 400 Gb/s adapter each
        watts=700,
        calibration=Calibration("MaxText, Llama 2 7B on 8 H100, cuDNN attention", 0.497, 1.0),
        source="NVIDIA H100 SXM datasheet",
    ),
    Chip(
        "h200",
        (),
        flops=989e12,
        memory=int(0.95 * 140.4 * GIB),
        memory_bandwidth=4800e9,
        links=450e9,
        network=50e9,
        watts=700,
        calibration=None,
        source="NVIDIA H200 SXM datasheet",
    ),
)


@dataclass(frozen=True)
class Topology:
    """Slices of one shape, or nodes of GPUs.

    shape: chips along each axis of the torus; (nodes, GPUs of a node) for GPUs.
    slices: how many, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_topology` reads it."""
        if self.chip.is_gpu:
            return f"{self.chip.name}:{math.prod(self.shape)}"
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Devices as jax counts them, over all slices."""
        per_chip = 2 if self.chip.name == "tpu7x" else 1
        return math.prod(self.shape) * self.slices * per_chip

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which axes the torus closes: whole cubes in 3-D; rows of sixteen chips in 2-D."""
        if self.chip.largest:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return (*(size == 16 for size in self.shape), False)

    def bandwidth(self, places: Sequence[tuple[int, ...]], slices: Sequence[int]) -> float:
        """Bytes/s that each member of a group can send while all of them exchange in a ring.

        On a torus, a group uses the links of each axis along which its members differ: both
        directions of a ring, one where the axis does not close. GPUs of several nodes share their
        adapters: a ring leaves a node once, and there are as many rings as members in a node.

        Args:
            places: of the members: coordinates on the torus; (node, number) for GPUs.
            slices: of the members.
        """
        if self.chip.is_gpu:
            nodes = {place[0] for place in places}
            if len(nodes) < 2:
                return self.chip.links
            return min(self.chip.links, self.chip.network * len(places) / len(nodes))
        if len(set(slices)) > 1:
            return self.chip.network
        per_axis = self.chip.links / (3 if self.chip.largest else 2)
        share = 0.0
        for axis, closes in zip(range(len(self.shape)), self.wrap, strict=False):
            if len({place[axis] for place in places}) > 1:
                share += 1.0 if closes else 0.5
        return per_axis * share if share else self.chip.links


def parse_topology(text: str, slices: int = 1) -> Topology:
    """v5p:4x4x4, v5p-128, v5litepod-16, v5e:4x4, h100:8, ...: as a slice that can be rented.

    Raises:
        ConfigError: there is no such chip or slice; the nearest ones are named.
    """
    match = re.fullmatch(r"([a-z]+\d*[a-z]*)[:-]((?:\d+x)*\d+)", text.strip().lower())
    chips = {name: chip for chip in CHIPS for name in (chip.name, *chip.sold_as)}
    chip = chips.get(match[1]) if match else None
    if match is None or chip is None:
        raise ConfigError(
            f"'{text}' names no topology; give a chip ({', '.join(chip.name for chip in CHIPS)}) "
            "and its slice: v5p:4x4x4, v5p-128, v5e-16, h100:8"
        )
    sizes = tuple(int(size) for size in match[2].split("x"))
    if chip.is_gpu:
        return _nodes(chip, sizes, slices)
    if len(sizes) > 1:
        if sizes not in chip.shapes:
            raise ConfigError(_no_slice(text, chip, math.prod(sizes)))
        return Topology(chip, sizes, slices)
    count = sizes[0] / chip.cores_in_name
    fitting = [shape for shape in chip.shapes if math.prod(shape) == count]
    if not fitting:
        raise ConfigError(_no_slice(text, chip, count))
    return Topology(chip, fitting[0], slices)


def _nodes(chip: Chip, sizes: tuple[int, ...], slices: int) -> Topology:
    count = math.prod(sizes)
    if not 0 < count <= GPUS_PER_NODE and count % GPUS_PER_NODE:
        near = max(GPUS_PER_NODE, round(count / GPUS_PER_NODE) * GPUS_PER_NODE)
        raise ConfigError(
            f"{count} GPUs are not whole nodes of {GPUS_PER_NODE}; the nearest is "
            f"{chip.name}:{near}"
        )
    if count < 1 or slices > 1:
        raise ConfigError("slices are a TPU's; give the number of GPUs: h100:64 is 8 nodes")
    in_node = min(count, GPUS_PER_NODE)
    return Topology(chip, (count // in_node, in_node))


def _no_slice(text: str, chip: Chip, count: float) -> str:
    ordered = sorted(chip.shapes, key=lambda shape: abs(math.log(math.prod(shape) / max(count, 1))))
    names = [f"{chip.name}:{'x'.join(map(str, s))}" for s in sorted(ordered[:3], key=math.prod)]
    return f"there is no slice '{text}'; the nearest are {', '.join(names)}"


def sold_name(topology: Topology) -> str:
    """What the shop calls a slice: v5p-128, v5litepod-16, v6e-256."""
    chip = topology.chip
    if chip.is_gpu or chip.name == "tpu7x":
        return topology.name
    family = chip.sold_as[0] if chip.sold_as else chip.name
    return f"{family}-{math.prod(topology.shape) * chip.cores_in_name}"
