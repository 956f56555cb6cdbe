"""The files beside a run are its own: no other run takes, replaces or goes on with them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from run_factory import make_run
from stopped_runs import DIAL, altered, contents, copied, stop_in_epoch

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.study import folder
from gradprobe.trainers.paths import Paths

NAMES = [
    *("conflict", "conflict.h5", "conflict.hdf5", "conflict.h5.h5", "conflict.h5.hdf5", ".h5", "lr0.1", "lr0.2"),
    *("lr0.1.h5", "lr0.2.h5", "lr0", "lr0.h5", "lr0.hdf5", "lr0.1.hdf5", "conflict.", "conflict..h5", "conflict-best"),
    *("conflict-best.h5", "conflict.best", "conflict.best.h5", "conflict.H5"),
]


def record(out, *arguments):
    return command(["record", *DIAL, "--epochs", "1", *map(str, arguments), "--out", str(out)])


def sides(run):
    paths = Paths(run)
    return [paths.best, paths.last, paths.checkpoint]


def test_no_two_names_of_runs_share_a_side_file():
    for one, other in itertools.combinations(NAMES, 2):
        assert not {*sides(Path(one))} & {*sides(Path(other))}, (one, other)


def test_the_usual_names_are_those_of_earlier_versions_and_the_others_whole():
    assert [path.name for path in sides(Path("conflict.h5"))] == [
        *("conflict.best.pt", "conflict.last.pt", "conflict.checkpoint.pt")
    ]
    assert Paths(Path("lr0.1")).best.name == "lr0.1.best.pt"
    assert Paths(Path("sub/lr0.1.h5")).last == Path("sub/lr0.1.h5.last.pt").absolute()


@pytest.mark.parametrize("names", [("lr0.1", "lr0.2"), ("a.h5", "a", "a.hdf5"), ("lr0.1.h5", "lr0.1", "lr0.2.h5")])
def test_runs_of_like_names_keep_their_weights(names, tmp_path):
    kept = {}
    for seed, name in enumerate(names):
        assert record(tmp_path / name, "--seed", seed) == 0
        kept[name] = [path.read_bytes() for path in sides(tmp_path / name)[:2]]
    for name, before in kept.items():
        assert [path.read_bytes() for path in sides(tmp_path / name)[:2]] == before
        weights = torch.load(Paths(tmp_path / name).last, weights_only=True)
        with open_run(tmp_path / name) as run:
            assert run.end == "finished"
            assert {tuple(layer.split(".")) for layer in run.layers} <= {tuple(key.split(".")[:2]) for key in weights}
    assert len({tuple(each) for each in kept.values()}) == len(names)


def test_each_of_two_stopped_runs_of_like_names_goes_on_with_its_own_state(tmp_path, monkeypatch):
    runs = [stop_in_epoch(monkeypatch, 2, tmp_path / f"lr0.{n}", "--lr", f"0.00{n}") for n in (1, 2)]
    assert [command(["record", "--resume", str(run)]) for run in runs] == [0, 0]
    for n, run in zip((1, 2), runs, strict=True):
        whole = tmp_path / f"whole{n}.h5"
        assert command(["record", *DIAL, "--epochs", "3", "--lr", f"0.00{n}", "--out", str(whole)]) == 0
        with open_run(run) as found, open_run(whole) as wanted:
            assert found["loss"].tolist() == wanted["loss"].tolist()
            assert found.provenance["settings.lr"] == float(f"0.00{n}")


# ---- the id


def test_a_run_keeps_its_id_over_its_sessions_and_each_has_its_own(tmp_path, monkeypatch):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "a.h5")
    with open_run(run) as file:
        first = file.provenance["id"]
    assert torch.load(Paths(run).checkpoint, weights_only=True)["id"] == first
    assert command(["record", "--resume", str(run)]) == 0
    assert record(tmp_path / "b.h5") == 0
    with open_run(run) as one, open_run(tmp_path / "b.h5") as other:
        assert one.provenance["id"] == first
        assert len(one.sessions) == 2
        assert other.provenance["id"] != first


def test_the_checkpoint_of_another_run_is_refused_and_nothing_is_touched(tmp_path, monkeypatch, capsys):
    """Of the very same settings, data and steps: nothing but the id tells them apart."""
    run, other = (stop_in_epoch(monkeypatch, 2, tmp_path / f"{name}.h5") for name in "ab")
    Paths(other).checkpoint.replace(Paths(run).checkpoint)
    before = contents(tmp_path)
    capsys.readouterr()
    assert command(["record", "--resume", str(run)]) == 3
    said = capsys.readouterr()
    assert f"{Paths(run).checkpoint}: is of another run than {run}" in said.err
    assert "--overwrite" in said.err
    assert said.out == ""
    assert contents(tmp_path) == before


def test_a_checkpoint_of_an_earlier_version_is_refused_for_a_run_with_an_id(tmp_path, monkeypatch, capsys):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "a.h5")
    altered(run, lambda state: [state.pop(name) for name in ("id", "sum")] and state)
    assert command(["record", "--resume", str(run)]) == 3
    assert "is of another run" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    from gradprobe.trainers import loop

    with monkeypatch.context() as patch:
        patch.setattr("uuid.uuid4", lambda: type("None", (), {"hex": ""}))
        plain = loop.training_state
        patch.setattr(loop, "training_state", lambda t: {k: v for k, v in plain(t).items() if k not in ("id", "sum")})
        run = stop_in_epoch(monkeypatch, 2, tmp_path / "old.h5")
    assert "id" not in torch.load(Paths(run).checkpoint, weights_only=True)
    assert command(["record", "--resume", str(run)]) == 0
    with open_run(run) as file:
        assert file.end == "finished"


def test_a_checkpoint_under_its_earlier_name_is_told(tmp_path, monkeypatch, capsys):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "lr0.1.h5")
    Paths(run).checkpoint.rename(tmp_path / "lr0.1.checkpoint.pt")
    assert command(["record", "--resume", str(run)]) == 3
    said = capsys.readouterr().err
    assert "rename it to lr0.1.h5.checkpoint.pt" in said
    assert "weights to lr0.1.h5.best.pt and lr0.1.h5.last.pt" in said
    (tmp_path / "lr0.1.checkpoint.pt").rename(Paths(run).checkpoint)
    assert command(["record", "--resume", str(run)]) == 0


# ---- files of another run in the way


@pytest.mark.parametrize("which", ["best", "last", "checkpoint"])
def test_side_files_of_a_run_that_is_gone_are_not_replaced_unasked(which, tmp_path, monkeypatch, capsys):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "a.h5")
    run.unlink()
    for path in Paths(run).existing():
        if path != getattr(Paths(run), which):
            path.unlink()
    before = contents(tmp_path)
    assert list(before) == [getattr(Paths(run), which)]
    capsys.readouterr()
    assert record(run) == 2
    assert getattr(Paths(run), which).name in (told := capsys.readouterr().err)
    assert "--overwrite" in told
    assert contents(tmp_path) == before
    assert record(run, "--overwrite") == 0


def test_a_run_of_the_name_of_a_side_file_is_not_replaced(tmp_path, capsys):
    assert record(tmp_path / "a.best.pt") == 0
    before = (tmp_path / "a.best.pt").read_bytes()
    assert record(tmp_path / "a.h5") == 2
    assert "a.best.pt" in capsys.readouterr().err
    assert (tmp_path / "a.best.pt").read_bytes() == before


def test_a_link_to_nowhere_in_the_place_of_a_side_file_counts(tmp_path):
    (tmp_path / "a.last.pt").symlink_to(tmp_path / "nothing")
    assert record(tmp_path / "a.h5") == 2


def test_the_first_checkpoint_of_a_run_that_was_killed_before_its_first_row_is_in_nobodys_way(tmp_path, monkeypatch):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "a.h5")
    altered(run, lambda state: state.update(epoch=0))
    for path in (run, Paths(run).best, Paths(run).last):
        path.unlink()
    assert record(run) == 0


def test_a_study_finds_the_checkpoint_of_a_run_with_a_dot_in_its_name(tmp_path, monkeypatch):
    run = stop_in_epoch(monkeypatch, 2, tmp_path / "lr0.1.h5")
    assert folder.state(run) == folder.RESUMABLE
    assert folder.state(copied(run, tmp_path / "other")) == folder.RESUMABLE
    Paths(run).checkpoint.unlink()
    assert folder.state(run) == folder.BEGUN


# ---- best.pt


def test_best_weights_that_are_missing_are_told_and_others_do_not_pass_for_them(tmp_path, monkeypatch, capsys):
    run = stop_in_epoch(monkeypatch, 3, tmp_path / "a.h5")
    altered(run, lambda state: state.update(best=5.0))  # no epoch will be better
    Paths(run).best.unlink()
    capsys.readouterr()
    assert command(["record", "--resume", str(run)]) == 0
    told = capsys.readouterr().err
    assert "a.best.pt is missing: the weights of the best epoch of the first 2 are lost" in told
    assert "better than that one was (5)" in told
    assert not Paths(run).best.exists()
    assert Paths(run).last.exists()


@pytest.mark.parametrize("epoch", [1, 3])
def test_nothing_is_told_of_best_weights_that_are_there_or_not_to_be_expected(epoch, tmp_path, monkeypatch, capsys):
    run = stop_in_epoch(monkeypatch, epoch, tmp_path / "a.h5")
    capsys.readouterr()
    assert command(["record", "--resume", str(run)]) == (0 if epoch > 1 else 3)  # in the first, no row was measured
    assert "is missing" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [("plot",), ("export", "--to", "csv"), ("export", "--to", "netcdf")], ids=" ".join)
def test_what_is_made_of_runs_of_like_names_has_names_of_its_own(words, tmp_path):
    made = []
    for name in ("lr0.1", "lr0.2"):
        make_run(tmp_path / name, rows=5, epochs=1)
        before = set(tmp_path.iterdir())
        assert command([words[0], str(tmp_path / name), *words[1:]]) == 0
        made.append(sorted(path.name for path in set(tmp_path.iterdir()) - before))
    assert made[0]
    assert made[1] == [name.replace("lr0.1", "lr0.2") for name in made[0]]
