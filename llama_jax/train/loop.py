"""Pretraining: the loop that joins data, step, checkpoints and metrics.

The same command starts a run and continues it. Batch number n is a function of (seed, n) and the
step a function of (state, batch), so a run that was stopped ends with the bits of one that was not.
"""

import math
import os
import signal
import threading
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import config as schema
from llama_jax import tokenizer as tokenizers
from llama_jax.config import ConfigError, TrainConfig
from llama_jax.data.loader import Loader
from llama_jax.data.shards import read_meta
from llama_jax.model.count import flops_per_token, n_parameters
from llama_jax.model.llama import Llama
from llama_jax.train import checkpoint
from llama_jax.train.checkpoint import CONFIG, Checkpoint, Writer
from llama_jax.train.metrics import (
    PLOT,
    Clock,
    Journal,
    Screen,
    describe,
    duration,
    peak_flops,
    plot_losses,
)
from llama_jax.train.optimizer import Optimizer
from llama_jax.train.program import make_program
from llama_jax.train.step import Batch, TrainState, init_state, lm_loss, make_evaluation

DONE, STOPPED = 0, 75
MOST_SKIPPED_IN_ROW = 3
CHECKPOINTS = "checkpoints"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, and what to try."""


class Plan(NamedTuple):
    """All that is decided before anything is allocated.

    The fields from model on are those of train.program.Program.
    """

    config: TrainConfig
    tokenizer: tokenizers.Tokenizer
    data: Loader
    validation: Loader | None
    model: Llama
    optimizer: Optimizer
    mesh: Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Any


class Programs(NamedTuple):
    """What is compiled, once per run.

    step: (state, batch) -> (state, metrics); the old state is given up.
    evaluate: (params, batch) -> sums; None without validation data.
    is_finite: state -> bool.
    """

    step: Any
    evaluate: Any
    is_finite: Any


class Progress(NamedTuple):
    """What a run knows besides its arrays; part of every checkpoint.

    step: batches consumed; the next one is batch number `step`.
    validation_loss: of this step, None if it was not measured.
    best_loss: lowest validation loss so far.
    without_best: validation losses since then.
    """

    step: int = 0
    validation_loss: float | None = None
    best_loss: float | None = None
    without_best: int = 0

    def after_step(self) -> "Progress":
        """One batch later."""
        return self._replace(step=self.step + 1, validation_loss=None)

    def measured(self, loss: float) -> "Progress":
        """With the validation loss of this step; one that is not finite is never a best."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return self._replace(validation_loss=loss, best_loss=loss, without_best=0)
        return self._replace(
            validation_loss=loss if math.isfinite(loss) else None,
            without_best=self.without_best + 1,
        )


def train(config: TrainConfig) -> int:
    """Trains until the last step, or continues a run; returns 0, or 75 when a signal stopped it.

    A checkpoint is written every `checkpoint.every` steps, at each new best validation loss, and at
    the end. SIGTERM and Ctrl-C let the step under way finish and save it; a second one ends the
    process at once.

    Raises:
        ConfigError: the configuration does not fit the devices, the data, the tokenizer or the run
            in `out`; nothing has been allocated.
        CheckpointError: a checkpoint cannot be written, or none is intact.
        TrainingError: three updates in a row were not finite. The last good checkpoint stays.
    """
    clock = Clock("startup")
    plan = make_plan(config)
    out = Path(config.out)
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(plan.mesh))
        stop = stack.enter_context(StopRequest())
        tokenizer_copy = out / plan.tokenizer.file_name
        copies = [out / CONFIG, tokenizer_copy]
        writer = stack.enter_context(Writer(out / CHECKPOINTS, config.checkpoint, copies))
        found = checkpoint.newest(out / CHECKPOINTS)
        progress = Progress()
        if found:
            check_resumable(plan, found)
            writer.set_aside_after(found.step)
            progress = Progress(**{name: found.progress[name] for name in Progress._fields})
        schema.save(config, out / CONFIG)
        tokenizer_copy.write_bytes(plan.tokenizer.model)
        journal = stack.enter_context(Journal(out, progress.step, config, config.wandb))
        screen = stack.enter_context(Screen(progress.step, config.steps))
        screen.say(introduction(plan, progress))
        if is_over(config, progress):
            screen.say("nothing is left to do; raise steps (or patience) to go on")
            return DONE

        clock.switch("compile")
        programs = compile_programs(plan)
        clock.switch("startup")
        state = restored_state(plan, found) if found else new_state(plan)
        saved_step = found.step if found else None
        reporter = Reporter(plan, progress.step, journal, screen, clock)
        batches = stack.enter_context(closing(plan.data.batches(progress.step)))
        batch = place(plan, next(batches))

        while not is_over(config, progress) and not stop.requested:
            clock.switch("step")
            state, metrics = programs.step(state, batch)
            progress = progress.after_step()
            clock.switch("data")  # while the devices are busy with the step
            batch = place(plan, next(batches))
            reporter.report(progress.step, metrics)
            writer.check()

            is_best = False
            if plan.validation and is_due(progress.step, config.evaluate_every, config):
                reporter.flush()
                clock.switch("validation")
                loss = measure(plan, plan.validation, programs, state)
                progress = progress.measured(loss)
                is_best = progress.without_best == 0
                reporter.validation(progress.step, loss, is_best)

            is_kept = is_best and config.checkpoint.keep_best > 0
            if is_kept or is_due(progress.step, config.checkpoint.every, config):
                reporter.flush()
                clock.switch("checkpoint")
                save(plan, programs, writer, state, progress)
                saved_step = progress.step

        reporter.flush()
        clock.switch("checkpoint")
        if progress.step != saved_step:
            save(plan, programs, writer, state, progress)
        writer.wait()
        clock.switch("end")
        plot_losses(out)
        screen.say(summary(plan, progress, stop, clock))
    return DONE if is_over(config, progress) else STOPPED


