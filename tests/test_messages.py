"""One catalogue: every message is used, is in each language, gets what it takes, and is said in that language."""

from __future__ import annotations

import ast
import fnmatch
import re
import string
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from run_factory import make_run
from verdict_factory import Truth, shortened, study

import gradprobe
from gradprobe.errors import UsageError
from gradprobe.messages import LANGUAGES, Language, Message, en, zh_tw
from gradprobe.runfile import Run
from gradprobe.summary import summarise, wording
from gradprobe.verdict import training_losses
from gradprobe.verdict.answers import INCONCLUSIVE, Answer, ArmLevel
from gradprobe.verdict.comparison import compare
from gradprobe.verdict.criteria import Criteria
from gradprobe.verdict.decision import level_sentence, reason_of_rule

PACKAGE = Path(gradprobe.__file__).parent
TOPICS = {"en": en, "zh-TW": zh_tw}
SAYING = ("Message", "SAY", "words")
"""Names of what is called with a key first."""

ENGLISH = r"([A-Za-z]{2,}[ ,;:]+){3,}"
"""What in Chinese can only be a sentence, or a part of one, that was left in English."""


# ---- the catalogue


def places(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_language_has_every_message_once_with_the_same_places(lang):
    assert set(LANGUAGES[lang]) == set(LANGUAGES["en"])
    topics = [module.MESSAGES for module in vars(TOPICS[lang]).values() if hasattr(module, "MESSAGES")]
    assert sum(map(len, topics)) == len(LANGUAGES[lang])
    for key, text in LANGUAGES[lang].items():
        assert text.strip() or key == "join.sentences", key
        assert places(text) == places(LANGUAGES["en"][key]), key


def test_no_message_in_chinese_is_english():
    for key, text in LANGUAGES["zh-TW"].items():
        bare_text = re.sub(r"\{[^}]*\}|`[^`]*`", "", text)
        assert not re.search(ENGLISH, bare_text), key


def modules():
    return [p for p in PACKAGE.rglob("*.py") if "messages" not in p.relative_to(PACKAGE).parts]


def calls():
    """File, keys or beginnings of keys, and names of values, of everything that is said by a key."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and node.args
                and getattr(node.func, "attr", getattr(node.func, "id", "")) in SAYING
            ):
                whole = any(keyword.arg is None for keyword in node.keywords)
                yield path.name, list(keys_in(node.args[0])), None if whole else {one.arg for one in node.keywords}


def keys_in(node):
    """Keys; with a * for what is put into one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from keys_in(node.body)
        yield from keys_in(node.orelse)


def test_whatever_is_said_is_in_the_catalogue_and_gets_what_it_takes():
    said = [(file, keys, values) for file, keys, values in calls() if keys]
    assert len(said) > 200
    for file, keys, values in said:
        assert all(fnmatch.filter(LANGUAGES["en"], key) for key in keys), (file, keys)
        if values is not None and not any("*" in key for key in keys):
            assert set().union(*(places(LANGUAGES["en"][key]) for key in keys)) == values, (file, keys)


def test_no_message_is_dead():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [*modules(), PACKAGE / "messages/language.py"]]
    known = {key for tree in trees for node in ast.walk(tree) for key in keys_in(node)}
    template = (PACKAGE / "report" / "page.html.j2").read_text(encoding="utf-8")
    known |= set(re.findall(r"words\(['\"]([\w.]+)['\"]", template))
    made = {key for key in known if re.fullmatch(r"\w+\.[\w.*]*\*[\w.]*|\*\.\w+", key)}
    made |= {f"{start}*" for start in re.findall(r"words\(['\"]([\w.]+)['\"] ~", template)}
    dead = [key for key in LANGUAGES["en"] if key not in known and not any(fnmatch.fnmatch(key, one) for one in made)]
    assert dead == []


NAMES = {"samples over noise scale"}
"""No sentences: a gate's name, as programs know it."""


