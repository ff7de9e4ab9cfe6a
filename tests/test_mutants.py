"""The mutants themselves: each fits the code as it is, and the script that tries them out believes no false witness."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mutants
import pytest
from mutants import MUTANTS, ROOT, Mutant

ALL = [pytest.param(mutant, id=mutant.name) for mutant in MUTANTS]
TEST = "test_oracle.py::test_it_changes_none_of_its_inputs"


@pytest.mark.parametrize("mutant", ALL)
def test_a_mutant_changes_one_place_that_is_there(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.old != mutant.new
    if mutant.file.endswith(".py"):
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")


@pytest.mark.parametrize("mutant", ALL)
def test_the_tests_of_a_mutant_are_there(mutant: Mutant) -> None:
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        # test_native collects tests of other modules by these names.
        assert f"def {name}(" in text or f'"{name.removeprefix("test_")}",' in text, test


def test_mutants_are_told_apart_by_their_names() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def change(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "kvkern/kernels/oracle.py", old, new, (TEST,))


@pytest.mark.full
def test_only_a_test_that_fails_catches_a_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    title = (ROOT / "kvkern/kernels/oracle.py").read_text().split("\n")[0]
    harmless = change("a word in a docstring", title, title + " ")
    broken = change("a module that cannot be imported", title, "1 = 1 " + title)
    assert mutants.main(["-j", "1"], [harmless, broken]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^SURVIVED  in [\d.]+ s: a word in a docstring", said, re.MULTILINE), said
    assert re.search(r"^SURVIVED  without a verdict, pytest's exit status [2-4] in", said, re.MULTILINE), said
    assert re.search(r"^0 of 2 mutants caught in", said, re.MULTILINE), said


@pytest.mark.full
def test_tests_that_fail_without_a_mutant_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    mutant = change("any", "import", "import ")._replace(tests=("test_oracle.py::test_that_is_not_there",))
    text = (ROOT / mutant.file).read_text()
    mutant = mutant._replace(old=text[:200], new=text[:200] + "\n")
    with pytest.raises(SystemExit, match="without a mutant the tests do not pass, exit status 4"):
        mutants.main(["-j", "1"], [mutant])


def test_a_mutant_that_does_not_fit_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        mutants.main([], [change("twice", "import", "imports")])
    assert caught.value.code == 2
    assert re.search(r"twice: kvkern/kernels/oracle\.py has 'import' \d+ times, not once", capsys.readouterr().err)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_neither_folder_nor_process(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, mutants.__file__, "-j", "1", "-k", MUTANTS[0].name]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    while not any(tmp_path.glob("kvkern-mutants-*/0/kvkern/_C*.so")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
