"""K1 in Gluon for an sm_90 that is not there: compiled, its instructions read; and run by a stand-in for Gluon.

Compiled: registers, shared memory, and whether the softmax is overlapped. Run: its states against fp64, its barriers under
orders that are drawn, and mistakes planted in its source, each of which must be seen.

This file, run as a program, is the child that compiles: without TRITON_INTERPRET, which Triton reads on decoration.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gluon_stand_in
import numpy as np
import pytest
import torch
from ptx_dataflow import regions

from kvkern.geometry import pad_tokens
from kvkern.plan import PREFIX_BLOCK_M

ROOT = Path(__file__).resolve().parent.parent
LOG2E = math.log2(math.e)
WAIT = "        mbarrier.wait(k_full.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1, pred=more)\n        acc"
"""The wait for the next K in the main loop, between the softmax and the wait for P V."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@functools.cache
def compiled(variant: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        child = subprocess.run(
            [sys.executable, __file__, variant], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


@needs_triton
def test_it_fits_and_its_main_loops_do_not_spill() -> None:
    found = compiled("128")
    assert found["registers"] == 168 and found["shared_bytes"] <= 232_448
    # A few bytes outside the main loops.
    assert found["stack_bytes"] <= 48
    # Beside these two there are what idle warps hold and what the first warpgroup has before it gives some up.
    assert {24, 240} <= set(found["setmaxnreg"])
    assert len(found["loops"]) == 2
    assert all(loop["spills"] == 0 for loop in found["loops"])


@needs_triton
def test_the_softmax_lies_between_the_two_waits_of_a_main_loop() -> None:
    for loop in compiled("128")["loops"]:
        assert loop["waits"] == ["0x1", "0x0"] and loop["exponentials_between"] >= 60, loop


@needs_triton
def test_control_without_the_wait_for_the_next_tile_there_the_overlap_is_lost() -> None:
    loops = compiled("128 no boundary")["loops"]
    assert len(loops) == 2
    assert all(loop["exponentials_between"] < 60 for loop in loops), loops


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("form", ["large", "small"])
def test_a_tile_is_rounded_as_the_default_kernel_rounds_it(form: str) -> None:
    ours, default = regions(compiled("128")["ptx"]), regions(compiled(f"plain {form} 128")["ptx"])
    # The main loop and the last tile, and of ours both for each warpgroup, with a first one between segments.
    assert [region.masked for region in default] == [False, True]
    assert [region.masked for region in ours] == [False, True, True] * 2
    for n, region in enumerate(ours):
        assert len(region.p) == 64 and len(region.l) == 2 and len(set(region.acc)) == 64
        if n % 3 < 2:
            assert region == default[region.masked]
        else:
            # Before it there is no maximum and no sum, and the acc under way is that of a segment which is over.
            assert region.scores == default[1].scores and region.acc == tuple(f"A{i}" for i in range(64))


@needs_triton
@pytest.mark.full
def test_control_other_tiles_or_another_operation_are_rounded_otherwise() -> None:
    ours, narrow = compiled("128")["ptx"], compiled("plain large 64")["ptx"]
    a, b = regions(ours)[0], regions(narrow)[0]
    assert not set(a.p) & set(b.p) and not set(a.l) & set(b.l) and not set(a.acc) & set(b.acc)

    # From the wait for scores on: an addition that takes one of its operands twice, and one weight's exponential.
    begin = ours.index("wgmma.wait_group.sync.aligned 1;")
    head, loop = ours[:begin], ours[begin:]
    add = re.search(r"add\.rn\.f32 \t%r\d+, (%r\d+), (%r\d+);", loop)
    assert add is not None
    twice = regions(head + loop.replace(add[0], add[0].replace(f" {add[2]};", f" {add[1]};"), 1))[0]
    assert twice.p == a.p and twice.l != a.l
    exponential = regions(head + loop.replace("ex2.approx.ftz.f32", "ex2.approx.f32", 1))[0]
    assert sum(x != y for x, y in zip(exponential.p, a.p, strict=True)) == 1 and exponential.l != a.l


@needs_triton
def test_anything_but_hopper_with_16_bits_is_refused() -> None:
    from kvkern.kernels.prefix_hopper import prefix_attention_hopper, unfit, why_not

    assert unfit(90, torch.bfloat16, 128) is None and unfit(90, torch.float16, 64) is None
    assert unfit(80, torch.bfloat16, 128) == "sm_80" and unfit(100, torch.bfloat16, 128) == "sm_100"
    assert unfit(90, torch.float32, 128) is not None and unfit(90, torch.bfloat16, 96) == "head_dim 96"
    assert why_not(torch.device("cpu"), torch.bfloat16, 128) is not None

    from kvkern.errors import UnsupportedError

    nothing = torch.zeros(2, 6, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="hopper"):
        q = torch.zeros(1, 2, 4, 128, dtype=torch.bfloat16)
        prefix_attention_hopper(q, nothing.long(), nothing, nothing, layer=0, sm_scale=1.0)


# -- run, without a GPU ------------------------------------------------------------------------------------------------


class Launch:
    """Nodes, items and queries drawn from a seed, and one run of the kernel in the stand-in under the same seed."""

    def __init__(self, seed: int, **fixed: Any) -> None:
        rng = random.Random(seed)

        def draw(name: str, choices: Sequence[Any]) -> Any:
            drawn = rng.choice(choices)
            return fixed.get(name, drawn)

        self.seed, self.values = seed, np.random.default_rng(seed)
        self.kind = draw("kind", ["bfloat16", "float16"])
        self.head_dim = draw("head_dim", [64, 128])
        self.G = draw("G", [1, 3, 4, 7])
        self.num_kv_heads = draw("num_kv_heads", [1, 2])
        self.programs = draw("programs", [1, 2, 3])
        self.segment = draw("segment", [128, 256, 512])
        self.tokens = draw("tokens", [[1, 127], [128], [129, 300], [257, 1], [1025], [640, 130], [384, 129, 2]])
        self.layer, self.layers = 1, 2
        # Wide enough that the maximum goes up from tile to tile.
        self.sm_scale = 0.3

        # The rows of a node are some of the step's; those of no node, and the states of no item, are left alone.
        most = max(1, PREFIX_BLOCK_M // self.G)
        self.items: list[tuple[int, ...]] = []
        state = row = 0
        for node, tokens in enumerate(self.tokens):
            rows = max(1, draw("rows", [1, 2, most - 1, most, most + 1 + rng.randrange(most)]))
            segments = -(-tokens // self.segment)
            cuts = sorted({0, segments} | {rng.randrange(segments) for _ in range(rng.randrange(3))})
            for begin, end in pairwise(cuts):
                for first in range(row, row + rows, most):
                    self.items.append((node, first, min(first + most, row + rows), begin, end, state))
                state += 1 if begin == 0 else end - begin
            row += rows if rng.random() < 0.7 else 0
        self.rows, self.states = max(item[2] for item in self.items) + rng.randrange(3), state + 1
        rng.shuffle(self.items)
        # As a plan pads its table: an item without rows does nothing.
        self.items += [(0,) * 6] * rng.randrange(2)

    def run(self, text: str) -> np.ndarray:
        """Largest errors of m, l and acc, each in units of what is allowed."""
        machine = gluon_stand_in.Machine(self.seed)
        kind = gluon_stand_in.KINDS[self.kind]
        packed = self.rows * self.G

        def drawn(*shape: int) -> np.ndarray:
            return np.asarray(kind.cast(self.values.standard_normal(shape, np.float32)))

        q = drawn(self.num_kv_heads, packed, self.head_dim)
        blocks = []
        for tokens in self.tokens:
            block = drawn(self.layers, 2, self.num_kv_heads, pad_tokens(tokens), self.head_dim)
            block[..., tokens:, :] = 0
            blocks.append(block)
        # At least two rows, as a plan pads it.
        table = [
            (machine.address(block), tokens, block.shape[3], self.segment)
            for block, tokens in zip(blocks, self.tokens, strict=True)
        ]
        table += [(0,) * 4] * (2 - len(table))
        m, l = (np.full((self.states, self.num_kv_heads, packed), np.nan, np.float32) for _ in range(2))
        acc = np.full((*m.shape, self.head_dim), np.nan, np.float32)
        i32, scale = functools.partial(gluon_stand_in.value, dtype=np.int32), np.float32(self.sm_scale * LOG2E)
        machine.launch(
            text,
            "prefix_hopper_kernel",
            self.programs,
            machine.pointer(q, self.kind),
            machine.pointer(np.array(table, np.int64), "int64"),
            machine.pointer(np.array(self.items, np.int32), "int32"),
            machine.pointer(m, "float32"),
            machine.pointer(l, "float32"),
            machine.pointer(acc, "float32"),
            i32(packed),
            i32(len(self.items)),
            i32(self.num_kv_heads),
            i32(self.layer),
            gluon_stand_in.value(scale),
            G=self.G,
            HEAD_DIM=self.head_dim,
        )
        self.switches = machine.switches
        return self.errors(q, blocks, m, l, acc)

    def errors(
        self, q: np.ndarray, blocks: list[np.ndarray], m: np.ndarray, l: np.ndarray, acc: np.ndarray
    ) -> np.ndarray:
        """Against fp64 over the keys of each state at once, and nothing but those states written."""
        unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[self.kind]
        untouched = np.ones(m.shape, bool)
        worst = np.zeros(3)
        for node, row_begin, row_end, seg_begin, seg_end, state in self.items:
            for head in range(self.num_kv_heads if row_begin < row_end else 0):
                rows = slice(row_begin * self.G, row_end * self.G)
                k, v = blocks[node][self.layer, :, head].astype(np.float64)
                ends = [(0, seg_end)] if seg_begin == 0 else [(s, s + 1) for s in range(seg_begin, seg_end)]
                for n, (begin, end) in enumerate(ends):
                    keys = slice(begin * self.segment, min(end * self.segment, self.tokens[node]))
                    place = (state + n, head, rows)
                    scores = q[head, rows].astype(np.float64) @ k[keys].T * (self.sm_scale * LOG2E)
                    p = np.exp2(scores - m[place][:, None])
                    # A weight is rounded once, to the tensor cores' type, which cannot hold one below 2^-24 in fp16;
                    # the rest is fp32's.
                    bound = 1.1 * unit * (p @ np.abs(v[keys])) + 2.0**-24 * np.abs(v[keys]).sum(0) + 1e-4
                    worst = np.maximum(
                        worst,
                        [
                            np.max(np.abs(m[place] - scores.max(1)) / 1e-4),
                            np.max(np.abs(l[place] / p.sum(1) - 1) / 1e-4),
                            np.max(np.abs(acc[place] - p @ v[keys]) / bound),
                        ],
                    )
                    untouched[place] = False
        assert np.isnan(m[untouched]).all() and np.isnan(l[untouched]).all() and np.isnan(acc[untouched]).all()
        return worst


def run_launch(text: str, seed: int, **fixed: Any) -> None:
    """Raises a Fault, or an AssertionError that names what is wrong."""
    launch = Launch(seed, **fixed)
    worst = launch.run(text)
    assert (worst < 1).all(), f"seed {seed}: m, l, acc off by {worst} of what is allowed"


@pytest.fixture(scope="module")
def source() -> str:
    return (ROOT / "kvkern/kernels/prefix_hopper.py").read_text()


def test_every_state_is_right_in_whatever_order_its_warps_go_on(source: str, seed: int) -> None:
    for n in range(48):
        run_launch(source, seed + n)


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_every_state_is_right_in_150_orders_more(source: str, seed: int, part: int) -> None:
    for n in range(150):
        run_launch(source, seed + n)


def test_a_table_without_nodes_does_nothing(source: str, seed: int) -> None:
    launch = Launch(seed, tokens=[1])
    launch.items, launch.tokens = [(0,) * 6] * 2, []
    launch.run(source)


def test_a_seed_is_one_order(source: str, seed: int) -> None:
    first, second, other = Launch(seed), Launch(seed), Launch(seed, tokens=[1025, 3])
    assert (first.run(source) == second.run(source)).all() and first.switches == second.switches
    assert other.run(source).shape == (3,) and other.switches != first.switches


MUTANTS = {
    # A barrier's phase.
    "K is copied a phase early": (
        "mbarrier.wait(k_free.index(stage), phase ^ 1)",
        "mbarrier.wait(k_free.index(stage), phase)",
    ),
    "V is copied a phase early": (
        "mbarrier.wait(v_free.index(stage), phase ^ 1)",
        "mbarrier.wait(v_free.index(stage), phase)",
    ),
    "V is read a phase early": (
        "mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)",
        "mbarrier.wait(v_full.index(before), (((tile - 1) // STAGES) & 1) ^ 1)",
    ),
    "K is read a phase early": (WAIT, WAIT.replace("& 1, pred", "& 1 ^ 1, pred")),
    "the phase is the stage's": (
        "(tile // STAGES) & 1\n                    mbarrier.wait",
        "tile & 1\n                    mbarrier.wait",
    ),
    "a descriptor waits for the phase before": (
        "mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1, pred=last >= 0)",
        "mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1 ^ 1, pred=last >= 0)",
    ),
    # A buffer that is not given back, or too early, or by too few.
    "K of a first tile is kept": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n                mbarrier.arrive(k_free.index(stage))\n",
        "s = warpgroup_mma_wait(0, deps=(s,))\n",
    ),
    "K of a later tile is kept": (
        "s = warpgroup_mma_wait(1, deps=(s,))\n        mbarrier.arrive(k_free.index(stage))\n",
        "s = warpgroup_mma_wait(1, deps=(s,))\n",
    ),
    "V of a last tile is kept": ("mbarrier.arrive(v_free.index(stage))\n", "pass\n"),
    "V of an earlier tile is kept": ("mbarrier.arrive(v_free.index(before))\n", "pass\n"),
    # Of a first tile alone: in `overlapped` this is no mistake, since the next copy into K also waits for V.
    "K is given back before the wait for its product": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n                mbarrier.arrive(k_free.index(stage))\n",
        "mbarrier.arrive(k_free.index(stage))\n                s = warpgroup_mma_wait(0, deps=(s,))\n",
    ),
    "V is given back before the wait for its product": (
        "        acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier.arrive(v_free.index(before))\n",
        "        mbarrier.arrive(v_free.index(before))\n        acc = warpgroup_mma_wait(0, deps=(acc,))\n",
    ),
    "V is given back twice": (
        "        mbarrier.arrive(v_free.index(before))\n",
        "        mbarrier.arrive(v_free.index(before))\n        mbarrier.arrive(v_free.index(before))\n",
    ),
    "one consumer gives K back for both": (
        "mbarrier.init(k_free.index(n), count=2)",
        "mbarrier.init(k_free.index(n), count=1)",
    ),
    "one consumer gives V back for both": (
        "mbarrier.init(v_free.index(n), count=2)",
        "mbarrier.init(v_free.index(n), count=1)",
    ),
    "K is copied unasked": ("mbarrier.wait(k_free.index(stage), phase ^ 1)\n", "pass\n"),
    "V is copied unasked": ("mbarrier.wait(v_free.index(stage), phase ^ 1)\n", "pass\n"),
    # A read too early.
    "K of an item's first tile is not waited for": (
        "mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)\n                none",
        "pass\n                none",
    ),
    "K of the next tile is not waited for": (WAIT, "        acc"),
    "V is not waited for": ("mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)\n", "pass\n"),
    "V of a last tile is not waited for": (
        "mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)\n",
        "pass\n",
    ),
    "scores are not waited for": ("warpgroup_mma_wait(1, deps=(s,))", "warpgroup_mma_wait(2, deps=(s,))"),
    "the sum is not waited for": (
        "acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier",
        "acc = warpgroup_mma_wait(1, deps=(acc,))\n        mbarrier",
    ),
    "a descriptor does not wait for K": (
        "mbarrier.wait(k_full.index(last % STAGES), (last // STAGES) & 1, pred=last >= 0)\n",
        "pass\n",
    ),
    "queries have no fence": ("q_tile.store(q)\n                fence_async_shared()\n", "q_tile.store(q)\n"),
    "too few bytes are expected": (
        "mbarrier.expect(v_full.index(stage), BLOCK_N * HEAD_DIM * 2)",
        "mbarrier.expect(v_full.index(stage), BLOCK_N * HEAD_DIM)",
    ),
    # The ring.
    "one stage too few": ("BLOCK_M, BLOCK_N, STAGES = 64, 128, 2\n", "BLOCK_M, BLOCK_N, STAGES = 64, 128, 1\n"),
    "K and V on one barrier": (
        "tma.async_copy_global_to_shared(v_desc, [first, 0], v_full.index(stage)",
        "tma.async_copy_global_to_shared(v_desc, [first, 0], k_full.index(stage)",
    ),
    "the count begins again with an item": (
        "        tile = 0\n"
        "        for index in range(gl.program_id(0), num_items * num_kv_heads, gl.num_programs(0)):\n"
        "            node_ptr, head, _, _, seg_begin",
        "        for index in range(gl.program_id(0), num_items * num_kv_heads, gl.num_programs(0)):\n"
        "            tile = 0\n"
        "            node_ptr, head, _, _, seg_begin",
    ),
    "both consumers have one buffer of queries": ("qk_scale, q_high, total_high", "qk_scale, q_low, total_high"),
    "both consumers have one total": ("qk_scale, q_high, total_high", "qk_scale, q_high, total_low"),
    # A predicate.
    "a next tile is waited for that does not come, of an item": (
        "more = (left > BLOCK_N) | (seg_begin + 1 < seg_end)",
        "more = (left > 0) | (seg_begin + 1 < seg_end)",
    ),
    "a next tile is waited for that does not come, of a segment": (
        "(coming > BLOCK_N) | (seg + 2 < seg_end)",
        "(coming > 0) | (seg + 2 < seg_end)",
    ),
    "a next tile is waited for that does not come, at the end": (
        "left - (tiles - 1) * BLOCK_N, seg + 1 < seg_end",
        "left - (tiles - 1) * BLOCK_N, seg < seg_end",
    ),
    "a next tile is not waited for that comes, of an item": (
        "more = (left > BLOCK_N) |",
        "more = (left > 3 * BLOCK_N) |",
    ),
    "a next tile is not waited for that comes, of a segment": (
        "(coming > BLOCK_N) |",
        "(coming > 3 * BLOCK_N) |",
    ),
    "the next segment is not waited for": (
        "left - (tiles - 1) * BLOCK_N, seg + 1 < seg_end",
        "left - (tiles - 1) * BLOCK_N, seg + 2 < seg_end",
    ),
    "the first copy of all is not waited for": (
        "mbarrier.wait(k_full.index(last % STAGES), (last // STAGES) & 1, pred=last >= 0)",
        "mbarrier.wait(k_full.index(last % STAGES), (last // STAGES) & 1, pred=last > 0)",
    ),
    "pad keys count": ('scores = gl.where((keys < left)[None, :], scores, float("-inf"))', "pass"),
    "a segment ends late": ("left - (tiles - 1) * BLOCK_N, seg", "left - (tiles - 1) * BLOCK_N + 1, seg"),
    "a segment of one tile ends late": (
        "coming, (coming",
        "coming + 1, (coming",
    ),
    "an item of one tile ends late": ("qk_scale, left, True, S_LAYOUT", "qk_scale, left + 1, True, S_LAYOUT"),
    "queries of other items are read": (
        "mask=(rows < count)[:, None], other=0.0",
        "mask=(rows < BLOCK_M)[:, None], other=0.0",
    ),
    "rows of other items are stored": ("inside = (acc_rows < count)", "inside = (acc_rows < BLOCK_M)"),
    "both consumers take the same rows": ("row_begin += PART * BLOCK_M\n", "row_begin += 0 * BLOCK_M\n"),
    # The fold.
    "a first segment is folded": ("if (seg_begin == 0) & (seg > 0):", "if (seg_begin == 0) & (seg >= 0):"),
    "a later walk is folded": ("if (seg_begin == 0) & (seg > 0):", "if seg > 0:"),
    "m and l of a total are not kept": ("m_total, l_total = m_done, l_done\n", "pass\n"),
    "acc of a total is not kept": ("total.store(acc)\n", "pass\n"),
    "a segment goes on with the maximum of the one before": (
        '                    m = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=S_ROWS)\n',
        "",
    ),
    "acc of a segment that is over is scaled for the next": (
        "if not FIRST:\n            acc",
        "if True:\n            acc",
    ),
    "a total is stored where a later walk is": (
        "if (seg_begin == 0) & (seg + 1 < seg_end):",
        "if seg + 1 < seg_end:",
    ),
    "a state in another's slot": ("state + seg - seg_begin)", "state + seg)"),
    "a total is not scaled": (
        "acc = gl.fma(total.load(O_LAYOUT), gl.convert_layout(a, O_ROWS)[:, None], acc)",
        "acc = total.load(O_LAYOUT) + acc",
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_control_a_mistake_is_seen(source: str, seed: int, mistake: str) -> None:
    right, wrong = MUTANTS[mistake]
    assert source.count(right) == 1, "the mistake no longer fits the kernel: plant it anew"
    mutant = source.replace(right, wrong)
    # Segments of four tiles, one of three and one of one that end within a tile, one key alone; walks from each.
    shape = {"tokens": [1300, 600, 1], "segment": 512, "programs": 1, "head_dim": 64, "num_kv_heads": 1}
    with pytest.raises(AssertionError):
        for n in range(100):
            run_launch(mutant, seed + n, **shape)


# -- the child ---------------------------------------------------------------------------------------------------------


def main(variant: str) -> None:
    if variant.startswith("plain"):
        _, form, block_n = variant.split()
        print(json.dumps({"ptx": plain(form, int(block_n))}))
        return
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kvkern.kernels.state import ROUNDING

    path = ROOT / "kvkern/kernels/prefix_hopper.py"
    text = path.read_text()
    if "no boundary" in variant:
        assert text.count(WAIT) == 1
        # Waited for before the softmax instead, so that no block boundary is left behind it.
        text = text.replace(WAIT, "        acc").replace(
            "        m, l, alpha, p = softmax(",
            WAIT.removesuffix("        acc") + "        m, l, alpha, p = softmax(",
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "prefix_hopper_variant.py"
        copy.write_text(text)
        spec = importlib.util.spec_from_file_location("prefix_hopper_variant", copy)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = module.prefix_hopper_kernel
        aligned = {(n,): [["tt.divisibility", 16]] for n, a in enumerate(kernel.arg_names) if a.endswith("_ptr")}
        source = GluonASTSource(
            kernel, module.signature(torch.bfloat16), module.constants(4, int(variant.split()[0])), aligned
        )
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | ROUNDING)
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    found = {
        "registers": int(numbers[1]),
        "stack_bytes": int(numbers[2]),
        "shared_bytes": binary.metadata.shared,
        "setmaxnreg": sorted(
            {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", binary.asm["ptx"])}
        ),
        "loops": main_loops(sass),
        "ptx": binary.asm["ptx"],
    }
    print(json.dumps(found))


def plain(form: str, block_n: int) -> str:
    """PTX of the default kernel's form on sm_90, with tiles of so many keys."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvkern.kernels.prefix import forms, prefix_kernel
    from kvkern.kernels.state import ROUNDING

    given = forms(128, 4, torch.bfloat16, 90)[form] | {
        "G": 4,
        "HEAD_DIM": 128,
        "BLOCK_D": 128,
        "DEBUG": False,
        "PDL": False,
    }
    given["BLOCK_N"] = block_n
    constants = {name: given.pop(name) for name in list(given) if name.isupper()}
    kinds = {"q_ptr": "*bf16", "node_table_ptr": "*i64", "items_ptr": "*i32", "qk_scale": "fp32"}
    kinds |= {"m_ptr": "*fp32", "l_ptr": "*fp32", "acc_ptr": "*fp32"}
    names = prefix_kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, a in enumerate(names) if a.endswith("_ptr")}
    source = ASTSource(prefix_kernel, signature, constants, aligned)
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given | ROUNDING).asm["ptx"]
    return ptx


def main_loops(sass: str) -> list[dict[str, Any]]:
    """The innermost loops that hold HGMMA: their waits in order, exponentials between the first two, and spills.

    A loop's branch back has a predicate; the one out of a wait's own loop, which ptxas puts at the end, has none.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    loops = []
    for at, text in code:
        target = re.match(r"@\S+ BRA (?:\S+, )?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            body = [line for place, line in code if int(target[1], 16) <= place <= at]
            if any("HGMMA" in line for line in body):
                loops.append((int(target[1], 16), at, body))
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = []
    for _, _, body in inner:
        waits = [n for n, line in enumerate(body) if "WARPGROUP.DEPBAR" in line]
        between = body[waits[0] : waits[1]] if len(waits) > 1 else []
        found.append(
            {
                "waits": [body[n].split(",")[-1].strip() for n in waits],
                "exponentials_between": sum("MUFU.EX2" in line for line in between),
                "spills": sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for line in body),
                "instructions": len(body),
            }
        )
    return found


if __name__ == "__main__":
    main(sys.argv[1])
