"""Meta's folders: layout and rules of its own code; a .pth is read as data and never run."""

import contextlib
import json
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from fuzz import LONG, SHORT, survive
from models import GOLDEN, converted, huggingface_folder

from llama_jax.config import ConfigError, ModelConfig, RopeScaling, load_model, model_names
from llama_jax.convert import meta, torch_file
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import load_params


@pytest.fixture
def folder(tmp_path):
    """A sound folder of one shard that a test may damage."""
    return converted(GOLDEN / "llama3", tmp_path / "meta", "meta")


def change_params(folder, **values):
    path = folder / "params.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))


# --- params.json -----------------------------------------------------------------------------

# dim, multiple_of, ffn_dim_multiplier -> width, of published files.
PUBLISHED = {
    "llama_7b": (256, None),
    "llama_13b": (256, None),
    "llama_33b": (256, None),
    "llama_65b": (256, None),
    "llama2_70b": (4096, 1.3),
    "llama3_8b": (1024, 1.3),
    "llama3_70b": (4096, 1.3),
    "llama3.1_405b": (4096, 1.2),
    "llama3.2_1b": (256, 1.5),
    "llama3.2_3b": (256, 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_width_of_published_models_follows_from_their_files(name):
    config = load_model(name)
    assert meta.feed_forward_width(config.d_model, *PUBLISHED[name]) == config.d_ff


@pytest.mark.parametrize("name", sorted(set(model_names())))
def test_every_published_architecture_is_written_and_read_back(name):
    config = load_model(name)
    values = meta.params_values(config)
    width = (values["multiple_of"], values.get("ffn_dim_multiplier"))
    assert meta.feed_forward_width(config.d_model, *width) == config.d_ff
    # 3.2 has a factor of 32, where Meta's key says scaled alone.
    assert "rope_scaling_factor" not in values
    assert values.get("use_scaled_rope", False) is (config.rope_scaling.type == "llama3")
    assert ("rope_theta" in values) is (config.rope_theta != 10000.0)


@pytest.mark.parametrize("d_ff", [1, 7, 48, 171, 172, 4097, 11007])
def test_any_width_is_given_back(d_ff):
    config = ModelConfig(
        **{"d_model": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "d_head": 16},
        **{"d_ff": d_ff, "vocab_size": 8, "norm_eps": 1e-5, "rope_theta": 1e4},
        tie_embeddings=False,
    )
    values = meta.params_values(config)
    width = (values["multiple_of"], values.get("ffn_dim_multiplier"))
    assert meta.feed_forward_width(64, *width) == d_ff


def test_the_factor_of_scaled_rope_is_8_and_32_where_embeddings_are_tied(tmp_path):
    for case, factor in (("llama3.1", 8.0), ("llama3.2_tied", 32.0)):
        rope = {"original_max_position_embeddings": 8192}
        first = huggingface_folder(tmp_path / case, case, rope_parameters=rope)
        there = converted(first, tmp_path / f"{case}_meta", "meta")
        assert "factor" not in (there / "params.json").read_text()
        assert open_source(there).config.rope_scaling == RopeScaling(
            type="llama3", factor=factor, **meta.SCALED_ROPE
        )
        change_params(there, rope_scaling_factor=16.0)
        assert open_source(there).config.rope_scaling.factor == 16.0


def test_what_old_files_leave_out_is_found(tmp_path):
    there = converted(GOLDEN / "llama1", tmp_path / "there", "meta", shards=2)
    change_params(there, vocab_size=-1, n_kv_heads=..., rope_theta=..., multiple_of=48)
    config = open_source(there).config
    assert (config.vocab_size, config.n_kv_heads, config.rope_theta) == (64, 4, 10000.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"norm_eps": ...}, "norm_eps: is required"),
        ({"dim": 33}, r"dim \(33\) is not a multiple of n_heads"),
        ({"n_heads": 0}, "is not a multiple of n_heads"),
        ({"dim": "32"}, "dim"),
        ({"n_layers": 1}, r"layers\.1\.\S+ is not part"),
        ({"n_layers": 10**12}, r"layers\.2\.\S+ is missing"),
        ({"n_kv_heads": 4}, r"wk\.weight has shape \(16, 32\), expected \(32, 32\)"),
        ({"vocab_size": 65}, r"tok_embeddings\.weight has shape \(64, 32\), expected \(65, 32\)"),
        ({"multiple_of": 0}, "out of range"),
        ({"ffn_dim_multiplier": 1e300}, "out of range"),
        ({"ffn_dim_multiplier": float("nan")}, "finite"),
        ({"multiple_of": 64, "ffn_dim_multiplier": ...}, r"w1\.weight has shape \(48, 32\)"),
    ],
)
def test_params_that_do_not_fit_are_refused(folder, values, said):
    change_params(folder, **values)
    with pytest.raises(ConfigError, match=said):
        open_source(folder)


