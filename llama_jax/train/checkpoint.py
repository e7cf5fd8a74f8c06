"""Checkpoints: written while training goes on, whole or not at all, checked before use.

    checkpoints/<step>/state/params       parameters (Orbax; loads on any mesh)
    checkpoints/<step>/state/<tree>       whatever else resuming needs
    checkpoints/<step>/progress.json      format, step, seed, position in the data, losses, versions
    checkpoints/<step>/config.yaml ...    copies of the run's files
    checkpoints/<step>/manifest.json      size and SHA-256 of each file above

A step is written as <step>.tmp and renamed once all of it, manifest included, is on the disk: a
folder with a bare number is complete. This is the only module that knows Orbax.

Of several processes each writes the arrays its devices hold, and hashes a share of the files, when
they are written and when they are checked; everything else is done by process 0. All of them must
see the same folder.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import yaml
from orbax.checkpoint import v1 as ocp

from llama_jax.config import CheckpointConfig, ConfigError, Schema, parse
from llama_jax.data.shards import sync
from llama_jax.train.manifest import (
    MANIFEST,
    each,
    entries,
    file_damage,
    files_in,
    merged,
    write_manifest,
)
from sharding.distributed import exchange

FORMAT = 1
SLOWEST_SECONDS = 3600.0  # for one process to write or hash its share
CONFIG, PROGRESS, STATE = "config.yaml", "progress.json", "state"

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says which, and what to do."""


class Checkpoint(NamedTuple):
    """One complete step on the disk.

    folder: its folder.
    step: its number.
    progress: the content of progress.json.
    """

    folder: Path
    step: int
    progress: dict[str, Any]

    def config(self) -> dict[str, Any]:
        """The configuration the step was made with, as plain values."""
        return yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))


# Reading ------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """Numbers of the complete steps in a checkpoints folder, in numeric order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def newest(
    folder: Path,
    trees: Sequence[str] | None = None,
    wanted: Callable[[dict[str, Any]], bool] | None = None,
) -> Checkpoint | None:
    """The newest intact step of a checkpoints folder; None where no step was ever completed.

    Steps that are damaged are passed over with one warning. All processes of a run call this
    together, and get the same.

    Args:
        folder: the checkpoints folder.
        trees: those that will be loaded, and so are checked; None for all.
        wanted: progress -> whether the step is of use; None: every step is.

    Raises:
        CheckpointError: there are steps and all of them are damaged.
    """
    damaged: list[str] = []
    (listed, *_) = exchange("listing checkpoints", json.dumps(steps(folder)), SLOWEST_SECONDS)
    for step in reversed(json.loads(listed)):
        problem = damage(folder / str(step), trees)
        if problem is None and wanted and not wanted(_open(folder / str(step)).progress):
            continue
        if problem is None:
            if damaged:
                log.warning(
                    "%s: damaged: %s. Step %d, the newest that is intact, is used instead.",
                    *(folder, "; ".join(damaged), step),
                )
            return _open(folder / str(step))
        damaged.append(f"step {step} ({problem})")
    if damaged:
        raise CheckpointError(
            f"{folder}: no checkpoint is intact: {'; '.join(damaged)}. Restore the folder from a "
            "copy, or remove it to start anew."
        )
    return None


def find(path: str | Path, trees: Sequence[str] | None = None) -> Checkpoint:
    """The checkpoint a user means by a run folder, a checkpoints folder or a step's folder.

    Of the first two the newest intact step is taken; `trees` is as for `newest`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if (path / STATE).is_dir() or (path / MANIFEST).is_file():
        if problem := damage(path, trees):
            raise CheckpointError(f"{path}: the checkpoint is damaged: {problem}.")
        return _open(path)
    inner = path / "checkpoints"
    found = newest(inner if inner.is_dir() else path, trees)
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint here. Give the folder of a run, its checkpoints folder, or the "
            "folder of one step."
        )
    return found


def damage(folder: Path, trees: Sequence[str] | None = None) -> str | None:
    """What is wrong with a step's files, or None: every size and SHA-256 is as it was written.

    Of several processes, which call this together, each checks a share of the files.

    Args:
        folder: the step's folder.
        trees: checks only these of the state (the files beside it always).
    """
    found = exchange("checking a checkpoint", _damage_of_share(folder, trees), SLOWEST_SECONDS)
    return next((problem for problem in found if problem), None)


def _damage_of_share(folder: Path, trees: Sequence[str] | None) -> str:
    """What is wrong with the files that this process checks, or nothing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if missing := {PROGRESS, CONFIG} - set(listed):
        return f"{MANIFEST} does not list {min(missing)}"
    if trees is not None:
        unused = [name for name in listed if _tree_of(name) not in (None, *trees)]
        for name in unused:
            del listed[name]
    share = sorted(listed)[jax.process_index() :: jax.process_count()]
    problems = each(lambda name: file_damage(folder / name, *listed[name]), share)
    if found := [f"{name} {text}" for name, text in problems if text]:
        return found[0]
    step = json.loads((folder / PROGRESS).read_bytes())["step"]
    if folder.name.isdecimal() and int(folder.name) != step:
        return f"it is step {step} under another number"
    return ""


