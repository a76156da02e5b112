"""Prompts from files, the pictures that go with them, and weights of words as they are written."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfumato.drawing import emphasis, options, prompts
from sfumato.drawing.prompts import Line
from sfumato.errors import UserError
from tests.unit.toy_drawing import write_picture


def test_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# comment\na red fox\r\n\n  two cats \n#3 on the list\n".encode())
    assert [line.prompt for line in prompts.gather(["first"], file)] == ["first", "a red fox", "two cats"]


def test_a_list_of_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a fox", "negative": "rain", "seeds": [3, 4], "image": "in/a.png"}\n\n'
        '{"prompt": "two cats", "seed": 7, "condition": "/b.png"}\n{"prompt": ""}\n'
    )
    first, second, third = prompts.read_file(file)
    assert first == Line("a fox", "rain", (3, 4), tmp_path / "in/a.png", where=f"{file}, line 1")
    assert (second.seeds, second.condition) == ((7,), Path("/b.png"))
    assert (third.prompt, third.where) == ("", f"{file}, line 4")
    shots = prompts.to_shots([first, second, third], [0, 1])
    assert [(s.prompt, s.seed, s.row) for s in shots] == [
        ("a fox", 3, 0), ("a fox", 4, 0), ("two cats", 7, 1), ("", 0, 2), ("", 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "no prompt is in it"),
        ("p.txt", "# only\n\n", "no prompt is in it"),
        ("p.jsonl", "", "no prompt is in it"),
        ("p.jsonl", '{"prompt": "a", "negatve": "b"}', "did you mean negative"),
        ("p.jsonl", '{"prompt": "a", "zzz": "b"}', "the keys are prompt, negative"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2"),
        ("p.jsonl", '{"prompt": "a"', "no JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": 1, "seeds": [2]}', "both seed and seeds"),
        ("p.jsonl", '{"prompt": "a", "seeds": []}', "whole numbers"),
        ("p.jsonl", '{"prompt": "a", "seed": "1"}', "whole numbers"),
        ("p.jsonl", '{"prompt": "a", "seed": 18446744073709551616}', "of 64 bits"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "no JSON"),
        ("p.jsonl", '{"prompt": "a", "image": 1}', "image is no text"),
        ("p.jsonl", '{"prompt": "a \\ud800 b"}', "line 1: prompt(.|\n)*not valid Unicode text"),
        ("p.jsonl", '{"prompt": "a", "image": "\\ud800"}', "line 1: image(.|\n)*not valid Unicode text"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        prompts.read_file(file)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "p.txt.png").rename(tmp_path / "p.txt")
    with pytest.raises(UserError, match="not in UTF-8"):
        prompts.read_file(tmp_path / "p.txt")
    with pytest.raises(UserError, match="No such file"):
        prompts.read_file(tmp_path / "q.txt")
    with pytest.raises(UserError, match="no prompt is given"):
        prompts.gather([], None)


def check_pairs(paired: Callable[[list[Line], str, Path], list[Line]], folder: Path) -> None:
    """One prompt goes with every picture, as many prompts with theirs in order; another number is refused."""
    for name in ("b.png", "a.JPG"):
        write_picture(folder / f"x{name.lower()}").rename(folder / name)
    (folder / "notes.txt").write_text("no picture")
    one = paired([Line("p")], "image", folder)
    assert [(line.prompt, line.image) for line in one] == [("p", folder / "a.JPG"), ("p", folder / "b.png")]
    both = paired([Line("p"), Line("q")], "image", folder)
    assert [(line.prompt, line.image) for line in both] == [("p", folder / "a.JPG"), ("q", folder / "b.png")]
    single = paired([Line("p"), Line("q", image=Path("own"))], "image", folder / "b.png")
    assert [line.image for line in single] == [folder / "b.png", Path("own")], "an own picture is lost"
    try:
        found = paired([Line("p")] * 3, "image", folder)
    except UserError as error:
        assert "2 pictures for 3 prompts" in str(error)
    else:
        raise AssertionError(f"{len(found)} lines out of 3 prompts and 2 pictures")


def test_pictures_and_prompts_are_paired(tmp_path: Path) -> None:
    check_pairs(prompts.paired, tmp_path)


def test_pairs_catch_a_silent_cut(tmp_path: Path) -> None:
    def broken(lines: list[Line], role: str, place: Path) -> list[Line]:
        pictures = prompts.pictures_in(place, role)
        return prompts.paired(lines[: len(pictures)] if len(pictures) > 1 else lines, role, place)

    with pytest.raises(AssertionError, match="3 prompts and 2 pictures"):
        check_pairs(broken, tmp_path)


def test_what_cannot_be_drawn_in_one_call_is_refused(tmp_path: Path) -> None:
    image = Path("a.png")
    with pytest.raises(UserError, match="has an image, the other has none"):
        prompts.check_alike([Line("a", image=image, where="line 1"), Line("b", where="line 2")])
    with pytest.raises(UserError, match="no image that it belongs to"):
        prompts.check_alike([Line("a", mask=image)])
    with pytest.raises(UserError, match="holds no picture"):
        prompts.pictures_in(tmp_path, "image")
    with pytest.raises(UserError, match="no such file or folder"):
        prompts.pictures_in(tmp_path / "x", "image")


def test_sizes_and_weights_of_the_command_line() -> None:
    assert (options.size("512"), options.size("768x512")) == ((512, 512), (768, 512))
    for text in ("0", "x512", "5.5", "512x0", "a"):
        with pytest.raises(Exception, match="no size"):
            options.size(text)
    assert options.weighted("a=b/c=0.8") == (Path("a=b/c"), 0.8)
    assert options.weighted("a=b") == (Path("a=b"), 1.0)
    assert (options.number("1e3"), options.seed("-9223372036854775808")) == (1000, -(2**63))
    for text in ("nan", "-inf", "1e999"):
        for read in (options.number, lambda text: options.weighted(f"a={text}")):
            with pytest.raises(ArgumentTypeError, match="no finite number"):
                read(text)
    for text in (str(2**64), str(-(2**63) - 1)):
        with pytest.raises(ArgumentTypeError, match="none of the seeds"):
            options.seed(text)
    assert torch.Generator().manual_seed(options.seed(str(2**64 - 1))) is not None


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("a (red: .5) fox", [("a ", 1), ("red", 0.5), (" fox", 1)]),
        ("((red) fox)", [("red", 1.21), (" fox", 1.1)]),
        ("(a (red:2) fox:0.5)", [("a ", 0.5), ("red", 1.0), (" fox", 0.5)]),
        ("[red] fox", [("red", 1 / 1.1), (" fox", 1)]),
        (r"a \(red\) fox\\", [("a (red) fox\\", 1)]),
        ("(red", [("red", 1.1)]),
        ("red) [fox)", [("red) ", 1), ("fox)", 1 / 1.1)]),
        ("at 12:30, ratio 3:2", [("at 12:30, ratio 3:2", 1)]),
        ("(at 12:30 sharp)", [("at 12:30 sharp", 1.1)]),
        ("[red:1.3] fox", [("red:1.3", 1 / 1.1), (" fox", 1)]),
        ("red:1.3) fox", [("red:1.3) fox", 1)]),
        ("()", [("", 1)]),
        ("", [("", 1)]),
    ],
)
def test_weights_are_read(prompt: str, wanted: list[tuple[str, float]]) -> None:
    found = emphasis.parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])
