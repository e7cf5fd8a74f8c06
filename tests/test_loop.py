"""Whole runs of a tiny model on a real corpus: stopped, killed, damaged, poisoned, changed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from faults import MODEL, prepared
from jax.experimental.compilation_cache import compilation_cache

from llama_jax import config as schema
from llama_jax.config import ConfigError, TrainConfig
from llama_jax.data.loader import Loader
from llama_jax.data.shards import DataError, read_meta
from llama_jax.train import checkpoint, loop, metrics, program
from llama_jax.train.checkpoint import CheckpointError
from llama_jax.train.goodput import Clock
from llama_jax.train.loop import train
from llama_jax.train.metrics import read_metrics
from llama_jax.train.report import TrainingError
from sharding.mesh import make_mesh

pytestmark = pytest.mark.optimized  # what goes on exactly is what users run
STEPS, HALF = 8, 4
COMPUTE = {"loss_chunks": 2, "scan_layers": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A tokenizer and a prepared corpus: forty documents of a few words."""
    return prepared(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Equal programs are compiled once; gives the settings for other processes."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    programs = {}
    compile_anew = loop.compile_programs

    def compile_once(run):
        c = run.config
        key = (c.model, c.compute, c.optimizer, c.steps, c.accumulate, run.program.mesh)
        if key not in programs:
            programs[key] = compile_anew(run)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_programs", compile_once)
        yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """One device unless a test asks for more: most of what is tested here is not about meshes."""

    def make(sizes, devices):
        wanted = np.prod([size for size in sizes.values() if size > 0])
        return make_mesh(sizes, jax.devices()[:wanted])

    monkeypatch.setattr(program, "make_mesh", make)


def make_config(corpus, out, **changes):
    values = {
        "out": str(out),
        "model": MODEL,
        "tokenizer": str(corpus / "tokenizer.model"),
        "data": {
            "sources": [{"path": str(corpus / "shards")}],
            "sequence_length": 16,
            "batch_size": 4,
        },
        "steps": STEPS,
        "optimizer": {"peak_lr": 1e-2, "warmup_steps": 2},
        "compute": COMPUTE,
        "checkpoint": {"every": HALF, "keep_last": 9},
        "log_every": 1,
        "evaluate_every": HALF,
        "evaluate_batches": 2,
    }
    return TrainConfig.model_validate({**values, **changes})


def ending(out):
    """Every bit of the newest checkpoint, its place in the data, and every loss logged."""
    found = checkpoint.newest(Path(out) / "checkpoints")
    assert found is not None
    run = loop.make_run(schema.read(TrainConfig, Path(out) / "config.yaml"))
    state = loop.restored_state(run, found)
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    losses = [
        (line["step"], line.get("loss"), line.get("grad_norm"), line.get("validation_loss"))
        for line in read_metrics(Path(out) / "metrics.jsonl")
    ]
    return bits, found.progress["data"], losses


def restart_at(step, run, out):
    """A run's folder as it was after a step: its later checkpoints are not there."""
    shutil.copytree(run, out)
    for later in checkpoint.steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(out / "checkpoints" / str(later))
    return out


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """A run from beginning to end, for others to be compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
        out = tmp_path_factory.mktemp("runs") / "undisturbed"
        assert train(make_config(corpus, out)) == 0
    return out


# Resuming is exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resumed_is_undisturbed_to_the_bit(corpus, tmp_path, monkeypatch, seed, dtype, accumulate):
    """The middle checkpoint was written while the first run went on with donated arrays."""
    monkeypatch.setattr(loop, "plot_losses", lambda out: None)
    settings = {"seed": seed, "compute": {**COMPUTE, "dtype": dtype}, "accumulate": accumulate}
    assert train(make_config(corpus, tmp_path / "whole", **settings)) == 0
    half = restart_at(HALF, tmp_path / "whole", tmp_path / "half")
    assert train(make_config(corpus, half, **settings)) == 0
    whole = ending(tmp_path / "whole")
    assert ending(half) == whole
    assert [step for step, loss, *_ in whole[2] if loss is not None] == list(range(1, STEPS + 1))
    assert whole[1] == {"seed": seed, "next_batch": STEPS}


def test_two_runs_are_equal_and_another_seed_is_not(corpus, undisturbed, tmp_path):
    assert train(make_config(corpus, tmp_path / "again")) == 0
    assert train(make_config(corpus, tmp_path / "other", seed=5)) == 0
    assert ending(tmp_path / "again") == ending(undisturbed)
    assert ending(tmp_path / "other") != ending(undisturbed)


# A process of its own, which at batch number `at`, when a checkpoint is there, ends itself.
ALONE = """
import os, signal, sys, time
from pathlib import Path
from llama_jax import config as schema
from llama_jax.data.loader import Loader
from llama_jax.train import loop

config, at, what = schema.read(schema.TrainConfig, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
original = Loader.batches

def batches(self, start, stop=None):
    for step, batch in enumerate(original(self, start, stop), start):
        if step == at:
            while not (Path(config.out) / "checkpoints" / str(config.checkpoint.every)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), getattr(signal, what))
        yield batch

Loader.batches = batches
sys.exit(loop.train(config))
"""


@pytest.mark.parametrize("what", ["SIGTERM", "SIGKILL"])
def test_stopped_processes_go_on_exactly(corpus, undisturbed, compiled, tmp_path, what):
    """A stop signal loses no step; kill -9 only those since the last checkpoint."""
    config = make_config(corpus, tmp_path / "run")
    schema.save(config, tmp_path / "start.yaml")
    stopped = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "start.yaml"), "6", what],
        env={**os.environ, **compiled, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None, stopped.stderr
    if what == "SIGKILL":
        assert stopped.returncode == -signal.SIGKILL
        assert saved.step == HALF
    else:
        assert stopped.returncode == 75, stopped.stderr
        assert saved.step == 6  # batch 6, the seventh, was being fetched during the sixth step
        assert f"stopped by {what} after step 6" in stopped.stdout
    assert train(config) == 0
    assert ending(tmp_path / "run") == ending(undisturbed)


def test_ctrl_c_finishes_the_step_and_saves(corpus, undisturbed, tmp_path, monkeypatch, capsys):
    original = Loader.batches

    def batches(self, start, stop=None):
        for step, batch in enumerate(original(self, start, stop), start):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batches", batches)
        assert train(make_config(corpus, tmp_path)) == 75
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]
    assert "stopped by SIGINT after step 3; the same command goes on" in capsys.readouterr().out
    assert train(make_config(corpus, tmp_path)) == 0
    assert ending(tmp_path) == ending(undisturbed)


def test_a_second_signal_ends_the_process_at_once():
    script = """
        import signal, time
        from llama_jax.train.stop import SECOND_SIGNAL_SECONDS, StopRequest
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # of the scheduler and of the supervisor: one wish
            print(stop.requested, flush=True)
            time.sleep(1.5 * SECOND_SIGNAL_SECONDS)
            signal.raise_signal(signal.SIGTERM)
            print("still here")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("SIGTERM\n", -signal.SIGTERM)


def test_signal_handlers_are_given_back(corpus, undisturbed):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert train(make_config(corpus, undisturbed)) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_finished_run_is_left_as_it_is(corpus, undisturbed, capsys):
    before = ending(undisturbed)
    assert train(make_config(corpus, undisturbed)) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert ending(undisturbed) == before


def test_a_damaged_checkpoint_costs_only_its_steps(corpus, undisturbed, tmp_path, caplog):
    run = restart_at(STEPS, undisturbed, tmp_path / "run")
    damaged = next((run / "checkpoints" / str(STEPS) / "state").rglob("d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train(make_config(corpus, run)) == 0
    assert f"Step {HALF}, the newest that is intact, is used instead" in caplog.text
    assert (run / "checkpoints" / f"{STEPS}.damaged").is_dir()
    assert ending(run) == ending(undisturbed)


def test_going_on_on_another_mesh(corpus, undisturbed, tmp_path):
    run = restart_at(HALF, undisturbed, tmp_path / "run")
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    assert train(make_config(corpus, run, mesh=mesh)) == 0
    _, _, losses = ending(run)
    _, _, expected = ending(undisturbed)
    for one, other in zip(losses, expected, strict=True):
        np.testing.assert_allclose(*([x for x in y if x is not None] for y in (one, other)), 1e-5)


def test_moments_on_the_host_are_as_good_and_resume_to_the_bit(corpus, undisturbed, tmp_path):
    settings = {"optimizer": {"peak_lr": 1e-2, "warmup_steps": 2, "offload": True}}
    settings["mesh"] = {"data": 1, "fsdp": 2, "tensor": 2}
    config = make_config(corpus, tmp_path / "whole", **settings)
    moments = jax.tree.leaves(loop.make_run(config).program.state.optimizer.mu)
    assert {moment.sharding.memory_kind for moment in moments} == {"pinned_host"}
    assert train(config) == 0
    half = restart_at(HALF, tmp_path / "whole", tmp_path / "half")
    assert train(make_config(corpus, half, **settings)) == 0
    bits, place, losses = ending(tmp_path / "whole")
    assert ending(half) == (bits, place, losses)
    for one, other in zip(losses, ending(undisturbed)[2], strict=True):
        np.testing.assert_allclose(*([x for x in y if x is not None] for y in (one, other)), 1e-5)


# What may change and what may not -----------------------------------------------------------------


def test_a_changed_model_is_refused_and_touches_nothing(corpus, undisturbed):
    before = (undisturbed / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"model.d_ff: 24 in the checkpoint, 28 now"):
        train(make_config(corpus, undisturbed, model={**MODEL, "d_ff": 28}))
    with pytest.raises(ConfigError, match=r"model.window: None in the checkpoint, 8 now"):
        train(make_config(corpus, undisturbed, model={**MODEL, "window": 8}))
    assert (undisturbed / "config.yaml").read_bytes() == before


def test_a_changed_learning_rate_takes_effect(corpus, undisturbed, tmp_path):
    run = restart_at(HALF, undisturbed, tmp_path / "run")
    optimizer = {"peak_lr": 5e-3, "warmup_steps": 2, "schedule": "constant"}
    assert train(make_config(corpus, run, steps=STEPS + 2, optimizer=optimizer)) == 0
    lines = read_metrics(run / "metrics.jsonl")
    rates = {x["step"]: x["learning_rate"] for x in lines if "learning_rate" in x}
    assert rates[2] == pytest.approx(1e-2)
    assert [rates[step] for step in range(HALF + 1, STEPS + 3)] == pytest.approx([5e-3] * 6)


def other_tokenizer(corpus, folder):
    """The same pieces in another file."""
    model = folder / "tokenizer.model"
    empty_field = b"\x2a\x00"
    model.write_bytes((corpus / "tokenizer.model").read_bytes() + empty_field)
    return model


def test_another_tokenizer_is_refused(corpus, undisturbed, tmp_path):
    """As is a corpus prepared with another one."""
    model = other_tokenizer(corpus, tmp_path)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        train(make_config(corpus, tmp_path / "run", tokenizer=str(model)))
    found = checkpoint.newest(undisturbed / "checkpoints")
    assert found is not None
    run = loop.make_run(make_config(corpus, undisturbed))
    found.progress["tokenizer"] = "0" * 64
    with pytest.raises(ConfigError, match="is not the tokenizer this run was trained with"):
        loop.check_resumable(run, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 2}}, "multiply to 2, but there are 4 devices"),
        (
            {"mesh": {"data": 1, "tensor": 4}, "model": MODEL | {"n_heads": 2, "n_kv_heads": 1}},
            "layers/attention/o: dimension 1 .heads. is 2",
        ),
        (
            {"accumulate": 2},
            r"must be a multiple of mesh.data x mesh.fsdp x mesh.expert .4 on these devices",
        ),
        ({"model": {**MODEL, "vocab_size": 300}}, "has 320 pieces, but model.vocab_size is 300"),
        ({"patience": 3}, "patience needs validation data"),
    ],
    ids=["devices", "heads", "batch", "vocabulary", "patience"],
)
def test_refused_before_anything_is_allocated(corpus, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(program, "make_mesh", make_mesh)  # all four devices
    if "patience" in changes:
        empty = read_meta(corpus / "shards").model_copy(update={"validation": ()})
        monkeypatch.setattr(loop, "read_meta", lambda path: empty)
    arrays = len(jax.live_arrays())
    with pytest.raises(ConfigError, match=message):
        train(make_config(corpus, tmp_path / "run", **changes))
    assert len(jax.live_arrays()) == arrays
    assert not (tmp_path / "run").exists()


def test_parameters_from_another_run(corpus, undisturbed, tmp_path):
    config = make_config(corpus, tmp_path / "run", parameters_from=str(undisturbed))
    run = loop.make_run(config)
    state = loop.new_state(run)
    found = checkpoint.newest(undisturbed / "checkpoints")
    assert found is not None
    trained = loop.restored_state(run, found)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(trained.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert int(state.step) == int(state.optimizer.count) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer.mu))


