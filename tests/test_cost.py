"""kvkern.cost and `kvkern cost`: the paper's figures, what each input changes, when nothing pays, and bad input by name."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern import cli, pricing
from kvkern.cost import Costs, Inputs, break_even_reads, fit, kv_token_bytes, price
from kvkern.errors import RequestError

README = Path(__file__).resolve().parent.parent / "README.md"
TIERS = ("gpu", "cpu", "disk")


def paper(name: str = "paper", **changed: Any) -> Inputs:
    return Inputs(**{**pricing.preset(name), **changed})


def by_list(inputs: Inputs) -> Costs:
    return price(inputs, inputs.list_prefill)


# -- the paper ---------------------------------------------------------------------------------------------------------

LONG, SHORT = paper(), paper("paper-255")
MILLION = 1e6

# (what it is, ours, as the paper prints it). The number of its decimals is its precision.
PRINTED = [
    ("ratio at 255 tokens", SHORT.speedup, "8.6"),
    ("ratio at 3,774 tokens", LONG.speedup, "49.7"),
    ("break-even at 255 tokens", break_even_reads(SHORT.prefill_seconds, SHORT.reuse_seconds), "1.13"),
    ("break-even at 3,774 tokens", break_even_reads(LONG.prefill_seconds, LONG.reuse_seconds), "1.02"),
    ("bytes a token", LONG.token_bytes, "147456"),
    ("GB at 3,774 tokens", LONG.kv_gb, "0.54"),
    ("dollars of a prefill", by_list(LONG).prefill, "0.0189"),
    ("dollars of a load by egress", by_list(LONG).egress, "0.049"),
    ("egress by prefill", by_list(LONG).egress_by_prefill, "2.6"),
    ("million dollars of prefill", by_list(LONG).agents_prefill / MILLION, "1.51"),
    ("million dollars of reuse", by_list(LONG).agents_reuse / MILLION, "0.03"),
    ("cached price by list price", by_list(LONG).tariff / by_list(LONG).prefill, "0.1"),
]


def printed(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("ours", "theirs"), [row[1:] for row in PRINTED], ids=[row[0] for row in PRINTED])
def test_the_preset_gives_back_what_the_paper_prints(ours, theirs):
    assert printed(ours, theirs) == theirs


def test_the_preset_holds_the_papers_inputs():
    assert (LONG.tokens, LONG.prefill_seconds, LONG.reuse_seconds) == (3774, 14.71, 0.296)
    assert (SHORT.tokens, SHORT.prefill_seconds, SHORT.reuse_seconds) == (255, 0.67, 0.078)
    for inputs in (LONG, SHORT):
        assert (inputs.prefill_price, inputs.egress_gb, inputs.agents, inputs.cache_read_factor) == (5, 0.09, 80e6, 0.1)


def test_the_tariff_lies_inside_at_3774_tokens_and_not_at_255():
    assert by_list(LONG).tariff_inside
    assert by_list(SHORT).tariff < by_list(SHORT).reuse and not by_list(SHORT).tariff_inside


@pytest.mark.parametrize("gb_bytes", [1e9, 2**30])
def test_control_of_another_gb_three_printed_figures_do_not_follow(gb_bytes):
    other = paper(gb_bytes=gb_bytes)
    ours = (other.kv_gb, by_list(other).egress, by_list(other).egress_by_prefill)
    assert all(printed(value, like) != like for value, like in zip(ours, ("0.54", "0.049", "2.6"), strict=True))


def test_bytes_of_a_token_are_those_of_the_geometry():
    assert kv_token_bytes(layers=36, num_kv_heads=8, head_dim=128, element_bytes=2) == 147_456
    import torch

    from kvkern.geometry import Geometry

    qwen = Geometry(layers=36, num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.float16)
    assert qwen.token_bytes() == 147_456
    assert fit(qwen, document_tokens=3774, suffix_tokens=1, memory_bytes=1 << 40).token_bytes == 147_456


# -- each input, and what it changes -----------------------------------------------------------------------------------

BASE = paper(tokens=3770, gpu_hour=3.0)  # 10 % more is a whole number of tokens


def flat(costs: Costs, inputs: Inputs) -> dict[str, float]:
    found = {k: v for k, v in dataclasses.asdict(costs).items() if k not in ("hosting", "tariff_inside")}
    for name, tier in zip(TIERS, costs.hosting, strict=True):
        found |= {f"{name}.{k}": v for k, v in dataclasses.asdict(tier).items() if k != "tier"}
    even = break_even_reads(inputs.prefill_seconds, inputs.reuse_seconds)
    return found | {"kv_gb": inputs.kv_gb, "speedup": inputs.speedup, "break_even": even}


def oracle(inputs: Inputs, *, seconds: bool) -> dict[str, float]:
    """The same from the formulas, in exact fractions."""
    x = {k: Fraction(v) for k, v in dataclasses.asdict(inputs).items() if v is not None}
    listed = x["tokens"] * x["prefill_price"] / 1_000_000
    second = x["gpu_hour"] / 3600 if seconds else listed / x["prefill_seconds"]
    p, r, gb = (
        x["prefill_seconds"] * second,
        x["reuse_seconds"] * second,
        x["tokens"] * x["token_bytes"] / x["gb_bytes"],
    )
    found = {
        "prefill": p,
        "reuse": r,
        "saved": p - r,
        "tariff": x["cache_read_factor"] * listed,
        "egress": gb * x["egress_gb"],
        "egress_by_prefill": gb * x["egress_gb"] / p,
        "egress_pays_below": (p - r) / gb,
        "gpu_hour": second * 3600,
        "month_prefill": x["reads_month"] * p,
        "month_egress": x["reads_month"] * (gb * x["egress_gb"] + r),
        "month_tariff": x["reads_month"] * x["cache_read_factor"] * listed,
        "agents_prefill": x["agents"] * p,
        "agents_reuse": p + x["agents"] * r,
        "kv_gb": gb,
        "speedup": x["prefill_seconds"] / x["reuse_seconds"],
        "break_even": x["prefill_seconds"] / (x["prefill_seconds"] - x["reuse_seconds"]),
    }
    rents = (x["gpu_gb_hour"] * 720, x["cpu_gb_hour"] * 720, x["disk_gb_month"])
    size = x["tokens"] * x["token_bytes"]
    loads = (Fraction(0), size / x["cpu_bytes_per_s"], size / x["disk_bytes_per_s"])
    for name, rent, load in zip(TIERS, rents, loads, strict=True):
        read = (load + x["reuse_seconds"]) * second
        found |= {
            f"{name}.gb_hours_month": gb * 720,
            f"{name}.rent_month": gb * rent,
            f"{name}.read_seconds": load + x["reuse_seconds"],
            f"{name}.read": read,
            f"{name}.pays_from_reads": gb * rent / (p - read),
            f"{name}.month": gb * rent + x["reads_month"] * read,
        }
    return {k: float(v) for k, v in found.items()}


def of_tiers(names: str, *tiers: str) -> list[str]:
    return [f"{tier}.{name}" for tier in tiers or TIERS for name in names.split()]


# What 10 % more of an input does, by the list: an output in a list of n is 1.1 ** n as large; in + or - larger or smaller.
# All others stay as they are, to the bit.
MORE: dict[str, dict[int | str, list[str]]] = {
    "tokens": {
        1: ["kv_gb", "prefill", "reuse", "saved", "tariff", "egress", "gpu_hour", "agents_prefill", "agents_reuse"]
        + ["month_prefill", "month_egress", "month_tariff", "gpu.read", "gpu.month"]
        + of_tiers("gb_hours_month rent_month"),
        "+": of_tiers("read_seconds read pays_from_reads month", "cpu", "disk"),
    },
    "token_bytes": {
        1: ["kv_gb", "egress", "egress_by_prefill", "gpu.pays_from_reads", *of_tiers("gb_hours_month rent_month")],
        -1: ["egress_pays_below"],
        "+": ["month_egress", "gpu.month", *of_tiers("read_seconds read pays_from_reads month", "cpu", "disk")],
    },
    "gb_bytes": {
        -1: ["kv_gb", "egress", "egress_by_prefill", *of_tiers("gb_hours_month rent_month pays_from_reads")],
        1: ["egress_pays_below"],
        "-": ["month_egress", *of_tiers("month")],
    },
    "prefill_seconds": {
        1: ["speedup"],
        -1: ["reuse", "gpu_hour", *of_tiers("read")],
        "+": ["saved", "egress_pays_below"],
        "-": ["break_even", "month_egress", "agents_reuse", *of_tiers("pays_from_reads month")],
    },
    "reuse_seconds": {
        1: ["reuse", "gpu.read", "gpu.read_seconds"],
        -1: ["speedup"],
        "+": ["break_even", "month_egress", "agents_reuse", *of_tiers("pays_from_reads month")]
        + of_tiers("read read_seconds", "cpu", "disk"),
        "-": ["saved", "egress_pays_below"],
    },
    "prefill_price": {
        1: ["prefill", "reuse", "saved", "tariff", "egress_pays_below", "gpu_hour", "agents_prefill", "agents_reuse"]
        + ["month_prefill", "month_tariff", *of_tiers("read")],
        -1: ["egress_by_prefill", *of_tiers("pays_from_reads")],
        "+": ["month_egress", *of_tiers("month")],
    },
    "cache_read_factor": {1: ["tariff", "month_tariff"]},
    "egress_gb": {1: ["egress", "egress_by_prefill"], "+": ["month_egress"]},
    "gpu_gb_hour": {1: of_tiers("rent_month pays_from_reads", "gpu"), "+": ["gpu.month"]},
    "cpu_gb_hour": {1: of_tiers("rent_month pays_from_reads", "cpu"), "+": ["cpu.month"]},
    "disk_gb_month": {1: of_tiers("rent_month pays_from_reads", "disk"), "+": ["disk.month"]},
    "cpu_bytes_per_s": {"-": of_tiers("read_seconds read pays_from_reads month", "cpu")},
    "disk_bytes_per_s": {"-": of_tiers("read_seconds read pays_from_reads month", "disk")},
    "reads_month": {1: ["month_prefill", "month_egress", "month_tariff"], "+": of_tiers("month")},
    "agents": {1: ["agents_prefill"], "+": ["agents_reuse"]},
    "gpu_hour": {},
}


def check_perturbed(name: str, before: dict[str, float], after: dict[str, float], expected: dict[str, float]) -> None:
    changes = {output: how for how, outputs in MORE[name].items() for output in outputs}
    for output in before:
        how, old, new = changes.get(output), before[output], after[output]
        assert new == pytest.approx(expected[output], rel=1e-12), f"{output} after {name}"
        if isinstance(how, int):
            assert new == pytest.approx(old * 1.1**how, rel=1e-12), f"{output} after {name}"
        elif how is not None:
            assert new > old * (1 + 1e-9) if how == "+" else new < old * (1 - 1e-9), f"{output} after {name}"
        else:
            assert new == pytest.approx(old, rel=1e-14), f"{output} after {name}"


def perturbed(name: str) -> Inputs:
    value = getattr(BASE, name)
    return dataclasses.replace(BASE, **{name: value * 11 // 10 if name == "tokens" else value * 1.1})


def test_the_formulas_are_those_of_exact_fractions():
    assert flat(by_list(BASE), BASE) == pytest.approx(oracle(BASE, seconds=False), rel=1e-12)
    assert BASE.gpu_prefill is not None
    assert flat(price(BASE, BASE.gpu_prefill), BASE) == pytest.approx(oracle(BASE, seconds=True), rel=1e-12)


@pytest.mark.parametrize("name", pricing.NAMES)
def test_ten_percent_more_of_an_input_changes_what_it_must_and_nothing_else(name):
    more = perturbed(name)
    check_perturbed(name, flat(by_list(BASE), BASE), flat(by_list(more), more), oracle(more, seconds=False))
    assert more.gpu_prefill is not None
    assert flat(price(more, more.gpu_prefill), more) == pytest.approx(oracle(more, seconds=True), rel=1e-12)


def test_control_an_output_that_follows_no_input_is_caught():
    more = perturbed("egress_gb")
    stale = flat(by_list(BASE), BASE)
    with pytest.raises(AssertionError, match="egress after egress_gb"):
        check_perturbed("egress_gb", stale, stale, oracle(more, seconds=False))


def test_the_same_seconds_at_the_price_that_the_list_comes_to_cost_the_same():
    same = dataclasses.replace(BASE, gpu_hour=by_list(BASE).gpu_hour)
    assert same.gpu_prefill is not None
    assert flat(price(same, same.gpu_prefill), same) == pytest.approx(flat(by_list(same), same), rel=1e-12)


# -- when it pays ------------------------------------------------------------------------------------------------------

SECONDS = st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(SECONDS, SECONDS, st.integers(0, 10**6))
def test_reads_beyond_the_break_even_pay_and_no_others(prefill, reuse, reads):
    even = break_even_reads(prefill, reuse)
    if reuse >= prefill:
        assert even == math.inf
        return
    assert 1 <= even < math.inf
    p, r = Fraction(prefill), Fraction(reuse)
    exact = p / (p - r)
    assert exact > 1 and even == pytest.approx(float(exact), rel=1e-15 + 2e-16 * float(exact))
    if abs(reads - exact) > 1e-9 * exact:  # beside the bound itself, which is rounded
        assert (p + reads * r < reads * p) == (reads > even)


@settings(deadline=None)
@given(SECONDS, SECONDS | st.just(0), st.floats(1e-6, 100), st.integers(0, 10**7))
def test_hosting_pays_beyond_its_reads_a_month_and_no_others(prefill, reuse, rent, reads):
    inputs = paper(prefill_seconds=prefill, reuse_seconds=reuse, gpu_gb_hour=rent, reads_month=reads)
    costs = by_list(inputs)
    for tier in costs.hosting:
        bound = tier.pays_from_reads
        assert bound >= 0
        if tier.read >= costs.prefill:
            assert bound == math.inf
        elif abs(reads - bound) > 1e-6 * bound and abs(tier.month - costs.month_prefill) > 1e-9 * costs.month_prefill:
            assert (tier.month < costs.month_prefill) == (reads > bound)


@settings(deadline=None)
@given(SECONDS | st.just(0), SECONDS, st.floats(1e-6, 10) | st.just(0))
def test_egress_pays_below_its_price_and_no_other(reuse, prefill, egress):
    costs = by_list(paper(reuse_seconds=reuse, prefill_seconds=prefill, egress_gb=egress))
    if abs(costs.egress + costs.reuse - costs.prefill) > 1e-9 * costs.prefill:
        assert (costs.egress + costs.reuse < costs.prefill) == (egress < costs.egress_pays_below)


EXTREMES = {
    field.name: st.sampled_from([1, 10**15] if field.metadata["whole"] else [1e-12, 1.0, 1e15])
    | (st.just(0) if field.metadata["zero"] else st.nothing())
    for field in dataclasses.fields(Inputs)
}


@settings(deadline=None, max_examples=50)
@given(st.fixed_dictionaries(EXTREMES))
def test_whatever_is_allowed_gives_numbers_or_never(values):
    inputs = Inputs(**values)
    for prefill in (inputs.list_prefill, inputs.gpu_prefill):
        found = flat(price(inputs, prefill), inputs)
        assert {k for k, v in found.items() if not math.isfinite(v)} <= {
            "speedup",
            "break_even",
            *of_tiers("pays_from_reads"),
        }
        assert min(v for k, v in found.items() if k not in ("saved", "egress_pays_below")) >= 0
    json.dumps(pricing.fields(inputs, ""), allow_nan=False)
    said = " ".join(text for _, text in pricing.lines(inputs, ""))
    assert not any(word in said for word in ("nan", "inf", "e+", "e-"))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cost(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main(["cost", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def found(cost) -> Callable[..., dict[str, Any]]:
    def run(*words: object) -> dict[str, Any]:
        code, out, err = cost(*words, "--json")
        assert code == 0, err
        result: dict[str, Any] = json.loads(out)
        return result

    return run


def test_the_readme_shows_what_it_prints(cost):
    lines = README.read_text(encoding="utf-8").splitlines()
    begin = lines.index("    $ kvkern cost --gpu-hour 3")
    code, out, _ = cost("--gpu-hour", 3)
    said = out.splitlines()
    assert code == 0 and [line.removeprefix("    ") for line in lines[begin + 1 : begin + 1 + len(said)]] == said


def test_json_and_table_say_the_same(cost, found):
    result = found()
    assert result["by_seconds"] is None and result["from"] == "preset paper"
    out = cost()[1]
    for text in (
        "147,456 bytes",
        "0.543 GB",
        "49.7x",
        "1.02 reads",
        "$0.0189",
        "$0.0489",
        "2.59x",
        "$1.51 M",
        "$0.0304 M",
    ):
        assert text in out
    assert "--gpu-hour" in out and "by seconds  " in out


def test_reuse_that_is_slower_never_pays_and_says_so(cost, found):
    result = found("--reuse-seconds", 20)
    assert result["break_even_reads"] is None
    assert [tier["pays_from_reads"] for tier in result["by_list"]["hosting"]] == [None] * 3
    out = cost("--reuse-seconds", 20)[1]
    assert "it never pays" in out and out.count("  never") == 3 and "at no price" in out


def test_later_values_override_earlier_ones(found, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        "egress_gb = 0.05\nreads_month = 7\n[geometry]\nlayers = 2\nnum_kv_heads = 1\nhead_dim = 16\nelement_bytes = 2\n"
    )
    result = found("--inputs", file, "--reads-month", 9, "--preset", "paper-255")["inputs"]
    assert (result["egress_gb"], result["reads_month"], result["token_bytes"], result["tokens"]) == (0.05, 9, 128, 255)
    assert found("--inputs", file, "--token-bytes", 5)["inputs"]["token_bytes"] == 5


def test_the_presets_seconds_for_another_length_are_remarked_on(cost):
    assert "reuse_seconds is the preset's, of 3,774 tokens" in cost("--tokens", 9000)[2]
    assert cost("--tokens", 9000, "--prefill-seconds", 60, "--reuse-seconds", 0.4)[2] == ""


def cell(tokens: int, **seconds: list[float]) -> dict[str, Any]:
    """As bench/bench_document.py writes it."""
    parts = {
        "prefill": [4.0, 2.0, 3.0],
        "step": [0.5, 0.25, 0.75],
        "load_cold": [0.5],
        "load_warm": [0.25],
        "copy_pinned": [],
    }
    shape = {"part": "length", "P": tokens, "model": "tiny", "dtype": "float32"}
    return {"shape": shape, "document": tokens, "kv_bytes": tokens * 2000, "backend": "cpu", "seconds": parts | seconds}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_measured_seconds_stand_in_the_place_of_list_prices(found, tmp_path):
    agents = {"shape": {"part": "agents", "B": 4}, "document": 100, "seconds": {"step": [0.1]}}
    file = write(tmp_path / "document.json", {"results": [cell(100), cell(200, copy_pinned=[0.125]), agents]})
    result = found("--measured", file, "--tokens", 200, "--gpu-hour", 36)
    inputs = {k: result["inputs"][k] for k in ("tokens", "token_bytes", "gb_bytes", "prefill_seconds", "reuse_seconds")}
    assert list(inputs.values()) == [200, 2000, 1e9, 3.0, 0.5]
    assert (result["inputs"]["cpu_bytes_per_s"], result["inputs"]["disk_bytes_per_s"]) == (
        400_000 / 0.125,
        400_000 / 0.5,
    )
    by_seconds = result["by_seconds"]
    assert (by_seconds["prefill"], by_seconds["reuse"]) == pytest.approx((0.03, 0.005))
    assert by_seconds["egress_by_prefill"] == pytest.approx(0.0004 * 0.09 / 0.03)
    assert [tier["read_seconds"] for tier in by_seconds["hosting"]] == pytest.approx([0.5, 0.625, 1.0])
    assert "document.json: medians of tiny  float32" in result["from"]


def test_a_record_of_publish_needs_only_the_seconds_of_reuse_beside_it(found, cost, tmp_path):
    file = write(tmp_path / "doc.json", {"file": "a.kv", "tokens": 100, "kv_bytes": 128_000, "prefill_seconds": 1.5})
    result = found("--measured", file, "--gpu-hour", 2, "--reuse-seconds", 0.1)["inputs"]
    assert (result["tokens"], result["token_bytes"], result["prefill_seconds"]) == (100, 1280, 1.5)
    code, _, err = cost("--measured", file, "--gpu-hour", 2)
    assert code == 1 and err.startswith("RequestError: reuse_seconds: ") and "--reuse-seconds" in err
    code, _, err = cost("--measured", file, "--reuse-seconds", 0.1)
    assert code == 1 and err.startswith("RequestError: gpu_hour: ")


@pytest.mark.parametrize("name", pricing.NAMES)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, 1e300, True, "1", None, 10**400])
def test_a_value_that_is_no_amount_is_refused_by_name(name, value):
    if value is None and name == "gpu_hour":
        return
    with pytest.raises(RequestError) as refused:
        dataclasses.replace(BASE, **{name: value})
    assert refused.value.field == name and len(refused.value.found) < 100 and refused.value.do


ZERO = {"reuse_seconds", "cache_read_factor", "egress_gb", "gpu_gb_hour", "cpu_gb_hour", "disk_gb_month", "reads_month"}


@pytest.mark.parametrize("name", pricing.NAMES)
def test_zero_is_refused_where_it_has_no_meaning(name):
    if name in ZERO | {"agents"}:
        assert getattr(dataclasses.replace(BASE, **{name: 0}), name) == 0
    else:
        with pytest.raises(RequestError, match=f"^{name}: found 0"):
            dataclasses.replace(BASE, **{name: 0})


@pytest.mark.parametrize("name", sorted(set(pricing.NAMES) - {"tokens"}))
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_an_option_is_refused_by_name(cost, name, value):
    code, out, err = cost(f"--{name.replace('_', '-')}", value)
    assert (code, out) == (1, "") and err.startswith(f"RequestError: {name}: found {float(value)!r}, needed ")


TOML_GEOMETRY = "[geometry]\nlayers = {}\nnum_kv_heads = 8\nhead_dim = 128\nelement_bytes = 2\n"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("egres_gb = 1", "egres_gb"),
        ("[prices]\ngpu = 1", "prices"),
        ("tokens = 1.5", "tokens"),
        ("agents = nan", "agents"),
        ("agents = -inf", "agents"),
        ("agents = [1]", "agents"),
        ("agents = 1979-05-27", "agents"),
        ("agents = true", "agents"),
        ('agents = "' + "9" * 9999 + '"', "agents"),
        ("token_bytes = 3\n" + TOML_GEOMETRY.format(1), "geometry"),
        ("geometry = 3", "geometry"),
        ("geometry = {layers = 3}", "geometry"),
        (TOML_GEOMETRY.format(-1), "geometry.layers"),
        (TOML_GEOMETRY.format("true"), "geometry.layers"),
        (TOML_GEOMETRY.format("nan"), "geometry.layers"),
        ("agents = " + "9" * 9999, "inputs"),
        ("agents =", "inputs"),
        ("agents = " + "[" * 9999, "inputs"),
    ],
)
def test_a_bad_toml_file_is_refused_by_name(cost, tmp_path, text, field):
    code, out, err = cost("--inputs", write(tmp_path / "bad.toml", text))
    assert (code, out) == (1, "") and err.startswith(f"RequestError: {field}: found ") and len(err) < 800


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{", "measured"),
        ("[" * 99999, "measured"),
        ([1], "measured"),
        ({}, "tokens"),
        ({"tokens": 5, "prefill_seconds": "1"}, "measured.prefill_seconds"),
        ({"tokens": 5, "kv_bytes": 0}, "measured.kv_bytes"),
        ('{"tokens": NaN}', "measured.tokens"),
        ({"results": []}, "tokens"),
        ({"results": 3}, "measured"),
        ({"results": [{"document": 3}]}, "measured"),
        ({"results": [cell(100), cell(200)]}, "tokens"),
        ({"results": [cell(100, step=[])]}, "measured"),
        ({"results": [cell(100, step=[-1.0])]}, "measured.step"),
        ({"results": [cell(100, prefill=[1.0, math.inf])]}, "measured.prefill"),
    ],
)
def test_a_bad_measured_file_is_refused_by_name(cost, tmp_path, content, field):
    code, out, err = cost("--measured", write(tmp_path / "bad.json", content), "--gpu-hour", 1)
    assert (code, out) == (1, "") and err.startswith(f"RequestError: {field}: found ") and len(err) < 800


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--preset", "none"), "preset"),
        (("--inputs", "none.toml"), "inputs"),
        (("--measured", "none.json"), "measured"),
        (("--model", "x", "--token-bytes", 3), "token_bytes"),
        (("--tokens", 0), "tokens"),
    ],
)
def test_what_is_not_there_is_refused_by_name(cost, words, field):
    code, out, err = cost(*words)
    assert (code, out) == (1, "") and err.startswith(f"RequestError: {field}: found ")


def test_it_answers_without_torch():
    program = (
        "import sys; sys.argv[0] = 'kvkern'; from kvkern import cli; code = cli.main(['cost'])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "$1.51 M" in done.stdout, done.stderr
