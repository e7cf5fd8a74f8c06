"""Live comparison of the model's variants with the classes of Hugging Face that have them.

Every case is a whole model of theirs, tiny and random, with what ours lacks taken out: a norm after
attention becomes the identity, say. Where theirs centres the stream before it norms it, all that
writes into the stream is centred, so that nothing is left to centre.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from llama_jax.config import ModelConfig
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.ops.attend import alibi_slopes
from llama_jax.model.stack import stack

pytestmark = pytest.mark.parity

ROWS, PREFILL = 2, 9

OURS = """{d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, d_head: 8, d_ff: 48, vocab_size: 64,
  norm_eps: 1.0e-6, rope_theta: 1.0e+4, tie_embeddings: false}"""
THEIRS = """{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, head_dim: 8,
  num_key_value_heads: 2, intermediate_size: 48, vocab_size: 64, max_position_embeddings: 128,
  rms_norm_eps: 1.0e-6, tie_word_embeddings: false, bos_token_id: 1, eos_token_id: 2,
  pad_token_id: null, rope_parameters: {rope_type: default, rope_theta: 1.0e+4}}"""

Arrays = dict[str, Any]


# Their weights in our layout: w is what a layer of theirs holds, by name, and `one` what its norms
# add to their weights.


def heads(weight, width):
    """(heads x width, D) -> (D, heads, width)."""
    return weight.reshape(-1, width, weight.shape[1]).transpose(2, 0, 1)


def out_of_heads(weight, width):
    """(D, heads x width) -> (heads, width, D)."""
    return weight.T.reshape(-1, width, len(weight))


def halves(x, start=0):
    """Pairs of neighbours, from a place on, become pairs of the two halves."""
    turned = x[..., start:]
    return np.concatenate([x[..., :start], turned[..., 0::2], turned[..., 1::2]], axis=-1)


def grouped_query(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    at = "self_attn."
    found = {name: w.get(f"{at}{name}_proj.weight") for name in "qkv"}
    ours = {name: heads(x, c.d_head) for name, x in found.items() if x is not None}
    ours["o"] = out_of_heads(w[f"{at}o_proj.weight"], c.d_head)
    for name in ("q_norm", "k_norm"):
        if f"{at}{name}.weight" in w:
            ours[name] = w[f"{at}{name}.weight"] + one
    if f"{at}sinks" in w:
        ours["sinks"] = w[f"{at}sinks"]
    return ours


def interleaved(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    ours = grouped_query(w, c, one)
    return {**ours, **{name: halves(ours[name]) for name in "qk"}}


def unscaled(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    """Their scores are not divided by the root of the width."""
    ours = grouped_query(w, c, one)
    return {**ours, "q_norm": ours["q_norm"] * c.d_head**0.5}


def fused_projection(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    parts = np.split(w["attn.Wqkv.weight"], 3)
    ours = {name: heads(part, c.d_head) for name, part in zip("qkv", parts, strict=True)}
    return {**ours, "o": out_of_heads(w["attn.out_proj.weight"], c.d_head)}


def latent(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    at, settings, H = "self_attn.", c.attention_settings.plain(), c.d_head
    width = H + settings["rope_width"]
    up = heads(w[f"{at}kv_b_proj.weight"], 2 * H)
    ours = {
        "kv_down": halves(w[f"{at}kv_a_proj_with_mqa.weight"].T, settings["kv_rank"]),
        "kv_norm": w[f"{at}kv_a_layernorm.weight"],
        "key_up": up[..., :H],
        "value_up": up[..., H:],
        "o": out_of_heads(w[f"{at}o_proj.weight"], H),
    }
    if "query_rank" not in settings:
        return {**ours, "q": halves(heads(w[f"{at}q_proj.weight"], width), H)}
    return {
        **ours,
        "q_down": w[f"{at}q_a_proj.weight"].T,
        "q_norm": w[f"{at}q_a_layernorm.weight"],
        "q_up": halves(heads(w[f"{at}q_b_proj.weight"], width), H),
    }


def differential(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    """A pair is a head of their first half and one of their second, its value both of theirs."""
    at, H = "self_attn.", c.d_head
    q, k, v = (heads(w[f"{at}{name}_proj.weight"], H) for name in "qkv")
    lambdas = {
        f"lambda_{name}": np.stack([w[f"{at}lambda_{name}{n}"] for n in (1, 2)]) for name in "qk"
    }
    return {
        "q_pair": np.stack(np.split(q, 2, axis=1), axis=1),
        "k_pair": np.stack(np.split(k, 2, axis=1), axis=1),
        "v": np.concatenate(np.split(v, 2, axis=1), axis=-1),
        "o": out_of_heads(w[f"{at}o_proj.weight"], 2 * H),
        "head_norm": np.ones(2 * H, np.float32),
        **lambdas,
    }


def delta_or_gated(w: Arrays, c: ModelConfig, one: float) -> Arrays:
    if c.attention == "gated_delta":
        return gated_delta(w, c)
    ours = grouped_query(w, c, one)  # a head of queries is followed by its gate
    return {**ours, "q": ours["q"][:, 0::2], "head_gate": ours["q"][:, 1::2]}


def gated_delta(w: Arrays, c: ModelConfig) -> Arrays:
    at, D, N, K, H = "linear_attn.", c.d_model, c.n_heads, c.n_kv_heads, c.d_head
    V = c.attention_settings.plain()["value_width"]
    group = N // K * V  # what one key head has of values
    of_key_heads = heads(w[f"{at}in_proj_qkvz.weight"], 2 * H + 2 * group)
    q, k, v, gate = np.split(of_key_heads, np.cumsum([H, H, group]), axis=-1)
    beta, decay = np.split(heads(w[f"{at}in_proj_ba.weight"], 2 * N // K), 2, axis=-1)
    filters = w[f"{at}conv1d.weight"][:, 0].T
    of_q, of_k, of_v = np.split(filters, np.cumsum([K * H, K * H]), axis=1)
    return {
        **{"q": q, "k": k, "v": v.reshape(D, N, V), "head_gate": gate.reshape(D, N, V)},
        **{"q_filter": of_q.reshape(-1, K, H), "k_filter": of_k.reshape(-1, K, H)},
        **{"v_filter": of_v.reshape(-1, N, V), "head_norm": w[f"{at}norm.weight"]},
        **{"beta": beta.reshape(D, N), "decay": decay.reshape(D, N)},
        **{"decay_rate": w[f"{at}A_log"], "decay_bias": w[f"{at}dt_bias"]},
        "o": out_of_heads(w[f"{at}out_proj.weight"], V),
    }


def feed_forward(w: Arrays, c: ModelConfig) -> Arrays:
    if c.experts is None:
        return dense(w, "feed_forward" if "feed_forward.up_proj.weight" in w else "mlp")
    gate, up = np.split(w["mlp.experts.gate_up_proj"], 2, axis=1)
    ours = {
        "router": w["mlp.gate.weight"].T,
        "expert_gate": gate.transpose(0, 2, 1),
        "expert_up": up.transpose(0, 2, 1),
        "expert_down": w["mlp.experts.down_proj"].transpose(0, 2, 1),
    }
    if c.experts.shared_d_ff:
        ours["shared"] = dense(w, "mlp.shared_experts")
    return ours


def dense(w: Arrays, at: str) -> Arrays:
    found = [name for name in ("gate", "up", "down") if f"{at}.{name}_proj.weight" in w]
    return {name: w[f"{at}.{name}_proj.weight"].T for name in found}


def silent(w: Arrays, c: ModelConfig) -> Arrays:
    """A layer that adds nothing: theirs is of a kind that ours is not."""
    into = np.zeros((c.d_model, c.d_ff), np.float32)
    return {"gate": into, "up": into, "down": into.T}


# What is done to a model of theirs before it is compared.


def drop_norms_behind(model):
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.forward = lambda x: x


def drop_norms_behind_and_of_keys(model):
    """Their values are keys that were normed, but not scaled."""
    drop_norms_behind(model)
    # Else layers that share keys would skip tokens, and fail without embeddings of their own.
    model.config.output_hidden_states = True
    for layer in model.model.layers:
        if not layer.self_attn.is_kv_shared_layer:
            layer.self_attn.k_norm.weight.fill_(1)


def drop_experts(model):
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: (0 * x, None)


def centre(model):
    """Nothing that is added to the stream has a mean."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            weight -= weight.mean(0)
        if name.endswith(("embed_tokens.weight", "wte.weight")):
            weight -= weight.mean(1, keepdim=True)
        if name.endswith("norm.bias"):
            weight.zero_()


