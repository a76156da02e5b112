"""What tests of drawing begin with: pictures, and toy adapters that change what a toy model draws."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import DPTConfig, DPTForDepthEstimation

from sfumato.models.loading import quiet


def write_picture(file: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Random colours in broad squares."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(low).resize(size, Image.Resampling.NEAREST).save(file)
    return file


def write_mask(file: Path, size: tuple[int, int] = (32, 32)) -> Path:
    """The right half is drawn anew."""
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[:, size[0] // 2 :] = 255
    Image.fromarray(pixels).save(file)
    return file


def unet_of(base: Path) -> Any:
    """The U-Net of a diffusers folder."""
    with quiet():
        return UNet2DConditionModel.from_pretrained(base / "unet", low_cpu_mem_usage=False)


def write_control(folder: Path, base: Path) -> Path:
    """A ControlNet for a base, with random numbers where a new one has zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(unet_of(base), load_weights_from_unet=False)
        for name, parameter in net.named_parameters():
            if "controlnet_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder)
    return folder


def write_lora(file: Path, base: Path, seed: int = 0) -> Path:
    """A LoRA of rank 2 on the attention of a base's U-Net, under diffusers' names."""
    net = unet_of(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    tensors = {f"unet.{name}": value.contiguous() for name, value in get_peft_model_state_dict(net).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


def write_depth_model(folder: Path) -> Path:
    """A small random model that estimates depth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
        DPTForDepthEstimation(
            DPTConfig(
                **sizes,
                image_size=32,
                patch_size=8,
                backbone_out_indices=[0, 1, 2, 3],
                fusion_hidden_size=16,
                neck_hidden_sizes=[8, 8, 16, 16],
            )
        ).save_pretrained(folder)
    settings = {"image_processor_type": "DPTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
