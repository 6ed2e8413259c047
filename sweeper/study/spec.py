"""What a study is: the sections of a study file as one frozen value.

A :class:`StudySpec` is complete in itself. It is stored with the study, so that a worker needs
the store's address and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from sweeper.config import DataConfig, ModelConfig, OptimizerConfig, Section, TrainConfig
from sweeper.config import TrialConfig as TrialConfig
from sweeper.measurement import OBJECTIVE_METRICS
from sweeper.space import Parameter, Values
from sweeper.study.cluster import Slurm

SECTIONS = ("data", "model", "optimizer", "train")
"""The sections that make up a trial; the first word of every parameter's path."""

MAX_PARAMETERS = 200

ObjectiveMetric = Literal[
    "val_accuracy",
    "val_loss",
    "train_accuracy",
    "train_loss",
    "seconds",
    "samples_per_s",
    "peak_memory_mib",
]


def _no_default(schema: dict[str, Any]) -> None:
    """For the JSON Schema: what stands for a missing field depends on other fields."""
    del schema["default"]


class Objective(Section):
    """What is optimized.

    ``metric`` is one of training or validation: the test set selects nothing. ``direction`` may be
    left out where it is the metric's usual one. ``at``: the value of the ``best`` epoch, or of the
    ``last``.
    """

    metric: ObjectiveMetric = "val_accuracy"
    direction: Literal["maximize", "minimize"] = Field("maximize", json_schema_extra=_no_default)
    at: Literal["best", "last"] = "best"

    @property
    def maximize(self) -> bool:
        return self.direction == "maximize"


def _objective(value: Any) -> Any:
    """A metric's name alone takes the direction that makes sense for it."""
    if isinstance(value, str):
        value = {"metric": value}
    if isinstance(value, dict) and "direction" not in value:
        direction = OBJECTIVE_METRICS.get(str(value.get("metric", "val_accuracy")))
        return {**value, "direction": direction} if direction else value
    return value


_Objective = Annotated[Objective, BeforeValidator(_objective)]


