"""A whole experiment: every arm with every seed, fixed beforehand, run in parallel, resumable."""
