"""bench/compression.py: no form loses a bit, one that did is seen, and what pays follows from the rule. No time is asserted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = ("harness", "bench_engine", "bench_document", "compression", "plot", "report")
KINDS = {
    "bfloat16": (torch.bfloat16, np.uint16),
    "float16": (torch.float16, np.uint16),
    "float32": (torch.float32, np.uint32),
}
FORMS, CODECS = ("plain", "planes", "difference", "xor"), ("zstd-1", "zstd-3", "zstd-9", "lz4")
SHAPES = st.tuples(
    st.integers(1, 3), st.integers(0, 70) | st.sampled_from((255, 256, 257, 530)), st.sampled_from((1, 3, 16))
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as `python bench/<script>` finds them, and gone afterwards."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(str(BENCH))
        yield {name: __import__(name) for name in OWN}
    for name in OWN:
        del sys.modules[name]


@pytest.fixture(scope="module")
def compression(scripts: dict[str, ModuleType]) -> Any:
    return scripts["compression"]


def hostile(dtype: str) -> list[float | int]:
    """Bit patterns: both zeros, both infinities, quiet and signalling NaN with payloads, subnormals, the largest numbers."""
    kind, word = KINDS[dtype]
    info, width = torch.finfo(kind), 8 * word().itemsize
    mantissa = {"bfloat16": 7, "float16": 10, "float32": 23}[dtype]
    infinity = ((1 << (width - 1)) - 1) >> mantissa << mantissa
    positive = [0, 1, (1 << mantissa) - 1, infinity, infinity + 1, infinity | 1 << (mantissa - 1), infinity - 1]
    patterns = positive + [(1 << (width - 1)) | pattern for pattern in positive] + [(1 << width) - 1]
    values = torch.from_numpy(np.array(patterns, word).view(np.int16 if width == 16 else np.int32)).view(kind)
    assert values.isnan().sum() >= 4 and values.isinf().sum() == 2 and (values.abs() == info.max).sum() == 2
    assert ((values != 0) & (values.abs() < info.tiny)).sum() == 4
    return patterns


def drawn(dtype: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Random bit patterns, a third of them hostile, another third those of the token before."""
    rng, (kind, word) = np.random.default_rng(seed), KINDS[dtype]
    del kind
    words = rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True)
    choice = rng.integers(0, 3, shape)
    words = np.where(choice == 1, rng.choice(np.array(hostile(dtype), word), shape), words)
    for token in range(1, shape[1]):
        words[:, token] = np.where(choice[:, token] == 2, words[:, token - 1], words[:, token])
    return words


# -- no form loses a bit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KINDS)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32), codec=st.sampled_from(CODECS))
def test_every_bit_pattern_comes_back_and_nothing_beside_it_is_written(
    compression: Any, form: str, dtype: str, shape: tuple[int, int, int], seed: int, codec: str
) -> None:
    words = drawn(dtype, shape, seed)
    given_words = words.copy()
    heads, tokens, head_dim = shape
    block = np.full((heads, tokens + 5, head_dim), 0xA5A5, words.dtype)  # as in a padded block: heads lie apart
    compression.unpack(compression.pack(words, form, codec), form, codec, block[:, :tokens])
    np.testing.assert_array_equal(block[:, :tokens], given_words)
    np.testing.assert_array_equal(words, given_words)
    assert (block[:, tokens:] == 0xA5A5).all()


def test_the_forms_and_codecs_that_are_tested_are_all_that_there_are(compression: Any) -> None:
    assert tuple(compression.FORMS) == FORMS and tuple(compression.CODECS) == CODECS
    assert set(compression.DTYPES) == set(KINDS)


def test_planes_are_the_bytes_of_every_word_the_highest_first(compression: Any) -> None:
    words = np.array([[[0x1234], [0x00FF], [0xABCD]]], np.uint16)
    assert compression.planes(words).tobytes() == bytes([0x12, 0x00, 0xAB, 0x34, 0xFF, 0xCD])
    wide = np.array([[[0x12345678], [0x9ABCDEF0]]], np.uint32)
    assert compression.planes(wide).tobytes() == bytes([0x12, 0x9A, 0x34, 0xBC, 0x56, 0xDE, 0x78, 0xF0])


