"""bench/exactness.py: equal tokens are counted, another is named with its gap, and KV that was rounded or of other tokens is caught."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvkern import demo_model

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = ("harness", "bench_engine", "from_scratch", "readers", "exactness", "report")
TINY = ["--tiny", "--device", "cpu", "--documents", "40", "--questions", "5", "--tokens", "6"]
NUMBERS = {"questions": 5, "asked": 5, "answer_tokens": 30}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as `python bench/<script>` finds them, and gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        with torch.random.fork_rng():
            yield {name: __import__(name) for name in OWN}
        for name, module in [*sys.modules.items()]:
            if Path(getattr(module, "__file__", None) or "/").parent == BENCH:
                del sys.modules[name]


@pytest.fixture(scope="module")
def exactness(scripts: dict[str, ModuleType]) -> Any:
    return scripts["exactness"]


def ran(exactness: Any, out: Path, *argv: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["exactness.py", *TINY, *argv, "--out", str(out)])
        exactness.main()
    found: dict[str, Any] = json.loads((out / "exactness.json").read_text())
    return found


@pytest.fixture(scope="module")
def file(exactness: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of all parts wrote."""
    folder = tmp_path_factory.mktemp("exactness")
    ran(exactness, folder)
    return folder / "exactness.json"


@pytest.fixture
def results(file: Path) -> dict[tuple[str, str], Any]:
    found = json.loads(file.read_text())["results"]
    return {(result["shape"]["part"], result["shape"]["way"]): result for result in found}


