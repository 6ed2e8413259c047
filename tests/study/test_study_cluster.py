"""What a study file asks a SLURM cluster for."""

from __future__ import annotations

import pytest

from sweeper.study.cluster import Slurm, lead_s


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (None, None),
        (90, 5400),
        ("4:00:00", 14_400),
        ("100:30:05", 361_805),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("1-0:00:10", 86_410),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(
    time: int | str | None, seconds: int | None
) -> None:
    assert Slurm(time=time).limit_s == seconds


def test_a_worker_has_its_grace_and_time_to_be_queued_again() -> None:
    assert lead_s(0) == 20
    assert lead_s(30.2) == 51
