"""bench/instruction_counts.py: it finds the loops that the compiler made, and says what grew."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from kvkern.errors import UnsupportedError

LISTING = """
0000000000000000 <void kvkern::(anonymous namespace)::score_block<float __vector(16), 1, kvkern::(anonymous namespace)::Pair, 2>(int)>:
   0:\tmov    %rdi,%rax
   2:\tvmovups (%rax),%zmm1
   8:\tvdpbf16ps (%rdx){1to16},%zmm1,%zmm0
   e:\tvdpbf16ps (%rcx){1to16},%zmm1,%zmm2
  14:\tadd    $0x40,%rax
  18:\tjne    2 <score_block+0x2>
  1a:\tjne    0 <score_block>

0000000000000020 <void kvkern::(anonymous namespace)::score_block<float __vector(16), 1, kvkern::(anonymous namespace)::Pair, 1>(int)>:
  20:\tvdpbf16ps (%rdx){1to16},%zmm1,%zmm0
  26:\tjne    20 <score_block>

0000000000000030 <void kvkern::(anonymous namespace)::weigh<float __vector(8), 3, kvkern::(anonymous namespace)::Single>(int)>:
  30:\tvfmadd231ps %ymm1,%ymm2,%ymm3
  36:\tjne    30 <weigh>

0000000000000040 <void kvkern::(anonymous namespace)::weigh_seen<float __vector(8), 3, kvkern::(anonymous namespace)::Single>(int)>:
  40:\tvfmadd231ps %ymm1,%ymm2,%ymm3
  46:\tjne    40 <weigh_seen>
"""

linux = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="instructions of x86-64, objects of ELF"
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
    yield __import__("instruction_counts")
    for name in ("instruction_counts", "harness"):
        sys.modules.pop(name, None)


def test_an_inner_loop_is_counted_at_its_most_keys_and_a_pair_is_two_multiply_adds(counts):
    found = counts.main_loops(LISTING)
    assert found == {"score 1x16 bf16 pairs": counts.figure(5, 64), "weigh 3x8 fp32": counts.figure(2, 8)}


@pytest.mark.parametrize("function", ["score_block", "weigh"])
def test_a_function_that_is_not_found_is_refused(counts, function):
    with pytest.raises(UnsupportedError, match="attention_impl"):
        counts.main_loops(LISTING.replace(f"::{function}<", "::renamed<"))


def test_control_growth_is_told_and_less_than_5_percent_is_not(counts):
    before = {name: counts.figure(1000, 8000) for name in ("more", "same", "unrolled", "gone")}
    now = {"more": (1060, 8000), "same": (1040, 8000), "unrolled": (2000, 16000), "new": (1, 8)}
    lines, told = counts.compare({name: counts.figure(*pair) for name, pair in now.items()}, before)
    assert told == ["more: grew by 6.0%, from 0.1250 to 0.1325", "gone: not found any more"]
    assert [line.rpartition("(")[2] for line in lines] == ["+6.0%)", "+4.0%)", "+0.0%)", "new)"]


@linux
@pytest.mark.parametrize(("compiler", "factor", "code"), [("g++", 1.06, 1), ("g++", 1.04, 0), ("another", 1.06, 0)])
def test_check_fails_where_one_grew_but_not_for_another_compiler(
    counts, monkeypatch, capsys, tmp_path, compiler, factor, code
):
    def measured(by: str, instructions: float) -> tuple:
        return {"compiler": by, "flags": ""}, {"avx2 score": counts.figure(int(instructions), 800)}

    built, figures = measured("g++", 100)
    committed = tmp_path / "counts.json"
    committed.write_text(json.dumps({**built, "figures": figures}))
    monkeypatch.setattr(counts, "RESULT", committed)
    monkeypatch.setattr(counts, "measure", lambda emulated: measured(compiler, 100 * factor))
    monkeypatch.setattr("sys.argv", ["instruction_counts", "--check"])
    assert counts.main() == code
    said = capsys.readouterr().out
    assert ("grew by 6.0%" in said) == (factor > 1.05) and ("another build" in said) == (compiler != "g++")


@linux
@pytest.mark.parametrize("name", ["objdump", "valgrind", "g++"])
def test_a_missing_tool_is_named_with_what_to_install(counts, monkeypatch, capsys, name):
    which = counts.shutil.which
    monkeypatch.setattr(
        counts.shutil, "which", lambda asked: None if Path(asked).name == name else which(asked) or asked
    )
    monkeypatch.setattr("sys.argv", ["instruction_counts"])
    assert counts.main() == 1
    said = capsys.readouterr().err
    assert name in said and "apt-get install" in said


@linux
@pytest.mark.full
def test_callgrind_counts_the_same_as_is_committed(counts):
    built, now = counts.measure(["avx2"])
    committed = json.loads(counts.RESULT.read_text())
    if any(committed[key] != built[key] for key in built):
        pytest.skip(f"committed figures are of {committed['compiler']}")
    assert not counts.compare(now, {name: committed["figures"][name] for name in now})[1]
