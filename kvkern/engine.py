"""Engine: thousands of agents over shared prefixes. Continuous batching, streaming, one ragged forward [1, T] at a time.

A step takes decode rows of every running agent and a bounded number of extend rows, packs them in depth-first order of the
prefix tree, pads them to a bucket of the measured rounding class, and runs the stock model once. Finished agents leave at
once and waiting ones join. The bits of an answer depend on the agent's path and its own tokens, on nothing else.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from kvkern import cost, qwen3
from kvkern.backends import choose
from kvkern.errors import CapacityError, KvkernError, RequestError, UnsupportedError
from kvkern.geometry import PAGE
from kvkern.graphs import Graphs, PlanForward, capture_on
from kvkern.identity import model_geometry, tokenizer_digest
from kvkern.linear import Rounding, measure
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix
from kvkern.publish import Document, Question, check_document, check_ids, is_conversation
from kvkern.sampling import SamplingParams, TextStream, sample
from kvkern.scheduler import EXTEND_CHUNK, FINISHED, Scheduler, Step
from kvkern.scheduler import Sequence as Suffix

DEFAULT_MEMORY = 2 << 30
"""Bytes of suffix pages if the caller names no budget."""

EOS = {"eos_token_id", "eos_token_ids"}
"""Options that say which tokens end an answer; without them and a model that says so, the tokenizer's own does."""


@dataclass(frozen=True)
class Answer:
    """What one agent said.

    index          place of the question in the input
    text           the answer without special tokens, cut before a stop string
    token_ids      new tokens, an end-of-sequence token included
    finish_reason  "stop" (end of sequence or a stop string), "length", "cancelled", or "error"
    prompt_tokens  tokens of the question's suffix
    cached_tokens  tokens of the path that were not computed again
    error          why a request failed, else None
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    error: KvkernError | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of one agent's text as it comes; with the last one, the whole answer."""

    index: int
    text: str
    answer: Answer | None = None


@dataclass(eq=False)
class Request:
    """A submitted question, as `submit` returns it: hand it to `cancel`."""

    index: int
    suffix: Suffix
    prefix: SharedPrefix
    params: SamplingParams
    stream: TextStream
    seen: Tensor | None
    outbox: deque[Delta] | None = None
    answer: Answer | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.suffix.tokens[self.suffix.num_prompt :]


