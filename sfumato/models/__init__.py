"""Families of models: a family is one file of this folder, found by its name."""

import importlib
from typing import TYPE_CHECKING

from sfumato import config
from sfumato.errors import UserError
from sfumato.models.folder import examine, families

if TYPE_CHECKING:
    import torch

    from sfumato.models.family import Family

__all__ = ["families", "family_class", "load"]


def family_class(name: str) -> "type[Family]":
    """The class of a family of this folder, or of a dotted path such as "mine.models.newthing".

    Raises UserError when there is no such module, or it has no FAMILY.
    """
    path = name if "." in name else f"{__name__}.{name}"
    from sfumato.models.loading import quiet  # torch, which `families` does without

    try:
        with quiet():  # transformers warns about a torchvision that it does not need
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise  # the family is there; something that it imports is not
        raise UserError(
            f"model.family = {name!r}",
            f"no module {path}",
            f"families: {', '.join(families())}, or a dotted path",
        ) from None
    if not hasattr(module, "FAMILY"):
        raise UserError(
            f"model.family = {name!r}", f"{path} does not end in FAMILY = ...", "name a family's module"
        )
    return module.FAMILY


def load(
    model: config.Model,
    device: "torch.device",
    dtype: "torch.dtype",
    vae_dtype: "torch.dtype",
    images: bool = True,
    captions: bool = True,
) -> "Family":
    """The family that `model` asks for, with the parts loaded that encode images and captions.

    Raises UserError for every fault of the weights.
    """
    facts = examine(model)
    family = family_class(facts.family)(facts.folder, model, device, dtype, vae_dtype)
    return family.load(images, captions)
