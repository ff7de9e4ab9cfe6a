"""PagePool: suffix KV in pages of 16 tokens, counted by reference, and the device's page table and lengths.

Bookkeeping is on the host, where lengths are known without asking the device: a step adds as many tokens to a slot as it
has rows. Pages are shared between slots that continue the same tokens; a shared page that would be written is copied first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from kvkern.cpu import prefer_huge_pages
from kvkern.errors import CapacityError, RequestError
from kvkern.geometry import PAGE, Geometry


class PagePool:
    """Pages for the suffixes of up to `slots` agents.

    geometry            shape and dtype of the model's KV
    num_pages           pages in the pool; one holds 16 tokens of K and V of every layer
    slots               agents that can hold pages at once
    max_pages_per_slot  longest suffix, in pages; num_pages if None
    debug               poison pages with NaN when they are freed

    One allocation [layers, 2, num_pages, num_kv_heads, 16, head_dim]; kernels take it by strides (page, head, token).
    Raises CapacityError where pages or slots run out, RequestError for a page or slot that is not held and for less than no
    tokens or pages; a call that raises changes nothing.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        *,
        slots: int,
        max_pages_per_slot: int | None = None,
        device: torch.device | str = "cpu",
        debug: bool = False,
    ) -> None:
        limits = {"num_pages": num_pages, "slots": slots, "max_pages_per_slot": max_pages_per_slot}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise CapacityError(name, found=value, needed="at least 1", do="give the pool more memory")
        self.geometry = geometry
        # As tensors name it: "cuda" is the current one, of a number.
        self.device = torch.zeros(0, device=device).device
        self.num_pages = num_pages
        self.slots = slots
        self.max_pages_per_slot = min(max_pages_per_slot or num_pages, num_pages)
        self.debug = debug
        g = geometry
        # Fresh memory may hold anything; kernels must not depend on it, and in debug mode it is NaN so that they cannot.
        self.pages = prefer_huge_pages(
            torch.empty((g.layers, 2, num_pages, g.num_kv_heads, PAGE, g.head_dim), dtype=g.dtype, device=self.device)
        )
        if debug:
            self.pages.fill_(float("nan"))
        self.page_table = torch.zeros((slots, self.max_pages_per_slot), dtype=torch.int32, device=self.device)
        self.seq_lens = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._free_slots = list(range(slots - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def k_pages(self, layer: int) -> Tensor:
        """[num_pages, num_kv_heads, 16, head_dim] of one layer's keys, a view."""
        return self.pages[layer, 0]

    def v_pages(self, layer: int) -> Tensor:
        """[num_pages, num_kv_heads, 16, head_dim] of one layer's values, a view."""
        return self.pages[layer, 1]

    # -- pages -----------------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def references(self, page: int) -> int:
        return self._references[page]

    def alloc(self, n: int) -> list[int]:
        """n pages with one reference each. Raises CapacityError if fewer are free."""
        _not_negative("n", n)
        if n > len(self._free):
            raise CapacityError(
                "pages",
                found=f"{len(self._free)} free",
                needed=f"{n}",
                do="wait for agents to finish, or give the pool more pages",
            )
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One more reference to each page. Raises RequestError for a page that nobody holds."""
        self._need_held(dict.fromkeys(pages, 1))
        for page in pages:
            self._references[page] += 1

    def free(self, pages: list[int]) -> None:
        """Give back one reference to each page; a page without any is free again, and poisoned in debug mode."""
        self._need_held(Counter(pages))
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                if self.debug:
                    self.pages[:, :, page].fill_(float("nan"))
                self._free.append(page)

    def _need_held(self, references: Mapping[int, int]) -> None:
        for page, needed in references.items():
            if not 0 <= page < self.num_pages or self._references[page] < needed:
                raise RequestError(
                    "page", found=page, needed="a page that is held", do="free or share only what alloc returned"
                )

    # -- slots -----------------------------------------------------------------------------------------------------

    def acquire_slot(self) -> int:
        """A slot with an empty suffix. Raises CapacityError if every slot is taken."""
        if not self._free_slots:
            raise CapacityError(
                "slots", found="0 free", needed="1", do="wait for agents to finish, or make the pool with more slots"
            )
        slot = self._free_slots.pop()
        self._tables[slot], self._lengths[slot] = [], 0
        self.seq_lens[slot] = 0
        return slot

    def release_slot(self, slot: int) -> None:
        """Give the slot and its pages back."""
        self.free(self._table(slot))
        del self._tables[slot], self._lengths[slot]
        self._free_slots.append(slot)

    def length(self, slot: int) -> int:
        """Suffix tokens in the slot, on the host."""
        self._table(slot)
        return self._lengths[slot]

    def table(self, slot: int) -> list[int]:
        """The slot's pages in order, a copy."""
        return list(self._table(slot))

    def pages_needed(self, slot: int, tokens: int) -> int:
        """Free pages that reserve(slot, tokens) would take."""
        _not_negative("tokens", tokens)
        table, length = self._table(slot), self._lengths[slot]
        fresh = max(0, -(-(length + tokens) // PAGE) - len(table))
        return fresh + len(self._shared_tail(table, length, tokens))

    def reserve(self, slot: int, tokens: int) -> None:
        """Make sure that the next `tokens` tokens of the slot have pages of its own to be written to.

        A partly filled page that other slots read too is copied first. Raises CapacityError, and changes nothing, when the
        pool or the slot's row of the page table is too small.
        """
        table, length = self._table(slot), self._lengths[slot]
        _not_negative("tokens", tokens)
        pages = -(-(length + tokens) // PAGE)
        if pages > self.max_pages_per_slot:
            raise CapacityError(
                "pages of one agent",
                found=f"{pages} for {length + tokens} suffix tokens",
                needed=f"at most {self.max_pages_per_slot}",
                do="ask for fewer new tokens, or make the pool with a larger max_pages_per_slot",
            )
        shared = self._shared_tail(table, length, tokens)
        fresh = self.alloc(max(0, pages - len(table)) + len(shared))
        for index in shared:
            page = fresh.pop()
            self.pages[:, :, page] = self.pages[:, :, table[index]]
            self.free([table[index]])
            table[index] = page
            self.page_table[slot, index] = page
        if fresh:
            first = len(table)
            table.extend(fresh)
            self.page_table[slot, first : len(table)] = torch.tensor(fresh, dtype=torch.int32)

    def _shared_tail(self, table: list[int], length: int, tokens: int) -> list[int]:
        """Indices of held pages that the next tokens would write although others read them too."""
        if tokens == 0:
            return []
        end = min(len(table), -(-(length + tokens) // PAGE))
        return [i for i in range(length // PAGE, end) if self._references[table[i]] > 1]

    def advance(self, slot: int, tokens: int) -> None:
        """Count tokens on the host; the step's Plan counts them on the device. Less than none takes back what was counted."""
        table = self._table(slot)
        length = self._lengths[slot] + tokens
        _not_negative("length of the slot", length)
        if length > len(table) * PAGE:
            raise CapacityError(
                "pages of the slot",
                found=f"{len(table)} for {length} tokens",
                needed=-(-length // PAGE),
                do="call reserve before the step",
            )
        self._lengths[slot] = length

    def truncate(self, slot: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of the slot, on host and device, and free the pages after them."""
        table = self._table(slot)
        if not 0 <= tokens <= self._lengths[slot]:
            raise RequestError(
                "tokens", found=tokens, needed=f"0 to {self._lengths[slot]}", do="truncate to a length the slot has had"
            )
        keep = -(-tokens // PAGE)
        self.free(table[keep:])
        del table[keep:]
        self._lengths[slot] = tokens
        self.seq_lens[slot] = tokens

    def fork(self, source: int) -> int:
        """A new slot that shares all pages of `source`. Raises CapacityError if every slot is taken."""
        table, length = self._table(source), self._lengths[source]
        slot = self.acquire_slot()
        self.share(table)
        self._tables[slot], self._lengths[slot] = list(table), length
        self.seq_lens[slot] = length
        self.page_table[slot] = self.page_table[source]
        return slot

    def _table(self, slot: int) -> list[int]:
        table = self._tables.get(slot)
        if table is None:
            raise RequestError(
                "slot", found=slot, needed="a slot that is held", do="use a slot that acquire_slot returned"
            )
        return table


def _not_negative(field: str, value: int) -> None:
    if value < 0:
        raise RequestError(field, found=value, needed="0 or more", do="count tokens and pages up from 0")
