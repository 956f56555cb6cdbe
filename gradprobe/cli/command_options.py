"""The options of a command, made from the table of settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from typer import Argument, Option

from gradprobe.trainers.flags import PANELS, flag, options
from gradprobe.trainers.settings import PRESETS, Settings

Command = TypeVar("Command", bound=Callable[..., int])

_KINDS = {"int": int, "float": float, "bool": bool}
"""Type of a setting -> that of its flag; all others are texts."""

Preset = Annotated[str, Option(help=f"A named configuration: {', '.join(PRESETS)}.", rich_help_panel="Common")]
Hyp = Annotated[Path | None, Option(help="A YOLOv5 hyp yaml: loss gains and optimizer.", rich_help_panel="Training")]
Source = Annotated[
    Path | None,
    Option("--from", help="An earlier run, for the trainers that are made from one.", rich_help_panel="Other trainers"),
]

RunFile = Annotated[Path, Argument(help="The run file, finished or still being written.")]
RunFiles = Annotated[list[Path] | None, Argument(help="Run files, or folders of them.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object, for programs.")]
Baseline = Annotated[str, Option(help="The arm that others are compared with. [default: as planned, or joint]")]
Controls = Annotated[
    list[str] | None, Option(help="An arm that trains one task alone. [default: those of --trainer single]")
]
ArmGlobs = Annotated[list[str] | None, Option(metavar="NAME=GLOB", help="The files of an arm, by name.")]
Paired = Annotated[
    bool | None,
    Option("--paired/--unpaired", help="Runs of one seed belong together, or not. [default: if the files show it]"),
]


def takes_settings(*, audit: bool = False) -> Callable[[Command], Command]:
    """Give a command an option for every setting, before its own; it takes them as ``**flags``, see :func:`given`.

    Args:
        audit: Only those that ``gradprobe audit`` takes.
    """
    return lambda command: _taking(command, _settings_parameters(audit))


def takes_fields_of(table: type) -> Callable[[Command], Command]:
    """Give a command an option for every field of a dataclass that is annotated with one, as ``**flags``."""
    hints = get_type_hints(table, include_extras=True)
    made = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is dataclasses.MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in dataclasses.fields(table)
        if get_origin(hints[each.name]) is Annotated
    ]
    return lambda command: _taking(command, made)


def fields_of(table: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the flags that are fields of a dataclass."""
    return {each.name: flags[each.name] for each in dataclasses.fields(table) if each.name in flags}


def _taking(command: Command, made: Sequence[inspect.Parameter]) -> Command:
    """A command with more parameters, before its own."""
    hints = get_type_hints(command, include_extras=True)
    own = {
        name: each.replace(annotation=hints.get(name, each.annotation), kind=each.KEYWORD_ONLY)
        for name, each in inspect.signature(command).parameters.items()
        if each.kind is not each.VAR_KEYWORD
    }
    more = [each for each in made if each.name not in own]
    command.__signature__ = inspect.Signature([*more, *own.values()])  # type: ignore[attr-defined]
    return command


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Setting -> value of its flag, None where it was not given; what else there is, is left out."""
    known = {each.name: known for each, known in options(Settings)}
    return {name: (value or None) if known[name].switch else value for name, value in flags.items() if name in known}


def flag_of(name: str) -> str:
    """The flag of a parameter of `record`."""
    return "--from" if name == "source" else flag(name)


def _settings_parameters(audit: bool) -> list[inspect.Parameter]:
    """In the order of the table, panel by panel."""
    made = []
    for each, known in sorted(options(Settings), key=lambda pair: PANELS.index(pair[1].panel)):
        if not known.flag or (audit and not known.audit):
            continue
        words = known.audit if audit and isinstance(known.audit, str) else known.help
        words = words.replace("{choices}", ", ".join(known.choices))
        if not known.switch and "[default:" not in words:
            words += f" [default: {known.shown or each.default}]"
        names = (flag(each.name),) if known.switch else ()
        kind = _KINDS.get(str(each.type), str)
        made.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=Option(False if known.switch else None, *names, help=words, rich_help_panel=known.panel),
                annotation=kind if known.switch else kind | None,
            )
        )
    return made
