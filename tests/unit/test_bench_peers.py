"""`bench peers`: what is read off its sides, and that unequal losses end it. The bare loops run for real."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sfumato import config
from sfumato.bench import bare, entrants, peers
from sfumato.bench.entrants import EXAMPLES, Scripts, Work
from sfumato.bench.race import Entrant, race, read_bar
from sfumato.errors import UserError

WRITES = """
import json, sys, time
with open(sys.argv[1], "w") as file:
    for step in range(1, 6):
        if step == int(sys.argv[2]):
            sys.exit("no more paint")
        time.sleep(0.05)
        file.write(json.dumps({"step": step, "seconds": time.perf_counter(), "loss": step / 10}) + "\\n")
        file.flush()
"""


def side(folder: Path, stop: int = 0) -> Entrant:
    file = folder / "side" / "metrics.jsonl"
    return Entrant("a side", [sys.executable, "-c", WRITES, str(file), str(stop)], file.parent, 5, file)


def test_a_side_is_watched_to_its_last_step(tmp_path: Path) -> None:
    seen = race(side(tmp_path))
    assert seen.losses == [0.1, 0.2, 0.3, 0.4, 0.5]
    steps = [later - earlier for earlier, later in zip(seen.times, seen.times[1:], strict=False)]
    assert len(steps) == 4 and all(step >= 0.05 for step in steps)
    assert seen.memory > 1e6


def test_a_side_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a side ended after 2 of 5 steps:\nno more paint"):
        race(side(tmp_path, stop=3))


def losses_of(drawn: Sequence[bytes], log: Path) -> list[float]:
    """What is read of a bar that is drawn in these parts."""
    found: list[tuple[float, float]] = []
    parts = iter(drawn)
    with log.open("wb") as words:
        read_bar(lambda size: next(parts), found, words)
    return [loss for _, loss in found]


def test_a_progress_bar_is_read_with_the_loss_of_its_own_step(tmp_path: Path) -> None:
    drawn = [
        b"Steps:   0%|  | 0/3 [00:00<?, ?it/s]\rSteps:  33%|# | 1/3 [00:01<00:02, 1.0s/it]",
        b"\rSteps:  33%|# | 1/3 [00:01<00:02, 1.0s/it, lr=1e-5, step_loss=0.5]",
        b"\rSteps:  67%|##| 2/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_loss=0.5]",
        b"\rSteps:  67%|##| 2/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_lo",
        b"ss=0.25]\rSteps: 100%|##| 3/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_loss=0.25]",
        b"\rSteps: 100%|##| 3/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_loss=1.5e-3]\n",
        b"",
    ]
    assert losses_of(drawn, tmp_path / "words") == [0.5, 0.25, 0.0015]
    assert (tmp_path / "words").read_bytes() == b"".join(drawn)


def test_a_bar_that_tells_a_loss_before_its_first_step_is_read(tmp_path: Path) -> None:
    """As deepspeed-diffusers draws it."""
    drawn = [
        b"Steps:   0%|  | 0/2 [00:01<?, ?it/s, epoch= 1, loss=0.500000]\r",
        b"Steps:  50%|# | 1/2 [00:01<00:01, 1.0s/it, epoch= 1, loss=0.500000]\r",
        b"Steps: 100%|##| 2/2 [00:02<00:00, 1.0s/it, epoch= 1, loss=0.250000]\r",
        b"",
    ]
    assert losses_of(drawn, tmp_path / "words") == [0.5, 0.25]


def test_losses_that_chance_does_not_explain_end_it() -> None:
    equal = [{"name": "one", "losses": [1.0, 0.02]}, {"name": "two", "losses": [1.05, 0.02]}]
    peers.compare_losses(equal)
    with pytest.raises(AssertionError, match="two has the loss 1.3000, not 1.0000"):
        peers.compare_losses([equal[0], {"name": "two", "losses": [1.3, 0.02]}])


@pytest.mark.parametrize(("family", "tasks"), [("sd", ["full"]), ("sdxl", ["lora", "controlnet"])])
def test_the_bare_loops_train_on_the_same_world(
    family: str, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PICTURES", 8)
    learns = peers.world(tmp_path, "tiny", Work(tasks[-1], family, 64, 4, 3))
    model, pictures, file = tmp_path / "model", tmp_path / "pictures", tmp_path / "lines.jsonl"
    for task in tasks:
        bare.main(model, pictures, 3, 4, 64, file, task)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        # Untrained, it says about nothing of the noise.
        assert all(0.5 < line["loss"] < 2 for line in lines), lines
    data = bare.encoded(model, pictures, 64)
    assert data["latents"].shape == (8, 8, 8, 8)
    assert (data["latents"][:, 4:] > 0).all()  # standard deviations
    torch.testing.assert_close(data, bare.encoded(model, pictures, 64))
    if family == "sd":
        assert data["context"].shape == (8, 77, 32)
        return
    assert data["context"].shape == (8, 77, 64) and data["pooled"].shape == (8, 40)
    assert data["sizes"][3].tolist() == [64, 64, 0, 0, 64, 64]
    assert data["hint"].shape == (8, 3, 64, 64)
    assert {*data["hint"].unique().tolist()} == {0, 1}  # the outlines that the pictures are of
    unet, control, trained = bare.learner(model, "controlnet")
    assert learns == sum(p.numel() for p in trained) == sum(p.numel() for p in control.parameters())
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize(("task", "family"), [*EXAMPLES])
def test_every_side_is_asked_for_the_same(task: str, family: str, tmp_path: Path) -> None:
    work = Work(task, family, 64, 8, 5)
    script, recipe = tmp_path / EXAMPLES[task, family], tmp_path / "recipe.py"
    sides = entrants.entrants(tmp_path, work, Scripts(script, recipe))
    assert [one.name for one in sides][-2:] == ["diffusers' example", "seed's recipe"]
    assert len({one.folder for one in sides}) == len(sides) == 5
    assert [one.name for one in peers.order(sides, 1)] == [one.name for one in reversed(sides)]
    assert sides[0].command[-5:] == ["5", "8", "64", str(sides[0].lines), task]

    example = sides[3].command
    assert example[1] == str(script)
    assert {"--train_batch_size=8", "--max_train_steps=5", "--resolution=64", "--mixed_precision=no"} <= {
        *example
    }
    assert ("--rank=4" in example) == (task == "lora")
    assert ("--conditioning_image_column=conditioning_image" in example) == (task == "controlnet")

    for cache, side in zip(("both", "none"), sides[1:3], strict=True):
        ours = config.load(side.command[4], side.command[5:])
        assert (ours.steps, ours.batch_size, ours.data.cache, ours.method.kind) == (5, 8, cache, task)
        assert ours.optimizer.lr == bare.LR and f"--learning_rate={bare.LR}" in example
        if ours.method.kind == "lora":
            assert (ours.method.rank, ours.method.targets) == (bare.RANK, bare.TARGETS)

    compiled = entrants.entrants(tmp_path, work, Scripts(), compiled=True)
    assert [one.name for one in compiled] == ["bare loop", "ours, cached", "ours, compiled", "ours, live"]
    settings = [config.load(one.command[4], one.command[5:]) for one in compiled[1:]]
    assert [(one.data.cache, one.engine.compile) for one in settings] == [
        ("both", False), ("both", True), ("none", False)
    ]  # fmt: skip

    told = json.loads(Path(sides[4].command[2].removeprefix("--cfg=")).read_text())
    assert told["train_micro_batch_size_per_gpu"] * told["gradient_accumulation_steps"] == 8
    assert told["use_lora"]["action"] == (task == "lora") and told["max_train_steps"] == 5
    assert sides[4].env["WORLD_SIZE"] == "1"


def test_folders_without_the_scripts_and_work_that_none_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file .*train_text_to_image.py"):
        peers.run("tiny", tmp_path, 1, None)
    with pytest.raises(UserError, match="no file .*train_controlnet_sdxl.py"):
        peers.run("tiny", tmp_path, 1, None, "controlnet", "sdxl")
    with pytest.raises(UserError, match="no file .*train_text_to_image.py"):
        peers.run("tiny", None, 1, None, recipe=tmp_path)
    with pytest.raises(UserError, match="full of sdxl"):
        peers.run("tiny", None, 1, None, family="sdxl", recipe=tmp_path)
    with pytest.raises(UserError, match="--model base --family sd --task controlnet"):
        peers.run("base", None, 1, None, "controlnet")


@pytest.mark.parametrize(("family", "real"), [("sd", 1.117 / 0.803), ("sdxl", 4.879 / 6.761)])
def test_mids_parts_cost_in_proportion_what_real_ones_do(tmp_path: Path, family: str, real: float) -> None:
    """A picture encoded over a U-Net forward, in FLOPs; real: SD 1.5 at 512 pixels and SDXL at 1024."""
    peers.make_model(tmp_path, "mid", family)
    size = peers.MODELS["mid"][0]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae"))
        settings = unet.config
        rows = {"context": torch.zeros(1, 77, settings.cross_attention_dim)}
        if family == "sdxl":
            pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
            rows |= {"pooled": torch.zeros(1, pooled), "sizes": torch.zeros(1, 6)}
        with FlopCounterMode(display=False) as forward:
            bare.answer(unet, None, torch.zeros(1, 4, size // 8, size // 8), torch.zeros(1), rows)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.zeros(1, 3, size, size))
    assert encoding.get_total_flops() / forward.get_total_flops() == pytest.approx(real, rel=0.1)
