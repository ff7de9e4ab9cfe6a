"""The list of layers: read from the imports of every module, held here, and tried on modules that break it."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kvkern

PACKAGE = Path(kvkern.__file__).parent

# A module imports from lower layers, and within its own only what stands left of it: so no import can come back.
LAYERS = (
    ("errors", "geometry", "cpu"),
    ("files", "identity", "packing", "header", "prefix", "pages", "plan"),
    (
        "plain",
        "native",
        "rows",
        "kernels.oracle",
        "kernels.tiles",
        "kernels.state",
        "kernels.append",
        "kernels.prefix",
        "kernels.prefix_hopper",
        "kernels.suffix",
        "kernels.merge",
    ),
    ("backends", "linear"),
    ("attention",),
    ("qwen3", "store"),
    ("publish", "sampling", "scheduler", "graphs", "cost"),
    ("generate", "engine"),
    (
        *("scratch", "opening", "console", "describe", "pricing", "answers", "demo_model", "ledger", "attach", "demo"),
        *("checks.__init__", "checks.assertions", "checks.tiny", "checks.subject", "checks.cases", "checks.serving"),
        *("checks.options", "checks.conftest", "checks.test_contract", "checks.test_bits", "checks.test_rounding"),
        *("checks.test_documents", "checks.events", "checks.run", "cli", "__init__"),
    ),
)
PLACE = {name: (layer, place) for layer, names in enumerate(LAYERS) for place, name in enumerate(names)}
NEED_TRITON = {"kernels.tiles", "kernels.state", "kernels.append", "kernels.prefix", "kernels.suffix", "kernels.merge"}
NEED_TRITON |= {"kernels.prefix_hopper"}


def imported(source: str, name: str) -> set[str]:
    """Full names of all that a module imports, at any depth of its code, `from a import b` as a.b."""
    here = ["kvkern", *name.split(".")[:-1]]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            start = ".".join(base + ([node.module] if node.module else []))
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str], modules: set[str]) -> set[str]:
    """The modules of kvkern among imported names: kvkern.plan.Plan -> plan, kvkern.cpu -> cpu."""
    found = set()
    for name in names:
        root, *parts = name.split(".")
        if root != "kvkern":
            continue
        candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found.add(next((c for c in candidates if c in modules), "__init__"))
    return found


def trespasses(sources: dict[str, str]) -> list[str]:
    """Every import that goes up or sideways, as "importer -> imported"."""
    modules = set(PLACE) | {"_C", "kernels"}
    return [
        f"{name} -> {other}"
        for name, source in sources.items()
        for other in sorted(ours(imported(source, name), modules))
        if other not in ("_C", "kernels") and PLACE[other] >= PLACE[name]
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "kernels" / "__init__.py"]
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8") for path in files
    }


def test_every_module_has_a_place_in_the_list(sources):
    assert sorted(set(sources) - set(PLACE)) == []


def test_a_module_imports_only_from_below(sources):
    assert trespasses({name: source for name, source in sources.items() if name in PLACE}) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("pages", "from kvkern.plan import Plan", ["pages -> plan"]),
        ("pages", "from kvkern import plan", ["pages -> plan"]),
        ("pages", "import kvkern.attention as a", ["pages -> attention"]),
        ("pages", "def late():\n    from kvkern.store import load", ["pages -> store"]),
        ("pages", "from . import plan", ["pages -> plan"]),
        ("pages", "from .plan import Plan", ["pages -> plan"]),
        ("kernels.state", "from .suffix import kernel", ["kernels.state -> kernels.suffix"]),
        ("kernels.state", "from ..attention import attend", ["kernels.state -> attention"]),
        ("kernels.state", "from kvkern.kernels import suffix", ["kernels.state -> kernels.suffix"]),
        ("pages", "from kvkern import attend", ["pages -> __init__"]),
        ("pages", "import kvkern", ["pages -> __init__"]),
        ("plan", "from kvkern.pages import PagePool\nimport torch", []),
        ("cpu", "from kvkern import _C", []),
    ],
)
def test_control_an_import_from_above_is_caught(name, source, found):
    assert trespasses({name: source}) == found


def test_control_a_module_outside_the_list_is_caught(sources):
    with pytest.raises(AssertionError, match="utils"):
        test_every_module_has_a_place_in_the_list({**sources, "utils": ""})


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("kernels.oracle", {"__future__", "math", "torch"}),  # it shares no code with what it judges
        ("errors", {"__future__"}),
    ],
)
def test_some_modules_stand_alone(sources, name, allowed):
    assert {other.split(".")[0] for other in imported(sources[name], name)} <= allowed


@pytest.mark.parametrize(
    ("name", "stranger"),
    [
        ("scratch", "kvkern"),  # the peer that answers from scratch, in a process that never imports kvkern
        ("scheduler", "torch"),  # it touches no tensor
        ("store", "pickle"),
        ("plan", "triton"),
        ("plain", "triton"),
    ],
)
def test_some_modules_never_import(sources, name, stranger):
    if name not in sources:
        pytest.fail(f"{name}.py is in the list but not in the package")
    assert stranger not in {other.split(".")[0] for other in imported(sources[name], name)}


def test_nothing_pickles(sources):
    for name, source in sources.items():
        assert not {other.split(".")[0] for other in imported(source, name)} & {"pickle", "dill", "shelve"}, name


def test_triton_is_imported_by_its_kernels_alone(sources):
    found = {name for name, source in sources.items() if "triton" in {n.split(".")[0] for n in imported(source, name)}}
    assert found <= NEED_TRITON


def test_the_package_works_where_triton_is_not_installed(sources):
    modules = sorted(set(sources) - NEED_TRITON - {"__init__"})
    program = f"""
        import importlib, sys
        sys.modules["triton"] = None  # import triton raises ModuleNotFoundError
        for name in {["kvkern", *(f"kvkern.{name}" for name in modules)]!r}:
            importlib.import_module(name)
        from kvkern.attention import attend
        import torch
        q, k, v = torch.randn(2, 4, 16), torch.randn(3, 2, 16), torch.randn(2, 1, 2, 16)
        assert attend(q, k, k, v, v, torch.tensor([1, 1])).shape == q.shape
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
