"""Weights on disk, read slice by slice: a model's safetensors files, or random ones made once."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.engine.ranks import Ranks
from sfumato.engine.shards import shape_of
from sfumato.errors import UserError


class WeightFiles:
    """The tensors of one or more safetensors files, by name; opened lazily, never held whole."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._open = [safe_open(file, "pt") for file in self.files]
        self._of = {name: file for file in self._open for name in file.keys()}

    def check(self, module: nn.Module) -> None:
        """Refuse files whose names or shapes are not those of the module's parameters."""
        wanted = {name: shape_of(p) for name, p in module.named_parameters()}
        missing = sorted(wanted.keys() - self._of.keys())
        surplus = sorted(self._of.keys() - wanted.keys() - {name for name, _ in module.named_buffers()})
        wrong = [
            f"{name} is {found}, not {shape}"
            for name, shape in wanted.items()
            if name in self._of and (found := tuple(self._of[name].get_slice(name).get_shape())) != shape
        ]
        for what, names in (("lack", missing), ("also hold", surplus), ("differ in", wrong)):
            if names:
                raise UserError(
                    f"weights for {type(module).__name__} from {', '.join(str(f) for f in self.files)}",
                    f"the files {what} {len(names)} tensors, the first: {names[0]}",
                    "use weights that fit the config.json beside them",
                )

    def __call__(self, name: str, start: int, length: int) -> Tensor:
        """A slice of the flattened tensor, (length,)."""
        return self._of[name].get_tensor(name).flatten()[start : start + length]


def starting(
    build: Callable[[], nn.Module], files: Sequence[Path], seed: int, folder: Path, ranks: Ranks
) -> WeightFiles:
    """The weights that a run starts from: the files, or where there are none random ones kept in `folder`."""
    return WeightFiles(files) if files else from_random(build, seed, folder, ranks)


def from_random(build: Callable[[], nn.Module], seed: int, folder: Path, ranks: Ranks) -> WeightFiles:
    """Draw the module's starting weights once, on the first rank's CPU, and hand them over as a file.

    Through a file every ZeRO stage and number of ranks starts from the same numbers, and a run that is
    started again before its first checkpoint does too.
    """
    file = folder / "random.safetensors"
    if ranks.first and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build()
        part = file.with_suffix(".part")
        save_file({name: p.detach().contiguous() for name, p in module.state_dict().items()}, part)
        part.rename(file)
    ranks.barrier()
    return WeightFiles([file])
