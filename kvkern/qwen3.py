"""What transformers is given: the attention function, its mask function, and the caches that carry a step into a layer.

A stock model of transformers calls `attention(module, query, key, value, mask, ...)` after QK-norm, RoPE and the cache's
`update`. The caches here keep nothing of their own: `update` hangs itself on the key tensor, and the attention function finds
it there. So neither weights nor classes of the model are touched. Without one of these caches the function is transformers'
own sdpa attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from kvkern.attention import fused_attention, shared_prefix_attention
from kvkern.backends import choose
from kvkern.errors import CapacityError, DeviceError, ShapeError, UnsupportedError
from kvkern.geometry import PAGE, Geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix
from kvkern.rows import rms_norm, silu_mul

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
            do="load the model with attn_implementation='kvkern', or call model.set_attn_implementation('kvkern'); a model that "
            "keeps its own all the same takes no attention from outside, and cannot be served",
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    ):
        raise UnsupportedError(
            "model.layer_types",
            found=f"{sorted(kinds)}, sliding_window={getattr(config, 'sliding_window', None)}",
            needed="full attention in every layer",
            do="use a model with plain causal attention, without sliding windows or other kinds of layers",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            "model", found="an encoder-decoder", needed="a decoder-only model", do="use a causal language model"
        )
    for name in ("attn_logit_softcapping", "alibi", "add_cross_attention"):
        if getattr(config, name, None):
            raise UnsupportedError(
                f"model.{name}",
                found=getattr(config, name),
                needed="none",
                do="use a model with plain causal attention",
            )
    backward = next(
        (name for name, module in model.named_modules() if getattr(module, "is_causal", True) is False), None
    )
    if backward is not None:
        raise UnsupportedError(
            "model.is_causal",
            found=f"False in {backward}",
            needed="True in every layer",
            do="use a causal language model",
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
    is_croppable = True
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


class CarrierCache(Cache):
    """Base of the caches here: one layer object per layer, and the suffix's length as transformers counts it."""

    def __init__(self, layers: int) -> None:
        self.seq_length = 0
        super().__init__(layers=[_CarrierLayer(self, index) for index in range(layers)])


class StepCache(CarrierCache):
    """One packed step [1, T] of an engine: the rows of a begun plan, in its order.

    fused  whether layers that `fuse` has changed take the fused way; None: where a user's `fuse(model)` is in force
    """

    def __init__(self, plan: Plan, *, backend: str | None = None, fused: bool | None = None) -> None:
        super().__init__(plan.pool.geometry.layers)
        self.plan, self.backend, self.fused = plan, backend, fused

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None) -> Tensor:
        q_rows, k_rows, v_rows = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
        o = shared_prefix_attention(
            q_rows, k_rows, v_rows, self.plan, self.plan.pool, layer=layer, sm_scale=sm_scale, backend=self.backend
        )
        return o[None]


