"""Tables of the README, from the files under bench/results/. Nothing in them is written by hand.

python bench/report.py            rewrites the part of README.md between the two marks
python bench/report.py --check    exit 1 if that part is not what the files give
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
MISSING = "not measured"
PEERS = {
    "cuda": {
        "expanded_sdpa": "unshared sdpa",
        "cudnn_rows": "cuDNN over packed rows",
        "flex_rows": "FlexAttention over packed rows",
        "flashinfer_cascade": "FlashInfer cascade",
        "flashinfer_decode": "FlashInfer decode",
        "gemm": "the two GEMMs alone",
    },
    "cpu": {
        "expanded_sdpa": "unshared sdpa",
        "flash_rows": "torch's flash over packed rows",
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
    """One layer's step beside its peers, a row a cell; what has no time says so. A ratio below 1 is a row where we lose."""
    file = json.loads(path.read_text())
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


def gpu_table() -> list[str]:
    """What stands in place of a GPU's file."""
    return [
        "On a GPU, by `bench/gpu_run.sh`:",
        "",
        "| | against | |",
        "|---|---|---|",
        f"| K1, prefix attention | the two GEMMs alone | {MISSING} |",
        f"| K2, suffix attention | a copy of as many bytes | {MISSING} |",
        f"| one layer's decode step | {', '.join(PEERS['cuda'].values())} | {MISSING} |",
    ]


def tables() -> str:
    lines: list[str] = []
    on_gpu = False
    for path in sorted((ROOT / "bench" / "results").glob("*/*.json")):
        make = {"demo": demo_table, "prefix": prefix_table, "layer": layer_table}.get(path.stem)
        if make is not None:
            lines += [*make(path), ""]
            on_gpu |= make is layer_table and "gpu" in json.loads(path.read_text())["machine"]
    if not on_gpu:
        lines += gpu_table()
    return "\n".join(lines).rstrip()


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    new = f"{head}{BEGIN}\n{tables()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if new != text:
            print(
                "README.md: its results are not what bench/results/ gives\n  do: python bench/report.py",
                file=sys.stderr,
            )
            return 1
        return 0
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
