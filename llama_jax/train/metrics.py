"""What a run tells: live on the screen, in metrics.jsonl, in TensorBoard, as a plot."""

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from llama_jax.config import Schema

METRICS = "metrics.jsonl"
PLOT = "loss.png"

# Dense bf16 FLOP/s of one device, by the start of jax's name for it; the longest that fits counts.
# TPUs: Google Cloud's page of each version ("Peak compute per chip"). GPUs: NVIDIA's datasheets,
# half of the figure "with sparsity"; SXM boards but for the one that says PCIe.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by jax's name for its kind; None where it is not known."""
    fits = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def device_memory() -> dict[str, float]:
    """Memory of each device of this process in GiB, in use and at its highest, where it is told."""
    values = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}  # None on a CPU
        for name, key in (("memory", "bytes_in_use"), ("peak_memory", "peak_bytes_in_use")):
            if key in stats:
                values[f"{name}/{device.id}"] = stats[key] / 2**30
    return values


class Journal:
    """Every number of a run by step: metrics.jsonl, TensorBoard and, if wanted, Weights & Biases.

    A line of metrics.jsonl is {"step": n, name: number, ...}; a number that is not finite is null.
    Opened by a resumed run, it first drops what lies beyond the step it goes on from.

    Args:
        folder: of the run.
        step: the one the run goes on from; 0 for a new run.
        config: shown beside the curves.
        wandb_project: Weights & Biases project, or None.

    Raises:
        ImportError: wandb_project is given and wandb is not installed.
    """

    def __init__(self, folder: Path, step: int, config: Schema, wandb_project: str | None = None):
        from tensorboardX import SummaryWriter  # half a second that `--help` need not wait

        self._wandb = _start_wandb(folder, config, wandb_project) if wandb_project else None
        _keep_until(folder / METRICS, step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._board.add_text("config", f"```json\n{config.model_dump_json(indent=1)}\n```", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line, which is on its way to the disk when this returns."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in line.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Completes the files."""
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_wandb(folder: Path, config: Schema, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "logging to Weights & Biases needs the extra 'track': pip install 'llama-jax[track]'"
        ) from error
    name = folder / "wandb_id.txt"  # the same run again after a restart
    if not name.exists():
        name.write_text(secrets.token_hex(8), encoding="utf-8")
    return wandb.init(
        project=project,
        id=name.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
        config=config.model_dump(mode="json"),
    )


def _keep_until(path: Path, step: int) -> None:
    """Drops lines beyond a step, which will be run again, and a last line cut off by a crash."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(kept), encoding="utf-8")
    os.replace(shorter, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a crash cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Screen:
    """Progress of a run for a person: a live line on a terminal, plain lines elsewhere.

    Args:
        step: steps done already.
        steps: of the whole run.
        console: where to write; by default the standard output.
    """

    def __init__(self, step: int, steps: int, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._steps = steps
        self._live: Progress | None = None
        if self._console.is_terminal:
            self._live = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("compiling", total=steps, completed=step)
            self._live.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, text: str, stays: bool) -> None:
        """The state after a step: on a terminal the live line, elsewhere a line if it `stays`."""
        if self._live:
            self._live.update(self._task, completed=step, description=text)
        elif stays:
            self.say(f"step {step}/{self._steps}  {text}")

    def close(self) -> None:
        """Ends the live line."""
        if self._live:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(values: Mapping[str, float], seconds_left: float) -> str:
    """Metrics of a step as a short line: loss, rate, speed, time left."""
    parts = [f"loss {values['loss']:.4f}", f"lr {values['learning_rate']:.2e}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("skipped"):
        parts.append(f"skipped {values['skipped']:.0f}")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])


def duration(seconds: float) -> str:
    """45s, 3m05s, 2h05m, 3d04h."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f}s"
    if hours < 1:
        return f"{int(minutes)}m{int(seconds % 60):02}s"
    if days < 1:
        return f"{int(hours)}h{int(minutes % 60):02}m"
    return f"{int(days)}d{int(hours % 24):02}h"


def plot_losses(folder: Path) -> Path | None:
    """Draws training and validation loss of a run's metrics.jsonl by step; returns the PNG.

    None where no loss has been logged.
    """
    lines = read_metrics(folder / METRICS)
    curves = {
        "training": [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None],
        "validation": [
            (x["step"], x["validation_loss"]) for x in lines if x.get("validation_loss") is not None
        ],
    }
    if not any(curves.values()):
        return None

    from matplotlib.figure import Figure  # two seconds that `--help` need not wait
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), marker in zip(curves.items(), ("", "o"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / PLOT
    figure.savefig(path, dpi=120)
    return path
