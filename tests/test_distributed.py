"""Which process this is, and which rows are its own."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import ConfigError, parse
from llama_jax.config.survival import DistributedConfig
from sharding.distributed import Process, exchange, find, from_local_rows, local_rows
from sharding.mesh import make_mesh


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "host:1234"}, "coordinator needs processes and process too: give all"),
        ({"process": 1, "processes": 2}, "process and processes needs coordinator too"),
        (
            {"coordinator": "host:1", "processes": 2, "process": 2},
            r"process \(2\) must be below processes \(2\): they count from 0",
        ),
        ({"coordinator": "host", "processes": 2, "process": 0}, r"\(host\) must be host:port"),
        ({"coordinator": "h:99999", "processes": 2, "process": 0}, "must be host:port"),
        (
            {"coordinator": "h:1", "processes": 2, "process": 0, "cluster": "slurm"},
            r"give either cluster \(slurm\) or coordinator, not both",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(DistributedConfig, values, "run.yaml")


SLURM = {
    "SLURM_JOB_ID": "60123",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_a_process_of_slurm_is_found(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = find()
    assert found is not None
    assert found[:2] == (9, 16)
    assert found.host == "node07"
    assert found.port >= 61440
    assert found.local_devices == (1,)
    assert find("none") is None


def test_explicit_numbers_ask_nobody(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = find("auto", "[::1]:1234", 4, 3)
    assert found == Process(3, 4, "[::1]:1234", None)
    assert (found.host, found.port) == ("::1", 1234)


def test_a_lone_machine_is_one_process():
    assert find() is None


def test_a_scheduler_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"could not be told apart|did not start this process"):
        find("slurm")


def test_alone_an_exchange_gives_the_own_text():
    assert exchange("test", "mine", 1.0) == ["mine"]


@pytest.mark.parametrize("spec", [P(("data", "fsdp")), P("fsdp"), P()])
def test_rows_go_to_the_devices_that_hold_them(spec):
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices())
    values = np.arange(24).reshape(8, 3)
    shape = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=NamedSharding(mesh, spec))
    rows = local_rows(shape)
    assert rows.tolist() == list(range(8))
    np.testing.assert_array_equal(from_local_rows(shape, rows, values), values)
