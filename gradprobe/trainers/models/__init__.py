"""Models that the bundled trainers train; each is imported when it is asked for, never before."""

from __future__ import annotations