@pytest.mark.parametrize(("form", "second"), [("difference", 0x0001_0000 - 0x1135), ("xor", 0x1234 ^ 0x00FF)])
def test_a_token_is_taken_from_the_one_before_in_its_own_head_and_dimension(
    compression: Any, form: str, second: int
) -> None:
    words = np.array([[[0x1234, 7], [0x00FF, 7]], [[1, 2], [1, 2]]], np.uint16)
    made = np.zeros_like(words)
    compression.fill_planes(compression.FORMS[form].split(words).tobytes(), made)
    assert made.tolist() == [[[0x1234, 7], [second, 0]], [[1, 2], [0, 0]]]


@pytest.mark.parametrize("op", [np.add, np.bitwise_xor])
@pytest.mark.parametrize("word", [np.uint16, np.uint32])
def test_running_is_accumulate_at_every_length(compression: Any, op: np.ufunc, word: type) -> None:
    for tokens in [*range(70), 255, 256, 257, 272, 4096, 4113]:
        words = np.random.default_rng(tokens).integers(0, np.iinfo(word).max, (tokens, 3), word, endpoint=True)
        expected = op.accumulate(words, axis=0, dtype=word)
        compression.running(op, words)
        np.testing.assert_array_equal(words, expected, f"{tokens} tokens")


# -- one that did is seen ----------------------------------------------------------------------------------------------


@pytest.fixture
def subject(compression: Any, tmp_path: Path) -> Iterator[Any]:
    bench = SimpleNamespace(device=torch.device("cpu"), options=argparse.Namespace())
    with compression.publish(bench, None, 130, "bfloat16") as document:
        made = compression.Subject(document, tmp_path, samples=1)
        yield made
        made.made.release()


def unpack_all(compression: Any, subject: Any, form: str) -> None:
    for which in range(2):
        for layer, words in enumerate(subject.planes[which]):
            compression.unpack(compression.pack(words, form, "lz4"), form, "lz4", subject.room(layer, which))


@pytest.mark.parametrize("form", FORMS)
def test_control_each_check_sees_one_flipped_bit_wherever_it_lies(compression: Any, subject: Any, form: str) -> None:
    assert subject.made.padded_tokens > subject.tokens
    unpack_all(compression, subject, form)
    assert compression.differing(subject) == {"words": 0, "sums": 0, "digests": 0}
    block = compression.bits(subject.made.block())
    for flat in np.random.default_rng().integers(0, block.size, 3).tolist():
        place = np.unravel_index(flat, block.shape)  # of a token or of the padding
        block[place] ^= 1 << (flat % 16)
        assert compression.differing(subject) == {"words": 1, "sums": 1, "digests": 1}, place
        block[place] ^= 1 << (flat % 16)


def test_a_block_that_nothing_was_unpacked_to_is_not_taken_for_the_document(compression: Any, subject: Any) -> None:
    subject.poison()
    layers = subject.geometry.layers
    found = compression.differing(subject)
    assert found["sums"] == found["digests"] == 2 * layers and found["words"] > 0


def planted(monkeypatch: pytest.MonkeyPatch, compression: Any, change: Callable[[bytes], bytes]) -> None:
    """A codec whose unpacked bytes are changed."""
    lz4 = compression.CODECS["lz4"]
    wrong = compression.Codec(lz4.pack, lambda frame, size: change(lz4.unpack(frame, size)))
    monkeypatch.setitem(compression.CODECS, "lz4", wrong)


