"""What the engine promises exactly, strongest first, each with controls that the same assertion catches.

a. A document saved, and loaded in another process, gives the same bits.
b. An agent alone and the same agent among others, early or late, preempted and resumed: the same bits.
d. Any order of agents, pages and segments' workers: the same bits.
c. Reuse against transformers from scratch: fp32 to rounding; in bf16 at most twice transformers' own error.

The bits compared are those of the logits that every token was chosen from.
"""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_exact, assert_same_bits
from models import VOCAB_SIZE, scratch_logits, tiny_model, tiny_tokenizer, twin
from safetensors.torch import load_file
from test_exact import threads
from torch import Tensor, nn

import kvkern
from kvkern import backends, plain
from kvkern import engine as module
from kvkern.checks.serving import fold_from_the_right
from kvkern.engine import Engine, Request
from kvkern.geometry import PAGE, SUFFIX_SEGMENT
from kvkern.identity import model_geometry
from kvkern.linear import Rounding, RoundingClass

TESTS = Path(__file__).parent
DOCUMENT_TOKENS = 2 * 1024 + 50
"""Three segments, the last one short."""


class Recorder(Engine):
    """An engine that keeps the logits each token was chosen from."""

    def __init__(self, model: Any, *, pages: int = 512, **options: Any) -> None:
        memory_bytes = pages * PAGE * model_geometry(model).token_bytes()
        super().__init__(model, tiny_tokenizer(), memory_bytes=memory_bytes, debug=True, **options)
        self.logits: dict[int, list[Tensor]] = {}

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.logits.setdefault(request.index, []).append(row.clone())
        super()._choose(requests, logits)

    def run(self, doc: Any, questions: dict[int, list[int]], new: int) -> dict[int, Tensor]:
        """Logits of each question by its number, [new, vocabulary]."""
        requests = [self.submit(doc, ids, index=i, max_new_tokens=new, eos_token_id=[]) for i, ids in questions.items()]
        while self.scheduler.unfinished:
            self.step()
        assert all(request.answer.finish_reason == "length" for request in requests)
        assert self.pool.free_pages == self.pool.num_pages
        return {i: torch.stack(self.logits.pop(i)) for i in questions}


class Case(NamedTuple):
    """A model with random weights, a document of random tokens, and the backend that they are served by."""

    model: Any
    doc: kvkern.Document
    backend: str

    def engine(self, **options: Any) -> Recorder:
        return Recorder(self.model, backend=self.backend, **options)

    def run(self, questions: dict[int, list[int]], *, new: int = 4, **options: Any) -> dict[int, Tensor]:
        return self.engine(**options).run(self.doc, questions, new)


def make_case(backend: str, seed: int | None = None, *, tokens: int = DOCUMENT_TOKENS, **config: Any) -> Case:
    seed = random.randrange(1 << 30) if seed is None else seed
    model = tiny_model(seed=seed, **config)
    ids = torch.randint(VOCAB_SIZE, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Case(model, kvkern.publish(model, tiny_tokenizer(), ids), backend)


@pytest.fixture(params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(seed: int, backend: str) -> Iterator[Case]:
    case = make_case(backend)
    yield case
    assert case.doc.references == 1
    case.doc.release()


def random_questions(n: int, longest: int = 40) -> dict[int, list[int]]:
    return {i: torch.randint(VOCAB_SIZE, (random.randint(1, longest),)).tolist() for i in range(n)}


def only(questions: dict[int, list[int]], *which: int) -> dict[int, list[int]]:
    return {i: questions[i] for i in which}


def assert_same_logits(a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
    """Of all questions that are in both."""
    assert a.keys() & b.keys()
    for i in sorted(a.keys() & b.keys()):
        assert_same_bits(a[i], b[i], f"logits[{i}]")


# -- a: a round trip through a file, in another process ----------------------------------------------------------------

LOAD = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from safetensors.torch import save_file
    from test_exact_engine import *
    file, out, seed, backend = sys.argv[2:]
    model = tiny_model(seed=int(seed))
    doc = kvkern.load(file, model, tiny_tokenizer())
    questions = {i: list(range(i, 3 * i + 5)) for i in range(6)}
    logits = Case(model, doc, backend).run(questions)
    save_file({"kv": doc.block().clone(), **{str(i): rows for i, rows in logits.items()}}, out)
"""


def test_a_file_loaded_in_another_process_gives_the_same_bits(seed, backend, tmp_path):
    case = make_case(backend, seed)
    questions = {i: list(range(i, 3 * i + 5)) for i in range(6)}
    expected = case.run(questions)
    case.doc.save(tmp_path / "a.kv")
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(TESTS)]
    subprocess.run(
        [*command, str(tmp_path / "a.kv"), str(tmp_path / "out"), str(seed), backend], check=True, timeout=200
    )
    found = load_file(tmp_path / "out")
    assert_same_bits(found.pop("kv"), case.doc.block(), "kv")
    assert_same_logits({int(i): rows for i, rows in found.items()}, expected)
    mapped = kvkern.load(tmp_path / "a.kv", case.model, tiny_tokenizer(), mmap=True)
    assert_same_logits(Case(case.model, mapped, backend).run(questions), expected)


def test_control_one_bit_of_the_kv_is_seen(case, monkeypatch):
    questions = random_questions(2)
    expected = case.run(questions)
    changed = case.doc.block().clone()
    changed.view(torch.int32)[1, 1, 0, 5, 3] ^= 1 << 20
    monkeypatch.setattr(case.doc, "_block", changed)
    with pytest.raises(AssertionError, match=r"logits\[\d\]: \d+ of \d+ differ, first at"):
        assert_same_logits(case.run(questions), expected)


# -- b: alone, among others, early, late, interrupted ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_agent_has_the_same_bits_alone_and_among_64_others(seed, backend, dtype):
    case, questions = make_case(backend, dtype=dtype), random_questions(65)
    among = case.run(questions)
    for i in (0, 17, 64):
        assert_same_logits(case.run(only(questions, i)), among)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_with_two_threads_an_agent_has_the_same_bits_alone_and_among_others(seed, dtype):
    """The rounding class is measured at this number of threads, the document is read with it, and work is cut between them."""
    with threads(2):
        case, questions = make_case("cpu", dtype=dtype, tokens=1100), random_questions(17, longest=12)
        among = case.run(questions)
        for i in (0, 16):
            assert_same_logits(case.run(only(questions, i)), among)


def test_agent_257_has_the_same_bits_though_256_run(case):
    questions = random_questions(257, longest=6)
    engine = case.engine(max_agents=257, pages=600)
    for i in range(256):
        engine.submit(case.doc, questions[i], index=i, max_new_tokens=6, eos_token_id=[])
    while not any(len(rows) == 2 for rows in engine.logits.values()) or engine.scheduler.waiting:
        engine.step()
    assert len(engine.scheduler.running) == 256
    late = engine.run(case.doc, only(questions, 256), new=4)
    assert_same_logits(late, case.run(only(questions, 256)))


@pytest.mark.parametrize("few", [1, 5])
def test_bits_do_not_depend_on_how_many_tokens_a_step_extends(case, few):
    questions = random_questions(3, longest=30)
    questions[0] = torch.randint(VOCAB_SIZE, (70,)).tolist()
    assert_same_logits(case.run(questions, max_extend_tokens=few), case.run(questions, max_extend_tokens=512))


def test_an_agent_that_is_preempted_and_resumed_has_the_same_bits(case, monkeypatch):
    # Two pages hold a question and 12 new tokens; four agents are let in, and then each wants a third page.
    questions = {i: torch.randint(VOCAB_SIZE, (20,)).tolist() for i in range(6)}
    expected = case.run(questions, new=20)
    tight = case.engine(pages=8)
    preempted = []
    preempt = tight.scheduler.preempt
    monkeypatch.setattr(tight.scheduler, "preempt", lambda: preempted.append(preempt()) or preempted[-1])
    found = tight.run(case.doc, questions, new=20)
    assert any(s.num_prompt < len(s.tokens) for s in preempted), "none lost what it had answered"
    assert_same_logits(found, expected)


@pytest.mark.parametrize("length", [SUFFIX_SEGMENT - 2, SUFFIX_SEGMENT + 6])
def test_a_suffix_that_crosses_a_segment_has_the_same_bits_alone_and_among_others(case, length):
    """The first one crosses by decode rows, the second by extend rows."""
    questions = random_questions(8)
    questions[3] = torch.randint(VOCAB_SIZE, (length,)).tolist()
    assert_same_logits(case.run(only(questions, 3)), case.run(questions))


def test_neighbours_that_wait_or_have_finished_change_no_bit(case):
    questions = random_questions(12)
    expected = case.run(only(questions, 5))
    assert_same_logits(case.run(questions, max_agents=3), expected)
    engine = case.engine()
    short = [engine.submit(case.doc, questions[i], index=i, max_new_tokens=1) for i in range(5)]
    found = engine.run(case.doc, only(questions, 5), new=4)
    assert all(request.answer is not None for request in short)
    assert_same_logits(found, expected)
    again = engine.run(case.doc, only(questions, 5), new=4)  # on pages that others have left
    assert_same_logits(again, expected)


def test_agents_of_other_documents_and_levels_change_no_bit(case):
    questions = random_questions(9, longest=12)
    child = kvkern.publish(case.model, None, list(range(40)), parent=case.doc)
    leaf = kvkern.publish(case.model, None, list(range(9, 99)), parent=child)
    other = kvkern.publish(case.model, None, list(range(200, 230)))
    nodes = [case.doc, leaf, other, child, leaf, case.doc, other, child, case.doc]
    engine = case.engine()
    for i, node in enumerate(nodes):
        engine.submit(node, questions[i], index=i, max_new_tokens=4, eos_token_id=[])
    while engine.scheduler.unfinished:
        engine.step()
    among = {i: torch.stack(rows) for i, rows in engine.logits.items()}
    for i, node in enumerate(nodes):
        assert_same_logits(case.engine().run(node, only(questions, i), new=4), among)
    for node in (leaf, child, other):
        node.release()


# -- d: any order ------------------------------------------------------------------------------------------------------


def test_agents_in_any_order_have_the_same_bits(case):
    questions = random_questions(20)
    order = random.sample(sorted(questions), len(questions))
    assert_same_logits(case.run(only(questions, *order)), case.run(questions))


def test_pages_and_slots_in_any_order_give_the_same_bits(case):
    questions = random_questions(20)
    engine = case.engine()
    random.shuffle(engine.pool._free)
    random.shuffle(engine.pool._free_slots)
    assert_same_logits(engine.run(case.doc, questions, new=4), case.run(questions))


def with_workers(workers: int) -> Any:
    make = kvkern.Plan.make
    return staticmethod(lambda pool, agents, **options: make(pool, agents, workers_per_node=workers, **options))


@pytest.mark.parametrize("workers", [2, 3])
def test_segments_on_any_worker_give_the_same_bits(case, monkeypatch, workers):
    questions = random_questions(10)
    expected = case.run(questions)
    monkeypatch.setattr(module.Plan, "make", with_workers(workers))
    assert_same_logits(case.run(questions), expected)


# -- controls of b and d: mistakes that show only in a batch -----------------------------------------------------------


class FollowsRows(nn.Linear):
    """A layer whose rounding follows the number of rows, as a GEMM's may: below 8 rows it sums in two halves."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] >= 8:
            return super().forward(x)
        half = self.in_features // 2
        return x[..., :half] @ self.weight[:, :half].T + x[..., half:] @ self.weight[:, half:].T


@pytest.fixture
def follower(case: Case) -> Case:
    """The case with such a layer; its document is read with it, too."""
    down = case.model.model.layers[0].mlp.down_proj
    made = FollowsRows(down.in_features, down.out_features, bias=False)
    made.weight = down.weight
    case.model.model.layers[0].mlp.down_proj = made
    return case


CAUGHT = r"logits\[\d+\]: \d+ of \d+ differ, first at"


def test_rows_are_kept_out_of_buckets_that_round_otherwise(follower):
    questions = random_questions(20)
    engine = follower.engine()
    assert 4 in engine.rounding.layers.outside and 4 not in engine.rounding.layers.buckets
    assert_same_logits(engine.run(follower.doc, only(questions, 3), new=4), follower.run(questions))


def test_control_a_row_bucket_outside_the_class_is_caught(follower, monkeypatch):
    questions = random_questions(20)
    measured = module.measure(follower.model)
    wrong = RoundingClass((4, *measured.layers.buckets), {})
    monkeypatch.setattr(module, "measure", lambda model: Rounding(**{**vars(measured), "layers": wrong}))
    with pytest.raises(AssertionError, match=CAUGHT):
        assert_same_logits(follower.run(only(questions, 3)), follower.run(questions))


def test_control_without_invariance_it_is_caught(follower):
    questions = random_questions(20)
    with pytest.raises(AssertionError, match=CAUGHT):
        assert_same_logits(follower.run(only(questions, 3), invariant=False), follower.run(questions, invariant=False))


def mask_off_by_one(backend: backends.Backend) -> backends.Backend:
    """In a batch a row does not see its own token."""

    def suffix(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, slot: Tensor, back: Tensor, *rest, **kw):
        return backend.suffix_attention(q, k, v, table, lens, slot, back + int(q.shape[0] > 8), *rest, **kw)

    return backend._replace(suffix_attention=suffix)


def segments_that_follow_the_batch(backend: backends.Backend) -> backends.Backend:
    """In a batch the segments are half as long."""

    def prefix(q: Tensor, node_table: Tensor, items: Tensor, path_table: Tensor, **options: Any) -> plain.State:
        if q.shape[0] > 8:
            node_table, items = node_table.clone(), items.clone()
            node_table[:, 3] //= 2
            items[:, 4] = -(-node_table[items[:, 0].long(), 1] // node_table[items[:, 0].long(), 3].clamp(min=1))
        return backend.prefix_attention(q, node_table, items, path_table, **options)

    return backend._replace(prefix_attention=prefix)


@pytest.mark.parametrize("mistake", [mask_off_by_one, segments_that_follow_the_batch, fold_from_the_right])
def test_control_a_mistake_in_the_batch_is_caught(
    case, monkeypatch, mistake: Callable[[backends.Backend], backends.Backend]
):
    questions = random_questions(20)
    alone = case.run(only(questions, 3))
    wrong = mistake(backends.choose(case.backend, "cpu"))
    monkeypatch.setattr(backends, "choose", lambda name, device: wrong)
    if mistake is fold_from_the_right:
        monkeypatch.setattr(module.Plan, "make", with_workers(3))
    with pytest.raises(AssertionError, match=CAUGHT):
        assert_same_logits(alone, case.run(questions))


# -- c: against transformers from scratch ------------------------------------------------------------------------------


def from_scratch(case: Case, questions: Sequence[list[int]], new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the engine, of transformers in fp64, and of transformers' eager attention in the model's own dtype.

    The same tokens for all: those that the engine chose.
    """
    logits = case.run(dict(enumerate(questions)), new=new)
    found = torch.cat([logits[i] for i in range(len(questions))])
    document = case.doc.token_ids.tolist()
    whole = [document + q + logits[i].argmax(-1).tolist()[:-1] for i, q in enumerate(questions)]
    exact, own = twin(case.model, "eager", dtype=torch.float64), twin(case.model, "eager")
    reference, plain = (torch.cat([scratch_logits(m, ids, last=new) for ids in whole]) for m in (exact, own))
    return found, reference, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_reuse_is_as_exact_as_transformers_from_scratch(seed, backend, kind, dtype):
    case = make_case(backend, kind=kind, dtype=dtype, tokens=1100)
    questions = list(random_questions(3).values())
    assert_exact(*from_scratch(case, questions, new=8), "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_control_a_question_one_position_off_is_not_as_exact(seed, dtype, monkeypatch):
    case = make_case("cpu", dtype=dtype, tokens=1100)
    questions = list(random_questions(3).values())
    monkeypatch.setattr(kvkern.Document, "end", property(lambda self: self.position + self.tokens - 1))
    with pytest.raises(AssertionError, match=r"logits: (max|mean) error"):
        assert_exact(*from_scratch(case, questions, new=8), "logits")
