"""Rounding classes: only buckets in which a row keeps its bits, whatever of the model it is that loses them."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kvkern import linear
from kvkern.errors import CapacityError, RequestError, UnsupportedError
from kvkern.linear import RoundingClass, measure

BUCKETS = (4, 8, 16, 32)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
}


@pytest.fixture
def qwen3(seed: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()


@pytest.fixture(autouse=True)
def forget():
    linear._measure.cache_clear()


def one_ulp_more(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def replace(model: nn.Module, name: str, make):
    """Put a subclass in place of every module `name`, with the same weights."""
    for module in model.modules():
        old = getattr(module, name, None)
        if isinstance(old, nn.Module):
            old.__class__ = make(type(old))


def with_forward(change):
    """A subclass whose output is changed by `change(output [1, rows, ...])`."""

    def make(kind):
        class Changed(kind):
            def forward(self, *args):
                out = super().forward(*args)
                return tuple(map(change, out)) if isinstance(out, tuple) else change(out)

        Changed.__name__ = kind.__name__
        return Changed

    return make


def differs_with_32_rows(y):
    return one_ulp_more(y) if y.shape[1] == 32 else y


def differs_in_the_last_of_8_rows(y):
    if y.shape[1] == 8:
        y = y.clone()
        y[:, -1, ..., 0] = one_ulp_more(y[:, -1, ..., 0])
    return y


def depends_on_the_neighbours_of_16_rows(y):
    return y + y.abs().amax(dim=1, keepdim=True) * 1e-7 * torch.arange(16)[:, None] if y.shape[1] == 16 else y


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_a_whole_forward_keep_their_bits_in_every_bucket_of_the_class(qwen3, dtype):
    model = qwen3.to(dtype)
    found = measure(model, buckets=BUCKETS, head_buckets=BUCKETS)
    hidden = torch.randn(1, 64, dtype=dtype)
    results = []
    for bucket in found.layers.buckets:
        x = torch.randn(1, bucket, 64, dtype=dtype)
        x[0, bucket // 2] = hidden
        with torch.inference_mode():
            for layer in model.model.layers:
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            results.append(model.model.norm(x)[0, bucket // 2])
    assert all(torch.equal(r, results[0]) for r in results)


def test_each_distinct_module_is_measured_once(qwen3):
    assert sorted(measure(qwen3, buckets=(4, 8)).probes) == sorted(
        [
            "Linear 64 x 64",  # q and o
            "Linear 32 x 64",
            "Linear 96 x 64",
            "Linear 64 x 96",
            "Linear 200 x 64",
            "Qwen3RMSNorm 64",
            "Qwen3RMSNorm 4 x 16",
            "Qwen3RMSNorm 2 x 16",
            "Qwen3RotaryEmbedding",
            "SiLUActivation 96",
        ]
    )


def test_a_layer_with_and_one_without_bias_are_two():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, mlp_bias=True)).eval()
    probes = measure(model, buckets=(4, 8)).probes
    assert "Linear 96 x 64 with bias" in probes and "Linear 64 x 64" in probes


@pytest.mark.parametrize("name", ["k_proj", "down_proj", "act_fn", "k_norm", "norm", "rotary_emb"])
def test_control_a_bucket_in_which_any_module_has_other_bits_is_out(qwen3, name):
    natural = measure(qwen3, buckets=BUCKETS).layers.buckets
    replace(qwen3, name, with_forward(differs_with_32_rows))
    found = measure(qwen3, buckets=BUCKETS).layers
    assert found.buckets == tuple(n for n in natural if n != 32)
    assert found.outside[32].endswith(f"other bits than with {found.max_rows} rows")


@pytest.mark.parametrize("name", ["q_proj", "act_fn", "q_norm", "input_layernorm", "rotary_emb"])
def test_control_a_bucket_in_which_one_position_differs_is_out(qwen3, name):
    natural = measure(qwen3, buckets=BUCKETS).layers.buckets
    replace(qwen3, name, with_forward(differs_in_the_last_of_8_rows))
    found = measure(qwen3, buckets=BUCKETS).layers
    assert found.buckets == tuple(n for n in natural if n != 8)
    assert found.outside[8].endswith("depend on its position")


class InAnotherOrder(nn.Linear):
    """Sums in fp32 and rounds once, as a GEMM does in 16 bits; with 32 rows in another order than with any other number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = slice(None) if x.shape[1] != 32 else torch.arange(self.in_features - 1, -1, -1)
        return (x[..., order].float() @ self.weight[:, order].float().T).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_control_in_16_bits_a_bucket_that_sums_in_another_order_is_out(qwen3, name, dtype):
    model = qwen3.to(dtype)
    replace(model, name, lambda kind: InAnotherOrder)
    found = measure(model, buckets=BUCKETS).layers
    assert 32 not in found.buckets and found.outside[32].startswith("InAnotherOrder")


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 60), (torch.float16, 1500)])
@pytest.mark.parametrize(("out", "k"), [(576, 1536), (576, 576), (64, 96), (40, 2560)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_rows_of_a_linear_layer_show_another_order_of_summation(seed, out, k, dtype, least, bias):
    """Of 4,096 outputs that nearly cancel, in bf16 1 in 25 for long sums and 1 in 80 for the shortest; random rows show none at all."""
    layer = nn.Linear(k, out, bias=bias, dtype=dtype)
    (probe,) = linear._probes_of(layer, nn.Sequential(layer), is_head=False)
    order = torch.randperm(k)

    def differ(rows: torch.Tensor) -> int:
        given, other = (rows[:, o].float() @ layer.weight[:, o].float().T for o in (torch.arange(k), order))
        added = layer.bias.float() if bias else 0.0
        return int(((given + added).to(dtype) != (other + added).to(dtype)).sum())

    rows = linear._rows(probe)
    assert differ(rows) >= least * (k / 1536) ** 0.5
    assert differ(torch.randn(rows.shape).to(dtype)) < differ(rows) / 10


@pytest.mark.parametrize("weight", ["zeros", "the same row twice", "nearly the same row twice"])
def test_rows_are_finite_and_of_the_usual_size_whatever_the_weight_and_the_bias(seed, weight):
    """NaN has the same bits in every bucket: a layer that gives nothing else would be compared with nothing."""
    layer = nn.Linear(64, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        if weight == "zeros":
            layer.weight.zero_()
        else:
            layer.weight[20:] = layer.weight[:20]
            layer.weight[20:, 0] += 1e-3 * (weight != "the same row twice")
    (probe,) = linear._probes_of(layer, nn.Sequential(layer), is_head=False)
    rows = linear._rows(probe)
    with torch.inference_mode():
        (outputs,) = probe.run(rows[None])
    assert probe.cancelling == 32 and rows.isfinite().all() and outputs.isfinite().all()
    assert rows.float().norm(dim=1).max() < 3 * 64**0.5


class Quantized(nn.Linear):
    """Keeps its weight in 8 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64)


def test_a_layer_whose_weight_is_no_plain_one_is_measured_on_random_rows(qwen3):
    model = qwen3.to(torch.bfloat16)
    replace(model, "o_proj", lambda kind: Quantized)
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        layer.self_attn.o_proj.weight = nn.Parameter((weight * 64).to(torch.int8), requires_grad=False)
    probes = {probe.name: probe for probe in linear._probes(model)}
    assert probes["Quantized 64 x 64"].cancelling == 0 and probes["Linear 64 x 96"].cancelling == 48
    assert "Quantized 64 x 64" in measure(model, buckets=BUCKETS).probes


def test_control_a_bucket_in_which_other_rows_are_felt_is_out(qwen3):
    natural = measure(qwen3, buckets=BUCKETS).layers.buckets
    replace(qwen3, "up_proj", with_forward(depends_on_the_neighbours_of_16_rows))
    assert measure(qwen3, buckets=BUCKETS).layers.buckets == tuple(n for n in natural if n != 16)


def test_the_output_projection_has_a_class_of_its_own(qwen3):
    natural = measure(qwen3, buckets=BUCKETS, head_buckets=BUCKETS)
    replace(qwen3, "lm_head", with_forward(differs_in_the_last_of_8_rows))
    found = measure(qwen3, buckets=BUCKETS, head_buckets=BUCKETS)
    assert found.layers == natural.layers
    assert found.head.buckets == tuple(n for n in natural.head.buckets if n != 8)


def test_of_two_classes_as_large_the_one_with_more_rows_is_taken():
    def signature_of(rows):
        return one_ulp_more if rows in (8, 16) else torch.clone

    probe = linear._Probe("k", "fake", lambda rows, _: torch.ones(rows, 2), lambda x: (signature_of(x.shape[1])(x),))

    def largest(*buckets: int, most_rows: bool = False) -> tuple[int, ...]:
        return linear._largest([probe], buckets, most_rows=most_rows).buckets

    assert largest(4, 8, 16, 32) == (4, 32)
    assert largest(4, 8, 12, 16) == (8, 16)
    assert largest(4, 8, 12, 16, 32) == (4, 12, 32)
    # On a GPU.
    assert largest(4, 12, 16) == (4, 12) and largest(4, 12, 16, most_rows=True) == (16,)
    assert largest(4, 8, 12, 32, most_rows=True) == (4, 12, 32)


# -- how it is used ----------------------------------------------------------------------------------------------------


def test_rows_for_is_the_smallest_bucket_that_holds_them():
    found = RoundingClass((4, 16, 64), {})
    assert [found.rows_for(n) for n in (1, 4, 5, 16, 17, 64)] == [4, 4, 16, 16, 64, 64]
    assert found.max_rows == 64
    with pytest.raises(CapacityError, match=r"^rows: found 65, needed at most 64"):
        found.rows_for(65)
    with pytest.raises(RequestError, match=r"^rows: found 0"):
        found.rows_for(0)


def test_a_second_measurement_of_such_a_model_is_remembered_until_the_threads_change(qwen3):
    first = measure(qwen3, buckets=(4, 8))
    assert measure(Qwen3ForCausalLM(Qwen3Config(**SMALL)), buckets=(4, 8)) is first
    assert measure(qwen3, buckets=(4, 16)) is not first
    assert measure(qwen3.bfloat16(), buckets=(4, 8)) is not first
    qwen3.float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        other = measure(qwen3, buckets=(4, 8))
        assert other is not first and other.threads == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_remembering_keeps_no_model_alive():
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    measure(model, buckets=(4,))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_description_is_plain_json(qwen3):
    described = json.loads(json.dumps(measure(qwen3, buckets=(4, 8), head_buckets=(4,)).describe()))
    assert described["row_buckets"] == [4, 8] and described["head_row_buckets"] == [4]
    assert described["device"] == "cpu" and described["dtype"] == "float32"
    assert described["threads"] == torch.get_num_threads()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_mixture_of_experts_is_refused_by_name():
    config = Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32)
    with pytest.raises(UnsupportedError, match=r"^model\.config\.num_experts: found 4"):
        measure(Qwen3MoeForCausalLM(config))


def test_a_model_without_any_safe_number_of_rows_is_refused(qwen3):
    replace(qwen3, "up_proj", with_forward(lambda y: y + torch.arange(y.shape[1])[:, None]))
    with pytest.raises(UnsupportedError, match=r"^rounding class: found 4 rows: Linear 96 x 64: a row's bits depend"):
        measure(qwen3, buckets=BUCKETS)


@pytest.mark.parametrize("name", ["buckets", "head_buckets"])
def test_no_buckets_are_refused(qwen3, name):
    with pytest.raises(RequestError, match=f"^{name}: found"):
        measure(qwen3, **{name: ()})
    with pytest.raises(RequestError, match=f"^{name}: found"):
        measure(qwen3, **{name: (0, 4)})