@pytest.mark.parametrize("form", FORMS)
def test_control_a_form_that_loses_one_bit_has_no_number(
    compression: Any, subject: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    assert compression.measure(subject, form, "lz4", samples=1, part_s=0)["tokens"] == 130
    planted(monkeypatch, compression, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SystemExit, match=rf"wrong result: {form}/lz4 .* words=\d+ sums=4 digests=4; no number is kept"):
        compression.measure(subject, form, "lz4", samples=1, part_s=0)


@pytest.mark.parametrize(
    ("times", "pays", "steady"), [((16, 16, 16), True, True), ((15, 16, 20), True, False), ((15, 20, 20), False, False)]
)
def test_a_form_that_pays_in_some_samples_alone_says_so(
    compression: Any, subject: Any, monkeypatch: pytest.MonkeyPatch, times: tuple[int, ...], pays: bool, steady: bool
) -> None:
    """A clock that runs as it is told: K, of 16,640 bytes, is packed three times, then unpacked as often, and so is V."""
    subject.disk = {"bytes": 1, "seconds": [1e-12], "cold": True}
    monkeypatch.setitem(compression.CODECS, "lz4", compression.Codec(lambda data: b"", lambda frame, size: bytes(size)))
    monkeypatch.setattr(compression, "differing", lambda _: {})
    ticks = [0.0]
    for second in [1.0, 1.0, 1.0, *(n * 1e-6 for n in times)] * 2:
        ticks += [ticks[-1] + second, ticks[-1] + second]
    monkeypatch.setattr(
        compression, "time", SimpleNamespace(perf_counter=count().__next__, thread_time=iter(ticks[:-1]).__next__)
    )
    found = compression.measure(subject, "plain", "lz4", samples=3, part_s=10)["verdicts"]["all"]
    assert (found["pays"], found["steady"]) == (pays, steady)


def test_too_few_bytes_have_no_number(compression: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, compression, lambda data: data[:-1])
    with pytest.raises(SystemExit, match=r"wrong result: 8319 bytes, needed 8320"):
        compression.measure(subject, "planes", "lz4", samples=1, part_s=0)


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "seconds", "disk", "pays"),
    [
        (80, 0.09e-6, None, True),  # 1.1 GB/s
        (81, 0.09e-6, None, False),  # smaller by 19 %
        (80, 0.1e-6, None, False),  # 1 GB/s, and not above it
        (10, 1e-6, None, False),
        (10, 1e-6, 0.09e9, True),  # slower than 1 GB/s, faster than the disk
        (10, 1e-6, 0.11e9, False),
        (80, 0.09e-6, 9e9, True),  # slower than the disk, faster than 1 GB/s
        (81, 0.09e-6, 1e3, False),
        (120, 0.09e-6, 1e3, False),  # larger than before
    ],
)
def test_a_form_pays_by_20_percent_and_1_gb_a_second_or_the_disks_speed(
    compression: Any, after: int, seconds: float, disk: float | None, pays: bool
) -> None:
    found = compression.verdict(100, after, seconds, disk)
    assert found["pays"] is pays
    assert found["smaller"] == pytest.approx(1 - after / 100) and found["bytes_per_s"] == pytest.approx(100 / seconds)
    if disk is None:
        assert found["above_disk"] is None and found["read_share"] is None
    else:
        assert found["read_share"] == pytest.approx((after / disk + seconds) / (100 / disk))


def cell(compression: Any, form: str, after: tuple[int, int], seconds: tuple[float, float] = (5e-8, 5e-8)) -> Any:
    """Of 100 bytes of K and as many of V, on a disk of 2 GB/s."""
    k, v = (compression.verdict(100, n, s, 2e9) for n, s in zip(after, seconds, strict=True))
    verdicts = {"all": compression.verdict(200, sum(after), sum(seconds), 2e9), "K": k, "V": v}
    return {
        "shape": {"form": form, "codec": "lz4"},
        "disk": {"bytes": 200, "seconds": [1e-7], "cold": True},
        "verdicts": {part: found | {"steady": True} for part, found in verdicts.items()},
    }


def test_the_answer_names_what_pays_the_smallest_first(compression: Any) -> None:
    cells = [
        cell(compression, "plain", (79, 79)),
        cell(compression, "xor", (60, 70)),
        cell(compression, "planes", (99, 99)),
    ]
    found = compression.answer(cells)
    assert found["pays"] == {
        "all": ["xor/lz4", "plain/lz4"],
        "K": ["xor/lz4", "plain/lz4"],
        "V": ["xor/lz4", "plain/lz4"],
    }
    assert found["text"].startswith(
        "2 of 3 pay: xor/lz4 35.0 % at 2.00 GB/s, plain/lz4 21.0 % at 2.00 GB/s; needed 20 %"
    )
    assert "the disk's 2.00 GB/s, cold; to read xor/lz4 and then unpack it takes 1.65x of reading" in found["text"]
    cells[0]["verdicts"]["all"]["steady"] = False
    assert "plain/lz4 21.0 % at 2.00 GB/s (not in every sample);" in compression.answer(cells)["text"]