# Numbers that are not finite ----------------------------------------------------------------------


def poison(monkeypatch, steps):
    """Makes the loss of these batches NaN."""
    original = Loader.batch

    def batch(self, step):
        values = original(self, step)
        if step in steps and self.steps is None:
            values["weights"][0, 0] = np.nan
        return values

    monkeypatch.setattr(Loader, "batch", batch)


def test_one_bad_step_is_skipped_and_counted(corpus, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2, 5, 6})
    assert train(make_config(corpus, tmp_path)) == 0
    lines = {x["step"]: x for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x}
    assert lines[3]["loss"] is None  # JSON has no NaN
    assert [lines[step]["skipped"] for step in range(1, STEPS + 1)] == [0, 0, 1, 1, 1, 2, 3, 3]
    assert np.isfinite([lines[step]["loss"] for step in (4, 5, 8)]).all()
    said = [line for line in capsys.readouterr().out.splitlines() if "update skipped" in line]
    assert [line.split(":")[0] for line in said] == ["step 3", "step 6", "step 7"]


def test_three_bad_steps_in_a_row_stop_the_run(corpus, undisturbed, tmp_path, monkeypatch):
    poison(monkeypatch, {5, 6, 7, 8})
    with pytest.raises(TrainingError, match=r"3 steps in a row \(until step 8\)"):
        train(make_config(corpus, tmp_path, steps=STEPS + 4))
    assert checkpoint.steps(tmp_path / "checkpoints") == [HALF]
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    state = loop.restored_state(loop.make_run(make_config(corpus, tmp_path)), found)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_count_in_a_row_survives_a_restart(corpus, tmp_path, monkeypatch):
    """Else a run restarted often enough would never stop."""
    poison(monkeypatch, {2, 3, 4})
    config = make_config(corpus, tmp_path)
    with pytest.raises(TrainingError, match="until step 5"):
        train(config)
    assert checkpoint.steps(tmp_path / "checkpoints") == [HALF]
    with pytest.raises(TrainingError, match="until step 5"):
        train(config)


