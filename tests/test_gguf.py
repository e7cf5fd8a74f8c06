"""GGUF files: read as the gguf library reads them, refused where a number cannot be trusted."""

import os
import struct
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from fuzz import LONG, SHORT, survive
from models import GOLDEN, converted, huggingface_folder

from llama_jax.config import ConfigError
from llama_jax.convert import gguf_file, names
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import load_params

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A sound file, as bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    return converted(GOLDEN / "llama3", folder / "tiny.gguf", "gguf").read_bytes()


def read_all(path):
    """Every tensor of a file."""
    load_params(open_source(path))


# --- what is written and read ----------------------------------------------------------------


def test_the_gguf_library_reads_what_we_write(tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama3.1")
    reader = gguf.GGUFReader(converted(first, tmp_path / "there.gguf", "gguf"))
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["llama.attention.head_count_kv"] == 1
    assert said["llama.rope.dimension_count"] == 16
    assert said["llama.context_length"] == 128
    assert said["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # factor 8, 1 to 4, 64 positions, base 10,000, 8 pairs: by hand from the rule of Llama 3.1
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)
    blend = (64 / wavelengths - 1) / 3
    blended = 1 / ((1 - blend) / 8 + blend)
    divisors = np.select([wavelengths < 16, wavelengths > 64], [1.0, 8.0], blended)
    np.testing.assert_allclose(tensors["rope_freqs.weight"].data, divisors, rtol=1e-6)
    # Meta's order of pairs, which llama.cpp rotates: rows (2i, 2i + 1) are (i, i + 8) of ours.
    ours = open_source(first)
    q = next(row for row in names.TENSORS if row.path[-1] == "q")
    rows = ours.tensor(q, 0).transpose(1, 2, 0)  # heads, width, d_model
    mixed = np.stack([rows[:, :8], rows[:, 8:]], axis=2).reshape(32, 32)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"].data, mixed)
    assert all(tensors[n].tensor_type == 0 for n in tensors if "norm" in n)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_types_are_those_asked_for(dtype, tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama3")
    reader = gguf.GGUFReader(converted(first, tmp_path / "there.gguf", "gguf", dtype=dtype))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    wanted = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == wanted
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    # Rows of 48 numbers do not fill blocks of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F32" if dtype == "q8_0" else wanted)


def test_q8_0_is_what_the_gguf_library_makes(tmp_path):
    first = open_source(GOLDEN / "llama3")
    there = converted(GOLDEN / "llama3", tmp_path / "there.gguf", "gguf", dtype="q8_0")
    (stored,) = (t for t in gguf.GGUFReader(there).tensors if t.name == "blk.0.ffn_up.weight")
    weights = load_params(first)["layers"]["feed_forward"]["up"][0].T
    kind = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(stored.data, gguf.quants.quantize(weights, kind))
    back = load_params(open_source(there))["layers"]["feed_forward"]["up"][0].T
    np.testing.assert_array_equal(back, gguf.quants.dequantize(stored.data, kind))
    assert np.abs(back - weights).max() <= np.abs(weights).max() / 127


@pytest.mark.filterwarnings("ignore:invalid value")  # random scales may be infinite
@pytest.mark.parametrize("kind", [k for k in gguf_file.KINDS.values() if k.name[0] == "Q"])
def test_every_quantised_type_is_read_as_the_gguf_library_reads_it(kind, tmp_path):
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.numbers, kind.width)
    assert gguf_file.NUMBERS[kind.name] == theirs.value
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2 * kind.width)).astype(np.uint8)
    path = tmp_path / "a.gguf"
    info = struct.pack("<QB", 1, ord("a")) + struct.pack("<I2Q", 2, 2 * kind.numbers, 3)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + info + struct.pack("<IQ", theirs.value, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + blocks.tobytes())
    stored = gguf_file.read(path).tensors["a"]
    assert stored.shape == (3, 2 * kind.numbers)
    np.testing.assert_array_equal(stored.read(), gguf.quants.dequantize(blocks, theirs))


