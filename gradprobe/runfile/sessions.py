"""The sessions that a run was recorded in: the first, and one for every time it was gone on with.

Stored in the provenance as one JSON text per session. What the newest session was started with is the provenance
itself; an earlier session keeps only those entries that the next one replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from gradprobe.rows.limits import MAX_TEXT

MOST = 100
"""Sessions that are kept; of more, the first and the newest."""

Session = dict[str, Any]
"""``first_step``; ``started`` (UTC); ``end`` as of the file, empty: killed, or still going on; ``replaced``."""


def session(first_step: int = 0) -> Session:
    """A session that begins now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"first_step": first_step, "started": now, "end": "", "replaced": {}}


def resumed(
    earlier: Sequence[Session], end: str, old: Mapping[str, Any], new: Mapping[str, Any], step: int
) -> list[Session]:
    """The sessions of a run that is gone on with.

    Args:
        earlier: Those up to now.
        end: How the last of them ended.
        old: Its provenance, flat.
        new: The provenance of the session that begins.
        step: The first step of the new session.

    >>> [s["replaced"] for s in resumed([session()], "", {"a": 1, "b": 2}, {"a": 1, "b": 3}, 10)]
    [{'b': 2}, {}]
    """
    before = [dict(s) for s in earlier] or [session() | {"started": ""}]
    gone = {k: v for k, v in old.items() if k not in new or _plain(new[k]) != _plain(v)}
    before[-1] = {**before[-1], "end": end, "replaced": gone}
    kept = before if len(before) < MOST else [before[0], *before[2 - MOST :]]
    return [*kept, session(step)]


def dump(sessions: Sequence[Session]) -> list[str]:
    """As they are stored. Of what was replaced, texts are cut where a file has no room for all of it."""
    found: list[str] = []
    for room in (None, 1000, 50, 0):
        found = [json.dumps(_cut(s, room), default=str, ensure_ascii=False) for s in sessions]
        if max((len(text.encode("utf-8", "replace")) for text in found), default=0) * len(found) <= MAX_TEXT:
            break
    return found


def _cut(session: Session, room: int | None) -> Session:
    """With entries of up to so many characters; None: all; 0: without any."""
    if room is None:
        return session
    long = {k: f"{v!s:.{room}} ... (cut)" if len(str(v)) > room else v for k, v in session["replaced"].items()}
    return {**session, "replaced": long if room else {}}


def load(texts: Any) -> list[Session]:
    """As :func:`dump` made them.

    Raises:
        ValueError: They are not: the file may be a stranger's.
    """
    if not isinstance(texts, list):
        raise ValueError(f"sessions are {texts!r}, not a list of JSON texts")
    return [_session(text) for text in texts]


def _session(text: Any) -> Session:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"a session is no JSON text ({error})") from None
    kinds = {"first_step": int, "started": str, "end": str, "replaced": dict}
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"a session lacks one of {', '.join(kinds)}, or has it of another type")
    return found


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
