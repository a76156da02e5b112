"""`--hostfile FILE`: one supervisor on each machine of the file, started by DeepSpeed's launcher over ssh.

DeepSpeed starts one process a machine, which is this very command; there it starts the machine's ranks, so
logs, hangs, the first error and the exit code are as with --nodes. This process does no more than wait: it
holds a connection to node 0, over which signals go, and whose end (this process's death) stops the run.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import UserError
from sfumato.launch.asked import PATIENCE, Asked, signals
from sfumato.launch.interface import PORT, address, loopback, resolved
from sfumato.launch.line import Line

SLOTS = "SFUMATO_HOST_SLOTS"
"""In the processes that DeepSpeed starts: ranks of each machine, as JSON."""
WORD = "SFUMATO_HOST_PARENT"
"""There, too: what only this process and they know, so that nobody else is obeyed."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")
ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""For pdsh's ssh: without it the connection to a host that has lost its power may stand for hours."""
PLAIN = re.compile(r"[\w@%+=:,./-]+")
"""Words that every shell reads as they are."""
NOISE = re.compile(rb"\[[\d-]+ [\d:,]+\] \[\w+\] \[(launch|real_accelerator)\.py:|pdsh@\S+: \S+: ssh exited ")
"""What DeepSpeed's launcher and pdsh say of every start and end, which `verdict` says better."""
LEAVE = 30.0  # seconds from the second signal to the end of DeepSpeed's launcher
LOGIN = 60.0  # seconds in which ssh to a host has to answer


def read(file: Path) -> dict[str, int]:
    """Host -> number of ranks, of lines such as "worker-1 slots=8"; "#" begins a comment.

    Raises UserError for a file that DeepSpeed's launcher would not take.
    """
    asked = f"--hostfile {file}"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UserError(asked, f"it cannot be read: {why}", "name a file of lines HOST slots=N") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.:@-]+)\s+slots=([1-9]\d*)(\s.*)?", text)
        if match is None:
            raise UserError(asked, f"line {number}: {text!r}", "write HOST slots=N, N at least 1")
        if match[1] in found:
            raise UserError(asked, f"line {number}: {match[1]} for the second time", "name each host once")
        found[match[1]] = int(match[2])
    if not found:
        raise UserError(asked, "it names no host", "write lines HOST slots=N")
    return found