class Engine:
    """Serves questions over published documents of one model.

    model              a causal language model of transformers with attn_implementation="kvkern"
    tokenizer          its tokenizer
    max_agents         agents that run at once
    memory_bytes       budget for suffix pages; how many agents fit follows from it, see `describe`
    max_extend_tokens  question tokens computed in one step beside the decode rows
    max_queue          questions that may wait; None: any number
    invariant          pad forwards to buckets of the measured rounding class, so that bits do not depend on the batch
    backend            "triton", "cpu" or "torch"; by default the device decides
    fused              True: steps take the way of `kvkern.qwen3.fuse`, norms and RoPE in the project's kernels; False: the model's
                       own forward; None: True on the cpu backend for a Qwen3 or Llama, elsewhere where `fuse(model)` is in force
    graphs             replay decode steps from CUDA graphs, from the second one of an unchanged set of agents on. No GPU has run
                       this yet, hence it is off by default. A replay runs no Python of the model: hooks, and weights or modules
                       put in place of others, are seen when the set changes. It takes memory for one step's activations
    debug              poison freed pages

    What fused changes in the model only this engine's steps see, and it is taken back when the engine is collected.
    Raises UnsupportedError or DeviceError for a model or tokenizer that the kernels cannot serve, CapacityError for a budget
    that holds no page, RequestError for a limit below 1, DeviceError or BackendError for graphs without CUDA or triton.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_agents: int = 256,
        memory_bytes: int = DEFAULT_MEMORY,
        max_extend_tokens: int = 256,
        max_queue: int | None = None,
        invariant: bool = True,
        backend: str | None = None,
        fused: bool | None = None,
        graphs: bool = False,
        debug: bool = False,
    ) -> None:
        self.device = qwen3.check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self._tokenizer_digest = tokenizer_digest(tokenizer)
        limits = {"max_agents": max_agents, "max_extend_tokens": max_extend_tokens, "max_queue": max_queue}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise RequestError(name, found=value, needed="at least 1", do=f"give a larger {name}")
        self.geometry = model_geometry(model)
        self.backend = choose(backend, self.device)
        self.graphs = Graphs(model, capture_on(self.device, self.backend.name) if graphs else None)
        page_bytes = PAGE * self.geometry.token_bytes()
        most = max_agents * -(-qwen3.max_positions(model) // PAGE)
        num_pages = min(memory_bytes // page_bytes, most)
        if num_pages < 1:
            raise CapacityError(
                "memory_bytes",
                found=cost.render_bytes(memory_bytes),
                needed=f"at least {cost.render_bytes(page_bytes)}, one page of 16 tokens",
                do="give the engine more memory",
            )
        self.fused, self.fused_why = self._fuse(fused)
        self.rounding: Rounding | None = measure(model) if invariant else None
        self.pool = PagePool(
            self.geometry,
            num_pages,
            slots=max_agents,
            max_pages_per_slot=-(-qwen3.max_positions(model) // PAGE),
            device=self.device,
            debug=debug,
        )
        self.scheduler = Scheduler(
            self.pool,
            max_rows=max_agents + max_extend_tokens,
            max_extend_tokens=max_extend_tokens,
            max_agents=max_agents,
            max_queue=max_queue,
            # What one agent brings must fit into one forward.
            max_chunk=EXTEND_CHUNK if self.rounding is None else min(EXTEND_CHUNK, self.rounding.layers.max_rows),
        )
        self.steps = 0
        self._requests: dict[Suffix, Request] = {}
        self._plans: dict[tuple[AgentRows, ...], PlanForward] = {}
        # Any 4-D mask is handed on as it is, so transformers builds none and asks the device nothing.
        self._mask = torch.empty((1, 1, 1, 1), device=self.device)

    def _fuse(self, fused: bool | None) -> tuple[bool | None, str]:
        """Whether steps are fused, None where a user's `fuse` decides, and why."""
        if fused is False:
            return False, "not wanted"
        if fused is None and self.backend.name != "cpu":
            return None, f"as kvkern.qwen3.fuse(model) says, on the {self.backend.name} backend"
        try:
            fusion = qwen3.fuse(self.model, everyone=False)
        except UnsupportedError as error:
            if fused:
                raise
            return False, f"{error.field}: found {error.found}"
        weakref.finalize(self, fusion.remove).atexit = False
        return True, "wanted" if fused else "by default on the cpu backend"

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        document: Document,
        questions: Iterable[Question | Sequence[int]],
        *,
        ordered: bool = False,
        generation_config: Any = None,
        seed: int = 0,
        template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Answer]:
        """Ask every question about one document; yields each Answer as it ends, or in input order with ordered=True.

        questions          texts, conversations since the document, or token ids of suffixes; taken as the queue has room for them
        generation_config  a transformers GenerationConfig; the model's own if None
        seed               question i draws with seed + i
        options            fields of GenerationConfig that come first: max_new_tokens, do_sample, temperature, stop_strings, ...

        A question that is refused becomes an Answer with finish_reason "error" and its error; the others go on. When the
        iterator is closed or interrupted, questions that have not ended are cancelled and their pages given back.
        Raises RequestError, UnsupportedError, or what `check_document` raises, before the first question for what concerns
        all of them.
        """
        params = self._params(generation_config, options)
        self._check(document)
        answers = self._answers(document, questions, params, seed, template_kwargs or {})
        return _in_order(answers) if ordered else answers

    def _answers(
        self,
        document: Document,
        questions: Iterable[Question | Sequence[int]],
        params: SamplingParams,
        seed: int,
        kwargs: dict[str, Any],
    ) -> Iterator[Answer]:
        with closing(self._stream(document, questions, params, seed, kwargs)) as deltas:
            for delta in deltas:
                if delta.answer is not None:
                    yield delta.answer

    def stream(
        self,
        document: Document,
        questions: Iterable[Question | Sequence[int]],
        *,
        generation_config: Any = None,
        seed: int = 0,
        template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """As `ask`, but yields pieces of text as they come; the last Delta of a question holds its Answer."""
        params = self._params(generation_config, options)
        self._check(document)
        return self._stream(document, questions, params, seed, template_kwargs or {})

    def _stream(
        self,
        document: Document,
        questions: Iterable[Question | Sequence[int]],
        params: SamplingParams,
        seed: int,
        kwargs: dict[str, Any],
    ) -> Generator[Delta, None, None]:
        coming = enumerate(questions)
        # Each stream has an outbox of its own: several may take turns on one engine.
        outbox: deque[Delta] = deque()
        mine: dict[int, Request] = {}
        exhausted = False
        document.retain()
        try:
            while True:
                # A generator of a million questions is read only as far as agents can run.
                while not exhausted and not outbox and len(self.scheduler.waiting) < self._read_ahead():
                    item = next(coming, None)
                    if item is None:
                        exhausted = True
                        break
                    index, question = item
                    try:
                        mine[index] = self._submit(document, question, params, seed + index, index, kwargs, outbox)
                    except KvkernError as error:
                        yield Delta(index, "", Answer(index, "", (), "error", 0, document.end, error))
                if not mine and exhausted:
                    return
                if not outbox:
                    self.step()
                while outbox:
                    delta = outbox.popleft()
                    if delta.answer is not None:
                        del mine[delta.index]
                    yield delta
        finally:
            for request in mine.values():
                self.cancel(request)
            _give_back(document)

    def _read_ahead(self) -> int:
        ahead = self.scheduler.max_agents
        return ahead if self.scheduler.max_queue is None else min(ahead, self.scheduler.max_queue)

    def submit(
        self,
        document: Document,
        question: Question | Sequence[int],
        *,
        generation_config: Any = None,
        seed: int = 0,
        index: int = 0,
        template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """Put one question into the queue; `step` then works on it, and `request.answer` is set when it has ended.

        Raises RequestError (an empty question, an unknown token id, a bad option), CapacityError (a full queue, more tokens
        than positions or pages), and what `check_document` raises for a document of another model or tokenizer.
        """
        params = self._params(generation_config, options)
        self._check(document)
        return self._submit(document, question, params, seed, index, template_kwargs or {})

    def _submit(
        self,
        document: Document,
        question: Question | Sequence[int],
        params: SamplingParams,
        seed: int,
        index: int,
        kwargs: dict[str, Any],
        outbox: deque[Delta] | None = None,
    ) -> Request:
        tokens = self._tokens(document, question, kwargs)
        longest = document.end + len(tokens) + params.max_new_tokens
        if longest > qwen3.max_positions(self.model):
            raise CapacityError(
                "max_new_tokens",
                found=f"{document.end} + {len(tokens)} + {params.max_new_tokens} tokens",
                needed=f"at most the model's {qwen3.max_positions(self.model)} positions",
                do="ask for fewer new tokens, or a shorter question",
            )
        suffix = Suffix(id=index, tokens=tokens, max_new_tokens=params.max_new_tokens, node=document)
        seen = None
        if params.repetition_penalty != 1.0:
            seen = document.path_token_ids()
        own = params if seed == params.seed else _with_seed(params, seed)
        request = Request(index, suffix, document, own, TextStream(self.tokenizer, params.stop_strings), seen, outbox)
        document.retain()
        try:
            self.scheduler.submit(suffix)
        except KvkernError:
            document.release()
            raise
        self._requests[suffix] = request
        if params.max_new_tokens == 0:
            self._end(request, "length")
        return request

    def cancel(self, request: Request) -> None:
        """Stop working on a request and give back its pages; one that has ended stays as it is."""
        if request.answer is None:
            self._end(request, "cancelled")

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of all running agents: forwards of the packed rows, one new token for each that has none to compute.

        An error leaves every request in the queue, to be extended again by the next step; one that belongs to requests
        whose document was released under them ends these, and the others go on.
        """
        step = self.scheduler.next_step()
        self.steps += 1
        plans, self._plans = self._plans, {}
        try:
            for group in self._groups(step):
                agents = tuple(_agent(suffix, rows) for suffix, rows in group)
                # Only the plans of this step are kept, since a plan keeps the blocks of its prefixes.
                planned = self._plans[agents] = plans.get(agents) or self._plan(agents)
                self._forward(group, planned)
        except BaseException as error:
            # How far the step came is uncertain, and preemption changes no bit.
            while self.scheduler.running:
                self.scheduler.preempt()
            self._plans.clear()
            lost = [r for r in self._requests.values() if any(node.released for node in r.prefix.path())]
            if not (lost and isinstance(error, KvkernError)):
                raise
            for request in lost:
                self._end(request, "error", error)

    def _groups(self, step: Step) -> Iterator[Step]:
        """The step in parts that a bucket holds: rows in one of the layers, wanted logits in one of the head."""
        most_rows, most_heads = (1 << 30, 1 << 30)
        if self.rounding is not None:
            most_rows, most_heads = self.rounding.layers.max_rows, self.rounding.head.max_rows
        group: Step = []
        held = 0
        for suffix, rows in step:
            if group and (held + rows > most_rows or len(group) == most_heads):
                yield group
                group, held = [], 0
            group.append((suffix, rows))
            held += rows
        if group:
            yield group

    @torch.no_grad()
    def _forward(self, group: Step, planned: PlanForward) -> None:
        """Run the model on these rows, then choose tokens for the sequences that are complete."""
        plan = planned.plan
        plan.begin()
        ids, positions = [0] * plan.rows, [0] * plan.rows
        for n, i in enumerate(plan.order):
            suffix, rows = group[i]
            begin, first = plan.qo_indptr[n], suffix.computed
            ids[begin : begin + rows] = suffix.tokens[first : first + rows]
            start = self._requests[suffix].prefix.end + first
            positions[begin : begin + rows] = range(start, start + rows)
        ready = [i for i, (suffix, rows) in enumerate(group) if suffix.remaining == rows]
        # At least one row of logits, in a bucket of its own: the head's GEMM obeys the same rounding class.
        wanted = [plan.last_rows[i] for i in ready] or [0]
        if self.rounding is not None:
            wanted += [wanted[0]] * (self.rounding.head.rows_for(len(wanted)) - len(wanted))
        inputs = [torch.tensor(values, device=self.device) for values in ([ids], [positions], wanted)]
        decode = all(rows == suffix.remaining == 1 for suffix, rows in group)
        logits = self.graphs.run(planned, inputs, decode=decode)
        self.scheduler.commit(group)
        if ready:
            self._choose([self._requests[group[i][0]] for i in ready], logits[: len(ready)])

    def _plan(self, agents: tuple[AgentRows, ...]) -> PlanForward:
        rows = sum(agent.rows for agent in agents)
        bucket = self.rounding.layers.rows_for(rows) if self.rounding is not None else rows
        plan = Plan.make(self.pool, agents, bucket=bucket)
        # Without the engine, which must not hold itself.
        return PlanForward(plan, partial(_logits, self.model, plan, self._mask, self.backend.name, self.fused))

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        history = [r.seen if r.seen is None else torch.cat([r.seen, torch.tensor(r.suffix.tokens)]) for r in requests]
        try:
            tokens = sample(
                logits,
                [r.params for r in requests],
                [len(r.suffix.tokens) for r in requests],
                [() if seen is None else seen for seen in history],
            )
        except KvkernError:
            # One of them is at fault; find it, so that the others go on.
            for row, request in enumerate(requests):
                self._choose_one(request, logits[row : row + 1], history[row])
            return
        for request, token in zip(requests, tokens, strict=True):
            self._take(request, token)

    def _choose_one(self, request: Request, logits: Tensor, history: Tensor | None) -> None:
        try:
            seen = () if history is None else history
            token = sample(logits, [request.params], [len(request.suffix.tokens)], [seen])[0]
        except KvkernError as error:
            self._end(request, "error", error)
        else:
            self._take(request, token)

    def _take(self, request: Request, token: int) -> None:
        """Add a new token to an answer, and end it where a token, a string or a number says so."""
        request.suffix.tokens.append(token)
        text = request.stream.push(token)
        if token in request.params.eos_token_ids or request.stream.stopped:
            self._end(request, "stop", text=text)
        elif len(request.new_tokens) >= request.params.max_new_tokens:
            self._end(request, "length", text=text)
        elif text:
            self._send(request, text)

    def _end(self, request: Request, reason: str, error: KvkernError | None = None, *, text: str = "") -> None:
        self.scheduler.finish(request.suffix)
        assert request.suffix.state == FINISHED
        del self._requests[request.suffix]
        text += request.stream.finish()
        request.answer = Answer(
            request.index,
            request.stream.text,
            tuple(request.new_tokens),
            reason,
            request.suffix.num_prompt,
            request.prefix.end,
            error,
        )
        self._plans.clear()
        _give_back(request.prefix)
        self._send(request, text)

    def _send(self, request: Request, text: str) -> None:
        if request.outbox is not None:
            request.outbox.append(Delta(request.index, text, request.answer))

    # -- checks ----------------------------------------------------------------------------------------------------

    def _params(self, generation_config: Any, options: dict[str, Any]) -> SamplingParams:
        defaults = self.model.generation_config
        params = SamplingParams.from_generation_config(generation_config, defaults=defaults, **options)
        if not params.eos_token_ids and self.tokenizer.eos_token_id is not None and not options.keys() & EOS:
            params = SamplingParams(**{**vars(params), "eos_token_ids": frozenset([self.tokenizer.eos_token_id])})
        return params

    def _tokens(self, document: Document, question: Question | Sequence[int], kwargs: dict[str, Any]) -> list[int]:
        if isinstance(question, str) or is_conversation(question):
            return document.question_ids(question, kwargs)
        if not isinstance(question, (Sequence, Tensor)) or not all(map(_is_id, question)):
            raise RequestError(
                "question",
                found=type(question).__name__,
                needed="a text, messages, or token ids",
                do="give each question as one text, one conversation since the document, or one list of token ids",
            )
        tokens = [int(token) for token in cast("Sequence[int]", question)]
        check_ids(tokens, self.model.config.vocab_size, "question")
        return tokens

    def _check(self, document: Document) -> None:
        check_document(document, self.model, tokenizer_digest=self._tokenizer_digest)

    def describe(self) -> dict[str, Any]:
        """What the engine has to work with: agents, pages, bytes, backend, fused steps, graphs and rounding class."""
        return {
            "max_agents": self.scheduler.max_agents,
            "pages": self.pool.num_pages,
            "page_tokens": PAGE,
            "memory_bytes": self.pool.num_pages * PAGE * self.geometry.token_bytes(),
            "suffix_tokens": self.pool.num_pages * PAGE,
            "backend": self.backend.name,
            "backend_why": self.backend.why,
            "fused": self.fused,
            "fused_why": self.fused_why,
            "graphs": self.graphs.capture is not None,
            "graphs_why": self.graphs.why,
            "rounding": self.rounding.describe() if self.rounding is not None else "not measured (invariant=False)",
        }


def _logits(
    model: Any,
    plan: Plan,
    mask: Tensor,
    backend: str,
    fused: bool | None,
    ids: Tensor,
    positions: Tensor,
    wanted: Tensor,
) -> Tensor:
    """`kvkern.graphs.Forward` of a plan's rows, once it is given the first five."""
    logits: Tensor = model(
        ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=qwen3.StepCache(plan, backend=backend, fused=fused),
        use_cache=True,
        logits_to_keep=wanted,
    ).logits
    return logits[0]


def _give_back(prefix: SharedPrefix) -> None:
    """Release, unless its owner has released more than was his."""
    if not prefix.released:
        prefix.release()


def _agent(suffix: Suffix, rows: int) -> AgentRows:
    assert suffix.slot is not None, "a sequence in a step runs"
    return AgentRows(suffix.slot, suffix.node, rows)


def _is_id(token: Any) -> bool:
    if isinstance(token, Tensor):
        return token.dim() == 0 and not token.is_floating_point()
    return isinstance(token, int) and not isinstance(token, bool)


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(**{**vars(params), "seed": seed})


def _in_order(answers: Iterator[Answer]) -> Iterator[Answer]:
    """Answers by index, each held back until those before it have ended."""
    held: dict[int, Answer] = {}
    following = 0
    for answer in answers:
        held[answer.index] = answer
        while following in held:
            yield held.pop(following)
            following += 1
