"""What is checked: one model with its tokenizer, on one device, by one backend; and a text to ask it about."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvkern import native, opening
from kvkern.backends import Backend, choose
from kvkern.checks import tiny
from kvkern.errors import TemplateError
from kvkern.geometry import Geometry
from kvkern.identity import model_geometry
from kvkern.publish import Document, publish

DATA = Path(opening.__file__).parent / "data"
CHARACTERS = 1300
"""Of the document: some hundred tokens of a real tokenizer."""

QUESTIONS = 17
"""Of which the first stands for the one agent whose bits are compared."""


@dataclass(frozen=True, eq=False)
class Subject:
    """name as it was given; model and tokenizer ready for kvkern; backend as it was chosen; a text and questions to it."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    backend: Backend
    text: str
    questions: tuple[str, ...]

    @property
    def geometry(self) -> Geometry:
        return model_geometry(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.geometry.dtype

    def publish(self) -> Document:
        """The document, as the system message where the model's chat template allows it, else as plain text."""
        try:
            return publish(self.model, self.tokenizer, self.text)
        except TemplateError:
            return publish(self.model, self.tokenizer, self.text, chat=False)

    def conversation(self, document: Document, question: str) -> list[int]:
        """All tokens before the answer, as transformers alone makes them."""
        if document.wording.chat:
            messages = [{"role": "system", "content": self.text}, {"role": "user", "content": question}]
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            return ids
        own: list[int] = self.tokenizer(self.text)["input_ids"]
        if len(own) > 1 and own[-1] == self.tokenizer.eos_token_id:
            own = own[:-1]
        return [*own, *self.tokenizer(question, add_special_tokens=False)["input_ids"]]

    def describe(self) -> dict[str, Any]:
        """What the results speak of, JSON values only."""
        g = self.geometry
        cuda = self.device.type == "cuda"
        return {
            "model": self.name,
            "geometry": f"{g.layers} layers, {g.num_qo_heads} heads over {g.num_kv_heads} kv heads of {g.head_dim}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": f"{self.device} {torch.cuda.get_device_name(self.device)}" if cuda else str(self.device),
            "backend": self.backend.name,
            "backend_why": self.backend.why,
            "instruction_set": native.instruction_set(),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }


def open_subject(
    model: str | None, *, dtype: opening.Dtype | None, device: str | None, backend: str | None, seed: int
) -> Subject:
    """The model of this name, or a tiny random one. Raises as `opening.open_model`, `device_of` and `choose` do."""
    native.instruction_set()  # a KVKERN_ISA that cannot be had is refused before a model is opened
    place = opening.device_of(device)
    chosen = choose(backend, place)
    if model is None:
        live, tokenizer = tiny.tiny_model(dtype or opening.dtype_for(place), place, seed)
    else:
        live, tokenizer = opening.open_model(model, dtype, place)
    lines = (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    return Subject(
        name=tiny.NAME if model is None else model,
        model=live,
        tokenizer=tokenizer,
        device=place,
        backend=chosen,
        text=(DATA / "gpl-3.txt").read_text(encoding="utf-8")[:CHARACTERS],
        questions=tuple(json.loads(line)["question"] for line in lines),
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("kvkern", "torch", "triton", "transformers", "pytest"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
