"""When two specs are the same study, and what a change does to it."""

from __future__ import annotations

import pytest

from sweeper.study.diff import changes
from sweeper.study.parse import loads
from sweeper.study.spec import StudySpec

TEXT = """\
name: s
data: {name: digits}
model: {name: mixer, patch: 2}
search: {trials: 10}
parameters:
  optimizer.lr: {low: 1e-4, high: 0.1, log: true}
  model.blocks: [1, 2]
reference: {source: r, trials: [{params: {model.blocks: 3}, reported: {test_accuracy: 0.9}}]}
"""


def spec(*overrides: str, text: str = TEXT) -> StudySpec:
    return loads(text, overrides)


def test_a_spec_does_not_differ_from_itself_or_from_how_it_is_stored() -> None:
    stored = StudySpec.model_validate_json(spec().stored())
    assert changes(spec(), stored) == []


def test_a_default_written_out_and_another_order_are_no_changes() -> None:
    written = spec(
        "optimizer.name=adam",
        "train.batch_size=128",
        "search.sampler=tpe",
        "objective=val_accuracy",
        "parameters.model.blocks={values: [1, 2]}",
    )
    assert changes(spec(), written) == []
    turned = spec(
        "parameters.optimizer.lr=null", "parameters.optimizer.lr={low: 1e-4, high: 0.1, log: true}"
    )
    assert list(turned.parameters) == ["model.blocks", "optimizer.lr"]
    assert changes(spec(), turned) == []


@pytest.mark.parametrize(
    ("override", "path", "told"),
    [
        ("description=new", "description", 'description: "" → "new"'),
        ("resources.workers=3", "resources.workers", 'resources.workers: "auto" → 3'),
        ("resources.slurm.partition=long", "resources.slurm.partition", 'nothing → "long"'),
        ("faults.retries=0", "faults.retries", "faults.retries: 3 → 0"),
        ("search.stop={patience: 3}", "search.stop.patience", "search.stop.patience: nothing → 3"),
        ("train.graph=off", "train.graph", 'train.graph: "auto" → "off"'),
        ("reference.source=other", "reference.source", 'reference.source: "r" → "other"'),
        ("reference.trials.0.note=n", "reference.trials[0].note", '"" → "n"'),
        (
            "reference.trials.0.reported={}",
            "reference.trials[0].reported",
            '{"test_accuracy": 0.9} → {}',
        ),
        ("reference=null", "reference.source", 'reference.source: "r" → nothing'),
    ],
)
def test_harmless_changes(override: str, path: str, told: str) -> None:
    found = changes(spec(), spec(override))
    assert all(change.harmless and not change.extends for change in found)
    first = next(change for change in found if change.path == path)
    assert told in str(first)


def test_only_a_larger_budget_extends() -> None:
    (more,) = changes(spec(), spec("search.trials=20"))
    assert more.extends
    assert not more.harmless
    assert str(more) == "search.trials: 10 → 20"
    (fewer,) = changes(spec(), spec("search.trials=5"))
    assert not fewer.extends
    assert not fewer.harmless


@pytest.mark.parametrize(
    "override",
    [
        "data.limit=100",
        "data.name=circles",
        "model.patch=4",
        "model={name: mlp, width: 9}",
        "optimizer.momentum=0.5",
        "optimizer.schedule=cosine",
        "train.epochs=3",
        "train.seed=1",
        "search.seed=1",
        "search.sampler=random",
        "search.pruner=median",
        "objective=val_loss",
        "objective.at=last",
        "parameters.model.blocks=[1, 2, 3]",
        "parameters.model.blocks=null",
        "parameters.model.skip=[true, false]",
        "parameters.model.blocks={values: [1, 2], when: {model.skip: true}}",
    ],
)
def test_what_decides_results_makes_another_study(override: str) -> None:
    extra = []
    if override.startswith(("model=", "data.name")):
        extra = ["parameters.model.blocks=null", "reference=null", "model={name: mlp}"]
    if "when" in override:
        extra = ["parameters.model.skip=[true, false]"]
    before, after = spec(*extra), spec(*extra, override)
    found = changes(before, after)
    assert any(not change.harmless and not change.extends for change in found)


def test_a_range_of_whole_numbers_is_not_one_of_real_numbers() -> None:
    whole = spec("parameters.optimizer.weight_decay={low: 0, high: 1}")
    (change,) = changes(whole, spec("parameters.optimizer.weight_decay={low: 0.0, high: 1.0}"))
    assert str(change) == 'parameters.optimizer.weight_decay.numbers: "whole" → "real"'
    assert (change.harmless, change.extends) == (False, False)


def test_the_trials_of_a_grid_may_be_written_or_not() -> None:
    grid = ("search.sampler=grid", "parameters.optimizer.lr=[0.1, 0.2]")
    before, after = spec(*grid, "search.trials=null"), spec(*grid, "search.trials=4")
    assert changes(before, after) == []


def test_published_configurations_count_where_they_are_what_runs() -> None:
    only = ("search.sampler=reference", "search.trials=null")
    before, after = spec(*only), spec(*only, "reference.trials.0.params={model.blocks: 4}")
    (change,) = changes(before, after)
    assert (change.path, change.harmless) == ("reference.trials[0].params", False)
    noted = changes(before, spec(*only, "reference.trials.0.note=n"))
    assert [change.harmless for change in noted] == [True]


def test_a_default_written_out_counts_where_a_parameter_exchanges_the_variant() -> None:
    """A patch of 14 is ViT's default; written out, the Mixer takes it over."""
    text = "name: s\ndata: {name: mnist}\nmodel: {name: vit}\nsearch: {trials: 2}\n"
    text += "parameters: {model.name: [vit, mixer]}\n"
    before, after = spec(text=text), spec("model.patch=14", text=text)
    assert before.trial_config({"model.name": "mixer"}) != after.trial_config(
        {"model.name": "mixer"}
    )
    assert [change.path for change in changes(before, after)] == ["model.patch"]


def test_another_name_is_another_study_with_comparable_trials() -> None:
    (change,) = changes(spec(), spec("name=t"))
    assert not change.harmless
