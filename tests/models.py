"""Tiny random models and a tiny tokenizer that are the same in every process, and what transformers makes of them from scratch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("a", "n"), ("Ġ", "p")]
VOCAB_SIZE = 320
"""Of the models: more than the tokenizer has, as real models have."""

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.first and date is defined %}Today is {{ date }}. {% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if mood is defined %}[{{ mood }}] {% endif %}{% endif %}"""

QWEN3 = """\
{%- set last = namespace(query=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" and "</think>" in m.content and loop.index0 < last.query %}
{{- m.content.split("</think>")[-1].lstrip() }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""What Qwen3's template does: the thoughts of earlier turns are left out."""

TEXT = (
    "The pump starts when the valve is open. A valve opens by hand, or when pressure in the second tank falls below two "
    "bar. Nobody but the engineer on duty may close it. After a failure the log names the part, the hour and the person "
    "who was there, and the pump is not started again before both have been read."
)

QUESTIONS = (
    "Why?",
    "When does the pump start?",
    "Who may close the valve, and who else, if nobody is on duty?",
    "What is in the log",
    "Is two bar high?",
    "List all parts that are named: tanks, valves, people.",
    "And then?",
    "Say it in one word.",
)


def tiny_tokenizer(template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; `options` go to PreTrainedTokenizerFast."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    backend = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **options}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = template
    return tokenizer


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
}
"""Models with plain causal attention: class, config and what the config must be told."""


def tiny_model(
    kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "kvkern", **config: Any
) -> Any:
    """A random model of one of KINDS whose tokens depend on all that it sees; the same seed is the same weights in any process."""
    shape: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    make, settings, needed = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _to(make(settings(**{**shape, **needed, **config})).eval(), dtype)
        for name, bias in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(bias)  # a fresh model's are zero, and would tell of nothing
    model.set_attn_implementation(attention)
    return model


def twin(model: Any, attention: str = "sdpa", *, dtype: torch.dtype | None = None) -> Any:
    """The same weights under another attention, and in another dtype if one is given."""
    made = _to(type(model)(copy.deepcopy(model.config)).eval(), model.dtype)
    made.load_state_dict(model.state_dict())
    made.set_attn_implementation(attention)
    return _to(made, dtype or model.dtype)


def _to(model: Any, dtype: torch.dtype) -> Any:
    """The weights in another dtype; the frequencies of RoPE stay in fp32, as they do where a model is loaded."""
    rotary = type(model.model.rotary_emb)(config=model.config)
    model.to(dtype).model.rotary_emb = rotary
    return model


# -- from scratch ------------------------------------------------------------------------------------------------------


def conversation(
    tokenizer: Any, text: str, question: str, turns: Sequence[Any] = (), **template_kwargs: Any
) -> list[int]:
    """All tokens that come before the answer."""
    messages = [{"role": "system", "content": text}, *turns, {"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **template_kwargs
    )
    return ids


@torch.no_grad()
def scratch_answer(model: Any, ids: Sequence[int], new: int, **options: Any) -> list[int]:
    """The new tokens of transformers' own generate."""
    prompt = torch.tensor([list(ids)])
    options = {"do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **options)
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def scratch_logits(model: Any, ids: Sequence[int], last: int = 1) -> Tensor:
    """Logits of the last positions, [last, vocabulary]."""
    return model(torch.tensor([list(ids)]), logits_to_keep=last).logits[0]
