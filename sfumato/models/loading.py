"""Frozen parts from a folder: safetensors only, nothing of the folder is executed, nothing is said."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.models.folder import read_json
from sfumato.models.signatures import remember
from sfumato.models.unscaled import unscale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What settings call the numbers that a model computes with."""


def frozen_dtypes(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Arithmetic of the frozen text encoders and of the frozen VAE, which never runs in fp16."""
    precision = config.engine.precision
    vae = config.model.vae_dtype
    if vae == "auto":
        vae = "bf16" if precision == "bf16" else "fp32"
    return DTYPES[precision], DTYPES[vae]


def held_parts(config: Config) -> tuple[bool, bool]:
    """Whether the frozen VAE and the frozen text encoders are at hand while a run trains."""
    cache = config.data.cache
    images, captions = cache in ("none", "captions"), cache in ("none", "images")
    return images, captions and not config.learns_text


class _Quiet:
    """What the libraries were told before the first of several threads asked for quiet."""

    lock = threading.Lock()
    inside = 0
    before: ClassVar[list[tuple[Any, int, bool]]] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Within it diffusers and transformers say errors only, and draw no progress bars.

    Threads may be within it at the same time; the last to leave puts back what was.
    """
    with _Quiet.lock:
        if not _Quiet.inside:
            for library in (diffusers_logging, transformers_logging):
                _Quiet.before.append((library, library.get_verbosity(), library.is_progress_bar_enabled()))
                library.set_verbosity(logging.ERROR)
                library.disable_progress_bar()
        _Quiet.inside += 1
    try:
        if threading.current_thread() is threading.main_thread():
            with warnings.catch_warnings():  # of the whole process, whatever thread they come from
                warnings.simplefilter("ignore", FutureWarning)
                yield
        else:
            yield
    finally:
        with _Quiet.lock:
            _Quiet.inside -= 1
            while not _Quiet.inside and _Quiet.before:
                library, verbosity, bar = _Quiet.before.pop()
                library.set_verbosity(verbosity)
                if bar:
                    library.enable_progress_bar()


def frozen(kind: type, folder: Path, variant: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a diffusers or transformers class, in eval mode and without gradients.

    On the meta device it has shapes and no numbers, and of the folder only its config.json is read.

    Raises UserError when the file is broken, or its weights are not all those that the class and its config
    ask for: the libraries would fill the gaps with random numbers.
    """
    if device.type == "meta":
        return shaped(kind, folder, dtype)
    # diffusers warns about the missing accelerate unless told not to want it; transformers has no such key.
    own = (
        {"low_cpu_mem_usage": False, "torch_dtype": dtype}
        if kind.__module__.startswith("diffusers")
        else {"dtype": dtype, "trust_remote_code": False}  # unset, it would ask whoever sits there
    )
    if (folder / "adapter_config.json").exists():  # transformers would load what it names, from anywhere
        raise UserError(f"the {kind.__name__} in {folder}", "an adapter_config.json is there", "remove it")
    try:
        with quiet():
            model, found = kind.from_pretrained(  # type: ignore[attr-defined]
                folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **own,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the {kind.__name__} in {folder}", reason, "download or export the folder again"
        ) from error
    missing = sorted(str(name) for name in found["missing_keys"])
    if missing or found["mismatched_keys"]:
        names = missing or sorted(str(name) for name in found["mismatched_keys"])
        raise UserError(
            f"the {kind.__name__} in {folder}",
            f"its file lacks {len(names)} of the weights that config.json asks for, such as {names[0]}",
            "use a config.json and weights that belong together",
        )
    unscale(model)
    remember(model)
    return model.to(device).eval().requires_grad_(False)


def shaped(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """What `frozen` gives on the meta device."""
    said = read_json(folder / "config.json")
    with quiet(), torch.device("meta"):
        ours = kind.__module__.startswith("diffusers")
        model = kind.from_config(said) if ours else kind(kind.config_class(**said))
        unscale(model)
        return model.to(dtype).eval().requires_grad_(False)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder; UserError if its files are missing or it names no prompt length."""
    try:
        with quiet():
            words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the tokenizer in {folder}", reason, "download or export the folder again"
        ) from error
    if words.model_max_length > 10_000:  # transformers' mark for "not said" is 1e30
        raise UserError(
            f"the tokenizer in {folder}",
            "it does not say how many tokens a prompt has",
            'write "model_max_length": 77 into its tokenizer_config.json',
        )
    return words


def peft_library(asked: str) -> Any:
    """The package peft. Raises UserError, with the pip line, if it cannot be imported."""
    try:
        with quiet():
            import peft
    except ImportError as error:
        found = f"the package peft makes adapters, and cannot be imported: {error}"
        raise UserError(asked, found, "pip install 'sfumato[lora]'") from error
    return peft


def module_dtype(net: nn.Module) -> torch.dtype:
    """The dtype of a module's weights: what its inputs are cast to."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    raise AssertionError(f"{type(net).__name__} has no weights")
