"""int8 weights and cache: how far they round, and that nothing else changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from models import converted, huggingface_folder, speaking_folder

import llama_jax
from llama_jax.ablate.parity import variants
from llama_jax.config import ConfigError, ExpertsConfig, Frozen, MeshConfig, ModelConfig
from llama_jax.convert.formats import open_source
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import load_params
from llama_jax.model.cache import KVCache
from llama_jax.model.layer_cache import Int8
from llama_jax.model.layout import (
    INPUTS,
    OUTPUTS,
    for_decoding,
    int8_axes,
    int8_shapes,
    is_quantized,
    quantize,
)
from llama_jax.model.llama import Llama
from llama_jax.model.ops.attend import attend
from llama_jax.model.ops.product import letters, product
from llama_jax.model.ops.weight import OutputMajor, Words, take
from llama_jax.model.stack import unstack
from llama_jax.train import checkpoint, manifest
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

CONFIG = ModelConfig(
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=48,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    tie_embeddings=False,
)
EXPERTS = ExpertsConfig(count=4, per_token=2, shared_d_ff=48)
MODELS = {
    "untied": Llama(CONFIG),
    "tied": Llama(CONFIG.model_copy(update={"tie_embeddings": True})),
    "mixture": Llama(CONFIG.model_copy(update={"experts": EXPERTS})),
}
# Every product of a weight in the model: q, k and v, o, gate and up, down, head, tied head.
SUBSCRIPTS = (
    *("BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD"),
    *("BTD,DV->BTV", "BTD,VD->BTV"),
)
SIZES = {"D": 32, "N": 4, "K": 2, "H": 8, "F": 48, "V": 64}
ROWS = (1, 2, 8, 9, 33)
TIED = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@functools.cache
def parameters(model):
    """Random parameters of very different sizes, one output of a matrix all zeros."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        values = random.normal(size=leaf.shape) * np.exp(random.normal(size=leaf.shape)) * 0.1
        values[..., 1] = 0
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


def outputs_first(name, matrix):
    """(layers, in..., out...) as (layers, out..., in...), by numpy."""
    if name == "embed":
        return np.asarray(matrix)
    outs = range(matrix.ndim - OUTPUTS[name], matrix.ndim)
    start = matrix.ndim - OUTPUTS[name] - INPUTS[name]
    return np.moveaxis(np.asarray(matrix), outs, range(start, start + OUTPUTS[name]))


def floats(name, weight):
    """A matrix in int8 as fp32 with its inputs first again."""
    values, scale = np.asarray(weight.values), np.asarray(weight.scale)
    wide = np.float32(values) * scale.reshape(scale.shape + (1,) * INPUTS[name])
    if name == "embed":
        return wide
    start = wide.ndim - OUTPUTS[name] - INPUTS[name]
    outs = range(start, start + OUTPUTS[name])
    return np.moveaxis(wide, outs, range(wide.ndim - OUTPUTS[name], wide.ndim))


def is_weight(leaf):
    return isinstance(leaf, OutputMajor | Words)


