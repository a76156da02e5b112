"""`sfumato bench`: which measurement, and by which processes."""

import argparse
import os
import tempfile
from pathlib import Path

from sfumato import launch, place, tuning
from sfumato.launch.become import as_ranks

RANKS = 2
"""How many are started where --gpus does not say."""


def bench(arguments: argparse.Namespace) -> int:
    """Measure what is asked for; the exit code, 1 where a bound or a promise is broken."""
    if arguments.what == "checkpoints":
        started = launch.supervised() or place.find(os.environ) is not None
        if not started and arguments.hostfile is None:
            arguments.gpus = arguments.gpus or RANKS
        with tempfile.TemporaryDirectory(prefix="sfumato-") as logs:
            code = as_ranks(arguments, Path(logs))
        if code is None:
            with tuning.importing():
                from sfumato.bench import saving

            saving.run(arguments.json, arguments.quick)
        return code or 0
    if arguments.what == "faults":
        from sfumato.bench import faults

        return int(not faults.good(faults.run(arguments.kills, arguments.gpus or RANKS, arguments.json)))
    if arguments.what == "peers":
        from sfumato.bench import peers

        which = arguments.task, arguments.family, arguments.seed_recipe, arguments.compiled
        peers.run(arguments.model, arguments.diffusers_examples, arguments.rounds, arguments.json, *which)
        return 0
    if arguments.real:
        tuning.restart()
    if arguments.what == "scaling":
        os.environ["DS_ACCELERATOR"] = "cpu"  # its ranks are gloo's, also beside a GPU
        with tuning.importing():
            from sfumato.bench import scaling

        scaling.run(arguments.model, arguments.rounds, arguments.json)
        return 0
    if arguments.what == "gates":
        with tuning.importing():
            from sfumato.bench import gates

        return int(gates.are_broken(gates.run(arguments.presets, arguments.json)))
    if arguments.what == "gpu":
        with tuning.importing():
            from sfumato.bench import gpu

        gpu.run(arguments.toy, arguments.json)
        return 0
    from sfumato.bench import data as measure

    measure.run(arguments.json, arguments.quick)
    return 0
