"""Where files may go, and where not: devices, links, planted names, write-protected files, folders that vanish."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_factory import make_run
from test_layout import PACKAGE, modules
from writing import assert_rows, header, row, write
from zoo import mlp

import gradprobe
from gradprobe import errors, open_run, plots
from gradprobe.cli.app import run as command
from gradprobe.integrations.trainer_recording import Recording
from gradprobe.probes import GradientProbe
from gradprobe.report.page import write as write_page
from gradprobe.runfile import Run, RunWriter, audits, lock
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.pieces import parts_folder
from gradprobe.runfile.repair import repair
from gradprobe.study import plan
from gradprobe.trainers import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="devices, links and modes as POSIX has them")

QUICK = {"flush_rows": 10**9, "flush_seconds": 0.02}
AUDIT = {"task": "cls", "weight": 0.0, "class": "clean", "sentence": "", "same_twice": True, "others": ["det"]} | {
    "displacement": [0.0],
    "ulp": [0.0],
    "doors": [],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("source") / "source.h5", rows=5, epochs=1)


def record(path, source):
    write(path, range(4)).close()


def figure(path, source):
    with Run(source) as run:
        plots.write(run, "losses", path.with_suffix(".svg") if path.suffix != ".svg" else path, data=False)


def table(path, source):
    """The CSV beside a figure."""
    with Run(source) as run:
        plots.write(run, "losses", path.with_suffix(".svg"))


def page(path, source):
    write_page("<html>", path)


def audit(path, source):
    audits.write(path, AUDIT)


def weights(path, source):
    checkpoint.save(path, {"a": torch.ones(3)})


def fixed(path, source):
    plan.write(path.parent, {"arms": []})


def exported(path, source):
    with Run(source) as run:
        export_run(run, "netcdf", path)


def repaired(path, source):
    repair(source, path)


WRITERS = {
    record: "run.h5",
    figure: "figure.svg",
    table: "figure.csv",
    page: "report.html",
    audit: "audit.h5",
    weights: "run.last.pt",
    fixed: plan.NAME,
}
"""What replaces the file that is there, and under which name."""

NEW = {exported: "run.nc", repaired: "saved.h5"}
"""What wants a new place."""

each = pytest.mark.parametrize("writer", [*WRITERS, *NEW], ids=lambda w: w.__name__)
replacing = pytest.mark.parametrize("writer", WRITERS, ids=lambda w: w.__name__)


def place(folder, writer):
    return folder / {**WRITERS, **NEW}[writer]


# ---- what is no file


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
    except OSError as error:
        pytest.skip(f"no device can be made here ({error})")


OTHERS = {
    "device": device,
    "pipe": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o666),
    "folder": os.mkdir,
}


@each
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_never_replaced(tmp_path, source, writer, kind, linked):
    out, thing = place(tmp_path, writer), tmp_path / "thing"
    OTHERS[kind](thing if linked else out)
    if linked:
        out.symlink_to(thing)
    before = {p.name: p.lstat()[:3] for p in tmp_path.iterdir()}
    with pytest.raises((errors.GradprobeError, OSError), match=f"a {kind}|exists|Is a directory"):
        writer(out, source)
    assert {p.name: p.lstat()[:3] for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_no_option_makes_a_run_of_it(tmp_path, option, kind, linked):
    out, thing = tmp_path / "run.h5", tmp_path / "thing"
    OTHERS[kind](thing if linked else out)
    if linked:
        out.symlink_to(thing)
    before = {p.name: p.lstat()[:3] for p in tmp_path.iterdir()}
    with pytest.raises(errors.RunFileError, match=f"is a {kind}, which a file must not replace"):
        RunWriter(out, **{option: True})
    assert {p.name: p.lstat()[:3] for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("writer", [record, page, audit, weights], ids=lambda w: w.__name__)
def test_an_open_file_of_a_process_is_no_place(tmp_path, source, writer):
    """/dev/stdout is such a link: a file would take the place of what the shell's ``>`` has open."""
    place_ = tmp_path / "open"
    with place_.open("w") as file:
        out = tmp_path / "out"
        out.symlink_to(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises((errors.GradprobeError, OSError), match="what a process has open"):
            writer(out, source)
        file.write("still this one")
        file.flush()
        assert place_.read_text() == "still this one"


@pytest.mark.parametrize("name", ["figs", "fifo"])
def test_a_figure_goes_not_beside_a_folder_or_a_pipe_of_that_name(tmp_path, source, name, capsys):
    out = tmp_path / name
    {"figs": os.mkdir, "fifo": os.mkfifo}[name](out)
    assert command(["plot", str(source), "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]


# ---- links


@replacing
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
@pytest.mark.parametrize("how", ["absolute", "relative", "chain"])
def test_a_link_is_written_through_and_stays(tmp_path, source, writer, there, how):
    out, store = place(tmp_path, writer), tmp_path / "store"
    store.mkdir()
    real = store / "kept"
    if there and writer not in (record, fixed):  # these replace nothing of themselves
        real.write_text("old")
    if how == "chain":
        (tmp_path / "second").symlink_to(Path("store", "kept"))
    out.symlink_to({"absolute": real, "relative": Path("store", "kept"), "chain": tmp_path / "second"}[how])
    aim = out.readlink()
    writer(out, source)
    assert out.is_symlink()
    assert out.readlink() == aim
    assert stat.S_ISREG(real.lstat().st_mode)
    assert real.read_bytes() != b"old"
    assert [p.name for p in store.iterdir()] == ["kept"]
    if writer in (record, audit):
        assert check_run(out).whole


@pytest.mark.parametrize("writer", NEW, ids=lambda w: w.__name__)
def test_what_wants_a_new_place_takes_no_link_to_something(tmp_path, source, writer):
    out, real = place(tmp_path, writer), tmp_path / "real"
    real.write_text("old")
    out.symlink_to(real)
    with pytest.raises(errors.UsageError, match="exists"):
        writer(out, source)
    assert real.read_text() == "old"


def test_an_export_goes_where_a_link_leads(tmp_path, source):
    out, real = tmp_path / "csv", tmp_path / "elsewhere"
    out.symlink_to(real)
    with Run(source) as run:
        export_run(run, "csv", out)
    assert out.is_symlink()
    assert (real / "rows.csv").stat().st_size > 100


@each
def test_links_in_a_circle_or_into_nowhere_are_told(tmp_path, source, writer):
    out = place(tmp_path, writer)
    for aim in (out.name, "no/such/folder/file"):
        out.symlink_to(aim)
        with pytest.raises((errors.GradprobeError, OSError), match=r"circle|not there|exists"):
            writer(out, source)
        assert sorted(p.name for p in tmp_path.iterdir()) == [out.name]
        out.unlink()


def test_a_run_under_two_names_has_one_folder_of_parts_and_one_lock(tmp_path):
    path, link = tmp_path / "disk" / "run.h5", tmp_path / "run.h5"
    path.parent.mkdir()
    link.symlink_to(path)
    writer = write(link, range(5), **QUICK)
    assert writer.flush()
    for name in (path, link):
        with pytest.raises(errors.RunFileError, match="is being recorded into already"):
            RunWriter(name, overwrite=True)
        with open_run(name) as run:
            assert_rows(run, range(5))
            assert lock.recording_state(run) == "recording"
        assert lock.being_recorded(name)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".parts")] == []
    writer.close()
    write(link, range(5, 8), rewind=(5, 0)).close()
    with open_run(link) as run:
        assert_rows(run, range(8))
    assert link.is_symlink()
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_a_killed_run_is_gone_on_with_and_saved_by_its_link(tmp_path):
    path, link = tmp_path / "disk" / "run.h5", tmp_path / "latest.h5"
    path.parent.mkdir()
    link.symlink_to(path)
    writer = write(path, range(5), **QUICK)
    assert writer.flush()
    writer._lock.release()  # as a kill does
    report_ = check_run(link)
    assert report_.rows == 5
    assert not [f for f in report_.findings if f.kind == "damaged"]
    assert repair(link, tmp_path / "saved.h5").rows == 5
    write(link, range(5, 7), rewind=(5, 0)).close()
    with open_run(path) as run:
        assert_rows(run, range(7))


# ---- planted names


def old_names(out):
    """The temporary names that earlier versions took."""
    parts_ = out.with_name(f"{out.name}.parts")
    return [
        *(out.with_name(f".{out.name}.{end}") for end in ("tmp", f"{os.getpid()}.tmp", "partial")),
        *(parts_ / f".{name}.tmp" for name in (out.name, "00000001.h5")),
    ]


@each
@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_is_planted_at_temporary_names_is_neither_followed_nor_in_the_way(tmp_path, source, writer, kind):
    """In the folder of parts, which is the run's own, a link is swept up, and not what it leads to."""
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    folder = tmp_path / "out"
    folder.mkdir()
    out = place(folder, writer)
    planted = [name for name in old_names(out) if writer is record or name.parent == folder]
    for name in planted:
        name.parent.mkdir(exist_ok=True)
        if kind == "link":
            name.symlink_to(victim)
        elif kind == "file":
            name.write_text("mine")
        else:
            name.mkdir()
            (name / "file").write_text("mine")
    writer(out, source)
    assert victim.read_text() == "keep me"
    for name in (p for p in planted if p.parent == folder):
        assert name.is_symlink() if kind == "link" else (name / "file" if kind == "folder" else name).exists()
    if kind == "link":
        assert victim.lstat().st_nlink == 1


def test_temporary_names_are_never_the_same(tmp_path, source, monkeypatch):
    from gradprobe.whole_files import Disk

    made, real = [], Disk.create
    monkeypatch.setattr(Disk, "create", lambda self, path: made.append(path.name) or real(self, path))
    for writer in WRITERS:
        (tmp_path / writer.__name__).mkdir()
        for _ in range(1 if writer in (record, fixed) else 3):
            writer(place(tmp_path / writer.__name__, writer), source)
    assert len(made) > 15
    assert len(set(made)) == len(made)


def test_a_planted_folder_of_parts_or_lock_is_refused(tmp_path):
    path, elsewhere = tmp_path / "run.h5", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".mine.tmp").write_text("keep me")
    (elsewhere / "lock").write_text("keep me")
    parts_folder(path).symlink_to(elsewhere)
    with pytest.raises(errors.RunFileError, match="symbolic link, which a folder of parts never is"):
        RunWriter(path)
    assert sorted(p.name for p in elsewhere.iterdir()) == [".mine.tmp", "lock"]
    parts_folder(path).unlink()
    parts_folder(path).mkdir()
    (parts_folder(path) / "lock").symlink_to(tmp_path / "made by the lock")
    with pytest.raises(errors.RunFileError, match="cannot be written here"):
        RunWriter(path)
    assert not (tmp_path / "made by the lock").exists()


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_makes_is_not(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from gradprobe import whole_files
class Slow(whole_files.Disk):
    pass
with whole_files.replacing(Path({str(tmp_path / "run.pt")!r}), whole_files.Disk()) as descriptor:
    os.write(descriptor, b"half")
    print("half", flush=True)
    time.sleep(60)
"""
    other = tmp_path / ".gradprobe-notes.tmp"
    other.write_text("mine")
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert all(writer.stdout.readline() == "half\n" for writer in writers)
        checkpoint.save(tmp_path / "run.pt", {"a": 1})
        assert len(list(tmp_path.iterdir())) == 4
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        write_page("<html>", tmp_path / "other.html")
        assert len(list(tmp_path.iterdir())) == 4
        writers[1].send_signal(signal.SIGINT)
        writers[1].wait()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "other.html", "run.pt"]


def test_a_killed_export_is_swept_too(tmp_path, source):
    from gradprobe.whole_files import staged

    if os.fork() == 0:
        with staged(tmp_path / "csv") as folder:
            folder.mkdir()
            (folder / "rows.csv").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    assert len(list(tmp_path.iterdir())) == 1
    with Run(source) as run:
        export_run(run, "csv", tmp_path / "csv")
    assert [p.name for p in tmp_path.iterdir()] == ["csv"]


def test_one_file_alone_renames_and_writes_whole_files():
    """But for the data set that is drawn into an empty folder, and for what is set aside unread."""
    others = {"whole_files.py", "runfile/store.py", "trainers/data/phantom.py"}
    for path in modules():
        if path.relative_to(PACKAGE).as_posix() in others:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            assert name not in ("rename", "write_text", "write_bytes", "mkstemp"), f"{path}: {name}"


# ---- modes, hard links


@each
def test_modes_are_those_of_the_user(tmp_path, source, writer):
    out, old = place(tmp_path, writer), os.umask(0o027)
    try:
        writer(out, source)
    finally:
        os.umask(old)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


@replacing
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, source, writer):
    out = place(tmp_path, writer)
    if writer is record:
        writer_ = write(out, range(3), **QUICK)
        out.chmod(0o600)
        writer_.close()
    elif writer is fixed:
        pytest.skip("a plan is written once")
    else:
        writer(out, source)
        out.chmod(0o600)
        writer(out, source)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


@replacing
def test_a_write_protected_file_is_kept(tmp_path, source, writer):
    out = place(tmp_path, writer)
    if writer is fixed:
        pytest.skip("a plan is written once")
    writer(out, source)
    before = out.read_bytes()
    out.chmod(0o444)
    with pytest.raises((errors.RunFileError, OSError), match=r"write-protected|this run exists"):
        writer(out, source)
    assert out.read_bytes() == before
    if writer is record:
        with pytest.raises(errors.RunFileError, match="write-protected"):
            RunWriter(out, resume=True)
        assert out.read_bytes() == before
        write(out, range(7), overwrite=True).close()
        with open_run(out) as run:
            assert_rows(run, range(7))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".svg") == [out.name][: out.suffix != ".svg"]


def test_another_hard_link_keeps_what_it_had(tmp_path):
    path, other = tmp_path / "run.pt", tmp_path / "other.pt"
    checkpoint.save(path, {"a": 1})
    os.link(path, other)
    checkpoint.save(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 2}
    assert torch.load(other, weights_only=True) == {"a": 1}


# ---- programs that change their folder


def test_outputs_are_where_the_program_was_when_it_named_them(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from gradprobe.sinks.tensorboard import TensorBoardSink

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    case, sink = mlp(torch.float32), TensorBoardSink("events")
    recording = Recording("test", "callback.h5", sinks=[sink])
    monkeypatch.chdir(second)
    recording.open(case.model, ("t0", "t1"), None, every=1)
    for step in range(3):
        recording.record(case.losses(step))
        recording.probe.flush()
    recording.close()
    assert list(second.iterdir()) == []
    assert sorted(p.name for p in first.iterdir()) == ["callback.h5", "events"]
    with open_run(first / "callback.h5") as run:
        assert len(run) == 3


def moving():
    from audit_zoo import factory

    os.chdir(os.environ["MOVED"])
    return factory()()


def test_an_experiment_that_changes_its_folder_does_not_take_the_audit_with_it(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    monkeypatch.setenv("MOVED", str(second))
    words = ["audit", "test_targets:moving", "--steps", "2", "--out", "audit.h5", "--figure", "figure.svg"]
    assert command(words) == 0, capsys.readouterr().err
    assert list(second.iterdir()) == []
    assert sorted(p.name for p in first.iterdir()) == ["audit.h5", "figure.csv", "figure.svg"]


def test_an_audit_says_before_its_training_that_it_cannot_write(tmp_path, capsys):
    os.mkfifo(tmp_path / "figure.svg")
    assert command(["audit", "no_such_module:f", "--figure", str(tmp_path / "figure.svg")]) == 3
    assert "is a pipe" in capsys.readouterr().err


# ---- what others do to a run while it is recorded


def test_a_file_that_came_after_the_writer_is_not_replaced(tmp_path):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    path.write_text("somebody else's")
    with pytest.raises(errors.RunFileError, match="this run exists"):
        writer.start(header())
    assert path.read_text() == "somebody else's"
    assert not parts_folder(path).exists()


@pytest.mark.parametrize("what", ["folder", "lock"])
def test_a_folder_of_parts_that_is_removed_is_made_again(tmp_path, caplog, what):
    path = tmp_path / "run.h5"
    writer = write(path, range(4), **QUICK)
    assert writer.flush()
    gone = parts_folder(path) if what == "folder" else parts_folder(path) / "lock"
    shutil.rmtree(gone) if what == "folder" else gone.unlink()
    for step in range(4, 10):
        writer.write(row(step))
    assert writer.flush()
    with pytest.raises(errors.RunFileError, match="is being recorded into already"):
        RunWriter(path, overwrite=True)
    with open_run(path) as run:
        assert_rows(run, range(4 if what == "folder" else 0, 10))
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(4 if what == "folder" else 0, 10))
        assert run.rows_dropped == (4 if what == "folder" else 0)
        assert run.end == "finished"
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]
    said = [record.message for record in caplog.records]
    assert len(said) == (what == "folder")
    assert all("4 rows are lost: they were in run.h5.parts/, from which somebody removed them" in s for s in said)


def test_everything_may_be_removed_while_it_is_recorded(tmp_path):
    path = tmp_path / "exp" / "run.h5"
    writer = write(path, range(4), **QUICK)
    assert writer.flush()
    writer._store.merge(*writer._flusher._described())  # as it does with many parts
    shutil.rmtree(path.parent)
    for step in range(4, 10):
        writer.write(row(step))
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(10))


def merged(path, count, **options):
    """A live run, of which so many rows are in the main file."""
    writer = write(path, [], flush_rows=1, flush_seconds=1e9, **options)
    writer._store._fan = 2
    for step in range(count):
        writer.write(row(step))
        assert writer.flush()
    deadline = time.monotonic() + 20
    while writer._store._merged_rows < count - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    with Run(path) as run:
        assert len(run) == count
    assert writer._store._merged_rows
    return writer


@pytest.mark.parametrize("how", ["closed", "gone on", "gone back"])
def test_a_main_file_that_is_removed_loses_no_row(tmp_path, caplog, how):
    path = tmp_path / "run.h5"
    writer = merged(path, 8)
    path.unlink()
    steps = list(range(8))
    if how == "gone back":
        writer.rewind(6, 0)
        steps = list(range(6))
    more = range(len(steps), 30) if how == "gone on" else ()
    for step in more:
        writer.write(row(step))
        assert writer.flush()
    writer.close()
    with open_run(path) as run:
        assert_rows(run, [*steps, *more])
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]
    assert [r.message for r in caplog.records] == [f"{path}: was removed while it was recorded, and is written anew"]


@pytest.mark.parametrize("kind", ["a run", "a text", "a link", "a folder", "a pipe"])
def test_what_is_put_in_its_place_is_kept_and_mixed_into_nothing(tmp_path, caplog, kind):
    path, other = tmp_path / "run.h5", tmp_path / "other.h5"
    writer = merged(path, 8)
    path.unlink()
    write(other, range(100, 120)).close()
    {
        "a run": other.rename,
        "a text": lambda path: path.write_text("mine"),
        "a link": lambda path: path.symlink_to(other),
        "a folder": os.mkdir,
        "a pipe": os.mkfifo,
    }[kind](path)
    before = path.lstat()
    writer.write(row(8))
    writer.close()
    with open_run(path) as run:
        assert_rows(run, range(9))
    assert os.path.samestat((tmp_path / "run.h5.other-1").lstat(), before)
    if kind == "a link":
        with open_run(other) as run:
            assert_rows(run, range(100, 120))
    (said,) = [record.message for record in caplog.records]
    assert said == f"{path}: was replaced while it was recorded; what was put there is run.h5.other-1 now"


def test_a_run_that_another_process_took_over_is_left_to_it(tmp_path):
    """Its lock was removed, another one recorded there: this one keeps its rows, says so, and touches nothing."""
    path = tmp_path / "run.h5"
    writer = write(path, range(4), **QUICK)
    assert writer.flush()
    shutil.rmtree(parts_folder(path))
    other = write(path, range(50, 55), overwrite=True, **QUICK)
    assert other.flush()
    writer.write(row(4))
    assert not writer.flush()
    with pytest.raises(errors.RunFileError, match=r"is being recorded into already.*1 rows are lost"):
        writer.close()
    other.write(row(55))
    other.close()
    with open_run(path) as run:
        assert_rows(run, range(50, 56))
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


def test_a_probe_goes_on_where_its_folder_of_parts_is_removed(tmp_path):
    case, path = mlp(torch.float32), tmp_path / "run.h5"
    with gradprobe.attach(case.model, ("t0", "t1"), path, every=1) as probe:
        assert isinstance(probe, GradientProbe)
        for step in range(6):
            probe.backward(case.losses(step))
            if step == 2:
                assert probe.flush()
                shutil.rmtree(parts_folder(path))
        assert probe.flush()
    with open_run(path) as run:
        assert run["step"].tolist() == [3, 4, 5]
        assert run.rows_dropped == 3


@pytest.mark.parametrize("files", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_descriptors_are_given_back(tmp_path, files):
    folder = Path("/dev/fd")
    if not folder.exists():
        pytest.skip("no list of open files here")
    write(tmp_path / "first.h5", range(3)).close()
    before = len(list(folder.iterdir()))
    for number in range(files):
        merged(tmp_path / f"{number}.h5", 4).close()
        checkpoint.save(tmp_path / "run.pt", {"a": 1})
    assert len(list(folder.iterdir())) == before


# ---- runs that are called as other files are


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("plot", "{source}", "--out", "{folder}/run.png"), "run.png"),
        (("plot", "{source}", "--out", "{folder}/run.png"), "run.csv"),
        (("replay", "{source}", "--out", "{folder}/run.svg"), "run.csv"),
        (("report", "{source}", "--out", "{folder}/run.h5"), "run.h5"),
    ],
)
def test_no_figure_table_or_page_replaces_a_run(words, name, source, tmp_path, capsys):
    run = tmp_path / name
    shutil.copy2(source, run)
    before = run.read_bytes()
    assert command([word.format(source=source, folder=tmp_path) for word in words]) == 3
    assert f"{run}: cannot be written here" in (said := capsys.readouterr().err)
    assert "it is a run file" in said
    assert run.read_bytes() == before
    assert list(tmp_path.iterdir()) == [run]


def test_an_audit_replaces_an_audit_and_no_run(source, tmp_path):
    run = tmp_path / "run.h5"
    shutil.copy2(source, run)
    with pytest.raises(errors.RunFileError, match="it is a run file"):
        audit(run, source)
    assert run.read_bytes() == source.read_bytes()
    audit(tmp_path / "audit.h5", source)
    audit(tmp_path / "audit.h5", source)


@pytest.mark.parametrize("name", ["run.csv", "run.png"])
@pytest.mark.parametrize("words", [("plot",), ("replay", "--method", "gradnorm")], ids=lambda words: words[0])
def test_a_run_is_not_replaced_by_its_own_figure(words, name, source, tmp_path):
    run = tmp_path / name
    shutil.copy2(source, run)
    assert command([words[0], str(run), *words[1:]]) == 0
    assert run.read_bytes() == source.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


# ---- names at the end of what a file system takes


def test_a_run_is_read_by_the_longest_name_there_is(tmp_path):
    """No folder of parts can be beside it, so that none is."""
    write(tmp_path / "run.h5", range(4)).close()
    longest = (tmp_path / "run.h5").rename(tmp_path / ("n" * 252 + ".h5"))
    with open_run(longest) as run:
        assert len(run)
    assert check_run(longest).whole
    with pytest.raises(errors.RunFileError, match="no such file"):
        open_run(tmp_path / ("n" * 300))
    for make in (lambda out: repair(longest, out), lambda out: export_run(open_run(longest), "csv", out)):
        with pytest.raises(errors.RunFileError, match="cannot be written here"):
            make(tmp_path / ("m" * 300))
    with pytest.raises(errors.RunFileError, match="cannot be written here"):
        RunWriter(tmp_path / ("m" * 255))
    assert list(tmp_path.iterdir()) == [longest]


def test_a_name_that_no_file_can_have_is_told(tmp_path, monkeypatch):
    with pytest.raises(errors.RunFileError, match="half of a surrogate pair"):
        RunWriter(tmp_path / "half \ud800.h5")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(errors.RunFileError, match=r"run\.h5: cannot be written here"):
        RunWriter("run.h5")
