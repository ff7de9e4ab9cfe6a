"""How far the KV of a real document compresses without loss, and whether that pays.

    python bench/compression.py [--here] [--model PATH] [--document FILE] [--tokens 3774] [--dtypes bfloat16 float32]
                                [--seconds 100] [--tiny]

By default SmolLM2 of the demo over the first 3,774 tokens of the GNU GPL 3. The document is published, and every layer's K and V,
[kv heads, tokens, head_dim] without the padding (its zeros would flatter), is made one frame of its own, in every form

    plain        the words as they lie
    planes       byte planes: the highest byte of every word, then the next, down to the lowest
    difference   byte planes of the bit pattern less that of the token before, modulo 2^16 or 2^32, in each head and dimension
    xor          the same with XOR in place of the difference

by every codec: zstd at levels 1, 3 and 9 (package zstandard) and lz4 (package lz4). A form is one cell: it is packed and unpacked
on one core, transform included, by numpy. Unpacking writes to a block as a loaded document's. That block then has to equal the
published one bit by bit, in its 64-bit sums and in the SHA-256 of every block as a .kv file holds them: else the script ends,
and no number is kept. After each cell compression.json is written; a cell that it holds is skipped, none begins after --seconds.

The rule: a form pays if it is smaller by 20 % or more and unpacks at more than 1 GB/s on one core, or faster than the disk. The
disk is read in the same run: the .kv file in pieces of 4 MiB, after its pages were dropped (`cold`: true, false, or null where
the file system does not tell; what a virtual machine's host keeps of it is not seen from within). A form that is only faster
than the disk pays where reading and unpacking overlap; `read_share` says what one after the other takes, of reading the plain
bytes. GB are 10^9 bytes of KV before compression. Fields of a cell:

    before, after      bytes of K and of V; after is a list, one number a layer
    seconds            compress_K, decompress_K, compress_V, decompress_V: samples over all layers, of wall clock
    core_seconds       the same samples in time that the core worked for it: one thread does all of it, so that is what it takes on a
                       core of its own, whatever else runs beside it. Speeds and verdicts are of these
    disk               bytes, seconds (samples), cold
    verdicts           of `all`, K and V, from medians: smaller, bytes_per_s, above_1_gb_per_s, above_disk, pays, read_share; steady:
                       whether the fastest and the slowest sample say the same of pays

and beside the cells `answers`, one for each model, document and dtype.

    compression model=... dtype=bfloat16 form=planes codec=zstd-1 | <n> % smaller (K <n> %, V <n> %), compress <n> GB/s,
                decompress <n> GB/s (K <n>, V <n>) | pays: <yes or no>
    bfloat16: no form pays: ...
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_engine
import lz4
import lz4.block
import numpy as np
import torch
import zstandard
from bench_document import forget
from bench_engine import FAILURES, draw
from harness import Bench, WrongResult, shown
from numpy.typing import NDArray

import kvkern
from kvkern import demo, opening, packing, store
from kvkern.demo_model import demo_model
from kvkern.identity import tensor_bytes
from kvkern.packing import Words, fill_planes, planes
from kvkern.prefix import SharedPrefix

TOKENS, TINY_TOKENS = 3774, 150
DTYPES = ("bfloat16", "float32", "float16")
SMALLER, BYTES_PER_S = 0.2, 1e9
"""The rule: the least share saved, and the speed of unpacking on one core that is enough by itself."""
PIECE = 4 << 20
"""Bytes of one read of the disk."""
RUN = 16
"""Tokens that `running` takes one after the other."""


# -- forms -------------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A transform that loses nothing.

    split  words [kv heads, tokens, head_dim] -> a contiguous array to be compressed
    join   (the same bytes, words to fill, of any strides) -> None
    """

    split: Callable[[Words], NDArray[Any]]
    join: Callable[[bytes, Words], None]


def fill_plain(data: bytes, words: Words) -> None:
    words[...] = np.frombuffer(data, words.dtype).reshape(words.shape)


