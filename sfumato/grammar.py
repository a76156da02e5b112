"""What may stand on the command line: every verb and option."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import sfumato
from sfumato.drawing import presets
from sfumato.drawing.options import positive, sampling_options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as `verb` and its arguments; ends the process with a message if it makes no sense.

    Raises UserError for a faulty preset of `sample`.
    """
    parser = grammar()
    # Overrides and prompts may stand before and after options, which argparse cannot say.
    arguments, rest = parser.parse_known_args(argv)
    if arguments.verb == "sample" and (preset := presets.find(arguments.model)) is not None:
        said = presets.defaults(preset, arguments.options)
        arguments.options.set_defaults(**said)
        arguments, rest = parser.parse_known_args(argv)
        arguments.model = arguments.instead or said["model"]
        # What the command line says of prompts stands in the place of the preset's.
        arguments.prompts = [] if rest else arguments.prompts
    if hasattr(arguments, "prompts"):
        arguments.prompts += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
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
    command.set_defaults(options=command)

    bench_options(verb)

    export_options(verb)

    command = verb("replay", "look again at a batch whose numbers were not finite")
    command.add_argument("folder", type=Path, help="such as runs/NAME/bad/step-000123")

    demo_options(verb)

    command = verb("tiny", "write a family's random toy model, to try things out")
    command.add_argument("family", help="such as sd or sdxl")
    command.add_argument("folder", type=Path)

    verb("presets", "list the ready-made configs")
    return parser


def bench_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What is measured."""
    command = verb("bench", "measure this machine, and how the program stands up to it")
    command.add_argument(
        "what",
        choices=("data", "checkpoints", "faults"),
        help="how fast data are read, beside Pillow and datasets; what saving and going on take, beside "
        "DeepSpeed's own; whether a run that is killed again and again loses anything",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    command.add_argument("--quick", action="store_true", help="less of everything")
    command.add_argument(
        "--gpus", type=positive, metavar="N", help="ranks of checkpoints and faults; default: 2"
    )
    command.add_argument("--kills", type=positive, metavar="N", default=100, help="of faults; default: 100")


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


def export_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What becomes of a checkpoint."""
    command = verb("export", "write a run's checkpoint as a diffusers folder")
    command.add_argument(
        "run", type=Path, help="the run's folder, such as runs/NAME, or one of its checkpoints"
    )
    command.add_argument("--to", type=Path, help="the new folder; default: RUN/export")
    command.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: as the run's config says"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--weights",
        metavar="KIND",
        help='"live", "ema", or "ema_0.1" of [ema] profiles; default: the average, if the run keeps one',
    )
    which.add_argument(
        "--width",
        type=float,
        metavar="W",
        help="the average of this width, made from profiles that were kept",
    )
    command.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload it to the Hugging Face hub, made if not there"
    )
    command.add_argument("--private", action="store_true", help="as a private repository")


def demo_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The demonstration, and what it is made of."""
    command = verb("demo", "teach a small model the style of other emoji and show it; needs sfumato[demo]")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of its run, as steps=20")
    command.add_argument(
        "--images", type=Path, metavar="FOLDER", help="instead write emoji there, with captions and outlines"
    )
    styles = ("noto", "openmoji", "twemoji")
    command.add_argument("--style", choices=styles, default=styles[0], help="of --images")
    command.add_argument(
        "--rebuild-base", type=Path, metavar="FOLDER", help="instead make its base model anew, for hours"
    )
