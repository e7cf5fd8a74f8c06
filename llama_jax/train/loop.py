"""Pretraining: the loop that joins data, step, checkpoints and metrics.

The same command starts a run and continues it. Batch number n is a function of (seed, n) and the
step a function of (state, batch), so a run that was stopped ends with the bits of one that was not.
"""

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from llama_jax import config as schema
from llama_jax import tokenizer as tokenizers
from llama_jax.config import ConfigError, TrainConfig, batch_of
from llama_jax.data.loader import Loader
from llama_jax.data.shards import read_meta
from llama_jax.train import checkpoint, spikes
from llama_jax.train.checkpoint import CONFIG, Checkpoint, Writer, is_first
from llama_jax.train.checksum import difference, make_checksums
from llama_jax.train.goodput import Clock, Ledger
from llama_jax.train.metrics import Journal, Screen, plot_losses
from llama_jax.train.processes import joined
from llama_jax.train.profile import Profiler
from llama_jax.train.program import Program, make_program
from llama_jax.train.report import Reporter, TrainingError, introduction, is_due, summary
from llama_jax.train.spikes import Spike, Window
from llama_jax.train.step import Batch, TrainState, init_state, lm_loss, make_evaluation
from llama_jax.train.stop import StopRequest, both_wishes, wishes
from sharding.distributed import barrier, from_local_rows, local_rows
from sharding.partition import on_devices

DONE, STOPPED = 0, 75
SLOWEST_SECONDS = 600.0  # for a process to come where the others are
CHECKPOINTS = "checkpoints"


class Run(NamedTuple):
    """All that is decided before anything is allocated.

    rows: of a batch, those that this process reads.
    """

    config: TrainConfig
    tokenizer: tokenizers.Tokenizer
    data: Loader
    validation: Loader | None
    rows: np.ndarray
    program: Program


class Programs(NamedTuple):
    """What is compiled, once per run.

    step: (state, batch) -> (state, metrics); the old state is given up. Several processes add to
        the batch what each wants (`wishes`), and read the answer in metrics["stop"].
    evaluate: (params, batch) -> sums; None without validation data.
    is_finite: state -> bool.
    checksums: state -> a checksum for each device; None where no two devices hold the same.
    groups: what the columns of the checksums are.
    """

    step: Any
    evaluate: Any
    is_finite: Any
    checksums: Any
    groups: Any


