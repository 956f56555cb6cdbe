"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gradprobe.errors import MissingExtraError


def optional(module: str, why: str, extra: str = "export") -> Any:
    """Import a module of an extra.

    Raises:
        MissingExtraError: Its package is not installed; says the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        raise MissingExtraError(package, extra, why) from error
