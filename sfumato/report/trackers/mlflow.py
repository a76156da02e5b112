"""MLflow: on the server of MLFLOW_TRACKING_URI, else in the file mlflow.db beside the runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from sfumato.config import Config
from sfumato.report.trackers import settings

LONGEST = 500
"""Letters of a parameter that every server takes."""


class Mlflow:
    """A run of MLflow; a step that is told again replaces nothing, and its newest value is drawn last."""

    def __init__(self, client: Any, number: str) -> None:
        self.client, self.id = client, number

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of one line."""
        now = int(scalars.get("time", 0) * 1000)
        metrics = [Metric(name, value, now, step) for name, value in scalars.items() if name != "step"]
        self.client.log_batch(self.id, metrics=metrics)

    def images(self, step: int, files: Sequence[Path]) -> None:
        """The previews of a step."""
        for file in files:
            self.client.log_artifact(self.id, str(file), f"previews/step-{step:06d}")

    def back_to(self, step: int) -> None:
        """Nothing can be taken back."""

    def close(self) -> None:
        """The run has ended."""
        self.client.set_terminated(self.id)


def begin(config: Config, kept: str | None, step: int) -> Mlflow:
    """Begin, or go on with the run of an earlier start."""
    asked = None if config.log.offline else os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(asked or f"sqlite:///{config.output.absolute() / 'mlflow.db'}")
    if kept is not None:
        client.update_run(kept, status="RUNNING")
        return Mlflow(client, kept)
    found = client.get_experiment_by_name(config.log.project)
    place = None if asked else (config.output.absolute() / "mlflow").as_uri()
    experiment = found.experiment_id if found else client.create_experiment(config.log.project, place)
    run = client.create_run(experiment, run_name=config.name)
    told = [Param(name, str(value)[:LONGEST]) for name, value in settings(config).items()]
    for first in range(0, len(told), 100):
        client.log_batch(run.info.run_id, params=told[first : first + 100])
    return Mlflow(client, run.info.run_id)
