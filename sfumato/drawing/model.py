"""A model to draw with: found and checked without its weights, then opened with all that belongs to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.drawing import adapters, pipelines, sources
from sfumato.drawing.options import VAE
from sfumato.drawing.sources import Found
from sfumato.errors import UserError
from sfumato.models import compiled
from sfumato.models.family import Family
from sfumato.models.loading import DTYPES, peft_library


@dataclass(frozen=True)
class Ready:
    """A model whose files were checked."""

    name: str
    """What the user calls it."""
    found: Found
    window: int
    """Tokens of a prompt."""
    emphasis: bool
    """Whether brackets in prompts are weights."""
    loras: tuple[tuple[Path, float], ...]
    control: Path | None
    """A ControlNet's folder."""
    dtype: str
    """One of DTYPES."""
    device: torch.device
    offload: bool
    vae: str = VAE[0]
    """One of VAE."""
    compile: bool = False
    """Whether the denoiser's blocks are compiled."""

    def settings(self) -> dict[str, Any]:
        """What the drawings' facts tell of it."""
        facts: dict[str, Any] = {"dtype": self.dtype, "window": self.window}
        if self.emphasis:
            facts["emphasis"] = True
        if self.loras:
            facts["loras"] = ", ".join(f"{path}={weight:g}" for path, weight in self.loras)
        if self.control is not None:
            facts["control"] = str(self.control)
        if self.vae != VAE[0]:
            facts["vae"] = self.vae
        if self.compile:
            facts["compile"] = True
        if self.offload:
            facts["offload"] = True
        return facts


@dataclass(frozen=True)
class Opened:
    """A model in memory."""

    pipeline: Any
    family: Family | None
    """Where prompts are read by the family and not by the pipeline."""
    control: Any
    """A ControlNetModel."""


def find(
    source: str | Path,
    *,
    roles: frozenset[str] = frozenset(),
    window: int | None = None,
    emphasis: bool = False,
    loras: Sequence[tuple[Path, float]] = (),
    control: str | Path | None = None,
    dtype: str = "fp32",
    variant: str | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    vae: str = VAE[0],
    compile: bool = False,
) -> Ready:
    """The model that a source means, after all its files and those of its adapters were checked.

    roles: the kinds of pictures that it will draw from. window None: as the model was trained, or 77.
    Raises UserError for what is not there, is broken, or does not belong together; loads no weights.
    """
    device = torch.device(device)
    if offload:
        pipelines.check_offload(device)
    if compile:
        compiled.check_here("--compile", device.type, dtype)
    found = sources.find_model(source, variant)
    if found.kind == "lora" and found.adapter is not None:
        loras = ((found.adapter, 1.0), *loras)
    if found.kind == "controlnet":
        if control is not None:
            asked = f"--control {control} with the model {source}"
            raise UserError(asked, "the model is a ControlNet's run itself", "leave --control out")
        control = found.adapter
    if loras:
        peft_library("drawing with a LoRA")
    for path, _ in loras:
        adapters.check_lora(path, found.folder)
    place = sources.find_control(control) if control is not None else None
    check_roles(found.folder, roles, str(source), place)
    if place is not None:
        adapters.check_control(place, found.folder)
    adapters.check_files(found.folder, found.variant)
    chosen = window or found.prompt_window
    how = dtype, device, offload, vae, compile
    return Ready(str(source), found, chosen, emphasis, tuple(loras), place, *how)


def check_roles(folder: Path, roles: frozenset[str], source: str, control: Path | None) -> None:
    """Raise UserError unless a model can draw from these kinds of pictures."""
    own = "ControlNet" in pipelines.pipeline_class(folder).__name__
    if (control is not None or own) and "condition" not in roles:
        asked = f"drawing with the ControlNet {control or source}"
        raise UserError(asked, "no condition to show it", "give one: --condition IMAGE, or --depth IMAGE")
    if control is None and not own and "condition" in roles:
        raise UserError(
            f"drawing with {source} from a condition",
            "no ControlNet that reads it",
            "name one with --control",
        )
    pipelines.class_for(pipelines.pipeline_class(folder), roles)
    if adapters.denoiser_config(folder).get("in_channels") == 9 and "mask" not in roles:
        found = "it is a model for inpainting: its denoiser takes 9 channels"
        raise UserError(f"drawing with {source}", found, "give it --image and --mask")


def open_model(ready: Ready) -> Opened:
    """Load a model and put in what belongs to it. Raises UserError."""
    found, dtype = ready.found, DTYPES[ready.dtype]
    pipeline, family = pipelines.open_pipeline(
        found.folder,
        ready.device,
        dtype,
        ready.window,
        found.variant,
        with_family=ready.emphasis,
        offload=ready.offload,
    )
    if found.kind == "textual_inversion" and found.adapter is not None:
        adapters.add_words(pipeline, found.adapter, found.facts)
    adapters.add_loras(pipeline, ready.loras)
    control = pipeline.components.get("controlnet")
    if ready.control is not None:
        control = adapters.load_control(ready.control, dtype, "cpu" if ready.offload else ready.device)
    if ready.offload:
        # The ControlNet computes at every step, and its pipeline's order of parts does not name it.
        _ = control.to(ready.device) if control is not None else None
        pipeline.enable_model_cpu_offload(device=ready.device)
    settle(ready, pipeline, control)
    return Opened(pipeline, family, control)


def settle(ready: Ready, pipeline: Any, control: Any) -> None:
    """Let a pipeline and its ControlNet compute as it is asked."""
    if ready.vae == "sliced":
        pipeline.vae.enable_slicing()
    elif ready.vae == "tiled":
        pipeline.vae.enable_tiling()
    denoiser = pipeline.components.get("unet") or pipeline.components.get("transformer")
    for net in (denoiser, control) if ready.compile else ():
        if net is not None:
            compiled.compile_blocks(net, several=False, learning=False)
