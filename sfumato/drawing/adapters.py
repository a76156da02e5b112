"""LoRAs, ControlNets and learned words: whether they fit a model, before it is loaded, and into it."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sfumato.drawing.sources import EMBEDDINGS, LORA, find_lora
from sfumato.errors import UserError
from sfumato.models.control import check_pair
from sfumato.models.folder import called, read_json
from sfumato.models.loading import frozen, peft_library, quiet

ATTENTION = re.compile(
    r"attn(\d)[._](?:processor[._])?to_([qkv])(?:_lora)?[._](?:lora_A|lora_down|lora\.down|down)\b"
)

MAGNITUDE = "lora_magnitude_vector"
"""What peft calls a DoRA's lengths."""


def shapes(file: Path, asked: str) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the header of a safetensors file. Raises UserError for a broken file."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        found = f"{file.name} cannot be read: {str(error).strip().splitlines()[0]}"
        raise UserError(asked, found, "download or export it again") from None


def check_files(folder: Path, variant: str | None) -> None:
    """Raise UserError for a safetensors file of a diffusers folder that is cut off or broken."""
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(part.glob("*.safetensors")):
            if file.name.endswith(ending) or re.search(r"-\d{5}-of-\d{5}", file.name):
                shapes(file, f"the weights {file}")


def denoiser_config(folder: Path) -> dict[str, Any]:
    """The config of a diffusers folder's U-Net; {} where it has none."""
    file = folder / "unet" / "config.json"
    return read_json(file) if file.is_file() else {}


def check_lora(source: Path, folder: Path) -> Path:
    """The file of a LoRA. Raises UserError if it is broken, or the model's layers have other widths."""
    file, asked = find_lora(source), f"the LoRA {source}"
    own = denoiser_config(folder)
    across, along = own.get("cross_attention_dim"), own.get("block_out_channels")
    tensors = shapes(file, asked)
    if not any("lora" in name or "alpha" in name for name in tensors):
        raise UserError(
            asked, f"no LoRA: its tensors are called {', '.join(list(tensors)[:2])}", "name a LoRA"
        )
    if any(name.endswith("dora_scale") for name in tensors):
        raise UserError(
            asked,
            "a DoRA under kohya's names; diffusers would leave out its DoRA part",
            f"name the run's folder, or {LORA} beside it",
        )
    for name, shape in tensors.items():
        match = ATTENTION.search(name)
        if match is None or len(shape) < 2 or "text_encoder" in name or "lora_te" in name:
            continue
        prompts = match[1] == "2" and match[2] in "kv"
        if prompts and isinstance(across, int) and shape[1] != across:
            raise UserError(
                asked,
                f"it was trained on a model whose prompts have the width {called(shape[1])}; "
                f"those of {folder} have {called(across)}",
                "take a LoRA and a model of one family",
            )
        if not prompts and along and shape[1] not in along:
            found = f"it changes layers of width {shape[1]}; those of {folder} have {along}"
            raise UserError(asked, found, "take a LoRA and a model of one family")
    return file


def add_loras(pipeline: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Put adapters into a pipeline, each with its weight. Raises UserError for one that does not fit."""
    if loras:
        peft_library("drawing with a LoRA")
    for number, (path, _) in enumerate(loras):
        file, asked = find_lora(path), f"the LoRA {path}"
        try:
            with quiet(), warnings.catch_warnings():
                # peft warns of the second adapter, which is meant.
                warnings.simplefilter("ignore", UserWarning)
                pipeline.load_lora_weights(
                    file.parent, weight_name=file.name, adapter_name=f"lora{number}", local_files_only=True
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]  # the first line alone names no layer
            raise UserError(
                asked, f"it does not fit the model: {reason}", "take one of the same family"
            ) from error
        check_lengths(pipeline, file, f"lora{number}", asked)
    if loras:
        pipeline.set_adapters([f"lora{n}" for n in range(len(loras))], [weight for _, weight in loras])


def check_lengths(pipeline: Any, file: Path, adapter: str, asked: str) -> None:
    """Raise UserError unless a pipeline holds all of a DoRA's lengths; those it misreads it drops unsaid."""
    with safe_open(file, "pt") as tensors:
        told = {name: tensors.get_tensor(name) for name in tensors.keys() if MAGNITUDE in name}
    nets = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    held = [p for net in nets for n, p in net.named_parameters() if f"{MAGNITUDE}.{adapter}." in n]
    there = {(p.dtype, *p.flatten().tolist()) for p in held}
    for name, lengths in told.items():
        forms = {(kind, *lengths.flatten().to(kind).tolist()) for kind in {p.dtype for p in held}}
        if not forms & there:
            found = f"diffusers leaves out {name}, a part of its DoRA"
            raise UserError(asked, found, "export it again, if a run of Sfumato made it")


def check_control(control: Path, folder: Path) -> None:
    """Raise UserError unless a ControlNet is whole, and was made for a denoiser like the model's."""
    check_pair(control, folder, denoiser_config(folder))
    for file in sorted(control.glob("*.safetensors")):
        shapes(file, f"the ControlNet {control}")


def load_control(control: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The ControlNet of a folder. Raises UserError for a broken or incomplete file."""
    return frozen(ControlNetModel, control, None, dtype, torch.device(device))


def add_words(pipeline: Any, export: Path, facts: dict[str, Any]) -> None:
    """Put the words that a textual inversion learned into a pipeline's tokenizers and encoders.

    The file holds {word: (n, d)}, or of SDXL "clip_l" and "clip_g", (n, d) of a word that sfumato.json names.
    Raises UserError if it is broken or does not fit.
    """
    file, asked = export / EMBEDDINGS, f"the learned words of {export}"
    shapes(file, asked)
    tensors = load_file(file)
    try:
        with quiet():
            if not {"clip_l", "clip_g"} & tensors.keys():
                for word, rows in tensors.items():
                    pipeline.load_textual_inversion({word: rows})
                return
            word = word_of(file, facts, asked)
            for name, part in (("clip_l", ""), ("clip_g", "_2")):
                pipeline.load_textual_inversion(
                    tensors[name],
                    token=word,
                    text_encoder=getattr(pipeline, f"text_encoder{part}"),
                    tokenizer=getattr(pipeline, f"tokenizer{part}"),
                )
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(asked, f"they do not fit the model: {reason}", "draw with its own base") from error


def word_of(file: Path, facts: dict[str, Any], asked: str) -> str:
    """The word that a file's vectors belong to: as sfumato.json says, or the file's own remarks."""
    with safe_open(file, "pt") as tensors:
        remarks = tensors.metadata() or {}
    word = facts.get("token") or facts.get("word") or remarks.get("token") or remarks.get("word")
    if not isinstance(word, str):
        raise UserError(asked, "no file says which word it is", 'write "token" into sfumato.json')
    return word
