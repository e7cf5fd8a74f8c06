"""Everything `plan` says about one configuration on one topology, as JSON values."""

import resource
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.config import ConfigError, MeshConfig
from llama_jax.model.attention import rules_for
from llama_jax.model.count import flops_per_token, forward_flops_per_token, n_parameters
from llama_jax.plan.compile import (
    Compiled,
    OutOfMemory,
    compile_step,
    devices_of,
    mismatched_compiler,
    missing_compiler,
)
from llama_jax.plan.flops import executed_flops
from llama_jax.plan.hardware import Topology, sold_name
from llama_jax.plan.memory import MASTER, Memory, decoding_memory, training_memory
from llama_jax.plan.programs import (
    decoding_jaxpr,
    decoding_mesh,
    decoding_step,
    training_jaxpr,
    training_step,
)
from llama_jax.plan.roofline import (
    Times,
    Wire,
    decoding_traffic,
    training_traffic,
    training_wire,
    wire,
)
from llama_jax.plan.settings import PlanConfig
from llama_jax.train.program import check_rows, check_tokens
from sharding.collectives import Collective, collectives, totals
from sharding.mesh import resolve

Record = dict[str, Any]
MOST_TENSORS = 8
DAY = 24 * 3600


class Reading(NamedTuple):
    """What the program of a step says.

    executed: FLOPs of all devices.
    compiled: None where it was not compiled.
    traffic, sent: empty and None where it was not compiled, or does not fit.
    """

    executed: float
    compiled: Compiled | OutOfMemory | None = None
    traffic: Sequence[Collective] = ()
    sent: Wire | None = None


def estimate(config: PlanConfig, topology: Topology, compiled: bool = True) -> Record:
    """The plan of one configuration.

    Args:
        config: the run, or the decoder.
        topology: the machine; its mesh is config.mesh, which must fit it.
        compiled: compile the step, if the compiler is installed; else all is in closed form.

    Raises:
        ConfigError: the configuration does not fit together or does not fit the topology.
    """
    mesh_config = decoding_mesh(config, topology.devices) if config.decode else config.mesh
    sizes = resolved(mesh_config, topology)
    if config.decode:
        memory = decoding_memory(config, sizes, rules_for(config.model, mesh_config.rules, sizes))
    else:
        check_rows(config, sizes)
        kernel = check_tokens(config, sizes, "gpu" if topology.chip.is_gpu else "tpu")
        compute = config.compute.model_copy(update={"attention": kernel})
        config = config.model_copy(update={"compute": compute})
        memory = training_memory(config, sizes)
    missing = missing_compiler(topology)
    reading = _traced(config) if missing or not compiled else _compiled(config, topology)
    sent = reading.sent or _closed_wire(config, sizes, memory, topology)
    times = _times(config, sizes, memory, topology, reading.executed, sent)
    return {
        **_machine(topology, sizes, config),
        **_memory(memory, reading.compiled, topology),
        **_traffic(sent, reading),
        **_speed(config, topology, times, reading.executed),
        "compile_seconds": round(reading.compiled.seconds, 1) if reading.compiled else None,
        # ru_maxrss is in KiB on Linux.
        "planner_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "notes": _notes(topology, missing) if compiled else [],
    }


def _notes(topology: Topology, missing: str | None) -> list[str]:
    """What the reader should know of the compiler."""
    if missing:
        return [f"{missing}; memory and traffic are closed forms"]
    mismatch = None if topology.chip.is_gpu else mismatched_compiler()
    return [mismatch] if mismatch else []


def _traced(config: PlanConfig) -> Reading:
    """Of the program of one row, on no devices, with reference attention: kernels do not say what
    they compute, which is less by the half of each block on the diagonal."""
    one_row = decoding_jaxpr(config) if config.decode else training_jaxpr(config)
    return Reading(executed_flops(one_row) * _rows(config))


def _compiled(config: PlanConfig, topology: Topology) -> Reading:
    """Of the real program."""
    devices = devices_of(topology)
    step = decoding_step(config, devices) if config.decode else training_step(config, devices)
    executed = _traced(config).executed
    found = compile_step(step)
    if isinstance(found, OutOfMemory):
        return Reading(executed, found)
    traffic = collectives(found.hlo, step.mesh.shape)
    sent = wire(traffic, topology, step.mesh.devices.ravel().tolist())
    return Reading(executed, found, traffic, sent)


def resolved(mesh: MeshConfig, topology: Topology) -> dict[str, int]:
    """Axis sizes with -1 replaced.

    Raises:
        ConfigError: they do not multiply to the devices of the topology.
    """
    try:
        return resolve(mesh.sizes, topology.devices)
    except ValueError as error:
        raise ConfigError(f"{topology.name}: {error}") from error


def _rows(config: PlanConfig) -> int:
    return config.batch if config.decode else config.data.batch_size