# --- shards ----------------------------------------------------------------------------------


def shard_shapes(folder, number):
    path = folder / f"consolidated.{number:02}.pth"
    return {name: tensor.shape for name, tensor in torch_file.read(path).items()}


@pytest.mark.parametrize(("case", "split"), [("llama2_gqa", (64, 8)), ("llama3", (16, 32))])
def test_each_file_holds_the_parts_that_meta_s_code_expects(case, split, tmp_path):
    # d_model 32, 4 heads of 8, 2 kv heads, d_ff 48, vocabulary 64, in 4 files: each kv head twice.
    there = converted(GOLDEN / case, tmp_path / "there", "meta", shards=4)
    for number in range(4):
        shapes = shard_shapes(there, number)
        layer = "layers.1."
        assert shapes["tok_embeddings.weight"] == split
        assert shapes["output.weight"] == (16, 32)
        assert shapes[layer + "attention.wq.weight"] == (8, 32)
        assert shapes[layer + "attention.wk.weight"] == (8, 32)
        assert shapes[layer + "attention.wv.weight"] == (8, 32)
        assert shapes[layer + "attention.wo.weight"] == (32, 8)
        assert shapes[layer + "feed_forward.w1.weight"] == (12, 32)
        assert shapes[layer + "feed_forward.w2.weight"] == (32, 12)
        assert shapes[layer + "feed_forward.w3.weight"] == (12, 32)
        assert shapes[layer + "attention_norm.weight"] == (32,)
        assert len(shapes) == 3 + 2 * 9
    files = [torch_file.read(there / f"consolidated.{n:02}.pth") for n in range(4)]
    keys = [file["layers.0.attention.wk.weight"].read() for file in files]
    np.testing.assert_array_equal(keys[0], keys[1])
    np.testing.assert_array_equal(keys[2], keys[3])
    assert (keys[0] != keys[2]).any()


