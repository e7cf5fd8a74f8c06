"""Tokenizers of the file tokenizer.json, cut by the Hugging Face `tokenizers` library.

The library gets pieces, merges and one of the known pipelines, never the file itself. As with
SentencePiece, a space put before a text is taken away by `decode`, and a U+2581 in a text with byte
fallback is spelt in bytes: so every text comes back. (The library's Metaspace leaves the space out
before a text that begins with one; that text would not come back.)
"""

import re
from dataclasses import replace

from llama_jax.config import ConfigError
from llama_jax.tokenizer import tiktoken, tokenizer_json
from llama_jax.tokenizer.interface import Tokenizer, TokenizerError

# A tokenizer.json does not say which of its tokens begin and end a text: their names do.
_BEGINS = (tiktoken.BOS, "<s>", "<|endoftext|>")
_ENDS = (*tiktoken.ANSWER_ENDS, "</s>", "<|endoftext|>")


class HuggingFace(Tokenizer):
    """A tokenizer.json of LLaMA's kinds: byte-level, or with byte fallback."""

    file_name = tokenizer_json.NAME

    def __init__(self, model: bytes, path: str):
        """Reads the bytes of a tokenizer.json; `path` names it in errors (TokenizerError)."""
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                "A tokenizer.json needs the tokenizers library: pip install 'llama-jax[convert]'."
            ) from error
        bpe = tokenizer_json.read(model, path)
        bos = next((bpe.controls[name] for name in _BEGINS if name in bpe.controls), None)
        eos = tuple(bpe.controls[name] for name in _ENDS if name in bpe.controls)
        if bos is None or not eos:
            raise TokenizerError(
                f"{path}: has no special tokens that begin and end a text ({', '.join(_BEGINS)}; "
                f"{', '.join(_ENDS)})"
            )
        apart = bpe.controls.keys() | bpe.added.keys()
        empty = replace(bpe, pieces=[], merges=[], controls={}, added={}, prefixed=False)
        self._library = tokenizers.Tokenizer.from_str(tokenizer_json.write(empty).decode())
        self._library.model = tokenizers.models.BPE(
            vocab={piece: id for id, piece in enumerate(bpe.pieces) if piece not in apart},
            merges=bpe.merges,
            byte_fallback=not bpe.words,
            ignore_merges=bpe.whole_words,
        )
        self._prefix = " " if bpe.prefixed else ""
        # Texts with ids of their own, found before the rest is cut.
        self._fixed = {text: [id] for text, id in bpe.added.items()}
        if not bpe.words:
            ids = {piece: id for id, piece in enumerate(bpe.pieces)}
            sign = tokenizer_json.SPACE.encode()
            self._fixed[tokenizer_json.SPACE] = [ids[f"<0x{byte:02X}>"] for byte in sign]
        longest_first = sorted(self._fixed, key=len, reverse=True)
        self._units = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

        spellings = [b"" if p in bpe.controls else bpe.bytes_of(p) for p in bpe.pieces]
        at_start = spellings
        if bpe.prefixed:
            at_start = [
                text if piece in tokenizer_json.FALLBACK else text.removeprefix(b" ")
                for text, piece in zip(spellings, bpe.pieces, strict=True)
            ]
        super().__init__(model, path, spellings, bpe.controls, bos, eos, at_start)

    def _cut(self, text: str) -> list[int]:
        ids: list[int] = []
        for unit in self._units.split(self._prefix + text) if self._fixed else [text]:
            if unit in self._fixed:
                ids += self._fixed[unit]
            elif unit:
                ids += self._library.encode(unit, add_special_tokens=False).ids
        return ids
