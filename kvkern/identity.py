"""Identity: the explicit list of what changes a prefix's KV, compared before a byte of it is used.

A prefix serves only the model, tokenizer and template that it was made with. What they are is written down field by field
(`Identity`), as numbers where a reader can judge them and as SHA-256 digests where not. Fields stand in order of the cost of
finding them out: a wrong RoPE base is refused before gigabytes of weights are hashed.

Not in it, because the KV does not depend on it or only by rounding: the model's path, versions of transformers and torch,
the backend, the prefill chunk (all of these are provenance), padding and truncation settings of the tokenizer.

What the config says of the model is taken by name: geometry, RoPE, and the few numbers in `ARCHITECTURE` that no weight
shows. Everything here is duck-typed, so nothing is imported of transformers or tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from kvkern import cpu
from kvkern.errors import IdentityError, KvkernError, RequestError, UnsupportedError
from kvkern.geometry import Geometry

FORMAT = 1
"""Version of the list of fields and of the plain file around it."""

LAYOUT = 1
"""Version of the block: [layers, 2, num_kv_heads, tokens padded to 128, head_dim], cut by geometry.segment_tokens."""

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "num_experts_per_tok",
    "norm_topk_prob",
)
"""Entries of a config that change the KV and that neither the weights nor the geometry show; those that are set count."""

SAMPLES = 64
"""Elements a tensor that are looked at before a remembered weights digest is used again."""

COPY_BYTES = 32 << 20
"""Bytes that are hashed or summed at a time of a tensor on another device: a copy of no more is made there or here."""


class Above(Protocol):
    """What is asked of a parent: a published SharedPrefix."""

    @property
    def end(self) -> int: ...

    identity: Any


# -- the fields --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """All that changes a prefix's KV. Never changed after it is made, nor are the mappings in it.

    format           FORMAT
    layout           LAYOUT
    geometry         layers, heads, head_dim and dtype of K and V
    architecture     entries of the config named in ARCHITECTURE
    rope             theta, type, partial, the dtype of the frequencies, and every parameter of the scaling
    position         position of the first token: 0, or where the parent ends
    ancestors        digest of the parent's identity, which holds its own ancestors'; None for a root
    tokens           how many tokens the node has
    token_ids        digest of the node's own token ids as int64, little-endian
    tokenizer        digest of vocabulary, merges, added tokens, normaliser, pre-tokeniser and post-processor; None where
                     the document was given as token ids and there is none
    template         digest of the chat template's text; None where the document is no conversation
    template_kwargs  keywords the template was given, as JSON values
    weights          digest of names, dtypes, shapes and values of the state dict, and of the active adapters
    """

    format: int
    layout: int
    geometry: Geometry
    architecture: Mapping[str, Any]
    rope: Mapping[str, Any]
    position: int
    ancestors: str | None
    tokens: int
    token_ids: str
    tokenizer: str | None
    template: str | None
    template_kwargs: Mapping[str, Any]
    weights: str

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        token_ids: Tensor | Sequence[int],
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        parent: Above | None = None,
    ) -> Self:
        """The identity of what this model is about to make of these tokens.

        template         text of the chat template; None for a plain text
        template_kwargs  keywords it was given, JSON values
        parent           the published prefix that is continued

        Raises RequestError (a keyword that is no JSON value, a parent without identity), UnsupportedError (a tokenizer
        without a tokenizers backend, weights that are not in memory).
        """
        count, digest = len(token_ids), tokens_digest(token_ids)
        kwargs = _json_values("template_kwargs", template_kwargs or {})
        stages = _stages(model, tokenizer, count, digest, _text_digest(template), kwargs, parent)
        return cls(**{name: value() for name, value in stages.items()})

    @classmethod
    def expect(
        cls,
        model: Any,
        tokenizer: Any,
        found: Identity,
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        parent: Above | None = None,
    ) -> Self:
        """The identity that a prefix of `found`'s tokens has if this model and tokenizer make it.

        template and template_kwargs, where given, take the place of the tokenizer's template and the recorded keywords.
        """
        stages = _expected(model, tokenizer, found, template, template_kwargs, parent)
        return cls(**{name: value() for name, value in stages.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["geometry"] = _geometry_dict(self.geometry)
        for name in ("architecture", "rope", "template_kwargs"):
            plain[name] = dict(plain[name])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Raises IdentityError that names the field which is missing, unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        for name in [*names, *plain]:
            if name not in plain or name not in names:
                raise IdentityError(
                    name,
                    found="nothing" if name not in plain else "a field",
                    needed="a field" if name not in plain else "no such field",
                    do="publish the document again",
                )
            kinds = _KINDS[name]
            # bool is an int to Python, and no number of anything here.
            if not isinstance(plain[name], kinds) or isinstance(plain[name], bool):
                needed = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
                raise IdentityError(
                    name, found=type(plain[name]).__name__, needed=needed, do="publish the document again"
                )
        return cls(**{**plain, "geometry": _geometry(plain["geometry"])})

    def to_json(self) -> str:
        """Canonical: the same identity is the same text."""
        return canonical(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises IdentityError for what to_json cannot have written."""
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            plain = None
        if not isinstance(plain, dict):
            raise IdentityError(
                "identity", found="no JSON object", needed="what to_json wrote", do="publish the document again"
            )
        return cls.from_dict(plain)

    def digest(self) -> str:
        """SHA-256 of the whole: what a child keeps of its path."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


_KINDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "layout": (int,),
    "geometry": (dict,),
    "architecture": (dict,),
    "rope": (dict,),
    "position": (int,),
    "ancestors": (str, type(None)),
    "tokens": (int,),
    "token_ids": (str,),
    "tokenizer": (str, type(None)),
    "template": (str, type(None)),
    "template_kwargs": (dict,),
    "weights": (str,),
}

_DIGESTS = ("ancestors", "token_ids", "tokenizer", "template", "weights")

_AGAIN = "publish the document again with this model"
_WHOSE: dict[str, tuple[str, str]] = {
    "format": (" as this kvkern writes", "publish the document again with this kvkern"),
    "layout": (" as this kvkern writes", "publish the document again with this kvkern"),
    "geometry": (" as in the model", _AGAIN),
    "architecture": (" as in the model", _AGAIN),
    "rope": (" as in the model", _AGAIN),
    "position": (" as the parent given ends", "load it below the parent that it was made for"),
    "ancestors": (" as of the parent given", "load it below the parent that it was made for"),
    "tokens": (" as asked for", "publish the document again"),
    "token_ids": (" as asked for", "publish the document again"),
    "tokenizer": (" as of the tokenizer", "give the tokenizer it was made with, or publish the document again"),
    "template": (" as of the tokenizer", "give the chat template it was made with, or publish the document again"),
    "template_kwargs": (" as asked for", "give the keywords it was made with, or publish the document again"),
    "weights": (" as in the model", "load the weights it was made with, or publish the document again"),
}
"""Whose value is needed, and what to do where it differs."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; ASCII only. Raises ValueError for what is not JSON, NaN among it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# -- comparison --------------------------------------------------------------------------------------------------------


