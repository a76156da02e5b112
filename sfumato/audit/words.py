"""How long captions are: in tokens of the model's own tokenizers if its folder is here, else in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.config import Model
from sfumato.errors import UserError
from sfumato.models.folder import read_facts
from sfumato.models.hub import is_hub_id

MARKS = 2  # tokens of a window of 77 that are not the caption's: its begin and its end


@dataclass(frozen=True)
class Ruler:
    """Measures captions."""

    tokenizers: dict[str, Any]
    """Those of the model by their folders' names, without those that give the same tokens; none: words."""
    limit: int | None
    """Tokens of a caption that are read, without the marks of begin and end; None where words are counted."""
    why: str
    """Why words are counted."""

    @property
    def unit(self) -> str:
        """What is counted."""
        return "tokens" if self.tokenizers else "words"

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The length of each text, by the tokenizer that makes the most of it."""
        if not self.tokenizers:
            return [len(text.split()) for text in texts]
        counts = [
            map(len, words(list(texts), add_special_tokens=False, verbose=False).input_ids)
            for words in self.tokenizers.values()
        ]
        return [max(each) for each in zip(*counts, strict=True)]

    def read(self, text: str) -> str:
        """The beginning of a text that the model reads."""
        for words in self.tokenizers.values():
            if not words.is_fast:
                continue
            told = words(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            assert self.limit is not None, "there are tokenizers, but no limit"
            ends = [end for _, end in told.offset_mapping[: self.limit]]
            text = text[: max(ends, default=0)] if len(told.input_ids) > self.limit else text
        return text


def ruler(model: Model) -> Ruler:
    """What measures a model's captions. Downloads nothing."""
    try:
        folder = at_hand(model)
        names = [name for name in read_facts(folder).needs if name.startswith("tokenizer")]
        # The import takes a second or two.
        from sfumato.models.loading import tokenizer

        found: dict[str, Any] = {}
        for name in names:
            words = tokenizer(folder / name)
            same = [other for other in found if found[other].get_vocab() == words.get_vocab()]
            found |= {} if same else {name: words}
    except UserError as error:
        return Ruler({}, None, f"{error.asked}: {error.found}")
    windows = {77: 1, 150: 2, 225: 3}[model.prompt_window]
    return (
        Ruler(found, windows * (77 - MARKS), "") if found else Ruler({}, None, "the model has no tokenizer")
    )


def at_hand(model: Model) -> Path:
    """The weights' folder, or what the hub's cache holds of it. Raises UserError if there is none."""
    folder = Path(model.weights).expanduser()
    if not folder.is_dir() and is_hub_id(model.weights):
        from huggingface_hub import snapshot_download

        try:
            wanted = ["model_index.json", "*/*.json", "*/*.txt"]
            told = snapshot_download(
                model.weights, revision=model.revision, allow_patterns=wanted, local_files_only=True
            )
            return Path(told)
        except (OSError, ValueError):
            pass
    if not folder.is_dir():
        raise UserError(f"the weights {model.weights}", "they are not on this machine", "download them")
    return folder
