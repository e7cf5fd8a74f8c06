"""The manifest of a checkpoint: size and SHA-256 of each of its files, on the disk when it is."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_jax.data.shards import sync

MANIFEST = "manifest.json"


def files_in(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The files below a folder, in order."""
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def entries(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Puts files on the disk, and gives their lines of the manifest."""
    for path in files:
        sync(path)
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in each(_sha256, files)
    }


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Lines of the manifest from several processes."""
    return {name: entry for part in parts for name, entry in part.items()}


def write_manifest(folder: Path, known: Mapping[str, Any] | None = None) -> None:
    """Puts every file of a folder on the disk, and its size and SHA-256 into the manifest.

    `known` are lines of the manifest for files that others have hashed.
    """
    files = files_in(folder)
    others = known or {}
    mine = [path for path in files if path.relative_to(folder).as_posix() not in others]
    manifest = dict(sorted({**others, **entries(folder, mine)}.items()))
    (folder / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def each(function: Any, items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(item, function(item)) for each, several at a time: hashing leaves Python's lock alone."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(zip(items, pool.map(function, items), strict=True))


def file_damage(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file of this size and hash, or None."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual} bytes instead of {size}"
        return None if _sha256(path) == sha256 else "has changed since it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
