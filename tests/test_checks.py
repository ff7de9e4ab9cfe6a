"""`kvkern check`: what holds is said to hold, what is broken is named, and nothing else is taken for either."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from kvkern import cli, demo_model
from kvkern.checks import run as module
from kvkern.checks.run import Check, Report, run
from kvkern.errors import DeviceError, KvkernError, RequestError

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "model": str,
    "geometry": str,
    "dtype": str,
    "device": str,
    "backend": str,
    "backend_why": str,
    "instruction_set": str,
    "threads": int,
    "versions": dict,
    "seed": int,
    "checks": list,
    "seconds": float,
    "held": bool,
}

COMMAND = "import sys; sys.argv[0] = 'kvkern'; from kvkern import cli; sys.exit(cli.main())"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def command(*words: object, cwd: Path, code: str = COMMAND, **environment: str) -> subprocess.CompletedProcess[str]:
    """`kvkern` with these words in a process of its own, in that folder."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "KVKERN"))}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, words)],
        cwd=cwd,
        env=alone | ONE_THREAD | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


# -- the whole, on the tiny model --------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose every file would break a pytest that is run there."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
    (here / "conftest.py").write_text("raise RuntimeError('the conftest.py of the folder is read')\n")
    (here / "torch.py").write_text("raise RuntimeError('the torch.py of the folder is read')\n")
    (here / "kvkern").mkdir()
    (here / "kvkern" / "__init__.py").write_text("raise RuntimeError('the kvkern of the folder is read')\n")
    return here