def running(op: np.ufunc, words: Words) -> None:
    """Replace words [tokens, head_dim] by op over every token up to it, in place; op is associative.

    As `op.accumulate` along the tokens, which takes more than twice as long: runs of tokens side by side, then what precedes
    each run.
    """
    whole = len(words) // RUN * RUN
    if whole > RUN:
        runs = words[:whole].reshape(-1, RUN, *words.shape[1:])
        for n in range(1, RUN):
            op(runs[:, n], runs[:, n - 1], out=runs[:, n])
        running(op, runs[:, -1])
        op(runs[1:, :-1], runs[:-1, -1:], out=runs[1:, :-1])
    for n in range(whole if whole > RUN else 1, len(words)):
        op(words[n], words[n - 1], out=words[n])


def neighbours(away: np.ufunc, back: np.ufunc) -> Form:
    """Byte planes of away(token, the token before); the first token stays as it is. `back` undoes `away`, and is associative."""

    def split(words: Words) -> NDArray[np.uint8]:
        changes = words.copy()
        away(words[:, 1:], words[:, :-1], out=changes[:, 1:])
        return planes(changes)

    def join(data: bytes, words: Words) -> None:
        fill_planes(data, words)
        for own in words:
            running(back, own)

    return Form(split, join)


FORMS: dict[str, Form] = {
    "plain": Form(lambda words: words, fill_plain),
    "planes": Form(planes, fill_planes),
    "difference": neighbours(np.subtract, np.add),
    "xor": neighbours(np.bitwise_xor, np.bitwise_xor),
}


# -- codecs ------------------------------------------------------------------------------------------------------------


class Codec(NamedTuple):
    """pack: a contiguous array -> a frame. unpack: (frame, bytes that were packed) -> these bytes."""

    pack: Callable[[NDArray[Any]], bytes]
    unpack: Callable[[bytes, int], bytes]


def zstd(level: int) -> Codec:
    return Codec(lambda data: packing.compress(data, level), packing.decompress)


CODECS: dict[str, Codec] = {
    **{f"zstd-{level}": zstd(level) for level in (1, 3, 9)},
    "lz4": Codec(
        lambda data: lz4.block.compress(data.reshape(-1).view(np.uint8), store_size=False),
        lambda frame, size: lz4.block.decompress(frame, uncompressed_size=size),
    ),
}


def versions() -> dict[str, str]:
    """Of what packs and unpacks."""
    found = {name: importlib.metadata.version(name) for name in ("numpy", "zstandard", "lz4")}
    return found | {"libzstd": ".".join(map(str, zstandard.ZSTD_VERSION)), "liblz4": lz4.library_version_string()}


def pack(words: Words, form: str, codec: str) -> bytes:
    return CODECS[codec].pack(FORMS[form].split(words))


def unpack(frame: bytes, form: str, codec: str, words: Words) -> None:
    """Fill words with what was packed. Raises WrongResult for another number of bytes."""
    data = CODECS[codec].unpack(frame, words.nbytes)
    if len(data) != words.nbytes:
        raise WrongResult(f"wrong result: {len(data)} bytes, needed {words.nbytes}; no number is kept")
    FORMS[form].join(data, words)


# -- the rule ----------------------------------------------------------------------------------------------------------


def verdict(before: int, after: int, seconds: float, disk_bytes_per_s: float | None) -> dict[str, Any]:
    """Whether a form pays: smaller by 20 % or more, and unpacked at more than 1 GB/s or faster than the disk.

    before, after     bytes
    seconds           to unpack all of it on one core
    disk_bytes_per_s  of a read, or None where it was not measured
    """
    speed = before / seconds
    above_disk = None if disk_bytes_per_s is None else speed > disk_bytes_per_s
    above = speed > BYTES_PER_S
    return {
        "smaller": 1 - after / before,
        "bytes_per_s": speed,
        "above_1_gb_per_s": above,
        "above_disk": above_disk,
        # As a product: 1 - 80 / 100 is less than 0.2.
        "pays": after <= (1 - SMALLER) * before and (above or bool(above_disk)),
        "read_share": None if disk_bytes_per_s is None else (after + seconds * disk_bytes_per_s) / before,
    }


