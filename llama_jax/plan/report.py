"""The plan in words."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_jax.plan.hardware import GIB, Topology

WIDTH = 100


def print_plan(record: dict[str, Any]) -> None:
    """Prints one plan."""
    console = Console(highlight=False, width=max(WIDTH, Console().width))
    console.print(_headline(record))
    for note in record["notes"]:
        console.print(f"[yellow]{escape(note)}[/]")
    console.print(_memory(record))
    if not record["fits"]:
        console.print(_too_large(record))
    if record["collectives"]:
        console.print(_collectives(record))
    console.print(_times(record))
    console.print(_speed(record))
    if record["budget"]:
        console.print(_budget(record["budget"]))
    console.print(escape(_footer(record)))


def _headline(record: dict[str, Any]) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
    slices = f"{record['slices']} slices of " if record["slices"] > 1 else ""
    work = f"{record['rows']:,} rows of {record['row_tokens']:,} " + (
        "slots, one token each" if record["step"] == "decode" else "tokens"
    )
    used, limit = record["peak_bytes_per_chip"], record["hbm_bytes_per_chip"]
    gap = abs(limit - used) / GIB
    verdict = (
        f"[bold green]fits[/], {gap:.2f} GiB of each chip to spare"
        if record["fits"]
        else f"[bold red]does not fit[/]: {gap:.2f} GiB too much on each chip"
    )
    sold = "" if record["sold_as"] == record["topology"] else f" ({record['sold_as']})"
    return (
        f"{record['parameters']:,} parameters, {record['step']} step, on {slices}"
        f"{record['topology']}{sold}: {record['chips']:,} chips{f', {axes}' if axes else ''}\n"
        f"{work}: {verdict}"
    )


def _grid(title: str, *headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _memory(record: dict[str, Any]) -> Table:
    table = _grid("memory of a chip", "", "GiB")
    table.add_row(
        f"peak ({record['memory_from']})", f"[bold]{record['peak_bytes_per_chip'] / GIB:,.2f}[/]"
    )
    table.add_row("there are", f"{record['hbm_bytes_per_chip'] / GIB:,.2f}")
    for kind, size in record["memory_compiled"].items():
        table.add_row(f"  {kind} (compiler)", f"{size / GIB:,.2f}")
    for kind, size in record["memory_by_kind"].items():
        table.add_row(f"  {kind} (closed form)", f"{size / GIB:,.2f}")
    table.add_row("  together (closed form)", f"{record['memory_closed_form'] / GIB:,.2f}")
    if record["host_bytes_per_chip"]:
        moved = record["host_bytes_moved_per_chip"] / 1e9
        table.add_row("of its host, besides", f"{record['host_bytes_per_chip'] / GIB:,.2f}")
        table.caption = f"{moved:,.2f} GB go there and back in a step, which no time below counts"
    return table


def _too_large(record: dict[str, Any]) -> Table:
    table = _grid("what is largest, and what shrinks it", "on each chip", "GiB", "smaller with")
    for one in record["largest_allocations"]:
        table.add_row(escape(one["name"]), f"{one['bytes'] / GIB:,.2f}", "(compiler)")
    for one in record["largest_tensors"]:
        table.add_row(escape(one["name"]), f"{one['bytes'] / GIB:,.2f}", escape(one["remedy"]))
    table.columns[2].justify = "left"
    return table


def _collectives(record: dict[str, Any]) -> Table:
    table = _grid("collectives of a step", "", "along", "places", "executed", "GB sent by a chip")
    for row in record["collectives"]:
        table.add_row(
            row["kind"],
            " x ".join(row["axes"]) or "?",
            f"{row['sites']:,}",
            f"{row['executions']:,}",
            f"{row['wire_bytes'] / 1e9:,.2f}",
        )
    return table


def _times(record: dict[str, Any]) -> Table:
    table = _grid("a step takes at least", "", "", "seconds")
    model, executed = record["model_flops_per_chip"], record["executed_flops_per_chip"]
    within = record["wire_bytes_per_chip"] - record["network_bytes_per_chip"]
    what = {
        "compute": f"{executed / 1e12:,.2f} TFLOP, {executed / model:.2f} x the model's",
        "memory": "least traffic of the memory, closed form",
        "interconnect": f"{within / 1e9:,.2f} GB ({record['wire_from']})",
        "network": f"{record['network_bytes_per_chip'] / 1e9:,.2f} GB ({record['wire_from']})",
    }
    for name, seconds in record["seconds"].items():
        mark = "[bold]" if name == record["bound"] else ""
        table.add_row(f"{mark}{name}", f"{mark}{what[name]}", f"{mark}{seconds:,.4f}")
    return table


def _speed(record: dict[str, Any]) -> Table:
    table = _grid(f"bound by {record['bound']}", "", "s / step", "MFU", "tokens/s per chip")
    rows = {
        "upper bound, all overlapped": record["overlapped"],
        "upper bound, sent in between": record["serial"],
    }
    calibrated = record["calibrated"]
    if calibrated:
        rows[
            f"estimate: {calibrated['share_of_peak']:.0%} of the peak, as {calibrated['from']}"
        ] = calibrated
    for name, speed in rows.items():
        table.add_row(
            escape(name),
            f"{speed['seconds']:,.4f}",
            f"{speed['mfu']:.1%}",
            f"{speed['tokens_per_second_per_chip']:,.0f}",
        )
    return table


def _budget(budget: dict[str, Any]) -> str:
    text = (
        f"{budget['tokens']:,.0f} tokens at the {budget['at']}: {budget['days']:,.1f} days, "
        f"{budget['chip_hours']:,.0f} chip-hours"
    )
    if budget["mwh"] is None:
        return f"{text}; the maker publishes no power: --watts gives energy and CO2"
    return (
        f"{text}, {budget['mwh']:,.1f} MWh and {budget['tco2eq']:,.1f} tCO2eq "
        f"at {budget['watts']:,.0f} W"
    )


def _footer(record: dict[str, Any]) -> str:
    seconds, source = record["compile_seconds"], record["chip"]["source"]
    how = "in closed form" if seconds is None else f"compiled in {seconds:,.0f} s"
    return f"{how}; {record['planner_bytes'] / GIB:.1f} GiB of this machine; chip: {source}"


def print_search(found: list[dict[str, Any]], topology: Topology) -> None:
    """Prints what a search ranked."""
    console = Console(highlight=False, width=max(WIDTH, Console().width))
    table = _grid(
        f"what fits {topology.name}; speeds are the upper bound without overlap",
        "mesh",
        "remat",
        "rows",
        "parts",
        "GiB",
        "from",
        "bound",
        "MFU",
        "tokens/s per chip",
    )
    for one in found:
        record = one["plan"]
        axes = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1)
        speed = record["serial"]
        table.add_row(
            axes or "one chip",
            f"keep {len(one['remat_save'])}" if one["remat_save"] else one["remat"],
            f"{record['rows']:,}",
            str(one["accumulate"]),
            f"{record['peak_bytes_per_chip'] / GIB:,.1f}"
            + ("" if record["fits"] else " [red]too much[/]"),
            record["memory_from"],
            record["bound"],
            f"{speed['mfu']:.1%}",
            f"{speed['tokens_per_second_per_chip']:,.0f}",
        )
    console.print(table)
    if not found:
        console.print("nothing fits; give a larger slice, or a smaller data.batch_size")
