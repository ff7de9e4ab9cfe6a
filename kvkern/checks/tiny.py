"""A tiny random Qwen3 with a tokenizer of bytes: what is checked where no model is named. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kvkern.opening import Dtype

NAME = "a tiny random Qwen3"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_model(dtype: Dtype, device: torch.device, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) as `opening.open_model` returns them; "auto" is bfloat16, as it is for most checkpoints."""
    config = Qwen3Config(
        vocab_size=320,  # more than the tokenizer has, as real models have
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        # So wide that every token depends on all that the model sees.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Qwen3ForCausalLM(config).eval()
    rotary = type(model.model.rotary_emb)(config=config)
    model.to(device, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    # The frequencies of RoPE stay in fp32, as they do where a model is loaded.
    model.model.rotary_emb = rotary.to(device)
    model.set_attn_implementation("kvkern")
    return model, _tokenizer()


def _tokenizer() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = CHATML
    return tokenizer
