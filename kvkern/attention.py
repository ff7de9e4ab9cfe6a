"""Attention over a path of shared prefixes and an agent's own suffix: check, append (K0), prefixes (K1), suffix (K2).

Below the functions lies one flat operator of torch.library, `kvkern::shared_prefix_attention`, which takes tensors and
numbers only and declares the pages mutated: it is what opcheck and torch.compile see. It takes the pages of all layers as
they are allocated, for a view of a mutated tensor loses its storage offset in inductor where sizes are dynamic (torch 2.13;
pytorch issue 198068): K and V would be written to one place.

A call of an operator goes through all that torch has registered for it. By torch.library.custom_op that is 0.2 ms of Python on
torch 2.13 (0.03 on 2.11), for every layer of every step, most of it to look for defaults where there are none; as here, 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kvkern import backends, plain
from kvkern.errors import DeviceError, DtypeError, RequestError, ShapeError
from kvkern.geometry import DTYPES, PAGE, Geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

Both = tuple[Tensor, Tensor]
"""o and lse."""

_library = torch.library.Library("kvkern", "FRAGMENT")


def _operator(name: str, fake: Callable[..., Both]) -> Callable[[Callable[..., Both]], Callable[..., Both]]:
    """Register a function as an operator of torch that writes its argument `pages`, and give what calls it."""

    def register(run: Callable[..., Both]) -> Callable[..., Both]:
        schema = torch.library.infer_schema(run, mutates_args=("pages",))
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvkern::{name}", fake, lib=_library)
        operator = getattr(torch.ops.kvkern, name).default

        def call(*arguments: Any) -> Both:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
                return _WithoutBackward.apply(operator, *arguments)  # type: ignore[no-any-return]
            return operator(*arguments)  # type: ignore[no-any-return]

        return call

    return register


class _WithoutBackward(torch.autograd.Function):
    """An operator under autograd: its results say so where a gradient is asked of them, instead of giving none."""

    @staticmethod
    def forward(ctx: Any, operator: Callable[..., Both], *arguments: Any) -> Both:
        return operator(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RequestError(
            "backward",
            found="a gradient asked of attention over a shared prefix",
            needed="inference: prefixes are read-only, and there is no backward",
            do="call it under torch.no_grad(), or train with the model's own attention",
        )


def _fake(q: Tensor, *rest: Any) -> Both:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2], dtype=torch.float32)


@_operator("shared_prefix_attention", _fake)
def _flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    row_slot: Tensor,
    row_back: Tensor,
    suffix_tiles: Tensor,
    path_table: Tensor,
    node_table: Tensor,
    items: Tensor,
    layer: int,
    sm_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The flat operator: pages [layers, 2, num_pages, num_kv_heads, 16, head_dim] by strides, other shapes as in `PlanTensors`
    and `plain`; k and v may have no rows, then nothing is appended."""
    run = backends.choose(backend, q.device)
    k_pages, v_pages = pages[layer].unbind()
    queries = run.append(q, k, v, k_pages, v_pages, page_table, seq_lens, row_slot, row_back)
    tables = page_table, seq_lens, row_slot, row_back, suffix_tiles, path_table
    return _after_append(run, queries, k_pages, v_pages, tables, node_table, items, layer, sm_scale)


