"""Places and limits that a user may have: quotas, few descriptors, no home, other workers, many cycles."""

from __future__ import annotations

import errno
import gc
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import verdict_factory as factory
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from warm import Process
from writing import write

from gradprobe import attach, errors, open_run
from gradprobe.runfile.integrity import check_run

HERE, FDS = Path(__file__).parent, Path("/proc/self/fd")
unix = pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are those of Unix")

TRAINING = """
import sys, warnings
import torch, gradprobe

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 24
    def __getitem__(self, i): return torch.full((8,), float(i)).sin()

def main(out, method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(30)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    more = {"num_workers": 1, "multiprocessing_context": method} if method != "none" else {}
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, **more)
    with gradprobe.attach(model, ["a", "b"], out, every=1, optimizer=optimizer) as probe:
        for epoch in range(EPOCHS):
            for x in loader:
                y = model(x)
                probe.backward({"a": y[:, 0].square().mean(), "b": y[:, 1:].square().mean()})
                optimizer.step(); optimizer.zero_grad()
    print("done", sum(p.double().sum().item() for p in model.parameters()))

if __name__ == "__main__":
    LIMIT
    main(*sys.argv[1:])
"""


def train(folder: Path, out: str, method: str = "none", *, epochs: int = 1, limit: str = ""):
    program = folder / "train.py"
    program.write_text(TRAINING.replace("EPOCHS", str(epochs)).replace("LIMIT", limit or "pass"))
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    if method == "none":
        done = Process([out, method], program=program, cwd=folder, env=environment)
        stdout, stderr = done.communicate(timeout=120)
    else:  # what starts workers anew needs an interpreter that was
        words = [sys.executable, str(program), out, method]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
        stdout, stderr = done.stdout, done.stderr
    assert done.returncode == 0, stderr
    return stdout, stderr


@unix
def test_workers_started_in_another_way_change_no_number(tmp_path):
    methods = ("none", "spawn", "forkserver")
    plain, *others = (train(tmp_path, f"{name}.h5", name)[0] for name in methods)
    assert others == [plain, plain]
    with open_run(tmp_path / "none.h5") as one:
        for method in methods[1:]:
            with open_run(tmp_path / f"{method}.h5") as two:
                for name in ("step", "loss", "grad_norm", "cosine"):
                    assert (one[name] == two[name]).all(), (method, name)
            assert check_run(tmp_path / f"{method}.h5").whole


@unix
def test_a_quota_ends_no_training_and_loses_no_row(tmp_path):
    """No file may have more than 60 kB: the rows stay in parts, and are read as they are."""
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    )
    _, stderr = train(tmp_path, "run.h5", epochs=25, limit=limit)
    assert "could not be put together ([Errno 27] File too large)" in stderr
    with open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == list(range(150))
    assert check_run(tmp_path / "run.h5").whole


@unix
def test_without_a_home_or_a_folder_for_temporary_files(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    environment |= {"TMPDIR": str(tmp_path / "nothing"), "HOME": str(tmp_path / "nobody")}
    run = tmp_path / "run.h5"
    run.write_bytes((HERE / "fixtures" / "all-tables-1.0.h5").read_bytes())
    for words in (["summary", run], ["plot", run, "--out", tmp_path / "plot.png"], ["check", run]):
        done = Process(words, env=environment)
        _, stderr = done.communicate(timeout=120)
        assert done.returncode == 0, stderr
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@unix
def test_in_a_folder_that_was_removed_what_is_elsewhere_can_be_read(tmp_path):
    run = HERE / "fixtures" / "all-tables-1.0.h5"
    start = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
    code = f"{start}; from gradprobe.__main__ import main; sys.argv[1:] = ['summary', {str(run)!r}]; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cycles", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_attaching_and_closing_over_and_over_leaves_nothing_behind(tmp_path, cycles):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left = []
    for cycle in range(cycles):
        with attach(model, ["a", "b"], tmp_path / "run.h5", every=1, optimizer=optimizer, overwrite=cycle > 0) as probe:
            a, b = model(torch.ones(1, 3))[0]
            probe.backward({"a": a, "b": b})
            optimizer.step()
            optimizer.zero_grad()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        hooks += len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)
        descriptors = len(list(FDS.iterdir())) if FDS.exists() else 0
        left.append((hooks, threading.active_count(), descriptors))
    gc.collect()
    assert len(set(left[5:])) == 1
    assert left[-1] == left[5]


@unix
@pytest.mark.parametrize("seeds", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_many_runs_are_compared_with_few_descriptors(tmp_path, seeds):
    runs = factory.study({"joint": factory.Truth(), "gradnorm": factory.Truth(cosine=-0.1)}, range(seeds), twice=False)
    paths = [str(factory.write(tmp_path, run)) for run in runs]
    assert len(paths) == 4 * seeds
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); "
        "from gradprobe.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    for words in (["compare", *paths, "--baseline", "joint"], ["report", *paths, "--out", str(tmp_path / "r.html")]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert done.returncode == 0 or (words[0] == "compare" and done.returncode >= 10), done.stderr  # a verdict
    assert (tmp_path / "r.html").stat().st_size > 100_000


# ---- what a network file system lacks


def test_without_locks_and_without_fsync_of_folders_a_run_is_recorded_whole_and_it_is_said(
    tmp_path, monkeypatch, caplog
):
    """As NFS without its lock daemon: nobody can tell who records, which is said; nothing else is lost."""
    real = os.fsync

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def of_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr("os.fsync", of_files_alone)
    writer = write(tmp_path / "run.h5", range(10))
    assert writer.flush()
    with open_run(tmp_path / "run.h5") as run:
        assert len(run) == 10
    writer.close()
    assert check_run(tmp_path / "run.h5").whole
    assert "this file system has no locks" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_a_file_that_is_replaced_under_a_reader_of_a_network_file_system_is_told_and_opened_anew(tmp_path, monkeypatch):
    """There a replaced file that is open cannot be read any more: ESTALE, and never numbers of two runs."""
    write(tmp_path / "run.h5", range(3000)).close()
    with open_run(tmp_path / "run.h5") as run:
        write(tmp_path / "run.h5", range(4), overwrite=True).close()
        with monkeypatch.context() as stale:

            def gone(*_):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

            stale.setattr("gradprobe.runfile.files.SummedFile._read_at", gone)
            with pytest.raises(errors.RunFileError, match=os.strerror(errno.ESTALE)):
                run.read("grad_norm")  # more than what is kept of the file in memory
        assert run.refresh()
        assert run["step"].tolist() == list(range(4))
