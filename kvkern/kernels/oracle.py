"""What attention over prefixes and suffix is, in a few lines of dense fp64 that know no plan, no pages and no segments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_fp64(q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """One agent's rows against all that they may see.

    q     [rows, num_qo_heads, head_dim], the last rows of the sequence
    k, v  [tokens, num_kv_heads, head_dim]: prefixes, then suffix; row i sees tokens 0 to tokens - rows + i

    Returns o [rows, num_qo_heads, head_dim] and lse [rows, num_qo_heads], natural logarithm, both fp64.
    A row that sees nothing has o = 0 and lse = -inf.
    """
    rows, num_qo_heads, head_dim = q.shape
    tokens, group = k.shape[0], num_qo_heads // k.shape[1]
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    k64 = k.double().repeat_interleave(group, dim=1)
    v64 = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,thd->rht", q.double(), k64) * scale
    visible = torch.arange(tokens)[None, :] <= torch.arange(tokens - rows, tokens)[:, None]
    scores = scores.masked_fill(~visible.to(q.device)[:, None, :], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("rht,thd->rhd", weights, v64), lse
