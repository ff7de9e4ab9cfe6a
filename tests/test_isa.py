"""Instruction sets: KVKERN_ISA gets what it asks for or a refusal, and each object holds what it is compiled for."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits

from kvkern import _C, backends, cli, native
from kvkern.errors import BackendError
from kvkern.plain import State

INSTRUCTION_SETS = _C.instruction_sets()


def states() -> tuple[State, State]:
    draw = torch.Generator().manual_seed(3)
    a, b = (State(*(torch.rand(shape, generator=draw) for shape in ((257,), (257,), (257, 64)))) for _ in range(2))
    return a, b


@pytest.fixture
def asked_for(monkeypatch):
    """The instruction sets that csrc is asked for, in order."""
    names: list[str] = []
    fold = _C.fold

    def listening(*sides, instruction_set, **sizes):
        names.append(instruction_set)
        fold(*sides, instruction_set=instruction_set, **sizes)

    monkeypatch.setattr(_C, "fold", listening)
    return names


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_forced_one_is_in_use_and_an_argument_goes_before_it(name, monkeypatch, asked_for):
    monkeypatch.setenv("KVKERN_ISA", name)
    assert native.instruction_set() == name
    a, b = states()
    forced = native.merge(a, b)
    assert_same_bits(forced.acc, native.merge(a, b, instruction_set=name).acc, "acc")
    native.merge(a, b, instruction_set="portable")
    assert asked_for == [name, name, "portable"]


@pytest.mark.parametrize("value", [None, ""])
def test_control_where_none_is_forced_it_is_the_best(value, monkeypatch, asked_for):
    monkeypatch.delenv("KVKERN_ISA", raising=False)
    if value is not None:
        monkeypatch.setenv("KVKERN_ISA", value)
    assert native.instruction_set() == INSTRUCTION_SETS[0] and native.forced_instruction_set() is None
    native.merge(*states())
    assert asked_for == INSTRUCTION_SETS[:1]


@pytest.mark.parametrize("name", ["mmx", "AVX2", " portable", "portable,avx2", "avx512"])
def test_one_that_is_unknown_or_that_the_cpu_lacks_is_refused(name, monkeypatch, asked_for):
    monkeypatch.setattr(_C, "instruction_sets", lambda: ["avx2", "portable"])
    monkeypatch.setenv("KVKERN_ISA", name)
    for call in (native.instruction_set, lambda: native.merge(*states())):
        with pytest.raises(BackendError, match="runs here: avx2, portable") as refused:
            call()
        assert (refused.value.field, refused.value.found) == ("KVKERN_ISA", name) and "unset it" in refused.value.do
    assert not asked_for


def test_the_choice_of_the_cpu_backend_is_refused_and_control_another_backend_is_not(monkeypatch):
    monkeypatch.delenv("KVKERN_ISA", raising=False)
    assert backends.choose(None, "cpu").name == "cpu"  # in the cache from here on
    monkeypatch.setenv("KVKERN_ISA", "mmx")
    for name in (None, "cpu"):
        with pytest.raises(BackendError, match="runs here") as refused:
            backends.choose(name, "cpu")
        assert refused.value.field == "KVKERN_ISA"
    assert backends.choose("torch", "cpu").name == "torch"


def test_env_says_which_is_in_use_and_whether_it_was_forced(monkeypatch, capsys):
    def env(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["kvkern", "env", "--device", "cpu", *words])
        code = cli.main()
        return code, capsys.readouterr().out

    monkeypatch.delenv("KVKERN_ISA", raising=False)
    found = json.loads(env("--json")[1])
    assert (found["instruction_set"], found["instruction_set_forced"]) == (INSTRUCTION_SETS[0], False)
    assert "forced" not in env()[1]
    monkeypatch.setenv("KVKERN_ISA", "portable")
    found = json.loads(env("--json")[1])
    assert (found["instruction_set"], found["instruction_set_forced"]) == ("portable", True)
    assert "in C++ for portable, forced by KVKERN_ISA" in env()[1]
    monkeypatch.setenv("KVKERN_ISA", "mmx")
    code, said = env("--json")
    assert code == 1 and json.loads(said)["error"]["field"] == "KVKERN_ISA"


# -- the objects of csrc -----------------------------------------------------------------------------------------------

OBJECTS = Path(__file__).resolve().parent.parent / "build" / f"ninja{sysconfig.get_config_var('EXT_SUFFIX')}"
# What an inner loop of products has to consist of, and what may stand nowhere in the object.
PRODUCTS = {
    "portable": r"mulps .*xmm",
    "avx2": r"vfn?madd\d+ps .*ymm",
    "avx512": r"vfn?madd\d+ps .*zmm",
    "avx512bf16": r"vdpbf16ps .*zmm",
}
FOREIGN = {"portable": r"\t *v|[yz]mm", "avx2": "zmm", "avx512": "bf16", "avx512bf16": "(?!)"}
x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="instructions of x86-64, objects of ELF"
)


def binutils(*words: str | Path) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


@cache
def disassembled(isa: str) -> str:
    return binutils("objdump", "-d", "--no-show-raw-insn", OBJECTS / f"isa_{isa}.o")


@cache
def inner_loops(isa: str) -> list[list[str]]:
    """The instructions from a jump's target to the jump back to it, where no other such loop lies between."""
    loops, addresses, lines, newest = [], [], [], -1
    for line in disassembled(isa).splitlines():
        if line.endswith(">:"):
            addresses, lines, newest = [], [], -1
        found = re.match(r" *([0-9a-f]+):\t(.*)", line)
        if not found:
            continue
        addresses.append(int(found[1], 16))
        lines.append(found[2])
        jump = re.match(r"j\w+ +([0-9a-f]+) ", found[2])
        if jump and int(jump[1], 16) in addresses:
            begin = addresses.index(int(jump[1], 16))
            if begin > newest:
                loops.append(lines[begin:])
                newest = begin
    return loops


def made_for(isa: str, its_object: str) -> bool:
    """Whether an inner loop of the object has 8 products or more as this instruction set has them, and no foreign ones."""
    most = max(sum(bool(re.match(PRODUCTS[isa], line)) for line in loop) for loop in inner_loops(its_object))
    return most >= 8 and not re.search(FOREIGN[isa], disassembled(its_object))


@x86
@pytest.mark.parametrize("isa", PRODUCTS)
def test_an_object_has_its_instructions_in_its_inner_loops_and_control_no_other_object_has(isa):
    assert [other for other in PRODUCTS if made_for(isa, other)] == [isa]


def weak(path: Path) -> list[str]:
    return [line for line in binutils("nm", path).splitlines() if re.search(r" [WwVvu] ", line)]


@x86
@pytest.mark.parametrize("isa", PRODUCTS)
def test_nothing_compiled_for_one_instruction_set_can_be_linked_into_code_of_another(isa):
    assert not weak(OBJECTS / f"isa_{isa}.o")


@x86
def test_control_an_inline_function_of_the_standard_library_is_weak():
    assert weak(OBJECTS / "dispatch.o")
