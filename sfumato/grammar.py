"""What may stand on the command line: every verb and option."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import sfumato
from sfumato.drawing import presets
from sfumato.drawing.options import positive, sampling_options
from sfumato.errors import UserError
from sfumato.slurm.options import slurm_options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as `verb` and its arguments; ends the process with a message if it makes no sense.

    Raises UserError for a faulty preset of `sample`, and for a second model.
    """
    parser = grammar()
    argv, behind = parted(argv)
    # Overrides and prompts may stand before and after options, which argparse cannot say.
    arguments, rest = parser.parse_known_args(argv)
    if arguments.verb == "sample" and (preset := presets.find(arguments.model)) is not None:
        own, said = arguments, presets.defaults(preset, arguments.options)
        arguments.options.set_defaults(**said)
        arguments, rest = parser.parse_known_args(argv)
        arguments.model = arguments.instead or said["model"]
        # What the command line says of prompts stands in the place of the preset's.
        arguments.prompts = own.prompts if rest else arguments.prompts
        if own.depth not in (None, "auto"):  # a map takes the place of the preset's model, too
            arguments.depth_model = own.depth_model
    elif arguments.verb == "sample" and arguments.instead is not None:
        found = f"the model is {arguments.model}, which is no preset"
        raise UserError(f"--model {arguments.instead}", found, "name one model: sfumato sample MODEL")
    if hasattr(arguments, "prompts"):
        arguments.prompts += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if getattr(arguments, "config", "") is None and rest and not rest[0].startswith("-"):
        arguments.config = rest.pop(0)  # argparse takes one that may be missing only before options
    for word in rest:
        if not hasattr(arguments, "overrides") or word.startswith("-") or "=" not in word:
            hint = f"; write settings without dashes: {word.lstrip('-')}" if "=" in word else ""
            parser.error(f"unknown argument {word}{hint}")
    if rest:
        arguments.overrides += rest
    if arguments.verb == "slurm":
        arguments.other_words, arguments.other = behind, None if behind is None else parse(behind)
    return arguments


def parted(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str] | None]:
    """The words of `slurm`, and those behind its "--", which are another command of ours."""
    if list(argv[:1]) != ["slurm"] or "--" not in argv:
        return argv, None
    cut = list(argv).index("--")
    return argv[:cut], argv[cut + 1 :]


def grammar() -> argparse.ArgumentParser:
    """Every verb and option."""
    parser = argparse.ArgumentParser(prog="sfumato", description=sfumato.__doc__)
    parser.add_argument("--version", action="version", version=f"sfumato {sfumato.__version__}")
    # DeepSpeed's launcher puts it before everything else; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
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
        ranks_options(command)

    slurm_options(verb("slurm", "print a job for Slurm: sfumato slurm CONFIG --nodes 4 --gpus 8 | sbatch"))

    plan_options(verb)

    doctor_options(verb)

    data_options(verb)

    command = verb("sample", "draw pictures with a trained model, or any diffusers folder")
    sampling_options(command)
    ranks_options(command)
    command.set_defaults(options=command)

    bench_options(verb)

    export_options(verb)

    report_options(verb)

    command = verb("replay", "look again at a batch whose numbers were not finite")
    command.add_argument("folder", type=Path, help="such as runs/NAME/bad/step-000123")

    demo_options(verb)

    command = verb("tiny", "write a family's random toy model, to try things out")
    command.add_argument("family", help="such as sd or sdxl")
    command.add_argument("folder", type=Path)

    verb("presets", "list the ready-made configs")
    return parser


