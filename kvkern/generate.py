"""transformers' own generate over a prefix: suffix-only prompts, with the document where transformers cannot see it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from kvkern import qwen3
from kvkern.backends import choose
from kvkern.errors import CapacityError, RequestError, ShapeError, UnsupportedError
from kvkern.prefix import SharedPrefix
from kvkern.publish import check_document, check_ids

LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
"""Lengths that count the prompt, which here is only a suffix, and what to say instead."""

REFUSED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": None,
    "prefill_chunk_size": None,
    "cache_implementation": None,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "dola_layers": None,
    "token_healing": False,
    "use_cache": True,
}
"""Options of GenerationConfig that a suffix-only prompt cannot serve, with the values under which they mean nothing."""

OWN = (
    "assistant_model",
    "custom_generate",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
    "inputs_embeds",
)
"""Arguments of generate that are made here, or that a suffix-only prompt cannot serve."""


class _OverDocument(LogitsProcessor):
    """A processor that is shown document and suffix, as it would be without a prefix."""

    def __init__(self, processor: Any, document_ids: Tensor) -> None:
        self.processor, self.document_ids = processor, document_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        document = self.document_ids.expand(input_ids.shape[0], -1)
        return self.processor(torch.cat([document, input_ids], dim=1), scores)


@torch.no_grad()
def generate(
    model: Any,
    prefix: SharedPrefix,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    logits_processor: Any = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with every row below `prefix`.

    prefix          a published prefix or Document of this model
    input_ids       int64 [B, S]: suffixes only, as `doc.encode` returns them, padded on the left
    attention_mask  [B, S], ones for tokens and zeros for the padding left of them; all ones if None
    kwargs          what generate takes: max_new_tokens, do_sample, temperature, top_k, top_p, streamer, stopping_criteria, ...

    Processors that look at the prompt (a repetition penalty, those in `logits_processor`) are shown document and suffix.
    Returns what generate returns: suffix and answer, int64 [B, S + new], or a ModelOutput with return_dict_in_generate.

    Raises RequestError for lengths that count the prompt, padding on the right, or an unknown token id; UnsupportedError
    for beams and other modes that are not served over a prefix; CapacityError past the model's positions; what
    `check_document` raises for a prefix of another model.
    """
    device = qwen3.check_model(model)
    check_document(prefix, model, field="prefix")
    lengths = _lengths(input_ids, attention_mask)
    check_ids(input_ids.flatten().tolist(), model.config.vocab_size, "input_ids")
    config = _config(model, generation_config, kwargs)
    capacity = input_ids.shape[1] + config.max_new_tokens
    if prefix.end + max(lengths) + config.max_new_tokens > qwen3.max_positions(model):
        raise CapacityError(
            "max_new_tokens",
            found=f"{prefix.end} + {max(lengths)} + {config.max_new_tokens} tokens",
            needed=f"at most the model's {qwen3.max_positions(model)} positions",
            do="ask for fewer new tokens",
        )
    processors = [_OverDocument(p, _ids(prefix, device)) for p in logits_processor or ()]
    if config.repetition_penalty not in (None, 1.0):
        penalty = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
        processors.insert(0, _OverDocument(penalty, _ids(prefix, device)))
        config.repetition_penalty = None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    copies = config.num_return_sequences or 1
    cache = qwen3.SuffixCache(
        prefix,
        prefix.geometry,
        [n for n in lengths for _ in range(copies)],
        capacity=capacity,
        backend=choose(backend, device).name,
    )
    return model.generate(
        input_ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.to(device).cumsum(-1) - 1).clamp(min=0) + prefix.end,
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
        **kwargs,
    )


def _ids(prefix: SharedPrefix, device: torch.device) -> Tensor:
    return prefix.path_token_ids().to(device)[None]


def _lengths(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Suffix tokens of each row, or an error for a mask that is not padding on the left."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ShapeError(
            "input_ids",
            found=list(input_ids.shape),
            needed="[B, S] with at least one token",
            do="pass doc.encode(questions)",
        )
    if attention_mask is None:
        return [input_ids.shape[1]] * input_ids.shape[0]
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            "attention_mask",
            found=list(attention_mask.shape),
            needed=list(input_ids.shape),
            do="pass doc.encode(questions)",
        )
    held = attention_mask.to("cpu", torch.bool)
    if not bool(held[:, -1].all()) or bool((held[:, :-1] & ~held[:, 1:]).any()):
        raise RequestError(
            "attention_mask",
            found="padding inside or on the right",
            needed="zeros on the left only",
            do="use doc.encode, or tokenizer.padding_side='left'",
        )
    lengths: list[int] = held.sum(1).tolist()
    return lengths


def _config(model: Any, given: GenerationConfig | None, kwargs: dict[str, Any]) -> GenerationConfig:
    """The generation config with the keywords that belong to it taken out of `kwargs`; refuses what a suffix cannot serve."""
    base = given if given is not None else model.generation_config
    for name, instead in LENGTHS.items():
        if kwargs.get(name) is not None or (given is not None and getattr(given, name, None) not in (None, 0, 20)):
            raise RequestError(
                name,
                found=kwargs.get(name, getattr(given, name, None)),
                needed=instead,
                do=f"the prompt is only a suffix: give {instead}",
            )
    config = copy.deepcopy(base)
    for name in [name for name in kwargs if hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))
    for name, neutral in REFUSED.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise UnsupportedError(
                name, found=value, needed=f"{neutral}", do="greedy search and sampling are served over a prefix"
            )
    for name in OWN:
        if kwargs.get(name) is not None:
            raise UnsupportedError(name, found="given", needed="None", do="leave it out")
    new = config.max_new_tokens
    if not isinstance(new, int) or isinstance(new, bool) or new < 1:
        raise RequestError(
            "max_new_tokens", found=new, needed="an integer of at least 1", do="say how many tokens an answer may have"
        )
    config.max_length, config.min_length = None, None
    return config
