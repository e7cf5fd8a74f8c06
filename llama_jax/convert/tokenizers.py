"""Tokenizers as other programs want them: Hugging Face files and GGUF metadata, both directions."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, AnyStr, TypeVar

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax.tokenizer import SentencePiece, Tokenizer, TokenizerError, tokenizer_json
from llama_jax.tokenizer import sentencepiece as sentencepiece_file
from llama_jax.tokenizer import tiktoken as tiktoken_file
from llama_jax.tokenizer.huggingface import HuggingFace
from llama_jax.tokenizer.sentencepiece import PIECE
from llama_jax.tokenizer.tiktoken import Tiktoken
from llama_jax.tokenizer.tokenizer_json import CHARACTER_OF_BYTE, FALLBACK, Bpe

_T = TypeVar("_T")
_GGML = "tokenizer.ggml."
# GGUF numbers the types of pieces as SentencePiece does.
_TYPES = (PIECE.NORMAL, PIECE.UNKNOWN, PIECE.CONTROL, PIECE.USER_DEFINED, PIECE.UNUSED, PIECE.BYTE)
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


# Hugging Face ---------------------------------------------------------------------------------


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content: what AutoTokenizer of transformers needs to give the same ids.

    A tokenizer.json is written for every kind: from a bare tokenizer.model, transformers makes
    tokenizers that leave out the space before a text that begins with one.

    Raises TokenizerError for a model that a tokenizer.json cannot express.
    """
    names = {id: name for name, id in tokenizer.controls.items()}
    bos, eos = names[tokenizer.bos_id], names[tokenizer.eos_ids[0]]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files = {"tokenizer_config.json": json.dumps(config, indent=2).encode()}
    if isinstance(tokenizer, HuggingFace):
        return {tokenizer.file_name: tokenizer.model, **files}
    if isinstance(tokenizer, SentencePiece):
        files[tokenizer.file_name] = tokenizer.model
    return {tokenizer_json.NAME: tokenizer_json.write(to_bpe(tokenizer), bos), **files}


def to_bpe(tokenizer: Tokenizer) -> Bpe:
    """Pieces and merges of a tokenizer. Raises TokenizerError for what these cannot express."""
    if isinstance(tokenizer, HuggingFace):
        return tokenizer_json.read(tokenizer.model, tokenizer.path)
    if isinstance(tokenizer, Tiktoken):
        return _bpe_of_ranks(tokenizer)
    return _bpe_of_scores(tokenizer)


def _bpe_of_ranks(tokenizer: Tiktoken) -> Bpe:
    """tiktoken merges any two neighbours whose union is a token, the lowest rank first."""
    tokens = tiktoken_file.read(tokenizer.model, tokenizer.path)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelt = ["".join(CHARACTER_OF_BYTE[byte] for byte in token) for token in tokens]
    return Bpe(
        pieces=[*spelt, *tiktoken_file.CONTROLS],
        merges=[
            (spelt[left], spelt[right])
            for token in tokens
            for left, right in sorted(_halves(token, ranks))
        ],
        controls=tokenizer.controls,
        added={},
        words="llama-bpe",
        prefixed=False,
        whole_words=True,  # tiktoken looks a word up before it merges
    )


def _bpe_of_scores(tokenizer: Tokenizer) -> Bpe:
    """SentencePiece merges any two neighbours whose union is a piece, the highest score first."""
    path = tokenizer.path
    proto = sentencepiece_file.parse(tokenizer.model, path)
    if proto.trainer_spec.model_type != schema.TrainerSpec.BPE or not tokenizer.lossless:
        raise TokenizerError(f"{path}: only BPE without normalisation can be converted")
    if any(piece.type in (PIECE.USER_DEFINED, PIECE.UNUSED) for piece in proto.pieces):
        raise TokenizerError(f"{path}: user-defined and unused pieces cannot be converted")
    normal = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == PIECE.NORMAL}
    bare = set("".join(normal)) - normal.keys()
    if bare:
        raise TokenizerError(
            f"{path}: the character {min(bare)!r} is in pieces but is none itself, which only "
            "SentencePiece can cut"
        )
    merges = [
        (-proto.pieces[id].score, left, right)
        for piece, id in normal.items()
        for left, right in _halves(piece, normal)
    ]
    pieces = [piece.piece for piece in proto.pieces]
    return Bpe(
        pieces=pieces,
        merges=[(pieces[left], pieces[right]) for _, left, right in sorted(merges)],
        controls=tokenizer.controls,
        added={},
        words=None,
        prefixed=proto.normalizer_spec.add_dummy_prefix,
        whole_words=False,
    )


