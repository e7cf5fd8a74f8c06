"""sharding/: the mesh, the rules, the placement of trees, the constraint of activations."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sharding.constrain import constrain
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS, Rules

REPOSITORY = Path(__file__).parents[1]
TRAIN, DECODE = PRESETS["train"], PRESETS["decode"]
PARAMETER_AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "layers")
ACTIVATION_AXES = (
    *("batch", "seq", "kv_seq"),
    *("act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab"),
)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    sizes = {"data": data, "fsdp": fsdp, "expert": 1, "context": 1, "tensor": tensor}
    return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


# mesh


def test_the_suite_has_four_devices():
    assert len(jax.devices()) == 4


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 4}, (4,)),
        ({"data": -1, "fsdp": 2, "tensor": 1}, (2, 2, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 2, 2)),
        ({"data": 4, "fsdp": 1, "tensor": -1}, (4, 1, 1)),
    ],
)
def test_mesh_keeps_the_order_and_fills_in_the_open_axis(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == tuple(sizes)
    assert mesh.devices.shape == shape
    assert {device.id for device in mesh.devices.flat} == {0, 1, 2, 3}


def test_mesh_axes_are_auto():
    mesh = make_mesh({"data": 2, "fsdp": 2})
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_mesh_of_some_devices():
    mesh = make_mesh({"tensor": -1}, jax.devices()[1:3])
    assert [device.id for device in mesh.devices.flat] == [1, 2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2, "fsdp": 3}, r"data=2 x fsdp=3 multiply to 6, but there are 4 devices; .*-1"),
        ({"data": 2}, r"data=2 multiply to 2, but there are 4 devices"),
        ({"data": 3, "fsdp": -1}, r"data=3 multiply to 3, .* divide the 4 devices; .*fsdp=-1"),
        ({"data": 8, "fsdp": -1}, r"data=8 multiply to 8, .* divide the 4 devices"),
        ({"data": -1, "fsdp": -1}, r"data and fsdp are -1"),
        ({"data": 0, "fsdp": -1}, r"data is 0"),
        ({"data": -2}, r"data is -2"),
    ],
)
def test_mesh_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


@dataclass(frozen=True)
class Gpu:
    """As much of a device as its place in a mesh depends on."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "imagined"
    process_index: int = 0


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 2}, {"data"}),
        ({"data": 4, "fsdp": 2, "tensor": 2}, {"data"}),
        ({"data": 1, "fsdp": 8, "tensor": 2}, {"fsdp"}),
        ({"data": 1, "fsdp": 1, "tensor": 16}, {"tensor"}),
    ],
)
def test_the_outermost_axes_cross_slices(sizes, crossing):
    devices = [Gpu(id=i, slice_index=i % 2) for i in range(16)]
    mesh = make_mesh(sizes, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.devices.shape == tuple(sizes.values())
    assert len(set(mesh.devices.flat)) == 16
    varying = {name for axis, name in enumerate(sizes) if (np.diff(slices, axis=axis) != 0).any()}
    assert varying == crossing


def test_four_slices_spread_over_two_axes():
    devices = [Gpu(id=i, slice_index=i // 4) for i in range(16)]
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[:, :, 0] == slices[:, :, 1]).all()
    assert slices[:, :, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def constructions(source: str) -> Iterator[str]:
    """Calls and imports by which a file would make a mesh of its own."""
    makers = {"Mesh", "AbstractMesh", "create_device_mesh", "create_hybrid_device_mesh"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.split(".")[-1] in makers or called == "jax.make_mesh":
                yield called
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            yield from (
                name.name for name in node.names if name.name in {*makers, "make_mesh"} - {"Mesh"}
            )


@pytest.mark.parametrize(
    "source",
    [
        "mesh = jax.make_mesh((4,), ('data',))",
        "mesh = jax.sharding.Mesh(devices, ('data',))",
        "mesh = Mesh(devices, ('data',))",
        "from jax import make_mesh",
        "from jax.experimental.mesh_utils import create_device_mesh as create",
    ],
)
def test_a_construction_is_recognised(source):
    assert list(constructions(source))


def test_only_mesh_py_constructs_meshes():
    assert list(constructions("from sharding.mesh import make_mesh\nmesh = make_mesh({})")) == []
    files = [*REPOSITORY.glob("*.py")]
    for folder in ("llama_jax", "sharding", "tests", "benchmarks"):
        files += (REPOSITORY / folder).rglob("*.py")
    found = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if list(constructions(file.read_text(encoding="utf-8")))
    }
    assert found == {"sharding/mesh.py"}


# rules


def test_rules_are_values():
    same = Rules.of({"embed": "fsdp", "mlp": None})
    assert same == Rules.of({"embed": ("fsdp",), "mlp": ()})
    assert hash(same) == hash(Rules.of({"embed": "fsdp", "mlp": None}))
    assert same != same.replace(mlp="tensor")
    with pytest.raises(AttributeError):
        same.table = ()


def test_spec():
    rules = Rules.of({"batch": ("data", "fsdp"), "mlp": "tensor", "seq": None})
    assert rules.spec(("batch", "seq", "mlp")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert rules.spec((None, "mlp")) == PartitionSpec(None, "tensor")
    assert rules.spec(()) == PartitionSpec()


def test_replace_changes_and_adds():
    rules = Rules.of({"mlp": "tensor"}).replace(mlp=None, latent="fsdp")
    assert rules == Rules.of({"mlp": None, "latent": "fsdp"})


def test_rules_refuse_one_mesh_axis_for_two_dimensions():
    with pytest.raises(ValueError, match=r"both 'heads' and 'mlp' .*'tensor'"):
        TRAIN.spec(("embed", "heads", "mlp"))
    with pytest.raises(ValueError, match=r"'batch' names a mesh axis twice"):
        Rules.of({"batch": ("data", "data")})


def test_rules_refuse_an_unknown_axis_naming_the_nearest():
    with pytest.raises(ValueError, match=r"no axis 'kv_head'; the nearest is 'kv_heads'"):
        TRAIN.spec(("embed", "kv_head"))
    with pytest.raises(ValueError, match=r"no axis 'x'; known are embed, mlp"):
        Rules.of({"embed": "fsdp", "mlp": None}).spec(("x",))


def test_presets_know_every_axis():
    for rules in PRESETS.values():
        for axis in PARAMETER_AXES + ACTIVATION_AXES:
            rules.spec((axis,))


def test_decoding_leaves_weights_and_tokens_whole_and_splits_the_cache():
    assert TRAIN.spec(("embed", "mlp")) == PartitionSpec(("fsdp", "context"), "tensor")
    assert TRAIN.spec(("batch", "seq")) == PartitionSpec(("data", "fsdp", "expert"), "context")
    assert DECODE.spec(("embed", "mlp")) == PartitionSpec(None, "tensor")
    assert DECODE.spec(("batch", "seq")) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert DECODE.spec(("kv_heads", "kv_seq")) == PartitionSpec("tensor", "context")
    whole = TRAIN.replace(embed=None, seq=None, residual_seq=None)
    assert whole.replace(kv_seq="context") == DECODE


# partition


def test_shardings_follow_the_rules():
    mesh = mesh_of(fsdp=2, tensor=2)
    placed = shardings(
        {"q": array(3, 8, 4, 2), "norm": array(8)},
        {"q": ("layers", "embed", "heads", "head_dim"), "norm": ("embed",)},
        mesh,
        TRAIN,
    )
    assert placed == {
        "q": NamedSharding(mesh, PartitionSpec(None, ("fsdp", "context"), "tensor", None)),
        "norm": NamedSharding(mesh, PartitionSpec(("fsdp", "context"))),
    }
    assert placed["q"].shard_shape((3, 8, 4, 2)) == (3, 4, 2, 2)


def test_shardings_of_optimizer_state():
    """Named tuples, empty tuples, None and scalars: nodes and leaves a tuple of names resembles."""
    shapes = {"embed": array(8, 4), "layers": ({"gate": array(4, 6)}, {"gate": array(4, 6)})}
    axes = {"embed": ("vocab", "embed"), "layers": ({"gate": ("embed", "mlp")},) * 2}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, shapes)
    state_axes = optax.tree_map_params(
        optimizer,
        lambda _, names: names,
        state,
        axes,
        transform_non_params=lambda _: (),
    )
    mesh = mesh_of(fsdp=2, tensor=2)
    placed = shardings(
        {"state": state, "nothing": None}, {"state": state_axes, "nothing": None}, mesh, TRAIN
    )

    assert jax.tree.structure(placed["state"]) == jax.tree.structure(state)
    adam = placed["state"][1][0]
    assert adam.count.spec == PartitionSpec()
    for moments in (adam.mu, adam.nu):
        assert moments["embed"].spec == PartitionSpec("tensor", ("fsdp", "context"))
        assert moments["layers"][1]["gate"].spec == PartitionSpec(("fsdp", "context"), "tensor")


def test_shardings_place_arrays():
    mesh = mesh_of(data=2, tensor=2)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    placed = jax.device_put(x, shardings(x, ("batch", "act_mlp"), mesh, TRAIN))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, x)


def test_shardings_refuse_what_does_not_divide():
    with pytest.raises(
        ValueError,
        match=r"layers/attention/k: dimension 2 \(kv_heads\) is 2, which tensor=4 of the mesh does "
        r"not divide\. Use a mesh whose tensor divides 2, .* or rules that leave kv_heads whole",
    ):
        shardings(
            {"layers": {"attention": {"k": array(3, 8, 2, 4)}}},
            {"layers": {"attention": {"k": ("layers", "embed", "kv_heads", "head_dim")}}},
            mesh_of(tensor=4),
            TRAIN,
        )


def test_shardings_refuse_a_batch_that_two_axes_do_not_divide():
    with pytest.raises(ValueError, match=r"\(batch\) is 6, which data=2 x fsdp=2 .* multiple of 4"):
        shardings({"tokens": array(6, 8)}, {"tokens": ("batch", "seq")}, mesh_of(2, 2), TRAIN)


def test_shardings_refuse_a_mesh_without_the_axis():
    with pytest.raises(
        ValueError, match=r"'embed' over mesh axis 'fsdp', .*\(data\) does not have"
    ):
        shardings({"norm": array(8)}, {"norm": ("embed",)}, make_mesh({"data": 4}), TRAIN)


@pytest.mark.parametrize("axes", [("embed",), ("embed", "mlp", None), "ab", ["embed", "mlp"]])
def test_shardings_refuse_axes_that_do_not_fit_the_shape(axes):
    with pytest.raises(ValueError, match=r"^gate has shape \(4, 6\) but logical axes"):
        shardings({"gate": array(4, 6)}, {"gate": axes}, mesh_of(4), TRAIN)


def test_shardings_refuse_different_trees():
    with pytest.raises(ValueError, match=r"trees of shapes and of axis names differ: .*gate"):
        shardings({"gate": array(4, 6)}, {"up": ("embed", "mlp")}, mesh_of(4), TRAIN)


# constrain


def test_constrain_is_the_identity_without_rules_or_mesh():
    x = jnp.ones((3, 5))
    assert constrain(x, ("batch", "seq"), TRAIN) is x
    with jax.set_mesh(mesh_of(data=4)):
        assert constrain(x, ("batch", "seq"), None) is x
        program = jax.make_jaxpr(lambda x: constrain(x, ("batch", "seq"), None))(x)
    assert not program.eqns


@pytest.mark.parametrize("compiled", [True, False])
def test_constrain_lays_out_and_keeps_the_values(compiled):
    x = np.arange(4 * 3 * 8, dtype=np.float32).reshape(4, 3, 8)
    axes = ("batch", "seq", "act_mlp")

    def f(x):
        return constrain(jnp.asarray(x), axes, TRAIN)

    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        y = (jax.jit(f) if compiled else f)(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, TRAIN.spec(axes)), x.ndim)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 4)}
    np.testing.assert_array_equal(y, x)