def test_the_answer_says_that_nothing_pays_and_where_a_part_does(compression: Any) -> None:
    cells = [cell(compression, "plain", (100, 100)), cell(compression, "xor", (95, 70))]
    found = compression.answer(cells)
    assert found["pays"] == {"all": [], "K": [], "V": ["xor/lz4"]}
    assert found["text"].startswith("none of 2 pays; smallest xor/lz4 17.5 %")
    assert found["text"].endswith("V alone by xor/lz4 30.0 % at 2.00 GB/s")
    cells[0]["disk"]["cold"] = None
    assert "cold not confirmed" in compression.answer(cells)["text"]
    cells[1]["disk"]["cold"] = False
    assert ", not cold" in compression.answer(cells)["text"]


# -- all of it ---------------------------------------------------------------------------------------------------------


def ran(compression: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *argv: str) -> dict[str, Any]:
    wanted = ["--tiny", "--device", "cpu", "--samples", "2", "--part-seconds", "0", "--scratch", str(out.parent)]
    monkeypatch.setattr(sys, "argv", ["compression.py", *wanted, "--out", str(out), *argv])
    compression.main()
    path = out / "compression.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_a_file_holds_every_cell_and_is_taken_up_again(
    compression: Any, scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = ran(compression, monkeypatch, out, "--dtypes", "bfloat16", "float32")
    assert "failed" not in file and not list(tmp_path.glob("kvkern-bench-*"))
    assert len(file["results"]) == 2 * len(FORMS) * len(CODECS)
    for result in file["results"]:
        size = 2 * 2 * 150 * 16 * {"bfloat16": 2, "float32": 4}[result["shape"]["dtype"]]  # layers, kv heads, tokens
        assert result["before"] == {"K": size, "V": size} and result["tokens"] == 150
        assert all(len(layers) == 2 and min(layers) > 0 for layers in result["after"].values())
        for clock in ("seconds", "core_seconds"):
            assert all(second > 0 for samples in result[clock].values() for second in samples)
        whole = result["verdicts"]["all"]
        assert whole["smaller"] == pytest.approx(1 - sum(map(sum, result["after"].values())) / (2 * size))
        assert set(result["versions"]) == {"numpy", "zstandard", "lz4", "libzstd", "liblz4"}
        assert len(result["disk"]["seconds"]) == 2 and result["disk"]["bytes"] > 2 * size
    assert [found["shape"]["dtype"] for found in file["answers"]] == ["bfloat16", "float32"]
    assert "bfloat16: " in capsys.readouterr().out

    # A cell that is held is not measured again; one that is missing is.
    lost = file["results"].pop(3)
    (out / "compression.json").write_text(json.dumps(file))
    again = ran(compression, monkeypatch, out, "--dtypes", "bfloat16", "float32")
    assert again["results"][:-1] == file["results"] and again["results"][-1]["shape"] == lost["shape"]
    assert len(again["answers"]) == 2
    monkeypatch.setattr(compression, "publish", lambda *_: pytest.fail("nothing is left to measure"))
    assert ran(compression, monkeypatch, out)["results"] == again["results"]

    monkeypatch.setattr(scripts["report"], "ROOT", tmp_path)
    table = scripts["report"].compression_table(out / "compression.json")
    rows = [row for row in table if row.startswith("| tiny")]
    assert len(rows) == 32 and {row.count("|") for row in rows} == {table[2].count("|")}
    assert sum(found["text"] in row for row in table for found in again["answers"]) == 2


def test_no_cell_begins_after_the_seconds(compression: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(compression, monkeypatch, tmp_path / "out", "--seconds", "-1")["results"] == []


def test_fewer_tokens_than_wanted_are_all_that_the_text_has(
    compression: Any, scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("one two three")
    model = scripts["bench_engine"].random_model(scripts["bench_engine"].SMALL, torch.device("cpu")).bfloat16()
    monkeypatch.setattr(compression.opening, "open_model", lambda *_: (model, scripts["bench_engine"].words(320)))
    bench = SimpleNamespace(device=torch.device("cpu"), options=argparse.Namespace(model=None))
    with compression.publish(bench, text.read_text(), 3774, "bfloat16") as document:
        assert 1 <= document.tokens < 10
        made = compression.Subject(document, tmp_path, samples=1)
        assert compression.measure(made, "xor", "zstd-1", samples=1, part_s=0)["tokens"] == document.tokens