def ranks_options(command: argparse.ArgumentParser) -> None:
    """Which ranks work; `launch.become` obeys. docs/launching.md shows each way."""
    group = command.add_argument_group("ranks", "several processes, on one machine or many")
    group.add_argument("--gpus", type=positive, metavar="G", help="start G ranks on this machine")
    group.add_argument("--nodes", type=positive, metavar="N", help="of N machines, each started like this")
    group.add_argument("--node-rank", type=int, metavar="R", help="this machine's number, from 0")
    group.add_argument("--master", metavar="HOST[:PORT]", help="machine 0; default port: 29500")
    group.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="instead start all machines of the file over ssh"
    )
    group.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def doctor_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What is looked at before a run is trusted to a machine."""
    command = verb("doctor", "see whether this machine, its ranks and a config compute what they should")
    command.add_argument("config", nargs="?", help="a TOML file, or a preset's name; default: our defaults")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as engine.zero_stage=2")
    ranks_options(command)
    command.add_argument("--real-model", action="store_true", help="try the config's model, not its toy twin")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the lines and figures there, too")


def plan_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """On which devices a run is thought of."""
    command = verb("plan", "say what a run takes, and how it is best held, before a device is rented")
    command.add_argument("config", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.resolution=768")
    command.add_argument("--gpus", type=positive, metavar="G", help="devices of a machine; default: 1")
    command.add_argument("--nodes", type=positive, metavar="N", help="machines; default: 1")
    command.add_argument("--memory", type=float, metavar="GB", help="of a device; default: as --device has")
    command.add_argument(
        "--host-memory", type=float, metavar="GB", help="of a machine, for what is moved there"
    )
    command.add_argument("--device", metavar="NAME", help="such as H100, A100-40, RTX-4090, 910B")
    command.add_argument("--all", action="store_true", help="every way, in other precisions too")
    command.add_argument("--records", type=positive, metavar="N", help="of the data, to tell the epochs")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")


def bench_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What is measured."""
    command = verb("bench", "measure this machine, and how the program stands up to it")
    command.add_argument(
        "what",
        choices=("data", "checkpoints", "faults", "peers", "scaling", "gates", "gpu"),
        help="how fast data are read, beside Pillow and datasets; what saving and going on take, beside "
        "DeepSpeed's own; whether a run that is killed again and again loses anything; how fast we train, "
        "beside a bare loop and others' scripts; what 1, 2 and 4 ranks make of it; what a step does at full "
        "size, counted without a device; how fast one card is",
    )
    command.add_argument("presets", nargs="*", metavar="PRESET", help="of gates; default: all that train")
    command.add_argument("--toy", action="store_true", help="of gpu: toy models, on any machine")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    command.add_argument("--quick", action="store_true", help="less of everything")
    ranks_options(command)
    command.add_argument("--kills", type=positive, metavar="N", default=100, help="of faults; default: 100")
    command.add_argument(
        "--model", choices=("tiny", "base", "mid"), default="tiny", help="of peers and scaling; default: tiny"
    )
    both = "of peers and scaling; default: 5"
    command.add_argument("--rounds", type=positive, metavar="N", default=5, help=both)
    command.add_argument(
        "--task", choices=("full", "lora", "controlnet"), default="full", help="of peers; default: full"
    )
    command.add_argument("--family", choices=("sd", "sdxl"), default="sd", help="of peers; default: sd")
    command.add_argument(
        "--diffusers-examples", type=Path, metavar="DIR", help="of peers: diffusers' folder `examples`"
    )
    command.add_argument("--seed-recipe", type=Path, metavar="DIR", help="of peers: deepspeed-diffusers")
    command.add_argument("--compiled", action="store_true", help="of peers: ours with engine.compile, too")


def data_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What is told of data before training."""
    command = verb("data", "look through the data before training, and write a page about them")
    command.add_argument("config", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.source=photos")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/data")

    command = verb("cache", "encode images and captions before training, once for all runs that share them")
    command.add_argument("config", nargs="?", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.cache=both")
    ranks_options(command)
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


def report_options(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Whose page is written."""
    command = verb("report", "write a run's page, or for several runs one that compares them")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, as runs/NAME")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/report.html, or compare.html beside the runs"
    )


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
