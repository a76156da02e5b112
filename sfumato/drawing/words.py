"""Prompts to what a pipeline's call takes: as plain text, or encoded by the model's family."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfumato.drawing import emphasis
from sfumato.models.family import Family


def words(
    pipeline: Any,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    family: Family | None,
    weights: bool = False,
) -> Mapping[str, Any]:
    """The keywords that tell the pipeline what to draw and what not, one of each for every picture.

    negatives None: the pipeline's own absent prompt. weights: brackets in prompts are read as weights.
    """
    if family is None:
        return {
            "prompt": list(prompts),
            "negative_prompt": None if negatives is None else list(negatives),
        }
    wanted = encoded(pipeline, prompts, family, weights)
    if negatives is None:
        absent = family.null_condition()
        absent = {name: rows.expand(len(prompts), *rows.shape[1:]) for name, rows in absent.items()}
    else:
        absent = encoded(pipeline, negatives, family, weights)
    return family.prompt_inputs(wanted, absent)


@torch.no_grad()
def encoded(pipeline: Any, prompts: Sequence[str], family: Family, weights: bool) -> dict[str, Any]:
    """Prompts as the family encodes them, with learned words written out, and weighed if that is asked."""
    pieces = [emphasis.parse(prompt) if weights else [(prompt, 1.0)] for prompt in prompts]
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    if convert is not None:
        pieces = [[(convert(text, pipeline.tokenizer), weight) for text, weight in each] for each in pieces]
    found = family.encode_prompts([emphasis.plain(each) for each in pieces])
    if weights:
        found = found | {"context": emphasis.weigh(found["context"], pieces, encoders_of(pipeline))}
    return found


def cut_off(pipeline: Any, prompts: Sequence[str], window: int, weights: bool) -> list[tuple[str, int]]:
    """The prompts with more tokens than are read, and how many they have."""
    tokenizer = pipeline.components.get("tokenizer")
    if tokenizer is None:
        return []
    read = emphasis.WORDS * -(-window // 77)
    texts = {prompt: emphasis.plain(emphasis.parse(prompt)) if weights else prompt for prompt in prompts}
    lengths = {
        prompt: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        for prompt, text in texts.items()
    }
    return [(prompt, length) for prompt, length in lengths.items() if length > read]


def encoders_of(pipeline: Any) -> list[tuple[Any, int]]:
    """A pipeline's tokenizers, each with the width of its encoder's hidden states."""
    parts = pipeline.components
    return [
        (parts[f"tokenizer{number}"], parts[f"text_encoder{number}"].config.hidden_size)
        for number in ("", "_2", "_3")
        if parts.get(f"tokenizer{number}") is not None and parts.get(f"text_encoder{number}") is not None
    ]
