"""An export's way to the Hugging Face hub."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.errors import UserError
from sfumato.report.card import HERE
from sfumato.report.public import short


def check(name: str | None) -> None:
    """Raise UserError for what forbids an upload and is known on this machine: its name, and the token.

    name: owner/name; None where there is no upload.
    """
    if name is None:
        return
    from huggingface_hub import constants, get_token  # takes a second
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    asked = f"an upload to {name}"
    try:
        if name.count("/") != 1:
            raise HFValidationError("it is not of the form owner/name")
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(asked, f"the hub takes no such name: {error}", "name it as me/my-model") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(asked, "HF_HUB_OFFLINE is set", "unset it, or leave the upload out")
    if get_token() is None:
        do = "log in with `hf auth login`, or set HF_TOKEN; the token needs write access"
        raise UserError(asked, "no token for the hub on this machine", do)


def prepare(name: str, private: bool = False) -> str:
    """Make a repository if it is not there, and give its address.

    Raises UserError if the hub refuses, cannot be reached, or has it as a public one where a private one is
    asked for.
    """
    from huggingface_hub import HfApi

    check(name)
    hub = HfApi(library_name="sfumato")
    with told(name):
        hub.whoami()
        address = str(hub.create_repo(name, private=private or None, exist_ok=True))
        if private and not hub.model_info(name).private:
            do = "make it private in its settings on the hub, or leave --private out"
            raise UserError(f"an upload to {name}, as a private repository", "it is a public one", do)
    return address


def send(folder: Path, name: str) -> None:
    """Put an export into a repository that is there, in one commit. Raises UserError if that fails."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with told(name):
        HfApi(library_name="sfumato").create_commit(
            name,
            [
                CommitOperationAdd(path.relative_to(folder).as_posix(), content(path, folder, name))
                for path in files
            ],
            commit_message="Upload from Sfumato",
        )


def after_run(folder: Path, name: str, private: bool, tell: Callable[[str], None]) -> None:
    """Upload what a run left. A fault is told, and leaves the run as it is."""
    try:
        address = prepare(name, private)
        send(folder, name)
    except UserError as error:
        tell(f"The run is whole, but its upload failed.\n{error}")
    else:
        tell(f"uploaded to {address}")


def content(path: Path, folder: Path, name: str) -> Path | bytes:
    """What goes up of a file: itself, but for those that tell where they lie."""
    if path == folder / "README.md":
        here = HERE.replace('"."', json.dumps(name)).split("  #")[0]
        return path.read_text(encoding="utf-8").replace(HERE, here).encode()
    if path == folder / "sfumato.json":
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["base"] = short(facts["base"])
        return (json.dumps(facts, indent=1) + "\n").encode()
    return path


@contextmanager
def told(name: str) -> Iterator[None]:
    """Within it what the hub or the way to it has against an upload becomes one message."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base of its errors is that of the HTTP library, which differs between versions.
    http: Any = HfHubHTTPError.__mro__[1]
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, http) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = str(error).strip().split("\n")[0]
        found, do = {
            401: (
                "the hub does not accept the token",
                "log in again: `hf auth login`, or set another HF_TOKEN",
            ),
            403: (
                "the token may not write there",
                f"take a token with write access to {name.split('/')[0]}, or another name",
            ),
            404: ("the hub has no such owner, or the token may not see it", "correct the name"),
        }.get(
            status or 0,
            (
                f"the hub refused it, or cannot be reached: {reason}",
                "try again: sfumato export RUN --push-to-hub",
            ),
        )
        raise UserError(f"an upload to {name}", found, do) from error