def _after_append(
    run: backends.Backend,
    queries: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: tuple[Tensor, ...],
    node_table: Tensor,
    items: Tensor,
    layer: int,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    path_table = tables[-1]
    state = run.prefix_attention(
        queries,
        node_table,
        items,
        path_table,
        num_kv_heads=k_pages.shape[1],
        layer=layer,
        sm_scale=sm_scale,
    )
    return run.suffix_attention(queries, k_pages, v_pages, *tables, state, sm_scale=sm_scale)


@_operator("shared_prefix_attention_fused", _fake)
def _flat_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    row_slot: Tensor,
    row_back: Tensor,
    suffix_tiles: Tensor,
    path_table: Tensor,
    node_table: Tensor,
    items: Tensor,
    q_eps: float,
    k_eps: float,
    layer: int,
    sm_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The flat operator with norm and RoPE of q and k before it, in K0's one launch."""
    run = backends.choose(backend, q.device)
    k_pages, v_pages = pages[layer].unbind()
    places = page_table, seq_lens, row_slot, row_back
    queries = run.append_fused(q, k, v, q_norm, k_norm, cos, sin, k_pages, v_pages, *places, q_eps=q_eps, k_eps=k_eps)
    tables = *places, suffix_tiles, path_table
    return _after_append(run, queries, k_pages, v_pages, tables, node_table, items, layer, sm_scale)


@overload
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pages: PagePool,
    *,
    layer: int,
    sm_scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pages: PagePool,
    *,
    layer: int,
    sm_scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pages: PagePool,
    *,
    layer: int,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v of these rows to their agents' pages, then attend: over the path of prefixes, and causally over the own suffix.

    q        [rows, num_qo_heads, head_dim], fp32, fp16 or bf16; any strides, the last one 1
    k, v     [rows, num_kv_heads, head_dim], like q
    plan     Plan of these rows, begun for this step (`plan.begin()`)
    pages    PagePool the plan was made for; its pages of these agents are written, the prefixes are only read
    layer    index into the prefixes and the pages
    sm_scale factor on q.k before the softmax; head_dim ** -0.5 if None
    backend  "triton", "cpu" or "torch"; by default the device decides

    Returns o, like q; with return_lse also lse [rows, num_qo_heads] fp32, natural logarithm (FlashInfer's is base 2).
    A row's bits depend on its own q, path and suffix, and on nothing else in the batch. Padding rows give 0 and -inf.
    Raises ShapeError, DtypeError, DeviceError or RequestError before any launch, naming the argument.
    Source: attention over prefix and suffix apart, Juravsky et al. 2024, arXiv 2402.05099.
    """
    _check_rows(q, k, v, plan, pages, layer)
    o, lse = _flat(
        q,
        k,
        v,
        pages.pages,
        pages.page_table,
        pages.seq_lens,
        *plan.tensors,
        layer,
        q.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
        backend,
    )
    return (o, lse) if return_lse else o


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    plan: Plan,
    pages: PagePool,
    *,
    layer: int,
    q_eps: float,
    k_eps: float,
    sm_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`shared_prefix_attention` of q and k as the projections of a Qwen3 or Llama give them: K0 does their norm and RoPE as well.

    q_norm, k_norm  [head_dim], weights of the RMS norm of each head, None without one (not on triton); q_eps and
                    k_eps are added to the mean square
    cos, sin        [rows, head_dim], as transformers' rotary embedding makes them: both halves alike

    Returns o. Raises as `shared_prefix_attention`, naming the argument.
    """
    _check_rows(q, k, v, plan, pages, layer)
    rows, _, head_dim = q.shape
    for name, tensor, needed in (
        ("q_norm", q_norm, (head_dim,)),
        ("k_norm", k_norm, (head_dim,)),
        ("cos", cos, (rows, head_dim)),
        ("sin", sin, (rows, head_dim)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != needed:
            raise ShapeError(name, found=list(tensor.shape), needed=list(needed), do="bring those of the model's layer")
        if tensor.stride(-1) != 1:
            raise ShapeError(f"{name}.stride(-1)", found=tensor.stride(-1), needed=1, do=f"pass {name}.contiguous()")
        if tensor.dtype != q.dtype:
            raise DtypeError(name, found=tensor.dtype, needed=f"{q.dtype} as q", do="convert it")
        if tensor.device != q.device:
            raise DeviceError(name, found=tensor.device, needed=f"{q.device} as q", do="move it")
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    tables = pages.pages, pages.page_table, pages.seq_lens, *plan.tensors
    o, _ = _flat_fused(q, k, v, q_norm, k_norm, cos, sin, *tables, q_eps, k_eps, layer, sm_scale, backend)
    return o


def _check_rows(q: Tensor, k: Tensor, v: Tensor, plan: Plan, pages: PagePool, layer: int) -> None:
    rows, num_qo_heads, num_kv_heads, head_dim, dtype, device = plan.expects
    if plan.pool is not pages:
        raise RequestError(
            "pages",
            found="another pool than the plan's",
            needed="the pool that the plan was made for",
            do="make the plan for this pool",
        )
    if not plan.begun:
        raise RequestError(
            "plan",
            found="not begun",
            needed="a plan whose rows are counted",
            do="call plan.begin() before the first layer",
        )
    if not 0 <= layer < pages.geometry.layers:
        raise ShapeError(
            "layer", found=layer, needed=f"0 to {pages.geometry.layers - 1}", do="name a layer of the pool"
        )
    for name, tensor, heads in (("q", q, num_qo_heads), ("k", k, num_kv_heads), ("v", v, num_kv_heads)):
        if tensor.dim() != 3 or tuple(tensor.shape) != (rows, heads, head_dim):
            raise ShapeError(
                name,
                found=list(tensor.shape),
                needed=[rows, heads, head_dim],
                do="bring the rows of this plan, in its order",
            )
        if tensor.stride(-1) != 1:
            raise ShapeError(f"{name}.stride(-1)", found=tensor.stride(-1), needed=1, do=f"pass {name}.contiguous()")
        if tensor.dtype != dtype:
            raise DtypeError(
                name,
                found=tensor.dtype,
                needed=f"{dtype} as in the pool",
                do="convert it, or make the pool in this dtype",
            )
        if tensor.device != device:
            raise DeviceError(
                name, found=tensor.device, needed=f"{device} as in the pool", do="move it to the pool's device"
            )


@overload
def attend(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    seq_lens: Tensor,
    sm_scale: float | None = None,
    return_lse: Literal[False] = False,
    *,
    backend: str | None = None,
    workers_per_node: int | None = None,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    seq_lens: Tensor,
    sm_scale: float | None,
    return_lse: Literal[True],
    *,
    backend: str | None = None,
    workers_per_node: int | None = None,
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    seq_lens: Tensor,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    backend: str | None = None,
    workers_per_node: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a batch over one shared prefix and its own suffixes, on plain tensors.

    q                   [B, num_qo_heads, head_dim], or [B, R, num_qo_heads, head_dim]: the last R tokens of each suffix
    k_prefix, v_prefix  [P, num_kv_heads, head_dim], visible to every row; P may be 0
    k_suffix, v_suffix  [B, S, num_kv_heads, head_dim], the first seq_lens[b] tokens of each count
    seq_lens            int [B], 0 to S; a q row whose own token would lie before the suffix's first sees the prefix alone
    sm_scale            factor on q.k before the softmax; head_dim ** -0.5 if None
    workers_per_node    runs that the prefix is cut into, by default as the device has use for; the bits do not depend on it

    Returns o like q; with return_lse also lse [B, (R,) num_qo_heads] fp32, natural logarithm; 0 and -inf where nothing is seen.
    Copies prefix and suffixes into a block and pages first: an engine that keeps them uses `shared_prefix_attention`.
    Raises ShapeError, DtypeError, DeviceError or RequestError naming the argument.
    """
    lengths = _check_attend(q, k_prefix, v_prefix, k_suffix, v_suffix, seq_lens)
    queries = q[:, None] if q.dim() == 3 else q
    batch, rows, num_qo_heads, head_dim = queries.shape
    num_kv_heads = k_prefix.shape[1]
    geometry = Geometry(1, num_qo_heads, num_kv_heads, head_dim, q.dtype)
    pool = PagePool(geometry, max(1, sum(-(-n // PAGE) for n in lengths)), slots=batch, device=q.device)
    for b, n in enumerate(lengths):
        slot = pool.acquire_slot()
        pool.reserve(slot, n)
        pool.advance(slot, n)
        table = pool.page_table[slot].long()
        for pages, suffix in ((pool.k_pages(0), k_suffix), (pool.v_pages(0), v_suffix)):
            position = torch.arange(n, device=q.device)
            pages[table[position // PAGE], :, position % PAGE] = suffix[b, :n]
        pool.seq_lens[slot] = n

    node = None
    if k_prefix.shape[0]:
        node = SharedPrefix(geometry, torch.zeros(k_prefix.shape[0], dtype=torch.int64), device=q.device)
        node.block()[0, 0, :, : node.tokens] = k_prefix.transpose(0, 1)
        node.block()[0, 1, :, : node.tokens] = v_prefix.transpose(0, 1)
        node.publish()
    plan = Plan.make(pool, [AgentRows(slot, node, rows) for slot in range(batch)], workers_per_node=workers_per_node)
    assert plan.order == tuple(range(batch))
    none = q.new_empty((0, num_kv_heads, head_dim))
    o, lse = _flat(
        queries.reshape(batch * rows, num_qo_heads, head_dim),
        none,
        none,
        pool.pages,
        pool.page_table,
        pool.seq_lens,
        *plan.tensors,
        0,
        head_dim**-0.5 if sm_scale is None else sm_scale,
        backend,
    )
    if node is not None:
        node.release()
    o, lse = o.view(q.shape), lse.view(q.shape[:-1])
    return (o, lse) if return_lse else o


def _check_attend(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, k_suffix: Tensor, v_suffix: Tensor, seq_lens: Tensor
) -> list[int]:
    """Lengths on the host, or an error that names the argument."""
    if q.dim() not in (3, 4) or 0 in q.shape:
        raise ShapeError(
            "q",
            found=list(q.shape),
            needed="[B, num_qo_heads, head_dim] or [B, R, num_qo_heads, head_dim], none of them 0",
            do="pass at least one row",
        )
    batch, head_dim = q.shape[0], q.shape[-1]
    if k_prefix.dim() != 3 or k_prefix.shape[-1] != head_dim:
        raise ShapeError(
            "k_prefix",
            found=list(k_prefix.shape),
            needed=f"[P, num_kv_heads, {head_dim}]",
            do="pass the keys of the prefix token by token",
        )
    heads = k_prefix.shape[1]
    suffix_shape = [batch, k_suffix.shape[1] if k_suffix.dim() == 4 else "S", heads, head_dim]
    for name, tensor, needed in (
        ("v_prefix", v_prefix, list(k_prefix.shape)),
        ("k_suffix", k_suffix, suffix_shape),
        ("v_suffix", v_suffix, suffix_shape),
        ("seq_lens", seq_lens, [batch]),
    ):
        if list(tensor.shape) != needed:
            raise ShapeError(
                name, found=list(tensor.shape), needed=needed, do="bring prefix, suffixes and q of one model and batch"
            )
    if q.dtype not in DTYPES:
        raise DtypeError("q", found=q.dtype, needed="float32, float16 or bfloat16", do="convert it")
    for name, tensor in (
        ("k_prefix", k_prefix),
        ("v_prefix", v_prefix),
        ("k_suffix", k_suffix),
        ("v_suffix", v_suffix),
    ):
        if tensor.dtype != q.dtype:
            raise DtypeError(name, found=tensor.dtype, needed=f"{q.dtype} as in q", do="convert it")
        if tensor.device != q.device:
            raise DeviceError(name, found=tensor.device, needed=f"{q.device} as q", do="move it")
    if seq_lens.dtype.is_floating_point or seq_lens.dtype == torch.bool:
        raise DtypeError("seq_lens", found=seq_lens.dtype, needed="integers", do="pass the suffix lengths in tokens")
    lengths: list[int] = seq_lens.tolist()
    for b, n in enumerate(lengths):
        if not 0 <= n <= k_suffix.shape[1]:
            raise RequestError(
                f"seq_lens[{b}]",
                found=n,
                needed=f"0 to {k_suffix.shape[1]}, the tokens in k_suffix",
                do="give lengths that the suffixes have",
            )
    return lengths


def merge_state(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over keys A and attention over keys B -> attention over both. The order of A and B is part of the rounding.

    o_a, o_b      [..., head_dim], fp32, fp16 or bf16
    lse_a, lse_b  [...], fp32, natural logarithm; -inf where nothing was seen

    Returns (o like o_a, lse fp32). Raises ShapeError or DtypeError naming the argument.
    Source: Milakov and Gimelshein 2018, arXiv 1805.02867, as used between blocks of keys.
    """
    for name, tensor, needed in (
        ("o_b", o_b, o_a.shape),
        ("lse_a", lse_a, o_a.shape[:-1]),
        ("lse_b", lse_b, o_a.shape[:-1]),
    ):
        if tensor.shape != needed:
            raise ShapeError(
                name, found=list(tensor.shape), needed=list(needed), do="merge results of the same rows and heads"
            )
    if o_a.dtype not in DTYPES or o_b.dtype != o_a.dtype:
        raise DtypeError(
            "o_b", found=f"{o_b.dtype} beside o_a {o_a.dtype}", needed="two equal floating dtypes", do="convert one"
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.dtype != torch.float32:
            raise DtypeError(name, found=lse.dtype, needed=torch.float32, do="keep lse in fp32")
    ones = torch.ones_like(lse_a)
    merged = plain.merge(
        plain.State(lse_a * (1 / math.log(2.0)), ones, o_a.float()),
        plain.State(lse_b * (1 / math.log(2.0)), ones, o_b.float()),
    )
    o, lse = plain.finish(merged)
    return o.to(o_a.dtype), lse
