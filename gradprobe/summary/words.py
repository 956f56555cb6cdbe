"""What a run shows, in sentences: plain, with units and numbers of rows.

They say what was measured and never what it might prove: readings of single minibatches are mostly noise, and
whether anything changed interference takes a control run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradprobe.rows import says_absent
from gradprobe.summary import crowd, estimated, ledger, updates

CAUTION = (
    "These are single minibatches: mostly noise. They do not show whether interference is there, or whether "
    "anything reduced it: that takes a control run."
)

PAIRS_IN_WORDS = 3
METRICS_IN_WORDS = 16
NAMES_IN_WORDS = 4


def sentences(summary: dict[str, Any]) -> list[str]:
    """What a run shows, in words, from its :func:`~gradprobe.summary.numbers.summarise`."""
    said = [_what_it_is(summary), *_gaps(summary), *_looked_at(summary)]
    if summary["audit"] is not None:
        return [*said, *_audited(summary["audit"])]
    if not summary["rows"]:
        return [*said, "No row was recorded, so there is nothing to say about gradients."]
    said += [*_losses_and_weights(summary), *_norms(summary)]
    gradients = _at_features(summary)
    if summary["level"] == "features":
        gradients.append("Gradients on parameters were not measured (level='features').")
    elif summary["layers"]:
        gradients = [
            *_sketched(summary),
            *_not_derived(summary),
            *_cosines(summary),
            *_first_order(summary),
            *updates.sentences(summary["updates"]),
            *gradients,
            *ledger.sentences(summary["ledger"]),
        ]
    said += [*gradients, CAUTION] if gradients else []
    said += estimated.sentences(summary["probe_loader"])
    if summary["level"] != "features" and not summary["layers"]:
        said.append(
            "The tasks share no layer, so no cosine between their gradients is defined: interference is not "
            "applicable, which is not the same as 0."
        )
    return [*said, *_metric_words(summary), *_overhead_words(summary)]


def _what_it_is(summary: dict[str, Any]) -> str:
    state = summary["end"] or "unfinished (still being written, or left by a killed process)"
    rows = f"{summary['rows']} rows"
    if summary["steps"]:
        rows += f" (steps {summary['steps']['first']} to {summary['steps']['last']})"
    trainer = f", trainer {summary['trainer']}" if summary["trainer"] else ""
    where = f"{_count(summary['layers'], 'shared layer')} with {summary['parameters']:,} parameters"
    if summary["level"] == "features":
        where = _count(len(summary["features"]), "feature")
    names = list(summary["tasks"])
    tasks = crowd.counted(names) if crowd.many(names) else f"tasks {_and(names)}"
    return f"{summary['file']}: {rows}, {tasks}, {where}{trainer}; {state}."


def _audited(audit: dict[str, Any]) -> list[str]:
    said = [f"An audit, not a recording: {audit['sentence']}"]
    for door in audit["doors"]:
        if door["state"] == "open":
            said.append(f"{door['door']}: {door['evidence']}. To shut it: {door['how_to_shut']}.")
    return said


def _gaps(summary: dict[str, Any]) -> list[str]:
    missing, said = summary["rows_not_measured"], []
    if missing:
        why = "; ".join(f"{reason} ({count})" for reason, count in missing.items())
        said.append(f"{sum(missing.values())} of {summary['rows']} rows hold less than a full measurement: {why}.")
    said += _of_layers(summary)
    if summary["rows_dropped"]:
        said.append(f"{summary['rows_dropped']} rows were dropped; gradprobe check says why that may be.")
    return said


def _of_layers(summary: dict[str, Any]) -> list[str]:
    """Layers that do not count, that came later, or that are not in every row."""
    said, lacking = [], summary["lacking"]
    if names := summary["layers_by_graph_only"]:
        said.append(
            f"{_count(len(names), 'layer')} left out of all sums: the graph leads two tasks there, but fewer than two "
            f"ever had a gradient other than 0 ({_first(names)})."
        )
    if joined := summary["layers_joined"]:
        names = [f"{name} from step {step}" for name, step in joined.items()]
        said.append(f"{_count(len(names), 'layer')} joined the shared ones after the start ({_first(names)}).")
    if lacking["rows"]:
        often = sorted(lacking["layers"].items(), key=lambda item: -item[1])
        names = [f"{name} in {rows}" for name, rows in often]
        said.append(
            f"{_count(lacking['rows'], 'row')} of {summary['rows']} lack layers, and are measured over those that they "
            f"have; lacking most often: {_first(names)}."
        )
    if count := sum(n for reason, n in summary["rows_not_measured"].items() if says_absent(reason)):
        said.append(f"{_count(count, 'row')} with absent tasks, which are in no median and no sum there.")
    return said


def _first(names: list[str]) -> str:
    more = f", and {len(names) - NAMES_IN_WORDS} more" if len(names) > NAMES_IN_WORDS else ""
    return f"{', '.join(names[:NAMES_IN_WORDS])}{more}"


def _looked_at(summary: dict[str, Any]) -> list[str]:
    every, rows = summary["looked_at"]["every"], summary["looked_at"]["rows"]
    if every == 1:
        return []
    return [
        f"It is long: what is said of gradients below is from one row in {every} ({rows:,} rows); losses, weights and "
        "counts are from all."
    ]


def _losses_and_weights(summary: dict[str, Any]) -> list[str]:
    tenth = max(1, summary["rows"] // 10)
    losses = _changes(summary, "loss")
    said = []
    if losses:
        said.append(f"Training losses ({_count(tenth, 'row')} at each end, medians): {losses}.")
    weights = _changes(summary, "weight")
    if weights:
        said.append(
            f"Weights: {weights}. A cosine between two tasks' gradients does not depend on the weights; dominance does."
        )
    return said


def _changes(summary: dict[str, Any], what: str) -> str:
    parts = []
    if crowd.many(summary["tasks"]):
        ends = {task: (values[what]["first"], values[what]["last"]) for task, values in summary["tasks"].items()}
        return crowd.moved(ends) if any(None not in pair for pair in ends.values()) else ""
    for task, values in summary["tasks"].items():
        first, last = values[what]["first"], values[what]["last"]
        if first is None or last is None:
            continue
        moved = first != last or values[what].get("min") != values[what].get("max")
        parts.append(
            f"{what} of {task} went from {first:.4g} to {last:.4g}"
            if moved
            else f"{what} of {task} stayed at {first:.4g}"
        )
    return "; ".join(parts)


def _norms(summary: dict[str, Any]) -> list[str]:
    known = {t: v["grad_norm"]["median"] for t, v in summary["tasks"].items()}
    text = ", ".join(f"{task} {value:.3g}" for task, value in known.items() if value is not None)
    text = crowd.spread(known) if crowd.many(known) else text
    return [f"Gradient norm over its shared layers, median, in loss per unit of parameter: {text}."] if text else []


def _cosines(summary: dict[str, Any]) -> list[str]:
    pairs = summary["pairs"]
    known = [name for name, values in pairs.items() if values["cosine"]["median"] is not None]
    said = [f"{_both(name)}: no cosine was measured." for name in pairs if name not in known][:PAIRS_IN_WORDS]
    if len(known) > PAIRS_IN_WORDS:
        said.append(f"The {PAIRS_IN_WORDS} of {len(known)} pairs with the lowest median cosine (all: summary --json):")
        known = sorted(known, key=lambda name: pairs[name]["cosine"]["median"])[:PAIRS_IN_WORDS]
    return said + [_cosine(name, pairs[name]) for name in known]


def _not_derived(summary: dict[str, Any]) -> list[str]:
    found = summary["joint_difference"]
    if not found:
        return []
    return [
        f"From step {found['step']:.0f} on every task has had a pass of its own, and rows are exact: a gradient "
        f"taken from the joint one differed by {found['value']:.1e} of the norms, by rounding within layers."
    ]


def _sketched(summary: dict[str, Any]) -> list[str]:
    kept = summary["sketch"]
    if kept is None:
        return []
    error = kept**-0.5
    return [
        f"Gradients were sketched to {kept:,} numbers per layer and task: on larger layers a cosine near 0 is right to "
        f"about {error:.1g} a row (standard deviation), without bias, and a norm to {error / 2**0.5:.1%}."
    ]


def _cosine(name: str, values: dict[str, Any]) -> str:
    cosine = values["cosine"]
    return (
        f"{_both(name)}: cosine over all shared layers has median {cosine['median']:+.2f} (middle half "
        f"{cosine['q25']:+.2f} to {cosine['q75']:+.2f}); {_percent(values['stochastic_conflict_rate'])} of the "
        f"{_count(cosine['rows'], 'measured step')} had it below 0 (the stochastic conflict rate)."
    )


def _at_features(summary: dict[str, Any]) -> list[str]:
    known = [
        (values["cosine"]["median"], feature["feature"], pair, values["cosine"]["rows"])
        for feature in summary["features"]
        for pair, values in feature["pairs"].items()
        if values["cosine"]["median"] is not None
    ]
    if not known:
        return []
    text = "; ".join(
        f"{middle:+.2f} at {name} for {_both(pair)} ({_count(rows, 'step')})"
        for middle, name, pair, rows in sorted(known)[:PAIRS_IN_WORDS]
    )
    lowest = f"the lowest {PAIRS_IN_WORDS} of {len(known)} " if len(known) > PAIRS_IN_WORDS else ""
    return [
        f"Where the tasks part, {lowest}median cosines of their gradients at the features: {text}. They bound what the "
        "parameters' gradients can be, and do not measure it."
    ]


def _first_order(summary: dict[str, Any]) -> list[str]:
    shares = {t: v["dominance"]["median"] for t, v in summary["tasks"].items()}
    text = ", ".join(f"{task} {_percent(value)}" for task, value in shares.items() if value is not None)
    text = crowd.spread(shares, _percent) if crowd.many(shares) else text
    said = [f"Dominance (share of the squared weighted gradient, median): {text}."] if text else []
    effects = [e for e in summary["interference"] if e["median"] is not None]
    if effects and len(summary["tasks"]) <= 3:
        text = "; ".join(f"{e['by']} on {e['task']} {e['median']:+.2f}" for e in effects)
        said.append(
            f"Effect of one task's part of the step on another's own progress (+ adds, - cancels; first order, "
            f"on the same minibatch, median): {text}."
        )
    return said


def _metric_words(summary: dict[str, Any]) -> list[str]:
    parts = [
        f"{name} {m['first']['value']:.3g} to {m['last']['value']:.3g} ({m['best_is']} {m['best']['value']:.3g} "
        f"in epoch {m['best']['epoch']})"
        for name, m in summary["metrics"].items()
        if m["first"]
    ]
    more = [f"{len(parts) - METRICS_IN_WORDS} more (all: summary --json)"] if len(parts) > METRICS_IN_WORDS else []
    text = "; ".join([*parts[:METRICS_IN_WORDS], *more])
    return [f"Metrics from the first to the last epoch (counted from 0): {text}."] if parts else []


def _overhead_words(summary: dict[str, Any]) -> list[str]:
    cost = summary["overhead"]
    if cost["share"] is None:
        return []
    return [f"Measuring took {cost['seconds']:.3g} s, {_percent(cost['share'])} of the recorded time."]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _both(pair: str) -> str:
    return pair.replace("|", " and ")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _and(names: Iterable[str]) -> str:
    *rest, last = list(names) or [""]
    return f"{', '.join(rest)} and {last}" if rest else last
