"""How far away everything in a picture is, by a model of transformers: a depth map for a ControlNet."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.models.folder import listing
from sfumato.models.hub import is_hub_id
from sfumato.models.loading import frozen, quiet

INSTEAD = "give a ready depth image: --depth FILE"


def estimator(source: str | None, device: torch.device | str) -> Callable[[Image.Image], Image.Image]:
    """A function from an RGB picture to its depth map, grey, of the same size, near is white.

    The model's answer is resized bicubically to the picture and stretched to 0..255, as ControlNets for depth
    were trained on. source: a local folder or hub id of a model for depth estimation. Raises UserError.
    """
    if source is None:
        found = "no --depth-model that would estimate it"
        raise UserError("--depth auto", found, f"name one, such as Intel/dpt-hybrid-midas, or {INSTEAD}")
    asked, folder = f"the depth model {source}", find(source)
    with quiet():
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        try:
            # The one for Pillow: the other needs torchvision.
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, use_fast=False, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(asked, reason, f"download it again, or {INSTEAD}") from None
    model = frozen(AutoModelForDepthEstimation, folder, None, torch.float32, torch.device(device))

    @torch.no_grad()
    def estimate(picture: Image.Image) -> Image.Image:
        given = processor(images=picture, return_tensors="pt").to(model.device)
        depth = model(**given).predicted_depth[:, None].float()  # (1, 1, h, w)
        size = (picture.height, picture.width)
        depth = torch.nn.functional.interpolate(depth, size, mode="bicubic", align_corners=False)[0, 0].cpu()
        low, high = depth.min(), depth.max()
        if not bool(torch.isfinite(depth).all()):
            raise UserError(asked, "it gives numbers that are not finite", INSTEAD)
        grey = (depth - low) / (high - low).clamp_min(1e-12)  # (H, W) in [0, 1]
        return Image.fromarray((grey * 255).round().numpy().astype(np.uint8))

    return estimate


def find(source: str) -> Path:
    """The local folder of a depth model, after a download if it is a hub id. Raises UserError."""
    folder, asked = Path(source).expanduser(), f"the depth model {source}"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                asked, f"no config.json; it holds {listing(folder)}", f"name another, or {INSTEAD}"
            )
        return folder
    if not is_hub_id(source):
        raise UserError(asked, "no such folder", f"name a folder or a hub id, or {INSTEAD}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            asked, f"the hub does not give it: {reason}", f"name a folder, or {INSTEAD}"
        ) from None
