"""What a probe costs beside a bare training step, on two models, for 2 to 40 tasks, and beside what others offer.

    OMP_WAIT_POLICY=passive python benchmarks/overhead.py [--rounds 20] [--only detector|classifier|tasks|peers]

Everything is timed in turn in one process. What is printed are medians of ratios to a bare joint step of the same round
(forward, backward, SGD step), by wall time and by CPU time; absolute times change with the machine and its load. The
probes record into files, as they are used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import warnings

import peers
from cases import classifier, detector
from timing import in_turn, machine, ratios, show

TASKS = (2, 4, 8, 16, 40)


def beside_the_passes(times, use):
    """What a probe adds to its own passes, as a share of a bare step; pairs of the same round."""
    probe, passes, bare = (times[n][1] for n in (use, f"{use}, its passes alone", "bare"))
    return statistics.median((a - b) / c for a, b, c in zip(probe, passes, bare, strict=True))


def on_the_detector(rounds):
    case = detector()
    steps = {
        "bare": case.bare(),
        "backward, det derived": case.probed("backward", {"det": 1.0, "cls": 0.01}),
        "backward, det explicit": case.probed("backward", {"det": 0.01, "cls": 1.0}),
        "record": case.probed("record"),
        "record, its passes alone": case.passes_alone("record"),
        "features at every step": case.probed("backward", level="features"),
        "record, memory low": case.probed("record", memory="low"),
    }
    times = in_turn(steps, rounds)
    targets = {
        "backward, det derived": 1.45,
        "backward, det explicit": 1.65,
        "record": 1.95,
        "features at every step": 1.02,
    }
    show("YOLOv5n, 160 px, batch 8, T = 2", times, targets)
    print(f"record beside its passes: {beside_the_passes(times, 'record'):.3f} of a bare step (CPU; target 0.06)")
    for step in steps.values():
        close(step)


def on_the_classifier(rounds):
    case = classifier(2)
    steps = {
        "bare": case.bare(),
        "backward": case.probed("backward"),
        "backward, its passes alone": case.passes_alone("backward"),
        "record": case.probed("record"),
        "record, its passes alone": case.passes_alone("record"),
        "features at every step": case.probed("backward", level="features"),
        "backward, memory low": case.probed("backward", memory="low"),
    }
    times = in_turn(steps, rounds)
    targets = {"backward": 1.80, "record": 2.45, "features at every step": 1.02}
    show("ResNet-18, 64 px, batch 16, T = 2", times, targets)
    for use in ("backward", "record"):
        print(f"{use} beside its passes: {beside_the_passes(times, use):.3f} of a bare step (CPU; target 0.06)")
    for step in steps.values():
        close(step)
    every_kth(case, rounds, ratios(times)["backward"][0])


def every_kth(case, rounds, full):
    """Ten steps at a time, so that each round holds whole intervals."""
    intervals = (5, 10)
    steps = {"bare": ten(case.bare())}
    steps |= {f"backward, every {k}": ten(case.probed("backward", every=k)) for k in intervals}
    # Past the first derived rows: the 1st, 2nd, 4th, 8th ... are checked by explicit passes.
    times = in_turn(steps, max(4, rounds // 2), warm=10)
    show("ten steps", times, {f"backward, every {k}": 1 + (full - 1) / k + 0.02 for k in intervals})


def ten(step):
    def run():
        for _ in range(10):
            step()

    return run


def by_tasks(rounds):
    print("\nResNet-18, 64 px, batch 16, growth with T: ratios to a bare step (of CPU); limit: (F + T B) / (F + B)")
    print(f"{'T':>3} {'limit':>6} {'backward':>9} {'record':>9} {'low':>9} {'features':>9}")
    for tasks in TASKS:
        case = classifier(tasks)
        forward = case.step(lambda losses: None)
        steps = {
            "bare": case.bare(),
            "forward": forward,
            "backward": case.probed("backward"),
            "record": case.probed("record"),
            "low": case.probed("record", memory="low"),
            "features": case.probed("backward", level="features"),
        }
        found = ratios(in_turn(steps, max(3, rounds * 2 // tasks), warm=5))  # between the checked rows
        share = found["forward"][1]
        cells = " ".join(f"{found[name][1]:9.2f}" for name in ("backward", "record", "low", "features"))
        print(f"{tasks:3} {share + tasks * (1 - share):6.2f} {cells}", flush=True)
        for step in steps.values():
            close(step)


def beside_others(rounds):
    for tasks in (2, 4, 8):
        case = classifier(tasks)
        steps = {
            "bare": case.bare(),
            "gradprobe backward": case.probed("backward"),
            "gradprobe record": case.probed("record"),
        }
        print(f"\npeers, T = {tasks}:")
        found = [peers.available(make, case) for make in peers.ALL]
        steps |= {name: quiet(step) for name, step in found if step is not None}
        show(f"ResNet-18, 64 px, batch 16, T = {tasks}", in_turn(steps, max(3, rounds // tasks)))
        for step in steps.values():
            close(step)


def quiet(step):
    def run():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()

    return run


def close(step):
    if hasattr(step, "probe"):
        step.probe.close()


PARTS = {"detector": on_the_detector, "classifier": on_the_classifier, "tasks": by_tasks, "peers": beside_others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=list(PARTS))
    arguments = parser.parse_args()
    print(machine())
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            part(arguments.rounds)


if __name__ == "__main__":
    main()
