"""Attention of N agents over one shared prefix and short suffixes: one layer, one decode step.

    python bench/bench_prefix.py [--device cpu] [--backend cpu] [--samples 15] [--out bench/results/NAME]

Entries of each line, all timed in this process:
  kvkern    append, prefix and suffix through `shared_prefix_attention`
  expanded  scaled_dot_product_attention, every agent with its own view of the prefix (what a batch without sharing reads)
  gemm      the two matrix products of the prefix alone, scores kept in memory: a roof, not attention
A ratio says how many times as long the entry takes.

    prefix   N=64 P=2048 S=48 heads=9/3 D=64 float32 | <median> us (<spread> %) | <n> GFLOP/s <n> GB/s | <n>x expanded  <n>x gemm
"""

from __future__ import annotations

import torch
from harness import Bench, gate
from torch.nn.functional import scaled_dot_product_attention

import kvkern
from kvkern.geometry import PAGE
from kvkern.kernels.oracle import attend_fp64

CPU_SHAPES = [
    # agents, prefix tokens, suffix tokens, query heads, kv heads, head_dim, dtype
    (1, 3774, 48, 9, 3, 64, torch.float32),
    (16, 3774, 48, 9, 3, 64, torch.float32),
    (64, 2048, 48, 9, 3, 64, torch.float32),
    (256, 3774, 48, 9, 3, 64, torch.float32),
    (64, 2048, 48, 32, 8, 128, torch.float32),
    (64, 2048, 48, 32, 8, 128, torch.bfloat16),
]
CUDA_SHAPES = [
    (16, 32768, 256, 32, 8, 128, torch.bfloat16),
    (64, 32768, 256, 32, 8, 128, torch.bfloat16),
    (1024, 32768, 256, 32, 8, 128, torch.bfloat16),
    (4096, 8192, 512, 32, 8, 128, torch.bfloat16),
]


def run(bench: Bench, shape: tuple) -> None:
    agents, prefix_tokens, suffix_tokens, num_qo_heads, num_kv_heads, head_dim, dtype = shape
    device, generator = bench.device, torch.Generator(bench.device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    geometry = kvkern.Geometry(1, num_qo_heads, num_kv_heads, head_dim, dtype)
    prefix = kvkern.SharedPrefix(geometry, torch.arange(prefix_tokens), device=device)
    k_prefix, v_prefix = normal(num_kv_heads, prefix_tokens, head_dim), normal(num_kv_heads, prefix_tokens, head_dim)
    prefix.block()[0, 0, :, :prefix_tokens], prefix.block()[0, 1, :, :prefix_tokens] = k_prefix, v_prefix
    prefix.publish()

    pages = -(-suffix_tokens // PAGE)
    pool = kvkern.PagePool(geometry, agents * pages, slots=agents, device=device)
    pool.pages.copy_(torch.randn(pool.pages.shape, generator=generator, device=device))
    for _ in range(agents):
        slot = pool.acquire_slot()
        pool.reserve(slot, suffix_tokens)
        pool.advance(slot, suffix_tokens - 1)
        pool.seq_lens[slot] = suffix_tokens - 1
    plan = kvkern.Plan.make(pool, [kvkern.AgentRows(slot, prefix, 1) for slot in range(agents)])
    plan.begin()
    q, k, v = (
        normal(agents, num_qo_heads, head_dim),
        normal(agents, num_kv_heads, head_dim),
        normal(agents, num_kv_heads, head_dim),
    )

    def ours() -> torch.Tensor:
        return kvkern.shared_prefix_attention(q, k, v, plan, pool, layer=0, backend=bench.options.backend)

    o = ours()
    suffix_k, suffix_v = (
        pool_pages[pool.page_table[:, :pages].long()].transpose(2, 3).flatten(1, 2)[:, :suffix_tokens].transpose(1, 2)
        for pool_pages in (pool.k_pages(0), pool.v_pages(0))
    )
    whole_k, whole_v = (
        torch.cat([shared.expand(agents, -1, -1, -1), own], dim=2)
        for shared, own in ((k_prefix, suffix_k), (v_prefix, suffix_v))
    )

    def expanded() -> torch.Tensor:
        return scaled_dot_product_attention(q[:, :, None], whole_k, whole_v, enable_gqa=num_qo_heads != num_kv_heads)

    n = min(agents, 4)
    plain = expanded()[:n, :, 0]
    for agent in range(n):
        reference, _ = attend_fp64(
            q[agent, None].cpu(), whole_k[agent].transpose(0, 1).cpu(), whole_v[agent].transpose(0, 1).cpu()
        )
        gate(o[agent, None], reference, plain[agent, None])

    packed = q.view(agents, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = torch.empty(num_kv_heads, packed.shape[1], prefix_tokens, dtype=dtype, device=device)

    def gemm() -> torch.Tensor:
        torch.bmm(packed, k_prefix.transpose(1, 2), out=scores)
        return torch.bmm(scores, v_prefix)

    entries = {"kvkern": bench.time(ours), "expanded": bench.time(expanded), "gemm": bench.time(gemm)}
    tokens = prefix_tokens + suffix_tokens
    bench.add(
        {
            "N": agents,
            "P": prefix_tokens,
            "S": suffix_tokens,
            "heads": f"{num_qo_heads}/{num_kv_heads}",
            "D": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
        },
        entries,
        flop=4.0 * agents * num_qo_heads * head_dim * tokens,
        bytes_moved=2.0 * num_kv_heads * head_dim * dtype.itemsize * (prefix_tokens + agents * suffix_tokens),
    )


def main() -> None:
    bench = Bench.start("prefix", __doc__)
    for shape in CUDA_SHAPES if bench.device.type == "cuda" else CPU_SHAPES:
        run(bench, shape)
    bench.finish()


if __name__ == "__main__":
    main()
