"""Attention kernels of accelerators: what `attend` computes, without scores in memory.

Both are Pallas kernels that come with jax. They leave out the blocks that causality hides, and
compute the scores again in the backward pass (FlashAttention, arXiv 2205.14135). Causality is told
by the order of the tokens, so the documents of a row follow each other, in segments.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from llama_jax.model.ops.balance import balanced_order
from sharding.constrain import parts
from sharding.rules import Rules

Kernel = Literal["auto", "xla", "splash", "flash"]
OF_PLATFORM: dict[str, Kernel] = {"tpu": "splash", "gpu": "flash", "cuda": "flash"}
NOTHING: frozenset[str] = frozenset()
# What a kernel can do besides LLaMA's attention, as fields of ModelConfig; XLA computes everything.
ABLE = {"splash": frozenset({"window", "score_cap"}), "flash": NOTHING}
LANES = 128  # of a TPU's vector unit: blocks are multiples
LARGEST_BLOCK = 1024  # queries, or keys, that are loaded at once
LARGEST_PART = 512  # keys that are computed at once


def chosen(
    kernel: Kernel, platform: str | None = None, devices: int = 1, wanted: frozenset[str] = NOTHING
) -> Kernel:
    """The kernel itself, or for "auto" that of a platform (None: of this process), if it can split
    a row's tokens over so many devices and has all that is wanted; else xla."""
    if kernel != "auto":
        return kernel
    found = OF_PLATFORM.get(platform or jax.default_backend(), "xla")
    able = wanted <= ABLE.get(found, wanted) and (found != "flash" or devices == 1)
    return found if able else "xla"


def check_able(kernel: Kernel, length: int, devices: int, wanted: frozenset[str]) -> None:
    """Refuses what a kernel cannot do: rows that devices cannot share with the same causal work,
    variants of attention that it does not have.

    Args:
        wanted: fields of ModelConfig that the layers have otherwise than LLaMA.

    Raises:
        ValueError: naming the numbers and the remedy.
    """
    if missing := sorted(wanted - ABLE.get(kernel, wanted)):
        raise ValueError(
            f"the {kernel} kernel has no {', '.join(missing)} (model.{missing[0]}): use "
            "compute.attention xla"
        )
    if devices == 1:
        return
    if kernel == "flash":
        raise ValueError(
            "the flash kernel does not split a row's tokens: use mesh.context 1, or "
            "compute.attention xla"
        )
    block = LANES if kernel == "splash" else 1
    if length % (2 * devices * block):
        raise ValueError(
            f"{length} tokens of a row cannot be shared evenly by {devices} devices: with "
            f"{kernel} attention the sequence length must be a multiple of {2 * devices * block} "
            f"(2 x mesh.context{f' x {block}' if block > 1 else ''})"
        )


