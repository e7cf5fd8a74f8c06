"""SentencePiece tokenizers: LLaMA 1 and 2 (LLaMA paper, section 2.1; Llama 2 paper, section 2.2).

Byte-pair encoding over characters; each digit is a piece of its own; a character without a piece is
spelt in UTF-8 bytes, so any text can be written. Ids: <unk> 0, <s> 1, </s> 2, the bytes 3 to 258.

Inside a piece a space is written U+2581. A LLaMA model puts one space before the text (so that a
word has the same pieces at the start as in the middle) and takes one away when it decodes. With
that rule decode(encode(text)) == text for every text. Text itself never yields <s> or </s>.
"""

import codecs
import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax.config import TokenizerInspectConfig

NAME = "tokenizer.model"
MAX_FILE_BYTES = 100 * 2**20  # the largest published models are below 10 MB

SPACE = "\u2581"
# Stretches of text that no piece of a LLaMA vocabulary reaches across (`_is_cut_by` checks it), so
# that each can be encoded alone, once, and be remembered. For other models, all up to a space sign.
_WORD = re.compile(f"[{SPACE}\n]| *[^ {SPACE}\n]+| +")
_ALL = re.compile(f"{SPACE}|[^{SPACE}]+")
_MAX_REMEMBERED = 64  # characters; a longer unit is hardly met twice
_PIECE = schema.ModelProto.SentencePiece
_DAMAGED = "not a SentencePiece model, or damaged"


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or text or ids that it cannot take."""


class Tokenizer:
    """A SentencePiece model. `bos_id`, `eos_ids`, `vocab_size` as in the file; picklable.

    `model` is the file itself and `fingerprint` its SHA-256 in hex, which prepared corpora and
    checkpoints carry.
    `lossless` is False for a model that rewrites text before it cuts it (Unicode normalisation,
    not LLaMA's): ids are then SentencePiece's own, and decoding gives the rewritten text.
    """

    file_name = NAME

    def __init__(self, model: bytes, path: str):
        """Reads the bytes of a tokenizer.model; `path` names it in errors (TokenizerError)."""
        self.path = path
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.model = model
        try:
            proto = schema.ModelProto.FromString(model)
        except DecodeError as error:
            raise TokenizerError(f"{path}: {_DAMAGED}") from error
        pieces = [piece.piece for piece in proto.pieces]
        types = [piece.type for piece in proto.pieces]
        # A file cut between two fields still parses; pieces that are not UTF-8 come as bytes.
        if not proto.HasField("normalizer_spec") or not all(isinstance(p, str) for p in pieces):
            raise TokenizerError(f"{path}: {_DAMAGED}")
        ids_of_bytes = {p: i for i, p in enumerate(pieces) if types[i] == _PIECE.BYTE}
        missing = [v for v in range(256) if f"<0x{v:02X}>" not in ids_of_bytes]
        if missing or not proto.trainer_spec.byte_fallback:
            what = f"lacks {len(missing)} of the 256 bytes" if missing else "has no byte fallback"
            raise TokenizerError(f"{path}: {what}, so it cannot write every text")
        controls = {p: i for i, p in enumerate(pieces) if types[i] == _PIECE.CONTROL}
        bos, eos = proto.trainer_spec.bos_piece, proto.trainer_spec.eos_piece
        if bos not in controls or eos not in controls:
            raise TokenizerError(f"{path}: has no control pieces {bos} and {eos}")
        if proto.trainer_spec.treat_whitespace_as_suffix:
            raise TokenizerError(f"{path}: writes spaces behind words; only LLaMA's way is read")
        self.vocab_size = len(pieces)
        self.bos_id: int = controls[bos]
        self.eos_ids: tuple[int, ...] = (controls[eos],)

        # The space before a text is put there by `encode`; the other spaces are all kept.
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
        self._spelling = [
            _spelling(piece, proto.trainer_spec.unk_surface) for piece in proto.pieces
        ]
        self._spelling_at_start = [
            text.removeprefix(b" ") if prefixed and kind != _PIECE.BYTE else text
            for text, kind in zip(self._spelling, types, strict=True)
        ]
        # A space sign in the text itself must not come back as a space: it is spelt in bytes.
        self._space_sign = tuple(ids_of_bytes[f"<0x{value:02X}>"] for value in SPACE.encode())
        self._units = _WORD if _is_cut_by(_WORD, proto) else _ALL
        self.lossless = not _rewrites(proto)
        self._remembered = functools.lru_cache(maxsize=2**18)(self._encode_unit)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, str]]:
        return Tokenizer, (self.model, self.path)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of the text, between <s> and </s> if asked. Empty text has no ids.

        Raises TokenizerError for a lone surrogate, which is no character and has no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text is a lone surrogate "
                f"({text[error.start]!a}), which UTF-8 cannot write"
            ) from error
        ids = [self.bos_id] if bos else []
        for unit in self._units.findall(self._prefix + text if text else ""):
            short = len(unit) <= _MAX_REMEMBERED
            ids += self._remembered(unit) if short else self._encode_unit(unit)
        if eos:
            ids += self.eos_ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; <s> and </s> are invisible, bytes that are not UTF-8 become U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """
        stream = StreamDecoder(self)
        return stream.feed(ids) + stream.finish()

    def spelling(self, token: int, at_start: bool = False) -> bytes:
        """UTF-8 of one id; `at_start`: without the space that `encode` puts before a text.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(
                f"token id {token} is outside the vocabulary of {self.vocab_size} ({self.path})"
            )
        return self._spelling_at_start[token] if at_start else self._spelling[token]

    def _encode_unit(self, unit: str) -> tuple[int, ...]:
        return self._space_sign if unit == SPACE else tuple(self._processor.encode(unit))


class StreamDecoder:
    """Decodes ids as they come. The texts of all `feed` calls and `finish`, joined, are `decode`.

    No text ends in half a character: bytes of an unfinished one are held back until the next ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def feed(self, ids: Iterable[int]) -> str:
        """Text that these ids complete."""
        spellings = []
        for token in ids:
            spelling = self._tokenizer.spelling(token)
            if self._at_start and spelling:
                spelling = self._tokenizer.spelling(token, at_start=True)
                self._at_start = False
            spellings.append(spelling)
        return self._decoder.decode(b"".join(spellings))

    def finish(self) -> str:
        """What is held back, as U+FFFD; the decoder is then at the start of a new text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = True
        return text


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a SentencePiece file, or in `tokenizer.model` of a folder.

    Raises TokenizerError when there is none, or it is damaged, or cannot write every byte.
    """
    file = Path(path)
    if file.is_dir():
        file = file / NAME
        if not file.exists():
            raise TokenizerError(f"{path}: this folder holds no {NAME}")
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TokenizerError(f"{file}: {size:,} bytes is too large for a tokenizer")
        model = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from error
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
        raise TokenizerError(f"{file}: a tiktoken file (Llama 3); only SentencePiece is read")
    return Tokenizer(model, str(file))


def inspect_tokenizer(config: TokenizerInspectConfig) -> int:
    """Prints what a tokenizer holds and how it cuts a text; returns the exit code."""
    tokenizer = load(config.path)
    ids = tokenizer.encode(config.text)
    size = len(config.text.encode())
    print(f"file         {tokenizer.path}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    print(
        f"pieces       {tokenizer.vocab_size:,} (bos {tokenizer.bos_id}, eos {tokenizer.eos_ids})"
    )
    if not tokenizer.lossless:
        print(
            "caution      it rewrites text before it cuts it, so decoding may differ from the text"
        )
    print(f"text         {config.text!r}")
    print(f"ids          {' '.join(map(str, ids))}")
    print(f"spellings    {' '.join(repr(tokenizer.spelling(i))[1:] for i in ids)}")
    print(f"rate         {len(ids)} tokens, {size / max(len(ids), 1):.2f} bytes each")
    print(f"round trip   {'equal' if tokenizer.decode(ids) == config.text else 'DIFFERENT'}")
    return 0


def _spelling(piece: schema.ModelProto.SentencePiece, unknown: str) -> bytes:
    """What a piece stands for in UTF-8; nothing for a control piece."""
    if piece.type == _PIECE.CONTROL:
        return b""
    if piece.type == _PIECE.UNKNOWN:
        return unknown.encode()
    if piece.type == _PIECE.BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # <0xAB>
    return piece.piece.replace(SPACE, " ").encode()


def _rewrites(proto: schema.ModelProto) -> bool:
    """Whether text may be changed before it is cut; LLaMA's rule is identity."""
    spec = proto.normalizer_spec
    return bool(spec.precompiled_charsmap) or not spec.escape_whitespaces


def _is_cut_by(unit: re.Pattern[str], proto: schema.ModelProto) -> bool:
    """Whether encoding unit by unit is exact: no merge and no rewriting reaches across a border."""
    if proto.trainer_spec.model_type != schema.TrainerSpec.BPE or _rewrites(proto):
        return False
    if any(piece.type == _PIECE.USER_DEFINED for piece in proto.pieces):
        return False
    texts = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == _PIECE.NORMAL]
    return all(len(unit.findall(text)) == 1 for text in texts)