def disk_speed(disk: dict[str, Any]) -> float:
    return disk["bytes"] / statistics.median(disk["seconds"])


def answer(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the cells of one model, document and dtype say: the forms that pay, and it in a sentence."""

    def name(cell: dict[str, Any]) -> str:
        return f"{cell['shape']['form']}/{cell['shape']['codec']}"

    def told(cell: dict[str, Any], part: str = "all") -> str:
        found = cell["verdicts"][part]
        doubt = "" if found["steady"] else " (not in every sample)"
        return f"{name(cell)} {100 * found['smaller']:.1f} % at {found['bytes_per_s'] / 1e9:.2f} GB/s{doubt}"

    paying = {
        part: sorted(
            (cell for cell in cells if cell["verdicts"][part]["pays"]),
            key=lambda cell, part=part: -cell["verdicts"][part]["smaller"],
        )
        for part in ("all", "K", "V")
    }
    smallest = max(cells, key=lambda cell: cell["verdicts"]["all"]["smaller"])
    slowest, fastest = (pick(disk_speed(cell["disk"]) / 1e9 for cell in cells) for pick in (min, max))
    disk = f"{slowest:.2f}" + (f" to {fastest:.2f}" if f"{slowest:.2f}" != f"{fastest:.2f}" else "")
    cold = [cell["disk"]["cold"] for cell in cells]
    needed = (
        f"needed {100 * SMALLER:.0f} % at {BYTES_PER_S / 1e9:.0f} GB/s, or at the disk's {disk} GB/s, "
        f"{'cold' if all(cold) else 'not cold' if False in cold else 'cold not confirmed'}"
    )
    if paying["all"]:
        best = paying["all"][0]
        text = (
            f"{len(paying['all'])} of {len(cells)} pay: {', '.join(map(told, paying['all']))}; {needed}; "
            f"to read {name(best)} and then unpack it takes {best['verdicts']['all']['read_share']:.2f}x of reading plain bytes"
        )
    else:
        text = f"none of {len(cells)} pays; smallest {told(smallest)}; {needed}"
        alone = [f"{part} alone by {told(paying[part][0], part)}" for part in "KV" if paying[part]]
        if alone:
            text += f"; {' and '.join(alone)}"
    return {"cells": len(cells), "pays": {part: list(map(name, found)) for part, found in paying.items()}, "text": text}


# -- measuring ---------------------------------------------------------------------------------------------------------


class Subject:
    """A published document, its .kv file's digests, the disk's speed, and a block to unpack to."""

    def __init__(self, document: kvkern.Document, folder: Path, samples: int) -> None:
        self.document, self.geometry, self.tokens = document, document.geometry, document.tokens
        path = folder / "document.kv"
        document.save(path)
        try:
            self.header = store.inspect(path)
            self.disk = read_cold(path, samples)
        finally:
            path.unlink()
        self.planes = [[bits(get(n)) for n in range(self.geometry.layers)] for get in (document.key, document.value)]
        """Of K and of V, by layer: [kv heads, tokens, head_dim]."""
        self.made = SharedPrefix(self.geometry, document.token_ids)

    def room(self, layer: int, which: int) -> Words:
        """Where a layer's K or V belongs in the block: a view."""
        return bits(self.made.block())[layer, which, :, : self.tokens]

    def poison(self) -> None:
        bits(self.made.block())[:, :, :, : self.tokens] = 0xA5A5


def bits(block: torch.Tensor) -> Words:
    """A view of the words as unsigned integers, on the CPU."""
    signed, unsigned = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}[block.element_size()]
    return block.cpu().view(signed).numpy().view(unsigned)


def read_cold(path: Path, samples: int) -> dict[str, Any]:
    """Seconds to read a file that is not in the page cache, as `cold` says."""
    size, gone, seconds = path.stat().st_size, [], []
    piece = bytearray(PIECE)
    for _ in range(samples):
        gone.append(forget(path))
        fd = os.open(path, os.O_RDONLY)
        try:
            began = time.perf_counter()
            while os.readv(fd, [piece]):
                pass
            seconds.append(time.perf_counter() - began)
        finally:
            os.close(fd)
    cold = False if False in gone else None if None in gone else True
    return {"bytes": size, "seconds": seconds, "cold": cold}


