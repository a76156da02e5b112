"""Textual inversion: the vectors of a new word learn, and nothing else (arXiv:2208.01618)."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato import config
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.methods.method import Method, Trained
from sfumato.models import prompts
from sfumato.models.family import Family
from sfumato.models.folder import Facts, read_json
from sfumato.models.loading import tokenizer
from sfumato.models.parts import Parts
from sfumato.models.texts import Condition

FILE = "learned_embeds.safetensors"
"""What diffusers' load_textual_inversion looks for in a folder."""
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What others call the vectors of each encoder, where there are two."""


class Words(nn.Embedding):
    """A text encoder's table of words, which is frozen, and new rows (count, width), which learn."""

    def __init__(self, rows: int, width: int, first: int, count: int) -> None:
        """first: the id of the first new row; ids from there on are not looked up in the table."""
        super().__init__(rows, width)
        self.weight.requires_grad_(False)
        self.first = first
        self.learned = nn.Parameter(torch.empty(count, width))

    def forward(self, input: Tensor) -> Tensor:
        """Ids (B, n) -> vectors (B, n, width)."""
        new = input >= self.first
        old_rows = F.embedding(input.masked_fill(new, 0), self.weight)
        # Rows of no new word give the gradient 0, so that every rank has one, whatever its captions are.
        new_rows = F.embedding((input - self.first).clamp(min=0), self.learned)
        return torch.where(new[..., None], new_rows, old_rows)


class TextualInversion(Method):
    """The denoiser and the text encoders, frozen, with new rows in the encoders' tables of words.

    A transformers config with eos_token_id = 2, as SDXL's second encoder has, takes the pooled text from the
    highest id, which is the new word's: stock pipelines do so too, and training agrees with them.
    """

    def __init__(self, family: Family, config: config.Config) -> None:
        """Raises UserError if the word is in the vocabulary, or the one it is to be like is not."""
        super().__init__(family, config)
        assert config.method.kind == "textual_inversion", f"a run of {config.method.kind}"
        self.rule = config.method
        self.first = {part: len(words) for part, words in family.tokenizers.items()}
        self.family = copy.copy(family)  # its own vocabulary stays as it is
        self.family.tokenizers = {
            part: with_word(words, self.rule) for part, words in family.tokenizers.items()
        }

    @classmethod
    def check(cls, config: config.Config, facts: Facts, captions: Iterable[str]) -> int:
        assert config.method.kind == "textual_inversion", f"a run of {config.method.kind}"
        folders = [facts.folder / name for name in facts.needs]
        plain = [tokenizer(folder) for folder in folders if folder.name.startswith("tokenizer")]
        extended = [with_word(words, config.method) for words in plain]
        check_captions(config, extended[0], len(plain[0]), captions)
        encoders = [folder for folder in folders if folder.name.startswith("text_encoder")]
        widths = (read_json(folder / "config.json")["hidden_size"] for folder in encoders)
        return config.method.vectors * sum(map(int, widths))

    def build(self) -> Parts:
        """The parts from their config files, with the tables that have new rows."""
        parts = {self.family.learns: self.family.build_denoiser()}
        for part in self.text:
            encoder: Any = self.family.build_text(part)
            table = encoder.get_input_embeddings()
            rows, width = table.num_embeddings, table.embedding_dim
            encoder.requires_grad_(False)
            encoder.set_input_embeddings(Words(rows, width, self.first[part], self.rule.vectors))
            parts[part] = encoder
        parts[self.family.learns].requires_grad_(False)
        return self.assembled(**parts)

    def draw(self, seed: int) -> dict[str, Tensor]:
        """The new rows: like a word, or drawn with the mean and spread that each column of the table has."""
        with torch.device("meta"):
            parts = self.build()
        random = torch.Generator().manual_seed(seed)
        found = {}
        for name, shape in ((name, p.shape) for name, p in parts.named_parameters() if p.requires_grad):
            table = self.base_weight(name.removesuffix(".learned") + ".weight").float()
            if self.rule.like is not None:
                words = self.family.tokenizers[name.partition(".")[0]]
                ids = words(self.rule.like, add_special_tokens=False).input_ids
                found[name] = table[ids].mean(0).expand(shape).contiguous()
            else:
                found[name] = table.mean(0) + table.std(0) * torch.randn(shape, generator=random)
        return found

    def encode(self, batch: Batch) -> tuple[Tensor, Condition]:
        """As every method; a word of several vectors is written out as they are called."""
        return super().encode(replace(batch, captions=self.written_out(batch.captions)))

    def written_out(self, captions: Sequence[str]) -> list[str]:
        """Captions as stock pipelines read them: "<new> <new>_1 <new>_2" for a word of three vectors."""
        first: Any = self.family.tokenizers[self.text[0]]
        told: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt([*captions], first)
        return told

    def export(self, trained: Trained, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """A file for diffusers' load_textual_inversion; SDXL's holds the rows of each encoder."""
        rows = {name.partition(".")[0]: numbers.to(dtype) for name, numbers in trained.items()}
        several = len(rows) > 1
        tensors = {KEYS[part] if several else self.rule.word: found for part, found in rows.items()}
        told = {"word": self.rule.word, "vectors": str(self.rule.vectors)}
        save_file(tensors, folder / FILE, {"format": "pt"} | told)


def names_of(rule: config.TextualInversion) -> list[str]:
    """What diffusers calls the vectors of a word."""
    return [rule.word, *(f"{rule.word}_{number}" for number in range(1, rule.vectors))]


def with_word(tokenizer: Any, rule: config.TextualInversion) -> Any:
    """A copy of a tokenizer that knows the new word.

    Raises UserError if it knows it before, or does not know the word that the new one is to be like.
    """
    asked, known = f'the new word "{rule.word}" (method.word)', tokenizer.get_vocab()
    for name in names_of(rule):
        if name in known or f"{name}</w>" in known:
            found = f'"{name}" is in the model\'s vocabulary'
            raise UserError(asked, found, f'choose another, such as "<{rule.word.strip("<>")}-1>"')
    if rule.like is not None:
        ids = tokenizer(rule.like, add_special_tokens=False).input_ids
        if not ids or tokenizer.unk_token_id in ids:
            found = f'"{rule.like}" is not in the model\'s vocabulary'
            raise UserError(f"a word that starts like {rule.like!r} (method.like)", found, "choose another")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(names_of(rule))
    return tokenizer


def check_captions(config: config.Config, tokenizer: Any, id: int, captions: Iterable[str]) -> None:
    """Raise UserError unless one of the captions holds the word where it is read. id: the word's."""
    assert config.method.kind == "textual_inversion", f"a run of {config.method.kind}"
    word, window = config.method.word, config.model.prompt_window
    several, seen, example = prompts.windows(window), 0, ""
    for caption in captions:
        ids, _ = prompts.tokenize(tokenizer, [caption], several)
        if bool((ids == id).any()):
            return
        seen, example = seen + 1, example or caption
    raise UserError(
        f'learning the word "{word}" (method.word)',
        f'of {seen:,} captions none holds it in the {window} tokens that are read; the first is "{example}"',
        f'write it into the captions, or set data.caption_prefix = "a photo of {word}, "',
    )
