"""The command line: flags over files, help, messages and exit codes."""

import json
import subprocess
import sys

import pytest

from llama_jax import cli, flags
from llama_jax.chat.settings import ChatConfig
from llama_jax.config import (
    ConfigError,
    MeshConfig,
    TrainConfig,
    configs_folder,
    load_model,
    parse,
    read_yaml,
)
from llama_jax.convert.settings import ConvertConfig
from llama_jax.generate.settings import GenerateConfig, SamplingConfig

RUN = {
    "out": "x",
    "model": "tiny",
    "tokenizer": "t.model",
    "data": {"sources": ["a", "b"], "sequence_length": 16, "batch_size": 4},
    "steps": 10,
    "optimizer": {"warmup_steps": 1},
}


def resolve(*args: str) -> TrainConfig:
    return parse(TrainConfig, flags.merge(TrainConfig, RUN, flags.split(args)), "run.yaml")


def test_flags_lie_on_top_of_the_file():
    config = resolve("--optimizer.peak_lr", "1e-3", "--steps=20", "--compute.scan_layers", "false")
    assert config.optimizer.peak_lr == 1e-3
    assert config.optimizer.warmup_steps == 1
    assert config.steps == 20
    assert config.compute.scan_layers is False


def test_a_short_form_can_be_changed_field_by_field():
    assert resolve("--model.n_layers", "3").model == load_model("tiny").model_copy(
        update={"n_layers": 3}
    )
    assert resolve("--model", "llama2_7b").model == load_model("llama2_7b")
    sources = resolve("--data.sources.1.weight", "2").data.sources
    assert [(s.path, s.weight) for s in sources] == [("a", 1.0), ("b", 2.0)]


def test_a_section_given_in_part_keeps_the_defaults_of_its_place():
    assert MeshConfig().rules == "train"
    assert SamplingConfig().max_new_tokens != 1024
    for given in (["--mesh.data", "1"], ["--sampling.top_k", "3"], []):
        words = ["--checkpoint", "x", "--prompts", "a", *given]
        values = flags.merge(GenerateConfig, {}, flags.split(words))
        assert parse(GenerateConfig, values, "flags").mesh.rules == "decode"
    chat = parse(ChatConfig, {"checkpoint": "x", "sampling": {"top_k": 3}}, "chat.yaml")
    assert (chat.sampling.max_new_tokens, chat.sampling.top_k) == (1024, 3)
    told = parse(ChatConfig, {"checkpoint": "x", "sampling": {"max_new_tokens": 9}}, "chat.yaml")
    assert told.sampling.max_new_tokens == 9


def test_lists_take_several_words_and_none_empties():
    config = resolve(
        "--data.sources", "p", "q", "r", "--patience", "none", "--checkpoint.keep_every", "5"
    )
    assert [s.path for s in config.data.sources] == ["p", "q", "r"]
    assert config.patience is None
    assert config.checkpoint.keep_every == 5
    saved = resolve("--compute.remat", "named", "--compute.remat_save", "query", "key")
    assert saved.compute.remat_save == ("query", "key")


def test_words_before_the_flags_fill_the_positional_fields():
    places = flags.positional(ConvertConfig)
    assert places == ["source", "destination"]
    given = flags.split(["a", "b", "--to", "gguf"], places)
    assert given == [("source", ["a"]), ("destination", ["b"]), ("to", ["gguf"])]
    given = flags.split(["--to", "gguf", "--source", "a"], places)
    assert given == [("to", ["gguf"]), ("source", ["a"])]
    with pytest.raises(ConfigError, match="'c' follows no flag"):
        flags.split(["a", "b", "c", "--to", "gguf"], places)
    with pytest.raises(ConfigError, match="'a' follows no flag"):
        flags.split(["a"])


def test_help_shows_the_positional_fields(capsys):
    code, out, _ = run(capsys, "convert", "--help")
    assert code == 0
    assert "usage: llama-jax convert SOURCE DESTINATION" in out


def test_the_file_is_not_changed_by_flags():
    before = json.dumps(RUN)
    resolve("--data.sources.0.weight", "3", "--model.n_layers", "1")
    assert json.dumps(RUN) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optimizer.peak_lrr", "1"], "nearest is 'optimizer.peak_lr'"),
        (["--steps", "1.5"], "run.yaml: steps: .*integer"),
        (["--model.n_kv_heads", "3"], "multiple of n_kv_heads"),
        (["--model", "llama2_7"], "Did you mean llama2_7b"),
        (["--steps", "1", "2"], "--steps takes one value, not 2"),
        (["--steps"], "--steps takes one value, not 0"),
        (["--data.sources.7.weight", "1"], "must be the number of an entry"),
        (["stray"], "'stray' follows no flag"),
        (["--accumulate", "3"], "multiple of accumulate"),
        (["--mesh.data", "3"], "mesh.data x mesh.fsdp"),
        (["--data.sequence_length", "12"], "multiple of compute.loss_chunks|multiple of"),
        (["--optimizer.warmup_steps", "10"], "smaller than steps"),
    ],
)
def test_a_mistake_is_named(args, message):
    with pytest.raises(ConfigError, match=message):
        resolve(*args)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve("--steps", "-1", "--optimizer.beta1", "2", "--dat", "1")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("run.yaml: ") for line in lines)


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = cli.main(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_commands_are_listed_and_the_nearest_is_named(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    code, _, err = run(capsys, "trian")
    assert code == 2
    assert "did you mean 'train'" in err
    code, _, err = run(capsys, "tokenizer", "eat")
    assert code == 2
    assert "tokenizer train" in err


def test_bad_configuration_is_two_without_traceback(capsys):
    code, _, err = run(capsys, "generate", "--checkpoint", "x")
    assert code == 2
    assert "prompts" in err
    assert "Traceback" not in err


def test_failure_is_one_without_traceback(capsys, tmp_path):
    code, _, err = run(capsys, "generate", "--checkpoint", str(tmp_path), "--prompts", "a")
    assert code == 1
    assert str(tmp_path) in err
    assert "Traceback" not in err
    code, _, err = run(
        capsys, "generate", "--checkpoint", str(tmp_path), "--prompts", "a", "--debug"
    )
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_teaches_every_field(capsys, name):
    code, out, _ = run(capsys, *name.split(), "--help")
    assert code == 0
    for field, info in cli.COMMANDS[name].schema.model_fields.items():
        assert info.description, f"{name}: {field} has no meaning written down"
        assert f"{info.alias or field}" in out


def test_help_needs_no_jax():
    program = (
        "import sys; from llama_jax.cli import main; main(['train', '--help']);"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_models_as_json(capsys):
    code, out, _ = run(capsys, "models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["llama2_7b"]["parameters"] == 6_738_415_616
    assert rows["llama2_70b"]["cache_bytes_per_token_bf16"] == 327_680


def test_models_as_a_table(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert "llama3" in out


def test_recipes_say_command_hardware_time_and_result():
    recipes = sorted((configs_folder() / "runs").glob("*.yaml"))
    assert recipes
    for path in recipes:
        header = path.read_text().split("\nout:")[0]
        for word in ("main.py", "hardware", "time", "result"):
            assert word in header, f"{path.name} does not say its {word}"
        parse(TrainConfig, read_yaml(path), str(path))
