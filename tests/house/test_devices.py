"""Devices are DeepSpeed's accelerator's business: no line outside the seam names one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.test_rooms import FILES, place

SEAM = ("device.py",)
"""The files that may."""
PLANS = "planner/"
"""Here names are data: plans are for machines that are not at hand."""
KINDS = ("cuda", "npu", "xpu", "mps", "hpu", "mlu", "sdaa", "hip")
NAMED = re.compile(rf"({'|'.join(KINDS)})(:\d+)?|nccl|hccl|ccl")


def texts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every text of a source that is no docstring, with its line."""
    words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
            yield node.value, node.lineno


def check_devices(source: str, file: str) -> None:
    """Fail for a device's name, torch's module of one, a method that moves to one, and torch's own seam."""
    if file in SEAM:
        return
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assert owner != "torch" or node.attr not in (*KINDS, "accelerator"), (
                f"{file}:{node.lineno} asks torch.{node.attr}; ask sfumato.device or get_accelerator()"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in KINDS, f"{file}:{node.lineno} moves to one kind of device"
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{name.name}".lstrip(".") for name in node.names]
            wrong = [name for name in names if re.match(rf"torch\.({'|'.join(KINDS)}|accelerator)\b", name)]
            wrong += [name for name in names if re.match(r"torch_|intel_extension|habana", name)]
            assert not wrong, f"{file}:{node.lineno} imports {', '.join(wrong)}"
    for text, line in [] if file.startswith(PLANS) else texts(tree):
        assert not NAMED.fullmatch(text), f'{file}:{line} names "{text}"; ask sfumato.device'


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_line_names_a_device(path: Path) -> None:
    check_devices(path.read_text(encoding="utf-8"), place(path))


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.cuda.max_memory_allocated()",
        "torch.npu.synchronize()",
        "stream = torch.xpu.Stream()",
        "import torch.cuda",
        "from torch import xpu",
        "from torch.cuda.amp import GradScaler",
        "import torch_npu",
        "model.cuda()",
        "model.to('cuda')",
        "torch.Generator(device='cuda:0')",
        "with torch.autocast('cuda', torch.bfloat16):\n    pass",
        "fused = device.type in ('cpu', 'cuda')",
        "dist.init_process_group('nccl')",
        "torch.accelerator.synchronize()",
    ],
)
def test_the_check_catches(line: str) -> None:
    with pytest.raises(AssertionError):
        check_devices(line, "engine/optimizer.py")
    check_devices(line, SEAM[0])
