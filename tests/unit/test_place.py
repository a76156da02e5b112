"""A process finds its place in the environments of the launchers."""

import pytest

from sfumato.errors import UserError
from sfumato.place import Place, adopt, find, first_node, is_further

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node-77@1",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-05],cpu1",
    "SLURM_JOB_ID": "123456",
}


def test_torchrun() -> None:
    env = dict(TORCHRUN)
    assert adopt(env) == Place(3, 1, 4, 2, "torchrun or deepspeed")
    assert env == TORCHRUN


def test_openmpi_on_one_machine() -> None:
    env = dict(OPENMPI)
    assert adopt(env) == Place(3, 1, 4, 4, "mpirun")
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("3", "1", "4")
    assert env["MASTER_ADDR"] == "127.0.0.1"
    # Every rank of the job computes the same port.
    other = OPENMPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    adopt(other)
    assert other["MASTER_PORT"] == env["MASTER_PORT"]


def test_openmpi_on_several_machines_needs_an_address() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        adopt(OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_srun() -> None:
    env = dict(SRUN)
    place = adopt(env)
    assert place is not None and (place.rank, place.local_rank, place.world) == (3, 1, 4)
    assert env["MASTER_ADDR"] == "gpu03"
    assert 20000 <= int(env["MASTER_PORT"]) < 30000


def test_ranks_of_this_node_of_a_step() -> None:
    """srun -N 3 -n 8, which says no --ntasks-per-node."""
    env = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_STEP_NUM_TASKS": "8"}
    found = [find(env | {"SLURM_NODEID": str(node)}) for node in range(3)]
    assert [place.local_world for place in found if place] == [3, 3, 2]
    # srun --mpi=pmi2 says less by mpirun's names; mpirun that srun has started says other numbers.
    pmi = find(env | {"SLURM_NODEID": "0", "PMI_RANK": "3", "PMI_SIZE": "8"})
    assert pmi is not None and (pmi.by, pmi.local_rank, pmi.local_world) == ("srun", 1, 3)
    inner = find(env | {"PMI_RANK": "3", "PMI_SIZE": "64"})
    assert inner is not None and (inner.by, inner.world) == ("mpirun", 64)


def test_a_batch_script_is_no_rank() -> None:
    """sbatch gives its script rank 0 of all tasks; to take it would wait for tasks that nobody starts."""
    script = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert find(script) is None


def test_a_single_task_may_start_ranks() -> None:
    assert find(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find({}) is None


def test_one_rank_of_a_machine_speaks() -> None:
    assert is_further(TORCHRUN) and not is_further(TORCHRUN | {"LOCAL_RANK": "0"})
    assert not is_further({}) and not is_further({"RANK": "x", "WORLD_SIZE": "2"})


def test_torchrun_wins_over_the_srun_that_started_it() -> None:
    place = find(SRUN | TORCHRUN | {"RANK": "0"})
    assert place is not None and place.rank == 0


@pytest.mark.parametrize(
    "change", [{"RANK": "one"}, {"RANK": "4"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": ""}, {"LOCAL_RANK": "x"}]
)
def test_faults_are_the_users(change: dict[str, str]) -> None:
    with pytest.raises(UserError):
        adopt(TORCHRUN | change)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("a[7]-ib,b", "a7-ib"),
        ("rack1-node[1,2]", "rack1-node1"),
        ("rack[1-2]node[1-4],b", "rack1node1"),
        ("r[01,03]n[3-4]s", "r01n3s"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_list_of_nodes_that_is_none() -> None:
    with pytest.raises(UserError, match="list of nodes"):
        first_node("")
