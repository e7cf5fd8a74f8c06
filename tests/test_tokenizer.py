"""SentencePiece: ids are the library's, learning repeats. test_tokenizer_kinds has the rest."""

import io

import pytest
import sentencepiece
from corpora import sentences, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax import tokenizer as tokenizers
from llama_jax.config import TokenizerInspectConfig, TokenizerTrainConfig
from llama_jax.tokenizer import TokenizerError
from llama_jax.tokenizer.files import inspect_tokenizer
from llama_jax.tokenizer.train import train, train_tokenizer

SPACE_SIGN = "\u2581"
PARTS = [
    *" \n\t\r\0aé日1",
    SPACE_SIGN,
    "\u2047",
    "\ufffd",
    "😀",
    "  ",
    "<s>",
    "</s>",
    "<0x0A>",
    "<unk>",
]
AWKWARD = st.lists(st.sampled_from(PARTS)).map("".join)
EDGES = (
    "",
    " ",
    "  a",
    "a  ",
    "\n",
    " \n x",
    SPACE_SIGN,
    f" {SPACE_SIGN} a",
    "\0",
    "😀",
    "\ufeffa",
)


@pytest.fixture(scope="module")
def llama2(shared_data):
    return tokenizers.load(shared_data / "tokenizers" / "llama2_tokenizer.model")


@pytest.mark.parametrize("text", EDGES)
def test_edges_come_back(text):
    assert tiny_tokenizer().decode(tiny_tokenizer().encode(text)) == text


def test_encoding_by_units_equals_the_library():
    tokenizer = tiny_tokenizer()
    library = sentencepiece.SentencePieceProcessor(model_proto=tiny_model())
    assert tokenizer.lossless
    for text in ("\n".join(sentences(50, seed=9)), "a" * 500 + " llama\t\n\n  hill", *EDGES):
        if SPACE_SIGN not in text:  # which the library cannot give back
            assert tokenizer.encode(text) == library.encode(text)


def other_model(**settings):
    """A tokenizer that is not quite LLaMA's, and the library's view of it."""
    file = io.BytesIO()
    common = {"byte_fallback": True, "vocab_size": 290, "pad_id": -1, "minloglevel": 2} | settings
    lines = [*sentences(300), *["one<sep>two  three"] * 30]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, **common
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    return tokenizers.SentencePiece(file.getvalue(), "other"), library


ACROSS = f"s{SPACE_SIGN}and"  # a piece from one word into the next
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "settings",
    [
        {**IDENTITY, "model_type": "unigram"},
        {**IDENTITY, "model_type": "bpe", "user_defined_symbols": ["<sep>", ACROSS]},
        {**IDENTITY, "model_type": "bpe", "split_by_whitespace": False, "vocab_size": 400},
        {**IDENTITY, "model_type": "bpe", "add_dummy_prefix": False},
    ],
    ids=["unigram", "user-defined", "across words", "no space in front"],
)
def test_other_kinds_of_models_are_read_as_the_library_reads_them(settings):
    tokenizer, library = other_model(**settings)
    assert tokenizer.lossless
    for text in (
        "one<sep>two  hills and\n llama",
        "  the llama 42",
        "",
        "é😀",
        "\n".join(sentences(9)),
    ):
        assert tokenizer.encode(text) == library.encode(text)
    for text in ("one<sep>two  hills and\n llama", "  the llama 42", *EDGES):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "settings",
    [{"user_defined_symbols": [ACROSS]}, {"split_by_whitespace": False, "vocab_size": 400}],
    ids=["user-defined", "learned"],
)
def test_pieces_across_words_are_used(settings):
    tokenizer, _ = other_model(**IDENTITY, model_type="bpe", **settings)
    pieces = [tokenizer.spelling(i) for i in tokenizer.encode("sat on hills and hummed about")]
    assert any(b" " in piece.strip() for piece in pieces)


def test_a_model_that_rewrites_text_says_so():
    tokenizer, library = other_model(model_type="bpe", normalization_rule_name="nmt_nfkc")
    assert not tokenizer.lossless
    assert tokenizer.encode("the ｌｌａｍａ") == library.encode("the ｌｌａｍａ")
    assert tokenizer.decode(tokenizer.encode("the ｌｌａｍａ")) == "the llama"


