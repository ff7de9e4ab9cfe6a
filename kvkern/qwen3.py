"""What transformers is given: the attention function, its mask function, and the caches that carry a step into a layer.

A stock model of transformers calls `attention(module, query, key, value, mask, ...)` after QK-norm, RoPE and the cache's
`update`. The caches here keep nothing of their own: `update` hangs itself on the key tensor, and the attention function finds
it there. So neither weights nor classes of the model are touched. Without one of these caches the function is transformers'
own sdpa attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvkern.attention import shared_prefix_attention
from kvkern.errors import DeviceError, RequestError, ShapeError, UnsupportedError
from kvkern.geometry import PAGE, Geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

NAME = "kvkern"
"""The value of attn_implementation."""

LACKING = ("sliding_window", "softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Keywords of transformers' attention functions whose meaning the kernels lack."""


class _Carrier(Protocol):
    """A cache of this module, as the attention function finds it on the key tensor."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None) -> Tensor:
        """q [B, num_qo_heads, S, head_dim], k and v [B, num_kv_heads, S, head_dim] -> o [B, S, num_qo_heads, head_dim]."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; shapes as in `_Carrier`. Returns ([B, S, num_qo_heads, head_dim], None).

    Raises UnsupportedError for a keyword with a meaning that neither the kernels nor sdpa have, and for dropout over a prefix.
    """
    for name in LACKING:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"attention.{name}",
                found=_seen(kwargs[name]),
                needed="None",
                do="use a model with plain causal attention",
            )
    carried: tuple[_Carrier, int] | None = getattr(key, "_kvkern", None)
    if carried is None:
        o, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return o, None
    if dropout:
        raise UnsupportedError("attention.dropout", found=dropout, needed="0.0 over a prefix", do="call model.eval()")
    cache, layer = carried
    return cache.attend(layer, query, key, value, scaling), None


def _seen(value: object) -> object:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else value


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' sdpa mask: the ordinary path needs it, and the caches here know their rows without one."""
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


# -- the model ---------------------------------------------------------------------------------------------------------


def check_model(model: Any) -> torch.device:
    """The one device of a model that the kernels can serve.

    Raises UnsupportedError naming what the model has that they lack, or DeviceError for a model on several devices.
    """
    config = model.config
    found = config._attn_implementation
    if found != NAME:
        raise UnsupportedError(
            "attn_implementation",
            found=repr(found),
            needed=repr(NAME),
            do="load the model with attn_implementation='kvkern', or call model.set_attn_implementation('kvkern')",
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    ):
        raise UnsupportedError(
            "model.layer_types",
            found=f"{sorted(kinds)}, sliding_window={getattr(config, 'sliding_window', None)}",
            needed="full attention in every layer",
            do="use a model without sliding windows",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            "model", found="an encoder-decoder", needed="a decoder-only model", do="use a causal language model"
        )
    for name in ("attn_logit_softcapping", "alibi"):
        if getattr(config, name, None):
            raise UnsupportedError(
                f"model.{name}",
                found=getattr(config, name),
                needed="none",
                do="use a model with plain causal attention",
            )
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or "meta" in {d.type for d in devices}:
        raise DeviceError(
            "model.device",
            found=", ".join(sorted(map(str, devices))),
            needed="one device with the weights on it",
            do="load the model onto one device",
        )
    if model.training:
        raise UnsupportedError("model.training", found="True", needed="False", do="call model.eval()")
    return devices.pop()


def max_positions(model: Any) -> int:
    """Positions that the model was made for."""
    return int(model.config.max_position_embeddings)


# -- caches ------------------------------------------------------------------------------------------------------------


class _CarrierLayer(CacheLayerMixin):
    """A layer that stores nothing: it hands its cache to the attention function on the key tensor."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: CarrierCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_states._kvkern = (self.cache, self.index)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.cache.seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seq_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class CarrierCache(Cache):
    """Base of the caches here: one layer object per layer, and the suffix's length as transformers counts it."""

    def __init__(self, layers: int) -> None:
        self.seq_length = 0
        super().__init__(layers=[_CarrierLayer(self, index) for index in range(layers)])


class StepCache(CarrierCache):
    """One packed step [1, T] of an engine: the rows of a begun plan, in its order."""

    def __init__(self, plan: Plan, *, backend: str | None = None) -> None:
        super().__init__(plan.pool.geometry.layers)
        self.plan, self.backend = plan, backend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None) -> Tensor:
        q_rows, k_rows, v_rows = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
        o = shared_prefix_attention(
            q_rows, k_rows, v_rows, self.plan, self.plan.pool, layer=layer, sm_scale=sm_scale, backend=self.backend
        )
        return o[None]


