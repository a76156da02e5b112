"""What may stand on the command line: every verb and option."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import sfumato


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as `verb` and its arguments; ends the process with a message if it makes no sense."""
    parser = grammar()
    # Overrides may stand before and after options, which argparse cannot say.
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if not hasattr(arguments, "overrides") or word.startswith("-") or "=" not in word:
            hint = f"; write settings without dashes: {word.lstrip('-')}" if "=" in word else ""
            parser.error(f"unknown argument {word}{hint}")
    if rest:
        arguments.overrides += rest
    return arguments


def grammar() -> argparse.ArgumentParser:
    """Every verb and option."""
    parser = argparse.ArgumentParser(prog="sfumato", description=sfumato.__doc__)
    parser.add_argument("--version", action="version", version=f"sfumato {sfumato.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=help, description=help)
        command.set_defaults(verb=name)
        return command

    for name, help in (
        ("train", "train as a config file or preset says; a stopped run goes on"),
        ("check", "say what `train` would do, and everything that is wrong, without doing it"),
    ):
        command = verb(name, help)
        command.add_argument("config", help="a TOML file, or a preset's name")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings, as data.resolution=768"
        )
        command.add_argument("--gpus", type=positive, metavar="N", help="start N ranks on this machine")

    data_options(verb)

    command = verb("sample", "draw pictures with a trained model, or any diffusers folder")
    sampling_options(command)

    command = verb("bench", "measure this machine: how fast data are read, beside Pillow and datasets")
    command.add_argument("what", choices=("data",))
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    command.add_argument("--quick", action="store_true", help="less of everything: two minutes or so")

    command = verb("export", "write a run's checkpoint as a diffusers folder")
    command.add_argument(
        "run", type=Path, help="the run's folder, such as runs/NAME, or one of its checkpoints"
    )
    command.add_argument("--to", type=Path, help="the new folder; default: RUN/export")
    command.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: as the run's config says"
    )
    command.add_argument(
        "--weights", choices=("ema", "live"), help="default: the average, if the run keeps one"
    )

    command = verb("demo", "teach a small model the style of other emoji and show it; needs sfumato[demo]")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of its run, as steps=20")
    command.add_argument(
        "--rebuild-base", type=Path, metavar="FOLDER", help="instead make its base model anew, for hours"
    )

    command = verb("tiny", "write a family's random toy model, to try things out")
    command.add_argument("family", help="such as sd or sdxl")
    command.add_argument("folder", type=Path)

    verb("presets", "list the ready-made configs")
    return parser


def data_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What is told of data before training."""
    command = verb("data", "look through the data before training, and write a page about them")
    command.add_argument("config", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.source=photos")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/data")

    command = verb("cache", "encode images and captions before training, once for all runs that share them")
    command.add_argument("config", nargs="?", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.cache=both")
    command.add_argument("--gpus", type=positive, metavar="N", help="share the work among N ranks")
    command.add_argument(
        "--prune", type=Path, metavar="STORE", help="instead free what no run needs whose folder is there"
    )


def sampling_options(command: argparse.ArgumentParser) -> None:
    """What `sample` is told."""
    command.add_argument("model", help="a run's folder, a diffusers folder or a hub id")
    command.add_argument("prompts", nargs="+", help="one or more prompts")
    command.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    command.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="one picture a prompt and seed"
    )
    command.add_argument("--steps", type=positive, default=25, help="denoising steps")
    command.add_argument("--gpus", type=positive, metavar="N", help="share the pictures among N ranks")
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="a LoRA's file or run; again for more",
    )
    command.add_argument("--guidance", type=float, default=5.0, help="1 is none")
    command.add_argument("--size", type=positive, help="side in pixels; default: what the model was made for")
    command.add_argument("--negative", help="what the pictures should not show")
    command.add_argument(
        "--scheduler", help="another sampler than the model's own: ddim, euler, dpm++, unipc"
    )
    command.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, else bf16"
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
