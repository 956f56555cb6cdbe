"""What a run shows, in sentences: plain, with units and numbers of rows.

They say what was measured and never what it might prove: readings of single minibatches are mostly noise, and
whether anything changed interference takes a control run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradprobe.messages import Message, Value
from gradprobe.rows import says_absent
from gradprobe.summary import crowd, estimated, ledger, updates

CAUTION = Message("summary.caution")

_PAIRS_IN_WORDS = 3
_METRICS_IN_WORDS = 16
_NAMES_IN_WORDS = 4


def messages(summary: dict[str, Any]) -> list[Message]:
    """What a run shows, in words, from its :func:`~gradprobe.summary.numbers.summarise`."""
    said = [_what_it_is(summary), *_gaps(summary), *_looked_at(summary)]
    if summary["audit"] is not None:
        return [*said, *_audited(summary["audit"])]
    if not summary["rows"]:
        return [*said, Message("summary.no_row")]
    said += [*_losses_and_weights(summary), *_norms(summary)]
    gradients = _at_features(summary)
    if summary["level"] == "features":
        gradients.append(Message("summary.at_features_only"))
    elif summary["layers"]:
        gradients = [
            *_sketched(summary),
            *_not_derived(summary),
            *_cosines(summary),
            *_first_order(summary),
            *updates.messages(summary["updates"]),
            *gradients,
            *ledger.messages(summary["ledger"]),
        ]
    said += [*gradients, CAUTION] if gradients else []
    said += estimated.messages(summary["probe_loader"])
    if summary["level"] != "features" and not summary["layers"]:
        said.append(Message("summary.not_shared"))
    return [*said, *_metrics(summary), *_overhead(summary)]


def _what_it_is(summary: dict[str, Any]) -> Message:
    steps, names = summary["steps"], list(summary["tasks"])
    rows = Message("summary.rows", n=summary["rows"])
    if steps:
        rows = Message("summary.rows_steps", n=summary["rows"], first=steps["first"], last=steps["last"])
    where = Message("summary.layers", n=summary["layers"], parameters=summary["parameters"])
    if summary["level"] == "features":
        where = Message("summary.features", n=len(summary["features"]))
    if summary["trainer"]:
        where = Message("summary.trained", where=where, trainer=summary["trainer"])
    return Message(
        "summary.what",
        file=summary["file"],
        rows=rows,
        tasks=crowd.counted(names) if crowd.many(names) else Message("summary.tasks", tasks=names),
        where=where,
        state=summary["end"] or Message("summary.unfinished"),
    )


def _audited(audit: dict[str, Any]) -> list[Message]:
    doors = [
        Message("summary.door", door=door["door"], evidence=door["evidence"], how=door["how_to_shut"])
        for door in audit["doors"]
        if door["state"] == "open"
    ]
    return [Message("summary.audit", sentence=audit["sentence"]), *doors]


def _gaps(summary: dict[str, Any]) -> list[Message]:
    missing, said = summary["rows_not_measured"], []
    if missing:
        why = [Message("summary.why", reason=reason, n=count) for reason, count in missing.items()]
        said.append(Message("summary.not_measured", n=sum(missing.values()), rows=summary["rows"], why=why))
    said += _of_layers(summary)
    if summary["rows_dropped"]:
        said.append(Message("summary.dropped", n=summary["rows_dropped"]))
    return said


def _of_layers(summary: dict[str, Any]) -> list[Message]:
    """Layers that do not count, that came later, or that are not in every row."""
    said, lacking = [], summary["lacking"]
    if names := summary["layers_by_graph_only"]:
        said.append(Message("summary.graph_only", n=len(names), names=_first(names)))
    if joined := summary["layers_joined"]:
        since = [Message("summary.from_step", layer=name, step=step) for name, step in joined.items()]
        said.append(Message("summary.joined", n=len(since), names=_first(since)))
    if lacking["rows"]:
        often = sorted(lacking["layers"].items(), key=lambda item: -item[1])
        lacks = [Message("summary.lacks", layer=name, n=rows) for name, rows in often]
        said.append(Message("summary.lacking", n=lacking["rows"], rows=summary["rows"], names=_first(lacks)))
    if count := sum(n for reason, n in summary["rows_not_measured"].items() if says_absent(reason)):
        said.append(Message("summary.absent", n=count))
    return said


def _first(names: Sequence[Value]) -> list[Value]:
    more = [Message("join.more", n=len(names) - _NAMES_IN_WORDS)] if len(names) > _NAMES_IN_WORDS else []
    return [*names[:_NAMES_IN_WORDS], *more]


def _looked_at(summary: dict[str, Any]) -> list[Message]:
    every, rows = summary["looked_at"]["every"], summary["looked_at"]["rows"]
    return [] if every == 1 else [Message("summary.long", every=every, rows=rows)]


def _losses_and_weights(summary: dict[str, Any]) -> list[Message]:
    said = []
    if losses := _changes(summary, "loss"):
        said.append(Message("summary.losses", n=max(1, summary["rows"] // 10), changes=losses))
    if weights := _changes(summary, "weight"):
        said.append(Message("summary.weights", changes=weights))
    return said


def _changes(summary: dict[str, Any], what: str) -> list[Message]:
    if crowd.many(summary["tasks"]):
        ends = {task: (values[what]["first"], values[what]["last"]) for task, values in summary["tasks"].items()}
        return [crowd.moved(ends)] if any(None not in pair for pair in ends.values()) else []
    parts = []
    for task, values in summary["tasks"].items():
        first, last = values[what]["first"], values[what]["last"]
        if first is None or last is None:
            continue
        if first != last or values[what].get("min") != values[what].get("max"):
            parts.append(Message(f"summary.{what}_moved", task=task, first=first, last=last))
        else:
            parts.append(Message(f"summary.{what}_stayed", task=task, first=first))
    return parts


def _norms(summary: dict[str, Any]) -> list[Message]:
    norms = {t: v["grad_norm"]["median"] for t, v in summary["tasks"].items()}
    each = [Message("summary.value", name=task, value=value) for task, value in norms.items() if value is not None]
    return [Message("summary.norms", values=crowd.spread(norms) if crowd.many(norms) else each)] if each else []


def _cosines(summary: dict[str, Any]) -> list[Message]:
    pairs = summary["pairs"]
    known = [name for name, values in pairs.items() if values["cosine"]["median"] is not None]
    unknown = [name for name in pairs if name not in known][:_PAIRS_IN_WORDS]
    said = [Message("summary.no_cosine", tasks=_both(name)) for name in unknown]
    if len(known) > _PAIRS_IN_WORDS:
        said.append(Message("summary.lowest", n=_PAIRS_IN_WORDS, of=len(known)))
        known = sorted(known, key=lambda name: pairs[name]["cosine"]["median"])[:_PAIRS_IN_WORDS]
    return said + [_cosine(name, pairs[name]) for name in known]


def _not_derived(summary: dict[str, Any]) -> list[Message]:
    found = summary["joint_difference"]
    return [Message("summary.exact", step=found["step"], value=found["value"])] if found else []


def _sketched(summary: dict[str, Any]) -> list[Message]:
    kept = summary["sketch"]
    if kept is None:
        return []
    error = kept**-0.5
    return [Message("summary.sketched", kept=kept, error=error, norm=error / 2**0.5)]


def _cosine(name: str, values: dict[str, Any]) -> Message:
    cosine = values["cosine"]
    return Message(
        "summary.cosine",
        tasks=_both(name),
        median=cosine["median"],
        low=cosine["q25"],
        high=cosine["q75"],
        rate=values["stochastic_conflict_rate"],
        rows=cosine["rows"],
    )


def _at_features(summary: dict[str, Any]) -> list[Message]:
    known = sorted(
        (values["cosine"]["median"], feature["feature"], pair, values["cosine"]["rows"])
        for feature in summary["features"]
        for pair, values in feature["pairs"].items()
        if values["cosine"]["median"] is not None
    )
    found = [
        Message("summary.at_feature", median=middle, feature=name, tasks=_both(pair), rows=rows)
        for middle, name, pair, rows in known[:_PAIRS_IN_WORDS]
    ]
    if len(known) > _PAIRS_IN_WORDS:
        return [Message("summary.features_lowest", n=_PAIRS_IN_WORDS, of=len(known), values=found)]
    return [Message("summary.features_all", values=found)] if known else []


def _first_order(summary: dict[str, Any]) -> list[Message]:
    shares = {t: v["dominance"]["median"] for t, v in summary["tasks"].items()}
    each = [Message("summary.share", name=task, value=value) for task, value in shares.items() if value is not None]
    values = crowd.spread(shares, shares=True) if crowd.many(shares) else each
    said = [Message("summary.dominance", values=values)] if each else []
    effects = [
        Message("summary.effect", by=e["by"], task=e["task"], value=e["median"])
        for e in summary["effect"]
        if e["median"] is not None
    ]
    return [*said, Message("summary.effects", values=effects)] if effects and len(summary["tasks"]) <= 3 else said


def _metrics(summary: dict[str, Any]) -> list[Message]:
    each = [
        Message(
            f"summary.metric_{m['best_is']}",
            name=name,
            first=m["first"]["value"],
            last=m["last"]["value"],
            best=m["best"]["value"],
            epoch=m["best"]["epoch"],
        )
        for name, m in summary["metrics"].items()
        if m["first"]
    ]
    more = [Message("summary.more", n=len(each) - _METRICS_IN_WORDS)] if len(each) > _METRICS_IN_WORDS else []
    return [Message("summary.metrics", values=[*each[:_METRICS_IN_WORDS], *more])] if each else []


def _overhead(summary: dict[str, Any]) -> list[Message]:
    cost = summary["overhead"]
    if cost["share"] is None:
        return []
    return [Message("summary.overhead", seconds=cost["seconds"], share=cost["share"])]


def _both(pair: str) -> list[str]:
    return pair.split("|")
