"""Tokenizer files from strangers: each is refused with a sentence, none crashes or is half used."""

import json
import random

import pytest
from corpora import (
    KINDS,
    tiktoken_file,
    tiny_byte_fallback,
    tiny_byte_level,
    tiny_model,
    tiny_tokens,
)
from sentencepiece import sentencepiece_model_pb2 as schema

from llama_jax import tokenizer as tokenizers
from llama_jax.tokenizer import TokenizerError

Piece = schema.ModelProto.SentencePiece


def changed(change):
    proto = schema.ModelProto.FromString(tiny_model())
    change(proto)
    return proto.SerializeToString()


def without_byte(proto):
    del proto.pieces[3 + 0x41]


def without_space(proto):
    next(p for p in proto.pieces if p.piece == "\u2581").piece = "\u2582"


def byte_as_text(proto):
    proto.pieces[3 + 0x41].type = Piece.NORMAL


def misnamed_byte(proto):
    proto.pieces[3 + 0x41].piece = "<0xZZ>"


def byte_twice(proto):
    proto.pieces[3 + 0x41].piece = "<0x42>"


def no_fallback(proto):
    proto.trainer_spec.byte_fallback = False


def no_bytes_at_all(proto):
    proto.trainer_spec.byte_fallback = False
    kept = [piece for piece in proto.pieces if piece.type != Piece.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)


def no_bos(proto):
    proto.pieces[1].type = Piece.NORMAL


def no_eos(proto):
    proto.pieces[2].piece = "</other>"


def same_piece_twice(proto):
    proto.pieces[300].piece = proto.pieces[301].piece


def empty_piece(proto):
    proto.pieces[300].piece = ""


def piece_with_nul(proto):
    proto.pieces[300].piece = "a\0b"


def no_pieces(proto):
    del proto.pieces[:]


def spaces_behind(proto):
    proto.trainer_spec.treat_whitespace_as_suffix = True


def damaged_rules(proto):
    proto.normalizer_spec.precompiled_charsmap = b"\xff\xff\xff\x7f garbage"


SENTENCEPIECE = {
    "empty": b"",
    "text": b"hello world\n" * 40,
    "zeros": bytes(4096),
    "crlf": tiny_model().replace(b"\n", b"\r\n"),
    "varint": b"\x0a" + b"\xff" * 9 + b"\x7f",
    "long piece": b"\x0a\xff\xff\xff\xff\x0f" + b"a" * 10,
    "many pieces": b"\x0a\x00" * 2**22,
    "gzip": b"\x1f\x8b\x08\x00" + bytes(60),
    "not UTF-8": tiny_model().replace(b"llama", b"ll\xffma"),
    **{
        change.__name__: changed(change)
        for change in (
            without_byte,
            without_space,
            byte_as_text,
            misnamed_byte,
            byte_twice,
            no_fallback,
            no_bytes_at_all,
            no_bos,
            no_eos,
            same_piece_twice,
            empty_piece,
            piece_with_nul,
            no_pieces,
            spaces_behind,
            damaged_rules,
        )
    },
}

TOKENS = tiny_tokens()
RANKS = tiktoken_file(TOKENS).split(b"\n")[:-1]


def with_line(line, number=10):
    """A tiktoken file with one line replaced."""
    return b"\n".join([*RANKS[:number], line, *RANKS[number + 1 :], b""])


TIKTOKEN = {
    "one line": b"IQ== 0\n",
    "bad base64": with_line(b"C!== 10"),
    "short base64": with_line(b"C 10"),
    "unpadded base64": with_line(b"Cg= 10"),
    "empty token": with_line(b" 10"),
    "no rank": with_line(b"Cg=="),
    "rank is a word": with_line(b"Cg== ten"),
    "negative rank": with_line(b"Cg== -10"),
    "hexadecimal rank": with_line(b"Cg== 0xA"),
    "huge rank": with_line(b"Cg== " + b"9" * 5000),
    "rank beyond the lines": with_line(b"Cg== 999999999"),
    "rank twice": with_line(b"Cg== 11"),
    "rank missing": b"\n".join([*RANKS[:300], *RANKS[301:], b""]),
    "byte missing": tiktoken_file([*TOKENS[:10], *TOKENS[11:]]),
    "token twice": tiktoken_file([*TOKENS, TOKENS[300]]),
    "third field": with_line(b"Cg== 10 1"),
    "tab": with_line(b"Cg==\t10"),
    "blank line": with_line(b"Cg== 10\n"),
    "crlf": tiktoken_file(TOKENS).replace(b"\n", b"\r\n"),
    "bom": b"\xef\xbb\xbf" + tiktoken_file(TOKENS),
    "utf-16": tiktoken_file(TOKENS).decode().encode("utf-16"),
    "cut in a line": tiktoken_file(TOKENS)[:-6],
    "NUL": with_line(b"Cg== 10\0"),
    "one endless line": b"A" * 100_000 + b" 0\n",
    "a pointer": b"version 1\noid sha256:" + b"0" * 64 + b"\nsize 2183982\n",
}


