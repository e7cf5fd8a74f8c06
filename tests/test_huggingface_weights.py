"""Weights of Hugging Face folders: every layout is read, damaged or foreign files are refused."""

import json
import shutil
import struct
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from fuzz import LONG, SHORT, survive
from safetensors.numpy import load_file, save_file

from llama_jax.config import ConfigError
from llama_jax.convert import huggingface, safetensors_file
from llama_jax.convert.source import load_params

GOLDEN = Path(__file__).parent / "golden"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden folder that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "llama2_gqa", tmp_path / "model"))


def load(folder):
    return load_params(huggingface.open_folder(folder), np.float32)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder, change):
    """Loads model.safetensors, lets `change` edit the dict, and writes it back."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def split_into_shards(folder):
    """model.safetensors -> two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    write_index(folder, places)
    return places


def write_index(folder, places):
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_shards_give_the_same_bits_as_one_file(folder):
    whole = load(folder)
    split_into_shards(folder)
    assert_same_bits(load(folder), whole)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_fp32_without_loss(folder, dtype):
    whole = load(folder)
    rewrite(
        folder, lambda tensors: tensors.update({n: t.astype(dtype) for n, t in tensors.items()})
    )
    rounded = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), whole)
    assert_same_bits(load(folder), rounded)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(load(folder)))


def test_stored_rotary_buffers_are_ignored(folder):
    whole = load(folder)
    buffers = {
        "model.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    rewrite(folder, lambda tensors: tensors.update(buffers))
    assert_same_bits(load(folder), whole)


@pytest.fixture
def tied(tmp_path):
    return Path(shutil.copytree(GOLDEN / "llama3.2_tied", tmp_path / "tied"))


def test_a_head_stored_beside_tied_embeddings_must_equal_them(tied):
    whole = load(tied)
    embed = "model.embed_tokens.weight"
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": tensors[embed].copy()}))
    assert_same_bits(load(tied), whole)
    rewrite(tied, lambda tensors: tensors["lm_head.weight"].__setitem__((63, 31), 7.0))
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        load(tied)
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": np.zeros((2, 2), np.float32)}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight has shape \(2, 2\)"):
        load(tied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop(K_PROJ),
            rf"{K_PROJ} is missing, expected shape \(16, 32\)",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), "f4")}),
            r"model\.layers\.2\.mlp\.up_proj\.weight is not part",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, "f4")}),
            r"q_proj\.bias is not part",
        ),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ].T.copy()}),
            rf"{K_PROJ} has shape \(32, 16\), expected \(16, 32\)",
        ),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ].reshape(-1)}),
            rf"{K_PROJ} has shape \(512,\)",
        ),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.int8)}),
            rf"{K_PROJ} has type I8, expected one of float32, bfloat16, float16",
        ),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.float64)}),
            rf"{K_PROJ} has type F64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, said):
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \(16, 32\), expected \(32, 32\)"),
        ({"vocab_size": 128}, r"embed_tokens\.weight has shape \(64, 32\), expected \(128, 32\)"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+ is not part"),
        ({"num_hidden_layers": 10**12}, r"layers\.2\.\S+ is missing"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight is not model\.embed_tokens\.weight"),
        ({"intermediate_size": 10**12}, r"expected \(1000000000000, 32\)"),
    ],
)
def test_a_config_of_another_model_is_refused_before_allocation(folder, values, said):
    # The last sizes would be terabytes: allocating them first is a MemoryError, not this message.
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=said):
        load(folder)


def test_only_the_first_problems_are_listed(folder):
    rewrite(folder, lambda tensors: tensors.clear())
    with pytest.raises(ConfigError) as refused:
        load(folder)
    assert str(refused.value).count("is missing") == 3


def test_a_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(folder)


# --- damaged safetensors (the library checks the file, the loader turns its errors into ours) ---


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def with_header(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        with_header(b"", b""),
        with_header({}, length=10_000),
        with_header({}, length=200_000_000),
        with_header({}, length=2**64 - 1),
        with_header(b"\xff\xfe{"),
        with_header(b"not json"),
        with_header(b"[]"),
        with_header(b'{"a":' * 50_000),
        with_header(b"[" * 50_000),
        with_header({"a": 1}),
        with_header({"a": {"dtype": "F32"}}),
        with_header(entry(dtype="Q9")),
        with_header(entry(dtype=None)),
        with_header(entry(shape=(-2,))),
        with_header(entry(shape=(3,))),
        with_header(entry(shape=(2**33, 2**33))),
        with_header(entry(shape=(2**64,))),
        with_header(entry(offsets=(0, 16))),
        with_header(entry(offsets=(8, 0))),
        with_header(entry(offsets=(-8, 0))),
        with_header(entry(offsets=(4, 12)), b"\0" * 12),
        with_header(entry(offsets=(0, 2**64 - 1))),
        with_header(entry(), b"\0" * 4),
        with_header(entry(), b"\0" * 12),
        with_header({**entry(), "b": entry()["a"]}),
        with_header({**entry(), "b": entry(offsets=(12, 20))["a"]}, b"\0" * 20),
        with_header(entry()),
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_damaged_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"safetensors|does not hold this model"):
        load(folder)


def test_a_header_too_large_to_parse_is_not_parsed(folder):
    # Well-formed, and within the library's own limit, but a million entries take it a gigabyte.
    header = {"__metadata__": {"a": "x" * safetensors_file.LARGEST_HEADER}}
    (folder / "model.safetensors").write_bytes(with_header(header, b""))
    with pytest.raises(ConfigError, match="too large to be genuine"):
        load(folder)


def test_a_truncated_file_is_refused_wherever_it_ends(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), 977), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"model\.safetensors"):
            load(folder)


@pytest.mark.parametrize("inputs", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(folder, inputs):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]
    assert survive(lambda: load(folder), path, content, inputs, head) > inputs / 2


@pytest.mark.parametrize("inputs", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_read_or_refused(folder, name, inputs):
    split_into_shards(folder)
    path = folder / name
    content = path.read_bytes()
    assert survive(lambda: load(folder), path, content, inputs, len(content)) > inputs / 2


# --- shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "..",
        "sub/model.safetensors",
        "/outside.safetensors",
        "..\\outside.safetensors",
        "model\0.safetensors",
        "pytorch_model.bin",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_leave_its_folder(folder, name):
    places = split_into_shards(folder)
    # The outside file exists and is sound, so only the name can be what is refused.
    tensors = load_file(GOLDEN / "llama2_gqa" / "model.safetensors")
    save_file({K_PROJ: tensors[K_PROJ]}, folder.parent / "outside.safetensors")
    write_index(folder, {**places, K_PROJ: name})
    with pytest.raises(ConfigError, match="is not the name of a file in this folder"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{", '{"weight_map": 1}']
)
def test_a_damaged_index_is_refused(folder, content):
    split_into_shards(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors, which is missing"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    places = split_into_shards(folder)
    path = folder / next(file for name, file in places.items() if name != K_PROJ)
    other = next(file for file in places.values() if file != places[K_PROJ])
    path = folder / other
    save_file(load_file(path) | {K_PROJ: np.zeros((16, 32), np.float32)}, path)
    with pytest.raises(ConfigError, match=f"{K_PROJ} is also in another shard"):
        load(folder)


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"llama-jax\[convert\]"):
        load(folder)
