"""CLIP's vocabulary from the shipped merges gives CLIP's ids."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sfumato.models.vocabulary import END, WINDOW, merges, vocabulary, write_tokenizer


def test_counts() -> None:
    assert len(merges()) == 48_894
    assert len(vocabulary()) == 49_408


@pytest.mark.parametrize(("pad", "pad_id"), [(END, 49_407), ("!", 0)])
def test_known_ids(tmp_path: Path, pad: str, pad_id: int) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path, pad))
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo of a CAT").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        49_406,
        49_407,
        pad_id,
    )
    assert tokenizer.model_max_length == WINDOW
    padded = tokenizer("a cat", padding="max_length", max_length=WINDOW).input_ids
    assert len(padded) == WINDOW
    assert padded[4:] == [pad_id] * (WINDOW - 4)


def test_survives_saving(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "a"))
    tokenizer.save_pretrained(tmp_path / "b")
    again = CLIPTokenizer.from_pretrained(tmp_path / "b")
    assert again("piñata, café!").input_ids == tokenizer("piñata, café!").input_ids
    assert again.decode(again("piñata").input_ids, skip_special_tokens=True) == "piñata"


def test_long_text_is_cut(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path))
    ids = tokenizer("cat " * 200, truncation=True, max_length=WINDOW).input_ids
    assert len(ids) == WINDOW
    assert ids[-1] == tokenizer.eos_token_id


def test_unknown_pad(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="padding token"):
        write_tokenizer(tmp_path, "<pad-of-another-model>")
