"""Weights on disk, read slice by slice: a model's safetensors files, or random ones made once."""

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.engine.ranks import Ranks
from sfumato.engine.shards import shape_of
from sfumato.errors import UserError


class WeightFiles:
    """The tensors of one or more safetensors files, by name; opened lazily, never held whole.

    called: a parameter's name -> its name in the files.
    """

    def __init__(self, files: Sequence[Path], called: Callable[[str], str] = str) -> None:
        self.files, self.called = list(files), called
        self._open = [safe_open(file, "pt") for file in self.files]
        self._of = {name: file for file in self._open for name in file.keys()}

    def check(self, module: nn.Module) -> None:
        """Refuse files whose names or shapes are not those of the module's parameters."""
        wanted = {self.called(name): shape_of(p) for name, p in module.named_parameters()}
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
        name = self.called(name)
        return self._of[name].get_tensor(name).flatten()[start : start + length]


def starting(
    files: Sequence[Path],
    draw: Callable[[], dict[str, Tensor]],
    called: Callable[[str], str],
    folder: Path,
    ranks: Ranks,
) -> WeightFiles:
    """The weights that a run starts from: its files, and what is drawn, once, on the first rank.

    Through a file in the run's `folder` every ZeRO stage and number of ranks starts from the same numbers,
    and a run that is started again before its first checkpoint does too.
    """
    file = folder / "random.safetensors"
    if ranks.first and not file.exists() and (drawn := draw()):
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file(drawn, part)
        part.rename(file)
    ranks.barrier()
    return WeightFiles([*files, file] if file.exists() else files, called)
