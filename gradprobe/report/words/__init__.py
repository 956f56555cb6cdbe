"""Every string of a report, by key, in each language; names and numbers are filled in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from gradprobe.errors import UsageError
from gradprobe.report.names import clean
from gradprobe.report.words import en, zh_tw
from gradprobe.report.words.heard import heard

LANGUAGES: dict[str, Mapping[str, str]] = {"en": en.MESSAGES, "zh-TW": zh_tw.MESSAGES}

VERDICTS = {
    "REDUCED": "reduced",
    "REDUCED (size uncertain)": "reduced_uncertain",
    "EQUIVALENT": "equivalent",
    "INCREASED": "increased",
    "NOT REDUCED": "not_reduced",
    "INCONCLUSIVE": "inconclusive",
    "UNDEFINED": "undefined",
    "NOT APPLICABLE": "not_applicable",
    "NO VERDICT": "no_verdict",
}
"""The verdicts, and what they are called in keys."""


def verdict_key(verdict: str) -> str:
    """The key of a verdict; one that this version does not know says nothing.

    >>> verdict_key("NOT REDUCED")
    'not_reduced'
    """
    return VERDICTS.get(str(verdict), "no_verdict")


class Words:
    """The messages of one language.

    Args:
        lang: "en" or "zh-TW".

    Raises:
        UsageError: There is no such language; lists those there are.
    """

    def __init__(self, lang: str = "en") -> None:
        known = {name.lower(): name for name in LANGUAGES} | {"zh-hant": "zh-TW", "zh-hant-tw": "zh-TW", "zh": "zh-TW"}
        name = known.get(lang.lower().replace("_", "-"))
        if name is None:
            raise UsageError(f"--lang {lang}: no such language; take one of: {', '.join(LANGUAGES)}.")
        self.lang = name
        self.messages = LANGUAGES[name]

    def __call__(self, key: str, **values: object) -> str:
        """The message with its values filled in."""
        return self.messages[key].replace(" %", "\u00a0%").format(**values)  # a number and its unit stay together

    def __contains__(self, key: str) -> bool:
        return key in self.messages

    def subject(self, text: str) -> str:
        """ "cls>det", what the first does to the second, and "det|cls", the two, as they are read.

        >>> Words().subject("cls>det"), Words().subject("det|cls")
        ('cls\xa0→\xa0det', 'det\xa0|\xa0cls')
        """
        if f"subject.{text}" in self:
            return self(f"subject.{text}")
        return clean(text).replace(">", "\u00a0→\u00a0", 1).replace("|", "\u00a0|\u00a0")

    def heard(self, sentence: str) -> tuple[str, bool]:
        """What a comparison says in English, in this language; and whether it had to stay English."""
        return heard(self.lang, clean(sentence, 600))

    def join(self, sentences: Iterable[str]) -> str:
        """Sentences one after the other."""
        return self.messages["join.sentences"].join(sentences)

    def list(self, names: Iterable[str]) -> str:
        """Names in a row: "a, b and c"."""
        *rest, last = list(names) or [""]
        return f"{self.messages['join.comma'].join(rest)}{self.messages['join.and']}{last}" if rest else last

    def number(self, value: float | None, digits: int = 3) -> str:
        """To so many significant digits, with a real minus; a dash where there is none.

        >>> Words().number(-0.12345), Words().number(None)
        ('−0.123', '–')
        """
        if value is None or not math.isfinite(value):
            return "–"
        if float(value).is_integer() and abs(value) < 1e6:
            return f"{value:.0f}".replace("-", "−")
        return f"{value:.{digits}g}".replace("-", "−")

    def signed(self, value: float | None, digits: int = 3) -> str:
        """As :meth:`number`, with the sign always."""
        text = self.number(value, digits)
        return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text

    def span(self, low: float | None, high: float | None, signed: bool = False) -> str:
        """An interval in words: "0.1 to 0.3"."""
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return "–"
        shown = self.signed if signed else self.number
        return self("join.span", low=shown(low), high=shown(high))

    def p_value(self, value: float | tuple[float, float] | None) -> str:
        """A p-value, or raw and adjusted beside each other."""
        if isinstance(value, (tuple, list)):
            return " / ".join(self.p_value(v) for v in value)
        if value is None or not math.isfinite(value):
            return "–"
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
