"""A denoiser's repeated blocks, each compiled by torch.compile; the rest of it stays as it is.

A block as a whole is compiled once for all of its kind, so that a large model takes as long as a small one.
"""

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sfumato.device import COMPILERS, kind
from sfumato.errors import UserError

BACKEND = "inductor"
KINDS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of diffusers' U-Nets and ControlNets; of other models it is those that diffusers names itself."""
WHOLE = (*KINDS, "CLIPEncoderLayer")
"""Blocks whose weights come and go together at stage 3: at most 49 million numbers each in SD and SDXL."""
VARIANTS = 4
"""Compilations of one kind of block at one size: with and without gradients of its input and of its text."""


class Compiled:
    """How a block is called: compiled where it learns, or where it draws, and as it is elsewhere.

    What is seldom done, such as the validation of a run that trains, is not worth minutes of compiling.
    """

    def __init__(self, block: nn.Module, learning: bool, several: bool) -> None:
        self.learning = learning
        self.plain = block._call_impl
        # Marking sizes by itself, torch would take the width of another block for a size that varies.
        self.compiled = torch.compile(block._call_impl, backend=BACKEND, dynamic=several)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() != self.learning:
            return self.plain(*inputs, **options)
        try:
            return self.compiled(*inputs, **options)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            asked = "compiled blocks (engine.compile, --compile)"
            found = f"torch.compile starts anew again and again: {str(error).strip().split(chr(10))[0]}"
            raise UserError(asked, found, "leave it off for this model") from error


def compile_blocks(net: nn.Module, several: bool, learning: bool = True) -> None:
    """Have a model's repeated blocks compiled when they are first called. Parameters keep their names.

    several: images of several sizes will come; then one compilation is for all of them, whose code is slower
    than that for a single size. learning: compile for gradients, else for drawing.
    """
    kinds = {*KINDS, *getattr(net, "_repeated_blocks", ())}
    blocks = [block for block in net.modules() if type(block).__name__ in kinds]
    assert blocks, f"{type(net).__name__} has no blocks that repeat"
    for block in blocks:
        block._compiled_call_impl = Compiled(block, learning, several)
    settings: Any = torch._dynamo.config
    # All blocks are called through one function of torch's, which counts them together.
    settings.cache_size_limit = max(settings.cache_size_limit, VARIANTS * len({sizes_of(b) for b in blocks}))
    settings.fail_on_cache_limit_hit = True
    if kind() == "cpu":
        # inductor would turn convolutions' tensors to channels last: 8 to 18 % of a step (LOG.md).
        import torch._inductor.config as inductor

        inductor.layout_optimization = False


def check_here(asked: str, device: str, precision: str) -> None:
    """Raise UserError where torch cannot compile for a kind of device, or is known to compile wrong numbers.

    asked: the setting. device: its kind, as torch says it. precision: "fp32", "bf16" or "fp16".
    """
    compiler = os.environ.get("CXX", "g++")
    if device not in COMPILERS:
        raise UserError(asked, f"nobody has tried torch.compile of these models on {device}", "leave it off")
    package = COMPILERS[device]
    if package is not None and find_spec(package) is None:
        raise UserError(
            asked, f"torch compiles with {package}, which is not installed", f"pip install {package}"
        )
    if device == "cpu" and shutil.which(compiler) is None:
        found = f"torch compiles with {compiler}, which is not installed"
        raise UserError(asked, found, "install a compiler for C++, name it in CXX, or leave it off")
    if device == "cpu" and precision != "fp32":
        found = f"torch 2.13's kernels for CPUs gave wrong gradients in bf16, and this is {precision}"
        raise UserError(asked, found, "compute in fp32, or leave it off")


def draws_compiled(net: nn.Module) -> bool:
    """Whether blocks of a model are compiled for drawing."""
    calls = (vars(block).get("_compiled_call_impl") for block in net.modules())
    return any(isinstance(call, Compiled) and not call.learning for call in calls)


def sizes_of(block: nn.Module) -> tuple[Any, ...]:
    """What blocks have in common that are compiled as one."""
    return type(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
