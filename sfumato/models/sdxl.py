"""SDXL: a U-Net, two CLIP encoders, and the size and crop as conditions (arXiv:2307.01952)."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.models import prompts as text
from sfumato.models.family import Condition, Family, check_width
from sfumato.models.loading import frozen, module_dtype, quiet, tokenizer
from sfumato.models.sd import tiny_clip, tiny_unet, tiny_vae
from sfumato.models.vocabulary import write_tokenizer


class SDXL(Family):
    """The condition is {"context": (B, 77, d1 + d2), "pooled": (B, p), "size_and_crop": (B, 6) fp32}.

    The context is the penultimate layer of both encoders side by side; pooled is the projected end token of
    the second encoder, of the first window where there are several.
    """

    pipeline = StableDiffusionXLPipeline
    needs = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    denoiser_class = UNet2DConditionModel
    encoders = ("tokenizers", "text_encoders")
    size_and_crop = True

    @cached_property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """The folder's two tokenizers."""
        return [tokenizer(self.folder / part) for part in ("tokenizer", "tokenizer_2")]

    @cached_property
    def text_encoders(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        """The folder's two text encoders."""
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        encoders = [
            frozen(kind, self.folder / part, self.model.variant, self.dtype, self.device)
            for part, kind in kinds.items()
        ]
        context = sum(encoder.config.hidden_size for encoder in encoders)
        check_width(self.folder, "context", context, self.denoiser_config.get("cross_attention_dim"))
        sizes = 6 * (self.denoiser_config.get("addition_time_embed_dim") or 0)
        pooled = sizes + encoders[1].config.projection_dim
        takes = self.denoiser_config.get("projection_class_embeddings_input_dim")
        check_width(self.folder, "pooled text with sizes", pooled, takes)
        return encoders

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        count = text.windows(self.model.prompt_window)
        first, second = (
            text.encode(words, encoder, prompts, count)
            for words, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        )
        layers = [answer.hidden_states[-2] for answer in (first, second)]
        hidden = torch.cat(layers, -1)  # (B * count, 77, d1 + d2)
        pooled = second.text_embeds.unflatten(0, (-1, count))[:, 0]  # (B, p)
        return {"context": text.join(hidden, count), "pooled": pooled}

    def scaled(self, raw: Tensor) -> Tensor:
        vae = self.vae_config
        if vae.latents_mean is None or vae.latents_std is None:
            return super().scaled(raw)
        mean, std = (raw.new_tensor(part).view(-1, 1, 1) for part in (vae.latents_mean, vae.latents_std))
        return (raw - mean) * vae.scaling_factor / std

    def make_null(self) -> Condition:
        empty = super().make_null()
        if self.facts.settings.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(rows) for name, rows in empty.items()}
        return empty

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = module_dtype(net)
        # Sizes stay fp32: bf16 would turn 257 pixels into 256 and 1155 into 1152.
        added = {"text_embeds": condition["pooled"].to(dtype), "time_ids": condition["size_and_crop"]}
        context = condition["context"].to(dtype)
        return net(x_t.to(dtype), t, context, added_cond_kwargs=added, return_dict=False)[0]  # (B, c, h, w)

    def parts(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizers[0],
            "tokenizer_2": self.tokenizers[1],
            "text_encoder": self.text_encoders[0],
            "text_encoder_2": self.text_encoders[1],
            "force_zeros_for_empty_prompt": self.facts.settings.get("force_zeros_for_empty_prompt", True),
            "add_watermarker": False,
        }

    def prompt_inputs(self, condition: Condition, null: Condition) -> dict[str, Tensor]:
        return {
            "prompt_embeds": condition["context"],
            "pooled_prompt_embeds": condition["pooled"],
            "negative_prompt_embeds": null["context"],
            "negative_pooled_prompt_embeds": null["pooled"],
        }

    @staticmethod
    def tiny(folder: Path, seed: int = 0) -> None:
        write_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
        write_tokenizer(folder / "tokenizer_2", pad="!")
        sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 40}
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = StableDiffusionXLPipeline(
                vae=tiny_vae(scaling_factor=0.13025),
                text_encoder=CLIPTextModel(tiny_clip()),
                text_encoder_2=CLIPTextModelWithProjection(
                    tiny_clip(num_hidden_layers=3, projection_dim=40, hidden_act="gelu")
                ),
                tokenizer=tokenizer(folder / "tokenizer"),
                tokenizer_2=tokenizer(folder / "tokenizer_2"),
                unet=UNet2DConditionModel(
                    **tiny_unet(), cross_attention_dim=32 + 32, addition_embed_type="text_time", **sizes
                ),
                scheduler=EulerDiscreteScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    steps_offset=1,
                    timestep_spacing="leading",
                ),
                add_watermarker=False,
            )
            pipeline.save_pretrained(folder)


FAMILY = SDXL
