"""The loss of a text: every token once, in its window, as fp64 arithmetic on full logits has it."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import converted, speaking_folder

import llama_jax
from llama_jax import cli
from llama_jax.config import ConfigError, ModelConfig, RopeScaling
from llama_jax.evaluate import command, perplexity
from llama_jax.evaluate.command import read_texts, resolve
from llama_jax.evaluate.perplexity import Score, Window, losses, windows
from llama_jax.evaluate.settings import EvaluateConfig
from llama_jax.model.layout import for_decoding, int8_axes, int8_shapes, quantize
from llama_jax.model.llama import Llama
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

CONFIG = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=10,
    d_ff=48,
    vocab_size=61,
    norm_eps=1e-5,
    rope_theta=1e4,
    tie_embeddings=False,
)
MODEL = Llama(CONFIG)
LENGTHS = (45, 2, 1, 9, 30, 0, 61)


def config(**changes):
    return ModelConfig.model_validate({**CONFIG.model_dump(), **changes})


def parameters(model=MODEL):
    """Random parameters, faster than `init`."""
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, model.shapes())


@pytest.fixture(scope="module")
def params():
    return parameters()


def documents(lengths=LENGTHS, vocab_size=CONFIG.vocab_size):
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens, length):
    """Logits (64, V) of one window of `length` tokens, padded."""
    at = jnp.arange(64)[None]
    return model.apply(params, tokens[None], at, (at < length).astype(jnp.int32)).value[0]


def direct(model, params, document, window, stride, length=None):
    """The loss of each token, from full logits and in fp64, each token in a window of its own.

    It begins at the first multiple of the stride from which the token is within reach; `length`
    stands for that of the window, by which dynamic frequencies go.
    """
    found = []
    for t in range(1, len(document)):
        begin = max(0, math.ceil((t - window) / stride)) * stride
        end = min(begin + window, len(document) - 1)
        tokens = np.zeros(64, np.int32)
        tokens[: end - begin] = document[begin:end]
        logits = np.asarray(full_logits(model, params, tokens, length or end - begin), np.float64)
        row = logits[t - 1 - begin]
        top = row.max()
        found.append(top + math.log(np.exp(row - top).sum()) - row[document[t]])
    return np.array(found)


def assert_same_losses(found, expected, tolerance=2e-6):
    assert [part.shape for part in found] == [part.shape for part in expected]
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(here, there, rtol=tolerance, atol=tolerance)


# --- windows ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 200), st.integers(1, 70), st.data())
def test_every_token_is_scored_once_with_the_context_that_is_promised(length, window, data):
    stride = data.draw(st.integers(1, window))
    found = list(windows(length, window, stride))
    scored = [t for w in found for t in range(w.first, w.end)]
    assert scored == list(range(1, length))
    assert not found or found[0].begin == 0
    for w in found:
        assert w.end - 1 - w.begin <= window
        for t in range(w.first, w.end):
            assert t - w.begin >= min(t, window - stride, window)
            assert t > w.begin


def test_windows_of_a_length_that_can_be_counted_by_hand():
    assert list(windows(12, window=6, stride=4)) == [
        Window(0, 1, 7),
        Window(4, 7, 11),
        Window(8, 11, 12),
    ]
    assert list(windows(7, window=6, stride=6)) == [Window(0, 1, 7)]
    assert list(windows(1, window=6, stride=6)) == []


# --- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride"), [(16, 8), (16, 16), (16, 1), (7, 3), (60, 20), (1, 1)]
)
def test_losses_are_those_of_full_logits_in_fp64(window, stride, params):
    ids = documents()
    found = losses(MODEL, params, ids, window, stride, batch_size=4)
    assert_same_losses(found, [direct(MODEL, params, one, window, stride) for one in ids])


def test_a_window_as_long_as_the_text_is_one_pass(params):
    (ids,) = documents((40,))
    logits = MODEL.apply(params, np.array([ids[:-1]]), np.arange(39)[None]).value[0]
    expected = -jax.nn.log_softmax(logits)[np.arange(39), ids[1:]]
    for window in (39, 40, 1000):
        assert_same_losses(losses(MODEL, params, [ids], window, 1), [np.asarray(expected)])


def test_losses_do_not_depend_on_the_batch_nor_on_the_order(params):
    ids = documents()
    expected = losses(MODEL, params, ids, 16, 5, batch_size=1)
    assert_same_losses(losses(MODEL, params, ids, 16, 5, batch_size=4), expected)
    assert_same_losses(losses(MODEL, params, ids[::-1], 16, 5)[::-1], expected)


def test_progress_adds_up_to_all_tokens(params):
    seen = []
    losses(MODEL, params, documents(), 16, 5, batch_size=3, advance=seen.append)
    assert sum(seen) == sum(max(length - 1, 0) for length in LENGTHS)
    assert len(seen) > 3


@pytest.mark.parametrize("layout", ["stacked", "decoding"])
def test_a_cache_in_pieces_changes_nothing(layout, params, monkeypatch):
    """Rows longer than a piece, so that later pieces see the earlier ones through the cache."""
    monkeypatch.setattr(perplexity, "PIECE", 16)
    ids = documents((70, 33, 5))
    expected = [direct(MODEL, params, one, 40, 20) for one in ids]
    if layout == "decoding":
        params = for_decoding(params, rows=8)
    for cache in (None, "float32"):
        found = losses(MODEL, params, ids, 40, 20, batch_size=2, cache_dtype=cache)
        assert_same_losses(found, expected)


def test_a_narrow_cache_shows_in_the_loss(params):
    ids = documents((70, 33, 5))
    expected = losses(MODEL, params, ids, 40, 20)
    off = {}
    for cache in ("bfloat16", "int8"):
        found = losses(MODEL, params, ids, 40, 20, cache_dtype=cache)
        off[cache] = max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))
        assert 1e-4 < off[cache] < 0.1, cache
        # The first token is predicted from itself alone, whose value is rounded too.
        assert (found[0] != expected[0]).mean() > 0.9


def test_dynamic_scaling_goes_by_the_window_with_a_cache_and_by_the_text_without():
    scaling = RopeScaling(type="dynamic", factor=4.0, original_context=8)
    model = Llama(config(rope_scaling=scaling))
    params = parameters(model)
    ids = documents((30, 12))
    expected = [direct(model, params, one, 20, 10) for one in ids]
    assert_same_losses(losses(model, params, ids, 20, 10), expected)
    through = [direct(model, params, one, 20, 10, length=20) for one in ids]
    found = losses(model, params, ids, 20, 10, cache_dtype="float32")
    assert_same_losses(found, through)
    assert not np.allclose(found[1], expected[1], rtol=1e-4)


@pytest.mark.parametrize("weights", ["floats", "int8"])
@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_mesh_changes_nothing(cache, weights, params):
    """2 x 2 devices; 3 rows, which two devices do not divide."""
    ids = documents((20, 17, 19))
    model = Llama(CONFIG.model_copy(update={"vocab_size": 64}), rules=PRESETS["decode"])
    params, axes, shapes = parameters(model), model.axes(), model.shapes()
    if weights == "int8":
        params, axes, shapes = quantize(params), int8_axes(axes), int8_shapes(shapes)
    expected = losses(model, params, ids, 32, 16, cache_dtype=cache)
    sizes = {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    mesh = make_mesh(sizes, jax.devices()[:4])
    placed = jax.device_put(params, shardings(shapes, axes, mesh, model.rules))
    with jax.set_mesh(mesh):
        found = losses(model, placed, ids, 32, 16, cache_dtype=cache)
    assert_same_losses(found, expected, 2e-5 if cache is None and weights == "floats" else 2e-3)


def test_logits_of_a_batch_never_exist_together():
    """Temporary memory of a batch of 4,096 tokens."""
    model = Llama(config(vocab_size=2**14))
    ids = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    shapes = model.shapes()
    program = perplexity._piece_losses.lower(model, shapes, ids, ids, ids, ids, None).compile()
    assert program.memory_analysis().temp_size_in_bytes < ids.size * 2**14 * 4


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 61], "document 1: token id 61 is not in the model's vocabulary of 61"),
        ([1, -1], "document 1: token id -1"),
        ([1, 2.5], "document 1: expected a list of token ids"),
        ([[1, 2]], "document 1: expected a list of token ids"),
    ],
)
def test_ids_that_jax_would_clamp_are_refused(ids, message, params):
    with pytest.raises(ValueError, match=message):
        losses(MODEL, params, [[1, 2], ids], 16, 8)


@pytest.mark.parametrize(("window", "stride"), [(8, 9), (8, 0), (0, 0)])
def test_a_stride_that_leaves_tokens_out_is_refused(window, stride, params):
    with pytest.raises(ValueError, match=f"stride is {stride}: give 1 to {window}"):
        losses(MODEL, params, documents(), window, stride)


def test_a_batch_of_none_is_refused(params):
    with pytest.raises(ValueError, match="batch_size is 0"):
        losses(MODEL, params, documents(), 8, 4, batch_size=0)


def test_a_loss_that_is_not_finite_is_an_error(params):
    broken = {**params, "final_norm": params["final_norm"] * jnp.nan}
    with pytest.raises(FloatingPointError, match="document 0: the loss of tokens 1 to 9"):
        losses(MODEL, broken, documents((10,)), 16, 8)


def test_the_score_of_a_model_that_knows_nothing():
    """61 equal chances for each token; two tokens to a byte."""
    score = Score(nll=100 * math.log(61), tokens=100, bytes=50)
    assert math.isclose(score.perplexity, 61)
    assert math.isclose(score.nll_per_token, math.log(61))
    assert math.isclose(score.bits_per_byte, 2 * math.log2(61))
    assert math.isclose(score.nll_per_byte, 2 * math.log(61))
    assert Score(nll=1e6, tokens=10, bytes=10).perplexity == math.inf


# --- texts and windows that are asked for ----------------------------------------------------


def test_a_text_is_one_document_and_a_line_of_json_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt", "text") == ["one\n\ntwo\n"]
    lines = ['{"text": "one\\ntwo"}', "", '{"text": ""}', '{"text": "three", "other": 1}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl", "text") == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"caf\xe9", r"document 1: bad UTF-8 \(byte 3"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', r"document 2: no text \('text' should"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', "document 2: no text"),
        ("a.jsonl", b'{"text": "one"}\n{', "document 2: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "document 1: lone surrogate"),
        ("a.jsonl", b'\n\n{"text": ""}\n', "holds no text"),
        ("a.jsonl.gz", b"no archive", "document 1: cannot be read"),
    ],
)
def test_a_text_that_would_be_scored_in_part_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(tmp_path / name, "text")


def test_a_text_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            read_texts(path, "text")


def settings_of(**given):
    return EvaluateConfig(checkpoint="a", perplexity="b", **given)


@pytest.mark.parametrize(
    ("given", "context", "expected"),
    [
        ({}, 512, (512, 256)),
        ({}, 131072, (2048, 1024)),
        ({}, None, (2048, 1024)),
        ({"window": 100}, None, (100, 50)),
        ({"window": 1}, None, (1, 1)),
        ({"window": 600, "extrapolate": True}, 512, (600, 300)),
        ({"stride": 512}, 512, (512, 512)),
    ],
)
def test_windows_suit_the_model_unless_they_are_asked_for(given, context, expected):
    assert resolve(settings_of(**given), context) == expected


def test_windows_that_do_not_suit_the_model_are_refused():
    with pytest.raises(ConfigError, match="trained for 512 positions: give --window 512, or --ext"):
        resolve(settings_of(window=513), 512)
    with pytest.raises(ConfigError, match=r"stride \(600\) must be at most window \(512\)"):
        resolve(settings_of(stride=600), 512)
    with pytest.raises(ValueError, match=r"stride \(9\) must be at most window \(8\)"):
        settings_of(window=8, stride=9)


# --- the command -----------------------------------------------------------------------------

TEXT = "the cat sat on the mat, abc abd stop. " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of ours and of theirs, and texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    speaking_folder(folder / "hf", "llama2_gqa")
    converted(folder / "hf", folder / "ours", "llama_jax")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def evaluated(folder, *flags, model="ours"):
    out = folder / "result" / "out.json"
    paths = ["--checkpoint", str(folder / model), "--perplexity", str(folder / "text.txt")]
    assert cli.main(["evaluate", *paths, "--out", str(out), *flags]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_command_gives_the_loss_of_the_whole_text(folder, capsys):
    found = evaluated(folder, "--window", "64", "--stride", "16")
    model = llama_jax.load(folder / "hf")
    ids = model.tokenizer.encode(TEXT, bos=True)
    (expected,) = losses(model.model, model.params, [ids], 64, 16)
    total = float(expected.sum(dtype=np.float64))
    assert math.isclose(found["nll"], total, rel_tol=1e-6)
    assert math.isclose(found["perplexity"], math.exp(total / (len(ids) - 1)), rel_tol=1e-6)
    assert math.isclose(found["bits_per_byte"], total / math.log(2) / len(TEXT), rel_tol=1e-6)
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, len(TEXT))
    assert (found["window"], found["stride"], found["documents"]) == (64, 16, 1)
    assert found["settings"]["window"] == 64
    shown = capsys.readouterr().out
    assert f"{found['perplexity']:,.4f}" in shown
    assert "out.json" in shown


def test_the_command_prints_json_alone_when_asked(folder, capsys):
    found = evaluated(folder, "--json")
    assert json.loads(capsys.readouterr().out) == found
    assert (found["window"], found["stride"]) == (128, 64)  # the model's own context


def test_weights_and_cache_in_int8_change_the_loss_a_little(folder):
    plain = evaluated(folder)
    narrow = [
        evaluated(folder, "--weights", "int8"),
        evaluated(folder, "--cache", "int8"),
        evaluated(folder, "--dtype", "bfloat16"),
    ]
    for found in narrow:
        assert 0 < abs(found["nll_per_token"] / plain["nll_per_token"] - 1) < 0.01
    assert [found["int8_weights"] for found in (plain, *narrow)] == [False, True, False, False]
    assert narrow[0]["parameter_bytes"] < 0.4 * plain["parameter_bytes"]
    same = evaluated(folder, "--cache", "float32")
    assert math.isclose(same["nll"], plain["nll"], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--perplexity", "none.txt"], "none.txt: no such file"),
        (["--window", "129"], "give --window 128"),
        (["--window", "8", "--stride", "9"], "must be at most window (8)"),
        (["--cache", "int4"], "cache"),
        (["--out", "."], "is a folder"),
    ],
)
def test_the_command_refuses_in_one_sentence(flags, message, folder, capsys):
    paths = ["--checkpoint", str(folder / "ours"), "--perplexity", str(folder / "text.txt")]
    given = paths if "--perplexity" not in flags else paths[:2]
    assert cli.main(["evaluate", *given, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_text_without_tokens_is_refused(folder, monkeypatch):
    model = llama_jax.load(folder / "ours")
    monkeypatch.setattr(type(model.tokenizer), "_cut", lambda self, text: [])
    given = {"checkpoint": str(folder / "ours"), "perplexity": str(folder / "text.txt")}
    with pytest.raises(ConfigError, match="makes no tokens of this text"):
        command.evaluate(EvaluateConfig(**given))


@pytest.mark.parity
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 64), (48, 5), (1000, 500)])
def test_the_loss_is_that_of_transformers(window, stride, folder):
    """Their own loss, with the labels of what a window does not score masked."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model = llama_jax.load(folder / "hf")
    ids = model.tokenizer.encode(TEXT, bos=True)
    (found,) = losses(model.model, model.params, [ids], window, stride)
    total, counted = 0.0, 0
    for begin in range(0, len(ids), stride):
        # One more than the window: the last is only a label. They shift the labels themselves.
        row = torch.tensor([ids[begin : begin + window + 1]])
        labels = row.clone()
        labels[:, : counted + 1 - begin] = -100
        new = int((labels[:, 1:] != -100).sum())
        if new:
            with torch.no_grad():
                total += float(theirs(row, labels=labels).loss) * new
            counted += new
    assert counted == len(ids) - 1
    np.testing.assert_allclose(found.sum(dtype=np.float64), total, rtol=2e-6)
