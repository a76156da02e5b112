"""The command line: one short function per verb. torch is imported only by the verbs that compute."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from sfumato import config, device, launch, tuning
from sfumato.drawing.options import check_places
from sfumato.errors import CONTINUE, Lost, Stopped, UserError
from sfumato.grammar import parse
from sfumato.launch.become import as_ranks, world
from sfumato.stopping import SIGNALS, Stopping


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 our defect (with its traceback), 2 the user's mistake.

    75 is a run that was asked to stop and has saved: the same command goes on. Another interrupted command
    gives 128 + the signal's number, as shells expect.
    """
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if argv is None:
        arguments.command = [sys.executable, *sys.orig_argv[1:]]
    else:
        arguments.command = [sys.executable, "-m", "sfumato", *argv]
    arguments.real = argv is None
    logging.getLogger("DeepSpeed").addFilter(device.telling)
    code = guarded(lambda: VERBS[arguments.verb](arguments))
    if code == CONTINUE and arguments.real:
        for number in SIGNALS:  # one that comes twice, while Python goes down, must not change the code
            signal.signal(number, signal.SIG_IGN)
    return code


def guarded(work: Callable[[], int]) -> int:
    """Do the work of a command; its exit code, after the user was told what went wrong."""
    try:
        return work()
    except UserError as error:
        if not launch.report(error):
            print(error, file=sys.stderr)
        return 1 if launch.is_echo(error) else 2
    except Stopped as stopped:
        if launch.supervised() or os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return CONTINUE
    except Lost as error:
        if not launch.report(error):
            print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; Python would complain again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (told := device.not_there(error)) is not None:
            if not launch.report(told):
                print(told, file=sys.stderr)
            return 2
        if launch.report(error):
            return 1
        raise


def train(arguments: argparse.Namespace) -> int:
    """Train: as one process, as the rank that a launcher made of us, or as the launcher of --gpus ranks."""
    settings = config.load(arguments.config, arguments.overrides)
    code = as_ranks(arguments, settings.folder / "logs", settings)
    if code is None:
        with Stopping():  # a signal while torch is imported
            with tuning.importing(tuning.unneeded(settings.method) if arguments.real else ()):
                from sfumato import train as loop

            loop.train(settings)
    return code or 0


def data(arguments: argparse.Namespace) -> int:
    """Look through the data of a config; a UserError if a run would refuse them."""
    settings = config.load(arguments.config, arguments.overrides)
    with tuning.importing():
        from sfumato.audit import examine

    examine(settings, arguments.out or settings.folder / "data", print)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """See whether the machine, the ranks and a config compute what they should; 1 if something is bad."""
    settings = config.load(arguments.config, arguments.overrides) if arguments.config else None
    with tuning.importing():
        from sfumato.doctor import begin

    return begin(arguments, settings)


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
    code = as_ranks(arguments, settings.folder / "logs", settings)
    if code is None:
        with tuning.importing():
            from sfumato import cache as work

        print(work.encode(settings))
    return code or 0


def slurm(arguments: argparse.Namespace) -> int:
    """Print a script for sbatch."""
    from sfumato.slurm import script, wanted

    print(script(wanted(arguments)), end="")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Print the plan of a run."""
    settings = config.load(arguments.config, arguments.overrides)
    ranks = world(arguments)
    with tuning.importing():
        from deepspeed.accelerator import get_accelerator

        from sfumato.check import check as examine

    local = min(ranks, arguments.gpus or ranks)
    if settings.engine.auto:
        from sfumato.planner import auto  # which takes seconds to import

        settings = auto.here(settings, ranks, local, print)
    print(examine(settings, ranks, get_accelerator().device_name(), local=local))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Say how a run is best held on devices that need not be here."""
    settings = config.load(arguments.config, arguments.overrides)
    asked = arguments.gpus or 1, arguments.nodes or 1, arguments.memory, arguments.device
    with tuning.importing():
        from sfumato.planner import command

    also = arguments.all, arguments.records, arguments.json, arguments.host_memory
    command.plan(settings, *asked, *also, alone=arguments.real)
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Draw every prompt with every seed; several ranks share them."""
    if not launch.supervised():  # before the ranks' logs are made there
        check_places(arguments.out, arguments.bench)
    code = as_ranks(arguments, arguments.out / "logs")
    if code is not None:
        return code
    with tuning.importing():
        from sfumato import sample as work
        from sfumato.engine import ranks

    own = ranks.start(timeout=1800)
    for path in work.sample(work.request_of(arguments), work.Place(own.device, own.rank, own.world)):
        print(path)
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure."""
    from sfumato.bench import command

    return command.bench(arguments)


def export(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as its users load it, and upload that."""
    if arguments.push_to_hub is None:
        if arguments.private:
            raise UserError("--private", "no --push-to-hub", "name the repository: --push-to-hub OWNER/NAME")
        from sfumato.export import export as write

        asked = arguments.to, arguments.dtype, arguments.weights
        print(write(arguments.run, *asked, anew=True, width=arguments.width))
        return 0
    from sfumato.report import upload

    upload.check(arguments.push_to_hub)
    from sfumato.export import newest, ready

    newest(arguments.run)
    address = upload.prepare(arguments.push_to_hub, arguments.private)
    folder = ready(arguments.run, arguments.to, arguments.dtype, arguments.weights, arguments.width)
    print(folder)
    upload.send(folder, arguments.push_to_hub)
    print(address)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write the page of a run, or of several side by side."""
    from sfumato.report import page

    print(page.report(arguments.runs, arguments.out))
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """Take a bad batch through the model again; 1 if its numbers are bad again."""
    if arguments.real:
        tuning.restart()
    with tuning.importing():
        from sfumato.replay import replay as again

    return 0 if again(arguments.folder) else 1


def demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    if arguments.real:
        tuning.restart()
    if arguments.images is not None:
        from sfumato.demo import emoji

        if arguments.images.exists() and any(arguments.images.iterdir()):
            raise UserError(f"--images {arguments.images}", "something is there", "name a new folder")
        print(emoji.write_images(arguments.style, arguments.images, codes=emoji.tuning(), edges=True))
        return 0
    if arguments.rebuild_base is not None:
        from sfumato.demo.base import rebuild

        print(rebuild(arguments.rebuild_base))
        return 0
    with tuning.importing():
        from sfumato.demo.run import demo as run

    run(overrides=tuple(arguments.overrides))
    return 0


def tiny(arguments: argparse.Namespace) -> int:
    """Write a toy model into a new folder."""
    place = arguments.folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or (place == arguments.folder.absolute() and any(place.iterdir())):
        asked = f"sfumato tiny {arguments.family} {arguments.folder}"
        found = "something is there" if place.is_dir() else f"{place} is not a folder"
        raise UserError(asked, found, "name a new folder")
    from sfumato.models import family_class

    family_class(arguments.family).tiny(arguments.folder)
    print(arguments.folder)
    return 0


def presets(arguments: argparse.Namespace) -> int:
    """Each preset's name and the sentence that its file begins with."""
    for file in sorted(config.PRESETS.glob("*.toml")):
        print(f"{file.stem:20} {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    return 0


VERBS = {verb.__name__: verb for verb in (train, check, plan, doctor, data, cache, sample, bench, export)}
VERBS |= {verb.__name__: verb for verb in (report, replay, demo, tiny, presets, slurm)}
