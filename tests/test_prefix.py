"""SharedPrefix: published once, read as copies, counted, and watched for a changed byte."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal

import pytest
import torch

from kvkern import cpu
from kvkern.errors import DeviceError, KvkernError, ReadOnlyError, RequestError, ShapeError, StoreError
from kvkern.geometry import Geometry, num_segments
from kvkern.prefix import SharedPrefix

GEOMETRY = Geometry(2, 4, 2, 16, torch.float32)


def make(
    tokens: int = 5, parent: SharedPrefix | None = None, *, publish: bool = True, protect: bool = True
) -> SharedPrefix:
    prefix = SharedPrefix(GEOMETRY, torch.randint(0, 1000, (tokens,)), parent=parent)
    prefix.block()[..., :tokens, :] = torch.randn(2, 2, 2, tokens, 16)
    if not protect:
        prefix._mapping = None
    return prefix.publish(identity="me", provenance={"model": "none"}) if publish else prefix


# -- filling and publishing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1025])
def test_the_block_is_one_contiguous_allocation_padded_with_zeros(tokens):
    prefix = make(tokens, publish=False)
    filled = prefix.block()[..., :tokens, :].clone()
    block = prefix.publish().block()
    assert block.shape == (2, 2, 2, -(-tokens // 128) * 128, 16) and block.is_contiguous()
    assert not block[..., tokens:, :].any() and torch.equal(block[..., :tokens, :], filled)
    assert prefix.size_bytes == block.numel() * 4


def test_a_prefix_is_published_once():
    prefix = make(publish=False)
    assert not prefix.published
    prefix.publish(identity="me", provenance={"model": "none"})
    assert prefix.published and prefix.identity == "me" and prefix.provenance == {"model": "none"}
    with pytest.raises(ReadOnlyError, match=r"^prefix: found published already"):
        prefix.publish()


def test_provenance_is_a_copy():
    given = {"model": "a"}
    prefix = make(publish=False).publish(provenance=given)
    given["model"] = "b"
    assert prefix.provenance == {"model": "a"}


def end_of_a_child_that_writes(prefix: SharedPrefix) -> int:
    """Exit status of a forked process that writes one byte through the block's pointer; negative: the signal."""
    address = prefix.block().data_ptr()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.memset(address, 1, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_write_to_a_published_block_kills_the_process():
    prefix = make(publish=False)
    assert end_of_a_child_that_writes(prefix) == 0, "the control: it may be written until it is published"
    prefix.publish()
    assert end_of_a_child_that_writes(prefix) == -signal.SIGSEGV


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_is_read_are_copies():
    prefix = make()
    key, value, ids, sums = prefix.key(1), prefix.value(1), prefix.token_ids, prefix.sums
    assert torch.equal(key, prefix.block()[1, 0, :, :5]) and torch.equal(value, prefix.block()[1, 1, :, :5])
    for copy in (key, value, ids, sums):
        copy.zero_()
    assert prefix.key(1).any() and prefix.value(1).any() and prefix.token_ids.any() and prefix.sums.any()
    prefix.check()


def test_token_ids_are_copied_at_the_start_too():
    ids = torch.tensor([1, 2, 3])
    prefix = SharedPrefix(GEOMETRY, ids)
    ids.zero_()
    assert prefix.token_ids.tolist() == [1, 2, 3] and prefix.token_ids.dtype == torch.int64


def test_a_layer_that_is_not_there_is_refused():
    for layer in (-1, 2):
        with pytest.raises(ShapeError, match=f"^layer: found {layer}, needed 0 to 1"):
            make().key(layer)


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_a_path_adds_up_from_the_root():
    root = make(5)
    child = make(7, root)
    leaf = make(130, child)
    assert leaf.path() == [root, child, leaf] and root.path() == [root]
    assert [(n.position, n.end) for n in leaf.path()] == [(0, 5), (5, 12), (12, 142)]
    ids = torch.cat([n.token_ids for n in (root, child, leaf)])
    assert torch.equal(leaf.path_token_ids(), ids)


def test_a_parent_lives_as_long_as_its_children():
    root = make()
    first, second = make(3, root), make(4, root)
    assert root.references == 3
    root.release()
    first.release()
    assert first.released and not root.released
    second.check()
    second.release()
    assert second.released and root.released


def test_a_parent_must_be_published_held_and_of_the_same_model_and_device():
    with pytest.raises(KvkernError, match=r"^parent: found a prefix that is still being filled"):
        make(3, make(publish=False))
    gone = make()
    gone.release()
    with pytest.raises(ReadOnlyError, match=r"^prefix: found released"):
        make(3, gone)
    root = make()
    with pytest.raises(ShapeError, match=r"^parent\.geometry: found"):
        SharedPrefix(Geometry(1, 4, 2, 16, torch.float32), torch.tensor([1]), parent=root)
    with pytest.raises(DeviceError, match=r"^parent\.device: found cpu, needed meta"):
        SharedPrefix(GEOMETRY, torch.tensor([1]), device="meta", parent=root)
    assert root.references == 1


def test_a_child_that_cannot_be_allocated_leaves_its_parent_as_it_was(monkeypatch):
    root = make()

    def no_memory(*_):
        raise OSError("no memory")

    monkeypatch.setattr(cpu, "map_tensor", no_memory)
    with pytest.raises(OSError, match="no memory"):
        make(3, root)
    assert root.references == 1


@pytest.mark.parametrize(
    "ids", [torch.empty(0, dtype=torch.int64), torch.tensor(3), torch.ones(2, 3, dtype=torch.int64)]
)
def test_a_document_without_tokens_is_refused(ids):
    with pytest.raises(RequestError, match=r"^document: found token ids of shape"):
        SharedPrefix(GEOMETRY, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_token_ids_that_are_no_integers_are_refused(dtype):
    with pytest.raises(RequestError, match=rf"^document: found token ids of {dtype}, needed integers"):
        SharedPrefix(GEOMETRY, torch.ones(3, dtype=dtype))


# -- integrity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 1024, 1025, 2100])
def test_blocks_cover_the_allocation_once(tokens):
    prefix = make(tokens)
    seen = torch.zeros_like(prefix.block())
    for layer, which, segment, view in prefix.blocks():
        step = prefix.segment_tokens
        seen[layer, which, :, segment * step : (segment + 1) * step] += 1
        assert view.data_ptr() == prefix.block()[layer, which, 0, segment * step].data_ptr()
    assert (seen == 1).all()
    assert prefix.sums.shape == (2, 2, num_segments(tokens))


def test_check_names_the_layer_the_tensor_and_the_segment_of_a_flipped_bit():
    prefix = make(2100, protect=False)
    block = prefix.block().view(torch.int32)
    places = [(0, 0, 0, 0, 0), (1, 1, 1, 2047, 15), (1, 0, 1, 2048, 3), (0, 1, 0, 2175, 0)]  # the last in the padding
    for place in places:
        layer, which, _, token, _ = place
        bit = 1 << int(torch.randint(0, 31, ()))
        prefix.check()
        block[place] ^= bit
        with pytest.raises(
            StoreError, match=rf"^kv\[layer {layer}, {'KV'[which]}, segment {token // 1024}\]: found a changed sum"
        ):
            prefix.check()
        block[place] ^= bit
    prefix.check()


def test_two_swapped_words_are_noticed():
    prefix = make(5, protect=False)
    row = prefix.block()[0, 0, 0, 0]
    row.copy_(row.view(2, 8).flip(0).flatten())
    with pytest.raises(StoreError, match=r"^kv\[layer 0, K, segment 0\]"):
        prefix.check()


def test_check_and_sums_need_a_published_prefix():
    for use in (SharedPrefix.check, lambda prefix: prefix.sums):
        with pytest.raises(KvkernError, match=r"^prefix: found a prefix that is still being filled"):
            use(make(publish=False))


# -- life --------------------------------------------------------------------------------------------------------------

USES = {
    "block": SharedPrefix.block,
    "key": lambda p: p.key(0),
    "value": lambda p: p.value(0),
    "size_bytes": lambda p: p.size_bytes,
    "check": SharedPrefix.check,
    "sums": lambda p: p.sums,
    "block_sums": SharedPrefix.block_sums,
    "retain": SharedPrefix.retain,
    "release": SharedPrefix.release,
    "enter": SharedPrefix.__enter__,
    "child": lambda p: SharedPrefix(GEOMETRY, torch.tensor([1]), parent=p),
}


@pytest.mark.parametrize("use", USES)
def test_a_released_prefix_is_refused(use):
    prefix = make()
    prefix.release()
    assert prefix.released
    with pytest.raises(ReadOnlyError, match=r"^prefix: found released, needed a prefix that is still held"):
        USES[use](prefix)


def test_references_are_counted_and_with_releases_on_leaving():
    prefix = make()
    prefix.retain()
    prefix.release()
    assert not prefix.released
    with prefix as same:
        assert same is prefix
    assert prefix.released
    with make() as early:
        early.release()


def test_the_memory_lives_as_long_as_somebody_holds_the_tensor():
    prefix = make()
    block, key = prefix.block(), prefix.key(0)
    prefix.release()
    assert torch.equal(block[0, 0, :, :5], key)


def test_the_name_says_the_state():
    prefix = make(publish=False)
    assert "5 tokens at 0, 2 layers, 2 kv heads of 16" in repr(prefix) and "filling" in repr(prefix)
    prefix.publish()
    assert "published" in repr(prefix)
    prefix.release()
    assert "released" in repr(prefix)