def compare(found: Identity, needed: Identity, *, where: str) -> None:
    """Raises IdentityError that names the first field which differs, with both values; `where` says whose `found` is."""
    for field in fields(Identity):
        _compare_field(field.name, getattr(found, field.name), getattr(needed, field.name), where)


def match(
    found: Identity,
    model: Any,
    tokenizer: Any,
    *,
    where: str,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    parent: Above | None = None,
) -> None:
    """`compare` with what `Identity.expect` gives, one field at a time: weights are hashed only when all else agrees."""
    for name, value in _expected(model, tokenizer, found, template, template_kwargs, parent).items():
        _compare_field(name, getattr(found, name), value(), where)


def _compare_field(name: str, found: Any, needed: Any, where: str) -> None:
    if isinstance(found, Geometry):
        found, needed = _geometry_dict(found), _geometry_dict(needed)
    if isinstance(found, Mapping):
        for key in sorted({*found, *needed}):
            if found.get(key) != needed.get(key):
                _refuse(name, f"{name}.{key}", found.get(key), needed.get(key), where)
    elif found != needed:
        _refuse(name, name, found, needed, where)


def _refuse(name: str, field: str, found: Any, needed: Any, where: str) -> None:
    whose, do = _WHOSE[name]
    if name in _DIGESTS:
        found, needed = short(found), short(needed)
    found, needed = ("none" if value is None else value for value in (found, needed))
    raise IdentityError(field, found=f"{found} in {where}", needed=f"{needed}{whose}", do=do)


