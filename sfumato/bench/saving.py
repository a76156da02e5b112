"""`sfumato bench checkpoints`: what saving, going on and stopping take, beside DeepSpeed's own checkpoints.

The dict that `run` gives, and writes as JSON, format 1; seconds are lists, one number for each round:

    format, ranks, stage, parameters, bytes {"ours", "deepspeed"}, machine
    step         of a training step, while nothing is written
    pause        that the training stands still: {"ours", "deepspeed"}
    published    from the call until the checkpoint can be loaded: {"ours", "deepspeed"}
    beside       of a training step while ours is written behind it
    load         back into the engine: {"ours", "deepspeed"}; ours takes the sum of every file first
    stop         from SIGTERM to the end of `sfumato train` on a toy model, which saves
"""

import json
import shutil
import signal
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from sfumato.bench import fire
from sfumato.bench.faults import last_step
from sfumato.bench.machine import machine
from sfumato.config import Config, parse
from sfumato.engine import checkpoint, ranks
from sfumato.engine.engine import Engine
from sfumato.engine.ranks import Ranks
from sfumato.engine.weights import WeightFiles
from sfumato.errors import UserError

LIMIT = 600.0  # seconds that any wait may take
WIDTHS = {"quick": (64, 128), "full": (160, 320, 640)}
"""Channels of the U-Net that is trained."""
STEPS = 3  # timed before each round
STOPS = 3


def run(out: Path | None, quick: bool) -> dict[str, Any] | None:
    """Measure on all ranks together, show it on the first, and write it to `out` as JSON.

    Raises UserError if the folder of `out` is not there.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}", f"no folder {out.parent}", "make it, or name another file")
    place = ranks.start(LIMIT)
    folder: list[Any] = [tempfile.mkdtemp(prefix="sfumato-bench-") if place.first else None]
    dist.broadcast_object_list(folder)
    try:
        found = measured(place, Path(folder[0]), quick)
    finally:
        place.barrier()
        if place.first:
            shutil.rmtree(folder[0], ignore_errors=True)
    if not place.first:
        return None
    console = Console()
    console.print(table(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def settings(folder: Path) -> Config:
    """A run whose data are never read."""
    return parse(
        {
            "steps": 1_000_000,
            "output": str(folder / "runs"),
            "batch_size": 8,
            "micro_batch_size": 1,
            "model": {"weights": str(folder)},
            "data": {"source": str(folder), "resolution": 64},
            "engine": {"precision": "fp32", "zero_stage": 1, "timeout": LIMIT},
            "checkpoint": {"export": False, "keep": 1},
        }
    )


def unet(widths: tuple[int, ...]) -> nn.Module:
    """Stable Diffusion's U-Net, narrower."""
    from diffusers import UNet2DConditionModel

    net: nn.Module = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=widths,
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
    )
    return net


def measured(place: Ranks, folder: Path, quick: bool) -> dict[str, Any]:
    """All figures; the same on every rank but for the seconds, which are the first one's."""
    widths, rounds = (WIDTHS["quick"], 2) if quick else (WIDTHS["full"], 5)
    start = folder / "start.safetensors"
    if place.first:
        save_file({name: p.detach().contiguous() for name, p in unet(widths).named_parameters()}, start)
    place.barrier()
    engine = Engine(settings(folder), place, lambda: unet(widths), WeightFiles({"": [start]}))
    found: dict[str, Any] = {
        "format": 1,
        "ranks": place.world,
        "stage": 1,
        "parameters": sum(parameter.numel() for parameter in engine.parameters()),
        "bytes": {},
        "machine": machine(),
        "step": [],
        "beside": [],
        **{key: {"ours": [], "deepspeed": []} for key in ("pause", "published", "load")},
    }
    steps(engine, 1)
    for _ in range(rounds):
        found["step"] += steps(engine, STEPS)
        ours(engine, folder, found)
        deepspeeds(engine, folder, found)
    if place.first:
        found["stop"] = stops(folder / "stopped", place.world)
    place.barrier()
    return found


