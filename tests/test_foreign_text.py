"""Text of others: in a terminal, on a page and in a spreadsheet it is text and nothing else."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from data_set_factory import make_set
from run_factory import make_run

import gradprobe
from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.foreign import cell, visible

BIDI = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
UNSEEN = [0xAD, 0x200B, 0x2028, 0x2029, 0x2060, 0xFEFF, 0xE0001, 0xE0041, 0xE007F]
STEERING = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *BIDI, *UNSEEN]
FORMULAS = ("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0")

# Names that a run file may hold: everything but control characters, which the reader refuses.
TASKS = ("=det\u202e", "[red]cls[/]")
LAYERS = (
    "@sum\u200b",
    "[/]",
    "[link=http://evil.example]x[/link]",
    ":bomb:",
    "-1+1",
    "\u2066\U000e0041a\u061c",
)
TEXT = "[red]\x1b]0;title\x07\x9b2J\u202e\u2066 tail\ufeff"


def steering(text):
    """The code points of a text that steer, turn or hide."""
    return sorted({hex(ord(c)) for c in text if ord(c) in STEERING or unicodedata.category(c) == "Cs"})


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A run file of which every text is somebody's who means ill, its name too."""
    folder = tmp_path_factory.mktemp("of\u202e[red]\x1b[31m others")
    provenance = {
        "trainer": TEXT,
        "arm": TEXT,
        f"settings.{TEXT}": TEXT,
        "settings": {"seed": 0, "data": TEXT, TEXT: [TEXT]},
        "torch": "=1+1",
        "model": {"doubled": [TEXT]},
        "small": -0.5,
    }
    path = folder / "run\u2067\x1b]8;;http:x\x07[link=x].h5"
    return make_run(path, layers=LAYERS, tasks=TASKS, provenance=provenance, end=f"failed: {TEXT}", bad_rows=[3])