def test_constrain_follows_the_mesh_in_force():
    """A function compiled for one mesh is not run with its layout on the next."""

    @jax.jit
    def f(x):
        return constrain(x, ("batch", "act_mlp"), TRAIN)

    x = np.ones((4, 8), np.float32)
    shapes = []
    for mesh in (mesh_of(data=4), mesh_of(tensor=4), mesh_of()):
        with jax.set_mesh(mesh):
            shapes.append(f(x).addressable_shards[0].data.shape)
    assert shapes == [(1, 8), (4, 2), (4, 8)]


def test_constrain_passes_gradients_through_vmap_and_scan():
    x = np.linspace(-1, 1, 2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)

    def loss(x, rules):
        def body(carry, row):
            return carry, constrain(jnp.sin(row), ("batch", "act_mlp"), rules).sum()

        squares = jax.vmap(lambda row: constrain(row**2, ("batch", "act_mlp"), rules))(x)
        return jax.lax.scan(body, 0, x)[1].sum() + squares.sum()

    expected = jax.grad(loss)(x, None)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(x, TRAIN)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_constrain_refuses_what_does_not_divide():
    with (
        jax.set_mesh(mesh_of(data=4)),
        pytest.raises(
            ValueError, match=r"activation \(batch, seq\): dimension 0 \(batch\) is 6, which data=4"
        ),
    ):
        jax.jit(lambda x: constrain(x, ("batch", "seq"), TRAIN))(np.ones((6, 3)))


def test_constrain_refuses_axes_that_do_not_fit_the_shape():
    with (
        jax.set_mesh(mesh_of(data=4)),
        pytest.raises(ValueError, match=r"has shape \(4, 3\) but logical axes \('batch',\)"),
    ):
        constrain(jnp.ones((4, 3)), ("batch",), TRAIN)