class PrefillCache(CarrierCache):
    """A document that is being read: keys and values go to the prefix's block, attention is torch's own over all of it.

    Feed chunks in order through `model(chunk, position_ids=..., past_key_values=cache)` and call `advance` after each.
    Raises UnsupportedError where the model's layers do not hand over keys and values of the prefix's geometry.
    """

    def __init__(self, prefix: SharedPrefix) -> None:
        super().__init__(prefix.geometry.layers)
        self.prefix = prefix
        self.filled = 0
        self._attended: set[int] = set()

    def advance(self, tokens: int) -> None:
        layers = self.prefix.geometry.layers
        if len(self._attended) != layers:
            raise self._unsupported(f"{len(self._attended)} of {layers} layers that call the attention function")
        self._attended.clear()
        self.filled += tokens

    def _unsupported(self, found: str) -> UnsupportedError:
        g = self.prefix.geometry
        return UnsupportedError(
            "model.attention",
            found=found,
            needed=f"{g.layers} layers that call it with {g.num_kv_heads} kv heads of {g.head_dim}",
            do="use a model with plain grouped-query attention",
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None) -> Tensor:
        g, tokens = self.prefix.geometry, q.shape[2]
        for heads in (k, v):
            if heads.shape != (1, g.num_kv_heads, tokens, g.head_dim):
                raise self._unsupported(f"{heads.shape[1]} kv heads of {heads.shape[3]} in layer {layer}")
        self._attended.add(layer)
        block = self.prefix.block()[layer]
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
    """The suffixes of a batch below one prefix, for transformers' own generate; one that is returned may be continued.

    prefix      the leaf of every row's path
    rows        suffixes in the batch
    capacity    tokens that a suffix may come to, question and answer
    tokens      token ids that each row's pages hold, as far as they are known: `generate` writes them down
    reused      tokens of each row that the last generate took from the pages instead of computing them
    beams       whether its rows are a beam search's, which belong to no returned sequence

    transformers counts columns of a left-padded batch; here a row has tokens. Columns left of a row's `start` are padding, or
    are in its pages already, and are not computed. The length it reports is in columns and without the prefix, so position_ids
    must be given: prefix.end + index in the suffix.
    """

    def __init__(
        self, prefix: SharedPrefix, geometry: Geometry, rows: int, *, capacity: int, backend: str | None = None
    ) -> None:
        super().__init__(geometry.layers)
        self.prefix, self.backend = prefix, backend
        self.pool = _suffix_pool(geometry, rows, capacity, prefix.device)
        self.slots = [self.pool.acquire_slot() for _ in range(rows)]
        self.starts = [0] * rows
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.reused = [0] * rows
        self.beams = False
        self._plan: Plan | None = None
        self._rows: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.slots)

    def resume(self, prompts: Sequence[Sequence[int]], width: int, *, capacity: int) -> None:
        """Make ready for `prompts`, which end at column `width` each: keep what the pages hold of them, forget the rest.

        prompts   token ids of each row, its whole suffix; at least its last token is computed
        capacity  tokens that a suffix may come to

        Raises ShapeError for another number of rows.
        """
        self._need_rows(len(prompts))
        if self.pool.max_pages_per_slot * PAGE < capacity:
            self._move(len(prompts), capacity)
        for row, (slot, known, prompt) in enumerate(zip(self.slots, self.tokens, prompts, strict=True)):
            pairs = zip(known, prompt[:-1], strict=False)
            kept = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(known), len(prompt) - 1))
            self.pool.truncate(slot, kept)
            self.tokens[row], self.reused[row] = list(prompt[:kept]), kept
            self.starts[row] = width - (len(prompt) - kept)
        # A prompt of which nothing is kept is fed from its first column, padding included, as any other cache is.
        self.seq_length = min(self.starts) if any(self.reused) else 0

    def _move(self, rows: int, capacity: int) -> None:
        """Carry all rows over to a pool with room for more tokens."""
        old, self.pool = self.pool, _suffix_pool(self.pool.geometry, rows, capacity, self.pool.device)
        moved = []
        for slot in self.slots:
            fresh, length = self.pool.acquire_slot(), old.length(slot)
            self.pool.reserve(fresh, length)
            self.pool.advance(fresh, length)
            self.pool.seq_lens[fresh] = length
            pages = old.table(slot)[: -(-length // PAGE)]
            self.pool.pages[:, :, self.pool.table(fresh)] = old.pages[:, :, pages]
            moved.append(fresh)
        self.slots, self._plan = moved, None

    def _need_rows(self, rows: int) -> None:
        if rows != len(self.slots):
            raise ShapeError(
                "input_ids",
                found=f"a batch of {rows}",
                needed=f"{len(self.slots)} as in the first forward",
                do="keep the batch together",
            )

    def _begin(self, batch: int, tokens: int) -> None:
        """A plan for this forward: each row's last `count` columns, those that are neither padding nor in its pages."""
        self._need_rows(batch)
        begin, end = self.seq_length, self.seq_length + tokens
        counts = [max(0, end - max(start, begin)) for start in self.starts]
        agents = [AgentRows(s, self.prefix, n) for s, n in zip(self.slots, counts, strict=True) if n]
        for agent in agents:
            self.pool.reserve(agent.slot, agent.rows)
        if self._plan is None or list(self._plan.agents) != agents:
            self._plan = Plan.make(self.pool, agents)
            rows = [b * tokens + t for b, n in enumerate(counts) for t in range(tokens - n, tokens)]
            self._rows = torch.tensor(rows, device=self.pool.device)
        self._plan.begin()
        self.seq_length = end

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

    # -- what transformers does to a cache ------------------------------------------------------------------------------

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row indices[i] was; rows that several become share its pages until they are written."""
        sources = (torch.arange(len(self.slots))[indices.cpu()] if indices.dtype == torch.bool else indices).tolist()
        if len(sources) > self.pool.slots:
            raise CapacityError(
                "rows", found=len(sources), needed=f"at most {self.pool.slots}", do="generate with as many rows at once"
            )
        for row in set(range(len(self.slots))) - set(sources):
            self.pool.release_slot(self.slots[row])
        slots, taken = [], set()
        for row in sources:
            slots.append(self.pool.fork(self.slots[row]) if row in taken else self.slots[row])
            taken.add(row)
        self.slots = slots
        self.starts = [self.starts[row] for row in sources]
        self.tokens = [list(self.tokens[row]) for row in sources]
        self.reused = [self.reused[row] for row in sources]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; as transformers has it, a number below 0 of them, or one above 0 to keep."""
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seq_length - tokens_to_remove)
        end = max(0, self.seq_length - gone)
        for row, (slot, start) in enumerate(zip(self.slots, self.starts, strict=True)):
            length = self.pool.length(slot) - max(0, self.seq_length - max(start, end))
            self.pool.truncate(slot, length)
            del self.tokens[row][length:]
        self.seq_length = end

    def reset(self) -> None:
        """Forget all suffixes; the prefix stays."""
        for slot in self.slots:
            self.pool.truncate(slot, 0)
        self.tokens = [[] for _ in self.slots]
        self.starts, self.seq_length = [0] * len(self.slots), 0


def _suffix_pool(geometry: Geometry, rows: int, capacity: int, device: torch.device) -> PagePool:
    pages = -(-capacity // PAGE)
    return PagePool(geometry, pages * rows, slots=rows, max_pages_per_slot=pages, device=device)


# -- norm, RoPE and append in one launch -------------------------------------------------------------------------------


ATTENTIONS = (Qwen3Attention, LlamaAttention)
LAYERS = (Qwen3DecoderLayer, LlamaDecoderLayer)
INNER = frozenset({Qwen3RMSNorm, LlamaRMSNorm, Qwen3MLP, LlamaMLP, SiLUActivation, nn.SiLU})
"""Modules that a fused step does the work of, without calling them."""


class Fusion:
    """What `fuse` has changed in a model: `remove()`, or the end of a with block, takes it back.

    everyone  steps of every engine take the fused way that does not say otherwise; else those that ask for it alone

    Several may hold one model: a layer gets its own forward again with the last of them.
    """

    def __init__(self, modules: Sequence[Any], *, everyone: bool = True) -> None:
        self.modules = tuple(modules)
        for module in self.modules:
            forward = vars(module).get("forward") or (_FusedLayer if type(module) in LAYERS else _Fused)(module)
            forward.holders.add(self)
            if everyone:
                forward.everyone.add(self)
            # On the instance, beside its weights: neither its class nor its state_dict sees it. After the hold, since a
            # collected engine may have let go in between.
            module.forward = forward

    def remove(self) -> None:
        """Let go of every layer; a second time it does nothing."""
        for module in self.modules:
            forward = vars(module).get("forward")
            if isinstance(forward, _Forward):
                forward.holders.discard(self)
                forward.everyone.discard(self)
                if not forward.holders:
                    vars(module).pop("forward", None)
        self.modules = ()

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def fuse(model: Any, *, everyone: bool = True) -> Fusion:
    """Let an engine's steps do norm and RoPE of q and k of a Qwen3, RoPE of a Llama, within K0:
    one launch a layer from the projections to pages.

    On the cpu backend norms and SiLU of the layers are done in C++ as well (`kvkern.rows`). Only the forward of the attention
    and decoder layers of this model is replaced, and only steps of an engine take the other way:
    publishing, `kvkern.generate` and plain forwards run the model's own. Weights, and with them the identity of documents,
    stay as they are. In fp32 numbers differ by rounding; in 16 bits fewer steps round on the triton backend.

    everyone  True: steps of every engine but those made with fused=False; False: of engines that ask for it alone

    A step calls the projections, but no longer the norms and activations, of such a layer; where one of these has hooks, or is
    of another class than transformers', the layer runs its own forward. On the cpu backend an `Engine` does this by itself.
    Raises UnsupportedError for another model than Qwen3 or Llama, one whose attention forward something else has replaced, and
    all that `check_model` refuses.
    """
    check_model(model)
    modules = [module for module in model.modules() if type(module) in ATTENTIONS]
    layers = int(model.config.num_hidden_layers)
    if len(modules) != layers:
        raise UnsupportedError(
            "model.attention",
            found=f"{type(model).__name__} with {len(modules)} layers of Qwen3Attention or LlamaAttention",
            needed=f"{layers}, all of them",
            do="leave this model as it is: it runs without fuse",
        )
    for module in modules:
        if _replaced(module):
            raise UnsupportedError(
                "model.attention.forward",
                found="one that was replaced already",
                needed="that of its class",
                do="remove() what replaced it first",
            )
    plain = (module for module in model.modules() if type(module) in LAYERS and not _replaced(module))
    silu = getattr(model.config, "hidden_act", None) == "silu"
    return Fusion([*modules, *(plain if silu else ())], everyone=everyone)


class _Forward:
    """In place of a layer's forward. Not a module: the layer it serves must not become its own child.

    holders   Fusions that want it here; everyone  those of them that serve steps which ask for nothing
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.holders: set[Fusion] = set()
        self.everyone: set[Fusion] = set()

    def takes(self, cache: Any, x: Tensor, *inner: Any) -> bool:
        """Whether this call is a step that goes the fused way, and no one would miss a call of these modules within."""
        return (
            type(cache) is StepCache
            and (bool(self.everyone) if cache.fused is None else cache.fused)
            and not self.module.training
            and all(module is None or _plain(module, x.dtype) for module in inner)
        )


def _replaced(module: Any) -> bool:
    """Whether something else than a Fusion has put a forward on the instance."""
    return not isinstance(vars(module).get("forward"), _Forward | None)


def _plain(module: Any, dtype: torch.dtype) -> bool:
    """Whether a module does in this dtype what its class of transformers does, and nothing listens."""
    own = vars(module)
    if type(module) not in INNER or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    weight = own["_parameters"].get("weight")
    return weight is None or weight.dtype == dtype


class _Fused(_Forward):
    """The forward of one attention layer."""

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        takes = self.takes(past_key_values, hidden_states, q_norm, k_norm)
        # The triton kernel has no form without norm.
        if not takes or (q_norm is None and choose(past_key_values.backend, hidden_states.device).name == "triton"):
            result: tuple[Tensor, Tensor | None] = type(module).forward(
                module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return result
        x = hidden_states[0]
        q, k, v = (
            project(x).view(x.shape[0], -1, module.head_dim)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        cos, sin = (part[0] for part in position_embeddings)
        plan = past_key_values.plan
        o = fused_attention(
            q,
            k,
            v,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            cos,
            sin,
            plan,
            plan.pool,
            layer=module.layer_idx,
            q_eps=0.0 if q_norm is None else q_norm.variance_epsilon,
            k_eps=0.0 if k_norm is None else k_norm.variance_epsilon,
            sm_scale=module.scaling,
            backend=past_key_values.backend,
        )
        return module.o_proj(o.flatten(1)[None]), None


class _FusedLayer(_Forward):
    """The forward of one decoder layer: on the cpu backend its norms, the sum before the second, and SiLU are row kernels."""

    def __call__(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        module = self.module
        first, second, mlp = module.input_layernorm, module.post_attention_layernorm, module.mlp
        inner = first, second, mlp, getattr(mlp, "act_fn", None)
        takes = not args and self.takes(past_key_values, hidden_states, *inner)
        if not takes or choose(past_key_values.backend, hidden_states.device).name != "cpu":
            result: Tensor = type(module).forward(
                module, hidden_states, *args, past_key_values=past_key_values, **kwargs
            )
            return result
        normed, x = rms_norm(hidden_states[0], first.weight, first.variance_epsilon)
        attended, _ = module.self_attn(normed[None], past_key_values=past_key_values, **kwargs)
        normed, x = rms_norm(attended[0], second.weight, second.variance_epsilon, residual=x)
        return (x + mlp.down_proj(silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed))))[None]
