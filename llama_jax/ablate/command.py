"""`ablate`: variants of a model, trained at an equal budget, and one report on them.

A study is a folder. Every run is an ordinary training run with a folder of its own, made by a
process of its own; what it comes to is one file beside it. So a study goes on where it was stopped,
several machines may share one, and the report is made of whatever is there.
"""

import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llama_jax import config as schema
from llama_jax.ablate import measure, records
from llama_jax.ablate.grid import (
    CORPUS,
    RUNS,
    TOKENIZER,
    TRIALS,
    Variant,
    training_run,
    trial_run,
    variants,
)
from llama_jax.ablate.listing import print_list
from llama_jax.ablate.matrix import print_matrix
from llama_jax.ablate.probes import PROBES, chance
from llama_jax.ablate.probing import probe
from llama_jax.ablate.records import Account, Curve, SeedResult, Study
from llama_jax.ablate.report import write_report
from llama_jax.ablate.settings import AblateConfig
from llama_jax.config import (
    ConfigError,
    DataPrepareConfig,
    Frozen,
    TokenizerTrainConfig,
    TrainConfig,
)
from llama_jax.data.prepare import prepare
from llama_jax.data.python_sources import corpus_globs
from llama_jax.data.shards import META
from llama_jax.model.count import (
    cache_bytes_per_row,
    cache_bytes_per_token,
    flops_per_token,
    parameters,
)
from llama_jax.tokenizer.train import train_tokenizer
from llama_jax.train.loop import train
from llama_jax.train.metrics import METRICS, read_metrics
from sharding.mesh import machine

DONE, FAILED, STOPPED = 0, 1, 75
STUDY, ACCOUNTS, RESULT, LOG = "study.yaml", "accounts.json", "result.json", "log.txt"
SHARED = ("jax", "flax", "optax", "numpy")
ALL = "all"  # devices of a run
VISIBLE = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_DEVICES")
# The command line in a process of its own, wherever the package is.
CHILD = "import sys; from llama_jax.cli import main; sys.exit(main())"


class Job(NamedTuple):
    """A training run: of a variant and a seed, or a trial of a learning rate."""

    variant: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """What --only takes."""
        return f"{self.variant}/{self.seed if self.rate is None else f'lr{self.rate:g}'}"


def ablate(config: AblateConfig) -> int:
    """Trains what is missing of a study, measures, and writes its report.

    Returns 0; 75 when a signal stopped it, and the same command goes on; 1 when a run failed, whose
    log is then named.

    Raises:
        ConfigError: a variant cannot be, or cannot meet the budget.
    """
    console = Console(highlight=False)
    if config.list:
        return print_list(console)
    if config.parity:
        return print_matrix(console, Path(config.out))
    found = variants(config)
    if config.only is not None:
        return compute(config, found, _job(config, found, config.only))
    print_budget(config, found, console)
    if config.plan:
        return DONE
    out = Path(config.out)
    _check_unchanged(config, out / STUDY)
    out.mkdir(parents=True, exist_ok=True)
    schema.save(config, out / STUDY)
    if code := prepare_corpus(config, console):
        return code
    code = compute_all(config, trials(config, found), console)
    if code == DONE:
        code = compute_all(config, runs(config, found), console)
    if code == DONE:
        count(config, found, console)
    write_report(study(config, found), out)
    console.print(f"report      {out / 'report.md'}, report.html")
    return code


