"""A folder of image files, with .txt captions beside them or metadata.jsonl lists, also in folders below."""

import json
from pathlib import Path, PurePosixPath

from PIL import Image

from sfumato.config import Data
from sfumato.data.sources import Source, decode, digest, need_captions, read_captions
from sfumato.errors import UserError

IMAGES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
UNREAD = {".heic", ".heif", ".jxl", ".psd"}  # pictures to the user, but not to Pillow
LIST = "metadata.jsonl"


class Folder(Source):
    """Image files below a folder, in the order of their names.

    A picture's captions are those of its metadata.jsonl line ("file_name" is relative to that file) or, if
    none names it, the text of NAME.txt.
    """

    def __init__(self, place: Path, files: list[str], data: Data) -> None:
        """Raises UserError for no images, an image without caption, and a faulty list.

        files are all those of the folder, relative to place.
        """
        self.place = place
        self.files = [file for file in files if suffix(file) in IMAGES]
        if unread := [file for file in files if suffix(file) in UNREAD]:
            found = f"{len(unread)} pictures in a format that is not read; the first is {unread[0]}"
            raise UserError(
                f'data.source = "{data.source}"', found, "convert them to png or jpg, or move them"
            )
        if not self.files:
            found = f"{len(files)} files, none of them an image or parquet" if files else "an empty folder"
            raise UserError(
                f'data.source = "{data.source}"', found, f"put images there: {' '.join(sorted(IMAGES))}"
            )
        known = set(files)
        listed: dict[str, list[str]] = {}
        for file in files:
            if PurePosixPath(file).name == LIST:
                for image, texts in read_list(place, file, data.caption_column, known).items():
                    listed.setdefault(image, []).extend(texts)
        self.texts = [listed.get(file) or sidecar(place, file, known) for file in self.files]
        missing = [file for file, texts in zip(self.files, self.texts, strict=True) if not texts]
        need_captions(missing, len(self.files), str(place))
        sizes = [(place / file).stat().st_size for file in self.files]
        self.fingerprint = digest(zip(self.files, sizes, self.texts, strict=True))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.place / self.files[index])

    def captions(self, index: int) -> list[str]:
        return self.texts[index]

    def image(self, index: int) -> Image.Image:
        return decode(self.place / self.files[index], self.name(index))


def suffix(file: str) -> str:
    """What follows the last dot of a file's name, with the dot, in small letters."""
    return PurePosixPath(file).suffix.lower()


def sidecar(place: Path, image: str, known: set[str]) -> list[str]:
    """The caption of NAME.txt beside an image, in a list; [] if there is none."""
    file = PurePosixPath(image).with_suffix(".txt").as_posix()
    return [read_text(place / file).strip()] if file in known else []


def read_text(path: Path) -> str:
    """A text file's content. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the text of {path}", f"it is not UTF-8: {error}", "save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"the text of {path}", f"it cannot be read: {error}", "mend the file") from error


def read_list(place: Path, file: str, key: str, known: set[str]) -> dict[str, list[str]]:
    """Image path -> captions of one metadata.jsonl; lines that repeat a file_name add captions."""
    base = PurePosixPath(file).parent
    captions: dict[str, list[str]] = {}
    # Not splitlines: it also parts a caption that holds one of Unicode's line separators.
    for number, line in enumerate(read_text(place / file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {place / file}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(where, f"it is not JSON: {error}", "write one JSON object a line") from None
        if not isinstance(row, dict) or "file_name" not in row or key not in row:
            found = f"its keys are {', '.join(row)}" if isinstance(row, dict) else f"it is {row!r}"
            do = 'give it "file_name" and the caption; data.caption_column names the caption\'s key'
            raise UserError(f'"file_name" and "{key}" in {where}', found, do)
        image = (base / str(row["file_name"])).as_posix()
        if image not in known or suffix(image) not in IMAGES:
            found = f"not of a format that is read: {' '.join(sorted(IMAGES))}"
            raise UserError(
                f'"{row["file_name"]}" of {where}',
                found if image in known else "no such file beside or below it, or a hidden one",
                "mend file_name, convert the file, or take the line away",
            )
        captions.setdefault(image, []).extend(read_captions(row[key], where, key))
    return captions
