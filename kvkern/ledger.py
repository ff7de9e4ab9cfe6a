"""What the demo found: every number of it, and the ledger that sets reuse against from scratch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from kvkern import console
from kvkern.cost import render_bytes


@dataclass(frozen=True)
class DemoResult:
    """What `kvkern demo --json` prints. Bytes and seconds are plain numbers, shares lie between 0 and 1.

    agents                    that ran, each with one question
    questions                 distinct ones among theirs
    running_together          most agents that held pages at once
    document_tokens           of the document's text
    prefix_tokens             of the shared prefix: the document in the chat template
    new_tokens                an answer has at most
    answer_tokens             of all answers together
    token_exact               share of the compared tokens that are those of transformers from scratch
    compared_agents           whose answers were compared
    compared_tokens           of theirs, from scratch
    control_tokens_equal      the same share with the document's values zeroed: it must come out low
    kv_bytes                  the document's KV, held once
    kv_bytes_expanded         the same without padding, once for every agent
    suffix_kv_bytes           KV of questions and answers, in pages; needed either way
    file_bytes                the .kv file
    peak_memory_bytes         of the process that served the agents, on the host
    prefill_seconds           to read the document
    save_seconds              to write the file
    load_seconds              to load and verify it in the second process
    engine_seconds            to start the engine there: rounding class measured, pages allocated
    ask_seconds               for all agents: questions tokenised and read, answers generated and turned into text
    tokens_per_second         answer_tokens / ask_seconds
    scratch_seconds           for the compared answers from scratch, one after another, each read and generated
    scratch_seconds_per_agent
    reuse_seconds_per_agent   ask_seconds / agents
    ratio                     of the last two
    once_seconds              what reuse pays once: prefill, save, load, engine
    ratio_with_once           the ratio with once_seconds / agents counted too
    seconds                   the whole demo, models loaded three times included
    """

    agents: int
    questions: int
    running_together: int
    document_tokens: int
    prefix_tokens: int
    new_tokens: int
    answer_tokens: int
    token_exact: float
    compared_agents: int
    compared_tokens: int
    control_tokens_equal: float
    kv_bytes: int
    kv_bytes_expanded: int
    suffix_kv_bytes: int
    file_bytes: int
    peak_memory_bytes: int
    prefill_seconds: float
    save_seconds: float
    load_seconds: float
    engine_seconds: float
    ask_seconds: float
    tokens_per_second: float
    scratch_seconds: float
    scratch_seconds_per_agent: float
    reuse_seconds_per_agent: float
    ratio: float
    once_seconds: float
    ratio_with_once: float
    seconds: float
    backend: str
    rounding: Any
    model: str
    dtype: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def lines(self) -> console.Lines:
        """The same for eyes: what was compared, the ledger, the machine."""
        return [*_compared(self), ("", ""), *_ledger(self), ("", ""), *_machine(self)]


def _compared(result: DemoResult) -> console.Lines:
    count, tokens = result.compared_agents, result.compared_tokens
    by_reuse = result.reuse_seconds_per_agent * count
    return [
        (
            "compare",
            f"{count} of them from scratch, by a third process without kvkern: transformers with its own sdpa",
        ),
        ("", f"{result.token_exact:.2%} of {tokens} tokens equal"),
        ("", f"{result.scratch_seconds:.2f} s from scratch, {by_reuse:.2f} s by reuse"),
        ("control", f"{result.control_tokens_equal:.2%} of them equal with the values of the document zeroed"),
    ]


def _ledger(result: DemoResult) -> console.Lines:
    copies = f"{render_bytes(result.kv_bytes_expanded)} in copies"
    rows = [
        ("", "by reuse", "from scratch"),
        ("KV of the document", f"{render_bytes(result.kv_bytes)} once", copies),
        ("KV of the suffixes", render_bytes(result.suffix_kv_bytes), "the same"),
        ("an agent", f"{result.reuse_seconds_per_agent:.3f} s", f"{result.scratch_seconds_per_agent:.3f} s"),
        ("ratio", f"{result.ratio:.1f}x", "1"),
        ("paid once", f"{result.once_seconds:.2f} s", "nothing"),
        ("ratio with it", f"{result.ratio_with_once:.1f}x", "1"),
    ]
    first, *others = (f"{name:<19} {reuse:>18} {scratch:>22}" for name, reuse, scratch in rows)
    an_agent = "an agent by reuse: its share of the whole time of ask, questions tokenised and read, answers decoded"
    return [
        ("ledger", first),
        *(("", other) for other in others),
        ("", an_agent),
        ("", "paid once: prefill, write, load, rounding class"),
    ]


def _machine(result: DemoResult) -> console.Lines:
    machine, rounding = result.machine, result.rounding
    lines = [("machine", f"{machine['cpu']}, {machine['threads']} threads, {render_bytes(machine['memory_bytes'])}")]
    if "gpu" in machine:
        lines.append(("", f"{machine['gpu']}, {render_bytes(machine['gpu_memory_bytes'])}"))
    lines.append(("", f"{result.model}, {result.dtype} on {result.device}, backend {result.backend}"))
    if isinstance(rounding, dict):
        layers, head = (", ".join(map(str, rounding[name])) for name in ("row_buckets", "head_row_buckets"))
        lines.append(("", f"rounding class: {layers} rows; output projection {head}"))
    lines.append(("", f"peak memory of the second process {render_bytes(result.peak_memory_bytes)}"))
    lines.append(("", f"the whole demo took {result.seconds:.0f} s"))
    return lines
