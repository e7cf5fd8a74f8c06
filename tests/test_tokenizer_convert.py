"""Other programs get the same ids from what we write for them, and we from what they write."""

import json
import random

import numpy as np
import pytest
import tokenizers as library
from corpora import KINDS, NASTY, sentences, tiny_byte_level, tiny_tiktoken, tiny_tokenizer
from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax import tokenizer as tokenizers
from llama_jax.convert.tokenizers import from_gguf_fields, gguf_fields, huggingface_files
from llama_jax.tokenizer import SentencePiece, TokenizerError
from llama_jax.tokenizer.huggingface import HuggingFace

FILES = {
    "llama2": "tokenizers/llama2_tokenizer.model",
    "llama3": "tokenizers/llama3_tokenizer.model",
    "stories": "weights/stories260K_hf/tokenizer.model",
}
TEXTS = (*NASTY, "\n".join(sentences(20, seed=5)))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


@pytest.fixture(scope="module", params=FILES)
def real(request, shared_data):
    return tokenizers.load(shared_data / FILES[request.param])


def test_the_library_itself_reads_the_json_and_adds_bos(tokenizer):
    files = huggingface_files(tokenizer)
    reference = library.Tokenizer.from_str(files["tokenizer.json"].decode())
    reference.encode_special_tokens = True
    for text in TEXTS:
        assert reference.encode(text).ids == tokenizer.encode(text, bos=True)
        assert reference.decode(tokenizer.encode(text)) == text
    for name, id in tokenizer.controls.items():
        assert reference.token_to_id(name) == id


