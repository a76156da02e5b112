"""Weights of words, written as A1111's web interface reads them, and what they do to a prompt's encoding.

(word) weighs 1.1, [word] 1 / 1.1, (word:1.3) 1.3, nested brackets multiply, and a backslash makes a bracket
an ordinary letter. Each token's hidden states are multiplied by its weight; then all of the encoder's
are scaled so that their mean is what it was: the first method of that interface. SDXL's pooled text has no
weights.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError

STRONGER = 1.1
WORDS = 75  # tokens of a window besides its begin and end
MARK = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
Pieces = list[tuple[str, float]]


def parse(prompt: str) -> Pieces:
    """The prompt in pieces of one weight each. A bracket that is not closed reaches to the end."""
    texts: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        for place in range(opened.pop()[1], len(weights)):
            weights[place] *= factor
        return True

    for match in MARK.finditer(prompt):
        mark = match[0]
        if mark in "([":
            opened.append((mark, len(texts)))
            continue
        if match[1] is not None and close("(", float(match[1])):
            continue
        if (mark == ")" and close("(", STRONGER)) or (mark == "]" and close("[", 1 / STRONGER)):
            continue
        texts.append(mark[1:] if len(mark) == 2 and mark[0] == "\\" else mark)
        weights.append(1.0)
    while opened:
        bracket = opened[-1][0]
        close(bracket, STRONGER if bracket == "(" else 1 / STRONGER)
    return joined(zip(texts, weights, strict=True))


def joined(pieces: Any) -> Pieces:
    """Neighbours of one weight as one piece; at least one piece."""
    found: Pieces = []
    for text, weight in pieces:
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + text, weight)
        else:
            found.append((text, weight))
    return found or [("", 1.0)]


def plain(pieces: Pieces) -> str:
    """The words without their weights."""
    return "".join(text for text, _ in pieces)


def token_weights(tokenizer: Any, pieces: Pieces, windows: int) -> Tensor:
    """The weight of every token of so many windows, (windows * 77,) fp32; 1 where no word stands.

    Raises UserError where brackets cut a word in a way that gives other tokens than the whole has.
    """
    ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text, _ in pieces]
    whole = tokenizer(plain(pieces), add_special_tokens=False, verbose=False).input_ids
    if [token for part in ids for token in part] != whole:
        raise UserError(
            f'the weights in "{plain(pieces)}"',
            "a bracket stands within a word, which is read as one",
            "put brackets around whole words",
        )
    width = tokenizer.model_max_length
    weights = torch.ones(windows, width)
    each = [weight for part, (_, weight) in zip(ids, pieces, strict=True) for _ in part]
    for place, weight in enumerate(each[: windows * (width - 2)]):
        weights[place // (width - 2), 1 + place % (width - 2)] = weight
    return weights.flatten()


def weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden states (n, d) and the weights of their n tokens -> hidden states with the mean that they had.

    With weights of 1 they are returned as they are. Where the mean is 0 but for rounding it is left alone.
    """
    if bool((weights == 1).all()):
        return hidden
    before = hidden.float()
    after = before * weights.to(hidden.device)[:, None]
    mean, new = before.mean(), after.mean()
    if bool(mean.abs() > 1e-4 * before.std()) and bool(new != 0):
        after = after * (mean / new)
    return after.to(hidden.dtype)


def weigh(context: Tensor, prompts: Sequence[Pieces], encoders: Sequence[tuple[Any, int]]) -> Tensor:
    """A context (B, windows * 77, d1 + d2 + ...) with the prompts' weights.

    encoders: each tokenizer with the width that its encoder has in the context. Raises UserError for a
    context that is not made of these side by side.
    """
    if sum(width for _, width in encoders) != context.shape[-1]:
        found = f"its context has the width {context.shape[-1]}, its CLIP encoders {[w for _, w in encoders]}"
        raise UserError("--emphasis with this model", found, "leave --emphasis out")
    rows = []
    for row, pieces in zip(context, prompts, strict=True):
        parts = row.split([width for _, width in encoders], dim=-1)
        windows = [row.shape[0] // tokenizer.model_max_length for tokenizer, _ in encoders]
        weighed = [
            weighted(part, token_weights(tokenizer, pieces, count))
            for part, (tokenizer, _), count in zip(parts, encoders, windows, strict=True)
        ]
        rows.append(torch.cat(weighed, -1))
    return torch.stack(rows)
