"""What every kind of tokenizer can do, and text from ids as they come."""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from llama_jax.tokenizer import chat


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or text or ids that it cannot take."""


class Tokenizer(ABC):
    """Text to ids and back, whatever the kind of its file. Picklable.

    model: the file itself, which prepared corpora and checkpoints carry as `file_name`.
    fingerprint: its SHA-256 in hex.
    path: names it in errors.
    vocab_size: ids are 0 to vocab_size - 1.
    bos_id: begins a text.
    eos_ids: end a text or an answer; the first is the one that `encode` writes.
    controls: name -> id of the tokens that stand for no text. Text never yields them.
    lossless: False for a model that rewrites text before it cuts it (Unicode normalisation, not
        LLaMA's): decoding then gives the rewritten text.
    """

    file_name: ClassVar[str] = "tokenizer.model"
    lossless = True

    def __init__(
        self,
        model: bytes,
        path: str,
        spellings: Sequence[bytes],
        controls: Mapping[str, int],
        bos_id: int,
        eos_ids: tuple[int, ...],
        spellings_at_start: Sequence[bytes] | None = None,
    ):
        self.model = model
        self.path = path
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = len(spellings)
        self.controls = dict(controls)
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self._spellings = spellings
        self._spellings_at_start = spellings_at_start or spellings

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, str]]:
        return type(self), (self.model, self.path)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of the text, between BOS and EOS if asked. Empty text has no ids.

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
        if text:
            ids += self._cut(text)
        if eos:
            ids.append(self.eos_ids[0])
        return ids

    def encode_chat(
        self, messages: Sequence[chat.Message], format: chat.Format | None = None
    ) -> list[int]:
        """Ids of a dialog up to where the answer begins: see `chat.encode_chat`."""
        return chat.encode_chat(self, messages, format)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; controls are invisible, bytes that are not UTF-8 become U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """
        stream = StreamDecoder(self)
        return stream.feed(ids) + stream.finish()

    def spelling(self, token: int, at_start: bool = False) -> bytes:
        """UTF-8 of one id; `at_start`: without the space that `encode` puts before a text, if any.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(
                f"token id {token} is outside the vocabulary of {self.vocab_size} ({self.path})"
            )
        return self._spellings_at_start[token] if at_start else self._spellings[token]

    @abstractmethod
    def _cut(self, text: str) -> list[int]:
        """Ids of a text that is not empty and has a UTF-8."""


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
