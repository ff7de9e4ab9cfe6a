"""An engine on a random model of Qwen3-4B's shape: B agents over one document, by token ids; decode, prefill and memory.

    python bench/bench_engine.py [--tiny] [--fuse] [--graphs] [--no-invariant] [--device cuda] [--seconds 120] [--out bench/results/NAME]

After each cell engine.json is written; a cell that it holds is skipped, so a run can be cut off and taken up again. No cell
begins after --seconds. A cell that fails is kept with the reason, and run again next time. Weights are random, hence answers
mean nothing and none ends early; before any time, first tokens of questions to a short document are compared with those of
the same model under torch's attention, without document or pages: where they are others, the script ends; so it does where
--graphs gives other answers than none. The shape of a cell without graphs does not name them, as before there were any.

Fields: shape, backend, agents, document, decode_tokens_per_s (the median step of one token for each agent), seconds.decode
(every such step), prefill_s (publishing the document, the second of two times), extend_s (all questions,
up to the first token of each), peak_bytes (of torch's allocator; null on the CPU), forecast_bytes (weights, document and pages
as kvkern.cost has them, activations not counted), weights_bytes, rounding, commit.

    engine   B=1024 P=32768 model=qwen3-4b fuse=False invariant=True backend=None | <n> tokens/s, step <ms> ms (<spread> %) |
             prefill <s> s | peak <n> GiB, forecast <n> GiB
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from harness import Bench, WrongResult, shown
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import kvkern
from kvkern import cost
from kvkern.identity import model_geometry

AGENTS, DOCUMENTS = (1024, 64, 4096, 1, 256), (3774, 32768)
CELLS = [(b, p) for p in DOCUMENTS for b in AGENTS]
TINY = [(3, 100), (1, 100)]
QUESTION = 16
"""Tokens of a question."""

QWEN3_4B: dict[str, Any] = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=True,
)
SMALL: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    initializer_range=0.2,
)
FAILURES = (RuntimeError, MemoryError, kvkern.KvkernError)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tiny", action="store_true", help="a small model: to see that all of it runs; default on the CPU"
    )
    parser.add_argument("--agents", type=int, nargs="+", default=None, help="these numbers of agents alone")
    parser.add_argument(
        "--documents", type=int, nargs="+", default=None, help="these document lengths alone, in tokens"
    )
    parser.add_argument("--fuse", action="store_true", help="Engine(fused=True): norm and RoPE within K0")
    parser.add_argument("--graphs", action="store_true", help="Engine(graphs=True): decode steps from CUDA graphs")
    parser.add_argument("--no-invariant", dest="invariant", action="store_false", help="forwards of free shapes")
    parser.add_argument("--seconds", type=float, default=120.0, help="no cell begins after these")


def random_model(config: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Drawn where it lies, once: bf16 on a GPU and fp32 on a CPU, unless dtype says which. One thread draws 4 billion in half a minute."""
    settings = Qwen3Config(**config, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    held = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
    try:
        # transformers and torch would draw every weight one after the other; on "meta" neither does.
        with torch.device("meta"):
            model = Qwen3ForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(held)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for weight in model.parameters():
            # Of one dimension are the norms' alone.
            weight.normal_(0, settings.initializer_range) if weight.dim() > 1 else weight.fill_(1)
    # The frequencies of RoPE stay in fp32, as they do where a model is loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)
    model.set_attn_implementation("kvkern")
    return model


def words(size: int) -> Any:
    """A tokenizer with a word for each id, so that answers are text to be decoded."""
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def draw(count: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (count,)).tolist()


@torch.no_grad()
def check(
    model: Any, tokenizer: Any, backend: str | None, *, invariant: bool, fused: bool, graphs: bool = False
) -> None:
    """Raise WrongResult where a first token is not, up to rounding, what the model says under torch's attention, or where an
    answer is another with graphs."""
    size = model.config.vocab_size
    ids, questions = draw(200, size), [draw(QUESTION + n, size) for n in range(3)]
    with kvkern.publish(model, None, ids) as document:
        options: dict[str, Any] = dict(max_agents=4, invariant=invariant, backend=backend, fused=fused)
        engine = kvkern.Engine(model, tokenizer, **options)
        answers = list(engine.ask(document, questions, ordered=True, max_new_tokens=1, do_sample=False))
        if graphs:
            plain, replayed = (
                [answer.token_ids for answer in one.ask(document, questions, ordered=True, max_new_tokens=8)]
                for one in (engine, kvkern.Engine(model, tokenizer, **options, graphs=True))
            )
            if plain != replayed:
                raise WrongResult("wrong result: other tokens with graphs than without; no time is reported")
    model.set_attn_implementation("sdpa")
    try:
        for question, answer in zip(questions, answers, strict=True):
            logits = model(torch.tensor([ids + question], device=model.device), logits_to_keep=1).logits[0, -1].float()
            (token,) = answer.token_ids
            lost = ((logits.max() - logits[token]) / (logits.max() - logits.mean())).item()
            # Of many near the top, rounding may choose another; what another attention gives lies about the mean, at 1.
            if not lost <= 0.1:
                raise WrongResult(
                    f"wrong result: first token {lost:.2g} below the best, allowed 0.1; no time is reported"
                )
    finally:
        model.set_attn_implementation("kvkern")


def published(bench: Bench, model: Any, tokens: int) -> tuple[kvkern.Document, float]:
    """A document of random tokens, and the seconds that it took."""
    ids, made = draw(tokens, model.config.vocab_size), []
    seconds = bench.once(lambda: made.append(kvkern.publish(model, None, ids)))
    return made[0], seconds


def measure(
    bench: Bench, model: Any, tokenizer: Any, document: kvkern.Document, agents: int, *, graphs: bool = False
) -> dict[str, Any]:
    """Extend all questions, then time steps of one token for each agent; with graphs, those that are replays alone."""
    chosen, device, cuda = bench.options, bench.device, bench.device.type == "cuda"
    geometry, size = model_geometry(model), model.config.vocab_size
    most = min(QUESTION * agents, 8192)
    # Those that are extended first decode until the last ones are: steps to extend, and some for a preempted agent.
    new_tokens = -(-QUESTION * agents // most) + 2 + chosen.samples + 8
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = cost.fit(
        geometry,
        document_tokens=document.tokens,
        suffix_tokens=QUESTION + new_tokens,
        memory_bytes=1 << 60,
        weights_bytes=weights,
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    engine = kvkern.Engine(
        model,
        tokenizer,
        max_agents=agents,
        memory_bytes=agents * needed.suffix_bytes,
        max_extend_tokens=most,
        invariant=chosen.invariant,
        backend=chosen.backend,
        fused=chosen.fuse,
        graphs=graphs,
    )
    requests = [
        engine.submit(document, draw(QUESTION, size), index=i, max_new_tokens=new_tokens, do_sample=False)
        for i in range(agents)
    ]
    extend = 0.0
    while not all(request.new_tokens for request in requests):
        extend += bench.once(engine.step)
    for _ in range(3 if graphs else 1):
        bench.once(engine.step)
    steps = []
    for _ in range(chosen.samples):
        before = sum(len(request.new_tokens) for request in requests)
        steps.append(bench.once(engine.step))
        made = sum(len(request.new_tokens) for request in requests) - before
        if made != agents:
            raise RuntimeError(f"a step made {made} tokens for {agents} agents")
    if graphs and not engine.describe()["graphs"]:
        raise RuntimeError(f"no graphs: {engine.describe()['graphs_why']}")
    for request in requests:
        engine.cancel(request)
    return {
        "backend": engine.backend.name,
        "agents": agents,
        "document": document.tokens,
        "decode_tokens_per_s": agents / statistics.median(steps),
        "seconds": {"decode": steps},
        "extend_s": extend,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "forecast_bytes": needed.weights_bytes + needed.prefix_bytes + agents * needed.suffix_bytes,
        "weights_bytes": weights,
        "rounding": engine.describe()["rounding"],
    }


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    steps, peak = found["seconds"]["decode"], found["peak_bytes"]
    step = statistics.median(steps)
    return (
        f"engine   {shown(shape)} | {found['decode_tokens_per_s']:.1f} tokens/s, step {step * 1e3:.2f} ms "
        f"({100 * (max(steps) - min(steps)) / step:.0f} %) | prefill {found['prefill_s']:.2f} s | "
        f"peak {'not known' if peak is None else cost.render_bytes(peak)}, "
        f"forecast {cost.render_bytes(found['forecast_bytes'])}"
    )


def main() -> None:
    bench, began = Bench.start("engine", __doc__, extra=options), time.monotonic()
    chosen, cuda = bench.options, bench.device.type == "cuda"
    tiny = chosen.tiny or not cuda
    bench.resume()
    torch.seed()
    cells = TINY if tiny else CELLS
    if chosen.agents or chosen.documents:
        documents = chosen.documents or list(dict.fromkeys(p for _, p in cells))
        cells = [(b, p) for p in documents for b in chosen.agents or dict.fromkeys(b for b, _ in cells)]
    settings = {name: getattr(chosen, name) for name in ("fuse", "invariant", "backend")}
    # Cells that were measured before there were graphs stay what they are.
    settings |= {"graphs": True} if chosen.graphs else {}
    shapes = {cell: {"B": cell[0], "P": cell[1], "model": "tiny" if tiny else "qwen3-4b", **settings} for cell in cells}
    left = [cell for cell in cells if not bench.has(shapes[cell])]
    if not left:
        return
    model = random_model(SMALL if tiny else QWEN3_4B, bench.device)
    tokenizer = words(model.config.vocab_size)
    check(model, tokenizer, chosen.backend, invariant=chosen.invariant, fused=chosen.fuse, graphs=chosen.graphs)
    document: kvkern.Document | None = None
    prefill = 0.0
    for cell in left:
        agents, tokens = cell
        if time.monotonic() - began > chosen.seconds:
            break
        try:
            if document is None or document.tokens != tokens:
                # The first one warms: kernels compile as a document grows.
                for _ in range(2):
                    if document is not None:
                        document.release()
                        document = None
                    document, prefill = published(bench, model, tokens)
            assert document is not None
            found = measure(bench, model, tokenizer, document, agents, graphs=chosen.graphs)
        except FAILURES as error:
            bench.fail(shapes[cell], error)
        else:
            found["prefill_s"] = prefill
            bench.keep(shapes[cell], found)
            print(line(shapes[cell], found), flush=True)
        bench.save()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
