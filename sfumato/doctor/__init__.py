"""`sfumato doctor`: whether this machine, these ranks and a config compute what they should.

A line for each check, with a verdict and what to do; docs/doctor.md explains each. Every check has its own
time and cannot hang the others (rounds.py); all together end within two minutes. What is tried of the engine
is tried on a toy twin of the config (twin.py), through the very `Engine` that `train` uses. This file imports
no torch: it is all that the process needs that starts the ranks.
"""

import argparse
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from sfumato import tuning
from sfumato.config import Config
from sfumato.launch.become import as_ranks

VERDICT = "SFUMATO_DOCTOR"
"""Where a rank tells the command that started it whether something is bad, in place of an exit code."""


def begin(arguments: argparse.Namespace, config: Config | None) -> int:
    """Start the ranks that the command line asks for, or be one; 1 if something is bad, else 0."""
    # Not made here: this process may become a rank, or begin anew.
    logs = Path(tempfile.gettempdir()) / f"sfumato-doctor-{uuid.uuid4().hex[:8]}"
    verdict = Path(os.environ.setdefault(VERDICT, str(logs / "verdict")))
    code = as_ranks(arguments, logs, config)
    if code is None:
        with tuning.importing(tuning.unneeded(config and config.method) if arguments.real else ()):
            from sfumato.doctor.examine import examine

        return examine(config, arguments.real_model, arguments.json)
    if code == 0:
        code = int(verdict.is_file() and verdict.read_text(encoding="utf-8") == "bad")
        shutil.rmtree(logs, ignore_errors=True)
    return code  # after another end the logs, which it has named, stay
