"""Tokenizers beside the weights of other formats: Hugging Face folders and GGUF."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax.tokenizer import Tokenizer, TokenizerError


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name -> content of the files beside config.json."""
    return {tokenizer.file_name: tokenizer.model}


def gguf_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The tokenizer.ggml.* metadata, its lists filled up to vocab_size rows."""
    pieces = schema.ModelProto.FromString(tokenizer.model).pieces
    padding = range(len(pieces), vocab_size)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.piece for p in pieces] + [f"[PAD{i}]" for i in padding],
        "tokenizer.ggml.scores": [p.score for p in pieces] + [-1e4 for _ in padding],
        "tokenizer.ggml.token_type": [p.type for p in pieces] + [5 for _ in padding],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_ids[0],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }


def from_gguf_fields(fields: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises TokenizerError where it cannot be made."""
    try:
        if fields["tokenizer.ggml.model"] != "llama":
            raise TokenizerError(f"{path}: only SentencePiece is read")
        proto = schema.ModelProto()
        rows = zip(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.scores"],
            fields["tokenizer.ggml.token_type"],
            strict=True,
        )
        for piece, score, kind in rows:
            if kind != 5:
                proto.pieces.add(piece=piece, score=float(score), type=int(kind))
        proto.trainer_spec.model_type = schema.TrainerSpec.BPE
        proto.trainer_spec.byte_fallback = True
        proto.trainer_spec.vocab_size = len(proto.pieces)
        proto.trainer_spec.bos_piece = proto.pieces[
            int(fields["tokenizer.ggml.bos_token_id"])
        ].piece
        proto.trainer_spec.eos_piece = proto.pieces[
            int(fields["tokenizer.ggml.eos_token_id"])
        ].piece
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = bool(
            fields.get("tokenizer.ggml.add_space_prefix", True)
        )
        proto.normalizer_spec.remove_extra_whitespaces = False
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise TokenizerError(f"{path}: not a tokenizer ({error})") from error
    return Tokenizer(proto.SerializeToString(), str(path))
