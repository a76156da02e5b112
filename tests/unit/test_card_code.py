"""The code in a model card runs as it stands, in the export's folder, and draws with what was learned."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from sfumato import config, methods, models
from sfumato.models.loading import quiet
from sfumato.report import card
from tests.unit import twins


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for family in ("sd", "sdxl"):
        twins.write(family, folder / family)
    return folder


def write_export(place: Path, family: str, kind: str, folder: Path) -> str:
    """An export of random numbers with its card; the card's code."""
    given: dict[str, Any] = {
        "steps": 1,
        "batch_size": 1,
        "model": {"weights": str(place / family), "from_scratch": kind == "full"},
        "method": {"kind": kind},
        "data": {
            "source": "pictures",
            "resolution": 64,
            "conditioning_column": "edges",
            "prompt": "a sks cat" if kind == "lora" else None,
        },
        "preview": {"prompts": ['it\'s a "cat"'], "conditions": ["edges.png"] * (kind == "controlnet")},
    }
    settings = config.parse(given)
    folder.mkdir()
    if kind in ("full", "lora"):
        part = models.load(settings.model, torch.device("cpu"), torch.float32, torch.float32, False, False)
        method = methods.build(settings, part)
        drawn = method.draw(0)
        # A LoRA that was not trained changes nothing.
        numbers = {name: torch.randn_like(t) if "lora_B" in name else t for name, t in drawn.items()}
        method.frame(folder, torch.float32, {})
        method.export(numbers, folder, torch.float32, {})
    elif kind == "controlnet":
        with quiet():
            net = UNet2DConditionModel.from_pretrained(place / family / "unet", low_cpu_mem_usage=False)
            ControlNetModel.from_unet(net).save_pretrained(folder)
        Image.new("RGB", (64, 64), "red").save(folder / "condition.png")
    else:
        names = ("<new>",) if family == "sd" else ("clip_l", "clip_g")
        widths = [models.folder.read_json(place / family / part / "config.json")["hidden_size"]
                  for part in ("text_encoder", "text_encoder_2")[: len(names)]]  # fmt: skip
        rows = {name: torch.randn(2, wide) for name, wide in zip(names, widths, strict=True)}
        save_file(rows, folder / "learned_embeds.safetensors")
    trigger = "<new>" if kind == "textual_inversion" else settings.data.prompt
    facts = {"step": 1, "weights": "weight", "family": family, "trigger": trigger, "sfumato": "0"}
    card.write(folder, settings, {"step": 1, "samples": 4, "data": "x"}, facts)
    (folder / family).symlink_to(place / family)  # the reader's own copy of the base
    block = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert block is not None
    return block[1]


def check_remarks(export: Path) -> None:
    """Fail unless both files of a LoRA say what they are."""
    with safe_open(export / "kohya.safetensors", "pt") as file:
        said = file.metadata()
    wanted = {
        "ss_network_dim": "16",
        "ss_network_alpha": "16.0",
        "ss_base_model": "sd",
        "ss_resolution": "64",
    }
    assert wanted.items() <= said.items() and said["modelspec.trigger_phrase"] == "a sks cat"
    with safe_open(export / "pytorch_lora_weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (16, 16)


CASES = [("sd", "full"), ("sd", "lora"), ("sd", "controlnet"), ("sd", "textual_inversion")]
CASES += [("sdxl", "textual_inversion"), ("sdxl", "controlnet")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_code_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    code = write_export(place, family, kind, tmp_path / "export")
    monkeypatch.chdir(tmp_path / "export")
    quick = code.replace("height=64)", "height=64, num_inference_steps=2)")
    assert quick != code
    known: dict[str, Any] = {}
    with quiet():
        exec(quick, known)
    assert np.asarray(known["image"]).shape == (64, 64, 3) and Path("picture.png").is_file()
    pipeline = known["pipeline"]
    if kind == "lora":
        assert pipeline.get_active_adapters() and known["prompt"] == "a sks cat"
        check_remarks(Path())
    if kind == "textual_inversion":
        ids = pipeline.tokenizer("<new> <new>_1", add_special_tokens=False).input_ids
        assert len(pipeline.tokenizer.tokenize("<new>")) == 1 and max(ids) >= pipeline.tokenizer.vocab_size
