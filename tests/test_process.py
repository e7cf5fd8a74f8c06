"""Settings of the process, each tried in a process of its own."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import sys, resource
from llama_jax import process
if sys.argv[1] == "keep":
    assert process.keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    y = jnp.sort(x)  # a temporary as large as x
    return y[::-1] @ jnp.sort(y + x)

x = jnp.ones(4_000_000)
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_steps_find_the_memory_of_the_steps_before():
    """Counts pages that the system had to provide: 16 MB are 3,906 of them."""

    def faults(mode):
        command = [sys.executable, "-c", STEPS, mode]
        environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("plain") > 10 * 3906
    assert faults("keep") < 3906


def test_accelerators_are_left_alone(monkeypatch):
    from llama_jax import process

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(process, "_accelerator_is_installed", lambda: True)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: pytest.fail("called"))
    assert not process.keep_freed_memory()