def centre_and_drop_feed_forward(model):
    centre(model)
    for block in model.transformer.blocks:
        block.ffn.forward = lambda x, residual: residual


@dataclass(frozen=True)
class Family:
    """A class of theirs, and the variant of ours that it has.

    theirs, ours: settings besides those above.
    one: what norms add to their weights.
    incomparable: weights whose gradients differ: those that are constants there, or centred.
    length: tokens of a row.
    bound: of logits, whose size is about 1, and of gradients by the largest of an array.
    """

    theirs: str
    ours: str
    attention: Callable[..., Arrays] = grouped_query
    feed_forward: Callable[..., Arrays] = feed_forward
    prepare: Callable[[Any], None] = lambda model: None
    one: float = 0.0
    incomparable: tuple[str, ...] = ()
    length: int = 24
    bound: float = 2e-5


LATENT = """{num_key_value_heads: 4, kv_lora_rank: 12, qk_rope_head_dim: 4, head_dim: 4, n_group: 1,
  qk_nope_head_dim: 8, v_head_dim: 8, n_routed_experts: 4, num_experts_per_tok: 2, topk_group: 1,
  moe_intermediate_size: 16, routed_scaling_factor: 1.0, """

FAMILIES = {
    "Qwen3": Family("{}", "{qk_norm: true}"),
    "SmolLM3": Family(
        "{num_hidden_layers: 5, no_rope_layer_interval: 4}",
        "{n_layers: 5, pattern: [{}, {}, {}, {position: none}]}",
    ),
    "GptOss": Family(
        """{num_hidden_layers: 3, sliding_window: 5, attention_bias: false, num_local_experts: 2,
            num_experts_per_tok: 1}""",
        "{n_layers: 3, sinks: true, pattern: [{window: 5}, {}]}",
        feed_forward=silent,
        prepare=drop_experts,
        incomparable=("down",),
    ),
    "Gemma": Family("{num_key_value_heads: 1}", "{n_kv_heads: 1, feed_forward: geglu}", one=1.0),
    "Gemma2": Family(
        """{num_hidden_layers: 3, query_pre_attn_scalar: 8, attn_logit_softcapping: 2.0,
            final_logit_softcapping: null, sliding_window: 5}""",
        "{n_layers: 3, feed_forward: geglu, score_cap: 2.0, pattern: [{window: 5}, {}]}",
        prepare=drop_norms_behind,
        one=1.0,
    ),
    "Gemma4": Family(
        """{num_hidden_layers: 4, num_kv_shared_layers: 2, attention_k_eq_v: true,
            layer_types: [full_attention, full_attention, full_attention, full_attention],
            rope_parameters: {full_attention: {rope_type: default, rope_theta: 1.0e+4}},
            global_head_dim: 8, hidden_size_per_layer_input: 0}""",
        """{n_layers: 4, feed_forward: geglu, qk_norm: true, pattern: [
            {keys_are_values: true}, {keys_are_values: true}, {shares_kv: true}, {shares_kv: true}
        ]}""",
        attention=unscaled,
        prepare=drop_norms_behind_and_of_keys,
        incomparable=("q_norm", "k_norm"),
    ),
    "Nemotron": Family(
        """{norm_eps: 1.0e-6, rope_parameters:
            {rope_type: default, rope_theta: 1.0e+4, partial_rotary_factor: 0.5}}""",
        "{feed_forward: relu2, rotary_fraction: 0.5}",
        prepare=centre,
        one=1.0,
        incomparable=("o", "down"),
    ),
    "Cohere": Family(
        "{layer_norm_eps: 1.0e-6, logit_scale: 1.0}",
        "{parallel_block: true}",
        attention=interleaved,
        prepare=centre,
        incomparable=("o", "down"),
    ),
    "Mpt": Family(
        "{d_model: 48, n_heads: 6, n_layers: 2, max_seq_len: 64, layer_norm_epsilon: 1.0e-6}",
        "{d_model: 48, n_heads: 6, n_kv_heads: 6, position: alibi}",
        attention=fused_projection,
        feed_forward=silent,
        prepare=centre_and_drop_feed_forward,
        incomparable=("o", "down"),
    ),
    "Llama4": Family(
        """{num_hidden_layers: 3, no_rope_layers: [1, 1, 0], attention_chunk_size: 7,
            moe_layers: [], use_qk_norm: false, attn_temperature_tuning: false,
            intermediate_size_mlp: 48}""",
        "{n_layers: 3, pattern: [{chunk: 7}, {chunk: 7}, {position: none}]}",
        attention=interleaved,
    ),
    "DeepseekV2": Family(
        LATENT + "q_lora_rank: null, first_k_dense_replace: 0, n_shared_experts: 2}",
        """{attention: latent, attention_settings: {kv_rank: 12, rope_width: 4}, n_kv_heads: 4,
            d_ff: 16, experts: {count: 4, per_token: 2, normalise: false, shared_d_ff: 32}}""",
        attention=latent,
    ),
    "DeepseekV3": Family(
        LATENT + "q_lora_rank: 10, first_k_dense_replace: 1}",
        """{attention: latent, attention_settings: {kv_rank: 12, rope_width: 4, query_rank: 10},
            n_kv_heads: 4, pattern: [{}, {d_ff: 16, experts:
            {count: 4, per_token: 2, score: sigmoid, shared_d_ff: 16}}]}""",
        attention=latent,
    ),
    "DiffLlama": Family(
        "{num_hidden_layers: 3, num_attention_heads: 8, num_key_value_heads: 4}",
        "{attention: differential, n_layers: 3, n_heads: 8, n_kv_heads: 4}",
        attention=differential,
        incomparable=("head_norm",),
    ),
    # What a head recalls may be next to nothing, and its norm makes that one's rounding large: with
    # an epsilon of 1e-6 theirs is 8e-5 away from float64. Both compute 64 tokens at once.
    "Qwen3Next": Family(
        """{num_hidden_layers: 3, mlp_only_layers: [0, 1, 2], rms_norm_eps: 1.0e-3,
            layer_types: [linear_attention, linear_attention, full_attention],
            linear_num_key_heads: 2, linear_num_value_heads: 4, linear_key_head_dim: 8,
            linear_value_head_dim: 12, rope_parameters:
            {rope_type: default, rope_theta: 1.0e+4, partial_rotary_factor: 0.5}}""",
        """{n_layers: 3, norm_eps: 1.0e-3, pattern: [
            {attention: gated_delta, attention_settings: {value_width: 12}},
            {attention: gated_delta, attention_settings: {value_width: 12}},
            {attention: gated, qk_norm: true, rotary_fraction: 0.5}]}""",
        attention=delta_or_gated,
        one=1.0,
        length=80,
        bound=1e-4,
    ),
    "Mixtral": Family(
        "{num_local_experts: 4, num_experts_per_tok: 2}", "{experts: {count: 4, per_token: 2}}"
    ),
}


@pytest.fixture(scope="module")
def torch():
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    return torch


def random_model(name, torch):
    """A model of theirs, prepared; norms differ from one, and matrices keep the size of things."""
    transformers, family = importlib.import_module("transformers"), FAMILIES[name]
    kind = {"Gemma4": "Gemma4Text", "Llama4": "Llama4Text"}.get(name, name)
    theirs = yaml.safe_load(family.theirs)
    settings = yaml.safe_load(THEIRS)
    if name == "Mpt":  # it has names of its own
        settings = {"vocab_size": 64, "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(**{**settings, **theirs})
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32).eval()
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for path, weight in sorted(model.named_parameters()):
            draws = rng.standard_normal(tuple(weight.shape), np.float32)
            if weight.ndim > 1:
                draws *= weight.shape[-1] ** -0.5
            else:
                one = 0.0 if "linear_attn" in path else family.one
                draws = 0.3 * draws + (1 - one if "norm" in path else 0)
            weight.copy_(torch.from_numpy(draws))
        family.prepare(model)
    return model


NORMS = {
    "attention_norm": ("input_layernorm", "norm_1"),
    "feed_forward_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "norm_2"),
}


def in_our_layout(family, config, model, read, one):
    """What `read` gives of their weights, as our tree: values or gradients."""
    body = model.transformer if hasattr(model, "transformer") else model.model
    layers = []
    for depth, layer in enumerate(body.blocks if hasattr(body, "blocks") else body.layers):
        place = config.layer(depth)
        w = {name: read(weight) for name, weight in layer.named_parameters()}
        ours = {
            "attention": family.attention(w, place, one),
            "feed_forward": family.feed_forward(w, place),
        }
        for name, theirs in NORMS.items():
            found = [w[f"{norm}.weight"] + one for norm in theirs if f"{norm}.weight" in w]
            ours |= {name: found[0]} if found else {}
        layers.append(ours)
    norm = body.norm_f if hasattr(body, "norm_f") else body.norm
    embedding = model.get_input_embeddings()
    return stack(
        {
            "embed": read(embedding.weight) * getattr(embedding, "scalar_embed_scale", 1.0),
            "layers": tuple(layers),
            "final_norm": read(norm.weight) + one,
            "head": read(model.lm_head.weight).T,
        },
        period=len(config.places),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, torch):
    """What both compute for the same tokens: theirs done, ours ready."""
    family = FAMILIES[request.param]
    model = random_model(request.param, torch)
    config = ModelConfig(**{**yaml.safe_load(OURS), **yaml.safe_load(family.ours)})
    rng = np.random.default_rng(5)
    ids = rng.integers(0, config.vocab_size, (ROWS, family.length)).astype(np.int32)
    direction = rng.standard_normal((*ids.shape, config.vocab_size), np.float32)
    logits = model(input_ids=torch.from_numpy(ids).long(), use_cache=False).logits
    (logits * torch.from_numpy(direction)).sum().backward()

    def gradient(weight):
        return np.zeros(weight.shape, np.float32) if weight.grad is None else weight.grad.numpy()

    return SimpleNamespace(
        name=request.param,
        ours=Llama(config),
        params=in_our_layout(family, config, model, lambda w: w.detach().numpy(), family.one),
        ids=ids,
        direction=direction,
        logits=logits.detach().numpy(),
        gradients=in_our_layout(family, config, model, gradient, 0.0),
        family=family,
    )


