"""From a text to a published document: the KV that transformers would hold, the tokens that its template makes, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_exact, assert_same_bits
from models import CHATML, QUESTIONS, TEXT, conversation, scratch_answer, tiny_model, tiny_tokenizer, twin
from transformers import DynamicCache

import kvkern
from kvkern.errors import (
    CapacityError,
    IdentityError,
    KvkernError,
    ReadOnlyError,
    RequestError,
    ShapeError,
    TemplateError,
)
from kvkern.publish import Document

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def doc(model, tokenizer):
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        yield doc


def refused(kind: type[KvkernError], field: str, *args: Any, **options: Any) -> KvkernError:
    with pytest.raises(kind) as caught:
        kvkern.publish(*args, **options)
    assert caught.value.field == field and caught.value.do
    return caught.value


# -- the KV ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transformers_kv(model: Any, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [num_kv_heads, tokens, head_dim], after a prefill by transformers."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([ids]), past_key_values=cache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_the_kv_is_what_transformers_own_cache_holds(tokenizer, kind, chunk):
    model = tiny_model(kind, seed=torch.randint(1000, ()).item())
    doc = kvkern.publish(model, tokenizer, TEXT, chunk=chunk)
    ids = doc.token_ids.tolist()
    reference = transformers_kv(twin(model, dtype=torch.float64), ids)
    own = transformers_kv(twin(model), ids)
    for layer, (exact, sdpa) in enumerate(zip(reference, own, strict=True)):
        for name, found, needed, plain in zip("KV", (doc.key(layer), doc.value(layer)), exact, sdpa, strict=True):
            assert_exact(found, needed, plain, f"{name} of layer {layer}")
    block = doc.block()[:, :, :, doc.tokens :]
    assert block.shape[3] == doc.padded_tokens - doc.tokens > 0 and not block.any()
    assert doc.provenance["prefill_chunk"] == chunk


def test_control_a_document_one_token_further_on_is_another(model, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    doc = kvkern.publish(model, tokenizer, ids)
    keys = transformers_kv(twin(model, dtype=torch.float64), ids[1:])[0][0]
    with pytest.raises(AssertionError, match="max error"):
        assert_exact(doc.key(0)[:, 1:], keys, keys.float(), "K")


def test_the_same_document_is_the_same_bits(model, tokenizer):
    a, b = (kvkern.publish(model, tokenizer, TEXT) for _ in range(2))
    assert_same_bits(a.block(), b.block(), "kv")
    assert a.identity == b.identity and a.block().data_ptr() != b.block().data_ptr()


def test_progress_is_said_after_every_chunk(model, tokenizer):
    said: list[tuple[int, int]] = []
    doc = kvkern.publish(model, tokenizer, list(range(100, 150)), chunk=20, progress=lambda *n: said.append(n))
    assert said == [(20, 50), (40, 50), (50, 50)] and doc.tokens == 50


# -- the tokens --------------------------------------------------------------------------------------------------------


def test_a_chat_document_is_exactly_its_system_message(doc, tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "system", "content": TEXT}], return_dict=False)
    assert doc.token_ids.tolist() == ids and doc.wording.chat


def test_a_question_is_the_tail_of_the_whole_conversation(doc, tokenizer):
    for question, suffix in zip(QUESTIONS, doc.encode_ids(QUESTIONS), strict=True):
        assert doc.token_ids.tolist() + suffix == conversation(tokenizer, TEXT, question)


HABITS = [
    {"padding_side": "right"},
    {"padding_side": "left", "pad_token": None},
    {"pad_token": None, "eos_token": None},
    {"bos_token": "<|endoftext|>", "add_bos_token": True},
    {"pad_token": "<|no row in the model|>"},
]


@pytest.mark.parametrize("habits", HABITS, ids=lambda h: ", ".join(h))
def test_encode_pads_on_the_left_whatever_the_tokenizers_habits(model, doc, habits):
    tokenizer = tiny_tokenizer(**habits)
    if "no row" in str(tokenizer.pad_token):
        tokenizer.add_tokens([f"<{i}>" for i in range(100)])
        tokenizer.pad_token = "<99>"
    tokenizer(
        ["a", "a b c"], padding=tokenizer.pad_token is not None, truncation=True, max_length=2
    )  # leaves its state
    other = kvkern.publish(model, tokenizer, TEXT)
    assert other.token_ids.tolist() == doc.token_ids.tolist()
    batch = other.encode(QUESTIONS)
    suffixes = doc.encode_ids(QUESTIONS)
    width = max(map(len, suffixes))
    assert batch.keys() == {"input_ids", "attention_mask"} and batch["input_ids"].shape == (len(QUESTIONS), width)
    for ids, mask, suffix in zip(batch["input_ids"], batch["attention_mask"], suffixes, strict=True):
        assert mask.tolist() == [0] * (width - len(suffix)) + [1] * len(suffix)
        assert ids[width - len(suffix) :].tolist() == suffix
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(i for i in pads if i is not None and i < model.config.vocab_size)
        assert (ids[: width - len(suffix)] == pad).all()


def test_one_question_may_be_given_as_a_text(doc):
    assert doc.encode("Why?")["input_ids"].tolist() == doc.encode(["Why?"])["input_ids"].tolist()


def test_template_keywords_are_recorded_and_used_again_after_load(model, tokenizer, tmp_path):
    doc = kvkern.publish(model, tokenizer, TEXT, date="Friday", mood="glad")
    expected = conversation(tokenizer, TEXT, "Why?", date="Friday", mood="glad")
    assert doc.token_ids.tolist() + doc.encode_ids(["Why?"])[0] == expected
    doc.save(tmp_path / "a.kv")
    again = kvkern.load(tmp_path / "a.kv", model, tokenizer)
    assert again.identity == doc.identity and again.encode_ids(["Why?"]) == doc.encode_ids(["Why?"])
    other = conversation(tokenizer, TEXT, "Why?", date="Friday", mood="sad")
    assert again.token_ids.tolist() + again.encode_ids(["Why?"], mood="sad")[0] == other != expected
    plain = kvkern.publish(model, tokenizer, TEXT)
    assert plain.token_ids.tolist() != doc.token_ids.tolist()


def test_a_plain_document_goes_on_as_text(model, tokenizer):
    doc = kvkern.publish(model, tokenizer, TEXT, chat=False)
    assert doc.token_ids.tolist() == tokenizer(TEXT)["input_ids"] and doc.identity.template is None
    assert doc.encode_ids([" And then"]) == [tokenizer(" And then")["input_ids"]]
    with pytest.raises(TemplateError, match="mood"):
        doc.encode_ids(["Why?"], mood="glad")


def test_without_a_template_a_document_is_plain(model):
    doc = kvkern.publish(model, tiny_tokenizer(template=None), TEXT)
    assert not doc.wording.chat and doc.identity.template is None


def test_a_plain_document_has_a_beginning_but_no_end(model, tokenizer):
    from tokenizers.processors import TemplateProcessing

    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A <|im_end|>", None, special)
    bare = tokenizer("pump", add_special_tokens=False)["input_ids"]
    assert tokenizer("pump")["input_ids"] == [special[0][1], *bare, special[1][1]]
    doc = kvkern.publish(model, tokenizer, "pump", chat=False)
    assert doc.token_ids.tolist() == [special[0][1], *bare] and doc.encode_ids(["pump"]) == [bare]
    child = kvkern.publish(model, tokenizer, "pump", parent=doc)
    assert child.token_ids.tolist() == bare


@pytest.mark.parametrize("as_tensor", [False, True])
def test_token_ids_are_taken_as_they_are(model, tokenizer, as_tensor):
    ids = [5, 300, 7, 265]
    doc = kvkern.publish(model, tokenizer, torch.tensor(ids, dtype=torch.int32) if as_tensor else ids)
    assert doc.token_ids.tolist() == ids and not doc.wording.chat
    alone = kvkern.publish(model, None, ids)
    assert alone.identity.tokenizer is None
    with pytest.raises(RequestError, match="tokenizer: found None"):
        alone.encode(["Why?"])


# -- templates that are refused ----------------------------------------------------------------------------------------

UNSTABLE = {
    "the number of messages first": "{{ messages | length }}" + CHATML,
    "the last message first": "{{ messages[-1].content }}" + CHATML,
    "an end that goes away": CHATML + "{% if messages | length == 1 %}<|endoftext|>{% endif %}",
    "nothing before the user": "{% if messages | length > 1 %}" + CHATML + "{% endif %}",
    "no system message": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "words that follow the document": CHATML + "{% if messages[0].content | length > 20 %}long{% endif %}",
}


@pytest.mark.parametrize("kind", UNSTABLE)
def test_a_template_under_which_no_question_can_follow_is_refused(model, kind):
    tokenizer = tiny_tokenizer(template=UNSTABLE[kind])
    error = refused(TemplateError, "chat_template", model, tokenizer, TEXT)
    assert "chat=False" in error.do
    assert kvkern.publish(model, tokenizer, TEXT, chat=False).tokens > 0


def test_a_question_under_keywords_that_change_the_document_is_refused(doc):
    with pytest.raises(TemplateError, match="chat_template: found a conversation that leaves the document's"):
        doc.encode(["Why?"], **{"date": "Friday", "chat_template": "{{ date }}" + CHATML})


def test_chat_without_a_template_is_refused(model):
    refused(TemplateError, "chat_template", model, tiny_tokenizer(template=None), TEXT, chat=True)
    refused(TemplateError, "template_kwargs", model, tiny_tokenizer(), TEXT, chat=False, mood="glad")
    refused(TemplateError, "template_kwargs", model, tiny_tokenizer(), [1, 2], mood="glad")
    refused(TemplateError, "chat", model, tiny_tokenizer(), [1, 2], chat=True)


# -- documents and questions that are refused --------------------------------------------------------------------------

BAD = {
    "empty": "",
    "blank": " \n\t ",
    "no ids": [],
    "an empty tensor": torch.tensor([], dtype=torch.int64),
    "two dimensions": torch.ones(2, 2, dtype=torch.int64),
    "floats": torch.ones(3),
    "a number": 7,
    "nothing": None,
    "bytes": [b"a"],
    "messages": [{"role": "user", "content": "Why?"}],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_document_that_is_none_is_refused(model, tokenizer, kind):
    refused(RequestError, "document", model, tokenizer, BAD[kind])


@pytest.mark.parametrize("token", [320, -1, 2**40])
def test_an_unknown_token_id_is_refused(model, tokenizer, token):
    error = refused(RequestError, "document token_ids[2]", model, tokenizer, [1, 2, token])
    assert (error.found, error.needed) == (str(token), "0 to 319")


def test_a_tokenizer_of_a_larger_model_is_refused(model, tokenizer):
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    refused(RequestError, "document token_ids[0]", model, tokenizer, "<99>", chat=False)


def test_text_without_a_tokenizer_and_a_chunk_of_none_are_refused(model, tokenizer):
    refused(RequestError, "tokenizer", model, None, TEXT)
    refused(RequestError, "chunk", model, tokenizer, TEXT, chunk=0)


def test_a_document_longer_than_the_positions_is_refused(tokenizer):
    model = tiny_model(max_position_embeddings=20)
    error = refused(CapacityError, "document", model, tokenizer, list(range(20)))
    assert error.found == "20 tokens" and "20 positions" in error.needed
    parent = kvkern.publish(model, tokenizer, list(range(12)))
    refused(CapacityError, "document", model, tokenizer, list(range(8)), parent=parent)
    assert kvkern.publish(model, tokenizer, list(range(7)), parent=parent).end == 19
    with pytest.raises(CapacityError, match=r"questions\[1\]: found 8 tokens after a path of 12"):
        parent.encode(["a", "bcdfghjk"])


@pytest.mark.parametrize("question", ["", "  \n", None, 7])
def test_an_empty_question_is_refused(doc, question):
    with pytest.raises(RequestError) as caught:
        doc.encode(["Why?", question])
    assert caught.value.field == "questions[1]"


def test_a_question_with_a_token_that_the_model_lacks_is_refused(model, tokenizer):
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    doc = kvkern.publish(model, tokenizer, TEXT)
    with pytest.raises(RequestError, match=r"questions\[0\] token_ids\[\d+\]: found 367, needed 0 to 319"):
        doc.encode(["What is <99>?"])


def test_no_question_is_refused(doc):
    with pytest.raises(RequestError, match="questions: found none"):
        doc.encode([])


# -- children ----------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Is it safe?"}, {"role": "assistant", "content": "It is."}]
MORE = [{"role": "user", "content": "For all?"}, {"role": "assistant", "content": "For most."}]


def answers(doc: Document, model: Any, tokenizer: Any) -> list[list[int]]:
    engine = kvkern.Engine(model, tokenizer)
    return [list(a.token_ids) for a in engine.ask(doc, QUESTIONS[:3], max_new_tokens=8, ordered=True)]


def test_turns_below_a_chat_document_answer_as_from_scratch(model, tokenizer):
    doc = kvkern.publish(model, tokenizer, TEXT, mood="glad")
    child = kvkern.publish(model, tokenizer, TURNS, parent=doc)
    grandchild = kvkern.publish(model, tokenizer, MORE, parent=child)
    reference = twin(model)
    for node, turns in ((child, TURNS), (grandchild, TURNS + MORE)):
        whole = [conversation(tokenizer, TEXT, q, turns, mood="glad") for q in QUESTIONS[:3]]
        ids = node.path_token_ids().tolist()
        assert [ids + suffix for suffix in node.encode_ids(QUESTIONS[:3])] == whole
        assert answers(node, model, tokenizer) == [scratch_answer(reference, ids, 8) for ids in whole]


def test_texts_below_a_plain_document_answer_as_from_scratch(model, tokenizer):
    nodes: list[Document] = []
    for text in (TEXT, " The second part is about tanks.", " The third is short."):
        nodes.append(
            kvkern.publish(model, tokenizer, text, chat=False if not nodes else None, parent=(nodes or [None])[-1])
        )
    whole = [
        tokenizer(TEXT + " The second part is about tanks. The third is short." + q)["input_ids"] for q in QUESTIONS
    ]
    assert [nodes[2].path_token_ids().tolist() + s for s in nodes[2].encode_ids(QUESTIONS)] == whole
    assert answers(nodes[2], model, tokenizer) == [scratch_answer(twin(model), ids, 8) for ids in whole[:3]]
    assert [node.position for node in nodes] == [0, nodes[0].tokens, nodes[1].end]


def test_a_childs_kv_is_that_of_one_document(model, tokenizer):
    ids = torch.randint(300, (90,)).tolist()
    whole = transformers_kv(twin(model, dtype=torch.float64), ids)
    root = kvkern.publish(model, None, ids[:40], chunk=16)
    child = kvkern.publish(model, None, ids[40:], parent=root, chunk=16)
    for layer, (keys, values) in enumerate(whole):
        for name, found, exact in (("K", child.key(layer), keys), ("V", child.value(layer), values)):
            assert_exact(found, exact[:, 40:], exact[:, 40:].float(), f"{name} of layer {layer}")


def test_what_does_not_continue_the_parent_is_refused(model, tokenizer, doc):
    plain = kvkern.publish(model, tokenizer, TEXT, chat=False)
    refused(RequestError, "document", model, tokenizer, "a text", parent=doc)
    refused(RequestError, "document", model, tokenizer, TURNS, parent=plain)
    refused(RequestError, "document", model, tokenizer, [], parent=doc)
    refused(RequestError, "document", model, tokenizer, " ", parent=plain)
    refused(TemplateError, "chat", model, tokenizer, TURNS, parent=doc, chat=False)
    refused(TemplateError, "template_kwargs", model, tokenizer, TURNS, parent=doc, mood="sad")
    assert (doc.references, plain.references) == (1, 1)


FORGETFUL = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last %}(...){% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_that_forgets_earlier_turns_is_refused_below(model):
    """It is stable for one question, and so for the document; not for a turn that another follows."""
    tokenizer = tiny_tokenizer(template=FORGETFUL)
    doc = kvkern.publish(model, tokenizer, TEXT)
    refused(TemplateError, "chat_template", model, tokenizer, TURNS, parent=doc)
    assert doc.references == 1


def test_a_parent_of_another_model_is_refused(tokenizer, doc):
    refused(IdentityError, "parent.weights", tiny_model(seed=1), tokenizer, TURNS, parent=doc)
    refused(ShapeError, "parent.geometry", tiny_model(num_hidden_layers=1), tokenizer, TURNS, parent=doc)
    assert doc.references == 1


def test_a_child_keeps_its_parent_until_it_is_released(model, tokenizer):
    doc = kvkern.publish(model, tokenizer, TEXT)
    child = kvkern.publish(model, tokenizer, TURNS, parent=doc)
    doc.release()
    assert not doc.released and doc.references == 1
    assert len(answers(child, model, tokenizer)) == 3
    child.release()
    assert doc.released and child.released


def test_children_are_loaded_below_the_parent_they_were_made_for(model, tokenizer, tmp_path):
    doc = kvkern.publish(model, tokenizer, TEXT)
    child = kvkern.publish(model, tokenizer, TURNS, parent=doc)
    doc.save(tmp_path / "doc.kv")
    child.save(tmp_path / "child.kv")
    expected = answers(child, model, tokenizer)
    root = kvkern.load(tmp_path / "doc.kv", model, tokenizer)
    again = kvkern.load(tmp_path / "child.kv", model, tokenizer, parent=root)
    assert again.encode_ids(QUESTIONS) == child.encode_ids(QUESTIONS)
    assert answers(again, model, tokenizer) == expected
    stranger = kvkern.publish(model, tokenizer, TEXT + "!")
    for parent in (None, stranger):
        with pytest.raises(IdentityError):
            kvkern.load(tmp_path / "child.kv", model, tokenizer, parent=parent)
    assert stranger.references == 1


# -- another process ---------------------------------------------------------------------------------------------------

LOAD = """
    import json, sys
    sys.path.insert(0, sys.argv[2])
    from models import QUESTIONS, tiny_model, tiny_tokenizer
    import kvkern
    model, tokenizer = tiny_model(), tiny_tokenizer()
    doc = kvkern.load(sys.argv[1], model, tokenizer)
    answers = kvkern.Engine(model, tokenizer).ask(doc, QUESTIONS, max_new_tokens=8, ordered=True)
    print(json.dumps([doc.encode_ids(QUESTIONS), [a.token_ids for a in answers]]))
"""


def test_a_document_loaded_in_another_process_answers_as_from_scratch(model, tokenizer, tmp_path):
    with kvkern.publish(model, tokenizer, TEXT, mood="glad") as doc:
        doc.save(tmp_path / "a.kv")
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path / "a.kv"), str(TESTS)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    suffixes, found = json.loads(child.stdout)
    reference = twin(model)
    whole = [conversation(tokenizer, TEXT, question, mood="glad") for question in QUESTIONS]
    assert [doc.token_ids.tolist() + suffix for suffix in suffixes] == whole
    assert found == [scratch_answer(reference, ids, 8) for ids in whole]


# -- life --------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), RequestError("x", found=1, needed=2, do="3")])
@pytest.mark.parametrize("at", [20, 40])
def test_a_prefill_that_fails_leaves_nothing_behind(model, doc, monkeypatch, error, at):
    made: list[Document] = []
    begin = Document.__init__
    monkeypatch.setattr(Document, "__init__", lambda self, *a, **k: made.append(self) or begin(self, *a, **k))

    def progress(done: int, total: int) -> None:
        if done == at:
            raise error

    for parent in (None, doc):
        with pytest.raises(type(error)):
            kvkern.publish(model, None, list(range(40)), parent=parent, chunk=20, progress=progress)
    assert [(d.released, d.published) for d in made] == [(True, False)] * 2
    assert doc.references == 1


def test_a_model_that_fails_while_reading_leaves_nothing_behind(tokenizer, monkeypatch):
    model = tiny_model()
    parent = kvkern.publish(model, tokenizer, TEXT)

    def fail(*args: Any) -> None:
        raise Stop

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(Stop):
        kvkern.publish(model, tokenizer, TURNS, parent=parent)
    assert parent.references == 1


def test_a_released_document_refuses_everything(model, tokenizer, tmp_path):
    doc = kvkern.publish(model, tokenizer, TEXT)
    batch = doc.encode(["Why?"])
    doc.release()
    engine = kvkern.Engine(model, tokenizer)
    for use in (
        lambda: doc.release(),
        lambda: doc.key(0),
        lambda: doc.encode(["Why?"]),
        lambda: doc.save(tmp_path / "a.kv"),
        lambda: doc.check(),
        lambda: doc.__enter__(),
        lambda: engine.ask(doc, ["Why?"], max_new_tokens=1),
        lambda: engine.stream(doc, ["Why?"], max_new_tokens=1),
        lambda: engine.submit(doc, [1, 2], max_new_tokens=1),
        lambda: kvkern.generate(model, doc, **batch, max_new_tokens=1),
        lambda: kvkern.publish(model, tokenizer, TURNS, parent=doc),
    ):
        with pytest.raises(ReadOnlyError):
            use()
    assert list(tmp_path.iterdir()) == []


def test_leaving_the_with_block_releases(model, tokenizer):
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        assert not doc.released
    with pytest.raises(Stop), kvkern.publish(model, tokenizer, TEXT) as other:
        raise Stop
    assert doc.released and other.released
