"""Norm, RoPE and append in one: the kernel against fp64, the operator's refusals, and an engine on a fused Qwen3."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from models import QUESTIONS, TEXT, VOCAB_SIZE, tiny_model, tiny_tokenizer
from test_attention import PLANS, Compiled, Step
from test_exact_engine import Recorder, only
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted, repair

import kvkern
from kvkern import backends, plain, qwen3, rows
from kvkern.attention import fused_attention
from kvkern.engine import Engine
from kvkern.errors import DtypeError, ShapeError, UnsupportedError
from kvkern.geometry import PAGE

if INTERPRETING:
    from kvkern.kernels.append import append_fused

EPS = 1e-6
NOWHERE = 2**31 - 1


def exact(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and RoPE in fp64, pair by pair."""
    x, weight, cos, sin = (part.double() for part in (x, weight, cos, sin))
    y = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight
    out = torch.empty_like(y)
    half = x.shape[-1] // 2
    for d in range(half):
        a, b = y[..., d], y[..., d + half]
        out[..., d] = a * cos[:, None, d] - b * sin[:, None, d]
        out[..., d + half] = b * cos[:, None, d + half] + a * sin[:, None, d + half]
    return out


def assert_close_as(found: Tensor, theirs: Tensor, expected: Tensor, name: str) -> None:
    """fp32 to rounding; else at most 2x (max) and 1.5x (mean) of the error of transformers' own steps."""
    error, allowed = (found.double() - expected).abs(), (theirs.double() - expected).abs()
    assert found.isfinite().all()
    if found.dtype == torch.float32:
        assert error.max() <= 1e-6 * expected.abs().max(), f"{name}: max error {error.max()}"
        return
    assert error.max() <= 2 * allowed.max(), f"{name}: max error {error.max()} against {allowed.max()}"
    assert error.mean() <= 1.5 * allowed.mean(), f"{name}: mean error {error.mean()} against {allowed.mean()}"


@pytest.mark.parametrize(
    ("dtype", "G", "head_dim"),
    [
        ("float32", 1, 64),
        ("float32", 3, 80),
        ("float32", 16, 128),
        ("bfloat16", 2, 80),
        ("bfloat16", 4, 128),
        ("bfloat16", 8, 64),
        ("float16", 7, 128),
    ],
)
@interpreted
def test_the_kernel_agrees_with_fp64_and_writes_its_rows_alone(
    dtype: str, G: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided rows of one projection, pages token by token, and a padding row of NaN; a row alone has the same bits."""
    repair(monkeypatch)
    heads, kind = 2, getattr(torch, dtype)
    qkv = torch.randn(5, (G + 2) * heads, head_dim).to(kind)
    qkv[3] = math.nan
    q, k, v = qkv.split((G * heads, heads, heads), dim=1)
    weights = [(torch.rand(head_dim) + 0.5).to(kind) for _ in range(2)]
    angle = torch.rand(5, head_dim // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    table = torch.tensor([[4, 2, NOWHERE], [1, NOWHERE, -7], [3, 0, NOWHERE]], dtype=torch.int32)
    lengths = torch.tensor([17, 3, 19], dtype=torch.int32)
    slot = torch.tensor([2, 0, 0, -1, 2], dtype=torch.int32)
    back = torch.tensor([1, 1, 0, 0, 0], dtype=torch.int32)
    places = {0: (0, 1), 1: (4, 15), 2: (2, 0), 4: (0, 2)}

    def run(cos: Tensor, rows: slice = slice(None), eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
        pages = [torch.full((5, PAGE, heads, head_dim), math.nan, dtype=kind).transpose(1, 2) for _ in range(2)]
        packed = append_fused(
            *(part[rows] for part in (q, k, v)),
            *weights,
            cos[rows],
            sin[rows],
            *pages,
            table,
            lengths,
            slot[rows],
            back[rows],
            q_eps=eps,
            k_eps=eps,
        )
        return packed.transpose(0, 1).flatten(1, 2), *pages

    def check(cos_given: Tensor, eps: float = EPS) -> None:
        found, k_pages, v_pages = run(cos_given, eps=eps)
        seen = [row for row in range(5) if row != 3]
        written = torch.stack([k_pages[page, :, token] for page, token in places.values()])
        for name, got, x, weight in (("q", found[seen], q, weights[0]), ("k", written, k, weights[1])):
            theirs = plain._rope(plain._norm(x, weight, EPS), cos, sin)
            assert_close_as(got, theirs[seen], exact(x, weight, cos, sin)[seen], name)
        for row, (page, token) in places.items():
            assert_same_bits(v_pages[page, :, token], v[row], f"v[{row}]")
            k_pages[page, :, token] = v_pages[page, :, token] = math.nan
        assert k_pages.isnan().all() and v_pages.isnan().all()

    check(cos)
    together = run(cos)
    for row, (page, token) in places.items():
        alone = run(cos, slice(row, row + 1))
        assert_same_bits(alone[0][0], together[0][row], f"q[{row}]")
        assert_same_bits(alone[1][page, :, token], together[1][page, :, token], f"k[{row}]")
    with pytest.raises(AssertionError, match=r"q: m(ax|ean) error"):
        check(cos.roll(1, dims=0))
    with pytest.raises(AssertionError, match=r"q: m(ax|ean) error"):
        check(cos, eps=0.5)


# -- the operator ------------------------------------------------------------------------------------------------------


def fused_arguments(step: Step) -> dict[str, Any]:
    angle = torch.rand(6, 16).repeat(1, 2)
    dtype = step.q.dtype
    norms = {"q_norm": torch.rand(32).to(dtype), "k_norm": torch.rand(32).to(dtype)}
    turned = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    return {**step.arguments(), **norms, **turned, "q_eps": EPS, "k_eps": EPS}


@pytest.mark.parametrize("name", ["q_norm", "k_norm", "cos", "sin"])
def test_weights_and_angles_that_do_not_fit_are_refused(name: str) -> None:
    step = Step()
    good = fused_arguments(step)
    step.guard.seal()
    for change, kind, field in (
        (lambda t: t[..., :16], ShapeError, name),
        (lambda t: t[None], ShapeError, name),
        (lambda t: torch.stack([t, t], dim=-1)[..., 0], ShapeError, f"{name}.stride(-1)"),
        (lambda t: t.half(), DtypeError, name),
    ):
        with pytest.raises(kind) as caught:
            fused_attention(**good | {name: change(good[name])})
        assert caught.value.field == field
    step.guard.check("pages")


def test_the_fused_operator_passes_opcheck() -> None:
    step = Step()
    a, pool = fused_arguments(step), step.pool
    rows = [a[name] for name in ("q", "k", "v", "q_norm", "k_norm", "cos", "sin")]
    tables = pool.pages, pool.page_table, pool.seq_lens, *step.plan.tensors
    operator = torch.ops.kvkern.shared_prefix_attention_fused.default
    passed = torch.library.opcheck(operator, (*rows, *tables, EPS, EPS, 1, 32**-0.5, "torch"))
    assert passed and set(passed.values()) == {"SUCCESS"}


@pytest.mark.full
def test_compiled_the_fused_operator_has_the_eager_bits_and_a_new_plan_does_not_recompile() -> None:
    step = Compiled(backend="aot_eager", dynamic=True)
    weight = torch.rand(32)

    def function(q: Tensor, k: Tensor, v: Tensor, plan: Any) -> tuple[Tensor, ...]:
        cos, sin = q[:, 0].cos(), q[:, 0].sin()
        o = fused_attention(
            q * 2, k, v + 1, weight, weight, cos, sin, plan, step.pool, layer=1, q_eps=EPS, k_eps=EPS, backend="torch"
        )
        return o, o.sin()

    step.function = function  # type: ignore[method-assign]
    step.compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    step.same_bits(PLANS[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for agents in PLANS:
            step.same_bits(agents)


# -- the model ---------------------------------------------------------------------------------------------------------


def answers(
    model: Any, backend: str, questions: Any = QUESTIONS[:4], *, fused: bool | None = None
) -> list[tuple[int, ...]]:
    with kvkern.publish(model, tiny_tokenizer(), TEXT) as doc:
        engine = Engine(model, tiny_tokenizer(), memory_bytes=1 << 20, backend=backend, fused=fused, debug=True)
        return [a.token_ids for a in engine.ask(doc, questions, ordered=True, max_new_tokens=5, eos_token_id=[])]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_fused_engine_answers_as_before_and_takes_the_fused_way(
    backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    for name, weight in model.named_parameters():
        if "_norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    before, state = answers(model, backend, fused=False), {n: t.data_ptr() for n, t in model.state_dict().items()}
    calls = []
    inner = qwen3.fused_attention
    monkeypatch.setattr(qwen3, "fused_attention", lambda *a, **o: calls.append(o["layer"]) or inner(*a, **o))
    norms = []
    inner_norm = qwen3.rms_norm
    monkeypatch.setattr(qwen3, "rms_norm", lambda *a, **o: norms.append(1) or inner_norm(*a, **o))
    with qwen3.fuse(model):
        assert {n: t.data_ptr() for n, t in model.state_dict().items()} == state
        assert answers(model, backend) == before
        assert {0, 1} == set(calls)
        assert bool(norms) == (backend == "cpu")
        assert [answers(model, backend, [q])[0] for q in QUESTIONS[:2]] == before[:2]
        monkeypatch.setattr(
            qwen3, "fused_attention", lambda *a, **o: inner(*a[:5], *(t.roll(1, 0) for t in a[5:7]), *a[7:], **o)
        )
        assert answers(model, backend) != before, "control: angles of another row"
        calls.clear()
        assert answers(model, backend, fused=False) == before
    assert answers(model, backend, fused=False) == before and not calls
    monkeypatch.setattr(qwen3, "fused_attention", lambda *a, **o: calls.append(o["layer"]) or inner(*a, **o))
    assert answers(model, backend) == before and bool(calls) == (backend == "cpu")
    assert not replaced(model)


def test_what_cannot_be_fused_is_refused_by_name() -> None:
    model = tiny_model()
    other = tiny_model()
    other.model.layers[1].self_attn.forward = other.model.layers[1].self_attn.forward
    refused = (
        (other, "model.attention.forward"),
        (tiny_model("mistral"), "model.attention"),
        (tiny_model(attention="sdpa"), "attn_implementation"),
        (tiny_model().train(), "model.training"),
    )
    for made, field in refused:
        with pytest.raises(UnsupportedError) as caught:
            qwen3.fuse(made)
        assert caught.value.field == field
    assert replaced(other) == {1}, "what someone else put there stays"
    fusions = [qwen3.fuse(model), qwen3.fuse(model, everyone=False)]
    for fusion in fusions:
        assert replaced(model) == {0, 1}
        fusion.remove()
        fusion.remove()
    assert not replaced(model)


def replaced(model: Any) -> set[int]:
    """Layers in which some forward is on the instance."""
    return {i for i, layer in enumerate(model.model.layers) for m in layer.modules() if "forward" in vars(m)}


# -- engines -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any, prompt: list[int], new: int) -> tuple[int, ...]:
    """transformers from scratch, token by token."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[-new:])


def engine_of(model: Any, **options: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), memory_bytes=1 << 20, backend="cpu", debug=True, **options)


def test_engines_over_one_model_go_their_own_ways_and_the_last_one_takes_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = tiny_model("llama"), []
    inner = qwen3.fused_attention
    monkeypatch.setattr(qwen3, "fused_attention", lambda *a, **o: calls.append(1) or inner(*a, **o))
    with kvkern.publish(model, tiny_tokenizer(), TEXT) as doc:
        prompts = [doc.token_ids.tolist() + doc.question_ids(q, {}) for q in QUESTIONS[:3]]

        def ask(engine: Engine) -> tuple[list[tuple[int, ...]], bool]:
            calls.clear()
            asked = engine.ask(doc, QUESTIONS[:3], ordered=True, max_new_tokens=5, eos_token_id=[])
            return [answer.token_ids for answer in asked], bool(calls)

        expected = [greedy(model, prompt, 5) for prompt in prompts]
        engines = {fused: engine_of(model, fused=fused) for fused in (None, False, True)}
        assert {fused: engine.describe()["fused"] for fused, engine in engines.items()} == {
            None: True,
            False: False,
            True: True,
        }
        for fused in (None, False, True, False):
            assert ask(engines[fused]) == (expected, fused is not False)
        calls.clear()
        assert greedy(model, prompts[0], 5) == expected[0] and not calls
        del engines[None]
        assert replaced(model) == {0, 1} and ask(engines[True]) == (expected, True)
        with qwen3.fuse(model):
            del engines[True]
            assert replaced(model) == {0, 1} and ask(engines[False]) == (expected, False)
        assert not replaced(model) and ask(engines[False]) == (expected, False)


def test_an_engine_that_others_fuse_around_asks_for_nothing_on_another_backend() -> None:
    model = tiny_model()
    mine = engine_of(model)
    torch_engine = Engine(model, tiny_tokenizer(), memory_bytes=1 << 20, backend="torch")
    assert (mine.fused, torch_engine.fused) == (True, None)
    forward = model.model.layers[0].self_attn.forward
    assert not forward.everyone
    with qwen3.fuse(model):
        assert forward.everyone
    assert not forward.everyone and replaced(model) == {0, 1}


def test_a_model_without_a_fused_form_is_served_and_refused_only_where_it_is_wanted() -> None:
    model = tiny_model("qwen2")
    engine = engine_of(model)
    assert engine.describe()["fused"] is False and "model.attention" in engine.describe()["fused_why"]
    with pytest.raises(UnsupportedError) as caught:
        engine_of(model, fused=True)
    assert caught.value.field == "model.attention" and not replaced(model)


def test_a_layer_whose_inner_modules_are_heard_or_changed_runs_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner = tiny_model(), qwen3.rms_norm
    heard: list[int] = []
    norms: list[int] = []
    monkeypatch.setattr(qwen3, "rms_norm", lambda *a, **o: norms.append(1) or inner(*a, **o))
    expected = answers(model, "cpu")
    whole = len(norms)
    layer = model.model.layers[0]
    for module in (layer.mlp, layer.mlp.act_fn, layer.input_layernorm, layer.post_attention_layernorm):
        handle = module.register_forward_hook(lambda *_: heard.append(1))
        with kvkern.publish(model, tiny_tokenizer(), TEXT) as doc:
            engine = engine_of(model)
            heard.clear()
            norms.clear()
            asked = engine.ask(doc, QUESTIONS[:4], ordered=True, max_new_tokens=5, eos_token_id=[])
            assert [answer.token_ids for answer in asked] == expected
        assert len(heard) * 2 == len(norms) == whole // 2, "one layer of two"
        handle.remove()
    layer.input_layernorm.double()
    layer.input_layernorm.forward = lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:])
    assert answers(model, "cpu") == expected, "a norm of another dtype and forward is called"


def test_a_fused_llama_has_the_same_bits_alone_among_others_and_joining_late(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, seed=seed)
    questions = {i: torch.randint(VOCAB_SIZE, (1 + 3 * i,)).tolist() for i in range(14)}
    with kvkern.publish(model, tiny_tokenizer(), list(range(150))) as doc:
        few = Recorder(model, backend="cpu", fused=True, max_agents=3)
        among = few.run(doc, questions, 5)
        for i in (0, 5, 13):
            alone = Recorder(model, backend="cpu", fused=True).run(doc, {i: questions[i]}, 5)
            assert_same_bits(alone[i], among[i], f"logits[{i}]")
        inner = qwen3.rms_norm
        monkeypatch.setattr(
            qwen3, "rms_norm", lambda x, weight, eps, **o: inner(x, weight, eps * (1 + 1e4 * (x.shape[0] > 8)), **o)
        )
        wrong = Recorder(model, backend="cpu", fused=True, max_agents=3).run(doc, only(questions, 0, 1, 2), 1)
        with pytest.raises(AssertionError, match=r"logits\[0\]"):
            assert_same_bits(wrong[0], among[0][:1], "logits[0]")


def test_every_backend_has_the_fused_form() -> None:
    assert backends.choose("cpu", "cpu").append_fused is rows.append_fused
    assert backends.choose("torch", "cpu").append_fused is plain.append_fused
