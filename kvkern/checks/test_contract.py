"""Each path through the attention kernels, in the shape of the model's layers, against a dense fp64 oracle.

FlashAttention's rule for o and lse: at most twice the largest error of plain torch, and 1.5 times its mean; in fp32 1e-5.
"""

from __future__ import annotations

import pytest
import torch

from kvkern.checks.cases import assert_case_is_exact, attend, decode_case, make_case
from kvkern.checks.serving import mistake, own_token_unseen_in_a_batch
from kvkern.checks.subject import Subject
from kvkern.geometry import SUFFIX_SEGMENT, Geometry

TREE: dict[str, tuple[int, str | None]] = {
    "book": (1100, None),
    "chapter": (300, "book"),
    "talk": (17, "chapter"),
    "annex": (129, "book"),
}


def test_decode(geometry: Geometry, device: torch.device, backend: str) -> None:
    """contract: decode, 16 agents over a prefix of 700 tokens"""
    case = decode_case(geometry, device, 16, 700)
    assert_case_is_exact(attend(backend, case), case)


def test_extend(geometry: Geometry, device: torch.device, backend: str) -> None:
    """contract: extend, 1 to 40 rows an agent, with a prefix and without"""
    agents = [("doc", 40, 40), ("doc", 33, 17), (None, 20, 20), ("doc", 1, 1)]
    case = make_case(geometry, device, tree={"doc": (257, None)}, agents=agents)
    assert_case_is_exact(attend(backend, case), case)


def test_tree(geometry: Geometry, device: torch.device, backend: str) -> None:
    """contract: a tree of three levels, agents at each"""
    leaves = ["talk", "annex", None, "chapter", "talk", "book"]
    case = make_case(geometry, device, tree=TREE, agents=[(leaf, 12 + i, 2) for i, leaf in enumerate(leaves)])
    assert_case_is_exact(attend(backend, case), case)


def test_ragged_suffixes(geometry: Geometry, device: torch.device, backend: str) -> None:
    """contract: ragged suffixes, around the bounds of pages and of a segment"""
    lengths = [1, 15, 16, 17, SUFFIX_SEGMENT, SUFFIX_SEGMENT + 1]
    case = make_case(geometry, device, tree={"doc": (129, None)}, agents=[("doc", n, 1) for n in lengths])
    assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize("workers", [1, 3])
def test_several_segments(geometry: Geometry, device: torch.device, backend: str, workers: int) -> None:
    """contract: a prefix of three segments, cut for workers: {workers}"""
    case = decode_case(geometry, device, 4, 2049)  # two whole segments and one token
    assert_case_is_exact(attend(backend, case, workers_per_node=workers), case)


def test_padding_rows(geometry: Geometry, device: torch.device, backend: str) -> None:
    """contract: padding rows of NaN give 0 and -inf, and change no other row"""
    case = decode_case(geometry, device, 5, 300)
    assert_case_is_exact(attend(backend, case, padding=27), case)


def test_poisoned_memory(geometry: Geometry, device: torch.device, backend: str) -> None:
    """contract: memory that is not the agents' own holds NaN, and is not written"""
    case = make_case(geometry, device, tree=TREE, agents=[("talk", 33, 3), (None, 5, 1), ("annex", 16, 16)])
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)  # what torch.empty returns then holds NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        outs = attend(backend, case, padding=4)
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)
    assert_case_is_exact(outs, case)


def test_control_values_of_another_scale(geometry: Geometry, device: torch.device, backend: str) -> None:
    """control: an answer that is off by one part in fifty is caught"""
    case = decode_case(geometry, device, 4, 300)
    wrong = [out._replace(o=out.o * 1.02) for out in attend(backend, case)]
    with pytest.raises(AssertionError, match=r"o\[0\]: (max|mean) error"):
        assert_case_is_exact(wrong, case)


def test_control_mask(subject: Subject, geometry: Geometry, device: torch.device) -> None:
    """control: rows that do not see their own token are caught"""
    case = decode_case(geometry, device, 16, 40)
    with mistake(subject, own_token_unseen_in_a_batch):
        wrong = attend(subject.backend.name, case)
    with pytest.raises(AssertionError, match=r"o\[\d\]: (max|mean) error|not finite|infinity"):
        assert_case_is_exact(wrong, case)
