"""Reads compiled HLO text: which collectives it holds, along which mesh axes, how often, how large.

The text is for people and changes between compilers, so each spelling that was met has a test. What
counts is what one device does in one run of the program, loops unrolled:

* a loop's body counts as often as its condition says (`known_trip_count` where it is written; a
  TPU's text has only the comparison with a constant); a loop whose length is data counts once, and
  so does every branch of a conditional;
* an asynchronous collective is a start and a done: the start counts;
* a TPU spreads one collective over several fusions that repeat its channel: a channel counts once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sharding.hlo import Instruction, elements, executions, read, shape_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
)
BETWEEN = " between slices"


class Collective(NamedTuple):
    """One collective of a program.

    kind: all-gather, ...; those that a TPU's runtime does for the program over the data-centre
        network are called `all-gather between slices`, ....
    axes: the mesh axes along which its groups lie; none if they could not be read.
    group: partition numbers of the first group (positions in `mesh.devices.flat`).
    payload: bytes of the result of one execution on a device.
    executions: how often one run of the program executes it.
    wire_bytes: bytes that a device sends in one execution, by the ring algorithm.
    name: what it computes, as the compiler was told (op_name).
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    payload: int
    executions: int
    wire_bytes: float
    name: str


class Total(NamedTuple):
    """The collectives of one kind along the same axes: places in the program, executions, bytes a
    device sends in one run."""

    kind: str
    axes: tuple[str, ...]
    sites: int
    executions: int
    wire_bytes: float


def totals(found: Sequence[Collective]) -> list[Total]:
    """Collectives summed by kind and axes, those that send most first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, one.axes), []).append(one)
    rows = [
        Total(
            kind,
            axes,
            len(members),
            sum(one.executions for one in members),
            sum(one.executions * one.wire_bytes for one in members),
        )
        for (kind, axes), members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.wire_bytes)


def collectives(hlo: str, mesh_sizes: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled module that run and move something.

    Args:
        hlo: `compiled.as_text()`.
        mesh_sizes: mesh axis -> devices along it, outermost first, as in `mesh.shape`.
    """
    program = read(hlo)
    counts, windows = executions(program)
    found: dict[tuple[str, ...], Collective] = {}
    for computation, instructions in program.computations.items():
        for instruction in instructions:
            kind = _kind(instruction)
            if kind is None or not counts.get(computation):
                continue
            count = counts[computation]
            # One collective over the steps of a loop that hides it: each step moves a part.
            if "async_collective_fusion" in computation or "chain_id" in instruction.rest:
                count = windows[computation]
            one = _collective(instruction, kind, computation, count, mesh_sizes)
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (kind, channel[1]) if channel else (kind, computation, instruction.name)
            if one.wire_bytes and (key not in found or found[key].executions < count):
                found[key] = one
    return list(found.values())


# What it moves ------------------------------------------------------------------------------------


def _kind(instruction: Instruction) -> str | None:
    opcode = instruction.opcode
    if opcode.endswith("-done") or opcode.endswith("-update"):
        return None
    base = opcode.removesuffix("-start")
    if base in KINDS:
        return base
    transfer = re.search(r'megascale_transfer_type="(\w+)"', instruction.rest)
    if opcode == "send" and transfer:
        return transfer[1].lower().replace("_", "-") + BETWEEN
    return None


def _collective(
    instruction: Instruction,
    kind: str,
    computation: str,
    count: int,
    mesh_sizes: Mapping[str, int],
) -> Collective:
    members, moved = _members(instruction.rest, math.prod(mesh_sizes.values()))
    payload = _payload(instruction, kind)
    group = max(len(members), 1)
    if kind.endswith(BETWEEN):
        group = _slices(instruction.rest)
    match kind:
        case "all-gather between slices":  # here the payload is what a device gives
            wire = float(payload * (group - 1))
        case "all-reduce between slices":
            wire = 2 * payload * (group - 1) / group
        case "all-gather" | "all-to-all" | "ragged-all-to-all":
            wire = payload * (group - 1) / group
        case "reduce-scatter":
            wire = payload * (group - 1)
        case "all-reduce":
            # A reduce-scatter and an all-gather; a TPU's fused form keeps only the first.
            halves = 1 if computation.startswith("all-reduce-scatter") else 2
            wire = halves * payload * (group - 1) / group
        case _:  # permutations, broadcasts, from one slice to another: as it is
            wire = float(payload) if group > 1 else 0.0
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    axes = _axes(moved, mesh_sizes)
    return Collective(kind, axes, members, payload, count, wire, name[1] if name else "")


def _payload(instruction: Instruction, kind: str) -> int:
    """Bytes of the result: of a start's tuple, which has operands and results, the results."""
    parts = elements(instruction.shape)
    if kind.endswith(BETWEEN):
        return shape_bytes(parts[0])  # the rest is context
    is_start = instruction.opcode.endswith("-start")
    if is_start and kind != "all-reduce" and len(parts) > 1:
        return shape_bytes(parts[1])
    return shape_bytes(instruction.shape)


def _members(rest: str, devices: int) -> tuple[tuple[int, ...], Sequence[Sequence[int]]]:
    """The first group, and groups enough to tell along which axes they lie."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    if pairs:
        found = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        moving = [pair for pair in found if pair[0] != pair[1]]
        return _ring(moving), moving
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        numbers = np.arange(math.prod(map(int, iota[3].split(","))))
        numbers = numbers.reshape([int(size) for size in iota[3].split(",")])
        if iota[4]:
            numbers = numbers.transpose([int(axis) for axis in iota[4].split(",")])
        group = tuple(numbers.reshape(int(iota[1]), int(iota[2]))[0].tolist())
        return group, [group]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if named:
        group = _named_group(named[1], named[2])
        return group, [group]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        group = tuple(map(int, listed[1].split(",")))
        return group, [group]
    if "replica_groups={}" in rest:
        group = tuple(range(devices))
        return group, [group]
    return (), []


def _slices(rest: str) -> int:
    """How many slices take part: `megascale_target="{1,2}x{0:3}"` is two."""
    target = re.search(r'megascale_target="\{([\d,:]+)\}', rest)
    ranges = [part.split(":") for part in target[1].split(",")] if target else [["0", "1"]]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _ring(pairs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The devices that a permutation visits from its first source on."""
    following = {pair[0]: pair[1] for pair in pairs}
    visited: list[int] = []
    at = pairs[0][0] if pairs else None
    while at is not None and at not in visited:
        visited.append(at)
        at = following.get(at)
    return tuple(visited)


def _named_group(sizes: str, axes: str) -> tuple[int, ...]:
    """`'a'=8,'b'=2` and `'b'`, or a part of an axis, `'a':(2)4`: the group of device 0."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    strides = dict(zip(mesh, _strides(list(mesh.values())), strict=True))
    group = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part) if part else mesh[name]
        step = strides[name] * (mesh[name] // (int(before or 1) * count))
        group = (group[:, None] + step * np.arange(count)).ravel()
    return tuple(group.tolist())


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def _axes(groups: Sequence[Sequence[int]], mesh_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    sizes = tuple(mesh_sizes.values())
    differing = {
        axis
        for group in groups
        if max(group) < math.prod(sizes)
        for axis, places in zip(mesh_sizes, np.unravel_index(list(group), sizes), strict=True)
        if len(set(places.tolist())) > 1
    }
    return tuple(axis for axis in mesh_sizes if axis in differing)
