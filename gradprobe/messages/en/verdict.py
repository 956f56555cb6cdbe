"""What a comparison says, in English."""

MESSAGES: dict[str, str] = {
    # ---- verdicts
    "verdict.reduced": "REDUCED",
    "verdict.reduced_uncertain": "REDUCED (size uncertain)",
    "verdict.equivalent": "EQUIVALENT",
    "verdict.not_reduced": "NOT REDUCED",
    "verdict.increased": "INCREASED",
    "verdict.inconclusive": "INCONCLUSIVE",
    "verdict.undefined": "UNDEFINED",
    "verdict.not_applicable": "NOT APPLICABLE",
    "verdict.no_verdict": "NO VERDICT",
    "question.direction": "Direction",
    "question.interference": "Interference",
    "question.dominance": "Dominance",
    "question.outcome": "Outcome",
    "subject.largest share": "largest share",
    "subject.test split": "test split",
    # ---- what effects are differences of
    "quantity.direction": "the opposition of {task} and {other} (minus the noise-corrected cosine)",
    "quantity.interference": "the part of {task}'s own progress that {by} cancels (C)",
    "quantity.dominance": "the largest task's share of the squared weighted gradient",
    "quantity.outcome": "the gap in {metric} to {task} trained alone",
    "quantity.delta_m": "{metric}, the mean relative gap to the tasks trained alone",
    "quantity.untested": "the gap to the tasks trained alone on the test split",
    # ---- the rules
    "rule.1": "{quantity:first} fell by more than the margin of {margin}: {numbers}.",
    "rule.2": "{quantity:first} changed by less than the margin of {margin}, so it was not reduced: {numbers}.",
    "rule.3": "{quantity:first} fell; whether by more than the margin of {margin} is uncertain: {numbers}.",
    "rule.4": "{quantity:first} rose: {numbers}.",
    "rule.5": "{quantity:first} did not fall by as much as the margin of {margin}: {numbers}.",
    "rule.6": "{quantity:first} changed by {numbers}; inconclusive: the interval includes both a meaningful reduction "
    "and no reduction.",
    "rule.held_back": "{quantity:first} changed by {numbers}; inconclusive: the interval alone would say that {alone}, "
    "but not with so many comparisons.",
    "rule.alone_fell": "it fell",
    "rule.alone_rose": "it rose",
    "rule.alone_alike": "it changed by less than the margin of {margin}",
    "rule.alone_not_reduced": "it did not fall by as much as the margin of {margin}",
    "rule.numbers": "{estimate:signed estimate}, {n} seeds)",
    # ---- how large it is in an arm
    "level.none": "{arm}: {quantity} has no interval ({n} of {of} runs give a number).",
    "level.is": "{arm}: {quantity} is {estimate:estimate}, {n} seeds), {said}.",
    "level.even": "where 1 over the number of tasks is even",
    "level.all": "more than all of it: on the shared layers the task is driven backwards",
    "level.matters": "more than the margin",
    "level.there": "above 0; whether by more than the margin is open",
    "level.small": "above 0, and less than the margin",
    "level.below": "below 0",
    "level.helps": "below 0: it helps",
    "level.open": "which cannot be distinguished from 0",
    # ---- the headline
    "headline.no_conclusion": "No conclusion about interference: {why}",
    "headline.no_conclusion_short": "No conclusion about interference.",
    "headline.nothing": "there is nothing to compare.",
    "headline.no_gradient": "No gradient can interfere: {why}",
    "headline.no_gradient_short": "No gradient can interfere.",
    "headline.interference": "{arms:sentences}",
    "headline.arm": "{arm}: interference against {baseline} is {verdicts}.",
    "headline.verdict": "{verdict} ({subject:subject})",
    "headline.counted": "Interference: {counts:and}.",
    "headline.count": "{n}\u00a0×\u00a0{verdict}",
    "headline.who": "{arm} ({subject:subject})",
    "headline.direction.reduced": "Gradients came to point less against each other: {who:and}.",
    "headline.direction.reduced_uncertain": "Gradients came to point less against each other, by how much is "
    "uncertain: {who:and}.",
    "headline.direction.increased": "Gradients came to point more against each other: {who:and}.",
    "headline.direction.equivalent": "The direction of the gradients stayed the same.",
    "headline.direction.undefined": "Nothing can be said about the direction of the gradients: a gate failed.",
    "headline.direction.open": "No change in the direction of the gradients was shown.",
    "headline.outcome.reduced": "Performance came closer to that of single tasks: {who:and}.",
    "headline.outcome.reduced_uncertain": "Performance came closer to that of single tasks, by how much is uncertain: "
    "{who:and}.",
    "headline.outcome.increased": "Performance fell further behind that of single tasks: {who:and}.",
    "headline.outcome.equivalent": "Performance stayed the same.",
    "headline.outcome.undefined": "Nothing can be said about performance: a gate failed.",
    "headline.outcome.open": "No gain in performance was shown.",
    # ---- why there is no verdict
    "reason.gates": "{gates:semicolons}.",
    "reason.single": "{arm} trains {task} alone: no other task can interfere.",
    "reason.not_shared": "in {arm} {tasks:and} share no layer that they share in the baseline: what is not shared has "
    "no angle.",
    "reason.no_noise": "{file} was not measured in micro-batches, and single minibatches show mostly noise; record "
    "with `--micro-batches 4 --probe-loader val`.",
    "reason.no_ledger": "{file} holds no ledger; record with `--ledger` (every task's gradient at every step of a "
    "burst).",
    "reason.no_test": "no file holds metrics of a test split, so there is no answer on the outcome.",
    "reason.no_control": "there is no run of {tasks:and} alone, so what sharing costs is not known; record with "
    "`--trainer single --task {task}`.",
    "reason.untested": "{file} holds no {metric} of the test split.",
    "reason.few_seeds": "from {n:seed|seeds} there is a description and no verdict; at least {least} are needed, and 5 "
    "to 8 give an answer.",
    "reason.no_interval": "a number of it is not known, so there is no interval.",
    # ---- may they be compared
    "term.data": "data",
    "term.initial_weights": "initial weights",
    "term.batches": "batches",
    "term.budget": "budget",
    "difference.values": "{what} ({name} {one} and {other})",
    "difference.end": "budget (one of them did not come to its end)",
    "refusal.no_baseline": "there is no control run: no arm '{arm}' (arms: {there}); name one with `--baseline`.",
    "refusal.nothing": "there is nothing to compare {arm} with.",
    "refusal.no_controls": "There is no run of one task alone (`--trainer single`): no conclusion about what sharing "
    "costs the tasks.",
    "refusal.no_common_seed": "{arm} and {baseline} have no seed in common; `--unpaired` compares them as independent "
    "runs.",
    "refusal.differ": "{other} and {one} (seed {seed}) differ in {what:semicolons}. A difference between them could "
    "come from that. Record them alike (`gradprobe study` does), or take them as independent: `--unpaired`.",
    "refusal.not_shown": "{other} and {one} do not show that they had the same {what}. If runs of one seed did, say "
    "so: `--paired`; else `--unpaired` compares them as independent runs.",
    "refusal.no_seeds": "the files of {arm} do not name their seeds. If the files of both arms belong together in "
    "their order, say so: `--paired`; else: `--unpaired`.",
    "caution.differ": "{arm} and {baseline} differ in {what:semicolons}, and are compared all the same.",
    "caution.seeds": "{arm} and {baseline}: seeds {seeds} are in one of them only, and left out.",
    "caution.also": "{arm} differs from {baseline} also in {what:semicolons}: a difference may come from that.",
    "caution.setting": "{name} {one} and {other}",
    "caution.mixed": "{arm} mixes settings: {name} is {one} in {file} and {other} in {another}.",
    # ---- the plan
    "plan.goes_by": "{name} was planned as {planned}, and this comparison uses {now}.",
    "plan.seeds_missing": "{arm}: seeds {seeds} were planned and are not there.",
    "plan.seeds_more": "{arm}: seeds {seeds} were not planned.",
    "plan.arm_missing": "arm {arm} was planned and is not there.",
    "plan.arm_unplanned": "arm {arm} was not planned.",
    "plan.none": "{file} holds no plan, and others do.",
    "plan.another": "{file} was recorded under another plan: {name} is not the same.",
    "plan.otherwise": "{file}: {name} was planned as {planned}, and was {now}.",
    "plan.unfinished": "{file} did not come to its end.",
    # ---- what misleads
    "misleading.partial": "{file}: {n} recorded steps are partial batches ({size} of {full} samples): their losses are "
    "not comparable with the others.",
    "misleading.scaled": "{file}: the loss of {task} is scaled by batch size: at partial batches it is low for that "
    "alone.",
    "misleading.lower": "{arm}: the training loss of {task} ends {part:.0%} lower than in {baseline}. Training loss is "
    "no evidence of interference, and is no part of any verdict.",
    "misleading.higher": "{arm}: the training loss of {task} ends {part:.0%} higher than in {baseline}. Training loss "
    "is no evidence of interference, and is no part of any verdict.",
    # ---- to be known beside an answer
    "remark.layers": "Over the {n} layers that both arms share; {left_out} of the baseline's are left out.",
    "remark.stream": "From the training stream: a claim rests better on a probe loader (`--probe-loader val`).",
    "remark.direction": "Weights cannot change a cosine at given parameters; what changed came through the trajectory.",
    "remark.dominance": "Which task decides the update does not show whether tasks cancel each other.",
    "remark.outcome": "Of this test split; training loss is no part of it.",
    "remark.shares": "Shares: {arms:semicolons}.",
    "remark.shares_of": "{arm}: {shares}",
    "remark.share": "{task} {share:.2f}",
    "term.baseline": "baseline",
    "remark.residual": "Of {task}'s terms the ledger leaves at most {part:.1%} unexplained.",
    "remark.of_means": "In a run {task}'s own progress cannot be distinguished from 0, so C is a ratio of means over "
    "seeds: what {by} cancels on average, as a part of {task}'s average own progress. The interval is Fieller's.",
    "remark.cancelled": "What {by} cancels of {task}'s loss at a measured step, arm minus baseline, is "
    "{estimate:signed estimate}, in units of that loss). No margin was fixed for it, so it carries no verdict.",
    "remark.alone": "Of the progress that {task}'s own gradients would have made without those of others at the same "
    "states: {arms:semicolons}.",
    "remark.alone_of": "in {arm} {shrunk:.0%} is lost as its steps are shorter, and {cancelled:.0%} to what other "
    "tasks' parts of the updates do",
    "remark.alone_unknown": "Whether other tasks' gradients shorten {task}'s own steps, as they can under Adam, is not "
    "known for all runs; C does not contain it.",
    "remark.shortened": "What {task} loses in {arms:and} is mostly dominance and not cancellation: other tasks' "
    "gradients fill the second moment that {task}'s steps are divided by. C does not contain that.",
    "remark.same_weights": "Both arms have the same weights: no difference can come from weights.",
    "remark.no_clusters": "The interval is over seeds alone: which images of one clip or patient belong together is "
    "not in the files, so it does not cover other images.",
    "remark.clusters": "The interval is over seeds and over the {n} independent clusters of the test split.",
    "remark.skew": "The differences lean to one side. Where they do, a verdict on their mean is false more often than "
    "the 2.5 % of Student's t, in simulations in up to 54 %; read it as one on what most seeds do.",
    "direct.effect": "At the baseline's checkpoints the weights of {arm} change what {by} cancels of {task}'s "
    "first-order progress by {effect:signed}; the effect above is along each arm's own training.",
    "direct.none": "At the baseline's checkpoints {task}'s gradient cannot be distinguished from noise: there is no "
    "direct effect.",
    # ---- how far all of it reaches
    "scope.seeds": "What happens in one seed of ten is absent from {n} seeds in {part:.0%} of studies, and such a lean "
    "of the differences is then not seen: verdicts are on what most seeds do. Where rare seeds make the mean, REDUCED "
    "or INCREASED is false in up to 54 % of simulated studies, and not in 2.5 %.",
    "scope.data": "All runs learned from {n:data set|data sets}, and verdicts hold for that data: other data of the "
    "same kind may differ, by how much seeds cannot show.",
    "scope.data_unknown": "The files do not show how many data sets the runs learned from. If it was one, verdicts "
    "hold for that data: other data of the same kind may differ, by how much seeds cannot show.",
    "scope.test_images": "Other test images are covered, by the intervals of outcomes alone; other training images are "
    "not.",
    # ---- gates
    "gate.run": "{arm}, seed {seed}",
    "gate.of_run": "{run}: {found}",
    "gate.no_self_check": "no self-check is in the file; record it again with this version",
    "gate.self_check": "a task has cosine {copy:+.4f} with its own copy and {negative:+.4f} with its negative",
    "gate.not_twice": "no run was made twice, so that it is not known how far the same training differs from itself; "
    "record the baseline's first seed a second time, into a file such as {file} (`gradprobe study` does)",
    "gate.twice_equal": "{files:and} are the same run made twice, and equal to the bit",
    "gate.twice_unknown": "{files:and} are the same run made twice, and not all of them give a number of what is "
    "judged here",
    "gate.twice_apart": "{files:and} are the same run made twice, and differ by {apart:.2g} in what is judged here; "
    "{limit:.2g} is allowed, half the margin: where it is more, train deterministically",
    "gate.first_equal": "no run was made twice; the losses of the first step are equal to the bit",
    "gate.first_missing": "{runs:and}: no run was made twice, and step 0 was not recorded in both",
    "gate.first_differ": "{runs:and} differ in the losses of their first step, before any update: {one:.9g} and "
    "{other:.9g}",
    "gate.resolved": "of {task}'s squared gradient {square:.3g} the lower bound is {low:.3g}; where that is not above "
    "0, take more or larger probe batches",
    "gate.on_probe_batch": "valued on a fixed probe batch",
    "gate.on_probe_loader": "measured on a probe loader, drawn with replacement",
    "gate.no_samples": "the number of training samples is not known; record with `--micro-batches 4 --probe-loader "
    "val`",
    "gate.no_noise_scale": "the noise scale of {task} is not known; record with `--micro-batches 4 --probe-loader val`",
    "gate.samples": "{n} training samples are {ratio:.1f} times {task}'s noise scale of {scale:.0f}; {limit:.0f} times "
    "are asked for, or its estimates are biased by shuffling",
    "gate.rows": "{n} rows of the ledger count",
    "gate.residual": "of {task}'s loss the terms leave {part:.0%} of their size unexplained, which is more than the "
    "rows' noise",
    "gate.residual_noise": "of {task}'s loss the terms leave {part:.0%} of their size unexplained, which is no more "
    "than the rows' noise",
    "gate.earlier": "momentum from before the burst is {part:.1%} of {task}'s terms",
    "gate.own": "{task}'s own progress is {ratio:.1f} of its standard errors above 0",
    "gate.own_together": "{arm}: over {n} runs together {task}'s own progress is {ratio:.1f} of its standard errors "
    "above 0, in one of them {least:.1f}",
    "gate.own_over_seeds": "{task}'s mean own progress is {ratio:.1f} of its standard errors over {n} seeds above 0; "
    "{limit:.1f} are asked for, or a part of it has no interval",
    # ---- a bare table
    "bare.headline": "Inconclusive: a table of losses and weights says nothing about interference between tasks.",
    "bare.missing": "What is missing:",
    "bare.misleading": "What in the numbers misleads:",
    "bare.no_gradient": "No gradient was measured: without the angle and the length of the tasks' gradients on shared "
    "layers nothing is known of interference. Record with `gradprobe.attach` or `gradprobe record`.",
    "bare.no_control": "There is no control run: the same seed with static weights (`--trainer joint`), and each task "
    "alone (`--trainer single`).",
    "bare.one_run": "There is one run: what another seed gives is not known; at least 3 are needed, 5 to 8 give an "
    "answer.",
    "bare.no_metrics": "There are no metrics on held-out data: a training loss is no evidence of interference, nor of "
    "its absence.",
    "bare.no_ledger": "There is no ledger: what each task's part of the real update did to the other's loss is not "
    "known (`--ledger`).",
    "bare.falling": "A falling training loss ({falls}) is offered as evidence. Losses fall with and without "
    "interference: a run that interferes more may reach a lower one.",
    "bare.fall": "{task} {first:.4g} to {last:.4g}",
    "bare.not_learned": "{task} did not learn: its loss went from {first:.4g} to {last:.4g} ({change:+.0%}). What "
    "another task gained may be what this one lost.",
    "bare.partial": "Step {step} is a partial batch: it holds {n} of {of} samples, and its losses are not comparable "
    "with the others.",
    "bare.multiplied": "The loss of {task} goes with the batch size, as one that is multiplied by it does (YOLOv5's "
    "is): at step {step} it is {loss:.4g} for that alone, and about {corrected:.2f} when corrected (times {times:g}), "
    "compared with {usual:.2f} in full batches near it.",
    "bare.corrected": "The fall of {task} by {raw:.1%} is then one of about {corrected:.0%}, on one batch.",
    "bare.too_long": "The weights sum to {total:.2f} = T^2 with T = {count} tasks; GradNorm's sum to T = {count}. So "
    "they do where they are renormalised to mean 1 and then multiplied by T: gradients are {count} times too long.",
    "bare.unsteady": "The weights sum to {low:.3g} at one step and {high:.3g} at another: the size of the whole update "
    "changes with them.",
    "bare.angle": "Positive weights cannot change the angle between two gradients at given parameters: weights that "
    "moved show no less conflict.",
    # ---- on the terminal
    "compare.refused": "Refused:",
    "compare.not_planned": "Not as planned:",
    "compare.warnings": "Warnings:",
    "compare.known": "Remarks:",
    "compare.scope": "How far the verdicts reach:",
    "compare.remark": "{question}: {remark}",
    "compare.remark_of": "{question}, {arms}: {remark}",
    "compare.why": "Why",
    "compare.levels": "How large it is in each arm",
    "compare.layers": "Layers that changed most (exploratory)",
    "closing.paired": "Over {n} shared layers and {steps}, paired by seed.",
    "closing.unpaired": "Over {n} shared layers and {steps}, as independent runs.",
    "closing.steps": "steps {start} to {stop}",
    "closing.all_steps": "all steps",
    "closing.planned": "Margins, window and pairs were fixed before the runs.",
    "closing.planned_but": "Margins, window and pairs were fixed before the runs, but for what is not as planned.",
    "closing.chosen": "Margins, window and pairs were chosen now, and not before the runs.",
    "closing.reading": "Below 0 is a fall; intervals are of 95 %, over seeds. Training loss is no part of any verdict.",
}
