"""What may differ between two starts of one run, and how the rest is told."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.config import FASTEST, Config, parse
from sfumato.engine import checkpoint
from sfumato.errors import UserError

FREE = frozenset(
    {"name", "output", "steps", "micro_batch_size", "engine", "checkpoint", "preview", "log", "export"}
    | {"time_limit", "bad_numbers", "ema.snapshots", "environment", "validation", "profile"}
    | {"data.source", "data.workers", "data.worker_timeout", "data.store", "data.cache", "data.max_faults"}
    | {"data.prior.source"}
    | {"model.weights", "model.vae", "model.variant"}
)
"""Settings that may change between two starts of one run: they do not move its curve. That the data, and the
weights that do not learn, are the same is seen from their content, wherever they lie."""
BASE = {"model.weights", "model.variant"}
"""Settings that may change where the checkpoint holds the whole denoiser, but not where the rest is read
from them at every start."""
DATA, FROZEN = "data", "frozen"
"""The words in checkpoint.accept for other data, and for other numbers in what does not learn."""
WANTED = "checkpoint.accept"


def compared(config: Config, fingerprint: str, frozen: str | None, saved: checkpoint.Saved) -> list[str]:
    """What to tell of the settings that differ from a checkpoint's. UserError if one may not.

    A setting that the checkpoint does not know had its default. frozen: see `run.frozen`; None: not known.
    """
    try:
        known = parse(saved.state["config"]).model_dump(mode="json")
    except UserError:
        known = saved.state["config"]
    if config.engine.attention == FASTEST and isinstance(known["engine"].get("attention"), dict):  # kept
        known = known | {"engine": known["engine"] | {"attention": FASTEST}}
    changes = dict(differences(known, config.model_dump(mode="json")))
    changes.pop(WANTED, None)
    if saved.state["data"] != fingerprint:
        changes[DATA] = "the data are not those that it was trained on, or others are held out"
    if frozen is not None and saved.state.get("frozen") not in (None, frozen):
        changes[FROZEN] = "what does not learn is not what it was trained with, or is written otherwise"
    accepted = config.checkpoint.accept
    harmful = [
        f"{name}: {text}" for name, text in changes.items() if not (free(name, config) or name in accepted)
    ]
    if saved.step > config.steps:
        harmful.append(f"it is at step {saved.step}, beyond steps = {config.steps}")
    if harmful:
        names = [text.split(":")[0] for text in harmful if ":" in text]
        raise UserError(
            f"to go on with the run in {config.folder} from step {saved.step}",
            "\n       ".join(harmful),
            "put these back, or give the new run another name"
            + (f"; or, if you mean it, set checkpoint.accept = {json.dumps(names)}" if names else ""),
        )
    said = [f"goes on from {saved.path.name}"]
    said += [f"changed: {name}: {text}" for name, text in changes.items()]
    said += [
        f"checkpoint.accept names {name}, which did not change" for name in accepted if name not in changes
    ]
    return said


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of the settings that differ, with both values; of tables of two kinds, the kind alone."""
    tables = isinstance(before, dict) and isinstance(now, dict)
    if tables and (before.get("kind") == now.get("kind") or before.keys() == now.keys()):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif tables:
        yield f"{name}.kind", f"{before.get('kind')!r} -> {now.get('kind')!r}"
    elif before != now:
        yield name, f"{before!r} -> {now!r}"


def check_accepted(config: Config) -> None:
    """Raise UserError for a name in checkpoint.accept that is no setting's."""
    names = flat(config.model_dump(mode="json"))
    tables = {name.rpartition(".")[0] for name in names}
    known = {DATA, FROZEN, *names, *tables}
    for name in config.checkpoint.accept:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            do = f'write "{near[0]}"' if near else 'write names as in docs/config.md, such as "optimizer.lr"'
            raise UserError(f'checkpoint.accept = ["{name}"]', "no setting is called that", do)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def free(name: str, config: Config) -> bool:
    """Whether a setting may change between two starts of one run."""
    if name == "engine.precision" or (name in BASE and config.method.kind != "full"):
        return False
    if name == "steps" and config.optimizer.schedule != "constant":
        return False  # the learning rate falls over all of them
    return name in FREE or name.split(".")[0] in FREE
