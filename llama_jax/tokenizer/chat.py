"""Dialogs as token ids: the formats of Llama 2 and Llama 3, in plain code.

Templates that come with a model file are programs of strangers; none is ever run.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

Format = Literal["llama2", "llama3"]
Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# A tool's result has the role ipython; "tool" is another name for it.
LLAMA3_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "ipython": "ipython",
    "tool": "ipython",
}


class DialogError(ValueError):
    """A dialog that its chat format cannot express; the message says which part and why."""


class Encoder(Protocol):
    """What a chat format needs of a tokenizer."""

    controls: dict[str, int]
    bos_id: int

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of plain text, which never yields controls."""


def encode_chat(
    tokenizer: Encoder, messages: Sequence[Message], format: Format | None = None
) -> list[int]:
    """Ids of a dialog up to where the assistant's next message begins, BOS included.

    An answer is ended by any of the tokenizer's eos_ids.

    Args:
        tokenizer: the model's.
        messages: {"role": ..., "content": ...} each.
        format: llama2 (generation.py of meta-llama/llama) or llama3 (chat_format.py of
            meta-llama/llama-models); by default llama3 where the tokenizer has <|eot_id|>.

    Raises:
        DialogError: the format does not allow the dialog, or the tokenizer not the format.
        TokenizerError: a content has a lone surrogate.
    """
    if not messages:
        raise DialogError("the dialog is empty: give at least one message")
    for number, message in enumerate(messages):
        texts = isinstance(message, Mapping) and [message.get(k) for k in ("role", "content")]
        if not texts or len(message) != 2 or not all(isinstance(text, str) for text in texts):
            raise DialogError(f"message {number} must be a role and a content, both texts")
    if format is None:
        format = "llama3" if "<|eot_id|>" in tokenizer.controls else "llama2"
    return _llama2(tokenizer, messages) if format == "llama2" else _llama3(tokenizer, messages)


def _llama2(tokenizer: Encoder, messages: Sequence[Message]) -> list[int]:
    """Each question with its answer is a text of its own; the last question waits for one."""
    for number, message in enumerate(messages):
        tag = next((tag for tag in LLAMA2_TAGS if tag in message["content"]), None)
        if tag:
            raise DialogError(
                f"message {number} ({message['role']}) holds {tag}: special tags are not allowed "
                "as part of the prompt"
            )
    system, turns = "", messages
    if messages[0]["role"] == "system":
        system, turns = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise DialogError(
                f"message {len(messages) - len(turns) + index} has the role {message['role']!r}, "
                f"expected {expected!r}: a Llama 2 dialog is [system] user assistant user ..."
            )
    if len(turns) % 2 == 0:
        raise DialogError("a Llama 2 dialog must end in a message of the user, to be answered")
    # The system text is part of the first question before that is stripped.
    contents = [message["content"] for message in turns]
    contents[0] = system + contents[0]
    questions = [f"[INST] {content.strip()} [/INST]" for content in contents[::2]]
    answers = [content.strip() for content in contents[1::2]]
    ids = []
    for question, answer in zip(questions, answers, strict=False):
        ids += tokenizer.encode(f"{question} {answer} ", bos=True, eos=True)
    return ids + tokenizer.encode(questions[-1], bos=True)


def _llama3(tokenizer: Encoder, messages: Sequence[Message]) -> list[int]:
    """Headers and ends are control tokens; contents are taken as they are, nothing is trimmed."""
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    missing = [name for name in names if name not in tokenizer.controls]
    if missing:
        raise DialogError(
            f"this tokenizer has no {missing[0]}, which the llama3 format needs; use llama2"
        )
    start, end, end_of_turn = (tokenizer.controls[name] for name in names)

    def header(role: str) -> list[int]:
        return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

    ids = [tokenizer.bos_id]
    for number, message in enumerate(messages):
        if message["role"] not in LLAMA3_ROLES:
            raise DialogError(
                f"message {number} has the role {message['role']!r}; Llama 3 knows "
                f"{', '.join(LLAMA3_ROLES)}"
            )
        ids += header(LLAMA3_ROLES[message["role"]])
        ids += [*tokenizer.encode(message["content"]), end_of_turn]
    return ids + header("assistant")
