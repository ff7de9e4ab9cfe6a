"""transformers' own generate over a prefix: every mode against transformers on the concatenated prompt, and refusals."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import models
import pytest
import torch
from helpers import assert_exact
from models import KINDS, QUESTIONS, QWEN3, TEXT, tiny_model, tiny_tokenizer, twin
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator
from transformers.generation.streamers import BaseStreamer

import kvkern
from kvkern import qwen3
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

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def doc(model, tokenizer):
    with kvkern.publish(model, tokenizer, TEXT) as doc:
        yield doc


def whole(doc: kvkern.Document, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The concatenated prompt of each row, left-padded as the suffixes are: what transformers is given without a prefix."""
    rows, width = batch["input_ids"].shape
    ids = torch.empty(rows, doc.end + width, dtype=torch.int64)
    mask = torch.ones_like(ids)
    for row, (suffix, held) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        pad = width - int(held.sum())
        ids[row] = torch.cat([suffix[:pad], doc.path_token_ids(), suffix[pad:]])
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(doc: kvkern.Document, model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[list, list]:
    """New tokens over the prefix, and of transformers on the concatenated prompt, from the same torch seed."""
    seed = torch.randint(2**31, ()).item()
    found = []
    prompt = whole(doc, batch)
    for run, given in (
        (lambda **k: kvkern.generate(model, doc, **k), batch),
        (twin(model).generate, prompt),
    ):
        torch.manual_seed(seed)
        out = run(**given, **copy.copy(options))
        found.append(out[:, given["input_ids"].shape[1] :].tolist())
    return found[0], found[1]


# -- the same tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_over_a_ragged_batch_is_transformers_on_the_whole_prompt(tokenizer, kind):
    model = tiny_model(kind)
    doc = kvkern.publish(model, tokenizer, TEXT)
    batch = doc.encode(QUESTIONS)
    assert batch["attention_mask"].sum(1).unique().numel() > 3
    found, expected = both(doc, model, batch, max_new_tokens=20, **GREEDY)
    assert found == expected


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_backend_gives_these_tokens(model, doc, backend):
    batch = doc.encode(QUESTIONS)
    expected = both(doc, model, batch, max_new_tokens=8, **GREEDY)[1]
    out = kvkern.generate(model, doc, **batch, max_new_tokens=8, backend=backend, **GREEDY)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == expected


def test_the_suffix_comes_back_before_the_answer(model, doc):
    batch = doc.encode(QUESTIONS[:3])
    out = kvkern.generate(model, doc, **batch, max_new_tokens=3, **GREEDY)
    assert torch.equal(out[:, :-3], batch["input_ids"])


def test_a_batch_of_equal_lengths_needs_no_mask(model, doc):
    ids = torch.randint(300, (3, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = both(doc, model, batch, max_new_tokens=5, **GREEDY)[1]
    out = kvkern.generate(model, doc, ids, max_new_tokens=5, **GREEDY)
    assert out[:, 5:].tolist() == expected


SAMPLED = [
    {"temperature": 0.7, "top_k": 0},
    {"top_k": 5, "temperature": 1.3},
    {"top_p": 0.8, "top_k": 0},
    {"repetition_penalty": 1.4, "top_k": 20},
    {"min_p": 0.05},
    {"typical_p": 0.9, "renormalize_logits": True},
    {"num_beams": 3, "temperature": 0.8},
]


@pytest.mark.parametrize("options", SAMPLED, ids=lambda o: ", ".join(o))
def test_sampled_from_the_same_seed_is_transformers_on_the_whole_prompt(model, doc, options):
    # The tests' seed is fresh; a number that falls on the boundary of two tokens would tell of rounding only.
    torch.manual_seed(7)
    found, expected = both(
        doc, model, doc.encode(QUESTIONS), max_new_tokens=8, do_sample=True, pad_token_id=0, **options
    )
    assert found == expected
    torch.manual_seed(8)
    other = both(doc, model, doc.encode(QUESTIONS), max_new_tokens=8, do_sample=True, pad_token_id=0, **options)[0]
    assert other != found


def test_several_samples_of_each_question(model, doc):
    torch.manual_seed(3)
    options = dict(max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)
    found, expected = both(doc, model, doc.encode(QUESTIONS[:4]), **options)
    assert found == expected and len(found) == 12 and found[0] != found[1]


# Each of these reads the tokens before, or counts them, and each must change what greedy search would say.
READS_THE_PROMPT: dict[str, dict[str, Any]] = {
    "a penalty on repetition": {"repetition_penalty": 1.3},
    "a reward of repetition": {"repetition_penalty": 0.6},
    "no pair of tokens twice": {"no_repeat_ngram_size": 2},
    "no token of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "a reward of the prompt's tokens": {"encoder_repetition_penalty": 1.5},
    "a bias of sequences": {"sequence_bias": [[[5, 7], 3.0], [[9], 8.0]]},
    "bad words": {"bad_words_ids": [[i] for i in range(0, 300, 2)] + [[1, 2]]},
    "what may follow": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids.sum()) % 300, 5]},
    "no end before 6 tokens": {"min_new_tokens": 6, "eos_token_id": list(range(3, 300, 2))},
    "an end that becomes likelier": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
    "nothing of this at first": {"begin_suppress_tokens": list(range(200))},
    "this at last": {"forced_eos_token_id": 7},
    "guidance away from the last token": {"guidance_scale": 1.5},
    "guidance away from another prompt": {"guidance_scale": 1.5, "negative_prompt_ids": torch.arange(7).expand(8, -1)},
    "a watermark": {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "several at once": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[4]], "num_beams": 3},
}


@pytest.mark.parametrize("name", READS_THE_PROMPT)
def test_what_reads_the_prompt_reads_the_document_too(model, doc, name):
    batch = doc.encode(QUESTIONS)
    found, expected = both(doc, model, batch, max_new_tokens=10, **READS_THE_PROMPT[name], **GREEDY)
    assert found == expected
    free = {"eos_token_id": READS_THE_PROMPT[name].get("eos_token_id")}
    assert found != both(doc, model, batch, max_new_tokens=10, **free, **GREEDY)[0]


@pytest.mark.parametrize("processor", [RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(1)])
def test_control_a_processor_over_the_suffix_alone_gives_other_tokens(model, doc, processor):
    batch = doc.encode(QUESTIONS)
    penalty = getattr(processor, "penalty", None)
    options = {"no_repeat_ngram_size": 1} if penalty is None else {"repetition_penalty": penalty}
    expected = both(doc, model, batch, max_new_tokens=10, **options, **GREEDY)[1]

    class SuffixOnly(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return processor(input_ids[:, -(batch["input_ids"].shape[1]) :], scores)

    out = kvkern.generate(model, doc, **batch, max_new_tokens=10, logits_processor=[SuffixOnly()], **GREEDY)
    assert out[:, batch["input_ids"].shape[1] :].tolist() != expected


BEAMS: dict[str, dict[str, Any]] = {
    "four": {"num_beams": 4},
    "the best three of four": {"num_beams": 4, "num_return_sequences": 3},
    "long ones": {"num_beams": 3, "length_penalty": 2.0, "eos_token_id": list(range(0, 300, 7))},
    "short ones, stopped early": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True, "eos_token_id": 9},
}


@pytest.mark.parametrize("name", BEAMS)
def test_beams_are_transformers_with_their_scores(model, doc, name):
    batch = doc.encode(QUESTIONS)
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, **GREEDY, **BEAMS[name]}
    prompt = whole(doc, batch)
    found, expected = kvkern.generate(model, doc, **batch, **options), twin(model).generate(**prompt, **options)
    assert torch.equal(
        found.sequences[:, batch["input_ids"].shape[1] :], expected.sequences[:, prompt["input_ids"].shape[1] :]
    )
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


def test_control_beams_whose_pages_are_not_reordered_are_caught(model, doc, monkeypatch):
    monkeypatch.setattr(qwen3.SuffixCache, "reorder_cache", lambda self, beam_idx: None)
    found, expected = both(doc, model, doc.encode(QUESTIONS), max_new_tokens=20, num_beams=4, **GREEDY)
    assert found != expected


def test_a_prompt_computed_in_chunks_is_the_same(model, doc):
    batch = doc.encode(QUESTIONS)
    expected = both(doc, model, batch, max_new_tokens=6, **GREEDY)[1]
    for chunk in (1, 5, 1000):
        out = kvkern.generate(model, doc, **batch, max_new_tokens=6, prefill_chunk_size=chunk, **GREEDY)
        assert out[:, batch["input_ids"].shape[1] :].tolist() == expected


def test_an_answer_that_ends_is_padded(model, doc):
    batch = doc.encode(QUESTIONS)
    free = both(doc, model, batch, max_new_tokens=10, **GREEDY)[0]
    found, expected = both(doc, model, batch, max_new_tokens=10, eos_token_id=free[0][3], **GREEDY)
    assert found == expected and found[0][free[0].index(free[0][3]) + 1 :] == [0] * (9 - free[0].index(free[0][3]))


def test_over_three_levels_of_prefixes(model, tokenizer):
    root = kvkern.publish(model, tokenizer, TEXT, chat=False)
    child = kvkern.publish(model, tokenizer, " Then there are tanks.", parent=root)
    leaf = kvkern.publish(model, tokenizer, " And people.", parent=child)
    batch = leaf.encode(QUESTIONS)
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3}):
        found, expected = both(leaf, model, batch, max_new_tokens=10, **options, **GREEDY)
        assert found == expected


# -- candidates: prompt lookup, an assistant ---------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch) -> list[list[list[int]]]:
    """Whatever a generator of candidates was shown, in the order of the calls."""
    seen: list[list[list[int]]] = []
    for kind in (PromptLookupCandidateGenerator, AssistedCandidateGenerator):

        def spying(self: Any, input_ids: Tensor, *args: Any, made: Any = kind.get_candidates, **kwargs: Any) -> Any:
            seen.append(input_ids.tolist())
            return made(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(kind, "get_candidates", spying)
    return seen


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 3}], ids=str)
def test_prompt_lookup_finds_its_candidates_in_the_document(model, doc, shown, options):
    # The question quotes the document, so that there is something to be found.
    batch = doc.encode(["The pump starts when the valve is"])
    options = {"max_new_tokens": 16, "prompt_lookup_num_tokens": 4, **GREEDY, **options}
    found, expected = both(doc, model, batch, **options)
    assert found == expected
    half = len(shown) // 2
    assert half and shown[:half] == shown[half:] and len(shown[0][0]) == doc.end + batch["input_ids"].shape[1]


@pytest.mark.parametrize("attention", ["sdpa", "kvkern"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"no_repeat_ngram_size": 2}], ids=str)
def test_an_assistant_reads_the_whole_prompt(model, doc, shown, options, attention):
    assistant = tiny_model(seed=3, num_hidden_layers=1, attention=attention)
    ids = torch.cat([torch.zeros(2, dtype=torch.int64), torch.randint(300, (9,))])[None]
    batch = {"input_ids": ids, "attention_mask": (torch.arange(11) >= 2).long()[None]}
    found, expected = both(doc, model, batch, max_new_tokens=16, assistant_model=assistant, **{**GREEDY, **options})
    assert found == expected
    half = len(shown) // 2
    assert half and shown[:half] == shown[half:]


def test_an_assistant_with_a_tokenizer_of_its_own_reads_the_whole_text(model, tokenizer, doc, monkeypatch):
    monkeypatch.setattr(models, "MERGES", models.MERGES[:3])
    assistant = tiny_model(seed=3, num_hidden_layers=1, vocab_size=310, attention="sdpa")
    options = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": tiny_tokenizer()}
    found, expected = both(doc, model, doc.encode(QUESTIONS[:1]), max_new_tokens=16, **options, **GREEDY)
    assert found == expected


def test_an_assistant_that_is_always_right_saves_forwards(model, doc, monkeypatch):
    begun = []
    begin = qwen3.SuffixCache._begin
    monkeypatch.setattr(qwen3.SuffixCache, "_begin", lambda self, *a: begun.append(a) or begin(self, *a))
    batch = doc.encode(QUESTIONS[:1])
    found, expected = both(doc, model, batch, max_new_tokens=21, assistant_model=twin(model), **GREEDY)
    assert found == expected
    assert len(begun) < 12, "rejected what is its own"


def test_candidates_of_a_batch_are_transformers_refusal(model, doc):
    with pytest.raises(ValueError, match="batch_size = 1"):
        kvkern.generate(model, doc, **doc.encode(QUESTIONS), max_new_tokens=2, prompt_lookup_num_tokens=3, **GREEDY)


# -- a conversation that goes on ---------------------------------------------------------------------------------------


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 9, contents, strict=False)]


@pytest.fixture
def silent() -> Iterator[None]:
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def scratch_rows(doc: kvkern.Document, model: Any, batch: dict[str, Tensor], new: int) -> list[list[int]]:
    prompt = whole(doc, batch)
    out = twin(model).generate(**prompt, max_new_tokens=new, **GREEDY)
    return out[:, prompt["input_ids"].shape[1] :].tolist()


def test_a_conversation_goes_on_from_the_returned_cache(model, tokenizer, doc, silent):
    asked = [QUESTIONS[0], QUESTIONS[2], QUESTIONS[4]]
    out = kvkern.generate(
        model, doc, **doc.encode(asked), max_new_tokens=7, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    conversations = [list(known) for known in out.past_key_values.tokens]
    for _ in range(3):
        cache = out.past_key_values
        # What was answered last is not in the pages yet; then comes the next turn, of another length for each row.
        lasts = out.sequences[:, -1].tolist()
        new = [torch.randint(300, (random.randint(1, 30),)).tolist() for _ in asked]
        conversations = [k + [last] + n for k, last, n in zip(cache.tokens, lasts, new, strict=True)]
        batch = padded(conversations)
        expected = scratch_rows(doc, model, batch, 7)
        held = [len(k) for k in cache.tokens]
        out = kvkern.generate(
            model, doc, **batch, past_key_values=cache, max_new_tokens=7, return_dict_in_generate=True, **GREEDY
        )
        assert out.sequences[:, batch["input_ids"].shape[1] :].tolist() == expected
        assert out.past_key_values is cache and cache.reused == held


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.filterwarnings("ignore:past_key_values")
def test_a_conversation_may_go_back_and_change_anywhere(model, doc):
    cache = None
    rows = [torch.randint(300, (random.randint(1, 50),)).tolist() for _ in range(4)]
    for _ in range(6):
        batch = padded(rows)
        known = [[]] * 4 if cache is None else cache.tokens
        common = [
            next((i for i, (a, b) in enumerate(zip(k, row, strict=False)) if a != b), min(len(k), len(row)))
            for k, row in zip(known, rows, strict=True)
        ]
        out = kvkern.generate(
            model, doc, **batch, past_key_values=cache, max_new_tokens=3, return_dict_in_generate=True, **GREEDY
        )
        assert out.sequences[:, batch["input_ids"].shape[1] :].tolist() == scratch_rows(doc, model, batch, 3)
        cache = out.past_key_values
        assert cache.reused == [min(c, len(row) - 1) for c, row in zip(common, rows, strict=True)]
        rows = [
            [*row[: random.randint(0, len(row))], *torch.randint(300, (random.randint(1, 40),)).tolist()]
            for row in cache.tokens
        ]


def test_control_pages_that_hold_another_conversation_are_seen(model, doc):
    # Four, since the answer of a small model may by chance be the same to another conversation.
    cache = kvkern.generate(
        model, doc, **padded([[5, 6, 7, 8]] * 4), max_new_tokens=20, return_dict_in_generate=True, **GREEDY
    ).past_key_values
    other = padded([torch.randint(300, (30,)).tolist() for _ in range(4)])
    cache.tokens = [row[:20] for row in other["input_ids"].tolist()]
    out = kvkern.generate(model, doc, **other, past_key_values=cache, max_new_tokens=12, **GREEDY)
    assert cache.reused == [20] * 4 and out[:, 30:].tolist() != scratch_rows(doc, model, other, 12)


def test_answers_that_end_early_go_on_without_a_word(model, tokenizer, doc, silent):
    batch = doc.encode(QUESTIONS[:3])
    free = scratch_rows(doc, model, batch, 9)
    options = dict(max_new_tokens=9, eos_token_id=free[0][2], return_dict_in_generate=True, **GREEDY)
    out = kvkern.generate(model, doc, **batch, **options)
    answers = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    ended = [row[: row.index(free[0][2]) + 1] if free[0][2] in row else row for row in answers]
    assert len({len(row) for row in ended}) > 1
    suffixes = [i[m.bool()].tolist() for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    again = padded([s + a + [33, 34, 35] for s, a in zip(suffixes, ended, strict=True)])
    expected = scratch_rows(doc, model, again, 5)
    out = kvkern.generate(model, doc, **again, past_key_values=out.past_key_values, max_new_tokens=5, **GREEDY)
    assert out[:, again["input_ids"].shape[1] :].tolist() == expected


def thinking(model: Any) -> tuple[kvkern.Document, list[dict[str, str]], Any]:
    """A document under Qwen3's kind of template, a conversation after one answered turn, and that turn's result."""
    doc = kvkern.publish(model, tiny_tokenizer(QWEN3), TEXT)
    answer = "<think>Perhaps the pump.</think>The pump."
    first = doc.encode(turns("What starts?"))
    said = tiny_tokenizer(QWEN3)(answer, add_special_tokens=False)["input_ids"]
    # As if the model had said so: the pages hold the question and the answer with its thoughts.
    prompt = padded([first["input_ids"][0].tolist() + said])
    out = kvkern.generate(model, doc, **prompt, max_new_tokens=1, return_dict_in_generate=True, **GREEDY)
    return doc, turns("What starts?", answer, "And then?"), out


def test_a_template_that_drops_earlier_thoughts_is_noticed_and_said(model):
    doc, conversation, out = thinking(model)
    batch = doc.encode(conversation)
    text = tiny_tokenizer(QWEN3).decode(batch["input_ids"][0])
    assert "Perhaps" not in text and "The pump.<|im_end|>" in text
    cache = out.past_key_values
    with pytest.warns(UserWarning, match=r"row 0 goes on from \d+ of the \d+ tokens that are cached.*<think>"):
        again = kvkern.generate(model, doc, **batch, past_key_values=cache, max_new_tokens=8, **GREEDY)
    assert 0 < cache.reused[0] < len(doc.encode(turns("What starts?"))["input_ids"][0]) + 3
    assert again[:, batch["input_ids"].shape[1] :].tolist() == scratch_rows(doc, model, batch, 8)


def test_a_template_that_keeps_earlier_turns_needs_no_word(model, tokenizer, doc, silent):
    first = doc.encode(turns("What starts?"))["input_ids"][0].tolist()
    said = tokenizer("The pump.<|im_end|>", add_special_tokens=False)["input_ids"]
    out = kvkern.generate(
        model, doc, **padded([first + said]), max_new_tokens=1, return_dict_in_generate=True, **GREEDY
    )
    batch = doc.encode(turns("What starts?", "The pump.", "And then?"))
    again = kvkern.generate(model, doc, **batch, past_key_values=out.past_key_values, max_new_tokens=8, **GREEDY)
    assert out.past_key_values.reused == [len(first + said)]
    assert again[:, batch["input_ids"].shape[1] :].tolist() == scratch_rows(doc, model, batch, 8)


def test_a_conversation_is_what_the_template_makes_of_it(tokenizer, doc):
    conversation = turns("What starts?", "The pump.", "And then?")
    ids = tokenizer.apply_chat_template(
        [{"role": "system", "content": TEXT}, *conversation], add_generation_prompt=True, return_dict=False
    )
    one = doc.encode(conversation)["input_ids"]
    assert torch.equal(torch.cat([doc.path_token_ids(), one[0]]), torch.tensor(ids))
    several = doc.encode([conversation, "Why?", turns("Why?")])
    assert torch.equal(several["input_ids"][0], one[0]) and torch.equal(*several["input_ids"][1:])
    for wrong in ([{"content": "Why?"}], [{"role": "user", "content": "Why?"}, "Why?"], [[]]):
        with pytest.raises(RequestError, match=r"questions\[0\]: found .*needed a text"):
            doc.encode([wrong])


def test_a_conversation_below_a_plain_document_is_refused(model, tokenizer):
    plain = kvkern.publish(model, tokenizer, TEXT, chat=False)
    with pytest.raises(TemplateError, match="chat: found a conversation, needed a text"):
        plain.encode(turns("Why?"))


class Stop(Exception):
    pass


class StopsAfter(BaseStreamer):
    def __init__(self, puts: int) -> None:
        self.left = puts

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop

    def end(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore:past_key_values")
@pytest.mark.parametrize("puts", [0, 1, 4])
def test_a_cache_goes_on_after_a_generate_that_was_interrupted(model, doc, puts):
    first = doc.encode(QUESTIONS[2])
    cache = kvkern.generate(
        model, doc, **first, max_new_tokens=4, return_dict_in_generate=True, **GREEDY
    ).past_key_values
    more = padded([[*cache.tokens[0], *range(40, 60)]])
    with pytest.raises(Stop):
        kvkern.generate(
            model, doc, **more, past_key_values=cache, max_new_tokens=9, streamer=StopsAfter(puts), **GREEDY
        )
    other = padded([[*cache.tokens[0][:-2], *range(70, 95)]])
    out = kvkern.generate(model, doc, **other, past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert out[:, other["input_ids"].shape[1] :].tolist() == scratch_rows(doc, model, other, 6)


def caches(model: Any, doc: kvkern.Document) -> dict[str, tuple[type[KvkernError], Any, dict[str, Any], str]]:
    def after(rows: int = 2, **options: Any) -> Any:
        out = kvkern.generate(
            model,
            doc,
            **doc.encode(QUESTIONS[:rows]),
            max_new_tokens=2,
            return_dict_in_generate=True,
            **{**GREEDY, **options},
        )
        return out.past_key_values

    other = kvkern.publish(model, None, list(range(30)))
    ids = torch.ones(2, 3, dtype=torch.int64)
    foreign = kvkern.generate(model, other, ids, max_new_tokens=1, return_dict_in_generate=True, **GREEDY)
    return {
        "found DynamicCache": (RequestError, DynamicCache(), {}, "past_key_values"),
        "found those of another prefix": (RequestError, foreign.past_key_values, {}, "past_key_values"),
        "found those of a beam search": (RequestError, after(num_beams=2), {}, "past_key_values"),
        "found 3 rows, needed 2": (RequestError, after(3), {}, "past_key_values"),
        "found 2 rows, needed 4": (RequestError, after(), {"num_beams": 2}, "past_key_values"),
        "found those of the torch backend": (
            RequestError,
            after(backend="torch"),
            {"backend": "cpu"},
            "past_key_values",
        ),
    }


@pytest.mark.parametrize("name", [
    "found DynamicCache", "found those of another prefix", "found those of a beam search", "found 3 rows, needed 2",
    "found 2 rows, needed 4", "found those of the torch backend",
])  # fmt: skip
def test_a_cache_that_cannot_be_continued_is_refused(model, doc, name):
    kind, cache, options, field = caches(model, doc)[name]
    with pytest.raises(kind, match=name) as caught:
        kvkern.generate(
            model, doc, **doc.encode(QUESTIONS[:2]), past_key_values=cache, max_new_tokens=2, **{**GREEDY, **options}
        )
    assert caught.value.field == field and caught.value.needed and caught.value.do


def test_a_cache_of_a_released_document_is_refused(model, tokenizer):
    doc = kvkern.publish(model, tokenizer, TEXT)
    batch = doc.encode(QUESTIONS[:2])
    out = kvkern.generate(model, doc, **batch, max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    doc.release()
    with pytest.raises(ReadOnlyError):
        kvkern.generate(model, doc, **batch, past_key_values=out.past_key_values, max_new_tokens=2, **GREEDY)


# -- what transformers does to a cache ---------------------------------------------------------------------------------


def test_rows_of_a_cache_are_selected_and_cropped(model, doc):
    rows = [torch.randint(300, (n,)).tolist() for n in (21, 30, 17)]
    cache = kvkern.generate(
        model, doc, **padded(rows), max_new_tokens=2, return_dict_in_generate=True, **GREEDY
    ).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.batch_size == 2 and cache.pool.free_slots == 1
    cache.crop(-3)
    assert cache.get_seq_length() == 31 - 3 and [len(t) for t in cache.tokens] == [15, 19]
    again = padded([[*rows[2], 7, 8], [*rows[0], 9]])
    out = kvkern.generate(model, doc, **again, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert out[:, again["input_ids"].shape[1] :].tolist() == scratch_rows(doc, model, again, 5)
    assert cache.reused == [15, 19]
    last = cache.tokens[1]
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.tokens == [last] and last[:22] == [*rows[0], 9]
    cache.reset()
    assert (cache.get_seq_length(), cache.tokens, cache.pool.free_pages) == (0, [[]], cache.pool.num_pages)


@pytest.mark.filterwarnings("ignore:past_key_values")
def test_rows_that_share_pages_part_when_they_are_written(model, doc):
    rows = [torch.randint(300, (n,)).tolist() for n in (21, 30)]
    cache = kvkern.generate(
        model, doc, **padded(rows), max_new_tokens=2, return_dict_in_generate=True, **GREEDY
    ).past_key_values
    cache.batch_select_indices(torch.tensor([1, 1]))
    again = padded([[*rows[1], 7, 8], [*rows[1], 90, 91, 92]])
    out = kvkern.generate(model, doc, **again, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert out[:, again["input_ids"].shape[1] :].tolist() == scratch_rows(doc, model, again, 5)
    with pytest.raises(CapacityError, match="rows: found 3, needed at most 2"):
        cache.batch_select_indices(torch.tensor([0, 1, 1]))


# -- what goes along ---------------------------------------------------------------------------------------------------


def test_logits_processors_are_shown_what_they_would_be_shown_without_a_prefix(model, doc):
    seen: list[Tensor] = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids.clone())
            return scores

    found, expected = both(
        doc,
        model,
        doc.encode(QUESTIONS[:2]),
        max_new_tokens=3,
        logits_processor=LogitsProcessorList([Look()]),
        **GREEDY,
    )
    assert found == expected and len(seen) == 6
    assert all(map(torch.equal, seen[:3], seen[3:]))


def test_stopping_criteria_and_a_streamer_go_along(model, doc):
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= width + 2)

    batch = doc.encode(QUESTIONS[:1])
    width = batch["input_ids"].shape[1]
    streamer = Collect()
    out = kvkern.generate(
        model, doc, **batch, max_new_tokens=9, streamer=streamer, stopping_criteria=[AfterTwo()], **GREEDY
    )
    assert streamer.ended and out.shape[1] == width + 2
    assert streamer.values == [batch["input_ids"][0].tolist(), [out[0, -2].item()], [out[0, -1].item()]]
    out = kvkern.generate(
        model, doc, **batch, max_new_tokens=9, stopping_criteria=[MaxLengthCriteria(width + 4)], **GREEDY
    )
    assert out.shape[1] == width + 4


def test_a_generation_config_is_honoured_and_not_changed(model, doc):
    batch = doc.encode(QUESTIONS[:4])
    config = GenerationConfig(max_new_tokens=6, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    before = copy.deepcopy(config)
    found, expected = both(doc, model, batch, generation_config=config)
    assert found == expected and config == before
    out = kvkern.generate(model, doc, **batch, generation_config=config, max_new_tokens=2)
    assert out.shape[1] == batch["input_ids"].shape[1] + 2 and config == before


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_logits_are_transformers_to_fp32_rounding(tokenizer, kind):
    model = tiny_model(kind)
    doc = kvkern.publish(model, tokenizer, TEXT)
    batch = doc.encode(QUESTIONS)
    prompt = whole(doc, batch)
    options = dict(max_new_tokens=6, return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY)
    options["repetition_penalty"] = 1.3
    found, plain = kvkern.generate(model, doc, **batch, **options), twin(model).generate(**prompt, **options)
    exact = twin(model, dtype=torch.float64).generate(**prompt, **options)
    for name in ("scores", "logits"):
        for n, rows in enumerate(zip(found[name], exact[name], plain[name], strict=True)):
            # transformers itself makes fp32 of what the fp64 model says.
            assert_exact(rows[0], rows[1].double(), rows[2], f"{name}[{n}]")
    assert [row.argmax(-1).tolist() for row in found.scores] == found.sequences[:, -6:].T.tolist()


def test_hidden_states_come_back_for_the_suffix(model, doc):
    batch = doc.encode(QUESTIONS[:1])
    prompt = whole(doc, batch)
    options = dict(max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, **GREEDY)
    found = kvkern.generate(model, doc, **batch, **options).hidden_states
    expected = twin(model).generate(**prompt, **options).hidden_states
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for layer, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.shape[1] == (batch["input_ids"].shape[1] if step == 0 else 1), layer
            torch.testing.assert_close(a, b[:, -a.shape[1] :], rtol=1e-4, atol=1e-4)


def test_stop_strings_end_an_answer(model, tokenizer, doc):
    free = both(doc, model, doc.encode(QUESTIONS), max_new_tokens=12, **GREEDY)[0]
    row, stop = next(
        (row, text) for row in range(8) for text in tokenizer.batch_decode(free[row][2:-2]) if text.isascii() and text
    )
    batch = doc.encode(QUESTIONS[row])
    found, expected = both(doc, model, batch, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)
    assert found == expected and len(found[0]) < 12


def test_the_models_own_config_is_honoured_and_never_changed(tokenizer):
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.4
    model.generation_config.max_length = 20
    model.generation_config.pad_token_id = 0
    doc = kvkern.publish(model, tokenizer, TEXT)
    before = model.generation_config.to_dict()
    batch = doc.encode(QUESTIONS[:3])
    reference = twin(model)
    reference.generation_config = copy.deepcopy(model.generation_config)
    prompt = whole(doc, batch)
    expected = reference.generate(**prompt, max_new_tokens=8)[:, prompt["input_ids"].shape[1] :]
    out = kvkern.generate(model, doc, **batch, max_new_tokens=8)
    assert torch.equal(out[:, batch["input_ids"].shape[1] :], expected)
    with pytest.raises(RequestError, match="max_length"):
        kvkern.generate(model, doc, **batch, max_new_tokens=8, max_length=100)
    assert model.generation_config.to_dict() == before


def test_nothing_is_held_afterwards(model, tokenizer):
    doc = kvkern.publish(model, tokenizer, TEXT)
    kvkern.generate(model, doc, **doc.encode(QUESTIONS[:2]), max_new_tokens=2, **GREEDY)
    assert doc.references == 1
    doc.release()
    assert doc.released


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[type[KvkernError], dict[str, Any]]] = {
    "max_length": (RequestError, {"max_length": 400}),
    "min_length": (RequestError, {"min_length": 4}),
    "max_new_tokens": (RequestError, {"max_new_tokens": 0}),
    "penalty_alpha": (UnsupportedError, {"penalty_alpha": 0.6}),
    "num_beam_groups": (UnsupportedError, {"num_beam_groups": 2}),
    "diversity_penalty": (UnsupportedError, {"diversity_penalty": 0.5}),
    "constraints": (UnsupportedError, {"constraints": [1]}),
    "force_words_ids": (UnsupportedError, {"force_words_ids": [[1]]}),
    "dola_layers": (UnsupportedError, {"dola_layers": "low"}),
    "token_healing": (UnsupportedError, {"token_healing": True}),
    "assistant_early_exit": (UnsupportedError, {"assistant_early_exit": 1}),
    "use_mtp": (UnsupportedError, {"use_mtp": True}),
    "speculation_type": (UnsupportedError, {"speculation_type": "dflash"}),
    "cache_implementation": (UnsupportedError, {"cache_implementation": "static"}),
    "use_cache": (UnsupportedError, {"use_cache": False}),
    "output_attentions": (UnsupportedError, {"output_attentions": True}),
    "past_key_values": (RequestError, {"past_key_values": object()}),
    "position_ids": (UnsupportedError, {"position_ids": torch.ones(2, 3)}),
    "token_type_ids": (UnsupportedError, {"token_type_ids": torch.ones(2, 3)}),
    "inputs_embeds": (UnsupportedError, {"inputs_embeds": torch.ones(2, 3, 64)}),
    "custom_generate": (UnsupportedError, {"custom_generate": "some/where"}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_a_suffix_cannot_serve_is_refused_by_name(model, doc, field):
    kind, options = REFUSED[field]
    with pytest.raises(kind) as caught:
        kvkern.generate(model, doc, **doc.encode(QUESTIONS[:2]), **{"max_new_tokens": 4, **GREEDY, **options})
    assert caught.value.field == field and caught.value.do
    if hasattr(GenerationConfig(), field) and field != "max_new_tokens":
        config = GenerationConfig(max_new_tokens=4, pad_token_id=0)
        setattr(config, field, options[field])
        with pytest.raises(kind) as caught:
            kvkern.generate(model, doc, **doc.encode(QUESTIONS[:2]), generation_config=config)
        assert caught.value.field == field


def test_without_max_new_tokens_is_refused(model, doc):
    for new in (None, -1, 2.5, True):
        with pytest.raises(RequestError, match="max_new_tokens: found"):
            kvkern.generate(model, doc, **doc.encode(QUESTIONS[:2]), max_new_tokens=new)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
def test_a_mask_that_is_not_padding_on_the_left_is_refused(model, doc, mask):
    ids, full = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    full[1] = torch.tensor(mask)
    with pytest.raises(RequestError, match="attention_mask: found padding inside or on the right"):
        kvkern.generate(model, doc, ids, full, max_new_tokens=2)


def test_shapes_and_token_ids_are_checked(model, doc):
    ids = torch.ones(2, 4, dtype=torch.int64)
    for wrong, field in (
        ({"input_ids": ids[0]}, "input_ids"),
        ({"input_ids": ids[:, :0]}, "input_ids"),
        ({"input_ids": ids, "attention_mask": ids[:, 1:]}, "attention_mask"),
    ):
        with pytest.raises(ShapeError) as caught:
            kvkern.generate(model, doc, **wrong, max_new_tokens=2)
        assert caught.value.field == field
    for token in (-1, 320):
        ids[1, 2] = token
        with pytest.raises(RequestError, match=rf"input_ids token_ids\[6\]: found {token}, needed 0 to 319"):
            kvkern.generate(model, doc, ids, max_new_tokens=2)


def test_more_tokens_than_positions_are_refused(tokenizer):
    model = tiny_model(max_position_embeddings=24)
    doc = kvkern.publish(model, None, list(range(16)))
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(CapacityError, match=r"16 \+ 4 \+ 5 tokens, needed at most the model's 24 positions"):
        kvkern.generate(model, doc, ids, max_new_tokens=5)
    assert kvkern.generate(model, doc, ids, max_new_tokens=4, **GREEDY).shape == (1, 8)


def test_a_prefix_of_another_model_is_refused(doc):
    ids = torch.ones(1, 4, dtype=torch.int64)
    for other, error, field in (
        (tiny_model(seed=1), IdentityError, "prefix.weights"),
        (tiny_model(num_hidden_layers=1), ShapeError, "prefix.geometry"),
        (tiny_model(dtype=torch.bfloat16), ShapeError, "prefix.geometry"),
    ):
        with pytest.raises(error) as caught:
            kvkern.generate(other, doc, ids, max_new_tokens=2)
        assert caught.value.field == field


def test_a_backend_that_cannot_run_here_is_refused(model, doc):
    with pytest.raises(BackendError, match="backend: found fast"):
        kvkern.generate(model, doc, torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, backend="fast")


def test_a_wrapper_that_cannot_generate_is_refused(model, doc):
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config
            self.eval()

    with pytest.raises(UnsupportedError, match="model: found Wrapper, needed a model of transformers"):
        kvkern.generate(Wrapper(), doc, torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)


def test_a_compiled_models_generate_is_the_models(model, doc):
    batch = doc.encode(QUESTIONS[:2])
    expected = kvkern.generate(model, doc, **batch, max_new_tokens=4, **GREEDY)
    assert torch.equal(kvkern.generate(torch.compile(model), doc, **batch, max_new_tokens=4, **GREEDY), expected)


def test_a_prompt_in_chunks_and_a_cache_are_refused_together(model, doc):
    batch = doc.encode(QUESTIONS[:1])
    out = kvkern.generate(model, doc, **batch, max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    options = dict(past_key_values=out.past_key_values, max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size: found 4, needed None with past_key_values"):
        kvkern.generate(model, doc, **batch, **options, **GREEDY)