def test_the_verdict_and_the_ledger_hold_no_english_sentence():
    for path in [*(PACKAGE / "verdict").glob("*.py"), PACKAGE / "ledger" / "windows.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spared = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spared:
                assert len(re.findall(r"\b[A-Za-z']{2,}\s", f"{node.value} ")) < 4 or node.value in NAMES | LEFT_OUT, (
                    path.name,
                    node.value,
                )


LEFT_OUT = {
    "not measured, or not to be counted",
    "an end, the correction or the change of the loss is unknown",
    "momentum from before the burst is in it",
}
"""Why rows of a ledger do not count, as programs know it."""


# ---- a language


def test_an_unknown_language_lists_those_there_are():
    with pytest.raises(UsageError, match=r"--lang fr: .*en, zh-TW"):
        Language("fr")
    assert Language("zh_tw").lang == Language("zh-Hant").lang == "zh-TW"


def test_one_formatter_is_plain_for_a_terminal_and_typographic_on_a_page():
    numbers = Message("rule.numbers", estimate=(-0.12345, -0.2, 0.0312), n=3)
    assert str(numbers) == "-0.12 (95 % interval -0.20 to +0.03, 3 seeds)"
    assert Language(page=True).say(numbers) == "−0.12 (95\u00a0% interval −0.20 to +0.03, 3 seeds)"
    assert Language("zh-TW", page=True).say(numbers) == "−0.12（95\u00a0% 信賴區間 −0.20 至 +0.03，3 個種子）"
    unknown = Message("rule.numbers", estimate=(-0.12345, float("-inf"), 2.0), n=3)
    assert str(unknown) == "-0.123 (95 % interval -, 3 seeds)"
    part = Message("gate.earlier", part=0.1234, task="det")
    assert str(part) == "momentum from before the burst is 12.3 % of det's terms"
    assert "12.3\u00a0%" in Language(page=True).say(part)
    assert str(Message("refusal.nothing", arm="a`b")) == "there is nothing to compare a`b with."
    assert "--unpaired" in str(Message("refusal.no_common_seed", arm="a", baseline="b"))
    assert "`--unpaired`" in Language(page=True).say(Message("refusal.no_common_seed", arm="a", baseline="b"))
    assert [Language().p_value(p) for p in (1e-4, 0.0312, None)] == ["< 0.001", "0.031", "-"]
    assert [str(Message("reason.few_seeds", n=n, least=3))[5:12] for n in (1, 2)] == ["1 seed ", "2 seeds"]


def test_names_are_never_translated_and_are_cleaned_on_a_page_alone():
    name = "baseline {x}\u202e" + "y" * 200
    said = Message("plan.arm_unplanned", arm=name)
    assert name in str(said)
    page = Language("zh-TW", page=True).say(said)
    assert "baseline {x}\ufffd" in page
    assert len(page) < 120


def test_of_very_many_values_some_are_named_and_the_rest_is_counted():
    said = str(Message("plan.seeds_more", arm="joint", seeds=list(range(10**5))))
    assert said == f"joint: seeds {', '.join(map(str, range(20)))}, 99980 more were not planned."


def test_messages_are_values():
    one, other = (Message("plan.seeds_more", arm="a", seeds=seeds) for seeds in ([1, 2], (1, 2)))
    assert one == other
    assert len({one, other, Message("plan.seeds_more", arm="b", seeds=[1, 2])}) == 2


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.1, 1.5, "level.all"),
        (0.2, 0.6, "level.matters"),
        (0.05, 0.6, "level.there"),
        (0.05, 0.09, "level.small"),
        (-0.05, 0.6, "level.open"),
        (-0.5, -0.1, "level.helps"),
    ],
)
def test_a_level_says_how_much_there_is_beside_the_margin(low, high, said):
    what = Message("quantity.interference", task="det", by="cls")
    level = ArmLevel("interference", "joint", "cls>det", what, (low + high) / 2, low, high, [0.1] * 3, range(3))
    assert dict(level_sentence(level, 0.1).values)["said"].key == said


# ---- a comparison in Chinese


def messages_in(data):
    """All messages of a verdict, and those within them."""
    if isinstance(data, Message):
        yield data
        for _, value in data.values:
            yield from messages_in(value)
    elif is_dataclass(data):
        for one in fields(data):
            yield from messages_in(getattr(data, one.name))
    elif isinstance(data, (list, tuple)):
        for one in data:
            yield from messages_in(one)


