"""`generate`: prompts from flags or a JSONL file, answers to the screen or a JSONL file.

Answers are kept in a file of their own as they come, so a stopped run continues: the same command
does what is left, and then writes all answers in order, at once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama_jax.api import LanguageModel, load
from llama_jax.config import ConfigError, Schema, parse
from llama_jax.data.shards import write_atomic
from llama_jax.generate.request import TokenReport
from llama_jax.generate.settings import GenerateConfig, SamplingConfig
from llama_jax.generate.text import Completion, Prompt
from llama_jax.tokenizer import DialogError, Tokenizer, TokenizerError
from llama_jax.tokenizer.chat import Message

Ask = Callable[..., list[list[Completion]]]  # LanguageModel.answer, but for the settings


class ChatMessage(Schema):
    """One message of a dialog."""

    role: str
    """system, user or assistant."""
    content: str
    """What it says."""


class Line(SamplingConfig):
    """A line of a prompts file: what to continue, and settings of its own."""

    prompt: str | None = None
    """A text."""
    messages: tuple[ChatMessage, ...] | None = None
    """A dialog that ends with the user's turn."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('expected "prompt" (a text) or "messages" (a dialog), one of them')
        return self


def generate_command(config: GenerateConfig) -> int:
    """Answers all prompts; returns the exit code.

    Raises ConfigError naming file and line of a prompt that cannot be used.
    """
    origins, lines = zip(*_read(config), strict=True)
    out = Answers(Path(config.out), config) if config.out is not None else None
    if out and out.is_complete:
        print(f"{config.out} is complete already: {len(lines)} answers with the same settings")
        return 0
    answers = len(lines) * max(line.n for line in lines)
    rows = min(config.batch_size, answers)
    draft = None
    if config.draft is not None:
        rows = max(rows, 2)  # the model verifies several tokens of a row at a time
        draft = load(config.draft, config.dtype, config.mesh, rows=rows)
    model = load(config.checkpoint, config.dtype, config.mesh, weights=config.weights, rows=rows)
    prompts = [
        _prompt(model, line, number, origin, config)
        for number, (origin, line) in enumerate(zip(origins, lines, strict=True))
    ]
    ask = partial(model.answer, settings=config, draft=draft)
    if out:
        return _to_file(ask, model.tokenizer, prompts, config, out)
    return _to_screen(ask, lines, prompts, config)


def _read(config: GenerateConfig) -> Iterator[tuple[str, Line]]:
    """What to answer, with all settings; each after the file and the line that it comes from."""
    defaults = config.sampling.model_dump(exclude_unset=True)
    if config.prompts_file is None:
        for text in config.prompts:
            yield "--prompts", Line(**{**defaults, "prompt": text})
        return
    path = Path(config.prompts_file)
    count = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    count += 1
                    origin = f"{path}, line {number}"
                    yield origin, _parse(text, defaults, origin)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not count:
        raise ConfigError(f"{path}: holds no prompts")


def _parse(text: str, defaults: dict[str, Any], origin: str) -> Line:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f'{origin}: expected {{"prompt": "a text"}} or {{"messages": [...]}}')
    return parse(Line, {**defaults, **values}, origin)


def _prompt(
    model: LanguageModel, line: Line, number: int, origin: str, config: GenerateConfig
) -> Prompt:
    """The line for the engine. A seed of its own decides its draws wherever the line stands."""
    index = 0 if "seed" in line.model_fields_set - config.sampling.model_fields_set else number
    try:
        if line.prompt is not None:
            ids, ends = model.tokenizer.encode(line.prompt, bos=True), model.end_ids
        else:
            messages: list[Message] = [m.model_dump() for m in line.messages or ()]
            ids = model.tokenizer.encode_chat(messages, config.chat_format)
            ends = model.chat_end_ids
    except (DialogError, TokenizerError) as error:
        raise ConfigError(f"{origin}: {error}") from error
    return Prompt(ids, line, ends, index)


def _to_file(
    ask: Ask, tokenizer: Tokenizer, prompts: list[Prompt], config: GenerateConfig, out: "Answers"
) -> int:
    began, tokens = time.monotonic(), 0
    todo = [i for i in range(len(prompts)) if i not in out.done]
    if out.done:
        print(f"{len(out.done)} of {len(prompts)} prompts have been answered before")
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with out, Progress(*columns) as bar:
        task = bar.add_task("", total=len(prompts), completed=len(out.done), rate=0)

        def keep(number: int, completions: list[Completion]) -> None:
            nonlocal tokens
            out.add(_answer_line(todo[number], completions, tokenizer))
            tokens += sum(len(completion.tokens) for completion in completions)
            bar.update(task, advance=1, rate=tokens / (time.monotonic() - began))

        ask([prompts[i] for i in todo], on_done=keep)
        out.finish(len(prompts))
    seconds = time.monotonic() - began
    print(f"{len(prompts)} answers in {config.out} ({tokens:,} tokens, {tokens / seconds:,.0f}/s)")
    return 0


def _to_screen(
    ask: Ask, lines: Sequence[Line], prompts: list[Prompt], config: GenerateConfig
) -> int:
    console = Console(highlight=False, soft_wrap=True)

    def show(text: str) -> None:
        console.print(text, end="", markup=False)

    streams = config.stream and len(lines) == 1 and lines[0].n == 1
    if streams and lines[0].prompt is not None:
        console.print(lines[0].prompt, end="", markup=False, style="bold")
    groups = ask(prompts, on_text=(lambda _i, _k, text: show(text)) if streams else None)
    for line, completions in zip(lines, groups, strict=True):
        for completion in completions:
            if not streams:
                console.rule()
                if line.prompt is not None:
                    console.print(line.prompt, end="", markup=False, style="bold")
                show(completion.text)
            console.print(f"\n({len(completion.tokens)} tokens, {completion.finish_reason})")
    return 0


def _answer_line(index: int, completions: list[Completion], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "index": index,
        "text": completions[0].text,
        "completions": [_completion(completion, tokenizer) for completion in completions],
    }


def _completion(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    result = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.tokens),
    }
    if completion.logprobs is None:
        return result

    def named(token: int, logprob: float) -> dict[str, Any]:
        spelling = tokenizer.spelling(token).decode("utf-8", "replace")
        return {"id": token, "token": spelling, "logprob": logprob}

    def described(token: int, report: TokenReport) -> dict[str, Any]:
        likeliest = [named(other, logprob) for other, logprob in report.likeliest]
        return {**named(token, report.logprob), "likeliest": likeliest}

    pairs = zip(completion.tokens, completion.logprobs, strict=True)
    return {**result, "logprobs": [described(token, report) for token, report in pairs]}


class Answers:
    """A JSONL of answers that is complete or absent, and what has been answered of it so far.

    Beside it lie, while it is made, the answers in the order they came (.NAME.partial), and for
    good the settings (NAME.config.json), by which the same run knows itself.
    """

    def __init__(self, path: Path, config: GenerateConfig):
        """Raises ConfigError where answers to other prompts, or with other settings, lie there."""
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._settings = path.with_name(f"{path.name}.config.json")
        identity = json.dumps(_identity(config), indent=1, ensure_ascii=False)
        same = self._settings.exists() and self._settings.read_text("utf-8") == identity
        for kept in (path, self._partial):
            if not same and kept.exists() and kept.stat().st_size:
                raise ConfigError(
                    f"{kept} exists and was made with other prompts or settings; give another "
                    "name, or remove it"
                )
        self.is_complete = path.exists()
        self.done: dict[int, tuple[int, int]] = {}  # number -> where its line begins and ends
        if self.is_complete:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not same:
            write_atomic(self._settings, identity.encode())
        self._file = self._partial.open("ab+")
        self._file.truncate(self._read())

    def _read(self) -> int:
        """Notes the answers of a stopped run; the length up to the last whole line."""
        self._file.seek(0)
        position = 0
        for line in self._file:
            try:
                number = json.loads(line)["index"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self.done[number] = position, position + len(line)
            position += len(line)
        return position

    def add(self, line: dict[str, Any]) -> None:
        """Keeps an answer."""
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        start = self._file.seek(0, 2)
        self._file.write(content)
        self._file.flush()
        self.done[line["index"]] = start, start + len(content)

    def finish(self, count: int) -> None:
        """Writes the answers in order and removes what was kept on the way."""

        def ordered() -> Iterator[bytes]:
            for number in range(count):
                start, end = self.done[number]
                self._file.seek(start)
                yield self._file.read(end - start)

        write_atomic(self._path, ordered())
        self._partial.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _identity(config: GenerateConfig) -> dict[str, Any]:
    """What decides the answers: the settings, and the content of the prompts file."""
    values = config.model_dump(mode="json", exclude={"out", "stream"})
    if config.prompts_file is not None:
        values["prompts_sha256"] = hashlib.sha256(
            Path(config.prompts_file).read_bytes()
        ).hexdigest()
    return values
