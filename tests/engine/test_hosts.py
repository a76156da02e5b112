"""Two network namespaces are two machines, with addresses of their own and a cable that can be cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sfumato.launch.nodes import EVERY
from tests.engine import runs

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.97.1", "10.213.97.2")
TIMEOUT = 20  # engine.timeout, seconds: a busy machine's steps must stay below
# On node 0 its own name is a loopback address, as Debian's installer writes it.
NAMES = ("127.0.1.1 node0", f"{ADDRESSES[0]} node0")
ETC = Path("/etc/netns")
"""What `ip netns exec` lays over /etc."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces with a cable between them, and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = (f"sfumato-{os.getpid()}-0", f"sfumato-{os.getpid()}-1")
    try:
        try:
            for name, line in zip(names, NAMES, strict=True):
                ip("netns", "add", name)
                (ETC / name).mkdir(parents=True)
                (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{line}\n")
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            for process in inside(name):
                process.kill()
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(ETC / name, ignore_errors=True)
        with suppress(OSError):
            ETC.rmdir()


def inside(name: str) -> list[psutil.Process]:
    """The processes of a namespace."""
    told = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    found = []
    for number in told.split():
        with suppress(psutil.Error):
            found.append(psutil.Process(int(number)))
    return found


PROGRAM = Path(__file__).with_name("launch_program.py")


def start(name: str, *words: str) -> subprocess.Popen[str]:
    """A program in Python on a host, in a machine that knows nothing of the other but its address."""
    free = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "GLOO_SOCKET_IFNAME")
    env = {key: value for key, value in os.environ.items() if key not in free}
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Exit code and stderr of each, all within `timeout` seconds together."""
    end = time.monotonic() + timeout
    told = []
    for process in processes:
        _, error = process.communicate(timeout=max(0.1, end - time.monotonic()))
        told.append((process.returncode, error))
    return told


def steps(run: Path) -> list[int]:
    with suppress(FileNotFoundError):
        return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return []


def test_a_run_over_two_hosts_survives_a_cut_cable(hosts: tuple[str, str], tmp_path: Path) -> None:
    """Both hosts say whom they lost; started again, the run goes on."""
    runs.write_place(tmp_path, "sd")
    values = runs.settings(tmp_path, steps=100_000, checkpoint__every=1, engine__timeout=TIMEOUT)
    run = tmp_path / "runs" / "run"

    words = ["-m", "sfumato", "train", str(tmp_path / "run.toml")]
    words += ["--gpus", "1", "--nodes", "2", "--master", "node0"]
    write_toml(tmp_path / "run.toml", values)
    first = [start(name, *words, "--node-rank", str(number)) for number, name in enumerate(hosts)]
    end = time.monotonic() + 240
    while len(steps(run)) < 3:
        assert time.monotonic() < end and first[0].poll() is None, [process.poll() for process in first]
        time.sleep(0.05)
    time.sleep(5 * EVERY)  # until each host has heard of the other's steps
    ip("-n", hosts[0], "link", "set", "cable", "down")
    told = ends(first, TIMEOUT + 100)
    assert [code for code, _ in told] == [1, 1], told
    for (_, error), other, host in zip(told, (1, 0), hosts, strict=True):
        assert f"rank {other} of 2 is lost, last seen at step " in error, error
        assert f"node {other} " in error and "gave no sign of life for" in error, error
        assert "the same command on all nodes goes on" in error and "Traceback" not in error, error
        assert not inside(host)
    logs = run / "logs"
    assert "step 1/" in (logs / "rank-0.log").read_text() and (logs / "rank-1.log").exists()

    ip("-n", hosts[0], "link", "set", "cable", "up")
    last = len(steps(run)) + 2
    again = [start(name, *words, "--node-rank", str(n), f"steps={last}") for n, name in enumerate(hosts)]
    assert [code for code, _ in ends(again, 240)] == [0, 0]
    assert steps(run) == [*range(1, last + 1)]
    assert "goes on from step-" in (logs / "rank-0.log").read_text()


SSHD = Path("/usr/sbin/sshd")


@pytest.mark.skipif(
    not SSHD.exists() or shutil.which("pdsh") is None, reason="--hostfile needs sshd and pdsh, to be tried"
)
def test_a_hostfile_over_ssh(hosts: tuple[str, str], tmp_path: Path) -> None:
    """Real ssh and pdsh between the two: ranks, logs, a signal, and the exit code come through."""
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [f"AuthorizedKeysFile={tmp_path / 'user.pub'}", "StrictModes=no", "PidFile=none", "UsePAM=no"]
    words = [word for option in options for word in ("-o", option)]
    for name in hosts:
        ip("netns", "exec", name, str(SSHD), "-h", str(tmp_path / "host"), *words)
    ssh = tmp_path / "bin" / "ssh"  # in the place of a user's ~/.ssh
    ssh.parent.mkdir()
    known = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -q -i {tmp_path / "user"} {known} "$@"\n')
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("# two machines\n" + "".join(f"{each} slots=1\n" for each in ADDRESSES))

    logs = tmp_path / "logs"
    command = [
        "ip",
        "netns",
        "exec",
        hosts[0],
        sys.executable,
        str(PROGRAM),
        "hosts",
        str(tmp_path / "hosts"),
    ]
    env = os.environ | {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "saves", str(logs)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "sleeping\n", line + (process.stderr.read() if process.stderr and not line else "")
    end = time.monotonic() + 60
    while "sleeping" not in (logs / "rank-1.log").read_text():
        assert time.monotonic() < end, "rank 1 does not come to work"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "saved 15\n"), error
    assert "INFO" not in error and "stopping all ranks" in error
    assert "saved 15" in (logs / "rank-1.log").read_text()
    daemons = [process for name in hosts for process in inside(name)]
    assert all(process.name() == "sshd" for process in daemons), daemons


def write_toml(file: Path, values: dict[str, object]) -> None:
    """Nested tables of one level as TOML; JSON's values are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for table, fields in values.items():
        if isinstance(fields, dict):
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
    file.write_text("\n".join(lines) + "\n")
