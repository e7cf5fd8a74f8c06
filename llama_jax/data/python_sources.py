"""A corpus that is on every machine that can run this: the sources of Python's standard library."""

import sysconfig
from pathlib import Path

from llama_jax.config import ConfigError

# Tests repeat themselves, some packages are tables or other people's code.
NOT_LEARNT = {"test", "tests", "site-packages", "pydoc_data", "encodings", "lib2to3", "idlelib"}


def corpus_globs(folder: str | None) -> tuple[str, ...]:
    """Globs of the .py files to learn from: a folder's, or those of Python's standard library.

    Raises ConfigError where there are none.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    folders = {path.parent for path in root.rglob("*.py")}
    globs = [
        f"{inner}/*.py"
        for inner in sorted(folders)
        if NOT_LEARNT.isdisjoint(inner.relative_to(root).parts)
    ]
    if not globs:
        raise ConfigError(f"{root} has no .py files; name a folder that has with --corpus")
    return tuple(globs)
