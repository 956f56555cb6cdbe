"""What one run holds, as numbers for a program and as sentences for a person. numpy only."""

from gradprobe.summary.numbers import (
    conflict_rate,
    measures_parameters,
    median,
    not_measured,
    quantiles,
    shared_gram,
    summarise,
)
from gradprobe.summary.wording import CAUTION, sentences

__all__ = [
    "CAUTION",
    "conflict_rate",
    "measures_parameters",
    "median",
    "not_measured",
    "quantiles",
    "sentences",
    "shared_gram",
    "summarise",
]
