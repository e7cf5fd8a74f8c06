"""`data prepare`: nothing lost, nothing silent, the same bytes whatever workers and kills."""

import collections
import fcntl
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import sentences, tiny_model, tiny_tokenizer

from llama_jax.config import ConfigError, DataInspectConfig, DataPrepareConfig
from llama_jax.data import prepare as preparing
from llama_jax.data.inspect import inspect_corpus
from llama_jax.data.prepare import is_validation, prepare
from llama_jax.data.shards import DataError, Stream, file_name, read_meta


@pytest.fixture
def texts(tmp_path):
    """A folder of 60 documents in several files and formats, and a tokenizer beside it."""
    (tmp_path / "tokenizer.model").write_bytes(tiny_model())
    folder = tmp_path / "some texts é"
    folder.mkdir()
    documents = ["\n".join(sentences(3, seed=i)) for i in range(60)]
    for i in range(20):
        (folder / f"文 {i}.txt").write_text(documents[i], encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in documents[20:]]
    (folder / "a.jsonl").write_text("\n".join(lines[:20]), encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:]).encode()))
    return folder


@pytest.fixture
def small_steps(monkeypatch):
    """Batches of about three documents, so that a small corpus has many batches and shards."""
    monkeypatch.setattr(preparing, "_BATCH_BYTES", 300)


def config(texts, out, **settings):
    values = {"validation_fraction": 0.25, "shard_tokens": 100, "workers": 1, **settings}
    return DataPrepareConfig(
        paths=(str(texts),), out=str(out), tokenizer=str(texts.parent), **values
    )


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def documents(folder, split):
    stream = Stream(folder, split)
    return [stream.read(*stream.document(i))[0].tolist() for i in range(stream.documents)]


def all_texts(texts):
    found = [file.read_text(encoding="utf-8") for file in sorted(texts.glob("*.txt"))]
    packed = gzip.decompress((texts / "b.jsonl.gz").read_bytes()).decode().split("\n")
    lines = (texts / "a.jsonl").read_text(encoding="utf-8").split("\n") + packed
    return [json.loads(line)["text"] for line in lines] + found  # the order of the names


def test_every_document_arrives_once_in_order_and_unchanged(texts, tmp_path, small_steps):
    assert prepare(config(texts, tmp_path / "out")) == 0
    tokenizer = tiny_tokenizer()
    expected = {"train": [], "validation": []}
    for text in all_texts(texts):
        split = "validation" if is_validation(text, 0.25) else "train"
        expected[split].append(tokenizer.encode(text, bos=True, eos=True))
    assert len(expected["train"]) > 30
    assert len(expected["validation"]) > 5
    for split, ids in expected.items():
        assert documents(tmp_path / "out", split) == ids
    meta = read_meta(tmp_path / "out")
    assert (meta.records, meta.kept, meta.dropped) == (60, 60, {})
    assert len(meta.train) > 5
    assert meta.tokenizer == tokenizer.fingerprint


def test_files_are_what_the_documentation_says(texts, tmp_path, small_steps):
    prepare(config(texts, tmp_path / "out"))
    meta = read_meta(tmp_path / "out")
    names = {"meta.json", "quarantine.json", "tokenizer.model"}
    for split in ("train", "validation"):
        for part in meta.parts(split):
            tokens = tmp_path / "out" / f"{split}-{part.number:05d}.tokens"
            starts = tmp_path / "out" / f"{split}-{part.number:05d}.starts"
            names |= {tokens.name, starts.name}
            ids = np.fromfile(tokens, "<u2")
            places = np.fromfile(starts, "<i8")
            assert len(ids) == part.tokens == places[-1]
            assert len(places) == part.documents + 1
            assert (ids[places[:-1]] == 1).all()
            assert (ids[places[1:] - 1] == 2).all()
            assert hashlib.sha256(tokens.read_bytes()).hexdigest() == part.tokens_sha256
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_the_split_follows_the_text_alone():
    drawn = [is_validation(f"document {i}", 0.1) for i in range(4000)]
    assert 320 < sum(drawn) < 480
    assert all(is_validation(f"document {i}", 0.2) for i in range(4000) if drawn[i])
    assert not any(is_validation(f"document {i}", 0.0) for i in range(100))
    golden = [0, 3, 6, 16, 17, 18, 20, 24, 26]  # another draw would move documents of old corpora
    assert [i for i in range(30) if is_validation(f"document {i}", 0.2)] == golden


