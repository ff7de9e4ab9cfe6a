"""What each kernel comes to when it is compiled for a GPU that is not there: registers, spills, and its main loop.

python -m bench.compile_report                 an aligned table        --json   the same rows as JSON
python -m bench.compile_report --arch 90 ...   of these architectures  --core   the variants that make test holds
python -m bench.compile_report --write-golden tests/golden_compile.json         renew the installed Triton's column

A variant is a call of a kernel's launcher. The launch is recorded instead of made, so a row holds what that launcher would
launch: its tiles, its constants, the type and alignment of each argument. The main loop is the innermost one that holds a
tensor core instruction. Nothing here says how fast anything is.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
ARCHES = (80, 90, 100)
MMA = ("HMMA", "HGMMA", "UTCHMMA")
LOCAL = ("LDL", "STL")
SHARED = ("LDS", "STS", "LDSM", "STSM")
HEADS, ROWS = 8, 128
SWITCHES = ("TRITON_INTERPRET", "KVKERN_DEBUG", "KVKERN_PDL", "KVKERN_PREFIX")
"""Variables that would make other kernels than those of a plain launch."""

# -- SASS --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where it may go besides on to the next one."""
        if self.base not in ("BRA", "BSSY"):
            return None
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        if self.predicate:
            return False
        return self.base in ("EXIT", "RET", "BRX") or (self.base == "BRA" and "," not in self.operands)


