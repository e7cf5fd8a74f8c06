"""tiktoken: ids are those that the reference's algorithm gives, and those that Meta publishes."""

import itertools
import random

import pytest
import regex
from corpora import NASTY, sentences, tiktoken_file, tiny_tiktoken, tiny_tokens

from llama_jax import tokenizer as tokenizers
from llama_jax.tokenizer import tiktoken
from llama_jax.tokenizer.tiktoken import Tiktoken

# tokenizer.py of meta-llama/llama-models, class attribute pat_str.
WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_the_book(text, tokens):
    """Words, each looked up whole, else the pair of the lowest rank merged until none is left."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids = []
    for word in WORDS.findall(text):
        parts = [bytes([value]) for value in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while True:
            pairs = [
                (ranks[left + right], i)
                for i, (left, right) in enumerate(itertools.pairwise(parts))
                if left + right in ranks
            ]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def cuts_by_the_book(text, longest_call, longest_run):
    """The reference's loop over characters, which guards its library."""
    for start in range(0, len(text), longest_call):
        part = text[start : start + longest_call]
        begin, run, is_space = 0, 0, part[0].isspace()
        for i, character in enumerate(part):
            if character.isspace() != is_space:
                run, is_space = 1, not is_space
            else:
                run += 1
                if run > longest_run:
                    yield part[begin:i]
                    begin, run = i, 1
        yield part[begin:]


@pytest.fixture(scope="module")
def llama3(shared_data):
    return tokenizers.load(shared_data / "tokenizers" / "llama3_tokenizer.model")


@pytest.mark.parametrize("text", [*NASTY, "\n".join(sentences(50, seed=3))])
def test_ids_are_those_of_the_algorithm(text):
    assert tiny_tiktoken().encode(text) == by_the_book(text, tiny_tokens())


def test_a_word_that_merging_cannot_reach_is_found_whole():
    tokens = [*tiny_tokens(0), b"xyz"]
    tokenizer = Tiktoken(tiktoken_file(tokens), "")
    assert tokenizer.encode("xyz") == by_the_book("xyz", tokens) == [256]
    assert tokenizer.encode("wxyz") == by_the_book("wxyz", tokens) == list(b"wxyz")


def test_control_tokens_have_metas_ids():
    names = dict(enumerate(tiktoken.CONTROLS, start=128_000))
    assert len(set(names.values())) == 256
    assert {id: name for id, name in names.items() if "reserved" not in name} == {
        128000: "<|begin_of_text|>",
        128001: "<|end_of_text|>",
        128004: "<|finetune_right_pad_id|>",
        128006: "<|start_header_id|>",
        128007: "<|end_header_id|>",
        128008: "<|eom_id|>",
        128009: "<|eot_id|>",
        128010: "<|python_tag|>",
    }
    assert names[128002] == "<|reserved_special_token_0|>"
    assert names[128005] == "<|reserved_special_token_2|>"
    assert names[128255] == "<|reserved_special_token_247|>"


@pytest.mark.parametrize("seed", range(10))
def test_long_texts_are_cut_where_the_reference_cuts_them(seed):
    draw = random.Random(seed)
    runs = []
    for number in range(draw.randint(1, 40)):
        letters = (" \n\t\x1c\u2003", "ab1.é")[number % 2]
        length = draw.choice((1, 3, 24_999, 25_000, 25_001, 50_001, draw.randint(1, 60_000)))
        runs.append("".join(draw.choices(letters, k=length)))
    text = "".join(runs)
    expected = list(cuts_by_the_book(text, 400_000, 25_000))
    assert [part for part in tiktoken.parts(text) if part] == expected


def test_llama3_gives_metas_ids(llama3):
    # tests/api/test_tokenizer.py of meta-llama/llama-models.
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == ids
    assert llama3.decode(ids) == "This is a test sentence."
    assert (llama3.vocab_size, llama3.bos_id) == (128256, 128000)
    assert llama3.eos_ids == (128001, 128008, 128009)
    assert [llama3.encode(text) for text in ("system", "assistant", "\n\n")] == [
        [9125],
        [78191],
        [271],
    ]


@pytest.mark.parametrize("text", NASTY)
def test_llama3_cuts_by_the_book_and_gives_back(llama3, text):
    tokens = [llama3.spelling(id) for id in range(128_000)]
    assert llama3.encode(text) == by_the_book(text, tokens)
    assert llama3.decode(llama3.encode(text)) == text


def test_llama3_cuts_real_text_by_the_book(llama3, shared_data):
    text = (shared_data / "corpora" / "botchan.txt").read_text(encoding="utf-8")[:50_000]
    assert llama3.encode(text) == by_the_book(text, [llama3.spelling(i) for i in range(128_000)])