def test_the_number_of_workers_changes_no_byte(texts, tmp_path, small_steps):
    for workers in (1, 2):
        assert prepare(config(texts, tmp_path / str(workers), workers=workers)) == 0
    assert files(tmp_path / "1") == files(tmp_path / "2")


KILLED = """
import os, signal, sys
from llama_jax.config import DataPrepareConfig
from llama_jax.data import prepare as preparing

preparing._BATCH_BYTES = 300
folder, texts = sys.argv[1:]
def run(out):
    preparing.prepare(DataPrepareConfig(
        paths=(texts,), out=out, tokenizer=os.path.dirname(texts), validation_fraction=0.25,
        shard_tokens=1500, workers=1))

def forked(out, fatal):
    # Runs in a child that is killed just before its `fatal`-th write to the disk or rename.
    child = os.fork()
    if child == 0:
        calls = 0
        def watched(real):
            def call(*args, **keywords):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **keywords)
            return call
        os.fsync, os.replace, os.rename, os.unlink = map(
            watched, (os.fsync, os.replace, os.rename, os.unlink))
        run(out)
        os._exit(0)
    return os.waitpid(child, 0)[1]

fatal = 1
while forked(f"{folder}/{fatal}", fatal) == signal.SIGKILL:
    assert forked(f"{folder}/{fatal}", 10**9) == 0
    fatal += 1
"""


def test_killed_at_any_moment_then_resumed_equals_undisturbed(texts, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder), str(texts)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    runs = sorted(folder.iterdir(), key=lambda path: int(path.name))
    assert len(runs) > 30
    undisturbed = files(runs[-1])  # the last was not hit
    assert len(read_meta(runs[-1]).train) >= 2
    for run in runs:
        assert files(run) == undisturbed, f"killed before write {run.name}"


def test_finished_shards_are_not_made_again(texts, tmp_path, small_steps, monkeypatch):
    real, calls = preparing.write_atomic, collections.Counter()

    def stop_at_third_shard(path, content):
        if path.name == "00002.json":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(preparing, "write_atomic", stop_at_third_shard)
    assert prepare(config(texts, tmp_path / "out")) == 75
    monkeypatch.setattr(preparing, "write_atomic", real)
    first = tmp_path / "out" / file_name("train", 0, "tokens")
    before = first.stat()
    tokenise = preparing.tokenise

    def count(records, **settings):
        calls["records"] += len(records)
        return tokenise(records, **settings)

    monkeypatch.setattr(preparing, "tokenise", count)
    assert prepare(config(texts, tmp_path / "out")) == 0
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert 0 < calls["records"] < 60
    assert read_meta(tmp_path / "out").records == 60


def test_a_finished_corpus_is_left_alone(texts, tmp_path, capsys):
    prepare(config(texts, tmp_path / "out"))
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert prepare(config(texts, tmp_path / "out", workers=2)) == 0
    assert "already prepared" in capsys.readouterr().out
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == before