def is_over(config: TrainConfig, progress: Progress) -> bool:
    """Whether all steps are done, or patience with the validation loss is at an end."""
    impatient = config.patience is not None and progress.without_best >= config.patience
    return progress.step >= config.steps or impatient


def is_due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether something is due after a step: each `every` steps, and after the last."""
    return step % every == 0 or step == config.steps


# Before the run -----------------------------------------------------------------------------------


def make_plan(config: TrainConfig) -> Plan:
    """Opens tokenizer and data and lays everything out over the devices; allocates no array.

    Raises:
        ConfigError: they do not fit together.
    """
    if jax.process_count() > 1:
        raise ConfigError("training over several processes is not supported yet; start one")
    tokenizer = tokenizers.load(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{config.tokenizer} has {tokenizer.vocab_size} pieces, but model.vocab_size is "
            f"{config.model.vocab_size}; use a model whose vocab_size is at least that"
        )
    data, validation = open_data(config, tokenizer)
    return Plan(config, tokenizer, data, validation, *make_program(config))


def open_data(config: TrainConfig, tokenizer: tokenizers.Tokenizer) -> tuple[Loader, Loader | None]:
    """Training and validation data; None for the latter where the corpora have none.

    Raises:
        ConfigError: patience is set and there is nothing to be impatient with.
        DataError: a corpus is unfinished, damaged, or made with another tokenizer.
    """
    check = (config.seed, config.model.vocab_size, tokenizer.fingerprint)
    data = Loader(config.data, "train", *check)
    if any(read_meta(source.path).validation for source in config.data.sources):
        return data, Loader(config.data, "validation", *check)
    if config.patience is not None:
        raise ConfigError(
            "patience needs validation data, and the corpora have none; prepare them with "
            "validation_fraction, or leave patience out"
        )
    return data, None


def check_resumable(plan: Plan, found: Checkpoint) -> None:
    """Refuses to go on from a checkpoint that this configuration does not continue.

    Raises:
        ConfigError: naming what differs.
    """
    checkpoint.check_unchanged(found, plan.config)
    if found.progress["tokenizer"] != plan.tokenizer.fingerprint:
        raise ConfigError(
            f"{plan.config.tokenizer} is not the tokenizer this run was trained with; that one is "
            f"in {found.folder}. Use it, or start a new run in another folder (out)."
        )


def compile_programs(plan: Plan) -> Programs:
    """Compiles for the shapes of the plan."""
    config = plan.config
    loss_fn = lm_loss(plan.model, config.z_loss)
    evaluate = jax.jit(make_evaluation(loss_fn, config.accumulate))
    is_finite = jax.jit(
        lambda state: jnp.all(
            jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)])
        )
    )
    return Programs(
        plan.step.lower(plan.state, plan.batch).compile(),
        evaluate.lower(plan.state.params, plan.batch).compile() if plan.validation else None,
        is_finite.lower(plan.state).compile(),
    )


def new_state(plan: Plan) -> TrainState:
    """The state before the first step, each array made where it lies."""
    places = jax.tree.map(lambda x: x.sharding, plan.state)
    if plan.config.parameters_from:
        params = checkpoint.load_parameters(plan.config.parameters_from, plan.state.params)
        start = jax.jit(
            lambda params: init_state(params, plan.optimizer),
            donate_argnums=0,
            out_shardings=places,
        )
        return start(params)
    create = jax.jit(
        lambda key: init_state(plan.model.init(key), plan.optimizer), out_shardings=places
    )
    return create(jax.random.key(plan.config.seed))


def restored_state(plan: Plan, found: Checkpoint) -> TrainState:
    """The state of a checkpoint, read to where this run's arrays lie."""
    trees = checkpoint.load(found, _saved_trees(plan.state))
    return TrainState(params=trees["params"], **trees["training"])


