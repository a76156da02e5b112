"""A ControlNet's folder: where it lies, and whether it goes with a model."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import UserError
from sfumato.models.folder import STEMS, called, listing, read_json, safetensors
from sfumato.models.hub import download, is_hub_id

PART = "controlnet"
"""What diffusers calls it in a pipeline's folder."""
KIND = "ControlNetModel"
SHARED = (
    "cross_attention_dim",
    "block_out_channels",
    "addition_embed_type",
    "in_channels",
    "layers_per_block",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""Settings on which a ControlNet and its denoiser must agree."""


def is_control(folder: Path) -> bool:
    """Whether a folder is a ControlNet's."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("_class_name") == KIND


def find(source: str | Path, asked: str) -> Path:
    """The folder of a ControlNet that a source means: itself, of a run, a pipeline or a hub id.

    Raises UserError, which says what was `asked`, if there is none with weights.
    """
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(str(source)):
        path = download(str(source))
    elif not path.is_dir():
        found = "no such folder, and not of the form of a hub id, owner/name"
        raise UserError(asked, found, "name a ControlNet's folder, a run of that kind, or a hub id")
    for folder in (path, path / "export", path / PART):
        if is_control(folder):
            weights_in(folder)
            return folder
    do = f"name a folder that a {KIND} was saved to, or a run of that kind that has its export"
    raise UserError(asked, f"no config.json of a {KIND}; it holds {listing(path)}", do)


def weights_in(folder: Path) -> list[Path]:
    """The safetensors of a ControlNet's folder. Raises UserError if they are missing."""
    return safetensors(folder, STEMS["diffusers"], None)


def check_pair(control: Path, model: Path, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNet's folder. Raises UserError if it does not go with a model's denoiser.

    denoiser: the config of the model's U-Net; empty where it has none.
    """
    from diffusers import ControlNetModel, UNet2DConditionModel  # seconds, for those who only look for one

    asked, do = f"the ControlNet {control} with the model {model}", "take two that belong together"
    if not denoiser:
        raise UserError(asked, "the model has no U-Net", "take a model of Stable Diffusion or SDXL")
    said = read_json(control / "config.json")
    theirs, ours = complete(ControlNetModel, said), complete(UNet2DConditionModel, denoiser)
    for key in SHARED:
        if theirs[key] != ours[key]:
            say = called if key == "cross_attention_dim" else str
            found = f"it was made for {key} {say(theirs[key])}, the model has {say(ours[key])}"
            raise UserError(asked, found, do)
    if theirs["conditioning_channels"] != 3:
        found = f"it reads images of {theirs['conditioning_channels']} channels"
        raise UserError(asked, found, "take one that reads pictures, of 3 channels")
    return said


def complete(kind: type, said: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its class's defaults, lists for tuples as JSON has them."""
    taken = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    whole = {name: said.get(name, parameter.default) for name, parameter in taken.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in whole.items()}
