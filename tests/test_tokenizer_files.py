"""Tokenizer files from strangers: each is refused with a sentence, none crashes or is half used."""

import random

import pytest
from corpora import tiny_model
from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax import tokenizer as tokenizers
from llama_jax.tokenizer import TokenizerError

Piece = schema.ModelProto.SentencePiece


def changed(change):
    proto = schema.ModelProto.FromString(tiny_model())
    change(proto)
    return proto.SerializeToString()


def without_byte(proto):
    del proto.pieces[3 + 0x41]


def byte_as_text(proto):
    proto.pieces[3 + 0x41].type = Piece.NORMAL


def misnamed_byte(proto):
    proto.pieces[3 + 0x41].piece = "<0xZZ>"


def byte_twice(proto):
    proto.pieces[3 + 0x41].piece = "<0x42>"


def no_fallback(proto):
    proto.trainer_spec.byte_fallback = False


def no_bytes_at_all(proto):
    proto.trainer_spec.byte_fallback = False
    kept = [piece for piece in proto.pieces if piece.type != Piece.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)


def no_bos(proto):
    proto.pieces[1].type = Piece.NORMAL


def no_eos(proto):
    proto.pieces[2].piece = "</other>"


def same_piece_twice(proto):
    proto.pieces[300].piece = proto.pieces[301].piece


def empty_piece(proto):
    proto.pieces[300].piece = ""


def piece_with_nul(proto):
    proto.pieces[300].piece = "a\0b"


def no_pieces(proto):
    del proto.pieces[:]


def spaces_behind(proto):
    proto.trainer_spec.treat_whitespace_as_suffix = True


def damaged_rules(proto):
    proto.normalizer_spec.precompiled_charsmap = b"\xff\xff\xff\x7f garbage"


HOSTILE = {
    "empty": b"",
    "text": b"hello world\n" * 40,
    "zeros": bytes(4096),
    "bom": b"\xef\xbb\xbf" + tiny_model(),
    "crlf": tiny_model().replace(b"\n", b"\r\n"),
    "json": b'{"model": {"type": "BPE"}}',
    "varint": b"\x0a" + b"\xff" * 9 + b"\x7f",
    "long piece": b"\x0a\xff\xff\xff\xff\x0f" + b"a" * 10,
    "gzip": b"\x1f\x8b\x08\x00" + bytes(60),
    "not UTF-8": tiny_model().replace(b"llama", b"ll\xffma"),
    **{
        change.__name__: changed(change)
        for change in (
            without_byte,
            byte_as_text,
            misnamed_byte,
            byte_twice,
            no_fallback,
            no_bytes_at_all,
            no_bos,
            no_eos,
            same_piece_twice,
            empty_piece,
            piece_with_nul,
            no_pieces,
            spaces_behind,
            damaged_rules,
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused(tmp_path, name):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        tokenizers.load(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without_byte", "lacks 1 of the 256 bytes"),
        ("no_bytes_at_all", "lacks 256 of the 256 bytes"),
        ("no_bos", "has no control pieces <s> and </s>"),
        ("text", "not a SentencePiece model, or damaged"),
    ],
)
def test_the_reason_is_named(tmp_path, name, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(TokenizerError, match=message):
        tokenizers.load(tmp_path)


def test_every_truncation_is_refused():
    model = tiny_model()
    for end in range(len(model)):
        with pytest.raises(TokenizerError):
            tokenizers.SentencePiece(model[:end], "cut")


def test_random_damage_is_refused_or_harmless():
    draw = random.Random(0)
    for _ in range(400):
        model = bytearray(tiny_model())
        for _ in range(draw.randint(1, 4)):
            model[draw.randrange(len(model))] = draw.randrange(256)
        try:
            tokenizer = tokenizers.SentencePiece(bytes(model), "damaged")
        except TokenizerError:
            continue
        ids = tokenizer.encode("the llama 42 😀")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"none\.model: cannot be read"):
        tokenizers.load(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=r"this folder holds no tokenizer\.model"):
        tokenizers.load(tmp_path)


def test_a_huge_file_is_not_read(tmp_path):
    file = tmp_path / "tokenizer.model"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(TokenizerError, match="too large for a tokenizer"):
        tokenizers.load(file)
