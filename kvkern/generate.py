"""transformers' own generate over a prefix: suffix-only prompts, with the document where transformers cannot see it.

The model is asked to generate as it is, through a view of it: the same weights and configs, and a few methods that answer
otherwise. The processors of the scores are shown each row's whole prompt, and so is what proposes candidate tokens (prompt
lookup, an assistant).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from kvkern import qwen3
from kvkern.backends import choose
from kvkern.errors import CapacityError, RequestError, ShapeError, UnsupportedError
from kvkern.prefix import SharedPrefix
from kvkern.publish import check_document, check_ids

LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
"""Lengths that count the prompt, which here is only a suffix, and what to say instead."""

REFUSED = {
    "penalty_alpha": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "dola_layers": None,
    "token_healing": False,
    "assistant_early_exit": None,
    "use_mtp": False,
    "speculation_type": None,
    "cache_implementation": None,
    "use_cache": True,
    "output_attentions": False,
}
"""Options of GenerationConfig that a suffix-only prompt cannot serve, with the values under which they mean nothing."""

OWN = ("custom_generate", "position_ids", "inputs_embeds", "token_type_ids")
"""Arguments of generate that are made here, or that a suffix-only prompt cannot serve."""

BLIND = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
)
"""Processors that never look at the tokens before."""


@torch.no_grad()
def generate(
    model: Any,
    prefix: SharedPrefix,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Any = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with every row below `prefix`.

    prefix           a published prefix or Document of this model
    input_ids        int64 [B, S]: suffixes only, as `doc.encode` returns them, padded on the left
    attention_mask   [B, S], ones for tokens and zeros for the padding left of them; all ones if None
    past_key_values  what an earlier call returned (with return_dict_in_generate) for the same prefix and as many rows;
                     input_ids are the whole conversations again, and what its pages hold of them is not computed again
    kwargs           what generate takes: max_new_tokens, do_sample, num_beams, streamer, stopping_criteria, assistant_model, ...

    All that looks at the prompt is shown document and suffix: every processor of the scores, those in `logits_processor`
    too, prompt lookup, an assistant model. Stopping criteria see suffix and answer.
    Returns what generate returns: suffix and answer, int64 [B, S + new], or a ModelOutput with return_dict_in_generate.
    Warns where a conversation does not go on from the tokens that `past_key_values` holds: as much is computed again.

    Raises RequestError for lengths that count the prompt, padding on the right, an unknown token id, or a cache that cannot
    be continued; UnsupportedError for modes that are not served over a prefix; CapacityError past the model's positions;
    what `check_document` raises for a prefix of another model.
    """
    device = qwen3.check_model(model)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has no generate of its own
    if not isinstance(model, GenerationMixin):
        raise UnsupportedError(
            "model",
            found=type(model).__name__,
            needed="a model of transformers that can generate",
            do="pass the causal language model itself, not a wrapper of it",
        )
    check_document(prefix, model, field="prefix")
    prompts = _prompts(input_ids, attention_mask)
    check_ids([token for prompt in prompts for token in prompt], model.config.vocab_size, "input_ids")
    config = _config(model, generation_config, kwargs)
    longest = max(map(len, prompts))
    if prefix.end + longest + config.max_new_tokens > qwen3.max_positions(model):
        raise CapacityError(
            "max_new_tokens",
            found=f"{prefix.end} + {longest} + {config.max_new_tokens} tokens",
            needed=f"at most the model's {qwen3.max_positions(model)} positions",
            do="ask for fewer new tokens",
        )
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    # Candidates are tried before they are counted.
    capacity = longest + config.max_new_tokens + (config.prompt_lookup_num_tokens or 0)
    if past_key_values is None:
        cache = qwen3.SuffixCache(
            prefix,
            prefix.geometry,
            len(prompts) * copies,
            capacity=capacity,
            backend=choose(backend, device).name,
        )
    else:
        cache = _continued(past_key_values, prefix, len(prompts), copies, backend)
        if config.prefill_chunk_size is not None:
            raise UnsupportedError(
                "prefill_chunk_size",
                found=config.prefill_chunk_size,
                needed="None with past_key_values",
                do="leave it out: only what is new is computed",
            )
    known = [list(tokens) for tokens in cache.tokens]
    cache.beams = (config.num_beams or 1) > 1
    cache.resume([prompt for prompt in prompts for _ in range(copies)], input_ids.shape[1], capacity=capacity)
    _say_what_was_forgotten(known, cache.reused, _pad(config, model))

    ids = input_ids.to(device)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(device, torch.int64)
    view = _view(model, _Whole(prefix.path_token_ids().to(device), mask))
    out = view.generate(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0) + prefix.end,
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList(logits_processor or ()),
        **kwargs,
    )
    if not cache.beams:
        sequences = out if isinstance(out, Tensor) else out.sequences
        cache.tokens = _fed(sequences[:, : cache.seq_length], mask, copies)
    return out


