"""What torch, transformers, gguf and llama.cpp make of our files: `make test-parity`."""

import importlib
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, converted, huggingface_folder

import llama_jax
from llama_jax.config import ConfigError
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import load_params
from llama_jax.model.llama import Llama

pytestmark = pytest.mark.parity

META_ROPE = {"original_max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def torch():
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    return torch


def our_logits(source, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    params = jax.tree.map(jnp.asarray, load_params(source))
    return np.asarray(Llama(source.config).apply(params, ids, positions).value)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_our_folder_without_a_warning(case, torch, tmp_path, caplog, capfd):
    transformers = importlib.import_module("transformers")
    first = huggingface_folder(tmp_path / "first", case)
    there = converted(first, tmp_path / "there", "huggingface")
    capfd.readouterr()
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            there, dtype="auto", attn_implementation="eager", output_loading_info=True
        )
    logging.getLogger("transformers").propagate = False
    assert not caplog.records, [record.getMessage() for record in caplog.records]
    assert "warn" not in "".join(capfd.readouterr()).lower()
    assert not any(told.values()), told
    assert model.generation_config.eos_token_id == 2
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    off = np.abs(theirs - our_logits(open_source(there), ids)).max()
    print(f"{case}: logits {off:.1e}")
    assert off <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 4])
def test_torch_reads_our_pth_with_weights_only(dtype, shards, torch, tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama2_gqa", dtype)
    there = converted(first, tmp_path / "there", "meta", shards=shards)
    names = [f"consolidated.{n:02}.pth" for n in range(shards)]
    for mmap in (False, True):
        files = [torch.load(there / name, weights_only=True, mmap=mmap) for name in names]
        assert all(t.dtype == getattr(torch, dtype) for f in files for t in f.values())
        assert all(t.is_contiguous() for f in files for t in f.values())
        # Axes and the order of rotary pairs as FACTS says them, not as our table does.
        weights = _huggingface_from_meta(torch, files, d_head=8, kv_heads=2)
        reference = importlib.import_module("safetensors.torch").load_file(
            first / "model.safetensors"
        )
        assert weights.keys() == reference.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, reference[name]), name


def _huggingface_from_meta(torch, files, d_head, kv_heads):
    """Joins and renames Meta's tensors, written apart from the package, as a reference."""
    axes = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "output": 0}
    axes["tok_embeddings"] = 1  # Llama 2
    renamed = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    result = {}
    for name in files[0]:
        parts = [file[name] for file in files]
        stem = name.removesuffix(".weight")
        layer, inner = "", stem
        if stem.startswith("layers."):
            _, number, inner = stem.split(".", 2)
            layer = f"model.layers.{number}."
        kind = inner.split(".")[-1]
        if kind in ("wk", "wv"):
            parts = parts[:: max(len(files) // kv_heads, 1)]
        whole = torch.cat(parts, axes[kind]) if kind in axes else parts[0]
        if kind in ("wq", "wk"):
            heads, width = whole.shape[0] // d_head, whole.shape[1]
            whole = whole.view(heads, d_head // 2, 2, width).transpose(1, 2).reshape(-1, width)
        result[f"{layer}{renamed[inner]}.weight"] = whole
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_we_read_what_torch_saves(dtype, torch, tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama3", dtype)
    there = converted(first, tmp_path / "there", "meta", shards=2)
    expected = load_params(open_source(first))
    for path in there.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        state["rope.freqs"] = torch.ones(4)
        module = torch.nn.ParameterDict({n.replace(".", "/"): t for n, t in state.items()})
        saved = {n.replace("/", "."): t for n, t in module.state_dict().items()}
        wide = {n: torch.cat([t, t])[: len(t)] for n, t in saved.items()}  # views of larger ones
        torch.save(wide, path)
    loaded = load_params(open_source(there))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_the_legacy_format_of_torch_is_refused(torch, tmp_path):
    there = converted(huggingface_folder(tmp_path / "first", "llama3"), tmp_path / "there", "meta")
    path = there / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"not a zip, so not of torch 1\.6 or newer"):
        open_source(there)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1"])
def test_quantised_tensors_are_read_as_the_gguf_library_reads_them(kind, tmp_path):
    gguf = importlib.import_module("gguf")
    first = huggingface_folder(tmp_path / "first", "llama3")
    plain = converted(first, tmp_path / "plain.gguf", "gguf")
    types = gguf.GGMLQuantizationType
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(tmp_path / "there.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            value = field.contents()
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(field.name, value)
    expected = {}
    for tensor in reader.tensors:
        array = np.array(tensor.data)
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(array, types[kind])
            expected[tensor.name] = gguf.quants.dequantize(packed, types[kind])
            writer.add_tensor(tensor.name, packed, raw_dtype=types[kind])
        else:
            expected[tensor.name] = array
            writer.add_tensor(tensor.name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "there.gguf")
    assert source.dtype == np.float32
    back = converted(tmp_path / "there.gguf", tmp_path / "back.gguf", "gguf")
    for tensor in gguf.GGUFReader(back).tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name])


PROMPTS = [
    "", "Once upon a time", "Lily", "The dog", "One day, a", "Tom and", "She was", "In the park",
    "The sun", "A big", "He said", "Mom", "They played", "The cat", "It was", "Once", "Ben had",
    "The little girl", "There was", "My", "Sara likes", "Every day",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_continues_as_we_do(dtype, shared_data, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = shared_data / "weights" / "stories260K_hf"
    path = converted(folder, tmp_path / "stories.gguf", "gguf", dtype=dtype)
    theirs = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, n_threads=1, logits_all=False)
    ours = llama_jax.load(path)
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt, bos=True)
        assert theirs.tokenize(prompt.encode(), add_bos=True) == ids, prompt
        theirs.reset()
        chosen = []
        for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token in ours.end_ids or len(chosen) == 40:
                break
            chosen.append(token)
        (found,) = ours.generate([ids], temperature=0, max_new_tokens=40)
        assert found.tokens == chosen, prompt


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_llama_cpp_agrees_where_it_rounds_activations_too(dtype, shared_data, tmp_path):
    """It multiplies in the type of the weights; so tokens are compared along one and the same text.

    In fp32, in the test above, all are equal.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = shared_data / "weights" / "stories260K_hf"
    path = converted(folder, tmp_path / "stories.gguf", "gguf", dtype=dtype)
    theirs = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, n_threads=1, logits_all=True)
    ours = llama_jax.load(path)
    (story,) = ours.generate([[1]], temperature=0, max_new_tokens=200)
    ids = [1, *story.tokens]
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    logits = np.asarray(ours.logits([ids])[0])
    same = (expected.argmax(-1) == logits.argmax(-1)).mean()
    print(f"{dtype}: {same:.1%} of {len(ids)} tokens, logits {np.abs(expected - logits).max():.2f}")
    assert same >= 0.95