def digests(prefix: SharedPrefix) -> list[str]:
    """SHA-256 of every (layer, K or V, segment), as store.py takes them."""
    return [hashlib.sha256(tensor_bytes(view.contiguous())).hexdigest() for _, _, _, view in prefix.blocks()]


def differing(subject: Subject) -> dict[str, int]:
    """How many words, 64-bit sums and SHA-256 of the unpacked block are not those of the published one and of its file."""
    made, document = bits(subject.made.block()), bits(subject.document.block())
    sums = [value % (1 << 64) for value in subject.made.block_sums().flatten().tolist()]
    return {
        "words": int((made != document).sum()),
        "sums": sum(a != b for a, b in zip(sums, subject.header.sums, strict=True)),
        "digests": sum(a != b for a, b in zip(digests(subject.made), subject.header.kv, strict=True)),
    }


def measure(subject: Subject, form: str, codec: str, *, samples: int, part_s: float) -> dict[str, Any]:
    """One cell. Raises WrongResult where what is unpacked is not what was packed."""
    parts, layers = "KV", range(subject.geometry.layers)
    names = [f"{what}_{part}" for what in ("compress", "decompress") for part in parts]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    core_seconds: dict[str, list[float]] = {name: [] for name in names}
    frames: dict[str, list[bytes]] = {}

    def repeated(name: str, once: Callable[[], None]) -> None:
        taken = seconds[name]
        while not taken or (len(taken) < samples and sum(taken) < part_s):
            began, worked = time.perf_counter(), time.thread_time()
            once()
            core_seconds[name].append(time.thread_time() - worked)
            taken.append(time.perf_counter() - began)

    subject.poison()
    for which, part in enumerate(parts):
        own, rooms = subject.planes[which], [subject.room(n, which) for n in layers]

        def packing(part: str = part, own: list[Words] = own) -> None:
            frames[part] = [pack(words, form, codec) for words in own]

        def unpacking(part: str = part, rooms: list[Words] = rooms) -> None:
            for frame, room in zip(frames[part], rooms, strict=True):
                unpack(frame, form, codec, room)

        repeated(f"compress_{part}", packing)
        repeated(f"decompress_{part}", unpacking)
    wrong = differing(subject)
    if any(wrong.values()):
        raise WrongResult(f"wrong result: {form}/{codec} is not what was packed, {shown(wrong)}; no number is kept")

    before = {part: sum(words.nbytes for words in subject.planes[n]) for n, part in enumerate(parts)}
    after = {part: [len(frame) for frame in frames[part]] for part in parts}

    def judged(chosen: str) -> dict[str, Any]:
        taken = [
            sum(pick(core_seconds[f"decompress_{part}"]) for part in chosen) for pick in (statistics.median, min, max)
        ]
        sizes = sum(before[part] for part in chosen), sum(sum(after[part]) for part in chosen)
        found, *others = [verdict(*sizes, second, disk_speed(subject.disk)) for second in taken]
        return found | {"steady": all(other["pays"] == found["pays"] for other in others)}

    return {
        "tokens": subject.tokens,
        "before": before,
        "after": after,
        "seconds": seconds,
        "core_seconds": core_seconds,
        "disk": subject.disk,
        "verdicts": {"all": judged("KV"), "K": judged("K"), "V": judged("V")},
        "versions": versions(),
    }


def line(shape: dict[str, Any], found: dict[str, Any]) -> str:
    verdicts, before = found["verdicts"], sum(found["before"].values())
    whole, k, v = (verdicts[part] for part in ("all", "K", "V"))
    packing = sum(statistics.median(found["core_seconds"][f"compress_{part}"]) for part in "KV")
    return (
        f"compression {shown(shape)} | {100 * whole['smaller']:5.1f} % smaller (K {100 * k['smaller']:.1f} %, "
        f"V {100 * v['smaller']:.1f} %), compress {before / packing / 1e9:.2f} GB/s, decompress "
        f"{whole['bytes_per_s'] / 1e9:.2f} GB/s (K {k['bytes_per_s'] / 1e9:.2f}, V {v['bytes_per_s'] / 1e9:.2f}) | "
        f"pays: {'yes' if whole['pays'] else 'no'}{'' if whole['steady'] else ', not in every sample'}"
    )


