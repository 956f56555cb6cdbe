"""What one run shows, in English."""

MESSAGES: dict[str, str] = {
    "summary.what": "{file}: {rows}, {tasks}, {where}; {state}.",
    "summary.rows": "{n} rows",
    "summary.rows_steps": "{n} rows (steps {first} to {last})",
    "summary.tasks": "tasks {tasks:and}",
    "summary.many_tasks": "{n} tasks ({tasks}, ...)",
    "summary.layers": "{n:shared layer|shared layers} with {parameters:,} parameters",
    "summary.features": "{n:feature|features}",
    "summary.trained": "{where}, trainer {trainer}",
    "summary.unfinished": "unfinished (still being written, or left by a killed process)",
    "summary.audit": "An audit, not a recording: {sentence}",
    "summary.door": "{door}: {evidence}. To shut it: {how}.",
    "summary.no_row": "No row was recorded, so there is nothing to say about gradients.",
    "summary.at_features_only": "Gradients on parameters were not measured (level='features').",
    "summary.not_shared": "The tasks share no layer, so no cosine between their gradients is defined: interference is "
    "not applicable, which is not the same as 0.",
    "summary.caution": "These are single minibatches: mostly noise. They do not show whether interference is there, or "
    "whether anything reduced it: that takes a control run.",
    # ---- rows and layers
    "summary.not_measured": "{n} of {rows} rows hold less than a full measurement: {why:semicolons}.",
    "summary.why": "{reason} ({n})",
    "summary.dropped": "{n} rows were dropped; `gradprobe check` says why that may be.",
    "summary.graph_only": "{n:layer|layers} left out of all sums: the graph leads two tasks there, but fewer than two "
    "ever had a gradient other than 0 ({names}).",
    "summary.joined": "{n:layer|layers} joined the shared ones after the start ({names}).",
    "summary.from_step": "{layer} from step {step}",
    "summary.lacking": "{n:row|rows} of {rows} lack layers, and are measured over those that they have; lacking most "
    "often: {names}.",
    "summary.lacks": "{layer} in {n}",
    "summary.absent": "{n:row|rows} with absent tasks, which are in no median and no sum there.",
    "summary.long": "It is long: the statements on gradients use one row in {every} ({rows:,} rows); losses, "
    "weights and counts are from all.",
    # ---- losses, weights, norms
    "summary.losses": "Training losses ({n:row|rows} at each end, medians): {changes:semicolons}.",
    "summary.loss_moved": "loss of {task} went from {first:.4g} to {last:.4g}",
    "summary.loss_stayed": "loss of {task} stayed at {first:.4g}",
    "summary.weights": "Weights: {changes:semicolons}. A cosine between two tasks' gradients does not depend on the "
    "weights; dominance does.",
    "summary.weight_moved": "weight of {task} went from {first:.4g} to {last:.4g}",
    "summary.weight_stayed": "weight of {task} stayed at {first:.4g}",
    "summary.norms": "Gradient norm over its shared layers, median, in loss per unit of parameter: {values}.",
    "summary.value": "{name} {value:.3g}",
    "summary.share": "{name} {value:.0%}",
    "summary.unknown": "{name} unknown",
    # ---- gradients
    "summary.no_cosine": "{tasks:and}: no cosine was measured.",
    "summary.lowest": "The {n} of {of} pairs with the lowest median cosine (all: `summary --json`):",
    "summary.cosine": "{tasks:and}: cosine over all shared layers has median {median:+.2f} (middle half {low:+.2f} to "
    "{high:+.2f}); {rate:.0%} of the {rows:measured step|measured steps} had it below 0 (the stochastic conflict "
    "rate).",
    "summary.cosine_of": "{tasks:and} {value:+.2f}",
    "summary.exact": "From step {step:.0f} on every task has had a pass of its own, and rows are exact: a gradient "
    "taken from the joint one differed by {value:.1e} of the norms, by rounding within layers.",
    "summary.sketched": "Gradients were sketched to {kept:,} numbers per layer and task: on larger layers a cosine "
    "near 0 is right to about {error:.1g} a row (standard deviation), without bias, and a norm to {norm:.1%}.",
    "summary.features_all": "Where the tasks part, median cosines of their gradients at the features: "
    "{values:semicolons}. They bound what the parameters' gradients can be, and do not measure it.",
    "summary.features_lowest": "Where the tasks part, the lowest {n} of {of} median cosines of their gradients at the "
    "features: {values:semicolons}. They bound what the parameters' gradients can be, and do not measure it.",
    "summary.at_feature": "{median:+.2f} at {feature} for {tasks:and} ({rows:step|steps})",
    "summary.dominance": "Dominance (share of the squared weighted gradient, median): {values}.",
    "summary.effects": "Effect of one task's part of the step on another's own progress (+ adds, - cancels; first "
    "order, on the same minibatch, median): {values:semicolons}.",
    "summary.effect": "{by} on {task} {value:+.2f}",
    # ---- updates
    "summary.update_unknown": "{n} of {rows} updates were not split by task: {why:semicolons}.",
    "summary.update_shares": "Share of the update (after momentum and preconditioning, median): {update}; of the "
    "gradient: {gradient}.",
    "summary.update_cosines": "Cosine between the tasks' parts of the update, median: {values:semicolons}.",
    "summary.update_effects": "Effect of one task's part of the update on another's own progress (first order, "
    "median): {values:semicolons}.",
    "summary.clipped": "The gradient was scaled down before {n} of {rows} updates, to {least:.2g} at the least; parts "
    "in its squared norm, median: {parts}.",
    "summary.skipped": "{n} steps changed nothing.",
    "summary.batchnorm": "BatchNorm averaged {batches:.3g} batches per step: each step has more than one forward, so "
    "running statistics are a mix of their data.",
    # ---- the ledger
    "summary.ledger": "Loss ledger: {n} of {rows} rows count.",
    "summary.cancelled": "{by}'s part of the updates cancelled {part:.0%} of {task}'s own progress (C = {c:+.2f}), of "
    "this run alone.",
    "summary.added": "{by}'s part of the updates added {part:.0%} of {task}'s own progress (C = {c:+.2f}), of this run "
    "alone.",
    "summary.alone": "Of the progress that {task}'s own gradients would have made without those of others at the same "
    "states, {shrunk:.0%} is lost as its steps are shorter, and {cancelled:.0%} to what other tasks' parts of the "
    "updates do.",
    "summary.dominated": "What {task} loses is mostly dominance and not cancellation: other tasks' gradients fill the "
    "second moment that {task}'s steps are divided by. C does not contain that.",
    "summary.ledger_shut": "What others did to {task} is not known: {gates:semicolons}.",
    # ---- the probe loader
    "summary.probe": "On independent samples ({rows} rows of the probe loader), less their noise, over all steps: "
    "cosine of {cosines:semicolons}. Batch at which noise and gradient are equally long, in samples: {scales}.",
    "summary.probe_split": "On independent samples ({split}, {rows} rows of the probe loader), less their noise, over "
    "all steps: cosine of {cosines:semicolons}. Batch at which noise and gradient are equally long, in samples: "
    "{scales}.",
    "summary.probe_cosine": "{tasks:and} {cosine:+.2f} (95 % interval of this run {low:+.2f} to {high:+.2f})",
    "summary.probe_hidden": "{tasks:and} cannot be distinguished from noise",
    "summary.probe_missing": "{n} of these rows hold less than a measurement: {why:semicolons}.",
    # ---- metrics and cost
    "summary.metrics": "Metrics from the first to the last epoch (counted from 0): {values:semicolons}.",
    "summary.metric_highest": "{name} {first:.3g} to {last:.3g} (highest {best:.3g} in epoch {epoch})",
    "summary.metric_lowest": "{name} {first:.3g} to {last:.3g} (lowest {best:.3g} in epoch {epoch})",
    "summary.more": "{n} more (all: `summary --json`)",
    "summary.overhead": "Measuring took {seconds:.3g} s, {share:.0%} of the recorded time.",
    # ---- many tasks
    "crowd.spread": "median {median:.3g}, from {low:.3g} ({lowest}) to {high:.3g} ({highest})",
    "crowd.spread_share": "median {median:.0%}, from {low:.0%} ({lowest}) to {high:.0%} ({highest})",
    "crowd.moved": "{parts}",
    "crowd.stayed": "stayed for all {n} tasks",
    "crowd.fell": "fell for {n} of {of} tasks",
    "crowd.rose": "rose for {n} ({names})",
    "crowd.same": "stayed for {n}",
}
