"""What a command line and an environment make of a process, and what is refused."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from sfumato import launch
from sfumato.errors import UserError
from sfumato.grammar import parse
from sfumato.launch import alone, hosts, interface
from sfumato.launch.become import same, where, world
from sfumato.launch.interface import address
from sfumato.launch.nodes import At

NODE = {
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
}


def options(*words: str):  # type: ignore[no-untyped-def]
    return parse(["train", "sd15-full", *words])


def test_nodes_by_hand() -> None:
    asked = options("--nodes", "2", "--node-rank", "1", "--master", "a:7", "--gpus", "4")
    assert where(asked, {}, 9) == At(1, 2, "a", 7, 9)
    assert where(options("--nodes", "1", "--gpus", "4"), {}) is None
    assert where(options("--gpus", "4"), {}) is None


def test_srun_with_one_task_a_node() -> None:
    asked = options("--gpus", "8")
    at = where(asked, NODE)
    assert at is not None and (at.number, at.count, at.host) == (1, 2, "gpu03")
    assert 20000 <= at.port < 30000
    at = where(asked, NODE | {"MASTER_ADDR": "b", "MASTER_PORT": "5"})
    assert at is not None and (at.host, at.port) == ("b", 5)
    # One task a rank is no node, and the batch script, which knows of nodes too, is none of the tasks.
    assert where(asked, NODE | {"SLURM_STEP_NUM_TASKS": "16"}) is None
    assert where(asked, {name: value for name, value in NODE.items() if "STEP" not in name}) is None
    assert where(options(), NODE) is None
    pmi = NODE | {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert where(asked, pmi) == where(asked, NODE), "srun --mpi=pmi2 is no mpirun"
    with pytest.raises(UserError, match="MASTER_PORT='x'"):
        where(asked, NODE | {"MASTER_PORT": "x"})


def test_a_node_of_a_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options()
    asked.hostfile = Path("left in the command line")
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7", hosts.SLOTS: "[8,4]"}
    monkeypatch.setattr(os, "environ", {**told, hosts.WORD: "w"})
    assert where(asked, os.environ, 9) == At(1, 2, "a", 7, 9, "w")
    assert asked.gpus == 4 and asked.hostfile is None and not {hosts.SLOTS, hosts.WORD} & set(os.environ)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--nodes", "2", "--node-rank", "0", "--master", "a"], "no --gpus"),
        (["--nodes", "2", "--node-rank", "0", "--gpus", "1"], "no --master"),
        (["--nodes", "2", "--master", "a", "--gpus", "1"], "no --node-rank"),
        (["--nodes", "2", "--node-rank", "2", "--master", "a", "--gpus", "1"], "--node-rank 2"),
        (["--nodes", "2", "--node-rank=-1", "--master", "a", "--gpus", "1"], "--node-rank -1"),
        (["--nodes", "2", "--node-rank", "0", "--master", "a:²", "--gpus", "1"], r"no HOST\[:PORT\]"),
        (["--nodes", "2", "--node-rank", "0", "--master", "a:x", "--gpus", "1"], r"no HOST\[:PORT\]"),
        (["--node-rank", "0", "--gpus", "1"], "no --nodes"),
        (["--master", "a", "--gpus", "1"], "no --nodes"),
        (["--hostfile", "h", "--gpus", "1"], "the file says that"),
    ],
)
def test_options_that_make_no_sense(words: list[str], found: str) -> None:
    with pytest.raises(UserError, match=f"found: .*{found}"):
        where(options(*words), {})


@pytest.mark.parametrize(
    ("text", "meant"),
    [("a", ("a", 29500)), ("a:1", ("a", 1)), ("[::1]:1", ("::1", 1)), ("fe80::1", ("fe80::1", 29500))],
)
def test_address(text: str, meant: tuple[str, int]) -> None:
    assert address(text) == meant


@pytest.mark.parametrize(
    "words", [["--local_rank=1", "train", "x"], ["train", "--local_rank", "1", "x", "a=1"], ["check", "x"]]
)
def test_what_deepspeed_adds_is_taken(words: list[str]) -> None:
    assert parse(words).config == "x"


def test_world_of_check(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\n# b slots=8\n\nc slots=4\n")
    assert world(options("--hostfile", str(tmp_path / "hosts"))) == 12
    assert world(options("--nodes", "2", "--gpus", "4")) == 8
    assert world(options("--gpus", "4")) == 4 and world(options()) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "it cannot be read: No such file"),
        ("", "it names no host"),
        ("a slots=8\na slots=8\n", "line 2: a for the second time"),
        ("a\n", "line 1: 'a'"),
        ("a slots=0\n", "line 1: 'a slots=0'"),
        ("a; rm -r b slots=1\n", "line 1"),
    ],
)
def test_hostfiles_that_are_refused(tmp_path: Path, text: str | None, found: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=f"found: {found}"):
        hosts.read(tmp_path / "hosts")


def test_a_hostfile_without_pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("a slots=8\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="found: there is no pdsh here"):
        hosts.run(tmp_path / "hosts", ["x"], None)


def test_a_folder_that_deepspeed_would_cut_at_its_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my run").mkdir()
    for name in ("ssh", "pdsh"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path / "my run")
    with pytest.raises(UserError, match="found: the folder .*my run"):
        hosts.check(Path("hosts"), {"a": 8})


def test_an_interface_is_found_and_the_users_stays() -> None:
    own = [
        (name, each.address)
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET and not interface.loopback(each.address)
    ]
    if not own:
        pytest.skip("this machine has no address")
    name, number = own[0]
    found = interface.variables({"NCCL_SOCKET_IFNAME": "mine"}, number)
    assert found == {"GLOO_SOCKET_IFNAME": name, "HCCL_SOCKET_IFNAME": f"={name}"}
    assert interface.variables({}, "127.0.0.1") == {}, "loopback reaches no other machine"
    assert interface.toward("no-such-host.invalid") is None


def test_what_must_be_the_same() -> None:
    facts = same(None)
    assert facts["torch"] and set(facts) == {"sfumato", "torch", "deepspeed", "diffusers", "transformers"}


def test_a_rank_that_comes_late_does_not_undo_what_another_has_told(tmp_path: Path) -> None:
    mark = tmp_path / alone.TOLD
    assert alone.claim(mark)
    alone.remove_old(mark)
    assert not alone.claim(mark), "both would tell"
    os.utime(mark, (1, 1))  # of an earlier start
    alone.remove_old(mark)
    assert alone.claim(mark)


def test_a_mistake_that_others_caused_is_an_echo() -> None:
    """As that of a checkpoint which the others did not come to."""
    plain, caused, other = (
        UserError("to save the run", "the ranks lost each other", "see") for _ in range(3)
    )
    caused.__cause__ = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms")
    other.__cause__ = OSError("no space")
    assert [launch.is_echo(error) for error in (plain, caused, other)] == [False, True, False]
