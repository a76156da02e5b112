"""The page of one run."""

from pathlib import Path
from typing import Any

from sfumato.report.page import charts, content, state
from sfumato.report.page.paper import printed
from sfumato.report.page.pictures import Album
from sfumato.report.page.record import Record


class Story:
    """A run's folder, as far as it was read."""

    def __init__(self, folder: Path) -> None:
        self.record, self.album = Record(folder), Album(folder)

    def refresh(self) -> None:
        """Read what is new."""
        self.record.refresh()
        self.album.refresh()


def alone(story: Story) -> str:
    """The page of a run, of what lies in its folder now."""
    story.refresh()
    record = story.record
    config, why = content.parsed(record)
    pictures, fields, marks = story.album.page(), charts.one_run(record), charts.marks(record)
    faults, batches = content.faults(record), record.bad()
    rows, variables = content.environment(record)
    where = {
        "charts": fields,
        "marks": marks,
        "pictures": pictures,
        "speed": state.speed(record),
        "summary": content.summary(record),
        "shapes": content.shapes(record),
        "faults": faults,
        "bad": content.bad(record, batches),
        "starts": state.starts(record),
        "load": content.load(record, config),
        "settings": content.settings(record, config, why),
        "environment": rows,
        "variables": variables,
        "missing": state.missing(record, len(pictures["rows"])),
    }
    uris = [row["uris"] for row in pictures["rows"]]
    return printed(
        "run.html",
        where
        | {
            "name": record.name,
            "state": state.state(record),
            "share": min(1.0, record.step / record.steps) if record.steps else None,
            "tiles": state.tiles(record),
            "notes": state.notes(record, faults["count"], len(batches)),
            "contents": contents(where),
            "told": {"charts": fields, "marks": marks, "runs": 1},
            "drawn": {"steps": pictures["steps"], "uris": uris} if uris else None,
        },
    )


def contents(where: dict[str, Any]) -> list[tuple[str, str]]:
    """The sections that the page has."""
    data = where["shapes"] or where["faults"]["count"] or where["bad"] or len(where["starts"]) > 1
    settings = where["settings"]
    every = (
        ("curves", "Curves", where["charts"]),
        ("pictures", "Pictures", where["pictures"]["rows"]),
        ("speed", "Speed and memory", where["speed"] or where["summary"]),
        ("data", "Data and mishaps", data),
        ("load", "How to draw with it", where["load"]),
        ("settings", "Settings", settings["changed"] or settings["all"]),
        ("environment", "Environment", where["environment"]),
        ("missing", "What is not here", where["missing"]),
    )
    return [(name, text) for name, text, there in every if there]
