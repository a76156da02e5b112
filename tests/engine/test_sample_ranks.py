"""Ranks that share the pictures draw those that one process draws, also from weights sharded over them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from sfumato.drawing import draw as drawing
from sfumato.drawing import pipelines
from sfumato.drawing.request import Sampling, shots
from sfumato.engine import ranks  # noqa: F401 - keeps DeepSpeed from compiling an operator for minutes
from sfumato.sample import Place, Request, sample
from tests.engine.ranks import RankError, run_ranks
from tests.unit import twins
from tests.unit.toy_drawing import write_control, write_lora, write_mask, write_picture

QUICK = Sampling(steps=2, guidance=3.0, size=32)
PROMPTS = ["a red fox", "two cats", "a house"]
Picture = tuple[int, str, int, bytes]


def pictures(folder: Path, rank: int = 0, world: int = 1) -> list[Picture]:
    pipeline = pipelines.open_pipeline(folder, "cpu", torch.float32)[0]
    if world > 1:
        shard(pipeline.unet)
        (folder / f"sharded-{rank}").touch()
    found = drawing.draw(pipeline, shots(PROMPTS, [7]), Sampling(steps=2, size=32), rank=rank, world=world)
    return [(each.index, each.prompt, each.seed, each.image.tobytes()) for each in found]


def shard(net: torch.nn.Module) -> None:
    """Let DeepSpeed's stage 3 keep a part of every weight on each rank and gather it in the forward pass."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    net.requires_grad_(True)  # what does not learn it would leave whole
    deepspeed.initialize(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )
    assert all(weight.numel() == 0 for weight in net.parameters()), "the weights are not sharded"


def on_rank(folder: Path) -> list[Picture]:
    return pictures(folder, dist.get_rank(), dist.get_world_size())


def every_way(root: Path) -> list[str]:
    """Every way to draw by the command: the names and hashes of the files."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    out = root / f"out-{world}"
    request = Request(str(root / "sd"), ("a (red:1.3) fox", "two cats"), sampling=QUICK, seeds=(1, 2))
    image, control = {"image": root / "image.png"}, {"control": str(root / "control")}
    shown = {**control, "condition": root / "condition.png"}
    lora = [(root / "lora.safetensors", 0.7)]
    ways: list[dict[str, Any]] = [
        {"loras": lora},
        {"emphasis": True},
        image,
        {**image, "mask": root / "mask.png"},
        shown,
        {**image, **shown},
    ]
    for number, way in enumerate(ways):
        # The second call has one picture for two ranks, and a folder that holds pictures.
        for prompts in [request.prompts, ("one more",)][: 2 if number == 0 else 1]:
            asked = replace(request, **way, prompts=prompts, seeds=(1,), out=out / str(number))
            sample(asked, Place(rank=rank, world=world))
    if world > 1:
        dist.barrier()
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return [f"{file.relative_to(out)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]


def unequally_often(folder: Path) -> list[Picture]:
    drawing.share = lambda number, rank, world: list(range(number))[rank::world]
    return on_rank(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / "sd"
    twins.write("sd", path)
    return path


def test_two_ranks_draw_what_one_draws(folder: Path) -> None:
    alone = pictures(folder)
    assert [picture[:3] for picture in alone] == [(i, prompt, 7) for i, prompt in enumerate(PROMPTS)]
    assert run_ranks(on_rank, 2, folder, timeout=120) == [alone, alone]


def test_every_way_gives_the_same_files_on_two_ranks(folder: Path) -> None:
    root = folder.parent
    write_control(root / "control", folder)
    write_lora(root / "lora.safetensors", folder)
    for seed, name in enumerate(("image", "condition")):
        write_picture(root / f"{name}.png", seed=seed)
    write_mask(root / "mask.png")
    alone = every_way(root)
    assert len(alone) == 6 * 4 + 1, "two pictures, a sheet and a list of each way, and one picture more"
    assert run_ranks(every_way, 2, root, timeout=240) == [alone, alone]


def test_a_rank_that_draws_less_is_waited_for_in_vain(folder: Path) -> None:
    """Why `share` pads: without it the second of two ranks, with one picture of three, ends too early."""
    for rank in range(2):
        (folder / f"sharded-{rank}").unlink(missing_ok=True)
    with pytest.raises(RankError):
        run_ranks(unequally_often, 2, folder, timeout=120)
    assert all((folder / f"sharded-{rank}").exists() for rank in range(2)), "they failed before they drew"