def steps(engine: Engine, count: int) -> list[float]:
    """Seconds of some training steps on made-up numbers."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        for _ in range(engine.accumulation):
            draw = torch.Generator().manual_seed(engine.position)
            x, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 7, 64, generator=draw)
            where = engine.ranks.device
            said = engine(x.to(where), torch.tensor([500.0], device=where), text.to(where)).sample
            engine.backward((said - x.to(where)).square().mean((1, 2, 3)))
            engine.step()
        taken.append(time.perf_counter() - began)
    return taken


def ours(engine: Engine, folder: Path, found: dict[str, Any]) -> None:
    """A save behind the training, and a load."""
    told: list[float] = []
    facts = {"config": {}, "data": "", "records": 0, "family": ""}
    with checkpoint.Writer(engine, facts, lambda text: told.append(time.perf_counter())) as writer:
        path = checkpoint.path_of(writer.folder, engine.step_count)
        engine.ranks.barrier()
        began = time.perf_counter()
        writer.save()
        found["pause"]["ours"].append(time.perf_counter() - began)
        # All ranks take the same number of steps, until the first one has heard.
        while not engine.ranks.any(bool(told)):
            found["beside"] += steps(engine, 1)
    found["published"]["ours"] += [heard - began for heard in told]
    found["bytes"]["ours"] = weight_of(path)
    engine.ranks.barrier()
    began = time.perf_counter()
    saved = checkpoint.Saved(path)
    assert not engine.ranks.any(bool(saved.problems(engine.ranks.rank, engine.ranks.world))), "it is damaged"
    checkpoint.load(engine, saved)
    engine.ranks.barrier()
    found["load"]["ours"].append(time.perf_counter() - began)


def deepspeeds(engine: Engine, folder: Path, found: dict[str, Any]) -> None:
    """The same with DeepSpeed's save_checkpoint and load_checkpoint."""
    place = folder / "deepspeed"
    engine.ranks.barrier()
    began = time.perf_counter()
    engine.deepspeed.save_checkpoint(str(place), tag="saved")
    engine.ranks.barrier()
    for key in ("pause", "published"):
        found[key]["deepspeed"].append(time.perf_counter() - began)
    found["bytes"]["deepspeed"] = weight_of(place)
    began = time.perf_counter()
    engine.deepspeed.load_checkpoint(str(place), tag="saved")
    engine.ranks.barrier()
    found["load"]["deepspeed"].append(time.perf_counter() - began)
    if engine.ranks.first:
        shutil.rmtree(place)
    engine.ranks.barrier()


def weight_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def stops(place: Path, world: int) -> list[float]:
    """Seconds from SIGTERM to the end of a command, several times."""
    place.mkdir()
    fire.world(place)
    config, taken = fire.write_config(place, "stopped"), []
    for _ in range(STOPS):
        folder = place / "runs" / "stopped"
        reached, end = last_step(folder), time.monotonic() + LIMIT
        going = fire.Command(config, reached + 1_000_000, world)
        while last_step(folder) <= reached + 1:
            if going.wait(0.05) is not None or time.monotonic() > end:
                raise RuntimeError(f"the run did not go on; see {place / 'output.txt'}")
        began = time.perf_counter()
        going.process.send_signal(signal.SIGTERM)
        code = going.wait(LIMIT)
        taken.append(time.perf_counter() - began)
        assert code == 75, f"it ended with {code}"
    return taken


def table(found: dict[str, Any]) -> Table:
    """The figures for people: medians, and how far single ones lie apart."""

    def told(values: list[float]) -> str:
        return f"{median(values):.3f} s ({min(values):.3f} to {max(values):.3f})" if values else "-"

    size = f"{found['parameters'] / 1e6:.0f} M parameters, {found['ranks']} ranks, ZeRO {found['stage']}"
    rows = Table("", "Sfumato", "DeepSpeed", title=f"Checkpoints of {size}", title_justify="left")
    rows.add_row("bytes", *(f"{found['bytes'][who] / 1e9:.3f} GB" for who in ("ours", "deepspeed")))
    for key, name in (
        ("pause", "training stands still"),
        ("published", "can be loaded"),
        ("load", "loading"),
    ):
        rows.add_row(name, *(told(found[key][who]) for who in ("ours", "deepspeed")))
    rows.add_row("a step", told(found["step"]), "")
    rows.add_row("a step while it is written", told(found["beside"]), "")
    rows.add_row("SIGTERM to the end (toy)", told(found.get("stop", [])), "")
    return rows
