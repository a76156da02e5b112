"""What a diffusers folder says about itself in its JSON files. Imports no torch.

Everything that can be wrong with the weights is found here, before a model is loaded.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import config
from sfumato.errors import UserError
from sfumato.models.hub import download, is_hub_id
from sfumato.models.registry import families, which_family

__all__ = [
    "Facts",
    "examine",
    "families",
    "frozen_files",
    "learned",
    "locate",
    "read_facts",
    "read_json",
    "weight_files",
]

Components = dict[str, tuple[str, str]]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""Well-known models by the width of their prompts' encoding, for messages."""


@dataclass(frozen=True)
class Facts:
    """What the folder's JSON files say."""

    folder: Path
    vae_folder: Path
    """The folder whose config.json is the VAE's: a part of `folder` unless `model.vae` names another."""
    pipeline: str
    """The pipeline's class name."""
    family: str
    needs: tuple[str, ...]
    """The folders that the family reads besides the denoiser's, the VAE's and the scheduler's."""
    settings: dict[str, Any]
    """The pipeline's own flags, such as force_zeros_for_empty_prompt."""
    components: Components
    """Part -> (library, class name), of the parts that are present."""
    denoiser: dict[str, Any]
    """The denoiser's config."""
    scheduler: dict[str, Any]
    """The scheduler's config: betas and prediction_type."""
    latent_channels: int
    vae_factor: int
    """Pixels per latent along one side."""
    granularity: int
    """The side of a picture is a multiple of this many pixels."""

    @property
    def prediction_type(self) -> str:
        """The scheduler's "epsilon", "v_prediction" or "sample"."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    def check_resolution(self, side: int, setting: str = "data.resolution") -> None:
        """Raise UserError unless VAE and denoiser can take a side of so many pixels, which `setting` says."""
        if side % self.granularity:
            below = side // self.granularity * self.granularity
            near = [str(side) for side in (below, below + self.granularity) if side]
            raise UserError(
                f"{setting} = {side}",
                f"{self.folder} works on multiples of {self.granularity} pixels (its VAE divides the side by "
                f"{self.vae_factor}, its denoiser by {self.granularity // self.vae_factor})",
                f"choose {' or '.join(near)}",
            )


def locate(weights: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a local path, or of a hub id after a download of only what training reads.

    Raises UserError for what is neither, for a file, and when the hub cannot give it.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision = {revision!r}",
                f"{weights} is a local folder, which has no revisions",
                "remove it",
            )
        return path
    if path.is_file():
        raise UserError(
            f"the weights {weights}",
            "a file; Sfumato reads diffusers folders",
            "convert it once: diffusers' from_single_file, then save_pretrained to a folder",
        )
    if is_hub_id(weights):
        return download(weights, revision, variant)
    raise UserError(
        f"the weights {weights}",
        f"no such folder (seen from {Path.cwd()}), and not of the form of a hub id, owner/name",
        "name a folder that holds model_index.json, or a hub id",
    )


def examine(model: config.Model) -> Facts:
    """Find the weights, download them if need be, and check everything that their JSON files tell.

    Raises UserError for every mistake described in this module.
    """
    folder = locate(model.weights, model.revision, model.variant)
    vae_folder = folder / "vae" if model.vae is None else locate(model.vae)
    if model.vae is not None and (vae_folder / "model_index.json").is_file():
        vae_folder = vae_folder / "vae"
    facts = read_facts(folder, vae_folder, model.family)
    check_parts(facts, model)
    return facts


def read_facts(folder: Path, vae_folder: Path | None = None, family: str | None = None) -> Facts:
    """The facts of a folder; UserError if a JSON file is missing or broken, or no family is made for it."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"the weights {folder}",
            f"no model_index.json in it; it holds {listing(folder)}",
            "name a folder that a diffusers pipeline was saved to",
        )
    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    components = {
        part: (value[0], value[1])
        for part, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    name, needs = which_family(folder, pipeline, family)
    vae_folder = vae_folder or folder / "vae"
    denoiser, vae = (
        read_json(folder / learned(components) / "config.json"),
        read_json(vae_folder / "config.json"),
    )
    check_channels(folder, denoiser, vae_folder, vae)
    factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
    return Facts(
        folder=folder,
        vae_folder=vae_folder,
        pipeline=pipeline,
        family=name,
        needs=needs,
        settings={
            key: value for key, value in index.items() if not key.startswith("_") and key not in components
        },
        components=components,
        denoiser=denoiser,
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        latent_channels=vae.get("latent_channels", 4),
        vae_factor=factor,
        granularity=factor * 2 ** (len(denoiser.get("block_out_channels", [1])) - 1),
    )


def check_channels(folder: Path, denoiser: dict[str, Any], vae_folder: Path, vae: dict[str, Any]) -> None:
    """Raise UserError unless the denoiser takes what the VAE gives."""
    asked = f"training {folder} with the VAE {vae_folder}"
    if (kind := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise UserError(asked, f"the VAE is an {kind}", "use an AutoencoderKL")
    gives = vae.get("latent_channels", 4)
    takes = denoiser.get("in_channels", gives)
    if takes != gives:
        hint = "; 9 channels are an inpainting model, which no family trains" if takes == 9 else ""
        found = f"the denoiser takes {takes} channels and the VAE gives {gives}{hint}"
        raise UserError(asked, found, "choose weights and a VAE that belong together")


def check_parts(facts: Facts, model: config.Model) -> None:
    """Raise UserError for a part that is not there, and for a scheduler that we cannot train with."""
    if facts.prediction_type not in PREDICTIONS:
        raise UserError(
            f"training {facts.folder}",
            f"its scheduler predicts {facts.prediction_type!r}",
            f"use weights whose scheduler predicts one of {', '.join(PREDICTIONS)}",
        )
    for part in (learned(facts.components), "vae", "scheduler", *facts.needs):
        if part == "vae" and model.vae is not None:
            continue
        if part not in facts.components or not (facts.folder / part).is_dir():
            raise UserError(
                f"the weights {facts.folder}",
                f"no {part}, which the family {facts.family} reads; the folder holds {listing(facts.folder)}",
                "download or export the whole pipeline",
            )
        if part.startswith("text_encoder"):
            weight_files(facts.folder, part, model.variant)
        if part.startswith("tokenizer"):
            check_words(facts.folder / part)
    if not model.from_scratch:
        weight_files(facts.folder, learned(facts.components), model.variant)
    safetensors(facts.vae_folder, STEMS["diffusers"], model.variant if model.vae is None else None)


def frozen_files(facts: Facts, model: config.Model, learns: Collection[str]) -> list[Path]:
    """The configs and weights of the denoiser, the VAE and the text encoders that are read and not trained.

    learns: the parts that do.
    """
    texts = [part for part in facts.needs if part.startswith("text_encoder")]
    parts = [part for part in (learned(facts.components), *texts) if part not in learns]
    files = [facts.vae_folder / "config.json", *(facts.folder / part / "config.json" for part in parts)]
    files += safetensors(facts.vae_folder, STEMS["diffusers"], model.variant if model.vae is None else None)
    return files + [file for part in parts for file in weight_files(facts.folder, part, model.variant)]


def check_words(tokenizer: Path) -> None:
    """Raise UserError unless a tokenizer's folder holds its words; transformers would make up three."""
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((tokenizer / name).is_file() for name in names) for names in kinds):
        found = f"neither tokenizer.json nor vocab.json with merges.txt; it holds {listing(tokenizer)}"
        raise UserError(f"the tokenizer in {tokenizer}", found, "download or export the folder again")


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component, one or all shards in the index's order.

    Raises UserError when they are missing, of another variant, or only there as pickles.
    """
    stem = STEMS["transformers" if component.startswith("text_encoder") else "diffusers"]
    return safetensors(folder / component, stem, variant)


def safetensors(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """`stem`[.variant].safetensors of a folder, or the shards of its index."""
    dotted = f".{variant}" if variant else ""
    if (single := folder / f"{stem}{dotted}.safetensors").is_file():
        return [single]
    index = folder / f"{stem}.safetensors.index{dotted}.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if names and not absent:
            return [folder / name for name in names]
        raise UserError(
            f"the weights {index}",
            f"it names files that are not there: {', '.join(absent)}",
            "download them again",
        )
    found = listing(folder)
    if variant is None and any(folder.glob(f"{stem}.*.safetensors")):
        do = "set model.variant to the word before .safetensors"
    elif variant and (folder / f"{stem}.safetensors").is_file():
        do = "remove model.variant"
    elif any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        do = "convert the pickled weights, which can run code, to safetensors: load and save_pretrained once"
    else:
        do = "download or export the folder again"
    raise UserError(f"the weights {single}", f"no such file; {folder} holds {found}", do)


def called(width: Any) -> str:
    """A width of prompts' encoding, with the models that have it."""
    return f"{width}" + (f" ({WIDTHS[width]})" if width in WIDTHS else "")


def learned(components: Components) -> str:
    """The part that learns: "unet" or "transformer"."""
    return "transformer" if "transformer" in components else "unet"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fault = f"no such file; {path.parent} holds {listing(path.parent)}"
        raise UserError(
            f"the weights' file {path}",
            f"it cannot be read: {error}" if path.exists() else fault,
            "download or export the folder again",
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"the weights' file {path}", f"it holds a {type(value).__name__}, not a table", "replace it"
        )
    return value


def listing(folder: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return (
        ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        if names
        else "nothing"
    )
