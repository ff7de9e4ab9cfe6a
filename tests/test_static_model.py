"""The static model's arithmetic, on loops whose counts are written here. What it predicts is no measurement."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import static_model
from bench.static_model import GPUS, cycles, measured, memory_share, model, roofline, tensor_share

H100 = GPUS["H100"]


def prefix_row(waits: list[int]) -> dict[str, Any]:
    """A 128 x 128 tile of 8 warps: 8 products with both operands in shared memory and 8 with one."""
    return {
        "kernel": "prefix",
        "variant": "bf16 D128 G4",
        "control": False,
        "arch": 90,
        "triton": "0",
        "tile": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        "head_dim": 128,
        "registers": 200,
        "shared_bytes": 163_840,
        "instructions_per_tile": 460,
        "products": {"HGMMA.64x128x16.F32.BF16 A shared": 8, "HGMMA.64x128x16.F32.BF16": 8},
        "loop": {"MUFU": 66, "LDS": 0, "STS": 0, "LDSM": 0, "STSM": 0},
        "product_waits": waits,
        "copy_waits": [],
    }


def suffix_row(copy_waits: list[int]) -> dict[str, Any]:
    return prefix_row([]) | {
        "kernel": "suffix",
        "tile": {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "registers": 96,
        "shared_bytes": 53_248,
        "instructions_per_tile": 418,
        "products": {"HMMA.16816.F32.BF16": 32},
        "copy_waits": copy_waits,
    }


def test_cycles_of_a_loop_with_known_counts() -> None:
    found = cycles(prefix_row([0]), H100)
    # 4 * 128 * 128 * 128 operations at 4,096 a cycle; 66 of 8 cycles on each of 2 warps; 460 on each of 2 warps.
    assert (found.tensor, found.special, found.issue) == (2048, 1056, 920)
    # Two warpgroups: 8 * (2 + 4 KB) + 8 * 4 KB each; and 64 KB that are copied in; 128 bytes a cycle.
    assert found.shared == 2 * (8 * 6144 + 8 * 4096) / 128 + 65_536 / 128 == 1792
    assert found.overlapped == 2048
    assert found.serial == 2048 + 1056 + 920


def test_a_loop_that_waits_for_its_products_gets_the_sum_and_another_the_largest() -> None:
    assert tensor_share(prefix_row([0]), H100) == 2048 / 4024
    assert tensor_share(prefix_row([1, 0]), H100) == 1.0


def test_products_of_one_warp_and_of_tensor_memory() -> None:
    # 32 products of 16 x 8 x 16 on each of 4 warps.
    assert cycles(suffix_row([2]), H100).tensor == 32 * 4096 * 4 / 4096
    row = prefix_row([0]) | {"products": {"UTCHMMA": 12}}
    assert cycles(row, GPUS["B200"]).tensor == pytest.approx(4 * 128**3 / 8192)


def test_more_buffers_under_way_feed_more_and_never_more_than_all() -> None:
    shares = [memory_share(suffix_row([waits]), H100) for waits in (0, 2, 4)]
    assert shares == sorted(shares)
    assert shares[0] > 0 and shares[-1] <= 1
    starved = suffix_row([0]) | {"shared_bytes": 200_000}
    starved["tile"] = starved["tile"] | {"BLOCK_N": 32}
    assert memory_share(starved, H100) < 1
    assert memory_share(starved | {"copy_waits": [2]}, H100) > memory_share(starved, H100)


@pytest.mark.parametrize("unit", ["tensor", "special", "issue", "shared"])
def test_control_more_work_for_a_unit_is_seen_in_that_unit_alone(unit: str) -> None:
    row = prefix_row([0])
    more = copy.deepcopy(row)
    if unit == "tensor":
        more["products"]["HMMA.16816.F32.BF16"] = 1
    elif unit == "special":
        more["loop"]["MUFU"] += 1
    elif unit == "issue":
        more["instructions_per_tile"] += 1
    else:
        more["loop"]["LDS"] += 1
    before, after = vars(cycles(row, H100)), vars(cycles(more, H100))
    assert {name for name in before if after[name] > before[name]} == {unit}
    assert {name for name in before if after[name] != before[name]} == {unit}


def test_a_product_without_a_known_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="QGMMA"):
        cycles(prefix_row([0]) | {"products": {"QGMMA.64x128x32": 1}}, H100)


def test_roofline_is_bound_by_what_it_must_read_or_compute() -> None:
    # One agent: the prefix is read once. Thousands: its arithmetic takes longer.
    assert roofline(H100, 1, 32_768, 0) == pytest.approx(32_768 * 4096 / 3.35e12)
    assert roofline(H100, 4096, 32_768, 0) == pytest.approx(4 * 4096 * 32 * 128 * 32_768 / H100.flop_a_second)
    assert roofline(H100, 16, 0, 256) == pytest.approx(16 * 256 * 4096 / 3.35e12)


def test_a_measurement_takes_the_prediction_s_place(tmp_path: Path) -> None:
    rows = [prefix_row([0]), suffix_row([2])]
    made = model(H100, rows, tmp_path)
    assert {line["kind"] for line in made["shapes"]} == {"PREDICTION"}
    assert all(line["seconds"] >= line["roofline_seconds"] for line in made["shapes"])

    folder = tmp_path / "h100"
    folder.mkdir()
    shape = {"B": 64, "P": 32_768, "S": 256}
    result = {"shape": shape, "geometry": "32/8x128", "dtype": "bfloat16", "seconds": {"kvkern": [3.0, 1.0, 2.0]}}
    # The same agents and tokens of another model, and a file of other shapes.
    others = [result | {"geometry": "16/8x128", "seconds": {"kvkern": [9.0]}}, result | {"dtype": "float16"}]
    (folder / "a.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H100"}, "results": [{"shape": {"N": 64}}]}))
    file = {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "results": [*others, result]}
    (folder / "layer.json").write_text(json.dumps(file))
    found = {(line["B"], line["P"], line["S"]): line for line in model(H100, rows, tmp_path)["shapes"]}
    assert found[64, 32_768, 256]["seconds"] == 2.0 and found[64, 32_768, 256]["kind"] == "measured"
    assert [line["kind"] for line in found.values()].count("measured") == 1
    # Not on another GPU, and not for another shape.
    assert measured("A100", 64, 32_768, 256, tmp_path) is None
    assert measured("H100", 64, 32_768, 64, tmp_path) is None


def test_its_text_says_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([prefix_row([0]), suffix_row([2])]))
    monkeypatch.setattr(sys, "argv", ["static_model", "--rows", str(path)])
    assert static_model.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTION for H100")
    shapes = [line for line in lines if line.endswith(("PREDICTION", "measured"))]
    assert len(shapes) == len(static_model.SHAPES)
