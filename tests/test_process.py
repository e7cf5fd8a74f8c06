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
    y = jax.lax.optimization_barrier(jnp.cos(x))  # a temporary as large as x
    return jax.lax.optimization_barrier(y * x)[::-1] @ y

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

x = jnp.ones(12_000_000)
print(min(faults() for _ in range(12)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_steps_find_the_memory_of_the_steps_before():
    """Counts pages that the system had to provide: 48 MB are 11,718 of them.

    Of several steps the one with the fewest: a step may begin before the last one's memory is free.
    """

    def fewest_faults(mode):
        command = [sys.executable, "-c", STEPS, mode]
        environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert fewest_faults("plain") > 11718
    assert fewest_faults("keep") < 100


def test_accelerators_are_left_alone(monkeypatch):
    from llama_jax import process

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(process, "_accelerator_is_installed", lambda: True)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: pytest.fail("called"))
    assert not process.keep_freed_memory()
