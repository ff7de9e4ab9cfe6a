"""What is refused, in one table: each wrong input, and an error that says which field, what was found, what is needed, what to do.

The modules' own tests try more of each kind; here every line of "What is refused" has its own, and no refusal leaves a trace.
"""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import QUESTIONS, TEXT, tiny_model, tiny_tokenizer
from test_attention import batch_of
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kvkern
from kvkern import cli, errors, store
from kvkern.errors import (
    BackendError,
    CapacityError,
    DeviceError,
    DtypeError,
    IdentityError,
    KvkernError,
    ReadOnlyError,
    RequestError,
    ShapeError,
    StoreError,
    TemplateError,
    UnsupportedError,
)
from kvkern.geometry import PAGE
from kvkern.identity import Identity, match, model_geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

FOUR_PAGES = 4 * PAGE * 2 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, head_dim, bytes


class World:
    """One model with its document, a file of it, an engine, and a step; whoever is refused leaves all of it as it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = tiny_model(), tiny_tokenizer()
        self.doc = kvkern.publish(self.model, self.tokenizer, TEXT, date="today")
        self.file = folder / "doc.kv"
        self.doc.save(self.file)
        self.data = self.file.read_bytes()
        self.engine = kvkern.Engine(
            self.model, self.tokenizer, max_agents=2, memory_bytes=FOUR_PAGES, max_queue=1, invariant=False
        )
        self.geometry = model_geometry(self.model)
        self.pool = PagePool(self.geometry, 4, slots=2, max_pages_per_slot=3)
        self.slot = self.pool.acquire_slot()
        self.pool.reserve(self.slot, 2 * PAGE)
        self.plan = Plan.make(self.pool, [AgentRows(self.slot, self.doc, 3)])
        self.plan.begin()
        self.before = self.state()

    def state(self) -> tuple[object, ...]:
        doc, pool, scheduler = self.doc, self.pool, self.engine.scheduler
        books = pool.free_pages, pool.free_slots, pool.table(self.slot), pool.length(self.slot), pool.seq_lens.tolist()
        served = self.engine.pool.free_pages, self.engine.pool.free_slots, scheduler.unfinished
        files = sorted(path.name for path in self.folder.iterdir() if path.name.endswith((".kv", ".tmp")))
        return doc.references, doc.published, books, served, files

    # -- ways in

    def load(self, model: Any = None, tokenizer: Any = None, **options: Any) -> object:
        return kvkern.load(self.file, model or self.model, tokenizer or self.tokenizer, **options)

    def load_bytes(self, data: bytes) -> object:
        path = self.folder / "bad"
        path.write_bytes(data)
        return kvkern.load(path, self.model, self.tokenizer)

    def publish(self, text: Any = TEXT, model: Any = None, **options: Any) -> object:
        return kvkern.publish(model or self.model, self.tokenizer, text, **options)

    def submit(self, question: Any = "Why?", document: Any = None, **options: Any) -> object:
        return self.engine.submit(document or self.doc, question, **{"max_new_tokens": 2, **options})

    def attend(self, **changes: Callable[[torch.Tensor], torch.Tensor]) -> object:
        names = ("q", "k_prefix", "v_prefix", "k_suffix", "v_suffix", "seq_lens")
        given = dict(zip(names, batch_of([3, 5]), strict=True))
        return kvkern.attend(**{n: changes[n](t) if n in changes else t for n, t in given.items()})

    def operator(self, **changes: Any) -> object:
        given: dict[str, Any] = {
            "q": torch.randn(3, 4, 16),
            "k": torch.randn(3, 2, 16),
            "v": torch.randn(3, 2, 16),
            "plan": self.plan,
            "pages": self.pool,
            "layer": 1,
        }
        for name, change in changes.items():
            given[name] = change(given[name]) if callable(change) else change
        return kvkern.shared_prefix_attention(**given)

    def merge(self, **changes: Callable[[torch.Tensor], torch.Tensor]) -> object:
        given = {"o_a": torch.randn(5, 16), "lse_a": torch.randn(5), "o_b": torch.randn(5, 16), "lse_b": torch.randn(5)}
        return kvkern.merge_state(**{n: changes[n](t) if n in changes else t for n, t in given.items()})

    def agents(self, *agents: tuple[Any, ...], **options: Any) -> object:
        return Plan.make(self.pool, [AgentRows(*agent) for agent in agents], **options)

    def of_32_tokens(self) -> PagePool:
        """A pool over pages of another size, and its slot 0."""
        pool = PagePool(self.geometry, 4, slots=1)
        pool.acquire_slot()
        pool.pages = pool.pages.new_zeros(2, 2, 4, 2, 2 * PAGE, 16)
        return pool

    def flipped(self, at: int) -> bytes:
        changed = bytearray(self.data)
        changed[at] ^= 1
        return bytes(changed)

    @cached_property
    def folder_of_model(self) -> str:
        for name, model in (("tiny", self.model), ("other", tiny_model(seed=1))):
            model.save_pretrained(self.folder / name)
            self.tokenizer.save_pretrained(self.folder / name)
        return str(self.folder / "tiny")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# -- models that are no models for these kernels -------------------------------------------------------------------------

SMALL = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def stock(kind: Any, config: Any, **options: Any) -> Any:
    model = kind(config(**{**SMALL, "num_key_value_heads": 1, "head_dim": 16, **options})).eval()
    model.set_attn_implementation("kvkern")
    return model


def encoder_decoder() -> Any:
    model = T5ForConditionalGeneration(T5Config(vocab_size=320, d_model=32, d_ff=48, d_kv=16, num_layers=1)).eval()
    model.config._attn_implementation = "kvkern"
    return model


def alibi() -> Any:
    model = tiny_model()
    model.config.alibi = True
    return model


def two_devices() -> Any:
    model = tiny_model()
    model.lm_head.to("meta")
    return model


def other_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    return tokenizer


def filling(world: World) -> SharedPrefix:
    return SharedPrefix(world.geometry, torch.arange(3))


def gone(world: World) -> SharedPrefix:
    prefix = filling(world).publish()
    prefix.release()
    return prefix


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def torch_pickle(world: World) -> object:
    torch.save({"kv": world.doc.key(0)}, world.folder / "bad")
    return kvkern.load(world.folder / "bad", world.model, world.tokenizer)


def odd_provenance(world: World) -> None:
    ids = torch.arange(3)
    prefix = SharedPrefix(world.geometry, ids)
    prefix.publish(identity=Identity.of(world.model, None, ids), provenance={"by": {1}})
    store.save(prefix, world.folder / "never.kv")


ROPE = {"rope_type": "default", "rope_theta": 5e6}
AGAIN = "publish the document again"


class Refusal(NamedTuple):
    """What is tried, and regular expressions for the whole field and for a part of each of the other three."""

    call: Callable[[World], object]
    kind: type[KvkernError]
    field: str
    found: str
    needed: str
    do: str


_ = Refusal
REFUSALS = {
    # -- a file that is not of this model, and a changed byte
    "another model": _(
        lambda w: w.load(tiny_model(num_hidden_layers=3)), IdentityError, r"geometry\.layers", "2 in doc.kv", "3 as in the model", AGAIN
    ),
    "other weights": _(
        lambda w: w.load(tiny_model(seed=1)), IdentityError, "weights", "in doc.kv", "as in the model", "load the weights"
    ),
    "another dtype": _(
        lambda w: w.load(tiny_model(dtype=torch.bfloat16)), IdentityError, r"geometry\.dtype", "float32", "bfloat16", AGAIN
    ),
    "another tokenizer": _(
        lambda w: w.load(tokenizer=other_tokenizer()), IdentityError, "tokenizer", "in doc.kv", "as of the tokenizer", "give the tok"
    ),
    "another RoPE": _(
        lambda w: w.load(tiny_model(rope_parameters=ROPE)), IdentityError, r"rope\.theta", r"10000\.0", r"5000000\.0", AGAIN
    ),
    "another template": _(
        lambda w: w.load(tokenizer=tiny_tokenizer("{{ messages }}")), IdentityError, "template", "in doc.kv", "as of the", "give the chat"
    ),
    "another template keyword": _(
        lambda w: match(w.doc.identity, w.model, w.tokenizer, where="doc.kv", template_kwargs={"date": "now"}),
        IdentityError, r"template_kwargs\.date", "today in doc.kv", "now as asked for", "give the keywords",
    ),
    "a changed byte of KV": _(
        lambda w: w.load_bytes(w.flipped(store.inspect(w.file).kv_offset)),
        StoreError, r"kv\[layer 0, K, segment 0\]", "a SHA-256 of .* in bad", "as in its header", "copy the file again",
    ),
    "a changed byte of the token ids": _(
        lambda w: w.load_bytes(w.flipped(len(w.data) - 1)), StoreError, "token_ids", "SHA-256", "as in its header", "copy the file"
    ),
    "a changed byte of the header": _(
        lambda w: w.load_bytes(w.flipped(w.data.index(b"identity"))), StoreError, "metadata|header", "in bad", r"\w", "copy the file"
    ),
    "half a file": _(
        lambda w: w.load_bytes(w.data[: len(w.data) // 2]), StoreError, "size", "bytes in bad", "as its header says", "copy the file"
    ),
    "no file": _(
        lambda w: kvkern.load(w.folder / "none.kv", w.model, w.tokenizer), StoreError, "path", "No such file", "can be used", "name a"
    ),
    "a folder": _(
        lambda w: kvkern.load(w.folder, w.model, w.tokenizer), StoreError, "path", "no regular file", "a .kv file", "name a file"
    ),
    "a pickle": _(
        lambda w: w.load_bytes(pickle.dumps({"kv": [1, 2, 3]})), StoreError, "header|size", "in bad", "a .kv file", "kvkern publish wrote"
    ),
    "a pickle of torch's": _(torch_pickle, StoreError, "header", "in bad", "a .kv file", "kvkern publish wrote"),
    "a parent that the file has not": _(
        lambda w: w.load(parent=w.doc), IdentityError, "ancestors", "none in doc.kv", "as of the parent given", "without a parent"
    ),
    "a folder that is not there": _(
        lambda w: w.doc.save(w.folder / "none" / "a.kv"), StoreError, "path", "no folder", "a folder", "create it"
    ),
    "provenance that is no JSON": _(odd_provenance, RequestError, r"provenance\.by", "set", "a JSON value", "make it a text"),
    # -- a published prefix
    "to publish twice": _(lambda w: w.doc.publish(), ReadOnlyError, "prefix", "published already", "being filled", "allocate another"),
    "to put other memory under it": _(
        lambda w: w.doc.adopt(w.doc.block(), None), ReadOnlyError, "prefix", "a published prefix", "an unpublished", "map the file"
    ),
    "a released prefix": _(lambda w: gone(w).key(0), ReadOnlyError, "prefix", "released", "still held", "load or publish"),
    "a layer it has not": _(lambda w: w.doc.key(2), ShapeError, "layer", "2", "0 to 1", "name a layer"),
    "token ids that are none": _(
        lambda w: SharedPrefix(w.geometry, torch.zeros(3)), RequestError, "document", r"torch\.float32", "integers", "give the ids"
    ),
    # -- models
    "sliding windows": _(
        lambda w: w.publish(model=stock(MistralForCausalLM, MistralConfig, sliding_window=16)),
        UnsupportedError, r"model\.layer_types", "sliding_window=16", "full attention in every layer", "without sliding windows",
    ),
    "soft-capped scores": _(
        lambda w: w.publish(
            model=stock(Gemma2ForCausalLM, Gemma2Config, layer_types=["full_attention"] * 2, sliding_window=None)
        ),
        UnsupportedError, r"model\.attn_logit_softcapping", r"50\.0", "none", "plain causal attention",
    ),
    "ALiBi": _(lambda w: w.publish(model=alibi()), UnsupportedError, r"model\.alibi", "True", "none", "plain causal attention"),
    "cross-attention": _(
        lambda w: w.publish(model=encoder_decoder()), UnsupportedError, "model", "an encoder-decoder", "decoder-only", "causal language"
    ),
    "several devices": _(lambda w: w.publish(model=two_devices()), DeviceError, r"model\.device", "cpu, meta", "one device", "onto one"),
    "another attention": _(
        lambda w: w.publish(model=tiny_model(attention="sdpa")),
        UnsupportedError, "attn_implementation", "'sdpa'", "'kvkern'", "attn_implementation='kvkern'",
    ),
    "a model in training": _(
        lambda w: w.publish(model=tiny_model().train()), UnsupportedError, r"model\.training", "True", "False", r"model\.eval\(\)"
    ),
    # -- documents
    "an empty document": _(lambda w: w.publish(" \n"), RequestError, "document", "all blank", "at least one token", "not empty"),
    "a document of floats": _(
        lambda w: w.publish(torch.ones(3)), RequestError, "document", r"torch\.float32 \[3\]", "integers in one dimension", "token ids"
    ),
    "a document in two dimensions": _(
        lambda w: w.publish(torch.ones(2, 3).long()), RequestError, "document", r"\[2, 3\]", "one dimension", "token ids"
    ),
    "an unknown token": _(
        lambda w: w.publish([3, 320]), RequestError, r"document token_ids\[1\]", "320", "0 to 319", "this model's tokenizer"
    ),
    "too long a document": _(
        lambda w: w.publish([3] * 4096), CapacityError, "document", "4096 tokens", "4096 positions", "publish a part"
    ),
    "chunks of nothing": _(lambda w: w.publish(chunk=0), RequestError, "chunk", "0", "at least 1", "leave it out"),
    "a template keyword without a template": _(
        lambda w: w.publish(chat=False, mood="calm"), TemplateError, "template_kwargs", "mood", "none with chat=False", "leave them out"
    ),
    "a template keyword that no file can keep": _(
        lambda w: w.publish(date={1}), RequestError, r"template_kwargs\.date", "set", "text, a number", "that a file can keep"
    ),
    "text without a tokenizer": _(
        lambda w: kvkern.publish(w.model, None, TEXT), RequestError, "tokenizer", "None", "the model's tokenizer", "token ids"
    ),
    "a mapping of a file on another device": _(
        lambda w: store.load(w.file, mmap=True, device="meta"), RequestError, "mmap", "device meta", "cpu", "leave mmap out"
    ),
    # -- questions
    "an empty question": _(lambda w: w.submit(" "), RequestError, "question", "' '", "not empty", "leave it out"),
    "no tokens of a question": _(lambda w: w.submit([]), RequestError, "question", "no tokens", "at least one", "not empty"),
    "a question that is none": _(lambda w: w.submit(7), RequestError, "question", "int", "token ids", "one list of token ids"),
    "a token that the model lacks": _(
        lambda w: w.submit([1, -1]), RequestError, r"question token_ids\[1\]", "-1", "0 to 319", "this model's tokenizer"
    ),
    "more tokens than the pages": _(
        lambda w: w.submit([5] * 64, max_new_tokens=9), CapacityError, "pages of one agent", "5 for 64", "at most 4", "fewer new tokens"
    ),
    "more tokens than the positions": _(
        lambda w: w.submit(max_new_tokens=4096), CapacityError, "max_new_tokens", r"\+ 4096 tokens", "4096 positions", "fewer new"
    ),
    "less than no new tokens": _(
        lambda w: w.submit(max_new_tokens=-1), RequestError, "max_new_tokens", "-1", "at least 0", "another max_new_tokens"
    ),
    "a temperature of 0": _(
        lambda w: w.submit(do_sample=True, temperature=0.0), RequestError, "temperature", r"0\.0", "above 0", "another temperature"
    ),
    "a document of another model": _(
        lambda w: w.submit(document=kvkern.publish(tiny_model(seed=1), w.tokenizer, TEXT)),
        IdentityError, r"document\.weights", r"\w{4}\.\.\w{4}", "as in the model", "publish the document with this model",
    ),
    "an engine without room": _(
        lambda w: kvkern.Engine(w.model, w.tokenizer, memory_bytes=10), CapacityError, "memory_bytes", "10", "one page", "more memory"
    ),
    "an engine of no agents": _(
        lambda w: kvkern.Engine(w.model, w.tokenizer, max_agents=0), RequestError, "max_agents", "0", "at least 1", "larger max_agents"
    ),
    "an unknown backend": _(
        lambda w: kvkern.Engine(w.model, w.tokenizer, backend="fast"), BackendError, "backend", "fast", "one of triton", "leave it out"
    ),
    # -- pool and plan
    "a pool of no pages": _(lambda w: PagePool(w.geometry, 0, slots=1), CapacityError, "num_pages", "0", "at least 1", "more memory"),
    "more pages than are free": _(lambda w: w.pool.alloc(3), CapacityError, "pages", "2 free", "3", "wait for agents"),
    "more pages than one agent may have": _(
        lambda w: w.pool.reserve(w.slot, 3 * PAGE), CapacityError, "pages of one agent", "4 for 51", "at most 3", "max_pages_per_slot"
    ),
    "a slot that is not held": _(lambda w: w.pool.fork(1), RequestError, "slot", "1", "a slot that is held", "acquire_slot"),
    "a page that is not held": _(lambda w: w.pool.free([99]), RequestError, "page", "99", "a page that is held", "alloc"),
    "more tokens to keep than there are": _(
        lambda w: w.pool.truncate(w.slot, 4), RequestError, "tokens", "4", "0 to 3", "a length the slot has had"
    ),
    "less than no tokens": _(lambda w: w.pool.reserve(w.slot, -1), RequestError, "tokens", "-1", "0 or more", "from 0"),
    "a geometry of odd heads": _(
        lambda w: kvkern.Geometry(1, 4, 2, 24, torch.float32), ShapeError, r"geometry\.head_dim", "24", "multiple of 16", "such heads"
    ),
    "pages of another size": _(
        lambda w: Plan.make(w.of_32_tokens(), [AgentRows(0, None, 1)]),
        ShapeError, "pages", r"\[2, 2, 4, 2, 32, 16\]", "pages of 16 tokens", "view larger pages",
    ),
    "a step of nobody": _(lambda w: w.agents(), RequestError, "agents", "none", "at least one", "only for a step that has rows"),
    "an agent twice": _(
        lambda w: w.agents((w.slot, None, 1), (w.slot, None, 1)), RequestError, r"agents\.slot", "0 twice", "each slot once", "together"
    ),
    "an agent without rows": _(lambda w: w.agents((w.slot, None, 0)), RequestError, r"agents\.rows", "0", "at least 1", "leave an"),
    "a prefix that is being filled": _(
        lambda w: w.agents((w.slot, filling(w), 1)), ReadOnlyError, "prefix", "filling", "a published prefix", "publish before"
    ),
    "a prefix that is gone": _(
        lambda w: w.agents((w.slot, gone(w), 1)), ReadOnlyError, "prefix", "released", "still held", "release after"
    ),
    "a small bucket": _(
        lambda w: w.agents((w.slot, None, 5), bucket=4), CapacityError, "bucket", "4 rows", "at least 5", "a larger bucket"
    ),
    "a step without pages": _(
        lambda w: w.agents((w.slot, None, 2 * PAGE)).begin(), CapacityError, "pages of the slot", "2 for 35", "3", "call reserve"
    ),
    # -- the operator
    "rows of another shape": _(lambda w: w.operator(q=lambda t: t[:2]), ShapeError, "q", r"\[2, 4, 16\]", r"\[3, 4, 16\]", "this plan"),
    "rows of another dtype": _(
        lambda w: w.operator(k=lambda t: t.half()), DtypeError, "k", "float16", "float32 as in the pool", "convert it"
    ),
    "rows on another device": _(
        lambda w: w.operator(v=lambda t: t.to("meta")), DeviceError, "v", "meta", "cpu as in the pool", "move it"
    ),
    "rows with strides": _(lambda w: w.operator(q=strided), ShapeError, r"q\.stride\(-1\)", "2", "1", r"q\.contiguous\(\)"),
    "a layer out of range": _(lambda w: w.operator(layer=2), ShapeError, "layer", "2", "0 to 1", "a layer of the pool"),
    "the pages of another pool": _(
        lambda w: w.operator(pages=PagePool(w.geometry, 4, slots=2)), RequestError, "pages", "another pool", "the plan was made", "make the"
    ),
    "a plan that was not begun": _(
        lambda w: w.operator(plan=w.agents((w.slot, w.doc, 3))), RequestError, "plan", "not begun", "counted", r"plan\.begin\(\)"
    ),
    "attend, no rows": _(lambda w: w.attend(q=lambda t: t[:0]), ShapeError, "q", r"\[0, 4, 32\]", "none of them 0", "at least one row"),
    "attend, another shape": _(
        lambda w: w.attend(v_prefix=lambda t: t[1:]), ShapeError, "v_prefix", r"\[69, 2, 32\]", r"\[70, 2, 32\]", "one model and batch"
    ),
    "attend, another dtype": _(
        lambda w: w.attend(k_suffix=lambda t: t.half()), DtypeError, "k_suffix", "float16", "float32 as in q", "convert it"
    ),
    "attend, another device": _(
        lambda w: w.attend(k_prefix=lambda t: t.to("meta")), DeviceError, "k_prefix", "meta", "cpu as q", "move it"
    ),
    "attend, no lengths": _(
        lambda w: w.attend(seq_lens=lambda t: t.float()), DtypeError, "seq_lens", "float32", "integers", "lengths in tokens"
    ),
    "attend, a length out of range": _(
        lambda w: w.attend(seq_lens=lambda t: t * 2), RequestError, r"seq_lens\[1\]", "10", "0 to 8", "lengths that the suffixes have"
    ),
    "merge_state, another shape": _(
        lambda w: w.merge(lse_b=lambda t: t[:4]), ShapeError, "lse_b", r"\[4\]", r"\[5\]", "the same rows and heads"
    ),
    "merge_state, another dtype": _(
        lambda w: w.merge(lse_a=lambda t: t.half()), DtypeError, "lse_a", "float16", "float32", "keep lse in fp32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_says_field_found_needed_and_what_to_do_and_leaves_no_trace(world: World, what: str) -> None:
    call, kind, field, found, needed, do = REFUSALS[what]
    with pytest.raises(KvkernError) as caught:
        call(world)
    error = caught.value
    assert type(error) is kind
    assert re.fullmatch(field, error.field), error.field
    for name, pattern, text in (
        ("found", found, error.found),
        ("needed", needed, error.needed),
        ("do", do, error.do),
    ):
        assert text.strip() and re.search(pattern, text), f"{name}: {text}"
    assert str(error) == f"{error.field}: found {error.found}, needed {error.needed}\n  do: {error.do}"
    assert "tensor(" not in str(error), "never the contents of a tensor"
    assert world.state() == world.before


def test_every_kind_of_error_is_in_the_table() -> None:
    kinds = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, KvkernError)}
    assert {refusal.kind for refusal in REFUSALS.values()} == kinds - {KvkernError}


def test_control_what_is_right_is_not_refused(world: World) -> None:
    """The same ways in, unspoiled."""
    for ways in (world.load, world.publish):
        ways().release()
    assert isinstance(world.operator(), torch.Tensor)
    assert isinstance(world.attend(), torch.Tensor)
    assert len(world.merge()) == 2
    world.agents((world.slot, world.doc, 3))
    world.engine.cancel(world.submit())
    assert world.state() == world.before


# -- pages run out: no error --------------------------------------------------------------------------------------------


def test_without_pages_agents_wait_and_none_is_dropped(world: World) -> None:
    """Four pages, and each agent needs two or more: they take turns, and answer as those that had room."""
    roomy = kvkern.Engine(world.model, world.tokenizer, invariant=False)
    questions = [question for question in QUESTIONS if len(world.doc.question_ids(question)) < 3 * PAGE] * 2
    assert sum(-(-len(world.doc.question_ids(question)) // PAGE) for question in questions) > 2 * 4
    asked, alone = (
        list(engine.ask(world.doc, questions, max_new_tokens=8, ordered=True)) for engine in (world.engine, roomy)
    )
    assert [answer.token_ids for answer in asked] == [answer.token_ids for answer in alone]
    assert {answer.finish_reason for answer in asked} == {"length"} and world.state() == world.before


def test_a_full_queue_refuses_who_submits_and_keeps_who_waits(world: World) -> None:
    waiting = world.submit()
    with pytest.raises(CapacityError, match=r"^queue: found 1 waiting, needed fewer than 1\n  do: submit again when"):
        world.submit()
    while waiting.answer is None:
        world.engine.step()
    assert waiting.answer.finish_reason == "length" and world.state() == world.before


# -- no pickle ----------------------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def unpicklers(source: str) -> list[str]:
    """What in a source may unpickle or run what it reads: imports, and calls that are not told otherwise."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in UNPICKLERS else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = {
                "torch.load": told.get("weights_only") == "True",
                "numpy.load": told.get("allow_pickle", "False") == "False",
                "np.load": told.get("allow_pickle", "False") == "False",
                "eval": False,
                "exec": False,
            }.get(name, True)
            if name.endswith("from_pretrained") and not re.search("Config|Tokenizer", name):
                safe = told.get("use_safetensors") == "True" or "gguf_file" in told
            if not safe or told.get("trust_remote_code", "False") != "False":
                found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(Path(kvkern.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert unpicklers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import os, shelve",
        "def f():\n    import _pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "transformers.AutoModelForCausalLM.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_control_a_line_that_does_is_caught(line: str) -> None:
    assert unpicklers(line)


# -- exit codes ----------------------------------------------------------------------------------------------------------

COMMANDS = {
    ("inspect", "{doc}"): 0,
    ("verify", "{doc}"): 0,
    ("env",): 0,
    ("inspect", "{none}"): "StoreError: path: found No such file",
    ("verify", "{doc}", "--model", "{other}"): "IdentityError: weights: found ",
    ("publish", "{none}", "{text}", "-o", "{never}"): "RequestError: model: found no folder ",
    ("publish", "{tiny}", "{none}", "-o", "{never}"): "RequestError: document: found ",
    ("publish", "{tiny}", "{text}", "-o", "{never}", "--plain", "--template-kwarg", "a=1"): "TemplateError: template_kwargs: ",
    ("publish", "{tiny}", "{text}", "-o", "{never}", "--device", "cuda:99"): "DeviceError: device: found cuda:99",
    ("fit", "{tiny}", "--document-tokens", "9", "--suffix-tokens", "1", "--memory", "1K"): "CapacityError: memory: found ",
    ("env", "--backend", "magic"): "BackendError: backend: found magic",
    (): 2,
    ("nothing",): 2,
    ("publish", "{tiny}", "{text}"): 2,
    ("ask", "{doc}"): 2,
}  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_exits_with_0_1_or_2(
    world: World, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "text.txt").write_text(TEXT)
    names = {name: world.folder / file for name, file in (("doc", "doc.kv"), ("none", "none.kv"), ("text", "text.txt"))}
    names |= {"never": world.folder / "never.kv", "tiny": world.folder_of_model, "other": world.folder / "other"}
    expected = COMMANDS[words]
    code = cli.main([word.format(**names) for word in words])
    said = capsys.readouterr().err
    if isinstance(expected, int):
        assert code == expected
    else:
        assert code == 1 and said.startswith(expected) and re.search(r", needed .+\n  do: .+\n$", said)
    assert world.state() == world.before


@pytest.mark.parametrize("kind", [KvkernError, *KvkernError.__subclasses__()], ids=lambda kind: kind.__name__)
def test_an_error_comes_through_a_pool_of_processes_as_it_was(kind: type[KvkernError]) -> None:
    error = kind("pages", found=3, needed="at least 4", do="wait")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is kind and str(again) == str(error)
        assert (again.field, again.found, again.needed, again.do) == ("pages", "3", "at least 4", "wait")
