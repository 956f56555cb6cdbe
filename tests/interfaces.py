"""What each module offers to other rooms of the package (its ``__all__``), and what they and the documents use."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradprobe"


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _assigned(node: ast.AST) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def defined(path: Path) -> set[str]:
    """The names at the top of a module, those that it imports from elsewhere among them."""
    found: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(alias.asname or alias.name for alias in node.names)
        found.update(_assigned(node))
    return found


def offered(path: Path) -> set[str]:
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and "__all__" in _assigned(node):
            return set(ast.literal_eval(node.value))
    return set()


def uses(code: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of what a piece of code takes from a module of the package."""
    modules = {}
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                if (whole := f"{node.module}.{alias.name}") in MODULES:
                    modules[alias.asname or alias.name] = whole
                else:
                    yield node.module, alias.name
    bound = {name for node in ast.walk(code) for name in _assigned(node)}
    bound |= {node.arg for node in ast.walk(code) if isinstance(node, ast.arg)}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and node.value.id not in bound:
                yield modules[node.value.id], node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "gradprobe.module:Name" is imported when it is first used.
            module, _, name = node.value.partition(":")
            if module in MODULES and name.isidentifier():
                yield module, name


def _documents() -> Iterator[ast.Module]:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            yield ast.parse(block)
        for module, name in re.findall(r"`(gradprobe(?:\.\w+)+)\.(\w+)", text):
            yield ast.parse(f"from {module} import {name}")
    for path in (ROOT / "examples").rglob("*.py"):
        yield tree(path)


def used_elsewhere() -> dict[str, set[str]]:
    """By module, the names that another room, an example or a document uses."""
    found = defaultdict(set)
    for module, path in MODULES.items():
        for target, name in uses(tree(path)):
            if room(target) != room(module):
                found[target].add(name)
    for code in _documents():
        for target, name in uses(code):
            found[target].add(name)
    return found