def test_every_check_holds_on_the_tiny_model_in_any_folder_and_leaves_nothing_there(hostile: Path) -> None:
    before = sorted(path.name for path in hostile.rglob("*"))
    temporary = hostile.parent / "temporary"
    temporary.mkdir()
    settings = {"PYTEST_ADDOPTS": "--nonsense", "PYTEST_PLUGINS": "nonsense", "TMPDIR": str(temporary)}
    # With -O the assertions would be gone, and every control with them.
    done = command("check", "--json", cwd=hostile, PYTHONOPTIMIZE="1", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert {name: type(value) for name, value in result.items()} == FIELDS
    assert result["held"] is True and result["dtype"] == "float32" and result["backend"] == "cpu"
    assert {"python", "kvkern", "torch", "transformers", "pytest"} <= result["versions"].keys()
    checks = {check["name"]: check for check in result["checks"]}
    for check in checks.values():
        assert check.keys() == {"name", "claim", "held", "seconds", "message"}
        assert check["held"] is not False and check["seconds"] > 0
        assert check["held"] or check["message"]
    assert {name for name, check in checks.items() if check["held"] is None} <= {
        "test_rounding.py::test_buckets_outside"
    }
    kinds = Counter(check["claim"].split(":")[0] for check in checks.values())
    assert kinds.keys() == {"contract", "bits", "rounding", "documents", "control"}
    assert kinds["contract"] >= 7 and kinds["bits"] >= 4 and kinds["documents"] >= 4 and kinds["control"] >= 6
    assert "one class" in checks["test_rounding.py::test_classes_hold"]["message"]
    assert f"check {len(checks):2} of {len(checks)}: documents" in done.stderr
    assert sorted(path.name for path in hostile.rglob("*")) == before
    assert list(temporary.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--backend", "torch", "--dtype", "float16"]])
def test_every_check_holds_in_half_precision_too(tmp_path: Path, options: list[str]) -> None:
    done = command("check", "--json", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec(demo_model.PACKAGE) is None, reason=f"{demo_model.PACKAGE} is not installed"
)
def test_every_check_holds_on_the_model_of_the_demo(tmp_path: Path) -> None:
    folder = demo_model.demo_model()
    done = command("check", "--model", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nheld: " in done.stdout and str(folder) in done.stdout


@pytest.mark.full
def test_python_without_assertions_checks_nothing(tmp_path: Path) -> None:
    words = ["-O", "-P", "-m", "pytest", "-p", "no:cacheprovider", "-p", "kvkern.checks.options", "--pyargs"]
    done = subprocess.run(
        [sys.executable, *words, "kvkern.checks"],
        cwd=tmp_path,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "python runs with -O" in done.stdout + done.stderr


# -- what is broken is named -------------------------------------------------------------------------------------------

BROKEN = """
    import sys
    sys.argv[0] = "kvkern"
    from kvkern.checks import run
    from kvkern import cli, demo_model
    run.PLUGINS = (*run.PLUGINS, "broken")
    sys.exit(cli.main())
"""

ONLY_KERNELS = """

    def pytest_collection_modifyitems(items):
        files = ("test_contract.py", "test_bits.py")
        items[:] = [i for i in items if i.path.name in files and "agent" not in i.name and "control" not in i.name]
"""

# Rows 32 and on of a batch come out with one bit changed: right as numbers, and other bits than alone.
FOLLOWS_THE_BATCH = """
    import torch
    from kvkern import native

    whole = native.suffix_attention

    def suffix_attention(q, *tables, **options):
        o, lse = whole(q, *tables, **options)
        o.view(torch.int32)[32:] ^= 1
        return o, lse

    native.suffix_attention = suffix_attention
"""

# The prefix counts a little less than it should, wherever the row stands.
WRONG_NUMBERS = """
    from kvkern import native

    whole = native.prefix_attention

    def prefix_attention(*tables, **options):
        state = whole(*tables, **options)
        state.m.sub_(0.01)
        return state

    native.prefix_attention = prefix_attention
"""


# The mistake of a control is none.
NO_MISTAKE = """
    from kvkern.checks import serving

    serving.fold_from_the_right = lambda backend: backend

    def pytest_collection_modifyitems(items):
        items[:] = [i for i in items if i.name == "test_control_fold"]
"""


def broken_check(tmp_path: Path, plugin: str) -> tuple[str, dict[str, str]]:
    """What `kvkern check` prints with this plugin in its pytest, and the message of each claim that did not hold."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "broken.py").write_text(plugin)
    path = f"{ROOT}{os.pathsep}{modules}"
    done = command("check", code=textwrap.dedent(BROKEN), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout, dict(re.findall(r"(?m)^(.*?)  +NOT HELD +[0-9.]+ s\n    (.*)$", done.stdout))


@pytest.mark.parametrize(
    ("broken", "claim", "message", "right"),
    [
        (
            FOLLOWS_THE_BATCH,
            "bits: a row alone and among 63 others",
            r"o\[\d+\]: \d+ of \d+ differ, first at",
            "contract",
        ),
        pytest.param(
            WRONG_NUMBERS,
            "contract: decode, 16 agents over a prefix of 700 tokens",
            r"o\[\d+\]: max error \S+, needed at most",
            "bits: a row alone and among 63 others",
            marks=pytest.mark.full,
        ),
    ],
    ids=["bits", "contract"],
)
def test_a_broken_backend_is_told_by_the_right_check_and_by_the_exit_code(
    tmp_path: Path, broken: str, claim: str, message: str, right: str
) -> None:
    stdout, told = broken_check(tmp_path, textwrap.dedent(broken) + textwrap.dedent(ONLY_KERNELS))
    assert re.match(message, told[claim]), told
    # The other kind of check looks at something else, and holds.
    assert not [other for other in told if other.startswith(right)] and f"\n{right}" in stdout
    assert stdout.splitlines()[-1].startswith(f"NOT HELD: {len(told)} of ")


def test_a_control_that_catches_nothing_did_not_hold_and_says_in_which_file(tmp_path: Path) -> None:
    _, told = broken_check(tmp_path, textwrap.dedent(NO_MISTAKE))
    assert told.keys() == {"control: a fold in another order is caught"}
    [message] = told.values()
    assert re.fullmatch(r"Failed at test_bits\.py:\d+: DID NOT RAISE.*", message)


# -- the process behind it, with a stand-in for pytest -----------------------------------------------------------------

SUBJECT = {
    "model": "m",
    "geometry": "g",
    "dtype": "float32",
    "device": "cpu",
    "backend": "cpu",
    "backend_why": "why",
    "instruction_set": "avx2",
    "threads": 1,
    "versions": {"python": "3"},
}
TWO = [
    {"name": "a", "claim": "first: it is"},
    {"name": "b", "claim": "second: so"},
    {"name": "c", "claim": "third: too"},
]
BEGIN = [{"checks": TWO}, {"subject": SUBJECT, "seed": 7}]
FIRST = [{"start": "a"}, {"end": "a", "held": True, "seconds": 1.5, "message": "found"}]
FAKE = """
    import json, os, signal, sys, time
    fd = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--kvkern-events="))
    for line in {lines!r}:
        os.write(fd, (json.dumps(line) + "\\n").encode())
    {then}
"""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """pretend(lines, then): the process tells these events, then does that."""

    def pretend(lines: list[dict], then: str = "") -> None:
        code = textwrap.dedent(FAKE).format(lines=lines, then=then)
        monkeypatch.setattr(module, "PYTEST", (sys.executable, "-c", code))

    return pretend


def said(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["check", *words])
    return code, out.getvalue(), err.getvalue()


def ends(name: str, held: bool | None, message: str = "") -> list[dict]:
    return [{"start": name}, {"end": name, "held": held, "seconds": 0.25, "message": message}]


def test_what_is_skipped_is_said_as_a_skip_and_counted_as_neither(pretend) -> None:
    pretend([*BEGIN, *FIRST, *ends("b", None, "there is no bucket"), *ends("c", True)])
    code, out, _ = said()
    assert code == 0
    assert "first: it is  held        1.5 s\n    found\n" in out
    assert "second: so    not checked: there is no bucket\n" in out
    assert "\nheld: 2 of 2 checks, 1 not checked, in " in out


def test_one_that_does_not_hold_makes_the_exit_code_1_and_shows_its_message(pretend) -> None:
    pretend([*BEGIN, *FIRST, *ends("b", False, "o[3]: 1 of 8 differ"), *ends("c", True)], then="sys.exit(1)")
    code, out, _ = said()
    assert code == 1
    assert "second: so    NOT HELD    0.2 s\n    o[3]: 1 of 8 differ\n" in out
    assert "\nNOT HELD: 1 of 3 checks, in " in out and "--seed 7)" in out
    code, out, _ = said("--json")
    assert code == 1 and json.loads(out)["held"] is False
    assert json.loads(out)["checks"][1] == {
        "name": "b",
        "claim": "second: so",
        "held": False,
        "seconds": 0.25,
        "message": "o[3]: 1 of 8 differ",
    }


def test_nothing_checked_is_not_held(pretend) -> None:
    pretend([*BEGIN, *(event for name in "abc" for event in ends(name, None, "not here"))])
    assert said()[0] == 1
    assert not Report(checks=[]).held and not Report(checks=[Check("a", "a")]).held


def test_a_check_that_takes_the_process_with_it_did_not_hold_and_the_rest_is_not_checked(pretend) -> None:
    pretend([*BEGIN, *FIRST, {"start": "b"}], then="os.kill(os.getpid(), signal.SIGSEGV)")
    code, out, _ = said("--json")
    result = json.loads(out)
    assert code == 1 and result["held"] is False
    assert [check["held"] for check in result["checks"]] == [True, False, None]
    assert {check["message"] for check in result["checks"][1:]} == {"the process was killed by signal 11"}


def test_a_process_that_ends_before_a_check_is_an_error_with_its_last_words(pretend) -> None:
    pretend([], then="print('no module named anything', file=sys.stderr); sys.exit(4)")
    with pytest.raises(KvkernError, match=r"(?s)checks: found .*status 4: no module named anything.*\n  do: "):
        run()
    pretend(BEGIN, then="sys.exit(3)")
    code, out, _ = said("--json")
    assert code == 1 and json.loads(out)["error"]["field"] == "checks"


def test_a_refusal_of_the_model_is_told_as_such(pretend) -> None:
    words = {"found": "cuda:9", "needed": "one of cpu", "do": "leave it out"}
    pretend([{"checks": TWO}, {"error": ["DeviceError", "device", words]}], then="sys.exit(1)")
    with pytest.raises(DeviceError, match="device: found cuda:9, needed one of cpu"):
        run(device="cuda:9")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_the_process_and_prints_what_held_so_far(pretend, monkeypatch, as_json: bool) -> None:
    pretend([*BEGIN, *FIRST, {"start": "b"}], then="time.sleep(600)")
    children: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    take = Report.take

    def pressed(report: Report, line: dict) -> None:
        take(report, line)
        if line.get("start") == "b":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Report, "take", pressed)
    code, out, err = said(*(["--json"] if as_json else []))
    assert code == 130 and err.endswith("interrupted\n")
    assert children[0].returncode is not None
    if as_json:
        result = json.loads(out)
        assert result["held"] is False and [check["held"] for check in result["checks"]] == [True, None, None]
        assert [check["message"] for check in result["checks"]] == ["found", "interrupted", "interrupted"]
    else:
        assert "first: it is  held        1.5 s\n" in out and "second: so    not checked: interrupted\n" in out
        assert "\nheld: 1 of 1 checks, 2 not checked, in " in out and out.endswith("; interrupted\n")


# -- what is given -----------------------------------------------------------------------------------------------------


def test_options_reach_the_process_and_a_folder_by_its_whole_path(pretend, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    told = tmp_path / "told"
    then = f"json.dump([sys.argv, dict(os.environ), os.getcwd()], open({str(told)!r}, 'w'))"
    pretend([*BEGIN, *(event for name in "abc" for event in ends(name, True))], then=then)
    code, out, _ = said(
        *("--model", "m", "--dtype", "float16", "--device", "cuda", "--backend", "torch", "--seed", "5", "--json")
    )
    assert code == 0 and json.loads(out)["model"] == "m"
    words, environment, folder = json.loads(told.read_text())
    wanted = {f"--model={tmp_path / 'm'}", "--dtype=float16", "--device=cuda", "--backend=torch"}
    assert wanted <= set(words) and words[-2:] == ["--pyargs", "kvkern.checks"]
    assert environment["KVKERN_SEED"] == "5" and "PYTHONOPTIMIZE" not in environment
    assert Path(folder) != tmp_path and not Path(folder).exists()


def test_a_name_of_no_model_is_refused_before_anything_starts(pretend) -> None:
    pretend([], then="raise AssertionError")
    with pytest.raises(RequestError, match="model: found no folder nowhere"):
        run(model="nowhere")
    code, out, err = said("--model", "nowhere", "--json")
    assert code == 1 and json.loads(out)["error"]["field"] == "model" and "RequestError: model: found" in err


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pytest" else find(name, *a))
    code, out, err = said("--json")
    assert code == 1 and json.loads(out)["error"]["field"] == "pytest"
    assert err.endswith("\n  do: pip install kvkern[test]\n")


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seed", "x"], ["--dtype", "int8"], ["--nonsense"], ["model"]])
def test_wrong_usage_is_exit_code_2(words: list[str]) -> None:
    assert said(*words)[0] == 2


@pytest.mark.parametrize("words", [["--help"], []])
def test_neither_help_nor_the_process_that_waits_imports_torch(tmp_path: Path, words: list[str]) -> None:
    code = """
        import sys
        sys.argv[0] = "kvkern"
        from kvkern import cli, demo_model
        from kvkern.checks import run
        run.PYTEST = (sys.executable, "-c", "raise SystemExit('nothing to run')")
        code = cli.main()
        assert "torch" not in sys.modules and "pytest" not in sys.modules
        sys.exit(code)
    """
    done = command("check", *words, cwd=tmp_path, code=textwrap.dedent(code))
    if words:
        assert done.returncode == 0 and "rounding classes" in done.stdout, done.stderr
    else:
        assert done.returncode == 1 and "nothing to run" in done.stderr, done.stderr
