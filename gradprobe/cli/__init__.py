"""The command line: a file per command, heavy imports inside functions, so that `gradprobe --help` is quick."""

GATE_TRIPPED, INCONCLUSIVE, INTERRUPTED = 10, 11, 130
"""Exit codes: what ``--fail-on`` names is there; interference is left open; stopped by Ctrl-C."""
