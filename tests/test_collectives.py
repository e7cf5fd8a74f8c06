"""Collectives read from HLO text: small programs with closed forms, and each spelling by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.collectives import collectives, totals
from sharding.hlo import elements, executions, read, shape_bytes
from sharding.mesh import make_mesh

SIZES = {"data": 2, "tensor": 2}
ROWS, WIDTH = 8, 6


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(SIZES)


def compiled(mesh, function, in_spec, out_spec, repeats=1):
    """The HLO of a function of a shard, run `repeats` times in a loop."""

    def body(x, _):
        return function(x), None

    def whole(x):
        return jax.lax.scan(body, x, None, length=repeats)[0] if repeats > 1 else function(x)

    mapped = jax.shard_map(whole, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, in_spec))
    return jax.jit(mapped).lower(x).compile().as_text()


def only(hlo, sizes=SIZES):
    (one,) = collectives(hlo, sizes)
    return one


# --- compiled programs ------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_an_all_gather_sends_all_parts_but_its_own(mesh, axis):
    gather = lambda x: jax.lax.all_gather(x, axis, tiled=True)  # noqa: E731
    one = only(compiled(mesh, gather, P(axis, None), P(None, None)))
    assert (one.kind, one.axes, one.executions) == ("all-gather", (axis,), 1)
    assert one.payload == ROWS * WIDTH * 4
    assert one.wire_bytes == one.payload / 2


def test_a_sum_over_both_axes_sends_everything_twice(mesh):
    total = lambda x: jax.lax.psum(x, ("data", "tensor"))  # noqa: E731
    one = only(compiled(mesh, total, P(("data", "tensor"), None), P(None, None)))
    assert (one.kind, one.axes) == ("all-reduce", ("data", "tensor"))
    assert one.wire_bytes == 2 * (ROWS // 4 * WIDTH * 4) * 3 / 4


def test_a_reduce_scatter_sends_what_the_others_keep(mesh):
    scatter = lambda x: jax.lax.psum_scatter(x, "data", tiled=True)  # noqa: E731
    one = only(compiled(mesh, scatter, P(None, None), P("data", None)))
    assert (one.kind, one.axes) == ("reduce-scatter", ("data",))
    assert one.wire_bytes == ROWS // 2 * WIDTH * 4


def test_an_all_to_all(mesh):
    swap = lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True)  # noqa: E731
    one = only(compiled(mesh, swap, P("data", None), P(None, "data")))
    assert (one.kind, one.axes, one.wire_bytes) == ("all-to-all", ("data",), ROWS * WIDTH * 4 / 4)


def test_a_permutation_in_a_loop_counts_every_pass(mesh):
    turn = lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])  # noqa: E731
    one = only(compiled(mesh, turn, P("data", None), P("data", None), repeats=5))
    assert (one.kind, one.axes, one.executions) == ("collective-permute", ("data",), 5)
    assert one.wire_bytes == ROWS // 2 * WIDTH * 4
    (row,) = totals([one])
    assert (row.sites, row.executions, row.wire_bytes) == (1, 5, 5 * one.wire_bytes)


def test_what_is_not_sent_is_not_counted():
    """A group of one device."""
    alone = make_mesh({"data": 1, "tensor": 1}, jax.devices()[:1])
    hlo = compiled(alone, lambda x: jax.lax.psum(x, "data"), P(None), P(None))
    assert collectives(hlo, {"data": 1, "tensor": 1}) == []


# --- spellings of text ------------------------------------------------------------------------


def module(*lines: str, others: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", ("tensor",), 2),
        ("replica_groups={{0,2},{1,3}}", ("data",), 2),
        ("replica_groups={}", ("data", "tensor"), 4),
        ("replica_groups=[2,2]<=[4]", ("tensor",), 2),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ("data",), 2),
        ("replica_groups=[1,4]<=[4]", ("data", "tensor"), 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", ("tensor",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", ("data", "tensor"), 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0':(1)2}", ("data",), 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0':(2)2}", ("tensor",), 2),
    ],
)
def test_every_way_to_write_groups(groups, axes, size):
    one = only(
        module(f"ROOT %a = f32[8]{{0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}")
    )
    assert (one.axes, len(one.group)) == (axes, size)
    assert one.wire_bytes == 32 * (size - 1) / size


def test_pairs_of_a_permutation():
    line = "ROOT %c = bf16[8]{0} collective-permute(%p), channel_id=1, source_target_pairs="
    one = only(module(line + "{{0,1},{1,0},{2,3},{3,2}}"))
    assert (one.axes, one.group, one.wire_bytes) == (("tensor",), (0, 1), 16)


@pytest.mark.parametrize(
    ("line", "kind", "payload"),
    [
        (
            "%s = (f32[4]{0:T(128)S(1)}, f32[8]{0:T(128)}) all-gather-start(%p), GROUPS",
            "all-gather",
            32,
        ),
        (
            "%s = ((f32[4]{0}, bf16[2]{0}), (f32[8]{0}, bf16[4]{0})) all-gather-start(%p, %p),"
            " GROUPS",
            "all-gather",
            40,
        ),
        ("%s = (f32[8]{0}, f32[4]{0}) all-reduce-start(%p, %q), GROUPS", "all-reduce", 48),
        (
            "%s = ((f32[8]{0}), f32[4]{0}, u32[]{:S(2)}) reduce-scatter-start(%p), GROUPS",
            "reduce-scatter",
            16,
        ),
        (
            "%s = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%p),"
            " source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            16,
        ),
    ],
)
def test_a_start_counts_once_and_its_done_not_at_all(line, kind, payload):
    start = line.replace("GROUPS", "channel_id=1, replica_groups={{0,1},{2,3}}")
    one = only(module(start, f"ROOT %d = f32[8]{{0}} {kind}-done(%s), channel_id=1"))
    assert (one.kind, one.payload) == (kind, payload)


@pytest.mark.parametrize("opcode", ["async-start", "reduce-scatter-start"])
def test_an_asynchronous_wrapper_counts_what_it_calls(opcode):
    wrapped = (
        "%wrapped (p: f32[8]) -> f32[4] {\n"
        "  ROOT %r = f32[4]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1},{2,3}}\n}\n"
    )
    start = f"%s = ((f32[8]{{0}}), f32[4]{{0}}) {opcode}(%p), calls=%wrapped"
    one = only(module(start, "ROOT %d = f32[4]{0} async-done(%s)", others=wrapped))
    assert (one.kind, one.executions, one.wire_bytes) == ("reduce-scatter", 1, 16)


GATHER = "%g = f32[8]{0} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3}}"
FUSED = "\n".join(
    f"%async_collective_fusion.{n} (p: f32[4]) -> f32[8] {{\n  ROOT {GATHER}\n}}\n" for n in (1, 2)
)


def test_a_channel_in_several_fusions_is_one_collective():
    one = only(
        module(
            "%a = f32[8]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1",
            "ROOT %b = f32[8]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.2",
            others=FUSED,
        )
    )
    assert (one.executions, one.payload) == (1, 32)


def test_a_tpus_fused_reduce_scatter():
    fused = (
        "%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {\n"
        "  %a = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1},{2,3}}\n"
        "  ROOT %s = f32[4]{0} dynamic-slice(%a, %i)\n}\n"
    )
    one = only(module("ROOT %f = f32[4]{0} fusion(%p), calls=%all-reduce-scatter.1", others=fused))
    assert one.wire_bytes == 16  # an all-reduce of its own sends 32


@pytest.mark.parametrize(
    ("kind", "slices", "sent"),
    [("ALL_REDUCE", "{1,2}", 32), ("ALL_REDUCE", "{1:4}", 48), ("ALL_GATHER", "{1:4}", 96)],
)
def test_transfers_between_slices(kind, slices, sent):
    hlo = module(
        "%s = (f32[8]{0}, u32[], token[]) send(%p, %t), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{slices}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}',
        "%d = (f32[8]{0}, token[]) send-done(%s), channel_id=3, is_host_transfer=true",
    )
    one = only(hlo)
    name = kind.lower().replace("_", "-") + " between slices"
    assert (one.kind, one.wire_bytes, one.group) == (name, sent, ())


def loop(condition: str, step: str, config: str = "") -> str:
    """A loop around one permutation, whose condition and step are given."""
    return module(
        "ROOT %w = (s32[]{:T(128)}, f32[4]) while(%t), condition=%cond, body=%body" + config,
        others=(
            "%cond (c: (s32[], f32[4])) -> pred[] {\n"
            '  %limit = s32[]{:T(128)} constant(12), metadata={op_name="n"}\n'
            "  %c = (s32[]{:T(128)}, f32[4]{0}) parameter(0)\n"
            "  %i = s32[]{:T(128)} get-tuple-element(%c), index=0\n"
            f"  ROOT %test = pred[]{{:T(512)}} {condition}\n"
            "}\n\n"
            "%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {\n"
            "  %b = (s32[]{:T(128)}, f32[4]{0}) parameter(0)\n"
            "  %j = s32[]{:T(128)} get-tuple-element(%b), index=0\n"
            "  %x = f32[4]{0} get-tuple-element(%b), index=1\n"
            "  %one = s32[]{:T(128)} constant(1)\n"
            f"{step}"
            "  %y = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}\n"
            "  ROOT %r = (s32[]{:T(128)}, f32[4]{0}) tuple(%next, /*index=1*/%y)\n"
            "}\n"
        ),
    )


ONE = "  %next = s32[]{:T(128)} add(%j, %one)\n"
TWO = "  %half = s32[]{:T(128)} add(%j, %one)\n  %next = s32[]{:T(128)} add(%half, %one)\n"


@pytest.mark.parametrize(
    ("condition", "step", "config", "passes"),
    [
        ("compare(%i, %limit), direction=LT", ONE, "", 12),
        ("compare(%limit, %i), direction=GT", ONE, "", 12),
        ("compare(s32[]{:T(128)} %i, s32[]{:T(128)} %limit), direction=LT", ONE, "", 12),
        ("compare(%i, %limit), direction=LT", TWO, "", 6),  # unrolled by the compiler
        ("and(%i, %limit)", ONE, "", 1),  # its length is data
        ("compare(%i, %limit), direction=EQ", ONE, "", 1),
        ("compare(%limit, %i), direction=NE", ONE, "", 1),
        ("and(%i, %i)", ONE, ', backend_config={"known_trip_count":{"n":"9"}}', 9),
    ],
)
def test_how_often_a_loop_runs(condition, step, config, passes):
    assert only(loop(condition, step, config)).executions == passes


def test_a_windowed_product_hides_one_collective():
    """The steps of the loop carry parts of it."""
    hlo = loop("compare(%i, %limit), direction=LT", ONE)
    counts, windows = executions(read(hlo.replace("%body", "%windowed_dot_general_body_ag")))
    assert counts["windowed_dot_general_body_ag"] == 12
    assert windows["windowed_dot_general_body_ag"] == 1


def test_what_never_runs_is_not_counted():
    unused = f"%unused (p: f32[4]) -> f32[8] {{\n  ROOT {GATHER}\n}}\n"
    assert collectives(module("ROOT %r = f32[8]{0} copy(%p)", others=unused), SIZES) == []


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("(f32[2]{0}, (s8[3], pred[4]))", 15),
        ("s4[3]", 2),
        ("f8e4m3fn[5]", 5),
        ("token[]", 0),
        ("u32[]{:S(2)}", 4),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert shape_bytes(shape) == size


def test_elements_of_a_tuple():
    assert elements("(f32[2]{1,0:T(8,128)}, (u32[], s8[3]))") == [
        "f32[2]{1,0:T(8,128)}",
        "(u32[], s8[3])",
    ]
    assert elements("f32[2]{0}") == ["f32[2]{0}"]
