"""From logits to tokens, and from tokens to text: each row by its own logits, parameters, seed and position alone.

Penalty, temperature, top-k and top-p are those of transformers' generate, in its order and with its rounding, so the same
tokens are kept. The draw is ours: the uniform number of (seed, position) through the inverse of the kept tokens'
distribution, in fp64. A sample depends neither on the batch nor on how many tokens others have drawn.

Sampled rows are drawn on the host, one by one; a greedy batch is one argmax where the logits lie.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from kvkern.errors import RequestError, ShapeError, UnsupportedError

# -- parameters --------------------------------------------------------------------------------------------------------

GENERATE_DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
"""What transformers' generate takes for a field that neither the caller nor the model has set."""

NEUTRAL: Mapping[str, Any] = {
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "target_lookbehind": 10,
    "typical_p": 1.0,
}
"""Values under which a field that we lack does nothing; so do None, False and an empty list."""

WITHOUT_EFFECT = frozenset(
    {"use_cache", "pad_token_id", "bos_token_id", "decoder_start_token_id", "compile_config", "disable_compile"}
    | {"prefill_chunk_size", "transformers_version", "_commit_hash", "_from_model_config", "_original_object_hash"}
)
"""Fields that no token of a decoder's answer depends on."""

SAMPLING_ONLY = frozenset({"min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"})
"""Fields that transformers reads only where do_sample is set."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request chooses its tokens, and when it stops. Names and meanings are those of GenerationConfig.

    max_new_tokens      tokens to generate at most, 0 or more
    do_sample           draw; greedy otherwise, and temperature, top_k, top_p and seed do nothing
    temperature         above 0; divides the logits
    top_k               keep the k most probable; all if None or 0
    top_p               keep the most probable that together reach this share, above 0, at most 1
    repetition_penalty  above 0; logits of tokens seen (document, question and answer) are divided or multiplied by it
    seed                0 to 2**64 - 1
    eos_token_ids       a token that ends the answer
    stop_strings        a text that ends the answer before it

    Raises RequestError that names the field.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, needed, holds in (
            ("max_new_tokens", "an integer of at least 0", _is_int(self.max_new_tokens, 0)),
            ("do_sample", "True or False", isinstance(self.do_sample, bool)),
            ("temperature", "a number above 0", _is_positive(self.temperature)),
            ("top_k", "an integer of at least 1; None or 0 for all", self.top_k is None or _is_int(self.top_k, 0)),
            ("top_p", "a number above 0, at most 1", _is_positive(self.top_p) and self.top_p <= 1),
            ("repetition_penalty", "a number above 0", _is_positive(self.repetition_penalty)),
            ("seed", "an integer from 0 to 2**64 - 1", _is_int(self.seed, 0) and self.seed < 1 << 64),
            ("eos_token_ids", "token ids", _are(self.eos_token_ids, lambda i: _is_int(i, 0))),
            ("stop_strings", "strings that are not empty", _are(self.stop_strings, lambda s: isinstance(s, str) and s)),
        ):
            if not holds:
                raise RequestError(name, found=repr(getattr(self, name)), needed=needed, do=f"give another {name}")
        object.__setattr__(self, "eos_token_ids", frozenset(self.eos_token_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))

    @property
    def is_plain(self) -> bool:
        """The token is the argmax of the logits as they are."""
        return not self.do_sample and self.repetition_penalty == 1

    @classmethod
    def from_generation_config(cls, config: Any = None, *, defaults: Any = None, **overrides: Any) -> Self:
        """The parameters that transformers' generate would use.

        config     a GenerationConfig, or None
        defaults   the model's own GenerationConfig, for what `config` leaves unset
        overrides  fields of SamplingParams or of GenerationConfig that come before both

        Raises UnsupportedError that names a field which is set to something that kvkern does not do, RequestError for a
        bad value or no max_new_tokens.
        """
        given = {**_set_fields(config), **{name: value for name, value in overrides.items() if value is not None}}
        merged = {**_set_fields(defaults), **given}
        if "max_length" not in given:
            merged.pop("max_length", None)  # A model's own limit counts its prompt; ours are positions and pages.
        if "max_new_tokens" not in merged:
            do = "give max_new_tokens: max_length would count the document"
            raise RequestError("max_new_tokens", found="none", needed="an integer of at least 0", do=do)
        merged.pop("max_length", None)  # As in generate, max_new_tokens comes first.

        values = dict(GENERATE_DEFAULTS)
        for f in fields(cls):
            if f.name in merged:
                values[f.name] = merged.pop(f.name)
        eos = merged.pop("eos_token_id", None)
        if "eos_token_ids" not in values and eos is not None:
            values["eos_token_ids"] = [eos] if isinstance(eos, int) else eos
        for name in ("eos_token_ids", "stop_strings"):
            if isinstance(values.get(name), (int, str)):
                values[name] = [values[name]]
        _refuse_rest(merged, do_sample=bool(values["do_sample"]))
        return cls(**values)


def _set_fields(config: Any) -> dict[str, Any]:
    return {} if config is None else {name: value for name, value in vars(config).items() if value is not None}


def _refuse_rest(rest: Mapping[str, Any], *, do_sample: bool) -> None:
    for name, value in rest.items():
        if name in WITHOUT_EFFECT or (name in SAMPLING_ONLY and not do_sample):
            continue
        empty = value is False or (isinstance(value, Collection) and not value)
        if not empty and not (name in NEUTRAL and value == NEUTRAL[name]):
            honoured = ", ".join(f.name for f in fields(SamplingParams))
            needed = f"{NEUTRAL[name]!r} or unset" if name in NEUTRAL else "unset"
            raise UnsupportedError(name, found=repr(value), needed=needed, do=f"leave it out; honoured are {honoured}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _are(values: Any, holds: Any) -> bool:
    return isinstance(values, Collection) and not isinstance(values, (str, bytes)) and all(map(holds, values))


# -- the random number -------------------------------------------------------------------------------------------------


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words of a counter of four and a key of two.

    Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) of a seed and a position, both below 2**64: a multiple of 2**-53."""
    low, high, _, _ = philox((position & 0xFFFFFFFF, position >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53


# -- the token ---------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    history: Sequence[Tensor | Iterable[int]] | None = None,
) -> list[int]:
    """One token for each row.

    logits     [rows, vocabulary], fp32, fp16 or bf16, on any device
    params     of each row
    positions  of each row: the counter of its random number, another one for each token of a request
    history    token ids that each row has seen, document, question and answer, int64 [tokens] or any iterable; read
               only where a row has a repetition penalty

    Raises ShapeError for lists of another length, RequestError for a sampled row that has no finite maximum.
    """
    rows = logits.shape[0]
    for name, given in (("params", params), ("positions", positions), ("history", history)):
        if given is not None and len(given) != rows:
            raise ShapeError(
                name, found=f"{len(given)} entries", needed=f"{rows}, one a row of logits", do="give one for each row"
            )
    if all(p.is_plain for p in params):
        return _argmax(logits)

    plain = [i for i, p in enumerate(params) if p.is_plain]
    rest = [i for i, p in enumerate(params) if not p.is_plain]
    tokens = dict(zip(plain, _argmax(logits[plain]), strict=True)) if plain else {}
    # In fp32, as in generate. The index copies, so the caller's logits stay as they are.
    for i, scores in zip(rest, logits[rest].float().cpu(), strict=True):
        p = params[i]
        if p.repetition_penalty != 1:
            if history is None:
                raise RequestError(
                    "history",
                    found="none",
                    needed="the ids each row has seen",
                    do="pass history with a repetition penalty",
                )
            penalise(scores, history[i], p.repetition_penalty)
        tokens[i] = draw(keep(scores, p), uniform(p.seed, positions[i])) if p.do_sample else int(scores.argmax())
    return [tokens[i] for i in range(rows)]


def _argmax(logits: Tensor) -> list[int]:
    if logits.is_cpu:
        logits = logits.float()  # Exact, and with the search in half the time that torch takes in 16 bits.
    tokens: list[int] = logits.argmax(-1).tolist()  # The first of equal maxima.
    return tokens


def penalise(scores: Tensor, seen: Tensor | Iterable[int], penalty: float) -> None:
    """Make the tokens seen less probable, in place; scores fp32 [vocabulary] on the CPU.

    Source: Keskar et al. 2019, arXiv 1909.05858; like transformers' RepetitionPenaltyLogitsProcessor, negative scores
    are multiplied.
    """
    ids = seen.to("cpu", torch.int64) if isinstance(seen, Tensor) else torch.tensor(list(seen), dtype=torch.int64)
    score = scores[ids]
    scores[ids] = torch.where(score < 0, score * penalty, score / penalty)


def keep(scores: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top-k, then top-p: scores fp32 [vocabulary] on the CPU, with -inf where a token is out.

    Tokens equal to the k-th stay in. Of tokens equal to the last one that top-p keeps, those with the highest ids stay.
    Raises RequestError if the maximum is not finite.
    """
    if not scores.max().isfinite():
        raise RequestError(
            "logits",
            found=f"a maximum of {scores.max().item()}",
            needed="a finite one",
            do="look for NaN in the model's weights",
        )
    if params.temperature != 1:
        scores = scores / params.temperature
    if params.top_k:
        least = torch.topk(scores, min(params.top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < least, -math.inf)
    return _keep_top_p(scores, params.top_p) if params.top_p < 1 else scores


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    # Values alone are sorted: numpy does that 20 times as fast as a sort that brings the indices.
    ordered = torch.from_numpy(np.sort(scores.numpy()))
    # fp32 over the whole vocabulary, as transformers' TopPLogitsWarper, so that a sum at the bound falls on the same side.
    out = int((ordered.softmax(-1).cumsum(-1) <= 1 - top_p).sum())
    out = min(out, scores.numel() - 1)
    least = ordered[out]
    equal = (scores == least).nonzero().flatten()
    above = int((scores > least).sum())
    kept = scores.numel() - out - above
    scores = scores.masked_fill(scores < least, -math.inf)
    scores[equal[: equal.numel() - kept]] = -math.inf
    return scores


def draw(scores: Tensor, u: float) -> int:
    """The token at u in [0, 1) of the kept tokens' distribution, in the order of their ids; scores fp32 on the CPU."""
    values = scores.numpy()
    ids = np.flatnonzero(values > -math.inf)
    kept = values[ids].astype(np.float64)
    bounds = np.cumsum(np.exp(kept - kept.max()))
    # u * total may round up to the total, which no token's share holds.
    target = min(u * bounds[-1], np.nextafter(bounds[-1], 0.0))
    return int(ids[np.searchsorted(bounds, target, side="right")])


# -- the text ----------------------------------------------------------------------------------------------------------


class TextStream:
    """The text of one answer, token by token, cut before the first stop string.

    tokenizer     a fast tokenizer of transformers
    stop_strings  texts that end the answer, wherever tokens divide them; of several, the one that is whole first

    What `push` and `finish` return, put together, is the tokenizer's decoding of the tokens without special ones, or the
    text before the stop string. Until `finish` no part of a character is given out, nor text that may yet become part of a
    stop string.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop_strings = tuple(stop_strings)
        self._ids: list[int] = []
        # Only tokens from `_begin` on are decoded: the run that was given out last, and what came after it, which starts
        # at `_next`. The run before is needed, since a decoder may do at the start of a text (strip a space) what it does
        # nowhere else. `_known` characters of that window were taken.
        self._begin = self._next = self._known = 0
        self._held = ""
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """A stop string was found."""

    def push(self, token_id: int) -> str:
        """Text that this token makes certain, often none. Nothing after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        text = self._decode()
        # A decoder writes U+FFFD for a character whose last bytes are still to come.
        certain = text.rstrip("\ufffd")
        new = certain[self._known :]
        if not new:
            return ""
        self._known = len(certain)
        if certain == text:
            self._begin, self._next = self._next, len(self._ids)
            self._known = len(self._decode())
        return self._give(new, last=False)

    def finish(self) -> str:
        """The rest; a character that stayed incomplete is U+FFFD, as in the tokenizer's decoding."""
        if self.stopped:
            return ""
        new = self._decode()[self._known :]
        self._known += len(new)
        return self._give(new, last=True)

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids[self._begin :], skip_special_tokens=True)
        return text

    def _give(self, new: str, *, last: bool) -> str:
        before = len(self._held)
        text = self._held + new
        cut = self._find_stop(text, before)
        if cut is not None:
            self.stopped = True
            self._held, given = "", text[:cut]
        else:
            end = len(text) if last else len(text) - self._undecided(text)
            self._held, given = text[end:], text[:end]
        self.text += given
        return given

    def _find_stop(self, text: str, before: int) -> int | None:
        """Where the stop string begins that ends first, the longest of those; none ends within the first `before`."""
        found = []
        for stop in self._stop_strings:
            at = text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at))
        return min(found)[1] if found else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop_strings):
                return n
        return 0
