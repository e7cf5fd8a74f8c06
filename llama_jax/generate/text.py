"""Text in, text out: prompts are encoded, answers decoded as they come, stop strings cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_jax.generate.batch import answer
from llama_jax.generate.request import Answer, FinishReason, Request, TokenReport
from llama_jax.generate.settings import SamplingConfig
from llama_jax.generate.speculative import Draft
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params
from llama_jax.tokenizer import StreamDecoder, Tokenizer

# (number of the prompt, which of its answers, new text).
OnText = Callable[[int, int, str], None]
# (number of the prompt, its completions), as soon as all of them have ended.
OnDone = Callable[[int, "list[Completion]"], None]


@dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    tokens: without the end id; with a stop string, up to the token that completed it.
    text: of these tokens, cut before the stop string. Prompt and text joined read as one.
    finish_reason: "eos", "stop" (a stop string) or "length" (max_new_tokens or max_length).
    logprobs: of each token, where they were asked for.
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenReport] | None = None


@dataclass(frozen=True)
class Prompt:
    """A text, which gets a BOS in front, or token ids, taken as they are; and how to continue it.

    ends: ids that end an answer.
    index: as in request.Request.
    """

    content: str | Sequence[int]
    sampling: SamplingConfig
    ends: Sequence[int] = ()
    index: int = 0


def generate(
    model: Llama,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    on_text: OnText | None = None,
    on_done: OnDone | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    cache_dtype: str | None = None,
    draft: Draft | None = None,
) -> list[list[Completion]]:
    """Continues every prompt: for each, in order, as many completions as its sampling.n says.

    Args:
        model, params, max_length, batch_size, cache_dtype, draft: as for batch.answer.
        tokenizer: turns texts into ids and back.
        prompts: each with its settings.
        on_text: sees text as it comes. It never gets half a character, nor text that a stop string
            cuts later; joined, it is the completion's text.
        on_done: gets the completions of a prompt when the last of them has ended.

    Raises:
        ValueError: as batch.answer; also for a text that cannot be encoded or a tokenizer that has
            more ids than the model.
        FloatingPointError: logits are not finite.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    requests = [request_of(tokenizer, prompt) for prompt in prompts]
    writers = [
        [_Writer(tokenizer, request, _show(on_text, i, k)) for k in range(request.sampling.n)]
        for i, request in enumerate(requests)
    ]
    watched = on_text is not None or any(request.sampling.stop for request in requests)

    def watch(number: int, answer: int, tokens: list[int], is_last: bool) -> int | None:
        return writers[number][answer].feed(tokens, is_last)

    completions: list[list[Completion]] = [[] for _ in requests]

    def finish(number: int, answers: list[Answer]) -> None:
        for writer, found in zip(writers[number], answers, strict=True):
            if not watched:
                writer.feed(found.tokens, is_last=True)
            completions[number].append(
                Completion(found.tokens, writer.text, found.finish_reason, found.logprobs)
            )
        if on_done:
            on_done(number, completions[number])

    answer(
        model,
        params,
        requests,
        n_ids=tokenizer.vocab_size,
        max_length=max_length,
        batch_size=batch_size,
        cache_dtype=cache_dtype,
        draft=draft,
        watch=watch if watched else None,
        on_done=finish,
    )
    return completions


def request_of(tokenizer: Tokenizer, prompt: Prompt) -> Request:
    """The prompt as token ids."""
    content = prompt.content
    tokens = tokenizer.encode(content, bos=True) if isinstance(content, str) else content
    return Request(tokens, prompt.sampling, prompt.ends, prompt.index)


def _show(on_text: OnText | None, number: int, answer: int) -> Callable[[str], None] | None:
    return (lambda text: on_text(number, answer, text)) if on_text else None


class StopSearch:
    """Looks for stop strings in text that comes in parts, wherever the parts are cut.

    The stop string that ends first wins; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]):
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

    def __init__(
        self, tokenizer: Tokenizer, request: Request, on_text: Callable[[str], None] | None
    ):
        self.text = ""
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
                self._on_text(text)
