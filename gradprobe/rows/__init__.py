"""What a probe hands on: a header once, a row per measured step, metrics per epoch; and who takes them.

The probes make these (with torch), the run file stores them (with h5py), displays show them; this package knows neither
torch nor h5py, so that none of the three needs the others.
"""

from gradprobe.rows.features import FEATURE_SIZE, FEATURES, FeatureRow
from gradprobe.rows.header import FeatureHeader, GrowingSink, Header, Provenance, ResumableSink, Sink, TestClusters
from gradprobe.rows.ledger import LEDGER, LedgerRow
from gradprobe.rows.steps import GRAM_NOISE, PROBE_LOADER, ROWS, ProbeLoaderRow, Row
from gradprobe.rows.table import (
    EARLIER_SOURCES,
    FIRST_CALL,
    JOINED_WITHIN,
    MEASURED,
    MISSING_GRADIENT,
    NONFINITE_GRADIENT,
    NONFINITE_LOSS,
    OVERFLOWED,
    UNKNOWN_GRADIENT,
    Field,
    Table,
    absent,
    says_absent,
    sources,
    takes,
)
from gradprobe.rows.updates import UPDATES, UpdateRow

TABLES = (ROWS, FEATURES, UPDATES, LEDGER, PROBE_LOADER)
"""All of which a run may have rows; of the first every run has."""

TABLE_NAMES = tuple(table.name for table in TABLES)

AnyRow = Row | FeatureRow | UpdateRow | LedgerRow | ProbeLoaderRow

__all__ = [
    "EARLIER_SOURCES",
    "FEATURES",
    "FEATURE_SIZE",
    "FIRST_CALL",
    "GRAM_NOISE",
    "JOINED_WITHIN",
    "LEDGER",
    "MEASURED",
    "MISSING_GRADIENT",
    "NONFINITE_GRADIENT",
    "NONFINITE_LOSS",
    "OVERFLOWED",
    "PROBE_LOADER",
    "ROWS",
    "TABLES",
    "TABLE_NAMES",
    "UNKNOWN_GRADIENT",
    "UPDATES",
    "AnyRow",
    "FeatureHeader",
    "FeatureRow",
    "Field",
    "GrowingSink",
    "Header",
    "LedgerRow",
    "ProbeLoaderRow",
    "Provenance",
    "ResumableSink",
    "Row",
    "Sink",
    "Table",
    "TestClusters",
    "UpdateRow",
    "absent",
    "says_absent",
    "sources",
    "takes",
]
