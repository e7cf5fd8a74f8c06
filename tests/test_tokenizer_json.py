"""tokenizer.json: ids are those of the library that writes such files."""

import json

import pytest
import tokenizers as library
from corpora import NASTY, sentences, tiny_byte_fallback, tiny_byte_level
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llama_jax.tokenizer import TokenizerError, tokenizer_json
from llama_jax.tokenizer.huggingface import HuggingFace

SPACE_SIGN = "\u2581"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(words):
    """A byte-level tokenizer that the library trains and writes, as users of it do."""
    tokenizer = library.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words != "llama-bpe")
    before = {
        "llama-bpe": [pre_tokenizers.Split(library.Regex(SPLIT), behavior="isolated")],
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }[words]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sentences(300), "it's 1234 \n\n é"], trainer)
    return tokenizer


@pytest.mark.parametrize("words", ["llama-bpe", "gpt-2", "smollm"])
@pytest.mark.parametrize("whole_words", [False, True])
def test_what_the_library_writes_is_cut_as_the_library_cuts(words, whole_words):
    reference = trained(words)
    reference.model.ignore_merges = whole_words
    tokenizer = HuggingFace(reference.to_str().encode(), "")
    # The library's own way of not seeing controls in text.
    reference.encode_special_tokens = True
    for text in (*NASTY, "\n".join(sentences(20, seed=5))):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert tokenizer.vocab_size == reference.get_vocab_size()


def with_fallback(prepend, metaspace):
    """Llama 2's kind, in the library's older spelling (normalizer) or its newer one (Metaspace)."""
    file = json.loads(tiny_byte_fallback().model)
    tokenizer = library.Tokenizer.from_str(json.dumps(file))
    if metaspace:
        tokenizer.normalizer = None
        scheme = "first" if prepend else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    elif not prepend:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE_SIGN)
    return tokenizer


@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize("metaspace", [True, False])
def test_both_spellings_of_byte_fallback_are_cut_as_the_library_cuts(prepend, metaspace):
    reference = with_fallback(prepend, metaspace)
    tokenizer = HuggingFace(reference.to_str().encode(), "")
    reference.encode_special_tokens = True
    for text in (*NASTY, "\n".join(sentences(20, seed=5))):
        # Before a text that begins with a space, Metaspace puts none, and loses the text's own.
        if not (metaspace and prepend and text.startswith(" ")):
            assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_not_special_are_found_in_text():
    reference = trained("gpt-2")
    reference.add_tokens(["<tool>", "<tool>s", "zebra"])
    tokenizer = HuggingFace(reference.to_str().encode(), "")
    for text in ("a <tool> zebras <tool>s", "<tool>", "zebrazebra <tool", "<|end_of_text|>"):
        reference.encode_special_tokens = True
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_read_as_pairs_and_as_texts():
    file = json.loads(tiny_byte_level().model)
    assert isinstance(file["model"]["merges"][0], list)
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    older = HuggingFace(json.dumps(file).encode(), "")
    for text in NASTY:
        assert older.encode(text) == tiny_byte_level().encode(text)


def test_writing_what_was_read_gives_the_same_bytes():
    for tokenizer, bos in ((tiny_byte_level(), "<|begin_of_text|>"), (tiny_byte_fallback(), "<s>")):
        read = tokenizer_json.read(tokenizer.model, "")
        assert tokenizer_json.write(read, bos) == tokenizer.model


def test_a_control_that_text_could_yield_is_refused_or_out_of_reach():
    file = json.loads(tiny_byte_level().model)
    # A vocabulary that holds a control as an ordinary word, looked up whole.
    id = len(file["model"]["vocab"])
    for token in file["added_tokens"]:
        token["id"] += 1
    file["model"]["vocab"]["zz"] = id
    file["added_tokens"].insert(0, file["added_tokens"][0] | {"id": id, "content": "zz"})
    tokenizer = HuggingFace(json.dumps(file).encode(), "")
    assert tokenizer.controls["zz"] == id
    assert tokenizer.encode("zz") == [ord("z")] * 2
    file["model"]["merges"].append(["z", "z"])
    with pytest.raises(TokenizerError, match="merge 64, 'z' and 'z', is not of pieces"):
        HuggingFace(json.dumps(file).encode(), "")
