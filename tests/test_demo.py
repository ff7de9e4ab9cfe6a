"""The demo: three processes end to end on a tiny model, what it counts and says, and what it does with bad input and Ctrl-C."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
import tempfile
import textwrap
import types
from pathlib import Path

import pytest
import torch
from models import QUESTIONS, TEXT, scratch_answer, tiny_model, tiny_tokenizer

from kvkern import attach, console, demo, demo_model, opening
from kvkern.errors import (
    BackendError,
    CapacityError,
    DeviceError,
    KvkernError,
    RequestError,
    StoreError,
    TemplateError,
)
from kvkern.geometry import pad_tokens

NEW_TOKENS = 12
ISSUE = {
    "agents": int,
    "document_tokens": int,
    "new_tokens": int,
    "token_exact": float,
    "compared_agents": int,
    "control_tokens_equal": float,
    "kv_bytes": int,
    "kv_bytes_expanded": int,
    "prefill_seconds": float,
    "load_seconds": float,
    "scratch_seconds_per_agent": float,
    "reuse_seconds_per_agent": float,
    "ratio": float,
    "backend": str,
    "model": str,
    "versions": dict,
}


def save_model(folder, *, template=True, **config):
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    tiny_model(seed=1, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model's folder, a document of a few hundred tokens, and five questions."""
    folder = tmp_path_factory.mktemp("given")
    save_model(folder / "model")
    (folder / "handbook.txt").write_text(TEXT * 4, encoding="utf-8")
    lines = [json.dumps({"question": question}) for question in QUESTIONS[:3]]
    (folder / "questions.jsonl").write_text("\n".join([*lines, *QUESTIONS[3:5], ""]), encoding="utf-8")
    return {
        "model": folder / "model",
        "document": folder / "handbook.txt",
        "questions": folder / "questions.jsonl",
        "agents": 6,
        "new_tokens": NEW_TOKENS,
        "compared": 4,
        "device": "cpu",
    }


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder in which temporary files are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# -- the three processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    """One real run with --json: its result, its stdout, and what it left among temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(tempfile, "tempdir", str(temporary))
        result = demo.run(**given, json=True)
    return types.SimpleNamespace(result=result, out=out.getvalue(), left=list(temporary.iterdir()))


def test_every_token_is_that_of_transformers_from_scratch(done):
    assert done.result.token_exact == 1.0
    assert done.result.compared_agents == 4
    assert done.result.compared_tokens == 4 * NEW_TOKENS


def test_control_without_the_documents_values_the_tokens_differ(done):
    assert done.result.control_tokens_equal < 0.7


def test_json_is_one_object_with_every_field_of_its_type(done):
    fields = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert fields == done.result.to_dict()
    for name, kind in ISSUE.items():
        assert type(fields[name]) is kind, name
    assert fields["versions"]["torch"] == torch.__version__
    assert {"kvkern", "python", "transformers"} < set(fields["versions"])
    assert fields["machine"]["threads"] == torch.get_num_threads()


def test_what_is_counted_fits_together(done, given):
    result = done.result
    tokenizer, text = tiny_tokenizer(), given["document"].read_text(encoding="utf-8")
    prefix = tokenizer.apply_chat_template([{"role": "system", "content": text}], return_dict=False)
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, K and V, kv heads, head_dim, fp32
    assert result.agents == result.running_together == 6 and result.questions == 5
    assert result.document_tokens == len(tokenizer(text)["input_ids"]) and result.prefix_tokens == len(prefix)
    assert result.kv_bytes == pad_tokens(len(prefix)) * token_bytes < result.file_bytes
    assert result.kv_bytes_expanded == 6 * len(prefix) * token_bytes
    assert result.answer_tokens == 6 * NEW_TOKENS
    assert result.ratio == pytest.approx(result.scratch_seconds_per_agent / result.reuse_seconds_per_agent)
    assert 0 < result.ratio_with_once < result.ratio
    assert result.once_seconds > result.prefill_seconds + result.load_seconds
    assert 0 < result.ask_seconds < result.seconds


def test_no_temporary_file_is_left(done):
    assert done.left == []


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(demo_model.PACKAGE) is None, reason=f"{demo_model.PACKAGE} is not installed"
)
@pytest.mark.parametrize("agents", [4, pytest.param(16, marks=pytest.mark.full)])
def test_the_real_model_and_document_give_the_tokens_of_from_scratch(capsys, agents):
    # Each answer from scratch reads the whole document: four take longer than all else here.
    result = demo.run(agents=agents, new_tokens=24, compared=4, device="cpu")
    assert result.document_tokens == 3774
    assert (result.questions, result.compared_agents) == (agents, 4)
    assert result.token_exact == 1.0
    assert result.control_tokens_equal < 0.7
    said = capsys.readouterr().out
    assert "gpl-3.kv" in said and "3,774 tokens" in said


# -- what is said and kept: the other two processes stand in this one --------------------------------------------------


@pytest.fixture
def in_process(monkeypatch, temporary):
    """Serve and answer from scratch here; gives the requests that the two processes would have got, by name."""
    seen = {}

    def process(what, command, request):
        request = seen[what] = json.loads(json.dumps(request))
        if command is demo.SERVE:
            lines = []
            monkeypatch.setattr(attach, "_tell", lambda **line: lines.append(json.loads(json.dumps(line))))
            attach._serve(request)
            yield from lines
            return
        assert command is demo.SCRATCH
        model, tokenizer = opening.open_model(request["model"], request["dtype"], torch.device("cpu"))
        model.set_attn_implementation("sdpa")
        for index, prompt in enumerate(request["prompts"]):
            ids = prompt
            if isinstance(prompt[0], dict):
                ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            token_ids = scratch_answer(model, ids, request["max_new_tokens"])
            yield {"index": index, "prompt_tokens": len(ids), "token_ids": token_ids, "seconds": 0.5}
        yield {"done": True, "versions": {"torch": torch.__version__}}

    monkeypatch.setattr(demo, "_process", process)
    return seen


def test_the_text_names_every_step_and_the_ledger(given, in_process, capsys):
    result = demo.run(**given)
    said, progress = capsys.readouterr()
    steps = [line.split()[0] for line in said.splitlines() if line and line[0] != " "]
    assert steps == ["publish", "attach", "ask", "compare", "control", "ledger", "machine"]
    assert f"{result.document_tokens:,} tokens of the document, {result.prefix_tokens:,} with the chat template" in said
    assert "100.00% of 48 tokens equal" in said
    assert "6 agents with 5 questions, 6 running together; the 5 questions repeat" in said
    assert QUESTIONS[0] in said
    assert all(step in progress for step in ("prefill", "ask", "from scratch")), "progress is on stderr"


def test_the_second_process_never_sees_the_text(given, in_process):
    demo.run(**given)
    text = given["document"].read_text(encoding="utf-8")
    second, third = (json.dumps(in_process[f"{which} process"]) for which in ("second", "third"))
    for words in (text[:40], text[100:140], text[-40:]):
        assert json.dumps(words)[1:-1] in third
        assert json.dumps(words)[1:-1] not in second


def test_the_peer_gets_conversations_spread_over_the_batch(given, in_process):
    demo.run(**{**given, "agents": 5, "compared": 3})
    prompts = in_process["third process"]["prompts"]
    assert [[turn["role"] for turn in prompt] for prompt in prompts] == [["system", "user"]] * 3
    assert [prompt[1]["content"] for prompt in prompts] == [QUESTIONS[i] for i in (0, 2, 4)]


def test_a_kept_file_serves_again(given, in_process, tmp_path, temporary):
    demo.run(**given, out_dir=tmp_path / "new" / "kept")
    assert [file.name for file in (tmp_path / "new" / "kept").iterdir()] == ["handbook.kv"]
    assert list(temporary.iterdir()) == []
    model, tokenizer = opening.open_model(str(given["model"]), "float32", torch.device("cpu"))
    with attach.load(tmp_path / "new" / "kept" / "handbook.kv", model, tokenizer) as document:
        document.check()


def test_fewer_agents_than_questions_and_one_token_each(given, in_process):
    result = demo.run(**{**given, "agents": 1, "new_tokens": 1, "compared": 8})
    assert (result.agents, result.questions, result.compared_agents, result.answer_tokens) == (1, 1, 1, 1)
    assert result.token_exact == 1.0


@pytest.mark.parametrize("tokens", [1, 97])
def test_a_document_is_cut_after_its_first_tokens(given, in_process, tokens):
    result = demo.run(**given, document_tokens=tokens)
    assert result.document_tokens == tokens and result.token_exact == 1.0
    (cut,) = {prompt[0]["content"] for prompt in in_process["third process"]["prompts"]}
    text = given["document"].read_text(encoding="utf-8")
    assert text.startswith(cut) and len(tiny_tokenizer()(cut)["input_ids"]) == tokens


def test_a_model_without_a_template_goes_on_from_the_text(given, in_process, tmp_path, capsys):
    result = demo.run(**{**given, "model": save_model(tmp_path / "plain", template=False)})
    assert result.token_exact == 1.0 and result.prefix_tokens == result.document_tokens
    assert "chat template" not in capsys.readouterr().out


def test_control_a_served_document_that_is_not_the_published_one_is_caught(given, in_process, monkeypatch):
    load = attach.load
    monkeypatch.setattr(attach, "load", lambda *args, **options: attach._without_values(load(*args, **options)))
    assert demo.run(**given).token_exact < 0.7


def test_a_peer_that_was_asked_something_else_is_refused(given, in_process, monkeypatch):
    from_scratch = demo._from_scratch

    def longer(request):
        scratch = from_scratch(request)
        scratch["answers"][1]["prompt_tokens"] += 1
        return scratch

    monkeypatch.setattr(demo, "_from_scratch", longer)
    with pytest.raises(TemplateError, match="chat_template"):
        demo.run(**given)


def test_a_file_that_was_damaged_between_the_processes_is_refused(given, in_process, monkeypatch, temporary):
    def flip(say, kv, made, *, kept):
        with open(kv, "r+b") as file:
            file.seek(made.file_bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(demo, "_say_published", flip)
    with pytest.raises(StoreError, match=r"kv\[layer"):
        demo.run(**given)
    assert list(temporary.iterdir()) == []


# -- bad input ---------------------------------------------------------------------------------------------------------


def write(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


@pytest.mark.parametrize(
    ("bad", "kind", "field", "found"),
    [
        ({"agents": 0}, RequestError, "agents", "0"),
        ({"new_tokens": -1}, RequestError, "new_tokens", "-1"),
        ({"new_tokens": 0}, RequestError, "new_tokens", "0"),
        ({"compared": 0}, RequestError, "compared", "0"),
        ({"document_tokens": 0}, RequestError, "document_tokens", "0"),
        ({"document_tokens": 100_000}, RequestError, "document_tokens", "100000"),
        ({"device": "cuda:99"}, DeviceError, "device", "cuda:99"),
        ({"device": "abacus"}, DeviceError, "device", "abacus"),
        ({"backend": "abacus"}, BackendError, "backend", "abacus"),
        ({"model": "/no/such/folder"}, RequestError, "model", "no folder /no/such/folder"),
        ({"model": "./nothing"}, RequestError, "model", "no folder ./nothing"),
        ({"model": ""}, RequestError, "model", "an empty name"),
        ({"model": __file__}, RequestError, "model", "a file"),
        ({"model": Path(__file__).parent}, RequestError, "model", "a folder without config.json"),
        ({"document": "/no/such/file"}, RequestError, "document", "No such file"),
        ({"document": lambda p: write(p, "empty.txt", " \n")}, RequestError, "document", "empty.txt"),
        ({"document": lambda p: write(p, "latin.txt", b"caf\xe9")}, RequestError, "document", "byte 0xe9 at offset 3"),
        ({"document": lambda p: p}, RequestError, "document", "directory"),
        ({"document": lambda p: write(p, "long.txt", TEXT * 40)}, CapacityError, "document", "new ones"),
        ({"questions": "/no/such/file"}, RequestError, "questions", "No such file"),
        ({"questions": lambda p: write(p, "q.txt", "")}, RequestError, "questions", "no line in q.txt"),
        ({"questions": lambda p: write(p, "q.txt", "a\n\nb\n")}, RequestError, "questions, line 2 of q.txt", "nothing"),
        ({"questions": lambda p: write(p, "q.txt", '{"question": " "}')}, RequestError, "questions, line 1", "nothing"),
        ({"questions": lambda p: write(p, "q.txt", '{"q": "a"}')}, RequestError, "questions, line 1", '{"q"'),
        ({"questions": lambda p: write(p, "q.txt", "a\n{broken")}, RequestError, "questions, line 2", "{broken"),
        ({"questions": lambda p: write(p, "q.txt", "Why?\n" + TEXT * 15)}, CapacityError, "questions[1]", "question of"),
        ({"out_dir": Path(__file__) / "kept"}, RequestError, "out_dir", "kept"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_another_process_starts(
    given, monkeypatch, tmp_path, temporary, bad, kind, field, found
):
    def never(*args, **options):
        pytest.fail("a process was started")

    monkeypatch.setattr(demo.subprocess, "Popen", never)
    bad = {name: value(tmp_path) if callable(value) else value for name, value in bad.items()}
    with pytest.raises(kind) as caught:
        demo.run(**{**given, **bad})
    assert caught.value.field.startswith(field)
    assert found in caught.value.found
    assert caught.value.do
    assert list(temporary.iterdir()) == []


def test_a_folder_that_is_no_model_is_refused(given, tmp_path):
    write(tmp_path, "config.json", "{}")
    with pytest.raises(RequestError, match="a checkpoint of a causal language model") as caught:
        demo.run(**{**given, "model": tmp_path})
    assert caught.value.field == "model" and "\n" not in caught.value.found


def test_a_name_that_the_hub_does_not_know_is_refused_in_one_line(given, monkeypatch):
    def unreachable(name, file):
        raise OSError(f"We couldn't connect to load {name}.\nA page of advice.")

    monkeypatch.setattr("transformers.utils.cached_file", unreachable)
    with pytest.raises(RequestError) as caught:
        demo.run(**{**given, "model": "nobody/nothing"})
    assert caught.value.field == "model"
    assert caught.value.found == (
        "nobody/nothing: no such folder, and from the hub We couldn't connect to load nobody/nothing"
    )


def test_a_name_on_the_hub_is_opened_by_name_and_given_on_as_a_folder(given, monkeypatch, in_process):
    opened, from_name = [], opening.open_model
    monkeypatch.setattr("transformers.utils.cached_file", lambda name, file: str(given["model"] / file))

    def open_model(source, *rest):
        opened.append(source)
        return from_name(str(given["model"]), *rest)

    monkeypatch.setattr(opening, "open_model", open_model)
    result = demo.run(**{**given, "model": "someone/tiny", "agents": 1})
    assert result.model == "someone/tiny"
    assert opened == ["someone/tiny", str(given["model"]), str(given["model"])]


# -- processes: ended, interrupted, failed -----------------------------------------------------------------------------


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_lines_come_as_they_are_told_and_remarks_are_passed_over():
    code = """
        import json, sys
        request = json.load(sys.stdin)
        print("Warning: something")
        for i in range(request["count"]):
            print(json.dumps({"i": i}), flush=True)
    """
    assert list(demo._process("child", python(code), {"count": 3})) == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_the_error_of_a_process_is_raised_as_what_it_is():
    code = """print('{"error": ["StoreError", "kv", {"found": "a", "needed": "b", "do": "c"}]}', flush=True); exit(1)"""
    with pytest.raises(StoreError) as caught:
        list(demo._process("child", python(code), {}))
    assert str(caught.value) == "kv: found a, needed b\n  do: c"


def test_serve_tells_its_error_and_ends(given, monkeypatch, capsys):
    request = {"kv": "/no/such.kv", "model": str(given["model"]), "dtype": "float32", "device": "cpu", "threads": 1}
    request |= {"questions": ["Why?"], "new_tokens": 1, "compared": [0], "backend": None}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        attach.serve()
    torch.set_num_threads(threads)
    assert ended.value.code == 1
    kind, field, words = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (kind, field) == ("StoreError", "path")
    assert set(words) == {"found", "needed", "do"}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise SystemError('no luck')", "exit status 1: SystemError: no luck"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import sys; sys.stdin.close(); exit(3)", "exit status 3: nothing on stderr"),
    ],
)
def test_a_process_that_fails_is_one_error(code, found):
    with pytest.raises(KvkernError) as caught:
        list(demo._process("child", python(code), {"long": "x" * 1_000_000}))
    assert (caught.value.field, caught.value.found) == ("child", found)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_process_ends_with_its_reader(monkeypatch, deaf):
    code = f"""
        import json, os, signal, time
        if {deaf}:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(json.dumps({{"pid": os.getpid()}}), flush=True)
        time.sleep(600)
    """
    monkeypatch.setattr(demo, "PATIENCE_S", 0.2)
    lines = demo._process("child", python(code), {})
    pid = next(lines)["pid"]
    assert not gone(pid)
    lines.close()
    assert gone(pid)


def test_ctrl_c_ends_the_process_and_leaves_no_file(given, monkeypatch, temporary):
    code = f"""
        import json, os, time
        assert list(os.scandir({str(temporary)!r}))
        print(json.dumps({{"progress": ["pid", os.getpid(), None, ""]}}), flush=True)
        time.sleep(600)
    """
    pids = []
    bars = console.bars

    @contextlib.contextmanager
    def interrupted(**options):
        with bars(**options) as bar:

            def update(what):
                def pressed(done, *rest):
                    pids.append(done)
                    signal.raise_signal(signal.SIGINT)

                return pressed if what == "pid" else bar(what)

            yield update

    monkeypatch.setattr(console, "bars", interrupted)
    monkeypatch.setattr(demo, "SERVE", python(code))
    with pytest.raises(KeyboardInterrupt):
        demo.run(**given)
    assert len(pids) == 1 and gone(pids[0])
    assert list(temporary.iterdir()) == []


def test_the_control_is_the_document_without_its_values(given):
    model, tokenizer = opening.open_model(str(given["model"]), "float32", torch.device("cpu"))
    with demo.publish(model, tokenizer, TEXT) as document, attach._without_values(document) as blank:
        assert torch.equal(blank.key(1), document.key(1)) and document.value(1).abs().min() > 0
        assert not blank.value(1).any()
        assert blank.identity == document.identity and torch.equal(blank.token_ids, document.token_ids)
        blank.check()


def test_tokens_beyond_the_end_of_an_answer_count_as_different():
    assert demo._share_equal([[1, 2, 3], [4]], [[1, 2, 3], [4]]) == 1.0
    assert demo._share_equal([[1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert demo._share_equal([[2, 1, 3]], [[1, 2, 3]]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("agents", "count", "indices"), [(256, 8, [0, 36, 73, 109, 146, 182, 219, 255]), (1, 1, [0])])
def test_the_compared_agents_are_spread_over_the_batch(agents, count, indices):
    assert demo._spread(agents, count) == indices
