"""The launch recipes: read as their engines would, and the starts of Slurm and Open MPI run."""

import re
import subprocess

import pytest
import yaml
from faults import REPOSITORY, Runs, codes, free_port, losses, said

from llama_jax import flags
from llama_jax.config import TrainConfig, dotted_keys

DEPLOY = REPOSITORY / "deploy"
SCRIPTS = ("slurm.sbatch", "cloud_tpu.sh")


def text(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n", str(DEPLOY / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in text(script)


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir()))
def test_every_flag_of_a_recipe_is_one_of_train(name):
    """And each recipe restarts."""
    (command,) = re.findall(r"main\.py train (.*?)(?:\|\||&\"|\n\S|\n *env:|\Z)", text(name), re.S)
    used = [flag for flag, _ in flags.split(re.findall(r"--[\w.]+", command))]
    assert {"config", "restarts"} <= set(used)
    assert set(used) - {"config"} <= set(dotted_keys(TrainConfig))


def test_the_kubernetes_job_is_whole():
    service, job = yaml.safe_load_all(text("kubernetes.yaml"))
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert service["spec"]["clusterIP"] == "None"  # headless: a name for each pod
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert isinstance(spec["parallelism"], int)
    (container,) = pod["containers"]
    (shell,) = container["args"]
    assert f"--distributed.processes {spec['parallelism']}" in shell
    assert spec["completions"] == spec["parallelism"]
    # Pod 0 is <job>-0.<subdomain>, and the Service that gives the name selects the job's pods.
    host, port = re.search(r"coordinator (\S+):(\d+)", shell).groups()
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    ports = [entry["port"] for entry in service["spec"]["ports"]]
    assert ports == [int(port), int(port) + 1]  # jax's and the watchdog's
    assert pod["restartPolicy"] == "Never"  # needed by podFailurePolicy
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_the_skypilot_task_has_only_known_keys():
    task = yaml.safe_load(text("skypilot.yaml"))
    known = {"name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    assert set(task) <= known
    assert isinstance(task["num_nodes"], int)
    for shell in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=shell, text=True).returncode == 0
    variables = set(re.findall(r"\$(\w+)", task["run"]))
    given = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}
    assert variables == given | set(task["envs"]) | {"coordinator"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.end()


def slurm(index, number):
    return {
        "SLURM_JOB_ID": str(number),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_NODES": "1",
    }


def open_mpi(index, number):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{number * 4096}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


@pytest.mark.parametrize("scheduler", [slurm, open_mpi])
def test_processes_of_a_scheduler_find_each_other(runs, scheduler):
    """Started as Slurm and Open MPI start them: by environment variables alone."""
    path = runs.settings(scheduler.__name__, steps=4, distributed={"cluster": "auto"})
    number = free_port()  # jax makes its port of the number of the job
    started = [
        runs.start(path, name=f"process{index}", environment=scheduler(index, number))
        for index in range(2)
    ]
    assert codes(started) == [0, 0], "\n".join(map(said, started))
    assert "in 2 processes" in said(started[0])
    assert sorted(losses(runs.folder / scheduler.__name__)[0]) == [1, 2, 3, 4]
