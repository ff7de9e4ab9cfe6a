"""What `kvkern cost` is given, and how it says what cost.py computes: presets, TOML, measured JSON, the table.

Later ones override earlier ones: preset, --inputs, --measured, --model, options.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvkern import console, opening
from kvkern.cost import LEAST, MOST, Costs, Hosting, Inputs, break_even_reads, kv_token_bytes, price
from kvkern.errors import RequestError

PRESETS = Path(__file__).parent / "data" / "cost.toml"

NAMES = tuple(field.name for field in dataclasses.fields(Inputs))

MEASURED = ("tokens", "token_bytes", "prefill_seconds", "reuse_seconds", "gpu_hour")
"""Inputs that no preset may give where others are measured: they belong to one machine and one document."""

Values = dict[str, Any]


# -- what is given -----------------------------------------------------------------------------------------------------


def preset(name: str) -> Values:
    """Values of a preset of data/cost.toml. Raises RequestError naming those that there are."""
    tables = tomllib.loads(PRESETS.read_text(encoding="utf-8"))
    if name not in tables:
        raise RequestError("preset", found=name, needed=f"one of {', '.join(tables)}", do="name one of these")
    return {**_flat(tables["paper"], PRESETS.name), **_flat(tables[name], PRESETS.name)}


def read_inputs(source: str | Path) -> Values:
    """Values of a TOML file (- for standard input): names of Inputs, and `geometry` in the place of token_bytes."""
    try:
        found = tomllib.loads(opening.read_text("inputs", source))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError("inputs", found=f"{source}: {error}", needed="a TOML file", do="correct it") from None
    return _flat(found, _name(source))


def _flat(found: Mapping[str, Any], where: str) -> Values:
    """Names checked, geometry turned into token_bytes."""
    values, known = dict(found), (*NAMES, "geometry")
    for name in values:
        if name not in known:
            do = "correct it, or leave it out"
            raise RequestError(_cut(name), found=f"in {where}", needed=f"one of {', '.join(known)}", do=do)
    if "geometry" in values:
        shape, parts = values.pop("geometry"), {"layers", "num_kv_heads", "head_dim", "element_bytes"}
        if "token_bytes" in values or not isinstance(shape, dict) or set(shape) != parts:
            wrong = "token_bytes beside it" if "token_bytes" in values else _cut(repr(shape))
            needed = f"a table of {', '.join(sorted(parts))}"
            raise RequestError("geometry", found=wrong, needed=needed, do="give these, or token_bytes alone")
        values["token_bytes"] = kv_token_bytes(**shape)
    return values


def read_measured(source: str | Path, tokens: int | None = None) -> tuple[Values, str]:
    """Values that a JSON file holds, and what they are of.

    A file of bench/bench_document.py: medians of the cell of so many tokens, or of its only one; a step is the reuse, a
    copy from pinned memory (on a CPU a load from the page cache) the way from CPU memory, a cold load that from disk. Any
    other JSON object, for instance that of `kvkern publish --json`: those of tokens, token_bytes or kv_bytes,
    prefill_seconds and reuse_seconds that it has.
    """
    try:
        found = json.loads(opening.read_text("measured", source))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError("measured", found=f"{source}: {error}", needed="a JSON file", do="measure again") from None
    if not isinstance(found, dict):
        raise RequestError("measured", found=type(found).__name__, needed="a JSON object", do="give another file")
    name = _name(source)
    if "results" in found:
        return _cell(found["results"], name, tokens)
    values = {key: _number(found, key) for key in ("tokens", *MEASURED[1:4], "kv_bytes") if key in found}
    if "kv_bytes" in values and "tokens" in values:
        values.setdefault("token_bytes", values["kv_bytes"] / values["tokens"])
    values.pop("kv_bytes", None)
    return values, name


def _cell(results: Any, name: str, tokens: int | None) -> tuple[Values, str]:
    """A document's cell of bench_document.py; the last one of that length."""
    try:
        cells = {int(cell["document"]): cell for cell in results if cell["shape"].get("part") == "length"}
        chosen = tokens if tokens is not None else min(cells) if len(cells) == 1 else None
        if chosen not in cells:
            lengths = ", ".join(map(str, sorted(cells))) or "none"
            found = f"{lengths} in {name}"
            raise RequestError("tokens", found=found, needed="one of these", do="name its length by --tokens")
        cell = cells[chosen]
        seconds = {part: [_number({part: s}, part) for s in samples] for part, samples in cell["seconds"].items()}
        median = {part: statistics.median(samples) for part, samples in seconds.items() if samples}
        size = _number(cell, "kv_bytes")
        values = {
            "tokens": chosen,
            "token_bytes": size / chosen,
            "prefill_seconds": median["prefill"],
            "reuse_seconds": median["step"],
            "cpu_bytes_per_s": size / median.get("copy_pinned", median["load_warm"]),
            "disk_bytes_per_s": size / median["load_cold"],
        }
        what = "  ".join(str(cell["shape"][key]) for key in ("model", "dtype") if key in cell["shape"])
        return values, f"{name}: medians of {what}, backend {cell.get('backend', '?')}"
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        found = f"{name}: {type(error).__name__} at {_cut(str(error))}"
        needed = "a file of bench/bench_document.py"
        raise RequestError("measured", found=found, needed=needed, do="measure again, or give the seconds") from None


