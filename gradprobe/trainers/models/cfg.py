"""Finds and reads a YOLOv5 model description (cfg); imports neither torch nor yolov5."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradprobe.errors import UsageError

_REQUIRED = ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head")
_TORCH = re.compile(r"nn\.[A-Z]\w*")
_CALL = re.compile(r"nn\.[A-Z]\w*\([\w.=, -]*\)")
_LAYERS = {
    "Conv", "GhostConv", "Bottleneck", "GhostBottleneck", "SPP", "SPPF", "DWConv", "MixConv2d", "Focus", "CrossConv",
    "BottleneckCSP", "C3", "C3TR", "C3SPP", "C3Ghost", "C3x", "DWConvTranspose2d", "Concat", "Contract", "Expand",
    "Detect",
}  # fmt: skip
"""What YOLOv5 knows as layers; its namespace holds much else, such as `os.remove`, `open` and what loads weights."""
_WORDS = {
    "nc", "anchors", "None", "True", "False", "nearest", "linear", "bilinear", "bicubic", "trilinear", "area",
    "zeros", "reflect", "replicate", "circular", "same", "valid", "none", "relu", "gelu",
}  # fmt: skip
_MOST = 100_000
"""Of any whole number in a row: channels, kernel size, repeats."""


def find_cfg(cfg: str, folder: Path) -> Path:
    """The file that `cfg` means: a path to a yaml, else a name (with or without .yaml) in or below `folder`.

    Args:
        cfg: As YOLOv5's --cfg takes it; a file that exists goes before a name.
        folder: The `models` folder of the yolov5 package.

    Raises:
        UsageError: There is no such file; names the nearest cfgs.
    """
    path = Path(cfg)
    with suppress(OSError, ValueError):  # what no file can be called, as a checkpoint may say
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path
    known = {found.name: found for found in sorted(folder.rglob("yolo*.yaml"))}
    name = cfg if path.suffix else f"{cfg}.yaml"
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
    raise UsageError(
        f"unknown model cfg {cfg!r}: no such file, and yolov5 has none of that name. "
        f"Did you mean {', '.join(near)}? Or give the path of a yaml file."
    )


def read_cfg(path: Path) -> dict[str, Any]:
    """The description in `path`, checked as far as it can be without building the model.

    yolov5 evaluates the strings of a cfg as Python and calls what a row names with what the row gives, so only its own
    layers, those of `torch.nn`, their plain arguments and an activation such as `nn.SiLU()` pass.

    Raises:
        UsageError: The file cannot be read, is no detection cfg, leaves its anchors open, or holds something else than
            such names, or a number that no model has.
    """
    import yaml

    from gradprobe.trainers.yaml_file import compose, yaml_problem

    try:
        loader, node = compose(path)
        content = loader.construct_document(node) if node is not None else None
    except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError: no UTF-8, an impossible date, and the like
        line, problem = yaml_problem(error)
        raise UsageError(
            f"{path}{f', line {line}' if line else ''}: cannot be read as a model cfg: {problem}."
        ) from error
    if not isinstance(content, dict) or not all(key in content for key in _REQUIRED):
        absent = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
        raise UsageError(f"{path}: not a YOLOv5 model cfg, it lacks {', '.join(absent)}.")
    layers = list(_layers(content, path))
    if layers[-1][2] != "Detect":
        raise UsageError(f"{path}: its last layer is {layers[-1][2]}; gradprobe trains models that end in Detect.")
    if not isinstance(content["anchors"], list):
        raise UsageError(
            f"{path}: 'anchors: {content['anchors']}' leaves the anchors to YOLOv5's AutoAnchor, "
            "which gradprobe does not run. "
            "Copy the file, write the anchors of each output layer into it, and pass its path."
        )
    _check_numbers(content, layers, path)
    _check_strings(content, layers, path)
    return content


def trunk_length(content: Mapping[str, Any], path: Path) -> int:
    """How many layers the trunk has: the backbone, up to and including its last layer, an SPPF or SPP.

    Raises:
        UsageError: The backbone ends in something else, so there is no place for the classification head.
    """
    backbone = content["backbone"]
    last = backbone[-1][2] if backbone else "nothing"
    if last not in {"SPPF", "SPP"}:
        raise UsageError(
            f"{path}: its backbone ends in {last}, and the classification head stands on the output of an "
            "SPPF or SPP there. Choose another cfg, for example yolov5n.yaml."
        )
    return len(backbone)


def _layers(content: Mapping[str, Any], path: Path) -> Iterator[list[Any]]:
    for part in ("backbone", "head"):
        rows = content[part]
        if not isinstance(rows, list) or (part == "head" and not rows):
            raise UsageError(f"{path}: '{part}' is to be a list of [from, number, module, args].")
        for number, row in enumerate(rows):
            if not (isinstance(row, list) and len(row) == 4 and isinstance(row[3], list)):
                shown = repr(row)[:200]
                raise UsageError(f"{path}: row {number} of '{part}' is not [from, number, module, args]: {shown}.")
            yield row


def _check_strings(content: Mapping[str, Any], layers: list[list[Any]], path: Path) -> None:
    activation = content.get("activation")
    if activation is not None and not _CALL.fullmatch(str(activation)):
        raise UsageError(f"{path}: activation {_shown(activation)} is not a plain call such as nn.SiLU().")
    for _, _, module, args in layers:
        if not isinstance(module, str) or not (module in _LAYERS or _TORCH.fullmatch(module)):
            raise UsageError(
                f"{path}: yolov5 cannot build this model: {_shown(module)} is no layer of its own or of torch.nn."
            )
        for text in args:
            if isinstance(text, str) and not (text in _WORDS or _TORCH.fullmatch(text)):
                raise UsageError(
                    f"{path}: {_shown(text)} in the layer {module!r} is not a plain name that layers take."
                )


def _check_numbers(content: Mapping[str, Any], layers: list[list[Any]], path: Path) -> None:
    for key in ("depth_multiple", "width_multiple"):
        if type(content[key]) not in (int, float) or not 0 < content[key] <= _MOST:
            raise UsageError(f"{path}: {key} is {_shown(content[key])}, not a number above 0.")
    for _, number, module, args in layers:
        if type(number) is not int or not 0 < number * max(content["depth_multiple"], 1) <= 1000:
            raise UsageError(f"{path}: the layer {_shown(module)} is to stand {_shown(number)} times in a row.")
        if large := [value for value in args if isinstance(value, (int, float)) and not abs(value) <= _MOST]:
            raise UsageError(f"{path}: {_shown(large[0])} in the layer {_shown(module)} is too large.")


def _shown(value: Any) -> str:
    return repr(value)[:200]
