"""bench/: what its files hold, that they are taken up again, and that a wrong result has no time. No time is asserted."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import kvkern
from kvkern import _C, native, qwen3
from kvkern.kernels.oracle import attend_fp64
from kvkern.linear import RoundingClass

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = ("harness", "peers", "bench_layer", "bench_engine", "bench_linear", "plot", "claims", "report", "fma_peak")
SHAPE = ["--tiny", "--heads", "4", "2", "64", "--dtype", "bfloat16", "--samples", "3", "--device", "cpu"]
ENGINE = ["--tiny", "--samples", "3", "--device", "cpu"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as `python bench/<script>` finds them, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    with torch.random.fork_rng():
        yield {name: __import__(name) for name in OWN}
    for name in OWN:
        del sys.modules[name]


class Ran:
    """One run of a script's main, and what its file then holds."""

    def __init__(self, module: ModuleType, out: Path, *argv: str) -> None:
        held, sys.argv = sys.argv, [module.__name__, *argv, "--out", str(out)]
        self.refused: BaseException | None = None
        try:
            module.main()
        except SystemExit as error:
            self.refused = error
        finally:
            sys.argv = held
        path = out / f"{module.__name__.removeprefix('bench_')}.json"
        self.text = path.read_text() if path.exists() else None
        self.file: dict[str, Any] = json.loads(self.text) if self.text is not None else {}
        self.results: list[dict[str, Any]] = self.file.get("results", [])
        self.failed: list[dict[str, Any]] = self.file.get("failed", [])


def wrong(*args: Any, **options: Any) -> torch.Tensor:
    return RIGHT(*args, **options) * 1.5


RIGHT: Any = kvkern.shared_prefix_attention


# -- one layer ---------------------------------------------------------------------------------------------------------


def test_a_cell_keeps_every_sample_and_its_columns_follow_from_them(scripts: Any, tmp_path: Path) -> None:
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--kernels")
    (result,) = ran.results
    assert {"device", "cpu", "versions", "commit", "date"} <= ran.file["machine"].keys() and not ran.failed
    timed = {"kvkern", "K0", "K1", "K2", "gemm", "expanded_sdpa", "flash_rows", "torch_backend"}
    assert {name: len(samples) for name, samples in result["seconds"].items()} == dict.fromkeys(timed, 3)
    for_cuda = {"cudnn_rows", "flex_rows", "flashinfer_cascade", "flashinfer_cascade_fa2", "flashinfer_decode"}
    assert result["reasons"] == dict.fromkeys(for_cuda, "for CUDA alone")

    told = {name: result[name] for name in ("backend", "geometry", "dtype", "agents", "prefix", "suffix")}
    assert list(told.values()) == ["cpu", "4/2x64", "bfloat16", 3, 100, 20]
    assert result["flop"] == 4 * 3 * 4 * 64 * 120 and result["bytes"] == 2 * 2 * 64 * 2 * (100 + 3 * 20)
    medians = {name: statistics.median(samples) for name, samples in result["seconds"].items()}
    ours = medians.pop("kvkern")
    assert result["ms"] == ours * 1e3
    assert {name: result[f"ratio_{name}"] for name in medians} == {name: m / ours for name, m in medians.items()}
    assert result["gemm_share"] == pytest.approx(1e9 * result["gflops"] / result["roofs"]["gemm_flop_per_s"])
    assert result["copy_share"] == pytest.approx(1e9 * result["gbs"] / result["roofs"]["copy_bytes_per_s"])


def test_a_cell_that_the_file_holds_is_not_run_again(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert len(first.results) == 1 and capsys.readouterr().out.startswith("layer ")
    monkeypatch.setattr(kvkern, "shared_prefix_attention", wrong)  # nothing is there to notice it
    again = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert again.refused is None and again.text == first.text and capsys.readouterr().out == ""
    other = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers", "--backend", "torch")
    assert isinstance(other.refused, SystemExit) and other.text == first.text


def test_control_a_wrong_result_has_no_time(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvkern, "shared_prefix_attention", wrong)
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE)
    assert "wrong result" in str(ran.refused) and ran.text is None


