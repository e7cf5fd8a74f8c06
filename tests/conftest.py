"""Four CPU devices for the whole suite, and where the real data lies."""

import itertools
import os
from pathlib import Path

# Before jax is imported. The suite is about numbers, not hardware; a GPU here would only be noise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ warnings

import jax
import pytest
from jax._src import compiler

# At most four: more devices than that on two cores starve XLA's collectives, which then abort the
# process. For the same reason a test that runs steps on a mesh waits for each of them.
jax.config.update("jax_num_cpu_devices", 4)


# Most of the suite's time is compilation of programs that run once, and two thirds of that is the
# making of good machine code. XLA's passes before it, which decide what is computed and where it
# lies, stay; and all is there for tests that bear the mark.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Sets how well programs are compiled, before fixtures compile any."""
    is_quick = item.get_closest_marker("optimized") is None
    if is_quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", is_quick)
        jax.clear_caches()


def in_a_hurry(*args, env_options_overrides=None, **kwargs):
    """JAX's options of a compilation, and one that it has no setting for, which saves as much."""
    options = dict(env_options_overrides or {})
    if jax.config.read("jax_disable_most_optimizations"):
        options.setdefault("xla_cpu_use_fusion_emitters", False)
    return OPTIONS(*args, env_options_overrides=options, **kwargs)


OPTIONS, compiler.get_compile_options = compiler.get_compile_options, in_a_hurry


# Of the 65,530 memory maps that Linux gives a process, every compiled program has some: a worker
# that kept them all would be aborted by XLA in the middle of the suite.
MOST_MAPS = 45_000
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets compiled programs where there are many; looks after every twentieth test."""
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights, tokenizers and corpora; skips where there is none."""
    named = os.environ.get("LLAMA_JAX_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if named and not folder.is_dir():
        pytest.fail(f"LLAMA_JAX_DATA names {folder}, which is not a folder")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set LLAMA_JAX_DATA to its folder)")
    return folder
