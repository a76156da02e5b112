"""`sfumato bench scaling`: what 1, 2 and 4 gloo ranks make of the same global batch at each ZeRO stage.

Every cell (a stage, so many ranks) is run in each round, one after the other, in processes of its own with
one thread each, forked from one that has the libraries at hand. They train on numbers that are made here, in
fp32, one micro-batch a step on each rank. The dict that `run` gives, and writes as JSON, format 1:

    format, model, parameters, batch, steps, rounds, machine
    cells [{"stage", "ranks", and for each round a number in each of the lists
        "step"     seconds of a step of the slowest rank, the median
        "cpu"      seconds of the processor a step, of all ranks
        "memory"   bytes that belong to the rank that holds most, without the libraries' that all share
     "sent", "foretold"}]    bytes of a rank in a step: counted, and by planner/traffic.py
"""

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from sfumato import train
from sfumato.bench.gates.count import Counting
from sfumato.bench.gates.exchange import ALL_AWAY, foretold, free_port, sent_by
from sfumato.bench.gates.ours import counts_of, start_of
from sfumato.bench.gates.ours import step as counted_step
from sfumato.bench.machine import machine
from sfumato.bench.peers import MODELS, make_model, spread
from sfumato.bench.work import Numbers, batch_of, drawn, method_of
from sfumato.config import Config, parse
from sfumato.engine import ranks
from sfumato.errors import UserError
from sfumato.planner.architectures import facts_of
from sfumato.planner.trace import trace

STAGES, RANKS = (0, 1, 2, 3), (1, 2, 4)
WARM, STEPS = 2, 6
"""Steps of a cell in a round: untimed, and timed."""
LIMIT = 300.0
"""Seconds that a cell may take, and that a rank waits for others."""
LATE = "deepspeed.runtime.zero.muon.muon_optimizer"
"""Imported at a first engine otherwise, with all of inductor."""
PRELOAD = ["sfumato.bench.scaling", LATE, "sfumato.bench.frozen"]
"""What the processes are forked with."""


@dataclass(frozen=True)
class Cell:
    """So many ranks at a ZeRO stage."""

    stage: int
    ranks: int


def run(what: str, rounds: int, out: Path | None) -> dict[str, Any]:
    """Measure, show and write it to `out` as JSON; what: of `peers.MODELS`.

    Raises UserError if the folder of `out` is not there; RuntimeError where a rank fails.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}", f"no folder {out.parent}", "make it, or name another file")
    size, batch, _ = MODELS[what]
    log = Console(stderr=True)
    cells = [Cell(stage, count) for stage in STAGES for count in RANKS]
    with tempfile.TemporaryDirectory(prefix="sfumato-scaling-") as scratch:
        model = Path(scratch) / "model"
        make_model(model, what, "sd")
        seen: dict[Cell, list[list[dict[str, Any]]]] = {cell: [] for cell in cells}
        config = settings(model, cells[0], size, batch)
        cost = trace(config, facts_of(config.model), (size, size))
        found: dict[str, Any] = {"format": 1, "model": what, "batch": batch, "steps": STEPS}
        found |= {"parameters": sum(map(prod, cost.trained.values())), "machine": machine()}
        for number in range(rounds):
            for cell in cells if number % 2 == 0 else reversed(cells):
                log.print(f"round {number + 1} of {rounds}: {cell.ranks} at stage {cell.stage}")
                seen[cell].append(measured(settings(model, cell, size, batch), size, cell.ranks, STEPS))
            rows = [
                figures(cell, told, settings(model, cell, size, batch), size) for cell, told in seen.items()
            ]
            found |= {"rounds": number + 1, "cells": rows}
            if out is not None:  # after each round: one that is stopped is not for nothing
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print(table(found))
    return found


def settings(model: Path, cell: Cell, size: int, batch: int) -> Config:
    """A cell's run: its share of the global batch on each rank, and at stage 3 every weight put away."""
    return parse(
        {
            "steps": 10_000,
            "batch_size": batch,
            "micro_batch_size": batch // cell.ranks,
            "model": {"weights": str(model)},
            "data": {"source": "pictures", "resolution": size, "cache": "both", "views": 1},
            "engine": {"precision": "fp32", "zero_stage": cell.stage, "deepspeed": ALL_AWAY},
        }
    )


