"""The command line: one short function per verb. torch is imported only by the verbs that compute."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import sfumato
from sfumato import config, launch, place, tuning
from sfumato.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 our defect (with its traceback), 2 the user's mistake.

    An interrupted command gives 128 + the signal's number, as shells expect.
    """
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if argv is None:
        arguments.command = [sys.executable, *sys.orig_argv[1:]]
    else:
        arguments.command = [sys.executable, "-m", "sfumato", *argv]
    arguments.real = argv is None
    # It says so on stdout, on every rank; the plan and the run's records name the device.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    return guarded(lambda: arguments.verb(arguments))


def guarded(work: Callable[[], int]) -> int:
    """Do the work of a command; its exit code, after the user was told what went wrong."""
    try:
        return work()
    except UserError as error:
        if not launch.report(error):
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; Python would complain again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if launch.report(error):
            return 1
        raise


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

    def verb(function, help: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
        command = verbs.add_parser(function.__name__, help=help, description=help)
        command.set_defaults(verb=function)
        return command

    for function, help in (
        (train, "train as a config file or preset says; a stopped run goes on"),
        (check, "say what `train` would do, and everything that is wrong, without doing it"),
    ):
        command = verb(function, help)
        command.add_argument("config", help="a TOML file, or a preset's name")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings, as data.resolution=768"
        )
        command.add_argument("--gpus", type=positive, metavar="N", help="start N ranks on this machine")

    command = verb(cache, "encode images and captions before training, once for all runs that share them")
    command.add_argument("config", nargs="?", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.cache=both")
    command.add_argument("--gpus", type=positive, metavar="N", help="share the work among N ranks")
    command.add_argument(
        "--prune", type=Path, metavar="STORE", help="instead free what no run needs whose folder is there"
    )

    command = verb(sample, "draw pictures with a trained model, or any diffusers folder")
    sampling_options(command)

    command = verb(export, "write a run's checkpoint as a diffusers folder")
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

    command = verb(demo, "teach a small model the style of other emoji and show it; needs sfumato[demo]")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of its run, as steps=20")
    command.add_argument(
        "--rebuild-base", type=Path, metavar="FOLDER", help="instead make its base model anew, for hours"
    )

    command = verb(tiny, "write a family's random toy model, to try things out")
    command.add_argument("family", help="such as sd or sdxl")
    command.add_argument("folder", type=Path)

    verb(presets, "list the ready-made configs")
    return parser


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


def train(arguments: argparse.Namespace) -> int:
    """Train: as one process, as the rank that a launcher made of us, or as the launcher of --gpus ranks."""
    settings = config.load(arguments.config, arguments.overrides)
    code = as_ranks(arguments, settings.folder / "logs")
    if code is None:
        from sfumato import train as loop

        loop.train(settings)
    return code or 0


def cache(arguments: argparse.Namespace) -> int:
    """Encode what a run reads from the store, or free what none reads."""
    if arguments.prune is not None:
        if not arguments.prune.is_dir():
            raise UserError(f"--prune {arguments.prune}", "no such folder", "name a run's data.store")
        from sfumato import cache as work

        records, freed = work.prune(arguments.prune)
        print(f"freed {records:,} records, {freed / 1e9:,.2f} GB")
        return 0
    if arguments.config is None:
        raise UserError("sfumato cache", "no config", "name the config whose data are to be encoded")
    settings = config.load(arguments.config, arguments.overrides)
    code = as_ranks(arguments, settings.folder / "logs")
    if code is None:
        from sfumato import cache as work

        print(work.encode(settings))
    return code or 0


def as_ranks(arguments: argparse.Namespace, logs: Path) -> int | None:
    """Start --gpus ranks and give their exit code; or become the one rank, or one of the ranks: None."""
    if launch.supervised():
        launch.follow_supervisor()
    elif place.find(os.environ) is None:
        if arguments.gpus:
            return launch.run(arguments.command, arguments.gpus, logs)
        if arguments.real:
            tuning.restart()
    else:
        refuse_gpus(arguments.gpus)
    place.adopt(os.environ)
    return None


def refuse_gpus(gpus: int | None) -> None:
    """Raise UserError for --gpus where a launcher has started us as one of its ranks already."""
    found = place.find(os.environ)
    if gpus and found is not None:
        raise UserError(
            f"--gpus {gpus}",
            f"this process is rank {found.rank} of the {found.world} that {found.by} started",
            "leave --gpus out: each of them is one rank",
        )


def check(arguments: argparse.Namespace) -> int:
    """Print the plan of a run."""
    settings = config.load(arguments.config, arguments.overrides)
    found = place.find(os.environ)
    refuse_gpus(arguments.gpus)
    from deepspeed.accelerator import get_accelerator

    from sfumato.check import check as examine

    print(examine(settings, found.world if found else arguments.gpus or 1, get_accelerator().device_name()))
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Draw every prompt with every seed; several ranks share them."""
    code = as_ranks(arguments, arguments.out / "logs")
    if code is not None:
        return code
    import torch

    from sfumato.engine import ranks
    from sfumato.sample import Sampling, sample_folder

    own = ranks.start(timeout=1800)
    default = "fp32" if own.device.type == "cpu" else "bf16"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype or default]
    sampling = Sampling(
        steps=arguments.steps,
        guidance=arguments.guidance,
        size=arguments.size,
        negative=arguments.negative,
        scheduler=arguments.scheduler,
    )
    for path in sample_folder(
        arguments.model,
        arguments.prompts,
        arguments.seeds,
        arguments.out,
        sampling,
        device=own.device,
        dtype=dtype,
        rank=own.rank,
        world=own.world,
    ):
        print(path)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as a diffusers folder."""
    from sfumato.export import export as write

    print(write(arguments.run, arguments.to, arguments.dtype, arguments.weights))
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    if arguments.real:
        tuning.restart()
    if arguments.rebuild_base is not None:
        from sfumato.demo.base import rebuild

        print(rebuild(arguments.rebuild_base))
        return 0
    from sfumato.demo.run import demo as run

    run(overrides=tuple(arguments.overrides))
    return 0


def tiny(arguments: argparse.Namespace) -> int:
    """Write a toy model."""
    from sfumato.models import family_class

    family_class(arguments.family).tiny(arguments.folder)
    print(arguments.folder)
    return 0


def presets(arguments: argparse.Namespace) -> int:
    """Each preset's name and the sentence that its file begins with."""
    for file in sorted(config.PRESETS.glob("*.toml")):
        print(f"{file.stem:20} {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    return 0