def fused(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segments_BT: jax.Array | None,
    rules: Rules | None = None,
    balanced: bool = False,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H): each device computes its rows, heads and
    queries, against all keys.

    Args:
        kernel: splash or flash.
        segments_BT: documents of a row; here padding, 0, sees padding. None: one document.
        rules: how batch, heads and seq are split over the mesh in force.
        balanced: tokens lie in the order of `balanced_order`.
        window: keys that a query sees at most, its own among them; None: all.
        scale: of the scores; None: one over the root of a head's width.
        cap: soft cap of the scores; None: they have none.
        interpret: run the kernel's steps one by one, on any device: for tests.

    Raises:
        ValueError: the kernel cannot split these tokens, or has no windows or caps.
    """
    B, T, _, H = q_BTNH.shape
    given = {"window": window, "score_cap": cap}
    wanted = frozenset(name for name, value in given.items() if value is not None)
    check_able(kernel, T, parts("seq", rules), wanted)
    scale = H**-0.5 if scale is None else scale
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    # Key heads that the devices cannot share, each has those of its queries.
    keys = k_BKTH.shape[1]
    times = math.lcm(keys, parts("act_heads", rules)) // keys
    k_BKTH, v_BKTH = (jnp.repeat(x, times, axis=1) for x in (k_BKTH, v_BKTH))
    if kernel == "splash":
        return _splash(
            q_BTNH * scale, k_BKTH, v_BKTH, segments_BT, rules, balanced, window, cap, interpret
        )
    return _flash(q_BTNH, k_BKTH, v_BKTH, segments_BT, rules, scale, interpret)


def _splash(q_BTNH, k_BKTH, v_BKTH, segments_BT, rules, balanced, window, cap, interpret):
    """The TPU's kernel, which skips what a mask made beforehand hides."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, _ = q_BTNH.shape
    devices = parts("seq", rules)
    if devices == 1:
        q_BTNH, k_BKTH, v_BKTH, segments_BT = _padded(q_BTNH, k_BKTH, v_BKTH, segments_BT)
    length = q_BTNH.shape[1]
    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    if balanced:
        order = balanced_order(length, devices)
        mask.q_sequence = order  # which query each row of the mask is
    block = _divisor(length // devices // (2 if balanced else 1), LARGEST_BLOCK)
    part = _divisor(block, LARGEST_PART)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            *(block, block, part),  # forward: queries, keys, keys at once
            *(block, block, part),  # backward, for keys and values
            *(block, block),  # backward, for queries
        ),
        head_shards=parts("act_heads", rules),
        q_seq_shards=devices,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )

    def run(kernel, q_BTNH, k_BKTH, v_BKTH, of_queries_BT, of_keys_BT):
        if balanced:
            natural = np.argsort(order)
            k_BKTH, v_BKTH = k_BKTH[:, :, natural], v_BKTH[:, :, natural]
            of_keys_BT = of_keys_BT[:, natural]
        q_BNTH = jnp.swapaxes(q_BTNH, 1, 2)
        segments = splash.SegmentIds(of_queries_BT, of_keys_BT)
        y_BNTH = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(
            q_BNTH, k_BKTH, v_BKTH, segments
        )
        return jnp.swapaxes(y_BNTH, 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return run(kernel, q_BTNH, k_BKTH, v_BKTH, segments_BT, segments_BT)[:, :T]
    queries = rules.spec(("batch", "seq", "act_heads", None))
    keys = rules.spec(("batch", "act_heads", None, None))
    of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, rules.spec(("act_heads", "seq"))))
    of_segments = rules.spec(("batch", "seq")), rules.spec(("batch", None))
    return jax.shard_map(
        run,
        in_specs=(of_kernel, queries, keys, keys, *of_segments),
        out_specs=queries,
        check_vma=False,
    )(kernel, q_BTNH, k_BKTH, v_BKTH, segments_BT, segments_BT)[:, :T]


def _flash(q_BTNH, k_BKTH, v_BKTH, segments_BT, rules, scale, interpret):
    """The GPU's kernel, in Triton; it wants as many key heads as query heads."""
    from jax.experimental.pallas.ops.gpu import attention

    T = q_BTNH.shape[1]

    def run(q_BTNH, k_BKTH, v_BKTH, segments_BT):
        groups = q_BTNH.shape[2] // k_BKTH.shape[1]
        k_BTNH, v_BTNH = (
            jnp.repeat(jnp.swapaxes(x, 1, 2), groups, axis=2) for x in (k_BKTH, v_BKTH)
        )
        return attention.mha(
            q_BTNH, k_BTNH, v_BTNH, segments_BT, scale, causal=True, interpret=interpret
        )

    operands = _padded(q_BTNH, k_BKTH, v_BKTH, segments_BT)
    if rules is None or jax.sharding.get_abstract_mesh().empty:
        y_BTNH = run(*operands)
    else:
        queries = rules.spec(("batch", None, "act_heads", None))
        keys = rules.spec(("batch", "act_heads", None, None))
        y_BTNH = jax.shard_map(
            run,
            in_specs=(queries, keys, keys, rules.spec(("batch", None))),
            out_specs=queries,
            check_vma=False,
        )(*operands)
    return checkpoint_name(y_BTNH[:, :T], "attended")


def _padded(q_BTNH, k_BKTH, v_BKTH, segments_BT):
    """All with T a multiple of LANES; what is added comes last, where no earlier query sees it."""
    more = -q_BTNH.shape[1] % LANES
    if not more:
        return q_BTNH, k_BKTH, v_BKTH, segments_BT
    return (
        jnp.pad(q_BTNH, ((0, 0), (0, more), (0, 0), (0, 0))),
        *(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k_BKTH, v_BKTH)),
        jnp.pad(segments_BT, ((0, 0), (0, more))),
    )


def _divisor(length: int, largest: int) -> int:
    """The largest power of two, up to `largest`, that divides the length."""
    return int(np.gcd(length, largest))
