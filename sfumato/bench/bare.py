"""A bare training loop to measure ours against: PyTorch, diffusers' and peft's classes, nothing around them.

    python -m sfumato.bench.bare MODEL PICTURES STEPS BATCH SIZE FILE [full|lora|controlnet]

Every picture and caption is encoded once before the first step and stays in memory, so a step is only: draw
noise, run the model, backward, clip, AdamW. One line of FILE a step: {"step", "seconds" (since the loop
began), "loss"}. A folder with a second text encoder is SDXL's.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LR = 1e-5
RANK = 4
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
"""A LoRA's rank and layers: those of diffusers' examples."""
HINT = "conditioning_image_file_name"
"""The key of a picture's second image in metadata.jsonl, as `datasets` knows it."""


class Readers:
    """A folder's text encoders: one, or SDXL's two."""

    def __init__(self, model: Path) -> None:
        fp32 = {"dtype": torch.float32}
        names = ["tokenizer", "tokenizer_2"] if (model / "text_encoder_2").is_dir() else ["tokenizer"]
        self.tokenizers = [CLIPTokenizer.from_pretrained(model / name) for name in names]
        self.encoders: list[Any] = [CLIPTextModel.from_pretrained(model / "text_encoder", **fp32)]
        if len(names) > 1:
            second = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2", **fp32)
            self.encoders.append(second)

    def read(self, caption: str) -> dict[str, Tensor]:
        """A caption's "context" (1, 77, d), and with two encoders "pooled" (1, p)."""
        rule = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = [tokenizer(caption, **rule).input_ids for tokenizer in self.tokenizers]
        if len(ids) == 1:
            return {"context": self.encoders[0](ids[0])[0]}
        answers = [
            encoder(one, output_hidden_states=True) for encoder, one in zip(self.encoders, ids, strict=True)
        ]
        context = torch.cat([answer.hidden_states[-2] for answer in answers], -1)
        return {"context": context, "pooled": answers[1].text_embeds}


@torch.no_grad()
def encoded(model: Path, pictures: Path, size: int) -> dict[str, Tensor]:
    """All that steps read, a row for each picture.

    "latents" (N, 8, size / f, size / f), the scaled mean and standard deviation of what the VAE gives;
    "context" and "pooled" as `Readers` give them; with those "sizes" (N, 6); and "hint" (N, 3, size, size) in
    [0, 1] where pictures have second images.
    """
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    readers, scale = Readers(model), vae.config.scaling_factor
    rows: list[dict[str, Tensor]] = []
    for line in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        mean, logvar = vae.encode(
            pixels(pictures / told["file_name"], size) * 2 - 1
        ).latent_dist.parameters.chunk(2, 1)
        row = {"latents": torch.cat([mean, (logvar.clamp(-30, 20) / 2).exp()], 1) * scale}
        row |= readers.read(told["text"])
        if "pooled" in row:
            row["sizes"] = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
        if HINT in told:
            row["hint"] = pixels(pictures / told[HINT], size)
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def pixels(file: Path, size: int) -> Tensor:
    """A picture, (1, 3, size, size) in [0, 1]."""
    picture = Image.open(file).convert("RGB").resize((size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


def learner(model: Path, task: str) -> tuple[Any, Any, list[nn.Parameter]]:
    """The U-Net of a folder, the ControlNet beside it or None, and what learns."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).train()
    if task == "full":
        return unet, None, [*unet.parameters()]
    unet.requires_grad_(False)
    if task == "controlnet":
        control = ControlNetModel.from_unet(unet).train()
        return unet, control, [*control.parameters()]
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*TARGETS])
    )
    return unet, None, [p for p in unet.parameters() if p.requires_grad]


def answer(unet: Any, control: Any, noisy: Tensor, times: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """What the model says of noisy latents."""
    told: dict[str, Any] = {"encoder_hidden_states": rows["context"]}
    if "pooled" in rows:
        told["added_cond_kwargs"] = {"text_embeds": rows["pooled"], "time_ids": rows["sizes"]}
    if control is not None:
        down, middle = control(noisy, times, controlnet_cond=rows["hint"], return_dict=False, **told)
        told |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    found: Tensor = unet(noisy, times, **told).sample
    return found


def main(
    model: Path, pictures: Path, steps: int, batch: int, size: int, file: Path, task: str = "full"
) -> None:
    """Train on a diffusers folder for some steps."""
    torch.manual_seed(0)
    data = encoded(model, pictures, size)
    unet, control, learns = learner(model, task)
    noising = DDPMScheduler.from_pretrained(model / "scheduler")
    optimizer = torch.optim.AdamW(learns, lr=LR, fused=True)
    began = time.perf_counter()
    with file.open("w", encoding="utf-8") as log:
        for step in range(1, steps + 1):
            chosen = torch.randint(len(data["latents"]), (batch,))
            rows = {name: values[chosen] for name, values in data.items()}
            mean, deviation = rows["latents"].chunk(2, 1)
            latents = mean + deviation * torch.randn_like(mean)
            noise, times = torch.randn_like(latents), torch.randint(1000, (batch,))
            noisy = noising.add_noise(latents, noise, times)
            v = noising.config.prediction_type == "v_prediction"
            wanted = noising.get_velocity(latents, noise, times) if v else noise
            loss = mse_loss(answer(unet, control, noisy, times, rows), wanted)
            loss.backward()
            nn.utils.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            told = {"step": step, "seconds": time.perf_counter() - began, "loss": loss.item()}
            log.write(json.dumps(told) + "\n")
            log.flush()


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[3:6]]
    where = Path(sys.argv[1]), Path(sys.argv[2])
    main(*where, numbers[0], numbers[1], numbers[2], Path(sys.argv[6]), *sys.argv[7:])
