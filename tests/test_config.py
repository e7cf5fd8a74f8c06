"""The schema: what is accepted, what is refused and in which words, and what survives a file."""

import ast
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from llama_jax import cli, config
from llama_jax.chat import settings as chat_settings
from llama_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    ConfigError,
    DataConfig,
    ExpertsConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    Schema,
    TrainConfig,
    load_model,
    model,
    model_names,
    parse,
    read,
    reading,
    save,
    section,
)
from llama_jax.convert import settings as convert_settings
from llama_jax.convert.settings import ConvertConfig
from llama_jax.generate import settings as generate_settings
from llama_jax.generate.settings import GenerateConfig, SamplingConfig

# The schema of a command lies in config.py, or beside the command.
MODULES = (config, model, section, chat_settings, convert_settings, generate_settings)
REPOSITORY = Path(__file__).parents[1]

MODEL = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 8,
    "d_ff": 48,
    "vocab_size": 64,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_embeddings": False,
}
LLAMA3 = {
    "type": "llama3",
    "factor": 8,
    "original_context": 8192,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
}
YARN = {"type": "yarn", "factor": 4, "original_context": 64, "beta_fast": 32, "beta_slow": 1}
TRAIN = {
    "out": "runs/a",
    "model": MODEL,
    "tokenizer": "tokenizer.model",
    "data": {"sources": [{"path": "corpus"}], "sequence_length": 64, "batch_size": 8},
    "steps": 10,
    "optimizer": {"warmup_steps": 2},
}
GENERATE = {"checkpoint": "runs/a", "prompts": ["def "]}
CONVERT = {"source": "runs/a", "destination": "b", "to": "huggingface"}


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes laid over values, section by section."""
    new = dict(values)
    for key, value in changes.items():
        section = isinstance(value, dict) and isinstance(new.get(key), dict)
        new[key] = merged(new[key], value) if section else value
    return new


def refusal(schema: type[Schema], values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(schema, values, "run.yaml")
    return str(caught.value)


# --- what is refused, and how ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "values", "message"),
    [
        (ModelConfig, MODEL | {"norm_epss": 1}, "run.yaml: norm_epss: unknown key.*'norm_eps'"),
        (ModelConfig, MODEL | {"n_kv_head": 1}, "run.yaml: n_kv_head: unknown key.*'n_kv_heads'"),
        (
            ModelConfig,
            MODEL | {"rope_scaling": LLAMA3 | {"facto": 1}},
            "run.yaml: rope_scaling.facto: unknown key.*'rope_scaling.factor'",
        ),
        (TrainConfig, TRAIN | {"optimiser": {}}, "run.yaml: optimiser: unknown key.*'optimizer'"),
        (TrainConfig, TRAIN | {"peak_lr": 1}, "run.yaml: peak_lr: .*'optimizer.peak_lr'"),
        (
            TrainConfig,
            merged(TRAIN, {"model": MODEL | {"d_modl": 1}}),
            "run.yaml: model.d_modl: unknown key.*'model.d_model'",
        ),
        (
            TrainConfig,
            merged(TRAIN, {"data": {"sequence_lengths": 1}}),
            "run.yaml: data.sequence_lengths: unknown key.*'data.sequence_length'",
        ),
        (
            TrainConfig,
            merged(TRAIN, {"data": {"sources": [{"path": "a", "wieght": 2}]}}),
            "run.yaml: data.sources.0.wieght: unknown key.*'data.sources.0.weight'",
        ),
        (GenerateConfig, GENERATE | {"qqqqqq": 1}, "run.yaml: qqqqqq: unknown key$"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(schema, values, message):
    with pytest.raises(ConfigError, match=message):
        parse(schema, values, "run.yaml")


@pytest.mark.parametrize(
    ("schema", "values", "message"),
    [
        (ModelConfig, MODEL | {"n_layers": "two"}, "n_layers: .*integer.*got 'two'"),
        (ModelConfig, MODEL | {"n_layers": 2.5}, "n_layers: .*integer.*got 2.5"),
        (ModelConfig, MODEL | {"n_layers": None}, "n_layers: .*integer.*got None"),
        (ModelConfig, MODEL | {"n_layers": 0}, "n_layers: .*greater than 0.*got 0"),
        (ModelConfig, MODEL | {"rope_theta": 1}, "rope_theta: .*greater than 1.*got 1"),
        (ModelConfig, MODEL | {"norm_eps": "small"}, "norm_eps: .*number.*got 'small'"),
        (ModelConfig, MODEL | {"rope_theta": float("inf")}, "rope_theta: .*finite.*got inf"),
        (ModelConfig, MODEL | {"rope_theta": float("nan")}, "rope_theta: .*finite.*got nan"),
        (ModelConfig, MODEL | {"tie_embeddings": 2}, "tie_embeddings: .*boolean.*got 2"),
        (ModelConfig, MODEL | {"rope_scaling": None}, "rope_scaling: .*got None"),
        (ModelConfig, MODEL | {"rope_scaling": {"type": "ntk"}}, "rope_scaling.type: .*'llama3'"),
        (TrainConfig, merged(TRAIN, {"model": 3}), "model: .*got 3"),
        (TrainConfig, merged(TRAIN, {"data": {"packing": "dense"}}), "data.packing: .*'packed'"),
        (TrainConfig, merged(TRAIN, {"data": {"sources": []}}), "data.sources: .*at least 1"),
        (TrainConfig, merged(TRAIN, {"optimizer": {"beta2": 1}}), "optimizer.beta2: .*less than 1"),
        (TrainConfig, merged(TRAIN, {"compute": {"dtype": "fp8"}}), "compute.dtype: .*'bfloat16'"),
        (TrainConfig, merged(TRAIN, {"seed": -1}), "seed: .*got -1"),
        (
            GenerateConfig,
            merged(GENERATE, {"sampling": {"top_p": 0}}),
            "sampling.top_p: .*greater than 0",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_key(schema, values, message):
    with pytest.raises(ConfigError, match=f"^run.yaml: {message}"):
        parse(schema, values, "run.yaml")


@pytest.mark.parametrize("key", MODEL)
def test_what_a_checkpoint_decides_has_no_default(key):
    assert refusal(ModelConfig, without(MODEL, key)) == f"run.yaml: {key}: is required"


def test_all_mistakes_are_told_at_once():
    values = merged(without(TRAIN, "tokenizer"), {"steps": 0, "mesh": {"dta": 1}})
    lines = refusal(TrainConfig, values).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("run.yaml: ") for line in lines)
    assert {line.split(": ")[1] for line in lines} == {"tokenizer", "steps", "mesh.dta"}


CONTRADICTIONS = [
    (ModelConfig, MODEL | {"n_kv_heads": 3}, r"n_heads \(4\) .* multiple of n_kv_heads \(3\)"),
    (ModelConfig, MODEL | {"d_head": 7}, r"d_head x rotary_fraction \(7\) must be even"),
    (ModelConfig, MODEL | {"rotary_fraction": 0.4}, r"rotary_fraction \(3\) must be even"),
    (ModelConfig, MODEL | {"window": 3, "chunk": 3}, "window and chunk exclude each other"),
    (ModelConfig, MODEL | {"keep_first": 3}, "keep_first .* only with a window or a chunk"),
    (
        ModelConfig,
        MODEL | {"position": "alibi", "rotary_fraction": 0.5},
        "rotary_fraction has no meaning with position: alibi",
    ),
    (
        ModelConfig,
        MODEL | {"pattern": [{}, {"shares_kv": True, "keys_are_values": True}]},
        "pattern.1: a layer that shares_kv makes no keys",
    ),
    (ModelConfig, MODEL | {"shares_kv": True, "keys_are_values": True}, "makes no keys"),
    (ModelConfig, MODEL | {"shares_kv": True}, "shares_kv stands in an entry of the pattern"),
    (ModelConfig, MODEL | {"pattern": [{"shares_kv": True}]}, "pattern.0: shares_kv needs a layer"),
    (ModelConfig, MODEL | {"pattern": [{}, {"d_model": 4}]}, "pattern.1: d_model is the same"),
    (ModelConfig, MODEL | {"pattern": [{}, {}, {}]}, r"3 entries for n_layers \(2\)"),
    (
        ModelConfig,
        MODEL | {"pattern": [{}, {"windw": 4}]},
        "pattern.1: windw: unknown key; the nearest is 'window'",
    ),
    (
        ModelConfig,
        MODEL | {"pattern": [{"window": 4}, {"shares_kv": True}]},
        "pattern.1: with shares_kv its window must be that of the layer",
    ),
    (ExpertsConfig, {"count": 2, "per_token": 3}, r"per_token \(3\) must be at most count \(2\)"),
    (
        ModelConfig,
        MODEL
        | {"d_head": 2}
        | {"rope_scaling": {"type": "dynamic", "factor": 2, "original_context": 8}},
        "'dynamic' needs a d_head of 4",
    ),
    (ModelConfig, MODEL | {"n_layers": True}, "n_layers must be a number, not true"),
    (OptimizerConfig, {"peak_lr": False}, "peak_lr must be a number, not false"),
    (RopeScaling, without(LLAMA3, "original_context"), "'llama3' needs original_context"),
    (RopeScaling, without(LLAMA3, "low_freq_factor"), "'llama3' needs low_freq_factor"),
    (RopeScaling, without(LLAMA3, "high_freq_factor"), "'llama3' needs high_freq_factor"),
    (RopeScaling, without(YARN, "beta_fast"), "'yarn' needs beta_fast"),
    (RopeScaling, without(YARN, "beta_slow"), "'yarn' needs beta_slow"),
    (RopeScaling, without(YARN, "original_context"), "'yarn' needs original_context"),
    (RopeScaling, {"type": "dynamic", "factor": 2}, "'dynamic' needs original_context"),
    (RopeScaling, {"type": "linear", "beta_fast": 1}, "beta_fast has no meaning .* 'linear'"),
    (RopeScaling, {"original_context": 9}, "original_context has no meaning .* 'none'"),
    (RopeScaling, LLAMA3 | {"attention_factor": 1}, "attention_factor has no meaning .* 'llama3'"),
    (RopeScaling, {"factor": 2}, "factor has no meaning .* 'none'"),
    (RopeScaling, LLAMA3 | {"low_freq_factor": 4}, "high_freq_factor .*larger.* low_freq_factor"),
    (RopeScaling, YARN | {"beta_slow": 32}, "beta_fast .*larger.* beta_slow"),
    (ComputeConfig, {"remat_save": ["up"]}, "remat_save .*remat: named, not none"),
    (ComputeConfig, {"remat_offload": ["up"]}, "remat_offload .*remat: named, not none"),
    (ComputeConfig, {"remat": "named"}, "remat: named needs remat_save or .*some of query, key"),
    (
        ComputeConfig,
        {"remat": "named", "remat_save": ["up"], "remat_offload": ["gate", "up"]},
        "both remat_save and remat_offload name up",
    ),
    (MeshConfig, {"data": 0}, "data must be positive, or -1"),
    (MeshConfig, {"tensor": -2}, "tensor must be positive, or -1"),
    (MeshConfig, {"fsdp": -1}, "only one mesh axis may be -1"),
    (TrainConfig, merged(TRAIN, {"accumulate": 3}), r"batch_size \(8\) .* accumulate \(3\)"),
    (
        TrainConfig,
        merged(TRAIN, {"accumulate": 4, "mesh": {"data": 2, "fsdp": 2}}),
        r"batch_size / accumulate \(2\) .* mesh.data x mesh.fsdp x mesh.expert \(4\)",
    ),
    (
        TrainConfig,
        merged(TRAIN, {"mesh": {"data": 3, "fsdp": -1}}),
        r"batch_size / accumulate \(8\) .* mesh.data x mesh.fsdp x mesh.expert \(3\)",
    ),
    (
        TrainConfig,
        merged(TRAIN, {"compute": {"loss_chunks": 7}}),
        r"data.sequence_length \(64\) .* compute.loss_chunks \(7\)",
    ),
    (
        TrainConfig,
        merged(TRAIN, {"optimizer": {"warmup_steps": 10}}),
        r"optimizer.warmup_steps \(10\) .* steps \(10\)",
    ),
    (GenerateConfig, without(GENERATE, "prompts"), "give prompts: texts, or the name of a .jsonl"),
    (GenerateConfig, GENERATE | {"prompts": []}, "give prompts: texts, or the name of a .jsonl"),
    (SamplingConfig, {"stop": ["x", ""]}, "a stop string is empty"),
    (ConvertConfig, CONVERT | {"dtype": "q8_0"}, "q8_0 is of gguf; huggingface takes float32"),
    (ConvertConfig, CONVERT | {"shards": 2}, "shards .*to: meta, not huggingface"),
    (SamplingConfig, {"num_beams": 2, "n": 3}, r"n \(3\) must be at most num_beams \(2\)"),
]


@pytest.mark.parametrize(("schema", "values", "message"), CONTRADICTIONS)
def test_a_contradiction_names_the_file_and_the_keys(schema, values, message):
    with pytest.raises(ConfigError, match=f"^run.yaml: .*{message}"):
        parse(schema, values, "run.yaml")


def test_a_contradiction_inside_a_section_names_the_section():
    scaling = without(LLAMA3, "original_context")
    values = merged(TRAIN, {"model": MODEL | {"rope_scaling": scaling}})
    expected = "run.yaml: model.rope_scaling: rope scaling 'llama3' needs original_context"
    assert refusal(TrainConfig, values) == expected


def test_every_contradiction_that_the_schema_knows_is_among_the_cases():
    """Each `raise ValueError` of the schema's modules is reached by one of them."""
    raises = [
        (module.__file__, node)
        for module in MODULES
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and ast.unparse(node).startswith("raise ValueError(")
    ]
    assert len(raises) >= 15
    reached = set()
    for schema, values, _ in CONTRADICTIONS:
        with pytest.raises(ValidationError) as caught:
            schema.model_validate(values)
        trace = caught.value.errors()[0]["ctx"]["error"].__traceback__
        while trace is not None:  # where it was called, down to where it was raised
            reached.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
    missed = [
        ast.unparse(node)
        for file, node in raises
        if not any(file == f and node.lineno <= line <= node.end_lineno for f, line in reached)
    ]
    assert not missed, f"add a case to CONTRADICTIONS for {missed}"


