"""The file tokenizer.json of the Hugging Face `tokenizers` library, for LLaMA's two kinds.

Byte-level (Llama 3): pieces are bytes, each spelt as one printable character; a text is split into
words by a regular expression. With byte fallback (Llama 2): pieces are characters, a space is spelt
U+2581, characters without a piece are spelt in bytes, <0x00> to <0xFF>.

A file is a pipeline that its writer may put together from many parts, regular expressions of his
own among them. Only these two are read; everything else is refused.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from llama_jax.tokenizer.interface import TokenizerError
from llama_jax.tokenizer.tiktoken import SPLIT

NAME = "tokenizer.json"
SPACE = "\u2581"
MAX_PARTS = 2**20  # Llama 3 has 417,008

Words = Literal["llama-bpe", "gpt-2", "smollm"]
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
# How byte-level tokenizers split a text into words, by the names that GGUF has for it.
WORDS: dict[Words, list[dict[str, Any]]] = {
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ],
    "gpt-2": [{**_BYTE_LEVEL, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {**_BYTE_LEVEL, "use_regex": True},
    ],
}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def _byte_characters() -> list[str]:
    """Byte -> the character that stands for it: itself where that is printable and no space."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


@dataclass(frozen=True)
class Bpe:
    """What a tokenizer.json holds, checked.

    pieces: id -> spelling in the file.
    merges: pairs of pieces that become one, the most important first.
    controls: name -> id of the tokens that stand for no text.
    added: text -> id of further tokens that are found before anything is cut.
    words: how a byte-level tokenizer splits; None for one with byte fallback.
    prefixed: with byte fallback, whether a space is put before a text.
    whole_words: a word that is a piece is taken as it is, without looking at the merges.
    """

    pieces: list[str]
    merges: list[tuple[str, str]]
    controls: dict[str, int]
    added: dict[str, int]
    words: Words | None
    prefixed: bool
    whole_words: bool

    def bytes_of(self, piece: str) -> bytes:
        """What a piece that is no control stands for. Raises KeyError outside the byte alphabet."""
        if piece in self.added:
            return piece.encode()
        if self.words:
            return bytes(BYTE_OF_CHARACTER[character] for character in piece)
        if piece in FALLBACK:
            return bytes([FALLBACK[piece]])
        return piece.replace(SPACE, " ").encode()


FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _AddedToken(_Section):
    id: int
    content: str = Field(min_length=1)
    special: bool
    # The next three would make a token take or refuse its neighbours: text would be lost.
    lstrip: Literal[False] = False
    rstrip: Literal[False] = False
    single_word: Literal[False] = False


class _Model(_Section):
    type: Literal["BPE"] = "BPE"
    vocab: dict[str, Any]  # `_pieces` finds what is no id; a list of all errors would be huge
    merges: Annotated[list[str | tuple[str, str]], FailFast()]
    byte_fallback: bool = False
    ignore_merges: bool = False
    dropout: None = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None


class _File(_Section):
    model: _Model
    added_tokens: Annotated[list[_AddedToken], FailFast()] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


def read(content: bytes, path: str) -> Bpe:
    """Reads the bytes of a tokenizer.json.

    What is done with ids (post_processor, truncation, padding, decoder) is not read: `encode` adds
    BOS and EOS when asked, and `decode` is its inverse.

    Raises TokenizerError for what is damaged, or not one of LLaMA's kinds.
    """
    # In memory a list or an entry takes far more than its two bytes in the file.
    if sum(map(content.count, (b"[", b"{", b":"))) > MAX_PARTS:
        raise TokenizerError(f"{path}: more than {MAX_PARTS:,} entries, too many for a tokenizer")
    try:
        file = _File.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        raise TokenizerError(f"{path}: {place or 'the file'}: {first['msg'][:200]}") from error
    byte_level = not file.model.byte_fallback
    words = _words(file, path) if byte_level else None
    bpe = Bpe(
        pieces=_pieces(file, path),
        merges=pairs(file.model.merges, path),
        controls={token.content: token.id for token in file.added_tokens if token.special},
        added={token.content: token.id for token in file.added_tokens if not token.special},
        words=words,
        prefixed=not byte_level and _is_prefixed(file, path),
        whole_words=file.model.ignore_merges,
    )
    check(bpe, path)
    return bpe


