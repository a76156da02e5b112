"""The scripts of `sfumato slurm` under Slurm itself: its own daemons, two nodes of this machine, real runs.

Skipped where Slurm is not installed or its daemons do not start; Debian: apt-get install slurm-wlm.
"""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.engine.runs import metrics, write_place

ROOT = Path(__file__).parents[2]
PATIENCE = 400  # seconds; a busy machine with two cores imports torch in a minute
STEPS = 6
CONF = """
ClusterName=toy
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=30
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 CoresPerSocket=8 Gres=gpu:4
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 CoresPerSocket=8 Gres=gpu:4
PartitionName=toy Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# No GPU is opened: device files that every machine has stand for each node's four.
GRES = "NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/tty\n"
RUN = f"""
name = "run"
steps = {STEPS}
batch_size = 8
[model]
weights = "sd"
[data]
source = "pictures"
resolution = 64
workers = 0
[optimizer]
lr = 1e-3
[engine]
precision = "fp32"
timeout = 120
"""


class Slurm:
    """A controller and two nodes in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "RANK"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.env["PATH"] += ":/usr/sbin:/usr/local/sbin"

    def begin(self) -> None:
        """Start the daemons. Raises OSError where they do not come up."""
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        conf = CONF.format(folder=self.folder, ports=ports, user=getpass.getuser())
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(GRES)
        self.say("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.say("slurmd", "-N", node)
        end = time.monotonic() + 30
        while self.say("sinfo", "-h", "-N", "-o", "%t").split() != ["idle", "idle"]:
            if time.monotonic() > end:
                raise OSError((self.folder / "controller.log").read_text()[-2000:])
            time.sleep(0.3)

    def end(self) -> None:
        """Stop every job and every daemon of this folder."""
        self.say("scancel", "--user", getpass.getuser(), check=False)
        end = time.monotonic() + 40
        while self.say("squeue", "-h", check=False) and time.monotonic() < end:
            time.sleep(0.5)
        for file in self.folder.glob("*.pid"):
            try:
                daemon = psutil.Process(int(file.read_text()))
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(20)
            except (psutil.Error, ValueError):
                continue

    def say(self, *words: str, text: str | None = None, check: bool = True) -> str:
        """What a command of Slurm answers."""
        done = subprocess.run(
            words, env=self.env, input=text, text=True, capture_output=True, timeout=60, cwd=self.folder
        )
        if check and done.returncode:
            raise OSError(f"{words}: {done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        told = self.say("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in told.split())

    def wait(self, number: str, what: Callable[[], bool]) -> None:
        """Until it is so."""
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, f"{self.job(number)}\n{self.logs()}"
            time.sleep(0.3)

    def ended(self, number: str) -> str:
        """Its exit code, once it has ended for good; a wait in the queue is cut short."""

        since: list[float] = []

        def over() -> bool:
            now = self.job(number)
            # In the second in which it revoked the first start's credential Slurm revokes the next one's too.
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                since.append(time.monotonic())
                if not self.steps(now["JobId"]) and since[-1] - since[0] > 5:
                    self.say("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            return now["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        self.wait(number, over)
        return self.job(number)["ExitCode"].partition(":")[0]

    def steps(self, job: str) -> list[psutil.Process]:
        """The daemons of Slurm that hold what a job has started."""
        title = f"slurmstepd: [{job}."
        every = psutil.process_iter(["cmdline"])
        return [each for each in every if " ".join(each.info["cmdline"] or ()).startswith(title)]

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.rglob("slurm-*.*")))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Slurm(folder)
    for tool in ("sbatch", "slurmctld", "slurmd"):
        if shutil.which(tool, path=cluster.env["PATH"]) is None:
            pytest.skip(f"there is no {tool}: Slurm is not installed")
    try:
        try:
            cluster.begin()
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"Slurm's daemons do not start here: {error}")
        write_place(folder, "sd")
        yield cluster
    finally:
        cluster.end()


def submit(slurm: Slurm, *arguments: str) -> str:
    """The job's number, after `sfumato slurm ... | sbatch`."""
    printed = subprocess.run(
        [sys.executable, "-m", "sfumato", "slurm", *arguments],
        cwd=slurm.folder,
        env=slurm.env,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    return slurm.say("sbatch", "--parsable", text=printed).strip()


def lines_in(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.timeout(900)
def test_runs_under_slurm(slurm: Slurm) -> None:
    """An array on two nodes: one run is warned, put back by itself, and goes on; the other cannot be."""
    folder = slurm.folder
    (folder / "run.toml").write_text(RUN)
    run = folder / "runs" / "run-seed-0"
    run.parent.mkdir()
    (folder / "runs" / "run-seed-1").write_text("in the place of its folder")
    words = ("--nodes", "2", "--cpus-per-gpu", "1", "--time", "60", "--sweep", "seed=0,1")
    array = submit(slurm, "run.toml", "data.workers=1", *words)
    slurm.wait(array, lambda: lines_in(run / "metrics.jsonl") >= 2)
    warned = slurm.job(f"{array}_0")["JobId"]
    # What slurmctld sends --grace seconds before the limit, and to whom: all processes of the step.
    slurm.say("scancel", "--signal=USR1", warned)
    slurm.wait(warned, lambda: slurm.job(warned).get("Restarts") == "1")
    assert slurm.ended(f"{array}_1") == "1" and slurm.job(f"{array}_1")["Restarts"] == "0", slurm.logs()
    assert slurm.ended(warned) == "0", f"{slurm.job(warned)}\n{slurm.logs()}"

    log = (run / "logs" / f"slurm-{array}_0.log").read_text()
    assert "exit code 75" in log and "put back into the queue" in log and "exit code 0" in log
    resumed = re.search(r"goes on from step-0*(\d+)", log)
    assert resumed and 2 <= int(resumed[1]) < STEPS, log
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert [line["step"] for line in metrics(run)] == [*range(1, STEPS + 1)]


def test_sbatch_takes_a_line_apart_as_it_was_meant(slurm: Slurm) -> None:
    name = "a \"b' c\\d #e $x `y`"
    (slurm.folder / "run.toml").write_text(RUN)
    cpus = ("--gres", "none", "--job-name", name, "--sbatch", "hold", "--sbatch", "comment=größe &|;")
    number = submit(slurm, "run.toml", *cpus, "--time", "1-2", "--mem", "1G", "--gpus", "2")
    asked = slurm.say("scontrol", "show", "job", number)
    slurm.say("scancel", number)
    assert f"JobName={name}\n" in asked and "Comment=größe &|;" in asked and "gpu" not in asked
    assert "TimeLimit=1-02:00:00" in asked and "CPUs/Task=4" in asked and "Requeue=1" in asked