def test_the_original_file_travels_along():
    assert huggingface_files(tiny_tokenizer())["tokenizer.model"] == tiny_tokenizer().model
    assert huggingface_files(tiny_byte_level())["tokenizer.json"] == tiny_byte_level().model
    config = json.loads(huggingface_files(tiny_tiktoken())["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_gguf_metadata_give_the_same_tokenizer_back(tokenizer):
    fields = gguf_fields(tokenizer, tokenizer.vocab_size + 5)
    again = from_gguf_fields(fields, "file.gguf")
    assert again.vocab_size == tokenizer.vocab_size
    assert (again.bos_id, again.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
    arrays = {k: np.array(v) if isinstance(v, list) else v for k, v in fields.items()}
    assert from_gguf_fields(arrays, "").encode("a hill") == tokenizer.encode("a hill")


def test_gguf_metadata_are_padded_to_the_rows_of_the_embedding(tokenizer):
    size = tokenizer.vocab_size
    fields = gguf_fields(tokenizer, size + 2)
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert fields["tokenizer.ggml.token_type"][size:] == [5, 5]
    assert len(fields.get("tokenizer.ggml.scores", range(size + 2))) == size + 2
    with pytest.raises(TokenizerError, match=f"more than vocab_size {size - 1}"):
        gguf_fields(tokenizer, size - 1)


def test_gguf_names_the_ends():
    fields = gguf_fields(tiny_tiktoken(), tiny_tiktoken().vocab_size)
    controls = tiny_tiktoken().controls
    assert {k.split(".")[-1]: v for k, v in fields.items() if k.endswith("_id")} == {
        "bos_token_id": controls["<|begin_of_text|>"],
        "eos_token_id": controls["<|end_of_text|>"],
        "eot_token_id": controls["<|eot_id|>"],
        "eom_token_id": controls["<|eom_id|>"],
    }
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"


def changed(change):
    proto = schema.ModelProto.FromString(tiny_tokenizer().model)
    change(proto)
    return SentencePiece(proto.SerializeToString(), "odd.model")


def test_models_that_cannot_be_expressed_are_refused():
    def user_defined(proto):
        proto.pieces[290].type = schema.ModelProto.SentencePiece.USER_DEFINED

    def unigram(proto):
        proto.trainer_spec.model_type = schema.TrainerSpec.UNIGRAM

    def bare_character(proto):
        proto.pieces[290].piece = "thé"

    for change, message in (
        (user_defined, "user-defined"),
        (unigram, "only BPE"),
        (bare_character, "the character 'é' is in pieces"),
    ):
        with pytest.raises(TokenizerError, match=rf"odd\.model: {message}"):
            huggingface_files(changed(change))
    with pytest.raises(TokenizerError, match="only BPE"):
        gguf_fields(changed(unigram), 320)
    file = json.loads(tiny_byte_level().model)
    file["model"]["ignore_merges"] = False
    with pytest.raises(TokenizerError, match="ignore_merges False does not go with"):
        gguf_fields(HuggingFace(json.dumps(file).encode(), ""), 1000)


def fields_of(make, **changes):
    """GGUF metadata of a small tokenizer with some of them changed; None takes one away."""
    fields = gguf_fields(make(), make().vocab_size)
    for name, value in changes.items():
        fields[f"tokenizer.ggml.{name}"] = value
    return {key: value for key, value in fields.items() if value is not None}


def of_scores(**changes):
    return fields_of(tiny_tokenizer, **changes)


def of_words(**changes):
    return fields_of(tiny_tiktoken, **changes)


TOKENS = of_scores()["tokenizer.ggml.tokens"]
TYPES = of_scores()["tokenizer.ggml.token_type"]
WORDS = of_words()["tokenizer.ggml.tokens"]
HOSTILE = {
    "no model": of_scores(model=None),
    "model of another kind": of_scores(model="bert"),
    "model is a number": of_scores(model=7),
    "no tokens": of_scores(tokens=None),
    "tokens is a text": of_scores(tokens="abc"),
    "a token is a number": of_scores(tokens=[*TOKENS[:-1], 7]),
    "a token is bytes": of_scores(tokens=[*TOKENS[:-1], b"x"]),
    "a token twice": of_scores(tokens=[*TOKENS[:-1], TOKENS[-2]]),
    "an empty token": of_scores(tokens=[*TOKENS[:-1], ""]),
    "a half character": of_scores(tokens=[*TOKENS[:-1], "\ud800"]),
    "fewer tokens than types": of_scores(tokens=TOKENS[:-1]),
    "no types": of_scores(token_type=None),
    "an unknown type": of_scores(token_type=[*TYPES[:-1], 99]),
    "a negative type": of_scores(token_type=[*TYPES[:-1], -1]),
    "a type is a boolean": of_scores(token_type=[*TYPES[:-1], True]),
    "all unused": of_scores(token_type=[5] * len(TYPES)),
    "no scores": of_scores(scores=None),
    "fewer scores": of_scores(scores=[0.0]),
    "NaN scores": of_scores(scores=[float("nan")] * len(TOKENS)),
    "scores beyond float": of_scores(scores=[1e300] * len(TOKENS)),
    "no byte tokens": of_scores(tokens=[t.replace("<0x", "<1x") for t in TOKENS]),
    "bos outside": of_scores(bos_token_id=10**9),
    "bos negative": of_scores(bos_token_id=-1),
    "bos is a text": of_scores(bos_token_id="1"),
    "bos is no control": of_scores(bos_token_id=300),
    "eos outside": of_scores(eos_token_id=len(TOKENS)),
    "space prefix is a number": of_scores(add_space_prefix=1),
    "no words": of_words(pre=None),
    "unknown words": of_words(pre="qwen2"),
    "words is a list": of_words(pre=["llama-bpe"]),
    "no merges": of_words(merges=None),
    "a merge of one": of_words(merges=["ab"]),
    "a merge of three": of_words(merges=["a b c"]),
    "a merge of strangers": of_words(merges=["zq zq"]),
    "a merge is a pair": of_words(merges=[("a", "b")]),
    "a piece outside the alphabet": of_words(tokens=["日", *WORDS[1:]]),
    "no bytes": of_words(tokens=[f"x{i}" for i in range(len(WORDS))], merges=[]),
    "no beginning": of_words(tokens=[t.replace("begin", "start") for t in WORDS]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_metadata_are_refused(name):
    with pytest.raises(TokenizerError, match=r"^file\.gguf"):
        from_gguf_fields(HOSTILE[name], "file.gguf")


def test_the_reason_is_named():
    for name, reason in (
        ("unknown words", "pre is 'qwen2'; only llama-bpe, gpt-2, smollm are read"),
        ("model of another kind", "model is 'bert'; only llama and gpt2, which LLaMA uses"),
        ("a merge of strangers", "merge 0, 'zq' and 'zq', is not of pieces"),
        ("bos outside", "bos_token_id is 1000000000, not one of 320 tokens"),
    ):
        with pytest.raises(TokenizerError, match=reason):
            from_gguf_fields(HOSTILE[name], "")


def test_random_damage_to_gguf_metadata_is_refused_or_harmless():
    draw = random.Random(0)
    junk = [None, -1, 2**63, 1.5, float("inf"), "", "x y", "日", "\0", [], True, b"\xff", {}]
    for _ in range(300):
        fields = draw.choice((of_scores, of_words))()
        for _ in range(draw.randint(1, 3)):
            key = draw.choice(list(fields))
            if isinstance(fields[key], list) and fields[key] and draw.random() < 0.8:
                fields[key] = list(fields[key])
                fields[key][draw.randrange(len(fields[key]))] = draw.choice(junk)
            else:
                fields[key] = draw.choice(junk)
        try:
            tokenizer = from_gguf_fields(fields, "")
        except TokenizerError:
            continue
        assert tokenizer.decode(tokenizer.encode("the llama 42 😀")) == "the llama 42 😀"


# Live references ------------------------------------------------------------------------------


def random_texts(count, seed=0):
    draw = random.Random(seed)
    planes = [(0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x700)]
    planes += [(0x3040, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (0x10000, 0x10FFFF)]
    for _ in range(count):
        text = "".join(chr(draw.randint(*draw.choice(planes))) for _ in range(draw.randint(1, 30)))
        yield text.replace("\u2581", "")  # SentencePiece's own sign, which ours keeps apart


@pytest.mark.parity
def test_transformers_gives_the_same_ids(real, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in huggingface_files(real).items():
        (tmp_path / name).write_bytes(content)
    # transformers looks at the model's configuration too when it chooses a class.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, *random_texts(500)):
        assert reference.encode(text, split_special_tokens=True) == real.encode(text, bos=True)
    assert reference.bos_token_id == real.bos_id
    assert reference.eos_token_id == real.eos_ids[0]


@pytest.mark.parity
def test_transformers_own_conversion_of_tiktoken_gives_the_same_ids(shared_data):
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    file = shared_data / FILES["llama3"]
    reference = convert.TikTokenConverter(vocab_file=str(file)).converted()
    llama3 = tokenizers.load(file)
    for text in (*TEXTS, *random_texts(500)):
        assert reference.encode(text, add_special_tokens=False).ids == llama3.encode(text)


@pytest.mark.parity
def test_llama_cpp_gives_the_same_ids(real, tmp_path):
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    file = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in gguf_fields(real, real.vocab_size + 3).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reference = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (*TEXTS, *random_texts(500)):
        found = reference.tokenize(text.encode(), add_bos=True, special=False)
        assert found == real.encode(text, bos=True), text
    assert reference.token_eos() == real.eos_ids[0]
