"""The queue: exact whatever happens to workers."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.synchronize import Barrier

import pytest

from sweeper.errors import TrialLostError
from sweeper.store import Outcome, Store, StoredStudy, held, open_store, queue, standing, studies
from sweeper.store import attributes as attr

Start = Callable[..., StoredStudy]
REFERENCE = {
    "source": "R0",
    "trials": [
        {"params": {"optimizer.lr": 0.01}, "reported": {"test_accuracy": 0.9}},
        {"params": {"optimizer.lr": 5.0, "train.batch_size": 32}},
    ],
}


def complete(store: Store, study: StoredStudy, claimed: queue.Claim, value: float = 1.0) -> None:
    held.finish(
        store,
        study.study,
        claimed,
        outcome=Outcome.COMPLETED,
        values=[value],
    )


def test_claims_are_in_order_and_end_when_nothing_waits(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    first = queue.claim(store, study.id, "a")
    second = queue.claim(store, study.id, "a")
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    assert queue.claim(store, study.id, "a") is None


def test_published_values_outside_the_space_are_kept(store: Store, started: Start) -> None:
    study = started(search={"trials": 1}, reference=REFERENCE)
    points = []
    while claimed := queue.claim(store, study.id, "a"):
        points.append(held.values_of(study.spec, study.study, claimed))
    assert points[0] == {"optimizer.lr": 0.01}
    assert points[1] == {"optimizer.lr": 5.0, "train.batch_size": 32}
    assert 1e-4 <= points[2]["optimizer.lr"] <= 0.1


def test_a_drawn_point_stays_when_the_trial_is_put_back(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    point = held.values_of(study.spec, study.study, claimed)
    store.storage.set_trial_intermediate_value(claimed.trial_id, 2, 0.5)
    held.put_back(store, claimed)
    again = queue.claim(store, study.id, "b")
    assert again is not None
    assert (again.number, again.attempt) == (0, 2)
    assert held.values_of(study.spec, study.study, again) == point


def test_finishing_twice_is_finishing_once(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    complete(store, study, claimed, 0.5)
    complete(store, study, claimed, 0.5)  # the answer to the first was lost
    assert standing(store, study).rows[0].values == (0.5,)


def test_what_another_worker_has_by_now_is_not_put_back(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    first = queue.claim(store, study.id, "a")
    assert first is not None
    held.put_back(store, first)
    second = queue.claim(store, study.id, "b")
    assert second is not None
    with pytest.raises(TrialLostError):
        held.put_back(store, first)
    with pytest.raises(TrialLostError):
        complete(store, study, first)
    complete(store, study, second)


def test_the_pruner_does_not_look_ahead(store: Store, started: Start) -> None:
    study = started(search={"trials": 1, "pruner": {"name": "threshold", "lower": 0.5}})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    told = {1: 0.9, 2: 0.1}
    for epoch, value in told.items():
        held.report(store, claimed, epoch, value)
    assert not held.should_prune(store, study.study, claimed, 1, told)
    assert held.should_prune(store, study.study, claimed, 2, told)


def test_the_pruner_knows_what_was_told_a_moment_ago(
    store: Store, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "_PRUNER_SLACK_S", 600.0)  # what was read stays recent enough
    study = started(
        search={"trials": 1, "pruner": {"name": "threshold", "lower": 0.5, "min_epochs": 1}}
    )
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    store.storage.get_all_trials(study.id, deepcopy=False)  # read before the report
    held.report(store, claimed, 1, 0.1)
    assert not held.should_prune(store, study.study, claimed, 1, {})
    assert held.should_prune(store, study.study, claimed, 1, {1: 0.1})


def _work(url: str, name: str, together: Barrier, ended: multiprocessing.Queue[int]) -> None:
    store = open_store(url)
    study = studies.load(store, name)
    together.wait(120)
    first = True
    while claimed := queue.claim(store, study.id, multiprocessing.current_process().name):
        held.values_of(study.spec, study.study, claimed)
        complete(store, study, claimed)
        ended.put(claimed.number)
        if first:
            first = False
            together.wait(120)


def test_eight_processes_end_forty_trials_once_each(store: Store, url: str, started: Start) -> None:
    """All of them begin at one moment, and none goes on before each of them has had a trial."""
    study = started(search={"trials": 40, "sampler": "random"})
    context = multiprocessing.get_context("spawn")
    ended: multiprocessing.Queue[int] = context.Queue()
    together = context.Barrier(8)
    workers = [
        context.Process(target=_work, args=(url, study.name, together, ended)) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    numbers = [ended.get(timeout=120) for _ in range(40)]
    for worker in workers:
        worker.join(60)
    time.sleep(0.2)
    assert ended.empty()
    assert Counter(numbers) == Counter(range(40))
    assert standing(store, study).counts["complete"] == 40
    assert len({row.worker for row in standing(store, study).rows}) == 8


def test_facts_are_stored_before_the_state(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    held.finish(
        store,
        study.study,
        claimed,
        outcome=Outcome.CRASHED,
        facts={attr.ERROR: "x" * 20_000, attr.METRICS: {"test_accuracy": 0.5}},
    )
    row = standing(store, study).rows[0]
    assert row.outcome == "crashed"
    assert row.metrics == {"test_accuracy": 0.5}
    assert len(row.error or "") == 8000


def test_trials_of_known_values_are_claimed_by_what_fits(store: Store, started: Start) -> None:
    """Grid points in their order; others are left as they are, and so is what was never drawn."""
    grid = started(
        parameters={
            "train.batch_size": {"values": [32, 64]},
            "data.augment": {"values": [[], ["flip"]]},
        },
        search={"sampler": "grid"},
    )

    def claimed(study: StoredStudy, **wanted: object) -> int | None:
        found = queue.claim_where(
            store,
            study.id,
            "a",
            spec=study.spec,
            fits=lambda values: all(
                values[key.replace("_", ".", 1)] == v for key, v in wanted.items()
            ),
        )
        return None if found is None else found.number

    assert claimed(grid, train_batch_size=64) == 2
    assert claimed(grid, data_augment=["flip"]) == 1
    assert claimed(grid, data_augment=["flip"]) == 3
    assert claimed(grid, data_augment=["flip"]) is None
    assert claimed(grid) == 0
    rows = standing(store, grid).rows
    assert {row.state for row in rows} == {"running"}


def test_what_the_sampler_is_to_decide_fits_nothing_before_it_is_drawn(
    store: Store, started: Start
) -> None:
    study = started()
    assert queue.claim_where(store, study.id, "a", spec=study.spec, fits=lambda _: True) is None
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    drawn = held.values_of(study.spec, study.study, claimed)
    held.put_back(store, claimed)
    seen: list[object] = []

    def fits(values: object) -> bool:
        seen.append(values)
        return True

    again = queue.claim_where(store, study.id, "b", spec=study.spec, fits=fits)
    assert again is not None
    assert (again.number, again.attempt) == (claimed.number, 2)
    assert seen == [drawn]


def test_a_trial_that_is_to_train_alone_says_so_and_fits_no_cohort(
    store: Store, started: Start
) -> None:
    study = started(parameters={"train.seed": {"values": [1]}}, search={"sampler": "grid"})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    assert not claimed.alone
    held.note(store, claimed, {attr.ALONE: True})
    held.put_back(store, claimed)
    assert queue.claim_where(store, study.id, "a", spec=study.spec, fits=lambda _: True) is None
    again = queue.claim(store, study.id, "a")
    assert again is not None
    assert again.alone
