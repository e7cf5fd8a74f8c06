"""`chat`: a conversation with a model in the terminal, or over a pipe, a message a line."""

import contextlib
import dataclasses
import re
import select
import sys
from collections.abc import Callable, Iterator

from llama_jax.api import LanguageModel, load
from llama_jax.chat.settings import ChatConfig
from llama_jax.config import ConfigError
from llama_jax.tokenizer import DialogError, TokenizerError
from llama_jax.tokenizer.chat import Message

HELP = """\
/system TEXT  what the model is told before the conversation; without TEXT, nothing
/undo         takes back the last question and its answer
/reset        starts anew; the system text stays
/help         this
/quit         leaves, as Ctrl-D does
Ctrl-C stops an answer. Lines pasted together are one message."""
PROMPT = "> "
_PASTE_SECONDS = 0.05  # lines that follow each other faster than this were not typed
# A model may not move the cursor, retitle the window or ring the bell.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Messages = tuple[Message, ...]


def chat(config: ChatConfig) -> int:
    """Reads messages and streams answers until the input ends or /quit; returns the exit code.

    Raises ConfigError where the tokenizer lacks what the format needs.
    """
    model = load(config.checkpoint, config.dtype, config.mesh, rows=1)
    model = dataclasses.replace(model, end_ids=model.chat_end_ids)
    try:
        model.tokenizer.encode_chat([{"role": "user", "content": ""}], config.format)
    except DialogError as error:
        raise ConfigError(str(error)) from error
    terminal = sys.stdin.isatty()
    if terminal:
        print("Type a message; /help lists the commands.")
    converse(model, config, read_messages(terminal), terminal)
    return 0


def converse(
    model: LanguageModel, config: ChatConfig, inputs: Iterator[str], terminal: bool
) -> Messages:
    """Answers each message, obeys each command; returns the dialog."""
    messages = with_system((), config.system)

    def show(text: str) -> None:
        print(_CONTROL.sub("\ufffd", text) if terminal else text, end="", flush=True)

    for line in inputs:
        if line.strip() == "/quit":
            break
        if line.startswith("/"):
            messages, reply = obey(messages, line)
            print(reply)
        elif line.strip():
            messages, remark = answer(model, config, messages, line, show)
            print(f"\n({remark})" if remark else "", flush=True)
    return messages


def answer(
    model: LanguageModel,
    config: ChatConfig,
    messages: Messages,
    question: str,
    show: Callable[[str], None],
) -> tuple[Messages, str]:
    """The dialog with the question and its answer, and a remark where something was cut.

    A question that cannot be asked leaves the dialog as it was; the remark says why. Nothing is
    ever left out of a dialog to make it fit.
    """
    asked = (*messages, {"role": "user", "content": question})
    try:
        ids = model.tokenizer.encode_chat(asked, config.format)
    except (DialogError, TokenizerError) as error:
        return messages, f"not asked: {error}"
    if len(ids) >= config.max_length:
        return messages, (
            f"not asked: with it the conversation has {len(ids):,} tokens, and max_length is "
            f"{config.max_length:,}; /reset starts anew, /undo takes back the last exchange"
        )
    parts: list[str] = []

    def on_text(_: int, text: str) -> None:
        parts.append(text)
        show(text)

    remark = ""
    try:
        (completion,) = model.generate(
            [ids], config.sampling, max_length=config.max_length, on_text=on_text
        )
    except KeyboardInterrupt:
        if not parts:
            return messages, "stopped before the answer began; the question is taken back"
        remark = "stopped"
    else:
        if completion.finish_reason == "length":
            full = len(ids) + len(completion.tokens) >= config.max_length
            remark = (
                f"cut: the context of {config.max_length:,} tokens is full; /reset starts anew, "
                "/undo takes back the last exchange"
                if full
                else f"cut after {len(completion.tokens):,} tokens (sampling.max_new_tokens)"
            )
    return (*asked, {"role": "assistant", "content": "".join(parts)}), remark


def obey(messages: Messages, line: str) -> tuple[Messages, str]:
    """The dialog after a command, and what to tell the user."""
    command, _, text = line.partition(" ")
    match command.strip():
        case "/help":
            return messages, HELP
        case "/reset":
            return messages[: _system_size(messages)], "a new conversation"
        case "/system":
            told = "the system text is set" if text.strip() else "there is no system text"
            return with_system(messages, text.strip()), told
        case "/undo" if len(messages) > _system_size(messages):
            return messages[:-2], "the last question and its answer are taken back"
        case "/undo":
            return messages, "there is nothing to take back"
    return messages, (
        f"{command} is no command; /help lists them. To send it as a message, put a space before it"
    )


def with_system(messages: Messages, text: str) -> Messages:
    """The dialog with this system text instead of its own; none for an empty text."""
    system = ({"role": "system", "content": text},) if text else ()
    return (*system, *messages[_system_size(messages) :])


def _system_size(messages: Messages) -> int:
    return int(bool(messages) and messages[0]["role"] == "system")


def read_messages(terminal: bool) -> Iterator[str]:
    """Messages of the standard input: what a terminal delivers at once, else line by line."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, gives `input` its line editing and history
    while True:
        lines: list[str] = []
        try:
            lines.append(input(PROMPT if terminal else ""))
            while terminal and select.select([sys.stdin], [], [], _PASTE_SECONDS)[0]:
                lines.append(input())
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        except EOFError:
            if not lines:
                return
        yield "\n".join(lines)