def test_weights_are_all_those_of_the_model(case):
    assert jax.tree.map(jnp.shape, case.params) == jax.tree.map(jnp.shape, case.ours.shapes())


def test_logits_and_gradients_are_those_of_hugging_face(case):
    positions = np.broadcast_to(np.arange(case.ids.shape[1]), case.ids.shape)

    @jax.jit
    def compute(params):
        def along(params):
            logits = case.ours.apply(params, case.ids, positions).value
            return jnp.sum(logits * case.direction), logits

        return jax.grad(along, has_aux=True)(params)

    gradients, logits = compute(case.params)
    off = np.abs(logits - case.logits).max()
    assert np.abs(case.logits).max() > 1
    compared = {}
    paths = jax.tree.leaves_with_path(gradients["layers"])
    for (path, ours), theirs in zip(paths, jax.tree.leaves(case.gradients["layers"]), strict=True):
        if path[-1].key not in case.family.incomparable:
            largest = np.abs(theirs).max()
            compared[jax.tree_util.keystr(path)] = np.abs(ours - theirs).max() / max(largest, 1e-6)
    print(f"{case.name}: logits {off:.1e}, gradients {max(compared.values()):.1e}")
    assert off <= case.family.bound
    assert {path: off for path, off in compared.items() if not off <= case.family.bound} == {}


