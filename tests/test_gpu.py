"""The Triton kernels on a CUDA device: against fp64, and bit for bit in any company. `bench/gpu_run.sh` runs these first.

Each check is a function of device and backend. On the device it runs as a test marked gpu; where there is none, it runs with
smaller numbers on the backends of this machine, or in Triton's interpreter, so that nothing here runs first on a GPU.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, bits, fresh_memory_is_nan
from models import QUESTIONS, TEXT, tiny_model, tiny_tokenizer
from test_graphs import StandIn
from triton_interpreter import INTERPRETING, interpreted, repair

import kvkern
from kvkern import plain
from kvkern.backends import choose
from kvkern.checks import cases
from kvkern.checks.assertions import Out, assert_exact
from kvkern.checks.cases import Case, assert_case_is_exact, assert_same_rows
from kvkern.geometry import Geometry
from kvkern.kernels.oracle import attend_fp64

HERE = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 80, 128)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
SQUARE = [(dtype, G, HEAD_DIMS[(i + j) % 3]) for i, dtype in enumerate(DTYPES) for j, G in enumerate(GROUPS)]
"""Every pair of dtype, G and head_dim; all triples would compile three times as many kernels."""

SHAPES = [
    # agents, rows, prefix tokens, suffix tokens, kv heads, G, head_dim
    (1, 1, 1, 1, 1, 1, 64),
    (5, 1, 127, 33, 2, 3, 64),
    (7, 2, 1025, 17, 2, 4, 128),
    (3, 1, 4097, 1100, 1, 7, 80),
    (64, 1, 2049, 65, 2, 8, 128),
    (130, 1, 300, 48, 2, 2, 128),
]


# -- through attend ----------------------------------------------------------------------------------------------------


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    agents, rows, prefix_tokens, suffix_tokens, num_kv_heads, group, head_dim = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size).to(dtype).to(device)

    q = normal(agents, rows, num_kv_heads * group, head_dim)
    k_prefix, v_prefix = normal(prefix_tokens, num_kv_heads, head_dim), normal(prefix_tokens, num_kv_heads, head_dim)
    k_suffix, v_suffix = (normal(agents, suffix_tokens, num_kv_heads, head_dim) for _ in range(2))
    lengths = torch.randint(min(rows, suffix_tokens), suffix_tokens + 1, (agents,), device=device)
    for agent, length in enumerate(lengths.tolist()):
        k_suffix[agent, length:] = v_suffix[agent, length:] = float("nan")
    return q, k_prefix, v_prefix, k_suffix, v_suffix, lengths


def check_against_fp64(shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str) -> None:
    q, k_prefix, v_prefix, k_suffix, v_suffix, lengths = operands(shape, dtype, device)
    o, lse = kvkern.attend(q, k_prefix, v_prefix, k_suffix, v_suffix, lengths, None, True, backend=backend)
    assert o.isfinite().all() and lse.isfinite().all()
    for agent, length in enumerate(lengths.tolist()):
        k, v = (torch.cat([p, s[agent, :length]]) for p, s in ((k_prefix, k_suffix), (v_prefix, v_suffix)))
        expected, expected_lse = attend_fp64(q[agent].cpu(), k.cpu(), v.cpu())
        plain = _plain(q[agent], k, v)
        error, allowed = (o[agent].cpu() - expected).abs(), (plain.cpu() - expected).abs()
        floor = 1e-5 if dtype == torch.float32 else 0.0
        assert error.max() <= max(2 * allowed.max(), floor), (agent, error.max(), allowed.max())
        assert error.mean() <= max(1.5 * allowed.mean(), floor), (agent, error.mean(), allowed.mean())
        torch.testing.assert_close(lse[agent].double().cpu(), expected_lse, rtol=1e-4, atol=1e-4)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The computation as plain torch does it in this dtype."""
    rows, group = q.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("rhd,thd->hrt", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(rows, k.shape[0], dtype=torch.bool, device=q.device).triu(k.shape[0] - rows + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("hrt,thd->rhd", weights, v)


def check_alone_and_among(device: str, backend: str, workers: int) -> None:
    q, k_prefix, v_prefix, k_suffix, v_suffix, lengths = operands((64, 1, 5000, 70, 2, 4, 128), torch.bfloat16, device)
    together = kvkern.attend(
        q, k_prefix, v_prefix, k_suffix, v_suffix, lengths, backend=backend, workers_per_node=workers
    )
    for agent in (0, 17, 63):
        one = slice(agent, agent + 1)
        alone = kvkern.attend(q[one], k_prefix, v_prefix, k_suffix[one], v_suffix[one], lengths[one], backend=backend)
        assert_same_bits(alone[0], together[agent], f"o[{agent}]")


# -- through shared_prefix_attention -----------------------------------------------------------------------------------


def tree(device: str, dtype: torch.dtype, G: int, head_dim: int, long: int = 1100) -> Case:
    """Three levels and a document beside them; ragged suffixes, one of `long` tokens; an agent without a prefix."""
    nodes = {
        "doc": (1025, None),
        "left": (130, "doc"),
        "right": (1, "doc"),
        "deep": (257, "left"),
        "beside": (127, None),
    }
    agents = [
        ("doc", 33, 1),
        ("left", 17, 3),
        ("deep", 1, 1),
        ("right", 64, 8),
        ("beside", long, 2),
        (None, 40, 7),
        ("deep", 70, 20),
        ("doc", 16, 16),
    ]
    return cases.make_case(Geometry(2, 2 * G, 2, head_dim, dtype), torch.device(device), tree=nodes, agents=agents)


def decode(device: str, agents: int, prefix_tokens: int, G: int = 4, head_dim: int = 128) -> Case:
    geometry = Geometry(2, 2 * G, 2, head_dim, torch.bfloat16)
    return cases.decode_case(geometry, torch.device(device), agents, prefix_tokens)


def assert_same_case(a: Sequence[Out], b: Sequence[Out]) -> None:
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        assert_same_rows(one, other, i)


def check_tree(device: str, backend: str, dtype: torch.dtype, G: int, head_dim: int) -> None:
    case = tree(device, dtype, G, head_dim)
    assert_case_is_exact(cases.attend(backend, case, padding=3, workers_per_node=2), case)


def check_company(device: str, backend: str, agents: int, who: Sequence[int]) -> None:
    """Alone, among all, and among a few in another order."""
    case = decode(device, agents, 2049)
    together = cases.attend(backend, case, padding=1)
    for i in who:
        assert_same_rows(cases.attend(backend, case.only(i))[0], together[i], i)
    few = cases.attend(backend, case.only(*reversed(who)))
    assert_same_case(few, [together[i] for i in reversed(who)])


def check_order_and_placement(device: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Permutations of the agents, and a node's segments on any number of workers."""
    case = tree(device, dtype, 4, 64)
    expected = cases.attend(backend, case)
    for workers in (2, 3, 7):
        order = torch.randperm(len(case.agents)).tolist()
        shuffled = cases.attend(backend, case.only(*order), workers_per_node=workers, padding=workers)
        assert_same_case(shuffled, [expected[i] for i in order])


def check_repeats(device: str, backend: str, times: int, call: Callable[..., Any] | None = None) -> None:
    """One step again and again on one plan, its fresh memory full of NaN: a race would show in some bits."""
    run = cases.shared_prefix_attention if call is None else call
    differ = torch.zeros((), dtype=torch.int64, device=device)

    def repeated(*operands: Any, **options: Any) -> Any:
        with fresh_memory_is_nan():
            first = run(*operands, **options)
            for _ in range(times):
                for one, other in zip(first, run(*operands, **options), strict=True):
                    # Summed on the device: waiting after each step would keep steps apart.
                    differ.add_((bits(one) != bits(other)).any())
        return first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "shared_prefix_attention", repeated)
        cases.attend(backend, tree(device, torch.bfloat16, 4, 64, long=2100), padding=2, workers_per_node=3)
    assert not differ, f"{int(differ)} of {2 * times} results differ from the first"


def tiny_step(device: str, backend: str, broken: bool = False) -> None:
    """A step for the sanitizer; broken: its page table leads out of the pages."""
    right = cases.shared_prefix_attention

    def wrong(q: Any, k: Any, v: Any, plan: Any, pool: Any, **options: Any) -> Any:
        pool.page_table.fill_(cases.NOWHERE)
        return right(q, k, v, plan, pool, **options)

    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(cases, "shared_prefix_attention", wrong)
        cases.attend(backend, tree(device, torch.bfloat16, 4, 64), padding=1, workers_per_node=2)


# -- K0 with norm and RoPE, and K3 -------------------------------------------------------------------------------------


def check_fused_append(device: str, backend: str, dtype: torch.dtype, G: int = 4, head_dim: int = 128) -> None:
    """Norm and RoPE of q and k against fp64, v as it is, each in its place; nothing else in the pages changes."""
    heads, eps = 2, 1e-6

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size).to(device, dtype)

    def numbers(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v, weights = (
        normal(5, heads * G, head_dim),
        normal(5, heads, head_dim),
        normal(5, heads, head_dim),
        normal(2, head_dim),
    )
    angles = (torch.rand(5, head_dim // 2) * 6.28).repeat(1, 2)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    k_pages, v_pages = (torch.full((4, heads, 16, head_dim), cases.NAN, dtype=dtype, device=device) for _ in range(2))
    table, lengths = numbers([[2, cases.NOWHERE], [3, 0]]), numbers([2, 18])
    queries = choose(backend, device).append_fused(
        *(q, k, v, *weights, cos, sin, k_pages, v_pages, table, lengths),
        *(numbers([0, 0, 1, 1, -1]), numbers([1, 0, 1, 0, 0])),
        q_eps=eps,
        k_eps=eps,
    )
    if backend == "triton":
        queries = queries.transpose(0, 1).flatten(1, 2)
    at = torch.tensor([2, 2, 0, 0]), slice(None), torch.tensor([0, 1, 0, 1])
    assert_same_bits(v_pages[at], v[:4], "v")
    for pages in (k_pages, v_pages):
        assert int((~pages.isnan()).sum()) == 4 * heads * head_dim
    for name, found, x, weight in (("q", queries, q, weights[0]), ("k", k_pages[at], k[:4], weights[1])):
        rows = slice(0, len(x))
        wide = x.double()
        wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
        turned = torch.cat((-wide[..., head_dim // 2 :], wide[..., : head_dim // 2]), dim=-1)
        expected = wide * cos[rows, None].double() + turned * sin[rows, None].double()
        usual = plain._rope(plain._norm(x, weight, eps), cos[rows], sin[rows])
        assert_exact(found, expected, usual, name)


def check_merge(device: str, backend: str, head_dim: int = 80) -> None:
    """The fold of two states against fp64, some of them of no key."""
    a, b = (
        plain.State(
            *(t.to(device) for t in (10 * torch.randn(37, 3), 1 + torch.rand(37, 3), torch.randn(37, 3, head_dim)))
        )
        for _ in range(2)
    )
    for state, rows in ((a, slice(0, 9)), (b, slice(5, 14))):
        state.m[rows], state.l[rows], state.acc[rows] = -torch.inf, 0.0, 0.0
    m, l, acc = choose(backend, device).merge(a, b)
    assert_same_bits(m, torch.maximum(a.m, b.m), "m")
    # Of no key on either side: any finite pivot.
    pivot = m.masked_fill(m.isneginf(), 0.0).double()
    x, y = (torch.exp2(state.m.double() - pivot) for state in (a, b))
    torch.testing.assert_close(l.double(), x * a.l + y * b.l, rtol=1e-5, atol=1e-6)
    expected = x[..., None] * a.acc + y[..., None] * b.acc
    torch.testing.assert_close(acc.double(), expected, rtol=1e-5, atol=1e-5)


# -- forms of the Triton kernels ---------------------------------------------------------------------------------------


class Seen(dict[str, Any]):
    """Forms of K1 that note which one a launch takes."""

    def __init__(self, forms: dict[str, Any], seen: list[str]) -> None:
        super().__init__(forms)
        self.seen = seen

    def __getitem__(self, name: str) -> Any:
        self.seen.append(name)
        return super().__getitem__(name)


def in_form(name: str, case: Case, **change: int) -> list[Out]:
    """The case with K1 in the form of this name, which the launcher takes by the rows of a step, changed so."""
    prefix: Any = importlib.import_module("kvkern.kernels.prefix")
    real, seen = prefix.forms, []  # type: ignore[var-annotated]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVKERN_PREFIX", "plain")
        patch.setattr(prefix, "SMALL_ROWS", 2**30 if name == "small" else 0)
        patch.setattr(prefix, "forms", lambda *of: Seen({n: form | change for n, form in real(*of).items()}, seen))
        outs = cases.attend("triton", case, workers_per_node=2)
    assert seen == [name]
    return outs


def check_forms_of_k1(case: Case) -> None:
    assert_same_case(in_form("small", case), in_form("large", case))


@contextmanager
def workers_of_k2(count: int) -> Iterator[list[bool]]:
    """K2 with so many workers a tile; yields, for each launch that wanted more than one, whether it got them."""
    suffix: Any = importlib.import_module("kvkern.kernels.suffix")
    real, split = suffix._counters.get, []  # type: ignore[var-annotated]

    def get(device: torch.device, wanted: int) -> Any:
        counters = real(device, wanted)
        split.append(counters is not None)
        return counters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "_workers", lambda *_: count)
        patch.setattr(suffix._counters, "get", get)
        yield split


def check_workers_of_k2(case: Case, counts: Sequence[int]) -> None:
    with workers_of_k2(1) as split:
        expected = cases.attend("triton", case)
    assert split == []
    for count in counts:
        with workers_of_k2(count) as split:
            assert_same_case(cases.attend("triton", case), expected)
        assert split == [True]


def check_hopper(device: str, dtype: torch.dtype, G: int, head_dim: int) -> None:
    """The kernel that KVKERN_PREFIX=hopper names against the plain one, few rows and many, walks folded and apart."""
    for case in (
        tree(device, dtype, G, head_dim),
        cases.decode_case(Geometry(2, 2 * G, 2, head_dim, dtype), torch.device(device), 70, 300),
    ):
        for workers in (1, 3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("KVKERN_PREFIX", "plain")
                expected = cases.attend("triton", case, workers_per_node=workers)
                patch.setenv("KVKERN_PREFIX", "hopper")
                outs = cases.attend("triton", case, workers_per_node=workers)
            assert_same_case(outs, expected)


def check_switch(case: Case, variable: str) -> None:
    """With the switch on, a step is exact, and has the bits that it has without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(variable, raising=False)
        expected = cases.attend("triton", case, workers_per_node=2)
        patch.setenv(variable, "1")
        outs = cases.attend("triton", case, workers_per_node=2)
    assert_same_case(outs, expected)
    assert_case_is_exact(outs, case)


def apart(call: str, *before: str, timeout_s: int) -> subprocess.CompletedProcess[str]:
    """A call of this module in a process of its own, which may end badly. Raises subprocess.TimeoutExpired."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    # Each tensor an allocation of its own, so that what lies behind it is nobody's.
    env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [
        *before,
        sys.executable,
        "-c",
        f"import torch, test_gpu\ntorch.manual_seed({torch.initial_seed()})\ntest_gpu.{call}",
    ]
    return subprocess.run(
        command, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )


# -- an engine with graphs ---------------------------------------------------------------------------------------------


def check_graphs(device: str) -> None:
    """Five agents, 30 steps and more; three of them end before, which takes other plans and other graphs."""
    model, tokenizer = tiny_model(head_dim=64, dtype=torch.bfloat16).to(device), tiny_tokenizer()
    found, replayed = [], []
    with kvkern.publish(model, tokenizer, TEXT) as document:
        for graphs in (False, True):
            engine = kvkern.Engine(model, tokenizer, memory_bytes=4 << 20, graphs=graphs)
            requests = [
                engine.submit(document, question, max_new_tokens=new, eos_token_id=[])
                for question, new in zip(QUESTIONS[:5], (32, 9, 32, 17, 24), strict=True)
            ]
            while engine.scheduler.unfinished:
                engine.step()
                replayed.append(any(planned.graph is not None for planned in engine._plans.values()))
            found.append([request.answer.token_ids for request in requests if request.answer is not None])
            assert engine.describe()["graphs"] is graphs, engine.describe()["graphs_why"]
            if not graphs:
                assert not any(replayed)
    assert len(replayed) >= 60 and sum(replayed) > 20
    assert found[0] == found[1] and [len(tokens) for tokens in found[0]] == [32, 9, 32, 17, 24]


# -- on the device -----------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SANITIZER = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_agrees_with_fp64_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_fp64(shape, dtype, "cuda", "triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "G", "head_dim"), SQUARE, ids=str)
def test_a_tree_agrees_with_fp64_on_the_gpu(dtype: torch.dtype, G: int, head_dim: int) -> None:
    check_tree("cuda", "triton", dtype, G, head_dim)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "head_dim"), [(4, 128), (3, 64)])
def test_append_with_norm_and_rope_agrees_with_fp64_on_the_gpu(dtype: torch.dtype, G: int, head_dim: int) -> None:
    check_fused_append("cuda", "triton", dtype, G, head_dim)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_merge_agrees_with_fp64_on_the_gpu(head_dim: int) -> None:
    check_merge("cuda", "triton", head_dim)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("workers", [1, 3])
def test_a_row_has_the_same_bits_alone_and_among_64_on_the_gpu(workers: int) -> None:
    check_alone_and_among("cuda", "triton", workers)


@pytest.mark.gpu
@needs_gpu
def test_a_row_has_the_same_bits_alone_and_among_4096_on_the_gpu() -> None:
    check_company("cuda", "triton", 4096, (0, 17, 2048, 4095))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_and_placement_gives_the_same_bits_on_the_gpu(dtype: torch.dtype) -> None:
    check_order_and_placement("cuda", "triton", dtype)


@pytest.mark.gpu
@needs_gpu
def test_a_long_suffix_has_the_same_bits_on_any_number_of_workers_on_the_gpu() -> None:
    check_workers_of_k2(tree("cuda", torch.bfloat16, 4, 128, long=5000), (2, 3, 8))


@pytest.mark.gpu
@needs_gpu
def test_small_and_large_forms_give_the_same_bits_on_the_gpu() -> None:
    case = decode("cuda", 100, 5000)
    check_forms_of_k1(case)
    with pytest.raises(AssertionError, match=r"\d+ of \d+ differ, first at"):
        assert_same_case(in_form("large", case, BLOCK_N=32), in_form("large", case))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("workers", [1, 3])
def test_a_step_repeated_a_thousand_times_has_the_same_bits_on_the_gpu(workers: int) -> None:
    with workers_of_k2(workers):
        check_repeats("cuda", "triton", 1000)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_debug_mode_finds_nothing_on_the_gpu(dtype: torch.dtype) -> None:
    with workers_of_k2(3):
        check_switch(tree("cuda", dtype, 4, 128), "KVKERN_DEBUG")


@pytest.mark.gpu
@needs_gpu
def test_dependent_launches_have_the_bits_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    check_switch(tree("cuda", torch.bfloat16, 4, 128), "KVKERN_PDL")
    monkeypatch.setenv("KVKERN_PDL", "1")
    check_repeats("cuda", "triton", 1000)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("dtype", "G"), [(torch.bfloat16, 4), (torch.float16, 7)], ids=str)
def test_the_hopper_kernel_has_the_bits_of_the_plain_one(dtype: torch.dtype, G: int, head_dim: int) -> None:
    """In a process of its own: waits that never end must not take the others with them."""
    from kvkern.kernels import prefix_hopper

    if (reason := prefix_hopper.why_not(torch.device("cuda"), dtype, head_dim)) is not None:
        pytest.skip(reason)
    done = apart(f"check_hopper('cuda', {dtype}, {G}, {head_dim})", timeout_s=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@needs_gpu
def test_an_engine_with_graphs_says_the_same_on_the_gpu() -> None:
    check_graphs("cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer in PATH or /usr/local/cuda/bin")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "a planted mistake"])
def test_the_sanitizer_finds_nothing_but_a_planted_mistake(tool: str) -> None:
    tiny_step("cuda", "triton")  # compiled, before a process that is slow
    broken = tool == "a planted mistake"
    options = (
        "--tool",
        "memcheck" if broken else tool,
        "--error-exitcode",
        "9",
        "--target-processes",
        "application-only",
    )
    assert SANITIZER is not None
    try:
        done = apart(f"tiny_step('cuda', 'triton', {broken})", SANITIZER, *options, timeout_s=100)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} did not end within 100 s")
    found = done.stdout + done.stderr
    if "Device not supported" in found:
        pytest.skip("compute-sanitizer: device not supported")
    if broken:
        assert done.returncode != 0 and "Invalid __global__" in found, found
    else:
        assert done.returncode == 0, found


# -- the same without a device -----------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles_of_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_80, whose tiles the interpreter takes, has no small form."""
    if INTERPRETING:
        repair(monkeypatch)
        monkeypatch.setattr("kvkern.kernels.prefix.arch_of", lambda _: 90)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_these_checks_hold_for_the_backends_of_this_machine(backend: str) -> None:
    """What is skipped without a GPU has at least run: the same checks, where they can."""
    for shape in SHAPES[:4]:
        for dtype in (torch.float32, torch.bfloat16):
            check_against_fp64(shape, dtype, "cpu", backend)
    check_alone_and_among("cpu", backend, 3)
    for triple in (SQUARE[0], SQUARE[8], SQUARE[-5]):
        check_tree("cpu", backend, *triple)
    check_company("cpu", backend, 40, (0, 17, 39))
    check_order_and_placement("cpu", backend)
    check_repeats("cpu", backend, 3)
    check_fused_append("cpu", backend, torch.float32)
    check_fused_append("cpu", backend, torch.bfloat16, 3, 64)
    check_merge("cpu", backend)
    tiny_step("cpu", backend)


def test_the_check_of_graphs_holds_for_a_stand_in_and_catches_one_that_is_not_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in = StandIn()
    monkeypatch.setattr("kvkern.engine.capture_on", lambda *_: stand_in)
    check_graphs("cpu")
    assert len(stand_in.replays) > 2
    monkeypatch.setattr("kvkern.engine.capture_on", lambda *_: lambda call: (call(), lambda: None))
    with pytest.raises(AssertionError):
        check_graphs("cpu")


@pytest.mark.full
@interpreted
def test_forms_of_k1_and_their_control_hold_in_the_interpreter(small_tiles_of_sm_90: None) -> None:
    case = cases.make_case(
        Geometry(1, 2, 1, 64, torch.bfloat16), torch.device("cpu"), tree={"doc": (130, None)}, agents=[("doc", 3, 2)]
    )
    check_forms_of_k1(case)
    with pytest.raises(AssertionError, match=r"\d+ of \d+ differ, first at"):
        assert_same_case(in_form("large", case, BLOCK_N=32), in_form("large", case))


@interpreted
def test_workers_repeats_and_debug_mode_hold_in_the_interpreter(small_tiles_of_sm_90: None) -> None:
    geometry = Geometry(1, 2, 1, 64, torch.bfloat16)
    case = cases.make_case(
        geometry, torch.device("cpu"), tree={"doc": (130, None)}, agents=[("doc", 2100, 2), (None, 3, 1)]
    )
    check_workers_of_k2(case, (2,))
    check_switch(case, "KVKERN_DEBUG")
    check_switch(case, "KVKERN_PDL")
    check_fused_append("cpu", "triton", torch.bfloat16)
    check_merge("cpu", "triton")


@interpreted
def test_the_check_of_the_hopper_kernel_holds_for_a_stand_in_and_catches_another(
    small_tiles_of_sm_90: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix: Any = importlib.import_module("kvkern.kernels.prefix")
    prefix_hopper: Any = importlib.import_module("kvkern.kernels.prefix_hopper")
    factor = 1.0

    def stand_in(q: Any, node_table: Any, items: Any, path_table: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVKERN_PREFIX", "plain")
            state = prefix.prefix_attention(q, node_table, items, path_table, num_kv_heads=q.shape[0], **options)
        return state._replace(l=state.l * factor)

    monkeypatch.setattr(prefix_hopper, "why_not", lambda *_: None)
    monkeypatch.setattr(prefix_hopper, "prefix_attention_hopper", stand_in)
    small = cases.make_case(
        Geometry(2, 2, 2, 64, torch.bfloat16), torch.device("cpu"), tree={"doc": (5, None)}, agents=[("doc", 3, 2)]
    )
    monkeypatch.setitem(globals(), "tree", lambda *_: small)
    monkeypatch.setattr(cases, "decode_case", lambda *_: small)
    check_hopper("cpu", torch.bfloat16, 1, 64)
    factor = 1.01
    with pytest.raises(AssertionError, match=r"(o|lse)\[0\]: \d+ of \d+ differ, first at"):
        check_hopper("cpu", torch.bfloat16, 1, 64)


@pytest.mark.full
def test_a_process_of_its_own_finds_this_module() -> None:
    done = apart("check_repeats('cpu', 'cpu', 1)", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr


# -- controls ----------------------------------------------------------------------------------------------------------


def test_control_a_wrong_result_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kvkern.attend

    def wrong(q: torch.Tensor, *args: object, **options: object) -> object:
        return right(q * 1.01, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(kvkern, "attend", wrong)
    with pytest.raises(AssertionError):
        check_against_fp64(SHAPES[1], torch.float32, "cpu", "cpu")


def test_control_a_step_that_differs_once_is_caught() -> None:
    right, calls = cases.shared_prefix_attention, 0

    def sometimes(*operands: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        o, lse = right(*operands, **options)
        if calls == 3:
            # The last bit of one element.
            bits(o)[0, 0, 0] ^= 1
        return o, lse

    with pytest.raises(AssertionError, match="1 of 8 results differ"):
        check_repeats("cpu", "cpu", 4, sometimes)


def test_control_arithmetic_that_follows_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.shared_prefix_attention

    def wrong(q: torch.Tensor, *operands: Any, **options: Any) -> Any:
        o, lse = right(q, *operands, **options)
        return o * (1 + 2**-6 * (len(q) > 8)), lse

    monkeypatch.setattr(cases, "shared_prefix_attention", wrong)
    with pytest.raises(AssertionError, match=r"o\[0\]: \d+ of \d+ differ, first at"):
        check_company("cpu", "cpu", 9, (0, 8))
    with pytest.raises(AssertionError, match=r"o\[\d\]: max error"):
        check_tree("cpu", "cpu", torch.float32, 2, 64)


def test_control_a_fused_append_and_a_merge_that_are_wrong_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choose("torch", "cpu")

    def append_fused(q: Any, k: Any, v: Any, q_norm: Any, k_norm: Any, cos: Any, sin: Any, *at: Any, **eps: Any) -> Any:
        return right.append_fused(q, k, v, q_norm, k_norm, cos, -sin, *at, **eps)

    wrong = right._replace(append_fused=append_fused, merge=lambda a, b: right.merge(a, b._replace(l=b.l * 1.001)))
    monkeypatch.setitem(globals(), "choose", lambda *_: wrong)
    with pytest.raises(AssertionError, match="q: max error"):
        check_fused_append("cpu", "torch", torch.float32)
    with pytest.raises(AssertionError, match="not close"):
        check_merge("cpu", "torch")


def test_control_a_page_table_that_leads_out_of_the_pages_is_caught() -> None:
    with pytest.raises(IndexError):
        tiny_step("cpu", "torch", broken=True)
