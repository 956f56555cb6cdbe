"""Times of several ways to make a training step, taken in turn in one process, as ratios to the first."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Steps = Mapping[str, Callable[[], None]]


def machine() -> str:
    """What the numbers were measured on."""
    return (
        f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def cpu_name() -> str:
    """As the system calls it; the machine's kind where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def in_turn(steps: Steps, rounds: int, warm: int = 3) -> dict[str, tuple[list[float], list[float]]]:
    """Wall and CPU seconds of every step, one round after the other; the order turns round by round."""
    names = list(steps)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for index in range(warm + rounds):
        turned = names[index % len(names) :] + names[: index % len(names)]
        for name in turned:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if index >= warm:
                times[name][0].append(wall)
                times[name][1].append(cpu)
    return times


def ratios(times: Mapping[str, tuple[list[float], list[float]]], base: str = "bare") -> dict[str, tuple[float, float]]:
    """Medians, over the rounds, of each step's time by the base's of the same round: wall and CPU."""
    return {
        name: tuple(  # type: ignore[misc]
            statistics.median(a / b for a, b in zip(values[kind], times[base][kind], strict=True)) for kind in (0, 1)
        )
        for name, values in times.items()
    }


def show(title: str, times: Mapping[str, tuple[list[float], list[float]]], targets: Mapping[str, float] | None = None):
    """Print one table."""
    bare = statistics.median(times["bare"][0])
    print(f"\n{title}; bare step {bare * 1e3:.0f} ms (median of {len(times['bare'][0])})")
    print(f"{'':44} {'ratio':>6} {'of CPU':>7} {'target':>7}")
    for name, (wall, cpu) in ratios(times).items():
        target = (targets or {}).get(name)
        print(f"{name:44} {wall:6.2f} {cpu:7.2f} {f'{target:.2f}' if target else '':>7}")