def test_a_cell_that_failed_is_told_and_run_again(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(kvkern, "shared_prefix_attention", fails)
        failed = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert failed.results == [] and [cell["reason"] for cell in failed.failed] == ["OutOfMemoryError: no room"]
    again = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert again.failed == [] and [result["shape"] for result in again.results] == [failed.failed[0]["shape"]]


class Peer:
    """One by a function of the case."""

    def __init__(self, name: str, run: Any) -> None:
        self.name, self.run = name, run

    def available(self, case: Any) -> str | None:
        return None

    def prepare(self, case: Any) -> Any:
        return lambda: self.run(case)


def test_a_peer_that_fails_or_is_wrong_is_a_reason_and_no_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(case: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    def large(case: Any) -> torch.Tensor:
        case.room(1 << 60)
        return case.kvkern()

    broken = {
        "fails": fails,
        "wrong": lambda case: case.kvkern() * 1.5,
        "nan": lambda case: torch.full_like(case.q, float("nan")),
        "large": large,
        "odd": lambda case: {}["plan"],
        "right": lambda case: case.kvkern(),
    }
    monkeypatch.setattr(scripts["peers"], "PEERS", [Peer(name, run) for name, run in broken.items()])
    (result,) = Ran(scripts["bench_layer"], tmp_path, *SHAPE).results
    assert result["seconds"].keys() == {"kvkern", "gemm", "right"}
    reasons = result["reasons"]
    assert reasons.keys() == {"fails", "wrong", "nan", "large", "odd"}
    assert reasons["fails"] == "RuntimeError: no kernel" and reasons["odd"] == "KeyError: 'plan'"
    assert all(reasons[name].startswith("WrongResult: wrong result") for name in ("wrong", "nan"))
    assert reasons["large"].startswith("MemoryError: 1073741824.0 GiB needed")


# -- entries that break the device -------------------------------------------------------------------------------------


class Device:
    """A device that, once broken, raises at every synchronization, as CUDA does after an error of a kernel."""

    def __init__(self, scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.why: str | None = None
        self.told = 1 << 30
        # What takes the time of a cell as small as these.
        monkeypatch.setattr(scripts["bench_layer"], "fma_peak", lambda measured_in: None)
        monkeypatch.setattr(scripts["bench_layer"], "gc", SimpleNamespace(collect=lambda: 0))
        monkeypatch.setattr(scripts["harness"].Bench, "synchronize", lambda bench: self.synchronize())
        monkeypatch.setattr(
            scripts["peers"],
            "PEERS",
            [Peer(name, getattr(self, name)) for name in ("breaks", "late", "passes", "fine")],
        )
        self.bad = {"breaks"}

    def synchronize(self) -> None:
        if self.why is not None and self.told:
            self.told -= 1
            raise torch.AcceleratorError(self.why)

    def fine(self, case: Any) -> torch.Tensor:
        o: torch.Tensor = case.kvkern()
        return o

    def breaks(self, case: Any) -> torch.Tensor:
        if "breaks" in self.bad:
            self.why = "CUDA error: operation not supported on global/shared address space"
            raise torch.AcceleratorError(self.why)
        return self.fine(case)

    def late(self, case: Any) -> torch.Tensor:
        """Right, and then broken: a kernel's error shows when the device is next waited for."""
        self.why = "CUDA error: an illegal memory access" if "late" in self.bad else None
        return self.fine(case)

    def passes(self, case: Any) -> torch.Tensor:
        if "passes" in self.bad:
            self.why, self.told = "CUDA error: invalid argument", 1
            raise torch.AcceleratorError(self.why)
        return self.fine(case)

    def run(self, scripts: Any, out: Path, *argv: str) -> Ran:
        """A process of its own, hence on a whole device."""
        self.why = None
        return Ran(scripts["bench_layer"], out, *SHAPE, *argv)


@pytest.fixture
def device(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(scripts, monkeypatch)


ENTRIES = {"kvkern", "gemm", "breaks", "late", "passes", "fine"}


@pytest.mark.parametrize(("entry", "why"), [("breaks", "address space"), ("late", "illegal memory access")])
def test_an_entry_that_breaks_the_device_ends_the_script_and_is_left_out_of_the_next(
    scripts: Any, tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str], entry: str, why: str
) -> None:
    device.bad = {entry}
    first = device.run(scripts, tmp_path)
    assert isinstance(first.refused, scripts["harness"].Crashed) and first.refused.code == 75
    (crash,) = first.file["crashed"]
    assert (crash["entry"], crash["shape"]["B"]) == (entry, 3) and why in crash["reason"]
    assert not first.results and not first.failed and [path.name for path in tmp_path.iterdir()] == ["layer.json"]
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "broke the device" in line]
    assert f"B=3 P=100 S=20 heads=[4, 2, 64] dtype=bfloat16 backend=None isa={crash['shape']['isa']} | {entry} " in told
    assert told.endswith("run again: that goes on without it")

    again = device.run(scripts, tmp_path)
    (result,) = again.results
    assert again.refused is None and again.file["crashed"] == [crash]
    assert result["seconds"].keys() == ENTRIES - {entry} and why in result["reasons"][entry]


def test_control_an_error_that_passes_is_only_a_reason(scripts: Any, tmp_path: Path, device: Device) -> None:
    device.bad = {"passes"}
    ran = device.run(scripts, tmp_path)
    (result,) = ran.results
    assert ran.refused is None and "crashed" not in ran.file
    assert result["seconds"].keys() == ENTRIES - {"passes"} and "invalid argument" in result["reasons"]["passes"]


def test_an_entry_that_crashed_in_two_cells_is_left_out_in_all(scripts: Any, tmp_path: Path, device: Device) -> None:
    cells = [("--cell", str(b), "40", "0") for b in (1, 2, 3)]
    for cell in cells[:2]:
        for code in (75, None):  # crashed in one cell, it is tried in another
            ran = device.run(scripts, tmp_path, *cell)
            assert getattr(ran.refused, "code", None) == code
    last = device.run(scripts, tmp_path, *cells[2])
    assert last.refused is None and len(last.results) == 3 and len(last.file["crashed"]) == 2
    assert "broke the device in 2 cells" in last.results[2]["reasons"]["breaks"]


def test_a_crash_of_kvkern_fails_its_cell_and_the_others_go_on(
    scripts: Any, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_on_three(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if q.shape[0] >= 3:
            device.bad = {"breaks"}
            device.breaks(None)
        o: torch.Tensor = RIGHT(q, *args, **options)
        return o

    device.bad = set()
    monkeypatch.setattr(scripts["bench_layer"], "TINY", [(3, 40, 20), (4, 40, 20), (2, 40, 20)])
    monkeypatch.setattr(kvkern, "shared_prefix_attention", breaks_on_three)
    for crashes in (1, 2):
        ran = device.run(scripts, tmp_path)
        assert getattr(ran.refused, "code", None) == 75 and not ran.results
        assert [cell["shape"]["B"] for cell in ran.failed] == [3, 4][:crashes]
    device.bad = set()
    ran = device.run(scripts, tmp_path)
    assert ran.refused is None and [result["agents"] for result in ran.results] == [2]
    assert all("kvkern broke the device: AcceleratorError" in cell["reason"] for cell in ran.failed)
    assert [cell["shape"]["B"] for cell in ran.failed] == [3, 4] and not ran.file["not_begun"]


def test_a_crash_outside_of_all_entries_fails_its_cell(
    scripts: Any, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scripts["peers"].Case, "make", lambda *args, **options: device.breaks(None))
        first = device.run(scripts, tmp_path)
    assert getattr(first.refused, "code", None) == 75 and first.file["crashed"][0]["entry"] == "case"
    again = device.run(scripts, tmp_path)
    assert again.refused is None and not again.results and again.failed[0]["reason"].startswith("Broken: case broke")


def test_what_was_tried_when_the_process_ended_is_not_tried_again(
    scripts: Any, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.bad, trying, held = set(), tmp_path / "layer.trying", []
    names = ("fine", "breaks")

    def notes_it(case: Any) -> torch.Tensor:
        if len(held) < len(names):  # in the turns after, nothing is there
            held.append(trying.read_text())
        return device.fine(case)

    notes = [Peer(name, notes_it) for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(scripts["peers"], "PEERS", notes)
        first = device.run(scripts, tmp_path)
    assert len(first.results) == 1 and not trying.exists()
    assert [json.loads(text)["entry"] for text in held] == list(names)
    for text in (held[1], '{"sha'):  # the second: ended while it was written
        (tmp_path / "layer.json").unlink()
        trying.write_text(text)
        again = device.run(scripts, tmp_path)
        (result,) = again.results
        assert again.refused is None and not trying.exists()
        whole = text != held[1]
        assert result["seconds"].keys() == (ENTRIES if whole else ENTRIES - {"breaks"})
        assert whole or "the process ended" in again.file["crashed"][0]["reason"]


def test_a_kernel_that_breaks_the_device_takes_those_with_it_that_need_it(
    scripts: Any, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, whole = scripts["bench_layer"], scripts["bench_layer"].kernels
    monkeypatch.setattr(layer, "kernels", lambda case: whole(case) | {"K1": lambda: device.breaks(case)})
    monkeypatch.setattr(scripts["peers"], "PEERS", [])
    first = device.run(scripts, tmp_path, "--kernels")
    assert getattr(first.refused, "code", None) == 75 and first.file["crashed"][0]["entry"] == "K1"
    (result,) = device.run(scripts, tmp_path, "--kernels").results
    assert result["seconds"].keys() == {"kvkern", "K0", "gemm"} and "k1_ms" not in result
    assert result["reasons"]["K2"] == "it needs what K1 leaves"


def test_on_cuda_a_crash_in_a_turn_is_blamed_on_the_entry_of_the_turn(scripts: Any) -> None:
    layer = scripts["bench_layer"]

    class Clock:
        options = argparse.Namespace(cell_seconds=30.0, samples=4)

        def once(self, run: Any) -> float:
            run()
            return 0.1

    def breaks() -> None:
        raise torch.AcceleratorError("CUDA error")

    found = layer.Entries({"kvkern": lambda: None, "K1": breaks, "gemm": lambda: None})
    with pytest.raises(torch.AcceleratorError):
        layer.turns(Clock(), found, lambda: None, time.monotonic())
    assert found.now == "K1"


PROCESS = """
import os, runpy, signal, sys
sys.path.insert(0, {bench!r})
import harness, peers, torch

class Peer(peers.ExpandedSdpa):
    def __init__(self, name, run):
        self.name, self.prepare = name, lambda case: run

whole = True
def breaks():
    global whole
    whole = False
    raise torch.AcceleratorError("CUDA error")
def synchronize(bench):
    if not whole:
        raise torch.AcceleratorError("CUDA error")
harness.Bench.synchronize = synchronize
peers.PEERS[:] = [Peer("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV)), Peer("breaks", breaks)]
runpy.run_path({bench!r} + "/bench_layer.py", run_name="__main__")
"""


@pytest.mark.full
def test_a_process_that_dies_or_breaks_its_device_is_followed_by_one_that_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS.format(bench=str(BENCH)), *SHAPE, "--out", str(tmp_path)]
    codes = [subprocess.run(command, capture_output=True, check=False).returncode for _ in range(3)]
    assert codes == [-signal.SIGSEGV, 75, 0]
    (result,) = json.loads((tmp_path / "layer.json").read_text())["results"]
    assert result["seconds"].keys() == {"kvkern", "gemm"} and result["reasons"].keys() == {"dies", "breaks"}


def test_the_commit_that_a_caller_names_goes_before_that_of_a_checkout(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = scripts["harness"]
    monkeypatch.setattr(harness, "_first_line", lambda *command: "ours" if "rev-parse" in command else None)
    monkeypatch.setenv("KVKERN_COMMIT", "named")
    assert harness.machine(torch.device("cpu"))["commit"] == "named"
    monkeypatch.delenv("KVKERN_COMMIT")
    assert harness.machine(torch.device("cpu"))["commit"] == "ours"


def test_a_file_of_another_machine_is_not_taken_up(scripts: Any, tmp_path: Path) -> None:
    first = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    moved = first.file | {"machine": first.file["machine"] | {"cpu": "another"}}
    (tmp_path / "layer.json").write_text(json.dumps(moved))
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert "cpu: found another" in str(ran.refused) and ran.file == moved


@pytest.mark.parametrize("script", ["bench_layer", "bench_engine"])
def test_no_cell_begins_after_the_seconds(scripts: Any, tmp_path: Path, script: str) -> None:
    ran = Ran(scripts[script], tmp_path, "--tiny", "--device", "cpu", "--samples", "3", "--seconds", "-1")
    assert ran.refused is None and ran.text is None


def test_every_entry_of_a_quick_cell_fits_a_case_of_many_pages(scripts: Any) -> None:
    """Peers on a prefix of no whole page, a suffix of several pages, and G = 1: each is right on every agent."""
    peers, layer = scripts["peers"], scripts["bench_layer"]
    for heads, dtype in (((6, 2, 64), torch.float32), ((2, 2, 64), torch.bfloat16)):
        geometry = kvkern.Geometry(1, *heads, dtype)
        case = peers.Case.make(geometry, 5, 77, 35, device=torch.device("cpu"))
        layer.check(case, case.kvkern())
        assert len(case.samples) == 3
        for peer in peers.PEERS:
            if peer.available(case) is None:
                o = peer.prepare(case)()
                assert o.shape == case.q.shape
                layer.check(case, o)


# -- one layer on the CPU: many cells, little time -----------------------------------------------------------------------


def test_cells_of_the_aims_come_first_and_on_cuda_all_is_as_it_was(scripts: Any) -> None:
    layer = scripts["bench_layer"]

    def listed(*argv: str, cuda: bool = False) -> list[Any]:
        parser = argparse.ArgumentParser()
        layer.options(parser)
        return layer.cells(parser.parse_args(argv), cuda=cuda)

    quick, aims, everything = listed(), listed("--aims"), listed("--all")
    assert {cell.dtype for cell in quick} == {"float32", "bfloat16"} and len(quick) == 4
    assert aims[:4] == quick and everything[: len(aims)] == aims
    assert len(everything) == len(set(everything)) == 4 * 6 * 4 * 3 * 2
    sizes = {(cell.agents, cell.prefix, cell.suffix) for cell in aims if cell.heads[2] == 64}
    assert {(b, p, 0) for b in (64, 256, 1024) for p in (2048, 8192, 32768)} | {(1, 32768, 0), (4, 32768, 0)} <= sizes
    assert {(b, 512, s) for b in (64, 256, 1024) for s in (64, 512)} <= sizes
    assert listed("--aims", "--quick") == quick
    assert {(cell.heads, cell.dtype) for cell in listed("--all", "--heads", "9", "3", "64", "--dtype", "bfloat16")} == {
        ((9, 3, 64), "bfloat16")
    }
    assert listed(cuda=True) == [layer.Cell((32, 8, 128), "bfloat16", *cell) for cell in layer.CELLS]
    assert [cell[2:] for cell in listed("--quick", cuda=True)] == layer.QUICK
    assert listed("--heads", "4", "2", "64", "--dtype", "float16", "--cell", "1", "2", "3", cuda=True) == [
        layer.Cell((4, 2, 64), "float16", 1, 2, 3)
    ]


@pytest.mark.parametrize(("heads", "dtype"), [((6, 2, 64), torch.float32), ((2, 2, 64), torch.bfloat16)])
def test_without_a_suffix_every_entry_sees_the_prefix_alone(
    scripts: Any, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    peers, layer = scripts["peers"], scripts["bench_layer"]
    case = peers.Case.make(kvkern.Geometry(1, *heads, dtype), 5, 77, 0, device=torch.device("cpu"))
    before, keys = case.pool.pages.clone(), case.prefix_kv
    reference = torch.cat([attend_fp64(case.q[b, None], *(part.transpose(0, 1) for part in keys))[0] for b in range(5)])
    for run in (case.kvkern, *(peer.prepare(case) for peer in peers.PEERS if peer.available(case) is None)):
        assert (run().double() - reference).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(case.pool.pages, before) and layer.kernels(case).keys() == {"K1", "K2"}
    o, _ = layer.kernels(case)["K2"]()
    layer.check(case, o)
    case.pool.seq_lens.fill_(1)  # the control: a token of its own, which one row alone hardly heeds in 10 draws of 300
    assert (case.kvkern().double() - reference).abs().max() > 1e-2


def test_columns_of_k1_and_k2_count_what_each_has_to_do(scripts: Any, tmp_path: Path) -> None:
    (with_suffix,) = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--kernels", "--peers").results
    (without,) = Ran(
        scripts["bench_layer"], tmp_path / "0", *SHAPE, "--kernels", "--peers", "--cell", "3", "100", "0"
    ).results
    assert "k2_ms" not in without and without["flop"] == 4 * 3 * 4 * 64 * 100
    for result, tokens in ((with_suffix, 100), (without, 100)):
        k1, roofs = statistics.median(result["seconds"]["K1"]), result["roofs"]
        assert result["k1_ms"] == k1 * 1e3
        assert result["k1_gemm_share"] == pytest.approx(4 * 3 * 4 * 64 * tokens / k1 / roofs["gemm_flop_per_s"])
        assert result["k1_copy_share"] == pytest.approx(2 * 2 * 64 * 2 * tokens / k1 / roofs["copy_bytes_per_s"])
    k2 = statistics.median(with_suffix["seconds"]["K2"])
    assert with_suffix["k2_gbs"] == pytest.approx(2 * 2 * 64 * 2 * 3 * 20 / k2 / 1e9)
    samples = with_suffix["seconds"]["kvkern"]
    assert with_suffix["spread"]["kvkern"] == (max(samples) - min(samples)) / statistics.median(samples)


def test_roofs_of_a_cpu_are_those_of_the_cell_and_say_what_they_count(scripts: Any, tmp_path: Path) -> None:
    (result,) = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers").results
    roofs = result["roofs"]
    assert roofs["copy_counts"] == "bytes read and bytes written" and roofs["threads"] == torch.get_num_threads()
    gemm, copy = (statistics.median(roofs["seconds"][name]) for name in ("gemm", "copy"))
    assert roofs["gemm_flop_per_s"] == 2 * roofs["gemm_size"] ** 3 / gemm
    assert roofs["copy_bytes_per_s"] == 2 * roofs["copy_bytes"] / copy
    if "fma" in roofs["seconds"]:
        fma, threads = scripts["fma_peak"], torch.get_num_threads()
        flop = 2 * fma.LANES[result["isa"]] * fma.SUMS * fma.STEPS * threads
        assert roofs["fma_flop_per_s"] == flop / min(roofs["seconds"]["fma"]), "a peak is the best sample"


def test_the_peak_of_multiply_adds_is_what_its_loop_does(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fma = scripts["fma_peak"]
    runs_here = [name for name in _C.instruction_sets() if name in fma.LANES]
    for name in runs_here:
        lanes = fma.LANES[name]
        # Sum i, three times halved and one added: i / 8 + 1.75.
        assert fma.build(lanes, fma.FLAGS[name])(3, 0.5, 1.0) == lanes * sum(i / 8 + 1.75 for i in range(fma.SUMS))
    with pytest.raises(NotImplementedError, match="no loop for portable"):
        fma.FmaPeak("portable", 1)
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(NotImplementedError, match="no-such-compiler is not in PATH"):
        fma.FmaPeak("avx2", 1)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NotImplementedError, match=r"^false:"):
        fma.FmaPeak("avx2", 1)
    assert scripts["bench_layer"].fma_peak("avx2") is None and scripts["bench_layer"].fma_peak(None) is None


@pytest.mark.parametrize(("isa", "dtype", "told"), [("avx2", "bfloat16", True), ("avx512bf16", "bfloat16", False)])
def test_a_share_of_the_peak_is_told_where_k1_multiplies_and_adds_in_fp32(
    scripts: Any, isa: str, dtype: str, told: bool
) -> None:
    layer = scripts["bench_layer"]
    rates = {"gemm_flop_per_s": 1e9, "copy_bytes_per_s": 1e9, "fma_flop_per_s": 4e9}
    cell = layer.Cell((4, 2, 64), dtype, 3, 100, 0)
    found = layer.alone(cell, {"K1": 1e-3}, rates, isa)
    assert ("k1_fma_share" in found) == told
    assert layer.alone(cell._replace(dtype="float32"), {"K1": 1e-3}, rates, isa)["k1_fma_share"] == pytest.approx(
        4 * 3 * 4 * 64 * 100 / 1e-3 / 4e9
    )


def test_each_entry_has_its_share_of_a_cells_time_and_turns_are_mixed(scripts: Any) -> None:
    layer, order = scripts["bench_layer"], []

    class Clock:
        options = argparse.Namespace(cell_seconds=6.0, samples=4)

        def once(self, run: Any) -> float:
            name, taken = run
            order.append(name)
            return taken

    takes = {"kvkern": 5.0, "fast": 0.01, "slow": 0.5, "slower": 1.5, "roof copy": 0.4}
    runs = {name: (name, taken) for name, taken in takes.items()}
    found = layer.shares(Clock(), runs, {"slower": 1.5}, lambda: order.append("flush"))
    assert {name: len(samples) for name, samples in found.items()} == {
        **{"kvkern": 3, "fast": 4, "slow": 2, "slower": 1, "roof copy": 3}
    }
    timed = order[order.index("flush") :]
    assert timed[::2] == ["flush"] * (len(timed) // 2), "each timed run after a flush"
    assert timed.index("slow") < len(timed) // 2 < len(timed) - 1 - timed[::-1].index("slow")
    assert order.count("slower") == 0, "its checked run was its sample"


def test_on_cuda_the_first_turn_warms_and_a_slow_peer_has_no_other(scripts: Any) -> None:
    layer, order = scripts["bench_layer"], []

    class Clock:
        options = argparse.Namespace(cell_seconds=30.0, samples=4)

        def once(self, run: Any) -> float:
            name, taken = run
            order.append(name)
            return taken

    runs = {"kvkern": ("kvkern", 4.0), "fast": ("fast", 0.1), "slow": ("slow", 3.5)}
    found = layer.turns(Clock(), layer.Entries(runs), lambda: order.append("flush"), time.monotonic())
    assert found == {"kvkern": [4.0] * 4, "fast": [0.1] * 4, "slow": [3.5]}
    assert order[:6] == ["flush", "kvkern", "flush", "fast", "flush", "slow"] and order[6:] == 4 * order[:4]
    late = layer.turns(Clock(), layer.Entries(runs), lambda: None, time.monotonic() - 31)
    assert late["kvkern"] == [4.0] * layer.LEAST_TURNS


def test_a_cell_and_a_peer_that_would_take_too_long_have_a_reason(scripts: Any, tmp_path: Path) -> None:
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers", "--cell-seconds", "1e-9")
    assert ran.refused is None and ran.results == []
    (failed,) = ran.failed
    assert failed["reason"].startswith("TooLong: ") and "by the rate of the product" in failed["reason"]

    layer = scripts["bench_layer"]
    pace, small, large = (
        layer.Pace(8.0),
        *(layer.Cell((32, 8, 128), "bfloat16", 64, p, 0) for p in (2048, 32768)),
    )
    pace.note(small, {"expanded_sdpa": 2.0, "kvkern": 0.02})
    pace.admit(large, "kvkern")
    pace.admit(small, "expanded_sdpa")
    pace.admit(large._replace(dtype="float32"), "expanded_sdpa")
    with pytest.raises(layer.TooLong, match="about 32 s a run"):
        pace.admit(large, "expanded_sdpa")
    row = {
        "shape": {"B": 64, "P": 2048, "S": 0, "heads": [32, 8, 128], "dtype": "bfloat16"},
        "seconds": {"expanded_sdpa": [2.0]},
    }
    again = layer.Pace(8.0)
    again.take_up([row])
    assert again.reached[(32, 8, 128), "bfloat16", "expanded_sdpa"] == small.flop / 2.0


def test_a_case_that_does_not_fit_has_a_reason(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts["peers"], "available_memory", lambda: 1000)
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert ran.results == [] and ran.failed[0]["reason"].startswith("MemoryError: 0.0 GiB needed")


def test_rows_of_two_instruction_sets_stand_in_one_file(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> list[str | None]:
        return [row["isa"] for row in Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers").results]

    monkeypatch.delenv("KVKERN_ISA", raising=False)
    monkeypatch.setattr(native, "instruction_set", lambda: "first", raising=False)
    assert names() == ["first"]
    monkeypatch.setattr(native, "instruction_set", lambda: "second", raising=False)
    assert names() == names() == ["first", "second"]
    assert Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers", "--backend", "torch").results[-1]["isa"] is None


def test_control_an_instruction_set_that_does_not_take_is_not_measured_as_if_it_had(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVKERN_ISA", "avx2")
    monkeypatch.setattr(native, "instruction_set", lambda: "portable", raising=False)
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert str(ran.refused).startswith("KVKERN_ISA: found portable in use, needed avx2") and ran.text is None


def test_cells_that_were_not_begun_are_told_until_they_have_a_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, two = scripts["bench_layer"], [(2, 60, 0), (1, 50, 0)]
    monkeypatch.setattr(layer, "TINY", two)
    ticks = iter([0.0, 0.0, 1.0, *[2.0] * 9])
    with monkeypatch.context() as patch:
        patch.setattr(layer.time, "monotonic", lambda: next(ticks))
        cut = Ran(layer, tmp_path, *SHAPE, "--peers", "--seconds", "1")
    assert [row["agents"] for row in cut.results] == [2]
    (told,) = cut.file["not_begun"]
    assert told.startswith("B=1 P=50 S=0 heads=[4, 2, 64] dtype=bfloat16")
    done = Ran(layer, tmp_path, *SHAPE, "--peers")
    assert len(done.results) == 2 and done.file["not_begun"] == []


def test_the_gain_of_a_second_thread_is_kept_beside_the_cells(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers", "--threads-gain")
    (kept,) = ran.file["threads_gain"]
    assert kept["shape"] | {"isa": None} == {
        **{"B": 1, "P": 200, "heads": [4, 2, 64], "dtype": "bfloat16", "isa": None}
    }
    assert {count: len(samples) for count, samples in kept["seconds"].items()} == {"1": 3, "2": 3}
    one, two = (statistics.median(samples) for samples in kept["seconds"].values())
    assert kept["gain"] == one / two and torch.get_num_threads() == threads
    assert "threads  B=1 P=200" in capsys.readouterr().out
    again = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers", "--threads-gain")
    assert again.text == ran.text and capsys.readouterr().out == ""


def test_a_file_of_a_cpu_with_other_instructions_is_not_taken_up(scripts: Any, tmp_path: Path) -> None:
    first = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    moved = first.file | {"machine": first.file["machine"] | {"instruction_sets": ["portable"]}}
    (tmp_path / "layer.json").write_text(json.dumps(moved))
    ran = Ran(scripts["bench_layer"], tmp_path, *SHAPE, "--peers")
    assert "instruction_sets: found ['portable']" in str(ran.refused) and ran.file == moved


def test_the_folder_of_a_machine_is_named_for_its_instructions_and_cores(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = scripts["harness"]
    monkeypatch.setattr(harness, "_cpu_name", lambda: "Some CPU (R) 12-Core")
    monkeypatch.setattr(harness.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    expected = f"some-cpu-r-12-core-{_C.instruction_sets()[0]}-3-cores"
    assert harness.here() == BENCH / "results" / expected


def test_numbers_that_fill_a_pool_are_normal_and_repeat_at_no_page(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = scripts["peers"]
    monkeypatch.setattr(peers, "PERIOD", 10_007)
    for strided in (False, True):
        pages = torch.zeros(2, 2, 32, 16, 65)[..., : 64 if strided else 65]
        peers.fill(pages)
        tokens = pages.reshape(-1, pages.shape[-1])
        assert len(torch.unique(tokens, dim=0)) == len(tokens)
        assert abs(pages.mean()) < 0.05 and abs(pages.std() - 1) < 0.05


# -- tables of a CPU's cells -----------------------------------------------------------------------------------------------


def row(agents: int, prefix: int, suffix: int, dtype: str, isa: str, **columns: Any) -> dict[str, Any]:
    """A cell as bench_layer.py keeps it, kvkern 10 ms a run and the flash operator 20."""
    seconds = {"kvkern": [0.009, 0.010, 0.012], "K1": [0.008] * 3, "flash_rows": [0.02] * 3, "expanded_sdpa": [0.2]}
    told = {"agents": agents, "prefix": prefix, "suffix": suffix, "dtype": dtype, "isa": isa, "backend": "cpu"}
    shares = {"gemm_share": 0.5, "copy_share": 0.4, "k1_gemm_share": 0.93, "k1_copy_share": 0.8}
    return {
        **{"shape": told, "geometry": "32/8x128", **told, "ms": 10.0, "gflops": 100.0, "gbs": 1.0, **shares},
        **{"ratio_flash_rows": 2.0, "spread": {"kvkern": 0.3}, "seconds": seconds, "flop": 1e9, "bytes": 1.0},
        **{"reasons": {"torch_backend": "too long", "cudnn_rows": "for CUDA alone"}, **columns},
        "roofs": {"gemm_flop_per_s": 2e11},
    }


def cpu_file() -> dict[str, Any]:
    machine = {
        **{"device": "cpu", "cpu": "A CPU", "threads": 2, "versions": {"torch": "9", "triton": "9"}},
        "instruction_sets": ["avx512bf16", "avx512", "avx2", "portable"],
    }
    results = [
        row(64, 2048, 0, "float32", "avx512bf16"),
        row(256, 2048, 0, "float32", "avx512bf16", k1_gemm_share=0.85),
        row(64, 2048, 0, "bfloat16", "avx512bf16", k1_gemm_share=0.71),
        row(64, 2048, 0, "float32", "avx2", k1_gemm_share=0.4, k1_fma_share=0.9),
        row(64, 512, 64, "float32", "avx512bf16", k2_copy_share=0.7),
        row(1, 32768, 0, "float32", "avx512bf16", k1_copy_share=0.81),
    ]
    gain = {"shape": {"heads": [32, 8, 128], "dtype": "float32", "isa": "avx512bf16"}, "gain": 1.8}
    return {
        **{"bench": "layer", "machine": machine, "results": results, "not_begun": ["B=9 P=9 S=9"]},
        "threads_gain": [gain | {"seconds": {"1": [0.018], "2": [0.01]}}],
        "failed": [{"shape": {"B": 1024, "P": 32768, "S": 512}, "reason": "MemoryError: 9.0 GiB\nneeded"}],
    }


def cells_of(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_an_aim_is_met_where_every_cell_meets_it(scripts: Any) -> None:
    _, _, *found = cells_of(scripts["report"].aims_table(cpu_file()))
    table = {(text, isa): rest for text, isa, *rest in found}
    crowd = "K1, 64 agents and more over 2,048 tokens and more"
    assert table[f"{crowd}, fp32, D = 128: of the GEMM rate", "avx512bf16"] == [
        "90 %",
        "85 % to 93 %",
        "2",
        "met in 1 of 2",
    ]
    assert table[f"{crowd}, bf16, D = 128: of the GEMM rate", "avx512bf16"] == ["70 %", "71 %", "1", "met"]
    assert table[f"{crowd}, fp32, D = 64: of the GEMM rate", "avx512bf16"] == ["", "not measured", "0", "not measured"]
    assert table["K1, the same, fp32: against torch's flash", "avx512bf16"] == ["1.10x", "2.50x", "2", "met"]
    assert table["K1, the same: against unshared sdpa", "avx512bf16"] == ["8.00x", "25.00x", "3", "met"]
    assert table["K1, 1 to 4 agents over 32,768 tokens: of the copy rate", "avx512bf16"] == ["80 %", "81 %", "1", "met"]
    suffix = "K2, 64 agents and more, suffixes of 64 and more: of the copy rate"
    assert table[suffix, "avx512bf16"] == ["75 %", "70 %", "1", "not met"]
    assert table["K1, 1 agent over 32,768 tokens: 2 threads against 1", "avx512bf16"] == ["1.70x", "1.80x", "1", "met"]
    # torch keeps to the best instructions, so it judges no other.
    assert table[f"{crowd}, fp32, D = 128: of the GEMM rate", "avx2"] == ["", "40 %", "1", "told, no aim"]
    assert table[f"{crowd}, fp32, D = 128: of the FMA peak", "avx2"] == ["85 %", "90 %", "1", "met"]
    assert table[f"{crowd}, fp32, D = 128: of the FMA peak", "avx512bf16"] == ["", "not measured", "0", "not measured"]


def test_every_cell_has_a_row_or_a_reason_and_the_readme_a_few(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, folder = scripts["report"], tmp_path / "bench" / "results" / "a-cpu"
    folder.mkdir(parents=True)
    (folder / "layer.json").write_text(json.dumps(cpu_file()))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", *argv])
        return report.main()

    assert run("--check") == 1 and run() == 0 and run("--check") == 0
    page, readme = (folder / "layer.md").read_text(), (tmp_path / "README.md").read_text()
    timed = [cells for cells in cells_of(page.splitlines()) if "10.00 ms (30 %)" in cells]
    assert len(timed) == 6 and ["1.80x"] in [cells[-1:] for cells in cells_of(page.splitlines())]
    for told in (
        "B=1024 P=32768 S=512: MemoryError: 9.0 GiB needed",
        "not begun: B=9 P=9 S=9",
        "`torch` backend: too long",
    ):
        assert f"{told}\n" in page, told
    assert "CUDA" not in page and readme.startswith("before\n") and readme.endswith("after\n")
    assert sum("10.00 ms (30 %)" in line for line in readme.splitlines()) == 3, (
        "of the best instructions, of chosen cells"
    )
    assert "(bench/results/a-cpu/layer.svg)" in readme
    for stale in ("layer.md", "layer.svg"):
        kept = (folder / stale).read_text()
        (folder / stale).write_text(kept + " ")
        capsys.readouterr()
        assert run("--check") == 1 and stale in capsys.readouterr().err
        (folder / stale).write_text(kept)


def test_a_figure_has_every_curve_and_is_well_formed(scripts: Any) -> None:
    text = scripts["report"].cpu_figure(cpu_file())
    tree = ElementTree.fromstring(text)
    written = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"32/8x128, float32", "kvkern, avx512bf16", "kvkern, avx2", "torch's flash over packed rows"} <= set(written)
    assert "9/3x64, bfloat16: not measured" in written

    plot = scripts["plot"]
    curve = plot.Curve("<&>", "#000000", [(4, 50.0), (1, 100.0), (2, 0.0)])
    drawn = plot.svg([plot.Panel("one", [curve])], x_label="x", y_label="y")
    places = [
        (float(node.get("cx")), float(node.get("cy")))
        for node in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}circle")
    ]
    (x1, y1), (x2, y2), (x4, y4) = places
    assert x2 - x1 == pytest.approx(x4 - x2, abs=0.2) and y2 - y4 == pytest.approx(y4 - y1, abs=0.2)
    assert (y1, y2) == (plot.TOP, plot.HEIGHT - plot.BOTTOM), "the largest at the top, 0 at the bottom"


class FakeFlashInfer(ModuleType):
    """flashinfer by its documentation alone: what its wrappers give for lists of pages, computed on the CPU in fp64."""

    class Level:
        def __init__(self, q_indptr: Any, kv_indptr: Any, indices: Any, last: Any, page: int) -> None:
            self.q, self.kv, self.indices, self.last, self.page = q_indptr, kv_indptr, indices, last, page

        def tokens(self, row: int, pool: torch.Tensor) -> torch.Tensor:
            """[tokens, num_kv_heads, head_dim] of the request that has this row."""
            n = int((self.q[1:] <= row).sum())
            pages = self.indices[self.kv[n] : self.kv[n + 1]].long()
            held = pool[pages].transpose(1, 2).flatten(0, 1)
            return held[: (len(pages) - 1) * self.page + int(self.last[n])]

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str) -> None:
            assert layout == "HND" and workspace.dtype == torch.uint8

        def checked(self, heads: tuple[int, ...], dtypes: dict[str, Any], levels: list[Any]) -> None:
            self.heads, self.dtypes, self.levels = heads, dtypes, levels
            for level in levels:
                assert all(t.dtype == torch.int32 for t in (level.q, level.kv, level.indices, level.last))
                assert level.kv[-1] == len(level.indices) and len(level.last) == len(level.kv) - 1 == len(level.q) - 1

        def run(self, q: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            assert {q.dtype, pool[0].dtype} == set(self.dtypes.values()) and self.heads[0] == q.shape[1]
            rows = []
            for row in range(q.shape[0]):
                keys, values = (torch.cat([level.tokens(row, part) for level in self.levels]) for part in pool)
                rows.append(attend_fp64(q[row, None], keys, values)[0])
            return torch.cat(rows).to(q.dtype)

    class MultiLevelCascadeAttentionWrapper(Wrapper):
        def __init__(self, num_levels: int, workspace: torch.Tensor, layout: str) -> None:
            super().__init__(workspace, layout)
            assert num_levels == 2
            self._batch_prefill_wrappers = [SimpleNamespace(_backend="auto") for _ in range(num_levels)]

        def plan(self, q: Any, kv: Any, indices: Any, last: Any, *heads: int, sm_scale: float, **dtypes: Any) -> None:
            lists = zip(q, kv, indices, last, strict=True)
            self.checked(heads, dtypes, [FakeFlashInfer.Level(*each, heads[3]) for each in lists])

    class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
        def __init__(self, workspace: torch.Tensor, layout: str, *, use_tensor_cores: bool) -> None:
            super().__init__(workspace, layout)

        def plan(self, kv: Any, indices: Any, last: Any, *heads: int, sm_scale: float, **dtypes: Any) -> None:
            q = torch.arange(len(kv), dtype=torch.int32)
            self.checked(heads, dtypes, [FakeFlashInfer.Level(q, kv, indices, last, heads[3])])


def test_lists_of_pages_for_flashinfer_name_each_token_once(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every agent, not samples alone: the newest token is in a page of its own, the prefix ends within one."""
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashInfer("flashinfer"))
    peers = scripts["peers"]
    monkeypatch.setattr(peers.FlashInfer, "workspace", lambda self, case: torch.zeros(1, dtype=torch.uint8))
    geometry = kvkern.Geometry(1, 6, 2, 64, torch.float32)
    by_pages = (peers.FlashInferCascade(), 77), (peers.FlashInferCascadeFa2(), 77), (peers.FlashInferDecode(), 96)
    for peer, prefix_tokens in by_pages:
        case = peers.Case.make(geometry, 5, prefix_tokens, 33, device=torch.device("cpu"))
        ours = case.kvkern()
        assert torch.allclose(peer.prepare(case)(), ours, atol=1e-5), peer.name
        case.pool.page_table[4, 2] = case.pool.page_table[3, 2]  # the control: another agent's newest token
        assert not torch.allclose(peer.prepare(case)()[4], ours[4], atol=1e-5), peer.name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexattention_over_rows_of_a_kv_head_is_right(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers = scripts["peers"]
    case = peers.Case.make(kvkern.Geometry(1, 6, 2, 64, torch.float32), 5, 77, 35, device=torch.device("cpu"))
    ours = case.kvkern()
    assert torch.allclose(peers.FlexRows().prepare(case)(), ours, atol=1e-5)


# -- the engine --------------------------------------------------------------------------------------------------------


def test_an_engine_cell_keeps_every_step_beside_the_forecast(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(scripts["bench_engine"], tmp_path, *ENGINE)
    assert ran.refused is None and not ran.failed
    assert [(r["agents"], r["document"], r["backend"]) for r in ran.results] == [(3, 100, "cpu"), (1, 100, "cpu")]
    page = 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, K and V, kv heads, head_dim, bytes
    for result in ran.results:
        steps = result["seconds"]["decode"]
        assert len(steps) == 3
        assert result["decode_tokens_per_s"] == result["agents"] / statistics.median(steps)
        assert {"prefill_s", "extend_s", "rounding", "commit"} <= result.keys() and result["peak_bytes"] is None
        # A document of 100 tokens in 128, a suffix of 16 + 14 in two pages.
        assert result["forecast_bytes"] == result["weights_bytes"] + 8 * page + result["agents"] * 2 * page
    capsys.readouterr()
    again = Ran(scripts["bench_engine"], tmp_path, *ENGINE)
    assert again.text == ran.text and capsys.readouterr().out == ""


def test_an_engine_cell_that_fails_is_told_and_the_others_go_on(scripts: Any, tmp_path: Path) -> None:
    ran = Ran(scripts["bench_engine"], tmp_path, *ENGINE, "--agents", "1", "--documents", "5000", "40")
    assert [result["document"] for result in ran.results] == [40]
    (failed,) = ran.failed
    assert failed["shape"]["P"] == 5000 and failed["reason"].startswith("CapacityError: document")


def test_control_an_engine_with_another_attention_has_no_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = qwen3.shared_prefix_attention
    monkeypatch.setattr(qwen3, "shared_prefix_attention", lambda *args, **options: -right(*args, **options))
    ran = Ran(scripts["bench_engine"], tmp_path, *ENGINE)
    assert "wrong result" in str(ran.refused) and ran.text is None


# -- one call on a machine with a GPU -----------------------------------------------------------------------------------

PYTHON3 = """#!/bin/bash
echo "${KVKERN_COMMIT:-} $*" >>"$STAND_IN/calls"
case "$*" in
  *bench_layer.py*) read -r status <"$STAND_IN/layer"; sed -i 1d "$STAND_IN/layer"; exit "${status:-0}" ;;
  *"not sanitizer"*) cat "$STAND_IN/tests"; [[ ! -s $STAND_IN/tests ]] ;;
esac
"""
STEPS = [
    "setup.py",
    "- cuda",
    "not sanitizer",
    "bench_layer",
    "forms",
    "bench_document",
    "bench_engine",
    "bench_engine",
    "bench_prefix",
]
STEPS += ["kvkern.checks", "-k sanitizer"]


class GpuRun:
    """bench/gpu_run.sh with stand-ins for python3 and nvidia-smi: what it called, in order."""

    def __init__(self, folder: Path, *, layer: str = "", tests: str = "", limit: int = 580) -> None:
        folder.mkdir()
        for name, text in (("python3", PYTHON3), ("nvidia-smi", "#!/bin/bash\necho a card\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "layer").write_text("".join(f"{status}\n" for status in layer.split()))
        (folder / "tests").write_text(tests)
        env = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "STAND_IN": str(folder)}
        env |= {"OUT": str(folder / "out"), "LIMIT": str(limit), "DEVICE": "cuda", "KVKERN_COMMIT": "named"}
        done = subprocess.run(
            ["bash", str(BENCH / "gpu_run.sh")], env=env, capture_output=True, text=True, check=False, timeout=60
        )
        self.status, self.told = done.returncode, done.stdout + done.stderr
        calls = [line for line in (folder / "calls").read_text().splitlines() if "import xdist" not in line]
        assert all(call.startswith("named ") for call in calls)
        self.steps = [next(step for step in STEPS if step in call) for call in calls]


def test_a_run_on_a_gpu_begins_each_step_in_order_and_layer_until_it_is_through(tmp_path: Path) -> None:
    plain = GpuRun(tmp_path / "plain")
    assert plain.status == 0 and plain.steps == STEPS, plain.told
    again = GpuRun(tmp_path / "again", layer="75 75")
    assert again.status == 0 and again.steps == STEPS[:3] + ["bench_layer"] * 3 + STEPS[4:]
    died = GpuRun(tmp_path / "died", layer="139 0")
    assert died.status == 1 and died.steps.count("bench_layer") == 2
    for status in (1, 137):
        assert GpuRun(tmp_path / str(status), layer=f"{status} 0").steps == STEPS
    assert GpuRun(tmp_path / "for ever", layer="75 " * 20).steps.count("bench_layer") == 12


def test_a_failure_of_what_is_promised_ends_a_run_on_a_gpu_and_one_beside_it_does_not(tmp_path: Path) -> None:
    beside = "[gw0] [ 5%] FAILED tests/test_gpu.py::test_the_hopper_kernel[4]\nFAILED tests/test_store.py::test_a_round_trip\n"
    run = GpuRun(tmp_path / "beside", tests=beside)
    assert run.status == 1 and run.steps == STEPS
    exact = beside + "FAILED tests/test_gpu.py::test_rows[1] - AssertionError: hopper\n"
    for n, text in enumerate((exact, "ERROR: not found\n")):
        run = GpuRun(tmp_path / str(n), tests=text)
        assert run.status == 1 and run.steps == STEPS[:3] and "no benchmark" in run.told


def test_a_step_of_a_short_run_that_could_give_nothing_is_not_begun(tmp_path: Path) -> None:
    run = GpuRun(tmp_path / "short", limit=40)
    left_out = ("not sanitizer", "bench_layer", "bench_document", "bench_engine")
    assert run.steps == [step for step in STEPS if step not in left_out]
    assert run.status == 0 and run.told.count(" not begun") == sum(step in left_out for step in STEPS)


# -- as they are called ------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("script", ["bench_layer.py", "bench_engine.py"])
def test_a_script_runs_from_the_command_line(script: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(BENCH / script),
        "--tiny",
        "--device",
        "cpu",
        "--samples",
        "3",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " | " in done.stdout, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_kernels_have_times_and_memory_a_peak(scripts: Any, tmp_path: Path) -> None:
    cuda = ["--tiny", "--samples", "3", "--device", "cuda"]
    (result,) = Ran(scripts["bench_layer"], tmp_path, *cuda, "--peers").results
    assert {"kvkern", "K0", "K1", "K2", "gemm"} <= result["seconds"].keys()
    assert "kvkern_eager" in result["seconds"]
    results = Ran(scripts["bench_engine"], tmp_path, *cuda).results
    assert len(results) == 2 and all(r["peak_bytes"] > r["weights_bytes"] for r in results)


def test_an_operator_that_torch_no_longer_has_is_a_reason(scripts: Any) -> None:
    peers = scripts["peers"]
    assert callable(peers.aten("_scaled_dot_product_flash_attention_for_cpu"))
    with pytest.raises(NotImplementedError, match="has no operator aten::_no_such"):
        peers.aten("_no_such")
    assert issubclass(NotImplementedError, scripts["bench_layer"].FAILURES)


# -- linear layers -----------------------------------------------------------------------------------------------------


def test_rows_go_to_the_buckets_that_an_engine_takes(scripts):
    forwards, rounding = scripts["bench_linear"].forwards, RoundingClass((4, 16), {})
    assert [forwards(rounding, rows) for rows in (1, 4, 5, 16, 17, 37)] == [[4], [4], [16], [16], [16, 4], [16, 16, 16]]


def test_a_run_over_linear_layers_is_taken_up_again_and_makes_a_table(scripts, tmp_path, monkeypatch):
    run = scripts["bench_linear"]
    options = ("--quick", "--samples", "2", "--cell-seconds", "0", "--device", "cpu")
    first = Ran(run, tmp_path, *options)
    assert [r["shape"]["rows"] for r in first.results] == [*run.QUICK, *run.QUICK]
    for result in first.results:
        assert sum(result["bucket"]) >= result["shape"]["rows"] and set(result["bucket"]) <= set(result["buckets"])
        medians = {name: statistics.median(samples) for name, samples in result["seconds"].items()}
        assert result["ratio"] == medians["bucket"] / medians["free"]
    assert Ran(run, tmp_path, *options).results == first.results
    monkeypatch.setattr(scripts["report"], "ROOT", tmp_path)
    lines = scripts["report"].linear_table(tmp_path / "linear.json")
    assert [line.split(" | ")[1] for line in lines[4:]] == ["float32", "bfloat16"]
    assert f"{first.results[0]['ratio']:.2f}x" in lines[4] and "not measured" in lines[4]
