"""All trainers on the phantom, several seeds each, with their cost per step: the table of docs/interventions.md.

    OMP_WAIT_POLICY=passive python benchmarks/interventions.py --out runs/interventions [--seeds 3] [--write]

Every arm is a `gradprobe record` of its own, in a file of its own. Stopped, it goes on where it was: finished runs are
kept, an interrupted one is resumed. Costs are ratios to a joint step, taken in turn in one process. Further words go to
`gradprobe record`: `-- --epochs 2 --imgsz 64`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.runfile import Run
from gradprobe.trainers.registry import TRAINERS

DOCS = Path(__file__).parents[1] / "docs" / "interventions.md"
BEGIN, END = "<!-- table of benchmarks/interventions.py -->", "<!-- end of table -->"
METRICS = {"mAP50-95": "det", "accuracy": "cls"}  # and whose they are
HEAD = ("trainer", "step / joint step", "parameters", "operations / image", "mAP50-95", "accuracy", "cosine")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    trainer: str
    flags: tuple[str, ...] = ()
    after: str = ""  # the arm of the same seed that --from reads


def arms() -> list[Arm]:
    special = {
        "single": [Arm(f"single {task}", "single", ("--task", task)) for task in ("det", "cls")],
        "dual": [Arm("dual", "dual"), Arm("dual, shared to model.4", "dual", ("--share-until", "model.4"))],
        "gradnorm-static": [Arm("gradnorm-static", "gradnorm-static", after="gradnorm")],
        "split": [Arm("split, 5 layers", "split", ("--top-k", "5"), after="joint")],
    }
    return [arm for name in TRAINERS for arm in special.get(name, [Arm(name, name)])]


def path_of(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{seed}.h5"


def finished(path: Path) -> bool:
    try:
        with Run(path) as run:
            return run.end == "finished"
    except RunFileError:
        return False


def record(folder: Path, arm: Arm, seed: int, words: list[str]) -> None:
    out = path_of(folder, arm, seed)
    if finished(out):
        return
    base = [sys.executable, "-m", "gradprobe", "record"]
    if out.exists() and out.with_name(f"{out.stem}.checkpoint.pt").exists():
        done = subprocess.run([*base, "--resume", str(out)], check=False)
        if done.returncode == 0 or done.returncode == 130:
            return
    source = ["--from", str(path_of(folder, Arm(arm.after, arm.after), seed))] if arm.after else []
    command = [*base, "--trainer", arm.trainer, *arm.flags, *source, "--seed", str(seed), *words]
    subprocess.run([*command, "--out", str(out), "--overwrite"], check=True)


def cost(folder: Path, arm: Arm, steps: int, words: list[str]) -> dict[str, float]:
    """Seconds of a step, and of a joint step in the same process, in turn; unmeasured steps, medians."""
    from gradprobe.cli.progress import Display
    from gradprobe.trainers import loop
    from gradprobe.trainers.build import build
    from gradprobe.trainers.data.loading import load_data
    from gradprobe.trainers.settings import Settings

    class Silent(Display):
        def say(self, text):
            pass

    def make(values):
        settings = Settings(**values)
        silent = Silent(settings)
        training = build(settings, data, [silent], silent, out=folder / "unused.h5")
        training.model.train()
        return training

    with Run(path_of(folder, arm, 0)) as run:
        stored = {k.removeprefix("settings."): v for k, v in run.provenance.items() if k.startswith("settings.")}
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in names}
    values["every"] = 10**9
    for name in ("data", "cfg", "weights"):  # the file keeps no folders
        if f"--{name}" in words:
            values[name] = words[words.index(f"--{name}") + 1]
    plain = {"trainer": "joint", "task": "", "share_until": "", "double": (), "from_run": ""}
    data = load_data(values["data"], imgsz=values["imgsz"], seed=0, skip_bad=True)
    pair = {"joint": make({**values, **plain}), "arm": make(values)}
    times: dict[str, list[float]] = {name: [] for name in pair}
    batches = [batch for _, batch in zip(range(steps + 3), endless(pair["joint"].train_loader), strict=False)]
    for index, batch in enumerate(batches):
        for name in sorted(pair, reverse=bool(index % 2)):
            started = time.perf_counter()
            loop.train_step(pair[name], batch)
            if index >= 3:  # the first step is measured, the others warm up
                times[name].append(time.perf_counter() - started)
    for training in pair.values():
        training.probe.close()
    return {name: statistics.median(values) for name, values in times.items()}


def endless(loader):
    while True:
        yield from loader


def row(folder: Path, arm: Arm, seeds: int, costs: dict[str, dict[str, float]]) -> list[str]:
    scores: dict[str, list[float]] = {name: [] for name in (*METRICS, "cosine")}
    for seed in range(seeds):
        with Run(path_of(folder, arm, seed)) as run:
            facts = run.provenance
            for name, task in METRICS.items():
                trained = facts["settings.task"] in ("", task)
                scores[name].append(float(run.epochs[name][-1]) if trained else float("nan"))
            known = run["shared_cosine"][np.isfinite(run["shared_cosine"]).all(axis=1)]
            scores["cosine"].append(float(np.median(known)) if len(known) else float("nan"))
    ratio = costs[arm.name]["arm"] / costs[arm.name]["joint"] if arm.name in costs else float("nan")
    shared = "not applicable" if np.isnan(scores["cosine"]).any() else spread(scores["cosine"])
    numbers = [f"{facts['model.parameters']:,}", f"{facts['model.flops_per_image'] / 1e6:.0f} M"]
    return [
        arm.name,
        f"{ratio:.2f}",
        *numbers,
        *(spread(scores[name]) for name in METRICS),
        shared,
    ]


def spread(values: list[float]) -> str:
    if any(np.isnan(values)):
        return "not trained"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def table(folder: Path, chosen: list[Arm], seeds: int, costs: dict[str, dict[str, float]], words: list[str]) -> str:
    command = f"python benchmarks/interventions.py --seeds {seeds}" + (f" -- {' '.join(words)}" if words else "")
    import torch

    lines = [
        f"`{command}`; {seeds} seed(s), mean ± standard deviation; val split, which chose "
        "nothing, after the last epoch; "
        f"torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={torch.get_num_threads()}. "
        "The cosine is the median over measured minibatches, over all shared layers together.",
        "",
        "What it cannot show: which trainer is better on other data, or after a longer training; a difference smaller "
        "than the spread between so few seeds; or whether interference fell, which a cosine of single minibatches does "
        "not tell.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(row(folder, arm, seeds, costs)) + " |" for arm in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/interventions"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of every trainer")
    parser.add_argument("--only", default="", help="arms, with commas between, by the name of their trainer")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    parser.add_argument("words", nargs="*", help="for gradprobe record, behind --")
    given = parser.parse_args()
    only = {name.strip() for name in given.only.split(",") if name.strip()}
    chosen = [arm for arm in arms() if not only or arm.trainer in only]
    chosen.sort(key=lambda arm: bool(arm.after))  # what others are made from comes first
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        for arm in chosen:
            record(given.out, arm, seed, given.words)
    kept = given.out / "costs.json"
    costs = json.loads(kept.read_text()) if kept.exists() else {}
    for arm in chosen:
        if arm.name not in costs:
            costs[arm.name] = cost(given.out, arm, given.steps, given.words)
            kept.write_text(json.dumps(costs, indent=1))
    text = table(given.out, chosen, given.seeds, costs, given.words)
    print(text)
    if given.write:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