# -- all of it ---------------------------------------------------------------------------------------------------------


def options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=None, help="a folder of a model; by default the demo's")
    which.add_argument("--tiny", action="store_true", help="a small random model: to see that all of it runs")
    parser.add_argument("--document", type=Path, default=None, help="a text; by default the demo's")
    parser.add_argument("--tokens", type=int, default=None, help=f"of its first; by default {TOKENS:,}")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES[:2], choices=DTYPES)
    parser.add_argument(
        "--scratch", type=Path, default=None, help="folder for the .kv file, on the disk to be measured"
    )
    parser.add_argument(
        "--part-seconds", type=float, default=0.3, help="a part is repeated for so long, --samples at most"
    )
    parser.add_argument("--seconds", type=float, default=100.0, help="no cell begins after these")
    parser.set_defaults(samples=5)


def cells(bench: Bench, text: str | None, dtype: str) -> list[dict[str, Any]]:
    """Every cell of a dtype."""
    chosen = bench.options
    path = chosen.document or demo.DATA / demo.DOCUMENT
    kind = {
        "model": "tiny" if chosen.tiny else Path(chosen.model).name if chosen.model else "SmolLM2-135M-Instruct",
        "document": f"{path.name} {hashlib.sha256(text.encode()).hexdigest()[:8]}" if text else "random tokens",
        "P": chosen.tokens or (TINY_TOKENS if chosen.tiny else TOKENS),
        "dtype": dtype,
    }
    return [{**kind, "form": form, "codec": codec} for form in FORMS for codec in CODECS]


def publish(bench: Bench, text: str | None, tokens: int, dtype: str) -> kvkern.Document:
    """The first tokens of the text, or as many at random; fewer where the text has no more."""
    if text is None:
        model = bench_engine.random_model(bench_engine.SMALL, bench.device).to(getattr(torch, dtype))
        return kvkern.publish(model, None, draw(tokens, model.config.vocab_size))
    model, tokenizer = opening.open_model(bench.options.model or str(demo_model()), dtype, bench.device)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return kvkern.publish(model, tokenizer, ids)


def main() -> None:
    bench, began = Bench.start("compression", __doc__, extra=options), time.monotonic()
    chosen = bench.options
    bench.resume()
    torch.seed()
    text = None if chosen.tiny else opening.read_document(chosen.document or demo.DATA / demo.DOCUMENT)
    for dtype in dict.fromkeys(chosen.dtypes):
        wanted = cells(bench, text, dtype)
        left = [shape for shape in wanted if not bench.has(shape)]
        if left and time.monotonic() - began <= chosen.seconds:
            with (
                publish(bench, text, wanted[0]["P"], dtype) as document,
                tempfile.TemporaryDirectory(prefix="kvkern-bench-", dir=chosen.scratch) as folder,
            ):
                subject = Subject(document, Path(folder), chosen.samples)
                for shape in left:
                    if time.monotonic() - began > chosen.seconds:
                        break
                    try:
                        found = measure(
                            subject, shape["form"], shape["codec"], samples=chosen.samples, part_s=chosen.part_seconds
                        )
                    except FAILURES as error:
                        bench.fail(shape, error)
                    else:
                        bench.keep(shape, found)
                        print(line(shape, found), flush=True)
                    bench.save()
                subject.made.release()
            gc.collect()
        made = [result for result in bench.results if result["shape"] in wanted]
        if made:
            kind = {name: value for name, value in wanted[0].items() if name not in ("form", "codec")}
            kept = [found for found in bench.beside.get("answers", []) if found["shape"] != kind]
            bench.beside["answers"] = kept + [{"shape": kind, **answer(made)}]
            print(f"{dtype}: {bench.beside['answers'][-1]['text']}", flush=True)
    bench.finish()


if __name__ == "__main__":
    main()
