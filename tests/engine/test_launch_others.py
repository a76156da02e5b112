"""Ranks that torchrun, deepspeed, mpirun or srun start: logs, one console, one cause, the exit code."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engine import runs
from tests.engine.ranks import free_port
from tests.engine.test_hosts import write_toml
from tests.engine.test_launch import PROGRAM, ROOT


def environment(**more: str) -> dict[str, str]:
    free = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in free}
    return env | {"PYTHONPATH": str(ROOT)} | more


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words], env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_deepspeed_trains(tmp_path: Path) -> None:
    """It adds --local_rank=N before everything else."""
    runs.write_place(tmp_path, "sd")
    write_toml(tmp_path / "run.toml", runs.settings(tmp_path))
    train = ["sfumato", "train", str(tmp_path / "run.toml")]
    logs = tmp_path / "runs" / "run" / "logs"
    # What `deepspeed` itself starts on each machine; its first process only reads the hostfile.
    info = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    words = ["deepspeed.launcher.launch", f"--world_info={info}", f"--master_port={free_port()}", "--module"]
    ended = run(sys.executable, "-m", *words, *train, "steps=1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 1/1 ") == 1
    assert "step 1/1 " in (logs / "rank-0.log").read_text()
    assert "step 1/1 " not in (logs / "rank-1.log").read_text()


def test_torchrun_ranks_tell_one_mistake(tmp_path: Path) -> None:
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM), "alone"]
    ended = run(sys.executable, "-m", *words, "user-error", str(tmp_path))
    assert ended.returncode == 1, "torchrun keeps no code"
    assert ended.stderr.count("asked: a thing") == 1, ended.stderr
    assert all("asked: a thing" in (tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")
def test_mpirun_shows_one_cause(tmp_path: Path) -> None:
    words = ["--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(PROGRAM), "alone"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ended = run("mpirun", *words, "breaks", str(tmp_path), **root)
    assert ended.returncode == 1
    check_one_cause(ended.stderr, tmp_path)


def test_srun_shows_one_cause(tmp_path: Path) -> None:
    """Its variables, as of Slurm 23; the real one is in test_slurm_real.py."""
    port = str(free_port())
    processes = []
    for rank in range(2):
        names = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        names |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(PROGRAM), "alone", "breaks", str(tmp_path)],
                env=environment(**names),
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    check_one_cause("".join(told), tmp_path)
    assert "Traceback" in (tmp_path / "rank-0.log").read_text(), "the echo is in its log"


def check_one_cause(console: str, logs: Path) -> None:
    """Rank 1's error is on the console and in its log; rank 0's, an echo, in its log alone."""
    assert console.count("Traceback") == 1 and console.count("the wheel came off") == 2, console
    assert f"rank 1 failed; its log is {logs / 'rank-1.log'}" in console
    assert "the wheel came off" in (logs / "rank-1.log").read_text()


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    """A real run with a loader worker: its rank saves, and then everything is gone."""
    runs.write_place(tmp_path, "sd")
    values = runs.settings(tmp_path, steps=10_000, data__workers=1, checkpoint__every=10_000)
    write_toml(tmp_path / "run.toml", values)
    command = [sys.executable, "-m", "sfumato", "train", str(tmp_path / "run.toml"), "--gpus", "1"]
    supervisor = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    try:
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < end and supervisor.poll() is None, "it does not train"
            time.sleep(0.1)
        family = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(family) >= 3, "guard, rank and worker"
    finally:
        supervisor.kill()
        supervisor.wait()
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, left
    assert list((tmp_path / "runs" / "run" / "checkpoints").glob("step-*")), "the rank has saved"
