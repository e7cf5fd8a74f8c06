"""SentencePiece tokenizers: LLaMA 1 and 2 (LLaMA paper, section 2.1; Llama 2 paper, section 2.2).

Byte-pair encoding over characters; each digit is a piece of its own; a character without a piece is
spelt in UTF-8 bytes, so any text can be written. Ids: <unk> 0, <s> 1, </s> 2, the bytes 3 to 258.

Inside a piece a space is written U+2581. A LLaMA model puts one space before the text (so that a
word has the same pieces at the start as in the middle) and takes one away when it decodes. With
that rule decode(encode(text)) == text for every text. Text itself never yields <s> or </s>.
"""

import functools
import re

import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax.tokenizer.interface import Tokenizer, TokenizerError

SPACE = "\u2581"
# Stretches of text that no piece of a LLaMA vocabulary reaches across (`_is_cut_by` checks it), so
# that each can be encoded alone, once, and be remembered. For other models, all up to a space sign.
_WORD = re.compile(f"[{SPACE}\n]| *[^ {SPACE}\n]+| +")
_ALL = re.compile(f"{SPACE}|[^{SPACE}]+")
_MAX_REMEMBERED = 64  # characters; a longer unit is hardly met twice
MAX_PIECES = 2**20  # LLaMA has 32,000
PIECE = schema.ModelProto.SentencePiece
_OF_TEXT = (PIECE.NORMAL, PIECE.USER_DEFINED)
_DAMAGED = "not a SentencePiece model, or damaged"


class SentencePiece(Tokenizer):
    """A SentencePiece model. BOS, EOS and pieces are those of the file."""

    def __init__(self, model: bytes, path: str):
        """Reads the bytes of a tokenizer.model; `path` names it in errors (TokenizerError)."""
        proto = parse(model, path)
        pieces = [piece.piece for piece in proto.pieces]
        types = [piece.type for piece in proto.pieces]
        ids_of_bytes = {p: i for i, p in enumerate(pieces) if types[i] == PIECE.BYTE}
        missing = [v for v in range(256) if f"<0x{v:02X}>" not in ids_of_bytes]
        if missing or not proto.trainer_spec.byte_fallback:
            what = f"lacks {len(missing)} of the 256 bytes" if missing else "has no byte fallback"
            raise TokenizerError(f"{path}: {what}, so it cannot write every text")
        # Spelt in bytes, a space would come back as its sign.
        if not any(p == SPACE and kind in _OF_TEXT for p, kind in zip(pieces, types, strict=True)):
            raise TokenizerError(
                f"{path}: has no piece for the space, so it cannot write every text"
            )
        controls = {p: i for i, p in enumerate(pieces) if types[i] == PIECE.CONTROL}
        bos, eos = proto.trainer_spec.bos_piece, proto.trainer_spec.eos_piece
        if bos not in controls or eos not in controls:
            raise TokenizerError(f"{path}: has no control pieces {bos} and {eos}")
        if proto.trainer_spec.treat_whitespace_as_suffix:
            raise TokenizerError(f"{path}: writes spaces behind words; only LLaMA's way is read")

        # The space before a text is put there by `_cut`; the other spaces are all kept.
        prefixed = proto.normalizer_spec.add_dummy_prefix
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        try:
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=proto.SerializeToString()
            )
        except (RuntimeError, UnicodeError) as error:
            raise TokenizerError(f"{path}: {_DAMAGED}") from error
        self._prefix = " " if prefixed else ""
        # A space sign in the text itself must not come back as a space: it is spelt in bytes.
        self._space_sign = tuple(ids_of_bytes[f"<0x{value:02X}>"] for value in SPACE.encode())
        self._units = _WORD if _is_cut_by(_WORD, proto) else _ALL
        self.lossless = not rewrites(proto)
        self._remembered = functools.lru_cache(maxsize=2**18)(self._encode_unit)

        spellings = [_spelling(piece, proto.trainer_spec.unk_surface) for piece in proto.pieces]
        super().__init__(
            model,
            path,
            spellings,
            controls,
            bos_id=controls[bos],
            eos_ids=(controls[eos],),
            spellings_at_start=[
                text.removeprefix(b" ") if prefixed and kind != PIECE.BYTE else text
                for text, kind in zip(spellings, types, strict=True)
            ],
        )

    def _cut(self, text: str) -> list[int]:
        ids: list[int] = []
        for unit in self._units.findall(self._prefix + text):
            short = len(unit) <= _MAX_REMEMBERED
            ids += self._remembered(unit) if short else self._encode_unit(unit)
        return ids

    def _encode_unit(self, unit: str) -> tuple[int, ...]:
        return self._space_sign if unit == SPACE else tuple(self._processor.encode(unit))


def parse(model: bytes, path: str) -> schema.ModelProto:
    """The file as a message, as far as it is one; raises TokenizerError."""
    # In the file a piece begins with two bytes of this value; in memory it takes far more.
    if model.count(b"\x0a") > 2 * MAX_PIECES:
        raise TokenizerError(f"{path}: more than {MAX_PIECES:,} pieces, too many for a tokenizer")
    try:
        proto = schema.ModelProto.FromString(model)
    except DecodeError as error:
        raise TokenizerError(f"{path}: {_DAMAGED}") from error
    # A file cut between two fields still parses; pieces that are not UTF-8 come as bytes.
    whole = proto.HasField("normalizer_spec")
    if not whole or not all(isinstance(piece.piece, str) for piece in proto.pieces):
        raise TokenizerError(f"{path}: {_DAMAGED}")
    return proto


def _spelling(piece: schema.ModelProto.SentencePiece, unknown: str) -> bytes:
    """What a piece stands for in UTF-8; nothing for a control piece."""
    if piece.type == PIECE.CONTROL:
        return b""
    if piece.type == PIECE.UNKNOWN:
        return unknown.encode()
    if piece.type == PIECE.BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # <0xAB>
    return piece.piece.replace(SPACE, " ").encode()


def rewrites(proto: schema.ModelProto) -> bool:
    """Whether text may be changed before it is cut; LLaMA's rule is identity."""
    spec = proto.normalizer_spec
    return bool(spec.precompiled_charsmap) or not spec.escape_whitespaces


def _is_cut_by(unit: re.Pattern[str], proto: schema.ModelProto) -> bool:
    """Whether encoding unit by unit is exact: no merge and no rewriting reaches across a border."""
    if proto.trainer_spec.model_type != schema.TrainerSpec.BPE or rewrites(proto):
        return False
    if any(piece.type == PIECE.USER_DEFINED for piece in proto.pieces):
        return False
    texts = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == PIECE.NORMAL]
    return all(len(unit.findall(text)) == 1 for text in texts)
