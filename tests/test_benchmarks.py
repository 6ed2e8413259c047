"""The quick forms of the benchmarks that need nothing but a store and a tracker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def said_by(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_store_is_measured_with_and_without_a_history(tmp_path: Path) -> None:
    lines = said_by("bench_store.py", tmp_path).splitlines()
    measured = [line for line in lines if "claims_per_s" in line]
    assert [line.partition("history ")[2].split(",")[0] for line in measured] == [
        "0", "0", "200", "200",
    ]  # fmt: skip
    assert all(
        f", {call} " in line for line in measured for call in ("claim", "ask", "report", "tell")
    )
    assert sum("status of them all" in line for line in lines) == 2


@pytest.mark.mlflow
def test_what_was_measured_without_mlflow_arrives_when_it_is_back(tmp_path: Path) -> None:
    said = said_by("bench_tracking.py", tmp_path)
    assert "an hour without MLflow: 180 points in 4 runs" in said
    assert "all 180 points of 4 runs are in MLflow" in said.partition("after the outage")[2]
    assert said.count("% of those alone") == 2
