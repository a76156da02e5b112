"""The order of events of diffusers' training examples, as short loops: what our step is measured beside.

Written after examples/text_to_image and examples/controlnet of diffusers 0.42, for one process: full training
with fp32 weights under autocast, LoRA and ControlNet beside weights in half precision; noise and timesteps
drawn on the device; the loss read by the host in every step; gradients clipped, AdamW for each tensor's list.
What differs from them is said in docs/benchmarks.md.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.methods import Method
from sfumato.models.folder import Facts
from sfumato.models.loading import DTYPES, held_parts, peft_library, quiet
from sfumato.models.unscaled import scale

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
LR, CLIP = 1e-5, 1.0


class Example:
    """One process of such a script, for the work of a run of ours: its model, method, sizes and caches.

    parts: our method's, whose frozen VAE and text encoders it shares. `step` is one optimizer step.
    """

    def __init__(self, config: Config, facts: Facts, method: Method, device: torch.device) -> None:
        self.config, self.device, self.family = config, device, method.family
        self.low = DTYPES["bf16" if config.engine.precision == "fp32" else config.engine.precision]
        self.kind = config.method.kind
        assert self.kind in ("full", "lora", "controlnet"), f"diffusers' examples have no {self.kind}"
        with quiet(), device:
            self.unet: Any = self.family.build_denoiser()
            parts = method.build() if self.kind == "controlnet" else None
            self.control: Any = None if parts is None else parts["controlnet"]
        if self.control is not None:
            scale(self.control)
        self.adapt()
        learning: Any = self.control if self.control is not None else self.unet
        if config.engine.gradient_checkpointing:
            learning.enable_gradient_checkpointing()
        self.trained = [p for p in learning.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=1e-2)
        told = {**facts.scheduler, "clip_sample": False}
        self.noising: Any = DDPMScheduler.from_config(told)
        if device.type != "meta":
            self.fill()

    def adapt(self) -> None:
        """What learns stays in fp32, the rest is in half precision."""
        if self.kind == "full":
            self.unet.train()
            return
        with quiet():
            self.unet.requires_grad_(False).to(self.low)
        if self.control is not None:
            self.control.train()
            return
        peft = peft_library("diffusers' LoRA example")
        rank = getattr(self.config.method, "rank", 4)
        with self.device:
            rule = peft.LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS
            )
            self.unet.add_adapter(rule)
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def fill(self) -> None:
        """Random weights as small as ours."""
        for net in (self.unet, self.control):
            for parameter in net.parameters() if net is not None else ():
                parameter.data.normal_(0, 0.02)

    def step(self, batch: Batch) -> float:
        """Forward, backward, clipping and AdamW on a batch of the host; its loss."""
        latents, condition = self.encoded(batch)
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=self.device)
        noisy = self.noising.add_noise(latents, noise, times).to(self.low)
        answer = self.ask(noisy, times, condition, batch)
        v = self.noising.config.prediction_type == "v_prediction"
        wanted = self.noising.get_velocity(latents, noise, times) if v else noise
        loss = F.mse_loss(answer.float(), wanted.float(), reduction="mean")
        told = 0.0
        if self.control is None:  # the loss of all processes, gathered for the log
            told = loss.repeat(len(latents)).mean().item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        told = loss.detach().item()  # for the progress bar
        return told

    def encoded(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and text, from the cache or from the VAE and the text encoders."""
        family = self.family
        images, captions = held_parts(self.config)
        with torch.no_grad():
            if images:
                assert batch.pixels is not None, "a batch without pixels"
                pixels = batch.pixels.to(self.device).to(family.vae.dtype)
                drawn = family.vae.encode(pixels).latent_dist.sample()
                latents = (drawn * family.vae.config.scaling_factor).to(self.low)
            else:  # the scripts keep the latents that were drawn once
                assert batch.moments is not None, "a batch without moments"
                latents = batch.moments[:, : family.latent_channels].to(self.device)
            if captions:
                words = {name: ids.to(self.device) for name, ids in family.words(batch.captions).items()}
                text: Mapping[str, Tensor] = family.read(family.text_encoders, words)
            else:
                assert batch.text is not None, "a batch without text"
                text = {name: rows.to(self.device) for name, rows in batch.text.items()}
        return latents, {name: rows.to(self.low) for name, rows in text.items()}

    def ask(self, noisy: Tensor, times: Tensor, text: dict[str, Tensor], batch: Batch) -> Tensor:
        """The denoiser's answer under autocast, in fp32 as Accelerate gives it."""
        told: dict[str, Any] = {"encoder_hidden_states": text["context"], "return_dict": False}
        if "pooled" in text:
            rows = [[*row] for row in batch.size_and_crop.tolist()]
            sizes = [torch.tensor([row], device=self.device, dtype=self.low) for row in rows]
            told["added_cond_kwargs"] = {"time_ids": torch.cat(sizes), "text_embeds": text["pooled"]}
        with torch.autocast(self.device.type, self.low):
            if self.control is not None:
                assert batch.hint is not None, "a ControlNet's batch without second images"
                shown = batch.hint.to(self.device).to(self.low)
                down, middle = self.control(noisy, times, controlnet_cond=shown, **told)
                down, middle = [part.float() for part in down], middle.float()
                told["down_block_additional_residuals"] = [part.to(self.low) for part in down]
                told["mid_block_additional_residual"] = middle.to(self.low)
            answer: Tensor = self.unet(noisy, times, **told)[0]
        return answer.float()
