"""Messages, and what says them: the one place where numbers and lists become text of a language."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from string import Formatter
from typing import TypeAlias, Union

from gradprobe.errors import UsageError
from gradprobe.foreign import clean
from gradprobe.messages import en, zh_tw

Value: TypeAlias = Union[str, float, "Message", Sequence["Value"], None]
"""A name of the user's, which no language translates; a number, None: not known; a message in a message; several."""


@dataclass(frozen=True, init=False)
class Message:
    """A sentence, or a part of one, of the catalogue.

    Attributes:
        key: Of the catalogue.
        values: What is filled in, by name.

    ``str(message)`` is English for a terminal and for programs; :class:`gradprobe.messages.Language` says it otherwise.

    >>> str(Message("plan.arm_unplanned", arm="dual"))
    'arm dual was not planned.'
    """

    key: str
    values: tuple[tuple[str, Value], ...]

    def __init__(self, key: str, /, **values: Value) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "values", tuple((name, _kept(value)) for name, value in sorted(values.items())))

    def __str__(self) -> str:

        return ENGLISH.say(self)


def _kept(value: Value) -> Value:
    """Messages are compared and counted: what could change is held in a form that cannot."""
    if isinstance(value, (str, Message)) or not isinstance(value, Sequence):
        return value
    return tuple(map(_kept, value))


LANGUAGES: dict[str, Mapping[str, str]] = {"en": en.MESSAGES, "zh-TW": zh_tw.MESSAGES}

_MOST = 20
"""Of several values so many are named; the rest is counted."""

_PLAIN = str.maketrans({"−": "-", "–": "-", "“": '"', "”": '"', "→": "->", "←": "<-", "`": None})
"""What a terminal is given in the place of typographic signs, and of the marks of code."""

_JOINED = ("and", "semicolons", "sentences")
_ESTIMATES = ("estimate", "signed estimate")


