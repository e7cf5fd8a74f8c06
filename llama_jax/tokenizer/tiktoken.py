"""tiktoken tokenizers: Llama 3 (Herd paper, section 3.2; tokenizer.py of meta-llama/llama-models).

Byte-pair encoding over bytes: a text is split into words by a regular expression, and the bytes of
each are merged, lowest rank first. The file has a line "base64 rank" for each token; behind them
come 256 control tokens, which no text yields. Nothing is put before a text: each comes back.
"""

import base64
import binascii
import re
from collections.abc import Iterator

from llama_jax.config import ConfigError
from llama_jax.tokenizer.interface import Tokenizer, TokenizerError

# Digits go in groups of up to three.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
ANSWER_ENDS = (EOS, "<|eom_id|>", "<|eot_id|>")  # end of text, of a message, of a turn

# Places among the 256 control tokens, as of Llama 3.1. The file is that of Llama 3.0, where the
# third, the ninth and the eleventh of these are reserved tokens, which no text of the model holds.
_NAMED = {
    0: BOS,
    1: EOS,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_RESERVED = [place for place in range(256) if place not in _NAMED]
CONTROLS = [
    _NAMED.get(place) or f"<|reserved_special_token_{_RESERVED.index(place)}|>"
    for place in range(256)
]

# The reference's guards against words that overflow the library's stack; they decide ids.
_MAX_CALL = 400_000  # characters
_MAX_RUN = 25_000  # characters that are all white space, or all not
# Runs that are short enough, then the beginning of one that is not. Possessive: no backtracking.
_PART = re.compile(
    rf"(?:\s{{1,{_MAX_RUN}}}+(?!\s)|\S{{1,{_MAX_RUN}}}+(?!\S))*+(?:\s{{{_MAX_RUN}}}|\S{{{_MAX_RUN}}})?+"
)
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (0|[1-9][0-9]{0,8})")


class Tiktoken(Tokenizer):
    """A tiktoken file with the words and control tokens of Llama 3."""

    def __init__(self, model: bytes, path: str):
        """Reads the bytes of a tokenizer.model; `path` names it in errors (TokenizerError)."""
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(
                "Llama 3's tokenizer.model needs the tiktoken library: "
                "pip install 'llama-jax[convert]'."
            ) from error
        tokens = read(model, path)
        controls = {name: len(tokens) + place for place, name in enumerate(CONTROLS)}
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._library = tiktoken.Encoding(
            "llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=controls
        )
        super().__init__(
            model,
            path,
            [*tokens, *[b""] * len(controls)],
            controls,
            bos_id=controls[BOS],
            eos_ids=tuple(controls[name] for name in ANSWER_ENDS),
        )

    def _cut(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in parts(text):
            ids += self._library.encode_ordinary(part)
        return ids


def read(model: bytes, path: str) -> list[bytes]:
    """The tokens of a tiktoken file in the order of their ranks, which count from 0.

    Raises TokenizerError for a line that is not "base64 rank", for ranks or tokens that stand twice
    or are missing, and where one of the 256 bytes is.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(model.removesuffix(b"\n").split(b"\n"), start=1):
        fields = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(fields[1], validate=True) if fields else b""
        except binascii.Error:
            token = b""
        if fields is None or not token:
            raise TokenizerError(
                f"{path}, line {number}: expected 'base64 rank', found {line[:40]!r}; the file is "
                "damaged, download it again"
            )
        if token in ranks:
            raise TokenizerError(f"{path}, line {number}: the token {token[:40]!r} stands twice")
        ranks[token] = int(fields[2])
    missing = {bytes([value]) for value in range(256)} - ranks.keys()
    if missing:
        raise TokenizerError(
            f"{path}: lacks {len(missing)} of the 256 bytes, so it cannot write every text"
        )
    tokens = sorted(ranks, key=ranks.__getitem__)
    wrong = next((rank for rank, token in enumerate(tokens) if ranks[token] != rank), None)
    if wrong is not None:
        raise TokenizerError(f"{path}: ranks count from 0; {wrong} is missing or stands twice")
    return tokens


def parts(text: str) -> Iterator[str]:
    """The parts of a text that the library gets, one call each."""
    for start in range(0, len(text), _MAX_CALL):
        yield from _PART.findall(text[start : start + _MAX_CALL])
