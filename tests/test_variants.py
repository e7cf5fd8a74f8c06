"""The contract of a variant, and the parity matrix: every variant in every use against its
definition in numpy, written by itself or of the parts that `plain` holds.

A new attention needs a line in ATTENTION and one in configs/variants.yaml, and passes here, or is
no variant yet.
"""

import functools
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
import yaml

from llama_jax.ablate import parity, reference
from llama_jax.ablate.parity import CELLS, Case, Cell
from llama_jax.config import ConfigError, ModelConfig, configs_folder, parse, read_yaml
from llama_jax.model import count
from llama_jax.model.attention import ATTENTION, OPTIONAL
from llama_jax.model.attention.grouped_query import GroupedQueryAttention
from llama_jax.model.attention.interface import Attention
from llama_jax.model.cache import KVCache, cache_bytes
from llama_jax.model.llama import Llama
from llama_jax.model.stack import unstack

VARIANTS = parity.variants()


@functools.cache
def case(name: str) -> Case:
    return Case(VARIANTS[name])


# --- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_is_whole(name):
    attention = ATTENTION[name]
    assert issubclass(attention, Attention)
    assert not attention.__abstractmethods__
    assert attention.__doc__
    assert attention.settings <= set(OPTIONAL)
    for field in attention.Settings.model_fields.values():
        assert field.description


def test_an_attention_that_lacks_a_part_cannot_be_made():
    class Half(GroupedQueryAttention):
        """No way to count."""

        mixing_flops = Attention.mixing_flops

    with pytest.raises(TypeError, match=r"abstract.*mixing_flops"):
        Half(VARIANTS["grouped_query"], None)


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_is_in_the_matrix(name):
    """A line of configs/variants.yaml uses it."""
    used = {place.attention for config in VARIANTS.values() for place in config.places}
    assert name in used, f"give {name} a line in configs/variants.yaml"


def test_every_optional_field_is_in_the_matrix():
    used = {
        field
        for config in VARIANTS.values()
        for place in config.places
        for field in OPTIONAL
        if place.differs(field)
    }
    assert used == set(OPTIONAL) - {"rope_scaling"}  # which tests/test_rope.py compares


@pytest.mark.parametrize("field", OPTIONAL)
@pytest.mark.parametrize("name", ATTENTION)
def test_a_field_is_read_or_refused(name, field):
    """What an attention does not read may not be given to it."""
    config = next(c for c in VARIANTS.values() if c.places[0].attention == name).places[0]
    other = {
        "position": "none",
        "rotary_fraction": 0.5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "window": 3,
        "chunk": 3,
        "keep_first": 1,
        "sinks": True,
        "score_cap": 3.0,
        "qk_norm": True,
        "keys_are_values": True,
    }
    if field == "shares_kv":
        pattern = [{}, {"shares_kv": True}]
        build = lambda: Llama(changed(config, pattern=pattern))  # noqa: E731
    else:
        needs = {"window": 3} if field == "keep_first" else {}
        build = lambda: Llama(changed(config, **needs, **{field: other[field]}))  # noqa: E731
    if field in ATTENTION[name].settings:
        if field != "shares_kv":
            assert program(build()) != program(Llama(config))
        return
    with pytest.raises(ConfigError, match=f"attention {name} has no "):
        build()


def changed(config: ModelConfig, **changes) -> ModelConfig:
    """With the defaults of what a change excludes."""
    values = config.model_dump() | {"window": None, "chunk": None, "keep_first": 0}
    return parse(ModelConfig, values | changes, "changed")


def program(model: Llama) -> tuple[str, ...]:
    """What it computes, and with which constants."""
    tokens = jax.ShapeDtypeStruct((1, 6), jnp.int32)
    traced = jax.make_jaxpr(model.apply)(model.shapes(), tokens, tokens)
    return str(traced), *(str(constant) for constant in traced.consts)


def test_an_unknown_attention_and_unknown_settings_are_refused():
    config = VARIANTS["grouped_query"]
    with pytest.raises(ConfigError, match=r"no attention is called 'grouped'.*grouped_query"):
        Llama(changed(config, attention="grouped"))
    with pytest.raises(ConfigError, match=r"attention_settings: kv_rank: unknown key"):
        Llama(changed(config, attention_settings={"kv_rank": 4}))
    with pytest.raises(ConfigError, match=r"attention_settings: kv_rank: is required"):
        Llama(changed(config, attention="latent", n_kv_heads=4))
    latent = {"attention": "latent", "attention_settings": {"kv_rank": 4, "rope_width": 4}}
    with pytest.raises(ConfigError, match=r"n_kv_heads \(2\) must be n_heads \(4\)"):
        Llama(changed(config, **latent))
    with pytest.raises(ConfigError, match=r"must be even"):
        Llama(changed(config, attention="differential", n_kv_heads=1))


# --- the matrix ------------------------------------------------------------------------------


def is_a_setting(config: ModelConfig) -> bool:
    """Whether a variant differs from others in its scores, masks or activation alone: how layers
    are looped over or computed again is then the same program."""
    plain = config == VARIANTS["grouped_query"]
    kind = config.pattern or config.experts or config.attention != "grouped_query"
    return not (plain or kind)


MATRIX = [
    pytest.param(
        *(name, cell),
        marks=[pytest.mark.slow] if cell in ("remat", "unrolled") and is_a_setting(config) else [],
    )
    for name, config in VARIANTS.items()
    for cell in CELLS
]


