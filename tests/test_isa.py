"""KVKERN_ISA: the instruction set that the cpu backend uses is the one that was asked for, or a refusal."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_same_bits

from kvkern import _C, cli, native
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
