"""Cases of attention in the shape of one of a model's layers, on its device, run through the operator in hostile memory.

Pages that no row owns, the places behind an agent's last token, the other layer and padding rows hold NaN; page numbers and
lengths that nobody uses are out of range.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvkern.attention import shared_prefix_attention
from kvkern.checks.assertions import Out, assert_exact, assert_same_bits, assert_untouched, plain_attention
from kvkern.geometry import PAGE, Geometry
from kvkern.kernels.oracle import attend_fp64
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

NAN = float("nan")
NOWHERE = 2**30
"""A page number and a length that no pool has."""


@dataclass(frozen=True, eq=False)
class Agent:
    """A leaf of the tree or None; k and v of the whole suffix; q of its last rows, which are this step's."""

    node: SharedPrefix | None
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def rows(self) -> int:
        return self.q.shape[0]


@dataclass(frozen=True, eq=False)
class Case:
    """Agents over a tree of prefixes, in one layer of a model."""

    geometry: Geometry
    device: torch.device
    layer: int
    sm_scale: float | None
    agents: tuple[Agent, ...]

    def only(self, *which: int) -> Case:
        """The same agents, alone, or a few of them in this order."""
        return replace(self, agents=tuple(self.agents[i] for i in which))

    def nodes(self) -> list[SharedPrefix]:
        """All of the tree that an agent sees."""
        paths = [node for agent in self.agents if agent.node for node in agent.node.path()]
        return list(dict.fromkeys(paths))

    def keys_and_values(self, agent: Agent) -> tuple[Tensor, Tensor]:
        """All that an agent's last row sees, [tokens, num_kv_heads, head_dim]."""
        nodes = agent.node.path() if agent.node is not None else []
        keys = [node.key(self.layer).transpose(0, 1) for node in nodes]
        values = [node.value(self.layer).transpose(0, 1) for node in nodes]
        return torch.cat([*keys, agent.k]), torch.cat([*values, agent.v])

    def oracle(self) -> list[Out]:
        """Dense, in fp64."""
        return [Out(*attend_fp64(a.q, *self.keys_and_values(a), sm_scale=self.sm_scale)) for a in self.agents]

    def plain(self) -> list[Out]:
        """Dense, by plain torch in the dtype of the case."""
        return [plain_attention(a.q, *self.keys_and_values(a), self.sm_scale) for a in self.agents]


def make_case(
    geometry: Geometry,
    device: torch.device,
    *,
    tree: Mapping[str, tuple[int, str | None]],
    agents: Sequence[tuple[str | None, int, int]],
    sm_scale: float | None = None,
) -> Case:
    """Random values in a case of this shape.

    tree    name -> (tokens, name of the parent or None), parents first
    agents  (name of the leaf or None, suffix tokens after this step, rows in this step)

    The case runs in a random layer; the prefixes of the other layers hold NaN.
    """
    g, layer = geometry, random.randrange(geometry.layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, g.dtype)

    nodes: dict[str, SharedPrefix] = {}
    for name, (tokens, parent) in tree.items():
        above = nodes[parent] if parent else None
        node = SharedPrefix(g, torch.arange(tokens), device=device, parent=above)
        block = node.block()
        block[:layer], block[layer + 1 :] = NAN, NAN
        block[layer, :, :, :tokens] = normal(2, g.num_kv_heads, tokens, g.head_dim)
        nodes[name] = node.publish()
    made = []
    for leaf, suffix, rows in agents:
        k, v = (normal(suffix, g.num_kv_heads, g.head_dim) for _ in range(2))
        # Twice the usual spread: some keys matter more than others.
        q = 2 * normal(rows, g.num_qo_heads, g.head_dim)
        made.append(Agent(nodes[leaf] if leaf else None, q, k, v))
    return Case(g, device, layer, sm_scale, tuple(made))


def decode_case(geometry: Geometry, device: torch.device, rows: int, prefix_tokens: int) -> Case:
    """So many agents over one prefix, each with one row and a suffix of 1 to 70 tokens."""
    agents = [("doc", random.randint(1, 70), 1) for _ in range(rows)]
    return make_case(geometry, device, tree={"doc": (prefix_tokens, None)}, agents=agents)