def _halves(token: AnyStr, ids: Mapping[AnyStr, int]) -> Iterator[tuple[int, int]]:
    """Ids of the pairs of tokens that a token can be put together from."""
    for cut in range(1, len(token)):
        left, right = ids.get(token[:cut]), ids.get(token[cut:])
        if left is not None and right is not None:
            yield left, right


# GGUF -----------------------------------------------------------------------------------------


def gguf_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The tokenizer.ggml.* metadata of a GGUF file: texts, numbers, booleans and lists of them.

    vocab_size: rows of the model's embedding; what the tokenizer lacks is filled up with unused
    tokens. Raises TokenizerError for fewer rows than tokens, or what llama.cpp cannot cut equally.
    """
    missing = vocab_size - tokenizer.vocab_size
    if missing < 0:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, more than vocab_size {vocab_size}"
        )
    if isinstance(tokenizer, SentencePiece):
        fields = _fields_of_scores(tokenizer)
    else:
        bpe = to_bpe(tokenizer)
        fields = _fields_of_words(bpe, tokenizer.path) if bpe.words else _fields_of_merges(bpe)
    padding = range(tokenizer.vocab_size, vocab_size)
    fields["tokens"] += [f"[PAD{number}]" for number in padding]
    fields["token_type"] += [PIECE.UNUSED] * missing
    if "scores" in fields:
        fields["scores"] += [-1000.0] * missing
    fields |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids[0],
        "add_bos_token": True,
        "add_eos_token": False,
    }
    for field, name in (("eot_token_id", "<|eot_id|>"), ("eom_token_id", "<|eom_id|>")):
        if name in tokenizer.controls:
            fields[field] = tokenizer.controls[name]
    return {_GGML + name: value for name, value in fields.items()}


def _fields_of_scores(tokenizer: SentencePiece) -> dict[str, Any]:
    proto = sentencepiece_file.parse(tokenizer.model, tokenizer.path)
    if proto.trainer_spec.model_type != schema.TrainerSpec.BPE or not tokenizer.lossless:
        raise TokenizerError(f"{tokenizer.path}: only BPE without normalisation can be converted")
    unknown = [id for id, piece in enumerate(proto.pieces) if piece.type == PIECE.UNKNOWN]
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        **({"unknown_token_id": unknown[0]} if unknown else {}),
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }


def _fields_of_merges(bpe: Bpe) -> dict[str, Any]:
    """With byte fallback: a piece scores higher the earlier the merges make it."""
    scores: dict[str, float] = {}
    for left, right in bpe.merges:
        scores.setdefault(left + right, -float(len(scores)))
    types = _types(bpe) | dict.fromkeys(FALLBACK, PIECE.BYTE)
    unknown = {}
    if "<unk>" in bpe.pieces:
        types["<unk>"] = PIECE.UNKNOWN
        unknown["unknown_token_id"] = bpe.pieces.index("<unk>")
    return {
        "model": "llama",
        **unknown,
        "tokens": list(bpe.pieces),
        "scores": [scores.get(piece, -float(len(scores))) for piece in bpe.pieces],
        "token_type": [types.get(piece, PIECE.NORMAL) for piece in bpe.pieces],
        "add_space_prefix": bpe.prefixed,
    }


def _fields_of_words(bpe: Bpe, path: str) -> dict[str, Any]:
    if bpe.whole_words != (bpe.words == "llama-bpe"):
        raise TokenizerError(
            f"{path}: ignore_merges {bpe.whole_words} does not go with words of the kind "
            f"{bpe.words} in llama.cpp"
        )
    types = _types(bpe)
    return {
        "model": "gpt2",
        "pre": bpe.words,
        "tokens": list(bpe.pieces),
        "token_type": [types.get(piece, PIECE.NORMAL) for piece in bpe.pieces],
        "merges": [f"{left} {right}" for left, right in bpe.merges],
    }


def _types(bpe: Bpe) -> dict[str, int]:
    return dict.fromkeys(bpe.controls, PIECE.CONTROL) | dict.fromkeys(bpe.added, PIECE.USER_DEFINED)


def from_gguf_fields(fields: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """The tokenizer that a GGUF file's tokenizer.ggml.* metadata describe; `path` names it.

    Metadata come from strangers: everything is checked. Raises TokenizerError for metadata that are
    missing, of the wrong type or not LLaMA's, and ConfigError where a library is not installed.
    """
    path, model = str(path), fields.get(_GGML + "model")
    if model == "llama":
        return SentencePiece(_sentencepiece_model(fields, path), path)
    if model == "gpt2":
        return HuggingFace(tokenizer_json.write(_bpe_of_fields(fields, path)), path)
    raise TokenizerError(
        f"{path}: {_GGML}model is {model!r:.40}; only llama and gpt2, which LLaMA uses, are read"
    )


def _sentencepiece_model(fields: Mapping[str, Any], path: str) -> bytes:
    tokens, types = _tokens(fields, path)
    scores = _list(fields, "scores", path, float)[: len(tokens)]
    largest = float(np.finfo(np.float32).max)
    if len(scores) < len(tokens) or not all(abs(score) <= largest for score in scores):
        raise TokenizerError(f"{path}: {_GGML}scores must be a finite number for each token")
    proto = schema.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type = schema.TrainerSpec.BPE
    spec.vocab_size = len(tokens)
    spec.byte_fallback = True
    for name, usual in (("bos", 1), ("eos", 2)):
        id = fields.get(f"{_GGML}{name}_token_id", usual)
        if type(id) is not int or not 0 <= id < len(tokens):
            raise TokenizerError(
                f"{path}: {_GGML}{name}_token_id is {id!r:.40}, not one of {len(tokens)} tokens"
            )
        setattr(spec, f"{name}_piece", tokens[id])
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == PIECE.UNKNOWN]
    spec.unk_piece = unknown[0] if unknown else "<unk>"
    prefixed = fields.get(_GGML + "add_space_prefix", True)
    if not isinstance(prefixed, bool):
        raise TokenizerError(f"{path}: {_GGML}add_space_prefix is {prefixed!r:.40}, not a boolean")
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = prefixed
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def _bpe_of_fields(fields: Mapping[str, Any], path: str) -> Bpe:
    tokens, types = _tokens(fields, path)
    pre = fields.get(_GGML + "pre")
    name = _OTHER_NAMES.get(pre, pre) if isinstance(pre, str) else None
    words = next((known for known in tokenizer_json.WORDS if known == name), None)
    if words is None:
        raise TokenizerError(
            f"{path}: {_GGML}pre is {pre!r:.40}; only {', '.join(tokenizer_json.WORDS)} are read"
        )

    def of(kind: int) -> dict[str, int]:
        return {tokens[id]: id for id, found in enumerate(types) if found == kind}

    bpe = Bpe(
        pieces=tokens,
        merges=tokenizer_json.pairs(_list(fields, "merges", path, str), path),
        controls=of(PIECE.CONTROL),
        added=of(PIECE.USER_DEFINED),
        words=words,
        prefixed=False,
        whole_words=words == "llama-bpe",
    )
    tokenizer_json.check(bpe, path)
    return bpe


def _tokens(fields: Mapping[str, Any], path: str) -> tuple[list[str], list[int]]:
    """Tokens and their types, without those that only fill up the embedding's rows."""
    tokens = _list(fields, "tokens", path, str)
    types = _list(fields, "token_type", path, int)
    if len(tokens) != len(types) or not set(types) <= set(_TYPES):
        raise TokenizerError(
            f"{path}: {_GGML}token_type must be one of {', '.join(map(str, sorted(_TYPES)))} for "
            f"each of {len(tokens)} tokens"
        )
    count = len(tokens)
    while count and types[count - 1] == PIECE.UNUSED:
        count -= 1
    tokens, types = tokens[:count], types[:count]
    surrogates = re.search("[\ud800-\udfff]", "".join(tokens))
    if len(set(tokens)) < count or "" in tokens or surrogates:
        raise TokenizerError(
            f"{path}: {_GGML}tokens holds a token twice, an empty one, or one that is not UTF-8"
        )
    return tokens, types


def _list(fields: Mapping[str, Any], name: str, path: str, kind: type[_T]) -> list[_T]:
    """A list of the metadata, as a list of one Python type."""
    values = fields.get(_GGML + name)
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple) or not all(type(value) is kind for value in values):
        raise TokenizerError(f"{path}: {_GGML}{name} must be a list of {kind.__name__}")
    return list(values)
