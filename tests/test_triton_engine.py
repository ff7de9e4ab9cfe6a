"""The whole engine on the Triton kernels, in the interpreter: a tiny Qwen3 gives the tokens that it gives on the torch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import QUESTIONS, TEXT, tiny_model, tiny_tokenizer
from triton_interpreter import INTERPRETING, interpreted, repair

import kvkern
from kvkern import qwen3
from kvkern.engine import Engine


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        repair(monkeypatch)


def answers(model: Any, backend: str) -> list[tuple[int, ...]]:
    """Tokens of two agents that decode and extend beside each other."""
    with kvkern.publish(model, tiny_tokenizer(), TEXT) as doc:
        engine = Engine(model, tiny_tokenizer(), memory_bytes=1 << 20, backend=backend, debug=True)
        asked = engine.ask(doc, QUESTIONS[:2], ordered=True, max_new_tokens=3, eos_token_id=[])
        return [answer.token_ids for answer in asked]


@pytest.mark.full
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@interpreted
def test_an_engine_on_the_triton_kernels_gives_the_tokens_of_the_torch_backend(fused: bool) -> None:
    model = tiny_model()
    for name, weight in model.named_parameters():
        if "_norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    expected = answers(model, "torch")
    if not fused:
        assert answers(model, "triton") == expected
        return
    with qwen3.fuse(model):
        assert answers(model, "triton") == expected


@pytest.mark.full
@interpreted
def test_control_values_of_the_wrong_sign_and_size_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkern.kernels import append as k0

    model = tiny_model()
    expected = answers(model, "torch")
    right = k0.append
    monkeypatch.setattr(k0, "append", lambda q, k, v, *rest: right(q, k, -8 * v, *rest))
    kvkern.backends._choose.cache_clear()
    try:
        assert answers(model, "triton") != expected
    finally:
        monkeypatch.undo()
        kvkern.backends._choose.cache_clear()
