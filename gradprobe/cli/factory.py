"""A function of the user's, named on the command line as MODULE:FUNCTION."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gradprobe.errors import UsageError


def named_function(target: str) -> Callable[[], Any]:
    """The function; its module is looked for in the present folder as well.

    Raises:
        UsageError: It is not written as MODULE:FUNCTION, cannot be imported, or is no function.
    """
    import importlib

    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise UsageError(f"{target!r}: write MODULE:FACTORY, for example mytraining:make.")
    if "" not in sys.path:  # the installed command does not look in the folder that it is called from
        sys.path.insert(0, "")  # to stay: what the function imports when it is called may be there too
    try:
        found = getattr(importlib.import_module(name), attribute)
    except Exception as error:
        raise UsageError(f"{target}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"{target} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]