def short(digest: str | None) -> str:
    """A digest for a reader's eyes: 9c1f..e07a."""
    return "none" if digest is None else f"{digest[:4]}..{digest[-4:]}"


Stages = dict[str, Callable[[], Any]]


def _expected(
    model: Any,
    tokenizer: Any,
    found: Identity,
    template: str | None,
    template_kwargs: Mapping[str, Any] | None,
    parent: Above | None,
) -> Stages:
    if template is None and found.template is not None:
        template = chat_template(tokenizer)
    kwargs = found.template_kwargs if template_kwargs is None else _json_values("template_kwargs", template_kwargs)
    return _stages(model, tokenizer, found.tokens, found.token_ids, _text_digest(template), kwargs, parent)


def _stages(
    model: Any,
    tokenizer: Any,
    tokens: int,
    token_ids: str,
    template: str | None,
    template_kwargs: Mapping[str, Any],
    parent: Above | None,
) -> Stages:
    """Every field and how to find it out, in the order of Identity."""
    return {
        "format": lambda: FORMAT,
        "layout": lambda: LAYOUT,
        "geometry": lambda: model_geometry(model),
        "architecture": lambda: architecture_fields(model.config),
        "rope": lambda: {**rope_fields(model.config), **_frequencies(model)},
        "position": lambda: 0 if parent is None else parent.end,
        "ancestors": lambda: ancestors_digest(parent),
        "tokens": lambda: tokens,
        "token_ids": lambda: token_ids,
        "tokenizer": lambda: None if tokenizer is None else tokenizer_digest(tokenizer),
        "template": lambda: template,
        "template_kwargs": lambda: template_kwargs,
        "weights": lambda: weights_digest(model, every_byte=True),
    }


# -- the model's config ------------------------------------------------------------------------------------------------


def _text_config(config: Any) -> Any:
    # A model that also sees images keeps the language model's numbers one level down.
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def model_geometry(model: Any) -> Geometry:
    """Layers, heads and head_dim of the config, and the dtype that the attention's own weights have."""
    config = _text_config(model.config)
    heads = config.num_attention_heads
    return Geometry(
        layers=config.num_hidden_layers,
        num_qo_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=_kv_dtype(model),
    )


_KEY_WEIGHTS = ("k_proj.weight", "qkv_proj.weight", "k_proj.base_layer.weight")


def _kv_dtype(model: Any) -> torch.dtype:
    for name, parameter in model.named_parameters():
        if name.endswith(_KEY_WEIGHTS) and parameter.is_floating_point():
            return parameter.dtype
    # Quantised weights are of no floating dtype; what they are multiplied with is.
    return model.dtype


def _geometry_dict(geometry: Geometry) -> dict[str, Any]:
    plain = {field.name: getattr(geometry, field.name) for field in fields(geometry)}
    return {**plain, "dtype": str(geometry.dtype).removeprefix("torch.")}


def _geometry(plain: Mapping[str, Any]) -> Geometry:
    again = "publish the document again"
    names = {field.name for field in fields(Geometry)}
    if set(plain) != names:
        raise IdentityError("geometry", found=sorted(plain), needed=sorted(names), do=again)
    dtype = getattr(torch, plain["dtype"], None) if isinstance(plain["dtype"], str) else None
    if not isinstance(dtype, torch.dtype):
        raise IdentityError("geometry.dtype", found=plain["dtype"], needed="the name of a torch dtype", do=again)
    try:
        return Geometry(**{**plain, "dtype": dtype})
    except KvkernError as error:
        raise IdentityError(error.field, found=error.found, needed=error.needed, do=again) from None


def architecture_fields(config: Any) -> dict[str, Any]:
    """The entries of ARCHITECTURE that the config sets."""
    config = _text_config(config)
    values = {name: getattr(config, name, None) for name in ARCHITECTURE}
    return {name: value for name, value in values.items() if value is not None}