def run(file: Path, command: Sequence[str], master: str | None) -> int:
    """Start `command` on every host of the file and wait until all have ended; the ranks' exit code.

    `command` may hold --hostfile and --master: there SLOTS goes first.
    """
    slots = read(file)
    check(file, slots)
    host, port = reached(file, next(iter(slots)), master)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(file), "--force_multi"]
    runner += ["--num_gpus", "1", "--master_addr", host, "--master_port", str(port), "--quiet"]
    runner += ["--launcher_args", "-N -t 20", "--no_python", "--no_local_rank", "--no_ssh_check"]
    inner = ["env", *without_its_own(), f"{SLOTS}={json.dumps([*slots.values()], separators=(',', ':'))}"]
    word = secrets.token_hex(16)
    inner += [f"{WORD}={word}", *(quoted(each) for each in command)]
    env = {**os.environ, "PDSH_SSH_ARGS_APPEND": f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {ALIVE}"}
    with signals() as asked:
        process = subprocess.Popen(
            [*runner, *inner],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        copies = [
            threading.Thread(target=copy, args=(theirs, ours.buffer), daemon=True)
            for theirs, ours in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for each in copies:
            each.start()
        try:
            code = wait(process, asked, (host, port), word)
            for each in copies:
                each.join(5)
            return code
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def copy(theirs: Any, ours: Any) -> None:
    """Hand on all lines but the noise."""
    for line in theirs:
        if not NOISE.match(line):
            with contextlib.suppress(OSError, ValueError):
                ours.write(line)
                ours.flush()


def check(file: Path, slots: Mapping[str, int]) -> None:
    """Raise UserError where a program is missing, or a host does not let us in."""
    asked = f"--hostfile {file}"
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            do = f"install {program}, or start each machine with --nodes, --node-rank and --master"
            raise UserError(asked, f"there is no {program} here", do)
    for what, path in (("the folder", os.getcwd()), ("the interpreter", sys.executable)):
        if not PLAIN.fullmatch(path):
            found = f"{what} {path!r}, which DeepSpeed's launcher does not hand on whole"
            do = "have it at a path of letters and digits, or start each machine with --nodes"
            raise UserError(asked, found, do)
    end = time.monotonic() + LOGIN
    tries = {
        host: subprocess.Popen(
            [*SSH, host, "test", "-x", sys.executable, "-a", "-d", os.getcwd()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in slots
    }
    for host, each in tries.items():
        try:
            _, error = each.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.kill()
            error = f"no answer within {LOGIN:g} s"
        if each.returncode == 1 and not error.strip():
            found = f"{host} lacks {sys.executable} or the folder {os.getcwd()}"
            raise UserError(asked, found, "have both at the same place on all hosts, as on a shared disk")
        if each.returncode:
            last = (error.strip().splitlines() or [f"exit code {each.returncode}"])[-1]
            do = f"see that `ssh {host} true` works without a password"
            raise UserError(asked, f"{host} does not let us in: {last}", do)


def reached(file: Path, first: str, master: str | None) -> tuple[str, int]:
    """The address and port of the first host, for all others."""
    if master is not None:
        return address(master)
    name = first.rpartition("@")[2]
    # A name may be known to ssh alone.
    told = subprocess.run(["ssh", "-G", first], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    match = re.search(r"^hostname (\S+)$", told.stdout, re.M)
    name = match[1] if match else name
    addresses = [each for each in resolved(name, PORT) if not loopback(each)]
    if not addresses:
        found = f"its first host, {first}, has no address that other machines reach"
        raise UserError(f"--hostfile {file}", found, "name it by such a one, or add --master HOST[:PORT]")
    return addresses[0], PORT


def without_its_own() -> list[str]:
    """For `env`: what DeepSpeed's launcher sets for a process that uses one device, and ours uses all."""
    names = ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"]
    names += ["ASCEND_RT_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES", "MLU_VISIBLE_DEVICES"]
    return [word for name in names for word in ("-u", name)]


def quoted(word: str) -> str:
    """A word as the remote shell reads it; DeepSpeed puts double quotes around one with a space."""
    if PLAIN.fullmatch(word):
        return word
    escaped = re.sub(r"([\\$`])", r"\\\1", word)
    # With a space DeepSpeed itself escapes the quotes and puts some around.
    return escaped if " " in word else '"' + escaped.replace('"', '\\"') + '"'


def wait(process: subprocess.Popen[bytes], asked: Asked, node_0: tuple[str, int], word: str) -> int:
    """Wait for DeepSpeed's launcher, and pass on the signals that come; the exit code.

    node_0: where its supervisor listens. word: what it knows us by.
    """
    line: Line | None = None
    sent, due, kill_at = 0, 0.0, float("inf")
    while process.poll() is None:
        now = time.monotonic()
        if line is None and now >= due:
            due = now + 1
            with contextlib.suppress(OSError):
                line = Line(socket.create_connection(node_0, timeout=2))
                line.send(parent=word)
        elif line is not None:
            line.take()
            if line.closed:
                line.close()
                line = None
        if line is not None:
            for number in asked.noted[sent:]:
                sent += 1
                line.send(signal=int(number))
        if asked.again or (asked.first and line is None):
            kill_at = min(kill_at, now + LEAVE)
        elif asked.first:
            kill_at = min(kill_at, now + PATIENCE + LEAVE)
        if now > kill_at:
            process.terminate()  # DeepSpeed's launcher ends what it has started on all hosts
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE)
            return 128 + (asked.again or asked.first or signal.SIGTERM)
        time.sleep(0.1)
    if line is not None:
        line.close()
    code = process.returncode
    return 128 - code if code < 0 else code