def matrices(params):
    """(name, leaf) of every leaf; a matrix in a layout is one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
    return [(path[-1].key, leaf) for path, leaf in leaves]


def rounded(params):
    """Floats with exactly the values that the quantised parameters stand for."""

    def restore(path, leaf):
        return jnp.asarray(floats(path[-1].key, leaf)) if is_weight(leaf) else leaf

    return jax.tree_util.tree_map_with_path(restore, quantize(params), is_leaf=is_weight)


# --- weights ---------------------------------------------------------------------------------


@TIED
def test_every_weight_is_within_half_a_step_of_its_int8(model):
    params = parameters(model)
    for (name, matrix), (_, weight) in zip(
        matrices(params), matrices(quantize(params)), strict=True
    ):
        if name not in INPUTS:
            np.testing.assert_array_equal(matrix, weight)
            continue
        ours = outputs_first(name, matrix).astype(np.float64)
        axes = tuple(range(ours.ndim - INPUTS[name], ours.ndim))
        step = np.abs(ours).max(axis=axes, keepdims=True) / 127
        assert weight.values.dtype == jnp.int8
        assert weight.values.shape == ours.shape
        assert weight.scale.dtype == jnp.float32
        off = np.abs(outputs_first(name, floats(name, weight)) - ours)
        assert (off <= step * (0.5 + 1e-5)).all(), name
        reached = np.abs(np.int32(weight.values)).max(axis=axes, keepdims=True)
        np.testing.assert_array_equal(reached, np.where(step > 0, 127, 0))


@TIED
def test_shapes_and_axes_of_int8_follow_from_those_of_floats(model):
    quantized = quantize(parameters(model))
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), int8_shapes(model.shapes()))
    assert kinds == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), quantized)
    axes = int8_axes(model.axes())
    sizes = {"vocab": 64, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    sizes |= {"layers": 3, "expert": 4, "router": 4}
    flat, tree = jax.tree.flatten(quantized)
    for leaf, names_of_axes in zip(flat, tree.flatten_up_to(axes), strict=True):
        assert tuple(sizes[name] for name in names_of_axes) == leaf.shape
    attention = axes["layers"]["attention"]
    assert attention["q"].values == ("layers", "heads", "head_dim", "embed")
    assert attention["q"].scale == ("layers", "heads", "head_dim")
    assert attention["o"].values == ("layers", "embed", "heads", "head_dim")
    assert attention["o"].scale == ("layers", "embed")
    assert axes["embed"].values == ("vocab", "embed")


def test_what_is_in_int8_is_not_rounded_again():
    once = quantize(parameters(MODELS["tied"]))
    jax.tree.map(np.testing.assert_array_equal, quantize(once), once)
    assert is_quantized(once)
    assert not is_quantized(parameters(MODELS["tied"]))


def test_unstacked_layers_are_not_quantised_in_silence():
    with pytest.raises(ValueError, match="layers are unstacked"):
        quantize(unstack(parameters(MODELS["tied"])))


def test_consumed_parameters_are_gone_and_the_others_are_not():
    model = MODELS["untied"]
    params = jax.tree.map(jnp.copy, parameters(model))
    expected = quantize(params)
    found = quantize(params, consume=True)
    for name, leaf in matrices(params):
        assert leaf.is_deleted() is (name in INPUTS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- products --------------------------------------------------------------------------------


def operands(subscripts, rows):
    """Activations (1, rows, in...), and a weight (out..., in...) with its scale."""
    of_a, of_b, of_c = letters(subscripts)
    random = np.random.default_rng(0)
    a = random.normal(size=[1, rows, *(SIZES[x] for x in of_a[2:])])
    ins, outs = ([SIZES[x] for x in of_b if (x in of_c) is is_out] for is_out in (False, True))
    values = random.integers(-127, 128, outs + ins)
    return a, values, random.uniform(0.5, 2, outs) / 127


def reference(subscripts, a, values):
    """In fp64, by numpy; values (out..., in...)."""
    of_a, of_b, of_c = letters(subscripts)
    order = "".join(x for x in of_b if x in of_c) + "".join(x for x in of_b if x not in of_c)
    return np.einsum(f"{of_a},{order}->{of_c}", np.float64(a), np.float64(values))


@pytest.mark.parametrize("layout", ["output_major", "words"])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("subscripts", SUBSCRIPTS)
def test_products_are_those_of_fp64(subscripts, kind, layout):
    _, of_b, of_c = letters(subscripts)
    n_outs = sum(x in of_c for x in of_b)
    for rows in ROWS:
        a, values, scale = operands(subscripts, rows)
        if kind == "int8":
            wide = values * scale.reshape(scale.shape + (1,) * (values.ndim - n_outs))
            weight = OutputMajor(jnp.int8(values), jnp.float32(scale))
        else:
            values = np.asarray(jnp.bfloat16(values / 100))
            wide, weight = values, OutputMajor(jnp.bfloat16(values))
        expected = reference(subscripts, np.float32(a), wide)
        size = reference(subscripts, np.abs(a), np.abs(wide))
        weight = Words.of(weight, n_outs) if layout == "words" else weight
        found = jax.jit(product, static_argnums=(0, 3))(
            subscripts, jnp.float32(a), weight, "float32"
        )
        # Few rows against int8 take activations to 15 bits of a row's largest; all else is fp32.
        few = kind == "int8" and layout == "output_major" and rows <= 8
        bound = 2e-6 * size
        if few:
            unit = np.abs(a).max() / 127 / 128
            ones = reference(subscripts, np.ones_like(a), np.abs(wide))
            bound = bound + 0.51 * unit * ones
        assert (np.abs(found - expected) <= bound).all(), rows


@pytest.mark.parametrize("layout", ["output_major", "words"])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_products_of_bf16_activations_are_rounded_once_at_the_end(kind, layout):
    for rows in ROWS:
        a, values, scale = operands("BTD,DF->BTF", rows)
        a = np.asarray(jnp.bfloat16(a))
        if kind == "int8":
            weight, wide = (
                OutputMajor(jnp.int8(values), jnp.float32(scale)),
                values * scale[:, None],
            )
        else:
            wide = np.asarray(jnp.bfloat16(values / 100))
            weight = OutputMajor(jnp.bfloat16(wide))
        weight = Words.of(weight, 1) if layout == "words" else weight
        found = jax.jit(product, static_argnums=0)("BTD,DF->BTF", jnp.bfloat16(a), weight)
        expected = reference("BTD,DF->BTF", a, wide)
        assert found.dtype == jnp.bfloat16
        assert (np.abs(np.float64(found) - expected) <= 2**-8 * np.abs(expected) + 3e-3).all()


@pytest.mark.parametrize("layout", ["output_major", "words"])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_an_embedding_is_looked_up_exactly_in_any_layout(kind, layout):
    random = np.random.default_rng(0)
    values, scale = random.integers(-127, 128, (64, 32)), random.uniform(0.5, 2, 64)
    ids = np.array([[0, 63, 5], [5, 5, 31]])
    if kind == "int8":
        weight = OutputMajor(jnp.int8(values), jnp.float32(scale))
        expected = np.float32(values)[ids] * np.float32(scale)[ids][..., None]
    else:
        weight = OutputMajor(jnp.bfloat16(values))
        expected = np.float32(values)[ids]
    weight = Words.of(weight, 1) if layout == "words" else weight
    np.testing.assert_array_equal(take(weight, ids, jnp.float32), expected)
    np.testing.assert_array_equal(take(weight, ids, jnp.bfloat16), jnp.bfloat16(expected))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("outs", [(48,), (4, 6)])
def test_words_hold_every_value_in_its_place(dtype, outs):
    """Unpacked here by shifting bits, and there by taking each output's row."""
    random = np.random.default_rng(0)
    values = jnp.asarray(random.integers(-128, 128, (*outs, 8)), dtype)
    words = Words.of(OutputMajor(values, jnp.ones(outs) if dtype == jnp.int8 else None), len(outs))
    per_word = 4 // values.dtype.itemsize
    assert words.words.shape == (8 // per_word, *outs)
    bits = np.asarray(words.words)
    width = 32 // per_word
    parts = [(bits >> (width * i)) & (2**width - 1) for i in range(per_word)]
    unpacked = np.stack(parts, axis=1).reshape(8, *outs).astype(f"uint{width}")
    as_bits = np.asarray(values).view(f"uint{width}")
    np.testing.assert_array_equal(np.moveaxis(unpacked, 0, -1), as_bits)


def test_a_matrix_whose_inputs_do_not_fill_words_is_left_out_of_them():
    model = Llama(CONFIG.model_copy(update={"d_ff": 46}))
    params = for_decoding(quantize(parameters(model)), rows=1)
    kinds = {name: type(leaf) for name, leaf in matrices(params)}
    assert (kinds["down"], kinds["up"]) == (OutputMajor, Words)


# --- models ----------------------------------------------------------------------------------

TOKENS = np.random.default_rng(2).integers(0, 64, (3, 11)).astype(np.int32)
POSITIONS = np.tile(np.arange(11, dtype=np.int32), (3, 1))

apply = jax.jit(Llama.apply, static_argnums=0)


@TIED
@pytest.mark.parametrize("layout", ["scanned", "unrolled", "for 1 row", "for 8 rows"])
def test_a_quantised_model_computes_what_its_rounded_weights_say(model, layout):
    """33 rows go through fp32 products; one row of words does too; 8 rows are to 15 bits."""
    params = parameters(model)
    expected = apply(model, rounded(params), TOKENS, POSITIONS).value
    quantized = quantize(params)
    if layout == "unrolled":
        quantized = unstack(quantized)
    if layout.startswith("for"):
        quantized = for_decoding(quantized, int(layout.split()[1]))
    found = apply(model, quantized, TOKENS, POSITIONS).value
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)
    plain = apply(model, params, TOKENS, POSITIONS).value
    assert np.abs(found - plain).max() > 1e-3 * size, "nothing was rounded"

    one = apply(model, quantized, TOKENS[:1, :1], POSITIONS[:1, :1]).value
    np.testing.assert_allclose(one[0, 0], expected[0, 0], rtol=0, atol=1e-3 * size)


