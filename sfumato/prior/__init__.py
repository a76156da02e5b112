"""DreamBooth's class images: what a model draws of the prior before it is trained, kept for every run.

    STORE/prior/KEY/000017.png          drawn from seed 17, whatever the number of ranks
    STORE/prior/KEY/first-000100.jsonl  the list that a run of 100 pictures reads
    STORE/prior/KEY/facts.json  uses/   what they are, and which runs read them

KEY is a hash of the weights, the prompt and how it is drawn, but not of the arithmetic: a run in bf16 reads
what one in fp32 drew. So none that is there is ever stale, a run that asks for more draws only those that are
missing, and one that asks for fewer reads the first of them. `fill` draws them.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.config import Config, Data
from sfumato.data.sources.kinds import check_outside
from sfumato.data.store import key_of, uses
from sfumato.data.store.tensors import KEY_BYTES
from sfumato.data.store.writer import published
from sfumato.errors import UserError
from sfumato.models.folder import examine, learned
from sfumato.models.identity import fingerprint

FORMAT = 1
"""Another number when the same asks give other pictures."""
ROOM = "prior"
"""The folder in the store."""


@dataclass(frozen=True)
class Pictures:
    """The class images that a run asks for, drawn or not."""

    folder: Path
    prompt: str
    count: int
    side: int
    """Pixels along each side."""
    facts: Mapping[str, Any]
    """What they are, for people."""

    def file(self, number: int) -> Path:
        """Where a picture lies."""
        return self.folder / f"{number:06d}.png"

    @property
    def rows(self) -> Path:
        """The list of them all, which is there when they are."""
        return self.folder / f"first-{self.count:06d}.jsonl"

    def sound(self, number: int) -> bool:
        """Whether a picture is there and whole: all its checksums are right."""
        try:
            with Image.open(self.file(number)) as image:
                size = image.size
                image.verify()
        except (OSError, SyntaxError, ValueError, struct.error):
            return False
        return size == (self.side, self.side)

    def missing(self) -> list[int]:
        """The numbers of those that are to be drawn."""
        return [number for number in range(self.count) if not self.sound(number)]

    def given(self, config: Config) -> Config:
        """The config with these as data.prior.source."""
        assert config.data.prior is not None, "the config has no prior"
        prior = config.data.prior.model_copy(update={"source": str(self.rows)})
        return config.model_copy(update={"data": config.data.model_copy(update={"prior": prior})})

    def note(self, run: Path) -> None:
        """Write down what they are and that a run reads them; the run's folder is there from now on."""
        run.mkdir(parents=True, exist_ok=True)
        name = str(run.absolute())
        uses.note(self.folder / "uses", key_of(name).hex(), np.zeros((0, KEY_BYTES), np.uint8), {"run": name})
        put(self.folder / "facts.json", json.dumps(self.facts, indent=1) + "\n")

    def finish(self) -> None:
        """Write the list, once they are all there."""
        lines = [json.dumps({"file_name": self.file(number).name}) + "\n" for number in range(self.count)]
        put(self.rows, "".join(lines))


def put(path: Path, text: str) -> None:
    """A file with this text, appearing at once; one that has it is left alone, for its time is its stamp."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with published(path, len(text)) as file:
            file.write(text.encode())


def drawn(config: Config) -> bool:
    """Whether a config asks for class images that the model draws."""
    return config.data.prior is not None and config.data.prior.source is None


def check_store(data: Data) -> None:
    """Raise UserError if what is drawn would be found among the pictures that the data hold."""
    asked = f"class images in data.store = {data.store}"
    check_outside(data.store, data.layouts, asked, "set data.store to a folder outside")


def find(config: Config) -> Pictures:
    """The class images of such a config; reads all the weights, a gigabyte a second or so.

    Raises UserError for a model that draws nothing, for a store within the data, and for every fault of the
    model's folder.
    """
    prior, model = config.data.prior, config.model
    assert prior is not None and prior.source is None, "no class images are to be drawn"
    if model.from_scratch:
        found = "a model of random numbers draws nothing that could be preserved"
        do = "set data.prior.source to a folder of pictures, or take [data.prior] out"
        raise UserError("data.prior with model.from_scratch = true", found, do)
    check_store(config.data)
    facts, [side] = examine(model), config.data.resolutions
    asked = {"prompt": prior.prompt, "pixels": side, "steps": prior.steps, "guidance": prior.guidance}
    parts = (learned(facts.components), "scheduler", *facts.needs)
    said = [FORMAT, asked, facts.family, sorted(facts.settings.items()), model.prompt_window, model.variant]
    key = fingerprint([facts.vae_folder, *(facts.folder / part for part in parts)], said)
    told = {"format": FORMAT, **asked, "model": model.weights, "family": facts.family, "key": key}
    return Pictures(config.data.store / ROOM / key, prior.prompt, prior.images, side, told)


def prune(store: Path, tell: Callable[[str], None] = print) -> tuple[int, int]:
    """Free the class images that no run reads whose folder is still there; their number and bytes."""
    number = freed = 0
    for folder in sorted(path.parent for path in (store / ROOM).glob("*/facts.json")):
        if any(Path(use.facts["run"]).is_dir() for use in list(uses.noted(folder / "uses"))):
            continue
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        files = list(folder.glob("*.png"))
        tell(f'the runs are gone that read {len(files):,} class images of "{facts["prompt"]}"')
        number, freed = number + len(files), freed + sum(file.stat().st_size for file in files)
        shutil.rmtree(folder)
    return number, freed
