"""Who may import whom, what is exported, and that what is installed is what is in git."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import interfaces
import pytest

import gradprobe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradprobe"

MAY_IMPORT = {
    "__init__": {"attachment", "errors", "probes", "runfile", "updates"},
    "__main__": {"cli"},
    "errors": set(),
    "foreign": set(),
    "messages": {"errors", "foreign"},
    "whole_files": {"errors"},
    "measures": set(),
    "metric": set(),
    "display": set(),
    "statistics": {"measures"},
    "rows": {"measures"},
    "processes": {"errors", "measures"},
    "named_code": {"errors"},
    "environment": set(),
    "runfile": {"__init__", "errors", "foreign", "measures", "rows", "statistics", "whole_files"},
    "study": {"errors", "foreign", "measures", "runfile", "trainers", "whole_files"},
    "summary": {"errors", "ledger", "measures", "messages", "metric", "rows", "runfile"},
    "plots": {
        "display",
        "errors",
        "foreign",
        "measures",
        "metric",
        "rows",
        "runfile",
        "summary",
        "verdict",
        "whole_files",
    },
    "probes": {"errors", "measures", "processes", "rows", "statistics"},
    "audit": {"errors"},
    "forks": {"audit", "errors", "ledger", "statistics"},
    "ledger": {"errors", "measures", "messages", "probes", "rows"},
    "updates": {"errors", "ledger", "measures", "probes", "rows"},
    "trainers": {"audit", "errors", "measures", "named_code", "probes", "processes", "rows", "updates", "whole_files"},
    "sinks": {"errors", "measures", "rows"},
    "integrations": {"attachment", "errors", "probes", "processes", "rows"},
    "verdict": {"errors", "ledger", "measures", "messages", "metric", "runfile", "statistics"},
    "attachment": {"environment", "probes", "rows", "runfile", "updates"},
    "report": {
        "__init__",
        "display",
        "errors",
        "foreign",
        "ledger",
        "measures",
        "messages",
        "metric",
        "runfile",
        "verdict",
        "whole_files",
    },
    "cli": {
        "__init__",
        "audit",
        "environment",
        "errors",
        "foreign",
        "forks",
        "measures",
        "messages",
        "named_code",
        "plots",
        "probes",
        "processes",
        "report",
        "rows",
        "runfile",
        "statistics",
        "study",
        "summary",
        "trainers",
        "verdict",
        "whole_files",
    },
}

MAY_NOT_IMPORT = {
    "measures": {"torch", "h5py", "matplotlib"},
    "statistics": {"torch", "h5py", "matplotlib"},
    "rows": {"torch", "h5py", "matplotlib"},
    "whole_files": {"torch", "h5py", "matplotlib", "numpy"},
    "messages": {"torch", "h5py", "matplotlib", "numpy"},
    "runfile": {"torch", "matplotlib"},
    "summary": {"torch", "h5py", "matplotlib"},
    "verdict": {"torch", "h5py", "matplotlib"},
    "study": {"torch", "h5py", "matplotlib"},
    "plots": {"torch", "h5py"},
    "report": {"torch", "h5py", "matplotlib"},
    "processes": {"h5py", "yolov5", "matplotlib"},
    "probes": {"h5py", "yolov5", "matplotlib"},
    "audit": {"h5py", "yolov5", "matplotlib"},
    "forks": {"h5py", "yolov5", "matplotlib"},
    "ledger": {"h5py", "yolov5", "matplotlib"},
    "updates": {"h5py", "yolov5", "matplotlib"},
    "trainers": {"h5py", "matplotlib"},
    "sinks": {"h5py", "matplotlib"},
    "integrations": {"h5py", "matplotlib"},
}

THEIR_OWN = {
    "lightning": "integrations/lightning.py",
    "transformers": "integrations/huggingface.py",
    "ray": "study/cluster.py",
    "wandb": "sinks/wandb.py",
    "ultralytics": "none: its trainer hands itself to the callback",
}
"""Packages of others, and the one file that imports each."""


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    allowed = MAY_IMPORT[room(path)] | {room(path)}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "gradprobe" and len(parts) > 1:
            target = parts[1] if (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists() else "__init__"
            assert target in allowed, f"{path.relative_to(ROOT)} imports {name}"
        if path.name != "_import_yolov5.py":  # it handles what yolov5 does to others, matplotlib among them
            assert parts[0] not in MAY_NOT_IMPORT.get(room(path), set()), f"{path.relative_to(ROOT)} imports {name}"


def test_no_room_is_a_knot():
    """Also what is imported within a function, or for types alone, counts."""
    files = {".".join(("gradprobe", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in modules()}
    graph = {
        name: {other for other in imports(path) & files.keys() if room(files[other]) == room(path)} - {name}
        for name, path in files.items()
    }
    while leaves := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in leaves}
    assert not graph


ALIKE_ON_PURPOSE = ("messages/en/", "messages/zh_tw/", "plots/figures/")
"""Folders whose files have the names of others: two languages hold the same topics, and a figure has the name that
``gradprobe plot --what`` takes, also where a table of rows is called so."""


def test_a_name_is_that_of_one_module():
    names = [
        path.stem
        for path in modules()
        if not path.stem.startswith("__") and not path.relative_to(PACKAGE).as_posix().startswith(ALIKE_ON_PURPOSE)
    ]
    assert not {name for name in names if names.count(name) > 1}


def offers(module: str) -> set[str]:
    """What other rooms may use: its ``__all__``; of a room that is one module, what has no underscore."""
    path = interfaces.MODULES[module]
    if path.parent == PACKAGE and path.name != "__init__.py":
        return {name for name in interfaces.defined(path) if not name.startswith("_")}
    return interfaces.offered(path)


def test_a_room_uses_of_another_what_that_one_offers():
    for module, names in interfaces.used_elsewhere().items():
        taken = {name for name in names if f"{module}.{name}" not in interfaces.MODULES}
        assert taken <= offers(module) | {"__file__", "__version__"}, module


def test_nothing_is_offered_that_only_its_room_uses():
    """Packages offer to users, too; figures offer to the plot that draws them; the schema hands on names of rows."""
    used = interfaces.used_elsewhere()
    for module, path in interfaces.MODULES.items():
        if path.stem not in ("__init__", "schema") and path.parent.name not in ("gradprobe", "figures"):
            assert interfaces.offered(path) <= used.get(module, set()), module


def test_one_file_alone_imports_yolov5():
    users = {
        p.relative_to(PACKAGE).as_posix() for p in modules() if any(n.split(".")[0] == "yolov5" for n in imports(p))
    }
    assert users <= {"trainers/models/_import_yolov5.py"}


def test_one_file_of_the_verdict_alone_reads_runs():
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if room(path) == "verdict" and any(name.startswith("gradprobe.runfile") for name in imports(path))
    }
    assert users <= {"verdict/evidence.py"}


def test_packages_of_others_are_imported_by_one_file_alone():
    for path in modules():
        for package in {name.split(".")[0] for name in imports(path)} & set(THEIR_OWN):
            assert path.relative_to(PACKAGE).as_posix() == THEIR_OWN[package]


def test_what_is_exported():
    assert set(gradprobe.__all__) == {
        "GradientProbe",
        "GradprobeError",
        "Ledger",
        "ProbeLoader",
        "Run",
        "RunWriter",
        "Updates",
        "attach",
        "doctor",
        "open_run",
    }
    for name in gradprobe.__all__:
        assert callable(getattr(gradprobe, name))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = gradprobe.nonsense


def python(code: str, **options) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


def test_importing_gradprobe_imports_nothing_heavy():
    heavy = python(
        "import sys, gradprobe; print([m for m in ('torch', 'h5py', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_help_imports_nothing_heavy():
    heavy = ("torch", "h5py", "matplotlib", "numpy", "scipy", "yolov5", "pandas")
    show = f"print([m for m in {heavy} if m in sys.modules])"
    assert python(f"import sys; from gradprobe.cli.app import run; run(['--help']); {show}").strip().endswith("[]")


def test_a_comparison_needs_no_torch():
    show = "print([m for m in ('torch', 'matplotlib', 'pandas') if m in sys.modules])"
    assert (
        python(f"import sys, gradprobe.verdict.comparison, gradprobe.verdict.training_losses; {show}").strip() == "[]"
    )


def test_the_two_doors_at_the_top_lead_into_the_package():
    for name in ("probes", "trainers"):
        link = ROOT / name
        if not link.is_symlink():
            pytest.skip("this checkout was made without symbolic links")
        assert str(link.readlink()) == f"gradprobe/{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_what_git_holds(wheel):
    tracked = subprocess.run(["git", "ls-files", "gradprobe"], cwd=ROOT, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("gradprobe/")}
        others = {name.split("/")[0] for name in archive.namelist()} - {"gradprobe"}
    assert packed == set(tracked.stdout.split())
    assert all(name.endswith(".dist-info") for name in others)  # no top-level "probes" or "trainers"


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    where = python(
        "import gradprobe; print(gradprobe.__file__)", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}
    )
    assert Path(where.strip()).is_relative_to(target)
    version = subprocess.run(
        [sys.executable, "-m", "gradprobe", "--version"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert version.stdout.strip() == f"gradprobe {gradprobe.__version__}"


def test_the_linter_looks_at_every_file():
    """A pattern that leaves out the links at the top once left out the packages of the same name as well."""
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen = {Path(line).relative_to(ROOT).as_posix() for line in shown.stdout.splitlines() if line.endswith(".py")}
    ours = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(ours.stdout.split()) <= seen
    assert not [name for name in seen if name.startswith(("probes/", "trainers/"))]
