"""The contract of a method, and what methods share."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sfumato import config
from sfumato.data.batch import Batch
from sfumato.models.compiled import compile_blocks
from sfumato.models.denoiser import prepare
from sfumato.models.family import Family
from sfumato.models.folder import Facts, weight_files
from sfumato.models.parts import Parts
from sfumato.models.texts import Condition, bare

Trained = Mapping[str, Tensor]
"""What was trained: a parameter's name -> its fp32 numbers, read when they are asked for."""


class Method:
    """What learns, in which parts of the model, and what comes of it.

    A method is one file: it says `build`, `draw` and `export`, and what differs from here.
    """

    def __init__(self, family: Family, config: config.Config) -> None:
        """Raises UserError for settings that do not fit the family."""
        self.family, self.config = family, config
        self.text = tuple(family.text_classes) if config.learns_text else ()
        """The text encoders that learn, by name."""

    # What a method must say.

    def build(self) -> Parts:
        """The parts that the engine wraps; what requires gradients learns. Their numbers are not used."""
        raise NotImplementedError

    def draw(self, seed: int) -> dict[str, Tensor]:
        """What no file holds: parameters by name, on the CPU, drawn from the seed. Called on one rank."""
        raise NotImplementedError

    def export(self, trained: Trained, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """Write what was trained, as its users load it, into a folder that `frame` was there before.

        process: see Family.scheduler. It may be called in a thread beside the training, whose random numbers
        and settings of the process it must not touch: a module is built on the meta device, and none is read.
        """
        raise NotImplementedError

    def origin(self) -> str:
        """A hash of all that `draw` depends on."""
        said = [
            self.config.seed,
            *(part.model_dump(mode="json") for part in (self.config.method, self.config.model)),
        ]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    # What most of them leave as it is.

    @classmethod
    def check(cls, config: config.Config, facts: Facts, captions: Iterable[str]) -> int | None:
        """Raise UserError for what can be refused before a model is loaded and an image encoded.

        captions: some of the data's, spread over them, as a visit reads them; read as far as they are asked
        for. Returns how many numbers learn, or None where that is known later.
        """
        return None

    def weights(self) -> Mapping[str, Sequence[Path]]:
        """The safetensors that each part starts from."""
        return self.files_of(self.family.learns, *self.text)

    def source_name(self, name: str) -> str:
        """What a parameter is called in its part's files, after the part's name."""
        return name

    def settle(self, parts: Parts) -> None:
        """Change how frozen parts hold their numbers, once they have them; called below ZeRO stage 3."""

    def frame(self, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """Write what no training changes of an export into a folder.

        The method's family is changed on the way.
        """

    def encode(self, batch: Batch) -> tuple[Tensor, Condition]:
        """A batch -> latents (B, c, h, w) fp32, and the condition that `predict` takes."""
        latents = self.family.encode_images(batch)
        return latents, self.family.batch_words(batch) if self.text else self.family.condition(batch)

    def predict(self, parts: Parts, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The answer (B, c, h, w) to x_t (B, c, h, w) at timesteps t (B,)."""
        if self.text:
            condition = self.family.read_batch(parts.only(self.text), condition)
        return self.family.predict(parts[self.family.learns], x_t, t, condition)

    def pipeline(self, parts: Parts, process: Mapping[str, Any]) -> tuple[Any, Family]:
        """The pipeline that draws with the parts, and the family that reads its prompts."""
        family = self.family.with_text(parts.only(self.text))
        return family.assemble(parts[family.learns], process), family

    # For the files of methods.

    def files_of(self, *parts: str) -> dict[str, Sequence[Path]]:
        """The safetensors of the folder's parts."""
        folder, variant = self.family.folder, self.family.model.variant
        return {part: weight_files(folder, part, variant) for part in parts}

    def base_weight(self, name: str) -> Tensor:
        """A tensor of the folder's files."""
        part, _, inner = name.partition(".")
        for file in self.weights()[part]:
            with safe_open(file, "pt") as tensors:
                for said in tensors.keys():
                    if bare(said) == bare(inner):
                        return tensors.get_tensor(said)
        raise AssertionError(f"{name} is in no file")

    def assembled(self, **parts: nn.Module) -> Parts:
        """The parts with the run's attention kernel and activation checkpointing, compiled if asked."""
        engine, data = self.config.engine, self.config.data
        several = data.buckets is not None or len(data.resolutions) > 1
        for name, part in parts.items():
            prepare(part, engine.attention, engine.gradient_checkpointing)
            if engine.compile and name not in self.text:
                compile_blocks(part, several)
        return Parts(self.predict, parts)

    def text_parts(self) -> dict[str, nn.Module]:
        """The text encoders that learn, from their config files; what their answer ignores is frozen."""
        found = {part: self.family.build_text(part) for part in self.text}
        for part, encoder in found.items():
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(not bare(name).startswith(self.family.unread(part)))
        return found
