"""Small studies for the report: run files, and comparisons decided by the rules from made-up differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from run_factory import make_run

from gradprobe.ledger.windows import Gate
from gradprobe.messages import Message
from gradprobe.report.study_data import ArmFiles
from gradprobe.statistics import paired
from gradprobe.verdict import decision
from gradprobe.verdict.answers import (
    BY_RULE,
    DIRECTION,
    DOMINANCE,
    INTERFERENCE,
    NOT_APPLICABLE,
    OUTCOME,
    UNDEFINED,
    Answer,
    ArmFacts,
    ArmLevel,
    Comparison,
    LayerAnswer,
    Similarity,
)
from gradprobe.verdict.decision import decide

HOSTILE = (
    "<img src=x onerror=boom()>",
    "</script><script>boom()</script>",
    "'\"><svg onload=boom()>",
    "<a href='http://evil.example'>det</a>",
    "&lt;b&gt; {x} %{y} @ink \u202e",
    "{{ 7*7 }}{% raw %}",
)


def make_study(
    folder: Path, arms: Sequence[str] = ("joint", "gradnorm", "single"), seeds: int = 3, **options: Any
) -> list[ArmFiles]:
    """A file per arm and seed."""
    found = []
    for a, arm in enumerate(arms):
        paths = []
        for seed in range(seeds):
            provenance = {"trainer": arm, "settings": {"seed": seed, "lr": 0.01}, "data": {"fingerprint": "f" * 64}}
            path = folder / f"{a}-{seed}.h5"
            paths.append(make_run(path, seed=100 * a + seed, provenance=provenance, **options))
        found.append(ArmFiles(arm, paths, list(range(seeds))))
    return found


def answer(
    question: str, arm: str, subject: str, differences: Sequence[float], margin: float = 0.1, base: float = 0.4
) -> Answer:
    """An answer as the rules give it for these differences over seeds; of an outcome, metrics fall by them."""
    d = np.array(differences)
    contrast = paired(d[None])
    decision = decide(contrast, margin)
    rule = int(decision.rule[0])
    names = ("low95", "high95", "low90", "high90", "p_material", "p_zero", "p_increased")
    names += ("p_equivalent", "p_not_reduced", "p_equivalent_holm", "p_not_reduced_holm")
    names += ("p_material_holm", "p_zero_holm", "p_increased_holm")
    numbers = {name: float(getattr(decision, name)[0]) for name in names}
    values = base + (-d if question == OUTCOME else d)
    return Answer(
        question,
        arm,
        subject,
        Message("quantity.dominance"),
        BY_RULE[rule],
        rule,
        effect=float(contrast.effect[0]),
        margin=margin,
        n=len(d),
        seeds=range(len(d)),
        baseline_values=[base] * len(d),
        arm_values=[float(v) for v in values],
        gates=[Gate("residual", True, 0.04, 0.1, Message("gate.residual", task="det", part=0.04))],
        reason=Message("reason.no_interval"),
        **numbers,
    )


def make_comparison(arms: Sequence[ArmFiles], baseline: str = "joint", **changes: Any) -> Comparison:
    """Every verdict that a chart has to show, on the arms that are not the baseline."""
    others = [arm.name for arm in arms if arm.name not in (baseline, "single")] or ["gradnorm"]
    spread = np.array([-0.02, 0.01, 0.0, 0.02, -0.01])
    answers = []
    for arm in others:
        answers += [
            answer(DIRECTION, arm, "det|cls", 0.5 * spread),
            answer(INTERFERENCE, arm, "cls>det", spread - 0.4),
            answer(INTERFERENCE, arm, "det>cls", spread + 0.3),
            answer(DOMINANCE, arm, "largest share", 3 * spread - 0.1),
            answer(OUTCOME, arm, "mAP50", 2 * spread, margin=0.02, base=0.7),
        ]
    quantity = Message("quantity.interference", task="det", by="cls")
    failed = Gate("residual", False, 0.31, 0.1, Message("gate.residual", task="a", part=0.31))
    answers += [
        Answer(INTERFERENCE, "dual", "cls>det", quantity, NOT_APPLICABLE,
               reason=Message("reason.single", arm="dual", task="det")),
        Answer(INTERFERENCE, others[0], "a>b", quantity, UNDEFINED, effect=-0.1, low95=-0.5, high95=0.3, low90=-0.4,
               high90=0.2, margin=0.1, n=3, gates=[failed], reason=Message("reason.gates", gates=[failed.sentence])),
    ]  # fmt: skip
    levels = [
        ArmLevel(INTERFERENCE, arm.name, "cls>det", quantity, 0.4, 0.3, 0.5, [0.4 + d for d in spread], range(5))
        for arm in arms
    ]
    levels = [replace(level, sentence=decision.level_sentence(level, 0.1)) for level in levels]
    known = {
        "similarities": [Similarity(arm.name, "det|cls", 0.6, 0.5, 0.7, [0.6] * 3, range(3)) for arm in arms],
        "levels": levels,
        "headline": decision.headline(answers, levels, [], baseline),
        "baseline": baseline if any(arm.name == baseline for arm in arms) else "",
        "controls": [arm.name for arm in arms if arm.name == "single"],
        "arms": [ArmFacts(arm.name, "arm", [p.name for p in arm.files], [int(s) for s in arm.seeds]) for arm in arms],
        "tasks": ["det", "cls"],
        "answers": answers,
        "warnings": [Message("misleading.scaled", file="0-0.h5", task="det")],
        "layers": [LayerAnswer(DIRECTION, others[0], "det|cls", "model.0.conv", -0.2, -0.3, -0.1, 0.003, True)],
    }
    return Comparison(**(known | changes))