def measured(config: Config, size: int, world: int, steps: int) -> list[dict[str, Any]]:
    """What each of `world` ranks tells of so many timed steps, in order of rank.

    Raises RuntimeError with its traceback where one fails, and where they take longer than LIMIT.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, processes, pipes = free_port(), [], []
    told: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + LIMIT
    try:
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, config, size, rank, world, port, steps))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        while len(told) < world:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in told]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                raise RuntimeError(
                    f"{world} ranks at stage {config.engine.zero_stage} took over {LIMIT:.0f} s"
                )
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                told[rank] = heard(pipes[rank], rank)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [told[rank] for rank in range(world)]


def heard(pipe: Connection, rank: int) -> dict[str, Any]:
    """What a rank tells, once."""
    try:
        found = pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"rank {rank} died without a word") from error
    if isinstance(found, str):
        raise RuntimeError(f"rank {rank} failed:\n{found}")
    assert isinstance(found, dict), f"rank {rank} told {found}"
    return found


def work(pipe: Connection, config: Config, size: int, rank: int, world: int, port: int, steps: int) -> None:
    """One rank in a process of its own: it tells its figures, or a traceback."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    try:
        pipe.send(stepped(config, size, steps))
    except Exception:
        pipe.send(traceback.format_exc())
    wait([pipe], LIMIT)  # until all have told: a rank that leaves tears the others' connections
    os._exit(0)


def stepped(config: Config, size: int, steps: int) -> dict[str, Any]:
    """Train on one batch, and then once more while what is sent is counted.

    {"wall", "cpu" (seconds of each step), "memory" (bytes that this process came to hold),
    "sent" {collective: bytes}}.
    """
    before = own_memory()
    place = ranks.start(LIMIT)
    method = method_of(config, facts_of(config.model), place.device)
    engine, objective = start_of(config, place, method, Numbers(place.device))
    make = drawn(torch.Generator().manual_seed(place.rank))
    batch = batch_of(config, method.family, (size, size), config.micro_batch_size, make)
    most, wall, cpu = 0, [], []
    for number in range(WARM + steps):
        place.barrier()
        began = time.perf_counter(), time.process_time()
        train.optimizer_step(engine, method, objective, [batch])
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
        if number < WARM:
            most = max(most, own_memory())
    counting = Counting()
    with counting:
        counted_step(counting, engine, method, objective, batch)
    return {"wall": wall[WARM:], "cpu": cpu[WARM:], "memory": most - before, "sent": counts_of(counting).sent}


def own_memory() -> int:
    """Bytes of this process that it shares with no other."""
    found: int = psutil.Process().memory_full_info().uss
    return found


def figures(
    cell: Cell, several: Sequence[Sequence[dict[str, Any]]], config: Config, size: int
) -> dict[str, Any]:
    """A cell's row, of what its ranks told in each round."""
    found: dict[str, Any] = {"stage": cell.stage, "ranks": cell.ranks}
    found["step"] = [max(median(rank["wall"]) for rank in each) for each in several]
    found["cpu"] = [sum(median(rank["cpu"]) for rank in each) for each in several]
    found["memory"] = [max(rank["memory"] for rank in each) for each in several]
    found["sent"] = max(sent_by(rank["sent"], cell.ranks) for rank in several[0])
    found["foretold"] = foretold(config, facts_of(config.model), (size, size), cell.ranks)
    return found


def table(found: dict[str, Any]) -> Table:
    """The figures, a line for each cell."""
    what = (
        f"{found['model']}: {found['parameters'] / 1e6:.3g} M parameters, batch {found['batch']} in all, fp32"
    )
    shown = Table(title=what, title_justify="left", box=None)
    heads = ("\nstage", "\nranks", "images\na second", "lowest\nhighest", "cpu ms\na step")
    for heading in (*heads, "MB of\na rank", "bytes\nsent", "by\nformula"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for cell in found["cells"]:
        low, middle, high = spread([found["batch"] / seconds for seconds in cell["step"]])
        shown.add_row(
            str(cell["stage"]),
            str(cell["ranks"]),
            f"{middle:.1f}",
            f"{low:.1f} {high:.1f}",
            f"{median(cell['cpu']) * 1e3:.0f}",
            f"{median(cell['memory']) / 1e6:.0f}",
            f"{cell['sent']:,}",
            f"{cell['foretold']:,}",
        )
    return shown
