"""What a tile of keys does to a softmax state, read from PTX: two kernels with equal fingerprints round alike, on any GPU.

A region is the code from the wait for Q K^T to the next wgmma. Each fp32 operation in it is named by its opcode and what its
operands are named, so a name holds a whole tree of operations: scale, maximum, exponential, the order of sums, shuffles.
Accumulators are named by their place in the wgmma, S0 to S63 for Q K^T and A0 to A63 for P V; so it matters which goes where.
Whatever else comes from outside (the scale, m, l, a mask's condition) is "?". Operands that commute are sorted.

Not covered: what wgmma itself does, and the order of products in it.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

COMMUTE = ("add", "mul", "max", "min", "fma")
MMA = re.compile(r"\s*(wgmma\.mma_async\S+)\s+\{([^}]*)\},\s*(\{|%rd)")
OPERATION = re.compile(r"\s*(?:@\S+\s+)?([a-z][\w.:]*)\s+(%\w+)(?:\|%\w+)?,\s*(.*);")
MINUS_INFINITY = "0fFF800000"


class Region(NamedTuple):
    """Fingerprints of one tile: weights p of S0, S1, ..., sums l of the rows, and the accumulators as P V finds them."""

    masked: bool
    scores: str
    p: tuple[str, ...]
    l: tuple[str, ...]
    acc: tuple[str, ...]


def regions(ptx: str) -> list[Region]:
    """Of every tile, in the order of the text; those after which no weight is left are no tiles."""
    lines = ptx.splitlines()
    found, products, start = [], [], None
    for n, line in enumerate(lines):
        mma = MMA.match(line)
        if mma is not None:
            products.append((mma[1], mma[2].split(","), mma[3] == "{"))
        elif "wgmma.wait_group" in line and start is None and products:
            start = n
        elif "wgmma.fence" in line and start is not None:
            after = next((m for m in map(MMA.match, lines[n:]) if m is not None), None)
            region = _region(lines[start:n], products, after)
            found += [region] if region is not None else []
            products, start = [], None
    return found


def _region(code: list[str], products: list[tuple[str, list[str], bool]], after: re.Match[str] | None) -> Region | None:
    scores = [(opcode, registers) for opcode, registers, of_weights in products if not of_weights]
    sums = [registers for _, registers, of_weights in products if of_weights]
    if not sums and after is not None and after[3] == "{":
        sums = [after[2].split(",")]
    if not scores or not sums:
        return None
    opcode, registers = scores[-1]
    names = {register: f"S{n}" for n, register in enumerate(registers)}
    names |= {register: f"A{n}" for n, register in enumerate(sums[-1])}
    column = dict(names)
    weights: dict[int, str] = {}
    rows, masked = [], False
    for line in code:
        operation = OPERATION.match(line)
        if operation is None:
            continue
        name, target, operands = operation[1], operation[2], [o.strip() for o in operation[3].split(",")]
        if not (".f32" in name or name.startswith(("shfl", "mov"))):
            names.pop(target, None)
            continue
        inputs = [names.get(o, "?") if o.startswith("%") else o for o in operands]
        # Which score a value comes from, as long as it is of one alone.
        origin = next((column[o] for o in operands if column.get(o, "").startswith("S")), None)
        if name.startswith("mov"):
            names[target] = inputs[0]
        else:
            if name.split(".")[0] in COMMUTE:
                ordered = 2 if name.startswith("fma") else len(inputs)
                inputs = sorted(inputs[:ordered]) + inputs[ordered:]
            names[target] = hashlib.sha256(" ".join([name, *inputs]).encode()).hexdigest()[:16]
        if name.startswith(("mul", "sub", "selp", "mov")) and origin is not None:
            column[target] = origin
        else:
            column.pop(target, None)
        masked |= name.startswith("selp") and MINUS_INFINITY in operands and origin is not None
        if name.startswith("ex2") and origin is not None:
            weights[int(origin[1:])] = names[target]
        if name.startswith("fma"):
            rows.append(names[target])
    if len(weights) != len(registers):
        return None
    return Region(
        masked,
        opcode,
        tuple(weights[n] for n in range(len(registers))),
        tuple(rows),
        tuple(names.get(r, "?") for r in sums[-1]),
    )
