"""Which pipeline a source means: a diffusers folder, a hub id, or a run, with the adapters of it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError

from sfumato import config, models
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.models.folder import locate, read_json
from sfumato.models.loading import peft_library, quiet

LORA = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA."""


@dataclass(frozen=True)
class Found:
    """What a source means."""

    folder: Path
    """A diffusers folder."""
    prompt_window: int
    """Tokens of a prompt that it was trained to read."""
    lora: Path | None = None
    """The folder of a LoRA that belongs to it."""


def find_model(source: str | Path, variant: str | None = None) -> Found:
    """The diffusers folder that a source means: a folder, a run or a hub id. Raises UserError."""
    path = Path(source).expanduser()
    if (path / "model_index.json").is_file():
        return Found(path, 77)
    record = path / "resolved.json"
    if not record.is_file():
        return Found(locate(str(source), variant=variant), 77)
    export, model = path / "export", read_json(record).get("model", {})
    window = int(model.get("prompt_window", 77))
    if (export / LORA).is_file():
        base = locate(str(model["weights"]), model.get("revision"), model.get("variant"))
        return Found(base, window, export)
    if not (export / "model_index.json").is_file():
        raise UserError(
            f"drawing with the run {path}",
            "it has no export yet, which is written after its last step",
            "let it finish: start the same command again; or draw with the weights that it started from",
        )
    return Found(export, window)


def add_loras(pipeline: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Put adapters into a pipeline, each with its weight. Raises UserError for one that does not fit."""
    if loras:
        peft_library("drawing with a LoRA")
    for number, (path, _) in enumerate(loras):
        place = path / "export" if (path / "export" / LORA).is_file() else path
        file = place if place.is_file() else place / LORA
        asked = f"the LoRA {path}"
        if not file.is_file():
            raise UserError(
                asked, f"no such file, and no {LORA} there", "name a LoRA's file or a run's folder"
            )
        try:
            with quiet():
                pipeline.load_lora_weights(
                    file.parent, weight_name=file.name, adapter_name=f"lora{number}", local_files_only=True
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]  # the first line alone names no layer
            raise UserError(
                asked, f"it does not fit the model: {reason}", "take one of the same family"
            ) from error
    if loras:
        pipeline.set_adapters([f"lora{n}" for n in range(len(loras))], [weight for _, weight in loras])


def open_pipeline(
    folder: Path, device: torch.device | str, dtype: torch.dtype, prompt_window: int, variant: str | None
) -> tuple[Any, Family | None]:
    """The stock pipeline of a folder, and its family, which a prompt window beyond 77 needs."""
    index = read_json(folder / "model_index.json")
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:
        raise UserError(
            f"the pipeline in {folder}",
            f"a {index.get('_class_name')}, which diffusers {diffusers.__version__} does not have",
            "update diffusers, or name another folder",
        )
    taken = inspect.signature(kind.__init__).parameters
    extras = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    parts: dict[str, Any] = {name: value for name, value in extras.items() if name in taken}
    family = None
    if prompt_window != 77:
        model = config.Model.model_validate(
            {"weights": str(folder), "variant": variant, "prompt_window": prompt_window}
        )
        # The VAE of SDXL overflows in fp16; the stock pipeline knows, but not of parts that it is handed.
        vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        family = models.load(model, torch.device(device), dtype, vae_dtype)
        # Shared, so that the text encoders are not there twice.
        parts |= {"vae": family.vae, **family.parts()}
    try:
        with quiet():
            pipeline = kind.from_pretrained(
                folder,
                **parts,
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the pipeline in {folder}", reason, "download or export the folder again") from error
    return pipeline.to(device), family
