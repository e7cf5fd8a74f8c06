"""Every command of the README in its order, on a corpus and a model that take seconds."""

import json
from pathlib import Path

import pytest

import llama_jax
from llama_jax import cli
from llama_jax.data.python_sources import corpus_globs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A few pages of text."""
    folder = tmp_path_factory.mktemp("commands")
    texts = folder / "my_texts"
    texts.mkdir()
    for n in range(40):
        words = " ".join(f"line {n} of {m} says hello." for m in range(30))
        (texts / f"{n}.txt").write_text(words, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Tokenizer, corpus and a trained run, made by the commands."""
    texts, tokenizer, corpus, out = (
        folder / name for name in ("my_texts", "tokenizer.model", "corpus", "run")
    )
    for command in (
        f"tokenizer train --paths {texts} --out {tokenizer} --vocab_size 300",
        f"tokenizer inspect --path {tokenizer} --text hello",
        f"data prepare --paths {texts} --tokenizer {tokenizer} --out {corpus} --workers 1"
        " --validation_fraction 0.2",
        f"data inspect --path {corpus} --documents 1 --verify",
        f"train --config demo --out {out} --tokenizer {tokenizer} --data.sources {corpus}"
        " --model tiny --model.vocab_size 300 --model.n_layers 1 --data.sequence_length 32"
        " --data.batch_size 4 --steps 6 --optimizer.warmup_steps 2 --evaluate_every 3"
        " --checkpoint.every 4 --log_every 1",
    ):
        assert cli.main(command.split()) == 0, command
    return out


def test_a_run_leaves_what_the_guide_says(run: Path):
    assert {"config.yaml", "tokenizer.model", "metrics.jsonl", "tensorboard", "loss.png"} <= {
        path.name for path in run.iterdir()
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 6
    assert any("validation_loss" in line for line in lines)


def test_the_same_command_has_nothing_left_to_do(run: Path, capsys):
    assert cli.main(["train", "--config", str(run / "config.yaml")]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_generate_answers_on_the_screen_and_in_a_file(run: Path, tmp_path: Path, capsys):
    short = ["--sampling.max_new_tokens", "5"]
    assert cli.main(["generate", "--checkpoint", str(run), "--prompts", "line 1", *short]) == 0
    assert "line 1" in capsys.readouterr().out

    prompts, answers = tmp_path / "in.jsonl", tmp_path / "answers" / "out.jsonl"
    prompts.write_text('{"prompt": "line 1"}\n\n{"prompt": "line 2\u2028"}\n', encoding="utf-8")
    files = ["--prompts", str(prompts), "--out", str(answers)]
    assert cli.main(["generate", "--checkpoint", str(run), *files, *short]) == 0
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").split("\n") if line]
    assert [row["index"] for row in rows] == [0, 1]
    for row in rows:
        (completion,) = row["completions"]
        assert row["text"] == completion["text"]
        ended = completion["finish_reason"] == "length"
        assert completion["tokens"] == 5 if ended else completion["tokens"] < 5


def test_a_run_is_converted_and_verified(run: Path, tmp_path: Path, capsys):
    there, file = tmp_path / "hf", tmp_path / "model.gguf"
    assert cli.main(["convert", str(run), str(there), "--to", "huggingface"]) == 0
    assert cli.main(["verify", str(run), str(there)]) == 0
    assert cli.main(["convert", str(there), str(file), "--to", "gguf", "--dtype", "float16"]) == 0
    assert cli.main(["verify", str(there), str(file)]) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    short = ["--sampling.max_new_tokens", "5", "--sampling.temperature", "0"]
    assert cli.main(["generate", "--checkpoint", str(file), "--prompts", "line 1", *short]) == 0


@pytest.mark.parametrize("content", ["", "{broken\n", '{"text": "x"}\n', '{"prompt": 3}\n'])
def test_a_bad_file_of_prompts_is_refused(run: Path, tmp_path: Path, capsys, content: str):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(content, encoding="utf-8")
    command = ["generate", "--checkpoint", str(run), "--prompts", str(prompts)]
    assert cli.main(command) == 2
    assert str(prompts) in capsys.readouterr().err


def test_the_object_of_the_python_interface(run: Path):
    model = llama_jax.load(run)
    logits = model.logits([[1, 5, 7], [1, 2, 3]])
    assert (logits.shape, str(logits.dtype)) == ((2, 3, 300), "float32")
    with pytest.raises(ValueError, match="outside the vocabulary of 300"):
        model.logits([[300]])
    with pytest.raises(ValueError, match="rows of equally many ids"):
        model.logits([[1], [1, 2]])
    with pytest.raises(ValueError, match="temperatur"):
        model.generate(["a"], temperatur=1)
    one = model.generate("line", temperature=0, max_new_tokens=4)
    two = llama_jax.load(run / "checkpoints" / "6").generate(
        ["line", "of"], temperature=0, max_new_tokens=4
    )
    assert one[0].tokens == two[0].tokens


def test_a_folder_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        llama_jax.load(tmp_path / "missing")
    with pytest.raises(RuntimeError, match="no checkpoint here"):
        llama_jax.load(tmp_path)


def test_demo_learns_writes_and_goes_on(tmp_path: Path, capsys):
    sources = tmp_path / "sources"
    (sources / "package" / "test").mkdir(parents=True)
    for n in range(100):
        body = "".join(f"def f{m}(x):\n    return x + {m * n}\n" for m in range(40))
        (sources / "package" / f"m{n}.py").write_text(body)
    (sources / "package" / "test" / "t.py").write_text("assert False\n")
    assert corpus_globs(str(sources)) == (f"{sources}/package/*.py",)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "out: x\nmodel: {d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, d_head: 8, d_ff: 32,"
        " vocab_size: 300, norm_eps: 1e-5, rope_theta: 1e4, tie_embeddings: true}\n"
        "tokenizer: x\ndata: {sources: [x], sequence_length: 32, batch_size: 4}\nsteps: 4\n"
        "optimizer: {warmup_steps: 1}\nevaluate_every: 4\nlog_every: 1\n"
    )
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--corpus", str(sources), "--recipe", str(recipe)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "pairs of tokens counted" in printed
    assert "def __init__" in (out / "samples.txt").read_text()
    assert cli.main(command) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_demo_names_a_corpus_without_python(tmp_path: Path, capsys):
    command = ["demo", "--out", str(tmp_path / "o"), "--corpus", str(tmp_path)]
    assert cli.main(command) == 2
    assert "has no .py files" in capsys.readouterr().err
