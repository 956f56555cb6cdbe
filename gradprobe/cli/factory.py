"""A function of the user's, named on the command line as MODULE:FUNCTION."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradprobe.errors import UsageError
from gradprobe.trainers.registry import import_named


def named_function(target: str, example: str = "mytraining:make") -> Callable[..., Any]:
    """The function; its module is looked for in the present folder where it is not installed.

    Raises:
        UsageError: It is not written as MODULE:FUNCTION, cannot be imported, or is no function.
    """
    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise UsageError(f"{target!r}: write MODULE:FUNCTION, for example {example}.")
    try:
        found = getattr(import_named(name), attribute)
    except Exception as error:
        raise UsageError(f"{target}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"{target} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]
