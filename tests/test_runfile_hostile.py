from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import hostile
import pytest
from run_factory import make_run

from gradprobe.errors import RunFileError
from gradprobe.runfile import open_run, schema, untrusted

if not hasattr(os, "mkfifo"):
    pytest.skip("needs the files of POSIX", allow_module_level=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", hostile.CORPUS)
def test_a_hostile_file_is_refused_with_what_is_wrong(tmp_path, name):
    make, says = hostile.CORPUS[name]
    path = tmp_path / "run.h5"
    make(path)
    with pytest.raises(RunFileError, match=says) as refusal, open_run(path):
        pass
    assert "run.h5" in str(refusal.value)


def test_the_corpus_is_large():
    assert len(hostile.CORPUS) >= 25


def opened_files() -> set[str]:
    return {str(Path(link).readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_refusal_leaves_nothing_open(tmp_path):
    for name in ("soft_link", "one_bit_flipped", "text_file", "name_of_great_length", "a_later_version"):
        path = tmp_path / f"{name}.h5"
        hostile.CORPUS[name][0](path)
        with pytest.raises(RunFileError):
            open_run(path)
        assert not [file for file in opened_files() if name in file]


PLUGIN = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void loaded(void) { fclose(fopen(getenv("MARK"), "w")); }
int H5PLget_plugin_type(void) { return 0; }
const void *H5PLget_plugin_info(void) { return 0; }
"""

OPEN = """
import sys, h5py
from gradprobe.errors import RunFileError
from gradprobe.runfile import open_run
if sys.argv[1] == "h5py":
    try: h5py.File(sys.argv[2])["loss"][()]
    except OSError: pass
else:
    try: open_run(sys.argv[2])
    except RunFileError as error: print(error)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_no_code_is_loaded_for_an_unknown_filter(tmp_path):
    """Against the witness that HDF5 itself does load it."""
    (tmp_path / "plugin.c").write_text(PLUGIN)
    plugins, mark = tmp_path / "plugins", tmp_path / "mark"
    plugins.mkdir()
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", plugins / "libodd.so", tmp_path / "plugin.c"], check=True, capture_output=True
    )
    hostile.CORPUS["unknown_filter"][0](tmp_path / "run.h5")
    environment = {**os.environ, "HDF5_PLUGIN_PATH": str(plugins), "MARK": str(mark)}
    for how, loads in (("gradprobe", False), ("h5py", True)):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, how, tmp_path / "run.h5"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert mark.exists() == loads, how


def parts_of(path: Path) -> Path:
    folder = path.with_name(path.name + schema.PARTS_SUFFIX)
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "sessions", [["{"], 7, "x", ["[]"], [7.5], ["{}"], ["[" * 100_000]], ids=lambda s: repr(s)[:12]
)
def test_sessions_that_are_none_are_refused(tmp_path, sessions):
    path = make_run(tmp_path / "run.h5", rows=3, layers=2)
    with h5py.File(path, "r+") as file:
        file["provenance"].attrs["sessions"] = sessions
    with open_run(path) as run, pytest.raises(RunFileError, match="session"):
        run.sessions  # noqa: B018


def test_a_part_of_another_run_is_refused(tmp_path):
    path = make_run(tmp_path / "run.h5", layers=4)
    parts_of(path)
    for layers in (3, ["a", "b", "c", "d", "e"]):  # layers may join, but never go, nor become others
        make_run(tmp_path / f"other{layers}", layers=layers).rename(parts_of_(path) / "00000099.h5")
        count = layers if isinstance(layers, int) else len(layers)
        words = rf"00000099.h5: is a part of another run: .* on {count} layers, run.h5 .* on 4"
        with pytest.raises(RunFileError, match=words):
            open_run(path)


def parts_of_(path: Path) -> Path:
    return path.with_name(path.name + schema.PARTS_SUFFIX)


def test_a_part_that_leads_elsewhere_is_refused(tmp_path):
    path = make_run(tmp_path / "run.h5", layers=4)
    (parts_of(path) / "00000099.h5").symlink_to(make_run(tmp_path / "private.h5", layers=4))
    with pytest.raises(RunFileError, match=r"00000099.h5: .* symbolic link"):
        open_run(path)


@pytest.mark.timeout(60)
def test_a_part_that_is_a_pipe_is_refused(tmp_path):
    path = make_run(tmp_path / "run.h5")
    os.mkfifo(parts_of(path) / "00000099.h5")
    with pytest.raises(RunFileError, match="not a regular file"):
        open_run(path)


def test_a_status_without_a_name_is_refused_when_it_is_read(tmp_path):
    path = tmp_path / "run.h5"
    with hostile.changed(path) as file:
        file["status"][3] = 9
    with open_run(path) as run, pytest.raises(RunFileError, match="status 9 has no name"):
        run["status"]


def test_text_of_a_stranger_cannot_steer_the_terminal(tmp_path):
    path = tmp_path / "run.h5"
    with hostile.changed(path) as file:
        file.attrs["end"] = "failed: \x1b[2J\x07 \x9b1m"
        file["provenance"].attrs["trainer"] = "\x1b]0;owned\x07"
    with open_run(path) as run:
        assert run.end == "failed: \ufffd[2J\ufffd \ufffd1m"
        assert run.provenance["trainer"] == "\ufffd]0;owned\ufffd"


def test_a_list_of_text_in_a_large_file_is_refused(tmp_path, monkeypatch):
    """Many references to one long text would be copied many times before anyone could look at it."""
    path = tmp_path / "run.h5"
    with hostile.changed(path) as file:
        file["provenance"].attrs["notes"] = ["a", "b"]
    with open_run(path) as run:
        assert run.provenance["notes"] == ["a", "b"]
    monkeypatch.setattr(untrusted, "MAX_STRINGS", 1000)
    with pytest.raises(RunFileError, match="'notes' of /provenance holds 2 variable-length strings"):
        open_run(path)


def test_a_file_beyond_the_cap_is_refused(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run.h5")
    monkeypatch.setattr(untrusted, "MAX_FILE", 10_000)
    with pytest.raises(RunFileError, match="at most 10,000 are read"):
        open_run(path)


def test_more_than_memory_holds_is_not_read_at_once():
    if not Path("/proc/meminfo").exists():
        pytest.skip("needs /proc/meminfo")
    with pytest.raises(untrusted.RefusedError, match="read it with a stride"):
        untrusted.check_memory(1 << 60)
    untrusted.check_memory(1 << 20)


def test_what_another_program_changed_is_read_with_a_warning(tmp_path, caplog):
    path = make_run(tmp_path / "run.h5")
    with open_run(path) as run:
        assert run.sealed
    assert not caplog.records
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = "mine"
    with open_run(path) as run:
        assert not run.sealed
    assert "another program changed it" in caplog.text
