"""How prompts become conditions: a family's tokenizers and text encoders, frozen or learning."""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sfumato import config
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.models import prompts as text
from sfumato.models.folder import Facts, read_json
from sfumato.models.loading import frozen, quiet, tokenizer

Condition = dict[str, Tensor]
RECOUNTED = ".position_ids"
"""Numbers from 0 on, which old files of CLIP hold as if they were weights."""


def bare(name: str) -> str:
    """A tensor's name, after its part's name or alone, without the word that transformers puts before CLIP's.

    Whether it does depends on its version and the class.
    """
    return re.sub(r"^([^.]+\.)?text_model\.", r"\1", name)


class Texts:
    """The half of a family that reads prompts."""

    text_classes: ClassVar[Mapping[str, type]]
    """The class of each text encoder, by its name in the folder, in the order in which they are asked."""
    text_dependent: ClassVar[tuple[str, ...]] = ("text_encoders", "_null")
    """What is kept of the text encoders, and made again with others."""
    lora_text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Ends of the names of the text encoders' layers that LoRA changes, if it is to."""
    size_and_crop: ClassVar[bool] = False
    """Whether the condition holds the batch's size_and_crop."""

    folder: Path
    facts: Facts
    model: config.Model
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder."""
        folders = {part: part.replace("text_encoder", "tokenizer") for part in self.text_classes}
        return {part: tokenizer(self.folder / folder) for part, folder in folders.items()}

    @cached_property
    def masked(self) -> set[str]:
        """The text encoders that the pipeline gives the mask of their tokens."""
        configs = {part: read_json(self.folder / part / "config.json") for part in self.text_classes}
        return {part for part, said in configs.items() if said.get("use_attention_mask")}

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders, in `dtype`."""
        found = {
            part: frozen(kind, self.folder / part, self.model.variant, self.dtype, self.device)
            for part, kind in self.text_classes.items()
        }
        self.check_widths(found)
        return found

    def with_text(self, encoders: Mapping[str, nn.Module]) -> Self:
        """The same family with other text encoders, all of them or none; what is loaded is shared."""
        other = copy.copy(self)
        if encoders:
            for name in self.text_dependent:
                other.__dict__.pop(name, None)
            other.text_encoders = dict(encoders)
        return other

    def read(self, encoders: Mapping[str, Any], words: Condition) -> Condition:
        """What the text encoders say of `words` (see `words`): tensors of B rows."""
        raise NotImplementedError

    def check_widths(self, encoders: Mapping[str, Any]) -> None:
        """Raise UserError unless the text encoders give what the denoiser takes."""
        raise NotImplementedError

    def unread(self, part: str) -> tuple[str, ...]:
        """Beginnings of the names of a text encoder's weights that its answer does not depend on."""
        return ()

    def words(self, prompts: Sequence[str]) -> Condition:
        """The tokens of prompts: for each text encoder its ids (B, windows, 77), and maybe a mask."""
        count, found = text.windows(self.model.prompt_window), {}
        for part, words in self.tokenizers.items():
            found[part], mask = text.tokenize(words, prompts, count)
            if part in self.masked:
                found[f"{part} mask"] = mask
        return found

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> tensors of B rows, to the bit what the pipeline's encode_prompt gives. No gradients."""
        return self.read(self.text_encoders, self.words(prompts))

    @torch.no_grad()
    def condition(self, batch: Batch) -> Condition:
        """The batch's captions encoded, the null condition in the rows that are dropped."""
        if batch.text is not None:
            found = {name: rows.to(self.device) for name, rows in batch.text.items()}
        else:
            dropped = batch.dropped.to(self.device, non_blocking=True)
            null = self.null_condition()
            found = {
                name: torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), null[name], rows)
                for name, rows in self.encode_prompts(batch.captions).items()
            }
        if self.size_and_crop:
            found["size_and_crop"] = batch.size_and_crop.to(self.device)
        return found

    def batch_words(self, batch: Batch) -> Condition:
        """The batch's tokens, the empty prompt's in the rows that are dropped: for encoders that learn."""
        prompts = ["" if drop else said for said, drop in zip(batch.captions, batch.dropped, strict=True)]
        found = self.words(prompts) | {"dropped": batch.dropped}
        if self.size_and_crop:
            found["size_and_crop"] = batch.size_and_crop
        return {name: rows.to(self.device, non_blocking=True) for name, rows in found.items()}

    def read_batch(self, encoders: Mapping[str, Any], words: Condition) -> Condition:
        """What `condition` says, from `batch_words` and encoders that learn."""
        found = self.read(encoders, words)
        if self.null_is_zero:
            dropped = words["dropped"]
            found = {
                name: rows.masked_fill(dropped.view(-1, *[1] * (rows.ndim - 1)), 0)
                for name, rows in found.items()
            }
        return found | ({"size_and_crop": words["size_and_crop"]} if self.size_and_crop else {})

    @property
    def null_is_zero(self) -> bool:
        """Whether the pipeline takes zeros where there is no negative prompt, not the empty prompt."""
        return False

    def null_condition(self) -> Condition:
        """What the pipeline uses where there is no negative prompt, B = 1. Made once."""
        return self._null

    @cached_property
    def _null(self) -> Condition:
        empty = self.encode_prompts([""])
        return {name: torch.zeros_like(rows) for name, rows in empty.items()} if self.null_is_zero else empty

    def build_text(self, part: str) -> nn.Module:
        """A text encoder from its config file, holding random numbers, in fp32."""
        kind: Any = self.text_classes[part]
        with quiet():
            return kind(kind.config_class(**read_json(self.folder / part / "config.json")))


def check_width(folder: Path, what: str, gives: int, takes: Any) -> None:
    """Raise UserError unless the denoiser takes conditions as wide as the text encoders give them."""
    if any(width != gives for width in (takes if isinstance(takes, list) else [takes])):
        found = f"the denoiser takes a {what} of width {takes}, the text encoders give {gives}"
        raise UserError(
            f"the weights {folder}", found, "use a denoiser and text encoders that belong together"
        )