@pytest.mark.parametrize("name", ["gated", "differential", "latent_queries", "gated_delta_in_turn"])
def test_variants_compute_what_their_rounded_weights_say(name):
    model = Llama(variants()[name])
    params = parameters(model)
    quantized = for_decoding(quantize(params), 1)
    found, expected = (
        apply(model, p, TOKENS, POSITIONS).value for p in (quantized, rounded(params))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("preset", ["train", "decode"])
@pytest.mark.parametrize("sizes", [{"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}])
def test_experts_in_int8_are_split_over_a_mesh(sizes, preset):
    model = MODELS["mixture"]
    quantized = quantize(parameters(model))
    tokens, positions = (np.concatenate([x, x[:1]]) for x in (TOKENS, POSITIONS))
    expected = apply(model, quantized, tokens, positions).value
    axes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} | sizes
    mesh, rules = make_mesh(axes, jax.devices()[:4]), PRESETS[preset]
    whole_rows = rules.replace(residual_seq=None)  # 11 tokens, which two devices cannot share
    split = Llama(model.config, rules=whole_rows)
    places = shardings(int8_shapes(model.shapes()), int8_axes(model.axes()), mesh, whole_rows)
    placed = jax.device_put(quantized, places)
    up = placed["layers"]["feed_forward"]["expert_up"].values
    parts = 4 if preset == "train" or "tensor" in sizes else 2
    assert up.addressable_shards[0].data.size == up.size // parts
    with jax.set_mesh(mesh):
        found = apply(split, placed, tokens, positions).value
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@TIED
def test_the_output_weight_of_a_quantised_model_gives_its_logits(model):
    for params in (quantize(parameters(model)), for_decoding(quantize(parameters(model)), 1)):
        hidden = model.apply(params, TOKENS, POSITIONS, head="none").value
        found = product("BTD,DV->BTV", hidden, model.output_weight(params))
        expected = model.apply(params, TOKENS, POSITIONS).value
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- cache -----------------------------------------------------------------------------------


def test_vectors_of_an_int8_cache_are_within_half_a_step():
    random = np.random.default_rng(0)
    vectors = np.float32(random.normal(size=(5, 7, 16)) * np.exp(4 * random.normal(size=(5, 7, 1))))
    vectors[0, 0] = 0
    stored = Int8.of(jnp.asarray(vectors))
    step = np.abs(vectors).max(axis=-1, keepdims=True) / 127
    off = np.abs(np.asarray(stored.to(jnp.float32)) - vectors)
    assert (off <= step * (0.5 + 1e-5)).all()
    assert np.isfinite(stored.scale).all()
    np.testing.assert_array_equal(
        np.abs(np.int32(stored.values)).max(axis=-1) == 127, step[..., 0] > 0
    )


@pytest.mark.parametrize("stacked", [True, False])
def test_an_int8_cache_gives_back_what_was_written_where_it_was_written(stacked):
    random = np.random.default_rng(0)
    cache = KVCache.init(CONFIG, 4, 6, "int8", stacked)
    positions = np.array([[2, 3], [0, 6]])  # 6 is beyond the end
    rows = np.array([3, 1])
    k, v = jnp.float32(random.normal(size=(2, 2, 2, 2, 8)))  # (B, K, T, H)
    layer = cache.layer(1, 0, positions, None, rows)
    _, read, keys = layer.append({"key": k, "value": v}, 0, jnp.float32)
    assert keys.tolist() == [list(range(6))]
    for found, new in ((read["key"], k), (read["value"], v)):
        kept = Int8.of(new).to(jnp.float32)
        np.testing.assert_array_equal(found[0][:, 2:4], kept[0])
        np.testing.assert_array_equal(found[1][:, 0], kept[1][:, 0])
        np.testing.assert_array_equal(found[1][:, 1:], 0)


@TIED
def test_decoding_with_an_int8_cache_is_attention_over_rounded_keys_and_values(model, monkeypatch):
    """Against the same model without a cache, whose attention is given rounded keys and values."""
    params = parameters(model)
    expected_exact = apply(model, params, TOKENS, POSITIONS).value

    def over_rounded(q, k, v, *others):
        return attend(q, *(Int8.of(x).to(x.dtype) for x in (k, v)), *others)

    with monkeypatch.context() as patch:
        patch.setattr("llama_jax.model.attention.grouped_query.attend", over_rounded)
        expected = model.apply(params, TOKENS, POSITIONS).value

    cache = KVCache.init(model.config, 3, 16, "int8")
    output = apply(model, params, TOKENS[:, :7], POSITIONS[:, :7], cache=cache)
    found = [output.value]
    for t in range(7, 11):
        here = np.s_[:, t : t + 1]
        output = apply(model, params, TOKENS[here], POSITIONS[here], cache=output.cache)
        found.append(output.value)
    size = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=2e-5 * size)
    assert np.abs(expected - expected_exact).max() > 1e-4 * size


# --- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in floats (hf) and in int8 (int8)."""
    folder = tmp_path_factory.mktemp("quantize")
    speaking_folder(folder / "hf", "llama2_gqa")
    converted(folder / "hf", folder / "int8", "llama_jax", dtype="int8")
    return folder


@pytest.mark.parametrize("case", ["llama2_gqa", "llama3.2_tied"])
def test_a_converted_model_is_the_quantised_one_bit_for_bit(case, tmp_path):
    first = huggingface_folder(tmp_path / "hf", case)
    there = converted(first, tmp_path / "int8", "llama_jax", dtype="int8")
    assert yaml.safe_load((there / "config.yaml").read_text())["weights"] == "int8"
    source = open_source(there)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, int8_shapes(Llama(source.config).shapes()))
    found = load_params(source, None, places)
    expected = quantize(jax.tree.map(jnp.asarray, load_params(open_source(first))))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert source.dtype == np.float32


def test_a_variant_becomes_int8_and_floats_again(tmp_path):
    """Layers of two kinds, one of them a mixture, whose experts are many matrices in one array."""
    pattern = (Frozen(), Frozen({"experts": EXPERTS.model_dump()}))
    config = CONFIG.model_copy(update={"pattern": pattern})
    params = parameters(Llama(config))
    settings = {"end_ids": [], "context_length": 32, "weights": "floats"}
    text = yaml.safe_dump({"model": config.model_dump(mode="json"), **settings})
    files = {checkpoint.CONFIG: text.encode()}
    checkpoint.write_parameters(tmp_path / "floats", params, {"validation_loss": None}, files)
    small = converted(tmp_path / "floats", tmp_path / "int8", "llama_jax", dtype="int8")
    back = converted(small, tmp_path / "back", "llama_jax", dtype="float32")
    found = load_params(open_source(back))
    jax.tree.map(np.testing.assert_array_equal, found, rounded(params))


def test_an_int8_checkpoint_loads_as_it_is_and_without_a_word(folder):
    model = llama_jax.load(folder / "int8")
    assert is_quantized(model.params)
    expected = llama_jax.load(folder / "hf", weights="int8")
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    ids = [[1, 5, 9, 250, 319]]
    np.testing.assert_array_equal(model.logits(ids), expected.logits(ids))
    assert (model.end_ids, model.context_length) == (expected.end_ids, expected.context_length)
    (answer,) = model.generate("the cat", temperature=0, max_new_tokens=4)
    assert 0 < len(answer.tokens) <= 4


def test_weights_are_rounded_to_int8_from_what_is_stored_whatever_the_compute_type(folder):
    expected = llama_jax.load(folder / "int8", "bfloat16").params
    found = llama_jax.load(folder / "hf", "bfloat16", weights="int8").params
    for (name, one), (_, other) in zip(matrices(found), matrices(expected), strict=True):
        if name in INPUTS:
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_int8_checkpoint_loads_onto_a_mesh(folder):
    expected = llama_jax.load(folder / "int8").logits([[1, 5, 9, 250, 319]] * 2)
    mesh = MeshConfig(data=2, tensor=2, rules="decode")
    model = llama_jax.load(folder / "int8", mesh=mesh)
    np.testing.assert_allclose(model.logits([[1, 5, 9, 250, 319]] * 2), expected, atol=2e-3)
    weight = jax.tree.leaves(model.params["layers"][0]["attention"]["q"])[0]
    assert len(weight.sharding.device_set) == 4
    assert weight.addressable_shards[0].data.size == weight.size // 2


def test_an_int8_checkpoint_is_as_small_as_it_should_be(folder):
    size = lambda path: sum(p.stat().st_size for p in path.rglob("*") if p.is_file())  # noqa: E731
    state = size(folder / "int8" / "state")
    shapes = int8_shapes(Llama(open_source(folder / "int8").config).shapes())
    numbers = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert state < numbers + 2**16
    with_floats = converted(folder / "hf", folder / "floats", "llama_jax")
    assert "weights: floats" in (with_floats / "config.yaml").read_text()


def test_int8_becomes_floats_in_other_formats_and_stays_itself_in_ours(folder, tmp_path):
    again = converted(folder / "int8", tmp_path / "again", "llama_jax")
    first, second = llama_jax.load(folder / "int8"), llama_jax.load(again)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)

    back = open_source(converted(folder / "int8", tmp_path / "hf", "huggingface"))
    source = open_source(folder / "int8")
    expected = rounded(jax.tree.map(jnp.asarray, load_params(open_source(folder / "hf"))))
    for found in (load_params(source), load_params(back)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    float_again = open_source(
        converted(folder / "int8", tmp_path / "floats", "llama_jax", dtype="float32")
    )
    jax.tree.map(np.testing.assert_array_equal, load_params(float_again), expected)
    assert float_again.int8 is None


@pytest.mark.parametrize("to", ["huggingface", "meta", "gguf"])
def test_int8_is_of_our_format_alone(to):
    with pytest.raises(ValueError, match="dtype int8 is of llama_jax; " + to):
        ConvertConfig(source="a", destination="b", to=to, dtype="int8")


def changed(folder, path, **arrays):
    """An int8 checkpoint with arrays replaced (None: removed), its manifest in order."""
    source = open_source(folder / "int8")
    found = checkpoint.find(folder / "int8", ["params"])
    saved = checkpoint.shapes(found, "params")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = {}
    for name, kind in saved.items():
        target = jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=place)
        array = checkpoint.load_array(found, "params", saved, name, target)
        array = arrays.get(name.replace("/", "_"), array)
        if array is not None:
            branch = tree
            *inner, leaf = name.split("/")
            for key in inner:
                branch = branch.setdefault(key, {})
            branch[leaf] = array
    files = {"config.yaml": (folder / "int8" / "config.yaml").read_bytes()}
    files["tokenizer.model"] = source.tokenizer.model
    checkpoint.write_parameters(path, tree, {"validation_loss": None}, files)
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embed_scale": None}, "embed/scale is missing, expected shape (320,)"),
        ({"embed_values": jnp.zeros((319, 32), jnp.int8)}, "embed/values has shape (319, 32)"),
        ({"embed_values": jnp.zeros((320, 32))}, "embed/values has type float32, expected one of"),
        ({"embed_scale": jnp.zeros(320, jnp.bfloat16)}, "embed/scale has type bfloat16"),
        ({"final_norm": jnp.zeros(32, jnp.int8)}, "final_norm has type int8"),
        ({"layers_attention_q_scale": jnp.zeros((2, 8, 4))}, "layers/attention/q/scale has shape"),
    ],
)
def test_arrays_that_are_not_those_of_the_model_are_refused(arrays, message, folder, tmp_path):
    damaged = changed(folder, tmp_path / "damaged", **arrays)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_source(damaged)


@pytest.mark.parametrize(
    ("kind", "name"), [("floats", "embed/values is not"), ("int8", "embed/values is missing")]
)
def test_the_configuration_must_say_what_the_arrays_are(kind, name, folder, tmp_path):
    """int8 arrays said to be floats, and floats said to be int8."""
    if kind == "int8":
        there = converted(folder / "hf", tmp_path / "there", "llama_jax")
    else:
        there = changed(folder, tmp_path / "there")
    values = yaml.safe_load((there / "config.yaml").read_text()) | {"weights": kind}
    (there / "config.yaml").write_text(yaml.safe_dump(values))
    (there / "manifest.json").unlink()
    manifest.write_manifest(there)
    with pytest.raises(ConfigError, match="does not hold this model: " + name):
        open_source(there)
