"""`ablate --parity`: the matrix as a table."""

from pathlib import Path

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from llama_jax.ablate.parity import CELLS, DEVICES, Cell, matrix, variants
from llama_jax.config import ConfigError
from llama_jax.data.shards import write_atomic

PASSED, FAILED = 0, 1
WIDTH = 120  # characters, where there is no terminal to ask
LEGEND = (
    "Every variant of `configs/variants.yaml`, in every use, against its definition in numpy and",
    "float64: the largest difference, in parts of the largest number; for bf16 the root of the sum",
    "of squares in parts of the same. Written by `python main.py ablate --parity`.",
)


def print_matrix(console: Console, out: Path) -> int:
    """Computes every cell, prints them and writes parity.md; returns 1 where one is too far off."""
    # As many as a mesh of fsdp x tensor needs, on a machine with one; before any is used.
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if len(jax.devices()) < DEVICES:
        raise ConfigError(
            f"the matrix needs {DEVICES} devices and there are {len(jax.devices())}: set "
            "JAX_PLATFORMS=cpu"
        )
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    found: dict[str, dict[str, Cell]] = {name: {} for name in variants()}
    with Live(console=console, refresh_per_second=1, transient=True) as live:
        for name, cell, result in matrix(list(found)):
            found[name][cell] = result
            if console.is_terminal:
                live.update(_table({n: row for n, row in found.items() if row}))
    console.print(_table(found))
    failed = [
        f"{name} {cell}" for name, row in found.items() for cell in row if not row[cell].passes
    ]
    count = sum(map(len, found.values()))
    console.print(
        f"{count - len(failed)} of {count} cells pass; differences from the definition in float64, "
        "in parts of the largest number, and for bf16 of the root of the sum of squares"
    )
    for cell in failed:
        console.print(f"[red]too far off: {cell}[/]")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "parity.md", markdown(found).encode())
    return FAILED if failed else PASSED


def markdown(found: dict[str, dict[str, Cell]]) -> str:
    """The matrix as a document; a cell that is too far off says what it may be."""

    def text(cell: Cell) -> str:
        short = f"{cell.difference:.1e}"
        return short if cell.passes else f"**{short}**, allowed {cell.tolerance:.1e}"

    meanings = [f"* **{name}**: {(cell.__doc__ or '').strip()}" for name, cell in CELLS.items()]
    rows = [
        f"| {name} | " + " | ".join(text(row[cell]) for cell in CELLS) + " |"
        for name, row in found.items()
    ]
    head = [f"| variant | {' | '.join(CELLS)} |", f"| :-- {'| --: ' * len(CELLS)}|"]
    return "\n".join(["# Parity matrix", "", *LEGEND, "", *meanings, "", *head, *rows, ""])


def _table(found: dict[str, dict[str, Cell]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Parity matrix", pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for cell in CELLS:
        table.add_column(cell, justify="right", no_wrap=True)
    for name, row in found.items():
        table.add_row(name, *(_text(row.get(cell)) for cell in CELLS))
    return table


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.difference:.1e}"
    return text if cell.passes else f"[red]{text}[/]"
