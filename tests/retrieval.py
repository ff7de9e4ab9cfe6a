"""A stock Qwen3 built by hand, whose answers can be read in its document: it goes on from a token as the document does.

Two layers, nothing trained. Layer 0 is a previous-token head: its q and k are constant, and phased so that RoPE makes them
peak at distance 1. Layer 1 is a match head on the slowest RoPE dimensions: its query is the code of the token at hand, its
keys are the codes of the tokens before them, and its values are the codes of the tokens themselves, which the output
projection reads. In a document of distinct tokens the one key that matches says what comes next, by a margin that bf16 does
not eat; without the document's values nothing does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS = 128, 4, 2
G = NUM_QO_HEADS // NUM_KV_HEADS
CODE = 64
"""Elements of a token's code, each 1 or -1: two tokens agree in about half of them."""

ROPE_THETA = 1e10
FAST = 10
"""RoPE frequencies that tell distance 1 from all others; the 32 slowest ones turn by less than 0.1 in 8,192 positions."""

SHARPNESS = (40.0, 8.0)
"""Product of the q and k norms' weights of each layer."""

CONSTANT, TOKEN, PREVIOUS, NEXT = 0, slice(64, 128), slice(128, 192), slice(192, 256)
"""Where the hidden state, 256 wide, holds a constant, the token's code, that of the token before, and that of the answer."""


def retrieval_model(
    vocab_size: int, *, dtype: torch.dtype = torch.float32, attention: str = "kvkern", max_positions: int = 8192
) -> Any:
    """The model; the same weights for the same vocabulary. Its codes are drawn, all else is written down."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    codes = torch.randint(2, (vocab_size, CODE), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, TOKEN] = codes
        model.model.embed_tokens.weight[:, CONSTANT] = 1.0
        model.lm_head.weight[:, NEXT] = codes
        for layer, sharpness in zip(model.model.layers, SHARPNESS, strict=True):
            layer.self_attn.q_norm.weight.fill_(sharpness**0.5)
            layer.self_attn.k_norm.weight.fill_(sharpness**0.5)
        previous, match = (layer.self_attn for layer in model.model.layers)
        _look_one_back(previous)
        _look_for_the_same(match)
        _copy(previous, PREVIOUS)
        _copy(match, NEXT)
    rotary = type(model.model.rotary_emb)(config=config)
    model.to(dtype).model.rotary_emb = rotary  # frequencies stay in fp32, as where a model is loaded
    model.set_attn_implementation(attention)
    return model


def _heads(weight: Tensor) -> Tensor:
    """A projection's weight as [heads, head_dim, hidden], the memory itself."""
    return weight.view(-1, HEAD_DIM, weight.shape[1])


def _look_one_back(attention: Any) -> None:
    """A constant query at angle 0 and a constant key at the angle of one position: RoPE turns one onto the other at distance 1."""
    angle = ROPE_THETA ** (-2 * torch.arange(FAST) / HEAD_DIM)
    half = HEAD_DIM // 2
    _heads(attention.q_proj.weight)[:, :FAST, CONSTANT] = 1.0
    _heads(attention.k_proj.weight)[:, :FAST, CONSTANT] = angle.cos()
    _heads(attention.k_proj.weight)[:, half : half + FAST, CONSTANT] = angle.sin()


def _look_for_the_same(attention: Any) -> None:
    """The token's code as query, the code of the token before as key, on the slow halves of RoPE's pairs."""
    quarter = HEAD_DIM // 4
    slow = torch.cat([torch.arange(quarter, 2 * quarter), torch.arange(3 * quarter, HEAD_DIM)])
    _heads(attention.q_proj.weight)[:, slow, TOKEN] = torch.eye(CODE)
    _heads(attention.k_proj.weight)[:, slow, PREVIOUS] = torch.eye(CODE)


def _copy(attention: Any, to: slice) -> None:
    """Each kv head carries its part of the code, and each of its query heads a like share: an answer needs all of them."""
    share = CODE // NUM_KV_HEADS
    out = attention.o_proj.weight.view(-1, NUM_QO_HEADS, HEAD_DIM)
    for head in range(NUM_QO_HEADS):
        part = slice(head // G * share, (head // G + 1) * share)
        _heads(attention.v_proj.weight)[head // G, :share, TOKEN] = torch.eye(CODE)[part]
        out[to, head, :share] = torch.eye(CODE)[:, part] / G


class Quiz(NamedTuple):
    """A document of distinct tokens, questions on it, and what it says in answer to each."""

    document: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    vocab_size: int


OTHERS = 256
"""Tokens that no document has."""


def quiz(tokens: int, agents: int, *, answer_tokens: int = 4) -> Quiz:
    """Each question is up to 20 words that the document has not, then one that it has; its answer is how the document goes on."""
    ids = torch.randperm(tokens + OTHERS - 1).add(1).tolist()  # token 0 is what an answer of nothing comes to
    document, others = ids[:tokens], ids[tokens:]
    # The document's second token (the first has none before it, and takes itself for that), the last one with a whole
    # answer, answers that begin where a tile or a segment does, and any others.
    last = tokens - answer_tokens - 1
    edges = [1, last, *(edge - 1 for edge in (128, 1024, 2048) if edge <= last)]
    places = (edges + random.sample(sorted(set(range(1, last + 1)) - set(edges)), agents))[:agents]
    questions = [[*random.sample(others, random.randint(0, 20)), document[place]] for place in places]
    return Quiz(document, questions, [document[p + 1 : p + 1 + answer_tokens] for p in places], tokens + OTHERS)


def accuracy(answers: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are right; one that is missing is wrong."""
    found = sum(sum(a == b for a, b in zip(x, y, strict=False)) for x, y in zip(answers, right, strict=True))
    return found / sum(map(len, right))
