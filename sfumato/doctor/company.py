"""Who the ranks are, and whether they are the same: hosts, devices, versions, code, config, data, clocks."""

import hashlib
import os
import platform
import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

import sfumato
from sfumato.config import Config
from sfumato.data.sources import open_source
from sfumato.device import accelerator
from sfumato.doctor import versions
from sfumato.doctor.disks import nearest
from sfumato.doctor.lines import Line, bad, good, judged, unseen, warning
from sfumato.doctor.rounds import Answer, Rounds, named, trouble
from sfumato.engine.agreement import odd

APART = 1.0
"""Seconds between two hosts' clocks from which on their logs and locks no longer go together."""
TIMES = 5  # meetings whose median is taken
KINDS = {
    "versions": ("versions", "install the same versions on all machines: pip install -c constraints.txt"),
    "code": ("Sfumato's own files", "install the same Sfumato on all machines"),
    "config": ("the config", "start all ranks with the same config and overrides"),
    "python": ("python", "use one Python on all machines"),
}
"""What must be the same on all ranks: how it is called, and what to do where it is not."""


def facts(config: Config | None) -> dict[str, Any]:
    """What this rank tells of itself."""
    seam = accelerator()
    cpu = seam.device_name() == "cpu"
    total = psutil.virtual_memory().total if cpu else seam.total_memory()
    return {
        "host": socket.gethostname(),
        "device": seam.current_device_name() if not cpu else "cpu",
        "memory": int(total or 0),
        "versions": versions.found(),
        "python": platform.python_version(),
        "code": code(),
        "edited": code() != LOADED,
        "config": hashed(config.model_dump_json().encode()) if config else "",
        "shown": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SHOWN)},
    }


SHOWN = ("NCCL_", "HCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_VISIBLE", "ASCEND_", "OMP_NUM")
"""Beginnings of the environment variables that --json has of each rank."""


def code() -> str:
    """A hash of all files of this package."""
    folder = Path(sfumato.__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".json"))
    return hashed(*(f"{path.relative_to(folder)}\n".encode() + path.read_bytes() for path in files))


def hashed(*parts: bytes) -> str:
    """A short hash of bytes."""
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


LOADED = code()
"""The files as they were when this process began, which is what it computes with."""


def look(rounds: Rounds, config: Config | None) -> list[Line]:
    """Where the ranks are, and whether they see the same."""
    answers = rounds.ask(lambda: facts(config), 20)
    if not rounds.first:
        return []
    told = {answer.rank: answer.said for answer in answers if answer.said}
    return trouble("ranks", answers) + [*present(told), *alike(told, config)]


def present(told: dict[int, Any]) -> list[Line]:
    """Who is where."""
    hosts = Counter(fact["host"] for fact in told.values())
    memory = {rank: fact["memory"] for rank, fact in told.items()}
    least, most = min(memory.values()), max(memory.values())
    size = f"{least / 1e9:,.0f}" + (f" to {most / 1e9:,.0f}" if most > 1.02 * least else "") + " GB"
    kinds = Counter(fact["device"].split(":")[0] for fact in told.values())
    device = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    places = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    text = f"{len(told)}: {places}; {device}, {size} each" + (", shared" if "cpu" in kinds else "")
    shared = taken_twice(told)
    if shared:
        return [
            bad("ranks", f"{text}; {shared}", "give each rank a device of its own: fewer ranks a machine")
        ]
    if len(kinds) > 1:
        return [bad("ranks", text, "let all ranks compute on the same kind of device")]
    fine = len(set(hosts.values())) == 1
    do = "start equally many ranks on each machine"
    return [judged(fine, "ranks", text, do, ranks={rank: fact for rank, fact in told.items()})]


def taken_twice(told: dict[int, Any]) -> str:
    """Ranks of one host that compute on one device, unless that is the CPU or each sees its own only."""
    seen: dict[tuple[str, str], list[int]] = {}
    for rank, fact in told.items():
        if fact["device"] != "cpu":
            visible = next((fact["shown"][name] for name in VISIBLE if name in fact["shown"]), "")
            seen.setdefault((fact["host"], f"{fact['device']} of {visible or 'all'}"), []).append(rank)
    several = [f"{named(ranks)} share {device}" for (_, device), ranks in seen.items() if len(ranks) > 1]
    return "; ".join(several)


VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


def alike(told: dict[int, Any], config: Config | None) -> list[Line]:
    """Whether all see the same; the odd ones are named."""
    if len(told) == 1:
        return [unseen("same on all", "there is one rank")]
    found = []
    for kind, (called, do) in KINDS.items():
        values = [hashed(str(told[rank][kind]).encode()) for rank in sorted(told)]
        if len(set(values)) > 1:
            numbers = [int(value, 16) for value in values]
            text = f"{called} differ: {odd(numbers).replace('bits', 'ones').replace('hold', 'have')}"
            found.append(bad("same on all", text + differing(told, kind), do))
    edited = [rank for rank in sorted(told) if told[rank].get("edited")]
    if edited:
        text = f"Sfumato's own files were changed while {named(edited)} ran: a rank may have read both kinds"
        found.append(bad("same on all", text, "start the doctor again, and do not edit what runs"))
    what = ["versions", "Sfumato's files"] + (["config"] if config else [])
    return found or [good("same on all", f"{', '.join(what)}: the same on {named(sorted(told))}")]