def rope_fields(config: Any) -> dict[str, Any]:
    """RoPE parameters in one form: theta, type, partial, and each further parameter of the scaling under its own name.

    Numbers are floats, parameters that are not set are left out. Where layers have parameters of their own, names begin
    with the kind of layer: full_attention.theta.
    """
    config = _text_config(config)
    given = getattr(config, "rope_parameters", None) or {
        **(getattr(config, "rope_scaling", None) or {}),
        "rope_theta": getattr(config, "rope_theta", None),
        "partial_rotary_factor": getattr(config, "partial_rotary_factor", None),
    }
    kinds = {kind: value for kind, value in given.items() if isinstance(value, Mapping)}
    if kinds:
        return {f"{kind}.{name}": value for kind in sorted(kinds) for name, value in _rope(kinds[kind]).items()}
    return _rope(given)


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"rope_theta": "theta", "partial_rotary_factor": "partial", "rope_type": "type"}
    found: dict[str, Any] = {"type": given.get("type"), "partial": 1.0}
    for name, value in given.items():
        if value is not None:
            found[renamed.get(name, name)] = _as_floats(value)
    found["type"] = given.get("rope_type") or given.get("type") or "default"
    return found


def _as_floats(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, list, tuple)):
        return value
    return float(value) if isinstance(value, (int, float)) else [_as_floats(entry) for entry in value]


def _frequencies(model: Any) -> dict[str, Any]:
    # model.to(bfloat16) rounds the frequencies too, from_pretrained(dtype=...) does not: other keys from the same weights.
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "inv_freq":
            return {"dtype": str(buffer.dtype).removeprefix("torch.")}
    return {}


# -- tokens, tokenizer, template ---------------------------------------------------------------------------------------


def tokens_digest(token_ids: Tensor | Sequence[int]) -> str:
    """SHA-256 of the ids as int64, little-endian."""
    ids = torch.as_tensor(token_ids).detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(tensor_bytes(ids)).hexdigest()


def ancestors_digest(parent: Above | None) -> str | None:
    """What a child keeps of its path: the digest of its parent's identity. Raises RequestError for one without."""
    if parent is None:
        return None
    if not isinstance(parent.identity, Identity):
        raise RequestError(
            "parent.identity",
            found=type(parent.identity).__name__,
            needed="an Identity",
            do="publish the parent with kvkern.publish",
        )
    return parent.identity.digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that decides which ids a text becomes; never of padding or truncation, which a mere call changes.

    Raises UnsupportedError for a tokenizer without a tokenizers backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise UnsupportedError(
            "tokenizer",
            found=f"{type(tokenizer).__name__} without a tokenizers backend",
            needed="a fast tokenizer",
            do="load it with AutoTokenizer.from_pretrained, which converts it",
        )
    return _tokenizer_digest(backend.to_str())


@functools.lru_cache(maxsize=2)
def _tokenizer_digest(text: str) -> str:
    """Kept by the whole text: a document's load asks for the same tokenizer's again and again, and most of the time is JSON's."""
    whole = json.loads(text)
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    return hashlib.sha256(canonical({name: whole.get(name) for name in parts}).encode()).hexdigest()


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template, the default one where it has several; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


