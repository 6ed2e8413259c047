"""The short form of ``scripts/chaos``: a sweep whose parts are killed is a whole sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.harness import Chaos, Plan


@pytest.mark.mlflow
def test_a_sweep_survives_the_death_of_its_parts(tmp_path: Path) -> None:
    home = tmp_path / "my home"
    home.mkdir()
    plan = Plan(
        trials=12,
        workers=3,
        seed=0,
        every_s=3.0,
        kills=6,
        limit_s=240,
        epochs=40,
    )
    account = Chaos(home, plan).run()
    assert account.wrong == [], account.table()
    assert sum(account.killed.values()) >= 3, account.table()
    assert account.resumed > 0, account.table()
