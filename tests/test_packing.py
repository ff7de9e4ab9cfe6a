"""KV packed without loss: the same bits, digests and identity, or one error that names what is wrong with a frame."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_identity import tiny_model, tiny_tokenizer
from test_store import flipped, publish, raw, refused, rewritten

import kvkern
from kvkern import cpu, packing, store
from kvkern.errors import IdentityError, RequestError, StoreError, UnsupportedError
from kvkern.files import AGAIN
from kvkern.header import Frames, header_bytes
from kvkern.identity import model_geometry, tokens_digest
from kvkern.prefix import SharedPrefix

FORM = packing.FORM
TOKENS = 1025  # a whole segment of 1,024, and one token with its padding
EVERY = np.arange(1 << 16, dtype=np.uint16)
"""Every pattern of 16 bits: both zeros, subnormals, infinities, and every NaN with its payload."""


@pytest.fixture(scope="module", params=packing.DTYPES, ids=str)
def model(request):
    return tiny_model(dtype=request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """(published prefix, its packed file, the file's bytes); nobody writes to it."""
    path = tmp_path_factory.mktemp("saved") / "a.kv"
    prefix = publish(model, tokenizer)
    store.save(prefix, path, compress=FORM)
    return prefix, path, path.read_bytes()


@pytest.fixture
def other(tmp_path):
    def write(data):
        path = tmp_path / "other.kv"
        path.write_bytes(data)
        return path

    return write


def refused_everywhere(path, **options):
    """The error of load, which is that of verify too."""
    error = refused(path, **options)
    with pytest.raises(StoreError) as caught:
        store.verify(path)
    assert str(caught.value) == str(error)
    return error


# -- words and frames --------------------------------------------------------------------------------------------------


def test_every_bit_pattern_comes_back():
    words = np.random.default_rng().permutation(EVERY).reshape(4, 512, 32)
    for kind in (torch.bfloat16, torch.float16):
        values = torch.from_numpy(EVERY.view(np.int16)).view(kind)
        assert values.isnan().sum() > 200 and values.isinf().sum() == 2 and (values == 0).sum() == 2
    room = np.full((4, 600, 32), 0xA5A5, np.uint16)
    packing.unpack(packing.pack(words), room[:, :512])
    np.testing.assert_array_equal(room[:, :512], words)
    assert (room[:, 512:] == 0xA5A5).all()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70) | st.sampled_from((127, 128, 129, 257)), st.integers(1, 33)),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(("noise", "few", "zeros")),
)
def test_any_words_come_back_from_any_strides_and_a_frame_fits_its_slot(shape, seed, kind):
    heads, tokens, head_dim = shape
    limit = {"noise": 1 << 16, "few": 3, "zeros": 1}[kind]
    block = np.random.default_rng(seed).integers(0, limit, (heads, tokens + 3, head_dim), np.uint16)
    words = block[:, :tokens]  # heads lie apart, as in a padded block
    frame, made = packing.pack(words), np.full_like(block, 0x5A5A)
    packing.unpack(memoryview(frame), made[:, :tokens])
    np.testing.assert_array_equal(made[:, :tokens], words)
    assert (made[:, tokens:] == 0x5A5A).all()
    slot = packing.slot_bytes(len(frame), words.nbytes)
    assert len(frame) <= packing.max_length(words.nbytes) and slot % 8 == 0
    assert max(len(frame), words.nbytes / packing.MAX_RATIO) <= slot < max(len(frame), words.nbytes / 64) + 9


def test_what_repeats_its_high_bytes_shrinks_and_noise_does_not():
    rng = np.random.default_rng()
    words = rng.integers(0, 256, (2, 512, 64), np.uint16) | np.uint16(0x3F00)
    assert len(packing.pack(words)) < 0.52 * words.nbytes
    noise = rng.integers(0, 1 << 16, (2, 512, 64), np.uint16)
    assert noise.nbytes <= len(packing.pack(noise)) <= packing.max_length(noise.nbytes)


SIZE = 4096


def frame_of(data, **options):
    return zstandard.ZstdCompressor(level=1, **options).compress(data)


