"""Which tests can come out differently on another version of Triton: those that conftest marks `triton`.

Found in the source, so that a new one cannot be forgotten: a test file is one where it, or a file of tests/ or bench/ that it
imports, directly or not, names triton or Gluon in code or in a string of its own; or where it names torch.compile, whose
compiler imports Triton. That is more than need be, not less; a comment or a docstring does not count.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRITON = re.compile(r"\b(?:import|from) triton|^triton|\bgluon|TRITON_", re.MULTILINE)
COMPILE = "torch.compile"


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that stand alone: of modules, functions, classes, and after a name."""
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def spoken(source: str) -> set[str]:
    """Everything that the code names: modules, attributes with their module, and strings."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    said = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            said |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            said |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            said.add(ast.unparse(node) if isinstance(node.value, ast.Name) else node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            said.add(node.value)
    return said


def imported(said: set[str], folders: tuple[Path, ...]) -> set[Path]:
    """The files in these folders that are imported under one of these names."""
    names = {tuple(name.split(".")) for name in said if re.fullmatch(r"[\w.]+", name)}
    files = {folder / f"{name[0]}.py" for folder in folders for name in names}
    files |= {folder / f"{name[1]}.py" for folder in folders for name in names if name[:-1] and name[0] == folder.name}
    return {
        file for file in files if file.is_file() and file.name != "conftest.py"
    }  # pytest's, and it imports this file


@functools.cache
def uses_triton(path: Path, folders: tuple[Path, ...] = (ROOT / "tests", ROOT / "bench")) -> bool:
    """Whether what this file tests depends on Triton."""
    seen: set[Path] = set()
    left = {path}
    while left:
        file = left.pop()
        seen.add(file)
        said = spoken(file.read_text())
        if any(TRITON.search(word) for word in said) or (file == path and COMPILE in said):
            return True
        left |= imported(said, folders) - seen
    return False