def attend(backend: str, case: Case, *, padding: int = 0, workers_per_node: int = 1) -> list[Out]:
    """Each agent's o and lse, in the order of the case, in one step through `shared_prefix_attention`.

    padding  padding rows after the agents' rows, whose q, k and v are NaN; they must give 0 and -inf

    The pages must change by the tokens of the step, and by nothing else.
    """
    g, pool = case.geometry, _hostile_pool(case)
    slots = [pool.acquire_slot() for _ in case.agents]
    for slot, agent in zip(slots, case.agents, strict=True):
        before = agent.k.shape[0] - agent.rows
        pool.reserve(slot, before)
        pool.advance(slot, before)
        pool.seq_lens[slot] = before
        _write(pool, pool.pages[case.layer], slot, agent, 0, before)
        pool.reserve(slot, agent.rows)
    plan = Plan.make(
        pool,
        [AgentRows(slot, agent.node, agent.rows) for slot, agent in zip(slots, case.agents, strict=True)],
        bucket=sum(agent.rows for agent in case.agents) + padding,
        workers_per_node=workers_per_node,
    )
    q = torch.full((plan.rows, g.num_qo_heads, g.head_dim), NAN, dtype=g.dtype, device=case.device)
    k, v = (torch.full_like(q[:, : g.num_kv_heads], NAN) for _ in range(2))
    expected = pool.pages.clone()
    places = dict(zip(plan.order, plan.qo_indptr, strict=False))
    for i, (slot, agent) in enumerate(zip(slots, case.agents, strict=True)):
        mine = slice(places[i], places[i] + agent.rows)
        q[mine], k[mine], v[mine] = agent.q, agent.k[-agent.rows :], agent.v[-agent.rows :]
        _write(pool, expected[case.layer], slot, agent, agent.k.shape[0] - agent.rows, agent.k.shape[0])

    plan.begin()
    o, lse = shared_prefix_attention(
        q, k, v, plan, pool, layer=case.layer, sm_scale=case.sm_scale, return_lse=True, backend=backend
    )
    assert_untouched(pool.pages, expected, "pages")
    rows = plan.rows - padding
    assert_same_bits(o[rows:], torch.zeros_like(o[rows:]), "o of padding rows")
    assert_same_bits(lse[rows:], torch.full_like(lse[rows:], -math.inf), "lse of padding rows")
    ends = {i: begin + case.agents[i].rows for i, begin in places.items()}
    return [Out(o[places[i] : ends[i]], lse[places[i] : ends[i]]) for i in range(len(case.agents))]


def _hostile_pool(case: Case) -> PagePool:
    """Pages for the case and a few more, full of NaN and handed out in random order, and slots likewise."""
    needed = [-(-agent.k.shape[0] // PAGE) for agent in case.agents]
    pool = PagePool(
        case.geometry,
        sum(needed) + 3,
        slots=len(needed) + 2,
        max_pages_per_slot=max(needed) + 1,
        device=case.device,
        debug=True,
    )
    pages, slots = pool.alloc(pool.num_pages), [pool.acquire_slot() for _ in range(pool.slots)]
    random.shuffle(pages)
    random.shuffle(slots)
    pool.free(pages)
    for slot in slots:
        pool.release_slot(slot)
    pool.page_table.fill_(NOWHERE)
    pool.seq_lens.fill_(NOWHERE)
    return pool


def _write(pool: PagePool, pages: Tensor, slot: int, agent: Agent, begin: int, end: int) -> None:
    """Tokens of an agent's suffix to where they belong in one layer's pages, without a kernel."""
    table = torch.tensor(pool.table(slot), dtype=torch.int64, device=pages.device)
    position = torch.arange(begin, end, device=pages.device)
    for which, values in enumerate((agent.k, agent.v)):
        pages[which][table[position // PAGE], :, position % PAGE] = values[begin:end]


def assert_case_is_exact(outs: Sequence[Out], case: Case) -> None:
    """Every agent's o and lse against the oracle."""
    for i, (out, reference, plain) in enumerate(zip(outs, case.oracle(), case.plain(), strict=True)):
        assert_exact(out.o, reference.o, plain.o, f"o[{i}]")
        assert_exact(out.lse, reference.lse, plain.lse, f"lse[{i}]")


def assert_same_rows(a: Out, b: Out, index: int | str) -> None:
    """Two results of one agent: the same bits in o and in lse."""
    assert_same_bits(a.o, b.o, f"o[{index}]")
    assert_same_bits(a.lse, b.lse, f"lse[{index}]")
