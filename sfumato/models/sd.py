"""Stable Diffusion 1.x and 2.x: a U-Net and one CLIP encoder (arXiv:2112.10752)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sfumato.models import prompts as text
from sfumato.models.family import Family
from sfumato.models.loading import quiet, tokenizer
from sfumato.models.texts import Condition, check_width
from sfumato.models.vocabulary import drop_copy, write_tokenizer


class StableDiffusion(Family):
    """The condition is {"context": (B, 77, d)}, or 154 or 231 tokens with longer prompt windows."""

    pipeline = StableDiffusionPipeline
    control_pipeline = StableDiffusionControlNetPipeline
    needs = ("tokenizer", "text_encoder")
    denoiser_class = UNet2DConditionModel
    text_classes: ClassVar = {"text_encoder": CLIPTextModel}

    def check_widths(self, encoders: Mapping[str, Any]) -> None:
        width = encoders["text_encoder"].config.hidden_size
        check_width(self.folder, "context", width, self.denoiser_config.get("cross_attention_dim"))

    def read(self, encoders: Mapping[str, Any], words: Condition) -> Condition:
        ids, mask = words["text_encoder"], words.get("text_encoder mask")
        hidden = text.answer(encoders["text_encoder"], ids, mask)[0]  # (B * count, 77, d)
        return {"context": text.join(hidden, ids.shape[1])}

    def inputs(self, dtype: torch.dtype, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        context = condition["context"].to(dtype)
        return {"sample": x_t.to(dtype), "timestep": t, "encoder_hidden_states": context}

    def parts(self) -> dict[str, Any]:
        silent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return super().parts() | silent

    def prompt_inputs(self, condition: Condition, null: Condition) -> dict[str, Tensor]:
        return {"prompt_embeds": condition["context"], "negative_prompt_embeds": null["context"]}

    @staticmethod
    def tiny(folder: Path, seed: int = 0) -> None:
        write_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = StableDiffusionPipeline(
                vae=tiny_vae(),
                text_encoder=CLIPTextModel(tiny_clip()),
                tokenizer=tokenizer(folder / "tokenizer"),
                unet=UNet2DConditionModel(**tiny_unet(), cross_attention_dim=32),
                scheduler=DDIMScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    clip_sample=False,
                    set_alpha_to_one=False,
                    steps_offset=1,
                ),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipeline.save_pretrained(folder)
        drop_copy(folder / "tokenizer")


def tiny_vae(**settings: Any) -> AutoencoderKL:
    """An 8x VAE of 4 latent channels with toy widths."""
    widths = (8, 8, 16, 16)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        **settings,
    )


def tiny_clip(**settings: Any) -> CLIPTextConfig:
    """The config of a CLIP text encoder of width 32 with the real vocabulary."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return CLIPTextConfig(
        **(sizes | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407} | settings)
    )


def tiny_unet() -> dict[str, Any]:
    """Settings of a U-Net of widths 32 and 64, for pictures of 64 pixels."""
    return {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "sample_size": 8,
        "use_linear_projection": True,
    }


FAMILY = StableDiffusion
