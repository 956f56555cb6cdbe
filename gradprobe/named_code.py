"""Code of the user's that this command line names. A name that was read from a file is never given to this."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradprobe.errors import UsageError


def import_named(module: str) -> Any:
    """Import a module that this command line names: an installed one, or else one of the present folder.

    Installed ones go first, and the present folder is looked into only for what is not installed: where a folder is a
    stranger's, no file of it may stand in for a package. A name that was read from a file is never given to this.
    """
    try:
        installed = importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        installed = False
    if not installed and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # to stay: what the module imports may lie there, too
    return importlib.import_module(module)


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
