"""Answer prompts from scratch with transformers alone: the peer that kvkern's answers are compared with.

    python kvkern/scratch.py < request.json

Run by path in a process of its own, it imports nothing of kvkern. On stdin, one JSON object; values shown are the defaults:

    model                folder or name                   prompts   list; a prompt is a list of token ids, a text, or a
    dtype                "float32"                                  conversation [{"role": ..., "content": ...}, ...]
    device               "cpu"                            template  keywords for the chat template: {}
    attn_implementation  "sdpa"                           threads   null: as many as torch takes
    max_new_tokens       24

On stdout a line for each prompt as it ends, then a closing line:

    {"index": 0, "prompt_tokens": 3802, "token_ids": [...], "seconds": 17.2}       new tokens alone, greedy, up to eos and with it
    {"done": true, "load_seconds": 3.6, "kvkern_imported": false, "versions": {...}}
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Python puts this folder on the path of a script in it, where its modules would shadow others by bare names: plan, store.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    request = json.load(sys.stdin)
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    tokenizer, model = load(request)
    load_seconds = time.perf_counter() - started

    prompts = [prompt_ids(tokenizer, prompt, request.get("template", {})) for prompt in request["prompts"]]
    answer(model, prompts[0][:4], 2)  # the first answer does not pay for what a process sets up once
    for index, ids in enumerate(prompts):
        started = time.perf_counter()
        token_ids = answer(model, ids, request.get("max_new_tokens", 24))
        say(index=index, prompt_tokens=len(ids), token_ids=token_ids, seconds=time.perf_counter() - started)

    imported = kvkern_imported()
    say(done=True, load_seconds=load_seconds, kvkern_imported=imported, versions=versions())
    assert not imported, "this process must be a peer, not a part of kvkern"


def load(request: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer, None where every prompt is token ids, and model."""
    only_ids = all(is_ids(prompt) for prompt in request["prompts"])
    tokenizer = None if only_ids else transformers.AutoTokenizer.from_pretrained(request["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=request.get("dtype", "float32"),
        attn_implementation=request.get("attn_implementation", "sdpa"),
        use_safetensors=True,
    )
    return tokenizer, model.to(request.get("device", "cpu")).eval()


def is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


def prompt_ids(tokenizer: Any, prompt: Any, template: dict[str, Any]) -> list[int]:
    """Token ids of a prompt in any of its three forms."""
    if is_ids(prompt):
        return prompt
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **template)["input_ids"]


def answer(model: Any, ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy new tokens, by transformers' own generate and cache."""
    prompt = torch.tensor([ids], device=model.device)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens)
    return out[0, len(ids) :].tolist()


def kvkern_imported() -> bool:
    """Whether anything of kvkern but this script, under its own name or another, is in this process."""
    files = [getattr(module, "__file__", None) for module in sys.modules.values()]
    paths = {Path(file).resolve() for file in files if file} - {Path(__file__).resolve()}
    return "kvkern" in sys.modules or any(HERE in path.parents for path in paths)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
