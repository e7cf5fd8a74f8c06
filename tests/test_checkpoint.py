"""Checkpoints: whole or absent, checked before use, the same bits on any mesh."""

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import config as schema
from llama_jax.config import CheckpointConfig, ConfigError, DataConfig, DataSource, TrainConfig
from llama_jax.train import checkpoint
from llama_jax.train.checkpoint import (
    CheckpointError,
    Writer,
    check_unchanged,
    damage,
    find,
    kept,
    load,
    load_parameters,
    newest,
    steps,
)
from sharding.mesh import make_mesh

CONFIG = TrainConfig(
    out="run",
    model="tiny",
    tokenizer="tokenizer.model",
    data=DataConfig(sources=(DataSource(path="corpus"),), sequence_length=64, batch_size=4),
    steps=4000,
)


def trees(step, kind=np.asarray):
    """Random, so that compression does not make a save instant; the step decides every bit."""
    numbers = np.random.default_rng(step)
    draw = lambda *shape: kind(numbers.normal(size=shape).astype(np.float32))  # noqa: E731
    params = {"embed": draw(48, 16), "layers": {"gate": draw(2, 16, 32)}}
    return {"params": params, "training": {"mu": draw(2, 16, 32), "count": kind(np.int32(step))}}


def targets(step=0, sharding=None, dtype=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), trees(step)
    )


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def run(tmp_path):
    """A run folder, and its files that every checkpoint copies."""
    schema.save(CONFIG, tmp_path / "config.yaml")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    return tmp_path


def open_writer(run, **policy):
    copies = [run / "config.yaml", run / "tokenizer.model"]
    return Writer(run / "checkpoints", CheckpointConfig(**policy), copies)


def write(run, *numbers, losses=None, **policy):
    with open_writer(run, **policy) as writer:
        for step in numbers:
            writer.save(step, trees(step), {"validation_loss": (losses or {}).get(step)})
    return run / "checkpoints"


def test_what_was_saved_is_loaded(run):
    folder = write(run, 5, 10, keep_last=3)
    found = newest(folder)
    assert found is not None
    assert (found.step, found.progress["format"]) == (10, 1)
    assert_same_bits(load(found, targets()), trees(10))
    assert found.config() == CONFIG.model_dump(mode="json")
    assert (found.folder / "tokenizer.model").read_bytes() == b"pieces"


def test_parameters_alone_from_any_of_the_three_folders(run):
    folder = write(run, 9, 10, 100, keep_last=3)
    wanted = targets()["params"]
    assert_same_bits(load_parameters(run, wanted), trees(100)["params"])
    assert_same_bits(load_parameters(str(folder), wanted), trees(100)["params"])
    assert_same_bits(load_parameters(folder / "9", wanted), trees(9)["params"])
    half = load_parameters(run, targets(dtype=jnp.bfloat16)["params"])
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees(100)["params"])
    assert_same_bits(half, expected)


def test_relative_paths_and_names_that_are_not_ascii(run, monkeypatch):
    monkeypatch.chdir(run)
    other = Path("läufe und mehr")
    other.mkdir()
    for name in ("config.yaml", "tokenizer.model"):
        shutil.copyfile(name, other / name)
    write(other, 1)
    assert_same_bits(load_parameters(other, targets()["params"]), trees(1)["params"])


def test_steps_are_in_numeric_order(run):
    folder = write(run, 9, 10, 100, keep_last=3)
    assert steps(folder) == [9, 10, 100]


@pytest.mark.parametrize(
    ("wrong", "difference"),
    [
        ("shape", r"embed is \(48, 16\) in the checkpoint and \(48, 17\) here"),
        ("missing", r"layers/gate is \(.*\) in the checkpoint and missing here"),
        ("more", r"head is missing in the checkpoint and \(48, 16\) here"),
    ],
)
def test_other_parameters_than_saved_are_refused(run, wrong, difference):
    write(run, 1)
    wanted = targets()["params"]
    some = wanted["embed"]
    if wrong == "shape":
        wanted["embed"] = jax.ShapeDtypeStruct((48, 17), some.dtype, sharding=some.sharding)
    elif wrong == "missing":
        del wanted["layers"]
    else:
        wanted["head"] = some
    with pytest.raises(
        CheckpointError, match=f"params are not of the shape asked for: {difference}"
    ):
        load_parameters(run, wanted)