# -- what is given -----------------------------------------------------------------------------------------------------


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Token ids of each row's suffix, or an error for a mask that is not padding on the left."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ShapeError(
            "input_ids",
            found=list(input_ids.shape),
            needed="[B, S] with at least one token",
            do="pass doc.encode(questions)",
        )
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return rows
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
            do="use doc.encode, also for a conversation that goes on, or tokenizer.padding_side='left'",
        )
    return [row[len(row) - n :] for row, n in zip(rows, held.sum(1).tolist(), strict=True)]


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
                name, found=value, needed=f"{neutral}", do="leave it out: generate cannot serve it over a prefix"
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


def _continued(given: Any, prefix: SharedPrefix, rows: int, copies: int, backend: str | None) -> qwen3.SuffixCache:
    """The cache of an earlier call, if this call can go on from it."""

    def refuse(found: object, needed: str, do: str) -> RequestError:
        return RequestError("past_key_values", found=found, needed=needed, do=do)

    if not isinstance(given, qwen3.SuffixCache):
        raise refuse(
            type(given).__name__,
            "the past_key_values that kvkern.generate returned",
            "leave it out, or pass those of an earlier call with return_dict_in_generate=True",
        )
    if given.prefix is not prefix:
        raise refuse("those of another prefix", "those of this prefix", "pass the prefix they were made over")
    if given.beams:
        raise refuse(
            "those of a beam search", "those of greedy search or sampling", "leave it out: its rows are no sequence's"
        )
    if rows * copies != len(given.slots):
        raise refuse(
            f"{len(given.slots)} rows", f"{rows * copies}, one a row that is generated", "keep the batch together"
        )
    if backend not in (None, given.backend):
        raise refuse(f"those of the {given.backend} backend", f"those of {backend}", "leave backend out")
    return given


def _pad(config: GenerationConfig, model: Any) -> set[int]:
    """Tokens that may stand behind the end of an answer."""
    eos = config.eos_token_id
    ends = eos if isinstance(eos, Sequence) else [eos]
    return {i for i in (config.pad_token_id, model.generation_config.pad_token_id, *ends) if i is not None}


def _say_what_was_forgotten(known: list[list[int]], reused: list[int], pad: set[int]) -> None:
    """Warn where more than the padding behind an answer is computed again."""
    for row, (tokens, kept) in enumerate(zip(known, reused, strict=True)):
        if any(token not in pad for token in tokens[kept:]):
            warnings.warn(
                f"past_key_values: row {row} goes on from {kept} of the {len(tokens)} tokens that are cached, and the rest is "
                "computed again; a chat template may render earlier turns otherwise, as Qwen3's leaves out their <think>",
                stacklevel=3,
            )
            return


def _fed(sequences: Tensor, mask: Tensor, copies: int) -> list[list[int]]:
    """Token ids that each row's pages hold: all columns but the padding on the left."""
    pads = (mask.shape[1] - mask.sum(1)).repeat_interleave(copies).tolist()
    return [row[pad:] for row, pad in zip(sequences.tolist(), pads, strict=True)]


# -- the view of the model ---------------------------------------------------------------------------------------------


