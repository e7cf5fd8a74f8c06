"""Text in, text out: prompts are encoded, answers decoded as they come, stop strings cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.config import SamplingConfig
from llama_jax.generate.batch import FinishReason, Request, answer
from llama_jax.model.llama import Llama, Params
from llama_jax.tokenizer import StreamDecoder, Tokenizer

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    tokens: without the end id; with a stop string, up to the token that completed it.
    text: of these tokens, cut before the stop string. Prompt and text joined read as one.
    finish_reason: "eos", "stop" (a stop string) or "length" (max_new_tokens or max_length).
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason


def generate(
    model: Llama,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingConfig,
    ends: Sequence[int] | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    on_text: OnText | None = None,
) -> list[Completion]:
    """Continues every prompt; the completions are in the order of the prompts.

    Args:
        model, params, max_length, batch_size: as for batch.answer.
        tokenizer: turns texts into ids and back.
        prompts: texts, which get a BOS in front, or token ids, taken as they are.
        sampling: for all prompts; equal prompts draw different answers, by their numbers.
        ends: ids that end an answer; by default the tokenizer's.
        on_text: called with (number of the prompt, new text) as text comes. It never gets half a
            character, nor text that a stop string cuts later; joined, it is the completion's text.

    Raises:
        ValueError: as batch.answer; also for an empty stop string, a text that cannot be encoded or
            a tokenizer that has more ids than the model.
        FloatingPointError: logits are not finite.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a text: give a list of them")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    ids = [tokenizer.encode(p, bos=True) if isinstance(p, str) else p for p in prompts]
    requests = [Request(tokens, sampling, index) for index, tokens in enumerate(ids)]
    writers = [_Writer(tokenizer, request, on_text) for request in requests]

    def watch(number: int, tokens: list[int], is_last: bool) -> int | None:
        return writers[number].feed(tokens, is_last)

    watched = on_text is not None or bool(sampling.stop)
    answers = answer(
        model,
        params,
        requests,
        tokenizer.eos_ids if ends is None else ends,
        max_length,
        batch_size,
        watch if watched else None,
    )
    if not watched:
        for writer, found in zip(writers, answers, strict=True):
            writer.feed(found.tokens, is_last=True)
    return [
        Completion(found.tokens, writer.text, found.finish_reason)
        for writer, found in zip(writers, answers, strict=True)
    ]


class StopSearch:
    """Looks for stop strings in text that comes in parts, wherever the parts are cut.

    The stop string that ends first wins; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]):
        """Raises ValueError for an empty stop string, which would end everything at once."""
        if "" in stops:
            raise ValueError("a stop string is empty: remove it, or give it characters")
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is certain to precede any stop string, whether one has been found).

        What may be the beginning of a stop string is held back until more text decides.
        """
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        holds = range(min(self._longest - 1, len(text)), 0, -1)
        hold = next((n for n in holds if self._may_begin(text[-n:])), 0)
        cut = len(text) - hold
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """What was held back, once it is certain that no text follows."""
        text, self._held = self._held, ""
        return text

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class _Writer:
    """Turns the tokens of one answer into text as they come, and looks for the stop strings."""

    def __init__(self, tokenizer: Tokenizer, request: Request, on_text: OnText | None):
        self.text = ""
        self._number = request.index
        self._on_text = on_text
        self._search = StopSearch(request.sampling.stop)
        self._decoder = StreamDecoder(tokenizer)
        self._prompt: Sequence[int] | None = request.tokens

    def feed(self, tokens: Sequence[int], is_last: bool) -> int | None:
        """How many of the tokens the answer keeps if a stop string ends it, else None."""
        if self._prompt is not None:
            # The decoder must know what came before: only at the start of a text is a space that
            # stands for nothing.
            self._decoder.feed(self._prompt)
            self._prompt = None
        for count, token in enumerate(tokens, start=1):
            if self._found(self._decoder.feed([token])):
                return count
        if is_last:
            if self._found(self._decoder.finish()):
                return len(tokens)
            self._write(self._search.finish())
        return None

    def _found(self, text: str) -> bool:
        """Writes what is certain; whether a stop string has ended the answer."""
        text, found = self._search.feed(text)
        self._write(text)
        return found

    def _write(self, text: str) -> None:
        if text:
            self.text += text
            if self._on_text:
                self._on_text(self._number, text)
