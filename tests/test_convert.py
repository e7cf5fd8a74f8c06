"""Conversions: every format into every other and back without a changed bit, or not at all."""

import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from models import CASES, GOLDEN, change_config, converted, huggingface_folder, speaking_folder
from safetensors.numpy import load_file, save_file

import llama_jax
from llama_jax import cli
from llama_jax.config import ConfigError
from llama_jax.convert import formats, huggingface, names
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import DTYPES, Stored, load_params, narrowest
from llama_jax.model.llama import Llama
from llama_jax.tokenizer.train import train
from llama_jax.train import checkpoint
from llama_jax.train.manifest import write_manifest
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

FORMATS = ("llama_jax", "huggingface", "meta", "gguf")
# Meta's code fixes what rope scaling starts from; the other formats say it.
META_ROPE = {"original_max_position_embeddings": 8192}
# What a format has no word for.
UNSAID = {
    ("meta", "wide_heads"): "heads of d_model / n_heads numbers, not d_head = 16",
    ("meta", "linear"): "one rope scaling, llama3",
    ("meta", "dynamic"): "one rope scaling, llama3",
    ("meta", "yarn"): "one rope scaling, llama3",
    ("meta", "llama3.1"): "original_context 8192.*'original_context': 64",
    ("meta", "llama3.2_tied"): "original_context 8192.*'original_context': 64",
    ("gguf", "dynamic"): "cannot say rope scaling 'dynamic'",
    ("meta", "mistral"): r"no window \(model.window\); choose huggingface",
    ("gguf", "mistral"): r"no window \(model.window\); choose huggingface",
}


def assert_same_model(source, expected, dtype):
    """Two opened models: same architecture, same bits, stored in the same type."""
    assert source.config == expected.config
    assert source.dtype == expected.dtype == DTYPES[dtype]
    here, there = load_params(source), load_params(expected)
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for mine, theirs in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), theirs.view(np.uint8))


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "to", "dtype"),
    # Types are spread over the generations: what is stored how does not depend on the other.
    [
        (case, to, list(DTYPES)[number % 3])
        for number, (case, to) in enumerate(itertools.product(CASES, FORMATS))
        if (to, case) not in UNSAID or "original_context" in UNSAID[to, case]
    ]
    + [("llama2_gqa", to, dtype) for to, dtype in itertools.product(FORMATS, DTYPES)],
)
def test_every_generation_survives_every_format_bit_for_bit(case, to, dtype, tmp_path):
    scaled = {"rope_parameters": META_ROPE} if to == "meta" and case.startswith("llama3.") else {}
    first = huggingface_folder(tmp_path / "first", case, dtype, **scaled)
    source, expected = open_source(converted(first, tmp_path / "there", to)), open_source(first)
    assert source.format == to
    assert_same_model(source, expected, dtype)
    # Meta's files say neither; the other three formats keep both.
    said = (expected.end_ids, expected.context_length) if to != "meta" else ((), None)
    assert (source.end_ids, source.context_length) == said
    assert said != ((), None) or to == "meta"


