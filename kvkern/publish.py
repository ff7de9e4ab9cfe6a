"""Text -> token ids -> one prefill in fixed chunks -> a published Document; and questions -> the token ids of suffixes."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import torch
from torch import Tensor

from kvkern import qwen3, store
from kvkern.backends import choose
from kvkern.errors import CapacityError, DeviceError, IdentityError, RequestError, ShapeError, TemplateError
from kvkern.geometry import Geometry
from kvkern.header import Header
from kvkern.identity import Identity, match, model_geometry, short, weights_digest
from kvkern.prefix import SharedPrefix

CHUNK = 512
"""Tokens of a document that are prefilled at once."""

STAND_IN = "document"
"""Content of the system message when a question is rendered: what follows that message does not depend on its content."""

ANY_QUESTION = "Why?"
"""Rendered where a document is published, to see whether a question can follow it."""

Messages = Sequence[Mapping[str, Any]]
Question = str | Messages
"""A question, or the conversation since the document, whose last message is to be answered."""
Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


class Wording:
    """How a document and the questions to it become tokens: a tokenizer, and whether its chat template is used.

    tokenizer        a transformers tokenizer, or None for a document given as token ids
    chat             the document is the system message, a question the user's next turn
    template_kwargs  keywords of the template, used for the document and for every question
    turns            messages between the system message and the question, shared by all agents below
    """

    def __init__(
        self, tokenizer: Any, *, chat: bool, template_kwargs: Mapping[str, Any] | None = None, turns: Messages = ()
    ) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.template_kwargs = dict(template_kwargs or {})
        self.turns = [dict(turn) for turn in turns]

    @property
    def template(self) -> str | None:
        return self.tokenizer.get_chat_template() if self.chat else None

    def document_ids(self, text: str) -> list[int]:
        """Tokens of a root document. Raises TemplateError where a conversation does not begin with exactly these."""
        if not self.chat:
            ids: list[int] = self.tokenizer(text)["input_ids"]
            # Some tokenizers close every text; a document goes on.
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        system = [{"role": "system", "content": text}]
        ids = self._render(system, {})
        after = self._after(ids, [*system, {"role": "user", "content": ANY_QUESTION}], {}, question=True)
        if after != self.question_ids(ANY_QUESTION, {}):
            raise TemplateError(
                "chat_template",
                found="a question whose tokens depend on the document before it",
                needed="the same tokens after every document",
                do="publish with chat=False, or with another chat_template",
            )
        return ids

    def turn_ids(self, begin: int) -> list[int]:
        """Tokens that the shared turns from `begin` on add to the conversation before them."""
        before = [{"role": "system", "content": STAND_IN}, *self.turns[:begin]]
        ids = self._after(self._render(before, {}), [*before, *self.turns[begin:]], {}, question=False)
        self.question_ids(ANY_QUESTION, {})  # One must be able to follow.
        return ids

    def question_ids(self, question: Question, template_kwargs: Mapping[str, Any]) -> list[int]:
        """Tokens that a question, or a conversation, adds, up to where the answer begins."""
        if not self.chat:
            if not isinstance(question, str):
                raise TemplateError(
                    "chat",
                    found="a conversation",
                    needed="a text for a document published with chat=False",
                    do="give the text that goes on, or publish with chat=True",
                )
            if template_kwargs:
                raise TemplateError(
                    "template_kwargs",
                    found=sorted(template_kwargs),
                    needed="none for a document published with chat=False",
                    do="leave them out",
                )
            ids: list[int] = self.tokenizer(question, add_special_tokens=False)["input_ids"]
            return ids
        base = [{"role": "system", "content": STAND_IN}, *self.turns]
        before = self._render(base, {})
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return self._after(before, [*base, *asked], template_kwargs, question=True)

    def _render(self, messages: Messages, template_kwargs: Mapping[str, Any], *, question: bool = False) -> list[int]:
        kwargs = {**self.template_kwargs, **template_kwargs}
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, add_generation_prompt=question, **kwargs
            )
        except jinja2.TemplateError as error:
            raise TemplateError(
                "chat_template",
                found=f"a template that refuses the conversation: {error}",
                needed="one that takes a system message, then the user's",
                do="publish with chat=False, with other messages, or with another chat_template",
            ) from error
        return ids

    def _after(
        self, before: list[int], messages: Messages, template_kwargs: Mapping[str, Any], *, question: bool
    ) -> list[int]:
        ids = self._render(messages, template_kwargs, question=question)
        if ids[: len(before)] != before:
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
            )
            raise TemplateError(
                "chat_template",
                found=f"a conversation that leaves the document's {len(before)} tokens at token {same}",
                needed="the tokens of [system] as a prefix of those of [system, user]",
                do="publish with chat=False, with other template keywords, or with another chat_template",
            )
        return ids[len(before) :]


class Document(SharedPrefix):
    """A SharedPrefix that knows its words: `encode` turns questions into suffixes, `save` writes the .kv file."""

    wording: Wording
    max_positions: int
    vocab_size: int

    def encode_ids(self, questions: Sequence[Question], **template_kwargs: Any) -> list[list[int]]:
        """Token ids of each question's suffix, unpadded.

        questions        texts, or conversations since the document: messages [{"role", "content"}, ...] below a chat document
        template_kwargs  keywords of the chat template, on top of those given to publish

        Raises RequestError for an empty question, CapacityError for one that leaves no position for an answer,
        TemplateError where the template with these keywords does not continue the document's tokens.
        """
        return [
            self.question_ids(question, template_kwargs, field=f"questions[{i}]")
            for i, question in enumerate(questions)
        ]

    def question_ids(
        self, question: Question, template_kwargs: Mapping[str, Any] | None = None, *, field: str = "question"
    ) -> list[int]:
        """Token ids of one question's suffix, or of a conversation's; `field` is its name in errors, which are those of `encode_ids`."""
        self.block()  # A released document is refused.
        if self.wording.tokenizer is None:
            raise RequestError(
                "tokenizer",
                found=None,
                needed="a tokenizer",
                do="publish or load the document with one, or pass token ids",
            )
        if not (question.strip() if isinstance(question, str) else is_conversation(question)):
            raise RequestError(
                field,
                found=repr(question),
                needed="a text that is not empty, or messages with role and content",
                do="leave it out",
            )
        ids = self.wording.question_ids(question, template_kwargs or {})
        check_ids(ids, self.vocab_size, field)
        if self.end + len(ids) >= self.max_positions:
            raise CapacityError(
                field,
                found=f"{len(ids)} tokens after a path of {self.end}",
                needed=f"fewer than the model's {self.max_positions} positions together",
                do="shorten the question, or use a model with more positions",
            )
        return ids

    def encode(self, questions: Sequence[Question] | Question, **template_kwargs: Any) -> dict[str, Tensor]:
        """{input_ids, attention_mask} of the suffixes, int64 [questions, longest], padded on the left, on the document's device.

        questions  one or many, as `encode_ids` takes them

        Raises as `encode_ids` does.
        """
        asked: list[Any] = [questions] if isinstance(questions, str) or is_conversation(questions) else list(questions)
        if not asked:
            raise RequestError("questions", found="none", needed="at least one", do="ask something")
        suffixes = self.encode_ids(asked, **template_kwargs)
        width = max(map(len, suffixes))
        tokenizer = self.wording.tokenizer
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        # A tokenizer may have been given a pad token that its model has no row for.
        pad = next(i for i in pads if i is not None and i < self.vocab_size)
        input_ids = torch.full((len(suffixes), width), pad, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(suffixes):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
        return {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}

    def save(self, path: str | Path, *, compress: str | None = None, progress: Progress | None = None) -> None:
        """Write the .kv file (see `store`): whole or not at all.

        compress  "planes-zstd-1": KV in bfloat16 packed without loss, with the same identity and digests; by default plain

        Raises StoreError for a path that cannot be written, UnsupportedError for a dtype that is not packed.
        """
        store.save(self, path, compress=compress, progress=progress)


def is_conversation(question: Any) -> TypeGuard[Messages]:
    """Whether it is messages, at least one, each with a role and a content or whatever else its template reads."""
    return (
        isinstance(question, Sequence)
        and not isinstance(question, str)
        and len(question) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in question)
    )


def publish(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[int] | Tensor | Messages,
    *,
    chat: bool | None = None,
    parent: Document | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    **template_kwargs: Any,
) -> Document:
    """Read a document once: prefill it in chunks and publish its KV on the model's device.

    model            a causal language model of transformers with attn_implementation="kvkern"
    tokenizer        its tokenizer; None if `text` is token ids
    text             the document; or its token ids; below a chat parent, messages [{"role", "content"}, ...]
    chat             put the document into the system message of the chat template; by default where the tokenizer has one
    parent           a published Document that this one continues
    chunk            tokens prefilled at once; provenance, not identity
    template_kwargs  keywords of the chat template, recorded and used again for every question

    Raises RequestError (an empty document, an unknown token id), CapacityError (more tokens than the model has positions),
    TemplateError (a template under which the document is no token prefix of the conversation), UnsupportedError or
    DeviceError (a model that the kernels cannot serve), ReadOnlyError or IdentityError (a parent that was released, or made
    with another model), each before anything is computed.
    """
    device = qwen3.check_model(model)
    if chunk < 1:
        raise RequestError("chunk", found=chunk, needed="at least 1", do="leave it out")
    if parent is not None:
        check_document(parent, model, field="parent")
    wording, ids = _words(tokenizer, text, chat, parent, template_kwargs)
    geometry = model_geometry(model)
    start = parent.end if parent is not None else 0
    check_ids(ids, model.config.vocab_size, "document")
    if start + len(ids) >= qwen3.max_positions(model):
        raise CapacityError(
            "document",
            found=f"{len(ids)} tokens" + (f" after a path of {start}" if start else ""),
            needed=f"fewer than the model's {qwen3.max_positions(model)} positions",
            do="publish a part of it, or use a model with more positions",
        )
    token_ids = torch.tensor(ids, dtype=torch.int64)
    document = _document(geometry, token_ids, device=device, parent=parent, wording=wording, model=model)
    try:
        _prefill(model, document, chunk, progress)
        identity = Identity.of(
            model,
            tokenizer,
            token_ids,
            template=wording.template,
            template_kwargs=wording.template_kwargs,
            parent=parent,
        )
        document.publish(identity=identity, provenance=_provenance(model, document, chunk))
    except BaseException:
        document.release()
        raise
    return document


def load(
    path: str | Path,
    model: Any,
    tokenizer: Any,
    *,
    parent: Document | None = None,
    mmap: bool = False,
    progress: Progress | None = None,
) -> Document:
    """Read a .kv file, verify that this model and tokenizer would have made it, and publish it on the model's device.

    parent  the loaded Document that the file continues, if it does
    mmap    serve from a read-only mapping of the file instead of a copy (CPU); see `store.load`

    Raises IdentityError naming the first field that differs, StoreError naming what is damaged, UnsupportedError or
    DeviceError for a model that the kernels cannot serve. A failed load leaves no trace.
    """
    device = qwen3.check_model(model)
    made: dict[str, Any] = {}

    def make(geometry: Geometry, token_ids: Tensor, header: Header) -> SharedPrefix:
        wording = Wording(
            tokenizer,
            chat=header.identity.template is not None,
            template_kwargs=header.identity.template_kwargs,
            turns=header.provenance.get("turns", ()),
        )
        made["document"] = _document(geometry, token_ids, device=device, parent=parent, wording=wording, model=model)
        return made["document"]

    store.load(
        path,
        device=device,
        check=lambda found, where: match(found, model, tokenizer, where=where, parent=parent),
        parent=parent,
        mmap=mmap,
        progress=progress,
        make=make,
    )
    return made["document"]


def check_document(
    document: SharedPrefix, model: Any, *, tokenizer_digest: str | None = None, field: str = "document"
) -> None:
    """Refuse a prefix that this model, or this tokenizer where one is given, has not made, before any of its KV is read.

    Raises ReadOnlyError for a released one, ShapeError or DeviceError for another geometry or device, IdentityError for
    other weights or another tokenizer.
    """
    document.block()
    again = "publish the document with this model"
    geometry, device = model_geometry(model), next(model.parameters()).device
    if document.geometry != geometry:
        raise ShapeError(f"{field}.geometry", found=document.geometry, needed=f"{geometry} as in the model", do=again)
    if document.device != device:
        raise DeviceError(
            f"{field}.device",
            found=document.device,
            needed=f"{device} as the model",
            do="load the document with this model",
        )
    weights = weights_digest(model)
    made_with = getattr(document.identity, "weights", None)
    if made_with != weights:
        raise IdentityError(
            f"{field}.weights", found=short(made_with), needed=f"{short(weights)} as in the model", do=again
        )
    made_with = getattr(document.identity, "tokenizer", None)
    if None not in (made_with, tokenizer_digest) and made_with != tokenizer_digest:
        raise IdentityError(
            f"{field}.tokenizer",
            found=short(made_with),
            needed=f"{short(tokenizer_digest)} as given",
            do="give the tokenizer that the document was published with",
        )


def _words(
    tokenizer: Any, text: Any, chat: bool | None, parent: Document | None, template_kwargs: Mapping[str, Any]
) -> tuple[Wording, list[int]]:
    """The wording of the document, and its own token ids."""
    given_ids = _given_ids(text)
    if given_ids is None and tokenizer is None:
        raise RequestError(
            "tokenizer", found=None, needed="the model's tokenizer", do="pass it, or give the document as token ids"
        )
    if isinstance(text, str) and not text.strip():
        raise RequestError(
            "document",
            found=f"a text of {len(text)} characters, all blank" if text else "an empty text",
            needed="at least one token",
            do="give a text that is not empty",
        )
    if template_kwargs and (parent is not None or given_ids is not None):
        raise TemplateError(
            "template_kwargs",
            found=sorted(template_kwargs),
            needed="none for token ids, nor below a parent, whose keywords are used again",
            do="leave them out",
        )
    if parent is not None:
        return _child_words(tokenizer, text, chat, parent, given_ids)
    if given_ids is not None:
        if chat:
            raise TemplateError(
                "chat", found=True, needed="False for a document given as token ids", do="give the document as text"
            )
        return Wording(tokenizer, chat=False), given_ids
    if not isinstance(text, str):
        raise RequestError(
            "document", found="messages", needed="a text or token ids", do="give messages only below a chat parent"
        )
    if chat is None:
        chat = tokenizer.chat_template is not None
    if chat and tokenizer.chat_template is None:
        raise TemplateError(
            "chat_template", found="a tokenizer without one", needed="a chat template", do="publish with chat=False"
        )
    if not chat and template_kwargs:
        raise TemplateError(
            "template_kwargs", found=sorted(template_kwargs), needed="none with chat=False", do="leave them out"
        )
    wording = Wording(tokenizer, chat=chat, template_kwargs=template_kwargs)
    return wording, wording.document_ids(text)


def _given_ids(text: Any) -> list[int] | None:
    """The token ids, where the document is given as such; None for a text or messages, in whatever state they are."""
    if isinstance(text, Tensor):
        if text.dim() != 1 or text.is_floating_point() or text.dtype == torch.bool:
            raise RequestError(
                "document",
                found=f"a tensor {text.dtype} {list(text.shape)}",
                needed="integers in one dimension",
                do="give token ids as tokenizer(text)['input_ids'] returns them",
            )
        ids: list[int] = text.tolist()
        return ids
    if isinstance(text, str):
        return None
    if not isinstance(text, Sequence):
        raise RequestError(
            "document", found=type(text).__name__, needed="a text, token ids or messages", do="give the document itself"
        )
    if all(isinstance(i, int) for i in text):
        return list(text)
    if not all(isinstance(turn, Mapping) for turn in text):
        raise RequestError(
            "document",
            found=", ".join(sorted({type(i).__name__ for i in text})),
            needed="a text, token ids or messages",
            do="give one of them",
        )
    return None


def _child_words(
    tokenizer: Any, text: Any, chat: bool | None, parent: Document, given_ids: list[int] | None
) -> tuple[Wording, list[int]]:
    above = parent.wording
    if chat is not None and chat != above.chat:
        raise TemplateError("chat", found=chat, needed=f"{above.chat} as in the parent", do="leave it out")
    if given_ids is not None:
        chat = above.chat and tokenizer is not None
        return Wording(tokenizer, chat=chat, template_kwargs=above.template_kwargs, turns=above.turns), given_ids
    if not above.chat:
        if not isinstance(text, str):
            raise RequestError(
                "document", found="messages", needed="a text or token ids below a parent without chat", do="give a text"
            )
        return Wording(tokenizer, chat=False), tokenizer(text, add_special_tokens=False)["input_ids"]
    if isinstance(text, str):
        raise RequestError(
            "document",
            found="a text below a chat parent",
            needed="messages [{'role', 'content'}, ...] or token ids",
            do="give the turns that follow the document",
        )
    wording = Wording(tokenizer, chat=True, template_kwargs=above.template_kwargs, turns=[*above.turns, *text])
    return wording, wording.turn_ids(len(above.turns))


def check_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Refuse no tokens, and tokens that the model does not know. Raises RequestError."""
    if not ids:
        raise RequestError(field, found="no tokens", needed="at least one token", do="give a text that is not empty")
    if min(ids) < 0 or max(ids) >= vocab_size:
        i, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise RequestError(
            f"{field} token_ids[{i}]", found=token, needed=f"0 to {vocab_size - 1}", do="use this model's tokenizer"
        )