def claims(size):
    """A frame whose header says `size` bytes; a block of one byte 64 times stands behind it."""
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + ((64 << 3) | 0b011).to_bytes(3, "little") + b"\0"


WRONG = {
    "nothing": (b"", "what zstd does not read"),
    "no frame": (bytes(SIZE), "what zstd does not read"),
    "its first bytes": (frame_of(bytes(SIZE))[:5], "what zstd does not read"),
    "cut short": (frame_of(random.randbytes(SIZE))[:-9], "what zstd does not read"),
    "two frames": (2 * frame_of(bytes(SIZE)), "what zstd does not read"),
    "more behind it": (frame_of(bytes(SIZE)) + b"\0", "what zstd does not read"),
    "no frame of data": (b"\x50\x2a\x4d\x18" + SIZE.to_bytes(4, "little") + bytes(SIZE), "a size of 0 bytes in it"),
    "no size": (frame_of(bytes(SIZE), write_content_size=False), "no size in it"),
    "too few bytes": (frame_of(bytes(SIZE - 2)), "a size of 4,094 bytes in it"),
    "too many bytes": (frame_of(bytes(SIZE + 2)), "a size of 4,098 bytes in it"),
    "nothing in it": (frame_of(b""), "a size of 0 bytes in it"),
    "a bomb": (frame_of(bytes(64 << 20)), "a size of 67,108,864 bytes in it"),
    "a bomb that is not there": (claims(1 << 50), f"a size of {1 << 50:,} bytes in it"),
    "fewer bytes than it says": (claims(SIZE), "what zstd does not read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_frame_that_is_not_of_its_size_is_refused(kind):
    frame, found = WRONG[kind]
    words = np.full((1, 2, SIZE // 4), 7, np.uint16)
    with pytest.raises(StoreError) as caught:
        packing.unpack(frame, words)
    assert caught.value.field == "frame" and caught.value.found.startswith(found) and f"{SIZE:,}" in caught.value.needed
    assert (words == 7).all()


def test_control_a_frame_of_its_size_is_not():
    assert packing.decompress(frame_of(bytes(SIZE)), SIZE) == bytes(SIZE)
    assert packing.decompress(claims(64), 64) == bytes(64)


def test_the_size_is_seen_before_memory_is_asked_for(monkeypatch):
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("it was to be unpacked"))
    for kind in ("a bomb", "a bomb that is not there", "no size", "too many bytes", "too few bytes"):
        with pytest.raises(StoreError):
            packing.decompress(WRONG[kind][0], SIZE)


def test_control_zstd_alone_does_not_see_every_changed_bit():
    """Why a file holds the sum of a frame: a bit of its header that zstd does not read."""
    frame = bytearray(frame_of(bytes(SIZE)))
    frame[4] ^= 0x10
    assert packing.decompress(bytes(frame), SIZE) == bytes(SIZE)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1025])
def test_both_forms_have_the_same_bits_digests_and_identity(model, tokenizer, tmp_path, tokens):
    plain, packed = tmp_path / "plain.kv", tmp_path / "packed.kv"
    with publish(model, tokenizer, tokens=tokens, seed=tokens) as prefix:
        store.save(prefix, plain)
        store.save(prefix, packed, compress=FORM)
        a, b = store.inspect(plain), store.verify(packed)
        assert b == store.inspect(packed) and b.frames.form == FORM and a.frames is None
        assert (b.kv, b.sums, b.identity, b.provenance) == (a.kv, a.sums, a.identity, a.provenance)
        assert b.identity.digest() == prefix.identity.digest()
        with store.load(packed) as loaded:  # without being told
            assert raw(loaded.block()) == raw(prefix.block()) and torch.equal(loaded.sums, prefix.sums)
            assert torch.equal(loaded.token_ids, prefix.token_ids) and loaded.published
            loaded.check()
            # From one form to the other, and back.
            store.save(loaded, tmp_path / "again.kv")
            assert (tmp_path / "again.kv").read_bytes() == plain.read_bytes()
            store.save(loaded, tmp_path / "again.kv", compress=FORM)
            assert (tmp_path / "again.kv").read_bytes() == packed.read_bytes()


def test_the_packed_file_is_what_the_docstring_says(saved):
    """The format read by hand: with nothing of store or packing."""
    prefix, path, data = saved
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    metadata = json.loads(outer["__metadata__"]["kvkern"])
    assert metadata["format"] == 2 and metadata["identity"]["format"] == 1 and (8 + length) % 4096 == 0
    assert sorted(metadata["packing"]) == ["form", "lengths", "sums"] and metadata["packing"]["form"] == "planes-zstd-1"
    geometry, at = prefix.geometry, 8 + length
    size = geometry.num_kv_heads * TOKENS * geometry.head_dim
    lengths = [int(n, 16) for n in metadata["packing"]["lengths"]]
    for n, (own, total) in enumerate(zip(lengths, metadata["packing"]["sums"], strict=True)):
        planes = np.frombuffer(zstandard.decompress(data[at : at + own]), np.uint8).reshape(2, size)
        words = planes[0].astype(np.uint16) << 8 | planes[1]
        expected = prefix.block()[n // 2, n % 2, :, :TOKENS].contiguous().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(words, expected.reshape(-1))
        slot = -(-max(own, -(-2 * size // 64)) // 8) * 8
        assert not any(data[at + own : at + slot])
        assert total == f"{cpu.block_sum(torch.frombuffer(bytearray(data[at : at + slot]), dtype=torch.uint8)):016x}"
        at += slot
    assert outer["frames"] == {"dtype": "U8", "shape": [at - 8 - length], "data_offsets": [0, at - 8 - length]}
    assert data[at:] == raw(prefix.token_ids) and len(lengths) == 2 * geometry.layers
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["frames", "token_ids"]
        assert torch.equal(file.get_tensor("token_ids"), prefix.token_ids)


@pytest.fixture(scope="module")
def book(saved, tmp_path_factory):
    prefix = saved[0]

    class Book:
        geometry, identity, path = prefix.geometry, prefix.identity, tmp_path_factory.mktemp("book") / "a.kv"

    return Book


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 300), heads=st.integers(1, 3), layers=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_shape_comes_back_through_a_file(book, tokens, heads, layers, seed):
    """Also a header whose place was left out before its numbers were known."""
    geometry = dataclasses.replace(book.geometry, layers=layers, num_kv_heads=heads, num_qo_heads=heads)
    draw = torch.Generator().manual_seed(seed)
    prefix = SharedPrefix(geometry, torch.randint(0, 64, (tokens,), generator=draw))
    kv = prefix.block()[:, :, :, :tokens].view(torch.int16)
    kv.copy_(torch.randint(-(2**15), 2**15, kv.shape, generator=draw).clamp_(-(seed % 2**15) - 1).to(torch.int16))
    identity = dataclasses.replace(
        book.identity, geometry=geometry, tokens=tokens, token_ids=tokens_digest(prefix.token_ids)
    )
    prefix.publish(identity=identity)
    store.save(prefix, book.path, compress=FORM)
    with store.load(book.path) as loaded, prefix:
        assert raw(loaded.block()) == raw(prefix.block())


def test_a_header_has_the_size_that_was_left_out_for_it_wherever_its_text_ends(book):
    """As long as the numbers of its frames may get: around the byte from which on it has a page more."""
    geometry, token_ids = dataclasses.replace(book.geometry, layers=1), torch.tensor([7])
    identity = dataclasses.replace(book.identity, geometry=geometry, tokens=1, token_ids=tokens_digest(token_ids))
    sizes = set()
    with SharedPrefix(geometry, token_ids) as prefix:
        # Noise, so that frames have another number of digits than none.
        prefix.block()[:, :, :, :1].view(torch.int16).random_(-(2**15), 2**15)
        prefix.publish(identity=identity, provenance={"created": ""})
        store.save(prefix, book.path, compress=FORM)
        left = -len(book.path.read_bytes()[: store.inspect(book.path).kv_offset].rstrip(b" ")) % 4096
        for more in range(left - 40, left + 4):
            prefix.provenance = {"created": "x" * more}
            store.save(prefix, book.path, compress=FORM)
            sizes.add(store.verify(book.path).kv_offset)
    assert len(sizes) == 2


def test_a_document_is_saved_and_loaded_by_model_and_tokenizer(tmp_path):
    model, tokenizer = tiny_model(dtype=torch.bfloat16), tiny_tokenizer()
    model.set_attn_implementation("kvkern")
    with kvkern.publish(model, tokenizer, "the pump starts when its valve is open", chat=False) as doc:
        doc.save(tmp_path / "a.kv", compress="planes-zstd-1")
        with kvkern.load(tmp_path / "a.kv", model, tokenizer) as loaded:
            assert raw(loaded.block()) == raw(doc.block()) and isinstance(loaded, kvkern.Document)
        stranger = tiny_model(dtype=torch.bfloat16, rms_norm_eps=1e-5)
        stranger.set_attn_implementation("kvkern")
        with pytest.raises(IdentityError, match=r"architecture\.rms_norm_eps"):
            kvkern.load(tmp_path / "a.kv", stranger, tokenizer)


def test_a_child_comes_back_below_its_parent_in_either_form(model, tokenizer, tmp_path):
    root = publish(model, tokenizer, tokens=40)
    child = publish(model, tokenizer, tokens=7, parent=root, seed=1)
    store.save(root, tmp_path / "plain.kv")
    store.save(root, tmp_path / "packed.kv", compress=FORM)
    store.save(child, tmp_path / "child.kv", compress=FORM)
    for name in ("plain.kv", "packed.kv"):
        above = store.load(tmp_path / name)
        with store.load(tmp_path / "child.kv", parent=above) as loaded:
            assert loaded.position == 40 and raw(loaded.block()) == raw(child.block())
    assert refused(tmp_path / "child.kv", IdentityError).field == "ancestors"


def test_zeros_fill_their_slots_so_that_no_small_file_asks_for_much_memory(saved, tmp_path):
    geometry, identity = saved[0].geometry, saved[0].identity
    with SharedPrefix(geometry, saved[0].token_ids) as zeros:
        zeros.publish(identity=identity)
        store.save(zeros, tmp_path / "a.kv", compress=FORM)
        header = store.inspect(tmp_path / "a.kv")
        assert max(header.frames.lengths) < header.frames.size // 1000
        assert header.kv_end - header.kv_offset >= TOKENS * geometry.token_bytes() / packing.MAX_RATIO
        with store.load(tmp_path / "a.kv") as loaded:
            assert not loaded.block().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_round_trip_over_a_gpu_gives_the_same_bits(saved, tmp_path):
    prefix, path, data = saved
    with store.load(path, device="cuda") as loaded:
        assert loaded.block().is_cuda and raw(loaded.block().cpu()) == raw(prefix.block())
        loaded.check()
        store.save(loaded, tmp_path / "b.kv", compress=FORM)
    assert (tmp_path / "b.kv").read_bytes() == data


# -- a changed byte, and forged files ----------------------------------------------------------------------------------


def places(path):
    """(region, byte where its slot begins, length of the frame, byte where the slot ends) of every frame."""
    header = store.inspect(path)
    at = header.kv_offset
    for n, (length, slot) in enumerate(zip(header.frames.lengths, header.frames.slots, strict=True)):
        yield f"frame of kv[layer {n // 2}, {'KV'[n % 2]}]", at, length, at + slot
        at += slot


def test_a_flipped_byte_of_a_frame_is_named(saved, other):
    _, path, data = saved
    for region, begin, length, end in places(path):
        for at in (begin, begin + 4, begin + length - 1, end - 1, random.randrange(begin, end)):
            error = refused_everywhere(other(flipped(data, at)))
            assert error.field == region and "in other.kv" in error.found


def test_a_flipped_byte_of_the_header_or_the_token_ids_is_refused(saved, other):
    _, path, data = saved
    offset = store.inspect(path).kv_offset
    text = len(data[:offset].rstrip(b" "))
    for at in [*random.sample(range(text), 40), text, offset - 1]:
        assert refused(other(flipped(data, at))).field.startswith(("header", "metadata"))
    at = data.index(b'lengths\\":[') + 15
    assert refused(other(flipped(data, at))).field.startswith(("header", "metadata"))
    assert refused(other(flipped(data, len(data) - 9))).field == "token_ids"


def reframed(path, index, frame):
    """The file with another frame in one place, and all that follows from it made right again: a forged file."""
    header, data = store.inspect(path), Path(path).read_bytes()
    frames, size = [data[begin : begin + length] for _, begin, length, _ in places(path)], header.frames.size
    frames[index] = frame
    slots = [one.ljust(packing.slot_bytes(len(one), size), b"\0") for one in frames]
    sums = tuple(cpu.block_sum(torch.frombuffer(bytearray(slot), dtype=torch.uint8)) for slot in slots)
    made = Frames(FORM, size, tuple(map(len, frames)), sums)
    start = header_bytes(header.identity, list(header.kv), list(header.sums), header.provenance, made)
    return start + b"".join(slots) + data[header.kv_end :]


def content(path, index):
    _, begin, length, _ = list(places(path))[index]
    return zstandard.decompress(Path(path).read_bytes()[begin : begin + length])


def test_control_the_same_words_in_another_frame_are_the_same_document(saved, other):
    prefix, path, data = saved
    frame = zstandard.ZstdCompressor(level=5, write_checksum=True).compress(content(path, 1))
    assert reframed(path, 1, frame) != data
    with store.load(other(reframed(path, 1, frame))) as loaded:
        assert raw(loaded.block()) == raw(prefix.block())


@pytest.mark.parametrize("at", [0, -1, "somewhere"])
def test_control_one_planted_bit_in_the_words_is_caught_by_their_digest(saved, other, at):
    _, path, _ = saved
    words = bytearray(content(path, 3))
    at = random.randrange(len(words)) if at == "somewhere" else at
    words[at] ^= 1 << random.randrange(8)
    error = refused_everywhere(other(reframed(path, 3, frame_of(bytes(words)))))
    assert error.field.startswith("kv[layer 1, V, segment ") and "SHA-256" in error.found


HOSTILE = {
    "cut short": lambda data: frame_of(data)[:-9],
    "more behind it": lambda data: frame_of(data) + b"more",
    "two frames": lambda data: frame_of(data[:512]) + frame_of(data[512:]),
    "no size": lambda data: frame_of(data, write_content_size=False),
    "a token less": lambda data: frame_of(data[:-64]),
    "a bomb": lambda data: frame_of(bytes(256 << 20)),
    "a bomb that is not there": lambda data: claims(1 << 50),
    "fewer than it says": lambda data: claims(len(data)),
    "the words as they are": lambda data: data,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_forged_frame_is_named(saved, other, kind):
    _, path, _ = saved
    error = refused_everywhere(other(reframed(path, 2, HOSTILE[kind](content(path, 2)))))
    assert error.field == "frame of kv[layer 1, K]" and "in other.kv" in error.found
    assert error.needed.endswith("bytes") and error.do == AGAIN


def length(to):
    return lambda m: m["packing"]["lengths"].__setitem__(1, to)


FORGERIES = {
    "metadata.format": lambda m: m.update(format=3),
    "header, format": lambda m: m.update(format=1),
    "metadata": lambda m: m.pop("packing"),
    "metadata, form": lambda m: m["packing"].pop("form"),
    "metadata, lengths": lambda m: m["packing"].update(lengths=3),
    "metadata, a length": length("zz"),
    "metadata, no text": length(64),
    "metadata.packing.form": lambda m: m["packing"].update(form="planes-zstd-2"),
    "metadata.packing": lambda m: m["identity"]["geometry"].update(dtype="float32"),
    "metadata.packing, float16": lambda m: m["identity"]["geometry"].update(dtype="float16"),
    "metadata.packing.lengths": lambda m: m["packing"]["lengths"].pop(),
    "metadata.packing.lengths, sums": lambda m: m["packing"]["sums"].append("0" * 16),
    "metadata.packing.lengths[1]": length("0" * 16),
    "metadata.packing.lengths[1], negative": length("-00000000000001f"),
    "metadata.packing.lengths[1], huge": length("7fffffffffffffff"),
    "header, another length": length("0" * 13 + "999"),
    "header, as written": lambda m: m["packing"]["sums"].__setitem__(0, m["packing"]["sums"][0].upper() + " "),
    "header, more": lambda m: m["packing"].update(more=1),
    "frame of kv[layer 0, K]": lambda m: m["packing"]["sums"].__setitem__(0, "0" * 16),
    "kv[layer 1, V, segment 1]": lambda m: m["kv"].__setitem__(7, "0" * 64),
    "metadata.sums, kv[layer 0, K, segment 0]": lambda m: m["sums"].__setitem__(0, "0" * 16),
}


@pytest.mark.parametrize("field", FORGERIES)
def test_metadata_that_does_not_fit_is_named(saved, other, field):
    name = field if field.startswith("metadata.sums") else field.split(", ")[0] if "kv[" not in field else field
    assert refused_everywhere(other(rewritten(saved[2], FORGERIES[field]))).field == name


def test_frames_lie_where_their_lengths_say_so_that_none_overlaps_another(saved, other):
    """Lengths that are all right by themselves and in sum, but not those of these frames."""
    _, path, data = saved
    frames = store.inspect(path).frames
    first, second = frames.lengths[:2]
    moved = 8 * (1 + abs(first - second) // 8)

    def change(metadata):
        metadata["packing"]["lengths"][:2] = [f"{first - moved:016x}", f"{second + moved:016x}"]

    assert refused_everywhere(other(rewritten(data, change))).field == "frame of kv[layer 0, K]"


@pytest.mark.parametrize(
    ("name", "value"), [("tokens", 10**15), ("layers", 10**15), ("num_kv_heads", 4), ("head_dim", 32)]
)
def test_sizes_that_the_file_does_not_have_are_refused_before_memory_is_asked_for(
    saved, other, monkeypatch, name, value
):
    def change(metadata):
        (metadata["identity"] if name == "tokens" else metadata["identity"]["geometry"])[name] = value

    monkeypatch.setattr(store, "SharedPrefix", lambda *a, **k: pytest.fail("memory was asked for"))
    fields = ("metadata.kv", "header", "metadata.packing.lengths", "frame of kv[layer 0, K]")
    path = other(rewritten(saved[2], change))
    if name in ("num_kv_heads", "head_dim"):
        # Lengths may be those of other shapes: a frame that says another size is refused as it is read.
        monkeypatch.undo()
        assert "a size of" in refused_everywhere(path).found
    else:
        assert refused_everywhere(path).field in fields


def test_a_file_cut_short_anywhere_or_with_more_behind_it_is_refused(saved, other):
    _, path, data = saved
    offset = store.inspect(path).kv_offset
    for size in [0, 7, 100, offset - 1, offset, offset + 1, len(data) - 1, *random.sample(range(len(data)), 20)]:
        assert refused(other(data[:size])).field in ("size", "header")
    assert refused(other(data + b"\0")).field == "size"


def test_a_failed_load_gives_its_block_back(saved, other):
    made = []

    def make(geometry, token_ids, header):
        made.append(SharedPrefix(geometry, token_ids))
        return made[-1]

    _, begin, _, _ = list(places(saved[1]))[-1]
    refused(other(flipped(saved[2], begin + 50)), make=make)
    assert made[0].released and not made[0].published


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kv_for_which_it_does_not_pay_is_refused_by_name(tokenizer, tmp_path, dtype):
    with publish(tiny_model(dtype=dtype), tokenizer, tokens=5) as prefix:
        with pytest.raises(UnsupportedError) as caught:
            store.save(prefix, tmp_path / "a.kv", compress=FORM)
        assert caught.value.field == "compress" and str(dtype).removeprefix("torch.") in caught.value.found
        assert "bfloat16" in caught.value.needed and "does not pay" in caught.value.needed
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["zstd", "planes-zstd-2", "", True])
def test_another_form_is_refused_by_name(saved, tmp_path, form):
    with pytest.raises(RequestError) as caught:
        store.save(saved[0], tmp_path / "a.kv", compress=form)
    assert caught.value.field == "compress" and caught.value.needed == FORM and list(tmp_path.iterdir()) == []


def test_a_packed_file_is_not_mapped(saved):
    error = refused(saved[1], RequestError, mmap=True)
    assert error.field == "mmap" and FORM in error.found and "without mmap" in error.do


def test_without_the_package_it_says_what_to_install(saved, tmp_path, monkeypatch):
    prefix, path, _ = saved
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert store.inspect(path).frames.form == FORM
    ways = (
        lambda: store.load(path),
        lambda: store.verify(path),
        lambda: store.save(prefix, tmp_path / "a.kv", compress=FORM),
    )
    for way in ways:
        with pytest.raises(UnsupportedError, match="zstandard: found not installed") as caught:
            way()
        assert "pip install 'kvkern[compress]'" in caught.value.do
    # Plain files need nothing of it.
    store.save(prefix, tmp_path / "a.kv")
    store.load(tmp_path / "a.kv").release()


def test_a_reader_that_knows_plain_files_alone_refuses_it_by_name(saved, monkeypatch):
    monkeypatch.setattr("kvkern.header.PACKED_FORMAT", 1)
    error = refused_everywhere(saved[1])
    assert error.field == "metadata.format" and error.found.startswith("2 in ")


# -- saving: whole or not at all ---------------------------------------------------------------------------------------


def test_progress_counts_kv_bytes_to_the_end(saved, tmp_path):
    prefix, path, _ = saved
    for way in (
        lambda progress: store.save(prefix, tmp_path / "b.kv", compress=FORM, progress=progress),
        lambda progress: store.load(path, progress=progress).release(),
        lambda progress: store.verify(path, progress=progress),
    ):
        steps = []
        way(lambda *step, steps=steps: steps.append(step))
        assert steps == [(prefix.size_bytes * n // 4, prefix.size_bytes) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_save_that_is_interrupted_keeps_the_older_file(saved, tmp_path, error):
    def stop(done, total):
        raise error

    path = tmp_path / "a.kv"
    path.write_bytes(b"older")
    with pytest.raises((KeyboardInterrupt, StoreError)):
        store.save(saved[0], path, compress=FORM, progress=stop)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("token", [TOKENS - 1, TOKENS])
def test_a_block_or_padding_that_changed_in_memory_is_not_saved(model, tokenizer, tmp_path, token):
    prefix = publish(model, tokenizer)
    prefix._mapping = None
    changed = prefix.block().clone()
    changed.view(torch.int16)[1, 1, 0, token, 3] ^= 1 << 14
    prefix._block = changed
    with pytest.raises(StoreError) as caught:
        store.save(prefix, tmp_path / "a.kv", compress=FORM)
    assert caught.value.field == ("kv[layer 1, V, segment 1]" if token < TOKENS else "kv[layer 1, V]")
    assert list(tmp_path.iterdir()) == []


def test_few_frames_wait_to_be_written(model):
    """Workers do not run ahead of whoever takes what they made."""
    geometry = dataclasses.replace(model_geometry(model), layers=20)
    begun, lock, rows = [], threading.Lock(), np.zeros(128 * geometry.head_dim, np.uint16).tobytes()

    def packed(layer, which):
        with lock:
            begun.append((layer, which))
        yield from [memoryview(bytearray(rows))] * geometry.num_kv_heads

    for taken, (block, _, _) in enumerate(store._walk(geometry, 1, packed, None)):
        assert block == (taken // 2, taken % 2, 0)
        time.sleep(0.002)
        assert len(begun) <= taken + 1 + store.THREADS
    assert len(begun) == 40


def test_the_digests_are_those_of_the_words(saved):
    prefix, path, _ = saved
    assert list(store.inspect(path).kv) == [hashlib.sha256(raw(view)).hexdigest() for _, _, _, view in prefix.blocks()]