class _Whole:
    """Turns ids of suffixes into those of whole prompts: [padding, suffix, ...] -> [padding, document, suffix, ...]."""

    def __init__(self, document_ids: Tensor, mask: Tensor) -> None:
        self.document_ids = document_ids
        self.mask = mask
        self.pads = mask.shape[1] - mask.sum(1, keepdim=True)
        self.ragged = bool(self.pads.any())

    @property
    def tokens(self) -> int:
        return self.document_ids.numel()

    def __call__(self, ids: Tensor) -> Tensor:
        """[rows, columns] -> [rows, tokens of the document + columns]; rows may be several for each of the prompts'."""
        both = torch.cat([self.document_ids.expand(ids.shape[0], -1), ids], dim=1)
        if not self.ragged:
            return both
        pads = self.pads.repeat_interleave(ids.shape[0] // self.pads.shape[0], dim=0)
        column = torch.arange(both.shape[1], device=ids.device).expand(ids.shape[0], -1)
        # A row's padding lies behind the document; everything between moves right.
        source = torch.where(column < pads + self.tokens, column - pads, column)
        return both.gather(1, torch.where(column < pads, column + self.tokens, source))

    def without_document(self, ids: Tensor) -> Tensor:
        """The way back, for a batch of one."""
        pad = int(self.pads[0])
        return torch.cat([ids[:, :pad], ids[:, pad + self.tokens :]], dim=1)

    def config(self, config: GenerationConfig) -> GenerationConfig:
        """The config with lengths that count the document."""
        whole = copy.copy(config)
        whole.max_length = config.max_length + self.tokens
        return whole


class _ShownTheWhole(LogitsProcessor):
    """Processors that see document and suffix, as they would without a prefix."""

    def __init__(self, processors: LogitsProcessorList, whole: _Whole) -> None:
        self.processors, self.whole = processors, whole

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processors(self.whole(input_ids), scores)


class _Candidates:
    """A generator of candidate tokens that sees document and suffix."""

    requires_model_outputs = False

    def __init__(self, generator: Any, whole: _Whole) -> None:
        self.generator, self.whole = generator, whole

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        ids, logits = self.generator.get_candidates(self.whole(input_ids))
        return self.whole.without_document(ids), logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self.generator.update_candidate_strategy(self.whole(input_ids), scores, num_matches)


class _View:
    """What differs in a view of a model, ahead of the model's own class."""

    _kvkern_whole: _Whole

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        # transformers reads this signature, and looks for the name kwargs.
        # Assisted decoding begins with all columns, whatever the cache holds of them.
        if is_first_iteration and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - past_key_values.get_seq_length()
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, next_sequence_length, past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: int, encoder_input_ids: Tensor, **rest: Any
    ) -> LogitsProcessorList:
        whole = self._kvkern_whole
        processors = super()._get_logits_processor(  # type: ignore[misc]
            generation_config=whole.config(generation_config),
            input_ids_seq_length=input_ids_seq_length + whole.tokens,
            encoder_input_ids=whole(encoder_input_ids),
            **rest,
        )
        if all(isinstance(processor, BLIND) for processor in processors):
            return processors
        return LogitsProcessorList([_ShownTheWhole(processors, whole)])

    def _get_candidate_generator(
        self,
        generation_config: Any,
        input_ids: Tensor,
        inputs_tensor: Tensor,
        logits_processor: LogitsProcessorList,
        model_kwargs: dict[str, Any],
        **rest: Any,
    ) -> Any:
        whole = self._kvkern_whole
        shown = [p.processors if isinstance(p, _ShownTheWhole) else [p] for p in logits_processor]
        # Position ids and the cache are this model's; an assistant makes its own from the mask.
        own = {name: value for name, value in model_kwargs.items() if name not in ("position_ids", "past_key_values")}
        mask = model_kwargs["attention_mask"]
        own["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], whole.tokens))], dim=1)
        generator = super()._get_candidate_generator(  # type: ignore[misc]
            generation_config=whole.config(generation_config),
            input_ids=whole(input_ids),
            inputs_tensor=whole(inputs_tensor),
            logits_processor=LogitsProcessorList([p for processors in shown for p in processors]),
            model_kwargs=own,
            **rest,
        )
        return _Candidates(generator, whole)


@functools.cache
def _view_class(kind: type) -> type:
    return type(kind.__name__, (_View, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _view(model: Any, whole: _Whole) -> Any:
    """The model with the methods of `_View`; parameters, modules and configs are the model's own."""
    kind: Any = type(model)
    view: Any = object.__new__(_view_class(kind))
    object.__setattr__(view, "__dict__", {**vars(model), "_kvkern_whole": whole})
    return view