def test_no_checkpoint(run, tmp_path_factory):
    assert newest(run / "checkpoints") is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find(run)


# Another mesh -------------------------------------------------------------------------------------

MESHES = {
    "one device": ({"fsdp": 1, "tensor": 1}, P(), P()),
    "fsdp": ({"fsdp": 4, "tensor": 1}, P("fsdp"), P(None, "fsdp")),
    "tensor": ({"fsdp": 1, "tensor": 2}, P("tensor"), P(None, None, "tensor")),
    "both": ({"fsdp": 2, "tensor": 2}, P("tensor", "fsdp"), P(None, "fsdp", "tensor")),
}


def placed(name):
    """The sharding of each array of `trees` on a mesh."""
    sizes, embed, stacked = MESHES[name]
    mesh = make_mesh(sizes, jax.devices()[: sizes["fsdp"] * sizes["tensor"]])
    specs = {
        "params": {"embed": embed, "layers": {"gate": stacked}},
        "training": {"mu": stacked, "count": P()},
    }
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


@pytest.mark.parametrize("loaded_on", MESHES)
@pytest.mark.parametrize("saved_on", MESHES)
def test_loads_on_another_mesh_bit_for_bit(run, saved_on, loaded_on):
    with open_writer(run) as writer:
        writer.save(1, jax.device_put(trees(1), placed(saved_on)), {})
    wanted = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        trees(1),
        placed(loaded_on),
    )
    loaded = load(find(run), wanted)
    assert_same_bits(loaded, trees(1))
    assert jax.tree.map(lambda x: x.sharding, loaded) == placed(loaded_on)


def test_arrays_may_be_donated_while_they_are_written(run):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.tree.map(jnp.asarray, trees(1))
    expected = jax.tree.map(np.array, state)
    with open_writer(run) as writer:
        writer.save(1, state, {})
        for _ in range(5):
            state = bump(state)
        jax.block_until_ready(state)
    assert_same_bits(load(find(run), targets()), expected)


# What is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"keep_last": 1, "keep_best": 0}, {60}),
        ({"keep_last": 2, "keep_best": 0}, {50, 60}),
        ({"keep_last": 1, "keep_best": 1}, {20, 60}),
        ({"keep_last": 1, "keep_best": 2}, {20, 40, 60}),
        ({"keep_last": 1, "keep_best": 9}, {20, 30, 40, 60}),
        ({"keep_last": 1, "keep_best": 0, "keep_every": 30}, {30, 60}),
        ({"keep_last": 9, "keep_best": 0}, {10, 20, 30, 40, 50, 60}),
    ],
)
def test_kept(policy, expected):
    """Steps without a validation loss are never a best; the newest stays whatever its loss."""
    losses = {10: None, 20: 1.0, 30: 3.0, 40: 2.0, 50: None, 60: 9.0}
    assert kept(losses, CheckpointConfig(**policy)) == expected


def test_old_steps_are_removed_and_best_and_newest_stay(run):
    losses = {8: 2.0, 9: 1.0, 10: 3.0, 100: 4.0}
    folder = write(run, 8, 9, 10, 100, losses=losses, keep_last=1, keep_best=1)
    assert steps(folder) == [9, 100]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "100", "9"]


def test_a_removal_that_fails_is_a_warning(run, monkeypatch, caplog):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder = write(run, 1)
    with open_writer(run, keep_last=1) as writer:
        writer.save(2, trees(2), {})
        monkeypatch.setattr(shutil, "rmtree", refuse)
        writer.wait()
    assert "old checkpoint cannot be removed" in caplog.text
    assert_same_bits(load(find(folder), targets()), trees(2))


