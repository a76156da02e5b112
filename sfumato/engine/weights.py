"""Weights on disk, read slice by slice: a model's safetensors files, or random ones made once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.engine.published import sync
from sfumato.engine.ranks import Ranks
from sfumato.engine.shards import shape_of
from sfumato.errors import UserError
from sfumato.models.texts import RECOUNTED, bare

Files = Mapping[str, Sequence[Path]]
"""A part's name -> its safetensors; "" is the name of files whose tensors are named in full."""


class WeightFiles:
    """The tensors of safetensors files, by name; opened lazily, never held whole.

    called: a parameter's name -> its name in the files of its part, after the part's name.
    """

    def __init__(self, files: Files, called: Callable[[str], str] = str) -> None:
        self.files, self.called = [file for several in files.values() for file in several], called
        opened = [(part, safe_open(file, "pt")) for part, several in files.items() for file in several]
        self._of = {
            bare(f"{part}.{name}" if part else name): (file, name)
            for part, file in opened
            for name in file.keys()
            if not name.endswith(RECOUNTED)
        }

    def check(self, module: nn.Module) -> None:
        """Refuse files whose names or shapes are not those of the module's parameters."""
        wanted = {self.name(name): shape_of(p) for name, p in module.named_parameters()}
        missing = sorted(wanted.keys() - self._of.keys())
        surplus = sorted(self._of.keys() - wanted.keys() - {bare(name) for name, _ in module.named_buffers()})
        wrong = [
            f"{name} is {found}, not {shape}"
            for name, shape in wanted.items()
            if name in self._of and (found := self.shape(name)) != shape
        ]
        for what, names in (("lack", missing), ("also hold", surplus), ("differ in", wrong)):
            if names:
                raise UserError(
                    f"weights from {', '.join(str(f) for f in self.files)}",
                    f"the files {what} {len(names)} tensors, the first: {names[0]}",
                    "use weights that fit the config.json beside them",
                )

    def name(self, parameter: str) -> str:
        """What a parameter is called here."""
        return bare(self.called(parameter))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        file, inner = self._of[name]
        return tuple(file.get_slice(inner).get_shape())

    def close(self) -> None:
        """Let go of the files, whose pages are memory of this process as long as they are open."""
        self._of.clear()

    def __call__(self, name: str, start: int, length: int) -> Tensor:
        """A slice of a parameter's flattened tensor, (length,)."""
        file, inner = self._of[self.name(name)]
        return file.get_tensor(inner).flatten()[start : start + length]


def starting(
    files: Files,
    draw: Callable[[], dict[str, Tensor]],
    called: Callable[[str], str],
    folder: Path,
    ranks: Ranks,
    origin: str = "",
) -> WeightFiles:
    """The weights that a run starts from: its files, and what is drawn, once, on the first rank.

    Through a file in the run's `folder` every ZeRO stage and number of ranks starts from the same numbers,
    and a run that is started again before its first checkpoint does too. origin: all that the drawn numbers
    depend on; a file of another origin is drawn anew.
    """
    file = folder / "random.safetensors"
    if ranks.first and origin_of(file) not in (origin, ""):
        file.unlink(missing_ok=True)
        if drawn := draw():
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            save_file(drawn, part, {"origin": origin})
            sync(part)
            part.rename(file)
    ranks.barrier()
    return WeightFiles({**files, "": [file]} if file.exists() else files, called)


def origin_of(file: Path) -> str | None:
    """What the drawn numbers of a file came from, "" of an older one; None where there is no such file."""
    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get("origin", "")
    except (OSError, SafetensorError):
        return None
