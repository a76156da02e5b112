"""The published architectures, for planning without their weights and without a network.

Each is a folder of `published` with the JSON files of a diffusers folder: what differs from the defaults of
the classes. The tokenizers are CLIP's, whose vocabulary we ship.
"""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from sfumato import config
from sfumato.models.folder import Facts, examine, read_facts

PUBLISHED = Path(__file__).parent / "published"
KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
"""Repositories of the hub -> the architecture of their models."""
KNOWN_VAES = {
    "madebyollin/sdxl-vae-fp16-fix": "sdxl",
    "stabilityai/sdxl-vae": "sdxl",
    "stabilityai/sd-vae-ft-mse": "sd15",
    "stabilityai/sd-vae-ft-ema": "sd15",
}
"""Repositories of VAEs -> the architecture that they are of."""


def facts_of(model: config.Model) -> Facts:
    """What is known of a model without its weights: its folder's JSON files, or the published architecture.

    Raises UserError for a folder that is no model's, and for a repository of the hub that is neither known
    here nor can be reached.
    """
    known = KNOWN.get(model.weights)
    if known is None or Path(model.weights).expanduser().exists():
        return examine(model)
    vae = None if model.vae is None else KNOWN_VAES.get(model.vae)
    if model.vae is not None and vae is None:
        return examine(model)
    return read_facts(PUBLISHED / known, PUBLISHED / (vae or known) / "vae", model.family)


def published_words(family: Any) -> dict[str, Any]:
    """CLIP's tokenizer for each text encoder of a family whose folder holds none."""
    return dict.fromkeys(family.text_classes, clip_words())


@lru_cache(1)
def clip_words() -> Any:
    """CLIP's tokenizer, which takes a second to read; nobody changes it."""
    from sfumato.models.loading import tokenizer
    from sfumato.models.vocabulary import write_tokenizer

    with tempfile.TemporaryDirectory(prefix="sfumato-words-") as place:
        return tokenizer(write_tokenizer(place))