class Language:
    """The messages of one language.

    Places in a message are ``{name}`` or ``{name:how}``. Of numbers ``how`` is ``signed``, ``p``, Python's own format,
    or what is counted (``seed|seeds``); of several values, how they are joined (``and``, ``semicolons``, ``sentences``;
    else with commas), how each is shown, or, of a value and both ends of its interval, ``estimate``
    and ``signed estimate``; of a message ``first``, with a capital; of a text ``subject``.

    Args:
        lang: "en" or "zh-TW".
        page: With real minus signs, spaces that do not break before units, and ``code`` between backticks; names are
            cleaned. Else plain, for terminals and programs.

    Raises:
        UsageError: There is no such language; lists those there are.
    """

    def __init__(self, lang: str = "en", *, page: bool = False) -> None:
        known = {name.lower(): name for name in LANGUAGES} | {"zh-hant": "zh-TW", "zh-hant-tw": "zh-TW", "zh": "zh-TW"}
        name = known.get(lang.lower().replace("_", "-"))
        if name is None:
            raise UsageError(f"--lang {lang}: no such language; take one of: {', '.join(LANGUAGES)}.")
        self.lang = name
        self.page = page
        self.messages = LANGUAGES[name]
        self.missing = "–" if page else "-"

    def __call__(self, key: str, /, **values: Value) -> str:
        """The message with its values filled in; texts among them are taken as they are."""
        return self._filled(key, values, clean_names=False)

    def __contains__(self, key: str) -> bool:
        return key in self.messages

    def say(self, message: Message) -> str:
        """A message; on a page, names in it are cleaned."""
        return self._filled(message.key, dict(message.values), clean_names=self.page)

    def subject(self, text: str) -> str:
        """ "cls>det", what the first does to the second, and "det|cls", the two, as they are read.

        >>> Language(page=True).subject("cls>det"), Language(page=True).subject("det|cls")
        ('cls\xa0→\xa0det', 'det\xa0|\xa0cls')
        """
        if f"subject.{text}" in self:
            return self(f"subject.{text}")
        return clean(text).replace(">", "\u00a0→\u00a0", 1).replace("|", "\u00a0|\u00a0") if self.page else text

    def join(self, sentences: Iterable[str]) -> str:
        """Sentences one after the other."""
        return self.messages["join.sentences"].join(sentences)

    def list(self, names: Iterable[str]) -> str:
        """Names in a row: "a, b and c"."""
        *rest, last = list(names) or [""]
        return f"{self.messages['join.comma'].join(rest)}{self.messages['join.and']}{last}" if rest else last

    def columns(self, *names: str) -> tuple[str, ...]:
        """Titles of the columns of a table."""
        return tuple(self(f"column.{name}") for name in names)

    def number(self, value: float | None, digits: int = 3) -> str:
        """To so many significant digits, whole numbers whole; a dash where there is none.

        >>> Language(page=True).number(-0.12345), Language().number(-0.12345), Language().number(None)
        ('−0.123', '-0.123', '-')
        """
        if value is None or not math.isfinite(value):
            return self.missing
        if isinstance(value, Integral) or (float(value).is_integer() and abs(value) < 1e6):
            return self._signs(f"{value:.0f}")
        return self._signs(f"{value:.{digits}g}")

    def signed(self, value: float | None, digits: int = 3) -> str:
        """As :meth:`number`, with the sign always."""
        text = self.number(value, digits)
        return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text

    def span(self, low: float | None, high: float | None, signed: bool = False) -> str:
        """An interval in words, to two digits of its width: "0.1 to 0.3"."""
        return self.estimate(low, low, high, signed)[1]

    def estimate(
        self, value: float | None, low: float | None, high: float | None, signed: bool = False
    ) -> tuple[str, str]:
        """A value and its interval in words, to as many decimals as give the interval's width two digits.

        An end that would read as 0 and is not gets more: whether 0 is within is what an interval is read for.

        >>> Language().estimate(0.02454, -0.00815, 0.0572, signed=True)
        ('+0.025', '-0.008 to +0.057')
        >>> Language().estimate(-0.05, -0.1, -0.004, signed=True)
        ('-0.050', '-0.100 to -0.004')
        >>> Language().estimate(1.225, -7.272, 9.722), Language().estimate(0.5, float("nan"), 1.0)
        (('1', '-7 to 10'), ('0.5', '-'))
        """
        shown = self.signed if signed else self.number
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return shown(value), self.missing
        if high - low <= 0 or (float(low).is_integer() and float(high).is_integer()):
            return shown(value), self("join.span", low=shown(low), high=shown(high))
        digits = max(0, 1 - math.floor(math.log10(high - low)))
        needed = max((-math.floor(math.log10(2 * abs(end))) for end in (low, high) if end), default=0)
        digits = max(digits, min(digits + 2, needed))
        how = f"{'+' if signed else ''}.{digits}f"
        said = [self._amount(one, how) for one in (value, low, high)]
        return said[0], self("join.span", low=said[1], high=said[2])

    def percent(self, share: float | None, digits: str = ".0") -> str:
        """A share of 1 in percent.

        >>> Language().percent(0.123), Language(page=True).percent(-0.001)
        ('12 %', '0\xa0%')
        """
        if share is None or math.isnan(share):
            return self.missing
        number = f"{100 * share:{digits}f}"
        number = number.lstrip("-") if not number.strip("-0.") else number  # never -0 %
        return self._signs(number) + ("\u00a0%" if self.page else " %")

    def p_value(self, value: float | tuple[float, float] | None) -> str:
        """A p-value, or the raw and the adjusted one."""
        if isinstance(value, tuple):
            return " / ".join(self.p_value(v) for v in value)
        if value is None or not math.isfinite(value):
            return self.missing
        return "< 0.001" if value < 0.001 else f"{value:.3f}"

    # ---- places of a message

    def _filled(self, key: str, values: Mapping[str, Value], *, clean_names: bool) -> str:
        said = []
        for text, name, how, _ in Formatter().parse(self._template(key)):
            said.append(text)
            if name is not None:
                said.append(self._value(values[name], how or "", clean_names))
        return "".join(said)

    def _template(self, key: str) -> str:
        text = self.messages[key]
        return text.replace(" %", "\u00a0%") if self.page else text.translate(_PLAIN)

    def _value(self, value: Value, how: str, clean_names: bool) -> str:
        if isinstance(value, Message):
            said = self.say(value)
            return said[:1].upper() + said[1:] if how == "first" else said
        if isinstance(value, str):
            return self.subject(value) if how == "subject" else clean(value) if clean_names else value
        if isinstance(value, Sequence) and how in _ESTIMATES:
            return self("join.estimate", **dict(zip(("value", "span"), self._estimate(value, how), strict=True)))
        if isinstance(value, Sequence):
            each = [self._value(one, "" if how in _JOINED else how, clean_names) for one in value[:_MOST]]
            more = [self("join.more", n=len(value) - _MOST)] if len(value) > _MOST else []
            return self._several([*each, *more], how)
        return self._amount(value, how)

    def _estimate(self, value: Sequence[Value], how: str) -> tuple[str, str]:
        estimate, low, high = (one if isinstance(one, (int, float)) else None for one in value)
        return self.estimate(estimate, low, high, how == "signed estimate")

    def _several(self, each: Sequence[str], how: str) -> str:
        if not each:
            return self.missing
        if how == "and":
            return self.list(each)
        return self.messages[f"join.{how if how in _JOINED else 'comma'}"].join(each)

    def _amount(self, value: float | None, how: str) -> str:
        if "|" in how:
            one, many = how.split("|")
            return f"{self.number(value)} {one if value == 1 else many}"
        if how == "p":
            return self.p_value(value)
        if how in ("", "signed"):
            return self.signed(value) if how else self.number(value)
        if value is None or math.isnan(value):
            return self.missing
        if how.endswith("%"):
            return self.percent(value, how[:-1])
        return self._signs(f"{value:{how}}")

    def _signs(self, number: str) -> str:
        return number.replace("-", "−").replace("inf", "∞") if self.page else number


ENGLISH = Language("en")
"""For a terminal and for programs."""
