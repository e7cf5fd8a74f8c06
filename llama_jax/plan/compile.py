"""Compiles a step for devices that are not there, with the compilers that would compile it there.

libtpu compiles for any TPU slice, and jax's CUDA plugin for NVIDIA's GPUs, on a machine with
neither. Nothing runs; no network is needed.
"""

import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from llama_jax.config import ConfigError
from llama_jax.plan.hardware import Topology
from llama_jax.plan.programs import Step

# Without these libtpu asks the cloud's metadata server what machine this is, and a second process
# is refused by a lock. The type need not be the one that is compiled for.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# What XLA's GPU compiler wants to know of a card it does not see: (name, cores, bytes of memory,
# bytes/s). The rest is that of every Hopper card.
CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 132, 84978434048, 3352320000000),
    "h200": ("NVIDIA H200", 132, 150754820096, 4916000000000),
}


class Compiled(NamedTuple):
    """A compiled step.

    peak: bytes that a device holds at the worst moment, as the compiler laid them out; where values
        of the backward pass lie on the host, no more than this.
    host: bytes of the host's memory for one device.
    arguments, temporary: bytes of what goes in, and of what exists only during the step; together
        more than the peak, since parts of the former are free before parts of the latter exist.
    hlo: the program of one device.
    seconds: of tracing, lowering and compiling.
    """

    peak: int
    host: int
    arguments: int
    temporary: int
    hlo: str
    seconds: float


class OutOfMemory(NamedTuple):
    """What a compiler said that could not make a program fit.

    required, available: bytes; None where it did not say.
    largest: (name, bytes) of the largest allocations, where it listed them.
    """

    required: int | None
    available: int | None
    largest: tuple[tuple[str, int], ...]
    seconds: float


def missing_compiler(topology: Topology) -> str | None:
    """What to install before `topology` can be compiled for; None where it is there."""
    if topology.chip.is_gpu:
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            return (
                "the compiler for NVIDIA's GPUs is not installed: "
                "pip install jax-cuda13-plugin jax-cuda13-pjrt, in the version of jax"
            )
    elif importlib.util.find_spec("libtpu") is None:
        return "the compiler for TPUs is not installed: pip install 'llama-jax[tpu]'"
    return None


def mismatched_compiler() -> str | None:
    """A warning where libtpu is not the version that this jax asks for, which fails in odd ways."""
    wanted = [
        match[1]
        for line in importlib.metadata.requires("jax") or []
        if (match := re.match(r"libtpu\s*\(?==([\d.]+?)(?:\.\*)?\)?\s*;", line))
    ]
    found = importlib.metadata.version("libtpu")
    if wanted and not f"{found}.".startswith(f"{wanted[0]}."):
        return f"libtpu is {found}, but jax {jax.__version__} was made for {wanted[0]}"
    return None


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """Devices of a topology, to lay arrays out over and to compile for; none of them is there.

    Raises:
        ConfigError: the compiler does not know the topology.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The topology needs no backend; CUDA's plugin refuses to load as one without a card.
    jax.config.update("jax_platforms", "cpu")
    try:
        if topology.chip.is_gpu:
            nodes, in_node = topology.shape
            return topologies.get_topology_desc(
                platform="cuda",
                target_config=_target(*CARDS[topology.chip.name]),
                topology=f"1x{nodes}x{in_node}",
            ).devices
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}",
            num_slices=topology.slices,
            **_torus(topology),
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"the compiler does not know {topology.name}: {error}") from error


def _torus(topology: Topology) -> dict[str, Any]:
    """How the slice is wired; without `wrap` XLA turns every all-gather into an all-reduce."""
    settings: dict[str, Any] = {"wrap": topology.wrap, "chips_per_host_bounds": (2, 2, 1)}
    if topology.chip.name in ("v4", "v5p"):
        settings["chip_config_name"] = "megacore"  # both cores of a chip as one device
    if topology.shape == (1, 1):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if topology.shape == (2, 4):
        settings["chips_per_host_bounds"] = (2, 4, 1)
    return settings


def _target(name: str, cores: int, memory: int, bandwidth: int) -> str:
    """A Hopper card as XLA's GpuTargetConfigProto in text form."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: {cores}
  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: {memory}  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def compile_step(step: Step) -> Compiled | OutOfMemory:
    """Traces, lowers and compiles; on a TPU that it does not fit is found here.

    Raises:
        RuntimeError: the compiler failed otherwise.
    """
    started = time.monotonic()
    try:
        with jax.set_mesh(step.mesh):
            compiled = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        return out_of_memory(message, time.monotonic() - started)
    sizes = compiled.memory_analysis()
    # The compiler's peak is that of both memories together. What comes and goes on the host need
    # not be there when the device holds the most.
    peak = sizes.peak_memory_in_bytes - sizes.host_argument_size_in_bytes
    if sizes.host_temp_size_in_bytes:
        peak = min(peak, sizes.argument_size_in_bytes + sizes.temp_size_in_bytes)
    return Compiled(
        peak=peak,
        host=sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes,
        arguments=sizes.argument_size_in_bytes,
        temporary=sizes.temp_size_in_bytes,
        hlo=compiled.as_text(),
        seconds=time.monotonic() - started,
    )


def out_of_memory(message: str, seconds: float) -> OutOfMemory:
    """Reads a compiler's complaint: "(511.62G) exceeds available HBM (15.75G)", and its list of the
    largest allocations where there is one ("Size: 1.00G ... Operator: op_name="...")."""
    sizes = re.search(r"\(?([\d.]+[KMGT]?)\)? exceeds available \w+ \(?([\d.]+[KMGT]?)\)?", message)
    used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", message)
    found = sizes or used
    listed = re.findall(
        r"Size: ([\d.]+[KMGT]?)\n(?:\s+Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s+Shape: (\S+)",
        message,
    )
    return OutOfMemory(
        required=_bytes(found[1]) if found else None,
        available=_bytes(found[2]) if found else None,
        largest=tuple(
            (f"{name or 'unnamed'} {shape}", _bytes(size)) for size, name, shape in listed
        ),
        seconds=seconds,
    )


def _bytes(text: str) -> int:
    """15.75G -> bytes, in powers of 1024."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(text.rstrip("KMGT")) * units.get(text[-1], 1))
