"""Corpora and runs carry the file of any kind of tokenizer."""

import pytest
from corpora import KINDS, sentences

import llama_jax
from llama_jax import cli


def run(*commands):
    for command in commands:
        assert cli.main(command.split()) == 0, command


def prepared(kind, folder):
    """A tokenizer in a folder of its own, and a corpus made with it."""
    tokenizer, given, corpus = KINDS[kind](), folder / "given", folder / "corpus"
    given.mkdir()
    (given / tokenizer.file_name).write_bytes(tokenizer.model)
    for n in range(8):
        (folder / f"{n}.txt").write_text("\n".join(sentences(20, seed=n)), encoding="utf-8")
    run(f"data prepare --paths {folder}/*.txt --tokenizer {given} --out {corpus} --workers 1")
    return tokenizer, given, corpus


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_is_prepared_and_shown_with_any_tokenizer(kind, tmp_path, capsys):
    tokenizer, given, corpus = prepared(kind, tmp_path)
    run(f"tokenizer inspect --path {given}", f"data inspect --path {corpus} --documents 1")
    shown = capsys.readouterr().out
    assert "round trip   equal" in shown
    assert sentences(1)[0] in shown  # the first document, decoded
    assert (corpus / tokenizer.file_name).read_bytes() == tokenizer.model


def test_a_run_carries_its_tokenizer_json(tmp_path):
    tokenizer, given, corpus = prepared("byte-level json", tmp_path)
    out = tmp_path / "run"
    run(
        f"train --config demo --out {out} --tokenizer {given} --data.sources {corpus} --model tiny"
        f" --model.vocab_size {tokenizer.vocab_size} --model.n_layers 1 --data.sequence_length 32"
        " --data.batch_size 4 --steps 2 --optimizer.warmup_steps 1 --evaluate_every 2"
    )
    for folder in (out, out / "checkpoints" / "2"):
        assert (folder / "tokenizer.json").read_bytes() == tokenizer.model
    model = llama_jax.load(out)
    assert type(model.tokenizer) is type(tokenizer)
    assert model.end_ids == tokenizer.eos_ids
