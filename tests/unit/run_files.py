"""Folders as runs leave them: real settings, lines as the loop writes them, and small pictures."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sfumato.config import parse

PROMPTS = ("a red fox in the snow", "a lighthouse at dusk", "a bowl of lemons")
START = 1_790_000_000.0


def config(place: Path, name: str = "cats", **changes: Any) -> dict[str, Any]:
    """resolved.json of a run."""
    values: dict[str, Any] = {
        "name": name,
        "output": str(place),
        "steps": 400,
        "batch_size": 8,
        "micro_batch_size": 4,
        "model": {"weights": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
        "data": {"source": str(place / "photos"), "resolution": 64, "store": str(place / "cache")},
        "optimizer": {"lr": 1e-4, "schedule": "cosine", "warmup_steps": 20},
        "preview": {"prompts": list(PROMPTS), "every": 100},
        "ema": {"enabled": True},
    }
    for key, value in changes.items():
        table, _, leaf = key.rpartition("__")
        (values.setdefault(table, {}) if table else values)[leaf] = value
    return parse(values).model_dump(mode="json")


def lines(steps: int, every: int = 1, seed: int = 0, device: bool = True) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    draw = random.Random(seed)
    for step in range(every, steps + 1, every):
        loss = (0.08 + 0.25 * math.exp(-3 * step / steps)) * math.exp(draw.gauss(0, 0.25))
        wait = max(0.0, draw.gauss(0.02, 0.01))
        yield {
            "step": step,
            "time": START + 0.5 * step,
            "seconds": 0.5 * step,
            "loss": loss * (9 if step == steps // 2 else 1),
            "loss_by_timestep": [loss * f if draw.random() > 0.05 else None for f in (2.2, 1.0, 0.5, 0.3)],
            "lr": 1e-4 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": 0.4 * math.exp(draw.gauss(0, 0.4)),
            "latent_mean": draw.gauss(0.05, 0.02),
            "latent_std": draw.gauss(0.9, 0.02),
            "noise_mean": draw.gauss(0, 0.004),
            "noise_std": draw.gauss(1, 0.003),
            "data_seconds": 0.5 * wait,
            "data_stall": wait,
            "images_per_second": draw.gauss(15.5, 0.4),
            "images_per_second_without_data_wait": draw.gauss(16, 0.3),
            "seconds_per_step": 0.5,
            "skipped": 0.0,
            "goodput": 0.93 - 0.1 * math.exp(-step / 40),
            "faults": 2,
            "overflows": 0,
            "left_out": 1 if step > steps // 3 else 0,
            "spike": step == steps // 2,
            "bucket": {"80x48": every}
            if step % 3 == 0
            else {"48x80": every}
            if step % 5 == 0
            else {"64x64": every},
            **({"ema_distance": 0.02 * step / (step + 50)} if step % 10 == 0 else {}),
            "device_memory_gib" if device else "process_memory_gib": 11.5 + min(step, 50) / 100,
        }


def validation(steps: int, every: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Lines of validation.jsonl."""
    draw = random.Random(seed)
    for step in range(0, steps + 1, every):
        for weights, better in (("live", 1.0), ("ema", 0.95)):
            loss = better * (0.1 + 0.2 * math.exp(-3 * step / steps)) * (1 + draw.gauss(0, 0.01))
            levels = [{"t": t, "loss": loss * f} for t, f in ((62, 2.4), (312, 1.1), (562, 0.6), (937, 0.2))]
            null = loss * (1 + 0.1 * step / steps)
            yield {"step": step, "weights": weights, "loss": loss, "quantiles": levels, "null_loss": null,
                   "gap": null - loss, "samples": 32, "seconds": 3.5}  # fmt: skip


def previews(run: Path, steps: list[int], total: int, prompts: tuple[str, ...] = PROMPTS) -> None:
    """Pictures that take on a colour and a form over the steps."""
    for step in steps:
        folder = run / "images" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        told = []
        for number, prompt in enumerate(prompts):
            done, low = step / total, Image.effect_noise((32, 32), 90).convert("RGB")
            sheet = low.resize((192, 192), Image.Resampling.BICUBIC)
            form = Image.new("RGB", sheet.size, ((200, 90, 40), (60, 90, 160), (190, 170, 60))[number % 3])
            ImageDraw.Draw(form).ellipse(
                (40, 50, 150, 150), ((245, 240, 230), (250, 210, 120), (250, 230, 90))[number % 3]
            )
            Image.blend(sheet, form, 0.1 + 0.85 * done).save(folder / f"{number:03d}-drawn-seed0.png")
            told.append(
                json.dumps({"file": f"{number:03d}-drawn-seed0.png", "prompt": prompt, "seed": 0}) + "\n"
            )
        (folder / "drawings.jsonl").write_text("".join(told))


def jsonl(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(place: Path, name: str = "cats", steps: int = 400, seed: int = 0, **changes: Any) -> Path:
    """A run's folder with everything that a page shows."""
    run = place / name
    run.mkdir(parents=True)
    (run / "resolved.json").write_text(json.dumps(config(place, name, steps=steps, **changes)))
    packages = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "diffusers": "0.36.0"}
    told = {"sfumato": "0.1.0", "python": "3.11.2", "system": "Linux", "ranks": 2, "device": "cpu",
            "packages": packages, "variables": {"OMP_NUM_THREADS": "1"}}  # fmt: skip
    (run / "environment.json").write_text(json.dumps(told))
    jsonl(run / "metrics.jsonl", lines(steps, seed=seed))
    jsonl(run / "validation.jsonl", validation(steps, max(1, steps // 8), seed))
    half, world = steps // 2 - steps // 20, {"world": 2, "device": "cpu"}
    jsonl(run / "starts.jsonl", [
        {"time": START, "step": 0, **world}, {"time": START + half / 2, "step": half, "end": "stopped"},
        {"time": START + half / 2 + 60, "step": half, **world},
        {"time": START + steps / 2 + 60, "step": steps, "end": "done"},
    ])  # fmt: skip
    jsonl(
        run / "faults" / "index.jsonl", [{"name": "photos/broken.jpg", "reason": "not a picture", "part": 0}]
    )
    jsonl(
        run / "faults" / "rank-0.jsonl",
        [{"name": "photos/late.png", "reason": "the file is cut short", "part": 0}],
    )
    samples = [{"rank": 0, "micro": 0, "id": 7, "visit": 1, "name": "photos/7.png", "caption": "a white cat",
                "dropped": False, "loss": "nan"}]  # fmt: skip
    bad = run / "bad" / f"step-{steps // 3:06d}"
    bad.mkdir(parents=True)
    (bad / "batch.json").write_text(json.dumps({"format": 1, "step": steps // 3, "samples": samples}))
    summary = {"mean_fps": 16.02, "window": [100, 199], "final_loss": 0.0912, "seconds_per_step": 0.5,
               "end_to_end_seconds": steps / 2 + 60}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    previews(run, [*range(0, steps + 1, max(1, steps // 4))], steps)
    (run / "export").mkdir()
    facts = {"step": steps, "family": "sd", "trigger": None, "weights": "ema"}
    (run / "export" / "sfumato.json").write_text(json.dumps(facts))
    return run