# --- files -----------------------------------------------------------------------------------


def test_yaml_writes_1e_3_as_text_and_it_is_read_as_a_number(tmp_path):
    path = tmp_path / "optimizer.yaml"
    path.write_text("peak_lr: 1e-3\neps: 1E-8\n", encoding="utf-8")
    assert yaml.safe_load(path.read_text()) == {"peak_lr": "1e-3", "eps": "1E-8"}
    optimizer = read(OptimizerConfig, path)
    assert (optimizer.peak_lr, optimizer.eps) == (1e-3, 1e-8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"d_model: \xff", "cannot be read"),
        (b"d_model: [1\n", "not valid YAML"),
        (b"d_model: !!python/name:os.system\n", "not valid YAML"),
        (b"", "expected 'key: value' lines"),
        (b"- d_model\n", "expected 'key: value' lines"),
        (b"tiny\n", "expected 'key: value' lines"),
        (b"1: 2\n", "1: .*string"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"broken\.yaml: .*{message}"):
        read(ModelConfig, path)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read(ModelConfig, tmp_path)


SECTIONS = [
    ModelConfig(**MODEL),
    ModelConfig(**MODEL, rope_scaling=LLAMA3),
    RopeScaling(**YARN, attention_factor=1.25),
    ComputeConfig(dtype="bfloat16", remat="named", remat_save=("up", "query"), loss_chunks=3),
    MeshConfig(data=2, fsdp=-1, tensor=4, rules="decode"),
    OptimizerConfig(peak_lr=1 / 3, eps=1e-20, schedule="wsd"),
    CheckpointConfig(every=7, keep_every=14, asynchronous=False),
    DataConfig(**TRAIN["data"]),
    SamplingConfig(stop=("\n\n", "é: #'\"", "  "), temperature=0),
    GenerateConfig(**GENERATE),
    TrainConfig.model_validate(merged(TRAIN, {"wandb": "yes", "patience": 3, "seed": 2**60})),
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: type(section).__name__)
def test_what_is_saved_reads_back_equal(section, tmp_path):
    path = tmp_path / "saved.yaml"
    save(section, path)
    again = read(type(section), path)
    assert again == section
    assert hash(again) == hash(section)


