"""`sfumato slurm`: a complete sbatch script for a run, for a sweep, or for another command of ours.

    print(script(wanted(arguments)), end="")

Everything is checked before a line is printed. docs/slurm.md explains the script line by line.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sfumato import config
from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.slurm import asks
from sfumato.slurm.script import Job, Start, script
from sfumato.slurm.shell import CONTROL
from sfumato.slurm.sweep import beside, runs

__all__ = ["Job", "Start", "script", "wanted"]

OTHERS = ("cache", "sample")
"""Commands besides `train` that ranks share."""
CPUS, BESIDE = 4, 2
"""Cores of a rank that trains nothing, and of one that does beside those of its data workers."""


def wanted(arguments: argparse.Namespace) -> Job:
    """The job that a command line asks for. Raises UserError for what Slurm or the command would refuse."""
    check_setup(arguments.setup)
    if arguments.max_running and not arguments.sweep:
        raise UserError(f"--max-running {arguments.max_running}", "no --sweep", "name what to sweep over")
    return another(arguments) if arguments.other is not None else training(arguments)


def training(arguments: argparse.Namespace) -> Job:
    """The job of a run, or of the runs of a sweep."""
    if arguments.config is None:
        raise UserError("sfumato slurm", "no config", "name one, or another command behind --")
    source, overrides = arguments.config, arguments.overrides
    found = runs(source, overrides, arguments.sweep, arguments.nodes * arguments.gpus)
    cpus = arguments.cpus_per_gpu or max(run.config.data.workers for run in found) + BESIDE
    starts = [Start(folder_of(run.config), run.settings) for run in found]
    name = config.load(source, overrides).name
    return job(arguments, ("train", source, *beside(overrides, arguments.sweep)), name, cpus, starts)


def another(arguments: argparse.Namespace) -> Job:
    """The job of a command that is no run."""
    other = arguments.other
    if other.verb not in OTHERS:
        do = f"behind -- may stand {' or '.join(OTHERS)}; for a run, sfumato slurm CONFIG"
        raise UserError(f"sfumato slurm -- {other.verb}", "no command that ranks share", do)
    if arguments.config is not None or arguments.sweep:
        what = arguments.config or f"--sweep {arguments.sweep[0]}"
        raise UserError(f"sfumato slurm {what} and -- {other.verb}", "two jobs", "print two scripts")
    for option in ("gpus", "nodes", "hostfile"):
        if (said := getattr(other, option, None)) is not None:
            raise UserError(f"--{option} {said} behind --", "Slurm gives the machines", "say it before --")
    if other.verb == "sample":
        folder, name = plain(other.out), "sample"
    elif other.config is None:
        raise UserError("sfumato slurm -- cache", "no config", "name the one whose data are encoded")
    else:
        settings = config.load(other.config, other.overrides)
        folder, name = folder_of(settings), f"{settings.name}-cache"
    return job(arguments, arguments.other_words, name, arguments.cpus_per_gpu or CPUS, [Start(folder)])


def job(
    arguments: argparse.Namespace, command: Sequence[str], name: str, cpus: int, starts: Sequence[Start]
) -> Job:
    """What the script does. command: sfumato's words. cpus: of each rank."""
    said = list(arguments.command)
    return Job(
        said=("sfumato", *said[said.index("slurm") :]),
        lines=tuple(asks.lines(arguments, name, cpus, len(starts) if arguments.sweep else 0)),
        command=command,
        starts=starts,
        python=arguments.python or sys.executable,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        cpus=cpus,
        setup=arguments.setup or "",
        array=bool(arguments.sweep),
        own_log=arguments.output is None,
        resumes=arguments.other is None,
        restarts=arguments.restarts,
        fruitless=arguments.fruitless,
    )


def folder_of(settings: Config) -> str:
    """A run's folder, as the script names it."""
    return plain(settings.folder)


def plain(folder: Path) -> str:
    """A path that no command takes for an option."""
    return os.path.join(".", folder) if str(folder).startswith("-") else str(folder)


def check_setup(text: str | None) -> None:
    """Raise UserError for lines of bash that bash would not read."""
    if text is None:
        return
    if CONTROL.search(text.replace("\n", "").replace("\t", "")):
        raise UserError(f"--setup {text!r}", "it has characters that no line of bash has", "write it anew")
    if (bash := shutil.which("bash")) is not None:
        told = subprocess.run([bash, "-n"], input=text, text=True, capture_output=True)
        if told.returncode or told.stderr:
            last = told.stderr.strip().splitlines()[-1:] or ["it does not read them"]
            raise UserError(f"--setup {text}", f"bash says: {last[0]}", "mend it")