# Damage -------------------------------------------------------------------------------------------


def files_of(step_folder):
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << (offset % 8)
    path.write_bytes(content)


def test_any_flipped_byte_is_detected(run):
    folder = write(run, 1)
    choose = random.Random(0)
    files = [path for path in files_of(folder / "1") if path.stat().st_size]
    assert len(files) > 8
    for number in range(50):
        path = files[number] if number < len(files) else choose.choice(files)
        offset = choose.randrange(path.stat().st_size)
        content = path.read_bytes()
        flip(path, offset)
        assert damage(folder / "1"), f"{path} at {offset}"
        path.write_bytes(content)
    assert damage(folder / "1") is None


def truncate(step_folder, path):
    path.write_bytes(path.read_bytes()[:-1])


def zero(step_folder, path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(step_folder, path):
    path.write_bytes(b"")


def delete(step_folder, path):
    path.unlink()


def swap(step_folder, path):
    other = max((p for p in files_of(step_folder) if p != path), key=lambda p: p.stat().st_size)
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def take_from_another_step(step_folder, path):
    shutil.copyfile(step_folder.parent / "1" / path.name, path)


def lose_manifest(step_folder, path):
    (step_folder / "manifest.json").unlink()


def stale_manifest(step_folder, path):
    shutil.copyfile(step_folder.parent / "1" / "manifest.json", step_folder / "manifest.json")


def manifest_of_nothing(step_folder, path):
    (step_folder / "manifest.json").write_text("{}")


def manifest_of_nonsense(step_folder, path):
    (step_folder / "manifest.json").write_text('["', encoding="utf-8")


def other_step_under_this_number(step_folder, path):
    shutil.rmtree(step_folder)
    shutil.copytree(step_folder.parent / "1", step_folder)


WAYS = [truncate, zero, empty, delete, swap, lose_manifest, stale_manifest, manifest_of_nothing,
        manifest_of_nonsense, other_step_under_this_number]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_damaged_step_is_passed_over_with_one_warning(run, way, caplog):
    folder = write(run, 1, 2)
    way(folder / "2", max(files_of(folder / "2"), key=lambda path: path.stat().st_size))
    with caplog.at_level(logging.WARNING):
        found = newest(folder)
    assert found is not None
    assert found.step == 1
    assert_same_bits(load(found, targets()), trees(1))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "damaged: step 2 (" in warning
    assert "Step 1, the newest that is intact, is used instead." in warning
    with pytest.raises(CheckpointError, match="damaged"):
        find(folder / "2")


def test_damage_names_the_file_and_what_is_wrong(run):
    step = write(run, 1) / "1"
    assert damage(step) is None
    tokenizer = step / "tokenizer.model"
    for way, text in (
        (lambda: flip(tokenizer, 3), "has changed since it was written"),
        (lambda: tokenizer.write_bytes(b"piece"), "has 5 bytes instead of 6"),
        (tokenizer.unlink, "is missing"),
    ):
        way()
        assert damage(step) == f"tokenizer.model {text}"


def test_a_damaged_optimizer_does_not_stop_its_parameters_from_being_used(run):
    folder = write(run, 1)
    shutil.rmtree(folder / "1" / "state" / "training")
    assert newest(folder, ["params"]) is not None
    assert_same_bits(load_parameters(run, targets()["params"]), trees(1)["params"])


def test_no_step_intact_is_an_error(run):
    folder = write(run, 1, 2)
    for step in "12":
        (folder / step / "progress.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact: step 2 \(.*step 1 \("):
        newest(folder)


def test_damaged_steps_are_set_aside_when_the_run_goes_on(run):
    """Else they would count as the newest ones, and the good step would be removed as old."""
    folder = write(run, 1, 2, 3, keep_last=3)
    for step in "23":
        flip(folder / step / "progress.json", 5)
    with open_writer(run, keep_last=2) as writer:
        writer.set_aside_after(1)
        assert steps(folder) == [1]
        writer.save(2, trees(7), {})
    assert steps(folder) == [1, 2]
    assert_same_bits(load(find(run), targets()), trees(7))


def test_an_unknown_format_is_refused_in_a_line(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    write(run, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(
        CheckpointError, match=r"has checkpoint format 2, and this .* reads format 1"
    ):
        find(run)


# Interruption and failing disks -------------------------------------------------------------------

# Forks from a process that has imported jax but not started it, so that a child costs little.
KILLED = """
import os, shutil, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from llama_jax.train import checkpoint as c

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(module, name):
    setattr(module, name, die)

def after(module, name):
    original = getattr(module, name)
    setattr(module, name, lambda *a, **k: (original(*a, **k), die()))

def among_the_files(folder):
    def watch():
        while not any(p.is_file() for p in folder.glob("2.tmp/state/**/d/*")):
            pass
        die()
    threading.Thread(target=watch, daemon=True).start()

def amid_removal(path, **_):
    next(p for p in path.rglob("*") if p.is_file()).unlink()
    die()

STAGES = [
    lambda folder: before(c.ocp, "save_checkpointables_async"),
    among_the_files,
    lambda folder: before(shutil, "copyfile"),
    lambda folder: before(c, "write_manifest"),
    lambda folder: after(c, "write_manifest"),
    lambda folder: before(c.Writer, "_remove_old"),
    lambda folder: setattr(shutil, "rmtree", amid_removal),
]

for number, prepare in enumerate(STAGES):
    run = Path(sys.argv[1]) / str(number)
    child = os.fork()
    if child == 0:
        with t.open_writer(run, keep_last=1) as writer:
            writer.save(1, t.trees(1), {{}})
            writer.wait()
            prepare(run / "checkpoints")
            writer.save(2, t.trees(2), {{}})
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_any_stage_of_a_save(run, tmp_path):
    stages = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}  # stage -> newest step after the kill
    for number in stages:
        (tmp_path / str(number)).mkdir()
        for name in ("config.yaml", "tokenizer.model"):
            shutil.copyfile(run / name, tmp_path / str(number) / name)
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["9"] * len(stages), done.stderr  # each died of SIGKILL

    for number, expected in stages.items():
        folder = tmp_path / str(number) / "checkpoints"
        if number < 5:
            assert (folder / "2.tmp").is_dir()
        assert all(damage(folder / str(step)) is None for step in steps(folder))
        found = newest(folder)
        assert found is not None
        assert found.step == expected
        assert_same_bits(load(found, targets()), trees(expected))
        folder = write(tmp_path / str(number), 3, keep_last=9)
        assert not list(folder.glob("*.tmp"))
        assert_same_bits(load(find(folder), targets()), trees(3))


def check_until_it_fails(writer):
    for _ in range(3000):
        writer.check()
        time.sleep(0.01)


def test_a_failing_save_is_raised_by_the_next_check(run, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write(run, 1)
    written = threading.Event()
    writer = open_writer(run)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write_manifest", lambda path, _: written.wait() and full(path))
        writer.save(2, trees(2), {})
        writer.check()  # nothing is known yet
        written.set()
        failure = r"2: the checkpoint could not be written \(.*No space left"
        with pytest.raises(CheckpointError, match=failure):
            check_until_it_fails(writer)
    assert steps(folder) == [1]
    assert not list(folder.glob("*.tmp"))
    assert_same_bits(load(find(run), targets()), trees(1))
    writer.save(3, trees(3), {})  # once there is room again
    writer.close()
    assert_same_bits(load(find(run), targets()), trees(3))


@pytest.mark.parametrize(
    "use",
    [
        lambda writer: writer.save(2, trees(2), {}),
        lambda writer: writer.wait(),
        lambda writer: writer.close(),
        lambda writer: writer.__exit__(None, None, None),
    ],
    ids=["save", "wait", "close", "exit"],
)
def test_a_failing_save_is_never_lost(run, monkeypatch, use):
    def broken(path, _):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "write_manifest", broken)
    writer = open_writer(run)
    writer.save(1, trees(1), {})
    with pytest.raises(CheckpointError, match="Input/output error"):
        use(writer)


def save_and_fail(run):
    with open_writer(run) as writer:
        writer.save(1, trees(1), {})
        raise KeyError("first")


def test_a_failing_save_does_not_hide_an_earlier_error(run, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(KeyError, match="first"):
        save_and_fail(run)
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_refuses_files(run, asynchronous):
    """A real refusal by the operating system, inside the array store: files may not grow."""
    script = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_checkpoint as t
        run = Path(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with t.open_writer(run, asynchronous={asynchronous}) as writer:
            writer.save(1, t.trees(1), {{}})
            writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
            try:
                writer.save(2, t.trees(2), {{}})
                writer.wait()
            except t.CheckpointError as error:
                print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(run)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "2: the checkpoint could not be written (File too large)" in done.stdout, done.stderr
    folder = run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "1"]
    assert_same_bits(load(find(run), targets()), trees(1))


def test_a_folder_that_cannot_be_written(run):
    (run / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be written"):
        open_writer(run)


def test_two_runs_in_one_folder_are_refused(run):
    with open_writer(run), pytest.raises(CheckpointError, match="another process is training"):
        open_writer(run)
    open_writer(run).close()


def test_the_synchronous_setting_waits(run):
    with open_writer(run, asynchronous=False) as writer:
        writer.save(1, trees(1), {})
        assert steps(run / "checkpoints") == [1]


# Changed configurations ---------------------------------------------------------------------------


def changed(**values):
    return TrainConfig.model_validate({**CONFIG.model_dump(mode="json"), **values})


def test_a_changed_field_that_must_stay_is_refused_by_name(run):
    found = find(write(run, 1))
    model = {**CONFIG.model.model_dump(mode="json"), "d_ff": 80, "rope_theta": 5e5}
    data = {**CONFIG.data.model_dump(mode="json"), "sequence_length": 128}
    data["sources"] = [*data["sources"], {"path": "more", "weight": 1.0}]
    with pytest.raises(ConfigError) as refusal:
        check_unchanged(found, changed(model=model, data=data, seed=7))
    text = str(refusal.value)
    assert f"model.d_ff: {CONFIG.model.d_ff} in the checkpoint, 80 now" in text
    assert "model.rope_theta: 10000.0 in the checkpoint, 500000.0 now" in text
    assert "data.sequence_length: 64 in the checkpoint, 128 now" in text
    assert "data.sources.1.path: None in the checkpoint, more now" in text
    assert "seed: 0 in the checkpoint, 7 now" in text
    assert len(text.splitlines()) == 1 + 6 + 1


def test_other_fields_may_change(run):
    found = find(write(run, 1))
    check_unchanged(
        found,
        changed(
            out="elsewhere",
            steps=9000,
            accumulate=2,
            log_every=1,
            optimizer={"peak_lr": 1e-3, "warmup_steps": 1},
            compute={"dtype": "bfloat16"},
            mesh={"fsdp": 2},
            checkpoint={"every": 7},
        ),
    )


def test_every_field_is_classed():
    """A new field of the schema must be thought about: may a resumed run change it?"""
    assert set(checkpoint.fixed_values(CONFIG)) == {
        *(f"model.{name}" for name in CONFIG.model.model_dump() if name != "rope_scaling"),
        *(f"model.rope_scaling.{name}" for name in CONFIG.model.rope_scaling.model_dump()),
        "data.sources.0.path",
        "data.sources.0.weight",
        "data.sequence_length",
        "data.batch_size",
        "data.packing",
        "data.shuffle",
        "seed",
    }


def test_the_manifest_lists_every_file(run):
    folder = write(run, 1) / "1"
    listed = set(json.loads((folder / "manifest.json").read_text()))
    files = [path for path in files_of(folder) if path != folder / "manifest.json"]
    assert listed == {os.path.relpath(path, folder) for path in files}
