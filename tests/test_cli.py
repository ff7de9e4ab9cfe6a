"""The command line, as a user types it: what it prints, what it exits with, and one readable error for each bad input."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import kvkern as library
from kvkern import _C, cli
from kvkern.answers import AnswerWriter
from kvkern.engine import Answer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening | default('') }}{% endif %}"
)
TEXT = "The pump starts when its valve is open, and stops when the tank is full. " * 16
QUESTIONS = ["Why?", "How does the pump start?", "Is the tank full, or is it not?"]

SCRIPT = Path(sys.executable).with_name("kvkern")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "kvkern.cli"]


def tiny_model(seed: int = 2) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=1.0,  # wide, and with this seed the three questions have three answers
        eos_token_id=257,
    )
    return Qwen3ForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models tiny/ and other/, doc.txt, and doc.kv of tiny; nobody writes to these."""
    folder = tmp_path_factory.mktemp("cli")
    for name, seed in (("tiny", 2), ("other", 1)):
        tiny_model(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "doc.txt").write_text(TEXT)
    assert cli.main(["publish", str(folder / "tiny"), str(folder / "doc.txt"), "-o", str(folder / "doc.kv")]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in a test are names in that folder; no network is asked."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Run:
    """kvkern(*words) -> exit code; then .out and .err."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self.capsys.readouterr()
        code = cli.main([str(word) for word in words])
        self.out, self.err = self.capsys.readouterr()
        return code

    def json(self, *words: object) -> dict:
        assert self(*words, "--json") == 0, self.err
        return json.loads(self.out)

    def lines(self, *words: object) -> list[dict]:
        assert self(*words, "--json") == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def kvkern(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def from_scratch(question: str, new_tokens: int) -> list[int]:
    """What transformers answers by its own attention, with the document in the prompt."""
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    model = AutoModelForCausalLM.from_pretrained("tiny", attn_implementation="sdpa")
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


# -- each command ------------------------------------------------------------------------------------------------------


def test_publish_then_inspect_then_verify_say_the_same_of_a_file(kvkern, tmp_path):
    made = kvkern.json("publish", "tiny", "doc.txt", "-o", tmp_path / "a.kv", "--chunk", 100)
    seen = kvkern.json("inspect", tmp_path / "a.kv")
    checked = kvkern.json("verify", tmp_path / "a.kv", "--model", "tiny")

    assert {name: made[name] for name in seen} == seen
    assert {name: checked[name] for name in seen} == seen
    assert seen["size_bytes"] == (tmp_path / "a.kv").stat().st_size
    assert seen["provenance"]["prefill_chunk"] == 100
    assert seen["provenance"]["model"] == str(Path("tiny").resolve()), "another folder's `ask` must find it"
    assert made["prefill_seconds"] > 0
    assert checked["verified"]["blocks"] == seen["blocks"] == 2 * 2 * seen["segments"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kv"]


def test_a_packed_file_serves_as_the_plain_one_does(kvkern, tmp_path):
    plain, packed = tmp_path / "plain.kv", tmp_path / "packed.kv"
    words = ("publish", "tiny", "doc.txt", "--dtype", "bfloat16", "-o")
    before, made = kvkern.json(*words, plain), kvkern.json(*words, packed, "--compress")
    assert (before["packed"], made["packed"]) == (None, "planes-zstd-1")
    assert made["identity"] == before["identity"] and made["kv_bytes"] == before["kv_bytes"]
    assert made["size_bytes"] == packed.stat().st_size < before["size_bytes"]
    assert kvkern.json("verify", packed, "--model", "tiny")["verified"]["blocks"] == made["blocks"]
    assert kvkern("inspect", packed) == 0
    (line,) = (line for line in kvkern.out.splitlines() if line.startswith("packed  "))
    assert "planes-zstd-1, " in line and f"% of {library.cost.render_bytes(made['kv_bytes'])}" in line
    assert kvkern("inspect", plain) == 0 and "packed  " not in kvkern.out
    ask = (*QUESTIONS, "--max-new-tokens", 4, "--ordered", "--backend", "torch")
    told = [[answer["token_ids"] for answer in kvkern.lines("ask", file, *ask)] for file in (plain, packed)]
    assert told[0] == told[1] and len(told[0]) == len(QUESTIONS)


def test_inspect_prints_what_the_json_holds_with_units(kvkern):
    held = kvkern.json("inspect", "doc.kv")
    assert kvkern("inspect", "doc.kv") == 0
    first, second, *rest = kvkern.out.splitlines()
    assert first.startswith("doc.kv")
    for part in (f"{held['tokens']:,} tokens", "2 layers", "2 kv heads of 16", "float32", "KiB"):
        assert part in first
    weights = held["identity"]["weights"]
    assert f"weights {weights[:4]}..{weights[-4:]}" in second and "made by kvkern" in second
    assert first.index(f"{held['tokens']:,}") == second.index(held["provenance"]["model"]), "aligned"
    assert any("chat template" in line for line in rest)
    assert kvkern.err == ""


def test_verify_without_a_model_says_that_it_compared_none(kvkern):
    assert kvkern("verify", "doc.kv") == 0
    assert "digests only, no model compared" in kvkern.out
    assert kvkern.json("verify", "doc.kv")["verified"]["model"] is None


def test_ask_answers_what_transformers_answers_from_scratch(kvkern):
    answers = kvkern.lines("ask", "doc.kv", *QUESTIONS, "--max-new-tokens", 12, "--agents", 2)
    assert sorted(answer["index"] for answer in answers) == [0, 1, 2]
    for answer in answers:
        question = QUESTIONS[answer["index"]]
        assert answer["question"] == question
        assert answer["token_ids"] == from_scratch(question, 12)
        assert answer["error"] is None and answer["cached_tokens"] > len(TEXT)
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 3, "an answer must depend on its question"
    assert "tokens/s" in kvkern.err


def test_ask_in_words_prints_question_answer_and_tokens(kvkern):
    asked = ("ask", "doc.kv", QUESTIONS[1], "--max-new-tokens", 12, "--model", "tiny")
    (answer,) = kvkern.lines(*asked)
    assert kvkern(*asked) == 0
    head, *body, tokens, blank = kvkern.out.split("\n")[:-1]
    assert head == f"[0] {QUESTIONS[1]}" and blank == ""
    assert "".join(body).split() == answer["text"].split()
    assert f"{len(answer['token_ids'])} new tokens ({answer['finish_reason']})" in tokens
    assert f"{answer['prompt_tokens']} question tokens after {answer['cached_tokens']:,} cached" in tokens


def test_ask_takes_lines_of_json_and_plain_lines_in_order(kvkern, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(f'{{"question": "{QUESTIONS[0]}"}}\n"{QUESTIONS[1]}"\n{QUESTIONS[2]}\n\n', encoding="utf-8")
    options = ("--max-new-tokens", 6, "--ordered", "--agents", 1)
    answers = kvkern.lines("ask", "doc.kv", "--questions", file, *options)
    assert [answer["question"] for answer in answers] == QUESTIONS

    output = tmp_path / "answers.jsonl"
    said = kvkern.json("ask", "doc.kv", "--questions", file, *options, "-o", output)
    assert [json.loads(line) for line in output.read_text().splitlines()] == answers
    assert (said["answers"], said["refused"], said["interrupted"]) == (3, 0, False)
    assert said["new_tokens"] == sum(len(answer["token_ids"]) for answer in answers)


def test_ask_reads_questions_from_standard_input(kvkern, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{QUESTIONS[0]}\n".encode())))
    (answer,) = kvkern.lines("ask", "doc.kv", "--questions", "-", "--max-new-tokens", 2)
    assert answer["question"] == QUESTIONS[0]


def test_a_sample_follows_the_seed_and_a_stop_text_ends_an_answer(kvkern):
    def texts(*options: object) -> list[str]:
        asked = ("ask", "doc.kv", *QUESTIONS, "--ordered", "--max-new-tokens", 10)
        return [answer["text"] for answer in kvkern.lines(*asked, *options)]

    hot = ("--temperature", 5, "--top-k", 0, "--top-p", 1.0)
    assert texts(*hot, "--seed", 3) == texts(*hot, "--seed", 3, "--agents", 1)
    assert texts(*hot, "--seed", 3) != texts(*hot, "--seed", 4)
    greedy = texts()
    last = next(text for text in greedy if len(text) > 1)[1]
    assert all(last not in text for text in texts("--stop", last))


def test_a_plain_document_is_continued_without_a_template(kvkern, tmp_path):
    made = kvkern.json("publish", "tiny", "doc.txt", "-o", tmp_path / "plain.kv", "--plain")
    assert made["identity"]["template"] is None and made["tokens"] == len(TEXT)
    (answer,) = kvkern.lines("ask", tmp_path / "plain.kv", "and then", "--max-new-tokens", 2)
    assert answer["prompt_tokens"] == len("and then")


def test_template_keywords_are_json_or_text_and_used_for_the_questions(kvkern, tmp_path):
    file = tmp_path / "kw.kv"
    words = ("--template-kwarg", "opening=<think>", "--template-kwarg", "n=3", "--template-kwarg", "on=false")
    made = kvkern.json("publish", "tiny", "doc.txt", "-o", file, *words)
    assert made["identity"]["template_kwargs"] == {"opening": "<think>", "n": 3, "on": False}
    (with_it,) = kvkern.lines("ask", file, "Why?", "--max-new-tokens", 1)
    (without,) = kvkern.lines("ask", "doc.kv", "Why?", "--max-new-tokens", 1)
    assert with_it["prompt_tokens"] == without["prompt_tokens"] + len("<think>")


def test_fit_shows_its_arithmetic_and_needs_no_weights(kvkern, tmp_path):
    shutil.copytree("tiny", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    asked = ("--document-tokens", 3774, "--suffix-tokens", 200, "--memory", "64MiB")
    for name, by in (("tiny", "its safetensors headers"), (tmp_path / "bare", "its config")):
        found = kvkern.json("fit", name, *asked)
        assert found["weights_from"] == by
        assert found["token_bytes"] == 2 * 2 * 2 * 16 * 4
        assert found["prefix_bytes"] == 3840 * found["token_bytes"]
        assert found["suffix_bytes"] == 208 * found["token_bytes"]
        assert found["weights_bytes"] == 4 * sum(p.numel() for p in tiny_model().parameters())
        left = (64 << 20) - found["weights_bytes"] - found["prefix_bytes"]
        assert found["agents"] == left // found["suffix_bytes"]
    assert kvkern("fit", "tiny", *asked) == 0
    assert f"{found['agents']:,} = left / one agent" in kvkern.out and "64.0 MiB" in kvkern.out
    assert kvkern.json("fit", "tiny", *asked, "--dtype", "bfloat16")["agents"] > found["agents"]


def test_cost_takes_the_bytes_of_a_token_from_a_model_and_the_rest_from_publish(kvkern, tmp_path):
    token_bytes = 2 * 2 * 2 * 16 * 4
    assert kvkern.json("cost", "--model", "tiny")["inputs"]["token_bytes"] == token_bytes
    made = kvkern.json("publish", "tiny", "doc.txt", "-o", tmp_path / "new.kv")
    (tmp_path / "made.json").write_text(kvkern.out)
    found = kvkern.json("cost", "--measured", tmp_path / "made.json", "--reuse-seconds", 1e-9, "--gpu-hour", 3600)
    assert found["kv_bytes"] == pytest.approx(made["kv_bytes"], rel=1e-12)
    assert found["by_seconds"]["prefill"] == pytest.approx(made["prefill_seconds"])


def test_env_says_backend_and_why_and_measures_a_model(kvkern):
    found = kvkern.json("env", "--model", "tiny", "--device", "cpu")
    assert found["backend"]["name"] == "cpu" and found["backend"]["why"]
    assert found["instruction_set"] == _C.instruction_sets()[0]
    assert found["torch_instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert found["threads"] == torch.get_num_threads()
    assert set(found["versions"]) == {"python", "kvkern", "torch", "triton", "transformers"}
    assert found["rounding"]["row_buckets"]
    assert kvkern("env", "--model", "tiny", "--device", "cpu") == 0
    assert f"torch {torch.__version__}" in kvkern.out and "one rounding class" in kvkern.out


def test_demo_hands_its_options_on(kvkern, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr("kvkern.demo.run", lambda **options: seen.update(options))
    options = ("--model", "tiny", "--document", "doc.txt", "--agents", 5, "--new-tokens", 3, "--keep", tmp_path)
    assert kvkern("demo", *options, "--device", "cpu", "--backend", "torch", "--json") == 0
    assert seen.items() >= {"model": "tiny", "document": Path("doc.txt"), "agents": 5, "new_tokens": 3}.items()
    assert seen.items() >= {"out_dir": tmp_path, "device": "cpu", "backend": "torch", "json": True}.items()


# -- bad input: exit code 1, one error that names the field ------------------------------------------------------------

ASK = ("ask", "doc.kv", "Why?")
PUBLISH = ("publish", "tiny", "doc.txt", "-o", "never.kv")


@pytest.fixture(scope="module")
def bad(folder: Path) -> None:
    """Things that no command can use."""
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n\t")
    (folder / "bad.jsonl").write_text('Why?\n{"question": 3}\n')
    (folder / "long.txt").write_text(TEXT * 2)
    data = bytearray((folder / "doc.kv").read_bytes())
    (folder / "short.kv").write_bytes(data[:-8])
    data[4096 + random.randrange(100_000)] ^= 1
    (folder / "flipped.kv").write_bytes(data)
    for name in ("no-weights", "no-tokenizer", "cut", "deeper", "wider", "foreign", "sliding", "code"):
        shutil.copytree(folder / "tiny", folder / name)
    (folder / "no-weights" / "model.safetensors").unlink()
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = (folder / "tiny" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-100])
    changes = {
        "deeper": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        "wider": {"intermediate_size": 64},
        "foreign": {"model_type": "nobodys"},
        "sliding": {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2},
        "code": {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"},
    }
    for name, change in changes.items():
        config = folder / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))


@pytest.mark.parametrize(
    ("words", "kind", "field", "found"),
    [
        # the document
        (("publish", "tiny", "none.txt", "-o", "never.kv"), "RequestError", "document", "none.txt: No such file"),
        (("publish", "tiny", ".", "-o", "never.kv"), "RequestError", "document", "Is a directory"),
        (("publish", "tiny", "latin.txt", "-o", "never.kv"), "RequestError", "document", "byte 0xe9 at offset 3"),
        (("publish", "tiny", "empty.txt", "-o", "never.kv"), "RequestError", "document", "an empty file"),
        (("publish", "tiny", "blank.txt", "-o", "never.kv"), "RequestError", "document", "all blank"),
        (("publish", "tiny", "long.txt", "-o", "never.kv"), "CapacityError", "document", "tokens"),
        # where to write
        (("publish", "tiny", "doc.txt", "-o", "none/a.kv"), "StoreError", "output", "no folder none"),
        (("publish", "tiny", "doc.txt", "-o", "tiny"), "StoreError", "output", "a folder"),
        ((*ASK, "-o", "none/a.jsonl"), "StoreError", "output", "no folder none"),
        # the model
        (("publish", "./none", "doc.txt", "-o", "never.kv"), "RequestError", "model", "no folder ./none"),
        (("publish", "none", "doc.txt", "-o", "never.kv"), "RequestError", "model", "no folder none"),
        (("publish", "doc.txt", "doc.txt", "-o", "never.kv"), "RequestError", "model", "doc.txt, a file"),
        (("publish", "no/body", "doc.txt", "-o", "never.kv"), "RequestError", "model", "no/body: "),
        (("publish", "no-weights", "doc.txt", "-o", "never.kv"), "RequestError", "model", "no file named"),
        (("publish", "no-tokenizer", "doc.txt", "-o", "never.kv"), "RequestError", "model", "no tokenizer"),
        (("publish", "cut", "doc.txt", "-o", "never.kv"), "RequestError", "model", "cut: "),
        (("publish", "deeper", "doc.txt", "-o", "never.kv"), "RequestError", "model", "11 missing weights"),
        (("publish", "wider", "doc.txt", "-o", "never.kv"), "RequestError", "model", "6 mismatched weights"),
        (("publish", "foreign", "doc.txt", "-o", "never.kv"), "RequestError", "model", "`nobodys`"),
        (("publish", "code", "doc.txt", "-o", "never.kv"), "RequestError", "model", "contains custom code"),
        (("publish", "sliding", "doc.txt", "-o", "never.kv"), "UnsupportedError", "model.layer_types", "sliding"),
        # options of publish
        ((*PUBLISH, "--device", "gpu"), "DeviceError", "device", "gpu"),
        ((*PUBLISH, "--device", "cuda:99"), "DeviceError", "device", "cuda:99"),
        ((*PUBLISH, "--chunk", "0"), "RequestError", "chunk", "0"),
        ((*PUBLISH, "--compress"), "UnsupportedError", "compress", "KV in float32"),
        ((*PUBLISH, "--compress", "--dtype", "float16"), "UnsupportedError", "compress", "KV in float16"),
        ((*PUBLISH, "--template-kwarg", "chat=1"), "RequestError", "template_kwargs.chat", "a keyword"),
        ((*PUBLISH, "--plain", "--template-kwarg", "a=1"), "TemplateError", "template_kwargs", "['a']"),
        # the file
        (("inspect", "none.kv"), "StoreError", "path", "No such file"),
        (("inspect", "."), "StoreError", "path", "no regular file"),
        (("inspect", "doc.txt"), "StoreError", "header", "in doc.txt"),
        (("inspect", "tiny/model.safetensors"), "StoreError", "header", "in model.safetensors"),
        (("inspect", "empty.txt"), "StoreError", "size", "0 bytes"),
        (("verify", "short.kv"), "StoreError", "size", "short.kv"),
        (("verify", "flipped.kv"), "StoreError", "kv[layer ", "a SHA-256"),
        (("ask", "flipped.kv", "Why?"), "StoreError", "kv[layer ", "a SHA-256"),
        (("verify", "doc.kv", "--model", "other"), "IdentityError", "weights", "in doc.kv"),
        (("verify", "doc.kv", "--model", "tiny", "--dtype", "bfloat16"), "IdentityError", "geometry.dtype", "float32"),
        ((*ASK, "--model", "other"), "IdentityError", "weights", "in doc.kv"),
        # options of ask
        ((*ASK, "--max-new-tokens", "-1"), "RequestError", "max_new_tokens", "-1"),
        ((*ASK, "--temperature", "0"), "RequestError", "temperature", "0.0"),
        ((*ASK, "--top-p", "2"), "RequestError", "top_p", "2.0"),
        ((*ASK, "--seed", "-1"), "RequestError", "seed", "-1"),
        ((*ASK, "--stop", ""), "RequestError", "stop_strings", "['']"),
        ((*ASK, "--agents", "0"), "RequestError", "agents", "0"),
        ((*ASK, "--memory", "plenty"), "RequestError", "memory", "'plenty'"),
        ((*ASK, "--memory", "20KiB"), "CapacityError", "memory", "20KiB"),
        ((*ASK, "--backend", "magic"), "BackendError", "backend", "magic"),
        ((*ASK, "--device", "gpu"), "DeviceError", "device", "gpu"),
        (("ask", "doc.kv", "--questions", "none.jsonl"), "RequestError", "questions", "No such file"),
        (("ask", "doc.kv", "--questions", "empty.txt"), "RequestError", "questions", "no line"),
        (("ask", "doc.kv", "--questions", "bad.jsonl"), "RequestError", "questions, line 2", "an object"),
        # fit and env
        (
            ("fit", "tiny", *["--document-tokens", "0", "--suffix-tokens", "1", "--memory", "1M"]),
            "RequestError",
            "document_",
            "0",
        ),
        (
            ("fit", "tiny", *["--document-tokens", "9", "--suffix-tokens", "1", "--memory", "1K"]),
            "CapacityError",
            "memory",
            "1.0",
        ),
        (
            ("fit", "cut", *["--document-tokens", "9", "--suffix-tokens", "1", "--memory", "1M"]),
            "RequestError",
            "model",
            "cut",
        ),
        (("env", "--backend", "magic"), "BackendError", "backend", "magic"),
        (("cost", "--egress-gb", "-0.01"), "RequestError", "egress_gb", "-0.01"),
        (("cost", "--model", "cut"), "RequestError", "model", "cut"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_error_that_names_the_field(kvkern, bad, words, kind, field, found):
    assert kvkern(*words, "--json") == 1
    *_, line = kvkern.out.splitlines()
    error = json.loads(line)["error"]
    assert error["type"] == kind and error["field"].startswith(field) and found in error["found"]
    assert error["needed"] and error["do"]
    rendered = f"{kind}: {error['field']}: found {error['found']}, needed {error['needed']}\n  do: {error['do']}\n"
    assert kvkern.err == rendered, "the same in words, and nothing beside it"
    assert not Path("never.kv").exists()


def test_without_json_an_error_leaves_stdout_empty(kvkern):
    assert kvkern("inspect", "none.kv") == 1
    assert kvkern.out == "" and kvkern.err.startswith("StoreError: path: found ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Usage"),
        (("nothing",), "No such command"),
        (("publish", "tiny", "doc.txt"), "--output"),
        ((*PUBLISH, "--dtype", "float8"), "float8"),
        ((*PUBLISH, "--template-kwarg", "word"), "NAME=VALUE"),
        (("ask", "doc.kv"), "at least one question"),
        ((*ASK, "--questions", "bad.jsonl"), "not both"),
        ((*ASK, "--max-new-tokens", "many"), "--max-new-tokens"),
    ],
)
def test_wrong_usage_exits_2(kvkern, words, said):
    assert kvkern(*words) == 2
    assert said in kvkern.out + kvkern.err


@pytest.mark.parametrize("size", [20, 600], ids=["of blanks", "too long"])
def test_a_refused_question_is_reported_and_the_others_are_answered(kvkern, size):
    refused = " " * size if size == 20 else "a" * size * 3
    assert kvkern("ask", "doc.kv", "Why?", refused, "When?", "--max-new-tokens", 2, "--ordered", "--json") == 1
    answers = [json.loads(line) for line in kvkern.out.splitlines()]
    assert [answer["finish_reason"] == "error" for answer in answers] == [False, True, False]
    assert answers[1]["error"]["field"].startswith("question")
    assert "question 1 is refused: " in kvkern.err and "2 of 3 answered, 1 refused" in kvkern.err


def test_a_file_whose_model_has_gone_says_so(kvkern, tmp_path):
    shutil.copytree("tiny", tmp_path / "moved")
    kvkern.json("publish", tmp_path / "moved", "doc.txt", "-o", tmp_path / "a.kv")
    shutil.rmtree(tmp_path / "moved")
    assert kvkern("ask", tmp_path / "a.kv", "Why?") == 1
    assert kvkern.err.startswith("RequestError: model: found no folder") and "which a.kv names" in kvkern.err
    assert "do: name it by --model" in kvkern.err
    assert kvkern("ask", tmp_path / "a.kv", "Why?", "--model", "tiny", "--max-new-tokens", 1) == 0


def test_a_file_that_continues_another_is_refused_with_what_to_do_in_python(kvkern, tmp_path):
    model = AutoModelForCausalLM.from_pretrained("tiny", attn_implementation="kvkern")
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    turns = [{"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "It is."}]
    with library.load("doc.kv", model, tokenizer) as parent:
        with library.publish(model, tokenizer, turns, parent=parent) as child:
            child.save(tmp_path / "child.kv")
        for words in (("verify", "child.kv", "--model", "tiny"), ("ask", "child.kv", "Why?", "--model", "tiny")):
            command, file, *rest = words
            assert kvkern(command, tmp_path / file, *rest) == 1
            assert kvkern.err.startswith("IdentityError: ancestors: found ")
            assert "in child.kv" in kvkern.err and "serves documents without a parent" in kvkern.err
            assert "do: " in kvkern.err and "kvkern.load(" in kvkern.err and "parent=" in kvkern.err
        assert kvkern("verify", tmp_path / "child.kv") == 0, "its digests need no parent"
        with library.load(tmp_path / "child.kv", model, tokenizer, parent=parent) as child:
            child.check()


def test_a_blank_line_among_questions_is_refused_before_the_file_is_read(kvkern, tmp_path):
    (tmp_path / "q.txt").write_text("Why?\n\nWhen?\n")
    assert kvkern("ask", "none.kv", "--questions", tmp_path / "q.txt") == 1
    assert kvkern.err.startswith("RequestError: questions, line 2 of q.txt: found nothing")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kvkern.store.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "doc.kv"])


# -- a stop from outside -----------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_ends_it_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["inspect", "doc.kv"]) == cli.READER_GONE
        print("later writes go nowhere", file=stdout, flush=True)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_stdout_is_an_error_not_a_traceback(monkeypatch, capsys):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        assert cli.main(["inspect", "doc.kv", "--json"]) == 1
    assert capsys.readouterr().err.startswith("StoreError: stdout: found No space left on device")


def test_ctrl_c_keeps_answers_that_wait_for_their_turn(tmp_path):
    def answers():
        for index in (2, 0, 3):
            yield Answer(index, f"text {index}", (1,), "length", 1, 1)
        raise KeyboardInterrupt

    output = tmp_path / "answers.jsonl"
    with AnswerWriter(list("abcde"), output, ordered=True, as_json=False) as writer:
        writer.write_all(answers())
    assert writer.interrupted and writer.answers == 3
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == [0, 2, 3]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_ctrl_c_during_ask_keeps_the_answers_that_have_ended(tmp_path):
    questions, output = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("".join(f"Question number {i}?\n" for i in range(2000)))
    words = [
        "ask",
        "doc.kv",
        "--questions",
        questions,
        "-o",
        output,
        "--agents",
        "1",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    child = subprocess.Popen(
        [*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        deadline = time.monotonic() + 120
        while not (output.exists() and output.stat().st_size) and child.poll() is None:
            assert time.monotonic() < deadline, "no answer came"
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    said = json.loads(out)
    assert 1 <= len(answers) == said["answers"] < 2000
    assert said["interrupted"] is True and "Traceback" not in err
    assert [answer["index"] for answer in answers] == list(range(len(answers)))
    assert all(answer["finish_reason"] in ("stop", "length") for answer in answers)


@pytest.mark.skipif(not SCRIPT.exists(), reason="kvkern is not installed as a command")
def test_help_answers_without_torch_and_transformers():
    def imported(*words: str) -> set[str]:
        command = [sys.executable, "-X", "importtime", str(SCRIPT), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
        assert done.returncode == 0 and "Usage: kvkern" in done.stdout
        return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}

    for words in (["--help"], ["ask", "--help"], ["cost", "--help"]):
        found = imported(*words)
        assert "kvkern.cli" in found
        assert not {"torch", "transformers", "kvkern.engine"} & found
