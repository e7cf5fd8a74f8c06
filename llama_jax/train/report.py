"""What the loop tells while it runs, and the words it begins and ends with."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.config import TrainConfig
from llama_jax.model.count import flops_per_token, n_parameters
from llama_jax.train.goodput import Clock, Ledger, goodput
from llama_jax.train.metrics import (
    PLOT,
    Journal,
    Screen,
    describe,
    device_memory,
    duration,
    peak_flops,
)
from llama_jax.train.spikes import Detector

MOST_SKIPPED_IN_ROW = 3
HIDDEN = ("data", "ahead", "report")  # what the main thread does while a step is under way


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, and what to try."""


def is_due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether something is due after a step: each `every` steps, and after the last."""
    return step % every == 0 or step == config.steps


class Reporter:
    """Takes each step's metrics, and reads them one step late, so that no device waits for it.

    All processes read the same numbers, and so decide the same; only the first has a journal.

    stop_agreed: a process was asked to stop, and all know it now.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        step: int,
        journal: Journal | None,
        screen: Screen,
        clock: Clock,
        ledger: Ledger | None,
        detector: Detector,
    ):
        self._config = config
        self._journal, self._screen, self._clock, self._ledger = journal, screen, clock, ledger
        self._detector = detector
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        rows, length = config.data.batch_size, config.data.sequence_length
        self._tokens = rows * length
        self._flops = flops_per_token(config.model, length)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * mesh.size
        self._first = step
        self._last = step, *self._seconds()
        self._speed: dict[str, float] = {}
        self.stop_agreed = False

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step under way; tells those of the one before.

        Raises:
            TrainingError: that was the third in a row without an update.
            Spike: its loss was the last of a rise that makes the run go back.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the step under way and tells its metrics; raises as `report` does."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        self._clock.switch("step")
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._clock.switch("report")
        self.stop_agreed |= bool(values.pop("stop", 0.0))
        is_logged = is_due(step, self._config.log_every, self._config)
        if is_logged:
            self._speed = self._measure_speed(step)
            self._write(step, values | self._speed | device_memory() | self._buckets())
        left = sum(self._seconds()) / (step - self._first) * (self._config.steps - step)
        self._screen.step(step, describe(values | self._speed, left), stays=is_logged)
        if values["skipped_in_row"]:
            self._screen.say(f"step {step}: loss or gradient is not finite; update skipped")
        if values["skipped_in_row"] >= MOST_SKIPPED_IN_ROW:
            raise TrainingError(
                f"loss or gradient was not finite in {MOST_SKIPPED_IN_ROW} steps in a row (until "
                f"step {step}). {self._config.out} keeps the checkpoints before it. Lower "
                "optimizer.peak_lr, lengthen the warmup, or look at the data of these steps"
            )
        self._detector.see(step, values["loss"])

    def validation(self, step: int, loss: float, is_best: bool) -> None:
        """Tells a validation loss."""
        self._write(step, {"validation_loss": loss})
        self._screen.say(f"step {step}  validation loss {loss:.4f}{'  (best)' if is_best else ''}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._journal:
            self._journal.write(step, values)

    def _buckets(self) -> dict[str, float]:
        """Seconds of the run so far in each bucket of `goodput`."""
        seconds = self._ledger.seconds() if self._ledger else {}
        return {f"seconds/{name}": value for name, value in seconds.items()}

    def _measure_speed(self, step: int) -> dict[str, float]:
        """Tokens per second since the last such call, the share of the peak that makes, and the
        share of the time that this thread spent on data and reports instead of waiting for a step.
        """
        waited, worked = self._seconds()
        steps, seconds = step - self._last[0], waited + worked - sum(self._last[1:])
        host_share = (worked - self._last[2]) / seconds
        self._last = step, waited, worked
        speed = {"tokens_per_second": steps * self._tokens / seconds, "host_share": host_share}
        if self._peak:
            speed["mfu"] = speed["tokens_per_second"] * self._flops / self._peak
        return speed

    def _seconds(self) -> tuple[float, float]:
        """Time so far that was spent waiting for steps, and on what belongs to them."""
        seconds = self._clock.seconds()
        return seconds.get("step", 0.0), sum(seconds.get(name, 0.0) for name in HIDDEN)


def introduction(config: TrainConfig, mesh: Mesh, step: int) -> str:
    """What will be trained on what."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = [
        f"{n_parameters(config.model):,} parameters, {config.compute.dtype}, on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}{f' ({axes})' if axes else ''}{hosts}",
        f"{config.steps:,} steps of {config.data.batch_size} x {config.data.sequence_length} "
        f"tokens ({tokens:,} in all) to {config.out}",
    ]
    if step:
        lines.append(f"going on from step {step:,}")
    return "\n".join(lines)


def summary(how: str, best: float | None, checkpoint: Path, clock: Clock, ledger: Any) -> str:
    """How it ended and where the time went."""
    seconds = clock.seconds()
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {x / total:.1%}" for name, x in seconds.items() if x > total / 1000)
    lines = [how, f"{duration(total)} in this process: {parts}"]
    if ledger:
        lines.append(
            f"{duration(sum(ledger.seconds().values()))} in all, "
            f"{ledger.starts()} start{'s' * (ledger.starts() > 1)}: "
            f"{goodput(ledger.seconds())}"
        )
    if best is not None:
        lines.append(f"best validation loss {best:.4f}")
    lines.append(f"checkpoint {checkpoint}, plot {checkpoint.parents[1] / PLOT}")
    return "\n".join(lines)