def _document(
    geometry: Geometry,
    token_ids: Tensor,
    *,
    device: torch.device,
    parent: Document | None,
    wording: Wording,
    model: Any,
) -> Document:
    document = Document(geometry, token_ids, device=device, parent=parent)
    document.wording = wording
    document.max_positions, document.vocab_size = qwen3.max_positions(model), model.config.vocab_size
    return document


@torch.no_grad()
def _prefill(model: Any, document: Document, chunk: int, progress: Progress | None) -> None:
    cache = qwen3.PrefillCache(document)
    ids = document.token_ids.to(document.device)[None]
    # Any 4-D mask is handed on as it is, so transformers builds none of its own.
    mask = torch.empty((1, 1, 1, 1), device=document.device)
    for begin in range(0, document.tokens, chunk):
        end = min(begin + chunk, document.tokens)
        positions = torch.arange(begin, end, device=document.device)[None] + document.position
        model.base_model(
            ids[:, begin:end], position_ids=positions, past_key_values=cache, attention_mask=mask, use_cache=True
        )
        cache.advance(end - begin)
        if progress is not None:
            progress(end, document.tokens)


def _provenance(model: Any, document: Document, chunk: int) -> dict[str, Any]:
    return {
        "model": str(model.config._name_or_path),
        "kvkern": importlib.metadata.version("kvkern"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "backend": choose(None, document.device).name,
        "prefill_chunk": chunk,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"turns": document.wording.turns} if document.wording.turns else {}),
    }