def test_a_missing_shard_is_named(tmp_path):
    there = converted(GOLDEN / "llama1", tmp_path / "there", "meta", shards=4)
    (there / "consolidated.02.pth").unlink()
    with pytest.raises(ConfigError, match=r"consolidated\.02\.pth is missing"):
        open_source(there)
    (there / "consolidated.03.pth").unlink()
    with pytest.raises(ConfigError, match="does not hold this model"):
        open_source(there)
    for path in there.glob("*.pth"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no consolidated\.00\.pth"):
        open_source(there)


def test_repeated_heads_that_differ_are_refused(tmp_path):
    there = converted(GOLDEN / "mqa", tmp_path / "there", "meta", shards=2)
    other = converted(GOLDEN / "llama3", tmp_path / "other", "meta", shards=2)
    first = (there / "consolidated.00.pth").read_bytes()
    key = torch_file.read(there / "consolidated.00.pth")["layers.0.attention.wk.weight"].read()
    assert first.count(key.tobytes()) == 1
    changed = first.replace(key.tobytes(), (key + 1).tobytes())
    (there / "consolidated.00.pth").write_bytes(changed)
    with pytest.raises(ConfigError, match=r"wk\.weight should be the same in 2 files, and is not"):
        load_params(open_source(there))
    assert load_params(open_source(other))


def test_the_frequencies_meta_stores_are_ignored(folder):
    path = folder / "consolidated.00.pth"
    arrays = {name: stored.read().copy() for name, stored in torch_file.read(path).items()}
    expected = load_params(open_source(folder))
    write_pth(path, arrays | {"rope.freqs": np.ones(4, np.float32)})
    loaded = load_params(open_source(folder))
    np.testing.assert_array_equal(loaded["embed"], expected["embed"])
    write_pth(path, arrays | {"bias": np.ones(4, np.float32)})
    with pytest.raises(ConfigError, match="bias is not part of the model"):
        open_source(folder)


def write_pth(path, arrays):
    shapes = {name: array.shape for name, array in arrays.items()}
    with torch_file.writing(path, shapes, "float32") as add:
        for array in arrays.values():
            add(array)


# --- crafted pickles -------------------------------------------------------------------------


def words(module, name):
    return f"c{module}\n{name}\n".encode()


def unicode(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


FLOATS, KEY = words("torch", "FloatStorage"), unicode("0")


def tensor(
    storage=FLOATS,
    key=KEY,
    length=b"K\x04",
    offset=b"K\x00",
    shape=b"(K\x04t",
    strides=b"(K\x01t",
):
    """The pickle of four numbers in the entry data/0; parts of it may be others."""
    place = b"(" + unicode("storage") + storage + key + unicode("cpu") + length + b"tQ"
    hooks = b"\x89" + words("collections", "OrderedDict") + b")R"
    rebuild = words("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + place + offset + shape + strides + hooks + b"tR"


TENSOR = tensor()


def state(name=b"", value=TENSOR):
    """A pickle of {"a": tensor}."""
    return b"\x80\x02}(" + (name or unicode("a")) + value + b"u."


def touch(canary):
    """The text of a command that creates the canary."""
    return unicode(f"touch {canary}")


def open_call(canary):
    return unicode(f"open({str(canary)!r}, 'w').close()")


# Each would create the canary if it were run by pickle: `test_the_payloads_work` shows it.
PAYLOADS = {
    "os.system": lambda c: b"\x80\x02" + words("os", "system") + b"(" + touch(c) + b"tR.",
    "posix.system": lambda c: b"\x80\x02" + words("posix", "system") + touch(c) + b"\x85R.",
    "eval": lambda c: b"\x80\x02" + words("builtins", "eval") + open_call(c) + b"\x85R.",
    "exec": lambda c: b"\x80\x02" + words("builtins", "exec") + open_call(c) + b"\x85R.",
    "as a value": lambda c: state(value=words("os", "system") + touch(c) + b"\x85R"),
    "as a name": lambda c: state(name=words("os", "system") + touch(c) + b"\x85R"),
    "nested reduce": lambda c: (
        b"\x80\x02" + words("builtins", "getattr") + words("builtins", "__import__")
        + unicode("os") + b"\x85R" + unicode("system") + b"\x86R" + touch(c) + b"\x85R."
    ),
    "subprocess": lambda c: (
        b"\x80\x02" + words("subprocess", "call") + b"](" + unicode("touch") + unicode(str(c))
        + b"e\x85R."
    ),
    "INST": lambda c: b"(" + touch(c) + b"ios\nsystem\n.",
    "OBJ": lambda c: b"(" + words("os", "system") + touch(c) + b"o.",
    "NEWOBJ": lambda c: (
        b"\x80\x02" + words("pathlib", "PosixPath") + unicode(str(c)) + b"\x85\x81"
        + b"0" + words("os", "system") + touch(c) + b"\x85R."
    ),
    "STACK_GLOBAL": lambda c: (
        b"\x80\x04" + unicode("os") + unicode("system") + b"\x93" + touch(c) + b"\x85R."
    ),
    "build with state": lambda c: (
        b"\x80\x02" + words("collections", "OrderedDict") + b")R}" + unicode("x")
        + words("os", "system") + touch(c) + b"\x85Rsb."
    ),
    "argument of an ordered dictionary": lambda c: (
        b"\x80\x02" + words("collections", "OrderedDict") + words("os", "system") + touch(c)
        + b"\x85R\x85R."
    ),
    "after the end of another": lambda c: (
        b"\x80\x02" + words("runpy", "_run_code") + words("builtins", "compile") + open_call(c)
        + unicode("x") + unicode("exec") + b"\x87R}\x86R."
    ),
}  # fmt: skip
# Functions of torch itself that read files or load code, and what else must not be named.
GADGETS = [
    *("torch load", "torch.hub load", "torch.storage _load_from_bytes", "torch.jit load"),
    *("torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2"),
    *("torch.utils.collect_env run", "torch.serialization load", "torch Tensor"),
    *("torch.distributed.rpc PythonUDF", "numpy.core.multiarray _reconstruct"),
    *("copyreg _reconstructor", "collections defaultdict", "__builtin__ apply", "codecs encode"),
    "torch os.systemStorage",
]


def zipped(path, data, entries=None, compression=zipfile.ZIP_STORED):
    """A file as torch.save makes it, around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (
            {"archive/data/0": bytes(16)} if entries is None else entries
        ).items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_work(name, tmp_path):
    """Else the next test would prove nothing."""
    canary = tmp_path / "canary"
    # Errors come after they have done it; torch, which some name, may be missing.
    with contextlib.suppress(TypeError, pickle.UnpicklingError, ModuleNotFoundError):
        pickle.loads(PAYLOADS[name](canary))
    assert canary.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_in_a_pickle_is_run(name, folder, tmp_path):
    canary = tmp_path / "canary"
    zipped(folder / "consolidated.00.pth", PAYLOADS[name](canary))
    with pytest.raises(ConfigError, match=r"which no list of tensors needs|damaged pickle"):
        open_source(folder)
    assert not canary.exists()


@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("place", ["called", "as a storage", "as a value"])
def test_no_other_function_may_be_named(gadget, place, folder):
    named = words(*gadget.split(" "))
    pickled = {
        "called": state(value=named + unicode("x") + b"\x85R"),
        "as a storage": state(value=tensor(storage=named)),
        "as a value": state(value=named),
    }[place]
    zipped(folder / "consolidated.00.pth", pickled)
    with pytest.raises(ConfigError, match="which no list of tensors needs"):
        open_source(folder)


def laughs(levels):
    """A tuple of two of a tuple of two ...: 2^levels when written out, a few bytes here."""
    twice = (b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return b"\x80\x02K\x01" + b"".join(twice) + b"."


CRAFTED = {
    "no pickle": (b"", "damaged pickle"),
    "garbage": (b"\xff" * 50, "damaged pickle"),
    "no end": (state()[:-1], "damaged pickle"),
    "empty stack": (b"\x80\x02.", "damaged pickle"),
    "a number": (b"\x80\x02K\x01.", "not a dictionary of tensors"),
    "a list": (b"\x80\x02].", "uses EMPTY_LIST"),
    "a dictionary of numbers": (state(value=b"K\x01"), "not a dictionary of tensors"),
    "two deep": (state(value=b"}"), "not a dictionary of tensors"),
    "a word": (state(value=words("torch", "FloatStorage")), "not a dictionary of tensors"),
    "a name of no text": (state(name=b"K\x01"), "damaged pickle"),
    "a name twice": (b"\x80\x02}(" + (unicode("a") + TENSOR) * 2 + b"u.", "a stands twice"),
    "2^31 numbers": (state(value=tensor(shape=b"(J\xff\xff\xff\x7ft")), "does not fit its array"),
    "negative size": (state(value=tensor(shape=b"(J\xff\xff\xff\xfft")), "damaged"),
    "size 2^200": (state(value=tensor(shape=b"(\x8a\x1a" + b"\0" * 25 + b"\x01t")), "damaged"),
    "size of text": (state(value=tensor(shape=b"(" + unicode("4") + b"t")), "damaged"),
    "true as a size": (state(value=tensor(shape=b"(\x88t")), "damaged"),
    "shape of no tuple": (state(value=tensor(shape=b"K\x04")), "damaged"),
    "offset": (state(value=tensor(offset=b"K\x01")), "does not fit its array of 4"),
    "negative offset": (state(value=tensor(offset=b"J\xff\xff\xff\xff")), "damaged"),
    "stride 0": (state(value=tensor(strides=b"(K\x00t")), "does not fit its array of 4"),
    "stride 2": (state(value=tensor(strides=b"(K\x02t")), "does not fit its array of 4"),
    "negative stride": (state(value=tensor(strides=b"(J\xff\xff\xff\xfft")), "damaged"),
    "more strides": (state(value=tensor(strides=b"(K\x01K\x01t")), "damaged"),
    "another storage": (state(value=tensor(key=unicode("1"))), "a is missing"),
    "storage outside": (state(value=tensor(key=unicode("../data.pkl"))), "expected 16 bytes"),
    "longer storage": (state(value=tensor(length=b"K\x05")), "expected 20 bytes"),
    "narrower storage": (
        state(value=tensor(storage=words("torch", "HalfStorage"))),
        "of 16 bytes, expected 8",
    ),
    "doubles": (state(value=tensor(storage=words("torch", "DoubleStorage"))), "does not hold"),
    "memory of a place 2^32": (b"\x80\x02}r\xff\xff\xff\xff.", "does not hold this model"),
    "a place never filled": (b"\x80\x02h\x07.", "damaged pickle"),
    "text of 2^63 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b".", "damaged pickle"),
    "number of 2^31 bytes": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "damaged"),
    "decimal of a million digits": (b"I" + b"9" * 10**6 + b"\n.", "damaged pickle|uses INT"),
    "many marks": (b"\x80\x02" + b"(" * 10**5 + b".", "damaged pickle"),
    "nested tuples": (b"\x80\x02)" + b"\x85" * 10**5 + b".", "not a dictionary"),
    "marks and tuples": (b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".", "not a dict"),
    "many steps": (b"\x80\x02" + b"}" * 2**19 + b".", "too long for a list of tensors"),
    "a billion laughs": (laughs(200), "not a dictionary of tensors"),
    "a billion laughs as a name": (state(name=laughs(200)[2:-1]), "damaged pickle"),
    "a billion laughs called": (laughs(200)[:-1] + b"\x85R.", "damaged pickle|calls what"),
    "too long": (b"\x80\x02" + b"N" * 2**20 + b".", "too large for a list of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused(name, folder):
    content, said = CRAFTED[name]
    path = zipped(folder / "consolidated.00.pth", content)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=said):
            open_source(folder)
        # A value of one byte in the file, a nested tuple, takes 48 in Python.
        assert tracemalloc.get_traced_memory()[1] <= 64 * 2**20 + 80 * path.stat().st_size
    finally:
        tracemalloc.stop()


# --- crafted zips ----------------------------------------------------------------------------


def test_a_sound_file_of_these_parts_is_read(tmp_path):
    """Else the refusals above and below could have another reason."""
    path = zipped(
        tmp_path / "a.pth", state(), {"archive/data/0": np.arange(4, dtype="f4").tobytes()}
    )
    np.testing.assert_array_equal(torch_file.read(path)["a"].read(), np.arange(4))


def test_a_compressed_entry_is_refused_unread(folder):
    bomb = b"N" * 10**8
    zipped(folder / "consolidated.00.pth", bomb, {}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="is compressed"):
        open_source(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "the array of a is missing"),
        ({"../../archive/data/0": bytes(16)}, "the array of a is missing"),
        ({"/archive/data/0": bytes(16)}, "the array of a is missing"),
        ({"archive/data/0": bytes(15)}, "of 15 bytes, expected 16"),
        ({"archive/data/0": bytes(16), "other/data.pkl": state()}, "holds 2 data.pkl"),
        ({"archive/data/0": bytes(16), "archive/byteorder": b"big"}, "big-endian"),
    ],
)
def test_zips_without_the_right_arrays_are_refused(entries, said, folder):
    zipped(folder / "consolidated.00.pth", state(), entries)
    with pytest.raises(ConfigError, match=said):
        open_source(folder)
    assert not (folder.parent / "archive").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_stands_twice_is_refused(folder):
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", state())
    with pytest.raises(ConfigError, match="stands twice"):
        open_source(folder)


def place_of(content, signature, which=0):
    places = [i for i in range(len(content)) if content.startswith(signature, i)]
    return places[which]


@pytest.mark.parametrize(
    ("signature", "which", "offset", "code", "value", "said"),
    [
        # An entry of the directory: sizes, place of the header, lengths of name and extra field.
        (b"PK\x01\x02", 1, 20, "<I", 2**31, "is compressed"),
        (b"PK\x01\x02", 1, 42, "<I", 2**32 - 2, "damaged zip|reaches beyond"),
        (b"PK\x01\x02", 1, 42, "<I", 1, "reaches beyond"),
        (b"PK\x01\x02", 1, 28, "<H", 65535, "damaged zip"),
        (b"PK\x01\x02", 1, 30, "<H", 65535, "cut off"),
        (b"PK\x01\x02", 1, 42, "<I", 0, "overlap"),
        # The header of an entry: length of its name.
        (b"PK\x03\x04", 1, 26, "<H", 65535, "reaches beyond"),
        # The end: size and place of the directory.
        (b"PK\x05\x06", 0, 12, "<I", 2**32 - 1, "not inside the file"),
        (b"PK\x05\x06", 0, 16, "<I", 2**32 - 2, "not inside the file"),
        (b"PK\x05\x06", 0, 16, "<I", 5, "damaged zip"),
        (b"PK\x05\x06", 0, 0, "<I", 0, "no directory"),
        (b"PK\x03\x04", 0, 0, "<I", 0, "not a zip"),
    ],
)
def test_numbers_of_a_zip_are_not_believed(signature, which, offset, code, value, said, folder):
    path = zipped(folder / "consolidated.00.pth", state())
    content = bytearray(path.read_bytes())
    struct.pack_into(code, content, place_of(content, signature, which) + offset, value)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        open_source(folder)


def test_both_sizes_of_an_entry_larger_than_the_file_are_refused(folder):
    path = zipped(folder / "consolidated.00.pth", state())
    content = bytearray(path.read_bytes())
    struct.pack_into("<II", content, place_of(content, b"PK\x01\x02", 1) + 20, 2**31, 2**31)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="reaches beyond the file"):
        open_source(folder)


def test_a_tar_and_an_old_pickle_are_refused(folder):
    for content in (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"archive/" + b"\0" * 600,
        b"",
        b"P",
    ):
        (folder / "consolidated.00.pth").write_bytes(content)
        with pytest.raises(ConfigError, match=r"not a zip|cannot be read"):
            open_source(folder)


def test_entries_beyond_four_gigabytes_are_found_by_their_wide_fields():
    extra = struct.pack("<HHQQ", 1, 16, 2**33, 2**34)
    assert torch_file._wide(extra, [2**32 - 1, 2**32 - 1, 7]) == [2**33, 2**34, 7]
    assert torch_file._wide(b"FB\x02\x00ZZ" + extra, [5, 2**32 - 1, 7]) == [5, 2**33, 7]


def test_a_file_cut_anywhere_is_refused(folder):
    path = folder / "consolidated.00.pth"
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 499), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:place])
        with pytest.raises(ConfigError, match=r"consolidated\.00\.pth"):
            open_source(folder)


@pytest.mark.parametrize("inputs", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(inputs, folder):
    path = folder / "consolidated.00.pth"
    content = path.read_bytes()

    def read_all():
        load_params(open_source(folder))

    assert survive(read_all, path, content, inputs, head=4000, tail=2500) > inputs / 2


def test_ordered_dictionaries_with_versions_are_read(tmp_path):
    """state_dict() of a module carries `_metadata`, an attribute."""
    versions = (
        words("collections", "OrderedDict") + b")R}" + unicode("_metadata")
        + words("collections", "OrderedDict") + b")R(" + unicode("") + b"}" + unicode("version")
        + b"K\x01su" + b"sb"
    )  # fmt: skip
    data = b"\x80\x02" + versions + b"(" + unicode("a") + TENSOR + b"u."
    path = zipped(tmp_path / "a.pth", data)
    assert set(torch_file.read(path)) == {"a"}
