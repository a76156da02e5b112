"""SDXL: a U-Net, two CLIP encoders, and the size and crop as conditions (arXiv:2307.01952)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sfumato.models import prompts as text
from sfumato.models.family import Family
from sfumato.models.folder import read_json
from sfumato.models.loading import quiet, tokenizer
from sfumato.models.sd import tiny_clip, tiny_unet, tiny_vae
from sfumato.models.texts import Condition, check_width
from sfumato.models.vocabulary import drop_copy, write_tokenizer


class SDXL(Family):
    """The condition is {"context": (B, 77, d1 + d2), "pooled": (B, p), "size_and_crop": (B, 6) fp32}.

    The context is the penultimate layer of both encoders side by side; pooled is the projected end token of
    the second encoder, of the first window where there are several.
    """

    pipeline = StableDiffusionXLPipeline
    control_pipeline = StableDiffusionXLControlNetPipeline
    needs = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    denoiser_class = UNet2DConditionModel
    text_classes: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    size_and_crop = True

    def check_widths(self, encoders: Mapping[str, Any]) -> None:
        context = sum(encoder.config.hidden_size for encoder in encoders.values())
        check_width(self.folder, "context", context, self.denoiser_config.get("cross_attention_dim"))
        sizes = 6 * (self.denoiser_config.get("addition_time_embed_dim") or 0)
        pooled = sizes + encoders["text_encoder_2"].config.projection_dim
        takes = self.denoiser_config.get("projection_class_embeddings_input_dim")
        check_width(self.folder, "pooled text with sizes", pooled, takes)

    def read(self, encoders: Mapping[str, Any], words: Condition) -> Condition:
        count = words["text_encoder"].shape[1]
        first, second = (
            text.answer(encoders[part], words[part], words.get(f"{part} mask")) for part in self.text_classes
        )
        layers = [answer.hidden_states[-2] for answer in (first, second)]
        hidden = torch.cat(layers, -1)  # (B * count, 77, d1 + d2)
        pooled = second.text_embeds.unflatten(0, (-1, count))[:, 0]  # (B, p)
        return {"context": text.join(hidden, count), "pooled": pooled}

    def unread(self, part: str) -> tuple[str, ...]:
        if part != "text_encoder":
            return ()
        last = read_json(self.folder / part / "config.json").get("num_hidden_layers", 12) - 1
        return f"encoder.layers.{last}.", "final_layer_norm."

    def scaled(self, raw: Tensor) -> Tensor:
        vae = self.vae_config
        if vae.latents_mean is None or vae.latents_std is None:
            return super().scaled(raw)
        mean, std = (raw.new_tensor(part).view(-1, 1, 1) for part in (vae.latents_mean, vae.latents_std))
        return (raw - mean) * vae.scaling_factor / std

    @property
    def null_is_zero(self) -> bool:
        return bool(self.facts.settings.get("force_zeros_for_empty_prompt", True))

    def inputs(self, dtype: torch.dtype, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        # Sizes stay fp32: bf16 would turn 257 pixels into 256 and 1155 into 1152.
        added = {"text_embeds": condition["pooled"].to(dtype), "time_ids": condition["size_and_crop"]}
        context = condition["context"].to(dtype)
        told = {"sample": x_t.to(dtype), "timestep": t, "encoder_hidden_states": context}
        return told | {"added_cond_kwargs": added}

    def parts(self) -> dict[str, Any]:
        flags = {"force_zeros_for_empty_prompt": self.null_is_zero, "add_watermarker": False}
        return super().parts() | flags

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
        for name in ("tokenizer", "tokenizer_2"):
            drop_copy(folder / name)


FAMILY = SDXL
