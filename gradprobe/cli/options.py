"""The options of a command, made from the table of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from typer import Option

from gradprobe.trainers.flags import PANELS, flag, options
from gradprobe.trainers.settings import PRESETS, Settings

Command = TypeVar("Command", bound=Callable[..., int])

KINDS = {"int": int, "float": float, "bool": bool}
"""Type of a setting -> that of its flag; all others are texts."""

Preset = Annotated[str, Option(help=f"A named configuration: {', '.join(PRESETS)}.", rich_help_panel="Common")]
Hyp = Annotated[Path | None, Option(help="A YOLOv5 hyp yaml: loss gains and optimizer.", rich_help_panel="Training")]
Source = Annotated[
    Path | None,
    Option("--from", help="An earlier run, for the trainers that are made from one.", rich_help_panel="Other trainers"),
]


def takes_settings(*, audit: bool = False) -> Callable[[Command], Command]:
    """Give a command an option for every setting, before its own; it takes them as ``**flags``, see :func:`given`.

    Args:
        audit: Only those that ``gradprobe audit`` takes.
    """

    def give(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        own = {
            name: each.replace(annotation=hints[name], kind=each.KEYWORD_ONLY)
            for name, each in inspect.signature(command).parameters.items()
            if each.kind is not each.VAR_KEYWORD
        }
        made = [each for each in _parameters(audit) if each.name not in own]
        command.__signature__ = inspect.Signature([*made, *own.values()])  # type: ignore[attr-defined]
        return command

    return give


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Setting -> value of its flag, None where it was not given; what else there is, is left out."""
    known = {each.name: known for each, known in options(Settings)}
    return {name: (value or None) if known[name].switch else value for name, value in flags.items() if name in known}


def flag_of(name: str) -> str:
    """The flag of a parameter of `record`."""
    return "--from" if name == "source" else flag(name)


def _parameters(audit: bool) -> list[inspect.Parameter]:
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
        kind = KINDS.get(str(each.type), str)
        made.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=Option(False if known.switch else None, *names, help=words, rich_help_panel=known.panel),
                annotation=kind if known.switch else kind | None,
            )
        )
    return made