BASE = Truth()
TWO = {"joint": BASE, "arm": BASE.but(cosine=0.2, cancelled={"cls>det": 0.1, "det>cls": 0.5}, weight=(1.0, 0.3))}
SMALL = {"rows": 24, "layers": 2}


def saying(run, **changes):
    """The run with something else in its provenance; None takes it out."""
    said = run.provenance | {name.replace("__", "."): value for name, value in changes.items()}
    return replace(run, provenance={name: value for name, value in said.items() if value is not None})


def partial_batches(run):
    size = np.where(np.arange(len(run.step)) % 6 == 5, 4, 16)
    return replace(run, batch_size=size, loss=run.loss * size[:, None] / 16)


def on_the_stream(run, **changes):
    return replace(saying(run, **changes), training=run.probed, probed=None)


def noisy(run):
    return replace(run, probed=run.probed and replace(run.probed, noise=run.probed.noise * 40))


def planned(run):
    plan = {"seeds": [0, 1, 9], "arms": ["joint", "gone"], "margin": 0.1 + (run.arm == "arm"), "settings.epochs": 5}
    return replace(saying(run, **{f"plan.{name}": value for name, value in plan.items()}), finished=run.seed < 2)


OF_THE_ARM = {
    "other seeds": lambda run: replace(run, seed=run.seed + 10),
    "one seed missing": lambda run: replace(run, seed=run.seed + 1),
    "other data": lambda run: saying(run, data__fingerprint="b", model__reference="c", batches__hash="d"),
    "nothing shown": lambda run: saying(run, data__fingerprint=None, batches__hash=None),
    "not measured": lambda run: replace(run, probed=None, ledger={}),
    "no layer shared": lambda run: replace(run, reach=np.eye(2, dtype=bool)),
    "one task": lambda run: replace(run, single="det"),
    "one layer shared": lambda run: replace(run, layers=("model.0.conv", "other")),
    "untested": lambda run: replace(run, tested=replace(run.tested, values={}, without={})),
    "seeds unnamed": lambda run: replace(run, seed=None),
}
OF_ALL = {
    "stream": on_the_stream,
    "samples unknown": lambda run: on_the_stream(run, data__train_images=None),
    "few samples": lambda run: on_the_stream(run, data__train_images=4),
    "ledger on a probe batch": lambda run: saying(run, probe__ledger__ends="probe"),
    "no self-check": lambda run: saying(run, self_check=None),
    "nothing tested": lambda run: replace(run, tested=replace(run.tested, clusters=(), values={}, without={})),
    "no clusters": lambda run: replace(run, tested=replace(run.tested, clusters=(), without={})),
    "partial batches": partial_batches,
    "noise": noisy,
    "shortened steps": shortened,
    "a plan": lambda run: run if run.single else planned(run),
}
ONCE = {
    "as they are": lambda run: run,
    "data not shown": lambda run: saying(run, data__fingerprint=None),
    "other losses": lambda run: replace(run, loss=run.loss * (0.5 if run.arm == "arm" else 1)),
    "later and higher": lambda run: replace(
        run, step=run.step + (run.arm == "arm"), loss=run.loss * (1 + (run.arm == "arm"))
    ),
}
TWICE = {
    "apart": lambda run: {"ledger": {**run.ledger, "term": run.ledger["term"] * 1.5}},
    "unknown": lambda run: {"probed": None},
}


