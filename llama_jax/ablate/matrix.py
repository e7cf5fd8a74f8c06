"""`ablate --parity`: the matrix as a table."""

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from llama_jax.ablate.parity import CELLS, DEVICES, Cell, matrix, variants
from llama_jax.config import ConfigError

PASSED, FAILED = 0, 1


def print_matrix(console: Console) -> int:
    """Computes every cell; returns 1 where one is too far off."""
    # As many as a mesh of fsdp x tensor needs, on a machine with one; before any is used.
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if len(jax.devices()) < DEVICES:
        raise ConfigError(
            f"the matrix needs {DEVICES} devices and there are {len(jax.devices())}: set "
            "JAX_PLATFORMS=cpu"
        )
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
    return FAILED if failed else PASSED


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
