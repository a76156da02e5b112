"""The stock pipeline of a folder, and the pipeline of diffusers that draws from what is given."""

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from sfumato import config, models
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.models.folder import read_json
from sfumato.models.loading import frozen, quiet

NAME = re.compile(r"(.*?)(?:ControlNet)?(?:Img2Img|Inpaint)?Pipeline")
"""How diffusers calls the pipelines of a model: its name, then what they draw from."""


def pipeline_class(folder: Path) -> Any:
    """The class of diffusers that a folder's model_index.json names. Raises UserError if there is none."""
    name = str(read_json(folder / "model_index.json").get("_class_name"))
    kind = named(name)
    if kind is None:
        raise UserError(
            f"the pipeline in {folder}",
            f"a {name}, which diffusers {diffusers.__version__} does not have",
            "update diffusers, or name another folder",
        )
    return kind


def named(name: str) -> Any:
    """What diffusers calls so, or None."""
    with quiet():  # transformers warns about a torchvision that it does not need
        return getattr(diffusers, name, None)


def class_for(kind: Any, roles: frozenset[str]) -> Any:
    """The class of the same model that draws from these of ROLES. Raises UserError if there is none.

    Classes are found by their names: the table of diffusers' AutoPipeline would import every model that
    diffusers has, for many seconds.
    """
    match = NAME.fullmatch(kind.__name__)
    task = "Inpaint" if "mask" in roles else "Img2Img" if "image" in roles else ""
    name = f"{match[1]}{'ControlNet' if 'condition' in roles else ''}{task}Pipeline" if match else ""
    found = named(name)
    if found is not None:
        return found
    if not roles:
        return kind  # it draws as it was saved
    raise UserError(
        f"a {kind.__name__} that draws from {' and '.join(sorted(roles))}",
        f"diffusers {diffusers.__version__} has no {name or 'such pipeline'}",
        "leave these pictures out, or take a model of another family",
    )


def becoming(pipeline: Any, kind: Any, **parts: Any) -> Any:
    """A pipeline of another class around the same parts, which are shared, with further ones."""
    if type(pipeline) is kind and not parts:
        return pipeline
    # from_pipe would cast every part to one dtype, and a VAE that was kept in fp32 with them.
    own = {**dict(pipeline.config), **pipeline.components, **parts}
    taken = inspect.signature(kind.__init__).parameters
    with quiet():
        made = kind(**{name: value for name, value in own.items() if name in taken})
    made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return made


def vae_factor(folder: Path) -> int | None:
    """The VAE makes multiples of so many pixels, as its config says; None where it does not."""
    file = folder / "vae" / "config.json"
    widths = read_json(file).get("block_out_channels") if file.is_file() else None
    return 2 ** (len(widths) - 1) if widths else None


def open_pipeline(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    prompt_window: int = 77,
    variant: str | None = None,
    *,
    with_family: bool = False,
    offload: bool = False,
) -> tuple[Any, Family | None]:
    """The stock pipeline of a folder, and its family where `with_family` or a window beyond 77 needs it.

    offload: the parts stay in memory, until the caller has `offloaded` the pipeline. Raises UserError.
    """
    kind = pipeline_class(folder)
    taken = inspect.signature(kind.__init__).parameters
    extras = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    parts: dict[str, Any] = {name: value for name, value in extras.items() if name in taken}
    family, place = None, torch.device("cpu" if offload else device)
    if prompt_window != 77 or with_family:
        model = config.Model.model_validate(
            {"weights": str(folder), "variant": variant, "prompt_window": prompt_window}
        )
        # The VAE of SDXL overflows in fp16; the stock pipeline knows, but not of parts that it is handed.
        vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        family = models.load(model, place, dtype, vae_dtype)
        # Shared, so that the text encoders are not there twice.
        parts |= {"vae": family.vae, **family.parts()}
    for part, its in modules_of(folder).items():
        if part in taken and part not in parts:
            # The pipeline would fill what a file lacks with what lies in memory, unnoticed.
            parts[part] = frozen(its, folder / part, variant_of(folder / part, variant), dtype, place)
    try:
        with quiet():
            pipeline = kind.from_pretrained(
                folder,
                **parts,
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                local_files_only=True,
            )
    except (
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        KeyError,
        AttributeError,
        SafetensorError,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the pipeline in {folder}", reason, "download or export the folder again") from error
    return pipeline.to(place), family


def modules_of(folder: Path) -> dict[str, type]:
    """The classes of the parts of a diffusers folder that hold weights, by name."""
    found = {}
    for part, said in read_json(folder / "model_index.json").items():
        library, name = said if isinstance(said, list) and len(said) == 2 else (None, None)
        if library in ("diffusers", "transformers") and (folder / part / "config.json").is_file():
            with quiet():
                kind = getattr(diffusers if library == "diffusers" else transformers, str(name), None)
            if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
                found[part] = kind
    return found


def variant_of(part: Path, variant: str | None) -> str | None:
    """The variant that a part is read in: as diffusers, the usual one where there is no such file."""
    endings = (file.name.partition(".")[2] for file in part.iterdir())
    return variant if variant and any(ending.startswith(variant) for ending in endings) else None


def check_offload(device: torch.device) -> None:
    """Raise UserError where no part can wait in memory while another computes on a device."""
    if device.type == "cpu":
        raise UserError("--offload", "everything computes on the CPU, where the parts lie", "leave it out")
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        found = "diffusers moves the parts with the package accelerate, which is not installed"
        raise UserError("--offload", found, "pip install accelerate")