def test_a_state_that_is_not_finite_is_never_saved(corpus, tmp_path):
    """Here the gradient is finite, and the update overflows."""
    optimizer = {"peak_lr": 3e38, "warmup_steps": 0, "weight_decay": 100.0}
    with pytest.raises(TrainingError, match="not finite after step 1, which is not saved"):
        train(make_config(corpus, tmp_path, optimizer=optimizer, checkpoint={"every": 1}))
    assert checkpoint.steps(tmp_path / "checkpoints") == []


# Validation, logs, failing saves ------------------------------------------------------------------


def test_best_is_kept_and_patience_ends(corpus, tmp_path, monkeypatch, capsys):
    losses = iter([float("nan"), 5.0, 4.0, float("nan"), 4.5, 3.0])
    monkeypatch.setattr(loop, "measure", lambda *_: next(losses))
    config = make_config(
        corpus,
        tmp_path,
        evaluate_every=1,
        patience=2,
        checkpoint={"every": 3, "keep_last": 1, "keep_best": 1},
    )
    assert train(config) == 0
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 5]
    assert "stopped after step 5: no better validation loss" in capsys.readouterr().out
    assert train(config) == 0  # its patience is still at an end
    assert "nothing is left to do" in capsys.readouterr().out
    assert next(losses) == 3.0