def print_budget(config: AblateConfig, found: dict[str, Variant], console: Console) -> None:
    """What every variant has, and what the study takes."""
    table = Table(box=SIMPLE_HEAD, title=escape(config.title), pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for heading in ("parameters", "active", "d_ff", "MFLOPs", "cache bytes", "off"):
        table.add_column(heading, justify="right", no_wrap=True)
    flops = 0
    for name, variant in found.items():
        run = training_run(config, variant, config.seeds[0])
        length, counted = run.data.sequence_length, parameters(variant.model)
        each = flops_per_token(variant.model, length)
        flops += each * run.steps * run.data.batch_size * length * len(config.seeds)
        if config.tuning:
            steps = config.tuning.steps * len(config.tuning.rates)
            flops += each * steps * run.data.batch_size * length
        off = max((abs(x) for x in variant.solved.off.values()), default=0.0)
        table.add_row(
            name,
            f"{counted.total:,}",
            f"{counted.active:,}",
            f"{variant.model.d_ff:,}",
            f"{each / 1e6:,.2f}",
            f"{cache_bytes_per_row(variant.model, length) // length:,}",
            f"{off:.2%}",
        )
    console.print(table)
    console.print("MFLOPs of training and bytes of cache are those of a token")
    for name, variant in found.items():
        console.print(f"  {name}: {variant.changes}", markup=False)
    tried = len(config.tuning.rates) * len(found) if config.tuning else 0
    console.print(
        f"{len(found) * len(config.seeds)} runs of {run.steps:,} steps x "
        f"{run.data.batch_size * run.data.sequence_length:,} tokens"
        + (f", {tried} trials of {config.tuning.steps:,} steps" if config.tuning else "")
        + f": {flops:.2e} FLOPs (at 10^11 a second {flops / 1e11 / 3600:,.1f} hours)"
    )


def _check_unchanged(config: AblateConfig, path: Path) -> None:
    """Refuses a folder that holds another study: runs of two would be compared."""
    if not path.exists():
        return
    before = schema.read(AblateConfig, path)
    for name in ("run", "corpus", "variants", "base", "budget", "tuning", "evaluation", "probes"):
        if getattr(before, name) != getattr(config, name):
            raise ConfigError(
                f"{path.parent} holds a study with another `{name}`: choose another out, or remove "
                "the folder"
            )


def prepare_corpus(config: AblateConfig, console: Console) -> int:
    """Makes tokenizer and shards of the study's text, unless they are there."""
    if config.corpus is None:
        return DONE
    out, texts = Path(config.out), config.corpus.paths or corpus_globs(None)
    separator = config.corpus.separator
    if not (out / TOKENIZER).exists():
        console.rule("tokenizer")
        settings = TokenizerTrainConfig(
            paths=texts,
            separator=separator,
            out=str(out / TOKENIZER),
            vocab_size=config.corpus.vocab_size,
            sample_mb=8,
        )
        if code := train_tokenizer(settings):
            return code
    if not (out / CORPUS / META).exists():
        console.rule("corpus")
        data = DataPrepareConfig(
            paths=texts,
            separator=separator,
            out=str(out / CORPUS),
            tokenizer=str(out / TOKENIZER),
            validation_fraction=config.corpus.validation_fraction,
        )
        return prepare(data)
    return DONE


# Runs ---------------------------------------------------------------------------------------------


def trials(config: AblateConfig, found: dict[str, Variant]) -> list[Job]:
    """Every learning rate that is to be tried."""
    if config.tuning is None:
        return []
    return [Job(name, config.tuning.seed, rate) for name in found for rate in config.tuning.rates]


def runs(config: AblateConfig, found: dict[str, Variant]) -> list[Job]:
    """Every run, seed by seed, so that a study that is stopped early compares all variants."""
    return [Job(name, seed) for seed in config.seeds for name in found]


def _job(config: AblateConfig, found: dict[str, Variant], name: str) -> Job:
    jobs = [*runs(config, found), *trials(config, found)]
    for job in jobs:
        if job.name == name:
            return job
    raise ConfigError(f"--only {name}: the runs are {', '.join(job.name for job in jobs)}")


def settings_of(config: AblateConfig, found: dict[str, Variant], job: Job) -> TrainConfig:
    """The training run of a job; a run of the study has the learning rate that was found best."""
    variant = found[job.variant]
    if job.rate is not None:
        return trial_run(config, variant, job.rate)
    return training_run(config, variant, job.seed, best_rate(config, job.variant))


def best_rate(config: AblateConfig, variant: str) -> float | None:
    """The tried learning rate of the lowest validation loss; None without trials.

    Raises:
        ConfigError: a trial is missing.
    """
    if config.tuning is None:
        return None
    losses = tried(config, variant)
    missing = [rate for rate in config.tuning.rates if rate not in losses]
    if missing:
        raise ConfigError(f"the trial {variant}/lr{missing[0]:g} is missing: run the study first")
    return min(losses, key=lambda rate: (losses[rate] != losses[rate], losses[rate]))


def tried(config: AblateConfig, variant: str) -> dict[float, float]:
    """Learning rate -> validation loss of the trials that are over."""
    losses = {}
    for rate in config.tuning.rates if config.tuning else ():
        path = Path(config.out) / TRIALS / variant / f"{rate:g}" / RESULT
        if path.exists():
            losses[rate] = records.read(path, SeedResult).loss
    return losses


def compute_all(config: AblateConfig, jobs: list[Job], console: Console) -> int:
    """Computes every job whose result is missing, `config.jobs` at a time; returns an exit code."""
    missing = [job for job in jobs if not (_folder(config, job) / RESULT).exists()]
    if not missing:
        return DONE
    bar = Progress(
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        console=console,
    )
    waiting, code = iter(missing), DONE
    free = list(config.devices) or [ALL] * config.jobs
    running: dict[subprocess.Popen[bytes], tuple[Job, str]] = {}
    with bar:
        task = bar.add_task("runs", total=len(jobs), completed=len(jobs) - len(missing))
        try:
            while True:
                while free and code == DONE and (job := next(waiting, None)) is not None:
                    devices = free.pop(0)
                    running[_start(config, job, devices)] = job, devices
                    names = ", ".join(job.name for job, _ in running.values())
                    bar.update(task, description=names)
                if not running:
                    return code
                for process in _ended(list(running)):
                    job, devices = running.pop(process)
                    free.append(devices)
                    if process.returncode == DONE:
                        bar.advance(task)
                        continue
                    code = STOPPED if process.returncode == STOPPED else FAILED
                    log = _folder(config, job) / LOG
                    what = "was stopped" if code == STOPPED else f"failed; see {log}"
                    console.print(f"{job.name} {what}")
        except KeyboardInterrupt:  # the runs have it too: they save and end
            for process in running:
                process.wait()
            return STOPPED


def _folder(config: AblateConfig, job: Job) -> Path:
    if job.rate is None:
        return Path(config.out) / RUNS / job.variant / str(job.seed)
    return Path(config.out) / TRIALS / job.variant / f"{job.rate:g}"


def _start(config: AblateConfig, job: Job, devices: str) -> subprocess.Popen[bytes]:
    folder = _folder(config, job)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["ablate", "--config", str(Path(config.out) / STUDY), "--only", job.name]
    given = dict.fromkeys(VISIBLE, devices) if devices != ALL else {}
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **given},
        )