def test_every_format_becomes_every_other_bit_for_bit(tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama2_gqa", "bfloat16")
    made = {to: converted(first, tmp_path / to, to) for to in FORMATS}
    for here, there in itertools.product(FORMATS, FORMATS):
        settings = {"context_length": 128} if here == "meta" else {}
        result = converted(made[here], tmp_path / f"{here}_{there}", there, **settings)
        assert_same_model(open_source(result), open_source(first), "bfloat16")


@pytest.mark.parametrize(
    ("case", "shards"),
    [
        *itertools.product(["llama1", "llama2_gqa", "mqa", "llama3"], [2, 4]),
        ("llama3.2_tied", 2),  # it has 2 heads
    ],
)
def test_meta_shards_are_joined_bit_for_bit(case, shards, tmp_path):
    # At 4 shards the 2 kv heads of llama2_gqa, and the 1 of mqa at 2, are repeated.
    scaled = {"rope_parameters": META_ROPE} if case.startswith("llama3.") else {}
    first = huggingface_folder(tmp_path / "first", case, "bfloat16", **scaled)
    there = converted(first, tmp_path / "meta", "meta", shards=shards)
    assert len(list(there.glob("consolidated.*.pth"))) == shards
    assert_same_model(open_source(there), open_source(first), "bfloat16")


@pytest.mark.parametrize(("to", "case"), UNSAID)
def test_what_a_format_cannot_say_is_refused_before_anything_is_written(to, case, tmp_path):
    with pytest.raises(ConfigError, match=UNSAID[to, case]):
        converted(GOLDEN / case, tmp_path / "there", to)
    assert list(tmp_path.iterdir()) == []


def test_variants_of_attention_stay_in_our_format(tmp_path):
    ours = converted(GOLDEN / "mistral", tmp_path / "ours", "llama_jax")
    path = ours / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("window: 7", "window: null").replace("chunk: null", "chunk: 7"))
    assert path.read_text() != text
    (ours / "manifest.json").unlink()
    write_manifest(ours)
    assert open_source(ours).config.chunk == 7
    for to in ("huggingface", "meta", "gguf"):
        with pytest.raises(ConfigError, match=r"no .*chunk \(model.chunk\).* our own format only"):
            converted(ours, tmp_path / to, to)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_a_wanted_type_is_the_source_rounded(wanted, to, tmp_path):
    first = GOLDEN / "llama2_gqa"
    source = open_source(converted(first, tmp_path / "there", to, dtype=wanted))
    expected = open_source(first)
    for row, layer in names.entries(source.config):
        array = source.tensor(row, layer)
        if to == "gguf" and array.ndim == 1:  # norms stay in fp32
            assert array.dtype == np.float32
        else:
            assert array.dtype == DTYPES[wanted]
        rounded = expected.tensor(row, layer).astype(array.dtype)
        np.testing.assert_array_equal(array.astype(np.float32), rounded.astype(np.float32))


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama2_gqa")
    weights = load_file(first / "model.safetensors")
    weights["model.norm.weight"][3] = 7e4
    save_file(weights, first / "model.safetensors")
    with pytest.raises(ConfigError, match="final_norm holds numbers too large for float16"):
        converted(first, tmp_path / "there", "huggingface", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    weights["model.norm.weight"][3] = np.inf  # what was infinite may stay so
    save_file(weights, first / "model.safetensors")
    converted(first, tmp_path / "there", "huggingface", dtype="float16")


def test_the_narrowest_type_is_the_one_that_holds_every_value():
    def stored(array, kind):
        return Stored(array.shape, kind, lambda: array)

    matrix = stored(np.zeros((2, 2), DTYPES["bfloat16"]), "bfloat16")
    fits = stored(np.array([1.5, -2.0], np.float32), "float32")
    not_fits = stored(np.array([1.001], np.float32), "float32")
    assert narrowest([matrix, fits]) == DTYPES["bfloat16"]
    assert narrowest([matrix, not_fits]) == DTYPES["float32"]
    quantised = stored(np.zeros((2, 32), np.float32), "Q8_0")
    assert narrowest([matrix, quantised]) == DTYPES["float32"]


def test_shards_of_safetensors_are_closed_when_full_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    first = huggingface_folder(tmp_path / "first", "llama3")
    there = converted(first, tmp_path / "there", "huggingface")
    assert_same_model(open_source(there), open_source(first), "float32")
    index = json.loads((there / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in there.glob("*.safetensors"))
    assert files == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    sizes = []
    for file in files:
        arrays = load_file(there / file)
        assert all(index["weight_map"][name] == file for name in arrays)
        sizes.append(sum(array.nbytes for array in arrays.values()))
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)


# --- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_each_device_reads_its_part_of_every_format(to, tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama2_gqa")
    source = open_source(converted(first, tmp_path / "there", to))
    model, mesh = (
        Llama(source.config),
        make_mesh({"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}),
    )
    places = shardings(model.shapes(), model.axes(), mesh, PRESETS["train"])
    params = load_params(source, np.float32, places)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    whole = load_params(open_source(first))
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert len(params["layers"]["attention"]["q"].addressable_shards) == 4


def test_of_a_layer_only_the_asked_slice_is_touched():
    """A device's part is cut from the mapped tensor before it is copied or cast."""
    source = open_source(GOLDEN / "llama2_gqa")
    copied = []

    class Watched(np.ndarray):
        def astype(self, *args, **keywords):
            copied.append(self.shape)
            return super().astype(*args, **keywords)

    watched = replace(source, tensor=lambda row, layer: source.tensor(row, layer).view(Watched))
    mesh, model = (
        make_mesh({"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}),
        Llama(source.config),
    )
    places = shardings(model.shapes(), model.axes(), mesh, PRESETS["train"])
    load_params(watched, DTYPES["bfloat16"], places)
    # d_model, d_ff / 2: once for each layer, device and matrix, however many replicas there are.
    assert copied.count((32, 24)) == 2 * 2 * 2
    assert (32, 48) not in copied


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    folder = speaking_folder(tmp_path_factory.mktemp("speaking") / "model")
    change_config(folder, rope_parameters=META_ROPE)
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_a_converted_model_says_the_same(to, speaking, tmp_path):
    there = converted(speaking, tmp_path / "there", to)
    first, second = llama_jax.load(speaking), llama_jax.load(there)
    assert second.end_ids == ((2, 17) if to != "meta" else (2,))
    ids = [[1, 5, 9, 250, 319]]
    np.testing.assert_array_equal(first.logits(ids), second.logits(ids))
    assert first.tokenizer.encode("the cat sat") == second.tokenizer.encode("the cat sat")


def test_end_ids_and_context_survive_the_way_through_our_checkpoint(speaking, tmp_path):
    there = converted(speaking, tmp_path / "there", "llama_jax")
    back = open_source(converted(there, tmp_path / "back", "huggingface"))
    assert (back.end_ids, back.context_length) == ((2, 17), 128)
    assert back.tokenizer.fingerprint == open_source(speaking).tokenizer.fingerprint


def test_training_starts_from_a_converted_checkpoint(speaking, tmp_path):
    there = converted(speaking, tmp_path / "there", "llama_jax")
    source = open_source(there)
    targets = Llama(source.config).shapes()
    loaded = checkpoint.load_parameters(
        there,
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            targets,
        ),
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, load_params(open_source(speaking)))


# --- what is refused -------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_model_is_refused(speaking, tmp_path):
    with pytest.raises(ConfigError, match="300 pieces and the model only 64 rows"):
        converted(GOLDEN / "llama3", tmp_path / "there", "gguf", tokenizer=str(speaking))
    assert list(tmp_path.iterdir()) == []


def test_an_end_id_outside_the_vocabulary_is_refused(tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama3", eos_token_id=64)
    with pytest.raises(ConfigError, match="end id 64 is outside the vocabulary of 64 rows"):
        open_source(first)


@pytest.mark.parametrize("to", ["huggingface", "gguf"])
def test_an_unknown_context_length_is_asked_for(to, tmp_path):
    meta = converted(GOLDEN / "llama2_gqa", tmp_path / "meta", "meta")
    with pytest.raises(ConfigError, match="add --context_length"):
        converted(meta, tmp_path / "there", to)
    there = converted(meta, tmp_path / "there", to, context_length=77)
    assert open_source(there).context_length == 77


def test_more_end_ids_than_gguf_names_are_refused(tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama3", eos_token_id=[1, 2, 3, 4])
    with pytest.raises(ConfigError, match="at most 3 ids that end a text"):
        converted(first, tmp_path / "there", "gguf")


@pytest.mark.parametrize(("shards", "said"), [(3, "cannot share"), (8, "cannot share")])
def test_shards_that_do_not_divide_are_refused(shards, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        converted(GOLDEN / "llama2_gqa", tmp_path / "there", "meta", shards=shards)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no_model", "x", "--to", "gguf"], "no_model: no such folder or file"),
        (["first", "first", "--to", "gguf"], "source and destination are one"),
        (["first", "other", "--to", "gguf"], "other exists already"),
        (["first", "link", "--to", "gguf"], "link exists already"),
        (["first", "first/inside", "--to", "gguf"], "lies inside the source"),
        (["other", "x", "--to", "gguf"], "no checkpoint here"),
        (["first", "x", "--to", "onnx"], "'llama_jax', 'huggingface', 'meta' or 'gguf'"),
        (["first", "x", "--to", "meta", "--dtype", "q8_0"], "q8_0 is of gguf"),
        (["first", "x", "--to", "gguf", "--shards", "2"], "shards is read only with to: meta"),
        (["first", "x", "y", "--to", "gguf"], "'y' follows no flag"),
        (["first", "--to", "gguf"], "destination: is required"),
    ],
)
def test_a_wrong_command_changes_nothing(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    huggingface_folder(Path("first"), "llama3")
    Path("other").mkdir()
    Path("link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert", *args]) in (1, 2)
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# --- complete or absent ----------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_a_failed_conversion_leaves_nothing(to, tmp_path, monkeypatch):
    way = formats.FORMATS[to]

    def write(source, path, settings, advance):
        def broken(row, layer):
            if row.path == ("final_norm",):
                raise OSError(28, "No space left on device")
            return source.tensor(row, layer)

        way.write(replace(source, tensor=broken), path, settings, advance)

    monkeypatch.setitem(formats.FORMATS, to, way._replace(write=write))
    with pytest.raises(OSError, match="No space left"):
        converted(GOLDEN / "llama3", tmp_path / "there", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_killed_conversion_leaves_no_destination_and_is_cleaned_up(to, tmp_path):
    program = """
import os, signal, sys
from llama_jax.convert import convert, formats
from llama_jax.convert.settings import ConvertConfig
flush = convert._flush
convert._flush = lambda path, deep=True: os.kill(os.getpid(), signal.SIGKILL)
convert.convert(ConvertConfig(source=sys.argv[1], destination=sys.argv[2], to=sys.argv[3]))
"""
    there = tmp_path / "there"
    args = [sys.executable, "-c", program, str(GOLDEN / "llama3"), str(there), to]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".there.partial"]
    converted(GOLDEN / "llama3", there, to)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert_same_model(open_source(there), open_source(GOLDEN / "llama3"), "float32")


# --- verify ----------------------------------------------------------------------------------


def verified(capsys, *args):
    """Exit code and report of `verify`."""
    code = cli.main(["verify", *map(str, args)])
    return code, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("to", FORMATS)
def test_verify_finds_a_conversion_equal(to, speaking, tmp_path, capsys):
    there = converted(speaking, tmp_path / "there", to)
    code, report = verified(capsys, speaking, there)
    assert code == 0, report
    assert "20 of 20 equal" in report
    assert "largest difference 0 " in report
    assert "DIFFERS" not in report


def test_verify_finds_a_rounded_conversion_right(tmp_path, capsys):
    there = converted(GOLDEN / "llama3", tmp_path / "there", "huggingface", dtype="bfloat16")
    code, report = verified(capsys, GOLDEN / "llama3", there)
    assert code == 0, report
    assert "21 of 21 equal, rounded to bfloat16" in report
    assert "largest difference 0 " not in report


def test_verify_needs_a_tolerance_for_quantised_weights(tmp_path, capsys):
    there = converted(GOLDEN / "llama3", tmp_path / "there.gguf", "gguf", dtype="q8_0")
    code, report = verified(capsys, GOLDEN / "llama3", there)
    assert code == 1
    assert "16 of 21 differ" in report or "differ, most by" in report
    assert verified(capsys, GOLDEN / "llama3", there, "--tolerance", "0.2")[0] == 0
    assert verified(capsys, GOLDEN / "llama3", there, "--tolerance", "1e-5")[0] == 1


def test_verify_finds_one_changed_number(tmp_path, capsys):
    there = huggingface_folder(tmp_path / "there", "llama3")
    weights = load_file(there / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][3, 5] += 0.25
    save_file(weights, there / "model.safetensors")
    code, report = verified(capsys, GOLDEN / "llama3", there)
    assert code == 1
    assert "1 of 21 differ" in report
    assert "most by 0.25" in report


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rms_norm_eps": 1e-6}, "norm_eps 1e-05 / 1e-06"),
        ({"eos_token_id": 3}, "(2,) / (3,)"),
    ],
)
def test_verify_finds_another_configuration(values, said, tmp_path, capsys):
    there = huggingface_folder(tmp_path / "there", "llama3", **values)
    code, report = verified(capsys, GOLDEN / "llama3", there)
    assert code == 1
    assert said in report


def test_verify_finds_another_tokenizer(speaking, tmp_path, capsys):
    there = Path(shutil.copytree(speaking, tmp_path / "there"))
    lines = ["other words than those", "entirely new text"]
    (there / "tokenizer.model").write_bytes(train(lines * 20, vocab_size=290))
    code, report = verified(capsys, speaking, there)
    assert code == 1
    assert "vocab_size 300 / 290" in report
    (there / "tokenizer.model").unlink()
    assert "only one has one" in verified(capsys, speaking, there)[1]


# --- our checkpoints as files of strangers ---------------------------------------------------


def rewritten(folder, change):
    """A converted checkpoint whose config.yaml, and its line in the manifest, are others."""
    path = folder / "config.yaml"
    path.write_text(change(path.read_text()))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["config.yaml"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda text: text.replace("n_kv_heads: 2", "n_kv_heads: 4"),
            "layers/attention/k has shape",
        ),
        (lambda text: text.replace("vocab_size: 64", "vocab_size: 65"), "embed has shape"),
        (lambda text: text.replace("n_layers: 2", "n_layers: 3"), "has shape"),
        (lambda text: text.replace("tie_embeddings: false", "tie_embeddings: true"), "head is not"),
        (lambda text: text.replace("model:", "modell:"), "has no section `model`"),
        (lambda text: text.replace("end_ids:\n- 2", "end_ids: [99]"), "end id 99 is outside"),
        (lambda text: text.replace("end_ids:\n- 2", "end_ids: x"), "end_ids"),
        (lambda text: text + "data: {}\n", "is required"),
        (lambda text: "[" * 100_000, "config.yaml"),
        (lambda text: LAUGHS + text.replace("d_ff: 48", "d_ff: *z"), "d_ff"),
    ],
)
def test_a_checkpoint_whose_configuration_does_not_fit_is_refused(change, said, tmp_path):
    there = converted(GOLDEN / "llama3", tmp_path / "there", "llama_jax")
    rewritten(there, change)
    with pytest.raises(ConfigError, match=said) as refused:
        open_source(there)
    assert len(str(refused.value)) < 2000


def test_a_changed_checkpoint_is_refused(tmp_path):
    there = converted(GOLDEN / "llama3", tmp_path / "there", "llama_jax")
    largest = max((there / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="has changed since it was written"):
        open_source(there)
