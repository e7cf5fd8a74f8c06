"""Tries meshes, rematerialisation and parts of a batch: all in closed form, the best compiled."""

from collections.abc import Iterator
from typing import Any

from llama_jax.config import ComputeConfig, ConfigError, MeshConfig, RematName
from llama_jax.plan.estimate import estimate
from llama_jax.plan.hardware import Topology
from llama_jax.plan.memory import training_memory
from llama_jax.plan.settings import PlanConfig

MOST_SHOWN = 12
# Kept for the backward pass, from everything to nothing.
REMAT: tuple[tuple[str, tuple[RematName, ...]], ...] = (
    ("none", ()),
    ("named", ("query", "key", "value", "attended", "attention_out", "gate", "up")),
    ("named", ("query", "key", "value", "attended", "attention_out")),
    ("named", ("query", "key", "value")),
    ("full", ()),
)


def search(config: PlanConfig, topology: Topology) -> list[dict[str, Any]]:
    """What fits, the fastest by the bound without overlap first.

    Each entry holds mesh, remat, remat_save, accumulate and its plan. The first
    `config.candidates` are compiled; one that the compiler cannot make fit goes to the end.

    Raises:
        ConfigError: a decoder is asked for, whose mesh follows from its heads.
    """
    if config.decode:
        raise ConfigError("search is for training; a decoder's mesh is given by mesh.tensor")
    ranked = []
    for candidate in candidates(config, topology):
        try:
            plan = estimate(candidate, topology, compiled=False)
        except ConfigError:
            continue  # the mesh does not divide the model or the batch
        if plan["fits"]:
            ranked.append((candidate, plan))
    ranked.sort(key=lambda pair: -_speed(pair[1]))
    if config.compiled:
        best = ranked[: config.candidates]
        compiled = [(candidate, estimate(candidate, topology)) for candidate, _ in best]
        compiled.sort(key=lambda pair: (not pair[1]["fits"], -_speed(pair[1])))
        ranked = compiled + ranked[len(best) :]
    return [
        {
            "mesh": plan["mesh"],
            "remat": candidate.compute.remat,
            "remat_save": candidate.compute.remat_save,
            "accumulate": candidate.accumulate,
            "plan": plan,
        }
        for candidate, plan in ranked[:MOST_SHOWN]
    ]


def candidates(config: PlanConfig, topology: Topology) -> Iterator[PlanConfig]:
    """Every mesh of powers of two, with as few parts as fit for each way to rematerialise.

    A row's tokens are split as the configuration says, and the rows of a step stay what they are
    there; fewer parts are more rows at a time.
    """
    context = config.mesh.context
    devices, rows = topology.devices // context, config.data.batch_size
    for tensor in _powers(min(devices, 16)):
        for fsdp in _powers(devices // tensor):
            if devices % (fsdp * tensor):
                continue
            data = devices // (fsdp * tensor)
            mesh = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
            for remat, names in REMAT:
                compute = {**config.compute.model_dump(), "remat": remat, "remat_save": names}
                for accumulate in _powers(max(rows // (data * fsdp), 1)):
                    changes = {
                        "mesh": mesh,
                        "compute": ComputeConfig(**compute),
                        "accumulate": accumulate,
                    }
                    candidate = config.model_copy(update=changes)
                    if _fits(candidate, mesh, topology):
                        yield candidate
                        break


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _fits(config: PlanConfig, mesh: MeshConfig, topology: Topology) -> bool:
    parts = mesh.data * mesh.fsdp * config.accumulate
    if config.data.batch_size % parts:
        return False
    try:
        return training_memory(config, mesh.sizes).total <= topology.chip.memory
    except ConfigError:
        return False


def _speed(plan: dict[str, Any]) -> float:
    return plan["serial"]["tokens_per_second_per_chip"]