def instructions(sass: str) -> list[Instruction]:
    """The instructions of what `cuobjdump -sass` prints for one kernel."""
    pattern = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
    return [
        Instruction(int(address, 16), (predicate or "").strip(), name, operands.strip())
        for address, predicate, name, operands in pattern.findall(sass)
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the loops, shortest first: from the target of each backward branch to that branch.

    A branch back from code that was moved out of line is no loop: its target can be passed by on the way to it.
    """
    place = {instruction.address: n for n, instruction in enumerate(code)}
    after: list[list[int]] = []
    for n, instruction in enumerate(code):
        nexts = [] if instruction.always_leaves or n + 1 == len(code) else [n + 1]
        if instruction.target in place:
            nexts.append(place[instruction.target])
        after.append(nexts)

    def reached_without(avoided: int) -> set[int]:
        seen, waiting = {avoided}, [0]
        while waiting:
            n = waiting.pop()
            if n not in seen:
                seen.add(n)
                waiting += after[n]
        return seen - {avoided}

    bodies = []
    for n, instruction in enumerate(code):
        if instruction.base == "BRA" and instruction.target in place and place[instruction.target] < n:
            first = place[instruction.target]
            if n not in reached_without(first):
                bodies.append(code[first : n + 1])
    return sorted(bodies, key=len)


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop that holds a tensor core instruction; empty where no loop does."""
    return next((body for body in loops(code) if any(i.base in MMA for i in body)), [])


def counts(code: list[Instruction]) -> dict[str, int]:
    """How often each instruction family stands in the code."""
    bases = Counter(i.base for i in code)
    found = {name: bases[name] for name in (*MMA, *LOCAL, *SHARED, "LDG", "STG", "SHFL", "BAR", "UTMALDG", "SYNCS")}
    found["EX2"] = sum(i.name.startswith("MUFU.EX2") for i in code)
    found["MUFU"] = bases["MUFU"]
    found["LDGSTS.128"] = sum(i.base == "LDGSTS" and "128" in i.name.split(".") for i in code)
    return found


def waits(code: list[Instruction], base: str) -> list[int]:
    """Operands of the waits for asynchronous work: how many groups may still be under way after each.

    base: "WARPGROUP" for warpgroup products, "DEPBAR" for copies.
    """
    return [
        int(i.operands.split(",")[1].strip(), 16)
        for i in code
        if i.base == base and "DEPBAR" in i.name and "," in i.operands
    ]


def tool(name: str, *arguments: str | Path) -> str:
    """What a tool of the Triton wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# -- layouts -----------------------------------------------------------------------------------------------------------


def fingerprint(ttgir: str) -> list[str]:
    """How sums are cut: shape and layout of each product and of each reduction. Another one means other bits."""
    named = dict(re.findall(r"^(#\w+) = (#.+)$", ttgir, re.MULTILINE))
    places = re.findall(r"\}\) : \(tensor<([^,<>]+), (#\w+)>\) ->", ttgir)
    places += re.findall(r"(?:warp_group_dot|tt\.dot)\b.*-> tensor<([^,<>]+), (#\w+)>", ttgir)
    lines = {f"{shape} {named.get(alias, alias)}" for shape, alias in places}
    return sorted(lines | {text for text in named.values() if "tensor_memory_encoding<" in text})


def warps_per_cta(prints: list[str]) -> list[list[int]]:
    """Warps along each dimension, in the layouts of a fingerprint."""
    found = {tuple(map(int, dims.split(","))) for dims in re.findall(r"warpsPerCTA = \[([\d, ]+)\]", "\n".join(prints))}
    return [list(warps) for warps in sorted(found)]


# -- launches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def recorded(arch: int | None = None) -> Iterator[list[Launch]]:
    """Launches are kept in a list and not made; `arch` is the architecture that the launchers see."""
    from triton.runtime.jit import KernelInterface

    import kvkern.kernels.tiles

    found: list[Launch] = []

    def get(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **keywords: found.append(Launch(kernel, grid, arguments, keywords))

    with mock.patch.object(KernelInterface, "__getitem__", get):
        if arch is None:
            yield found
            return
        real = kvkern.kernels.tiles.arch_of
        for module in pkgutil.iter_modules(kvkern.kernels.__path__):
            importlib.import_module(f"kvkern.kernels.{module.name}")
        users = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("kvkern.") and vars(module).get("arch_of") is real
        ]
        for module in users:
            module.arch_of = lambda device: arch  # type: ignore[attr-defined]
        try:
            yield found
        finally:
            for module in users:
                module.arch_of = real  # type: ignore[attr-defined]


TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def compiled(launch: Launch, arch: int, **changes: Any) -> Any:
    """Compile what a launch asks for, with `changes` to its keywords."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, keywords = launch.kernel, launch.keywords | changes
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    gluon = type(kernel).__name__ == "GluonJITFunction"
    for n, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in keywords:
            value = keywords[name]
        else:
            value = launch.arguments[n] if n < len(launch.arguments) else parameter.default
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if special and value.data_ptr() % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if gluon else ""
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    Source = ASTSource
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
    return triton.compile(
        Source(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )


# -- variants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A call of a launcher. `core` ones are held by make test; `changes` to the launch make a control."""

    kernel: str
    name: str
    call: Callable[[], Any]
    core: bool = False
    arches: tuple[int, ...] = ARCHES
    changes: dict[str, Any] = field(default_factory=dict)
    control: bool = False

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.name}"


def _i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _state(head_dim: int, G: int) -> Any:
    from kvkern.plain import State

    shape = (4, HEADS, ROWS * G)
    return State(torch.zeros(shape), torch.zeros(shape), torch.zeros((*shape, head_dim)))


def _append(dtype: torch.dtype, head_dim: int, G: int) -> Any:
    from kvkern.kernels.append import append

    q = torch.zeros((ROWS, HEADS * G, head_dim), dtype=dtype)
    k = torch.zeros((ROWS, HEADS, head_dim), dtype=dtype)
    pages = torch.zeros((8, HEADS, 16, head_dim), dtype=dtype)
    return append(q, k, k, pages, pages, _i32(ROWS, 64), _i32(ROWS), _i32(ROWS), _i32(ROWS))


def _prefix(dtype: torch.dtype, head_dim: int, G: int, rows: int = ROWS) -> Any:
    from kvkern.kernels.prefix import prefix_attention

    q = torch.zeros((HEADS, rows, G, head_dim), dtype=dtype)
    table = torch.zeros((1, 4), dtype=torch.int64)
    return prefix_attention(q, table, _i32(16, 6), _i32(1, 4), num_kv_heads=HEADS, layer=0, sm_scale=0.1)


def _suffix(
    dtype: torch.dtype, head_dim: int, G: int, workers: int = 1, launch: Callable[..., Any] | None = None
) -> Any:
    from kvkern.kernels.suffix import suffix_attention

    q = torch.zeros((HEADS, ROWS, G, head_dim), dtype=dtype)
    pages = torch.zeros((8, HEADS, 16, head_dim), dtype=dtype)
    table, lens = _i32(ROWS, 256), _i32(ROWS)
    return (launch or suffix_attention)(
        q,
        pages,
        pages,
        table,
        lens,
        lens,
        lens,
        _i32(ROWS, 4),
        _i32(1, 4),
        _state(head_dim, G),
        sm_scale=0.1,
        workers=workers,
    )


def table_in_the_loop() -> Any:
    """K2 with the page ids loaded in the tile that uses them. Made from its source, so that it differs in nothing else."""
    source = (ROOT / "kvkern" / "kernels" / "suffix.py").read_text(encoding="utf-8")
    carried = "            page = page_ids(table_ptr, first + BLOCK_N, longest, PAGE, BLOCK_N)\n"
    begins = "            keys = first + tl.arange(0, BLOCK_N)\n"
    if source.count(carried) != 1 or source.count(begins) != 1:
        raise RuntimeError("suffix.py: its page ids are not carried as this control expects")
    source = source.replace(carried, "").replace(begins, carried.replace("first + BLOCK_N", "first") + begins)
    # Triton asks for the file of a kernel when it compiles, so it stays until this process ends.
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "suffix_table_in_the_loop.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("suffix_table_in_the_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return _suffix(torch.bfloat16, 128, 4, launch=module.suffix_attention)


def _merge(head_dim: int, G: int) -> Any:
    from kvkern.kernels.merge import merge

    return merge(_state(head_dim, G), _state(head_dim, G))


def variants() -> list[Variant]:
    """What the launchers can launch, where it makes other code; controls last."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    part = functools.partial
    made = [Variant("append", "bf16 D128 G4", part(_append, bf16, 128, 4), core=True)]
    for dtype, name, head_dim, G, core in (
        (bf16, "bf16", 128, 4, True),
        (fp16, "fp16", 128, 4, False),
        (bf16, "bf16", 64, 4, False),
        (bf16, "bf16", 80, 4, False),
        (bf16, "bf16", 128, 16, False),
        (fp32, "fp32", 128, 4, False),
    ):
        shape = f"{name} D{head_dim} G{G}"
        made.append(Variant("prefix", shape, part(_prefix, dtype, head_dim, G), core))
        made.append(Variant("suffix", shape, part(_suffix, dtype, head_dim, G), core))
    # The form for a step of few rows, where there is one.
    made.append(Variant("prefix", "bf16 D128 G4 small", part(_prefix, bf16, 128, 4, 16), True, (90,)))
    made.append(Variant("suffix", "bf16 D128 G4 workers", part(_suffix, bf16, 128, 4, 4)))
    made.append(Variant("merge", "fp32 D128", part(_merge, 128, 4), core=True))

    prefix, suffix, merge = part(_prefix, bf16, 128, 4), part(_suffix, bf16, 128, 4), part(_merge, 128, 4)
    made += [
        Variant("prefix", "maxnreg=128", prefix, True, (90,), {"maxnreg": 128}, True),
        Variant("prefix", "BLOCK_N=64", prefix, True, (90,), {"BLOCK_N": 64}, True),
        Variant("suffix", "table in the loop", table_in_the_loop, True, (80,), {}, True),
        Variant("suffix", "maxnreg=64", suffix, True, (80,), {"maxnreg": 64}, True),
        Variant("merge", "enable_fp_fusion", merge, True, (80,), {"enable_fp_fusion": True}, True),
    ]
    return made


# -- rows --------------------------------------------------------------------------------------------------------------


def row(variant: Variant, arch: int) -> dict[str, Any]:
    """Compile one variant, and read the binary back."""
    import triton

    with recorded(arch) as found:
        variant.call()
    (launch,) = found
    binary = compiled(launch, arch, **variant.changes)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"no resource usage in: {usage}")
    code = instructions(sass)
    loop = main_loop(code)
    everywhere = counts(code)
    prints = fingerprint(binary.asm["ttgir"])
    ptx = binary.asm["ptx"]
    keywords = launch.keywords | variant.changes
    return {
        "kernel": variant.kernel,
        "variant": variant.name,
        "control": variant.control,
        "arch": arch,
        "triton": triton.__version__,
        "function": launch.kernel.__name__,
        "tile": {
            name: keywords[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages") if name in keywords
        },
        "head_dim": keywords.get("HEAD_DIM"),
        "registers": int(numbers[1]),
        "stack_bytes": int(numbers[2]),
        "spills": everywhere["LDL"] + everywhere["STL"],
        "shared_bytes": binary.metadata.shared,
        "tensor_memory": getattr(binary.metadata, "tmem_size", None) or 0,
        "instructions": len(code),
        "counts": everywhere,
        "instructions_per_tile": len(loop),
        "loop": counts(loop),
        "product_waits": waits(loop, "WARPGROUP"),
        "copy_waits": waits(loop, "DEPBAR"),
        "products": dict(Counter(_product(i) for i in loop if i.base in MMA)),
        "warps_per_cta": warps_per_cta(prints),
        "fingerprint": prints,
        "ptx": {
            "rounded": len(re.findall(r"\b(?:mul|add|sub)\.rn\.f32\b", ptx)),
            "free": len(re.findall(r"\b(?:mul|add|sub)\.f32\b", ptx)),
            "fused": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        },
    }


def tried(variant: Variant, arch: int) -> dict[str, Any]:
    """The row, or in its place why there is none."""
    try:
        return row(variant, arch)
    except Exception as error:
        cause = error.__cause__ or error
        why = f"{type(error).__name__}: {error}\n{cause}"
        return {
            "kernel": variant.kernel,
            "variant": variant.name,
            "control": variant.control,
            "arch": arch,
            "error": why,
        }


def _product(instruction: Instruction) -> str:
    """A tensor core instruction with what decides its cost: its name, and whether A too comes from shared memory."""
    shared = re.match(r"\w+, gdesc", instruction.operands) is not None
    return f"{instruction.name}{' A shared' if shared else ''}"


def rows_of(arch: int, core: bool, controls: bool = False) -> list[dict[str, Any]]:
    """Rows of one architecture, made by a child without TRITON_INTERPRET: Triton reads that when it decorates."""
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "-m", "bench.compile_report", "--child", str(arch)]
    command += ["--core"] * core + ["--controls"] * controls
    with tempfile.TemporaryDirectory() as cache:
        child = subprocess.run(
            command, env=env | {"TRITON_CACHE_DIR": cache}, cwd=ROOT, capture_output=True, text=True, timeout=900
        )
    if child.returncode != 0:
        raise RuntimeError(f"sm_{arch} does not compile:\n{child.stderr}")
    rows: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return rows


def key(found: dict[str, Any]) -> str:
    """Name of a row in the golden table."""
    return f"{found['kernel']} {found['variant']} sm_{found['arch']}"


GOLDEN = (
    "registers",
    "stack_bytes",
    "spills",
    "shared_bytes",
    "tensor_memory",
    "instructions",
    "instructions_per_tile",
)


def golden(found: dict[str, Any]) -> dict[str, Any]:
    """What the golden table keeps of a row."""
    kept = {name: found[name] for name in GOLDEN}
    kept["loop"] = {name: found["loop"][name] for name in ("LDL", "STL", "LDS")}
    return kept | {"warps_per_cta": found["warps_per_cta"], "fingerprint": found["fingerprint"]}


def write_golden(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the column of the Triton that made the rows; other columns stay."""
    for found in rows:
        if "error" in found:
            print(f"{path}: without {key(found)}, which does not compile", file=sys.stderr)
    rows = [found for found in rows if "error" not in found]
    table = json.loads(path.read_text()) if path.exists() else {}
    for version in {found["triton"] for found in rows}:
        table[version] = {
            key(found): golden(found) for found in rows if found["triton"] == version and not found["control"]
        }
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def shown(found: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in found:
        return f"{found['kernel']:7s} {found['variant']:22s} sm_{found['arch']:<3d} does not compile: {found['error']}"
    loop = found["loop"]
    products = "  ".join(f"{count} {name}" for name, count in found["products"].items()) or "-"
    return (
        f"{found['kernel']:7s} {found['variant']:22s} sm_{found['arch']:<3d} {found['triton']:6s} "
        f"{found['registers']:4d} {found['stack_bytes']:5d} {found['spills']:5d} {found['shared_bytes']:7d} "
        f"{found['tensor_memory']:4d} {found['instructions_per_tile']:5d} {loop['EX2']:4d} {loop['SHFL']:4d} "
        f"{loop['LDS']:3d} {loop['STS']:3d} {loop['LDL'] + loop['STL']:4d} {loop['LDGSTS.128']:5d} {loop['UTMALDG']:3d} "
        f"{found['product_waits']!s:>9s} {found['copy_waits']!s:>9s} {found['warps_per_cta']!s:14s} {products}"
    )


TITLE = (
    f"{'kernel':7s} {'variant':22s} {'arch':6s} {'triton':6s} {'regs':>4s} {'stack':>5s} {'spill':>5s} {'shared':>7s} "
    f"{'tmem':>4s} {'loop':>5s} {'ex2':>4s} {'shfl':>4s} {'lds':>3s} {'sts':>3s} {'loc':>4s} {'cp128':>5s} {'tma':>3s} "
    f"{'mma waits':>9s} {'cp waits':>9s} {'warps':14s} products in the loop"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHES, help="an architecture; all by default")
    parser.add_argument("--core", action="store_true", help="the variants that make test holds")
    parser.add_argument("--controls", action="store_true", help="also those that a gate has to catch")
    parser.add_argument("--write-golden", type=Path, metavar="FILE", help="renew the installed Triton's column")
    parser.add_argument("--child", type=int, choices=ARCHES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        # As its command line does, kvkern then leaves transformers out, which takes longer than a kernel.
        sys.argv[0] = "kvkern"
        chosen = [
            variant
            for variant in variants()
            if options.child in variant.arches
            and (variant.core or not options.core)
            and (options.controls or not variant.control)
        ]
        print(json.dumps([tried(variant, options.child) for variant in chosen]))
        return 0
    rows: list[dict[str, Any]] = []
    if not options.json:
        print(TITLE)
    for arch in options.arch or ARCHES:
        found = rows_of(arch, options.core, options.controls)
        rows += found
        if not options.json:
            print("\n".join(map(shown, found)), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    if options.write_golden is not None:
        if options.core or options.arch:
            parser.error("--write-golden writes a whole column\n  do: leave out --core and --arch")
        write_golden(options.write_golden, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
