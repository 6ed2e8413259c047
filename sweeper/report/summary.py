"""The first screen: what was asked, what came out, in ten seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sweeper.report.blocks import Facts, Tile
from sweeper.report.collect import StudyData, device_seconds, wall_seconds
from sweeper.report.configurations import Configuration, setting
from sweeper.report.leaderboard import REPEATED, described, published_name
from sweeper.report.wording import (
    duration,
    last_line,
    metric,
    metric_title,
    number,
    plural,
    short_names,
    value,
)
from sweeper.space import Parameter, Values
from sweeper.store import Standing, TrialRow
from sweeper.store.view import STATES
from sweeper.study.spec import StudySpec

_LISTED: Final = 12
_IN_HEADLINE: Final = 4


def headline(data: StudyData) -> str:
    """What came out, in one sentence."""
    now = data.now
    ranked = data.ranked
    if not ranked:
        failed = next((row.error for row in now.rows if row.error), None)
        return f"No trial has completed: {last_line(failed)}" if failed else none_completed(now)
    best = ranked[0]
    objective = now.spec.objective[0]
    reached = best.objective()
    scores = f"{metric_title(objective.metric)} {number(reached.mean if reached else None)}"
    if reached is not None and reached.deviation is not None:
        scores += f" ± {number(reached.deviation)} over {reached.count} seeds"
    tested = best.metric("test_accuracy")
    if tested is not None:
        scores += f", test accuracy {number(tested.mean)}"
    what = _named(data, best)
    pending = "" if now.over else f" So far: {now.ended} of {now.budget} trials have ended."
    if len(ranked) == 1:
        return f"{what}: {scores}.{pending}"
    unit = "values" if len(data.factors) == 1 else "configurations"
    return f"{what} is the best of {len(ranked)} {unit}: {scores}.{_near(ranked)}{pending}"


def none_completed(now: Standing) -> str:
    """That there is no result, and of a study that is over how its trials ended instead."""
    if not now.rows or not now.over:
        return "No trial has completed yet."
    ends = Counter(row.outcome or row.state for row in now.rows if row.state != "retried")
    listed = ", ".join(f"{count} {end.replace('_', ' ')}" for end, count in ends.most_common())
    return f"No trial has completed: {listed}."


def _near(ranked: Sequence[Configuration]) -> str:
    """How many others the seeds hardly tell from the best: their order is no finding."""
    best = ranked[0].objective()
    if best is None or not best.deviation:
        return ""
    means = [spread.mean for config in ranked[1:] if (spread := config.objective()) is not None]
    near = sum(abs(mean - best.mean) <= best.deviation for mean in means)
    if not near:
        return ""
    verb = "is" if near == 1 else "are"
    return f" {plural(near, 'other')} {verb} within its standard deviation."


def _named(data: StudyData, config: Configuration) -> str:
    """A configuration by its value of the one factor, else by its trial."""
    if len(data.factors) == 1 and len(data.found) > 1:
        path = data.factors[0]
        found = setting(data.now.spec, config.resolved, config.params, path)
        title = short_names([path])[path]
        return f"{title[:1].upper()}{title[1:]} {value(found)}"
    trial = f"Trial {config.complete[0].number}"
    if name := published_name(data, config):
        return f"{trial} ({name})"
    if not 0 < len(data.factors) <= _IN_HEADLINE:
        return trial
    return f"{trial} ({described(data, config)})"


def tiles(data: StudyData) -> tuple[Tile, ...]:
    """Objective, test accuracy, trials by state, device time."""
    now = data.now
    found = []
    best = now.best
    if best is not None:
        objective = now.spec.objective[0]
        alone = " alone" if any(len(config.complete) > 1 for config in data.found) else ""
        found.append(
            Tile(
                label=f"Best {metric_title(objective.metric)}",
                value=number(best.values[0]),
                detail=f"trial {best.number}{alone}, {objective.at} epoch",
            )
        )
        if "test_accuracy" in best.metrics:
            found.append(
                Tile(
                    label="Its test accuracy",
                    value=metric("test_accuracy", best.metrics["test_accuracy"]),
                    detail="read once, after training",
                )
            )
    counts = now.counts
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    found.append(Tile(label="Trials", value=f"{now.ended} of {now.budget}", detail=states))
    wall = wall_seconds(now.rows)
    workers = len({row.worker for row in now.rows if row.worker})
    found.append(
        Tile(
            label="Device time",
            value=duration(device_seconds(now.rows)),
            detail=f"{duration(wall)} from start to end, {plural(workers, 'worker')}"
            if wall is not None
            else "",
        )
    )
    return tuple(found)


def asked(data: StudyData) -> Facts:
    """The question: objective, what is fixed, what is searched and how."""
    spec = data.now.spec
    objectives = "; ".join(
        f"{each.direction} {metric_title(each.metric)} ({each.at} epoch)" for each in spec.objective
    )
    sections = spec.sections()
    search = spec.search
    how = [f"{search.sampler.name} sampler" if spec.parameters else "no parameter is searched"]
    if search.pruner.name != "none":
        how.append(f"{search.pruner.name} pruner")
    facts: list[tuple[str, tuple[str, ...]]] = [("objective", (objectives,))]
    if spec.parameters:
        spaces = (f"{path}: {_space(parameter)}" for path, parameter in spec.parameters.items())
        facts.append(("searched", tuple(spaces)))
    how.append(plural(data.now.budget, "trial"))
    if chosen := sum(bool(row.given) for row in data.now.rows if row.state != "retried"):
        how.append(f"{chosen} of them with values that a person gave (sweeper enqueue)")
    facts.append(("how", (", ".join(how),)))
    if enough := search.stop.model_dump(exclude_none=True):
        facts.append(("enough", tuple(f"{name}: {value(each)}" for name, each in enough.items())))
    for name in ("data", "model", "optimizer", "train"):
        facts.append((name, (_fixed(spec, name, sections[name]),)))
    if spec.reference is not None:
        many = plural(len(spec.reference.trials), "row")
        facts.append(("published", (f"{spec.reference.source}, {many}",)))
    return Facts(title="Asked", facts=tuple(facts))


def _fixed(spec: StudySpec, name: str, section: Mapping[str, Any]) -> str:
    """What a section of the study file holds fast, its kind even where that is the default one."""
    if name in spec.parameters:
        return "searched"
    kind = getattr(getattr(spec, name), "name", None)
    if kind is not None:
        section = {"name": f"{kind} by default", **section}
    said = _section(section, prefix=name, skip=set(spec.parameters))
    searched = any(path.startswith(f"{name}.") for path in spec.parameters)
    return said or ("defaults, but for what is searched" if searched else "defaults")


def _space(parameter: Parameter) -> str:
    if isinstance(parameter, Values):
        shown = [value(each) for each in parameter.values[:_LISTED]]
        more = len(parameter.values) - len(shown)
        text = ", ".join(shown) + (f" and {more} more" if more else "")
    else:
        text = f"{value(parameter.low)} to {value(parameter.high)}"
        text += " on a log scale" if parameter.log else ""
        text += f" in steps of {value(parameter.step)}" if parameter.step else ""
    if parameter.when:
        needs = " and ".join(
            f"{path} is {' or '.join(map(value, options))}"
            for path, options in parameter.when.items()
        )
        text += f", where {needs}"
    return text


def _section(section: Mapping[str, Any], *, prefix: str, skip: set[str]) -> str:
    """A section of the study file in one line, without what is searched."""
    parts = []
    for key, each in sorted(section.items(), key=lambda item: item[0] != "name"):
        path, title = f"{prefix}.{key}", key.replace("_", " ")
        if path in skip or each is None or each == [] or each == {}:
            continue
        if isinstance(each, Mapping):
            inside = _section(each, prefix=path, skip=skip)
            text = f"{title} ({inside})" if inside else ""
        elif isinstance(each, list | tuple):
            listed = [
                _section(item, prefix=path, skip=skip) if isinstance(item, Mapping) else value(item)
                for item in each
            ]
            text = f"{title} {' + '.join(listed)}"
        else:
            text = value(each) if key == "name" else f"{title} {value(each)}"
        if text:
            parts.append(text)
    return ", ".join(parts)


def best_configuration(data: StudyData) -> Facts | None:
    """The best trial: its parameters, and what else it reached."""
    row = data.now.best
    if row is None:
        return None
    titles = short_names(list(row.params))
    facts = [(f"{titles[path]}", (value(each),)) for path, each in row.params.items()]
    facts += [(title, (text,)) for title, text in _reached(data, row)]
    return Facts(title=f"Best: trial {row.number}", facts=tuple(facts))


def _reached(data: StudyData, row: TrialRow) -> list[tuple[str, str]]:
    objectives = {REPEATED.get((each.metric, each.at)) for each in data.now.spec.objective}
    names = ["max_train_accuracy", "max_val_accuracy", "test_accuracy", "test_loss"]
    names = [name for name in names if name not in objectives]
    found = [
        (metric_title(objective.metric), number(reached))
        for objective, reached in zip(data.now.spec.objective, row.values, strict=False)
    ]
    found += [
        (metric_title(name), metric(name, row.metrics[name]))
        for name in names
        if name in row.metrics
    ]
    epoch, epochs = row.metrics.get("best_epoch"), data.epochs(row)
    if epoch is not None:
        found.append(("best epoch", f"{round(epoch)} of {epochs}" if epochs else f"{round(epoch)}"))
    if row.model_parameters:
        found.append(("model size", f"{row.model_parameters:,} parameters"))
    if "mean_seconds" in row.metrics:
        found.append(("an epoch", f"{metric('mean_seconds', row.metrics['mean_seconds'])} s"))
    found.append(("whole trial", duration(row.seconds)))
    return found