def _saved_trees(state: TrainState) -> dict[str, Any]:
    training = state._asdict()
    return {"params": training.pop("params"), "training": training}


# During the run -----------------------------------------------------------------------------------


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a wish, which the loop reads between steps.

    The second one ends the process, as it would without us.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = signal.Signals(number).name
        # Not print: the signal may have come while something else was being printed.
        os.write(2, b"\nfinishing this step and saving; the same signal again ends at once\n")


def place(plan: Plan, batch: dict[str, np.ndarray]) -> Batch:
    """A batch of the loader on the devices; returns before it has arrived."""
    return {name: jax.device_put(batch[name], x.sharding) for name, x in plan.batch.items()}


def measure(plan: Plan, validation: Loader, programs: Programs, state: TrainState) -> float:
    """The validation loss in nats per token."""
    assert validation.steps is not None  # only training data is endless
    total = weight = 0.0
    for number in range(min(plan.config.evaluate_batches, validation.steps)):
        sums = jax.device_get(
            programs.evaluate(state.params, place(plan, validation.batch(number)))
        )
        total, weight = total + float(sums["loss"]), weight + float(sums["weight"])
    return total / weight


def save(
    plan: Plan, programs: Programs, writer: Writer, state: TrainState, progress: Progress
) -> None:
    """Begins a checkpoint. The data and every random draw follow from the seed and the step.

    Raises:
        TrainingError: the state is not finite; nothing is written.
    """
    if not programs.is_finite(state):
        raise TrainingError(
            f"parameters or optimizer state are not finite after step {progress.step}, which is "
            f"not saved; {plan.config.out} keeps the checkpoints before it. Lower optimizer.peak_lr"
        )
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "llama-jax")
    writer.save(
        progress.step,
        _saved_trees(state),
        {
            **progress._asdict(),
            "seed": plan.config.seed,
            "data": {"seed": plan.config.seed, "next_batch": progress.step},
            "tokenizer": plan.tokenizer.fingerprint,
            "versions": {name: version(name) for name in libraries},
        },
    )


class Reporter:
    """Takes each step's metrics, and reads them one step late, so that no device waits for it."""

    def __init__(self, plan: Plan, step: int, journal: Journal, screen: Screen, clock: Clock):
        self._config = plan.config
        self._journal, self._screen, self._clock = journal, screen, clock
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        rows, length = plan.config.data.batch_size, plan.config.data.sequence_length
        self._tokens = rows * length
        self._flops = flops_per_token(plan.config.model, length)
        peak = peak_flops(plan.mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * plan.mesh.size
        self._first = step
        self._last = step, *self._seconds()
        self._speed: dict[str, float] = {}

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step under way; tells those of the one before.

        Raises:
            TrainingError: that was the third in a row without an update.
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
        is_logged = is_due(step, self._config.log_every, self._config)
        if is_logged:
            self._speed = self._measure_speed(step)
            self._journal.write(step, values | self._speed)
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

    def validation(self, step: int, loss: float, is_best: bool) -> None:
        """Tells a validation loss."""
        self._journal.write(step, {"validation_loss": loss})
        self._screen.say(f"step {step}  validation loss {loss:.4f}{'  (best)' if is_best else ''}")

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
        return seconds.get("step", 0.0), seconds.get("data", 0.0) + seconds.get("report", 0.0)


# Words --------------------------------------------------------------------------------------------


def introduction(plan: Plan, progress: Progress) -> str:
    """What will be trained on what."""
    config, mesh = plan.config, plan.mesh
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    lines = [
        f"{n_parameters(config.model):,} parameters, {config.compute.dtype}, on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}{f' ({axes})' if axes else ''}",
        f"{config.steps:,} steps of {config.data.batch_size} x {config.data.sequence_length} "
        f"tokens ({tokens:,} in all) to {config.out}",
    ]
    if progress.step:
        lines.append(f"going on from step {progress.step:,}")
    return "\n".join(lines)


def summary(plan: Plan, progress: Progress, stop: StopRequest, clock: Clock) -> str:
    """How it ended and where the time went."""
    config, out = plan.config, Path(plan.config.out)
    if progress.step >= config.steps:
        how = f"done: {progress.step:,} steps"
    elif is_over(config, progress):
        how = f"stopped after step {progress.step:,}: no better validation loss for a while"
    else:
        how = f"stopped by {stop.requested} after step {progress.step:,}; the same command goes on"
    seconds = clock.seconds()
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {x / total:.1%}" for name, x in seconds.items() if x > total / 1000)
    best = "" if progress.best_loss is None else f"\nbest validation loss {progress.best_loss:.4f}"
    return (
        f"{how}\n{duration(total)} in this process: {parts}{best}\n"
        f"checkpoint {out / CHECKPOINTS / str(progress.step)}, plot {out / PLOT}"
    )
