"""What `sfumato sample` can be told. Imports no torch."""

import argparse
import math
import os
import re
import tempfile
from pathlib import Path

from sfumato.errors import UserError

WINDOWS = (77, 150, 225)
VAE = ("whole", "sliced", "tiled")
"""How the VAE decodes: a batch at once, picture by picture, or tile by tile."""
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Our names of samplers, and diffusers' classes."""
SEEDS = range(-(2**63), 2**64)
"""Those that torch's generators take."""


def sampling_options(command: argparse.ArgumentParser) -> None:
    """What is drawn, with which model, from which pictures and how."""
    command.add_argument(
        "model", help="a run, one of its checkpoints, a diffusers folder, a hub id, or a preset that draws"
    )
    command.add_argument("prompts", nargs="*", metavar="prompt", help="one or more prompts")
    command.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    command.add_argument("--model", dest="instead", metavar="MODEL", help="in place of a preset's model")
    text_options(command.add_argument_group("prompts"))
    how_options(command.add_argument_group("how it is drawn"))
    picture_options(command.add_argument_group("pictures to start from"))
    group = command.add_argument_group("adapters")
    group.add_argument(
        "--lora",
        type=weighted,
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="a LoRA's file or run; again for more",
    )
    group.add_argument(
        "--control", metavar="FOLDER", help="a ControlNet: a diffusers folder, a run or a hub id"
    )
    group.add_argument(
        "--control-scale", type=number, default=1.0, metavar="S", help="the factor of what it adds"
    )
    group = command.add_argument_group("in place of single pictures")
    group.add_argument(
        "--compare", type=Path, metavar="RUN", help="beside MODEL draw each checkpoint of RUN, and one grid"
    )
    group.add_argument(
        "--bench", type=Path, metavar="FILE", help="measure the speed, and write the figures there as JSON"
    )
    group.add_argument("--warm-up", type=count, default=1, metavar="N", help="rounds before it measures")
    group.add_argument("--repeats", type=positive, default=3, metavar="N", help="rounds that it measures")


def text_options(group: argparse._ArgumentGroup) -> None:
    """What the pictures show."""
    group.add_argument(
        "--prompts",
        dest="file",
        type=Path,
        metavar="FILE",
        help="more prompts: .txt, one a line, or .jsonl, which may name negative, seeds and pictures of each",
    )
    group.add_argument("--negative", help="what the pictures should not show")
    group.add_argument("--seeds", type=seed, nargs="+", metavar="N", help="one picture a prompt and seed")
    group.add_argument(
        "--window", type=int, choices=WINDOWS, help="tokens of a prompt; default: as the model was trained"
    )
    group.add_argument(
        "--emphasis",
        action="store_true",
        help="read (word), [word] and (word:1.3) as weights; without it they are ordinary letters",
    )


def how_options(group: argparse._ArgumentGroup) -> None:
    """How the pictures are drawn, and by what."""
    group.add_argument("--steps", type=positive, default=25, help="denoising steps")
    group.add_argument("--guidance", type=number, default=5.0, help="1 is none")
    group.add_argument(
        "--guidance-rescale", type=number, default=0.0, metavar="X", help="0.7 suits zero-terminal-SNR models"
    )
    group.add_argument("--size", type=size, metavar="N|WxH", help="in pixels; default: as the model was made")
    group.add_argument("--scheduler", help="another sampler than the model's own: " + ", ".join(SCHEDULERS))
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, else bf16")
    group.add_argument("--variant", help="the files' variant in MODEL, such as fp16")
    group.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="N",
        help="pictures at once; with more than 1 a picture's last bits depend on what is drawn beside it",
    )
    group.add_argument(
        "--offload", action="store_true", help="keep on the GPU only the part that computes: slower, smaller"
    )
    group.add_argument(
        "--vae",
        choices=VAE,
        default=VAE[0],
        help="decode a batch's pictures one by one, or each in tiles, whose seams change it: less memory",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="let torch.compile join the denoiser's operations: for many pictures",
    )


def picture_options(group: argparse._ArgumentGroup) -> None:
    """Pictures that a drawing starts from."""
    group.add_argument("--image", type=Path, metavar="FILE|FOLDER", help="change it: image-to-image")
    group.add_argument("--strength", type=number, metavar="S", help="of the change, 0 to 1; default: 0.8")
    group.add_argument(
        "--mask", type=Path, metavar="FILE|FOLDER", help="white: where --image is drawn anew; strength is 1"
    )
    group.add_argument(
        "--condition", type=Path, metavar="FILE|FOLDER", help="what the ControlNet of --control is shown"
    )
    group.add_argument(
        "--depth",
        metavar="FILE|FOLDER|auto",
        help="a depth map as the condition; auto: of --image, by --depth-model",
    )
    group.add_argument(
        "--depth-model", metavar="FOLDER", help="a transformers folder or hub id, such as DPT's"
    )
    group.add_argument("--fit", action="store_true", help="cut pictures of another size, as training does")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def count(text: str) -> int:
    """A whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def seed(text: str) -> int:
    """A whole number that torch's generators take."""
    number = int(text)
    if number not in SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is none of the seeds, which go from -2^63 to 2^64 - 1")
    return number


def size(text: str) -> tuple[int, int]:
    """(width, height) from N or WxH."""
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text)
    if match is None or not all(int(side or 1) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text} is no size: write 512 or 768x512")
    return int(match[1]), int(match[2] or match[1])


def check_places(out: Path, bench: Path | None) -> None:
    """Raise UserError for a folder of pictures or a file of figures that is there or cannot be written."""
    check_folder(f"--out {out}", out)
    if bench is not None and os.path.exists(bench):
        raise UserError(f"--bench {bench}", "it is there already", "name another file, or take it away")
    if bench is not None:
        check_file(f"--bench {bench}", bench)


def check_file(asked: str, file: Path) -> None:
    """Raise UserError for a file that cannot be written, without a trace of the attempt."""
    if not os.path.isdir(file.absolute().parent):
        raise UserError(asked, f"no folder {file.absolute().parent}", "make it, or name another")
    if not os.path.exists(file):
        check_folder(asked, file.parent)
    elif file.is_dir() or not os.access(file, os.W_OK):
        raise UserError(asked, "it is there, and cannot be written", "name another file")


def check_folder(asked: str, folder: Path) -> None:
    """Raise UserError for a folder to which no file can be written, or that cannot be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        found = f"{there} takes no file: {error.strerror}" if there.is_dir() else f"{there} is no folder"
        raise UserError(asked, found, "name another place") from None


def weighted(word: str) -> tuple[Path, float]:
    """A file and its weight from FILE or FILE=WEIGHT."""
    name, _, weight = word.rpartition("=")
    try:
        return (Path(name), number(weight)) if name else (Path(word), 1.0)
    except ValueError:
        return Path(word), 1.0  # the name itself has a "="