def test_the_validation_loss_is_that_of_the_split(corpus, undisturbed, tmp_path):
    """Compared with the logits of the final parameters, token by token."""
    run = loop.make_run(make_config(corpus, undisturbed, evaluate_batches=10**6))
    found = checkpoint.newest(undisturbed / "checkpoints")
    assert found is not None
    assert run.validation is not None
    state = loop.restored_state(run, found)
    total = weight = 0.0
    for batch in run.validation.batches(0):
        arguments = batch["tokens"], batch["positions"], batch["segments"]
        logits = np.asarray(run.program.model.apply(state.params, *arguments).value, np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        total += (batch["weights"] * (log_z - target)).sum()
        weight += batch["weights"].sum()
    measured = loop.measure(
        run, run.validation, loop.compile_programs(run), state, Clock("validation")
    )
    assert measured == pytest.approx(total / weight, rel=1e-5)


def test_metrics_are_logged_once_and_plotted(corpus, undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    steps = [(line["step"], "validation_loss" in line) for line in lines]
    assert len(steps) == len(set(steps)) == STEPS + 2
    expected = {"loss", "grad_norm", "learning_rate", "weight", "skipped", "tokens_per_second"}
    assert expected <= set(lines[0])
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((undisturbed / "tensorboard").iterdir())


def test_a_failing_save_ends_the_run(corpus, tmp_path, monkeypatch):
    """In the background, at the only checkpoint before the end: known long before that."""
    seen = []
    original = loop.place
    monkeypatch.setattr(loop, "place", lambda *a: seen.append(1) or original(*a))
    losses = iter([1.0])
    monkeypatch.setattr(loop, "measure", lambda *_: next(losses, 2.0))

    def full(folder, _):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    config = make_config(corpus, tmp_path, steps=2000, checkpoint={"every": 2000})
    with pytest.raises(CheckpointError, match=r"4: the checkpoint could not be written.*No space"):
        train(config)
    assert len(seen) < 1500
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_the_versions_and_the_config_are_in_every_checkpoint(undisturbed):
    folder = undisturbed / "checkpoints" / str(STEPS)
    progress = json.loads((folder / "progress.json").read_text())
    assert progress["versions"]["jax"] == jax.__version__
    assert schema.read(TrainConfig, folder / "config.yaml").steps == STEPS


# Skipped batches ----------------------------------------------------------------------------------


def test_skipped_batches_are_never_read(corpus, tmp_path, monkeypatch):
    read = []
    original = Loader.batch

    def batch(self, step):
        if self.steps is None:
            read.append(step)
        return original(self, step)

    monkeypatch.setattr(Loader, "batch", batch)
    assert train(make_config(corpus, tmp_path, skip_batches=[[2, 4], [5, 6]])) == 0
    assert {0, 1, 4, 6, 7, 8, 9, 10} <= set(read)  # and some ahead of those
    assert not {2, 3, 5} & set(read)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.progress["data"]["next_batch"] == STEPS + 3
    assert found.progress["skipped"] == [[2, 4], [5, 6]]


def test_skipping_later_is_as_exact_as_from_the_beginning(corpus, undisturbed, tmp_path, capsys):
    """From a checkpoint before the window, and by going back to it from one behind."""
    assert train(make_config(corpus, tmp_path / "whole", skip_batches=[[5, 7]])) == 0
    half = restart_at(HALF, undisturbed, tmp_path / "half")
    assert train(make_config(corpus, half, skip_batches=[[5, 7]])) == 0
    back = restart_at(STEPS, undisturbed, tmp_path / "back")
    assert train(make_config(corpus, back, skip_batches=[[5, 7]])) == 0
    assert (back / "checkpoints" / f"{STEPS}.rewound").is_dir()
    assert ending(half) == ending(back) == ending(tmp_path / "whole") != ending(undisturbed)


def test_no_checkpoint_before_the_window_is_an_error(corpus, undisturbed, tmp_path):
    run = restart_at(STEPS, undisturbed, tmp_path / "run")
    with pytest.raises(ConfigError, match="every checkpoint has been trained on batches that are"):
        train(make_config(corpus, run, skip_batches=[[1, 2]]))
    assert checkpoint.steps(run / "checkpoints") == [HALF, STEPS]


RULE = {"deviations": 1.5, "steps": 3, "history": 16, "skip_before": 2, "skip_after": 6}
POISONED = {24, 25, 26, 27, 28}


def spoil(monkeypatch):
    """Makes some batches predict what the model has never seen."""
    original = Loader.batch

    def batch(self, step):
        values = original(self, step)
        if self.steps is None and step in POISONED:
            values["targets"] = np.full_like(values["targets"], 3 + step)
        return values

    monkeypatch.setattr(Loader, "batch", batch)


def test_a_spike_is_skipped_by_rule_and_the_run_is_as_if_it_had_been_asked_to(
    corpus, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch)
    settings = {"steps": 36, "spikes": RULE, "evaluate_every": 36}
    assert train(make_config(corpus, tmp_path / "rule", **settings)) == 0
    assert "going back, and skipping the batches 22 to 29" in capsys.readouterr().out
    asked = make_config(corpus, tmp_path / "asked", **settings, skip_batches=[[22, 30]])
    assert train(asked) == 0
    assert "going back" not in capsys.readouterr().out
    assert ending(tmp_path / "rule") == ending(tmp_path / "asked")
    assert json.loads((tmp_path / "rule" / "skipped.json").read_text()) == [[22, 30]]


def test_spikes_without_end_end_the_run(corpus, tmp_path, monkeypatch):
    spoil(monkeypatch)
    rule = {**RULE, "skip_before": 0, "skip_after": 1, "most": 1}
    settings = {"steps": 36, "spikes": rule, "evaluate_every": 36}
    with pytest.raises(TrainingError, match="1 spikes of the loss were skipped, and another came"):
        train(make_config(corpus, tmp_path, **settings))


# Watching -----------------------------------------------------------------------------------------


def test_a_flipped_bit_in_one_replica_ends_the_run_unsaved(corpus, tmp_path, monkeypatch):
    original = loop.new_state

    def corrupted(run):
        state = original(run)
        embed = state.params["embed"]
        parts = [np.array(shard.data) for shard in embed.addressable_shards]
        parts[1].reshape(-1).view(np.uint32)[7] ^= 1 << 3
        places = [shard.device for shard in embed.addressable_shards]
        arrays = [jax.device_put(part, place) for part, place in zip(parts, places, strict=True)]
        wrong = jax.make_array_from_single_device_arrays(embed.shape, embed.sharding, arrays)
        return state._replace(params={**state.params, "embed": wrong})

    config = make_config(corpus, tmp_path, mesh={"data": 2}, checksum_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "new_state", corrupted)
        with pytest.raises(
            TrainingError, match=r"silent corruption after step 3: device 0 .*, 1 .*"
        ):
            train(config)
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    assert train(config) == 0


def planes(folder):
    (file,) = folder.rglob("*.xplane.pb")
    return {plane.name for plane in jax.profiler.ProfileData.from_file(str(file)).planes}


def test_steps_are_recorded_when_configured(corpus, tmp_path, capsys):
    assert train(make_config(corpus, tmp_path, profile={"first_step": 3, "steps": 2})) == 0
    assert "/host:CPU" in planes(tmp_path / "profile")
    assert f"recorded the steps until 4 in {tmp_path}/profile" in capsys.readouterr().out


def test_steps_are_recorded_at_a_signal(corpus, tmp_path, monkeypatch):
    original = Loader.batches

    def batches(self, start, stop=None):
        for step, batch in enumerate(original(self, start, stop), start):
            if step == 3:
                signal.raise_signal(signal.SIGUSR1)
            yield batch

    monkeypatch.setattr(Loader, "batches", batches)
    before = signal.getsignal(signal.SIGUSR1)
    assert train(make_config(corpus, tmp_path)) == 0
    assert "/host:CPU" in planes(tmp_path / "profile")
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_memory_of_each_device_is_logged_where_it_is_told(corpus, tmp_path, monkeypatch):
    class Device:
        id = 5

        def memory_stats(self):
            return {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 4 * 2**30}

    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device()])
    assert metrics.device_memory() == {"memory/5": 3.0, "peak_memory/5": 4.0}
    monkeypatch.undo()
    assert metrics.device_memory() == {}  # CPUs do not tell


def test_the_journal_tells_where_the_time_went(undisturbed):
    (*_, last) = (x for x in read_metrics(undisturbed / "metrics.jsonl") if "loss" in x)
    assert {"seconds/step", "seconds/startup", "seconds/compile"} <= set(last)
    book = json.loads((undisturbed / "goodput.json").read_text())
    assert (book["ended"], book["step"]) == (True, STEPS)
