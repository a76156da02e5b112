"""What the log costs: the same steps with every metric told at each of them, and with none.

    python -m sfumato.bench.telling [--small]

One engine trains a U-Net on made-up latents; a step that is tallied and told, with its line of metrics.jsonl
and its console line, and a step that is not, come in turn, so that a busy machine slows them alike. Prints
one line of JSON, medians in seconds of the processor: of both, and of the telling alone, with their ratios.
"""

import argparse
import io
import json
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from sfumato.bench.saving import WIDTHS, unet
from sfumato.config import Config, parse
from sfumato.config import Objective as Settings
from sfumato.data.batch import Draws
from sfumato.engine import ranks
from sfumato.engine.engine import Engine
from sfumato.engine.weights import WeightFiles
from sfumato.objective import Objective
from sfumato.report import tally
from sfumato.report.starts import Starts
from sfumato.report.telling import Telling

STEPS = 30
"""Of each kind, after two that are not counted."""
BATCH = 4


def config(folder: Path) -> Config:
    """A run whose data are never read."""
    return parse(
        {
            "steps": 1_000_000,
            "output": str(folder),
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "model": {"weights": "none"},
            "data": {"source": "none"},
            "engine": {"precision": "fp32"},
            "ema": {"enabled": True},
            "log": {"report_seconds": 1e9},
        }
    )


def step(engine: Engine, objective: Objective, told: Telling | None) -> float:
    """One optimizer step; told: who hears of it. Gives the seconds that this took by itself."""
    draw = torch.Generator().manual_seed(engine.position)
    latents, noise = (torch.randn(BATCH, 4, 32, 32, generator=draw) for _ in range(2))
    draws = Draws(noise, noise, torch.rand(BATCH, generator=draw), torch.zeros(BATCH, 4, 1, 1), None)
    text = torch.randn(BATCH, 7, 64, generator=draw)
    losses = objective.losses(lambda x, t: engine(x, t, text).sample, latents, draws)
    began = time.process_time()
    sums = None if told is None else tally.sums(objective, losses, latents, draws)
    spent = time.process_time() - began
    engine.backward(losses, sums)
    engine.step()
    if told is None:
        engine._applied.clear()
        return 0.0
    began = time.process_time()
    told.seen[engine.step_count] = (256, 256), []
    told.step({})
    return spent + time.process_time() - began


def measured(folder: Path, small: bool) -> dict[str, Any]:
    """The seconds of both kinds of steps."""
    widths = (32, 64) if small else WIDTHS["quick"]
    file, asked = folder / "start.safetensors", config(folder)
    asked.folder.mkdir()
    save_file({name: p.detach().contiguous() for name, p in unet(widths).named_parameters()}, file)
    engine = Engine(asked, ranks.start(600), lambda: unet(widths), WeightFiles({"": [file]}))
    objective = Objective(Settings(), {})
    spent: dict[bool, list[float]] = {False: [], True: []}
    alone: list[float] = []
    with (
        redirect_stdout(io.StringIO()),
        Telling(asked, engine, Starts(asked.folder, time.time()), [], 8) as told,
    ):
        for number in range(2 * (STEPS + 2)):
            kind = bool(number % 2)
            began = time.process_time()
            own = step(engine, objective, told if kind else None)
            spent[kind].append(time.process_time() - began)
            alone += [own] if kind else []
    none, all_told = (median(seconds[2:]) for seconds in (spent[False], spent[True]))
    return {
        "parameters": sum(parameter.numel() for parameter in engine.parameters()),
        "steps": STEPS,
        "seconds": none,
        "seconds_told": all_told,
        "ratio": all_told / none,
        "telling": median(alone[2:]),
        "share": median(alone[2:]) / none,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a smaller network, for a test")
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measured(Path(place), parser.parse_args().small)))
