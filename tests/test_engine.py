"""The engine: answers as from scratch, streams, ends and limits, trees, and what happens when things go wrong. Nothing leaks."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import QUESTIONS, TEXT, conversation, scratch_answer, tiny_model, tiny_tokenizer, twin
from transformers import GenerationConfig

import kvkern
from kvkern import engine as module
from kvkern.engine import Answer, Engine
from kvkern.errors import (
    BackendError,
    CapacityError,
    IdentityError,
    KvkernError,
    ReadOnlyError,
    RequestError,
    ShapeError,
    TemplateError,
    UnsupportedError,
)
from kvkern.geometry import PAGE
from kvkern.identity import model_geometry
from kvkern.linear import RoundingClass

NEW = 6
"""Tokens of an answer, where a test does not say."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def reference(model) -> Any:
    return twin(model)


@pytest.fixture
def doc(model, tokenizer) -> Iterator[kvkern.Document]:
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        yield doc
        assert doc.references == 1, "an engine holds the document"


@pytest.fixture
def engine(model, tokenizer) -> Iterator[Engine]:
    engine = Engine(model, tokenizer, memory_bytes=4 << 20, debug=True)
    yield engine
    assert_nothing_held(engine)


def small(model: Any, tokenizer: Any, *, pages: int, **options: Any) -> Engine:
    """An engine with so many pages."""
    memory_bytes = pages * PAGE * model_geometry(model).token_bytes()
    engine = Engine(model, tokenizer, memory_bytes=memory_bytes, **{"debug": True, **options})
    assert engine.pool.num_pages == pages
    return engine


def assert_nothing_held(engine: Engine) -> None:
    pool = engine.pool
    assert (pool.free_pages, pool.free_slots) == (pool.num_pages, pool.slots)
    assert not any(pool.references(page) for page in range(pool.num_pages))
    assert not engine._requests and not engine.scheduler.unfinished and not engine._plans


def tokens(answers: Any) -> list[list[int]]:
    return [list(answer.token_ids) for answer in answers]


def ask(engine: Engine, doc: kvkern.Document, questions: Any = QUESTIONS, **options: Any) -> list[Answer]:
    return list(engine.ask(doc, questions, ordered=True, **{"max_new_tokens": NEW, **options}))


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_answers_are_transformers_from_scratch(tokenizer, kind, chat, backend):
    model = tiny_model(kind, num_key_value_heads=1 if chat else 2)
    doc = kvkern.publish(model, tokenizer, TEXT, chat=chat)
    if chat:
        whole = [conversation(tokenizer, TEXT, question) for question in QUESTIONS]
    else:
        whole = [tokenizer(TEXT + question)["input_ids"] for question in QUESTIONS]
    engine = Engine(
        model, tokenizer, max_agents=3, max_extend_tokens=16, memory_bytes=1 << 20, backend=backend, debug=True
    )
    answers = ask(engine, doc, eos_token_id=[])
    reference = twin(model)
    assert tokens(answers) == [scratch_answer(reference, ids, NEW) for ids in whole]
    for answer, ids in zip(answers, whole, strict=True):
        assert (answer.cached_tokens, answer.prompt_tokens) == (doc.tokens, len(ids) - doc.tokens)
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert (answer.finish_reason, answer.error) == ("length", None)
    assert_nothing_held(engine)


def test_control_a_document_whose_values_changed_gives_other_answers(model, tokenizer, doc, engine, reference):
    whole = [conversation(tokenizer, TEXT, question) for question in QUESTIONS]
    other = kvkern.publish(model, tokenizer, TEXT.replace("pump", "lamp"))
    assert tokens(ask(engine, doc)) == [scratch_answer(reference, ids, NEW) for ids in whole]
    assert all(a != b for a, b in zip(tokens(ask(engine, other)), tokens(ask(engine, doc)), strict=True))


def test_answers_come_as_they_end_or_in_order(doc, engine):
    stop = [int(ask(engine, doc, QUESTIONS[7:])[0].token_ids[1])]
    options = dict(max_new_tokens=NEW, eos_token_id=stop)
    free = list(engine.ask(doc, QUESTIONS, **options))
    assert sorted(a.index for a in free) == list(range(8)) and [a.index for a in free] != list(range(8))
    assert free[0].finish_reason == "stop" and free[0].token_ids[-1] in stop
    in_order = list(engine.ask(doc, QUESTIONS, ordered=True, **options))
    assert in_order == sorted(free, key=lambda a: a.index)


def test_token_ids_are_questions_too(doc, engine):
    given = doc.encode_ids(QUESTIONS[:3])
    expected = tokens(ask(engine, doc, QUESTIONS[:3]))
    assert tokens(ask(engine, doc, given)) == expected
    assert tokens(ask(engine, doc, [torch.tensor(ids) for ids in given])) == expected


def test_conversations_are_questions_too(model, tokenizer, doc, engine):
    turns = [("user", "What starts?"), ("assistant", "The pump."), ("user", "And then?")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    answers = list(engine.ask(doc, [conversation, "Why?", conversation[:1]], ordered=True, max_new_tokens=6))
    messages = [{"role": "system", "content": TEXT}, *conversation]
    for answer, length in ((answers[0], 4), (answers[2], 2)):
        ids = tokenizer.apply_chat_template(messages[:length], add_generation_prompt=True, return_dict=False)
        assert list(answer.token_ids) == scratch_answer(twin(model), ids, len(answer.token_ids))
    assert answers[0].token_ids != answers[2].token_ids


def test_template_keywords_of_a_question_go_along(model, tokenizer, doc, engine, reference):
    whole = conversation(tokenizer, TEXT, QUESTIONS[1], mood="sad")
    answers = ask(engine, doc, QUESTIONS[1:2], template_kwargs={"mood": "sad"})
    assert tokens(answers) == [scratch_answer(reference, whole, NEW)]


def test_submit_and_step_answer_like_ask(doc, engine):
    requests = [engine.submit(doc, question, index=i, max_new_tokens=NEW) for i, question in enumerate(QUESTIONS)]
    while any(request.answer is None for request in requests):
        engine.step()
    assert [request.answer for request in requests] == ask(engine, doc)
    engine.step()  # with nobody there


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stop_strings": ["3", "T"]}, {"do_sample": True, "temperature": 1.5}])
def test_the_pieces_of_a_stream_are_the_text(doc, engine, options):
    pieces: dict[int, str] = dict.fromkeys(range(8), "")
    ended: dict[int, Answer] = {}
    for delta in engine.stream(doc, QUESTIONS, max_new_tokens=16, **options):
        assert delta.index not in ended and (delta.text or delta.answer)
        pieces[delta.index] += delta.text
        if delta.answer:
            ended[delta.index] = delta.answer
    answers = ask(engine, doc, max_new_tokens=16, **options)
    assert [ended[i] for i in range(8)] == answers
    assert list(pieces.values()) == [answer.text for answer in answers]


def test_a_stream_gives_text_before_the_end(doc, engine):
    deltas = list(engine.stream(doc, QUESTIONS[:1], max_new_tokens=16))
    assert len(deltas) > 4 and all(delta.answer is None for delta in deltas[:-1])


def test_several_iterators_take_turns_on_one_engine(model, tokenizer, doc, engine):
    other = kvkern.publish(model, tokenizer, TEXT, mood="glad")
    expected = tokens(ask(engine, doc)), tokens(ask(engine, other))
    a = engine.ask(doc, QUESTIONS, max_new_tokens=NEW, ordered=True)
    b = engine.ask(other, QUESTIONS, max_new_tokens=NEW, ordered=True)
    request = engine.submit(doc, QUESTIONS[0], max_new_tokens=NEW)
    first = [next(a), next(b)]
    rest_b, rest_a = list(b), list(a)  # b runs to its end while a waits
    assert (tokens([first[0], *rest_a]), tokens([first[1], *rest_b])) == expected
    assert request.answer is not None and list(request.answer.token_ids) == expected[0][0]


def test_questions_are_read_only_as_far_as_needed(model, tokenizer, doc):
    engine = Engine(model, tokenizer, max_agents=3)
    read: list[int] = []

    def many() -> Iterator[str]:
        for n in range(1000):
            read.append(n)
            yield QUESTIONS[n % 8]

    answers = engine.ask(doc, many(), max_new_tokens=4)
    assert read == []
    for n, _ in enumerate(itertools.islice(answers, 10), start=1):
        assert len(read) <= n + 6
    answers.close()
    assert_nothing_held(engine)
    read.clear()
    for answer in itertools.islice(engine.ask(doc, many(), max_new_tokens=0), 4):
        assert answer.token_ids == () and len(read) <= 8


# -- ends --------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_eos_and_holds_it(doc, engine, reference, tokenizer):
    free = ask(engine, doc)
    eos = free[0].token_ids[3]
    answers = ask(engine, doc, eos_token_id=[eos, 9999])
    for answer, long in zip(answers, free, strict=True):
        cut = long.token_ids.index(eos) + 1 if eos in long.token_ids else NEW
        assert answer.token_ids == long.token_ids[:cut]
        assert answer.finish_reason == ("stop" if eos in long.token_ids else "length")
    assert answers[0].finish_reason == "stop"


def test_the_tokenizers_eos_ends_an_answer_unless_told_otherwise(doc, engine, model, tokenizer):
    assert model.generation_config.eos_token_id is None
    assert engine._params(None, {"max_new_tokens": 1}).eos_token_ids == {tokenizer.eos_token_id}
    assert engine._params(None, {"max_new_tokens": 1, "eos_token_id": []}).eos_token_ids == frozenset()
    assert engine._params(None, {"max_new_tokens": 1, "eos_token_id": 5}).eos_token_ids == {5}
    given = GenerationConfig(eos_token_id=[5, 6])
    assert engine._params(given, {"max_new_tokens": 1}).eos_token_ids == {5, 6}


def test_an_answer_ends_before_a_stop_string(doc, engine):
    free = ask(engine, doc, max_new_tokens=16)[1]
    stop = free.text[2:4]
    answer = ask(engine, doc, max_new_tokens=16, stop_strings=[stop])[1]
    assert answer.text == free.text[: free.text.index(stop)] and answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < len(free.token_ids)


@pytest.mark.parametrize("new", [0, 1])
def test_an_answer_of_no_or_one_token(doc, engine, new):
    free, steps = ask(engine, doc), engine.steps
    answers = ask(engine, doc, max_new_tokens=new)
    assert [a.token_ids for a in answers] == [a.token_ids[:new] for a in free]
    assert all(a.finish_reason == "length" for a in answers)
    if new == 0:
        assert engine.steps - steps <= len(QUESTIONS) and all(a.text == "" for a in answers)


# -- sampling and configs ----------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_tokens_whatever_the_batch(model, tokenizer, doc, engine):
    options = dict(do_sample=True, temperature=1.2, top_k=40)
    together = tokens(ask(engine, doc, seed=5, **options))
    alone = [tokens(ask(engine, doc, [question], seed=5 + i, **options))[0] for i, question in enumerate(QUESTIONS)]
    assert together == alone
    few = Engine(model, tokenizer, max_agents=2, max_extend_tokens=3)
    assert tokens(ask(few, doc, seed=5, **options)) == together
    assert tokens(ask(engine, doc, seed=6, **options)) != together


def test_control_greedy_does_not_depend_on_the_seed(doc, engine):
    assert tokens(ask(engine, doc, seed=1)) == tokens(ask(engine, doc, seed=2))


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_counts_the_documents_tokens(tokenizer, doc, engine, reference, penalty):
    whole = [conversation(tokenizer, TEXT, question) for question in QUESTIONS[:4]]
    expected = [scratch_answer(reference, ids, NEW, repetition_penalty=penalty) for ids in whole]
    assert tokens(ask(engine, doc, QUESTIONS[:4], repetition_penalty=penalty)) == expected
    assert tokens(ask(engine, doc, QUESTIONS[:4])) != expected


def test_a_generation_config_is_honoured_and_options_come_first(doc, engine, model):
    config = GenerationConfig(max_new_tokens=5, repetition_penalty=1.3, eos_token_id=3)
    before = copy.deepcopy(config)
    found = list(engine.ask(doc, QUESTIONS, generation_config=config, ordered=True))
    assert found == ask(engine, doc, max_new_tokens=5, repetition_penalty=1.3, eos_token_id=3)
    assert {len(a.token_ids) for a in engine.ask(doc, QUESTIONS, generation_config=config, max_new_tokens=2)} <= {1, 2}
    assert config == before


def test_the_models_own_config_fills_in(tokenizer):
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.eos_token_id = 3
    doc, engine = kvkern.publish(model, tokenizer, TEXT), Engine(model, tokenizer)
    params = engine._params(None, {"max_new_tokens": 4})
    assert (params.repetition_penalty, params.eos_token_ids) == (1.3, {3})
    assert tokens(ask(engine, doc)) != tokens(ask(engine, doc, repetition_penalty=1.0))


REFUSED_OPTIONS = {
    "num_beams": (UnsupportedError, {"num_beams": 4}),
    "no_repeat_ngram_size": (UnsupportedError, {"no_repeat_ngram_size": 3}),
    "min_new_tokens": (UnsupportedError, {"min_new_tokens": 3}),
    "max_new_tokens": (RequestError, {"max_new_tokens": -1}),
    "temperature": (RequestError, {"temperature": 0.0}),
    "seed": (RequestError, {"seed": -1}),
    "cheese": (UnsupportedError, {"cheese": 1}),
}


@pytest.mark.parametrize("field", REFUSED_OPTIONS)
def test_a_bad_option_is_refused_before_the_first_question(doc, engine, field):
    kind, options = REFUSED_OPTIONS[field]
    options = {"max_new_tokens": 4, "do_sample": True, **options}
    for use in (engine.ask, engine.stream):
        if field == "seed":
            answers = list(use(doc, ["Why?"], **options))
            error = (answers[0].answer if use == engine.stream else answers[0]).error
            assert isinstance(error, kind) and error.field == field
            continue
        with pytest.raises(kind) as caught:
            use(doc, iter(()), **options)
        assert caught.value.field == field
    with pytest.raises(kind):
        engine.submit(doc, "Why?", **options)
    with pytest.raises(RequestError, match="max_new_tokens: found none"):
        engine.ask(doc, ["Why?"])


# -- several documents -------------------------------------------------------------------------------------------------


def test_several_documents_and_three_levels_in_one_step(model, tokenizer, engine, reference):
    def turn(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Part {n}?"}, {"role": "assistant", "content": "Yes, " * n}]

    nodes = {"a": (kvkern.publish(model, tokenizer, TEXT), TEXT, [])}
    nodes["b"] = (kvkern.publish(model, tokenizer, "A shorter one."), "A shorter one.", [])
    for name, above, n in (("a1", "a", 1), ("a2", "a", 2), ("a11", "a1", 3), ("a12", "a1", 4), ("b1", "b", 1)):
        parent, text, turns = nodes[above]
        nodes[name] = (kvkern.publish(model, tokenizer, turn(n), parent=parent), text, turns + turn(n))
    asked = [(name, question) for question in QUESTIONS[:2] for name in ("a12", "b", "a", "a11", "b1", "a2", "a1")]
    requests = [engine.submit(nodes[name][0], question, max_new_tokens=6) for name, question in asked]
    widest = 0
    while any(request.answer is None for request in requests):
        engine.step()
        widest = max(widest, len(engine.scheduler.running))
    assert widest == len(asked)
    for request, (name, question) in zip(requests, asked, strict=True):
        whole = conversation(tokenizer, nodes[name][1], question, nodes[name][2])
        assert list(request.answer.token_ids) == scratch_answer(reference, whole, 6), name
        assert request.answer.cached_tokens == nodes[name][0].end
    for name in reversed(nodes):
        nodes[name][0].release()
    assert all(node.released for node, _, _ in nodes.values())


def test_a_document_may_be_released_while_it_is_asked(model, tokenizer, engine):
    doc = kvkern.publish(model, tokenizer, TEXT)
    expected = tokens(ask(engine, doc))
    answers = engine.ask(doc, QUESTIONS, max_new_tokens=NEW, ordered=True)
    found = [next(answers)]
    doc.release()
    assert not doc.released
    assert tokens(found + list(answers)) == expected
    assert doc.released


def test_an_idle_engine_keeps_no_document_in_memory(model, tokenizer, engine):
    doc = kvkern.publish(model, tokenizer, TEXT)
    ask(engine, doc, QUESTIONS[:2], max_new_tokens=2)
    block, weak = weakref.ref(doc.block().untyped_storage()), weakref.ref(doc)
    doc.release()
    del doc
    gc.collect()
    assert weak() is None and block() is None


# -- cancelling --------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_ends_and_the_others_go_on(doc, engine):
    expected = tokens(ask(engine, doc))
    requests = [engine.submit(doc, question, max_new_tokens=NEW) for question in QUESTIONS]
    waiting = engine.submit(doc, "Why?", max_new_tokens=NEW)
    engine.cancel(waiting)
    assert waiting.answer.finish_reason == "cancelled" and waiting.answer.token_ids == ()
    for _ in range(5):
        engine.step()
    pages = engine.pool.free_pages
    engine.cancel(requests[2])
    assert engine.pool.free_pages > pages
    answer = requests[2].answer
    assert answer.finish_reason == "cancelled" and 0 < len(answer.token_ids) < NEW
    assert list(answer.token_ids) == expected[2][: len(answer.token_ids)]
    engine.cancel(requests[2])
    assert requests[2].answer is answer
    while engine.scheduler.unfinished:
        engine.step()
    rest = [i for i in range(8) if i != 2]
    assert [list(requests[i].answer.token_ids) for i in rest] == [expected[i] for i in rest]
    engine.cancel(requests[0])
    assert requests[0].answer.finish_reason == "length"


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("way", ["ask", "stream", "ordered"])
def test_closing_an_iterator_gives_back_pages_and_references(doc, engine, way, after):
    options = dict(max_new_tokens=NEW, eos_token_id=[])
    answers: Any = engine.stream(doc, QUESTIONS, **options) if way == "stream" else None
    answers = answers or engine.ask(doc, QUESTIONS, ordered=way == "ordered", **options)
    for _ in range(after):
        next(answers)
    assert (doc.references > 1) == (after > 0)
    answers.close()
    assert doc.references == 1
    assert_nothing_held(engine)
    assert len(ask(engine, doc)) == 8


def test_an_iterator_that_is_dropped_gives_everything_back(doc, engine):
    answers = engine.ask(doc, QUESTIONS * 2, max_new_tokens=NEW)
    next(answers)
    del answers
    gc.collect()
    assert doc.references == 1
    assert_nothing_held(engine)


def test_questions_that_raise_end_the_iterator_and_leave_nothing(doc, engine):
    def questions() -> Iterator[str]:
        yield QUESTIONS[0]
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        list(engine.ask(doc, questions(), max_new_tokens=4))
    assert doc.references == 1
    assert_nothing_held(engine)


# -- what is refused, while others go on -------------------------------------------------------------------------------

BAD_QUESTIONS = {
    "empty": ("", RequestError, "question"),
    "blank": (" \n", RequestError, "question"),
    "no tokens": ([], RequestError, "question"),
    "unknown": ([1, 320], RequestError, "question token_ids[1]"),
    "negative": ([-1], RequestError, "question token_ids[0]"),
    "nothing": (None, RequestError, "question"),
    "a number": (7, RequestError, "question"),
    "floats": ([1.5], RequestError, "question"),
    "words": (["Why", "not"], RequestError, "question"),
    "too long": ("x" * 5000, CapacityError, "question"),
    "too long for an answer": (None, CapacityError, "max_new_tokens"),
}


@pytest.mark.parametrize("kind", BAD_QUESTIONS)
def test_a_refused_question_is_an_answer_with_its_error(doc, engine, kind):
    question, error, field = BAD_QUESTIONS[kind]
    if kind == "too long for an answer":
        question = [5] * (4096 - doc.end - 1)
    answers = ask(engine, doc, [QUESTIONS[0], question, QUESTIONS[1]], max_new_tokens=2)
    good = tokens(ask(engine, doc, QUESTIONS[:2], max_new_tokens=2))
    assert [list(answers[i].token_ids) for i in (0, 2)] == good
    refused = answers[1]
    assert (refused.index, refused.finish_reason, refused.text, refused.token_ids) == (1, "error", "", ())
    assert type(refused.error) is error and refused.error.field == field and refused.error.do
    with pytest.raises(error):
        engine.submit(doc, question, max_new_tokens=2)
    assert engine.scheduler.unfinished == 0


def test_a_template_keyword_that_breaks_the_template_is_an_error_of_the_question(doc, engine):
    answer = ask(engine, doc, ["Why?"], template_kwargs={"chat_template": "{{ messages | length }}{{ date }}"})[0]
    assert isinstance(answer.error, TemplateError)


def test_a_question_too_long_for_the_pages_is_refused_and_others_go_on(model, tokenizer, doc):
    engine = small(model, tokenizer, pages=4)
    answers = ask(engine, doc, ["Why?", [5] * 60, "Who?"], max_new_tokens=6)
    assert [a.finish_reason for a in answers] == ["length", "error", "length"]
    assert answers[1].error.field == "pages of one agent" and "5 for 60" in answers[1].error.found
    assert_nothing_held(engine)


def test_a_pool_too_small_for_one_page_or_one_agent_is_refused(model, tokenizer, doc):
    with pytest.raises(CapacityError) as caught:
        Engine(model, tokenizer, memory_bytes=100)
    assert caught.value.field == "memory_bytes" and "one page" in caught.value.needed
    engine = small(model, tokenizer, pages=1)
    answers = ask(engine, doc, max_new_tokens=4)
    assert {a.error.field for a in answers} == {"pages of one agent"}
    assert_nothing_held(engine)
    assert len(ask(engine, doc, [[5, 6]], max_new_tokens=4)[0].token_ids) == 4


@pytest.mark.parametrize("name", ["max_agents", "max_extend_tokens", "max_queue"])
def test_a_limit_below_one_is_refused(model, tokenizer, name):
    with pytest.raises(RequestError) as caught:
        Engine(model, tokenizer, **{name: 0})
    assert caught.value.field == name


def test_a_backend_or_tokenizer_that_cannot_serve_is_refused(model, tokenizer):
    with pytest.raises(BackendError, match="backend: found fast"):
        Engine(model, tokenizer, backend="fast")
    with pytest.raises(UnsupportedError, match="tokenizer: found NoneType"):
        Engine(model, None)


def test_a_document_of_another_model_or_tokenizer_is_refused(model, tokenizer, doc, engine):
    other_tokenizer = tiny_tokenizer()
    other_tokenizer.add_tokens(["<more>"])
    for made_by, words, kind, field in (
        (tiny_model(seed=1), tokenizer, IdentityError, "document.weights"),
        (tiny_model(num_hidden_layers=1), tokenizer, ShapeError, "document.geometry"),
        (model, other_tokenizer, IdentityError, "document.tokenizer"),
    ):
        stranger = kvkern.publish(made_by, words, TEXT)
        for use in (engine.ask, engine.stream):
            with pytest.raises(kind) as caught:
                use(stranger, ["Why?"], max_new_tokens=1)
            assert caught.value.field == field and caught.value.do
        with pytest.raises(kind):
            engine.submit(stranger, "Why?", max_new_tokens=1)
        assert stranger.references == 1
    assert len(ask(engine, doc)) == 8


def test_weights_that_change_under_the_engine_are_seen(tokenizer):
    model = tiny_model()
    doc, engine = kvkern.publish(model, tokenizer, TEXT), Engine(model, tokenizer)
    assert len(ask(engine, doc, QUESTIONS[:1])) == 1
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(IdentityError, match=r"document\.weights"):
        engine.ask(doc, ["Why?"], max_new_tokens=1)


def test_a_full_queue_refuses_and_the_engine_goes_on(model, tokenizer, doc):
    engine = Engine(model, tokenizer, max_agents=1, max_queue=2)
    requests = [engine.submit(doc, question, max_new_tokens=4) for question in QUESTIONS[:2]]
    references = doc.references
    with pytest.raises(CapacityError) as caught:
        engine.submit(doc, QUESTIONS[2], max_new_tokens=4)
    assert (caught.value.field, caught.value.found) == ("queue", "2 waiting") and doc.references == references
    engine.step()
    requests.append(engine.submit(doc, QUESTIONS[2], max_new_tokens=4))
    while engine.scheduler.unfinished:
        engine.step()
    expected = tokens(ask(engine, doc, max_new_tokens=4))  # more questions than the queue holds
    assert [list(r.answer.token_ids) for r in requests] == expected[:3]
    assert_nothing_held(engine)


# -- pages run out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [8, 11])
def test_preemption_changes_no_token_and_loses_no_page(model, tokenizer, doc, engine, monkeypatch, pages):
    expected = tokens(ask(engine, doc, max_new_tokens=30, eos_token_id=[]))
    tight = small(model, tokenizer, pages=pages)
    preempted = []
    preempt = tight.scheduler.preempt
    monkeypatch.setattr(tight.scheduler, "preempt", lambda: preempted.append(preempt()) or preempted[-1])
    assert tokens(ask(tight, doc, max_new_tokens=30, eos_token_id=[])) == expected
    assert preempted and max(s.preemptions for s in preempted) >= 1
    assert_nothing_held(tight)


def test_preemption_changes_no_sample(model, tokenizer, doc, engine):
    options = dict(max_new_tokens=18, eos_token_id=[], do_sample=True, temperature=1.5, repetition_penalty=1.2)
    expected = tokens(ask(engine, doc, **options))
    tight = small(model, tokenizer, pages=7)
    assert tokens(ask(tight, doc, **options)) == expected
    assert_nothing_held(tight)


def test_poisoned_pages_change_nothing(model, tokenizer, doc):
    found = []
    for debug in (False, True):
        engine = small(model, tokenizer, pages=12, debug=debug)
        found.append(tokens(ask(engine, doc, max_new_tokens=16, eos_token_id=[])))
        assert engine.pool.pages.isnan().all().item() is debug
    assert found[0] == found[1]


# -- errors inside a step ----------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


OURS = UnsupportedError("x", found=1, needed=2, do="3")


@pytest.mark.parametrize(
    "error, where",
    [(Broken(), "forward"), (KeyboardInterrupt(), "forward"), (OURS, "forward"), (Broken(), "choose"), (OURS, "plan")],
)
def test_an_error_inside_a_step_loses_no_page_and_the_engine_goes_on(doc, monkeypatch, error, where):
    """It reaches whoever steps; his questions are cancelled, those of others are answered later, to the same tokens."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    engine = Engine(model, tokenizer, max_agents=5, memory_bytes=1 << 20, debug=True)
    expected = tokens(ask(engine, doc))
    other = engine.submit(doc, QUESTIONS[0], max_new_tokens=NEW)
    calls = itertools.count()

    def failing(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 3:
                raise error
            return call(*args, **kwargs)

        return run

    target, name = {
        # After it the second layer's keys are not written, and pages are full of NaN.
        "forward": (model.model.layers[0].mlp, "forward"),
        "choose": (module.TextStream, "push"),
        "plan": (kvkern.Plan, "begin"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing(getattr(target, name)))
        with pytest.raises(type(error)):
            ask(engine, doc)
    assert list(engine._requests.values()) == [other] and doc.references == 2
    assert tokens(ask(engine, doc)) == expected
    assert list(other.answer.token_ids) == expected[0]
    assert_nothing_held(engine)


def test_logits_that_cannot_be_sampled_end_their_request_alone(doc, engine, monkeypatch):
    expected = tokens(ask(engine, doc, do_sample=True))
    choose = Engine._choose

    def poisoned(self: Engine, requests: Any, logits: torch.Tensor) -> None:
        for row, request in enumerate(requests):
            if request.index == 2 and len(request.new_tokens) == 4:
                logits[row] = float("nan")
        choose(self, requests, logits)

    monkeypatch.setattr(Engine, "_choose", poisoned)
    answers = ask(engine, doc, do_sample=True)
    assert answers[2].finish_reason == "error" and answers[2].error.field == "logits"
    assert list(answers[2].token_ids) == expected[2][:4]
    assert [tokens(answers)[i] for i in range(8) if i != 2] == [expected[i] for i in range(8) if i != 2]


def test_a_document_released_under_its_agents_ends_them_alone(model, tokenizer, doc, engine):
    expected = tokens(ask(engine, doc))
    lost = kvkern.publish(model, tokenizer, TEXT, mood="glad")
    theirs = [engine.submit(lost, question, max_new_tokens=NEW) for question in QUESTIONS[:3]]
    mine = [engine.submit(doc, question, max_new_tokens=NEW) for question in QUESTIONS]
    for _ in range(3):
        engine.step()
    while not lost.released:
        lost.release()
    engine.submit(doc, "Why?", max_new_tokens=1)  # another set of agents, hence another plan
    while engine.scheduler.unfinished:
        engine.step()
    assert all(r.answer.finish_reason == "error" and isinstance(r.answer.error, ReadOnlyError) for r in theirs)
    assert [list(r.answer.token_ids) for r in mine] == expected


# -- rounding classes --------------------------------------------------------------------------------------------------


def test_a_class_of_one_bucket_runs_a_step_as_several_forwards(model, tokenizer, doc, engine, monkeypatch):
    expected = tokens(ask(engine, doc))
    measured = module.measure(model)
    only = RoundingClass((4,), {8: "for this test"})
    monkeypatch.setattr(
        module, "measure", lambda model: type(measured)(**{**vars(measured), "layers": only, "head": only})
    )
    narrow = Engine(model, tokenizer)
    shapes = set()
    hook = model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: shapes.add(tuple(args[0].shape[:2])))
    try:
        assert tokens(ask(narrow, doc)) == expected
    finally:
        hook.remove()
    assert shapes == {(1, 4)} and narrow.scheduler.chunk == 4


def test_every_forward_has_the_rows_of_a_measured_bucket(model, tokenizer, doc):
    engine = Engine(model, tokenizer, max_agents=6, max_extend_tokens=20)
    rows, heads = set(), set()
    hooks = [
        model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: rows.add(args[0].shape[1])),
        model.lm_head.register_forward_hook(lambda m, args, out: heads.add(args[0].shape[1])),
    ]
    try:
        ask(engine, doc)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(rows) > 1 and rows <= set(engine.rounding.layers.buckets)
    assert heads <= set(engine.rounding.head.buckets)


def test_describe_says_what_the_engine_has(model, tokenizer):
    engine = small(model, tokenizer, pages=12, max_agents=7)
    said = engine.describe()
    assert (said["pages"], said["suffix_tokens"], said["max_agents"]) == (12, 192, 7)
    assert said["memory_bytes"] == engine.pool.pages.numel() * 4
    assert said["rounding"]["row_buckets"] == list(engine.rounding.layers.buckets)
    assert "not measured" in Engine(model, tokenizer, invariant=False).describe()["rounding"]


def test_without_invariance_answers_are_transformers_too(model, tokenizer, doc, reference):
    engine = Engine(model, tokenizer, invariant=False)
    whole = [conversation(tokenizer, TEXT, question) for question in QUESTIONS]
    assert tokens(ask(engine, doc)) == [scratch_answer(reference, ids, NEW) for ids in whole]


def test_every_error_of_an_answer_is_a_kvkern_error(doc, engine):
    answers = ask(engine, doc, ["", "Why?", [999]])
    assert [isinstance(a.error, KvkernError) for a in answers] == [True, False, True]
