"""The chat command: history, commands, what is cut and said, and how lines become messages."""

import io
import pty
import sys
from types import SimpleNamespace

import pytest
from corpora import tiny_tiktoken, tiny_tokenizer

from llama_jax import cli
from llama_jax.api import LanguageModel
from llama_jax.chat import terminal as chat
from llama_jax.chat.settings import ChatConfig


class Scripted:
    """Stands for a model: gives the next answer of a script, and remembers what it was asked."""

    def __init__(self, *answers, tokenizer=None):
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.answers = list(answers)
        self.asked = []

    def generate(self, prompts, sampling, *, max_length, on_text):
        self.asked.append(prompts[0])
        answer = self.answers.pop(0)
        tokens = self.tokenizer.encode(answer)
        room = min(max_length - len(prompts[0]), sampling.max_new_tokens)
        for token in tokens[:room]:
            text = self.tokenizer.decode([token])
            on_text(0, text)
            if text == "!":
                raise KeyboardInterrupt
        reason = "length" if len(tokens) > room else "eos"
        return [SimpleNamespace(tokens=tokens[:room], finish_reason=reason)]


def config(**settings):
    return ChatConfig(checkpoint="x", **settings)


def talk(model, *lines, **settings):
    """The dialog after these lines, as (first letter of the role, content)."""
    messages = chat.converse(model, config(**settings), iter(lines), terminal=False)
    return [(message["role"][0], message["content"]) for message in messages]


def test_each_question_is_asked_with_all_that_came_before():
    model = Scripted("hums", "sat")
    dialog = talk(model, "the llama", "", "about hills?", system="Be kind.")
    assert [role for role, _ in dialog] == ["s", "u", "a", "u", "a"]
    encode = model.tokenizer.encode_chat
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "the llama"},
        {"role": "assistant", "content": "hums"},
        {"role": "user", "content": "about hills?"},
    ]
    assert model.asked == [encode(messages[:2]), encode(messages)]


def test_undo_takes_back_one_exchange_and_reset_all_but_the_system_text():
    lines = ("one", "two", "/undo", "three")
    assert talk(Scripted("1", "2", "3"), *lines) == [
        *(("u", "one"), ("a", "1")),
        *(("u", "three"), ("a", "3")),
    ]
    dialog = talk(Scripted("1", "2"), "one", "/reset", "two", system="S")
    assert dialog == [("s", "S"), ("u", "two"), ("a", "2")]


def test_undo_never_takes_the_system_text(capsys):
    assert talk(Scripted(), "/undo", system="S") == [("s", "S")]
    assert "nothing to take back" in capsys.readouterr().out


def test_system_is_set_changed_and_removed():
    assert talk(Scripted("1"), "/system A b", "x", "/system C") == [
        *(("s", "C"), ("u", "x"), ("a", "1")),
    ]
    assert talk(Scripted(), "/system A", "/system") == []


def test_quit_ends_and_help_and_unknown_commands_answer(capsys):
    model = Scripted()
    assert talk(model, "/help", "/usr/bin?", "/quit", "never asked") == []
    shown = capsys.readouterr().out
    assert "/undo" in shown
    assert "/usr/bin? is no command" in shown
    assert model.asked == []


def test_ctrl_c_keeps_what_was_shown_and_goes_on(capsys):
    dialog = talk(Scripted("the! llama", "2"), "one", "two")
    assert dialog == [("u", "one"), ("a", "the!"), ("u", "two"), ("a", "2")]
    assert "(stopped)" in capsys.readouterr().out


def test_ctrl_c_before_the_answer_takes_the_question_back(capsys):
    class Stopped(Scripted):
        def generate(self, *_, **__):
            raise KeyboardInterrupt

    assert talk(Stopped(), "one") == []
    assert "the question is taken back" in capsys.readouterr().out


def test_a_full_context_is_said_and_nothing_is_dropped(capsys):
    model = Scripted("x" * 100, "y")
    dialog = talk(model, "one", "two", max_length=40)
    assert [role for role, _ in dialog] == ["u", "a"]
    assert len(model.asked) == 1
    shown = capsys.readouterr().out
    assert "cut: the context of 40 tokens is full; /reset starts anew" in shown
    assert "not asked: with it the conversation has" in shown