def _tree_of(name: str) -> str | None:
    """The tree of the state that a file belongs to: state/params/... is of params."""
    parts = name.split("/")
    return parts[1] if parts[0] == STATE and len(parts) > 2 else None


def _open(folder: Path) -> Checkpoint:
    """An intact step's folder as a Checkpoint."""
    progress = json.loads((folder / PROGRESS).read_bytes())
    if progress["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: has checkpoint format {progress['format']}, and this version of llama_jax "
            f"reads format {FORMAT}. Use the version that wrote it."
        )
    return Checkpoint(folder, progress["step"], progress)


def load(checkpoint: Checkpoint, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Some of a checkpoint's trees, each array read straight to where its target says.

    Args:
        checkpoint: from `newest` or `find`, which have checked it.
        targets: name of the tree -> the tree as ShapeDtypeStructs, with the type and the sharding
            wanted, on whatever mesh.

    Raises:
        CheckpointError: the trees or shapes differ from those saved.
    """
    folder = (checkpoint.folder / STATE).absolute()
    saved = ocp.checkpointables_metadata(folder).metadata
    for name, tree in targets.items():
        if name not in saved:
            raise CheckpointError(f"{checkpoint.folder}: holds no {name}, only {', '.join(saved)}.")
        if difference := _difference(_shapes(saved[name]), _shapes(tree)):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} are not of the shape asked for: {difference}. Load "
                "them with the model they were trained with."
            )
    return ocp.load_checkpointables(folder, dict(targets))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree).items()}


def _leaves(tree: Any) -> dict[str, Any]:
    """Path -> array of a tree, also of Orbax's description of one."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {"/".join(map(_key, path)): leaf for path, leaf in leaves}


def _key(key: Any) -> str:
    """One step of a path; Orbax describes a named tuple by a dict of its fields."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _difference(saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
    """The first array in which two trees differ, or nothing."""
    for path in sorted(saved | wanted):
        if saved.get(path) != wanted.get(path):
            there, here = (str(x.get(path, "missing")) for x in (saved, wanted))
            return f"{path} is {there} in the checkpoint and {here} here"
    return ""


def load_parameters(path: str | Path, targets: Any) -> Any:
    """The parameters alone, from a run folder, a checkpoints folder or a step's folder.

    Args:
        path: the folder.
        targets: the parameters as ShapeDtypeStructs, with the type and the sharding wanted.

    Raises:
        CheckpointError: no checkpoint is there, it is damaged, or its shapes differ.
    """
    return load(find(path, ["params"]), {"params": targets})["params"]


def shapes(checkpoint: Checkpoint, tree: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of one of a checkpoint's trees, by its path: layers/..., say.

    Raises:
        CheckpointError: the checkpoint has no such tree.
    """
    saved = ocp.checkpointables_metadata((checkpoint.folder / STATE).absolute()).metadata
    if tree not in saved:
        raise CheckpointError(f"{checkpoint.folder}: holds no {tree}, only {', '.join(saved)}.")
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in _leaves(saved[tree]).items()
    }


def load_array(
    checkpoint: Checkpoint,
    tree: str,
    saved: Iterable[str],
    path: str,
    target: jax.ShapeDtypeStruct,
) -> jax.Array:
    """One array of a tree, by its path, straight to where and as what the target says.

    `saved` are the paths of all arrays of the tree, as `shapes` gives them.
    """
    wanted: dict[str, Any] = {}
    for name in saved:
        branch, *inner, leaf = wanted, *name.split("/")
        for key in inner:
            branch = branch.setdefault(key, {})
        branch[leaf] = target if name == path else ...  # which Orbax leaves where it is
    loaded = ocp.load_checkpointables((checkpoint.folder / STATE).absolute(), {tree: wanted})
    return reduce(getitem, path.split("/"), loaded[tree])