def test_other_settings_are_refused_by_name(texts, tmp_path, small_steps, monkeypatch):
    prepare(config(texts, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"a corpus made with other settings \(shard_tokens\)"):
        prepare(config(texts, tmp_path / "out", shard_tokens=600))
    monkeypatch.setattr(preparing, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert prepare(config(texts, tmp_path / "half")) == 75
    with pytest.raises(ConfigError, match=r"an unfinished corpus .*\(validation_fraction\)"):
        prepare(config(texts, tmp_path / "half", validation_fraction=0.1))
    (texts / "more.txt").write_text("more", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\(files, bytes, files_sha256\)"):
        prepare(config(texts, tmp_path / "half"))


def test_a_corpus_inside_its_own_text_folder_is_not_text(texts):
    assert prepare(config(texts, texts / "out")) == 0
    assert prepare(config(texts, texts / "out")) == 0  # "already prepared", not "other files"
    assert read_meta(texts / "out").records == 60


def test_two_at_once_are_refused(texts, tmp_path):
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another `data prepare` is at work"):
        prepare(config(texts, tmp_path / "out"))
    os.close(held)
    assert prepare(config(texts, tmp_path / "out")) == 0


def test_a_full_disk_is_said_and_survived(texts, tmp_path, small_steps, monkeypatch):
    real, calls = os.fsync, collections.Counter()

    def full(file):
        calls["fsync"] += 1
        if calls["fsync"] == 20:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; the finished shards are safe"):
        prepare(config(texts, tmp_path / "out"))
    assert prepare(config(texts, tmp_path / "out")) == 0
    assert prepare(config(texts, tmp_path / "whole")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_everything_left_out_is_counted_and_listed(texts, tmp_path, capsys):
    good = len(all_texts(texts))
    (texts / "bad.txt").write_bytes(b"ab\xff")
    (texts / "empty.txt").write_bytes(b"")
    lines = ['{"text": "kept"}', "{", '{"no": 1}', '{"text": "\\ud800"}']
    (texts / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    packed = gzip.compress(("\n".join(['{"text": "also kept"}'] * 3000)).encode())
    (texts / "cut.jsonl.gz").write_bytes(packed[:-4])
    assert prepare(config(texts, tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "quarantine.json").read_text(encoding="utf-8"))
    meta = read_meta(tmp_path / "out")
    expected = {
        ("bad.txt", 1, "bad UTF-8"),
        ("empty.txt", 1, "empty file"),
        ("lines.jsonl", 2, "not JSON"),
        ("lines.jsonl", 3, "no text"),
        ("lines.jsonl", 4, "lone surrogate"),
        ("cut.jsonl.gz", 3000, "cannot be read"),
    }
    listed = {(Path(e["file"]).name, e["record"], e["reason"]) for e in report["list"]}
    assert listed == expected
    assert meta.dropped == report["dropped"] == dict.fromkeys((r for _, _, r in expected), 1)
    kept = Stream(tmp_path / "out", "train").documents
    kept += Stream(tmp_path / "out", "validation").documents
    assert meta.kept == report["kept"] == kept == good + 1 + 2999
    assert meta.records == kept + len(expected)
    shown = capsys.readouterr().out
    for name, record, reason in expected:
        assert f"{name}:{record}: {reason}" in shown


def test_the_list_is_bounded_and_the_count_is_not(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_LISTED", 5)
    (texts / "z.jsonl").write_text("{\n" * 50, encoding="utf-8")
    prepare(config(texts, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "quarantine.json").read_text(encoding="utf-8"))
    assert (len(report["list"]), report["unlisted"], report["dropped"]) == (5, 45, {"not JSON": 50})


def test_nothing_to_learn_from_is_an_error(texts, tmp_path):
    for file in texts.iterdir():
        file.unlink()
    (texts / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"no document to learn from .*1 bad UTF-8"):
        prepare(config(texts, tmp_path / "out"))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_an_empty_validation_split_is_pointed_out(texts, tmp_path, capsys):
    prepare(config(texts, tmp_path / "out", validation_fraction=1e-9))
    assert "no document fell to validation" in capsys.readouterr().out


@pytest.mark.parametrize("locale", ["C", "POSIX", "tr_TR.UTF-8", "de_DE.UTF-8"])
def test_locale_and_time_zone_change_no_byte(texts, tmp_path, locale):
    prepare(config(texts, tmp_path / "here"))
    script = (
        "import sys; from llama_jax.config import *; from llama_jax.data.prepare import prepare;"
        "sys.exit(prepare(DataPrepareConfig(paths=(sys.argv[1],), out=sys.argv[2],"
        "tokenizer=sys.argv[3], validation_fraction=.25, shard_tokens=100, workers=1)))"
    )
    command = [sys.executable, "-c", script, str(texts), str(tmp_path / "there"), str(texts.parent)]
    environment = {**os.environ, "LC_ALL": locale, "LANG": locale, "TZ": "Pacific/Kiritimati"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_large_vocabulary_takes_wider_tokens(tmp_path):
    assert preparing.token_type(65_536).itemsize == 2
    assert preparing.token_type(65_537).itemsize == 4


def test_inspect_shows_and_verifies(texts, tmp_path, capsys):
    prepare(config(texts, tmp_path / "out"))
    inspect = DataInspectConfig(path=str(tmp_path / "out"), verify=True, documents=2)
    assert inspect_corpus(inspect) == 0
    shown = capsys.readouterr().out
    assert "60: 60 kept, 0 left out" in shown
    first = next(text for text in all_texts(texts) if not is_validation(text, 0.25))
    assert first.splitlines()[0] in shown
    damaged = tmp_path / "out" / "train-00000.tokens"
    content = bytearray(damaged.read_bytes())
    content[11] ^= 1
    damaged.write_bytes(content)
    assert inspect_corpus(inspect) == 1
    assert "train-00000.tokens: its SHA-256 differs" in capsys.readouterr().out
