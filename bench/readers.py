"""A reader who means other tokens than the publisher: another prompt before the document, chat template or tokenizer.

order         another system prompt stands before the document
template      the reader's tokenizer has another chat template
tokenizer     it cuts text otherwise, into tokens that the model knows
unchanged     the control: a tokenizer made again of the same parts
"""

from __future__ import annotations

import contextlib
import difflib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import kvkern
from kvkern.errors import KvkernError
from kvkern.publish import Document

CHANGED = ("unchanged", "order", "template", "tokenizer")

PROMPT = "You are a patient lawyer who answers in plain words, and never in more of them than needed.\n\n"
"""A system prompt that the document's KV knows nothing of."""
DEFAULT = (
    "You are a helpful AI assistant. Your knowledge ends in June 2024.\n\n"
    """What a chat template may say of itself."""
)
BEFORE_SYSTEM = (
    "{%- set said = namespace(all=[]) -%}{%- for message in messages -%}{%- if message['role'] == 'system' -%}"
    "{%- set said.all = said.all + [dict(message, content="
    + json.dumps(DEFAULT)
    + " + message['content'])] -%}{%- else -%}"
    "{%- set said.all = said.all + [message] -%}{%- endif -%}{%- endfor -%}{%- set messages = said.all -%}"
)

TEMPLATES: dict[str, Callable[[str], str]] = {
    "another default prompt before the document": lambda template: BEFORE_SYSTEM + template,
    "another marker of turns": lambda template: template.replace("<|im_start|>", "### "),
    "another opening of the answer": lambda template: template + "{% if add_generation_prompt %}Answer: {% endif %}",
}
"""The publisher's chat template -> the reader's. The last changes nothing that the document's KV depends on."""


def digits(parts: dict[str, Any]) -> None:
    apart = {"type": "Digits", "individual_digits": True}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [apart, parts["pre_tokenizer"]]}


def fewer_merges(parts: dict[str, Any]) -> None:
    merges = parts["model"]["merges"]
    parts["model"] |= {"merges": merges[: len(merges) // 2], "ignore_merges": False}


REVISIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "numbers cut into digits": digits,
    "without the later half of its merges": fewer_merges,
}
"""What another revision changes in the parts of a tokenizer, as its tokenizer.json holds them. Every token stays one of the model's."""


def remade(
    tokenizer: Any, *, revision: Callable[[dict[str, Any]], None] | None = None, template: str | None = None
) -> Any:
    """A tokenizer of the same parts, or of those that a revision or a template changes."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if revision is not None:
        revision(parts)
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    other.chat_template = template or tokenizer.chat_template
    return other


def readers_tokenizer(tokenizer: Any, part: str, way: str) -> Any:
    """The publisher's -> the reader's; way: of TEMPLATES or REVISIONS."""
    if part == "template":
        return remade(tokenizer, template=TEMPLATES[way](tokenizer.chat_template))
    return remade(tokenizer, revision=REVISIONS[way] if part == "tokenizer" else None)


def refusal(model: Any, document: Document, part: str, tokenizer: Any) -> dict[str, Any]:
    """What `kvkern.load` says of the document's file, with the reader's tokenizer, or below the prompt."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        path = Path(folder) / "document.kv"
        document.save(path)
        parent = None
        if part == "order":
            parent = held.enter_context(kvkern.publish(model, document.wording.tokenizer, PROMPT))
        try:
            kvkern.load(path, model, tokenizer, parent=parent).release()
        except KvkernError as error:
            said = {"error": type(error).__name__, "field": error.field, "message": str(error).splitlines()[0]}
            return {"refused": True, "refused_by": "kvkern.load", **said}
    return {"refused": False}


def meant(model: Any, tokenizer: Any, text: str, part: str) -> Document:
    """The document as the reader means it."""
    return kvkern.publish(model, tokenizer, PROMPT + text if part == "order" else text)


def token_counts(published: Document, wanted: Document) -> dict[str, int]:
    """Of both documents, and how many of the second's are not among the first's, in order."""
    a, b = published.token_ids.tolist(), wanted.token_ids.tolist()
    same = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return {"published_tokens": len(a), "meant_tokens": len(b), "other_tokens": len(b) - same}
