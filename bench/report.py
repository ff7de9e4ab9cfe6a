"""Tables of the README, from the files under bench/results/. Nothing in them is written by hand.

python bench/report.py            rewrites the part of README.md between the two marks, and beside each layer.json of a CPU
                                  layer.md, a row for every cell, and layer.svg, a figure; beside each paper.json
                                  report.html and paper.svg; and docs/paper.md
python bench/report.py --check    exit 1 if one of them is not what the files give
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import claims
from plot import Curve, Panel, svg

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
MISSING = "not measured"
PEERS = {
    "cuda": {
        "expanded_sdpa": "unshared sdpa",
        "cudnn_rows": "cuDNN over packed rows",
        "flex_rows": "FlexAttention over packed rows",
        "flashinfer_cascade": "FlashInfer cascade",
        "flashinfer_cascade_fa2": "the same by fa2",
        "flashinfer_decode": "FlashInfer decode",
        "gemm": "the two GEMMs alone",
    },
    "cpu": {
        "expanded_sdpa": "unshared sdpa",
        "flash_rows": "torch's flash over packed rows",
        "torch_backend": "`torch` backend",
        "gemm": "the two GEMMs alone",
    },
}
"""Entries of bench_layer.py on each kind of device, as the tables name them."""


def demo_table(path: Path) -> list[str]:
    """The main job: reuse against from scratch."""
    d = json.loads(path.read_text())
    setting = (
        f"{d['agents']} agents, {d['document_tokens']:,} document tokens, at most {d['new_tokens']} new tokens each"
    )
    rows = [
        ("seconds an agent", f"{d['reuse_seconds_per_agent']:.3f}", f"{d['scratch_seconds_per_agent']:.2f}"),
        (
            "KV of the document",
            f"{d['kv_bytes'] / 2**20:.1f} MiB",
            f"{d['kv_bytes_expanded'] / 2**30:.1f} GiB in copies",
        ),
        ("ratio of the seconds", f"{d['ratio']:.1f}x", "1"),
    ]
    return [
        f"The main job (`make demo`): {d['model']}, {d['dtype']}, {setting}; backend {d['backend']}, "
        f"{d['machine']['threads']} threads of {d['machine']['cpu']}. Of {d['compared_tokens']} compared tokens "
        f"{100 * d['token_exact']:.0f} % are those of transformers from scratch; with the document's values zeroed "
        f"{100 * d['control_tokens_equal']:.0f} %. File: `{path.relative_to(ROOT)}`.",
        "",
        "| | kvkern | transformers from scratch |",
        "|---|---|---|",
        *(f"| {name} | {ours} | {theirs} |" for name, ours, theirs in rows),
        "",
        f"Paid once, beside it: prefill {d['prefill_seconds']:.1f} s, load {d['load_seconds']:.1f} s.",
    ]


def prefix_table(path: Path) -> list[str]:
    """One layer's decode step. A ratio below 1 is a row where we lose."""
    file = json.loads(path.read_text())
    where = file["machine"].get("gpu") or f"{file['machine']['threads']} threads of {file['machine']['cpu']}"
    lines = [
        f"One layer's decode step over a shared prefix, {where}, torch {file['machine']['versions']['torch']}; medians, in "
        "brackets the spread (largest less smallest sample); ratios say how many times as long the other takes. "
        f"File: `{path.relative_to(ROOT)}`.",
        "",
        "| agents | prefix | heads | D | dtype | kvkern | GFLOP/s | unshared sdpa | the two GEMMs alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in file["results"]:
        shape, seconds = result["shape"], result["seconds"]
        medians = {name: statistics.median(samples) for name, samples in seconds.items()}
        ours = medians["kvkern"]
        spread = 100 * (max(seconds["kvkern"]) - min(seconds["kvkern"])) / ours
        lines.append(
            f"| {shape['N']} | {shape['P']:,} | {shape['heads']} | {shape['D']} | {shape['dtype']} | {ours * 1e3:.2f} ms "
            f"({spread:.0f} %) | {result['flop'] / ours / 1e9:.0f} | {medians['expanded'] / ours:.2f}x | "
            f"{medians['gemm'] / ours:.2f}x |"
        )
    return lines


def layer_table(path: Path) -> list[str]:
    """One layer's step beside its peers; what has no time says so. A ratio below 1 is a row where we lose."""
    file = json.loads(path.read_text())
    return cpu_summary(path, file) if file["machine"]["device"] == "cpu" else gpu_layer_table(path, file)


def gpu_layer_table(path: Path, file: dict[str, Any]) -> list[str]:
    """A row a cell."""
    facts, peers = file["machine"], PEERS[file["machine"]["device"]]
    lines = [
        f"One layer's decode step, {facts.get('gpu') or facts['cpu']}, torch {facts['versions']['torch']}, triton "
        f"{facts['versions']['triton']}; medians, in brackets the spread (largest less smallest sample); shares are of the rates "
        "of a matrix product and of a copy in the same run; K1 and K2 alone, out of cold caches; ratios say how many times as "
        f"long the other takes. File: `{path.relative_to(ROOT)}`.",
        "",
        "| agents | prefix | suffix | heads | dtype | kvkern | of GEMM | of copy | K1 | K2 | "
        + " | ".join(peers.values())
        + " |",
        "|---" * (10 + len(peers)) + "|",
    ]
    for result in file["results"]:
        seconds = result["seconds"]
        ours = seconds["kvkern"]
        median = statistics.median(ours)
        alone = [f"{statistics.median(seconds[k]) * 1e3:.3f} ms" if seconds.get(k) else MISSING for k in ("K1", "K2")]
        ratios = [f"{statistics.median(seconds[k]) / median:.2f}x" if seconds.get(k) else MISSING for k in peers]
        shares = [
            f"{100 * result[share]:.0f} %" if share in result else MISSING for share in ("gemm_share", "copy_share")
        ]
        cells = [
            f"{result['agents']}",
            f"{result['prefix']:,}",
            f"{result['suffix']}",
            result["geometry"],
            result["dtype"],
            f"{median * 1e3:.3f} ms ({100 * (max(ours) - min(ours)) / median:.0f} %)",
            *shares,
            *alone,
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for cell in file.get("failed", ()):
        shape = ", ".join(f"{name} {cell['shape'][name]}" for name in "BPS")
        # A reason may have several lines.
        lines += ["", f"No time for {shape}: {' '.join(cell['reason'].split())}."]
    return lines


# -- a CPU's layer.json ------------------------------------------------------------------------------------------------


class Aim(NamedTuple):
    """What the kernels are to reach.

    text     as the table says it
    needed   the least value, None where it is told but not judged
    value    of a row of the file, or None where the aim does not speak of that row
    percent  whether a value is a share of a rate, else how many times as fast
    """

    text: str
    needed: float | None
    value: Callable[[dict[str, Any]], float | None]
    percent: bool


def aims(instruction_set: str, *, best: bool) -> list[Aim]:
    """Of one instruction set; torch itself runs in the best one, so it is no measure of the others."""

    def many(row: dict[str, Any], dtype: str | None = None, head_dim: int | None = None) -> bool:
        return (
            row["agents"] >= 64
            and row["prefix"] >= 2048
            and dtype in (None, row["dtype"])
            and (head_dim is None or row["geometry"].endswith(f"x{head_dim}"))
        )

    def share(dtype: str, head_dim: int, field: str = "k1_gemm_share") -> Callable[[dict[str, Any]], float | None]:
        return lambda row: row.get(field) if many(row, dtype, head_dim) else None

    def k1_against(peer: str, dtype: str | None = None) -> Callable[[dict[str, Any]], float | None]:
        """Rows without a suffix, where the peer does what K1 does."""

        def value(row: dict[str, Any]) -> float | None:
            samples, ours = row["seconds"].get(peer), row["seconds"].get("K1")
            if row["suffix"] or not many(row, dtype) or not samples or not ours:
                return None
            return statistics.median(samples) / statistics.median(ours)

        return value

    def few(row: dict[str, Any]) -> float | None:
        return row.get("k1_copy_share") if row["agents"] <= 4 and row["prefix"] == 32768 else None

    def suffix(row: dict[str, Any]) -> float | None:
        return row.get("k2_copy_share") if row["agents"] >= 64 and row["suffix"] >= 64 else None

    crowd, pairs = "K1, 64 agents and more over 2,048 tokens and more", instruction_set == "avx512bf16"
    bf16 = f"{crowd}, bf16"
    return [
        Aim(f"{crowd}, fp32, D = 128: of the GEMM rate", 0.9 if best else None, share("float32", 128), True),
        Aim(f"{crowd}, fp32, D = 64: of the GEMM rate", None, share("float32", 64), True),
        Aim(f"{bf16}, D = 128: of the GEMM rate", 0.7 if pairs else None, share("bfloat16", 128), True),
        Aim(f"{bf16}, D = 64: of the GEMM rate", None, share("bfloat16", 64), True),
        Aim(
            f"{crowd}, fp32, D = 128: of the FMA peak",
            0.85 if instruction_set == "avx2" else None,
            share("float32", 128, "k1_fma_share"),
            True,
        ),
        Aim(
            "K1, the same, fp32: against torch's flash",
            1.1 if best else None,
            k1_against("flash_rows", "float32"),
            False,
        ),
        Aim(
            "K1, the same, bf16: against torch's flash",
            2.0 if best else None,
            k1_against("flash_rows", "bfloat16"),
            False,
        ),
        Aim("K1, the same: against unshared sdpa", 8.0 if best else None, k1_against("expanded_sdpa"), False),
        Aim("K1, 1 to 4 agents over 32,768 tokens: of the copy rate", 0.8, few, True),
        Aim("K2, 64 agents and more, suffixes of 64 and more: of the copy rate", 0.75, suffix, True),
    ]


def instruction_sets(file: dict[str, Any]) -> list[str]:
    """Those that have rows, the best first."""
    found = {row["isa"] for row in csrc_rows(file)}
    return [name for name in file["machine"]["instruction_sets"] if name in found]


def csrc_rows(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in file["results"] if row["backend"] == "cpu" and row.get("isa")]


def verdict(values: list[float], needed: float | None) -> str:
    if not values:
        return MISSING
    if needed is None:
        return "told, no aim"
    met = sum(value >= needed for value in values)
    return "met" if met == len(values) else "not met" if not met else f"met in {met} of {len(values)}"


def ranged(values: list[float], *, percent: bool) -> str:
    """Lowest to highest."""

    def one(value: float) -> str:
        return f"{100 * value:.0f} %" if percent else f"{value:.2f}x"

    low, high = (one(pick(values)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def aims_table(file: dict[str, Any]) -> list[str]:
    """Aim, measured, met or not, for every instruction set that was measured."""
    lines = ["| aim | instruction set | needed | measured | cells | |", "|---" * 6 + "|"]
    for n, name in enumerate(instruction_sets(file)):
        rows = [row for row in csrc_rows(file) if row["isa"] == name]
        gains = [kept["gain"] for kept in file.get("threads_gain", ()) if kept["shape"]["isa"] == name]
        found = [
            (aim, [value for row in rows if (value := aim.value(row)) is not None]) for aim in aims(name, best=n == 0)
        ]
        threads = Aim("K1, 1 agent over 32,768 tokens: 2 threads against 1", 1.7, lambda row: None, False)
        for aim, values in [*found, (threads, gains)]:
            needed = "" if aim.needed is None else ranged([aim.needed], percent=aim.percent)
            measured = ranged(values, percent=aim.percent) if values else MISSING
            lines.append(
                f"| {aim.text} | {name} | {needed} | {measured} | {len(values)} | {verdict(values, aim.needed)} |"
            )
    return lines


def cpu_rows(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A table, a row a cell."""
    peers = PEERS["cpu"]
    lines = [
        "| agents | prefix | suffix | heads | dtype | instructions | kvkern | GFLOP/s | of GEMM | of copy | K1 of GEMM | K1 of copy | "
        "K2 of copy | " + " | ".join(peers.values()) + " |",
        "|---" * (13 + len(peers)) + "|",
    ]
    for row in rows:
        shares = [row.get(f) for f in ("gemm_share", "copy_share", "k1_gemm_share", "k1_copy_share", "k2_copy_share")]
        ratios = [row.get(f"ratio_{name}") for name in peers]
        cells = [
            f"{row['agents']:,}",
            f"{row['prefix']:,}",
            f"{row['suffix']}",
            row["geometry"],
            row["dtype"],
            row.get("isa") or row["backend"],
            f"{row['ms']:.2f} ms ({100 * row['spread']['kvkern']:.0f} %)",
            f"{row['gflops']:.0f}",
            *("" if share is None else f"{100 * share:.0f} %" for share in shares),
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


README_CELLS = (
    (1, 32768, 0),
    (1, 8192, 64),
    (64, 2048, 0),
    (64, 2048, 64),
    (64, 8192, 0),
    (1024, 2048, 0),
    (64, 512, 512),
)
README_GEOMETRIES = ("32/8x128", "9/3x64")


def in_readme(file: dict[str, Any]) -> list[dict[str, Any]]:
    """A few rows of every kind, in the best instruction set."""
    best = instruction_sets(file)[:1]
    rows = [row for row in csrc_rows(file) if [row["isa"]] == best and row["geometry"] in README_GEOMETRIES]
    wanted = {cell: n for n, cell in enumerate(README_CELLS)}
    chosen = [row for row in rows if (row["agents"], row["prefix"], row["suffix"]) in wanted]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        cell = wanted[row["agents"], row["prefix"], row["suffix"]]
        return README_GEOMETRIES.index(row["geometry"]), row["dtype"] != "float32", cell

    return sorted(chosen, key=order)


def setting(file: dict[str, Any]) -> str:
    facts = file["machine"]
    return (
        f"{facts['threads']} threads of {facts['cpu']} ({', '.join(facts['instruction_sets'])}), torch "
        f"{facts['versions']['torch']}; medians of interleaved runs, in brackets the spread (largest less smallest "
        "sample). Shares are of the rates of a matrix product of 2,048 cubed in the same dtype, of a copy, bytes read and "
        "written, and of multiply-adds on registers alone (FMA), each in turns with the rest; ratios say how many times as "
        "long the other takes."
    )


def cpu_summary(path: Path, file: dict[str, Any]) -> list[str]:
    """The aims, the figure and a few rows; all of them are in layer.md."""
    folder = path.parent.relative_to(ROOT)
    untimed = len(file.get("failed", ())), len(file.get("not_begun", ()))
    return [
        f"One layer's decode step on a CPU, {setting(file)} A file of {len(file['results'])} cells: `{path.relative_to(ROOT)}`; each has a "
        f"row in `{folder}/layer.md`, as have {untimed[0]} without a time, with the reason ({untimed[1]} more were not begun).",
        "",
        *aims_table(file),
        "",
        f"![GFLOP/s by agents over 2,048 tokens: kvkern beside torch's operators]({folder}/layer.svg)",
        "",
        *cpu_rows(in_readme(file)),
    ]


def cpu_page(file: dict[str, Any]) -> str:
    """layer.md: every row, and why others have none."""

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["geometry"], row["dtype"], row.get("isa") or "", row["suffix"], row["prefix"], row["agents"]

    lines = ["# One layer's decode step, every cell", "", setting(file), "", *aims_table(file), ""]
    lines += cpu_rows(sorted(file["results"], key=order))
    lines += ["", "## 1 agent over 32,768 tokens: K1 with 1 and with 2 threads", ""]
    lines += ["| heads | dtype | instructions | 1 thread | 2 threads | gain |", "|---" * 6 + "|"]
    for kept in file.get("threads_gain", ()):
        shape, (one, two) = kept["shape"], (1e3 * statistics.median(samples) for samples in kept["seconds"].values())
        heads = "{}/{}x{}".format(*shape["heads"])
        lines.append(
            f"| {heads} | {shape['dtype']} | {shape['isa']} | {one:.2f} ms | {two:.2f} ms | {kept['gain']:.2f}x |"
        )
    lines += ["", "## No time", ""]
    for cell in file.get("failed", ()):
        lines.append(f"- {shape_text(cell['shape'])}: {' '.join(cell['reason'].split())}")
    lines += [f"- not begun: {name}" for name in file.get("not_begun", ())]
    for row in file["results"]:
        for name, why in row["reasons"].items():
            if name in PEERS["cpu"]:
                lines.append(f"- {shape_text(row['shape'])}, {PEERS['cpu'][name]}: {' '.join(why.split())}")
    return "\n".join(lines) + "\n"


def shape_text(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items() if value is not None)


def cpu_figure(file: dict[str, Any]) -> str:
    """layer.svg: GFLOP/s by agents over 2,048 tokens without a suffix."""
    sets = instruction_sets(file)
    panels = []
    for geometry in README_GEOMETRIES:
        for dtype in ("float32", "bfloat16"):
            rows = [
                row
                for row in csrc_rows(file)
                if (row["geometry"], row["dtype"], row["prefix"], row["suffix"]) == (geometry, dtype, 2048, 0)
            ]
            panels.append(Panel(f"{geometry}, {dtype}", curves(rows, sets)))
    return svg(panels, x_label="agents over one prefix of 2,048 tokens", y_label="GFLOP/s")


def curves(rows: list[dict[str, Any]], sets: list[str]) -> list[Curve]:
    def points(chosen: list[dict[str, Any]], entry: str) -> list[tuple[float, float]]:
        return [
            (row["agents"], row["flop"] / statistics.median(row["seconds"][entry]) / 1e9)
            for row in chosen
            if row["seconds"].get(entry)
        ]

    best = [row for row in rows if [row["isa"]] == sets[:1]]
    roof = statistics.median([row["roofs"]["gemm_flop_per_s"] / 1e9 for row in best]) if best else 0.0
    found = [Curve("matrix product, 2,048 cubed", "#777777", [(row["agents"], roof) for row in best], dashed=True)]
    for n, name in enumerate(sets):
        own = [row for row in rows if row["isa"] == name]
        found.append(Curve(f"kvkern, {name}", ("#0072b2", "#56b4e9", "#000000", "#e69f00")[n], points(own, "kvkern")))
    for entry, colour in (("flash_rows", "#d55e00"), ("expanded_sdpa", "#cc79a7"), ("torch_backend", "#009e73")):
        found.append(Curve(PEERS["cpu"][entry].replace("`", ""), colour, points(best, entry)))
    return [curve for curve in found if curve.points]


# -- linear layers -----------------------------------------------------------------------------------------------------


LINEAR_ROWS = (1, 16, 33, 64, 257)
"""Of those measured: alone, in a bucket of its own size, and just above the bucket before."""


def linear_table(path: Path) -> list[str]:
    """What padding rows to a bucket of the rounding class costs, by model and dtype."""
    file = json.loads(path.read_text())
    lines = [
        "What bits that do not follow the batch cost in the linear layers: the time of one decoder layer's with rows padded to a bucket of "
        "the rounding class, as many times that of just so many rows "
        f"({file['machine']['threads']} threads of {file['machine']['cpu']}, medians). File: `{path.relative_to(ROOT)}`.",
        "",
        "| model | dtype | buckets | outside | "
        + " | ".join(f"{n} row{'s' * (n > 1)}" for n in LINEAR_ROWS)
        + " | most, from 4 rows on |",
        "|---|---|---|---|" + "---|" * (len(LINEAR_ROWS) + 1),
    ]
    layers: dict[tuple[str, str], dict[int, Any]] = {}
    for result in file["results"]:
        shape = result["shape"]
        layers.setdefault((shape["model"], shape["dtype"]), {})[shape["rows"]] = result
    for (model, dtype), cells in layers.items():
        one = next(iter(cells.values()))
        ratios = [f"{cells[n]['ratio']:.2f}x" if n in cells else MISSING for n in LINEAR_ROWS]
        worst = max((r for n, r in cells.items() if n >= 4), key=lambda r: r["ratio"])
        buckets, outside = ", ".join(map(str, one["buckets"])), ", ".join(one["outside"]) or "none"
        lines.append(
            f"| {model} | {dtype} | {buckets} | {outside} | {' | '.join(ratios)} | "
            f"{worst['ratio']:.2f}x with {worst['shape']['rows']} |"
        )
    return lines


# -- a document by its length and by its agents ------------------------------------------------------------------------


def scratch_agents(result: dict[str, Any]) -> int | None:
    """The most agents at once of whom it is known what they take from scratch."""
    return max(map(int, result.get("from_scratch", ())), default=None)


def document_table(path: Path, part: dict[str, Any] | None = None) -> list[str]:
    """What a document costs by its length, three ratios beside it, and by its agents."""
    file = json.loads(path.read_text()) if part is None else part
    facts = file["machine"]
    where = facts.get("gpu") or f"{facts['threads']} threads of {facts['cpu']}"
    lines = [
        f"What a document costs by its length, {where}, torch {facts['versions']['torch']}; medians. Load and attach verify every "
        "digest; question: 16 tokens up to the first of the answer; step: one agent; answer: its other 63 tokens. Ratios of "
        "these parts: the paper's, prefill / step; a reader's, (prefill + question + answer) / (load + question + answer); a "
        "host's for N agents one after another, N (prefill + question + answer) / (prefill + N (question + answer)). "
        f"File: `{path.relative_to(ROOT)}`.",
        "",
        "| tokens | model | dtype | KV | prefill | save | load, cold | load, warm | attach | from host memory | question | step | answer | "
        "paper's | reader's | host's of 16 | of 1,024 |",
        "|---" * 17 + "|",
    ]
    parts = [result for result in file["results"] if result["shape"]["part"] == "length"]
    for result in sorted(parts, key=lambda result: result["document"]):
        seconds, ratio = result["seconds"], result["ratios"]
        cold = {True: "", False: " (not cold)", None: " (cold not confirmed)"}[result["cold"]]

        def shown(name: str, digits: int = 3, unit: str = "s", seconds: dict[str, Any] = seconds) -> str:
            if not seconds[name]:
                return ""
            return f"{statistics.median(seconds[name]) * (1e3 if unit == 'ms' else 1):.{digits}f} {unit}"

        cells = [
            f"{result['document']:,}",
            result["shape"]["model"],
            result["shape"]["dtype"],
            f"{result['kv_bytes'] / 2**20:.1f} MiB",
            shown("prefill"),
            shown("save"),
            shown("load_cold") + cold,
            shown("load_warm"),
            shown("attach"),
            shown("copy_pinned", 1, "ms"),
            shown("question", 1, "ms"),
            shown("step", 2, "ms"),
            shown("answer", 2),
            f"{ratio['paper']:.1f}x",
            f"{ratio['reader']:.2f}x",
            f"{ratio['host_16']:.2f}x",
            f"{ratio['host_1024']:.2f}x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    parts = [result for result in file["results"] if result["shape"]["part"] == "agents"]
    if parts:
        lines += [
            "",
            "By its agents, all at once, over one shared copy and each over a copy of its own, by agent: a step of one token for each; a "
            "whole answer, question of 16 tokens and 64 of the answer; bytes of KV. From scratch: the whole answer by transformers' own "
            "generate and attention over document and question, measured for as few agents at once as stand in brackets. Not "
            "measured: an answer that would take too long, copies that do not fit.",
            "",
            "| agents | tokens | model | dtype | step, shared | step, copies | answer, shared | answer, copies | bytes, shared | "
            "bytes, copies | answer, from scratch |",
            "|---" * 11 + "|",
        ]
    for result in sorted(parts, key=lambda result: (result["document"], result["agents"])):
        agents, held = result["agents"], result["copies"]
        none = "not measured"
        if not held["measured"]:
            none += f": {held['needed_bytes'] / 2**30:.1f} of {held['found_bytes'] / 2**30:.1f} GiB"

        def answer(kind: str, result: dict[str, Any] = result, none: str = none) -> str:
            """Of an agent, where its question and its answer are measured."""
            rest = result[f"answer{kind}_s"]
            return none if rest is None else f"{(result[f'extend{kind}_s'] + rest) / result['agents']:.3f} s"

        copied = result["step_copied_per_agent_s"]
        cells = [
            f"{agents:,}",
            f"{result['document']:,}",
            result["shape"]["model"],
            result["shape"]["dtype"],
            f"{result['step_per_agent_s'] * 1e3:.3f} ms",
            none if copied is None else f"{copied * 1e3:.3f} ms",
            answer("", none="not measured"),
            answer("_copied"),
            f"{result['bytes_per_agent'] / 2**20:.1f} MiB",
            f"{result['bytes_per_agent_copied'] / 2**20:.1f} MiB",
            MISSING if (few := scratch_agents(result)) is None else f"{result['scratch_per_agent_s']:.2f} s ({few})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for cell in file.get("failed", ()):
        lines += ["", f"No time for {shape_text(cell['shape'])}: {' '.join(cell['reason'].split())}."]
    return lines


# -- exactness at scale ------------------------------------------------------------------------------------------------


def exactness_table(path: Path) -> list[str]:
    """Tokens of answers over a document's KV beside those from scratch, by way; readers who mean other tokens; logits by dtype."""
    file = json.loads(path.read_text())
    facts = file["machine"]
    where = facts.get("gpu") or f"{facts['threads']} threads of {facts['cpu']}"
    parts = ("tokens", "rounded", "unchanged", "order", "template", "tokenizer", "logits")
    read: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for result in file["results"]:
        read[result["shape"]["part"]].append(result)

    def counts(result: dict[str, Any]) -> list[str]:
        judged, asked, gaps = result["questions"], result["asked"], [flip["gap"] for flip in result["flips"]]
        return [
            f"{judged:,}" if judged == asked else f"{judged:,} of {asked:,}",
            f"{result['tokens']:,}",
            f"{100 * result['equal'] / result['tokens']:.4g} %",
            f"{100 * result['equal'] / result['answer_tokens']:.4g} %",
            f"{len(gaps):,}",
            f"{max(gaps):.2g}" if gaps else "",
        ]

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    counted = "questions | tokens | equal | of whole answers | answers with another token | largest gap there |"
    lines = [
        f"Answers over a document's KV beside those from scratch by transformers, {where}, torch {facts['versions']['torch']}: greedy "
        "tokens up to an answer's first that is another, the share of these that are equal, and of whole answers, and the gap between "
        "the two largest logits there. Rounded KV shows what is "
        f"lost. Every such token is in the file: `{path.relative_to(ROOT)}`.",
        "",
        f"| model | dtype | document | way | {counted}",
        "|---" * 10 + "|",
    ]
    for result in sorted(read["tokens"] + read["rounded"], key=lambda result: result["shape"]["P"]):
        shape = result["shape"]
        way = shape["way"] + (" KV" if shape["part"] == "rounded" else "")
        lines.append(row(shape["model"], shape["dtype"], f"{shape['P']:,}", way, *counts(result)))
    changed = [result for part in ("unchanged", "order", "template", "tokenizer") for result in read[part]]
    if changed:
        lines += [
            "",
            "A reader who means other tokens than the publisher: what kvkern says, and what it would cost to take the document's KV all "
            "the same: answers over it beside those from scratch of what the reader means. Where all are equal, the KV does not depend "
            "on what differs, and the refusal is caution.",
            "",
            f"| the reader's | document | refused by | {counted} first tokens other |",
            "|---" * 10 + "|",
        ]
    for result in changed:
        shape = result["shape"]
        whose = shape["way"] if shape["part"] in ("unchanged", "order") else f"{shape['part']}: {shape['way']}"
        refused = f"{result['error']}, {result['field']}" if result["refused"] else "not refused"
        lines.append(row(whose, f"{shape['P']:,}", refused, *counts(result), f"{result['first_tokens_other']:,}"))
    if read["logits"]:
        lines += [
            "",
            "Logits over whole answers, and by their distance from fp64 at the first token, largest and mean.",
            "",
            "| logits in | document | questions | tokens | equal | largest difference | kvkern from fp64 | transformers from fp64 |",
            "|---" * 8 + "|",
        ]
    for result in read["logits"]:
        shape, most, mean = result["shape"], result["max_error"], result["mean_error"]
        errors = [f"{most[how]:.3g}, {mean[how]:.3g}" for how in ("kvkern", "sdpa")]
        numbers = [f"{result[name]:,}" for name in ("questions", "tokens", "tokens_equal")]
        lines.append(row(shape["way"], f"{shape['P']:,}", *numbers, f"{result['difference']:.3g}", *errors))
    return lines


# -- forms of the kernels, and the engine on a GPU ---------------------------------------------------------------------


FORMS = {"plain": "plain", "hopper": "Gluon", "cudnn": "cuDNN"}


def forms_table(path: Path) -> list[str]:
    """K1's forms beside cuDNN, and K2 beside a copy: each shape from the newest forms-N.json of the folder that has it."""
    paths = sorted(path.parent.glob("forms-*.json"))
    if path != paths[-1]:
        return []  # one table a folder
    files = [json.loads(each.read_text()) for each in paths]
    shapes: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    roofs = []
    for n, file in enumerate(files):
        cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        for result in file["results"]:
            shape = result["shape"]
            where = tuple(str(shape.get(name)) for name in ("kernel", "B", "P", "S", "heads"))
            cells.setdefault(where, {})[shape["form"]] = result
        roofs.append(
            {form: result for where, forms in cells.items() if where[0] == "roof" for form, result in forms.items()}
        )
        for where, forms in cells.items():
            if "cudnn" in forms or (where[0] == "K2" and "default" in forms and "1 walks" not in forms):
                shapes[where] = n, forms
    facts = files[-1]["machine"]
    lines = [
        f"Kernels alone, {facts['gpu']}, torch {facts['versions']['torch']}, triton {facts['versions']['triton']}, bfloat16; medians of "
        "CUDA graphs. cuDNN takes all rows of a kv head as one block of queries, over the prefix alone; shares are of a matrix product "
        "of 8,192 cubed and of a copy of 1 GiB, read and written, in the same run ("
        + "; ".join(f"{r['gemm']['tflops']:.0f} TFLOP/s and {r['copy']['gbs'] / 1e3:.2f} TB/s" for r in roofs)
        + f"). Files: `{path.parent.relative_to(ROOT)}/forms-N.json`.",
        "",
        "| K1: agents | prefix | heads | " + " | ".join(FORMS.values()) + " | of the product | against cuDNN | N |",
        "|---" * (6 + len(FORMS)) + "|",
    ]
    for (kernel, B, P, _, heads), (n, forms) in shapes.items():
        if kernel != "K1":
            continue
        # Until the Gluon form became it, the default form was the plain one.
        found = {
            "plain": forms.get("plain") or forms.get("default"),
            "hopper": forms.get("hopper"),
            "cudnn": forms["cudnn"],
        }
        field, unit = ("tflops", "TFLOP/s") if "tflops" in forms["cudnn"] else ("gbs", "GB/s")
        shown = [MISSING if found[f] is None else f"{found[f][field]:,.0f} {unit}" for f in FORMS]
        ours = min(found[f]["ms"] for f in ("plain", "hopper") if found[f] is not None)
        share = MISSING
        if field == "tflops":
            share = f"{100 * found['cudnn']['tflops'] * found['cudnn']['ms'] / ours / roofs[n]['gemm']['tflops']:.0f} %"
        qo, kv, dim = json.loads(heads)
        against = f"{found['cudnn']['ms'] / ours:.2f}x"
        lines.append(
            f"| {int(B):,} | {int(P):,} | {qo}/{kv}x{dim} | {' | '.join(shown)} | {share} | {against} | {paths[n].stem[6:]} |"
        )
    lines += [
        "",
        "| K2: agents | prefix | suffix | heads | time | GB/s of K and V | of the copy | N |",
        "|---" * 8 + "|",
    ]
    for (kernel, B, P, S, heads), (n, forms) in shapes.items():
        if kernel == "K2":
            one, (qo, kv, dim) = forms["default"], json.loads(heads)
            lines.append(
                f"| {int(B):,} | {int(P):,} | {S} | {qo}/{kv}x{dim} | {one['ms'] * 1e3:.1f} us | {one['gbs']:,.0f} | "
                f"{100 * one['gbs'] / roofs[n]['copy']['gbs']:.0f} % | {paths[n].stem[6:]} |"
            )
    return lines


def engine_table(path: Path) -> list[str]:
    """An engine's decode steps by agents and document."""
    file = json.loads(path.read_text())
    facts = file["machine"]
    lines = [
        f"An engine on a random model, {facts.get('gpu') or facts['cpu']}, torch {facts['versions']['torch']}; a step makes one token for "
        "each agent, medians, in brackets the spread. Rows of a forward: the largest bucket of the measured rounding class. File: "
        f"`{path.relative_to(ROOT)}`.",
        "",
        "| model | fused | graphs | agents | document | step | tokens/s | prefill | rows of a forward | peak | forecast |",
        "|---" * 11 + "|",
    ]
    for result in sorted(file["results"], key=lambda r: (r["document"], r["agents"])):
        steps, rounding = result["seconds"]["decode"], result["rounding"]
        step = statistics.median(steps)
        rows = rounding["row_buckets"][-1] if isinstance(rounding, dict) else "any"
        peak = MISSING if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f} GiB"
        cells = [
            result["shape"]["model"],
            "yes" if result["shape"]["fuse"] else "no",
            "yes" if result["shape"].get("graphs") else "no",
            f"{result['agents']:,}",
            f"{result['document']:,}",
            f"{step * 1e3:.1f} ms ({100 * (max(steps) - min(steps)) / step:.0f} %)",
            f"{result['decode_tokens_per_s']:,.1f}",
            f"{result['prefill_s']:.2f} s",
            f"{rows}",
            peak,
            f"{result['forecast_bytes'] / 2**30:.1f} GiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for cell in file.get("failed", ()):
        lines += ["", f"No time for {shape_text(cell['shape'])}: {' '.join(cell['reason'].split())}."]
    return lines


# -- how far the KV compresses -----------------------------------------------------------------------------------------


def compression_table(path: Path, part: dict[str, Any] | None = None) -> list[str]:
    """A row for every form and codec, K and V apart; what pays is the file's own verdict."""
    file = json.loads(path.read_text()) if part is None else part
    facts = file["machine"]
    lines = [
        f"How far the KV of a document compresses without loss, bit by bit verified; time that one core of {facts['cpu']} "
        "worked, GB are 10^9 bytes of KV before compression, medians. A form pays if it is smaller by 20 % or more and is "
        "decompressed at more than 1 GB/s, or "
        f"faster than the disk in the same run. File: `{path.relative_to(ROOT)}`.",
        "",
        "| model | tokens | dtype | form | codec | smaller | K | V | compress | decompress | disk | pays |",
        "|---" * 12 + "|",
    ]
    for result in file["results"]:
        shape, seconds, verdicts, disk = (result[name] for name in ("shape", "core_seconds", "verdicts", "disk"))
        packing = sum(statistics.median(seconds[f"compress_{part}"]) for part in "KV")
        cold = {True: "", False: " (not cold)", None: " (cold not confirmed)"}[disk["cold"]]
        cells = [
            shape["model"],
            f"{result['tokens']:,}",
            shape["dtype"],
            shape["form"],
            shape["codec"],
            *(f"{100 * verdicts[part]['smaller']:.1f} %" for part in ("all", "K", "V")),
            f"{sum(result['before'].values()) / packing / 1e9:.2f} GB/s",
            f"{verdicts['all']['bytes_per_s'] / 1e9:.2f} GB/s",
            f"{disk['bytes'] / statistics.median(disk['seconds']) / 1e9:.2f} GB/s{cold}",
            ("yes" if verdicts["all"]["pays"] else "no")
            + ("" if verdicts["all"]["steady"] else ", not in every sample"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for found in file.get("answers", ()):
        lines += ["", f"{found['shape']['model']}, {found['shape']['dtype']}: {found['text']}."]
    for cell in file.get("failed", ()):
        lines += ["", f"No number for {shape_text(cell['shape'])}: {' '.join(cell['reason'].split())}."]
    return lines


# -- the paper, measured again -----------------------------------------------------------------------------------------


def paper_table(path: Path) -> list[str]:
    """Of paper.json: claims with their verdicts, the figure, and what a document costs here."""
    file = json.loads(path.read_text())
    found = claims.of_paper(file)
    found.demo = claims.read(path.with_name("demo.json"))
    folder = path.parent.relative_to(ROOT)
    lines = [
        f"arXiv 2606.13361 measured again (`make bench-paper`): {found.name}. Every claim, rule and other machine: "
        f"[docs/paper.md](docs/paper.md); tables and figures in one page: `{folder}/report.html`. File: `{path.relative_to(ROOT)}`.",
        "",
        f"![Seconds by document length, and the three ratios]({folder}/paper.svg)",
        "",
        "| claim | the paper | here | |",
        "|---|---|---|---|",
    ]
    for row in claims.rows([found]):
        if row["verdict"].get(found.name, claims.MISSING) not in (claims.MISSING, "told"):
            lines.append(
                f"| {row['claim']} | {row['paper']} | {row['ours'][found.name]} | {row['verdict'][found.name]} |"
            )
    if "document" in file["parts"]:
        lines += ["", *document_table(path, file["parts"]["document"])]
    for part, why in file["missing"].items():
        lines += ["", f"{part.capitalize()}: {MISSING}: {why}."]
    return lines


def paper_pages(path: Path) -> dict[Path, str]:
    """What stands beside paper.json."""
    import paper_report  # matplotlib takes a while

    file = json.loads(path.read_text())
    found = claims.of_paper(file)
    found.demo = claims.read(path.with_name("demo.json"))
    arithmetic = claims.findings([])
    return {
        path.with_name("report.html"): paper_report.render(file, claims.rows([*arithmetic, found])),
        path.with_name("paper.svg"): paper_report.figure(file),
    }


# -- all files ---------------------------------------------------------------------------------------------------------


def gpu_table() -> list[str]:
    """What stands in place of a GPU's layer.json."""
    peers = ", ".join(PEERS["cuda"].values())
    return [f"One layer's decode step on a GPU beside {peers}, by `bench/gpu_run.sh`: {MISSING}."]


def tables() -> str:
    lines: list[str] = []
    on_gpu = False
    for path in result_files():
        make = {
            "forms": forms_table,
            "engine": engine_table,
            "demo": demo_table,
            "prefix": prefix_table,
            "layer": layer_table,
            "linear": linear_table,
            "document": document_table,
            "exactness": exactness_table,
            "compression": compression_table,
            "paper": paper_table,
        }.get(path.stem.split("-")[0])
        if make is not None and (made := make(path)):
            lines += [*made, ""]
            on_gpu |= make is layer_table and "gpu" in json.loads(path.read_text())["machine"]
    if not on_gpu:
        lines += gpu_table()
    return "\n".join(lines).rstrip()


def result_files() -> list[Path]:
    return sorted((ROOT / "bench" / "results").glob("*/*.json"))


def pages() -> dict[Path, str]:
    """What stands beside the files, and docs/paper.md."""
    folders = sorted({path.parent for path in result_files()})
    found = {ROOT / "docs" / "paper.md": claims.page(claims.findings(folders))}
    for path in result_files():
        if path.stem == "layer" and (file := json.loads(path.read_text()))["machine"]["device"] == "cpu":
            found[path.with_suffix(".md")] = cpu_page(file)
            found[path.with_suffix(".svg")] = cpu_figure(file)
        if path.stem == "paper":
            found |= paper_pages(path)
    return found


def made() -> dict[Path, str]:
    """Everything that files give."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return {readme: f"{head}{BEGIN}\n{tables()}\n{END}{tail}"} | pages()


def rewrite() -> None:
    for path, new in made().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(new, encoding="utf-8")


def main() -> int:
    if "--check" in sys.argv[1:]:
        new = made()
        stale = [path for path in new if not path.exists() or path.read_text(encoding="utf-8") != new[path]]
        for path in stale:
            print(
                f"{path.relative_to(ROOT)}: its results are not what bench/results/ gives\n  do: python bench/report.py",
                file=sys.stderr,
            )
        return 1 if stale else 0
    rewrite()
    return 0


if __name__ == "__main__":
    sys.exit(main())
