"""What a run needs and how fast it can go: closed forms, words, and the real TPU compiler."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from llama_jax import cli
from llama_jax import config as schema
from llama_jax.config import ConfigError, MeshConfig
from llama_jax.generate.decode import Decoder
from llama_jax.model.count import flops_per_token, n_parameters
from llama_jax.plan import compile as compiler
from llama_jax.plan import programs
from llama_jax.plan.compile import Compiled, compile_step, devices_of, out_of_memory
from llama_jax.plan.estimate import estimate, resolved
from llama_jax.plan.flops import executed_flops
from llama_jax.plan.hardware import CHIPS, GIB, Topology, parse_topology, sold_name
from llama_jax.plan.memory import training_memory
from llama_jax.plan.programs import decoding_mesh, training_jaxpr, training_step
from llama_jax.plan.report import print_plan
from llama_jax.plan.roofline import Times, wire
from llama_jax.plan.search import search
from llama_jax.plan.settings import PlanConfig
from llama_jax.train import loop
from sharding.collectives import Collective, collectives

pytestmark = pytest.mark.optimized  # plans are of real programs
RUNS = schema.configs_folder() / "runs"
PRESETS = sorted(path.stem for path in RUNS.glob("pretrain_*_*_*-*.yaml"))
FIELDS = {
    *("fits", "peak_bytes_per_chip", "hbm_bytes_per_chip", "wire_bytes_per_chip", "collectives"),
    *("model_flops_per_chip", "executed_flops_per_chip", "bound", "mfu_bound"),
    *("tokens_per_second_per_chip", "compile_seconds"),
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: pip install 'llama-jax[tpu]'",
)


def make_config(**values) -> PlanConfig:
    """A tiny run; sections are laid over its own."""
    base = {
        "model": {
            **schema.load_model("tiny").model_dump(),
            **{"n_heads": 4, "n_kv_heads": 4, "d_model": 64, "vocab_size": 512},
        },
        "data": {"sources": ["x"], "sequence_length": 64, "batch_size": 8},
        "steps": 10,
        "optimizer": {"warmup_steps": 1},
        "compute": {"dtype": "bfloat16", "remat": "full", "loss_chunks": 2},
        "mesh": {"data": 1, "fsdp": -1},
        "topology": "v5e:2x2",
    }
    for key, value in values.items():
        inner = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = {**base[key], **value} if inner else value
    return schema.parse(PlanConfig, base, "test")


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v5p-1024", "v5p:8x8x8", 512),
        ("v5p-8192", "v5p:16x16x16", 4096),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("V5E:4x4", "v5e:4x4", 16),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-32", "v4:2x2x4", 16),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
        ("h100:8", "h100:8", 8),
        ("h200-64", "h200:64", 64),
    ],
)
def test_slices_by_every_name(text, name, devices):
    topology = parse_topology(text)
    assert (topology.name, topology.devices) == (name, devices)
    assert parse_topology(sold_name(topology)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:3x3", "nearest are v5e:2x2, v5e:2x4, v5e:4x4"),
        ("v5e:32x16", "no slice 'v5e:32x16'; the nearest are .*v5e:16x16"),
        ("v5p-100", "no slice 'v5p-100'; the nearest are .*v5p:2x4x4"),
        ("v5p:8x4x4", "no slice"),  # sold as 4x4x8
        ("h100:12", "12 GPUs are not whole nodes of 8; the nearest is h100:16"),
        ("h100:0", "give the number of GPUs"),
        ("a100:8", "names no topology; give a chip .*v5p.*h100"),
        ("tpu", "names no topology"),
    ],
)
def test_what_cannot_be_rented_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_chips_are_plausible(chip):
    """Units: a slip of 8 or 1024 would leave these ranges."""
    assert 1e14 < chip.flops < 3e15
    assert 15 * GIB < chip.memory < 200 * GIB
    assert 5e11 < chip.memory_bandwidth < 1e13
    assert 1e11 < chip.links < 1e12
    assert chip.network < chip.links / 5
    assert chip.calibration is None or chip.calibration.share < 0.85
    assert chip.source


def test_links_of_a_group():
    """Whole cubes close in rings, rows of fewer than sixteen v5e chips do not."""
    cube, square = parse_topology("v5p:4x4x4"), parse_topology("v5e:4x4")
    line = [(i, 0, 0) for i in range(4)]
    assert cube.bandwidth(line, [0] * 4) == 200e9
    assert cube.bandwidth([(i, j, 0) for i in range(4) for j in range(4)], [0] * 16) == 400e9
    assert square.bandwidth(line, [0] * 4) == 50e9
    assert square.bandwidth(line, [0, 0, 1, 1]) == square.chip.network


def test_rings_through_several_nodes_share_their_adapters():
    gpus = parse_topology("h100:16")
    places = [(n // 8, n % 8) for n in range(16)]
    assert gpus.bandwidth(places[:8], [0] * 8) == 450e9
    assert gpus.bandwidth(places, [0] * 16) == 400e9
    assert gpus.bandwidth([places[0], places[8]], [0, 0]) == 50e9


# --- closed forms -----------------------------------------------------------------------------


def test_flops_of_a_program_with_loops_and_branches():
    def program(x, w):
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
        return jax.checkpoint(lambda x: x @ w)(x)

    jaxpr = jax.make_jaxpr(program)(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert executed_flops(jaxpr.jaxpr) == (5 + 2 + 1) * 2 * 3 * 4 * 4


def test_without_recomputation_executed_flops_are_the_models():
    """But for attention, of whose scores four blocks leave 5/8 where the model needs half."""
    config = make_config(compute={"remat": "none"}, data={"sequence_length": 1024})
    model, length = config.model, 1024
    scores = 12 * model.n_layers * model.n_heads * model.d_head * length
    expected = flops_per_token(model, length) + scores * (5 / 8 - 1 / 2)
    # One product of scores is computed anew: attention keeps weights, not scores. It keeps both.
    assert executed_flops(training_jaxpr(config)) == pytest.approx(length * expected, rel=1e-6)


@pytest.mark.parametrize(("fsdp", "tensor"), [(4, 1), (2, 2), (1, 4)])
def test_the_closed_form_of_state_is_what_a_device_holds(fsdp, tensor):
    config = make_config(mesh={"data": 1, "fsdp": fsdp, "tensor": tensor})
    memory = training_memory(config, config.mesh.sizes)
    state, _ = training_step(config, jax.devices()).arguments

    def held(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    assert memory.kinds["parameters"] == held(state.params)
    assert memory.kinds["optimizer"] == held(state.optimizer) - 4  # its count
    assert memory.total < sum(memory.kinds.values())


def test_what_lies_on_the_host_is_not_on_the_device():
    names = ("query", "key")
    sizes = {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}

    def memory(**changes):
        return training_memory(make_config(accumulate=2, **changes), sizes)

    here = memory(compute={"remat": "named", "remat_save": names})
    there = memory(optimizer={"offload": True}, compute={"remat": "named", "remat_offload": names})
    inputs = memory(compute={"remat": "full"}).kinds["activations"]
    sent = here.kinds["activations"] - inputs
    assert there.kinds == {**here.kinds, "optimizer": 0, "activations": inputs}
    assert (there.host, there.moved) == (
        here.kinds["optimizer"] + sent,
        here.kinds["optimizer"] + 2 * sent,  # each part of the batch sends its own
    )
    assert here.host == here.moved == 0


def test_keeping_more_takes_more_memory_and_fewer_flops():
    keep = ("query", "key", "value", "attended", "attention_out", "gate", "up")
    kinds = [("full", ()), ("named", keep[:3]), ("named", keep), ("none", ())]
    configs = [make_config(compute={"remat": r, "remat_save": names}) for r, names in kinds]
    sizes = {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    kept = [training_memory(config, sizes).kinds["activations"] for config in configs]
    flops = [executed_flops(training_jaxpr(config)) for config in configs]
    assert kept == sorted(set(kept))
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > flops[2]


def test_a_step_is_bound_by_what_takes_longest():
    times = Times(compute=4.0, memory=1.0, interconnect=2.0, network=0.5)
    assert (times.bound, times.overlapped, times.serial) == ("compute", 4.0, 6.5)
    assert times.calibrated(0.5) == 8.0


def test_traffic_is_told_apart_by_the_network_it_crosses():
    class Device:
        def __init__(self, number):
            self.coords, self.slice_index = (number % 4, 0, 0), number // 4

    devices = [Device(n) for n in range(8)]
    topology = Topology(parse_topology("v5e:4x4").chip, (4, 4), slices=2)
    inside = Collective("all-gather", ("fsdp",), (0, 1, 2, 3), 0, 2, 100.0, "")
    across = Collective("all-reduce", ("data",), (0, 4), 0, 1, 30.0, "")
    sent = Collective("all-reduce between slices", (), (), 0, 3, 10.0, "")
    found = wire([inside, across, sent], topology, devices)
    assert found == (200, 60, 200 / 50e9, 60 / topology.chip.network)


# --- plans ------------------------------------------------------------------------------------


def test_a_plan_in_closed_form_has_every_field():
    record = estimate(make_config(), parse_topology("v5e:2x2"), compiled=False)
    assert record.keys() >= FIELDS
    assert record["fits"]
    assert record["bound"] in record["seconds"]
    assert json.loads(json.dumps(record)) == record
    assert record["model_flops_per_chip"] * 4 == 512 * flops_per_token(make_config().model, 64)
    budget = record["budget"]
    assert budget["tokens"] == 10 * 8 * 64
    assert budget["mwh"] is None  # Google publishes no power of a v5e


def test_energy_is_the_papers_formula():
    """Llama 1 65B: 1,022,362 hours at 400 W and PUE 1.1 are 449 MWh and 173 t."""
    config = make_config(watts=400.0, tokens=1e12)
    budget = estimate(config, parse_topology("v5e:2x2"), compiled=False)["budget"]
    hours = budget["chip_hours"]
    assert budget["mwh"] / hours * 1022362 == pytest.approx(449, rel=2e-3)
    assert budget["tco2eq"] / hours * 1022362 == pytest.approx(173, rel=2e-3)
    assert budget["days"] * 24 * 4 == pytest.approx(hours)


def test_a_decoder_is_bound_by_its_weights_and_cache():
    config = make_config(decode=True, batch=4, context=32)
    record = estimate(config, parse_topology("v5e:2x2"), compiled=False)
    model = config.model
    values = 2 * model.n_layers * 4 * 32 * model.n_kv_heads * model.d_head
    assert record["memory_by_kind"]["cache"] == values * 2 // 4
    assert record["mesh"]["tensor"] == 4
    assert record["budget"] is None
    assert record["executed_flops_per_chip"] == record["model_flops_per_chip"]
    seconds = record["seconds"]["memory"] * record["chip"]["memory_bandwidth"]
    kinds = record["memory_by_kind"]
    assert seconds == pytest.approx(kinds["parameters"] + kinds["cache"])


def test_heads_decide_how_a_decoder_is_divided():
    config = make_config(decode=True)
    assert decoding_mesh(config, 32).tensor == 4
    given = make_config(decode=True, mesh={"data": 2, "fsdp": 1, "tensor": 2, "rules": "decode"})
    assert decoding_mesh(given, 4) == given.mesh


def test_what_does_not_fit_names_tensors_and_remedies(capsys):
    config = make_config(model="llama2_7b", data={"batch_size": 512, "sequence_length": 4096})
    record = estimate(config, parse_topology("v5e:2x2"), compiled=False)
    assert not record["fits"]
    largest = record["largest_tensors"]
    assert [one["bytes"] for one in largest] == sorted(
        (one["bytes"] for one in largest), reverse=True
    )
    assert "accumulate" in largest[0]["remedy"]
    assert "layer" in largest[0]["name"]
    print_plan(record)
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert largest[0]["name"][:20] in printed


def test_without_the_compiler_there_is_half_a_plan(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    record = estimate(make_config(), parse_topology("v5e:2x2"))
    assert record["memory_from"] == record["wire_from"] == "closed form"
    assert "pip install 'llama-jax[tpu]'" in record["notes"][0]
    gpus = make_config(data={"batch_size": 8})
    assert "jax-cuda13-plugin" in estimate(gpus, parse_topology("h100:8"))["notes"][0]


def test_a_mesh_must_fit_the_topology():
    topology = parse_topology("v5e:4x4")
    assert resolved(MeshConfig(data=2, fsdp=-1), topology) == {
        **{"data": 2, "fsdp": 8},
        **{"expert": 1, "context": 1, "tensor": 1},
    }
    with pytest.raises(ConfigError, match=r"v5e:4x4: .* multiply to 3, .* the 16 devices"):
        resolved(MeshConfig(data=3, fsdp=-1), topology)
    with pytest.raises(ConfigError, match=r"must be a multiple of mesh\.data x mesh\.fsdp"):
        estimate(make_config(data={"batch_size": 8}), topology, compiled=False)


def test_training_and_planning_take_their_step_from_one_place():
    assert loop.make_program is programs.make_program
    config = make_config(decode=True, batch=4, context=32)
    assert programs.decoding_step(config, jax.devices()).function is Decoder.advance


def test_search_ranks_what_fits():
    config = make_config(data={"batch_size": 32})
    found = search(config.model_copy(update={"compiled": False}), parse_topology("v5e:2x2"))
    speeds = [one["plan"]["serial"]["tokens_per_second_per_chip"] for one in found]
    assert len(found) > 5
    assert speeds == sorted(speeds, reverse=True)
    assert all(one["plan"]["fits"] for one in found)
    assert {one["remat"] for one in found} >= {"none"}
    with pytest.raises(ConfigError, match="search is for training"):
        search(make_config(decode=True), parse_topology("v5e:2x2"))


def test_nothing_fits_a_chip_that_is_too_small():
    config = make_config(model="llama3.1_405b", data={"batch_size": 8, "sequence_length": 4096})
    assert search(config, parse_topology("v5e:2x2")) == []


@pytest.mark.parametrize(
    ("message", "required", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (511.62G) exceeds available HBM (15.75G).",
            511.62,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: E1000: ... Used 18.98G of 15.75G hbm. Exceeded by", 18.98, 15.75),
    ],
)
def test_a_compilers_complaint_is_read(message, required, available):
    found = out_of_memory(message, 1.0)
    assert found.required == pytest.approx(required * GIB, rel=1e-6)
    assert found.available == pytest.approx(available * GIB, rel=1e-6)
    assert found.largest == ()


def test_a_compilers_list_of_allocations_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory\n  Largest program allocations in hbm:\n\n"
        '  1. Size: 1.50G\n     Operator: op_name="jit(step)/dot" source_file="x"\n'
        "     Shape: f32[4,8]{1,0}\n     Unpadded size: 1.50G\n\n"
        "  2. Size: 512.0M\n     Shape: bf16[2]{0}\n"
    )
    assert out_of_memory(message, 1.0).largest == (
        ("jit(step)/dot f32[4,8]{1,0}", int(1.5 * GIB)),
        ("unnamed bf16[2]{0}", GIB // 2),
    )


# --- the command ------------------------------------------------------------------------------


def test_the_command_in_words_and_as_json(tmp_path: Path, capsys):
    path = tmp_path / "run.yaml"
    schema.save(make_config(compiled=False), path)
    assert cli.main(["plan", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed
    assert "bound by" in printed
    assert cli.main(["plan", "--config", str(path), "--json", "--topology", "v5p-8"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= FIELDS
    assert cli.main(["plan", "--config", str(path), "--search"]) == 0
    assert "what fits v5e:2x2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:5x5"], "there is no slice"),
        (["--mesh.tensor", "3"], "multiply to 3, which does not divide the 4 devices"),
        (["--topology", "h100:8", "--slices", "2"], "slices are a TPU's"),
        (["--mesh.context", "2"], "with splash attention the sequence length must be a multiple"),
        (["--mesh.context", "2", "--compute.attention", "flash"], "does not split a row's tokens"),
        (
            ["--mesh.context", "2", "--compute.attention", "xla", "--compute.loss_chunks", "64"],
            "the logits of one of compute.loss_chunks: dimension 1 (seq) is 1",
        ),
    ],
)
def test_mistakes_are_bad_usage(tmp_path: Path, capsys, arguments, message):
    path = tmp_path / "run.yaml"
    schema.save(make_config(compiled=False), path)
    assert cli.main(["plan", "--config", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_suit_their_machine(name):
    """Each loads, its mesh divides model and batch, and in closed form it fits."""
    machine = name.rpartition("_")[2]
    values = schema.read_yaml(RUNS / f"{name}.yaml")
    config = schema.parse(PlanConfig, {**values, "topology": machine}, name)
    topology = parse_topology(machine)
    record = estimate(config, topology, compiled=False)
    assert record["fits"], record["memory_by_kind"]
    assert record["parameters"] == n_parameters(config.model)
    header = (RUNS / f"{name}.yaml").read_text().splitlines()
    assert any(f"--config {name}" in line for line in header)


def test_there_are_presets():
    assert len(PRESETS) >= 8


# --- the real compiler ------------------------------------------------------------------------


def compiled_step(config):
    topology = parse_topology(config.topology, config.slices)
    make = programs.decoding_step if config.decode else training_step
    step = make(config, devices_of(topology))
    found = compile_step(step)
    assert isinstance(found, Compiled)
    return found, step


@needs_libtpu
@pytest.mark.parity
def test_a_training_step_compiles_for_a_slice():
    config = make_config(data={"batch_size": 16}, accumulate=2)
    found, step = compiled_step(config)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(step.arguments)
    )
    assert held <= found.arguments <= held * 1.5 + 2**20  # a TPU pads small arrays to tiles
    sent = collectives(found.hlo, step.mesh.shape)
    assert {one.axes for one in sent} == {("fsdp",)}
    layers = config.model.n_layers
    # Every layer's matrices are gathered for each of the two parts, and again backwards.
    assert sum(one.executions for one in sent) >= 2 * 2 * layers
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(step.arguments))


@needs_libtpu
@pytest.mark.parity
def test_a_plan_with_the_compiler():
    record = estimate(make_config(), parse_topology("v5e:2x2"))
    closed = estimate(make_config(), parse_topology("v5e:2x2"), compiled=False)
    assert record["memory_from"] == record["wire_from"] == "compiler"
    assert record["executed_flops_per_chip"] == closed["executed_flops_per_chip"]
    assert record["wire_bytes_per_chip"] == pytest.approx(closed["wire_bytes_per_chip"], rel=0.5)
    assert record["collectives"]
    assert record["compile_seconds"] > 0


@needs_libtpu
@pytest.mark.parity
def test_slices_talk_over_the_network():
    config = make_config(slices=2, mesh={"data": 2, "fsdp": -1})
    record = estimate(config, parse_topology("v5e:2x2", 2))
    assert record["network_bytes_per_chip"] > 0
    assert record["seconds"]["network"] > 0


@needs_libtpu
@pytest.mark.parity
def test_a_decoding_step_compiles_for_a_slice():
    config = make_config(decode=True, batch=4, context=128)
    record = estimate(config, parse_topology("v5e:2x2"))
    assert record["fits"]
    # Two sums a layer, and the logits.
    found = {row["kind"]: row["executions"] for row in record["collectives"]}
    assert found["all-reduce"] >= 2 * config.model.n_layers


@needs_libtpu
@pytest.mark.parity
def test_what_the_compiler_cannot_fit_is_told():
    config = make_config(
        model={"d_model": 4096, "d_ff": 16384, "n_layers": 24, "d_head": 1024},
        data={"batch_size": 4},
    )
    record = estimate(config, parse_topology("v5e:2x2"))
    assert not record["fits"]
    assert record["memory_from"] == "compiler"
    assert record["peak_bytes_per_chip"] > record["hbm_bytes_per_chip"]
    assert record["hbm_bytes_per_chip"] == pytest.approx(15.75 * GIB, rel=1e-6)
    assert record["largest_tensors"][0]["bytes"] > GIB // 2
