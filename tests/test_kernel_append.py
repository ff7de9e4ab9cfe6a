"""K0 in debug mode: a table that would lead it elsewhere stops it, in both its forms, before anything is written."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor
from triton_interpreter import INTERPRETING, interpreted, repair

from kvkern.geometry import PAGE

if INTERPRETING:
    from kvkern.kernels.append import append, append_fused

ROWS, HEADS, G, HEAD_DIM, SLOTS, PAGES = 3, 2, 3, 64, 2, 4


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        repair(monkeypatch)


class Step:
    """Slot 1 brings rows 0 and 1 at positions 16 and 17; row 2 is padding."""

    def __init__(self) -> None:
        self.q = torch.randn(ROWS, HEADS * G, HEAD_DIM)
        self.k, self.v = torch.randn(2, ROWS, HEADS, HEAD_DIM)
        self.pages = torch.full((2, PAGES, HEADS, PAGE, HEAD_DIM), float("nan"))
        self.tables = {
            "page_table": torch.tensor([[-9, -9], [0, 3]], dtype=torch.int32),
            "seq_lens": torch.tensor([5, 18], dtype=torch.int32),
            "row_slot": torch.tensor([1, 1, -1], dtype=torch.int32),
            "row_back": torch.tensor([1, 0, 7], dtype=torch.int32),
        }

    def run(self, form: str) -> Tensor:
        places = (*self.pages, *self.tables.values())
        if form == "plain":
            return append(self.q, self.k, self.v, *places)
        one = torch.ones(HEAD_DIM)
        angles = torch.randn(2, ROWS, HEAD_DIM)
        return append_fused(self.q, self.k, self.v, one, one, *angles, *places, q_eps=1e-6, k_eps=1e-6)


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize(
    ("table", "at", "value", "message"),
    [
        ("row_slot", (1,), SLOTS, "row_slot: slot out of range"),
        ("seq_lens", (1,), 2 * PAGE + 2, "row_back: a position outside the page table"),
        ("row_back", (0,), 18, "row_back: a position outside the page table"),
        ("page_table", (1, 1), PAGES, "page_table: page out of range"),
        ("page_table", (1, 1), -1, "page_table: page out of range"),
    ],
)
@interpreted
def test_debug_mode_stops_at_a_place_that_is_out_of_range(
    monkeypatch: pytest.MonkeyPatch, form: str, table: str, at: tuple[int, ...], value: int, message: str
) -> None:
    monkeypatch.setenv("KVKERN_DEBUG", "1")
    step = Step()
    step.run(form)
    assert step.pages[:, 3, :, :2].isfinite().all() and step.pages[:, :3].isnan().all()
    written = step.pages.clone()
    step.tables[table][at] = value
    with pytest.raises(Exception, match=message):
        step.run(form)
    assert torch.equal(step.pages[:, :3].isnan(), written[:, :3].isnan())


@interpreted
def test_debug_mode_changes_no_bit_and_without_it_nothing_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step()
    monkeypatch.setenv("KVKERN_DEBUG", "1")
    packed = step.run("plain")
    pages = step.pages[:, 3, :, :2].clone()
    monkeypatch.delenv("KVKERN_DEBUG")
    assert_same_bits(step.run("plain"), packed, "q")
    assert_same_bits(step.pages[:, 3, :, :2], pages, "pages")
    # Row 0 now falls on page 0, where nothing of it belongs: only debug mode's table is wrong, not its memory.
    step.tables["seq_lens"][1] = 2 * PAGE + 1
    step.tables["page_table"] = torch.tensor([[0, 0, 0], [0, 3, 0]], dtype=torch.int32)[:, :2]
    step.run("plain")
    assert step.pages[:, 0].isfinite().any()
