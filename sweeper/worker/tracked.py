"""The run of one trial as the tracker gets to know it: start, epochs, end, the best weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeper import settings as names
from sweeper.checkpoints import Epoch
from sweeper.config import TrialConfig
from sweeper.measurement import EPOCH_METRICS
from sweeper.provenance import environment_tags
from sweeper.store import Claim, Outcome
from sweeper.tracking import RunStart, Tracker

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from torch import Tensor

    from sweeper.training import Trial

_STATE_TAGS: Final = {
    Outcome.COMPLETED: "complete",
    Outcome.PRUNED: "pruned",
    Outcome.DIVERGED: "pruned",
    Outcome.PREEMPTED: "waiting",
}


@dataclass(kw_only=True)
class TrackedRun:
    """What is said of ``claimed``, a trial of ``study``, by the worker of that name.

    A retried trial goes on in the run of the trial it replaces.
    """

    tracker: Tracker
    study: str
    claimed: Claim
    worker: str
    known: bool = False
    """Whether the tracker has been told of the run."""

    @property
    def key(self) -> str:
        """The tracker's name for the run."""
        return names.run_key(self.study, self.claimed.origin)

    def start(
        self, config: TrialConfig, *, owner: names.Owner, started: float, cohort: str | None
    ) -> None:
        """Tell of the trial. ``started``: when it was, as seconds since the epoch."""
        self.tracker.start(
            RunStart(
                key=self.key,
                experiment=self.study,
                name=names.run_name(self.claimed.origin),
                params=flattened(config.model_dump(mode="json")),
                tags={
                    names.STUDY_TAG: self.study,
                    names.ROLE_TAG: names.ROLE_TRIAL,
                    names.TRIAL_TAG: str(self.claimed.number),
                    names.STATE_TAG: "running",
                    names.ATTEMPT_TAG: str(self.claimed.attempt),
                    names.WORKER_TAG: self.worker,
                    **({names.COHORT_TAG: cohort} if cohort else {}),
                    **environment_tags(),
                },
                start_time_ms=round(started * 1000),
                owner=owner,
            )
        )
        self.known = True

    def describe(self, training: Trial) -> None:
        """What is known of the trial once its model and data are there."""
        self.tracker.note(
            self.key,
            tags={f"sweeper.note.{key}": text for key, text in training.notes.items()},
            metrics={"model_parameters": float(training.parameters)},
            dataset=training.dataset.describe(),
        )

    def resumed(self, epoch: int) -> None:
        """Say after which epoch this attempt went on."""
        said = f"attempt {self.claimed.attempt} after epoch {epoch}"
        self.tracker.note(self.key, tags={names.RESUMED_TAG: said})

    def log(self, epoch: Epoch) -> None:
        """One point of every curve."""
        measurement = epoch.measurement
        self.tracker.log(self.key, measurement.metrics, measurement.epoch, epoch.time_ms)

    def weights(self, weights: Mapping[str, Tensor]) -> None:
        """Keep weights as an artifact of the run."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / names.WEIGHTS_FILE
            save_file({key: value.contiguous() for key, value in weights.items()}, file)
            self.tracker.artifact(self.key, file, names.WEIGHTS_FOLDER)

    def end(
        self,
        status: str,
        outcome: Outcome,
        metrics: Mapping[str, float] | None = None,
        *,
        company: str | None = None,
    ) -> None:
        """End the run, if the tracker knows of it. ``company``: with whom the trial trained."""
        if not self.known:
            return
        state = "failed" if status == "FAILED" else _STATE_TAGS.get(outcome, "failed")
        self.tracker.end(
            self.key,
            status=status,
            metrics={
                name: value for name, value in (metrics or {}).items() if name not in EPOCH_METRICS
            },
            tags={
                names.STATE_TAG: state,
                names.OUTCOME_TAG: str(outcome),
                **({names.COMPANY_TAG: company} if company else {}),
            },
            end_time_ms=round(time.time() * 1000),
        )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; other values as they are."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result.update(flattened(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
