"""What holds for every kind of tokenizer: any text comes back, and yields no control token."""

import hashlib
import pickle
import random
import sys

import pytest
from corpora import KINDS, NASTY, tiny_model, tiny_tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax import tokenizer as tokenizers
from llama_jax.convert.tokenizers import huggingface_files
from llama_jax.tokenizer import StreamDecoder, TokenizerError
from llama_jax.tokenizer.huggingface import HuggingFace
from llama_jax.tokenizer.sentencepiece import SentencePiece
from llama_jax.tokenizer.tiktoken import Tiktoken

SPACE_SIGN = "\u2581"
RANDOM_TEXTS = 1_000_000
REAL = {
    "llama2": "tokenizers/llama2_tokenizer.model",
    "llama3": "tokenizers/llama3_tokenizer.model",
    "stories": "weights/stories260K_hf/tokenizer.model",
}
CONTROLS = ["<s>", "</s>", "<unk>", "<0x0A>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"]
PARTS = [*" \n\t\r\0aé日1", SPACE_SIGN, "\u2047", "\ufffd", "😀", "  ", "'s", "123", *CONTROLS]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PARTS)).map("".join))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
@example(text=f"{SPACE_SIGN}a")
@example(text=f" {SPACE_SIGN} a")
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_comes_back(tokenizer):
    scalars = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i <= 0xDFFF]
    for start in range(0, len(scalars), 2**16):
        text = "".join(scalars[start : start + 2**16])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos_only_when_asked(tokenizer):
    ids = tokenizer.encode("the llama")
    begin, end = tokenizer.bos_id, tokenizer.eos_ids[0]
    assert tokenizer.encode("the llama", bos=True, eos=True) == [begin, *ids, end]
    assert tokenizer.encode("") == []
    assert tokenizer.encode("", bos=True, eos=True) == [begin, end]


@settings(deadline=None)
@given(text=st.lists(st.sampled_from([*CONTROLS, " ", "a", "<"])).map("".join))
def test_control_ids_never_come_from_text(tokenizer, text):
    assert set(tokenizer.controls.values()).isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_control_written_as_text_is_text(tokenizer):
    text = " ".join(tokenizer.controls)
    assert set(tokenizer.controls.values()).isdisjoint(tokenizer.encode(text))
    assert {tokenizer.bos_id, *tokenizer.eos_ids} <= set(tokenizer.controls.values())


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="character 3 of the text is a lone surrogate"):
        tokenizer.encode("abc\ud800")


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(TokenizerError, match=f"token id {bad} is outside the vocabulary of"):
            tokenizer.decode([5, bad])


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 319)), cuts=st.lists(st.integers(0, 30), max_size=8))
def test_stream_is_decode_in_pieces(tokenizer, ids, cuts):
    stream, texts, rest = StreamDecoder(tokenizer), [], ids
    for cut in cuts:
        texts.append(stream.feed(rest[:cut]))
        rest = rest[cut:]
    texts += [stream.feed(rest), stream.finish()]
    assert "".join(texts) == tokenizer.decode(ids)
    assert stream.feed(ids) + stream.finish() == tokenizer.decode(ids)  # usable again


@settings(deadline=None)
@given(text=TEXTS)
def test_stream_of_single_ids_holds_whole_characters(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    texts = [stream.feed([i]) for i in tokenizer.encode(text, bos=True)]
    assert "".join(texts) == text
    assert stream.finish() == ""


def test_unfinished_character_is_shown_at_the_end(tokenizer):
    stream = StreamDecoder(tokenizer)
    *most, _ = tokenizer.encode("\U0001f999")
    assert stream.feed(most) == ""
    assert stream.finish() == "\ufffd"


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert type(other) is type(tokenizer)
    assert other.fingerprint == hashlib.sha256(tokenizer.model).hexdigest()
    assert other.encode("a hill 42") == tokenizer.encode("a hill 42")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sentencepiece", SentencePiece),
        ("tiktoken", Tiktoken),
        ("byte-level json", HuggingFace),
        ("byte-fallback json", HuggingFace),
    ],
)
def test_the_content_decides_the_kind(tmp_path, kind, expected):
    tokenizer = KINDS[kind]()
    file = tmp_path / "any.name"
    file.write_bytes(tokenizer.model)
    assert type(tokenizers.load(file)) is expected
    file.rename(tmp_path / tokenizer.file_name)
    found = tokenizers.load(tmp_path)
    assert (type(found), found.fingerprint) == (expected, tokenizer.fingerprint)


def test_of_two_files_in_a_folder_the_original_is_read(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(KINDS["byte-level json"]().model)
    (tmp_path / "tokenizer.model").write_bytes(tiny_model())
    assert tokenizers.load(tmp_path).file_name == "tokenizer.model"


def test_long_texts_come_back(tokenizer):
    for unit in ("a", " ", "the llama ", "\n \n", "é", "!"):
        text = unit * (100_000 // len(unit))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_json_and_original_give_equal_ids():
    for original, copy in (
        ("tiktoken", "byte-level json"),
        ("sentencepiece", "byte-fallback json"),
    ):
        for text in NASTY:
            assert KINDS[copy]().encode(text) == KINDS[original]().encode(text), (copy, text)
    assert KINDS["byte-level json"]().eos_ids == tiny_tiktoken().eos_ids


def round_trips(tokenizer, count, seed):
    """How many of `count` random texts come back, one by one and as a stream."""
    draw, equal = random.Random(seed), 0
    edges = [*" \n\t\0", SPACE_SIGN, "\ufeff", "\u200d", "\u0301", "</s>", "<|eot_id|>", "  ", "é"]
    tops = (0x80, 0x800, 0xD800, 0x110000)  # one to four bytes of UTF-8 are equally likely
    for _ in range(count):
        size = draw.randint(1, 9)
        points = [int(draw.random() * tops[int(draw.random() * 4)]) for _ in range(size)]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000) + draw.choice(edges)
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer)
        equal += tokenizer.decode(ids) == text == "".join(stream.feed([id]) for id in ids)
    return equal


def test_random_texts_come_back(tokenizer):
    assert round_trips(tokenizer, 3000, seed=0) == 3000


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_million_random_texts_come_back_from_real_tokenizers(name, shared_data):
    tokenizer = tokenizers.load(shared_data / REAL[name])
    assert round_trips(tokenizer, RANDOM_TEXTS, seed=1) == RANDOM_TEXTS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_million_random_texts_come_back_from_a_json(name, shared_data):
    files = huggingface_files(tokenizers.load(shared_data / REAL[name]))
    tokenizer = HuggingFace(files["tokenizer.json"], name)
    assert round_trips(tokenizer, RANDOM_TEXTS, seed=2) == RANDOM_TEXTS
