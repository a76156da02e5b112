"""Textual inversion: only a word's vectors learn, and stock pipelines read them as training does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato import config, methods
from sfumato.config import parse
from sfumato.data.batch import Batch
from sfumato.engine.weights import WeightFiles
from sfumato.errors import UserError
from sfumato.methods.textual_inversion import FILE, TextualInversion
from sfumato.models.folder import examine
from sfumato.models.parts import Parts
from tests.unit import twins

CAPTIONS = ["a photo of <new>, at night", "no such word", "<new> and <NEW>s"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings(name: str, **rule: Any) -> config.Config:
    kind = {"kind": "textual_inversion"} | rule
    model = {"weights": str(twins.twin(name))}
    return parse({"steps": 1, "batch_size": 1, "model": model, "method": kind, "data": {"source": "none"}})


def method_of(name: str, kind: type[TextualInversion] = TextualInversion, **rule: Any) -> TextualInversion:
    return kind(twins.family(name), settings(name, **rule))


def filled(method: TextualInversion, place: Path) -> Parts:
    """The parts with the numbers that a run would start from."""
    parts = method.build()
    save_file(method.draw(7), place / "random.safetensors")
    read = WeightFiles({**method.weights(), "": [place / "random.safetensors"]}, method.source_name)
    read.check(parts)
    with torch.no_grad():
        for name, p in parts.named_parameters():
            p.copy_(read(name, 0, p.numel()).view(p.shape))
    return parts


def batch(captions: list[str] = CAPTIONS) -> Batch:
    return twins.batch_of(captions, seed=3)


def said(method: TextualInversion, parts: Parts, found: Batch) -> Tensor:
    """What the text encoders say of a batch's captions."""
    context = method.family.read_batch(parts.only(method.text), method.encode(found)[1])["context"]
    assert context.requires_grad
    return context


def stock(name: str, folder: Path) -> Any:
    """The stock pipeline with an export's words, loaded as diffusers' documentation says."""
    pipeline: Any = DiffusionPipeline.from_pretrained(twins.twin(name))
    if name == "sd":
        pipeline.load_textual_inversion(folder)
        return pipeline
    state = load_file(folder / FILE)
    for key, ending in (("clip_l", ""), ("clip_g", "_2")):
        encoder, words = getattr(pipeline, f"text_encoder{ending}"), getattr(pipeline, f"tokenizer{ending}")
        pipeline.load_textual_inversion(state[key], token="<new>", text_encoder=encoder, tokenizer=words)
    return pipeline


def learned(parts: Parts) -> dict[str, Any]:
    return {name: p for name, p in parts.named_parameters() if p.requires_grad}


def check_only_words_learn(method: TextualInversion, parts: Parts) -> None:
    rows = [int(p.numel()) for p in learned(parts).values()]
    assert rows == [method.rule.vectors * 32] * len(method.text), "something else learns"


@pytest.mark.parametrize("vectors", [1, 3])
def test_stock_pipelines_read_what_was_trained(name: str, vectors: int, tmp_path: Path) -> None:
    """The same encodings and the same gradients as transformers' own table with the rows in it."""
    method = method_of(name, vectors=vectors)
    parts = filled(method, tmp_path)
    check_only_words_learn(method, parts)
    method.export({key: p.detach() for key, p in learned(parts).items()}, tmp_path, torch.float32, {})
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "word": "<new>", "vectors": str(vectors)}
    pipeline = stock(name, tmp_path)
    theirs = pipeline.encode_prompt(
        CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    ours = said(method, parts, batch())
    torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs[0].square().sum().backward()
    for key, p in learned(parts).items():
        encoder = getattr(pipeline, key.partition(".")[0])
        table = encoder.get_input_embeddings().weight
        torch.testing.assert_close(p.grad, table.grad[-vectors:], rtol=1e-4, atol=1e-4)
        assert p.grad.abs().sum(1).all(), "a vector has no gradient"
        file = method.base_weight(key.removesuffix(".learned") + ".weight")
        assert torch.equal(parts.get_parameter(key.removesuffix("learned") + "weight"), file)
    assert all(p.grad is None for p in parts.parameters() if not p.requires_grad)


def test_the_comparison_catches(tmp_path: Path) -> None:
    class Once(TextualInversion):
        def written_out(self, captions: Any) -> list[str]:
            return [*captions]

    right, wrong = (method_of("sd", kind, vectors=3) for kind in (TextualInversion, Once))
    parts = filled(right, tmp_path)
    assert (said(right, parts, batch()) - said(wrong, parts, batch())).abs().max() > 0.01
    [key] = learned(parts)
    parts.get_parameter(key.removesuffix("learned") + "weight").requires_grad_(True)
    with pytest.raises(AssertionError, match="something else learns"):
        check_only_words_learn(right, parts)


def test_a_batch_without_the_word_has_the_gradient_zero(tmp_path: Path) -> None:
    method = method_of("sd")
    parts = filled(method, tmp_path)
    said(method, parts, batch(["no such word"])).square().sum().backward()
    [p] = learned(parts).values()
    assert p.grad is not None and not p.grad.any()


def test_the_start_is_like_a_word_or_drawn_as_words_are(name: str) -> None:
    method = method_of(name, like="red fox", vectors=2)
    for key, rows in method.draw(1).items():
        table = method.base_weight(key.removesuffix(".learned") + ".weight")
        ids = twins.family(name).tokenizers["text_encoder"]("red fox").input_ids[1:-1]
        assert len(ids) == 2 and torch.equal(rows, table[ids].mean(0).expand(2, -1))
    method = method_of(name, vectors=8)
    one, again, other = method.draw(1), method.draw(1), method.draw(2)
    for key, rows in one.items():
        table = method.base_weight(key.removesuffix(".learned") + ".weight")
        assert 0.7 < float(rows.std() / table.std()) < 1.3
        assert torch.equal(rows, again[key]) and not torch.equal(rows, other[key])


def test_the_familys_own_vocabulary_stays(name: str) -> None:
    method = method_of(name)
    for part, words in twins.family(name).tokenizers.items():
        assert "<new>" not in words.get_vocab()
        assert "<new>" in method.family.tokenizers[part].get_vocab()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"word": "cat"}, '"cat" is in the model\'s vocabulary'),
        ({"word": "sks"}, "is in the model's vocabulary"),
        ({"like": " "}, "is not in the model's vocabulary"),
        ({}, '(?s)of 2 captions none holds it.*"a cat".*caption_prefix'),
    ],
)
def test_what_cannot_be_learned_is_refused(rule: dict[str, str], words: str) -> None:
    run = settings("sd", **rule)
    with pytest.raises(UserError, match=words):
        methods.METHODS["textual_inversion"].check(
            run, examine(run.model), iter(["a cat", "word " * 80 + "<new>"])
        )


def test_what_can_be_learned_is_counted(name: str) -> None:
    run = settings(name, vectors=4)
    count = methods.METHODS["textual_inversion"].check(run, examine(run.model), iter(["a", "the <new>"]))
    assert count == 4 * 32 * (1 if name == "sd" else 2)


def test_capitals_are_refused() -> None:
    with pytest.raises(UserError, match="capitals"):
        settings("sd", word="<New>")
