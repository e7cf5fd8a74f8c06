"""Small tokenizers and corpora for the tests of tokenizer and data."""

import functools
import random

import numpy as np

from llama_jax.data.shards import META, Meta, PartWriter, to_json, token_type, write_atomic
from llama_jax.tokenizer import SentencePiece
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
