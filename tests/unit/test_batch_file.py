"""A batch on disk: every number and word of it comes back as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from sfumato.data.batch import HOST, Batch, Draws, Fault, block_of, named, read, save
from sfumato.data.packed import packed
from tests.unit import batches


def micro_batch(**others: object) -> Batch:
    draw = torch.Generator().manual_seed(len(others))
    noise = [torch.randn(2, 4, 8, 8, generator=draw) for _ in range(3)]
    plain = Batch(
        ids=torch.tensor([7, 2**40]),
        visits=torch.tensor([0, 3]),
        captions=['a "quoted" cat\n', "ein Bär 🐻"],
        dropped=torch.tensor([True, False]),
        size_and_crop=torch.rand(2, 6, generator=draw),
        draws=Draws(
            noise[0],
            noise[1],
            torch.rand(2, generator=draw),
            torch.randn(2, 4, 1, 1, generator=draw),
            None,
        ),
    )
    return replace(plain, **others)  # type: ignore[arg-type]


def check_same(one: Batch, other: Batch) -> None:
    a, b = batches.tensors(one), batches.tensors(other)
    a |= {f"text/{name}": rows for name, rows in (one.text or {}).items()}
    b |= {f"text/{name}": rows for name, rows in (other.text or {}).items()}
    assert a.keys() == b.keys(), "other tensors"
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.shape == b[name].shape, f"another kind of {name}"
        # As bytes: NaN is not equal to itself.
        assert value.numpy(force=True).tobytes() == b[name].numpy(force=True).tobytes(), f"other {name}"
    assert (one.captions, one.faults, one.text is None) == (other.captions, other.faults, other.text is None)


def test_micro_batches_come_back_bit_for_bit(tmp_path: Path) -> None:
    """From a file, and from the block in which a worker hands them over."""
    pixels = torch.full((2, 3, 64, 64), float("nan"))
    pixels[0, 0, 0, 0] = -0.0
    moments = torch.randn(2, 64, 8, 8)[:, ::8]  # not contiguous
    moments[0, 0, 0, 0] = float("inf")
    several = [
        micro_batch(pixels=pixels, hint=torch.rand(2, 3, 64, 64), faults=(Fault("a.png", "no image"),)),
        micro_batch(moments=moments, text={"states": torch.rand(2, 77, 16).half()}, share=torch.ones(2)),
        micro_batch(text={}, draws=replace(micro_batch().draws, perturbation=torch.rand(2, 4, 8, 8))),
    ]
    save(several, tmp_path / "batch.safetensors")
    for one, other in zip(several, read(tmp_path / "batch.safetensors"), strict=True):
        check_same(one, other)
    large = micro_batch(pixels=torch.rand(2, 3, 512, 512))
    for each in [*several, large]:
        block = packed(each)
        assert isinstance(block.block, Tensor) == (each is large)
        opened = block.opened(copy=True)
        check_same(each, opened)
        if isinstance(block.block, Tensor):
            assert block.block.data_ptr() != opened.ids.untyped_storage().data_ptr(), "not copied"


@pytest.mark.parametrize("name", ["ids", "pixels", "captions", "noise"])
def test_the_comparison_catches(name: str) -> None:
    def nudged(value: Tensor) -> Tensor:
        return value + 1

    one = micro_batch(pixels=torch.zeros(2, 3, 8, 8))
    other = {
        "ids": replace(one, ids=nudged(one.ids)),
        "pixels": replace(one, pixels=None),
        "captions": replace(one, captions=["a", "b"]),
        "noise": replace(one, draws=replace(one.draws, noise=nudged(one.draws.noise))),
    }[name]
    with pytest.raises(AssertionError):
        check_same(one, other)


def test_a_damaged_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "batch.safetensors"
    save([micro_batch()], file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SafetensorError):
        read(file)


def moved(batch: Batch) -> tuple[Batch, int]:
    """A batch that was copied elsewhere, and by how many copies."""
    copies: list[Tensor] = []

    def change(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    return batch.moved(change), len(copies)


def test_a_batch_of_one_block_moves_at_once_and_its_text_apart() -> None:
    """What is read on the host stays there: to ask a device for it would wait for all its work."""
    batch = micro_batch(moments=torch.randn(2, 8, 8, 8), text={"states": torch.rand(2, 7, 16).half()})
    whole = packed(batch).opened(copy=False)
    found, copies = moved(whole)
    check_same(found, batch)
    assert copies == 2 and moved(batch)[1] > 5
    assert moved(packed(micro_batch(moments=torch.randn(2, 8, 8, 8))).opened(copy=False))[1] == 1
    assert found.text is not None
    assert found.text["states"].untyped_storage().nbytes() == found.text["states"].nbytes
    for name in HOST:
        assert getattr(found, name) is getattr(whole, name)
    assert found.draws.noise.data_ptr() != whole.draws.noise.data_ptr()


def test_what_is_no_whole_block_is_not_taken_for_one() -> None:
    """Part of a larger block would move all of it, and other strides would move other numbers."""
    tensors = named(packed(micro_batch(pixels=torch.rand(2, 3, 64, 64))).opened(copy=False))
    assert block_of(tensors) is not None
    assert block_of({name: each for name, each in tensors.items() if name != "pixels"}) is None
    assert block_of(tensors | {"pixels": tensors["pixels"].transpose(2, 3)}) is None
    assert block_of(tensors | {"pixels": tensors["pixels"].clone()}) is None
