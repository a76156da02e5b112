"""The model card of an export: README.md as the Hugging Face hub reads it, with a curve and pictures."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.config import Config
from sfumato.drawing.grid import grid
from sfumato.drawing.pictures import CONDITIONS, LIST
from sfumato.report.curve import curve
from sfumato.report.public import clean, flat, literal, on_hub, plain, settings, short, toml

FILES = ("README.md", "curve.png", "drawn.png")
"""What a card consists of."""
HERE = 'model = "."  # this folder'
"""The line of a card's code that says where the model lies."""
PICTURE = 512
"""The longest side of a preview in a card, in pixels."""
MACHINE = ("name", "output", "data.store", "data.workers", "data.worker_timeout")
"""Settings that say nothing about the model."""
TOLD = ("steps", "batch_size", "optimizer.lr", "data.resolution", "engine.precision")
"""Settings that are told even where they are the usual ones."""
KINDS = {
    "full": "Every weight of this model's denoiser",
    "lora": "This LoRA",
    "controlnet": "This ControlNet",
    "textual_inversion": "This word",
}
FAMILIES = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
"""The hub's words for families."""


def write(
    folder: Path, config: Config, state: Mapping[str, Any], facts: Mapping[str, Any], run: Path | None = None
) -> None:
    """Write the card of an export into its folder.

    state: of the checkpoint, as its manifest says. facts: as sfumato.json says. run: the run's folder, whose
    curve and previews up to the checkpoint's step are shown; unset: none are.
    """
    shown = []
    if run is not None and (points := losses(run / "metrics.jsonl", state["step"])):
        curve(points).save(folder / "curve.png")
        shown.append("![Loss over steps](curve.png)\n")
    drawn = previews(run / "images", state["step"]) if run is not None else None
    if drawn is not None:
        sheet, said = drawn
        sheet.save(folder / "drawn.png")
    parts = [
        front(config, facts, licence(config)),
        f"# {config.name}\n",
        intro(config, state, facts),
        *([f"![{said}](drawn.png)\n\n{said}.\n"] if drawn is not None else []),
        "## How to draw with it\n",
        f"```python\n{code(config, facts)}```\n",
        "## How it was trained\n",
        table(config),
        *shown,
        data_line(config, state),
        software(run),
        "## To train it again\n",
        again(config),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def front(config: Config, facts: Mapping[str, Any], licence: str | None) -> str:
    """The front matter, by which the hub sorts models. licence: None leaves it to the user."""
    from huggingface_hub import ModelCardData  # takes a second

    kind, base = config.method.kind, config.model.weights
    tags = ["text-to-image", "diffusers", FAMILIES.get(str(facts["family"]), str(facts["family"]))]
    tags += [kind.replace("_", "-")] * (kind != "full") + ["sfumato"]
    more: dict[str, Any] = {"instance_prompt": clean(str(facts["trigger"]))} if facts["trigger"] else {}
    if on_hub(base):
        more["base_model_relation"] = "finetune" if kind == "full" else "adapter"
    sources = [layout.source for layout in config.data.layouts]
    data = ModelCardData(
        base_model=base if on_hub(base) else None,
        datasets=[source for source in sources if on_hub(source)] or None,
        library_name="diffusers",
        license=licence,
        pipeline_tag="text-to-image",
        tags=tags,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def licence(config: Config) -> str | None:
    """The licence that the base's own card names, if it lies here."""
    from huggingface_hub import ModelCard

    file = Path(config.model.weights).expanduser() / "README.md"
    try:
        said = ModelCard.load(file).data.license if file.is_file() else None
    except (OSError, ValueError):
        return None
    return said if isinstance(said, str) else None


def intro(config: Config, state: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What it is."""
    base = config.model.weights
    name = f"[{base}](https://huggingface.co/{base})" if on_hub(base) else plain(short(base))
    of = f"{state['step']:,}" + (f" of {config.steps:,}" if config.steps != state["step"] else "")
    begin = "from random numbers, beside the frozen parts of" if config.model.from_scratch else "on"
    kept = "the average over training" if facts["weights"] != "weight" else "what it was at the end"
    lines = [
        f"{KINDS[config.method.kind]} was trained {begin} {name} for {of} steps with Sfumato "
        f"{facts['sfumato']}. Kept was {kept}."
    ]
    if config.method.kind == "textual_inversion":
        lines.append(f"The word is {literal(str(facts['trigger']))}.")
    elif facts["trigger"]:
        lines.append(f"Prompt it with {literal(str(facts['trigger']))}.")
    if config.model.prompt_window > 77:
        lines.append(
            f"It learned to read prompts of {config.model.prompt_window} tokens; the code below cuts "
            "them after 77, `sfumato sample` does not."
        )
    return " ".join(lines) + "\n"


def code(config: Config, facts: Mapping[str, Any]) -> str:
    """Python that draws with the export, if it runs in its folder."""
    side, prompt = max(config.data.resolutions), str(facts["trigger"] or "")
    said = prompt or next(iter(config.preview.prompts), "a picture")
    draw = f"image = pipeline(prompt, width={side}, height={side}).images[0]"
    local = "" if on_hub(config.model.weights) else "  # a folder: say where yours lies"
    base = f"base = {short(config.model.weights)!r}{local}"
    load = "pipeline = DiffusionPipeline.from_pretrained(base)"
    kind, imports = config.method.kind, ["from diffusers import DiffusionPipeline"]
    if kind == "full":
        lines = [HERE, "pipeline = DiffusionPipeline.from_pretrained(model)"]
    elif kind == "lora":
        file = "pytorch_lora_weights.safetensors"
        lines = [HERE, base, load, f'pipeline.load_lora_weights(model, weight_name="{file}")']
    elif kind == "controlnet":
        name = "StableDiffusion" + ("XL" if facts["family"] == "sdxl" else "") + "ControlNetPipeline"
        imports = [f"from diffusers import ControlNetModel, {name}", "from diffusers.utils import load_image"]
        lines = [HERE, base, "controlnet = ControlNetModel.from_pretrained(model)"]
        lines += [f"pipeline = {name}.from_pretrained(base, controlnet=controlnet)"]
        lines += ['condition = load_image("condition.png")']
        draw = draw.replace("prompt, ", "prompt, image=condition, ")
    else:
        file = "learned_embeds.safetensors"
        lines = [HERE, base, load]
        if facts["family"] == "sdxl":
            imports += ["from huggingface_hub import hf_hub_download", "from pathlib import Path"]
            imports += ["from safetensors.torch import load_file"]
            lines += [f'file = Path(model) / "{file}"']
            lines += [f'words = load_file(file if file.exists() else hf_hub_download(model, "{file}"))']
            for key, end in (("clip_l", ""), ("clip_g", "_2")):
                where = f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end}"
                lines += [f'pipeline.load_textual_inversion(words["{key}"], token={prompt!r}, {where})']
        else:
            lines += [f'pipeline.load_textual_inversion(model, weight_name="{file}")']
        said = f"a picture of {prompt}"
    lines += [f"prompt = {said!r}", draw, 'image.save("picture.png")']
    return "\n".join([*sorted(imports), "", *lines]) + "\n"


def table(config: Config) -> str:
    """The settings that are not the usual ones, and a few that are always told."""
    said = {name: value for name, value in settings(config) if name not in MACHINE}
    every = dict(flat(config.model_dump(mode="json")))
    rows = {name: said.pop(name, every[name]) for name in TOLD} | said
    lines = [f"| {literal(name)} | {literal(toml(value))} |\n" for name, value in rows.items()]
    return "| setting | value |\n|---|---|\n" + "".join(lines)


def data_line(config: Config, state: Mapping[str, Any]) -> str:
    """How many images, from where, and what tells whether others have the same."""
    names = ", ".join(dict.fromkeys(literal(short(layout.source)) for layout in config.data.layouts))
    count = f"{state['records']:,} images of {names}" if "records" in state else names
    seen = state["samples"]
    return f"Data: {count}; {seen:,} samples were seen. Fingerprint: {literal(str(state['data']))}.\n"


def software(run: Path | None) -> str:
    """The versions that it was trained with."""
    file = run / "environment.json" if run is not None else None
    if file is None or not file.is_file():
        return ""
    told = json.loads(file.read_text(encoding="utf-8"))
    names = {"sfumato": told["sfumato"], "python": told["python"], **told["packages"]}
    ranks = f"{told['ranks']} {told['device']} rank{'s' * (told['ranks'] > 1)}"
    return (
        f"Software: {', '.join(f'{name} {plain(str(number))}' for name, number in names.items())}; {ranks}.\n"
    )


def again(config: Config) -> str:
    """The config file and the command; folders are named by their last part only."""
    rows = [f"name = {toml(config.name)}"]
    rows += [f"{name} = {toml(value)}" for name, value in settings(config) if name not in MACHINE]
    file = f"{config.name}.toml"
    return (
        f"Save this as `{file}`, say where folders lie, and run `sfumato train {file}`.\n\n"
        "```toml\n" + "\n".join(rows) + "\n```\n"
    )


def losses(file: Path, step: int) -> list[tuple[int, float]]:
    """The finite losses of metrics.jsonl up to a step."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill left torn
            told = json.loads(line)
            if told["step"] <= step:
                found.append((int(told["step"]), float(told["loss"])))
    return found


def previews(folder: Path, step: int) -> tuple[Image.Image, str] | None:
    """The newest previews up to a step as a sheet, beside them the first ones, and what they show.

    None where there are none, or they cannot be read.
    """
    numbers = sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal())
    numbers = [number for number in numbers if number <= step]
    try:
        sets = {number: pictures(folder / f"step-{number:06d}") for number in {*numbers[:1], *numbers[-1:]}}
    except (OSError, ValueError, KeyError):
        return None
    if not sets or not sets[numbers[-1]]:
        return None
    prompts = [prompt for prompt, _ in sets[numbers[-1]]]
    columns = [number for number in sorted(sets) if [prompt for prompt, _ in sets[number]] == prompts]
    shown = conditions(folder, len(prompts))
    images = [
        image
        for row in range(len(prompts))
        for image in (*shown[row : row + 1], *(sets[number][row][1] for number in columns))
    ]
    side = min(PICTURE, max(128, *(max(image.size) for image in images)))
    heads = ["shown to it"] * bool(shown) + [f"step {number:,}" for number in columns]
    sheet = grid(images, prompts, heads, side=side)
    steps = " and ".join(f"{number:,}" for number in columns)
    return sheet, f"Drawn after {steps} steps" + (", with the same seeds" if len(columns) > 1 else "")


def conditions(folder: Path, count: int) -> list[Image.Image]:
    """What a ControlNet was shown for each of so many prompts; [] where that is not there."""
    try:
        return [Image.open(folder / CONDITIONS / f"{row:03d}.png").convert("RGB") for row in range(count)]
    except (OSError, ValueError):
        return []


def pictures(folder: Path) -> list[tuple[str, Image.Image]]:
    """Prompt and picture of each preview of a step."""
    # Not splitlines, for which letters of a prompt may end a line.
    lines = (folder / LIST).read_text(encoding="utf-8").split("\n")
    told = [json.loads(line) for line in lines if line]
    return [(line["prompt"], Image.open(folder / line["file"]).convert("RGB")) for line in told]
