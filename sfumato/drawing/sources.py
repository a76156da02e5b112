"""What a source means: a diffusers folder, a hub id, a run or one of its checkpoints. Imports no torch.

A run's export lies in runs/NAME/export, that of a checkpoint in runs/NAME/checkpoints/step-000500/export; its
sfumato.json says what kind of thing was learned, on which base.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.engine.published import checkpoint_of, checkpoints_in
from sfumato.errors import UserError
from sfumato.models import control
from sfumato.models.folder import listing, locate, read_json

LORA = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA."""
EMBEDDINGS = "learned_embeds.safetensors"
"""What diffusers calls the file of learned words."""


@dataclass(frozen=True)
class Found:
    """What a source means."""

    folder: Path
    """A diffusers folder."""
    prompt_window: int = 77
    """Tokens of a prompt that it was trained to read."""
    kind: str = "full"
    """What was learned: "full" is in `folder`; "lora", "controlnet" and "textual_inversion" in `adapter`."""
    adapter: Path | None = None
    """The export's folder of what belongs to the model in `folder`."""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)
    """What the export and the run's record say."""
    variant: str | None = None
    """The variant of the files in `folder`."""


def find_model(source: str | Path, variant: str | None = None) -> Found:
    """The model that a source means, and what was learned on it. Raises UserError."""
    export = export_of(Path(source).expanduser())
    if export is None:
        return Found(locate(str(source), variant=variant), variant=variant)
    facts, record = facts_of(export)
    model = record.get("model", {})
    window = int(facts.get("window") or model.get("prompt_window") or 77)
    kind = kind_of(export, facts)
    if kind == "full":
        return Found(export, window, facts=facts, variant=variant)
    base = model.get("weights") or facts.get("base")
    if base is None:
        raise UserError(
            f"drawing with {source}",
            f"a {kind} that does not say on which model it was trained",
            "name the model first, then this with --control or --lora",
        )
    its = model.get("variant") or variant
    return Found(locate(str(base), model.get("revision"), its), window, kind, export, facts, its)


def export_of(path: Path) -> Path | None:
    """The export that a run's or checkpoint's folder holds, or that the folder is; None for all else.

    Raises UserError for a run or a checkpoint without one.
    """
    if (path / "sfumato.json").is_file() or (path / "model_index.json").is_file():
        return path
    # A run that was stopped has those of its checkpoints.
    for export in (path / "export", *(step / "export" for step in reversed(checkpoints_in(path)))):
        if any((export / name).is_file() for name in ("sfumato.json", "model_index.json", LORA)):
            return export
    if (path / "resolved.json").is_file():
        raise UserError(
            f"drawing with the run {path}",
            "neither it nor one of its checkpoints holds an export",
            "let it finish: start the same command again; or draw with the weights that it started from",
        )
    if checkpoint_of(path) is not None:
        do = f"write one: sfumato export {path} --to FOLDER, and draw with that"
        raise UserError(f"drawing with the checkpoint {path}", "no export is in it", do)
    return None


def facts_of(export: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an export says about itself, and the record of its run; {} where there is none."""
    facts = read_json(export / "sfumato.json") if (export / "sfumato.json").is_file() else {}
    if not facts and export.name != "export":
        return {}, {}
    # runs/NAME/export, or runs/NAME/checkpoints/step-000500/export
    above = [export.absolute().parents[n] for n in (0, 2) if n < len(export.absolute().parents)]
    records = [folder / "resolved.json" for folder in above if (folder / "resolved.json").is_file()]
    return facts, read_json(records[0]) if records else {}


def kind_of(export: Path, facts: dict[str, Any]) -> str:
    """What was learned: as sfumato.json says, or as the files show. UserError for a kind that is unknown."""
    kind = facts.get("kind")
    if kind is None:
        if (export / LORA).is_file():
            kind = "lora"
        elif (export / EMBEDDINGS).is_file():
            kind = "textual_inversion"
        elif control.is_control(export):
            kind = "controlnet"
        else:
            kind = "full"
    if (export / "model_index.json").is_file():
        return "full"  # whatever was learned, it is a whole pipeline
    if kind not in ("lora", "controlnet", "textual_inversion"):
        found = f"an export of the kind {kind!r}, without model_index.json; it holds {listing(export)}"
        raise UserError(f"drawing with {export}", found, "export the run again")
    return str(kind)


def find_control(source: str | Path) -> Path:
    """The folder of a ControlNet: a diffusers folder, a run, a checkpoint or a hub id. Raises UserError."""
    return control.find(export_of(Path(source).expanduser()) or source, f"the ControlNet {source}")


def find_lora(source: Path) -> Path:
    """The file of a LoRA: itself, in a folder, or of a run or checkpoint. Raises UserError."""
    for file in (source / "export" / LORA, source / LORA, source):
        if file.is_file():
            return file
    raise UserError(
        f"the LoRA {source}",
        f"no such file, and no {LORA} there",
        "name a LoRA's file or a run's folder",
    )


def checkpoints_of(run: Path) -> tuple[str, list[tuple[int, Path]]]:
    """The weights that a run started from, and its exports (step, folder) in the order of the steps.

    Raises UserError if the folder is no run, or none of its checkpoints holds an export and there is none of
    its end.
    """
    asked = f"--compare {run}"
    if not (run / "resolved.json").is_file():
        raise UserError(asked, "no run is there: it holds no resolved.json", "name a run's folder: runs/NAME")
    base = read_json(run / "resolved.json").get("model", {}).get("weights")
    if base is None:
        raise UserError(asked, "resolved.json names no model.weights", "name a run of Sfumato")
    found: dict[int, Path] = {}
    for folder in checkpoints_in(run):
        if (folder / "export" / "sfumato.json").is_file():
            found[int(folder.name.removeprefix("step-"))] = folder / "export"
    last = run / "export"
    if (last / "sfumato.json").is_file():
        found.setdefault(int(read_json(last / "sfumato.json").get("step", 0)), last)
    if not found:
        raise UserError(asked, "none of its checkpoints holds an export", "let it finish, or export one")
    return str(base), sorted(found.items())
