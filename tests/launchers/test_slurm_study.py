"""The short form of ``scripts/time-limit``."""

from __future__ import annotations

from pathlib import Path

import pytest
from launchers.slurm_cluster import SlurmCluster
from launchers.slurm_study import Plan, TwoNodes


@pytest.mark.postgres
@pytest.mark.mlflow
def test_a_study_goes_on_after_a_time_limit_and_a_preemption(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Nothing is lost, nothing is done twice: every trial has each of its epochs once."""
    pytest.importorskip("pgserver", reason="the wheel pgserver is not installed")
    home = tmp_path / "my home"
    home.mkdir()
    plan = Plan(trials=8, epochs=28, time_min=10, requeue_s=5, lowered=True, over_s=240)
    account = TwoNodes(home, slurm_cluster, plan).run()
    assert account.wrong == [], account.table()
    assert account.limits >= 1, account.table()
    assert account.preemptions >= 1, account.table()
    assert sum(account.restarts.values()) == account.limits + account.preemptions, account.table()
    assert account.resumed, account.table()