def changed_json(change, make=tiny_byte_level):
    file = json.loads(make().model)
    change(file)
    return json.dumps(file).encode()


def json_with(make=tiny_byte_level, section=None, **values):
    """A tokenizer.json with some values of a section, or of the whole file, replaced."""
    return changed_json(lambda f: (f[section] if section else f).update(values), make)


def model_with(**values):
    return json_with(section="model", **values)


VOCABULARY = json.loads(tiny_byte_level().model)["model"]["vocab"]
ADDED = json.loads(tiny_byte_level().model)["added_tokens"]
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": False}
JSON = {
    "not JSON": b'{"model": ',
    "a list": b"[1, 2]",
    "empty object": b"{}",
    "deep": b'{"a":' * 100_000,
    "deep lists": b'{"model":' + b"[" * 100_000,
    "many lists": b'{"a":[' + b"[]," * 2**20 + b"[]]}",
    "not UTF-8": b'{"model": "\xff"}',
    "half a character": tiny_byte_level().model.replace(b"<|eot_id|>", rb"\ud800"),
    "NaN": b'{"model": NaN}',
    "bom": b"\xef\xbb\xbf" + tiny_byte_level().model,
    "cut": tiny_byte_level().model[:-100],
    "model is a list": json_with(model=[]),
    "a word model": model_with(type="WordPiece"),
    "unigram": model_with(type="Unigram", vocab=[["a", 0.0]]),
    "vocabulary is a list": model_with(vocab=list(VOCABULARY)),
    "id is a text": model_with(vocab=VOCABULARY | {"a": "97"}),
    "id is a fraction": model_with(vocab=VOCABULARY | {"a": 97.5}),
    "id is a boolean": model_with(vocab=VOCABULARY | {"a": True}),
    "negative id": model_with(vocab=VOCABULARY | {"a": -1}),
    "huge id": model_with(vocab=VOCABULARY | {"a": 2**40}),
    "endless id": tiny_byte_level().model.replace(b'"a":97', b'"a":' + b"9" * 4000),
    "id twice": model_with(vocab=VOCABULARY | {"a": 98}),
    "id missing": changed_json(lambda f: f["added_tokens"].pop(3)),
    "byte missing": model_with(
        vocab={"x" * 9 if k == "a" else k: v for k, v in VOCABULARY.items()}
    ),
    "empty vocabulary": model_with(vocab={}, merges=[]),
    "piece outside the alphabet": model_with(
        vocab={"日" if v == 300 else k: v for k, v in VOCABULARY.items()}, merges=[]
    ),
    "merges is an object": model_with(merges={}),
    "merge of one": model_with(merges=[["a"]]),
    "merge of three": model_with(merges=[["a", "b", "c"]]),
    "merge is a number": model_with(merges=[7]),
    "merge of strangers": model_with(merges=[["zq", "zq"]]),
    "merge to a stranger": model_with(merges=["q z"]),
    "merge without a space": model_with(merges=["ab"]),
    "merge to a control": changed_json(lambda f: f["model"]["merges"].append(["<|eot_id|", ">"])),
    "dropout": model_with(dropout=0.1),
    "prefix of pieces": model_with(continuing_subword_prefix="##"),
    "suffix of words": model_with(end_of_word_suffix="</w>"),
    "added is an object": json_with(added_tokens={}),
    "added without id": json_with(added_tokens=[{"content": "x", "special": True}]),
    "added is empty": json_with(added_tokens=[ADDED[0] | {"content": ""}, *ADDED[1:]]),
    "added with other id": json_with(added_tokens=[*ADDED, ADDED[0] | {"content": "a"}]),
    "added takes spaces": json_with(added_tokens=[ADDED[0] | {"rstrip": True}, *ADDED[1:]]),
    "no beginning": tiny_byte_level().model.replace(b"begin_of", b"start_of"),
    "normalises": json_with(normalizer={"type": "NFC"}),
    "own expression": json_with(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    ),
    "removes text": json_with(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}
    ),
    "puts a space before": json_with(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    ),
    "steps is a text": json_with(pre_tokenizer={"type": "Sequence", "pretokenizers": "x"}),
    "a step is a text": json_with(pre_tokenizer={"type": "Sequence", "pretokenizers": ["x"]}),
    "no steps": json_with(pre_tokenizer=None),
    "without space": tiny_byte_fallback().model.replace(b'"\xe2\x96\x81":', b'"\xe2\x96\x82":'),
    "another space": json_with(tiny_byte_fallback, normalizer=None, pre_tokenizer=METASPACE),
    "whole words": json_with(tiny_byte_fallback, "model", ignore_merges=True),
    "byte by name": changed_json(
        lambda f: f["model"]["merges"].append(["<0x0", "A>"]), tiny_byte_fallback
    ),
}
HOSTILE = {
    f"{kind}: {name}": content
    for kind, cases in (("sp", SENTENCEPIECE), ("tiktoken", TIKTOKEN), ("json", JSON))
    for name, content in cases.items()
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused(tmp_path, name):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        tokenizers.load(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sp: without_byte", "lacks 1 of the 256 bytes"),
        ("sp: no_bytes_at_all", "lacks 256 of the 256 bytes"),
        ("sp: no_bos", "has no control pieces <s> and </s>"),
        ("sp: text", "not a SentencePiece model, or damaged"),
        ("tiktoken: bad base64", "line 11: expected 'base64 rank', found b'C!== 10'"),
        ("tiktoken: crlf", r"line 1: expected 'base64 rank', found b'AA== 0\\r'"),
        ("tiktoken: rank twice", "10 is missing or stands twice"),
        ("tiktoken: rank missing", "300 is missing or stands twice"),
        ("tiktoken: token twice", "line 321: the token b.* stands twice"),
        ("tiktoken: byte missing", "lacks 1 of the 256 bytes"),
        ("tiktoken: bom", "begins with a byte order mark"),
        ("tiktoken: a pointer", "a pointer of Git LFS"),
        ("json: a word model", "model.type: Input should be 'BPE'"),
        ("json: byte missing", "lacks 1 of the 256 bytes"),
        ("json: merge of strangers", "merge 0, 'zq' and 'zq', is not of pieces"),
        ("json: own expression", "it cuts text in a way that is not LLaMA's"),
        ("json: deep", "recursion limit"),
        ("json: piece outside the alphabet", "the piece '日' is not spelt in bytes"),
        ("json: many lists", "more than 1,048,576 entries, too many for a tokenizer"),
        ("sp: many pieces", "more than 1,048,576 pieces, too many for a tokenizer"),
        ("sp: without_space", "has no piece for the space"),
        ("json: without space", "has no piece for the space"),
        ("json: no beginning", "has no special tokens that begin and end a text"),
    ],
)
def test_the_reason_is_named(tmp_path, name, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(TokenizerError, match=message):
        tokenizers.load(tmp_path)


def test_every_truncation_of_a_sentencepiece_file_is_refused():
    model = tiny_model()
    for end in range(len(model)):
        with pytest.raises(TokenizerError):
            tokenizers.SentencePiece(model[:end], "cut")


def damaged(model, draw):
    """The file with a few bytes or stretches changed, put in, taken out or doubled."""
    found = bytearray(model)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found))
        some = found[at : at + draw.choice((1, 2, 7, 40))]
        match draw.randrange(4):
            case 0:
                found[at] = draw.randrange(256)
            case 1:
                del found[at : at + len(some)]
            case 2:
                found[at:at] = some
            case 3:
                found[at:at] = draw.choice((b"0", b"9" * 30, b'"', b"[", b"\n", b"\xff", b"\0"))
    return bytes(found)


def survive(kind, count, seed):
    """Loads `count` damaged files, which may raise TokenizerError only; how many loaded."""
    draw, loaded, text = random.Random(seed), 0, "the llama 42 😀 <|eot_id|></s>"
    tokenizer = KINDS[kind]()
    for _ in range(count):
        model = damaged(tokenizer.model, draw)
        try:
            other = type(tokenizer)(model, "damaged")
        except TokenizerError:
            continue
        loaded += 1
        ids = other.encode(text)
        assert set(other.controls.values()).isdisjoint(ids)
        assert other.decode(ids) == text or not other.lossless, model
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_refused_or_harmless(kind):
    assert survive(kind, 150, seed=0) < 150


FUZZED_FILES = 100_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_random_damage_is_refused_or_harmless(kind):
    assert survive(kind, FUZZED_FILES // len(KINDS), seed=1) < FUZZED_FILES


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"none\.model: cannot be read"):
        tokenizers.load(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.model or tokenizer\.json"):
        tokenizers.load(tmp_path)


def test_a_huge_file_is_not_read(tmp_path):
    file = tmp_path / "tokenizer.model"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(TokenizerError, match="too large for a tokenizer"):
        tokenizers.load(file)