@pytest.fixture
def alone(exactness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the first part."""
    every = exactness.parts
    monkeypatch.setattr(exactness, "parts", lambda bench: every(bench)[:1])


@pytest.fixture(scope="module")
def subject(exactness: Any) -> Any:
    """The tiny model with its tokenizer."""
    made = exactness.Subject.__new__(exactness.Subject)
    torch.manual_seed(0)
    made.tiny, made.name = True, "tiny"
    made.model = exactness.bench_engine.random_model(exactness.bench_engine.SMALL, torch.device("cpu"))
    made.tokenizer = exactness.small_tokenizer(made.model.config.vocab_size)
    return made


class NoBench:
    """No file is written."""

    path, device = None, torch.device("cpu")


def scratch_of(exactness: Any, model: Any) -> Any:
    return exactness.Scratch(model, "tiny", exactness.Begun(NoBench()))


# -- what a run finds --------------------------------------------------------------------------------------------------


def test_answers_over_the_document_are_those_from_scratch_and_over_rounded_kv_they_are_compared(
    exactness: Any, file: Path, results: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {part for part, _ in results} == {*exactness.CHANGED, "tokens", "rounded", "logits"}
    for way in ("batch 256", "batch 1"):
        found = results["tokens", way]
        assert found | NUMBERS | {"tokens": 30, "equal": 30, "first_tokens_other": 0, "flips": []} == found, way
    for way in exactness.FORMS:
        found = results["rounded", way]
        assert found | NUMBERS == found and found["equal"] == found["tokens"] - len(found["flips"]) > 0
    # What the file holds is not run again, and nothing is begun.
    held = file.read_text()
    capsys.readouterr()
    ran(exactness, file.parent)
    assert file.read_text() == held and capsys.readouterr().out == ""
    assert [path.name for path in file.parent.iterdir()] == ["exactness.json"]


def test_a_reader_who_means_other_tokens_is_refused_and_told_what_it_would_have_cost(
    exactness: Any, results: Any
) -> None:
    changed = {key: result for key, result in results.items() if key[0] in exactness.CHANGED}
    assert all(found | NUMBERS == found for found in changed.values())
    for (part, _), found in changed.items():
        if part == "unchanged":
            continue
        field = {"order": "ancestors"}.get(part, part)
        assert (found["refused"], found["error"], found["field"]) == (True, "IdentityError", field)
        assert found["message"].startswith(f"{field}: found ") and "\n" not in found["message"]
    harmless = {("template", "another opening of the answer"), ("tokenizer", "numbers cut into digits")}
    for key, found in changed.items():
        # Nothing that the document's KV depends on is another, for the small tokenizer has no number of two digits.
        if key in harmless or key[0] == "unchanged":
            assert (found["equal"], found["flips"], found["other_tokens"]) == (30, [], 0), key
        else:
            assert found["equal"] < found["tokens"] < 30 and len(found["flips"]) > 0 and found["other_tokens"] > 0, key
            assert found["first_tokens_other"] == sum(flip["token"] == 0 for flip in found["flips"])
    assert changed["unchanged", "the same tokenizer"]["refused"] is False


def test_logits_differ_from_transformers_by_the_rounding_of_their_dtype(results: Any) -> None:
    found = {way: result for (part, way), result in results.items() if part == "logits"}
    assert list(found) == ["float32", "bfloat16", "float16"]
    for each in found.values():
        assert (each["questions"], each["tokens"]) == (5, 30) and each["tokens_equal"] <= 30
        assert all(0 < each["mean_error"][how] < each["max_error"][how] for how in ("kvkern", "sdpa"))
        assert 0 < each["mean_difference"] < each["difference"]
    assert found["float32"]["difference"] < 1e-4 < found["float16"]["difference"] < found["bfloat16"]["difference"] < 1
    assert found["float32"]["tokens_equal"] == 30 and found["float32"]["max_error"]["kvkern"] < 1e-4


def test_the_table_names_every_way_and_what_is_lost(
    scripts: Any, file: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts["report"], "ROOT", file.parent)
    text = "\n".join(scripts["report"].exactness_table(file))
    assert "| tiny | float32 | 40 | batch 256 | 5 | 30 | 100 % | 100 % | 0 |  |" in text
    assert "| the same tokenizer | 40 | not refused | 5 | 30 | 100 % | 100 % | 0 |  | 0 |" in text
    way = "without the later half of its merges"
    found = results["tokenizer", way]
    largest = max(flip["gap"] for flip in found["flips"])
    assert f"| tokenizer: {way} | 40 | IdentityError, tokenizer | 5 | {found['tokens']} | " in text
    assert (
        f" | {100 * found['equal'] / 30:.4g} % | {len(found['flips'])} | {largest:.2g} | {found['first_tokens_other']} |"
        in text
    )
    logits = results["logits", "float16"]
    assert f"| float16 | 40 | 5 | 30 | {logits['tokens_equal']} | {logits['difference']:.3g} | " in text
    # Where the time was over, the table says of how many.
    some = json.loads(file.read_text())
    some["results"][0] |= {"questions": 3, "tokens": 18, "equal": 18}
    other = file.parent / "some.json"
    other.write_text(json.dumps(some))
    assert "| batch 256 | 3 of 5 | 18 | 100 % | 60 % |" in "\n".join(scripts["report"].exactness_table(other))
    other.unlink()


# -- controls: what is wrong is caught ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_control_an_answer_with_another_token_is_a_flip_with_its_gap(
    exactness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exactness.answers

    def wrong(subject: Any, *args: Any, **options: Any) -> Any:
        found = right(subject, *args, **options)
        found[2][3] = (found[2][3] + 1) % subject.model.config.vocab_size
        return found

    monkeypatch.setattr(exactness, "answers", wrong)
    result = ran(exactness, tmp_path)["results"][0]
    (flip,) = result["flips"]
    assert (flip["question"], flip["token"]) == (2, 3) and flip["got"] != flip["wanted"] and flip["gap"] > 0
    # The two tokens after it are compared with nothing.
    assert (result["tokens"], result["equal"]) == (28, 27)


def test_control_kv_with_other_values_is_caught(exactness: Any, subject: Any) -> None:
    def values_zeroed(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)

    with subject.document(40) as document, exactness.altered(document, values_zeroed) as other:
        suffixes = document.encode_ids(subject.questions(4))
        found = [exactness.answers(subject, each, suffixes, agents=4, tokens=6) for each in (document, other)]
        scratch = scratch_of(exactness, subject.model)
        right, wrong = (exactness.compared(scratch, document, suffixes, each) for each in found)
    assert right["flips"] == [] and right["equal"] == 24
    assert len(wrong["flips"]) == 4 and max(flip["gap"] for flip in wrong["flips"]) > 0.05


def test_control_logits_over_other_kv_are_caught(exactness: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = exactness.kvkern.publish

    def shifted(*args: Any, **options: Any) -> Any:
        return exactness.altered(publish(*args, **options), lambda x: x * 1.01)

    exact = exactness.Exact(subject.model)
    right = exactness.logits(subject, exact, 40, subject.questions(2), 3, "float32")
    monkeypatch.setattr(exactness.kvkern, "publish", shifted)
    wrong = exactness.logits(subject, exact, 40, subject.questions(2), 3, "float32")
    assert wrong["difference"] > 1e-3 > 1e-4 > right["difference"]
    assert wrong["max_error"]["kvkern"] > 1e-3 > 1e-4 > wrong["max_error"]["sdpa"]


# -- from scratch, once for each text ----------------------------------------------------------------------------------


def test_what_is_known_judges_another_answer_as_a_forward_of_its_own(exactness: Any, subject: Any) -> None:
    size = subject.model.config.vocab_size
    with subject.document(40) as document, counted(subject.model) as forwards:
        suffixes = document.encode_ids(subject.questions(2))
        first = exactness.answers(subject, document, suffixes, agents=2, tokens=6)
        shared = scratch_of(exactness, subject.model)
        exactness.compared(shared, document, suffixes, first)
        forwards.clear()
        for place in (0, 3, 5):
            other = [[*answer[:place], (answer[place] + 1) % size, *answer[place + 1 :]] for answer in first]
            again = exactness.compared(shared, document, suffixes, other)
            assert len(forwards) == 0, "what is known is not asked again"
            alone = exactness.compared(scratch_of(exactness, subject.model), document, suffixes, other)
            assert len(forwards) == 2
            for a, b in zip(again.pop("flips"), alone.pop("flips"), strict=True):
                assert a.pop("gap") == pytest.approx(b.pop("gap"), abs=1e-4) and a == b
            assert again == alone
            forwards.clear()
        # An answer that is wrong first teaches one token; the right one asks for the rest.
        late = scratch_of(exactness, subject.model)
        exactness.compared(late, document, suffixes, [[(answer[0] + 1) % size, *answer[1:]] for answer in first])
        assert exactness.compared(late, document, suffixes, first)["equal"] == 12
        # Another question, document or model is another text.
        keys = {
            scratch.key(ids, [3]) for scratch in (late, exactness.Scratch(None, "other", None)) for ids in ([1], [2])
        }
        assert len({*keys, late.key([1, 3], [])}) == 5


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Grows with every forward."""
    found: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda module, args: found.append(1))
    try:
        yield found
    finally:
        hook.remove()