def comparisons():
    """As many refusals, warnings, gates, remarks and reasons as can be made."""
    few = study(TWO, range(3), **SMALL)
    *first, last = few
    yield compare(study(TWO))
    yield compare(study({"joint": BASE, "arm": BASE.but(spread=0.4)}, range(4), **SMALL), Criteria(outcome_margin=0.2))
    yield compare(study({"joint": BASE.but(cancelled={"cls>det": 1.4, "det>cls": -0.3})}, range(4), **SMALL))
    yield compare(study({"joint": BASE, "arm": BASE}, range(1), controls=False, twice=False, **SMALL))
    yield compare(study({"joint": BASE.but(spread=0), "arm": BASE.but(spread=0)}, range(2), **SMALL))
    yield compare([run for run in few if run.arm != "joint"])
    yield compare([run for run in few if run.single != "cls"], Criteria(margin=0.3))
    yield compare(study({"joint": BASE.but(resolved=2.0), "arm": BASE.but(resolved=2.0)}, **SMALL))
    yield compare(study({"joint": BASE, "arm": BASE.but(resolved=0.3)}, range(3), **SMALL))
    for change in OF_THE_ARM.values():
        yield compare([change(run) if run.arm == "arm" else run for run in few])
    for change in OF_ALL.values():
        yield compare([change(run) for run in few], Criteria(margin=0.2))
    for change in ONCE.values():
        yield compare([change(run) for run in first], Criteria(paired=True))
    for change in TWICE.values():
        yield compare([*first, replace(last, content="other", **change(last))])
    mixed = [saying(run, settings__lr=1.0 + run.seed, settings__epochs=9) if run.arm == "arm" else run for run in few]
    yield compare([replace(run, finished=run.arm != "arm") for run in mixed], Criteria(paired=False))


FAMILIES = (
    *("refusal.", "caution.", "gate.", "remark.", "reason."),
    *("plan.", "misleading.", "difference.", "rule.", "scope."),
)
HELD_BACK = {"rule.held_back", "rule.alone_alike", "rule.alone_fell", "rule.alone_rose", "rule.alone_not_reduced"}
ELSEWHERE = {"gate.passed", "gate.failed", "remark.skew", "reason.no_interval"} | HELD_BACK
"""Names of results, and what other tests make."""
TAKEN_FROM_FILES = r"[\w.-]+\.h5|--[\w-]+( joint| single| val| \d| det| cls)?|gradprobe study"


@pytest.fixture(scope="module")
def found():
    return list(comparisons())


def test_a_comparison_is_said_wholly_in_chinese(found):
    for message in {one for each in found for one in messages_in(each)}:
        text = re.sub(TAKEN_FROM_FILES, "", Language("zh-TW").say(message))
        assert not re.search(ENGLISH, text), (message, text)


def test_all_that_a_comparison_can_say_was_said_in_these(found):
    said = {message.key for one in found for message in messages_in(one)}
    assert {key for key in LANGUAGES["en"] if key.startswith(FAMILIES)} - ELSEWHERE - said == set()


@pytest.mark.parametrize(
    ("low95", "low90", "high90", "high95", "said"),
    [
        (-0.4, -0.3, -0.02, -0.01, "the interval alone would say that it fell, but not with so many comparisons."),
        (-0.12, -0.09, 0.09, 0.12, "alone would say that it changed by less than the margin of 0.1, but not"),
        (0.01, 0.02, 0.3, 0.4, "alone would say that it rose, but not"),
        (-0.12, -0.09, 0.3, 0.4, "alone would say that it did not fall by as much as the margin of 0.1, but not"),
        (-0.4, -0.3, 0.02, 0.03, "includes both a meaningful reduction and no reduction."),
    ],
)
def test_what_holm_does_not_let_stand_is_inconclusive_and_says_why(low95, low90, high90, high95, said):
    quantity = Message("quantity.interference", task="det", by="cls")
    numbers = {"low95": low95, "low90": low90, "high90": high90, "high95": high95, "n": 5, "margin": 0.1}
    answer = Answer("interference", "arm", "cls>det", quantity, INCONCLUSIVE, 6, effect=-0.2, **numbers)
    assert said in str(reason_of_rule(answer))
    assert "無法定論" in Language("zh-TW").say(reason_of_rule(answer))


def test_a_bare_table_is_said_wholly_in_chinese():
    table = training_losses.parse_table((Path(__file__).parent / "fixtures" / "report.csv").read_text())
    for message in messages_in(training_losses.judge_table(table)):
        text = Language("zh-TW").say(message)
        assert re.search("[\u4e00-\u9fff]", text), text


def test_a_run_is_told_wholly_in_chinese(tmp_path):
    tasks = [f"t{i}" for i in range(3)]
    with Run(make_run(tmp_path / "r.h5", rows=30, layers=4, epochs=2, tasks=tasks)) as run:
        said = wording._messages(summarise(run))
    assert len(said) > 8
    for message in said:
        assert not re.search(ENGLISH, Language("zh-TW").say(message)), message