def differing(told: dict[int, Any], kind: str) -> str:
    """Which versions differ, and how."""
    if kind != "versions":
        return ""
    packages = sorted({name for fact in told.values() for name in fact["versions"]})
    rows = {name: {fact["versions"].get(name, "none") for fact in told.values()} for name in packages}
    return " (" + "; ".join(f"{n}: {', '.join(sorted(v))}" for n, v in rows.items() if len(v) > 1) + ")"


def data(rounds: Rounds, config: Config | None) -> list[Line]:
    """Whether all ranks see the same data, by names, sizes and times."""
    if config is None:
        return [unseen("data", "no config was named")] if rounds.first else []
    answers = rounds.ask(lambda: [open_source(layout).stamp() for layout in config.data.layouts], 20)
    if not rounds.first:
        return []
    names = ", ".join(layout.source for layout in config.data.layouts)
    stamps = {answer.rank: str(answer.said) for answer in answers if answer.said}
    if wrong := trouble("data", answers):
        return wrong
    if len(set(stamps.values())) == 1:
        seen = f", alike on all {len(stamps)} ranks by names, sizes and times" if len(stamps) > 1 else ""
        return [good("data", f"{names}: can be read{seen}")]
    value, _ = Counter(stamps.values()).most_common(1)[0]
    others = [rank for rank, stamp in stamps.items() if stamp != value]
    do = "let all machines read one folder, or copy it with its times (rsync -a)"
    return [warning("data", f"{names}: other names, sizes or times on {named(others)}", do)]


def clocks(rounds: Rounds) -> list[Line]:
    """How far the ranks' clocks are apart, as seen where they meet."""
    if rounds.place.world == 1 or rounds.apart:
        why = rounds.apart or "there is one rank"
        return [unseen("clocks", why)] if rounds.first else []
    answers = rounds.ask(meetings, 10, together=True)
    if not rounds.first:
        return []
    return trouble("clocks", answers) or [told_clocks(answers)]


def meetings() -> list[float]:
    """This rank's clock right after each of some meetings of all."""
    times = []
    for _ in range(TIMES):
        dist.barrier()
        times.append(time.time())
    return times


def told_clocks(answers: Sequence[Answer]) -> Line:
    """What the clocks say."""
    first = answers[0].said
    offsets = {
        answer.rank: statistics.median(a - b for a, b in zip(answer.said, first, strict=True))
        for answer in answers
    }
    worst = max(offsets, key=lambda rank: abs(offsets[rank]))
    text = f"at most {abs(offsets[worst]) * 1e3:.1f} ms apart"
    if abs(offsets[worst]) > APART:
        text = f"that of rank {worst} is {offsets[worst]:+.1f} s off rank 0's"
    fine = abs(offsets[worst]) <= APART
    return judged(fine, "clocks", text, "set the machines' clocks by NTP (chrony)", seconds=offsets)


def shared(rounds: Rounds, config: Config | None) -> list[Line]:
    """Whether all ranks see what the first one writes, where checkpoints and indexes will lie."""
    name = "one folder"
    if config is None or rounds.place.world == 1:
        why = "no config was named" if config is None else "there is one rank"
        return [unseen(name, why)] if rounds.first else []
    # The same name on all ranks, and another one for every other group of ranks.
    said = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(rounds.run))
    token = hashed(*(word.encode() for word in said))
    files = {
        "output": nearest(config.folder) / f".sfumato-doctor-{token}",
        "data.store": nearest(config.data.store) / f".sfumato-doctor-{token}",
    }
    here = rounds.first

    def write() -> None:
        for file in files.values() if here else ():
            file.touch()

    def remove() -> None:
        for file in files.values() if here else ():
            file.unlink(missing_ok=True)

    written = rounds.ask(write, 10)
    seen = rounds.ask(lambda: [what for what, file in files.items() if not appears(file)], 10)
    rounds.ask(remove, 10)
    if not here:
        return []
    blind = {what: [answer.rank for answer in seen if what in (answer.said or ())] for what in files}
    found = [f"{what} on {named(ranks)}" for what, ranks in blind.items() if ranks]
    if wrong := trouble(name, written) + trouble(name, seen):
        return wrong
    if found:
        do = "let `output` and data.store be folders that all machines share (NFS, Lustre)"
        return [bad(name, f"what rank 0 writes is not seen: {'; '.join(found)}", do)]
    return [good(name, "all ranks see what rank 0 writes to `output` and data.store")]


def appears(file: Path) -> bool:
    """Whether a file is there, or comes within a few seconds: network disks look again now and then."""
    end = time.monotonic() + 4
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return file.exists()