SCHEMAS = [
    value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Schema) and value.__module__ == module.__name__
]


def stands_alone(schema: type[Schema]) -> bool:
    return not any(field.is_required() for field in schema.model_fields.values())


@pytest.mark.parametrize("schema", list(filter(stands_alone, SCHEMAS)))
def test_defaults_survive_a_file(schema, tmp_path):
    save(schema(), tmp_path / "saved.yaml")
    assert read(schema, tmp_path / "saved.yaml") == schema()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_says_what_it_means(schema):
    """`--help` prints it."""
    silent = [name for name, field in schema.model_fields.items() if not field.description]
    assert not silent
    assert schema.__doc__


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: type(section).__name__)
def test_sections_are_frozen_values(section):
    name = next(iter(type(section).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, name, getattr(section, name))
    assert hash(section.model_copy(deep=True)) == hash(section)


# --- the configurations that we ship ---------------------------------------------------------

RUNS = sorted((REPOSITORY / "configs" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("name", model_names())
def test_every_model_loads(name):
    model = load_model(name)
    assert isinstance(model, ModelConfig)
    assert parse(TrainConfig, merged(TRAIN, {"model": name}), "run.yaml").model == model


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_is_a_valid_configuration_of_one_command(path):
    refusals, accepted = [], []
    for schema in {command.schema for command in cli.COMMANDS.values()}:
        try:
            accepted.append(read(schema, path))
        except ConfigError as error:
            refusals.append(f"as {schema.__name__}:\n{error}")
    assert len(accepted) == 1, "\n".join(refusals)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_says_how_to_start_it_and_what_to_expect(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for wanted in ("python main.py ", "hardware ", "time ", "result "):
        assert any(wanted in line for line in comments), f"{path.name}: a comment with '{wanted}'"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama2-7b", "No model is called 'llama2-7b'. Did you mean llama2_7b?"),
        ("zzz", "No model is called 'zzz'. `models` lists them."),
        ("../models/tiny", "No model is called '../models/tiny'."),
    ],
)
def test_an_unknown_model_is_refused_and_the_nearest_named(name, message):
    with pytest.raises(ConfigError) as caught:
        load_model(name)
    assert str(caught.value).startswith(message)
    in_a_run = refusal(TrainConfig, merged(TRAIN, {"model": name}))
    assert in_a_run.startswith(f"run.yaml: model: {message}")


def test_configs_are_found_in_a_clone_and_in_an_installed_package(tmp_path, monkeypatch):
    """A clone has configs/ beside the package; a wheel has it inside, which comes first."""
    package, clone = tmp_path / "llama_jax", tmp_path / "configs"
    inside = package / "configs"
    for folder, width in ((clone, 8), (inside, 16)):
        (folder / "models").mkdir(parents=True)
        model = ModelConfig(**MODEL | {"d_model": width})
        save(model, folder / "models" / f"of_{width}.yaml")
    monkeypatch.setattr(reading, "__file__", str(package / "config" / "reading.py"))
    assert config.configs_folder() == inside
    assert model_names() == ["of_16"]
    assert load_model("of_16").d_model == 16
    inside.rename(package / "elsewhere")
    assert config.configs_folder() == clone
    assert load_model("of_8").d_model == 8


def test_the_wheel_takes_configs_into_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "llama_jax/configs"}


# --- what the schema says about itself -------------------------------------------------------


def marked(schema: type[Schema], prefix: str = "") -> set[str]:
    """Dotted names of the fields that a resumed run must keep."""
    names = set()
    for name, field in schema.model_fields.items():
        if (field.json_schema_extra or {}).get("resume") == "fixed":
            names.add(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Schema):
            names |= marked(field.annotation, f"{prefix}{name}.")
    return names


def test_a_resumed_run_must_keep_what_decides_its_parameters_and_its_data():
    assert marked(TrainConfig) == {
        "model",
        "seed",
        "data.sources",
        "data.sequence_length",
        "data.batch_size",
        "data.packing",
        "data.shuffle",
    }


VARIED = MODEL | {
    "attention": "latent",
    "attention_settings": {"kv_rank": 4, "deep": {"list": [1, 2.5, None]}},
    "pattern": [{"window": 4}, {"attention_settings": {"kv_rank": 3}, "rope_theta": 1e5}],
}


def test_mappings_that_others_read_are_values(tmp_path):
    """Equal, hashable, and the same after a file, whatever the order of their keys."""
    varied = ModelConfig(**VARIED)
    settings = dict(reversed(VARIED["attention_settings"].items()))
    other = ModelConfig(**VARIED | {"attention_settings": settings})
    assert other == varied
    assert hash(other) == hash(varied)
    assert ModelConfig(**VARIED | {"attention_settings": {"kv_rank": 5}}) != varied
    save(varied, tmp_path / "model.yaml")
    assert read(ModelConfig, tmp_path / "model.yaml") == varied
    assert varied.attention_settings.plain() == VARIED["attention_settings"]
    with pytest.raises(ConfigError, match=r"attention_settings: Input should be a valid dict"):
        parse(ModelConfig, VARIED | {"attention_settings": 3}, "model.yaml")


def test_a_pattern_says_what_each_layer_has_otherwise():
    varied = ModelConfig(**VARIED | {"n_layers": 5})
    first, second = varied.places
    assert (first.window, second.window) == (4, None)
    assert (first.rope_theta, second.rope_theta) == (1e4, 1e5)
    assert second.attention_settings.plain() == {"kv_rank": 3}
    assert [varied.layer(depth) for depth in range(5)] == [first, second, first, second, first]
    assert first.places == (first,)
    assert ModelConfig(**MODEL).places == (ModelConfig(**MODEL),)
    changed = varied.model_copy(update={"d_ff": 5})
    assert changed.places[0].d_ff == 5


def test_groups_and_mesh_sizes():
    assert ModelConfig(**MODEL | {"n_kv_heads": 1}).n_groups == 4
    assert list(MeshConfig(data=2, tensor=4).sizes.items()) == [
        ("data", 2),
        ("fsdp", 1),
        ("expert", 1),
        ("context", 1),
        ("tensor", 4),
    ]


def test_every_value_that_remat_may_save_is_accepted():
    names = get_args(config.RematName)
    assert ComputeConfig(remat="named", remat_save=names).remat_save == names


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\nmodel:\n  d_model: 1\n  d_model: 2\n")
    with pytest.raises(ConfigError, match=r"twice.yaml.*'d_model' stands twice"):
        config.read_yaml(path)
