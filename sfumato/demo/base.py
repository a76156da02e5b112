"""The demo's base model: how it is made, from nothing, with our own commands.

`sfumato demo --rebuild-base FOLDER` runs `rebuild`: autoencoder, text encoder, the denoiser by
`sfumato train` on base.toml, and last the autoencoder's decoder a while longer, which leaves the latents as
they are. About two hours on two cores. The result, FOLDER/base, ships as sfumato/demo/base.
"""

import json
import shutil
from pathlib import Path

from sfumato import config
from sfumato.demo import emoji
from sfumato.models.loading import quiet, tokenizer

with quiet():  # transformers warns about a torchvision that it does not need
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

RECIPE = Path(__file__).parent / "base.toml"
AUTOENCODER_STEPS, DECODER_STEPS = 1200, 2000


def rebuild(folder: Path) -> Path:
    """Make the base anew; returns the finished model's folder.

    What is finished in `folder` is kept, so the same call goes on after a stop.
    """
    from sfumato.demo.autoencoder import train_autoencoder
    from sfumato.demo.text import train_text_encoder
    from sfumato.train import train

    parts = folder / "parts"
    if not (parts / "vae" / "measured.json").exists():
        train_autoencoder(parts / "vae", steps=AUTOENCODER_STEPS)
    if not (parts / "text_encoder" / "measured.json").exists():
        train_text_encoder(parts / "text_encoder")
    untrained, images = folder / "untrained", folder / "noto"
    assemble(parts, untrained)
    emoji.write_images("noto", images)
    trained = train(
        config.load(RECIPE, [f"model.weights={untrained}", f"data.source={images}", f"output={folder}"])
    )
    sharp = parts / "sharp"
    if not (sharp / "measured.json").exists():
        start = parts / "vae"
        train_autoencoder(sharp, steps=DECODER_STEPS, peak=6e-4, start_from=start, decoder_only=True)
    finished = folder / "base"
    shutil.rmtree(finished, ignore_errors=True)
    shutil.copytree(trained, finished)
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(sharp / weights, finished / "vae" / weights)
    # What ships names no folder of the machine that it was made on.
    (finished / "sfumato.json").unlink()
    settings = finished / "vae" / "config.json"
    facts = {key: value for key, value in json.loads(settings.read_text()).items() if key != "_name_or_path"}
    settings.write_text(json.dumps(facts, indent=2) + "\n")
    return finished


def assemble(parts: Path, folder: Path) -> None:
    """Put the trained parts and an untrained denoiser into a Stable Diffusion folder."""
    with quiet():
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(parts / "vae", low_cpu_mem_usage=False),
            text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
            tokenizer=tokenizer(parts / "tokenizer"),
            unet=denoiser(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)


def denoiser() -> UNet2DConditionModel:
    """The U-Net over 16 x 16 latents: attention where it is cheap, at 8 x 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(48, 96, 144),
        norm_num_groups=16,
        cross_attention_dim=64,
        attention_head_dim=(1, 2, 3),  # diffusers reads the number of heads from this name
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: drawings on white are far from grey (arXiv:2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