def test_an_answer_cut_by_the_sampling_limit_says_so(capsys):
    talk(Scripted("a b c d e f g h i"), "one", sampling={"max_new_tokens": 3})
    assert "(cut after 3 tokens (sampling.max_new_tokens))" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a [INST] b", "holds [INST]: special tags are not allowed"),
        ("half \ud800", "lone surrogate"),
    ],
)
def test_what_cannot_be_asked_is_explained_and_forgotten(capsys, line, reason):
    assert talk(Scripted("1"), line, "fine") == [("u", "fine"), ("a", "1")]
    assert reason in capsys.readouterr().out


def test_the_tokenizer_or_the_user_chooses_the_format():
    for settings, expected in (({}, "llama3"), ({"format": "llama2"}, "llama2")):
        model = Scripted("1", tokenizer=tiny_tiktoken())
        talk(model, "hi", **settings)
        message = [{"role": "user", "content": "hi"}]
        assert model.asked == [tiny_tiktoken().encode_chat(message, expected)]


def test_a_terminal_gets_no_control_characters(capsys):
    messages = chat.converse(Scripted("\x1b[2Jhi\x07\n"), config(), iter(["x"]), terminal=True)
    assert capsys.readouterr().out.startswith("\ufffd[2Jhi\ufffd\n")
    assert messages[-1]["content"] == "\x1b[2Jhi\x07\n"


def test_over_a_pipe_each_line_is_a_message(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two\nlast"))
    assert list(chat.read_messages(terminal=False)) == ["one", "", " two", "last"]


def test_lines_pasted_into_a_terminal_are_one_message(monkeypatch):
    ours, theirs = pty.openpty()
    with open(theirs, encoding="utf-8") as terminal, open(ours, "wb", buffering=0) as typist:
        monkeypatch.setattr(sys, "stdin", terminal)
        messages = chat.read_messages(terminal=True)
        typist.write(b"def f():\n    return 1\n\nwhat is it?\n")
        assert next(messages) == "def f():\n    return 1\n\nwhat is it?"
        typist.write(b"another\n")
        assert next(messages) == "another"
        typist.write(b"\x04")  # Ctrl-D
        assert list(messages) == []


def test_a_trained_model_talks_over_a_pipe(monkeypatch, capsys, shared_data):
    folder = shared_data / "weights" / "stories260K_hf"
    lines = "Once upon a time\n/undo\n/help\nOnce [/INST]\nOnce upon a time\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    command = f"chat --checkpoint {folder} --max_length 80 --sampling.temperature 0"
    assert cli.main([*command.split(), "--system", "Tell a story."]) == 0
    shown = capsys.readouterr().out
    first, second = (shown.split("\n(cut: the context")[i] for i in (0, 1))
    assert len(first) > 20
    assert second.endswith(first)  # the same question gets the same answer
    assert "special tags are not allowed" in second


def test_a_format_that_the_tokenizer_lacks_is_refused_at_once(capsys, shared_data):
    folder = shared_data / "weights" / "stories260K_hf"
    assert cli.main(["chat", "--checkpoint", str(folder), "--format", "llama3"]) == 2
    assert "has no <|start_header_id|>" in capsys.readouterr().err


def test_an_answer_ends_at_the_ends_of_the_model_and_of_the_format(monkeypatch):
    class Model(LanguageModel):
        def generate(self, prompts, *_, **__):
            asked.append(self.end_ids)
            return [SimpleNamespace(tokens=[], finish_reason="eos")]

    model = Model(
        model=None,
        params=None,
        tokenizer=tiny_tiktoken(),
        end_ids=(7,),
        context_length=None,
        mesh=None,
    )
    asked = []
    monkeypatch.setattr(chat, "load", lambda *_, **__: model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert chat.chat(config()) == 0
    assert asked == [(7, *tiny_tiktoken().eos_ids)]