def _text_digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _json_values(field: str, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        try:
            found[name] = json.loads(canonical(value))
        except (TypeError, ValueError):
            raise RequestError(
                f"{field}.{name}",
                found=type(value).__name__,
                needed="text, a number, true, false, or lists and objects of them",
                do="give a value that a file can keep",
            ) from None
    return found


# -- weights -----------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """What a look at a model's weights shows, without reading all of them."""

    tensors: tuple[tuple[str, int, int, int], ...]
    adapters: str
    samples: str


class _Known(NamedTuple):
    """A digest, and the weights as they were then. A tensor that is gone may have left its address to another."""

    seen: _Seen
    sums: tuple[tuple[int, bytes], ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    digest: str

    def holds(self, seen: _Seen | None) -> bool:
        return self.seen == seen and all(ref() is not None for ref in self.tensors)


class WeightsDigest:
    """SHA-256 over names, dtypes, shapes and values of a model's state dict, and over its active adapters.

    A model's digest is remembered for as long as the model lives, and used again while no tensor's identity, address or
    version counter has moved. What torch does in place, `load_state_dict`, an optimizer or a new parameter moves one of
    them. A write through `.data`, a numpy view, DLPack or a pointer moves none; against those

    every_byte  compares a 64-bit sum of every tensor (csrc/blocksum.h, as fast as memory is read), which any changed word
                changes: what `Identity.of` and `match` ask for, so no document is made or loaded under a digest that is
                not that of the weights
    otherwise   up to 64 elements of each tensor are looked at, so that a question can be checked: an edit of whole tensors
                or rows behind torch's back is seen, one of a few elements stays unseen until the next publish or load

    Tied weights are hashed once. Raises UnsupportedError for weights that are not in memory (meta, offloaded).
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()

    def __call__(self, model: Any, *, every_byte: bool = False) -> str:
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module and renames its weights
        tensors = dict(_weights(model))
        seen = _look(tensors, _adapters(model))
        before = self._known.get(model)
        if before is not None and before.holds(seen) and (not every_byte or before.sums == _sums(tensors)):
            return before.digest

        digest = _hash(tensors, _adapters(model))
        if seen is not None:
            references = tuple(weakref.ref(tensor) for tensor in tensors.values())
            self._known[model] = _Known(seen, _sums(tensors), references, digest)
        return digest


weights_digest = WeightsDigest()


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise UnsupportedError(
                f"weights.{name}",
                found="on the meta device" if isinstance(tensor, Tensor) else type(tensor).__name__,
                needed="a tensor in memory",
                do="load the model whole on one device, without offloading",
            )
        yield name, tensor


def _adapters(model: Any) -> str:
    """Which adapters are at work, and how strongly, as JSON; their weights are in the state dict."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters") and hasattr(module, "scaling"):
            found[name] = {
                "active": list(module.active_adapters),
                "disabled": bool(module.disable_adapters),
                "merged": list(module.merged_adapters),
                "scaling": {adapter: float(factor) for adapter, factor in module.scaling.items()},
            }
    return canonical(found)


def _look(tensors: Mapping[str, Tensor], adapters: str) -> _Seen | None:
    """None where nothing can be remembered: an inference tensor counts no versions."""
    if any(tensor.is_inference() for tensor in tensors.values()):
        return None
    states = tuple((n, id(t), t.data_ptr(), t._version) for n, t in tensors.items())
    samples = hashlib.sha256()
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.numel() and tensor.is_contiguous():
            flat = tensor.detach().view(-1)
            few = flat[:: max(1, -(-flat.numel() // SAMPLES))].contiguous()
            by_device.setdefault(tensor.device, []).append(few.view(torch.uint8))
    for few_of in by_device.values():
        samples.update(tensor_bytes(torch.cat(few_of).cpu()))  # one copy a device
    return _Seen(states, adapters, samples.hexdigest())


def _hash(tensors: Mapping[str, Tensor], adapters: str) -> str:
    digests = _of_each(_tensor_digest, tensors)
    lines = [[name, str(t.dtype), list(t.shape), digests[_place(t)]] for name, t in sorted(tensors.items())]
    return hashlib.sha256(canonical([lines, adapters]).encode()).hexdigest()


def _sums(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, bytes], ...]:
    return tuple(_of_each(_tensor_sum, tensors).values())


def _of_each(read: Callable[[Tensor], Any], tensors: Mapping[str, Tensor]) -> dict[tuple[Any, ...], Any]:
    """What `read` makes of every tensor, by its place in memory, tied ones once; several at a time."""
    distinct = {_place(tensor): tensor for tensor in tensors.values()}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(distinct, pool.map(read, distinct.values()), strict=True))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the values in order."""
    hasher = hashlib.sha256()
    for part in _parts(tensor):
        hasher.update(tensor_bytes(part.cpu()))
    return hasher.hexdigest()


def _tensor_sum(tensor: Tensor) -> tuple[int, bytes]:
    """The 64-bit sum of the values' words, computed where they lie, and the bytes of the last word that is not whole."""
    flat = _bytes_of(tensor)
    whole = flat.numel() // cpu.WORD * cpu.WORD
    step = _part_bytes(flat)
    parts = [(flat[i : min(i + step, whole)], i // cpu.WORD) for i in range(0, whole, step)]
    return sum(cpu.block_sums(parts)) % (1 << 64), bytes(tensor_bytes(flat[whole:].cpu()))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of the values in order, so many at a time."""
    flat = _bytes_of(tensor)
    yield from flat.split(_part_bytes(flat))


def _part_bytes(flat: Tensor) -> int:
    """All at once on the CPU; elsewhere fewer, for a sum there, or a copy, takes as much memory again."""
    return max(flat.numel(), cpu.WORD) if flat.device.type == "cpu" else COPY_BYTES


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of the values in order, where they lie if they lie so; on another device than the CPU aligned to words."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    aligned = flat.device.type == "cpu" or flat.storage_offset() % cpu.WORD == 0
    return flat if aligned else flat.clone()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not a copy."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)