class Progress(NamedTuple):
    """What a run knows besides its arrays; part of every checkpoint.

    step: batches consumed; the next one is batch number `step`.
    validation_loss: of this step, None if it was not measured.
    best_loss: lowest validation loss so far.
    without_best: validation losses since then.
    skipped: windows of batches that were skipped, or will be.
    losses: what the rule for spikes remembers.
    """

    step: int = 0
    validation_loss: float | None = None
    best_loss: float | None = None
    without_best: int = 0
    skipped: tuple[Window, ...] = ()
    losses: dict[str, Any] = {}  # noqa: RUF012

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
    process at once. Of several processes each calls this, and each ends in the same way.

    Raises:
        ConfigError: the configuration does not fit the devices, the data, the tokenizer or the run
            in `out`; nothing has been allocated.
        CheckpointError: a checkpoint cannot be written, or none is intact.
        TrainingError: three updates in a row were not finite, or devices that should hold the same
            do not. The last good checkpoint stays.
    """
    clock = Clock("startup")
    with joined(config, clock):
        run = make_run(config)
        compiled = functools.cache(lambda: compile_programs(run))
        for _ in range(config.spikes.most + 1):
            try:
                return train_on(run, compiled, clock)
            except Spike as spike:
                skip_batches_of(spike, run, clock)
        raise TrainingError(
            f"{config.spikes.most} spikes of the loss were skipped, and another came "
            "(spikes.most). Lower optimizer.peak_lr, or look at the data"
        )


def train_on(run: Run, compiled: Callable[[], Programs], clock: Clock) -> int:
    """Trains from the newest checkpoint, or the beginning, to the end; returns the exit code.

    Raises:
        Spike: the run is to go on from an earlier checkpoint; further as `train`.
    """
    config, out = run.config, Path(run.config.out)
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(run.program.mesh))
        stop = stack.enter_context(StopRequest())
        profiler = stack.enter_context(Profiler(out, config.profile))
        tokenizer_copy = out / run.tokenizer.file_name
        copies = [out / CONFIG, tokenizer_copy]
        writer = stack.enter_context(Writer(out / CHECKPOINTS, config.checkpoint, copies))
        windows = spikes.united((*config.skip_batches, *spikes.read_skipped(out)))
        found = find_start(run, writer, windows)
        progress = started_from(found)._replace(skipped=windows)
        ledger = journal = None
        if is_first():
            schema.save(config, out / CONFIG)
            tokenizer_copy.write_bytes(run.tokenizer.model)
            ledger = Ledger(out, clock)
            journal = stack.enter_context(Journal(out, progress.step, config, config.wandb))
        screen = stack.enter_context(
            Screen(progress.step, config.steps, None if is_first() else Console(quiet=True))
        )
        screen.say(introduction(config, run.program.mesh, progress.step))
        if is_over(config, progress):
            screen.say("nothing is left to do; raise steps (or patience) to go on")
            if ledger:
                ledger.write(ended=True)
            return DONE

        clock.switch("compile")
        programs = compiled()
        clock.switch("startup")
        state = restored_state(run, found) if found else new_state(run)
        saved_step = found.step if found else None
        clock.step = progress.step
        detector = spikes.Detector(config.spikes, progress.losses)
        reporter = Reporter(
            config, run.program.mesh, progress.step, journal, screen, clock, ledger, detector
        )
        batches = stack.enter_context(closing(unskipped(run.data, progress.step, windows)))
        batch = place(run, next(batches))
        wish = both_wishes(run.program.mesh)

        while not is_over(config, progress) and not stops(stop, reporter):
            clock.switch("step")
            if said := profiler.before_step(progress.step + 1, state.step):
                screen.say(said)
            with jax.profiler.StepTraceAnnotation("train", step_num=progress.step + 1):
                state, metrics = programs.step(state, batch | wish[stop.requested is not None])
            progress = progress.after_step()
            clock.step = progress.step
            clock.switch("data")  # while the devices are busy with the step
            batch = place(run, next(batches))
            clock.settle("data" if metrics["loss"].is_ready() else "ahead")
            reporter.report(progress.step, metrics)
            writer.check()
            if ledger:
                ledger.sign_of_life()

            if config.checksum_every and progress.step % config.checksum_every == 0:
                check_replicas(run, programs, state, progress.step)

            is_best = False
            if run.validation and is_due(progress.step, config.evaluate_every, config):
                reporter.flush()
                clock.switch("validation")
                loss = measure(run, run.validation, programs, state, clock)
                progress = progress.measured(loss)
                is_best = progress.without_best == 0
                reporter.validation(progress.step, loss, is_best)

            is_kept = is_best and config.checkpoint.keep_best > 0
            if is_kept or is_due(progress.step, config.checkpoint.every, config):
                reporter.flush()
                clock.switch("checkpoint")
                progress = progress._replace(losses=detector.memory())
                save(run, programs, writer, state, progress)
                saved_step = progress.step

        reporter.flush()
        clock.switch("checkpoint")
        if progress.step != saved_step:
            progress = progress._replace(losses=detector.memory())
            save(run, programs, writer, state, progress)
        writer.wait()
        clock.switch("end")
        if ledger:
            plot_losses(out)
            ledger.write(ended=True)
        last = out / CHECKPOINTS / str(progress.step)
        how = ending(config, progress, stop)
        screen.say(summary(how, progress.best_loss, last, clock, ledger))
    return DONE if is_over(config, progress) else STOPPED


def is_over(config: TrainConfig, progress: Progress) -> bool:
    """Whether all steps are done, or patience with the validation loss is at an end."""
    impatient = config.patience is not None and progress.without_best >= config.patience
    return progress.step >= config.steps or impatient


def ending(config: TrainConfig, progress: Progress, stop: StopRequest) -> str:
    """How it ended, in a line."""
    if progress.step >= config.steps:
        return f"done: {progress.step:,} steps"
    if is_over(config, progress):
        return f"stopped after step {progress.step:,}: no better validation loss for a while"
    who = stop.requested or "a signal to another process"
    return f"stopped by {who} after step {progress.step:,}; the same command goes on"


# Before the run -----------------------------------------------------------------------------------


def make_run(config: TrainConfig) -> Run:
    """Opens tokenizer and data and lays everything out over the devices; allocates no array.

    Raises:
        ConfigError: they do not fit together.
    """
    tokenizer = tokenizers.load(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{config.tokenizer} has {tokenizer.vocab_size} pieces, but model.vocab_size is "
            f"{config.model.vocab_size}; use a model whose vocab_size is at least that"
        )
    program = make_program(config)
    own_rows = local_rows(program.batch["tokens"])
    data, validation = open_data(config, tokenizer, own_rows)
    return Run(config, tokenizer, data, validation, own_rows, program)


def open_data(
    config: TrainConfig, tokenizer: tokenizers.Tokenizer, rows: np.ndarray
) -> tuple[Loader, Loader | None]:
    """Training and validation data; None for the latter where the corpora have none.

    `rows` of each batch are read.

    Raises:
        ConfigError: patience is set and there is nothing to be impatient with.
        DataError: a corpus is unfinished, damaged, or made with another tokenizer.
    """
    check = (config.seed, config.model.vocab_size, tokenizer.fingerprint, rows)
    data = Loader(config.data, "train", *check)
    if any(read_meta(source.path).validation for source in config.data.sources):
        return data, Loader(config.data, "validation", *check)
    if config.patience is not None:
        raise ConfigError(
            "patience needs validation data, and the corpora have none; prepare them with "
            "validation_fraction, or leave patience out"
        )
    return data, None


def find_start(run: Run, writer: Writer, windows: tuple[Window, ...]) -> Checkpoint | None:
    """The checkpoint to go on from: the newest intact one that has passed no batch to be skipped.

    Newer ones no longer count. None for a run that begins.

    Raises:
        ConfigError: this configuration does not continue the run, or no checkpoint is early enough.
    """
    folder = Path(run.config.out) / CHECKPOINTS
    found = checkpoint.newest(folder, wanted=lambda saved: spikes.continues(saved, windows))
    if found:
        check_resumable(run, found)
        goes_back = started_from(found).skipped != windows
        writer.set_aside_after(found.step, "rewound" if goes_back else "damaged")
    elif checkpoint.steps(folder):
        raise ConfigError(
            f"{folder}: every checkpoint has been trained on batches that are to be skipped, or "
            "has skipped others. Skip later batches (skip_batches), or begin a new run (out)"
        )
    barrier("finding the checkpoint to go on from", SLOWEST_SECONDS)
    return found


def started_from(found: Checkpoint | None) -> Progress:
    """What is known at the start; fields that an older release did not save are as in a new run."""
    saved = found.progress if found else {}
    known = {name: saved[name] for name in Progress._fields if name in saved}
    skipped = spikes.united((first, after) for first, after in known.get("skipped", ()))
    return Progress(**{**known, "skipped": skipped})


def skip_batches_of(spike: Spike, run: Run, clock: Clock) -> None:
    """Keeps the window of a spike among those the run skips from now on."""
    out = Path(run.config.out)
    chosen = spikes.read_skipped(out)
    windows = spikes.united((*run.config.skip_batches, *chosen))
    window = spikes.window_of(spike, run.config.spikes, windows)
    barrier("a spike", SLOWEST_SECONDS)  # nobody reads the file while it is written
    if is_first():
        spikes.write_skipped(out, spikes.united((*chosen, window)))
        print(f"{spike}: going back, and skipping the batches {window[0]} to {window[1] - 1}")
    barrier("skipping batches", SLOWEST_SECONDS)
    clock.switch("startup")


def check_resumable(run: Run, found: Checkpoint) -> None:
    """Refuses to go on from a checkpoint that this configuration does not continue.

    Raises:
        ConfigError: naming what differs.
    """
    checkpoint.check_unchanged(found, run.config)
    if found.progress["tokenizer"] != run.tokenizer.fingerprint:
        raise ConfigError(
            f"{run.config.tokenizer} is not the tokenizer this run was trained with; that one is "
            f"in {found.folder}. Use it, or start a new run in another folder (out)."
        )


def compile_programs(run: Run) -> Programs:
    """Compiles for the shapes of the run."""
    config, program = run.config, run.program
    loss_fn = lm_loss(program.model, config.z_loss)
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    evaluate = jax.jit(make_evaluation(loss_fn, config.accumulate), out_shardings=everywhere)
    is_finite = jax.jit(
        lambda state: jnp.all(
            jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(on_devices(state))])
        )
    )
    checksums, groups = make_checksums(program.state, program.mesh) or (None, ())
    return Programs(
        program.step.lower(program.state, program.batch | wishes(program.mesh)).compile(),
        evaluate.lower(program.state.params, program.batch).compile() if run.validation else None,
        is_finite.lower(program.state).compile(),
        checksums and jax.jit(checksums).lower(program.state).compile(),
        groups,
    )


def new_state(run: Run) -> TrainState:
    """The state before the first step, each array made where it lies."""
    program = run.program
    places = jax.tree.map(lambda x: x.sharding, program.state)
    if run.config.parameters_from:
        params = checkpoint.load_parameters(run.config.parameters_from, program.state.params)
        start = jax.jit(
            lambda params: init_state(params, program.optimizer),
            donate_argnums=0,
            out_shardings=places,
        )
        return start(params)
    create = jax.jit(
        lambda key: init_state(program.model.init(key), program.optimizer), out_shardings=places
    )
    return create(jax.random.key(run.config.seed))


def restored_state(run: Run, found: Checkpoint) -> TrainState:
    """The state of a checkpoint, read to where this run's arrays lie."""
    trees = checkpoint.load(found, _saved_trees(run.program.state))
    return TrainState(params=trees["params"], **trees["training"])


