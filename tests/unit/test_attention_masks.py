"""Ascend's fused attention, whose mask says the opposite of all others': its kernel emulated on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as diffusers_attention
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sfumato.errors import UserError
from sfumato.models import npu_masks
from sfumato.models.attention import probe, set_attention
from tests.unit.twins import family

THEIRS = diffusers_attention._maybe_modify_attn_mask_npu
CPU = torch.device("cpu")
BATCH, QUERIES, KEYS, HEADS = 2, 5, 7, 3


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, **options: Any
) -> list[Tensor]:
    """What torch_npu's does with the options that diffusers gives it: True in the mask leaves a key out."""
    assert options["input_layout"] == "BSND" and heads == query.shape[2]
    mask = options["atten_mask"]
    assert mask is None or (mask.dtype == torch.bool and mask.is_contiguous())
    assert mask is None or mask.shape in [
        (len(query), part, query.shape[1], key.shape[1]) for part in (1, heads)
    ]
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    kept = None if mask is None else ~mask
    return [scaled_dot_product_attention(*parts, attn_mask=kept, scale=options["scale"]).transpose(1, 2)]


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers as it is where torch_npu is installed."""
    monkeypatch.setattr(diffusers_attention, "npu_fusion_attention", npu_fusion_attention)
    monkeypatch.setattr(diffusers_attention, "_CAN_USE_NPU_ATTN", True)
    monkeypatch.setattr(diffusers_attention, npu_masks.THEIRS, THEIRS)
    yield


def masks() -> dict[str, Tensor | None]:
    """Masks that mean the same in every backend, by what they are."""
    torch.manual_seed(0)
    kept = torch.rand(BATCH, 1, 1, KEYS) > 0.4
    kept[..., 0] = True
    whole = torch.rand(BATCH, HEADS, QUERIES, KEYS) > 0.4
    whole[..., 0] = True
    least = torch.finfo(torch.bfloat16).min
    return {
        "none": None,
        "booleans": kept,
        "booleans of every head": whole,
        "all kept": torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool),
        "added, -10000": (~kept).float() * -10000.0,
        "added, -10000 in bf16": ((~kept).float() * -10000.0).to(torch.bfloat16),
        "added, the least": (~whole).to(torch.bfloat16) * least,
        "added, -inf": torch.zeros(kept.shape).masked_fill(~kept, -torch.inf),
        "added, nothing": torch.zeros(BATCH, 1, 1, KEYS),
        "causal": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(),
    }


def check(mask: Tensor | None) -> None:
    """Fail unless the NPU backend gives native attention's answer with this mask."""
    torch.manual_seed(1)
    sizes = [(BATCH, count, HEADS, 4) for count in (QUERIES, KEYS, KEYS)]
    parts = [torch.randn(size) for size in sizes]
    plain = mask.float() if mask is not None and mask.dtype == torch.bfloat16 else mask
    right = dispatch_attention_fn(*parts, plain, backend=AttentionBackendName.NATIVE)
    found = dispatch_attention_fn(*parts, mask, backend=AttentionBackendName._NATIVE_NPU)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("what", masks())
def test_every_mask_means_what_it_means_elsewhere(npu: None, what: str) -> None:
    npu_masks.mend()
    check(masks()[what])


def test_a_mask_of_samples_and_keys_is_taken_as_diffusers_writes_it(npu: None) -> None:
    kept = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    query, key = torch.zeros(BATCH, QUERIES, HEADS, 4), torch.zeros(BATCH, KEYS, HEADS, 4)
    out = npu_masks.left_out(query, key, kept)
    assert out is not None and torch.equal(out, ~kept[:, None, None].expand(-1, 1, QUERIES, -1))
    assert torch.equal(out, THEIRS(query, key, kept))


@pytest.mark.parametrize("what", ["added, -10000", "added, the least", "added, -inf", "added, nothing"])
def test_diffusers_own_turns_added_masks_around_and_is_caught(npu: None, what: str) -> None:
    with pytest.raises(AssertionError, match="close"):
        check(masks()[what])


def test_numbers_that_the_kernel_cannot_add_are_refused(npu: None) -> None:
    npu_masks.mend()
    with pytest.raises(UserError, match="cannot") as error:
        check(torch.linspace(-3, 0, KEYS).expand(BATCH, 1, 1, KEYS))
    assert "native" in error.value.do


def test_the_probe_tries_a_mask_and_catches_a_kernel_that_keeps_what_is_true(
    npu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe("_native_npu", CPU, torch.bfloat16, 8)

    def other(*inputs: Any, **options: Any) -> list[Tensor]:
        mask = options.pop("atten_mask")
        return npu_fusion_attention(*inputs, atten_mask=None if mask is None else ~mask, **options)

    monkeypatch.setattr(diffusers_attention, "npu_fusion_attention", other)
    with pytest.raises(UserError, match="differs from native"):
        probe("_native_npu", CPU, torch.bfloat16, 8)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_unet_with_a_mask_of_words_gives_the_same(npu: None, name: str) -> None:
    part = family(name)
    torch.manual_seed(0)
    net = part.build_denoiser().eval()
    width = net.config["cross_attention_dim"]
    words = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    told: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 8, width),
        "encoder_attention_mask": words,
    }
    if name == "sdxl":
        pooled = (
            net.config["projection_class_embeddings_input_dim"] - 6 * net.config["addition_time_embed_dim"]
        )
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.zeros(2, 6)}
    noisy = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        plain = net(noisy, 500, **told).sample
        for backend in ("native", "_native_npu"):
            set_attention(net, backend)
            torch.testing.assert_close(net(noisy, 500, **told).sample, plain, rtol=1e-4, atol=1e-5)
        diffusers_attention._maybe_modify_attn_mask_npu = THEIRS  # the fixture puts it back
        assert not torch.allclose(net(noisy, 500, **told).sample, plain, rtol=1e-2, atol=1e-2)
