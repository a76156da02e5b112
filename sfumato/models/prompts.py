"""Prompts to tokens in windows, and windows to one context: what the CLIP families share.

A window is 77 tokens: begin, 75 words, end. With `prompt_window` 150 or 225 a prompt fills two or three
windows, each is encoded by itself, and their contexts are joined: (B, 154, d) or (B, 231, d).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

TOKENS = 77
"""Of a window."""


def windows(prompt_window: int) -> int:
    """How many windows a setting of 77, 150 or 225 tokens means."""
    return {77: 1, 150: 2, 225: 3}[prompt_window]


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, count, 77) int64; words that do not fit are cut off.

    An unused window holds begin, end and padding only.
    """
    width = tokenizer.model_max_length
    if count == 1:
        found = tokenizer(
            list(prompts), padding="max_length", max_length=width, truncation=True, return_tensors="pt"
        )
        return found.input_ids[:, None], found.attention_mask[:, None]  # (B, 1, 77)
    words = width - 2
    plain = tokenizer(
        list(prompts), add_special_tokens=False, truncation=True, max_length=words * count
    ).input_ids
    ids = torch.full((len(plain), count, width), tokenizer.pad_token_id)  # (B, count, 77)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(plain):
        for column in range(count):
            part = tokens[column * words : (column + 1) * words]
            window = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
            ids[row, column, : len(window)] = torch.tensor(window)
            mask[row, column, : len(window)] = 1
    return ids, mask


def answer(encoder: Any, ids: Tensor, mask: Tensor | None) -> Any:
    """The encoder's whole answer for (B, count, 77) ids, row by row; hidden_states are (B * count, 77, d)."""
    # Else the host would wait until the device has done what it was told before.
    rows = ids.flatten(0, 1).to(encoder.device, non_blocking=True)
    if mask is not None:
        mask = mask.flatten(0, 1).to(encoder.device, non_blocking=True)
    return encoder(rows, attention_mask=mask, output_hidden_states=True)


def join(hidden: Tensor, count: int) -> Tensor:
    """(B * count, 77, d) windows -> (B, count * 77, d) contexts."""
    return hidden.unflatten(0, (-1, count)).flatten(1, 2)
