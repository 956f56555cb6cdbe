"""Processes of ``gradprobe``, or of a script, that begin at once: forks of one that has imported all they need.

Each has its own folder, environment, signals, session and exit code, and so have the runs that a study
starts in it. What it is not: a new interpreter. Tests of imports, of what a shell sees and of the end of an interpreter
start a true one.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from functools import cache
from pathlib import Path

_ONE = threading.Lock()
"""Held from a question to its answer."""


class Process:
    """What :class:`subprocess.Popen` is with pipes and text; ``program`` is a script in the place of ``gradprobe``.

    ``strict``: a RuntimeWarning is an error, as with ``-W error::RuntimeWarning``.
    """

    def __init__(self, words, cwd=None, env=None, start_new_session=False, program="", strict=False) -> None:
        self.returncode = None
        self._said = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  # open until it is read
        self.pid = _ask(
            words=[str(word) for word in words],
            cwd=os.fspath(cwd or Path.cwd()),
            env=dict(os.environ if env is None else env),
            said=[file.name for file in self._said],
            session=start_new_session,
            program=os.fspath(program),
            strict=strict,
        )

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("gradprobe", timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(Path(file.name).read_text() for file in self._said)

    def send_signal(self, number) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def of_session(number) -> list[int]:
    """The processes that ``start_new_session`` began and what they started, as far as they are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            found.append(int(entry.name))
    return found


@cache
def _server():
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    atexit.register(server.communicate)  # its input ends
    return server


def _ask(**what):
    with _ONE:
        server = _server()
        print(json.dumps(what), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())


# ---- in the process that they are forks of


class _Fork:
    """Stands in for Popen where a study starts its runs."""

    def __init__(self, words, *, stdin, stdout, stderr, cwd, env) -> None:
        self.returncode = None
        words = words[2:]  # behind the interpreter and its program
        self.pid = _fork(lambda: _become(words, cwd or Path.cwd(), env, [stdout.fileno()] * 2))

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    wait, terminate, kill, send_signal = Process.wait, Process.terminate, Process.kill, Process.send_signal


def _fork(act) -> int:
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        act()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:  # before or behind what the command guards
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _become(words, cwd, env, outputs, program="") -> None:
    from gradprobe.__main__ import main

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, descriptor in enumerate(outputs, 1):
        os.dup2(descriptor, number)
    sys.argv = [program or "gradprobe", *words]
    if program:
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        main()


def _begin(ask) -> None:
    if ask["session"]:
        os.setsid()
    if ask["strict"]:
        warnings.filterwarnings("error", category=RuntimeWarning)
    outputs = [os.open(name, os.O_WRONLY | os.O_APPEND) for name in ask["said"]]
    _become(ask["words"], ask["cwd"], ask["env"], outputs, ask["program"])


def _import_all() -> None:
    import torch

    import gradprobe.study.runner as runner
    from gradprobe.trainers import build  # noqa: F401

    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports another thousand modules
    runner.subprocess = type("subprocess", (), {**vars(subprocess), "Popen": _Fork})


def _serve() -> None:
    _import_all()
    children = {}
    for line in sys.stdin:
        ask = json.loads(line)
        if "poll" not in ask:
            answer = _fork(lambda ask=ask: _begin(ask))
        elif ask["poll"] not in children and (found := os.waitpid(ask["poll"], os.WNOHANG))[0]:
            answer = children[found[0]] = os.waitstatus_to_exitcode(found[1])
        else:
            answer = children.get(ask["poll"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    del sys.path[0]
    _serve()
