"""Environment variables for speed are set where they help, and never over the user's."""

import os
import subprocess
import sys
from pathlib import Path

from sfumato.tuning import DONE, GLIBC, has_accelerator, missing

ROOT = Path(__file__).parents[2]
CPU = {"DS_ACCELERATOR": "cpu"}


def test_cpu_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert missing(CPU, 2) == GLIBC | {DONE: "1", "OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert missing(CPU, 1) == GLIBC | {DONE: "1"}


def test_a_gpu_rank_needs_no_glibc() -> None:
    assert missing({"DS_ACCELERATOR": "cuda"}, 1) == {DONE: "1"}


def test_the_users_own_stay() -> None:
    user = CPU | {"OMP_NUM_THREADS": "3", "MALLOC_TOP_PAD_": "1"}
    assert not missing(user, 2).keys() & user.keys()


def test_device_files(tmp_path: Path) -> None:
    assert not has_accelerator({}, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert has_accelerator({}, tmp_path)
    assert not has_accelerator(CPU, tmp_path)


def test_a_single_process_begins_anew_once_with_the_same_arguments() -> None:
    code = (
        "import os, sys; print('begun', flush=True); from sfumato import tuning; tuning.restart();"
        "print(os.environ['MALLOC_TOP_PAD_'], sys.argv[1:])"
    )
    env = {name: value for name, value in os.environ.items() if name not in (*GLIBC, DONE)} | CPU
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "a b", "c"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert out.stdout == "begun\nbegun\n268435456 ['a b', 'c']\n", out.stderr
