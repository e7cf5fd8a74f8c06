"""Reads HLO text: its computations, what arrays take, and how often each computation runs."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "token": 0}  # all other types end with, or begin with, their number of bits

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)?\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


class Instruction(NamedTuple):
    """One line of HLO: `%name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool


class Program(NamedTuple):
    """The computations of a module by name, and which of them it starts with."""

    computations: dict[str, list[Instruction]]
    entry: str


# Text -> instructions -----------------------------------------------------------------------------


def read(hlo: str) -> Program:
    """The instructions of an HLO module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line) if line[:1] not in (" ", "") else None
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line.strip())):
            shape, rest = _split_shape(line.strip()[match.end() :])
            opcode, _, operands = rest.partition("(")
            current.append(Instruction(match[2], shape, opcode.strip(), operands, bool(match[1])))
    return Program(computations, entry)


def _split_shape(text: str) -> tuple[str, str]:
    """`(f32[2]{0}, u32[]) add-start(...)` -> the shape, and what follows it."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text, 0)
    return text[: end + 1], text[end + 1 :].lstrip()


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += text[position] in "([{"
        depth -= text[position] in ")]}"
        if not depth:
            return position
    return len(text) - 1


def elements(shape: str) -> list[str]:
    """The parts of a tuple's shape; a shape that is no tuple is its own only part."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(shape):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[start:position].strip())
            start = position + 1
        if depth == 0:
            break
    return [part for part in parts if part]


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    bits = sum(_bits(kind) * _size(dims) for kind, dims in _ARRAY.findall(shape))
    return math.ceil(bits / 8)


def _bits(kind: str) -> int:
    return BITS[kind] if kind in BITS else int(re.findall(r"\d+", kind)[0])


def _size(dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size)


# How often ----------------------------------------------------------------------------------------


def executions(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """How often each computation runs: loops unrolled, and without the loops of windowed products.

    A windowed product is XLA's own loop over parts of one matrix product.
    """
    counts: dict[str, int] = {}
    windows: dict[str, int] = {}

    def visit(name: str, count: int, window: int) -> None:
        counts[name] = counts.get(name, 0) + count
        windows[name] = windows.get(name, 0) + window
        for instruction in program.computations.get(name, ()):
            if instruction.opcode == "while":
                condition, body = _loop(instruction.rest)
                trips = _trips(program, instruction.rest, condition, body)
                is_window = "windowed_dot_general" in body
                visit(body, count * trips, window * (1 if is_window else trips))
            else:
                for called in _called(instruction.rest):
                    visit(called, count, window)

    visit(program.entry, 1, 1)
    return counts, windows


def _loop(rest: str) -> tuple[str, str]:
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    body = re.search(r"body=%?([\w.\-]+)", rest)
    assert condition, rest  # a while has both
    assert body, rest
    return condition[1], body[1]


def _called(rest: str) -> Iterator[str]:
    for match in _CALLED.finditer(rest):
        yield from re.findall(r"%?([\w.\-]+)", match[1])


def _trips(program: Program, rest: str, condition: str, body: str) -> int:
    """Passes of a loop that counts up from 0 to a constant; 1 where its length is data."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', rest)
    if known:
        return int(known[1])
    found = _limit({one.name: one for one in program.computations[condition]})
    if found is None:
        return 1
    index, limit = found
    step = _step({one.name: one for one in program.computations[body]}, index)
    return max(math.ceil(limit / step), 0)


def _limit(instructions: Mapping[str, Instruction]) -> tuple[int, int] | None:
    """Of a condition `i < constant`: which part of the loop's tuple i is, and the constant."""
    root = next(one for one in instructions.values() if one.is_root)
    direction = re.search(r"direction=(\w+)", root.rest)
    operands = [instructions[name] for name in _operands(root.rest) if name in instructions]
    if root.opcode != "compare" or not direction or len(operands) != 2:
        return None
    counter, limit = operands if direction[1] == "LT" else reversed(operands)
    index = re.search(r"index=(\d+)", counter.rest)
    if direction[1] not in ("LT", "GT") or limit.opcode != "constant" or not index:
        return None
    return int(index[1]), _constant(limit)


def _step(instructions: Mapping[str, Instruction], index: int) -> int:
    """By how much a loop's body raises its counter: an unrolled one by more than 1."""
    root = next(one for one in instructions.values() if one.is_root)
    at = instructions.get(_operands(root.rest)[index])
    step = 0
    while at and at.opcode in ("add", "copy"):
        terms = [instructions[name] for name in _operands(at.rest) if name in instructions]
        step += sum(_constant(term) for term in terms if term.opcode == "constant")
        at = next((term for term in terms if term.opcode != "constant"), None)
    return max(step, 1)


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.partition(")")[0])


def _operands(rest: str) -> list[str]:
    """Names of the operands of an instruction, whose opening bracket has been read."""
    return [re.findall(r"[\w.\-]+", operand)[-1] for operand in elements("(" + rest)]