def ask(capsys, words):
    code = command([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


COMMANDS = [
    ("summary", "{run}"),
    ("summary", "{run}", "--json"),
    ("watch", "{run}", "--once"),
    ("watch", "{run}", "--once", "--json"),
    ("plot", "{run}", "--out", "{out}.png"),
    ("plot", "{run}", "--what", "cosine", "--out", "{out}.svg"),
    ("check", "{run}"),
    ("check", "{run}", "--json"),
    ("check", "{run}", "--repair", "{out}.h5"),
    ("advise", "{run}"),
    ("replay", "{run}", "--no-figure"),
    ("compare", "{run}"),
    ("compare", "{run}", "--table", "md"),
    ("compare", "{run}", "--json"),
    ("report", "{run}", "--out", "{out}.html"),
    ("export", "{run}", "--to", "csv", "--out", "{out}"),
    ("export", "{run}", "--to", "\u202enonsense\x1b[2J"),
    ("record", "--resume", "{run}"),
    ("record", "--from", "{run}", "--trainer", "gradnorm-static", "--data", "dial"),
    ("record", "--trainer", "\x1b[2J\u202e"),
    ("record", "--\u202enonsense\x1b[2J"),
    ("doctor", "\u202emodule\x1b[2J:f"),
    ("study", "--out", "{out}\u202e\x1b[2J", "--trainers", "\u202e\x1b[2J"),
    ("study", "--out", "{out}\u202e\x1b[2J", "--trainers", "joint", "--dry-run", "--data", "dial"),
    ("data", "check", "{run}"),
    ("data", "check", "no\u202e[red]\x1b[2J.yaml"),
    ("summary", "no\u202e[red]\x1b[2J\udcff.h5"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: ascii(" ".join(words[:1] + words[2:])))
def test_no_text_of_others_steers_a_terminal(foreign, words, tmp_path, capsys):
    code, out, err = ask(capsys, [word.format(run=foreign, out=tmp_path / "out") for word in words])
    assert (steering(out), steering(err)) == ([], []), (code, out, err)
    assert out or err
    assert "Traceback" not in err


def test_brackets_and_colons_are_printed_as_they_are(foreign, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no name is folded
    out = "".join(ask(capsys, words)[1] for words in (["summary", foreign], ["advise", foreign]))
    for name in ("[red]cls[/]", ":bomb:", "[link=http://evil.example]x[/link]"):
        assert name in re.sub(r"\s*\n[\s│┃]*", "", out) or name in out, name
    assert "\U0001f4a3" not in out  # what :bomb: stands for


def test_in_a_terminal_there_are_no_control_sequences_but_our_own(foreign, tmp_path):
    """In a real one, where colours are drawn: no link, no title, no cursor of a name, a warning or an error."""
    for words in (["summary", foreign], ["watch", foreign, "--once"], ["check", foreign], ["summary", f"{foreign}.no"]):
        shown = in_a_terminal(words, tmp_path)
        left = re.sub(r"\x1b\[[0-9;?]*[mlhAK]|\r", "", shown)  # styles, and the cursor of a live display
        assert steering(left) == [], (words, left)
        assert "\x1b[31m others" not in shown
        assert shown.strip()


def in_a_terminal(words, folder):
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    child = subprocess.Popen(
        [sys.executable, "-m", "gradprobe", *map(str, words)], stdout=side, stderr=side, cwd=folder, env=environment
    )
    os.close(side)
    told = b""
    try:
        while block := os.read(main, 1 << 16):
            told += block
    except OSError:  # the other side is closed
        pass
    os.close(main)
    child.wait(60)
    return told.decode()


def test_names_in_a_data_set_are_shown_as_text(tmp_path, capsys):
    yaml = make_set(tmp_path)
    text = yaml.read_text(encoding="utf-8")
    yaml.write_text(text.replace("AR", '"[red]A\\u202e\\e[2J"'), encoding="utf-8")
    (tmp_path / "images" / "train" / "x\u202e\x1b[2J[red].png").write_bytes(b"no image")
    _, out, err = ask(capsys, ["data", "check", yaml])
    assert "[red]A\ufffd\ufffd[2J" in out
    assert "x\ufffd\ufffd[2J[red].png" in out
    assert (steering(out), steering(err)) == ([], [])


def test_the_page_has_no_text_that_turns_or_hides_other_text(foreign, tmp_path, capsys):
    pytest.importorskip("jinja2")
    page = tmp_path / "page.html"
    assert ask(capsys, ["report", foreign, "--out", page])[0] == 0
    text = page.read_text(encoding="utf-8")
    library = max(re.findall(r"<script>(.*?)</script>", text, re.DOTALL), key=len)  # plotly.js, the same in every page
    assert steering(text.replace(library, "")) == []
    assert "[red]cls[/]" in text


def test_a_cell_of_text_is_no_formula_and_a_number_stays_one(foreign, tmp_path, capsys):
    assert ask(capsys, ["export", foreign, "--to", "csv", "--out", tmp_path / "csv"])[0] == 0
    assert ask(capsys, ["plot", foreign, "--out", tmp_path / "plot.png"])[0] == 0
    tables = {
        path.name: list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8"), newline="")))
        for path in tmp_path.rglob("*.csv")
    }
    assert len(tables) >= 6
    number = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-?inf")
    for name, table in tables.items():
        for row in table:
            for text in row:
                assert text[:1] not in ("=", "+", "-", "@", "\t", "\r") or number.fullmatch(text), (name, text)
    names = {row[0] for row in tables["layer_table.csv"]}
    assert {"'@sum\u200b", "'-1+1", "[/]"} <= names
    about = {row[0]: row[1] for row in tables["provenance.csv"]}
    assert (about["torch"], about["small"]) == ("'=1+1", "-0.5")
    cosines = [float(row[-1]) for row in tables["cosines.csv"][1:] if row[-1]]
    with open_run(foreign) as run:
        assert min(cosines) == pytest.approx(float(run["cosine"][run["status"] == 0].min()), rel=1e-6)


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_an_apostrophe(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-1", "+0.5", "-1e-05", ".5", "det", "a=b", "", "'x", "1-2"])
def test_what_is_no_formula_stays(text):
    assert cell(text) == text


@pytest.mark.parametrize("code", STEERING, ids=hex)
def test_what_steers_turns_or_hides_is_replaced(code):
    assert visible(f"a{chr(code)}b") == "a\ufffdb"


@pytest.mark.parametrize(
    "text",
    [
        "檢測",
        "心臟超音波",
        "كشف",
        "می\u200cخواهم",
        "क्\u200dष",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u2764\ufe0f\u200d\U0001f525",
        "e\u0301",
        "a\tb\nc",
        "\U0001f1f9\U0001f1fc",
        "葛\U000e0100",
    ],
)
def test_letters_accents_and_emoji_of_everybody_stay(text):
    assert visible(text) == text


def test_a_joiner_that_only_hides_is_replaced():
    assert visible("d\u200det") == "d\ufffdet"
    assert visible("\u200cdet\u200d") == "\ufffddet\ufffd"
    assert visible("a\udcffb") == "a?b"


def test_names_are_kept_as_they_are_for_programs(foreign, capsys):
    """What is for the eye changes, and not what is in the file."""
    with open_run(foreign) as run:
        assert run.tasks == TASKS
        assert run.layers == LAYERS
    _, out, _ = ask(capsys, ["summary", foreign, "--json"])
    assert tuple(json.loads(out)["tasks"]) == TASKS


def test_a_command_that_is_printed_can_be_given_to_a_shell(tmp_path, capsys):
    """A folder whose name cannot be shown is written as bash reads it."""
    out = tmp_path / "my \u202e\n$(touch marker)`x`' study"
    code, told, err = ask(
        capsys, ["study", "--out", out, "--trainers", "joint", "--seeds", "1", "--dry-run", "--data", "dial"]
    )
    assert code == 0, err
    for line in told.splitlines():
        show = "printf '%s\\0' " + line.removeprefix("gradprobe ")
        words = subprocess.run(["bash", "-c", show], capture_output=True, cwd=tmp_path, check=True).stdout.split(b"\0")
        assert os.fsencode(out) in words
    assert not (tmp_path / "marker").exists()
    assert shlex.split("a") == ["a"]


def test_one_place_makes_consoles_and_none_reads_markup():
    """A console of its own would draw what a name says."""
    package = Path(gradprobe.__file__).parent
    texts = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert [name for name, text in texts.items() if re.search(r"import .*\bConsole\b", text)] == ["cli/console.py"]
    assert not [name for name, text in texts.items() if re.search(r"rich\.markup|from_markup", text)]
