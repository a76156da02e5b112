"""Compiled blocks in DeepSpeed's hands: what is learned, averages and checkpoints, at stages 1 and 2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.engine import checkpoint, ranks
from sfumato.engine.engine import Engine
from sfumato.models import compiled
from sfumato.models.denoiser import prepare
from tests.engine import toys
from tests.engine.ranks import run_ranks

PLAIN = (0, False)
COMPILED = ((1, True), (2, True))


def all_stages(place: str) -> dict[tuple[int, bool], dict[str, Any]]:
    """By stage and whether blocks are compiled: losses, all tensors, an average's answer, a checkpoint."""
    compiled.BACKEND, compiled.KINDS = "aot_eager", ()  # attention, without code for the processor
    found = {}
    for stage, whether in (PLAIN, *COMPILED):
        settings = toys.config(
            engine__zero_stage=stage, engine__gradient_checkpointing=True, ema__enabled=True, ema__decay=0.5
        )

        def build(whether: bool = whether) -> Any:
            net = toys.unet()
            prepare(net, None, True)
            if whether:
                compiled.compile_blocks(net, several=False)
            return net

        engine = Engine(settings, ranks.start(60), build, toys.start_file())
        losses = []
        for step in range(2):
            toys.one_step(engine, step)
            losses.append(engine.metrics()["loss"])
        rows = slice(0, 2), 0, engine.dtype
        answers = [toys.losses_of(engine, *rows).detach()]
        with engine.averaged():
            answers.append(toys.losses_of(engine, *rows).detach())
        saved = checkpoint.save(engine, Path(place) / f"{stage}-{whether}", {}, keep=2)
        names = checkpoint.Saved(saved).parameters
        found[stage, whether] = {"losses": losses, "answers": answers, "names": [*names]}
        found[stage, whether]["tensors"] = checkpoint.own_tensors(engine)
        found[stage, whether]["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def test_every_stage_below_3_learns_averages_and_saves_the_same(tmp_path: Path) -> None:
    found = run_ranks(all_stages, 1, str(tmp_path), timeout=280)[0]
    right = found[PLAIN]
    assert right["graphs"] == 0
    assert not torch.allclose(*right["answers"], rtol=1e-3), "the average is no other model"
    for ours in map(found.get, COMPILED):
        assert ours["graphs"] > 0 and ours["names"] == right["names"]
        assert ours["losses"] == pytest.approx(right["losses"], rel=1e-5)
        torch.testing.assert_close(ours["answers"], right["answers"], rtol=1e-4, atol=1e-5)
        for kind in ("weight", "ema"):
            assert toys.distance(toys.joined([ours], kind), toys.joined([right], kind)) < 1e-5