def _several(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else [value]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Tpe(Section):
    """Tree-structured Parzen estimator, aware of running trials.

    ``startup_trials``: so many trials are drawn at random first.
    """

    name: Literal["tpe"] = "tpe"
    startup_trials: int = Field(default=10, ge=0)


class Gp(Section):
    """Gaussian process.

    ``startup_trials``: so many trials are drawn at random first.
    """

    name: Literal["gp"]
    startup_trials: int = Field(default=10, ge=0)


class CmaEs(Section):
    """Covariance matrix adaptation; numbers only, lists and conditions are drawn at random.

    ``startup_trials``: so many trials are drawn at random first.
    """

    name: Literal["cmaes"]
    startup_trials: int = Field(default=1, ge=0)


class Nsga2(Section):
    """Genetic search, made for several objectives.

    ``population``: trials a generation.
    """

    name: Literal["nsga2"]
    population: int = Field(default=50, ge=2)


class Qmc(Section):
    """Quasi-Monte Carlo: spreads evenly and looks at no result.

    Parameters with a condition are drawn at random.
    """

    name: Literal["qmc"]


class Random(Section):
    """Independent draws."""

    name: Literal["random"]


class Grid(Section):
    """Every combination once; ``trials`` may be left out."""

    name: Literal["grid"]


class ReferenceOnly(Section):
    """Exactly the trials listed under ``reference``, and nothing is sampled."""

    name: Literal["reference"]


Sampler = Annotated[
    Annotated[
        Tpe | Gp | CmaEs | Nsga2 | Qmc | Random | Grid | ReferenceOnly, Field(discriminator="name")
    ],
    BeforeValidator(_named),
]


class NoPruner(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


class _EpochPruner(Section):
    """``min_epochs``: no trial is pruned before so many epochs."""

    min_epochs: int = Field(default=1, ge=1)


class MedianPruner(_EpochPruner):
    """Ends a trial whose best value is worse than the median of the others at the same epoch.

    ``startup_trials``: so many trials run to their end first.
    """

    name: Literal["median"]
    startup_trials: int = Field(default=5, ge=0)


class AshaPruner(_EpochPruner):
    """Asynchronous successive halving: of ``reduction`` trials one goes on to the next rung."""

    name: Literal["asha"]
    reduction: int = Field(default=3, ge=2)


class HyperbandPruner(_EpochPruner):
    """Several brackets of successive halving, from ``min_epochs`` to the full number of epochs.

    ``reduction``: of so many trials one goes on to the next rung.
    """

    name: Literal["hyperband"]
    reduction: int = Field(default=3, ge=2)


class PatientPruner(Section):
    """Ends a trial whose last ``patience`` + 1 epochs were all worse than its best before them.

    Worse by more than ``min_delta``; a trial that stands still goes on.
    """

    name: Literal["patient"]
    patience: int = Field(default=5, ge=1)
    min_delta: float = Field(default=0.0, ge=0)


class ThresholdPruner(_EpochPruner):
    """Ends a trial whose objective leaves the range from ``lower`` to ``upper``."""

    name: Literal["threshold"]
    lower: float | None = None
    upper: float | None = None


Pruner = Annotated[
    Annotated[
        NoPruner | MedianPruner | AshaPruner | HyperbandPruner | PatientPruner | ThresholdPruner,
        Field(discriminator="name"),
    ],
    BeforeValidator(_named),
]


class Stop(Section):
    """What is enough, before the budget is used up: no further trial is begun then.

    ``target``: a completed trial's objective is as good as this. ``patience``: so many trials have
    ended since the best one did, and none was better; failed ones do not count. ``failures``: so
    many trials have failed. Trials that are running go on to their end. Launch the file with other
    values here to go on: ``resume`` does not change what is enough.
    """

    target: float | None = None
    patience: int | None = Field(default=None, ge=1)
    failures: int | None = Field(default=None, ge=1)


class Search(Section):
    """How points of the space are chosen, and how many.

    ``sampler`` chooses them, ``pruner`` ends trials early. ``trials`` is the budget, exactly; a
    grid and the published configurations know theirs and need none. ``stop`` says what is enough
    before that. ``seed`` is the sampler's.
    """

    sampler: Sampler = Tpe()
    pruner: Pruner = NoPruner()
    trials: int | None = Field(default=None, ge=1)
    stop: Stop = Stop()
    seed: int = Field(default=0, ge=0, lt=2**31)


class ReferenceTrial(Section):
    """One published result: the values it used and the metrics it reported.

    ``params`` are laid over the study's sections like a sampled point, and may lie outside the
    space. ``reported`` maps metrics to values; they are named as ours are, and a further name is
    shown, not compared. ``note`` is shown beside them.
    """

    params: dict[str, Any] = Field(default_factory=dict)
    reported: dict[str, float] = Field(default_factory=dict)
    note: str = ""


class Reference(Section):
    """Published results of one source, shown beside ours.

    ``source`` is where they were published. ``trials`` are the results, one each.
    """

    source: str
    trials: tuple[ReferenceTrial, ...] = Field(default=(), strict=False)


class Resources(Section):
    """Who trains. ``workers: auto`` is one a GPU, or one a core where there is no GPU.

    ``priority``: workers that serve all studies of a store take the highest first, and among equals
    the oldest study. ``gpus_per_worker`` may be a fraction. ``cohort`` is how many trials a worker
    trains at once, those of equal structure as one batch, others beside them on CUDA streams:
    ``auto`` is 1 on a CPU, and on a GPU what is measured to be the fastest there, in which way.
    ``slurm`` is what a SLURM cluster is asked for.
    """

    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    priority: int = Field(default=0, ge=-1000, le=1000)
    gpus_per_worker: float = Field(default=1, ge=0)
    cohort: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    slurm: Slurm = Slurm()


class Faults(Section):
    """What happens when something breaks.

    A trial whose worker is lost goes back to the queue up to ``retries`` times, one that crashed up
    to ``crash_retries`` times. ``on_out_of_memory``: ``retry`` tries once more, as it is, in the
    hope of a freer device. A worker beats every ``heartbeat_s``; after ``lost_after_s`` without
    one it counts as lost. ``on_divergence``: a trial whose loss is no longer finite counts as
    ``pruned`` (a bad result the sampler learns from) or as ``failed``. A checkpoint is written
    after every ``checkpoint_every`` epochs (0: never), at most every ``checkpoint_s`` seconds. A
    worker that is told to end finishes its epoch if that takes less than ``grace_s``.
    """

    retries: int = Field(default=3, ge=0)
    heartbeat_s: int = Field(default=10, ge=1)
    lost_after_s: int = Field(default=60, ge=2)
    on_divergence: Literal["pruned", "failed"] = "pruned"
    on_out_of_memory: Literal["retry", "fail"] = "retry"
    crash_retries: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=1, ge=0)
    checkpoint_s: float = Field(default=10, ge=0)
    grace_s: float = Field(default=30, ge=0)


StudyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class StudySpec(Section):
    """A whole study file, defaults filled in.

    ``name`` is the study's in the store. ``description`` is for people. ``objective`` is what is
    optimized: a metric, a mapping, or a list of these. ``data`` are the images. ``model`` is what
    is trained. ``optimizer`` is how its weights change. ``train`` is how long, in which batches,
    against which loss. ``search`` is how the space is searched. ``parameters`` are the space:
    dotted paths into data, model, optimizer and train. ``reference`` holds published results.
    ``resources`` is who trains. ``faults`` is what happens when something breaks.
    """

    name: StudyName
    description: str = ""
    objective: Annotated[
        tuple[_Objective, ...], BeforeValidator(_several), Field(min_length=1, strict=False)
    ] = (Objective(),)
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    search: Search = Search()
    parameters: dict[str, Parameter] = Field(default_factory=dict, max_length=MAX_PARAMETERS)
    reference: Reference | None = None
    resources: Resources = Resources()
    faults: Faults = Faults()

    def sections(self) -> dict[str, Any]:
        """The four sections of a trial as plain data, before any parameter is set.

        Only what the file sets: a default belongs to the model or schedule that a parameter may
        yet exchange for another.
        """
        return {
            name: getattr(self, name).model_dump(mode="json", exclude_unset=True)
            for name in SECTIONS
        }

    @property
    def imports(self) -> tuple[str, ...]:
        """The models ``package.module:factory`` that a trial of this study may import."""
        values: list[Any] = [self.model.name]
        for path in ("model.name", "model"):
            if isinstance(known := self.parameters.get(path), Values):
                values += known.values
            values += [
                trial.params[path]
                for trial in (self.reference.trials if self.reference else ())
                if path in trial.params
            ]
        names = [value.get("name") if isinstance(value, Mapping) else value for value in values]
        return tuple(dict.fromkeys(name for name in map(str, names) if ":" in name))

    def stored(self) -> str:
        """The spec as JSON, for the store; ``model_validate_json`` reads it back equal."""
        return self.model_dump_json(exclude_unset=True)

    def trial_config(self, values: Mapping[str, Any]) -> TrialConfig:
        """The configuration of the trial with the parameters ``values`` (dotted path to value).

        Raises pydantic's ValidationError where the values do not fit together.
        """
        return TrialConfig.model_validate(overlay(self.sections(), values))


def overlay(sections: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``sections`` with every dotted path of ``values`` set; shared parts are copied, not changed.

    Setting a ``name`` (another model, data set or schedule) to a new value drops the fields that
    belong to the former one and which the new one does not know. Outer paths are set before
    inner ones and names before the fields they bring, whatever the order of ``values``.
    """
    result: dict[str, Any] = copy.deepcopy(dict(sections))
    for path in sorted(values, key=lambda path: (path.count("."), not path.endswith(".name"))):
        *parents, leaf = path.split(".")
        target = result
        for parent in parents:
            child = target.get(parent)
            if isinstance(child, str):
                child = {"name": child}
            elif isinstance(child, Mapping):
                child = dict(child)  # a value of the space is shared by all trials
            else:
                child = {}
            target[parent] = child
            target = child
        if leaf == "name":
            _drop_former_fields(".".join(parents), target, str(values[path]))
        target[leaf] = values[path]
    return result


def _drop_former_fields(path: str, section: dict[str, Any], name: str) -> None:
    """Remove from ``section`` what its former variant had and the one called ``name`` has not."""
    from sweeper.study.variants import foreign_fields  # which imports this module

    for key in foreign_fields(path, section, name):
        del section[key]
