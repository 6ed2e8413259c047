"""The base of every section of a study file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen mapping whose unknown keys are mistakes and whose numbers are never cast silently.

    ``strict`` keeps ``"3"`` from passing as 3 and ``true`` as 1; whole floats still pass as int
    nowhere, ints pass as float everywhere, as YAML writers expect.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )
