"""What the demo ships and starts from: the document, the questions, the converted model, and the peer that answers from scratch."""

import difflib
import hashlib
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import kvkern
from kvkern import demo_model as demo
from kvkern.errors import RequestError

PACKAGE = Path(kvkern.__file__).parent
WORDS = ["you", "may", "convey", "copies", "of", "the", "work", "keep", "all", "notices", "system", "user", "assistant"]


@pytest.fixture(scope="module")
def questions():
    lines = (PACKAGE / "data" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# The document and the questions


def test_the_document_is_the_gpl_3_verbatim():
    data = (PACKAGE / "data" / "gpl-3.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986"


def test_there_are_256_questions_of_8_to_20_words(questions):
    assert len(questions) == 256
    for line in questions:
        assert set(line) == {"question"}
        assert 8 <= len(line["question"].split()) <= 20, line
        assert line["question"] == line["question"].strip()


def nearest(texts):
    """The two most alike of some texts: (ratio, text, text); (0, "", "") if no two share half of their letters."""
    best = (0.0, "", "")
    for a, b in itertools.combinations(texts, 2):
        match = difflib.SequenceMatcher(None, a.lower(), b.lower())
        if match.real_quick_ratio() > 0.8 and match.quick_ratio() > 0.8:
            best = max(best, (match.ratio(), a, b))
    return best


def test_no_two_questions_are_worded_alike(questions):
    texts = [line["question"] for line in questions]
    assert len(set(texts)) == len(texts)
    ratio, a, b = nearest(texts)
    assert ratio < 0.85, (a, b)


def test_control_a_paraphrase_among_the_questions_is_caught(questions):
    texts = [line["question"] for line in questions]
    seed = random.randrange(2**32)
    print("seed", seed)
    text = random.Random(seed).choice(texts)
    ratio, a, b = nearest([*texts, text.replace("?", ", please?").replace(".", ", please.")])
    assert ratio >= 0.85, (a, b)
    assert text in (a, b)


def test_the_questions_take_many_forms(questions):
    openings = [line["question"].split()[0] for line in questions]
    assert len(set(openings)) >= 20
    assert max(openings.count(word) for word in set(openings)) <= 64


# The peer: a process that never imports kvkern


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random two-layer Llama with a tokenizer of whole words and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    seed = torch.seed() % 2**32
    print("seed", seed)
    torch.manual_seed(seed)
    vocab = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def from_scratch(request, env=None):
    """Lines that the peer writes: one for each prompt, and the closing one."""
    done = subprocess.run(
        [sys.executable, str(PACKAGE / "scratch.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    *answers, closing = [json.loads(line) for line in done.stdout.splitlines()]
    return answers, closing


def generate(folder, prompts, max_new_tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    outs = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=max_new_tokens
        )
        outs.append(out[0, len(ids) :].tolist())
    return outs


def test_the_peer_gives_the_tokens_of_transformers_and_imports_nothing_of_ours(model_folder):
    draw = random.Random(torch.initial_seed())
    ids = [[draw.randrange(2, 2 + len(WORDS)) for _ in range(length)] for length in (1, 7, 90)]
    talk = [{"role": "system", "content": " ".join(WORDS)}, {"role": "user", "content": "may you convey copies"}]
    text = "keep all notices"
    answers, closing = from_scratch(
        {"model": str(model_folder), "max_new_tokens": 12, "threads": 1, "prompts": [*ids, talk, text]}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    prompts = [
        *ids,
        tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"],
        tokenizer(text)["input_ids"],
    ]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4]
    assert [answer["prompt_tokens"] for answer in answers] == [len(prompt) for prompt in prompts]
    assert [answer["token_ids"] for answer in answers] == generate(model_folder, prompts, 12)
    assert all(answer["seconds"] > 0 for answer in answers)
    assert closing["done"] and closing["kvkern_imported"] is False
    assert closing["versions"]["transformers"] == transformers.__version__


def test_control_a_peer_that_imports_kvkern_says_so_and_fails(tmp_path, model_folder):
    (tmp_path / "sitecustomize.py").write_text("import kvkern.errors\n")
    env = {"PATH": "", "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
    request = json.dumps({"model": str(model_folder), "max_new_tokens": 1, "prompts": [[2, 3]]})
    done = subprocess.run(
        [sys.executable, str(PACKAGE / "scratch.py")],
        input=request,
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode != 0
    assert json.loads(done.stdout.splitlines()[-1])["kvkern_imported"] is True


# The model, converted once


def test_the_cache_directory_is_ours_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("KVKERN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVKERN_CACHE")
    assert demo.default_cache_dir() == tmp_path / "xdg" / "kvkern"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.default_cache_dir() == tmp_path / "home" / ".cache" / "kvkern"


@pytest.fixture
def gguf_file(monkeypatch, tmp_path):
    """A file in place of the GGUF, so that conversion is not the matter of the test."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(demo, "_gguf_file", lambda: file)
    return file


def write_model(source, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(source.read_bytes())


def test_the_model_is_converted_once(monkeypatch, tmp_path, gguf_file):
    calls = []
    monkeypatch.setattr(demo, "_convert", lambda source, folder: (calls.append(folder), write_model(source, folder)))
    first, second = demo.demo_model(tmp_path / "cache"), demo.demo_model(tmp_path / "cache")
    assert first == second == tmp_path / "cache" / demo.MODEL
    assert (first / "model.safetensors").read_bytes() == b"GGUF"
    assert len(calls) == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path, gguf_file, stop):
    def broken(source, folder):
        write_model(source, folder)
        raise stop

    monkeypatch.setattr(demo, "_convert", broken)
    with pytest.raises(stop):
        demo.demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_model_of_a_process_that_was_faster_is_taken(monkeypatch, tmp_path, gguf_file):
    def late(source, folder):
        write_model(source, folder)
        (tmp_path / "cache" / demo.MODEL).mkdir()
        (tmp_path / "cache" / demo.MODEL / "config.json").write_text("theirs")

    monkeypatch.setattr(demo, "_convert", late)
    folder = demo.demo_model(tmp_path / "cache")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [demo.MODEL]


@pytest.mark.parametrize("name", [demo.PACKAGE, "gguf", "accelerate"])
def test_a_missing_package_is_named_before_anything_is_written(monkeypatch, tmp_path, name):
    find_spec = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda asked: None if asked == name else find_spec(asked))
    with pytest.raises(RequestError) as caught:
        demo.demo_model(tmp_path / "cache")
    assert caught.value.field == "demo model"
    assert name in caught.value.found
    assert "pip install" in caught.value.do
    assert not (tmp_path / "cache").exists()


def test_a_cache_directory_that_cannot_be_made_is_named(tmp_path, gguf_file):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError) as caught:
        demo.demo_model(tmp_path / "file" / "cache")
    assert caught.value.field == "cache directory"
    assert str(tmp_path / "file") in caught.value.found
    assert "KVKERN_CACHE" in caught.value.do
