"""What one run suggests to try next, in English."""

MESSAGES: dict[str, str] = {
    "advice.title": "Cosines, the worst layers first (interval within this run)",
    "advice.title_of": "Cosines of {pair}, the worst layers first (interval within this run)",
    "column.parameters": "Parameters",
    "column.cosine": "Cosine",
    "column.score": "Score",
    "column.conflict": "Conflict",
    "advice.nothing": "Nothing to do: no pair of tasks and no layer is in conflict beyond noise and chance, and no "
    "task dominates.",
    "advice.direction": "Direction: {tasks:and} point against each other (cosine {cosine:+.2f}, {low:+.2f} to "
    "{high:+.2f}). No weights change that; surgery or doubled layers may.",
    "advice.dominance": "Dominance: {task} makes {share:.0%} of the squared weighted gradient. Weights "
    "(`--task-weights`, `gradnorm`) change that.",
    "advice.layers": "{n} of {of} layers are in conflict (false discovery rate 10 %, exploratory). To double them: "
    "`gradprobe record --trainer split --from {file} --top-k {n}`",
    "advice.layers_doubled": "{n} of {of} layers are in conflict (false discovery rate 10 %, exploratory). {doubled} "
    "others are doubled already; `split` needs a run of an undivided model.",
    "advice.no_weights": "In most rows no positive weights give all tasks the same relative progress.",
    "advice.weights": "Weights with the same relative progress for all, to first order: `--task-weights {given}` "
    "(middle half: {spread:semicolons}).",
    "advice.spread": "{task} {low:.3g} to {high:.3g}",
    "advice.dual": "A dual backbone would take {n:,} parameters more{share}.",
    "advice.rest": "To double what is still shared would take {n:,} parameters more{share}.",
    "advice.share": ", {part:.0%} of the model's {whole:,}",
    "advice.caution": "Within one run, from single minibatches: samples that tasks share bias a cosine. Whether a "
    "remedy helps takes the same seeds with and without it.",
    # ---- what other methods would have done
    "replay.title": "Replay (medians over rows)",
    "replay.method": "Method",
    "replay.weight": "Weight",
    "replay.progress": "Progress",
    "replay.change": "Change to joint",
    "replay.harmed": "Harmed",
    "replay.length": "Step length",
    "replay.reading": "At the recorded parameters, to first order, on the same minibatch. Progress 1: as if the other "
    "tasks were absent. What a training with these weights would become takes a run.",
    "replay.gradnorm": "gradnorm saw the {n} measured rows alone, of {steps} steps: live it moves at every step. "
    "Record with `--every 1` for its own weights.",
}
