"""Conditions: text encodings to the bit, sizes and crops, and who is dropped (traps T9 and T10)."""

import copy as copying
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sfumato import models
from sfumato.data.batch import Batch
from sfumato.models import prompts as text
from sfumato.models.family import Condition, Family
from sfumato.models.loading import quiet
from tests.unit.twins import PROMPTS, batch_of, change, copy, family, load, twin

ALL = pytest.mark.parametrize("name", models.families())


@lru_cache
def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        return diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=dtype)


def answers(pipeline: Any, prompts: list[str]) -> tuple[Condition, Condition]:
    """What the stock pipeline's own encode_prompt gives for prompts and for no negative prompt."""
    with torch.no_grad(), quiet():
        found = pipeline.encode_prompt(
            prompts, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    names = ("context", "pooled")
    return dict(zip(names, found[0::2], strict=False)), dict(zip(names, found[1::2], strict=False))


def check_same(ours: Condition, theirs: Condition) -> None:
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    for name, rows in theirs.items():
        assert ours[name].shape == rows.shape and ours[name].dtype == rows.dtype, (name, ours[name].shape)
        assert torch.equal(ours[name], rows), f"{name} differs by {(ours[name] - rows).abs().max()}"


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_the_pipeline_does(name: str, dtype: torch.dtype) -> None:
    part, pipeline = load(twin(name), dtype), stock(twin(name), dtype)
    for prompts in (PROMPTS[:3], PROMPTS, [PROMPTS[3]]):
        check_same(part.encode_prompts(prompts), answers(pipeline, prompts)[0])


@ALL
def test_the_null_condition_is_the_pipelines(name: str) -> None:
    check_same(family(name).null_condition(), answers(stock(twin(name)), ["a cat"])[1])


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_has_zeros_for_no_prompt_only_if_the_folder_says_so(zeros: bool, tmp_path: Path) -> None:
    folder = copy("sdxl", tmp_path)
    change(folder / "model_index.json", lambda index: index.update(force_zeros_for_empty_prompt=zeros))
    part, pipeline = load(folder), stock(folder)
    null = part.null_condition()
    check_same(null, answers(pipeline, ["a cat"])[1])
    assert (null["context"].abs().sum() == 0) == zeros
    assert part.assemble(part.build_denoiser()).config.force_zeros_for_empty_prompt == zeros
    with pytest.raises(AssertionError, match="differs"):
        broken = part.encode_prompts([""]) if zeros else {key: torch.zeros_like(v) for key, v in null.items()}
        check_same(broken, answers(pipeline, ["a cat"])[1])


class LastLayer(nn.Module):
    """An encoder whose hidden states are shifted by one: the last stands where the penultimate should."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.device = encoder, encoder.config, torch.device("cpu")

    def forward(self, *inputs: Any, **options: Any) -> Any:
        found = self.inner(*inputs, **options)
        found["hidden_states"] = (*found.hidden_states, found.hidden_states[-1])
        return found


def last_layer(part: Family) -> None:
    part.text_encoders = {name: LastLayer(encoder) for name, encoder in part.text_encoders.items()}


def swapped_encoders_padding(part: Family) -> None:
    part.tokenizers = dict(zip(part.tokenizers, [*part.tokenizers.values()][::-1], strict=True))


def pooled_without_projection(part: Family) -> None:
    part.text_encoders["text_encoder_2"].text_projection = nn.Identity()


@pytest.mark.parametrize("spoil", [last_layer, swapped_encoders_padding, pooled_without_projection])
def test_the_check_catches_a_wrong_sdxl_encoding(spoil: Callable[[Family], None]) -> None:
    part = load(twin("sdxl"))
    spoil(part)
    with pytest.raises(AssertionError):
        check_same(part.encode_prompts(PROMPTS[:3]), answers(stock(twin("sdxl")), PROMPTS[:3])[0])


def test_the_check_catches_another_layer_and_padding_in_sd() -> None:
    part, right = load(twin("sd")), answers(stock(twin("sd")), PROMPTS[:3])[0]
    encoder = part.text_encoders["text_encoder"]
    found = text.answer(encoder, part.words(PROMPTS[:3])["text_encoder"], None)
    check_same({"context": found[0]}, right)
    with pytest.raises(AssertionError, match="differs"):
        check_same({"context": found.hidden_states[-1]}, right)
    part.tokenizers["text_encoder"].pad_token = "!"
    with pytest.raises(AssertionError, match="differs"):
        check_same(part.encode_prompts(PROMPTS[:3]), right)


def test_an_encoder_that_wants_its_mask_gets_it(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    change(folder / "text_encoder" / "config.json", lambda values: values.update(use_attention_mask=True))
    masked, pipeline = load(folder), stock(folder)
    check_same(masked.encode_prompts(PROMPTS), answers(pipeline, PROMPTS)[0])
    assert not torch.equal(
        masked.encode_prompts(["cat"])["context"], family("sd").encode_prompts(["cat"])["context"]
    )


# Longer windows.


@ALL
@pytest.mark.parametrize(("window", "count"), [(150, 2), (225, 3)])
def test_the_first_of_several_windows_is_the_short_encoding(name: str, window: int, count: int) -> None:
    part = load(twin(name), prompt_window=window)
    short, long = family(name).encode_prompts(PROMPTS[:3]), part.encode_prompts(PROMPTS[:3])
    assert long["context"].shape == (3, 77 * count, short["context"].shape[-1])
    torch.testing.assert_close(long["context"][:, :77], short["context"], rtol=0, atol=1e-6)
    empty = family(name).encode_prompts([""])["context"]
    for rest in long["context"][:, 77:].split(77, dim=1):
        torch.testing.assert_close(rest, empty.expand_as(rest), rtol=0, atol=1e-6)
    if "pooled" in short:
        torch.testing.assert_close(long["pooled"], short["pooled"], rtol=0, atol=1e-6)


def check_every_word_is_read(ids: Tensor, words: Sequence[int], tokenizer: Any) -> None:
    """The windows hold all words in order, between begin and end, and nothing but padding after the end."""
    read = []
    for window in ids:
        end = window.tolist().index(tokenizer.eos_token_id)
        assert window[0] == tokenizer.bos_token_id
        assert set(window[end + 1 :].tolist()) <= {tokenizer.pad_token_id}
        read += window[1:end].tolist()
    assert read == list(words), f"{len(read)} of {len(words)} words"


@pytest.mark.parametrize("length", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225])
def test_windows_cut_nothing_that_fits(length: int) -> None:
    for part in (*family("sd").tokenizers.values(), *family("sdxl").tokenizers.values()):
        prompt = " ".join(["cat"] * length)
        words = part(prompt, add_special_tokens=False).input_ids
        assert len(words) == length
        ids, mask = text.tokenize(part, [prompt], 3)
        assert ids.shape == mask.shape == (1, 3, 77) and mask.sum() == length + 6
        check_every_word_is_read(ids[0], words, part)


def test_the_window_check_catches_words_lost_at_the_seam() -> None:
    part = family("sd").tokenizers["text_encoder"]
    words = part(" ".join(f"{n}" for n in range(100)), add_special_tokens=False).input_ids[:150]
    ids = text.tokenize(part, [part.decode(words)], 2)[0][0]
    ids[1, 1:-1] = ids[1, 1:-1].roll(-1)
    with pytest.raises(AssertionError):
        check_every_word_is_read(ids, words, part)


@ALL
def test_drawing_reads_the_same_windows(name: str) -> None:
    part = load(twin(name), prompt_window=150)
    net = part.build_denoiser()
    pipeline = part.assemble(net)
    tail = PROMPTS[3] + " red"
    pictures = []
    for prompt in (PROMPTS[3], tail):
        inputs = part.prompt_inputs(part.encode_prompts([prompt]), part.null_condition())
        options = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
        pictures.append(pipeline(**inputs, **options, generator=torch.Generator().manual_seed(0)).images)
    assert not torch.equal(*pictures), "the 162nd word is not seen"


# Dropping.


def check_dropped(part: Family, batch: Batch, found: Condition) -> None:
    """Row by row: the caption's encoding, or the null condition where the sample is dropped."""
    null, kept = part.null_condition(), part.encode_prompts(batch.captions)
    for row, dropped in enumerate(batch.dropped.tolist()):
        for name in kept:
            right = null[name][0] if dropped else kept[name][row]
            assert torch.equal(found[name][row], right), f"row {row} of {name}, dropped={dropped}"


@ALL
def test_conditions_are_dropped_per_sample(name: str) -> None:
    for dropped in ([True, False, True], [False] * 3, [True] * 3):
        batch = batch_of(["a cat", "a dog", "a house"], dropped)
        check_dropped(family(name), batch, family(name).encode(batch)[1])


@ALL
@pytest.mark.parametrize("spoil", [torch.Tensor.any, torch.Tensor.all])
def test_the_drop_check_catches_one_coin_for_the_batch(name: str, spoil: Callable[[Tensor], Tensor]) -> None:
    batch = batch_of(["a cat", "a dog", "a house"], [True, False, True])
    coin = replace(batch, dropped=spoil(batch.dropped).expand(3))
    with pytest.raises(AssertionError, match="row"):
        check_dropped(family(name), batch, family(name).encode(coin)[1])


# Size and crop.


def check_sizes(reach: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
    """`reach(size_and_crop)` gives what arrives at the U-Net's embedding: exactly the pipeline's time ids."""
    pipeline = stock(twin("sdxl"))
    sizes = [((257, 1155), (3, 1023), (512, 768)), ((300, 500), (0, 84), (1024, 1024))]
    rows = torch.cat(
        [
            pipeline._get_add_time_ids(*size, dtype=torch.float32, text_encoder_projection_dim=40)
            for size in sizes
        ]
    )
    ours = torch.tensor([[257.0, 1155, 3, 1023, 512, 768], [300, 500, 0, 84, 1024, 1024]])
    found = reach(ours)
    assert found.dtype == torch.float32 and torch.equal(found.view(2, 6), rows), found


def sizes_seen(part: Family, sizes: Tensor) -> Tensor:
    net = part.build_denoiser().to(torch.bfloat16)
    seen: list[Tensor] = []
    net.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    batch = replace(batch_of(["a cat", "a dog"], [False, True]), size_and_crop=sizes)
    latents, condition = part.encode(batch)
    part.predict(net, latents, torch.tensor([1.0, 999.0]), condition)
    return seen[0]


def test_sizes_and_crops_reach_the_unet_as_the_pipeline_gives_them() -> None:
    part = load(twin("sdxl"), torch.bfloat16)
    check_sizes(lambda sizes: sizes_seen(part, sizes))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda sizes: sizes[:, [1, 0, 3, 2, 5, 4]], id="width-first"),
        pytest.param(lambda sizes: sizes[:, [0, 1, 4, 5, 2, 3]], id="target-before-crop"),
        pytest.param(lambda sizes: sizes.bfloat16().float(), id="rounded-to-bf16"),
    ],
)
def test_the_size_check_catches(spoil: Callable[[Tensor], Tensor]) -> None:
    part = load(twin("sdxl"), torch.bfloat16)
    with pytest.raises(AssertionError):
        check_sizes(lambda sizes: sizes_seen(part, spoil(sizes)))


def test_sd_has_no_sizes() -> None:
    assert family("sd").encode(batch_of(["a cat"]))[1].keys() == {"context"}
    assert family("sdxl").encode(batch_of(["a cat"]))[1].keys() == {"context", "pooled", "size_and_crop"}


def test_the_null_condition_is_made_once_and_not_changed_by_use() -> None:
    part = family("sdxl")
    before = copying.deepcopy(part.null_condition())
    part.encode(batch_of(["a", "b"], [True, True]))
    check_same(part.null_condition(), before)
    assert part.null_condition() is part.null_condition()
