"""Yaml, plans and paths of a stranger: each is read within bounds or refused in a line, and nothing in it is run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from stopped_runs import DIAL

from gradprobe.cli.app import run as command
from gradprobe.errors import UsageError

# ---- yaml


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
YAMLS = {
    "aliases": BOMB + "train: *a29\nval: x\nnames: *a29\nnc: *a29\nlr0: *a29\n",
    "merges": MERGES + "<<: *a29\ntrain: x\nval: x\nnames: [a]\n",
    "an alias to itself": "train: &a [*a]\nval: *a\nnames: *a\nlr0: *a\n",
    "a chain": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
    "lists in lists": "names: " + "[" * 100_000,
    "lists in lists, by lines": "[\n" * 400_000,
    "maps in maps": "{a: " * 100_000,
    "dashes": "- " * 100_000,
    "keys of keys": "? " * 100_000,
    "blocks": "".join(" " * i + "a:\n" for i in range(1400)),
    "much": "x" * (4 << 20),
    "values": "[" + "a," * 100_000 + "]",
    "four times the values": "[" + "a," * 400_000 + "]",
    "a long number": "nc: " + ":".join(["1"] * 100_000),
    "three times the number": "nc: " + ":".join(["1"] * 300_000),
    "no date": "nc: !!timestamp x\nlr0: !!timestamp x\ntrain: x\nval: x\nnames: [a]\n",
    "no truth": "nc: !!bool x\nlr0: !!bool x\ntrain: x\nval: x\nnames: [a]\n",
    "no number": 'nc: !!int ""\nlr0: !!int ""\ntrain: x\nval: x\nnames: [a]\n',
    "an object": "nc: !!python/object/apply:os.system [touch imported]\nlr0: 1\ntrain: x\nval: x\nnames: [a]\n",
    "noise": "\x01\x02",
}
READERS = {
    "data": ["data", "check"],
    "record --data": ["record", "--out", "x.h5", "--data"],
    "record --hyp": ["record", "--out", "x.h5", *DIAL, "--hyp"],
}


def read_as_cfg(path):
    """As `record --cfg` does, behind the data and the model's package."""
    from gradprobe.trainers.models.cfg import read_cfg

    with pytest.raises(UsageError) as caught:
        read_cfg(Path(path))
    return str(caught.value)


def every_yaml():
    """The longest by one reader: all hand on to one loader. And longer ones in the soak."""
    for kind in YAMLS:
        for reader in (*READERS, "record --cfg"):
            long = " times the " in kind or (kind == "values" and reader != "data")
            marks = pytest.mark.slow if long else ()
            yield pytest.param(kind, reader, marks=marks)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "reader"), list(every_yaml()))