@pytest.mark.parametrize(("name", "cell"), MATRIX)
def test_parity(name, cell):
    found = CELLS[cell](case(name))
    assert found.passes, f"{found.difference:.2e}, allowed {found.tolerance:.2e}"


def test_a_cell_that_is_not_a_number_does_not_pass():
    assert Cell(1.0, 2.0).passes
    assert not Cell(float("nan"), 2.0).passes
    assert not Cell(3.0, 2.0).passes


@pytest.mark.parametrize("cell", ["forward", "gradient", "decode", "ragged", "packed", "bf16"])
def test_another_definition_does_not_pass(cell, monkeypatch):
    """The cells tell variants apart: a window, held against the definition without one."""
    defined = reference.logits

    def without_window(config, params, ids):
        return defined(VARIANTS["grouped_query"], params, ids)

    monkeypatch.setattr(reference, "logits", without_window)
    assert not CELLS[cell](Case(VARIANTS["window"])).passes


@pytest.fixture
def guide(monkeypatch) -> ModelConfig:
    """The variant of docs/add_a_variant.md, added as it says: a file and two lines."""
    text = (Path(__file__).parents[1] / "docs" / "add_a_variant.md").read_text()
    file, entry = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    line = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    module = ModuleType("llama_jax.model.attention.tempered")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where annotations are looked up
    exec(compile(file, "docs/add_a_variant.md", "exec"), vars(module))
    (name, attention), *_ = eval(f"{{{entry}}}", vars(module)).items()
    monkeypatch.setitem(ATTENTION, name, attention)
    values = read_yaml(configs_folder() / "variants.yaml")["base"] | yaml.safe_load(line)[name]
    return parse(ModelConfig, values, line)


def test_the_variant_of_the_guide_is_one(guide):
    """In every use; its temperature is learned, and counts."""
    own = Case(guide)
    assert own.config.attention == "tempered"
    failed = {name: cell for name, of in CELLS.items() if not (cell := of(own)).passes}
    assert not failed
    plain = Case(VARIANTS["grouped_query"])
    extra = count.parameters(guide).total - count.parameters(plain.config).total
    assert extra == guide.n_layers * guide.n_heads
    assert not plain.off(own.logits, slice(None)).passes


# --- accounting ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_of_the_cache_are_those_of_the_compiled_step(name):
    """What a decoding step updates in place is the cache as it is accounted for."""
    config, length = VARIANTS[name], 512
    model = Llama(config)
    token = jax.ShapeDtypeStruct((3, 1), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.init(config, 3, length))
    step = jax.jit(model.apply, donate_argnames="cache")
    memory = step.lower(model.shapes(), token, token, None, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes(config, 3, length, jnp.float32)
    if all(place.reach is None for place in config.places):  # windows are full by then
        grown = cache_bytes(config, 1, length + 1, jnp.float32) - memory.alias_size_in_bytes // 3
        assert grown == count.cache_bytes_per_token(config, bytes_per_value=4)
    bf16 = cache_bytes(config, 3, length, jnp.bfloat16)
    recurrent = any(ATTENTION[place.attention].recurrent for place in config.places)
    assert recurrent or 2 * bf16 == cache_bytes(config, 3, length, jnp.float32)


@pytest.mark.parametrize("name", ["multi_head", "multi_query", "latent"])
def test_a_token_of_one_row_copies_no_cache(name):
    """Of few key heads too, of which XLA would make copies to update."""
    model = Llama(VARIANTS[name])
    params = jax.eval_shape(lambda: unstack(model.init(jax.random.key(0))))
    cache = jax.eval_shape(lambda: KVCache.init(model.config, 1, 4096, stacked=False))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    step = jax.jit(model.apply, donate_argnames="cache")
    text = step.lower(params, token, token, None, cache).compile().as_text()
    assert "%cache" in text
    assert not re.findall(r" copy\(%cache.*", text)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_that_count_are_those_of_the_tree(name):
    config = VARIANTS[name]
    counted = count.parameters(config)
    assert counted.total == sum(leaf.size for leaf in jax.tree.leaves(Llama(config).shapes()))
    assert counted.active == counted.total or any(place.experts for place in config.places)
    assert counted.products < counted.active


def test_each_mixture_of_a_pattern_counts_its_own_experts():
    """In closed form: of 4 experts one computes a token, of 2 both; all else is passed."""
    few, many = ({"count": n, "per_token": k} for n, k in ((4, 1), (2, 2)))
    config = changed(
        VARIANTS["grouped_query"], n_layers=2, pattern=[{"experts": few}, {"experts": many}]
    )
    expert = 3 * config.d_model * config.d_ff
    counted = count.parameters(config)
    assert counted.total - counted.active == 3 * expert


def test_a_window_bounds_the_cache_and_a_state_does_not_grow():
    def of(name: str, length: int) -> int:
        return cache_bytes(VARIANTS[name], 1, length, jnp.bfloat16)

    assert of("window", 10_000) == of("window", 100)
    assert of("gated_delta", 10_000) == of("gated_delta", 100)
    assert of("windows_in_turn", 10_000) < 0.51 * of("grouped_query", 10_000)
    assert of("shared_kv", 100) == of("grouped_query", 100)  # of twice as many layers
    assert 2 * of("keys_are_values", 100) == of("grouped_query", 100)
    # 12 + 4 numbers of a token and layer, where grouped-query attention has 2 x 2 heads x 8.
    assert 2 * of("latent", 100) == of("grouped_query", 100)
