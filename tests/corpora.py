"""Small tokenizers and corpora for the tests of tokenizer and data."""

import base64
import functools
import itertools
import random
from collections import Counter

import numpy as np

from llama_jax.convert.tokenizers import huggingface_files
from llama_jax.data.shards import META, Meta, PartWriter, to_json, token_type, write_atomic
from llama_jax.tokenizer import SentencePiece
from llama_jax.tokenizer.huggingface import HuggingFace
from llama_jax.tokenizer.tiktoken import Tiktoken
from llama_jax.tokenizer.train import train

WORDS = (
    "the",
    "llama",
    "sat",
    "on",
    "hills",
    "and",
    "hummed",
    "about",
    "42",
    "stones;",
    "not,",
    "I.",
)


def sentences(count, seed=0):
    """Lines of words, some indented, as text or code may be."""
    draw = random.Random(seed)
    return [
        " " * draw.choice((0, 0, 0, 4, 8)) + " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        for _ in range(count)
    ]


@functools.cache
def tiny_model():
    """The file of a tokenizer of 320 pieces."""
    return train(sentences(300), 320)


@functools.cache
def tiny_tokenizer():
    return SentencePiece(tiny_model(), "tiny")


@functools.cache
def tiny_tokens(count=64):
    """The 256 bytes, and `count` tokens merged from the commonest pairs of some words."""
    tokens = [bytes([value]) for value in range(256)]
    lines = "\n".join([*sentences(300), "it's   1234 \t\n\n é é 日本 😀😀"])
    words = Counter(f" {word}" for word in lines.split(" "))
    parts = {word: [bytes([value]) for value in word.encode()] for word in words}
    for _ in range(count):
        pairs = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(parts[word]):
                pairs[pair] += times
        left, right = pairs.most_common(1)[0][0]
        tokens.append(left + right)
        for word, found in parts.items():
            i = 0
            while i < len(found) - 1:
                if (found[i], found[i + 1]) == (left, right):
                    found[i : i + 2] = [left + right]
                i += 1
            parts[word] = found
    return tokens


def tiktoken_file(tokens):
    """The bytes of a tiktoken file with these tokens."""
    lines = [base64.b64encode(t) + f" {rank}\n".encode() for rank, t in enumerate(tokens)]
    return b"".join(lines)


@functools.cache
def tiny_tiktoken():
    return Tiktoken(tiktoken_file(tiny_tokens()), "tiny")


@functools.cache
def tiny_byte_level():
    """The same as a tokenizer.json."""
    return HuggingFace(huggingface_files(tiny_tiktoken())["tokenizer.json"], "tiny")


@functools.cache
def tiny_byte_fallback():
    """tiny_tokenizer as a tokenizer.json."""
    return HuggingFace(huggingface_files(tiny_tokenizer())["tokenizer.json"], "tiny")


KINDS = {
    "sentencepiece": tiny_tokenizer,
    "tiktoken": tiny_tiktoken,
    "byte-level json": tiny_byte_level,
    "byte-fallback json": tiny_byte_fallback,
}

# What breaks tokenizers: spaces, breaks, joined emoji, accents, scripts, digits, control names.
# fmt: off
NASTY = (
    "", " ", "  ", " a", "  a", "a ", "a  ", "\t", "\ta", "\n", "\n\n", "\n a", " \n \n", "\r\n",
    "a\r\nb", "Hello world", " Hello", "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "1", "12", "123", "1234", "1234567890", "w048 7tuijk dsdfhu",
    "нещо на Български", "កាន់តែពិសេសអាចខលចេញ",
    "🚀 (normal) 😶\u200d🌫️ (joined) ✅ (alone)", "👨\u200d👩\u200d👧\u200d👦",
    "e\u0301", "é", "\0", "a\0b",
    "\x01\x1f\x7f", "\x1c\x1d x\x85y", "\ufeff", "\u200b\u200d", "\u2028\u2029", "\xa0x",
    "\u3000日本語",
    "مرحبا بالعالم", "שלום", "it's we'll I'D THEY'RE 'S don't", "'''''' ``` \"\"\"", "====== -----",
    "<s>", "</s>", "<unk>", "<0x0A>", "<|eot_id|>", "<|begin_of_text|>hi", "[INST] x [/INST]",
    "\U0001f1e6\U0001f1fa", "Z̤͔ͧ̑̓ä͖̭̈̇lͮ̒ͫǧ̗͚̚o̙̔ͮ̇͐̇", "\U0010ffff", "a" * 300, " " * 300, "\n" * 50,
    "  leading and trailing  ", "def f(x):\n    return x\n\n\tpass", "３３３ ½ Ⅷ ①", "ﬁ ﷺ ẛ̣",
)
# fmt: on


def write_corpus(folder, shards, vocab_size=1000, fingerprint="f" * 64, validation=()):
    """A finished corpus from lists of shards, which are lists of documents, which are ids."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": [], "validation": []}
    for split, given in (("train", shards), ("validation", validation)):
        for number, documents in enumerate(given):
            writer = PartWriter(folder, split, number, token_type(vocab_size))
            writer.add(np.concatenate(documents), np.array([len(ids) for ids in documents]))
            parts[split].append(writer.commit())
    documents = sum(part.documents for part in parts["train"] + parts["validation"])
    meta = Meta(
        tokenizer=fingerprint,
        vocab_size=vocab_size,
        records=documents,
        kept=documents,
        dropped={},
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        settings={},
    )
    write_atomic(folder / META, to_json(meta.model_dump()))
    return folder


def numbered_documents(lengths, first=10):
    """Documents 1 ... 2 whose inner ids count up, so that each token tells where it is from."""
    documents, number = [], first
    for length in lengths:
        documents.append([1, *range(number, number + length - 2), 2])
        number += length - 2
    return documents