class PrefillCache(CarrierCache):
    """A document that is being read: keys and values go to the prefix's block, attention is torch's own over all of it.

    Feed chunks in order through `model(chunk, position_ids=..., past_key_values=cache)` and call `advance` after each.
    """

    def __init__(self, prefix: SharedPrefix) -> None:
        super().__init__(prefix.geometry.layers)
        self.prefix = prefix
        self.filled = 0

    def advance(self, tokens: int) -> None:
        self.filled += tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None) -> Tensor:
        block = self.prefix.block()[layer]
        tokens = q.shape[2]
        begin, end = self.filled, self.filled + tokens
        block[0, :, begin:end] = k[0]
        block[1, :, begin:end] = v[0]
        above = [node.block()[layer, :, :, : node.tokens] for node in self.prefix.path()[:-1]]
        seen = torch.cat([*above, block[:, :, :end]], dim=2)
        keys, values = seen.repeat_interleave(q.shape[1] // k.shape[1], dim=1).unsqueeze(1)
        visible = None
        if seen.shape[2] > tokens:
            visible = torch.ones(tokens, seen.shape[2], dtype=torch.bool, device=q.device).tril(seen.shape[2] - tokens)
        o = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible, is_causal=visible is None, scale=sm_scale
        )
        return o.transpose(1, 2)


class SuffixCache(CarrierCache):
    """The suffixes of a left-padded batch below one prefix, for transformers' own generate.

    prefix      the leaf of every row's path
    lengths     suffix tokens of each row of the first forward; what lies left of them is padding
    capacity    tokens that a suffix may come to, question and answer

    The length it reports is that of the padded suffix, so position_ids must be given: prefix.end + index in the suffix.
    """

    def __init__(
        self,
        prefix: SharedPrefix,
        geometry: Geometry,
        lengths: Sequence[int],
        *,
        capacity: int,
        backend: str | None = None,
    ) -> None:
        super().__init__(geometry.layers)
        pages = -(-capacity // PAGE)
        self.prefix, self.backend = prefix, backend
        self.pool = PagePool(
            geometry, pages * len(lengths), slots=len(lengths), max_pages_per_slot=pages, device=prefix.device
        )
        self.slots = [self.pool.acquire_slot() for _ in lengths]
        self._first = list(lengths)
        self._plan: Plan | None = None
        self._rows: Tensor | None = None

    def _begin(self, batch: int, tokens: int) -> None:
        """A plan for this forward: the rows that are no padding, each agent's last `count` columns."""
        if batch != len(self.slots):
            raise ShapeError(
                "input_ids",
                found=f"a batch of {batch}",
                needed=f"{len(self.slots)} as in the first forward",
                do="keep the batch together",
            )
        counts = [min(n, tokens) for n in self._first] if self.seq_length == 0 else [tokens] * batch
        for slot, count in zip(self.slots, counts, strict=True):
            self.pool.reserve(slot, count)
        if self._plan is None or [agent.rows for agent in self._plan.agents] != counts:
            agents = [AgentRows(slot, self.prefix, count) for slot, count in zip(self.slots, counts, strict=True)]
            self._plan = Plan.make(self.pool, agents)
            rows = [b * tokens + t for b, n in enumerate(counts) for t in range(tokens - n, tokens)]
            self._rows = torch.tensor(rows, device=self.pool.device)
        self._plan.begin()
        self.seq_length += tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None) -> Tensor:
        batch, heads, tokens, head_dim = q.shape
        if layer == 0:
            self._begin(batch, tokens)
        assert self._plan is not None and self._rows is not None
        q_rows, k_rows, v_rows = (tensor.transpose(1, 2).flatten(0, 1)[self._rows] for tensor in (q, k, v))
        o = shared_prefix_attention(
            q_rows, k_rows, v_rows, self._plan, self.pool, layer=layer, sm_scale=sm_scale, backend=self.backend
        )
        out = q.new_zeros((batch * tokens, heads, head_dim))
        out[self._rows] = o
        return out.view(batch, tokens, heads, head_dim)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise RequestError(
            "num_beams", found="beams over a prefix", needed="num_beams=1", do="use greedy search or sampling"
        )