def test_llama2_gives_published_ids(llama2):
    # From the documentation of Transformers and of Llama 2's chat format.
    assert llama2.encode("Hello, my name is", bos=True) == [1, 15043, 29892, 590, 1024, 338]
    assert llama2.encode("Hello world") == [15043, 3186]
    assert llama2.encode("[INST]") == [518, 25580, 29962]
    assert llama2.encode("[/INST]") == [518, 29914, 25580, 29962]
    assert llama2.encode("<<SYS>>") == [3532, 14816, 29903, 6778]
    assert llama2.encode("\n") == [29871, 13]
    assert llama2.encode("\0") == [29871, 3]
    assert llama2.encode("1234") == [29871, 29896, 29906, 29941, 29946]
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_ids) == (32000, 1, (2,))


def test_llama2_equals_the_library_on_real_text(llama2, shared_data):
    library = sentencepiece.SentencePieceProcessor(model_proto=llama2.model)
    for name in ("botchan.txt", "wikitext2_valid.txt"):
        text = (shared_data / "corpora" / name).read_text(encoding="utf-8")[:200_000]
        ids = llama2.encode(text)
        assert ids == library.encode(text)
        assert llama2.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(), AWKWARD))
def test_llama2_gives_any_text_back(llama2, text):
    assert llama2.decode(llama2.encode(text, bos=True, eos=True)) == text


def test_extra_spaces_are_kept_whatever_the_file_asks(shared_data):
    stories = tokenizers.load(shared_data / "weights" / "stories260K_hf")
    assert stories.vocab_size == 512
    assert stories.decode(stories.encode("  two  spaces ")) == "  two  spaces "


def test_training_has_llamas_settings():
    tokenizer = tiny_tokenizer()
    assert tokenizer.vocab_size == 320
    assert [tokenizer.spelling(i) for i in range(3, 259)] == [bytes([i]) for i in range(256)]
    digits = [i for i in range(259, 320) if tokenizer.spelling(i).strip().isdigit()]
    assert digits
    assert all(len(tokenizer.spelling(i)) == 1 for i in digits)
    assert any(tokenizer.spelling(i) == b"    " for i in range(259, 320))


def test_training_repeats():
    assert train(sentences(100), 300) == train(iter(sentences(100)), 300)


def test_long_lines_and_words_count_in_training():
    tokenizer = tokenizers.SentencePiece(train(["x" * 200_000, "yz " * 50_000], 279), "")
    assert {b"xx", b"yz"} <= {tokenizer.spelling(i) for i in range(259, 279)}


@pytest.mark.parametrize(
    ("lines", "vocab_size", "message"),
    [
        (["a b"], 4000, "vocab_size 4000 is more than this text yields: at most"),
        (["abcdefghijklmnop"], 262, "vocab_size 262 is too small for the characters"),
        ([], 300, "there is no text"),
        (["", ""], 300, "there is no text"),
    ],
)
def test_text_that_does_not_suit_is_explained(lines, vocab_size, message):
    with pytest.raises(TokenizerError, match=message):
        train(lines, vocab_size)


def train_config(tmp_path, **settings):
    out = str(tmp_path / "out" / "tokenizer.model")
    return TokenizerTrainConfig(paths=(str(tmp_path / "text"),), out=out, **settings)


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        text = "\n".join(sentences(200, seed=number))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    return folder


def test_train_command_writes_the_same_file_each_time(tmp_path, text_folder, capsys):
    config = train_config(tmp_path, vocab_size=330)
    assert train_tokenizer(config) == 0
    first = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert train_tokenizer(config) == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == first
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["tokenizer.model"]
    assert tokenizers.load(tmp_path / "out").vocab_size == 330
    assert "1 bad UTF-8" in capsys.readouterr().out


def test_sample_is_drawn_by_content(tmp_path, text_folder):
    for file in text_folder.iterdir():
        file.unlink()
    words = [f"{letter * 3} " * 90_000 for letter in "abcdefgh"]  # 8 documents of 0.34 MiB
    for number, text in enumerate(words):
        (text_folder / f"{number}.txt").write_text(text, encoding="utf-8")
    config = train_config(tmp_path, vocab_size=270, sample_mb=1, character_coverage=1)

    def learned():
        train_tokenizer(config)
        tokenizer = tokenizers.load(config.out)
        return {tokenizer.spelling(i).strip()[:1] for i in range(259, 270)} - {b""}

    first = learned()
    assert 0 < len(first) < 4  # as many as fit into 1 MiB
    for number, text in enumerate(reversed(words)):
        (text_folder / f"{number}.txt").write_text(text, encoding="utf-8")
    assert learned() == first


def test_inspect_shows_the_round_trip(tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model())
    assert inspect_tokenizer(TokenizerInspectConfig(path=str(tmp_path), text="a hill")) == 0
    shown = capsys.readouterr().out
    assert "round trip   equal" in shown
    assert tiny_tokenizer().fingerprint in shown