def _number(found: Mapping[str, Any], key: str) -> Any:
    """A measured number, which is above 0."""
    value = found[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST <= value <= MOST:
        needed = f"a number above 0, up to {MOST:.0e}"
        raise RequestError(f"measured.{key}", found=_cut(repr(value)), needed=needed, do="measure again")
    return value


def _name(source: str | Path) -> str:
    return "standard input" if str(source) == "-" else Path(source).name


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def gather(
    options: Mapping[str, Any],
    *,
    preset_name: str | None = None,
    file: str | None = None,
    measured: str | None = None,
    model: str | None = None,
) -> tuple[Inputs, str, list[str]]:
    """(inputs, where they are from, what to beware of). options: by name of Inputs, None where not given."""
    name = preset_name if preset_name is not None else "list" if measured is not None else "paper"
    base, given, origin, notes = preset(name), dict[str, Any](), f"preset {name}", list[str]()
    own = {key: value for key, value in options.items() if value is not None}
    if file is not None:
        given |= read_inputs(file)
        origin += f", then {_name(file)}"
    if measured is not None:
        read, what = read_measured(measured, own.get("tokens", given.get("tokens")))
        given |= read
        origin += f", then {what}"
    if model is not None:
        if "token_bytes" in own:
            raise RequestError("token_bytes", found="beside --model", needed="one of the two", do="leave one out")
        given["token_bytes"] = opening.weigh_model(model, "auto")[0].token_bytes()
        origin += f", then {model}"
    given |= own
    if own:
        origin += ", then options"
    if measured is not None:
        for key in MEASURED:
            if given.get(key) is None:
                flag = f"--{key.replace('_', '-')}"
                found = f"none in {_name(measured)}" if key != "gpu_hour" else "none"
                raise RequestError(key, found=found, needed="a value beside what is measured", do=f"give {flag}")
    for key in ("prefill_seconds", "reuse_seconds"):
        if "tokens" in given and key not in given and given["tokens"] != base["tokens"]:
            notes.append(f"{key} is the preset's, of {base['tokens']:,} tokens: give --{key.replace('_', '-')}")
    return Inputs(**{**base, **given}), origin, notes


# -- what is said ------------------------------------------------------------------------------------------------------


def fields(inputs: Inputs, origin: str) -> dict[str, Any]:
    """What --json prints; null for never. Dollars by the list, and by seconds of the machine where gpu_hour is given."""
    gpu = inputs.gpu_prefill
    found = {
        "from": origin,
        "inputs": dataclasses.asdict(inputs),
        "kv_bytes": inputs.kv_bytes,
        "kv_gb": inputs.kv_gb,
        "speedup": inputs.speedup,
        "break_even_reads": break_even_reads(inputs.prefill_seconds, inputs.reuse_seconds),
        "by_list": dataclasses.asdict(price(inputs, inputs.list_prefill)),
        "by_seconds": None if gpu is None else dataclasses.asdict(price(inputs, gpu)),
    }
    finite: dict[str, Any] = _finite(found)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dollars(value: float, unit: float | None = None) -> str:
    """Three digits and more: $0.0189, $18.87, $30,377, $1.51 M; in millions where `unit` is, or if it is None value itself."""
    sign, size = "-" if value < 0 else "", abs(value)
    if abs(size if unit is None else unit) >= 1e6:
        return f"{sign}${_digits(size / 1e6)} M"
    return f"{sign}${_digits(size)}"


def _digits(size: float) -> str:
    """Three digits or more, never an exponent."""
    if size < 1:
        return f"{size:.{min(12, 2 - math.floor(math.log10(size)))}f}" if size else "0"
    return f"{size:,.2f}" if size < 1000 else f"{size:,.0f}"


def _plain(size: float) -> str:
    """An input as it was given: 0.1, 1,000, 80,000,000."""
    return f"{size:,.12f}".rstrip("0").rstrip(".")


def lines(inputs: Inputs, origin: str) -> console.Lines:
    """The same for eyes: a block of aligned columns for each thing that is paid for, a column for each price of a second."""
    ways = [("by list price", price(inputs, inputs.list_prefill))]
    if inputs.gpu_prefill is not None:
        ways.append((f"by seconds, {dollars(inputs.gpu_hour or 0)}/h", price(inputs, inputs.gpu_prefill)))
    heads, costs = [name for name, _ in ways], [found for _, found in ways]
    size = f"{_digits(inputs.kv_gb)} GB of {inputs.gb_bytes:,.0f} bytes"
    even = break_even_reads(inputs.prefill_seconds, inputs.reuse_seconds)
    pays = "it never pays" if math.isinf(even) else f"it pays beyond {even:.2f} reads"
    ratio = f"{inputs.speedup:.1f}x" if math.isfinite(inputs.speedup) else "it takes none"
    blank = ("", "")
    return [
        ("inputs", origin),
        ("document", f"{inputs.tokens:,} tokens of {inputs.token_bytes:,.0f} bytes: {size}"),
        (
            "seconds",
            f"prefill {_digits(inputs.prefill_seconds)}, reuse {_digits(inputs.reuse_seconds)}: {ratio}; {pays}",
        ),
        ("", f"at the list price its prefill is worth {dollars(costs[0].gpu_hour)} an hour of the machine"),
        blank,
        *_block("a read", heads, _read_rows(inputs, costs)),
        blank,
        *_block("a month", heads, _month_rows(inputs, costs)),
        blank,
        *_block("agents", heads, _agent_rows(inputs, costs)),
        blank,
        *_block("pays", heads, _pays_rows(inputs, costs)),
        *([] if inputs.gpu_hour else [blank, ("by seconds", "give --gpu-hour, the price of the machine they are of")]),
    ]


Rows = list[tuple[str, list[str]]]


def _block(name: str, heads: list[str], rows: Rows) -> console.Lines:
    """A heading, and rows of columns that end where the heading's words do."""
    first = max(len(label) for label, _ in rows)
    return [
        (name if i == 0 else "", f"{label:<{first}}" + "".join(f"  {cell:>20}" for cell in cells))
        for i, (label, cells) in enumerate([("", heads), *rows])
    ]


def _read_rows(inputs: Inputs, ways: list[Costs]) -> Rows:
    def row(label: str, of: Callable[[Costs], float]) -> tuple[str, list[str]]:
        return label, [f"{dollars(of(costs))} {_digits(of(costs) / costs.prefill):>8}x" for costs in ways]

    return [
        row("prefill", lambda costs: costs.prefill),
        row("reuse", lambda costs: costs.reuse),
        row("load from CPU memory, reuse", lambda costs: costs.hosting[1].read),
        row("load from disk, reuse", lambda costs: costs.hosting[2].read),
        row(_bought(inputs), lambda costs: costs.tariff),
        row("egress of the KV", lambda costs: costs.egress),
    ]


def _month_rows(inputs: Inputs, ways: list[Costs]) -> Rows:
    tiers = ways[0].hosting
    return [
        (f"{_plain(inputs.reads_month)} reads, prefill each", [dollars(costs.month_prefill) for costs in ways]),
        *(
            (
                f"{_kept(tier)}, rent {dollars(tier.rent_month)}",
                [dollars(costs.hosting[i].month) for costs in ways],
            )
            for i, tier in enumerate(tiers)
        ),
        ("bought each time", [dollars(costs.month_tariff) for costs in ways]),
        ("KV sent each time, and reuse", [dollars(costs.month_egress) for costs in ways]),
    ]


def _agent_rows(inputs: Inputs, ways: list[Costs]) -> Rows:
    def row(label: str, of: Callable[[Costs], float]) -> tuple[str, list[str]]:
        return label, [dollars(of(costs), unit=costs.agents_prefill) for costs in ways]

    return [
        row(f"{_plain(inputs.agents)}, prefill each", lambda costs: costs.agents_prefill),
        row("one prefill, reuse each", lambda costs: costs.agents_reuse),
        row("saved", lambda costs: costs.agents_prefill - costs.agents_reuse),
    ]


def _pays_rows(inputs: Inputs, ways: list[Costs]) -> Rows:
    def reads(bound: float) -> str:
        return "never" if math.isinf(bound) else f"from {math.floor(bound) + 1:,} a month"

    return [
        *(
            (_kept(tier), [reads(costs.hosting[i].pays_from_reads) for costs in ways])
            for i, tier in enumerate(ways[0].hosting)
        ),
        (
            "KV sent",
            [f"below {dollars(c.egress_pays_below)}/GB" if c.egress_pays_below > 0 else "at no price" for c in ways],
        ),
        (_bought(inputs), [_who(costs) for costs in ways]),
    ]


def _bought(inputs: Inputs) -> str:
    return f"bought at {_plain(inputs.cache_read_factor)}x of the list"


def _kept(tier: Hosting) -> str:
    return f"KV {'on' if tier.tier == 'disk' else 'in'} {tier.tier}"


def _who(costs: Costs) -> str:
    """Who gains where a cached read is bought: reuse < tariff is the seller's gain, tariff < prefill the buyer's."""
    if costs.tariff_inside:
        return "for buyer and seller"
    if costs.tariff < costs.prefill:
        return "for the buyer"
    return "for the seller" if costs.tariff > costs.reuse else "for neither"