@pytest.mark.usefixtures("alone")
def test_a_run_that_is_stopped_goes_on_where_it_was(
    exactness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, says, judged = tmp_path / "exactness.begun", exactness.Scratch.says, []

    def stopping(after: int) -> Callable[..., Any]:
        def stopped(self: Any, ids: Any, suffix: Any, answer: Any) -> Any:
            if len(judged) == after:
                raise KeyboardInterrupt
            if not self.knows(self.key(ids, suffix), answer):
                judged.append(suffix)
            return says(self, ids, suffix, answer)

        return stopped

    monkeypatch.setattr(exactness.Scratch, "says", stopping(2))
    with pytest.raises(KeyboardInterrupt):
        ran(exactness, tmp_path)
    assert begun.exists() and not (tmp_path / "exactness.json").exists()

    # The time is over with the fourth.
    monkeypatch.setattr(exactness, "answers", None)  # they are there
    monkeypatch.setattr(exactness.Scratch, "says", stopping(-1))
    monkeypatch.setattr(exactness.Run, "late", lambda run: len(judged) == 4)
    (some,) = ran(exactness, tmp_path)["results"]
    assert (some["questions"], some["asked"], some["tokens"], len(judged)) == (4, 5, 24, 4) and begun.exists()

    monkeypatch.setattr(exactness.Run, "late", lambda run: False)
    (whole,) = ran(exactness, tmp_path)["results"]
    assert whole | NUMBERS | {"tokens": 30, "equal": 30, "flips": []} == whole
    assert whole["seconds"] > some["seconds"] and not begun.exists()
    assert len(judged) == 5, "each was judged once"


@pytest.mark.usefixtures("alone")
def test_no_part_begins_when_the_time_is_over(
    exactness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError):
        ran(exactness, tmp_path, "--seconds", "0")
    assert "0 s are over; run again for 1 parts: tokens/40/batch 256" in capsys.readouterr().out


# -- what is made: rounded KV, other dtypes, other tokenizers ----------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rounded_kv_is_within_half_a_step_and_channels_are_finer(exactness: Any, seed: int) -> None:
    x = torch.randn(2, 2, 3, 50, 8, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 100  # a channel that decides the scale of the tensor
    whole, channels, eight = (form(x) for form in exactness.FORMS.values())
    step = x.abs().amax((-3, -2, -1), keepdim=True) / 127
    assert ((whole - x).abs() <= 0.51 * step).all() and len((whole / step).round().unique()) <= 255
    own = x.abs().amax(-2, keepdim=True) / 127
    assert ((channels - x).abs() <= 0.51 * own).all() and (channels - x).norm() < (whole - x).norm()
    assert ((eight - x).abs() <= x.abs() / 16 + step).all() and (eight != x).any()
    zeros = torch.zeros(1, 2, 1, 3, 4)
    assert all(torch.equal(form(zeros), zeros) for form in exactness.FORMS.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_in_another_dtype_keeps_its_weights_and_frequencies(exactness: Any, subject: Any, dtype: Any) -> None:
    other = exactness.of_dtype(subject.model, dtype)
    for name, weight in subject.model.named_parameters():
        assert torch.equal(other.get_parameter(name), weight.to(dtype)), name
    for name, buffer in subject.model.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(other.get_buffer(name), buffer), name
    assert next(subject.model.parameters()).dtype == torch.float32
    if dtype == torch.float64:
        x, given = torch.randn(7, 64, dtype=dtype), other.model.layers[0].input_layernorm
        expected = x / (x.pow(2).mean(-1, keepdim=True) + given.variance_epsilon).sqrt() * given.weight
        torch.testing.assert_close(given(x), expected, rtol=1e-14, atol=1e-14)
        ours = subject.model.model.layers[0].input_layernorm(x)  # control: through fp32
        assert (ours - expected).abs().max() > 1e-9


def test_a_tokenizer_of_another_revision_cuts_otherwise_into_tokens_of_the_model(scripts: Any, subject: Any) -> None:
    text, tokenizer, readers = subject.text(600), subject.tokenizer, scripts["readers"]
    whole = tokenizer(text)["input_ids"]
    assert readers.remade(tokenizer)(text)["input_ids"] == whole
    fewer = readers.remade(tokenizer, revision=readers.fewer_merges)
    assert len(fewer(text)["input_ids"]) > len(whole) and max(fewer(text)["input_ids"]) < len(tokenizer)
    cut = readers.remade(tokenizer, revision=readers.digits)
    pieces = [piece for piece, _ in cut.backend_tokenizer.pre_tokenizer.pre_tokenize_str("29 June 2007")]
    assert pieces == ["2", "9", "ĠJune", "Ġ", "2", "0", "0", "7"]
    assert all(other.decode(other(text)["input_ids"]) == tokenizer.decode(whole) for other in (fewer, cut))


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec(demo_model.PACKAGE) is None, reason=f"{demo_model.PACKAGE} is not installed"
)
def test_the_demos_model_answers_as_from_scratch_through_a_file_too(exactness: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        options = ["--device", "cpu", "--documents", "64", "--questions", "3", "--tokens", "4", "--out", str(tmp_path)]
        patch.setattr(sys, "argv", ["exactness.py", *options])
        exactness.main()
    results = json.loads((tmp_path / "exactness.json").read_text())["results"]
    by = {(result["shape"]["part"], result["shape"]["way"]): result for result in results}
    exact = [("tokens", way) for way in ("batch 256", "batch 1", "file")] + [("unchanged", "the same tokenizer")]
    assert all(by[key]["equal"] == by[key]["tokens"] == by[key]["answer_tokens"] for key in exact)
    assert all(result["refused"] for (part, _), result in by.items() if part in ("order", "template", "tokenizer"))
    assert by["tokenizer", "without the later half of its merges"]["other_tokens"] > 0
