"""How many bytes are alive at most while something runs."""

from __future__ import annotations

import torch


def peak_bytes(run) -> int:
    """Most bytes allocated on the CPU beyond those at the start, while ``run()`` runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak
