"""transformers' own generate over a prefix: the tokens of the concatenated prompt, processors that see the document, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import QUESTIONS, TEXT, tiny_model, tiny_tokenizer, twin
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, MaxLengthCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import kvkern
from kvkern.errors import (
    BackendError,
    CapacityError,
    IdentityError,
    KvkernError,
    RequestError,
    ShapeError,
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
    """The concatenated prompt of each row, left-padded: what transformers is given without a prefix."""
    suffixes = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    prompts = [torch.cat([doc.path_token_ids(), suffix]) for suffix in suffixes]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
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
        out = run(**given, **copy.deepcopy(options))
        found.append(out[:, given["input_ids"].shape[1] :].tolist())
    return found[0], found[1]


# -- the same tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_over_a_ragged_batch_is_transformers_on_the_whole_prompt(tokenizer, kind):
    model = tiny_model(kind)
    doc = kvkern.publish(model, tokenizer, TEXT)
    batch = doc.encode(QUESTIONS)
    assert batch["attention_mask"].sum(1).unique().numel() > 3
    found, expected = both(doc, model, batch, max_new_tokens=20, **GREEDY)
    assert found == expected


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


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_the_repetition_penalty_counts_the_documents_tokens(model, doc, penalty):
    batch = doc.encode(QUESTIONS)
    found, expected = both(doc, model, batch, max_new_tokens=10, repetition_penalty=penalty, **GREEDY)
    assert found == expected
    assert found != both(doc, model, batch, max_new_tokens=10, **GREEDY)[0]


def test_control_a_penalty_over_the_suffix_alone_gives_other_tokens(model, doc):
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    batch = doc.encode(QUESTIONS)
    expected = both(doc, model, batch, max_new_tokens=10, repetition_penalty=1.3, **GREEDY)[1]

    class SuffixOnly(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return RepetitionPenaltyLogitsProcessor(1.3)(input_ids[:, doc.end :], scores)

    out = kvkern.generate(
        model, doc, **batch, max_new_tokens=10, logits_processor=LogitsProcessorList([SuffixOnly()]), **GREEDY
    )
    assert out[:, batch["input_ids"].shape[1] :].tolist() != expected


def test_several_samples_of_each_question(model, doc):
    torch.manual_seed(3)
    options = dict(max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)
    found, expected = both(doc, model, doc.encode(QUESTIONS[:4]), **options)
    assert found == expected and len(found) == 12 and found[0] != found[1]


def test_an_answer_that_ends_is_padded(model, doc):
    batch = doc.encode(QUESTIONS)
    free = both(doc, model, batch, max_new_tokens=10, **GREEDY)[0]
    found, expected = both(doc, model, batch, max_new_tokens=10, eos_token_id=free[0][3], **GREEDY)
    assert found == expected and found[0][free[0].index(free[0][3]) + 1 :] == [0] * (9 - free[0].index(free[0][3]))


def test_over_three_levels_of_prefixes(model, tokenizer):
    root = kvkern.publish(model, tokenizer, TEXT, chat=False)
    child = kvkern.publish(model, tokenizer, " Then there are tanks.", parent=root)
    leaf = kvkern.publish(model, tokenizer, " And people.", parent=child)
    found, expected = both(leaf, model, leaf.encode(QUESTIONS), max_new_tokens=10, **GREEDY)
    assert found == expected


# -- what goes along ---------------------------------------------------------------------------------------------------


def test_logits_processors_see_document_and_suffix(model, doc):
    seen: list[Tensor] = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return scores

    batch = doc.encode(QUESTIONS[:2])
    out = kvkern.generate(model, doc, **batch, max_new_tokens=3, logits_processor=[Look()], **GREEDY)
    assert len(seen) == 3
    for n, ids in enumerate(seen):
        assert torch.equal(ids[:, : doc.end], doc.path_token_ids().expand(2, -1))
        assert torch.equal(ids[:, doc.end :], out[:, : batch["input_ids"].shape[1] + n])


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


def test_logits_come_back_in_a_dict_of_results(model, doc):
    batch = doc.encode(QUESTIONS[:2])
    out = kvkern.generate(
        model, doc, **batch, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    assert [row.argmax(-1).tolist() for row in out.logits] == out.sequences[:, -3:].T.tolist()


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
    "num_beams": (UnsupportedError, {"num_beams": 2}),
    "prompt_lookup_num_tokens": (UnsupportedError, {"prompt_lookup_num_tokens": 3}),
    "assistant_model": (UnsupportedError, {"assistant_model": object()}),
    "no_repeat_ngram_size": (UnsupportedError, {"no_repeat_ngram_size": 2}),
    "penalty_alpha": (UnsupportedError, {"penalty_alpha": 0.6}),
    "guidance_scale": (UnsupportedError, {"guidance_scale": 2.0}),
    "sequence_bias": (UnsupportedError, {"sequence_bias": {(1,): 1.0}}),
    "cache_implementation": (UnsupportedError, {"cache_implementation": "static"}),
    "prefill_chunk_size": (UnsupportedError, {"prefill_chunk_size": 8}),
    "use_cache": (UnsupportedError, {"use_cache": False}),
    "past_key_values": (UnsupportedError, {"past_key_values": object()}),
    "position_ids": (UnsupportedError, {"position_ids": torch.ones(2, 3)}),
    "inputs_embeds": (UnsupportedError, {"inputs_embeds": torch.ones(2, 3, 64)}),
    "negative_prompt_ids": (UnsupportedError, {"negative_prompt_ids": torch.ones(2, 3)}),
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