def _steps(section: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The steps of a part of the pipeline, without the settings that do not change ids."""
    if section is None:
        return []
    steps = section.get(key) if section.get("type") == "Sequence" else [section]
    if not isinstance(steps, list):
        return [section]
    return [
        {k: v for k, v in step.items() if k != "trim_offsets"} if isinstance(step, dict) else step
        for step in steps
    ]


def _words(file: _File, path: str) -> Words:
    steps = _steps(file.pre_tokenizer, "pretokenizers")
    found = next((name for name, known in WORDS.items() if steps == known), None)
    if found is None or file.normalizer is not None:
        raise TokenizerError(
            f"{path}: it cuts text in a way that is not LLaMA's (normalizer "
            f"{_short(file.normalizer)}, pre_tokenizer {_short(file.pre_tokenizer)}); byte-level "
            f"files must split as one of {', '.join(WORDS)}"
        )
    return found


def _is_prefixed(file: _File, path: str) -> bool:
    """Whether a space is put before the text: by the normalizer, or by a Metaspace step."""
    normal = _steps(file.normalizer, "normalizers")
    cuts = _steps(file.pre_tokenizer, "pretokenizers")
    if normal in ([_PREPEND, _REPLACE], [_REPLACE]) and not cuts:
        return _PREPEND in normal
    metaspace = cuts[0] if len(cuts) == 1 and isinstance(cuts[0], dict) and not normal else {}
    scheme = metaspace.get("prepend_scheme")
    whole = metaspace.get("replacement") == SPACE and metaspace.get("split") is False
    if metaspace.get("type") == "Metaspace" and whole and scheme in ("first", "always", "never"):
        return scheme != "never"
    raise TokenizerError(
        f"{path}: it cuts text in a way that is not LLaMA's (normalizer {_short(file.normalizer)}, "
        f"pre_tokenizer {_short(file.pre_tokenizer)})"
    )


def _short(value: Any) -> str:
    return f"{value!r:.120}"


def _pieces(file: _File, path: str) -> list[str]:
    """Spellings by id: those of the vocabulary and of the added tokens."""
    ids = dict(file.model.vocab)
    for token in file.added_tokens:
        if ids.setdefault(token.content, token.id) != token.id:
            raise TokenizerError(
                f"{path}: {token.content[:40]!r} has the ids {ids[token.content]} and {token.id}"
            )
    strange = next((piece for piece, id in ids.items() if type(id) is not int), None)
    if strange is not None:
        raise TokenizerError(f"{path}: the id of {strange[:40]!r} is {ids[strange]!r:.40}")
    pieces = sorted(ids, key=ids.__getitem__)
    wrong = next((id for id, piece in enumerate(pieces) if ids[piece] != id), None)
    if wrong is not None:
        raise TokenizerError(f"{path}: ids count from 0; {wrong} is missing or stands twice")
    return pieces


def pairs(merges: Iterable[str | tuple[str, str]], path: str) -> list[tuple[str, str]]:
    """Pairs; older files write them with a space between, which is then in neither."""
    found = []
    for number, merge in enumerate(merges):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case (str(left), str(right)) if left and right:
                found.append((left, right))
            case _:
                raise TokenizerError(f"{path}: merge {number} is no pair: {merge!r:.80}")
    return found


def check(bpe: Bpe, path: str) -> None:
    """Raises TokenizerError for what cannot write every text, or would yield controls from one."""
    pieces = set(bpe.pieces) - bpe.controls.keys()
    needed = CHARACTER_OF_BYTE if bpe.words else FALLBACK
    missing = sum(byte not in pieces for byte in needed)
    if missing:
        raise TokenizerError(
            f"{path}: lacks {missing} of the 256 bytes, so it cannot write every text"
        )
    if not bpe.words and SPACE not in pieces:  # spelt in bytes, a space would come back as its sign
        raise TokenizerError(f"{path}: has no piece for the space; it cannot write every text")
    if bpe.whole_words and not bpe.words:
        raise TokenizerError(f"{path}: ignore_merges has no meaning with byte_fallback")
    # Text must not yield a control, nor a byte by its name.
    closed = set() if bpe.words else set(FALLBACK)
    made = pieces - closed - bpe.added.keys()
    for number, (left, right) in enumerate(bpe.merges):
        if left not in made or right not in made or left + right not in made:
            raise TokenizerError(
                f"{path}: merge {number}, {left[:40]!r} and {right[:40]!r}, is not of pieces"
            )
    if bpe.words:
        strange = next((p for p in made if not BYTE_OF_CHARACTER.keys() >= set(p)), None)
        if strange is not None:
            raise TokenizerError(f"{path}: the piece {strange[:40]!r} is not spelt in bytes")


def write(bpe: Bpe, bos: str | None = None) -> bytes:
    """The bytes of a tokenizer.json that says the same; its users will put `bos` before a text."""
    added = {token: id for names in (bpe.controls, bpe.added) for token, id in names.items()}
    # What stands at the end and is no piece of its own is not of the vocabulary.
    size = len(bpe.pieces)
    while size and bpe.pieces[size - 1] in added:
        size -= 1
    if bpe.words:
        normalizer: dict[str, Any] | None = None
        pre_tokenizer: dict[str, Any] | None = {
            "type": "Sequence",
            "pretokenizers": [
                {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
                for step in WORDS[bpe.words]
            ],
        }
        decoder: dict[str, Any] = {**_BYTE_LEVEL, "trim_offsets": True, "use_regex": True}
    else:
        prefix = [_PREPEND] if bpe.prefixed else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if bpe.prefixed else []
        normalizer = {"type": "Sequence", "normalizers": [*prefix, _REPLACE]}
        pre_tokenizer = None
        replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
        decoder = {"type": "Sequence", "decoders": steps}
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in bpe.controls,
            }
            for token, id in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _before_texts(bos, bpe.controls[bos]) if bos else None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": not bpe.words,
            "byte_fallback": not bpe.words,
            "ignore_merges": bpe.whole_words,
            "vocab": {piece: id for id, piece in enumerate(bpe.pieces[:size])},
            "merges": bpe.merges,
        },
    }
    return json.dumps(file, ensure_ascii=False, separators=(",", ":")).encode()


def _before_texts(token: str, id: int) -> dict[str, Any]:
    """The step that puts a control token before each text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }
