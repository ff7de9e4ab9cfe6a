"""What transformers is given: an ordinary attention without a prefix, refusals by name, and a step that asks the device nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import KINDS, QUESTIONS, TEXT, tiny_model, tiny_tokenizer, twin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, Qwen3ForCausalLM, StaticCache

import kvkern
from kvkern import qwen3
from kvkern.errors import DeviceError, ShapeError, UnsupportedError
from kvkern.plan import AgentRows, Plan


@pytest.fixture(scope="module", params=list(KINDS))
def model(request) -> Any:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


# -- without a prefix: transformers' sdpa ------------------------------------------------------------------------------


def ragged(*lengths: int) -> dict[str, Tensor]:
    """A left-padded batch of random tokens."""
    width = max(lengths)
    ids = torch.randint(300, (len(lengths), width))
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_a_forward_without_a_prefix_is_sdpa(model):
    other = twin(model, "sdpa")
    for batch in (ragged(40, 40), ragged(40, 7, 1), {"input_ids": torch.randint(300, (2, 33))}):
        found, expected = model(**batch).logits, other(**batch).logits
        seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert torch.equal(found[seen], expected[seen])


def test_a_ragged_generate_without_a_prefix_is_sdpa(model):
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    batch = ragged(40, 7, 1, 23)
    assert torch.equal(model.generate(**batch, **options), twin(model, "sdpa").generate(**batch, **options))


@torch.no_grad()
def test_static_caches_and_4d_masks_without_a_prefix_are_sdpas(model):
    other, ids = twin(model, "sdpa"), torch.randint(300, (2, 9))
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, 5:, :3] = False
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, other(input_ids=ids, attention_mask=mask).logits
    )
    caches = [StaticCache(config=m.config, max_cache_len=12) for m in (model, other)]
    logits = [m(input_ids=ids, past_key_values=c).logits for m, c in zip((model, other), caches, strict=True)]
    assert torch.equal(*logits)


def test_training_without_a_prefix_is_sdpas(model):
    ids = torch.randint(300, (2, 17))
    gradients = []
    for attention in ("kvkern", "sdpa"):
        trained = twin(model, attention).train()
        trained(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in trained.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_in_training_is_sdpas(model):
    ids = torch.randint(300, (2, 17))
    losses = []
    for attention in ("kvkern", "sdpa"):
        trained = twin(model, attention).train()
        for layer in trained.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(1)
        losses.append([trained(input_ids=ids, labels=ids).loss for _ in range(2)])
    assert losses[0][0] == losses[1][0] and losses[0][1] == losses[1][1]
    assert losses[0][0] != losses[0][1], "nothing was dropped"


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 9},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.3},
        {"use_cache": False},
    ],
    ids=lambda options: ", ".join(options),
)
def test_transformers_own_generate_without_a_prefix_is_as_with_sdpa(model, options):
    batch = {"input_ids": torch.randint(300, (1, 24))}
    found = []
    for made in (model, twin(model, "sdpa")):
        torch.manual_seed(2)
        made.generation_config.disable_compile = True  # a static cache is compiled otherwise, on the CPU as well
        found.append(made.generate(**batch, max_new_tokens=8, **{"do_sample": False, "pad_token_id": 0, **options}))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_model_goes_back_to_sdpa_and_comes_again(model, tokenizer):
    made = twin(model, "kvkern")
    other, ids = twin(model, "sdpa"), torch.randint(300, (2, 9))
    doc = kvkern.publish(made, tokenizer, TEXT)
    batch = doc.encode(QUESTIONS[:3])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    answers = kvkern.generate(made, doc, **batch, **options)
    for attention in ("sdpa", "eager", "kvkern"):
        made.set_attn_implementation(attention)
        other.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        assert torch.equal(made(input_ids=ids).logits, other(input_ids=ids).logits)
        if attention != "kvkern":
            with pytest.raises(UnsupportedError, match=f"attn_implementation: found '{attention}'"):
                kvkern.generate(made, doc, **batch, **options)
    assert torch.equal(kvkern.generate(made, doc, **batch, **options), answers)


def test_control_another_mask_is_no_longer_sdpa(model):
    batch = ragged(40, 7)
    other = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits[1, -1], model(**other).logits[1, -1])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", qwen3.LACKING)
@pytest.mark.parametrize("carried", [False, True])
def test_a_keyword_with_a_meaning_we_lack_is_refused(name, carried):
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    if carried:
        k._kvkern = (None, 0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    with pytest.raises(UnsupportedError) as caught:
        qwen3.attention(module, q, k, k, None, scaling=0.25, **{name: torch.ones(4)})
    assert (caught.value.field, caught.value.found) == (f"attention.{name}", "a tensor [4]")
    if not carried:
        assert qwen3.attention(module, q, k, k, None, scaling=0.25, **{name: None})[0].shape == (1, 3, 4, 16)


def test_dropout_over_a_prefix_is_refused():
    k = torch.randn(1, 2, 3, 16)
    k._kvkern = (None, 0)
    with pytest.raises(UnsupportedError, match=r"attention\.dropout: found 0\.1"):
        qwen3.attention(SimpleNamespace(), torch.randn(1, 4, 3, 16), k, k, None, dropout=0.1)


def with_config(**config: Any) -> Any:
    model = tiny_model()
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def looking_ahead() -> Any:
    model = tiny_model()
    model.model.layers[1].self_attn.is_causal = False
    return model


def over_two_devices() -> Any:
    model = tiny_model()
    model.lm_head.to("meta")
    return model


REFUSED = {
    "attn_implementation": lambda: tiny_model(attention="sdpa"),
    "model.training": lambda: tiny_model().train(),
    "model.layer_types": lambda: tiny_model(
        use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=None
    ),
    "model.attn_logit_softcapping": lambda: with_config(attn_logit_softcapping=30.0),
    "model.alibi": lambda: with_config(alibi=True),
    "model.add_cross_attention": lambda: with_config(add_cross_attention=True),
    "model.is_causal": lambda: looking_ahead(),
    "model": lambda: with_config(is_encoder_decoder=True),
    "model.device": over_two_devices,
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_model_that_the_kernels_cannot_serve_is_refused_by_name(field, tokenizer):
    model = REFUSED[field]()
    kind = DeviceError if field == "model.device" else UnsupportedError
    for use in (
        lambda: qwen3.check_model(model),
        lambda: kvkern.publish(model, tokenizer, TEXT),
        lambda: kvkern.Engine(model, tokenizer),
        lambda: kvkern.load("nothing.kv", model, tokenizer),
        lambda: kvkern.generate(model, None, torch.ones(1, 1, dtype=torch.int64), max_new_tokens=1),
    ):
        with pytest.raises(kind) as caught:
            use()
        assert caught.value.field == field and caught.value.do


def test_a_stock_sliding_window_model_is_refused(tokenizer):
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    model.set_attn_implementation("kvkern")
    with pytest.raises(UnsupportedError, match="sliding_window=16"):
        kvkern.publish(model, tokenizer, TEXT)


def test_a_model_without_weights_in_memory_is_refused():
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(DeviceError, match="found meta"):
        qwen3.check_model(model)


# -- the model stays what it was ---------------------------------------------------------------------------------------


def test_weights_classes_and_config_stay_untouched(tokenizer):
    model = tiny_model()
    before = {name: (t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    names = set(vars(model))
    methods = [{name for name in vars(m) if callable(vars(m)[name])} for m in model.modules()]
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        for options in ({}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
            batch = doc.encode(QUESTIONS[:2])
            kvkern.generate(model, doc, **batch, max_new_tokens=2, do_sample=False, pad_token_id=0, **options)
        assert len(list(kvkern.Engine(model, tokenizer).ask(doc, QUESTIONS[:2], max_new_tokens=2))) == 2
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[n].data_ptr() == p and after[n]._version == v for n, (p, v, _) in before.items())
    assert all(torch.equal(after[n], t) for n, (_, _, t) in before.items())
    assert type(model) is Qwen3ForCausalLM and [type(m) for m in model.modules()] == classes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [{name for name in vars(m) if callable(vars(m)[name])} for m in model.modules()] == methods
    assert set(vars(model)) == names
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config.to_dict() == generation.to_dict()


# -- a step asks the device nothing ------------------------------------------------------------------------------------

SYNCS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for the device: a value read, a shape that follows values, a copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.append(name)
        if name in SYNCS:
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError("an index by a mask waits for the device")
        if name == "repeat_interleave" and func._overloadname == "Tensor" and (kwargs or {}).get("output_size") is None:
            raise AssertionError("repeat_interleave waits for the device")
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            raise AssertionError(f"a copy to {kwargs['device']} waits for the device")
        return func(*args, **(kwargs or {}))


class Stepper:
    """A model, a document, and agents below it: one forward of their next rows, as an engine does it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.document = kvkern.publish(model, tokenizer, TEXT)
        self.pool = kvkern.PagePool(self.document.geometry, 16, slots=3)
        self.slots = [self.pool.acquire_slot() for _ in range(3)]

    def inputs(self, rows: Sequence[int]) -> tuple[Plan, dict[str, Any]]:
        for slot, n in zip(self.slots, rows, strict=True):
            self.pool.reserve(slot, n)
        before = [self.pool.length(slot) for slot in self.slots]
        agents = [AgentRows(slot, self.document, n) for slot, n in zip(self.slots, rows, strict=True)]
        plan = Plan.make(self.pool, agents, bucket=16)
        positions = [self.document.end + b + i for b, n in zip(before, rows, strict=True) for i in range(n)]
        return plan, {
            "input_ids": torch.randint(300, (1, 16)),
            "position_ids": torch.tensor([positions + [0] * (16 - sum(rows))]),
            "attention_mask": torch.empty(1, 1, 1, 1),
            "past_key_values": qwen3.StepCache(plan),
            "use_cache": True,
            "logits_to_keep": torch.tensor(plan.last_rows),
        }


@pytest.fixture
def stepper(model, tokenizer):
    stepper = Stepper(model, tokenizer)
    yield stepper
    stepper.document.release()


@pytest.mark.parametrize("rows", [(1, 1, 1), (1, 7, 5), (16, 0, 0)], ids=["decode", "extend", "extend alone"])
@torch.no_grad()
def test_a_step_asks_the_device_nothing(stepper, rows):
    stepper.slots = stepper.slots[: sum(n > 0 for n in rows)]
    plan, inputs = stepper.inputs([n for n in rows if n])
    with NoSync() as mode:
        plan.begin()
        logits = stepper.model(**inputs).logits
    assert mode.seen.count("shared_prefix_attention") == 2 and logits.isfinite().all()


@torch.no_grad()
def test_a_decode_steps_plan_serves_the_next_step(stepper):
    plan, inputs = stepper.inputs([1, 1, 1])
    with NoSync():
        for _ in range(3):
            plan.begin()
            stepper.model(**inputs)
    assert stepper.pool.seq_lens.tolist() == [3, 3, 3] == [stepper.pool.length(slot) for slot in stepper.slots]


@torch.no_grad()
def test_control_under_a_2d_mask_a_step_waits(stepper):
    plan, inputs = stepper.inputs([1, 7, 5])
    plan.begin()
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        stepper.model(**{**inputs, "attention_mask": torch.ones(1, 16, dtype=torch.int64)})


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.to("meta"),
        lambda x: torch.equal(x, x.clone()),
        lambda x: torch.repeat_interleave(x.abs().long()),
    ],
    ids=["item", "bool", "mask", "nonzero", "copy", "equal", "repeat"],
)
@torch.no_grad()
def test_control_a_wait_inside_the_step_is_caught(stepper, wait, monkeypatch):
    plan, inputs = stepper.inputs([1, 1, 1])
    plan.begin()
    attend = qwen3.StepCache.attend

    def waiting(self, layer, q, k, v, sm_scale):
        wait(q.flatten())
        return attend(self, layer, q, k, v, sm_scale)

    monkeypatch.setattr(qwen3.StepCache, "attend", waiting)
    with pytest.raises(AssertionError, match="wait"), NoSync():
        stepper.model(**inputs)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_step_compiles_as_one_graph_and_serves_another_plan(stepper):
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(stepper.model, fullgraph=True, backend=counting)
    for rows in ([3, 5, 4], [1, 1, 1], [2, 6, 1]):
        plan, inputs = stepper.inputs(rows)
        plan.begin()
        expected = stepper.model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, expected)
    assert len(graphs) == 1


# -- caches ------------------------------------------------------------------------------------------------------------


def test_the_suffix_cache_keeps_its_batch_together(model, tokenizer):
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        cache = qwen3.SuffixCache(doc, doc.geometry, 2, capacity=8)
        q = torch.randn(3, 4, 3, 16)
        with pytest.raises(ShapeError, match="a batch of 3"):
            cache.attend(0, q, q[:, :2], q[:, :2], None)
        with pytest.raises(ShapeError, match="a batch of 1, needed 2"):
            cache.resume([[1, 2]], 2, capacity=8)


def forget_a_layer(cache, layer, *args):
    return torch.zeros(1, args[0].shape[2], 4, 16) if layer else ATTEND(cache, layer, *args)


def hand_over_wider_heads(cache, layer, q, k, v, sm_scale):
    return ATTEND(cache, layer, q, k, torch.cat([v, v], dim=3), sm_scale)


ATTEND = qwen3.PrefillCache.attend
MISTAKES = {
    "1 of 2 layers that call the attention function": forget_a_layer,
    "2 kv heads of 32 in layer 0": hand_over_wider_heads,
}


@pytest.mark.parametrize("found", MISTAKES)
def test_layers_that_hand_over_something_else_are_refused(tokenizer, monkeypatch, found):
    monkeypatch.setattr(qwen3.PrefillCache, "attend", MISTAKES[found])
    with pytest.raises(UnsupportedError) as caught:
        kvkern.publish(tiny_model(), tokenizer, TEXT)
    assert (caught.value.field, caught.value.found) == ("model.attention", found)
    assert "2 kv heads of 16" in caught.value.needed and caught.value.do
