"""What is said of a .kv file, of this machine and of a rounding class: as fields, and in lines for eyes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvkern import console
from kvkern.cost import render_bytes

if TYPE_CHECKING:
    from kvkern.header import Header


def header_fields(header: Header) -> dict[str, Any]:
    from kvkern.geometry import pad_tokens

    geometry = header.identity.geometry
    return {
        "file": str(header.path),
        "tokens": header.tokens,
        "size_bytes": header.size_bytes,
        "kv_bytes": pad_tokens(header.tokens) * geometry.token_bytes(),
        "packed": header.frames.form if header.frames else None,
        "segments": header.segments,
        "blocks": len(header.kv),
        "identity": header.identity.to_dict(),
        "provenance": dict(header.provenance),
    }


def header_lines(header: Header) -> console.Lines:
    from kvkern.geometry import pad_tokens, segment_tokens
    from kvkern.identity import short

    identity, geometry, by = header.identity, header.identity.geometry, header.provenance
    kind = str(geometry.dtype).removeprefix("torch.")
    shape = f"{geometry.layers} layers  {geometry.num_kv_heads} kv heads of {geometry.head_dim}  {kind}"
    made = [f"{name} {by[name]}" for name in ("torch", "transformers", "backend") if name in by]
    chunk = f"  {by['prefill_chunk']:,} tokens a chunk" if isinstance(by.get("prefill_chunk"), int) else ""
    keywords = "".join(f"  {name}={json.dumps(value)}" for name, value in sorted(identity.template_kwargs.items()))
    wording = f"chat template {short(identity.template)}{keywords}" if identity.template else "no chat template"
    rope = "  ".join(f"{name} {value}" for name, value in sorted(identity.rope.items()))
    above = f", below {short(identity.ancestors)}" if identity.ancestors else ""
    length = f" of {segment_tokens(header.tokens):,} tokens"
    cut = f"{header.segments} segments{length}" if header.segments > 1 else "1 segment"
    kv_bytes = pad_tokens(header.tokens) * geometry.token_bytes()
    share = f"{(header.kv_end - header.kv_offset) / kv_bytes:.1%} of {render_bytes(kv_bytes)}"
    packed = [("packed", f"{header.frames.form}, {share}, unpacked at load")] if header.frames else []
    return [
        (header.path.name, f"{header.tokens:,} tokens  {shape}  {render_bytes(header.size_bytes)}"),
        ("model", f"{by.get('model', '?')}  weights {short(identity.weights)}  made by kvkern {by.get('kvkern', '?')}"),
        ("tokens", f"{short(identity.token_ids)}  from position {identity.position:,}{above}"),
        ("words", f"tokenizer {short(identity.tokenizer)}  {wording}"),
        ("rope", rope),
        ("blocks", f"{len(header.kv)}, each with its digest: {geometry.layers} layers x K and V x {cut}"),
        *packed,
        ("made", f"{by.get('created', '?')}  {'  '.join(made)}{chunk}"),
    ]


def devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "cores": os.cpu_count()}]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        arch = f"sm_{card.major}{card.minor}"
        found.append({"name": f"cuda:{i}", "card": card.name, "arch": arch, "memory_bytes": card.total_memory})
    return found


def devices_for_eyes(devices: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    units: dict[str, Callable[[Any], str]] = {"cores": lambda n: f"({n} cores)", "memory_bytes": render_bytes}
    for device in devices:
        yield {name: units[name](value) if name in units else value for name, value in device.items()}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("kvkern", "torch", "triton", "transformers"):
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def rounding_lines(rounding: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, buckets, outside in (
        ("rows", "row_buckets", "outside"),
        ("rows of lm_head", "head_row_buckets", "head_outside"),
    ):
        yield name, f"{', '.join(map(str, rounding[buckets]))}: one rounding class"
        for rows, why in rounding[outside].items():
            yield "", f"not {rows}: {why}"
    where = f"{rounding['device']}, {rounding['dtype']}, {rounding['threads']} threads"
    yield "measured", f"on {where}, in {rounding['seconds']:.1f} s, of {', '.join(rounding['modules'])}"