def _saved_trees(state: TrainState) -> dict[str, Any]:
    training = state._asdict()
    return {"params": training.pop("params"), "training": training}


# During the run -----------------------------------------------------------------------------------


def stops(stop: StopRequest, reporter: Reporter) -> bool:
    """Whether to stop now: one process at once, several when all of them know."""
    return reporter.stop_agreed if jax.process_count() > 1 else stop.requested is not None


def unskipped(data: Loader, step: int, windows: tuple[Window, ...]) -> Any:
    """The batches of the steps after `step`, with those of the windows left out."""
    start = batch_of(step, windows)
    for first, after in windows:
        if first >= start:
            yield from data.batches(start, first)
            start = after
    yield from data.batches(start)


def place(run: Run, batch: dict[str, np.ndarray]) -> Batch:
    """This process's rows of a batch on its devices; returns before they have arrived."""
    shapes = run.program.batch
    if jax.process_count() == 1:
        return {name: jax.device_put(batch[name], x.sharding) for name, x in shapes.items()}
    return {name: from_local_rows(x, run.rows, batch[name]) for name, x in shapes.items()}


def check_replicas(run: Run, programs: Programs, state: TrainState, step: int) -> None:
    """Compares what several devices hold alike.

    Raises:
        TrainingError: naming the device that differs.
    """
    if programs.checksums is None:
        return
    sums = np.asarray(programs.checksums(state))
    if found := difference(sums, programs.groups, run.program.mesh):
        raise TrainingError(
            f"silent corruption after step {step}: {found}. The checkpoints are from before; run "
            "the same command without that device's host to go on"
        )


