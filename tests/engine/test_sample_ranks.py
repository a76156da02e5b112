"""Ranks that share the pictures draw those that one process draws, also from weights sharded over them."""

from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from sfumato import models, pipelines, sample
from sfumato.engine import ranks  # noqa: F401 - keeps DeepSpeed from compiling an operator for minutes
from sfumato.sample import Sampling
from tests.engine.ranks import RankError, run_ranks

PROMPTS = ["a red fox", "two cats", "a house"]
Picture = tuple[int, str, int, bytes]


def pictures(folder: Path, rank: int = 0, world: int = 1) -> list[Picture]:
    pipeline = pipelines.open_pipeline(folder, "cpu", torch.float32, 77, None)[0]
    if world > 1:
        shard(pipeline.unet)
        (folder / f"sharded-{rank}").touch()
    found = sample.draw(pipeline, PROMPTS, [7], Sampling(steps=2, size=32), rank=rank, world=world)
    return [(each.index, each.prompt, each.seed, each.image.tobytes()) for each in found]


def shard(net: torch.nn.Module) -> None:
    """Let DeepSpeed's stage 3 keep a part of every weight on each rank and gather it in the forward pass."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
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


def unequally_often(folder: Path) -> list[Picture]:
    sample.share = lambda number, rank, world: list(range(number))[rank::world]
    return on_rank(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / "sd"
    models.family_class("sd").tiny(path)
    return path


def test_two_ranks_draw_what_one_draws(folder: Path) -> None:
    alone = pictures(folder)
    assert [picture[:3] for picture in alone] == [(i, prompt, 7) for i, prompt in enumerate(PROMPTS)]
    assert run_ranks(on_rank, 2, folder, timeout=120) == [alone, alone]


def test_a_rank_that_draws_less_is_waited_for_in_vain(folder: Path) -> None:
    """Why `share` pads: without it the second of two ranks, with one picture of three, ends too early."""
    for rank in range(2):
        (folder / f"sharded-{rank}").unlink(missing_ok=True)
    with pytest.raises(RankError):
        run_ranks(unequally_often, 2, folder, timeout=120)
    assert all((folder / f"sharded-{rank}").exists() for rank in range(2)), "they failed before they drew"
