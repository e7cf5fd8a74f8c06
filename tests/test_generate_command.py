"""The generate command: settings of each line, the file of answers, and how a run continues."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from corpora import tiny_model, tiny_tokenizer
from models import change_config, huggingface_folder
from safetensors.numpy import load_file, save_file

import llama_jax
from llama_jax import cli
from llama_jax.generate import command
from llama_jax.generate.settings import SamplingConfig

GREEDY = {"temperature": 0, "max_new_tokens": 8}
REPEATING = {**GREEDY, "repetition_penalty": 0.01}
WARM = {"temperature": 1.5, "top_p": 1, "max_new_tokens": 8, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a random model with a tokenizer of 320 pieces."""
    folder = huggingface_folder(tmp_path_factory.mktemp("model") / "model", "llama2_gqa")
    weights, numbers = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name, size in (("model.embed_tokens.weight", 1), ("lm_head.weight", 0.5)):
        weights[name] = size * numbers.standard_normal((320, 32), np.float32)
    save_file(weights, folder / "model.safetensors")
    change_config(folder, vocab_size=320)
    (folder / "tokenizer.model").write_bytes(tiny_model())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> llama_jax.LanguageModel:
    return llama_jax.load(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "answers" / "out.jsonl"


def write(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def arguments(folder: Path, prompts: Path, out: Path, *flags: str) -> list[str]:
    files = ["--checkpoint", str(folder), "--prompts", str(prompts), "--out", str(out)]
    # Two rows at a time: nearly all tests share the programs of this size.
    return ["generate", *files, "--mesh.data", "1", "--batch_size", "2", *flags]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def generate(folder: Path, prompts: Path, out: Path, *flags: str) -> list[dict]:
    assert cli.main(arguments(folder, prompts, out, *flags)) == 0
    return rows(out)


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


# --- what is answered --------------------------------------------------------------------------

# Setting -> (the others, its value): the value changes what these others give.
CHANGES = {
    "max_new_tokens": (GREEDY, 3),
    "temperature": (WARM, 0),
    "top_k": (WARM, 1),
    "top_p": (WARM, 0.01),
    "min_p": (WARM, 0.99),
    "repetition_penalty": (GREEDY, 0.01),
    "presence_penalty": (GREEDY, -100),
    "frequency_penalty": (GREEDY, -100),
    "no_repeat_ngram": (REPEATING, 1),
    "seed": (WARM, 2),
    "stop": (WARM, None),  # a part of the answer without it
    "n": (WARM, 2),
    "logprobs": (GREEDY, 2),
}


def as_row(completions: list) -> list[tuple[str, str, int, bool]]:
    return [(c.text, c.finish_reason, len(c.tokens), c.logprobs is not None) for c in completions]


def test_every_setting_in_a_line_reaches_its_answer(folder, model, prompts, out):
    # Beam search draws nothing and is tested by itself.
    assert CHANGES.keys() == SamplingConfig.model_fields.keys() - {"num_beams"}
    text = "the llama"
    base = {id(o): as_row(model.generate(text, **o)) for o in (GREEDY, REPEATING, WARM)}
    lines, expected = [], []
    for name, (others, value) in CHANGES.items():
        changed = {name: [base[id(WARM)][0][0][2:4]] if value is None else value}
        expected.append(as_row(model.generate(text, **others | changed)))
        assert expected[-1] != base[id(others)], f"{name} changes nothing here"
        # A seed of its own makes a line independent of its place.
        lines.append({"prompt": text, "seed": 0, **others, **changed})
    write(prompts, *lines)
    for row, wanted in zip(generate(folder, prompts, out), expected, strict=True):
        found = [
            (c["text"], c["finish_reason"], c["tokens"], "logprobs" in c)
            for c in row["completions"]
        ]
        assert found == wanted, lines[row["index"]]
        assert row["text"] == wanted[0][0]


def test_flags_hold_where_a_line_does_not_say(folder, prompts, out):
    write(prompts, {"prompt": "the"}, {"prompt": "the", "max_new_tokens": 2})
    flags = ("--sampling.max_new_tokens", "5", "--sampling.temperature", "0")
    first, second = generate(folder, prompts, out, *flags)
    assert [c["tokens"] for row in (first, second) for c in row["completions"]] == [5, 2]
    assert first["text"].startswith(second["text"])


def test_a_line_alone_is_answered_as_among_others(folder, prompts, out, tmp_path):
    texts = ["the llama", "hills and stones; 42", "I.", "sat on"]
    write(prompts, *({"prompt": text, **GREEDY} for text in texts))
    together = [row["text"] for row in generate(folder, prompts, out)]
    for number, text in enumerate(texts):
        write(prompts, {"prompt": text, **GREEDY})
        (row,) = generate(folder, prompts, tmp_path / f"{number}.jsonl")
        assert row["text"] == together[number]
    assert len(set(together)) == 4


def test_a_line_with_a_seed_draws_the_same_in_any_place_and_equal_lines_without_differ(
    folder, prompts, out
):
    free = {"prompt": "the", "temperature": 1.5, "max_new_tokens": 8}
    write(prompts, free | {"seed": 7}, free, free, free | {"seed": 7})
    texts = [row["text"] for row in generate(folder, prompts, out)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_messages_are_answered_as_a_dialog(folder, model, prompts, out, capsys):
    dialog = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the llama"}]
    write(prompts, {"messages": dialog, **GREEDY}, {"prompt": "the llama", **GREEDY})
    asked, continued = generate(folder, prompts, out, "--chat_format", "llama2")
    ids = tiny_tokenizer().encode_chat(dialog, "llama2")
    assert asked["text"] == model.generate([ids], **GREEDY)[0].text
    assert continued["text"] == model.generate("the llama", **GREEDY)[0].text
    assert asked["text"] != continued["text"]
    assert cli.main(arguments(folder, prompts, out.with_name("b"), "--chat_format", "llama3")) == 2
    assert "has no <|start_header_id|>" in capsys.readouterr().err


def test_n_answers_to_a_line_lie_in_its_line(folder, prompts, out):
    write(prompts, {"prompt": "the", **WARM, "n": 3}, {"prompt": "the", **WARM})
    several, one = generate(folder, prompts, out)
    texts = [completion["text"] for completion in several["completions"]]
    assert len(set(texts)) == 3
    assert several["text"] == texts[0] == one["text"]
    assert len(one["completions"]) == 1


def test_log_probabilities_in_the_file_are_those_of_the_model(folder, model, prompts, out):
    write(prompts, {"prompt": "the llama", **WARM, "logprobs": 2}, {"prompt": "sat", **GREEDY})
    first, second = generate(folder, prompts, out)
    (completion,) = first["completions"]
    tokens = [token["id"] for token in completion["logprobs"]]
    assert len(tokens) == completion["tokens"] == 8
    prompt = tiny_tokenizer().encode("the llama", bos=True)
    logits = model.logits([prompt + tokens])[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    for token, row in zip(completion["logprobs"], expected, strict=True):
        assert token["logprob"] == pytest.approx(row[token["id"]], abs=1e-4)
        assert token["token"] == tiny_tokenizer().spelling(token["id"]).decode("utf-8", "replace")
        order = np.argsort(-row)[:2]
        assert [other["id"] for other in token["likeliest"]] == order.tolist()
        found = [other["logprob"] for other in token["likeliest"]]
        assert found == pytest.approx(row[order].tolist(), abs=1e-4)
    assert "logprobs" not in second["completions"][0]


def test_several_answers_are_shown_on_the_screen(folder, capsys):
    flags = ["--sampling.n", "2", "--sampling.max_new_tokens", "3", "--batch_size", "2"]
    flags += ["--mesh.data", "1"]
    texts = ["--prompts", "the [llama]", "sat"]
    assert cli.main(["generate", "--checkpoint", str(folder), *texts, *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the [llama]") == shown.count("sat") == 2
    assert shown.count(" tokens, ") == 4


# --- the file, and how a run continues ---------------------------------------------------------

# With two rows at a time, the first line is not answered first.
LENGTHS = (30, 3, 4, 5, 2, 6, 3, 20)
MANY = [
    {"prompt": f"the llama {n}", "temperature": 1.5 * (n % 2), "max_new_tokens": length}
    for n, length in enumerate(LENGTHS)
]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory) -> bytes:
    """The answers to MANY, by a run that nothing stopped."""
    place = tmp_path_factory.mktemp("whole")
    write(place / "in.jsonl", *MANY)
    generate(folder, place / "in.jsonl", place / "out.jsonl")
    return (place / "out.jsonl").read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C when this many answers have been kept."""
    add = command.Answers.add

    def add_and_stop(answers: command.Answers, line: dict) -> None:
        add(answers, line)
        if len(answers.done) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Answers, "add", add_and_stop)


def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the numbers of the prompts as they are answered."""
    numbers, add = [], command.Answers.add

    def note(answers: command.Answers, line: dict) -> None:
        numbers.append(line["index"])
        add(answers, line)

    monkeypatch.setattr(command.Answers, "add", note)
    return numbers


def test_answers_are_in_the_order_of_the_prompts_whenever_they_end(
    folder, prompts, out, whole, monkeypatch
):
    numbers = answered(monkeypatch)
    write(prompts, *MANY)
    generate(folder, prompts, out)
    assert out.read_bytes() == whole
    assert [row["index"] for row in rows(out)] == list(range(8))
    assert sorted(numbers) == list(range(8)) != numbers
    settings = json.loads(out.with_name("out.jsonl.config.json").read_text(encoding="utf-8"))
    assert (settings["checkpoint"], settings["batch_size"]) == (str(folder), 2)
    assert {path.name for path in out.parent.iterdir()} == {"out.jsonl", "out.jsonl.config.json"}


KILLED = """
import os, signal, sys
from llama_jax import cli
from llama_jax.generate import command

add = command.Answers.add

def add_and_die(answers, line):
    add(answers, line)
    if len(answers.done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

command.Answers.add = add_and_die
cli.main(sys.argv[1:])
"""


def test_a_killed_run_continues_and_answers_every_prompt_once(
    folder, prompts, out, whole, monkeypatch, capsys
):
    write(prompts, *MANY)
    args = arguments(folder, prompts, out)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *args],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    before = [row["index"] for row in rows(partial(out))]
    assert len(before) == 3

    numbers = answered(monkeypatch)
    generate(folder, prompts, out)
    assert sorted(before + numbers) == list(range(8))
    assert out.read_bytes() == whole
    assert not partial(out).exists()
    assert "3 of 8 prompts have been answered before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "torn",
    [
        b'{"index": 7, "text": "th',
        b'{"index": 7, "text": "whole, but for its end", "completions": []}',
        b"\xff\x00 not JSON\n",
        b'["a list"]\n',
    ],
)
def test_a_torn_last_line_is_answered_again(folder, prompts, out, whole, monkeypatch, torn: bytes):
    write(prompts, *MANY)
    for count in (5, 7):  # stopped again, so that the answers behind the torn line count too
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            assert cli.main(arguments(folder, prompts, out)) == 130
        if count == 5:
            with partial(out).open("ab") as file:
                file.write(torn)
    numbers = answered(monkeypatch)
    generate(folder, prompts, out)
    assert len(numbers) == 1
    assert out.read_bytes() == whole


def test_a_complete_file_is_left_alone(folder, prompts, out, monkeypatch, capsys):
    write(prompts, *MANY[1:3])
    generate(folder, prompts, out)
    monkeypatch.setattr(command, "load", None)  # no model is needed
    before = out.read_bytes(), out.stat().st_mtime_ns
    generate(folder, prompts, out)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    assert "complete already: 2 answers" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [True, False], ids=["complete", "stopped"])
def test_answers_to_other_prompts_or_with_other_settings_are_refused_and_kept(
    folder, prompts, out, monkeypatch, capsys, finished: bool
):
    write(prompts, *MANY[1:4])
    with monkeypatch.context() as patch:
        if not finished:
            stop_after(patch, 2)
        assert cli.main(arguments(folder, prompts, out)) == (0 if finished else 130)
    kept = out if finished else partial(out)
    content = kept.read_bytes()
    capsys.readouterr()

    def refused(*flags: str) -> None:
        assert cli.main(arguments(folder, prompts, out, *flags)) == 2
        message = f"{kept} exists and was made with other prompts or settings"
        assert message in capsys.readouterr().err
        assert kept.read_bytes() == content

    refused("--sampling.top_k", "3")
    write(prompts, *MANY[1:3])
    refused()


def test_a_run_that_was_stopped_before_its_first_answer_may_change(
    folder, prompts, out, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt  # what Ctrl-C is, unless the shell has this process ignore it

    write(prompts, *MANY[1:3])
    with monkeypatch.context() as patch:
        patch.setattr(command, "load", interrupted)
        assert cli.main(arguments(folder, prompts, out)) == 130
    assert not out.exists()
    assert len(generate(folder, prompts, out, "--sampling.top_k", "3")) == 2


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "temprature": 1}', "temprature: unknown key; the nearest is 'temperat"),
        (b'{"text": "a", "prompt": "a"}', "text: unknown key"),
        (b'{"prompt": 3}', "prompt: .*string.*got 3"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature: .*number.*got 'hot'"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: .*finite"),
        (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens: .*greater than 0.*got 0"),
        (b'{"prompt": "a", "stop": [""]}', "a stop string is empty"),
        (b'{"prompt": "a", "seed": 4294967296}', "seed: .*less than 4294967296"),
        (b'{"prompt": "a", "messages": []}', '"prompt" .* or "messages" .*, one of them'),
        (b'{"temperature": 1}', '"prompt" .* or "messages" .*, one of them'),
        (b'{"messages": "hi"}', "messages: .*got 'hi'"),
        (b'{"messages": [{"role": "user"}]}', "messages.0.content: is required"),
        (b'{"messages": [{"role": "user", "contents": "a"}]}', "messages.0.contents: unknown key"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a"]', 'expected {"prompt": "a text"} or {"messages": '),
        (b'"a"', 'expected {"prompt": "a text"} or {"messages": '),
    ],
)
def test_a_line_that_cannot_be_used_is_named_before_anything_is_done(
    prompts, out, monkeypatch, capsys, line: bytes, message: str
):
    monkeypatch.setattr(command, "load", None)
    prompts.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    assert cli.main(arguments(Path("model"), prompts, out)) == 2
    shown = capsys.readouterr().err
    assert f"error: {prompts}, line 3: " in shown
    assert re.search(message, shown), shown
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b'{"prompt": "\xff"}\n', "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(prompts, out, capsys, content, message: str):
    if content is not None:
        prompts.write_bytes(content)
    assert cli.main(arguments(Path("model"), prompts, out)) == 2
    assert re.search(f"error: {re.escape(str(prompts))}: {message}", capsys.readouterr().err)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "the dialog is empty"),
        ([("user", "a [INST] b")], r"message 0 \(user\) holds \[INST\]"),
        ([("assistant", "a")], "user"),
        ([("user", "a"), ("assistant", "b")], "user"),
        ([("robot", "a")], "robot"),
        ([("user", "\ud800")], "lone surrogate"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_cannot_be_encoded_is_named(
    folder, prompts, out, capsys, asked: list | str, message: str
):
    dialog = [{"role": entry[0], "content": entry[-1]} for entry in asked]
    line = {"prompt": asked} if isinstance(asked, str) else {"messages": dialog}
    content = [{"prompt": "fine"}, line]
    prompts.write_text("\n\n".join(map(json.dumps, content)), encoding="utf-8")
    assert cli.main(arguments(folder, prompts, out)) == 2
    shown = capsys.readouterr().err
    assert re.search(rf"error: {re.escape(str(prompts))}, line 3: .*{message}", shown), shown
    assert not out.exists()
