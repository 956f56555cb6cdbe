"""Imports the yolov5 package without letting its import change this process.

Importing yolov5 7.0.14 needs `pkg_resources` (gone from today's setuptools), pulls in ultralytics, which
looks up hosts and writes a settings file, and changes print options, thread counts, logging, the plot backend,
the warning filters, `sys.path` and the environment. Here the calls that would do so are muted for the time of
the import, and what cannot be muted is put back.
"""

from __future__ import annotations

import importlib.util
import logging.config
import os
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gradprobe.errors import MissingExtraError, UsageError


class YOLOv5Package(NamedTuple):
    """The parts of the yolov5 package that gradprobe uses."""

    DetectionModel: Any
    ComputeLoss: Any
    Conv: Any
    """Its class attribute `default_act` is the activation of every model built after it was set."""


_lock = threading.Lock()
_package: YOLOv5Package | None = None


def package_folder() -> Path:
    """The folder of the installed yolov5 package, found without importing it.

    Raises:
        MissingExtraError: yolov5 is not installed.
    """
    spec = importlib.util.find_spec("yolov5")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("yolov5", "yolov5", "the bundled detection + classification model")
    return Path(next(iter(spec.submodule_search_locations)))


def import_yolov5() -> YOLOv5Package:
    """Import yolov5, leaving the process as it was; about two seconds the first time, nothing afterwards.

    What OpenCV, pandas and matplotlib set while they are imported themselves (OpenCV's Qt paths) stays.

    Raises:
        MissingExtraError: yolov5 is not installed.
        UsageError: yolov5 is installed and cannot be imported.
    """
    global _package
    with _lock:
        if _package is None:
            package_folder()
            try:
                _package = _import_undisturbed()
            except ImportError as error:
                raise UsageError(
                    f"the installed package yolov5 cannot be imported: {error}. "
                    "Install it anew with: pip install --force-reinstall 'gradprobe[yolov5]'"
                ) from error
        return _package


def _import_undisturbed() -> YOLOv5Package:
    # Imported first, so that what their own import sets is not taken for a change that yolov5 made.
    import cv2
    import matplotlib.pyplot
    import pandas

    muted = (
        (np, "set_printoptions"),
        (torch, "set_printoptions"),
        (cv2, "setNumThreads"),
        (matplotlib, "use"),
        (matplotlib, "rc"),
        (logging.config, "dictConfig"),
    )
    with ExitStack() as stack:
        for owner, name in muted:
            stack.enter_context(_replaced(owner, name, _do_nothing))
        stack.enter_context(pandas.option_context("display.max_columns", 10))
        stack.enter_context(_stubbed(_stub_modules()))
        stack.enter_context(_environment_and_path_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        from yolov5.models.common import Conv
        from yolov5.models.yolo import DetectionModel
        from yolov5.utils.loss import ComputeLoss
    return YOLOv5Package(DetectionModel, ComputeLoss, Conv)


def _do_nothing(*args: object, **kwargs: object) -> None:
    """Stands in for a call that is not to happen."""


def _stub_modules() -> dict[str, types.ModuleType | None]:
    """Stand-ins for absent and unwanted modules; None makes an import fail, where yolov5 allows for it."""
    stubs: dict[str, types.ModuleType | None] = {}
    if importlib.util.find_spec("pkg_resources") is None:
        from packaging.version import parse

        stubs["pkg_resources"] = _module("pkg_resources", parse_version=parse)
    if "ultralytics" not in sys.modules:
        checks = _module("ultralytics.utils.checks", check_requirements=_do_nothing)
        utils = _module("ultralytics.utils", checks=checks)
        stubs |= {"ultralytics": _module("ultralytics", utils=utils)}
        stubs |= {"ultralytics.utils": utils, "ultralytics.utils.checks": checks}
    if "thop" not in sys.modules:
        stubs["thop"] = None  # counts operations; its import drags in distutils
    return stubs


def _module(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _stubbed(stubs: dict[str, types.ModuleType | None]) -> Iterator[None]:
    modules: dict[str, Any] = sys.modules
    modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            modules.pop(name, None)


@contextmanager
def _environment_and_path_kept() -> Iterator[None]:
    environment, path = dict(os.environ), list(sys.path)
    # yolov5 makes this folder, in the home unless told otherwise; one that exists is left as it is.
    os.environ.setdefault("YOLOV5_CONFIG_DIR", tempfile.gettempdir())
    try:
        yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        sys.path[:] = path
