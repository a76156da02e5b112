"""Weights from the Hugging Face hub: only the files that training reads, or a clear refusal."""

import json
import re
from pathlib import Path

from sfumato.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
SINGLE = ("model", "diffusion_pytorch_model")


def is_hub_id(weights: str) -> bool:
    """Whether a text has the form owner/name."""
    return HUB_ID.fullmatch(weights) is not None


def download(repository: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local snapshot of a repository's configs, tokenizers and safetensors of one variant.

    Respects HF_HUB_OFFLINE and the token of the machine. Raises UserError when the hub does not know the
    repository, refuses it or cannot be reached, and the files are not in the cache.
    """
    # The import takes a second and is needed for hub ids only.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"the weights {repository}" + (f" at revision {revision}" if revision else "")
    try:
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=["model_index.json"]))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns(root, variant)))
    except GatedRepoError:
        do = "accept its licence on its hub page, then log in with `hf auth login` or set HF_TOKEN"
        raise UserError(asked, "the hub gives it only to accounts that accepted its licence", do) from None
    except RevisionNotFoundError:
        raise UserError(
            asked, "the hub has the repository but not this revision", "correct model.revision"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        do = "correct the name; a private repository needs HF_TOKEN; a folder must exist"
        raise UserError(asked, "neither a folder here nor a repository of the hub", do) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        do = "download it where there is a network and name that folder, or unset HF_HUB_OFFLINE if it is set"
        reason = str(error).strip().split("\n")[0]
        raise UserError(asked, f"no such folder here, and the hub cannot be reached: {reason}", do) from None


def patterns(root: Path, variant: str | None) -> list[str]:
    """The files to fetch of a repository whose model_index.json, if it has one, lies in `root`."""
    index = root / "model_index.json"
    dotted = f".{variant}" if variant else ""
    weights = [
        name
        for stem in SINGLE
        for name in (
            f"{stem}{dotted}.safetensors",
            f"{stem}{dotted}-?????-of-?????.safetensors",
            f"{stem}.safetensors.index{dotted}.json",
        )
    ]
    if not index.is_file():  # a lone VAE
        return ["config.json", *weights]
    parts = [
        part for part, value in json.loads(index.read_text()).items() if isinstance(value, list) and value[0]
    ]
    found = ["model_index.json"]
    for part in (part for part in parts if part not in UNUSED):
        small = (
            ["*.json", "*.txt", "*.model"]
            if part.startswith(("tokenizer", "scheduler"))
            else ["config.json", *weights]
        )
        found += [f"{part}/{name}" for name in small]
    return found
