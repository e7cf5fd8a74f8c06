"""Hugging Face folders: numbers equal golden files, all generations are read."""

import json
from functools import reduce
from operator import getitem
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import in_our_layout, load_folder
from safetensors.numpy import load_file

from llama_jax.config import ComputeConfig, ConfigError, RopeScaling, load_model
from llama_jax.convert import huggingface, names, source
from llama_jax.model.llama import Llama
from llama_jax.model.ops.rope import inverse_frequencies
from llama_jax.model.stack import unstack

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
SCALED = ["dynamic", "linear", "llama3.1", "llama3.2_tied", "yarn"]


def logits_of(config, params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return jax.jit(Llama(config).apply)(params, ids, positions).value


# --- numbers ---------------------------------------------------------------------------------


def test_every_golden_case_is_there():
    assert len(CASES) == 11
    files = [path for case in CASES for path in (GOLDEN / case).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 2e6


@pytest.mark.parametrize(
    ("case", "layout"),
    # The layout of layers and the kind of model are independent: two cases suffice for the second.
    [(case, "scanned") for case in CASES]
    + [("llama2_gqa", "unrolled"), ("llama3.2_tied", "unrolled")],
)
def test_logits_and_gradients_equal_hugging_face(case, layout):
    config, params = load_folder(GOLDEN / case)
    golden = np.load(GOLDEN / case / "golden.npz")
    ids = golden["ids"]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    model = Llama(config, ComputeConfig(scan_layers=layout == "scanned"))

    def mean_loss(params):
        logits = model.apply(params, ids, positions).value
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1)
        return -picked.mean(), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    off_logits = np.abs(logits - golden["logits"]).max()
    expected = in_our_layout(golden, config)
    off = {
        path: np.abs(reduce(getitem, path, gradients) - expected[path]).max() for path in expected
    }
    print(f"{case} {layout}: logits {off_logits:.1e}, gradients {max(off.values()):.1e}")
    assert logits.dtype == jnp.float32
    assert off_logits <= 1e-4
    assert abs(loss - golden["loss"]) <= 1e-5
    assert max(off.values()) <= 1e-4, off
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    assert len(expected) == len(jax.tree.leaves(gradients))


def test_per_layer_parameters_give_the_golden_logits():
    folder = GOLDEN / "llama2_gqa"
    config, params = load_folder(folder)
    params = unstack(params)
    golden = np.load(folder / "golden.npz")
    assert np.abs(logits_of(config, params, golden["ids"]) - golden["logits"]).max() <= 1e-4


@pytest.mark.parametrize("case", SCALED)
def test_without_its_scaling_a_golden_case_fails(case):
    # Otherwise the comparison above would say nothing about the scaling.
    config, params = load_folder(GOLDEN / case)
    golden = np.load(GOLDEN / case / "golden.npz")
    plain = config.model_copy(update={"rope_scaling": RopeScaling()})
    assert np.abs(logits_of(plain, params, golden["ids"]) - golden["logits"]).max() > 1e-2


def test_without_its_windows_a_golden_case_fails():
    config, params = load_folder(GOLDEN / "mistral")
    golden = np.load(GOLDEN / "mistral" / "golden.npz")
    assert config.window == 7
    for window in (None, 6, 8):
        other = config.model_copy(update={"window": window})
        assert np.abs(logits_of(other, params, golden["ids"]) - golden["logits"]).max() > 1e-2


@pytest.mark.parametrize("case", ["llama3.1", "llama3.2_tied", "yarn"])
def test_golden_scalings_have_all_three_bands(case):
    config = huggingface.read_config(GOLDEN / case)
    plain = config.model_copy(update={"rope_scaling": RopeScaling()})
    kept = inverse_frequencies(config) / inverse_frequencies(plain)
    stretched = np.isclose(kept, 1 / config.rope_scaling.factor)
    assert (kept == 1).any()
    assert stretched.any()
    assert ((kept < 1) & ~stretched).any()


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_names_are_those_of_the_model_and_of_the_file(case):
    config = huggingface.read_config(GOLDEN / case)
    shapes = Llama(config).shapes()
    for row in names.tensors(config):
        assert names.our_shape(row, config) == reduce(getitem, row.path, shapes).shape
    stored = load_file(GOLDEN / case / "model.safetensors")
    table = {
        row.huggingface.name.format(layer=layer): names.shape(row.huggingface.axes, config)
        for row, layer in names.entries(config)
    }
    assert table == {name: array.shape for name, array in stored.items()}


# --- config.json -----------------------------------------------------------------------------

LLAMA1_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA2_70B = {
    **LLAMA1_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA3_8B = {
    **LLAMA1_7B,
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA3_2_1B = {
    **LLAMA3_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
}
LLAMA3_2_1B_AS_5 = {
    key: value for key, value in LLAMA3_2_1B.items() if key not in ("rope_theta", "rope_scaling")
} | {"rope_parameters": {**LLAMA3_2_1B["rope_scaling"], "rope_theta": 500000.0}}


def config_from(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return huggingface.read_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "preset"),
    [
        (LLAMA1_7B, "llama_7b"),  # says nothing of kv heads, theta, scaling, head width or tying
        (LLAMA2_70B, "llama2_70b"),  # scaling is null
        (LLAMA3_8B, "llama3_8b"),
        (LLAMA3_2_1B, "llama3.2_1b"),
        (LLAMA3_2_1B_AS_5, "llama3.2_1b"),
    ],
)
def test_published_files_of_every_generation_give_our_presets(tmp_path, values, preset):
    assert config_from(tmp_path, values) == load_model(preset)


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"kind": "default"}, {"type": "none"}),
        ({"kind": "linear", "factor": 4}, {"type": "linear", "factor": 4.0}),
        (
            {"kind": "dynamic", "factor": 2.0},
            {"type": "dynamic", "factor": 2.0, "original_context": 4096},
        ),
        (
            {"kind": "yarn", "factor": 8.0, "mscale": None, "truncate": True},
            {
                "type": "yarn",
                "factor": 8.0,
                "original_context": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
        (
            {
                "kind": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16,
                "beta_slow": 2,
                "attention_factor": 1.25,
            },
            {
                "type": "yarn",
                "factor": 8.0,
                "original_context": 512,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.25,
            },
        ),
    ],
)
def test_scalings_in_every_spelling(tmp_path, section, spelling, given, expected):
    given = {spelling if key == "kind" else key: value for key, value in given.items()}
    config = config_from(tmp_path, {**LLAMA2_70B, section: given})
    assert config.rope_scaling == RopeScaling(**expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"model_type": "mistral"}, "architectures"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "a mistral model must give sliding_window",
        ),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
        ({"hidden_size": None}, "hidden_size: is required"),
        ({"rms_norm_eps": None}, "rms_norm_eps: is required"),
        ({"hidden_size": "8192"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 8190}, "head_dim"),
        ({"num_key_value_heads": 7}, "n_kv_heads"),
        ({"num_attention_heads": 0}, "n_heads"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}, "disagree"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate"),
        (
            {
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                }
            },
            "max_position_embeddings",
        ),
        ({"rope_scaling": ["linear", 4.0]}, "rope_scaling"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
            "contradict",
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "contradict",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said) as refused:
        config_from(tmp_path, {**LLAMA2_70B, **change})
    assert "config.json" in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{",
        b'{"hidden_size": 64',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    ],
)
def test_damaged_config_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        huggingface.read_config(tmp_path)


def test_missing_config_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        huggingface.read_config(tmp_path / "nowhere")


def test_oversized_config_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "LARGEST_JSON", 100)
    with pytest.raises(ConfigError, match="larger than 100 bytes"):
        config_from(tmp_path, LLAMA2_70B)


# --- end tokens ------------------------------------------------------------------------------


def test_end_ids_come_from_the_generation_config_first(tmp_path):
    assert huggingface.eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert huggingface.eos_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert huggingface.eos_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008]}')
    assert huggingface.eos_ids(tmp_path) == (128001, 128008)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ConfigError, match="eos_token_id"):
        huggingface.eos_ids(tmp_path)
