"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
from interfaces import MODULES

WITH_EXAMPLES = [module for module, path in MODULES.items() if ">>> " in path.read_text(encoding="utf-8")]
assert len(WITH_EXAMPLES) > 40


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module):
    """Those that need a run of the reader's are marked to be skipped."""
    assert not doctest.testmod(importlib.import_module(module)).failed