def measure(
    run: Run, validation: Loader, programs: Programs, state: TrainState, clock: Clock
) -> float:
    """The validation loss in nats per token."""
    assert validation.steps is not None  # only training data is endless
    total = weight = 0.0
    for number in range(min(run.config.evaluate_batches, validation.steps)):
        clock.switch("validation")
        sums = jax.device_get(programs.evaluate(state.params, place(run, validation.batch(number))))
        total, weight = total + float(sums["loss"]), weight + float(sums["weight"])
    return total / weight


def save(
    run: Run, programs: Programs, writer: Writer, state: TrainState, progress: Progress
) -> None:
    """Begins a checkpoint. The data and every random draw follow from the seed and the step.

    Raises:
        TrainingError: the state is not finite, or differs between devices; nothing is written.
    """
    if run.config.checksum_every:
        check_replicas(run, programs, state, progress.step)
    if not programs.is_finite(state):
        raise TrainingError(
            f"parameters or optimizer state are not finite after step {progress.step}, which is "
            f"not saved; {run.config.out} keeps the checkpoints before it. Lower optimizer.peak_lr"
        )
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "llama-jax")
    writer.save(
        progress.step,
        _saved_trees(state),
        {
            **progress._asdict(),
            "seed": run.config.seed,
            "data": {
                "seed": run.config.seed,
                "next_batch": batch_of(progress.step, progress.skipped),
            },
            "tokenizer": run.tokenizer.fingerprint,
            "versions": {name: version(name) for name in libraries},
        },
    )
