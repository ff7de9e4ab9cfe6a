"""docs/transformers.md: its code runs, block after block, and its answers are transformers' own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import QWEN3, TEXT, tiny_model, tiny_tokenizer, twin

import kvkern

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transformers.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What all names are after the page's code has run, on tiny models in the place of those it names.

    The tiny model's answers are no text that a tokenizer gives back, so its warning of a conversation that does not go on
    is to be expected.
    """
    folder = tmp_path_factory.mktemp("docs")
    (folder / "handbook.txt").write_text(TEXT, encoding="utf-8")
    for name, layers in (("Qwen3-4B", 2), ("Qwen3-0.6B", 1)):
        made = tiny_model(num_hidden_layers=layers, pad_token_id=265)
        made.generation_config.pad_token_id = 265
        made.save_pretrained(folder / name)
        tiny_tokenizer(QWEN3, pad_token="<|endoftext|>", eos_token="<|im_end|>").save_pretrained(folder / name)
    names: dict[str, Any] = {"__name__": "docs"}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "past_key_values: row 0 goes on from")
        patch.chdir(folder)
        for n, block in enumerate(BLOCK.findall(PAGE.read_text(encoding="utf-8"))):
            code = block.replace("Qwen/", "./").replace('dtype="bfloat16"', 'dtype="float32"')
            if "doc.release()" in code:
                break
            exec(compile(code, f"docs/transformers.md, block {n + 1}", "exec"), names)
    yield names
    names["doc"].release()


def answers(ran: dict[str, Any], suffixes: Sequence[Sequence[int]], new: int, doc: Any = None, **options: Any) -> Any:
    """transformers' own answers after the document and each suffix, ended by nothing but the model's own eos."""
    document = (doc or ran["doc"]).path_token_ids().tolist()
    reference = twin(ran["model"])
    reference.generation_config = ran["model"].generation_config
    out = []
    for suffix in suffixes:
        prompt = torch.tensor([[*document, *suffix]])
        made = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **options)
        out.append(made[0, prompt.shape[1] :].tolist())
    return out


def suffixes(batch: dict[str, Any]) -> list[list[int]]:
    return [i[m.bool()].tolist() for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_the_page_has_code(ran):
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) >= 11 and len(ran["answers"]) == 3


@pytest.mark.parametrize(
    ("name", "new", "options"),
    [
        ("beams", 16, {"num_beams": 3, "no_repeat_ngram_size": 3}),
        ("penalised", 16, {"repetition_penalty": 1.2}),
        ("scored", 16, {}),
    ],
)
def test_batches_answer_as_transformers_does(ran, name, new, options):
    found = ran[name] if isinstance(ran[name], torch.Tensor) else ran[name].sequences
    width = ran["batch"]["input_ids"].shape[1]
    assert found[:, width:].tolist() == answers(ran, suffixes(ran["batch"]), new, **options)


def test_one_question_answers_as_transformers_does(ran):
    why, quote = (suffixes(ran["doc"].encode(q))[0] for q in ("Why?", "Quote the handbook."))
    for name, suffix, new in (("streamed", why, 16), ("assisted", why, 32), ("looked_up", quote, 32)):
        assert ran[name][0].tolist() == suffix + answers(ran, [suffix], new)[0], name


def test_several_samples_come_for_each_question(ran):
    assert ran["sampled"].shape[0] == 6
    assert torch.equal(
        ran["sampled"][:, : ran["batch"]["input_ids"].shape[1]], ran["batch"]["input_ids"].repeat_interleave(2, 0)
    )


def test_ids_of_ones_own_answer_as_transformers_does(ran):
    assert not ran["ids"]["attention_mask"].all()
    width = ran["ids"]["input_ids"].shape[1]
    found = kvkern.generate(ran["model"], ran["doc"], **ran["ids"], max_new_tokens=16)[:, width:].tolist()
    assert found == answers(ran, suffixes(ran["ids"]), 16)


def test_a_conversation_answers_as_transformers_does(ran):
    suffix = suffixes(ran["second"])[0]
    assert ran["again"][0].tolist() == suffix + answers(ran, [suffix], 64)[0]
    assert ran["reused"][0] >= len(suffixes(ran["first"])[0])


def test_shared_turns_answer_as_transformers_does(ran):
    batch = ran["chapter"].encode(ran["questions"])
    found = ran["out"][:, batch["input_ids"].shape[1] :].tolist()
    assert found == answers(ran, suffixes(batch), 16, ran["chapter"])


def test_the_engine_has_answered_last(ran):
    assert ran["reply"].finish_reason in ("length", "stop") and 0 <= ran["reply"].index <= 3


def test_without_a_prefix_it_is_sdpa(ran):
    prompt = ran["tokenizer"]("The pump starts", return_tensors="pt")
    reference = twin(ran["model"])
    assert torch.equal(reference(**prompt, labels=prompt["input_ids"]).loss, ran["loss"])
    assert ran["plain"][0].tolist() == reference.generate(**prompt, max_new_tokens=16, pad_token_id=265)[0].tolist()


def test_control_other_documents_give_other_answers(ran):
    suffix = suffixes(ran["batch"])
    assert answers(ran, suffix, 16) != answers(ran, suffix, 16, ran["chapter"])