def test_no_yaml_takes_for_ever_or_gives_a_traceback(kind, reader, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(YAMLS[kind])
    start = time.monotonic()
    if reader in READERS:
        assert command([*READERS[reader], "evil.yaml"]) in (1, 2)
        said = capsys.readouterr().err
    else:
        said = read_as_cfg("evil.yaml")
    assert "evil.yaml" in said
    assert len(said) < 2000
    assert time.monotonic() - start < 40
    assert [path.name for path in tmp_path.iterdir()] == ["evil.yaml"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to itself"])
def test_no_yaml_that_is_no_file_is_waited_for(kind, reader, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("evil.yaml")
    {
        "FIFO": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "link to itself": lambda: path.symlink_to(path),
    }[kind]()
    assert command([*READERS[reader], "evil.yaml"]) in (1, 2)
    assert "evil.yaml" in capsys.readouterr().err
    assert "evil.yaml" in read_as_cfg("evil.yaml")


def test_a_list_of_22_000_names_is_read(tmp_path):
    from gradprobe.trainers.data.data_yaml import read_config

    names = "".join(f"  {i}: n{i:08} organism, being\n" for i in range(22_000))
    (tmp_path / "data.yaml").write_text(f"train: a\nval: b\nnames:\n{names}")
    assert len(read_config(tmp_path / "data.yaml").box_names) == 22_000


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[-1, 1, os.remove, [precious]]", "'os.remove' is no layer"),
        ("[-1, 1, open, [precious, w]]", "'open' is no layer"),
        ("[-1, 1, exit, [3]]", "'exit' is no layer"),
        ("[-1, 1, DetectMultiBackend, [precious]]", "'DetectMultiBackend' is no layer"),
        ("[-1, 1, nn.init.constant_, [1]]", "is no layer"),
        ("[-1, 1, 5, [1]]", "5 is no layer"),
        ("[-1, 1, Conv, [128, 1, 1, exec]]", "'exec' in the layer 'Conv'"),
        ("[-1, 1, Conv, [128, os.remove]]", "'os.remove' in the layer 'Conv'"),
        ("[-1, 1000000000, Conv, [128, 1, 1]]", "1000000000 times in a row"),
        ("[-1, 1, Conv, [100000000000, 1, 1]]", "100000000000 in the layer 'Conv' is too large"),
    ],
)
def test_a_model_description_can_name_layers_and_nothing_else(row, said, tmp_path, monkeypatch):
    from gradprobe.trainers.models._import_yolov5 import package_folder

    monkeypatch.chdir(tmp_path)
    text = (package_folder() / "models" / "yolov5n.yaml").read_text()
    old = "[-1, 1, Conv, [512, 1, 1]]"
    assert old in text
    Path("own.yaml").write_text(text.replace(old, row, 1))
    told = read_as_cfg("own.yaml")
    assert "own.yaml" in told
    assert said in told


@pytest.mark.parametrize("activation", ["os.abort()", "exit()", "breakpoint()", "open('x', 'w')", "nn.SiLU().to(3)"])
def test_an_activation_can_be_a_layer_of_torch_and_nothing_else(activation, tmp_path, monkeypatch):
    from gradprobe.trainers.models._import_yolov5 import package_folder

    monkeypatch.chdir(tmp_path)
    text = (package_folder() / "models" / "yolov5n.yaml").read_text()
    Path("own.yaml").write_text(f'{text}\nactivation: "{activation}"\n')
    assert "is not a plain call such as nn.SiLU()" in read_as_cfg("own.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{" * 5,
        '{"a": ' * 100_000,
        "[]",
        "null",
        "\x00",
        '{"a": ' + "1" * 5000 + "}",
        "x" * (9 << 20),
        '{"a": ' + "[" * 50 + "]" * 50 + "}",
    ],
)
def test_a_plan_that_is_none_is_one_clear_error(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(text)
    assert command(["record", *DIAL, "--plan", "plan.json"]) == 2
    assert "--plan plan.json" in capsys.readouterr().err


# ---- paths


def options():
    """Every option and argument of every command that takes a path, with what else the command needs."""
    import click
    import typer

    from gradprobe.cli.app import app

    def commands(found, words):
        for name, each in getattr(found, "commands", {}).items():
            yield from commands(each, [*words, name])
        if not hasattr(found, "commands"):
            yield found, words

    for found, words in commands(typer.main.get_command(app), []):
        needed = [p for p in found.params if isinstance(p, click.Argument) and p.required]
        for parameter in found.params:
            named = parameter.name in ("data", "cfg", "weights", "name") and not getattr(parameter, "is_flag", False)
            if isinstance(parameter.type, click.Path) or named:
                others = ["none.h5" for other in needed if other is not parameter]
                flag = [max(parameter.opts, key=len)] if isinstance(parameter, click.Option) else []
                asked = [p for p in found.params if isinstance(p, click.Option) and p.required and p is not parameter]
                yield [*words, *(word for p in asked for word in (p.opts[0], "csv")), *others, *flag]


ODD = {
    "NUL": "a\0b.h5",
    "5,000 characters": "x" * 5000,
    "50 folders of 100": "/".join(["x" * 100] * 50),
    "a name of 300": "x" * 300 + ".h5",
    "a name of 250": "x" * 250,
    "half a pair": "a\ud800.h5",
}


@pytest.mark.parametrize("words", list(options()), ids=" ".join)
def test_a_path_that_no_file_can_have_is_wrong_usage(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, path in ODD.items():
        assert command([*words, path]) == 2, kind
        told = capsys.readouterr().err
        assert told.startswith("gradprobe: "), kind
        assert len(told) < 300, kind
    assert not list(tmp_path.iterdir())


def test_an_empty_path_is_wrong_usage(capsys):
    for words in (["record", "--out", ""], ["summary", ""], ["record", "--resume", ""], ["check", ""]):
        assert command(words) == 2
        assert "is empty, and names no file" in capsys.readouterr().err