def test_cached_decoding_gives_the_logits_of_the_whole_row(case):
    length = case.ids.shape[1]
    cache = KVCache.init(case.ours.config, ROWS, length)
    step = jax.jit(case.ours.apply)
    ends, parts = range(PREFILL, length + 1), []
    for start, stop in zip([0, *ends], ends, strict=False):
        positions = np.broadcast_to(np.arange(start, stop), (ROWS, stop - start))
        output = step(case.params, case.ids[:, start:stop], positions, None, cache)
        cache = output.cache
        parts.append(output.value)
    off = np.abs(np.concatenate(parts, axis=1) - case.logits).max()
    print(f"{case.name}: cached {off:.1e}")
    assert off <= case.family.bound


@pytest.mark.parametrize("n_heads", range(1, 21))
def test_alibi_slopes_are_those_of_bloom_and_mpt(n_heads, torch):
    models = importlib.import_module("transformers.models")
    bloom, mpt = models.bloom.modeling_bloom, models.mpt.modeling_mpt
    of_bloom = bloom.build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
    of_mpt = -mpt.build_mpt_alibi_tensor(n_heads, 2)[:, 0, 0]
    for theirs in (of_bloom, of_mpt):
        np.testing.assert_allclose(alibi_slopes(n_heads), theirs.numpy(), rtol=1e-6)