def test_files_of_the_gguf_library_are_read(tmp_path):
    plain = converted(GOLDEN / "llama2_gqa", tmp_path / "plain.gguf", "gguf")
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(tmp_path / "there.gguf", "llama")
    # No vocab_size, key_length, dimension_count: what old files leave out.
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_custom_alignment(64)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source, expected = open_source(tmp_path / "there.gguf"), open_source(GOLDEN / "llama2_gqa")
    assert source.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, load_params(source), load_params(expected))


# --- crafted files ---------------------------------------------------------------------------


def text(value):
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def field(key, kind=U32, value=b"\0\0\0\0"):
    return text(key) + struct.pack("<I", kind) + value


def info(name="a", dims=(8,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def texts(key, count, value):
    return field(key, ARRAY, struct.pack("<IQ", STRING, count) + text(value) * count)


def file(fields=(), infos=(), data=b"", magic=b"GGUF", version=3, counts=None):
    tensors, keys = counts or (len(infos), len(fields))
    head = struct.pack("<4sIQQ", magic, version, tensors, keys) + b"".join([*fields, *infos])
    return head + bytes(-len(head) % 32) + data


BIG = 2**64 - 1
CRAFTED = {
    "empty": (b"", "cannot be read"),
    "short magic": (b"GG", "ends beyond the file"),
    "wrong magic": (file(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (file(version=1), "version 1"),
    "version 4": (file(version=4), "version 4"),
    "big-endian": (file(version=3 << 24), "big-endian"),
    # The overflows of 2024: number of fields and tensors, lengths of texts and arrays, dimensions.
    "field count": (file(counts=(0, BIG)), "fields, more than its bytes"),
    "field count 2^61": (file(counts=(0, 2**61)), "fields, more than its bytes"),
    "tensor count": (file(counts=(BIG, 0)), "tensors, more than its bytes"),
    "tensor count 2^60": (file(counts=(2**60, 0)), "tensors, more than its bytes"),
    "one field too many": (file([field("a" * 14)], counts=(0, 2)), "ends beyond the file"),
    "key length": (file([struct.pack("<QI", BIG, 4)]), "a key of .* is too long"),
    "key length 65,536": (file([field("k" * 65536)]), "a key of 65536 bytes is too long"),
    "key beyond the file": (file([struct.pack("<QI", 60000, 4)]), "ends beyond"),
    "key not UTF-8": (file([field(b"\xff\xfe")]), "is not UTF-8"),
    "key twice": (file([field("a"), field("a")]), "the key 'a' stands twice"),
    "field type": (file([field("a", 13)]), "type 13, which GGUF does not have"),
    "field type 2^32 - 1": (file([field("a", 2**32 - 1)]), "which GGUF does not have"),
    "text length": (file([field("a", STRING, struct.pack("<Q", BIG))]), "a of .* is too long"),
    "text beyond": (file([field("a", STRING, struct.pack("<Q", 2**20))]), "ends beyond"),
    "text not UTF-8": (file([field("a", STRING, text(b"\xc3\x28"))]), "a is not UTF-8"),
    "array length": (file([field("a", ARRAY, struct.pack("<IQ", U32, BIG))]), "ends beyond"),
    "array 2^62": (file([field("a", ARRAY, struct.pack("<IQ", U64, 2**62))]), "ends beyond"),
    "array of texts": (file([field("a", ARRAY, struct.pack("<IQ", STRING, BIG))]), "texts, more"),
    "texts beyond": (file([field("a", ARRAY, struct.pack("<IQ", STRING, 3))]), "ends beyond"),
    "array of arrays": (file([field("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of type 9"),
    "array type": (file([field("a", ARRAY, struct.pack("<IQ", 99, 1))]), "array of type 99"),
    "alignment 0": (file([field("general.alignment")]), "alignment is 0"),
    "alignment 12": (
        file([field("general.alignment", U32, struct.pack("<I", 12))]),
        "alignment is 12",
    ),
    "alignment 2^31": (
        file([field("general.alignment", U32, struct.pack("<I", 2**31))]),
        "alignment is 2147483648",
    ),
    "alignment a text": (
        file([field("general.alignment", STRING, text("32"))]),
        "alignment is '32'",
    ),
    "name 64": (file(infos=[info("n" * 64)]), "name of a tensor of 64 bytes is too long"),
    "name twice": (
        file(infos=[info("a"), info("a", offset=32)], data=bytes(64)),
        "the tensor a stands twice",
    ),
    "five dimensions": (file(infos=[info(dims=(1, 1, 1, 1, 1))]), "5 dimensions"),
    "2^32 - 1 dimensions": (
        file(infos=[text("a") + struct.pack("<I", 2**32 - 1)], counts=(1, 0), data=bytes(64)),
        "4294967295 dimensions",
    ),
    "type 999": (file(infos=[info(kind=999)]), "has type 999"),
    "removed type 4": (file(infos=[info(kind=4)]), "has type 4"),
    "integers": (file(infos=[info(kind=24)]), "has type 24"),
    "no numbers": (file(infos=[info(dims=(0,))]), "does not fill blocks"),
    # Dimensions whose product is small modulo 2^64.
    "product overflows": (file(infos=[info(dims=(2**33, 2**33))], data=bytes(64)), "needs"),
    "product is 0 mod 2^64": (file(infos=[info(dims=(2**32, 2**32))], data=bytes(64)), "needs"),
    "product is 8 mod 2^64": (
        file(infos=[info(dims=(2**61 + 1, 8))], data=bytes(64)),
        "needs",
    ),
    "dimensions larger than the file": (file(infos=[info(dims=(17,))], data=bytes(64)), "needs 68"),
    "blocks": (file(infos=[info(dims=(33,), kind=8)], data=bytes(64)), "fill blocks of Q8_0"),
    "rows of blocks": (
        file(infos=[info(dims=(16, 16), kind=8)], data=bytes(300)),
        "fill blocks of Q8_0",
    ),
    "offset": (file(infos=[info(offset=2**64 - 32)], data=bytes(64)), "needs 32 bytes at"),
    "offset past the end": (file(infos=[info(offset=64)], data=bytes(64)), "needs 32 bytes"),
    "offset misaligned": (file(infos=[info(offset=4)], data=bytes(64)), "not a multiple of 32"),
    "overlap": (file(infos=[info("a", (16,)), info("b", offset=32)], data=bytes(64)), "a and b ov"),
    "no data": (file(infos=[info()]), "needs 32 bytes"),
    "another architecture": (
        file([field("general.architecture", STRING, text("mamba"))]),
        "general.architecture is 'mamba'",
    ),
    "one of several": (
        file([field("split.count", 2, struct.pack("<H", 3))]),
        "one of several files; join them",
    ),
    "no architecture": (file(), "general.architecture is 'missing'"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files_are_refused(name, tmp_path):
    content, said = CRAFTED[name]
    path = tmp_path / "crafted.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=said):
            open_source(path)
        assert tracemalloc.get_traced_memory()[1] <= len(content) + 64 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (file([texts("a", 750_001, "")]), "750001 texts"),
        (file([texts("a", 375_000, "ab"), texts("b", 375_001, "ab")]), "750001 texts"),
        (
            file([field("a", ARRAY, struct.pack("<IQ", 0, 2**25) + bytes(2**25))]),
            "ends beyond a head of 32 MiB",
        ),
        (file([field(f"{n:05}") for n in range(2**16 + 1)]), "65537 fields"),
    ],
)
def test_more_metadata_than_any_model_has_are_refused(content, said, tmp_path):
    path = tmp_path / "large.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        open_source(path)


def test_texts_take_no_more_memory_than_the_file_and_64_mib(tmp_path):
    """At the most texts that are read; a tenth of them here, for tracing is slow."""
    path = tmp_path / "texts.gguf"
    count = gguf_file.MOST_TEXTS // 10
    path.write_bytes(file([texts("a", count, "\u0416")]))  # small in UTF-8, large in Python
    tracemalloc.start()
    fields = gguf_file.read(path).fields
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(fields["a"]) == count
    assert peak <= path.stat().st_size + 64 * 2**20 / 10


def with_field(tiny, key, kind, value):
    """The file with one more field, or another value of 4 bytes for one it has."""
    place = tiny.find(text(key) + struct.pack("<I", kind))
    if place >= 0:
        start = place + 8 + len(key) + 4
        return tiny[:start] + value + tiny[start + len(value) :]
    tensors, fields = struct.unpack_from("<QQ", tiny, 8)
    size = 24 + len(field(key, kind, value))
    padding = (-size + 24) % 32  # so that all that follows stays aligned
    more = field("x" * (padding - 16 if padding >= 17 else padding + 16), U32)
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields + 2)
    return head + field(key, kind, value) + more + tiny[24:]


@pytest.mark.parametrize(
    ("key", "kind", "value", "said"),
    [
        ("llama.block_count", U32, 1, "blk.1.* is not part"),
        ("llama.block_count", U32, 2**32 - 1, r"blk\.2\.attn_norm\.weight is missing"),
        ("llama.block_count", U32, 0, "n_layers"),
        ("llama.attention.head_count", U32, 0, "needs llama.attention.head_count"),
        ("llama.attention.head_count_kv", U32, 4, r"attn_k\.weight has shape \(16, 32\)"),
        ("llama.attention.head_count_kv", U32, 3, "multiple of n_kv_heads"),
        ("llama.embedding_length", U32, 2**32 - 1, "expected"),
        ("llama.feed_forward_length", U32, 49, r"ffn_gate\.weight has shape \(48, 32\)"),
        (
            "llama.vocab_size",
            U32,
            65,
            r"token_embd\.weight .* expected \(65, 32",
        ),
        ("llama.rope.dimension_count", U32, 4, "rope.dimension_count is 4, expected the width"),
        ("llama.attention.key_length", U32, 7, "expected the width of a head|must be even"),
        ("llama.expert_count", U32, 8, "mixture of experts"),
        ("llama.attention.sliding_window", U32, 8, "sliding_window is not understood"),
    ],
)
def test_metadata_that_do_not_fit_the_tensors_are_refused(tiny, key, kind, value, said, tmp_path):
    path = tmp_path / "changed.gguf"
    path.write_bytes(with_field(tiny, key, kind, struct.pack("<I", value)))
    with pytest.raises(ConfigError, match=said):
        open_source(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
def test_numbers_that_are_none_are_refused(tiny, key, value, tmp_path):
    path = tmp_path / "changed.gguf"
    path.write_bytes(with_field(tiny, f"llama.{key}", F32, struct.pack("<f", value)))
    with pytest.raises(ConfigError, match=r"norm_eps|rope_theta"):
        open_source(path)


def test_divisors_of_no_known_scaling_are_refused(tmp_path):
    first = huggingface_folder(tmp_path / "first", "llama3.1")
    path = converted(first, tmp_path / "there.gguf", "gguf")
    content = path.read_bytes()
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    changed = tensor.data.copy()
    changed[1] *= 1.01
    assert content.count(tensor.data.tobytes()) == 1
    path.write_bytes(content.replace(tensor.data.tobytes(), changed.tobytes()))
    with pytest.raises(ConfigError, match="are not those of a llama3 scaling with factor 8"):
        open_source(path)


def test_a_file_cut_anywhere_is_refused(tiny, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny)
    places = [*range(4096), *range(4096, len(tiny), 4999), len(tiny) - 1]
    for place in reversed(places):
        os.truncate(path, place)
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            open_source(path)
    assert len(places) > 4096


@pytest.mark.parametrize("inputs", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(tiny, inputs, tmp_path):
    path = tmp_path / "damaged.gguf"
    assert survive(lambda: read_all(path), path, tiny, inputs, head=3000) > inputs / 2