def check_unchanged(checkpoint: Checkpoint, config: Schema) -> None:
    """Refuses to resume with another value for a field that `config.fixed` marks.

    Raises:
        ConfigError: naming every such field with both values.
    """
    saved = parse(type(config), checkpoint.config(), str(checkpoint.folder / CONFIG))
    old, new = fixed_values(saved), fixed_values(config)
    changed = [
        f"  {name}: {old.get(name)} in the checkpoint, {new.get(name)} now"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint.folder}: this run cannot go on with another value for\n"
            + "\n".join(changed)
            + "\nKeep the old value, or start a new run in another folder (out)."
        )


def fixed_values(config: Schema, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field that a resumed run must keep."""
    values: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, dotted = getattr(config, name), prefix + name
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("resume") == "fixed":
            values |= _flat(config.model_dump(mode="json")[name], dotted)
        elif isinstance(value, Schema):
            values |= fixed_values(value, f"{dotted}.")
    return values


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dicts and lists of dicts as dotted names."""
    if isinstance(value, dict) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{name}.{key}").items()}


# Writing ------------------------------------------------------------------------------------------


def write_parameters(
    folder: Path, params: Any, progress: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Writes parameters alone as the folder of one step, 0, which everything here can read.

    Args:
        folder: does not exist yet; it is complete when this returns.
        params: the parameters, best as jax arrays: Orbax copies numpy ones before it writes.
        progress: what else belongs to the step, as JSON values.
        files: name -> bytes of the files beside it, config.yaml among them.
    """
    folder.mkdir()
    ocp.save_checkpointables((folder / STATE).absolute(), {"params": params})
    record = {"format": FORMAT, "step": 0, **progress}
    (folder / PROGRESS).write_text(json.dumps(record), encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_manifest(folder)


class Writer:
    """Writes the checkpoints of one run, at most one at a time, and removes old ones.

    Opening it removes what an interrupted save or removal left behind. A save that fails in the
    background is raised by the next `check`, `save` or `close`; complete steps are untouched by it.
    All processes of a run open it, and save together.

    Raises:
        CheckpointError: the folder cannot be written, another run writes to it, or the processes
            do not see the same folder.
    """

    def __init__(self, folder: Path, policy: CheckpointConfig, copies: Sequence[Path] = ()):
        self._folder = folder
        self._policy = policy
        self._copies = copies
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._lock: int | None = None
        if is_first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(folder)
                for leftover in folder.glob("*.tmp"):
                    shutil.rmtree(leftover)
            except OSError as error:
                raise CheckpointError(f"{folder}: cannot be written ({error}).") from error
        _check_shared(folder, self._lock)

    def set_aside_after(self, step: int, why: str = "damaged") -> None:
        """Renames newer steps, so that they no longer count as checkpoints."""
        for newer in steps(self._folder) if is_first() else ():
            if newer > step:
                aside = self._folder / f"{newer}.{why}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(newer)).rename(aside)

    def save(self, step: int, trees: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Begins to write a step; returns once the arrays may change (be donated) again.

        Args:
            step: its number, larger than that of every complete step.
            trees: name -> tree of arrays; "params" is what `load_parameters` reads.
            progress: what else belongs to the step, as JSON values; `validation_loss` (a number or
                None) decides which steps are best.

        Raises:
            CheckpointError: this save, or the one before, failed.
        """
        self.wait()
        partial = self._folder / f"{step}.tmp"
        record = {"format": FORMAT, "step": step, **progress}
        try:
            if is_first():
                partial.mkdir()
            written = ocp.save_checkpointables_async((partial / STATE).absolute(), dict(trees))
        except Exception as error:
            raise _failed(partial, error) from error
        self._saving = self._thread.submit(self._finish, written, partial, record)
        if not self._policy.asynchronous:
            self.wait()

    def _finish(self, written: Any, partial: Path, record: Mapping[str, Any]) -> None:
        """Completes a step once Orbax has written it, and removes those no longer wanted."""
        try:
            written.result()
            own = entries(partial, _own_arrays(partial)) if jax.process_count() > 1 else {}
            hashed = exchange("hashing a checkpoint", json.dumps(own), SLOWEST_SECONDS)
            if is_first():
                (partial / PROGRESS).write_text(json.dumps(record), encoding="utf-8")
                for path in self._copies:
                    shutil.copyfile(path, partial / path.name)
                write_manifest(partial, merged(json.loads(part) for part in hashed))
                partial.rename(self._folder / str(record["step"]))
                sync(self._folder)
            exchange("completing a checkpoint", "", SLOWEST_SECONDS)
        except Exception as error:
            raise _failed(partial, error) from error
        if is_first():
            self._remove_old()

    def _remove_old(self) -> None:
        losses = {step: _validation_loss(self._folder / str(step)) for step in steps(self._folder)}
        for step in set(losses) - kept(losses, self._policy):
            # Renamed first: a step with some files gone must never look complete.
            going = self._folder / f"{step}.removed.tmp"
            try:
                (self._folder / str(step)).rename(going)
                shutil.rmtree(going)
            except OSError as error:
                log.warning("%s: an old checkpoint cannot be removed (%s).", going, error)

    def check(self) -> None:
        """Raises the failure of the save under way, if it has one by now; never waits."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way is complete; raises its failure, once."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Completes the save under way and gives up the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._lock is not None:
                os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # and the first error goes on its way


def kept(losses: Mapping[int, float | None], policy: CheckpointConfig) -> set[int]:
    """The steps to keep: newest, best, and multiples of keep_every; the newest always.

    Args:
        losses: step -> validation loss, None where there was none; such a step is never a best.
        policy: how many of each.
    """
    in_order = sorted(losses)
    rated = [(loss, step) for step, loss in losses.items() if loss is not None]
    best = [step for _, step in sorted(rated)[: policy.keep_best]]
    every = [step for step in in_order if policy.keep_every and step % policy.keep_every == 0]
    return {*in_order[-policy.keep_last :], *best, *every}


def _validation_loss(folder: Path) -> float | None:
    try:
        return json.loads((folder / PROGRESS).read_bytes())["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(folder: Path) -> int:
    """Takes the folder for this process: a second run in it would remove our unfinished step."""
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CheckpointError(
            f"{folder}: another process is training in this folder. Wait for it, or give this run "
            "another folder (out)."
        ) from None
    except OSError:
        pass  # a network filesystem without locks: nothing to be had
    return handle


def is_first() -> bool:
    """Whether this is process 0, which does what only one process may do."""
    return jax.process_index() == 0


def _check_shared(folder: Path, lock: int | None) -> None:
    """Refuses processes that each have a folder of their own, under the same name."""
    if jax.process_count() == 1:
        return
    token = secrets.token_hex(16)
    if lock is not None:
        os.ftruncate(lock, 0)
        os.pwrite(lock, token.encode(), 0)
        os.fsync(lock)
    token = exchange("opening the checkpoints", token, SLOWEST_SECONDS)[0]
    try:
        seen = (folder / ".lock").read_text(encoding="utf-8") == token
    except OSError:
        seen = False
    sees = exchange("comparing the checkpoint folders", "1" if seen else "", SLOWEST_SECONDS)
    blind = [str(index) for index, text in enumerate(sees) if not text]
    if blind:
        raise CheckpointError(
            f"{folder}: process {', '.join(blind)} does not see the folder that process 0 sees. "
            "Put the run (out) on a filesystem that all hosts share."
        )


def _failed(partial: Path, error: Exception) -> CheckpointError:
    """The error to raise for a save that did not complete; what it wrote is removed."""
    if is_first():
        shutil.rmtree(partial, ignore_errors=True)
    return CheckpointError(
        f"{partial.with_suffix('')}: the checkpoint could not be written ({_reason(error)}). "
        "The checkpoints before it are complete; make room or repair the disk, and run the same "
        "command to go on from the newest."
    )


def _reason(error: Exception) -> str:
    """The system's own words where the array store passes its error number on."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else f"{type(error).__name__}: {error}"


def _own_arrays(partial: Path) -> list[Path]:
    """The files that this process has written: Orbax keeps those of each process apart."""
    return files_in(partial / STATE, f"*/ocdbt.process_{jax.process_index()}/**/*")
