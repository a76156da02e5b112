"""Stable Diffusion 1.x and 2.x: a U-Net and one CLIP encoder (arXiv:2112.10752)."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.models import prompts as text
from sfumato.models.family import Condition, Family, check_width
from sfumato.models.loading import frozen, module_dtype, quiet, tokenizer
from sfumato.models.vocabulary import write_tokenizer


class StableDiffusion(Family):
    """The condition is {"context": (B, 77, d)}, or 154 or 231 tokens with longer prompt windows."""

    pipeline = StableDiffusionPipeline
    needs = ("tokenizer", "text_encoder")
    denoiser_class = UNet2DConditionModel
    encoders = ("tokenizer", "text_encoder")

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The folder's tokenizer."""
        return tokenizer(self.folder / "tokenizer")

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """The folder's text encoder."""
        encoder = frozen(
            CLIPTextModel, self.folder / "text_encoder", self.model.variant, self.dtype, self.device
        )
        width = encoder.config.hidden_size
        check_width(self.folder, "context", width, self.denoiser_config.get("cross_attention_dim"))
        return encoder

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        count = text.windows(self.model.prompt_window)
        hidden = text.encode(self.tokenizer, self.text_encoder, prompts, count)[0]  # (B * count, 77, d)
        return {"context": text.join(hidden, count)}

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = module_dtype(net)
        return net(x_t.to(dtype), t, condition["context"].to(dtype), return_dict=False)[0]  # (B, c, h, w)

    def parts(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }

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
        "time_embedding_dim": 64,
        "use_linear_projection": True,
    }


FAMILY = StableDiffusion