def _ended(running: list[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """The processes that have ended, once there is one."""
    while True:
        if ended := [process for process in running if process.poll() is not None]:
            return ended
        time.sleep(0.2)


def compute(config: AblateConfig, found: dict[str, Variant], job: Job) -> int:
    """Trains one run to its end, evaluates it, and writes what it came to."""
    variant, run = found[job.variant], settings_of(config, found, job)
    if code := train(run):
        return code
    base = training_run(config, found[config.base_name], config.seeds[0])
    losses = measure.losses(run, base.data.sequence_length, config.evaluation)
    probes: dict[str, dict[str, float]] = {}
    places: dict[str, dict[str, dict[str, float]]] = {}
    if config.probes and job.rate is None:
        for name, difficulty in probes_asked(config):
            overall, of_place = probe(variant.model, name, difficulty, job.seed, config.probes)
            probes.setdefault(name, {})[str(difficulty)] = overall
            of_text = {str(place): accuracy for place, accuracy in of_place.items()}
            places.setdefault(name, {})[str(difficulty)] = of_text
    lines = read_metrics(Path(run.out) / METRICS)
    trained = [line for line in lines if "tokens_per_second" in line]
    result = SeedResult(
        variant=job.variant,
        seed=job.seed,
        learning_rate=run.optimizer.peak_lr,
        loss=losses.loss,
        batch_losses=losses.batches,
        curve=curve(lines, run.data.batch_size * run.data.sequence_length),
        loss_by_position=losses.by_position,
        train_seconds=trained[-1]["seconds/step"],
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in trained),
        probes=probes,
        probe_places=places,
    )
    records.write(_folder(config, job) / RESULT, result)
    return DONE


def probes_asked(config: AblateConfig) -> list[tuple[str, int]]:
    """Every probe and difficulty.

    Raises:
        ConfigError: a probe is unknown, or a difficulty no number.
    """
    asked = []
    for name, given in (config.probes.difficulties if config.probes else Frozen()).items():
        if name not in PROBES:
            raise ConfigError(
                f"probes.difficulties: no probe is called '{name}'; there are {', '.join(PROBES)}"
            )
        for difficulty in given if isinstance(given, tuple) else (given,):
            if not isinstance(difficulty, int):
                raise ConfigError(f"probes.difficulties.{name}: {difficulty!r} is no whole number")
            asked.append((name, difficulty))
    return asked


def chances(config: AblateConfig) -> dict[str, dict[str, float]]:
    """The accuracy of guessing, {probe: {difficulty: accuracy}}."""
    found: dict[str, dict[str, float]] = {}
    for name, difficulty in probes_asked(config):
        assert config.probes
        guess = chance(name, config.probes.length, config.probes.vocab_size, difficulty)
        found.setdefault(name, {})[str(difficulty)] = guess
    return found


def curve(lines: list[dict[str, float]], tokens: int) -> Curve:
    """The losses along a run, from its metrics; `tokens` of a step."""
    trained = [line for line in lines if line.get("loss") is not None]
    validated = [line for line in lines if line.get("validation_loss") is not None]
    return Curve(
        steps=tuple(int(line["step"]) for line in trained),
        tokens=tuple(int(line["step"]) * tokens for line in trained),
        losses=tuple(line["loss"] for line in trained),
        validation_steps=tuple(int(line["step"]) for line in validated),
        validation_losses=tuple(line["validation_loss"] for line in validated),
    )


# Accounts and report ------------------------------------------------------------------------------


def count(config: AblateConfig, found: dict[str, Variant], console: Console) -> None:
    """Measures speed and memory of every variant, unless that is done."""
    path = Path(config.out) / ACCOUNTS
    if path.exists():
        return
    console.print("measuring speed and memory")
    models = {name: variant.model for name, variant in found.items()}
    speeds, memory = measure.speeds(models, config.cost), config.cost.memory_gib
    accounts = []
    for name, variant in found.items():
        model, counted = variant.model, parameters(variant.model)
        run = training_run(config, variant, config.seeds[0])
        length = run.data.sequence_length
        accounts.append(
            Account(
                variant=name,
                description=variant.changes,
                parameters=counted.total,
                parameters_without_embeddings=counted.total - counted.embeddings,
                active_parameters=counted.active,
                d_ff=model.d_ff,
                training_flops_per_token=flops_per_token(model, length),
                cache_bytes_per_token=cache_bytes_per_row(model, length) // length,
                cache_bytes_per_row=cache_bytes_per_row(model, 1) - cache_bytes_per_token(model),
                speeds=speeds[name],
                capacities=tuple(
                    measure.capacity(model, context, memory)
                    for context in (config.cost.contexts if memory else ())
                    if memory
                ),
            )
        )
    records.write(path, tuple(accounts))


def study(config: AblateConfig, found: dict[str, Variant]) -> Study:
    """All that there is of the study by now."""
    out = Path(config.out)
    run = training_run(config, found[config.base_name], config.seeds[0])
    done = [_folder(config, job) / RESULT for job in runs(config, found)]
    accounts = out / ACCOUNTS
    corpus = (
        "Python's standard library"
        if config.corpus and not config.corpus.paths
        else ", ".join(
            config.corpus.paths if config.corpus else (source.path for source in run.data.sources)
        )
    )
    return Study(
        name=out.name,
        title=config.title,
        question=config.question,
        budget=tuple(budget.equal for budget in config.budget),
        budget_tolerance=config.tolerance,
        base=config.base_name,
        variants=tuple(found),
        seeds=config.seeds,
        corpus=corpus,
        tokens=run.steps * run.data.batch_size * run.data.sequence_length,
        sequence_length=run.data.sequence_length,
        device=machine(),
        versions={name: version(name) for name in SHARED},
        command=f"python main.py ablate --config {STUDY}",
        accounts=records.read(accounts, tuple[Account, ...]) if accounts.exists() else (),
        results=tuple(records.read(path, SeedResult) for path in done if path.exists()),
        chances=chances(config),
        learning_rates={name: tried(config, name) for name in found} if config.tuning else {},
    )
