"""Raw text: every record is a document or a reason, and text comes through unchanged."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import ConfigError, TextConfig
from llama_jax.data import sources
from llama_jax.data.sources import Dropped

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
parquet = pytest.importorskip("pyarrow.parquet")


def read(path, **config):
    """(number, text or reason) of every record."""
    config = TextConfig(paths=(str(path),), **config)
    records = sources.read(sources.find(config.paths), config)
    found = ((r.number, sources.document(r, config.text_field)) for r in records)
    return [(n, x.reason if isinstance(x, Dropped) else x) for n, x in found]


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_text_file_is_one_document(tmp_path):
    text = "first\r\n\r\nsecond\\n \t\0 é\u2028 \\\\ \n"
    assert read(save(tmp_path / "a.txt", text)) == [(1, text)]
    assert read(save(tmp_path / "b.py", text)) == [(1, text)]


def test_a_separator_cuts_documents(tmp_path):
    file = save(tmp_path / "a.txt", "one<|end|>two\n<|end|><|end|>three<|end|>")
    assert read(file, separator="<|end|>") == [
        (1, "one"),
        (2, "two\n"),
        (3, "empty text"),
        (4, "three"),
    ]
    assert read(save(tmp_path / "b.txt", "a\nb\n\nc"), separator="\\n\\n") == [
        (1, "a\nb"),
        (2, "c"),
    ]


@settings(deadline=None, max_examples=200)
@given(
    content=st.lists(st.sampled_from(["a", "ab", "-", "--", "---", "x" * 9])).map("".join),
    block=st.integers(1, 7),
)
def test_separators_are_found_across_blocks(content, block):
    data = content.encode()
    blocks = ((data[i : i + block], 0) for i in range(0, len(data), block))
    found = [piece for piece, _ in sources._pieces(blocks, b"---", 10**6)]
    expected = data.split(b"---")
    assert found == (expected if expected[-1] else expected[:-1])


@settings(deadline=None, max_examples=200)
@given(
    lines=st.lists(st.sampled_from([b"", b"abc", b"12345678", b"123456789", b"z" * 40])),
    block=st.integers(1, 20),
)
def test_large_pieces_are_dropped_and_only_they(lines, block):
    data = b"".join(line + b"\n" for line in lines)
    blocks = ((data[i : i + block], 0) for i in range(0, len(data), block))
    found = [piece for piece, _ in sources._pieces(blocks, b"\n", 8)]
    assert [p if isinstance(p, bytes) else p.reason for p in found] == [
        line if len(line) <= 8 else "too large" for line in lines
    ]


def test_a_large_document_does_not_fill_memory(tmp_path):
    with save(tmp_path / "a.jsonl", json_lines("before")).open("ab") as file:
        file.truncate(300 * 2**20)  # one line of zeros
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json_lines("after"))
    script = (
        "import resource, sys; from llama_jax.config import TextConfig;"
        "from llama_jax.data import sources;"
        "c = TextConfig(paths=(sys.argv[1],), max_document_mb=1);"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(len(list(sources.read(sources.find(c.paths), c))),"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.jsonl")]
    records, growth = subprocess.run(command, capture_output=True, check=True).stdout.split()
    assert int(records) == 3
    assert int(growth) < 30 * 1024  # KiB
    found = read(tmp_path / "a.jsonl", max_document_mb=1)
    assert found == [(1, "before"), (2, "too large"), (3, "after")]


def test_json_lines_and_everything_that_goes_wrong_in_them(tmp_path):
    lines = [
        b'{"text": "good \\u00e9 \\n \\\\n", "id": 1}',
        b'{"text": "unfinished',
        b"",
        b'["a", "list"]',
        b'{"other": "x"}',
        b'{"text": 3}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "half \\ud83d"}',
        b'{"text": "bad \xff"}',
        b"[" * 100_000,
        b'{"text": ' + b"1" * 5000 + b"}",
        b'{"text": "crlf"}\r',
        b'{"text": "whole \\ud83d\\ude00"}',
    ]
    expected = [
        "good é \n \\n",
        "not JSON",
        "empty line",
        "not a JSON object",
        "no text",
        "no text",
        "no text",
        "empty text",
        "lone surrogate",
        "bad UTF-8",
        "not JSON",
        "not JSON",
        "crlf",
        "whole 😀",
    ]
    for name in ("a.jsonl", "a.json", "a.ndjson"):
        found = read(save(tmp_path / name, b"\n".join(lines)))
        assert found == list(enumerate(expected, start=1))


def test_the_text_field_has_any_name(tmp_path):
    file = save(tmp_path / "a.jsonl", b'{"body": "x", "text": "y"}\n')
    assert read(file, text_field="body") == [(1, "x")]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_archives_are_opened(tmp_path, suffix):
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    lines = json_lines("a", "b")
    assert read(save(tmp_path / f"a.jsonl.{suffix}", pack(lines))) == [(1, "a"), (2, "b")]
    two = pack(json_lines("a")) + pack(json_lines("b"))
    assert read(save(tmp_path / f"two.jsonl.{suffix}", two)) == [(1, "a"), (2, "b")]
    assert read(save(tmp_path / f"a.txt.{suffix}", pack(b"text"))) == [(1, "text")]
    assert read(save(tmp_path / f"empty.txt.{suffix}", pack(b""))) == [(1, "empty file")]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_archive_gives_whole_lines_and_a_reason(tmp_path, suffix):
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    texts = [f"line {i} {os.urandom(30).hex()}" for i in range(3000)]
    packed = pack(json_lines(*texts))
    for keep in (len(packed) // 2, len(packed) - 1):
        *good, (number, reason) = read(save(tmp_path / f"a.jsonl.{suffix}", packed[:keep]))
        assert reason == "cannot be read"
        assert number == len(good) + 1
        assert [text for _, text in good] == texts[: len(good)]
    assert len(good) > 1000
    # A text is one document: half of it is none.
    cut = save(tmp_path / f"a.txt.{suffix}", pack(os.urandom(5000).hex().encode())[:-9])
    assert read(cut) == [(1, "cannot be read")]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_archive_is_no_crash(tmp_path, suffix):
    pack = (
        gzip.compress if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    )
    packed = bytearray(pack(json_lines(*map(str, range(2000)))))
    packed[len(packed) // 2] ^= 0xFF
    assert read(save(tmp_path / f"a.jsonl.{suffix}", packed))[-1][1] == "cannot be read"
    assert read(save(tmp_path / f"b.jsonl.{suffix}", b"plain")) == [(1, "cannot be read")]


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    texts = [*(f"row {i}" for i in range(600)), None, "", "é\0"]
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(603))}), file)
    found = read(file)
    assert found[:600] == [(i + 1, f"row {i}") for i in range(600)]
    assert found[600:] == [(601, "no text"), (602, "empty text"), (603, "é\0")]
    assert read(file, text_field="n") == [(1, "cannot be read")]
    assert read(file, text_field="none") == [(1, "cannot be read")]


def test_parquet_of_other_text_types(tmp_path):
    file = tmp_path / "a.parquet"
    for column in (
        pyarrow.array(["a", "b"], pyarrow.large_string()),
        pyarrow.array(["a", "b"]).dictionary_encode(),
        pyarrow.array([b"a", b"b"]),
    ):
        parquet.write_table(pyarrow.table({"text": column}), file)
        assert read(file) == [(1, "a"), (2, "b")]
    parquet.write_table(pyarrow.table({"text": [b"a", b"\xff"]}), file)
    assert read(file) == [(1, "a"), (2, "bad UTF-8")]
    parquet.write_table(pyarrow.table({"text": [["a"]]}), file)
    assert read(file) == [(1, "cannot be read")]
    parquet.write_table(pyarrow.table({"text": ["x" * 2**21, "y"]}), file)
    assert read(file, max_document_mb=1) == [(1, "too large"), (2, "y")]


def test_damaged_parquet_is_no_crash(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(2000)]}), file)
    whole = file.read_bytes()
    for damaged in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:4] + bytes(2000) + whole[2004:],
    ):
        file.write_bytes(damaged)
        assert read(file)[-1][1] == "cannot be read"


def test_bad_bytes_empty_files_and_byte_order_marks(tmp_path):
    assert read(save(tmp_path / "a.txt", b"abc\xffdef")) == [(1, "bad UTF-8")]
    assert read(save(tmp_path / "b.txt", "text".encode("utf-16"))) == [(1, "bad UTF-8")]
    assert read(save(tmp_path / "c.txt", b"")) == [(1, "empty file")]
    assert read(save(tmp_path / "c.jsonl", b"")) == [(1, "empty file")]
    assert read(save(tmp_path / "d.txt", b"\xef\xbb\xbfabc\xef\xbb\xbf")) == [(1, "abc\ufeff")]
    assert read(save(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + json_lines("a"))) == [(1, "a")]
    assert read(save(tmp_path / "e.txt", b"\xef\xbb\xbf")) == [(1, "empty text")]
    assert read(save(tmp_path / "f.txt", " \n")) == [(1, " \n")]


def test_an_unreadable_file_is_reported(tmp_path, monkeypatch):
    save(tmp_path / "a.txt", "x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.Path, "open", refuse)
    assert read(tmp_path / "a.txt") == [(1, "cannot be read")]


def test_reading_continues_where_it_stopped(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        save(tmp_path / name, json_lines(*(f"{name} {i}" for i in range(4))))
    config = TextConfig(paths=(str(tmp_path),))
    files = sources.find(config.paths)
    whole = list(sources.read(files, config))
    for taken, record in enumerate(whole, start=1):
        rest = list(sources.read(files, config, (record.file, record.number)))
        assert rest == whole[taken:]


def names(paths, root):
    return [str(file.relative_to(root)) for file in sources.find(map(str, paths))]


def test_files_are_found_in_a_fixed_order_and_once(tmp_path):
    for name in (
        "b/10.txt",
        "b/9.txt",
        "a/x y.txt",
        "a/é.txt",
        ".hidden/c.txt",
        "a/.d.txt",
        "z.md",
    ):
        save(tmp_path / name, "x")
    everything = ["a/x y.txt", "a/é.txt", "b/10.txt", "b/9.txt", "z.md"]
    assert names([tmp_path], tmp_path) == everything
    assert names([tmp_path / "*"], tmp_path) == everything
    assert names([tmp_path / "**" / "*.txt"], tmp_path) == everything[:4]
    assert names([tmp_path / "z.md", tmp_path, tmp_path / "b"], tmp_path) == [
        "z.md",
        *everything[:4],
    ]
    os.symlink(tmp_path / "z.md", tmp_path / "a" / "link.md")
    assert len(sources.find([str(tmp_path)])) == len(everything)
    assert names([tmp_path / "a" / ".d.txt"], tmp_path) == ["a/.d.txt"]


def test_links_to_folders_are_followed_once(tmp_path):
    save(tmp_path / "far" / "x.txt", "x")
    save(tmp_path / "near" / "y.txt", "y")
    os.symlink(tmp_path / "far", tmp_path / "near" / "link")
    os.symlink(tmp_path / "near", tmp_path / "near" / "loop")
    assert names([tmp_path / "near"], tmp_path) == ["near/link/x.txt", "near/y.txt"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    file = save(tmp_path / "a[1].txt", "x")
    assert names([file], tmp_path) == ["a[1].txt"]


def test_what_names_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("none.txt", "*.none", "empty"):
        with pytest.raises(ConfigError, match="names no file"):
            sources.find([str(tmp_path / path)])


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a" / "b.txt", "x")
    real = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="cannot be listed"):
        sources.find([str(tmp_path)])


@pytest.mark.parametrize(
    ("suffix", "library"), [("parquet", "pyarrow"), ("jsonl.zst", "zstandard")]
)
def test_a_missing_library_is_named_before_the_work(tmp_path, monkeypatch, suffix, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"needs {library}: pip install 'llama-jax\[data\]'"):
        sources.find([str(save(tmp_path / f"a.{suffix}", "x"))])


def test_a_file_name_that_is_not_utf8_can_be_printed(tmp_path):
    file = sources.Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    file.write_text("x", encoding="utf-8")
    assert read(tmp_path) == [(1, "x")]
    sources.printable(file).encode()
