"""What a run shows, in sentences: plain, with units and numbers of rows.

They say what was measured and never what it might prove: readings of single minibatches are mostly noise, and
whether anything changed interference takes a control run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradprobe.messages import Message, Value
from gradprobe.rows import says_absent
from gradprobe.runfile import Run
from gradprobe.summary import many_tasks
from gradprobe.summary.numbers import summarise

CAUTION = Message("summary.caution")

_PAIRS_IN_WORDS = 3
_METRICS_IN_WORDS = 16
_NAMES_IN_WORDS = 4


def _messages(summary: dict[str, Any]) -> list[Message]:
    """What a run shows, in words, from its :func:`~gradprobe.summary.numbers.summarise`."""
    messages = [_what_it_is(summary), *_gaps(summary), *_looked_at(summary)]
    if summary["audit"] is not None:
        return [*messages, *_audited(summary["audit"])]
    if not summary["rows"]:
        return [*messages, Message("summary.no_row")]
    messages += [*_losses_and_weights(summary), *_norms(summary)]
    gradients = _at_features(summary)
    if summary["level"] == "features":
        gradients.append(Message("summary.at_features_only"))
    elif summary["layers"]:
        gradients = [
            *_sketched(summary),
            *_not_derived(summary),
            *_cosines(summary),
            *_first_order(summary),
            *_updates(summary["updates"]),
            *gradients,
            *_ledger(summary["ledger"]),
        ]
    messages += [*gradients, CAUTION] if gradients else []
    messages += _probe_loader(summary["probe_loader"])
    if summary["level"] != "features" and not summary["layers"]:
        messages.append(Message("summary.not_shared"))
    return [*messages, *_metrics(summary), *_overhead(summary)]


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
        tasks=many_tasks.counted(names) if many_tasks.many(names) else Message("summary.tasks", tasks=names),
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
    missing, messages = summary["rows_not_measured"], []
    if missing:
        messages.append(
            Message("summary.not_measured", n=sum(missing.values()), rows=summary["rows"], why=_reasons(missing))
        )
    messages += _of_layers(summary)
    if summary["rows_dropped"]:
        messages.append(Message("summary.dropped", n=summary["rows_dropped"]))
    return messages


def _reasons(missing: dict[str, int]) -> list[Message]:
    return [Message("summary.why", reason=reason, n=count) for reason, count in missing.items()]


def _of_layers(summary: dict[str, Any]) -> list[Message]:
    """Layers that do not count, that came later, or that are not in every row."""
    messages, lacking = [], summary["lacking"]
    if names := summary["layers_by_graph_only"]:
        messages.append(Message("summary.graph_only", n=len(names), names=_first(names)))
    if joined := summary["layers_joined"]:
        since = [Message("summary.from_step", layer=name, step=step) for name, step in joined.items()]
        messages.append(Message("summary.joined", n=len(since), names=_first(since)))
    if lacking["rows"]:
        often = sorted(lacking["layers"].items(), key=lambda item: -item[1])
        lacks = [Message("summary.lacks", layer=name, n=rows) for name, rows in often]
        messages.append(Message("summary.lacking", n=lacking["rows"], rows=summary["rows"], names=_first(lacks)))
    if count := sum(n for reason, n in summary["rows_not_measured"].items() if says_absent(reason)):
        messages.append(Message("summary.absent", n=count))
    return messages


def _first(names: Sequence[Value]) -> list[Value]:
    more = [Message("join.more", n=len(names) - _NAMES_IN_WORDS)] if len(names) > _NAMES_IN_WORDS else []
    return [*names[:_NAMES_IN_WORDS], *more]


def _looked_at(summary: dict[str, Any]) -> list[Message]:
    every, rows = summary["looked_at"]["every"], summary["looked_at"]["rows"]
    return [] if every == 1 else [Message("summary.long", every=every, rows=rows)]


def _losses_and_weights(summary: dict[str, Any]) -> list[Message]:
    messages = []
    if losses := _changes(summary, "loss"):
        messages.append(Message("summary.losses", n=max(1, summary["rows"] // 10), changes=losses))
    if weights := _changes(summary, "weight"):
        messages.append(Message("summary.weights", changes=weights))
    return messages


def _changes(summary: dict[str, Any], what: str) -> list[Message]:
    if many_tasks.many(summary["tasks"]):
        ends = {task: (values[what]["first"], values[what]["last"]) for task, values in summary["tasks"].items()}
        return [many_tasks.moved(ends)] if any(None not in pair for pair in ends.values()) else []
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
    return (
        [Message("summary.norms", values=many_tasks.spread(norms) if many_tasks.many(norms) else each)] if each else []
    )


def _cosines(summary: dict[str, Any]) -> list[Message]:
    pairs = summary["pairs"]
    known = [name for name, values in pairs.items() if values["cosine"]["median"] is not None]
    unknown = [name for name in pairs if name not in known][:_PAIRS_IN_WORDS]
    messages = [Message("summary.no_cosine", tasks=_both(name)) for name in unknown]
    if len(known) > _PAIRS_IN_WORDS:
        messages.append(Message("summary.lowest", n=_PAIRS_IN_WORDS, of=len(known)))
        known = sorted(known, key=lambda name: pairs[name]["cosine"]["median"])[:_PAIRS_IN_WORDS]
    return messages + [_cosine(name, pairs[name]) for name in known]


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
    known = any(value is not None for value in shares.values())
    messages = [Message("summary.dominance", values=_shares(shares))] if known else []
    effects = _effects(summary["effect"])
    return (
        [*messages, Message("summary.effects", values=effects)] if effects and len(summary["tasks"]) <= 3 else messages
    )


def _effects(found: list[dict[str, Any]]) -> list[Message]:
    return [
        Message("summary.effect", by=e["by"], task=e["task"], value=e["median"])
        for e in found
        if e["median"] is not None
    ]


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


def sentences(run: Run, summary: dict[str, Any] | None = None) -> list[str]:
    """What the run shows, in words: plain, with units and numbers of rows, and cautious.

    Args:
        run: Any run; unfinished and empty ones too.
        summary: Its :func:`summarise`, where that is at hand already.
    """
    return list(map(str, _messages(summarise(run) if summary is None else summary)))


def _updates(found: dict[str, Any] | None) -> list[Message]:
    if found is None:
        return []
    messages = [*_taken_apart(found), *_compared(found)]
    clip, batches = found["clipping"], found["batchnorm"]["batches_per_step"]
    if clip["clipped"]:
        parts, least = _shares(clip["share"]), clip["scale"]["min"]
        messages.append(Message("summary.clipped", n=clip["clipped"], rows=clip["rows"], least=least, parts=parts))
    if found["skipped_steps"]:
        messages.append(Message("summary.skipped", n=found["skipped_steps"]))
    if batches is not None and batches > 1:
        messages.append(Message("summary.batchnorm", batches=batches))
    return messages


def _shares(values: dict[str, float | None]) -> Value:
    """Of each task, or in few words of many."""
    if many_tasks.many(values):
        return many_tasks.spread(values, shares=True)
    return [Message("summary.share", name=name, value=value) for name, value in values.items() if value is not None]


def _taken_apart(found: dict[str, Any]) -> list[Message]:
    missing = found["not_taken_apart"]
    if not missing:
        return []
    return [Message("summary.update_unknown", n=sum(missing.values()), rows=found["rows"], why=_reasons(missing))]


def _compared(found: dict[str, Any]) -> list[Message]:
    shares = {name: value for name, value in found["share"].items() if value is not None}
    if not shares:
        return []
    few = not many_tasks.many(found["gradient_share"])
    update = _shares(shares) if few else many_tasks.spread(shares, shares=True)
    messages = [Message("summary.update_shares", update=update, gradient=_shares(found["gradient_share"]))]
    pairs = {pair: value for pair, value in found["cosine"].items() if value is not None}
    if pairs and len(pairs) <= 3:
        cosines = [Message("summary.cosine_of", tasks=pair.split("|"), value=value) for pair, value in pairs.items()]
        messages.append(Message("summary.update_cosines", values=cosines))
    effects = _effects(found["effect"])
    if effects and len(shares) <= 5:
        messages.append(Message("summary.update_effects", values=effects))
    return messages


def _ledger(found: dict[str, Any] | None) -> list[Message]:
    """In words; empty where there is no ledger."""
    if found is None:
        return []
    messages = [Message("summary.ledger", n=found["counted"], rows=found["rows"])]
    for pair in found["cancelled"]:
        if (c := pair["c"]) is not None:
            key = "summary.cancelled" if c > 0 else "summary.added"
            messages.append(Message(key, by=pair["by"], task=pair["task"], part=abs(c), c=c))
    for task, about in found["tasks"].items():
        if about["shrunk"] is not None:
            cancelled = about["lost"] - about["shrunk"]
            messages.append(Message("summary.alone", task=task, shrunk=about["shrunk"], cancelled=cancelled))
        if about["dominated"]:
            messages.append(Message("summary.dominated", task=task))
        shut = [gate["sentence"] for gate in about["gates"] if not gate["passed"]]
        if shut:
            messages.append(Message("summary.ledger_shut", task=task, gates=shut))
    return messages


def _probe_loader(found: dict[str, Any] | None) -> list[Message]:
    if found is None:
        return []
    cosines = [_probe_cosine(pair.split("|"), value) for pair, value in found["pairs"].items()]
    scales = [
        Message("summary.unknown", name=task)
        if value["noise_scale"] is None
        else Message("summary.value", name=task, value=value["noise_scale"])
        for task, value in found["tasks"].items()
    ]
    first = Message("summary.probe", rows=found["rows"], cosines=cosines, scales=scales)
    if split := found["split"]:
        first = Message("summary.probe_split", split=split, rows=found["rows"], cosines=cosines, scales=scales)
    missing = found["not_measured"]
    if not missing:
        return [first]
    return [first, Message("summary.probe_missing", n=sum(missing.values()), why=_reasons(missing))]


def _probe_cosine(tasks: list[str], pair: dict[str, Any]) -> Message:
    if pair["cosine"] is None or pair["low"] is None:
        return Message("summary.probe_hidden", tasks=tasks)
    return Message("summary.probe_cosine", tasks=tasks, cosine=pair["cosine"], low=pair["low"], high=pair["high"])
