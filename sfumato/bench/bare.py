"""A bare training loop to measure ours against: plain PyTorch and diffusers' classes, nothing around them.

    python -m sfumato.bench.bare MODEL PICTURES STEPS BATCH SIZE FILE

Every picture and caption is encoded once before the first step and stays in memory, so a step is only: draw
noise, run the U-Net, backward, clip, AdamW. One line of FILE a step: {"step", "seconds" (since the loop
began), "loss"}.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

LR = 1e-5


@torch.no_grad()
def encoded(model: Path, pictures: Path, size: int) -> tuple[Tensor, Tensor]:
    """What the VAE gives for every picture, (N, 8, size / f, size / f), and the text states, (N, 77, d)."""
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    reader = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    moments, states = [], []
    for line in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        picture = Image.open(pictures / row["file_name"]).convert("RGB").resize((size, size))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        moments.append(vae.encode(pixels).latent_dist.parameters)
        words = tokenizer(row["text"], padding="max_length", truncation=True, return_tensors="pt")
        states.append(reader(words.input_ids)[0])
    scale = vae.config.scaling_factor
    mean, logvar = torch.cat(moments).chunk(2, 1)
    # The scaled mean and standard deviation, of which a step draws its latents.
    return torch.cat([mean, (logvar.clamp(-30, 20) / 2).exp()], 1) * scale, torch.cat(states)


def main(model: Path, pictures: Path, steps: int, batch: int, size: int, file: Path) -> None:
    """Train the U-Net of a diffusers folder for some steps."""
    torch.manual_seed(0)
    moments, states = encoded(model, pictures, size)
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).train()
    noising = DDPMScheduler.from_pretrained(model / "scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, fused=True)
    began = time.perf_counter()
    with file.open("w", encoding="utf-8") as log:
        for step in range(1, steps + 1):
            chosen = torch.randint(len(moments), (batch,))
            mean, deviation = moments[chosen].chunk(2, 1)
            latents = mean + deviation * torch.randn_like(mean)
            noise, times = torch.randn_like(latents), torch.randint(1000, (batch,))
            noisy = noising.add_noise(latents, noise, times)
            v = noising.config.prediction_type == "v_prediction"
            wanted = noising.get_velocity(latents, noise, times) if v else noise
            loss = mse_loss(unet(noisy, times, states[chosen]).sample, wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            told = {"step": step, "seconds": time.perf_counter() - began, "loss": loss.item()}
            log.write(json.dumps(told) + "\n")
            log.flush()


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[3:6]]
    main(Path(sys.argv[1]), Path(sys.argv[2]), numbers[0], numbers[1], numbers[2], Path(sys.argv[6]))