def _closed_wire(
    config: PlanConfig, sizes: Mapping[str, int], memory: Memory, topology: Topology
) -> Wire:
    if not config.decode:
        return training_wire(config, sizes, memory.kinds["parameters"] // MASTER, topology)
    # Two sums over tensor in each layer, of one bf16 vector for each row.
    rows = config.batch // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    vectors = config.model.n_layers * 2 * 2 * rows * config.model.d_model * 2
    amount = vectors * (sizes["tensor"] - 1) / sizes["tensor"]
    return Wire(amount, 0, amount / topology.chip.links, 0)


def _times(
    config: PlanConfig,
    sizes: Mapping[str, int],
    memory: Memory,
    topology: Topology,
    executed: float,
    sent: Wire,
) -> Times:
    chip = topology.chip
    moved = decoding_traffic(memory) if config.decode else training_traffic(config, sizes, memory)
    return Times(
        compute=executed / topology.devices / chip.flops,
        memory=moved / chip.memory_bandwidth,
        interconnect=sent.interconnect_seconds,
        network=sent.network_seconds,
    )


# As JSON ------------------------------------------------------------------------------------------


def _machine(topology: Topology, sizes: Mapping[str, int], config: PlanConfig) -> Record:
    chip = topology.chip
    return {
        "topology": topology.name,
        "sold_as": sold_name(topology),
        "slices": topology.slices,
        "chips": topology.devices,
        "mesh": dict(sizes),
        "step": "decode" if config.decode else "train",
        "parameters": n_parameters(config.model),
        "rows": _rows(config),
        "row_tokens": config.context if config.decode else config.data.sequence_length,
        "chip": {
            "flops": chip.flops,
            "memory_bandwidth": chip.memory_bandwidth,
            "links": chip.links,
            "network": chip.network,
            "source": chip.source,
        },
    }


def _memory(memory: Memory, found: Compiled | OutOfMemory | None, topology: Topology) -> Record:
    limit, host = topology.chip.memory, memory.host
    largest: Sequence[Any] = memory.tensors
    match found:
        case Compiled():
            peak, host, source = found.peak, found.host, "compiler"
            if not topology.chip.is_gpu:  # a TPU's compiler refuses what does not fit
                peak = min(peak, limit)
            kinds = {"arguments": found.arguments, "temporary": found.temporary}
        case OutOfMemory():
            peak, source, kinds = found.required or memory.total, "compiler", {}
            limit = found.available or limit
        case None:
            peak, source, kinds = memory.total, "closed form", {}
    fits = peak <= limit and not isinstance(found, OutOfMemory)
    listed = found.largest if isinstance(found, OutOfMemory) else ()
    return {
        "fits": fits,
        "peak_bytes_per_chip": peak,
        "hbm_bytes_per_chip": limit,
        "host_bytes_per_chip": host,
        "host_bytes_moved_per_chip": memory.moved,
        "memory_from": source,
        "memory_by_kind": memory.kinds,
        "memory_closed_form": memory.total,
        "memory_compiled": kinds,
        "largest_tensors": [tensor._asdict() for tensor in largest[:MOST_TENSORS]],
        "largest_allocations": [{"name": name, "bytes": size} for name, size in listed],
    }


def _traffic(sent: Wire, reading: Reading) -> Record:
    return {
        "wire_bytes_per_chip": sent.interconnect_bytes + sent.network_bytes,
        "network_bytes_per_chip": sent.network_bytes,
        "wire_from": "compiler" if reading.sent else "closed form",
        "collectives": [row._asdict() for row in totals(reading.traffic)],
    }


def _speed(config: PlanConfig, topology: Topology, times: Times, executed: float) -> Record:
    chips, peak = topology.devices, topology.chip.flops
    length = config.context if config.decode else config.data.sequence_length
    if config.decode:
        tokens = config.batch
        # One token that sees every slot: twice the causal half of a row of so many.
        model = tokens * forward_flops_per_token(config.model, 2 * length)
    else:
        tokens = config.data.batch_size * length
        model = tokens * flops_per_token(config.model, length)

    def at(seconds: float) -> Record:
        return {
            "seconds": seconds,
            "mfu": model / chips / peak / seconds,
            "tokens_per_second_per_chip": tokens / chips / seconds,
        }

    best = at(times.overlapped)
    calibration = None if config.decode else topology.chip.calibration
    calibrated = calibration and {
        "from": calibration.run,
        "share_of_peak": calibration.share,
        **at(times.calibrated(calibration.share)),
    }
    expected = calibrated or at(times.serial)
    return {
        "tokens_per_step": tokens,
        "model_flops_per_chip": model / chips,
        "executed_flops_per_chip": executed / chips,
        "seconds": times._asdict(),
        "bound": times.bound,
        "mfu_bound": best["mfu"],
        "tokens_per_second_per_chip": best["tokens_per_second_per_chip"],
        "overlapped": best,
        "serial": at(times.serial),
        "calibrated": calibrated,
        "budget": None
        if config.decode
        else _budget(
            config, topology, expected, "calibrated estimate" if calibrated else "serial bound"
        ),
    }


def _budget(config: PlanConfig, topology: Topology, speed: Record, basis: str) -> Record:
    """Time, chip-hours, energy and CO2 of a whole run (arXiv 2302.13971, table 15):
    Wh = chip-hours x watts x PUE; t = MWh x kg/kWh."""
    batch = config.data.batch_size * config.data.sequence_length
    tokens = config.tokens or config.steps * batch
    seconds = tokens / speed["tokens_per_second_per_chip"] / topology.devices
    chip_hours = seconds / 3600 * topology.devices
    watts = config.watts or topology.chip.watts
    energy = chip_hours * watts * config.pue / 1e6 if watts else None
    return {
        "tokens": tokens,
        "at": basis,
        "days": seconds / DAY,
        "chip_hours": chip_hours,
        "watts": watts,
        "mwh": energy,
        "tco2eq": None if energy is None else energy * config.carbon,
    }
