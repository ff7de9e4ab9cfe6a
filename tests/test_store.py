"""The .kv file: the same bits back, or one error that names what is wrong with it; never half a file."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from test_identity import OTHER_MODELS, OTHER_TOKENIZERS, TEMPLATE, tiny_model, tiny_tokenizer

import kvkern
from kvkern import cpu, files, store
from kvkern.errors import CapacityError, IdentityError, ReadOnlyError, RequestError, StoreError
from kvkern.geometry import num_segments
from kvkern.identity import Identity, canonical, match, model_geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

TOKENS = 1025  # a whole segment of 1,024, and one token with its padding


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def publish(model, tokenizer, *, tokens=TOKENS, parent=None, seed=0):
    """A prefix of random bits, NaNs and denormals among them, as this model's; its padding is zeros."""
    draw = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 64, (tokens,), generator=draw)
    prefix = SharedPrefix(model_geometry(model), token_ids, parent=parent)
    kv = prefix.block()[:, :, :, :tokens]
    bits = torch.randint(0, 256, (*kv.shape, kv.element_size()), generator=draw, dtype=torch.uint8)
    kv.copy_(bits.view(kv.dtype).squeeze(-1))
    identity = Identity.of(
        model, tokenizer, token_ids, template=TEMPLATE, template_kwargs={"thinking": False}, parent=parent
    )
    return prefix.publish(identity=identity, provenance={"model": "tiny", "created": "2026-01-01T00:00:00+00:00"})


def raw(tensor):
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """(published prefix, its file, the file's bytes); nobody writes to it."""
    path = tmp_path_factory.mktemp("saved") / "a.kv"
    prefix = publish(model, tokenizer)
    store.save(prefix, path)
    return prefix, path, path.read_bytes()


@pytest.fixture
def other(tmp_path):
    """Write bytes to a file and name it."""

    def write(data):
        path = tmp_path / "other.kv"
        path.write_bytes(data)
        return path

    return write


def refused(path, kind=StoreError, **options):
    """The one error that load ends in; every way into the file ends in the same one, for what they read."""
    with pytest.raises(kind) as caught:
        store.load(path, **options)
    assert "\n  do: " in str(caught.value)
    return caught.value


def run(code, *arguments, **options):
    tests = Path(__file__).parent
    source = f"import sys; sys.path.insert(0, {str(tests)!r})\n{textwrap.dedent(code)}"
    environment = {**os.environ, "PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", source, *map(str, arguments)], env=environment, **options)


CRASHES = """
    import ctypes, itertools, json, os, random, resource, signal, time
    import kvkern
    from kvkern import store
    from kvkern.errors import StoreError
    from kvkern.identity import tensor_bytes
    from test_identity import tiny_model, tiny_tokenizer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file, folder, seed, times = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    none, older = os.path.join(folder, "none"), os.path.join(folder, "older")
    random.seed(seed)

    def end_of(crash):
        pid = os.fork()
        if pid == 0:
            crash()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def touch(mmap, touched):
        prefix = store.load(file, mmap=mmap)
        return lambda: touched(prefix.block().data_ptr())

    def killed_while_saving(folder):
        kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)
        return lambda: store.save(store.load(file), os.path.join(folder, "a.kv"), progress=kill)

    # -- killed at every step of a save, and at any moment of publish and save

    def bytes_of(path):
        return open(path, "rb").read() if os.path.exists(path) else None

    newer = os.path.join(folder, "newer.kv")
    with store.load(file) as again:
        again.provenance = {**again.provenance, "model": "newer"}
        store.save(again, newer)
    known = {None: "none", bytes_of(file): "older", bytes_of(newer): "newer"}

    def seen(path):
        remains = [name for name in os.listdir(os.path.dirname(path)) if name != os.path.basename(path)]
        return known.get(bytes_of(path), "torn"), len(remains)

    def killed_at(number, after, path):
        kill, steps = (lambda: os.kill(os.getpid(), signal.SIGKILL)), itertools.count(1)
        def hooked(name, call):
            def step(*a, **k):
                mine = next(steps) == number
                if mine and not after:
                    kill()
                done = call(*a, **k)
                if mine:
                    kill()
                return done
            setattr(os, name, step)
        def crash():
            prefix = store.load(newer)
            for name in ("open", "pwrite", "fsync", "replace", "unlink", "close"):
                hooked(name, getattr(os, name))
            store.save(prefix, path)
        return crash

    def every_step(path):
        found = []
        for after in (False, True):
            number = 0
            while True:
                number += 1
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if os.path.exists(path):
                    os.unlink(path)
                if "older" in path:
                    os.link(file, path)
                end = end_of(killed_at(number, after, path))
                found.append((after, number, end, *seen(path)))
                if end == 0:
                    break
        return found

    def any_moment(path):
        os.makedirs(os.path.dirname(path))
        model, tokenizer = tiny_model(), tiny_tokenizer()
        model.set_attn_implementation("kvkern")
        def publish_and_save():
            with kvkern.publish(model, tokenizer, "the pump starts " * 40, chat=False, chunk=16) as doc:
                doc.save(path)
        def for_ever():
            while True:
                publish_and_save()
        begun = time.monotonic()
        assert end_of(publish_and_save) == 0
        once, found = time.monotonic() - begun, []
        for _ in range(times):
            pid = os.fork()
            if pid == 0:
                for_ever()
            time.sleep(random.random() * 2 * once)
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            store.verify(path)
            found.append(len(os.listdir(os.path.dirname(path))) - 1)
        return found

    # -- two that save to one name, and one that reads it meanwhile

    def two_writers(path):
        os.makedirs(os.path.dirname(path))
        os.link(file, path)
        writers = []
        for source in (file, newer):
            pid = os.fork()
            if pid == 0:
                prefix = store.load(source)
                for _ in range(times):
                    store.save(prefix, path)
                os._exit(0)
            writers.append(pid)
        blocks = bytes(tensor_bytes(store.load(file).block()))
        ends, read = [], []
        while writers:
            with store.load(path, mmap=len(read) % 2 == 1) as loaded:
                loaded.check()
                assert bytes(tensor_bytes(loaded.block())) == blocks
                read.append(loaded.provenance["model"])
            for pid in list(writers):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    writers.remove(pid)
                    ends.append(os.waitstatus_to_exitcode(status))
        return {"ends": ends, "read": sorted(set(read)), "last": seen(path)}

    # -- a file system that takes no more

    def full(path):
        os.makedirs(os.path.dirname(path))
        prefix = store.load(file)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            store.save(prefix, path)
        except StoreError as error:
            return str(error), os.listdir(os.path.dirname(path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    print(json.dumps({
        "read copy": end_of(touch(False, lambda address: ctypes.string_at(address, 4))),
        "read mmap": end_of(touch(True, lambda address: ctypes.string_at(address, 4))),
        "write copy": end_of(touch(False, lambda address: ctypes.memset(address, 1, 4))),
        "write mmap": end_of(touch(True, lambda address: ctypes.memset(address, 1, 4))),
        "kill none": end_of(killed_while_saving(none)),
        "kill older": end_of(killed_while_saving(older)),
        "steps none": every_step(os.path.join(folder, "steps", "a.kv")),
        "steps older": every_step(os.path.join(folder, "steps-older", "a.kv")),
        "any moment": any_moment(os.path.join(folder, "moment", "a.kv")),
        "two writers": two_writers(os.path.join(folder, "two", "a.kv")),
        "full": full(os.path.join(folder, "full", "a.kv")),
    }))
"""


@pytest.fixture(scope="module")
def crashes(saved, tmp_path_factory):
    """(how each of many processes ended, folders they saved to); one process starts, the others fork from it."""
    folder = tmp_path_factory.mktemp("crashes")
    for name in ("none", "older"):
        (folder / name).mkdir()
    (folder / "older" / "a.kv").write_bytes(saved[2])
    seed = random.randrange(2**32)
    print(f"crashes: seed {seed}")
    child = run(CRASHES, saved[1], folder, seed, 12, stdout=subprocess.PIPE, text=True)
    return json.loads(child.communicate()[0]), folder


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 128, 1025])
def test_a_round_trip_gives_the_same_bits(tokenizer, tmp_path, dtype, tokens, mmap):
    model = tiny_model(dtype=dtype)
    with publish(model, tokenizer, tokens=tokens, seed=tokens) as prefix:
        store.save(prefix, tmp_path / "a.kv")
        with store.load(tmp_path / "a.kv", mmap=mmap) as loaded:
            assert raw(loaded.block()) == raw(prefix.block())
            assert loaded.block().shape == prefix.block().shape and loaded.geometry == prefix.geometry
            assert torch.equal(loaded.token_ids, prefix.token_ids)
            assert torch.equal(loaded.sums, prefix.sums)
            assert loaded.identity == prefix.identity and loaded.published
            loaded.check()


def test_a_loaded_prefix_saves_as_the_same_file(saved, tmp_path):
    _, path, data = saved
    for mmap in (False, True):
        with store.load(path, mmap=mmap) as loaded:
            store.save(loaded, tmp_path / "b.kv")
        assert (tmp_path / "b.kv").read_bytes() == data


def test_a_mapped_file_may_be_replaced_and_deleted(saved, model, tokenizer, tmp_path):
    prefix, _, data = saved
    path = tmp_path / "a.kv"
    path.write_bytes(data)
    with store.load(path, mmap=True) as loaded, publish(model, tokenizer, seed=9) as newer:
        store.save(newer, path)
        loaded.check()
        path.unlink()
        assert raw(loaded.block()) == raw(prefix.block())


def test_control_a_mapped_file_rewritten_in_place_is_seen_by_check(saved, other):
    _, path, data = saved
    header, path = store.inspect(path), other(data)
    with store.load(path, mmap=True) as loaded:
        with open(path, "r+b") as file:
            file.seek(header.kv_offset)
            file.write(b"\x55" * 16)
        with pytest.raises(StoreError, match=r"kv\[layer 0, K, segment 0\]"):
            loaded.check()


def test_another_process_loads_it_against_its_own_model(saved):
    prefix, path, _ = saved
    code = """
        import hashlib
        from test_identity import tiny_model, tiny_tokenizer
        from kvkern import store
        from kvkern.identity import match, tensor_bytes
        model, tokenizer = tiny_model(), tiny_tokenizer()
        check = lambda found, where: match(found, model, tokenizer, where=where)
        with store.load(sys.argv[1], check=check) as loaded:
            print(hashlib.sha256(tensor_bytes(loaded.block())).hexdigest())
    """
    child = run(code, path, stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0].strip() == hashlib.sha256(raw(prefix.block())).hexdigest()


def test_the_safetensors_library_opens_it(saved):
    prefix, path, _ = saved
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["kv", "token_ids"]
        assert list(file.metadata()) == ["kvkern"]
        assert raw(file.get_tensor("kv")) == raw(prefix.block())
        assert torch.equal(file.get_tensor("token_ids"), prefix.token_ids)
        assert file.get_slice("kv").get_shape() == list(prefix.block().shape)
    assert set(safetensors.torch.load(path.read_bytes())) == {"kv", "token_ids"}


def test_the_file_is_what_the_docstring_says(saved):
    """The format read by hand: with nothing of store."""
    prefix, _, data = saved
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 4096 == 0
    text = data[8 : 8 + length].rstrip(b" ")
    outer = json.loads(text)
    metadata = json.loads(outer["__metadata__"]["kvkern"])
    begin, end = outer["kv"]["data_offsets"]
    body = data[8 + length :]
    assert begin == 0 and body[:end] == raw(prefix.block()) and body[end:] == raw(prefix.token_ids)
    blocks = [raw(view) for _, _, _, view in prefix.blocks()]
    assert metadata["kv"] == [hashlib.sha256(block).hexdigest() for block in blocks]
    assert metadata["sums"] == [f"{cpu.block_sum(view):016x}" for _, _, _, view in prefix.blocks()]
    assert metadata["identity"]["token_ids"] == hashlib.sha256(body[end:]).hexdigest()
    digest = metadata.pop("sha256")
    assert digest == hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_inspect_reads_the_header_alone(saved, other):
    prefix, path, data = saved
    header = store.inspect(path)
    assert header.identity == prefix.identity and header.tokens == TOKENS and header.segments == 2
    assert len(header.kv) == len(header.sums) == 2 * 2 * 2 and header.size_bytes == len(data)
    assert header.provenance["model"] == "tiny" and header.provenance["torch"] and header.kv_offset % 4096 == 0
    blank = bytearray(data)
    blank[header.kv_offset :] = bytes(len(data) - header.kv_offset)
    assert store.inspect(other(bytes(blank))).kv == header.kv
    with pytest.raises(StoreError):
        store.verify(other(bytes(blank)))


def test_verify_needs_no_model(saved):
    _, path, _ = saved
    assert store.verify(path) == store.inspect(path)


def test_progress_counts_to_the_end(saved, tmp_path):
    prefix, path, _ = saved
    ways = [
        lambda progress: store.save(prefix, tmp_path / "b.kv", progress=progress),
        lambda progress: store.load(path, progress=progress).release(),
        lambda progress: store.verify(path, progress=progress),
    ]
    for way in ways:
        steps = []
        way(lambda done, total, steps=steps: steps.append((done, total)))
        assert [total for _, total in steps] == [prefix.size_bytes] * 4
        assert [done for done, _ in steps] == [prefix.size_bytes * n // 4 for n in (1, 2, 3, 4)]


# -- identity ----------------------------------------------------------------------------------------------------------


def opened(model):
    model.set_attn_implementation("kvkern")
    return model


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """(model, file of a document that kvkern.publish made with it, the file's bytes)."""
    model, path = opened(tiny_model()), tmp_path_factory.mktemp("book") / "book.kv"
    text = "the pump starts when its valve is open"
    with kvkern.publish(model, tiny_tokenizer(), text, thinking=False) as doc:
        doc.save(path)
    return model, path, path.read_bytes()


def forged(name, value, part=None):
    """A file whose identity says something else, its digests made right again."""

    def change(metadata):
        (metadata["identity"][part] if part else metadata["identity"])[name] = value

    return change


# Every field of Identity. template_kwargs is missing: load asks questions with those of the file, whatever they are.
OTHER_FILES = {
    "metadata.format": (lambda m: m.update(format=3), StoreError),
    "metadata.identity.layout": (forged("layout", 2), StoreError),
    "geometry.num_qo_heads": (forged("num_qo_heads", 8, "geometry"), IdentityError),
    "architecture.rms_norm_eps": (forged("rms_norm_eps", 1e-5, "architecture"), IdentityError),
    "architecture.new": (forged("new", 1, "architecture"), IdentityError),
    "rope.theta": (forged("theta", 5e6, "rope"), IdentityError),
    "rope.factor": (forged("factor", 2.0, "rope"), IdentityError),
    "position": (forged("position", 7), IdentityError),
    "ancestors": (forged("ancestors", "0" * 64), IdentityError),
    "header": (forged("tokens", 9), StoreError),  # the block no longer has the shape of its tokens
    "token_ids": (forged("token_ids", "0" * 64), StoreError),
    "tokenizer": (forged("tokenizer", "0" * 64), IdentityError),
    "template": (forged("template", "0" * 64), IdentityError),
    "weights": (forged("weights", "0" * 64), IdentityError),
}


@pytest.mark.parametrize("field", OTHER_FILES)
def test_a_file_with_one_other_field_is_refused_by_name(book, other, field):
    model, _, data = book
    change, kind = OTHER_FILES[field]
    with pytest.raises(kind) as caught:
        kvkern.load(other(rewritten(data, change)), model, tiny_tokenizer())
    error = caught.value
    assert type(error) is kind and error.field == field
    assert "in other.kv" in error.found and error.needed and error.do


def test_every_field_of_identity_is_among_them():
    seen = {"tokens" if name == "header" else name.split(".")[-1 if "metadata" in name else 0] for name in OTHER_FILES}
    assert seen == {field.name for field in dataclasses.fields(Identity)} - {"template_kwargs"}


@pytest.mark.parametrize("field", OTHER_MODELS)
def test_another_model_is_refused_where_a_file_is_loaded(book, field):
    with pytest.raises(IdentityError) as caught:
        kvkern.load(book[1], opened(OTHER_MODELS[field]()), tiny_tokenizer())
    assert caught.value.field == field and "in book.kv" in caught.value.found


@pytest.mark.parametrize("change", OTHER_TOKENIZERS)
def test_another_tokenizer_is_refused_where_a_file_is_loaded(book, change):
    with pytest.raises(IdentityError) as caught:
        kvkern.load(book[1], book[0], OTHER_TOKENIZERS[change]())
    assert caught.value.field == "tokenizer" and "in book.kv" in caught.value.found


def test_control_what_does_not_change_the_kv_is_accepted(book, other):
    """Another version of transformers made it elsewhere; the tokenizer was used in between."""
    model, path, data = book
    tokenizer = tiny_tokenizer()
    tokenizer(["the pump", "the"], padding=True)
    tokenizer("the pump starts", truncation=True, max_length=2)
    elsewhere = {"transformers": "4.0", "torch": "1.0", "model": "/gone", "prefill_chunk": 1, "backend": "none"}
    for file in (path, other(rewritten(data, lambda m: m["provenance"].update(elsewhere)))):
        with kvkern.load(file, model, tokenizer) as loaded:
            loaded.check()


def test_the_model_saved_in_other_formats_is_still_the_model(book, tmp_path):
    """Sharded safetensors, one file, and a pickle of torch's that only weights are read from; in another process."""
    model, path, _ = book
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    code = """
        import hashlib, os
        import kvkern, torch
        from kvkern.errors import IdentityError
        from kvkern.identity import tensor_bytes
        from test_identity import tiny_tokenizer
        from transformers import AutoModelForCausalLM
        path, folder = sys.argv[1:]
        attention = {"attn_implementation": "kvkern"}
        one, sharded = (
            AutoModelForCausalLM.from_pretrained(os.path.join(folder, name), **attention) for name in ("one", "sharded")
        )
        pickled = AutoModelForCausalLM.from_config(one.config, **attention).eval()
        pickled.load_state_dict(torch.load(os.path.join(folder, "weights.bin"), weights_only=True))
        for model in (one, sharded, pickled):
            with kvkern.load(path, model, tiny_tokenizer()) as loaded:
                print(hashlib.sha256(tensor_bytes(loaded.block())).hexdigest())
        with torch.no_grad():
            pickled.lm_head.weight[5, 7] += 1
        try:
            kvkern.load(path, pickled, tiny_tokenizer())
        except IdentityError as error:
            print(error.field)
    """
    child = run(code, path, tmp_path, stdout=subprocess.PIPE, text=True)
    with store.load(path) as loaded:
        digest = hashlib.sha256(raw(loaded.block())).hexdigest()
    assert child.communicate()[0].split() == [digest, digest, digest, "weights"]


def test_identity_is_checked_before_a_byte_of_kv_is_read(saved, tokenizer, monkeypatch):
    _, path, _ = saved
    header = store.inspect(path)
    read = []
    whole = files.read_into
    monkeypatch.setattr(files, "read_into", lambda *a: read.append(a[3] + len(a[4])) or whole(*a))
    model = tiny_model(rms_norm_eps=1e-5)
    error = refused(path, IdentityError, check=lambda found, where: match(found, model, tokenizer, where=where))
    assert error.field == "architecture.rms_norm_eps" and "in a.kv" in error.found
    assert max(read) <= header.kv_offset


@pytest.mark.parametrize("mmap", [False, True])
def test_a_child_comes_back_below_its_parent_alone(model, tokenizer, tmp_path, mmap):
    root, stranger = publish(model, tokenizer, tokens=40), publish(model, tokenizer, tokens=40, seed=5)
    child = publish(model, tokenizer, tokens=7, parent=root, seed=1)
    store.save(root, tmp_path / "root.kv")
    store.save(child, tmp_path / "child.kv")
    above = store.load(tmp_path / "root.kv", mmap=mmap)

    with store.load(tmp_path / "child.kv", parent=above, mmap=mmap) as loaded:
        assert loaded.position == 40 and loaded.path() == [above, loaded] and above.references == 2
        assert raw(loaded.block()) == raw(child.block())
        match(loaded.identity, model, tokenizer, parent=above, where="child.kv")
    assert above.references == 1

    alone = refused(tmp_path / "child.kv", IdentityError)
    assert alone.field == "ancestors" and "parent" in alone.do and "no parent is given" in alone.needed
    assert refused(tmp_path / "child.kv", IdentityError, parent=stranger).field == "ancestors"
    assert refused(tmp_path / "root.kv", IdentityError, parent=above).field == "ancestors"
    assert above.references == 1 and stranger.references == 1


def test_a_child_at_another_position_is_refused(model, tokenizer, tmp_path):
    root = publish(model, tokenizer, tokens=40)
    child = publish(model, tokenizer, tokens=7, parent=root)
    store.save(child, tmp_path / "child.kv")
    root.position = 3  # a parent whose identity says one thing and whose place another
    assert refused(tmp_path / "child.kv", IdentityError, parent=root).field == "position"


def test_make_fills_what_the_caller_wants(saved):
    prefix, path, _ = saved

    class Book(SharedPrefix):
        title = "none"

    def make(geometry, token_ids, header):
        book = Book(geometry, token_ids)
        book.title = header.provenance["model"]
        return book

    with store.load(path, make=make) as loaded:
        assert isinstance(loaded, Book) and loaded.title == "tiny" and raw(loaded.block()) == raw(prefix.block())


# -- a changed byte ----------------------------------------------------------------------------------------------------


def flipped(data, at):
    changed = bytearray(data)
    changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_byte_of_a_block_is_named(saved, other, mmap):
    prefix, path, data = saved
    offset, item, step = store.inspect(path).kv_offset, prefix.geometry.dtype.itemsize, prefix.segment_tokens
    places = torch.arange(prefix.block().numel()).view(prefix.block().shape) * item
    for layer, which, segment, _ in prefix.blocks():
        view = places[layer, which, :, segment * step : (segment + 1) * step]
        assert num_segments(TOKENS) == 2 and view.numel()
        last, anywhere = int(view.max()) + item - 1, int(random.choice(view.flatten())) + random.randrange(item)
        for at in (int(view.min()), last, anywhere):
            error = refused(other(flipped(data, offset + at)), mmap=mmap)
            assert error.field == f"kv[layer {layer}, {'KV'[which]}, segment {segment}]"
            assert "in other.kv" in error.found


def test_a_flipped_byte_of_the_header_is_refused(saved, other):
    _, path, data = saved
    end = store.inspect(path).kv_offset
    used = len(data[:end].rstrip(b" "))
    places = [*range(12), used - 1, used, end - 1, *(random.randrange(8, used) for _ in range(150))]
    places += [random.randrange(used, end) for _ in range(10)]
    for at in places:
        path = other(flipped(data, at))
        for way in (store.inspect, store.verify, store.load):
            with pytest.raises(StoreError) as caught:
                way(path)
            region = caught.value.field.split(".")[0]
            assert region in ("header", "metadata", "size"), (at, caught.value)


def test_a_flipped_byte_of_the_padding_is_refused_like_any_other(saved, other):
    prefix, path, data = saved
    header = store.inspect(path)
    row_bytes = prefix.padded_tokens * 16 * 4
    for row in range(2 * 2 * 2):
        layer, which, head = row // 4, row // 2 % 2, row % 2
        assert not prefix.block()[layer, which, head, TOKENS:].any()
        at = header.kv_offset + row * row_bytes + random.randrange(TOKENS * 64, row_bytes)
        assert refused(other(flipped(data, at))).field == f"kv[layer {layer}, {'KV'[which]}, segment 1]"


@pytest.mark.full
def test_every_byte_of_the_header_counts(saved, other):
    _, path, data = saved
    for at in range(store.inspect(path).kv_offset):
        with pytest.raises(StoreError) as caught:
            store.inspect(other(flipped(data, at)))
        assert caught.value.field.split(".")[0] in ("header", "metadata", "size"), at


def test_a_flipped_byte_of_the_metadata_is_named(saved, other):
    _, _, data = saved
    at = data.index(b'tiny\\"')
    assert refused(other(data[:at] + b"T" + data[at + 1 :])).field == "metadata"
    at = data.index(b"1000000.0")
    assert refused(other(data[:at] + b"5" + data[at + 1 :])).field == "metadata"


def test_a_flipped_byte_of_the_token_ids_is_named(saved, other):
    _, _, data = saved
    for at in (len(data) - 1, len(data) - 8 * TOKENS, len(data) - 4 * TOKENS):
        assert refused(other(flipped(data, at))).field == "token_ids"
        with pytest.raises(StoreError, match="token_ids"):
            store.verify(other(flipped(data, at)))


def rewritten(data, change):
    """The file with other metadata, its own digest made right again: not damage, a foreign or forged file."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    metadata = json.loads(outer["__metadata__"]["kvkern"])
    change(metadata)
    metadata.pop("sha256")
    metadata["sha256"] = hashlib.sha256(canonical(metadata).encode()).hexdigest()
    outer["__metadata__"]["kvkern"] = canonical(metadata)
    text = canonical(outer).encode()
    size = -(-(8 + len(text)) // 4096) * 4096 - 8
    return size.to_bytes(8, "little") + text.ljust(size) + data[8 + length :]


def test_control_metadata_written_again_is_the_same_file(saved):
    assert rewritten(saved[2], lambda metadata: None) == saved[2]


FORGERIES = {
    "metadata.format": lambda m: m.update(format=3),
    "metadata.identity.layout": lambda m: m["identity"].update(layout=2),
    "metadata.identity.geometry.head_dim": lambda m: m["identity"]["geometry"].update(head_dim=17),
    "metadata.identity.geometry.dtype": lambda m: m["identity"]["geometry"].update(dtype="int8"),
    "metadata.identity.geometry.layers": lambda m: m["identity"]["geometry"].update(layers="two"),
    "metadata.identity.tokens": lambda m: m["identity"].update(tokens=0),
    "metadata.identity.weights": lambda m: m["identity"].pop("weights"),
    "metadata.kv": lambda m: m["kv"].pop(),
    "metadata": lambda m: m.update(sums=["zz"] * 8),
    "header": lambda m: m.update(more=1),
    "token_ids": lambda m: m["identity"].update(token_ids="0" * 64),
    "metadata.sums, kv[layer 0, K, segment 0]": lambda m: m["sums"].__setitem__(0, "0" * 16),
    "kv[layer 1, V, segment 1]": lambda m: m["kv"].__setitem__(7, "0" * 64),
}


@pytest.mark.parametrize("field", FORGERIES)
def test_metadata_that_does_not_fit_is_named(saved, other, field):
    assert refused(other(rewritten(saved[2], FORGERIES[field]))).field == field


@pytest.mark.parametrize(
    ("name", "value"), [("tokens", 10**15), ("layers", 10**15), ("num_kv_heads", 4), ("head_dim", 32)]
)
def test_sizes_that_the_file_does_not_have_are_refused_before_memory_is_asked_for(saved, other, name, value):
    def change(metadata):
        (metadata["identity"] if name == "tokens" else metadata["identity"]["geometry"])[name] = value

    assert refused(other(rewritten(saved[2], change))).field in ("metadata.kv", "header")


# -- no .kv file -------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(saved, other):
    _, path, data = saved
    offset = store.inspect(path).kv_offset
    places = [0, 1, 7, 8, 9, 100, offset - 1, offset, offset + 1, len(data) - 8 * TOKENS, len(data) - 1]
    places += [len(data) * n // 24 for n in range(1, 24)] + [random.randrange(len(data)) for _ in range(20)]
    for size in places:
        for options in ({}, {"mmap": True}):
            assert refused(other(data[:size]), **options).field in ("size", "header")


def test_a_file_with_more_behind_it_is_refused(saved, other):
    assert refused(other(saved[2] + b"\0")).field == "size"


def test_a_file_cut_short_while_it_is_read_is_refused(saved, other, monkeypatch):
    path = other(saved[2])

    def cut(found, where):
        os.truncate(path, store.inspect(path).kv_offset + 5000)

    assert refused(path, check=cut).field == "token_ids"

    path, preadv = other(saved[2]), os.preadv
    header = store.inspect(path)

    def cut_first(fd, buffers, offset):
        # Token ids lie behind kv and are read before it.
        if header.kv_offset <= offset < header.size_bytes - 8 * header.tokens:
            os.truncate(path, header.kv_offset + header.size_bytes // 2)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut_first)
    assert refused(path).field.startswith("kv[layer 1")


STRANGERS = {
    "empty": (b"", "size"),
    "text": (b"This is a handbook.\n" * 500, "header"),
    "a short text": (b"hello", "size"),
    "a huge header": ((1 << 62).to_bytes(8, "little") + b"{}", "header"),
    "a large header": ((200 << 20).to_bytes(8, "little") + b"{}" + b" " * 5000, "header"),
    "no JSON": ((4088).to_bytes(8, "little") + b"[" * 4088, "header"),
    "a list": ((4088).to_bytes(8, "little") + b"[]".ljust(4088), "header"),
    "bytes": ((4088).to_bytes(8, "little") + b"\xff" * 4088, "header"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "header"),
    "another key": ((4088).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}'.ljust(4088), "header"),
    "no object": ((4088).to_bytes(8, "little") + b'{"__metadata__":{"kvkern":"3"}}'.ljust(4088), "metadata"),
    "no text": ((4088).to_bytes(8, "little") + b'{"__metadata__":{"kvkern":3}}'.ljust(4088), "metadata"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_is_refused(other, kind):
    data, field = STRANGERS[kind]
    path = other(data)
    assert refused(path).field == field
    for way in (store.inspect, store.verify):
        with pytest.raises(StoreError):
            way(path)


def test_another_safetensors_file_is_refused(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    error = refused(tmp_path / "model.safetensors")
    assert error.field == "header" and "in model.safetensors" in error.found
    assert error.do == "name a file that kvkern publish wrote"


@pytest.mark.parametrize("kind", ["empty", "text", "a short text", "a pickle", "another key"])
def test_a_stranger_is_told_from_a_damaged_file(other, kind):
    assert refused(other(STRANGERS[kind][0])).do == "name a file that kvkern publish wrote"


@pytest.mark.parametrize("at", [0, 1, 5, 8, 20, 28])
def test_control_a_damaged_header_is_not_taken_for_a_stranger(saved, other, at):
    assert refused(other(flipped(saved[2], at))).do == files.AGAIN


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nothing.kv", tmp_path / "pipe", "/dev/zero", "", "a\0b", tmp_path / ("n" * 300)):
        for way in (store.inspect, store.verify, store.load):
            with pytest.raises(StoreError, match="path: found"):
                way(path)


def test_a_missing_file_says_so(tmp_path):
    assert "No such file" in refused(tmp_path / "nothing.kv").found


# -- a failed load leaves nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_a_failed_load_gives_everything_back(saved, other, model, tokenizer, mmap):
    _, path, data = saved
    made = []

    def make(geometry, token_ids, header):
        made.append(SharedPrefix(geometry, token_ids))
        return made[-1]

    descriptors = len(os.listdir("/proc/self/fd"))
    refused(other(flipped(data, store.inspect(path).kv_offset + 77)), make=make, mmap=mmap)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.load(path, make=make, mmap=mmap, progress=interrupt)
    assert [prefix.released for prefix in made] == [True, True]
    assert not any(prefix.published for prefix in made)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("mmap", [False, True])
def test_a_load_that_fails_at_any_read_leaves_parent_and_pool_as_they_were(
    model, tokenizer, tmp_path, mmap, monkeypatch
):
    root = publish(model, tokenizer, tokens=40)
    with publish(model, tokenizer, tokens=7, parent=root) as child:
        store.save(child, tmp_path / "child.kv")
    pool = PagePool(root.geometry, 4, slots=2)
    slot = pool.acquire_slot()
    pool.reserve(slot, 20)
    descriptors, failing, whole = len(os.listdir("/proc/self/fd")), [0], os.preadv

    def preadv(fd, buffers, offset):
        failing[0] -= 1
        if failing[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for number in range(1, 100):
        failing[0] = number
        try:
            store.load(tmp_path / "child.kv", parent=root, mmap=mmap).release()
        except StoreError as error:
            assert "Input/output error" in error.found
        else:
            break
        assert root.references == 1 and pool.free_pages == 2 and len(os.listdir("/proc/self/fd")) == descriptors
    assert number == (4 if mmap else 12), "a control: header twice, token ids, and each row that is not mapped"
    Plan.make(pool, [AgentRows(slot, root, 1)]).begin()
    root.check()


def test_no_memory_is_an_error_with_a_name(saved):
    def make(geometry, token_ids, header):
        raise OSError(errno.ENOMEM, "no memory")

    assert refused(saved[1], CapacityError, make=make).field == "memory"


def test_a_file_that_is_gone_before_it_is_mapped_is_refused(saved, other):
    path = other(saved[2])
    assert "No such file" in refused(path, mmap=True, check=lambda found, where: path.unlink()).found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_round_trip_over_a_gpu_gives_the_same_bits(saved, model, tokenizer, tmp_path):
    prefix, path, data = saved
    with store.load(path, device="cuda") as loaded:
        assert loaded.block().is_cuda and raw(loaded.block().cpu()) == raw(prefix.block())
        loaded.check()
        store.save(loaded, tmp_path / "b.kv")
    assert (tmp_path / "b.kv").read_bytes() == data
    match(prefix.identity, tiny_model().cuda(), tokenizer, where="a.kv")


def test_mmap_is_for_the_cpu(saved):
    assert refused(saved[1], RequestError, mmap=True, device="meta").field == "mmap"


def test_control_a_block_that_changed_after_the_digests_is_seen(saved):
    """What publish sums is compared with the file's sums: a copy that went wrong on its way to a device."""
    _, path, _ = saved

    class Faulty(SharedPrefix):
        def publish(self, **options):
            self.block()[1, 0, 0, 3, 2] = 1.0
            return super().publish(**options)

    error = refused(path, make=lambda geometry, token_ids, header: Faulty(geometry, token_ids))
    assert error.field == "kv[layer 1, K, segment 0]" and "sum" in error.found


# -- saving: whole or not at all ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_neither_file_nor_remains(saved, tmp_path, monkeypatch):
    prefix = saved[0]
    whole, calls = os.pwrite, []

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(fd, data[: max(1, len(data) // 2)], offset)  # short writes are allowed, too

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.save(prefix, tmp_path / "a.kv")
    assert len(calls) > 5 and os.listdir(tmp_path) == []


def test_short_writes_are_gone_on_with(saved, tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:20_000], offset))
    store.save(saved[0], tmp_path / "a.kv")
    assert (tmp_path / "a.kv").read_bytes() == saved[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreError("x", found=1, needed=2, do="3")])
def test_an_interrupted_save_keeps_the_older_file(saved, tmp_path, error):
    def stop(done, total):
        raise error

    (tmp_path / "a.kv").write_bytes(b"older")
    with pytest.raises(type(error)):
        store.save(saved[0], tmp_path / "a.kv", progress=stop)
    assert os.listdir(tmp_path) == ["a.kv"] and (tmp_path / "a.kv").read_bytes() == b"older"


def test_a_failing_sync_or_rename_leaves_nothing(saved, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreError, match="Input/output error"):
                store.save(saved[0], tmp_path / "a.kv")
        assert os.listdir(tmp_path) == []


def test_file_and_folder_are_synced_around_the_rename(saved, tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    store.save(saved[0], tmp_path / "a.kv")
    assert order[0].endswith(".tmp") and order[1:] == ["rename", str(tmp_path)]


def test_a_killed_save_leaves_the_older_file_or_none(saved, crashes):
    ends, folder = crashes
    for older, name in ((None, "none"), (saved[2], "older")):
        assert ends[f"kill {name}"] == -signal.SIGKILL
        path = folder / name / "a.kv"
        names = os.listdir(path.parent)
        assert path.exists() is (older is not None)
        if older is not None:
            assert path.read_bytes() == older
        remains = [name for name in names if name != "a.kv"]
        assert remains and all(name.startswith(".kvkern-") and name.endswith(".tmp") for name in remains)


@pytest.mark.parametrize("before", ["none", "older"])
def test_a_save_that_is_killed_at_any_step_leaves_the_older_file_or_the_new_one(crashes, before):
    found = crashes[0][f"steps {before}"]
    assert len(found) > 30, "a control: each write, sync, rename, open and close is a step"
    for after, number, end, state, remains in found:
        assert end in (0, -signal.SIGKILL) and state in (before, "newer"), (after, number, state)
        # One killed save leaves one file at most, since each save removes what those before it left.
        assert remains <= 1, (after, number, remains)
        assert (end, state, remains) == (0, "newer", 0) or end, (after, number)
    for after in (False, True):
        states = [state for a, _, _, state, _ in found if a is after]
        assert set(states) == {before, "newer"} and states == sorted(states, key="newer".__eq__), "never back again"
    assert {remains for *_, remains in found} == {0, 1}, "a control: some of them did leave a file"


def test_publish_and_save_may_be_killed_at_any_moment(crashes):
    found = crashes[0]["any moment"]  # after each kill the file was verified, digest by digest
    assert len(found) == 12 and max(found) <= 1


def test_of_two_that_save_to_one_name_one_whole_file_wins_and_a_reader_sees_old_or_new(crashes):
    found = crashes[0]["two writers"]
    assert found["ends"] == [0, 0], "neither takes the other's temporary file for an orphan"
    assert set(found["read"]) <= {"tiny", "newer"} and found["last"][0] in ("older", "newer") and found["last"][1] == 0


def test_a_file_system_that_takes_no_more_leaves_nothing(crashes):
    message, remains = crashes[0]["full"]
    assert message.startswith("path: found File too large at ") and "\n  do: free space" in message and remains == []


def test_orphans_are_removed_and_nothing_else(saved, tmp_path):
    for name in (".kvkern-dead.tmp", ".kvkern-live.tmp", "kvkern-x.tmp", ".kvkern-note", "a.kv.tmp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".kvkern-folder.tmp").mkdir()
    os.mkfifo(tmp_path / ".kvkern-pipe.tmp")
    (tmp_path / ".kvkern-link.tmp").symlink_to(tmp_path / "a.kv.tmp")
    before = set(os.listdir(tmp_path))
    with open(tmp_path / ".kvkern-live.tmp") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        store.save(saved[0], tmp_path / "a.kv")
    assert before - set(os.listdir(tmp_path)) == {".kvkern-dead.tmp"}
    store.save(saved[0], tmp_path / "a.kv")
    assert before - set(os.listdir(tmp_path)) == {".kvkern-dead.tmp", ".kvkern-live.tmp"}


@pytest.mark.parametrize("when", ["before the lock", "with the lock"])
def test_a_new_file_that_is_taken_for_an_orphan_is_written_under_another_name(saved, tmp_path, monkeypatch, when):
    """Another save looks between our open and our lock: before, it has removed the file; or it holds the lock to do so."""
    whole, held = fcntl.flock, []

    def flock(fd, how):
        if not held:
            path = os.readlink(f"/proc/self/fd/{fd}")
            held.append(os.open(path, os.O_RDWR))
            whole(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if when == "before the lock":
                os.unlink(path)
                os.close(held[0])
        whole(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    store.save(saved[0], tmp_path / "a.kv")
    assert held and os.listdir(tmp_path) == ["a.kv"] and (tmp_path / "a.kv").read_bytes() == saved[2]


def test_a_file_system_without_locks_keeps_its_orphans(saved, tmp_path, monkeypatch):
    def none(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".kvkern-0.tmp").write_bytes(b"x")
    store.save(saved[0], tmp_path / "a.kv")
    assert sorted(os.listdir(tmp_path)) == [".kvkern-0.tmp", "a.kv"] and (tmp_path / "a.kv").read_bytes() == saved[2]


def test_a_link_stays_a_link(saved, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.kv").symlink_to(tmp_path / "real" / "a.kv")
    store.save(saved[0], tmp_path / "link.kv")
    assert (tmp_path / "link.kv").is_symlink() and (tmp_path / "real" / "a.kv").read_bytes() == saved[2]


@pytest.mark.parametrize("name", ["missing/a.kv", ".", "a\0b", "n" * 300])
def test_a_path_that_cannot_be_written_is_refused(saved, tmp_path, name):
    with pytest.raises(StoreError, match="path: found"):
        store.save(saved[0], os.path.join(tmp_path, name))
    assert os.listdir(tmp_path) == []


def test_a_file_is_as_open_to_others_as_any_new_file(saved, tmp_path):
    store.save(saved[0], tmp_path / "a.kv")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a.kv").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_a_published_prefix_with_its_identity_is_saved(model, tokenizer, tmp_path):
    geometry, ids = model_geometry(model), torch.arange(5)
    filling, bare, gone = SharedPrefix(geometry, ids), SharedPrefix(geometry, ids), SharedPrefix(geometry, ids)
    stranger, odd = SharedPrefix(geometry, ids), SharedPrefix(geometry, ids)
    bare.publish()
    gone.publish().release()
    stranger.publish(identity=Identity.of(model, tokenizer, ids.flip(0)))
    odd.publish(identity=Identity.of(model, tokenizer, ids), provenance={"model": object()})
    wrong = [(filling, "prefix.identity"), (bare, "prefix.identity"), (stranger, "prefix.identity")]
    for prefix, field in [*wrong, (odd, "provenance.model")]:
        with pytest.raises(RequestError) as caught:
            store.save(prefix, tmp_path / "a.kv")
        assert caught.value.field == field
    with pytest.raises(ReadOnlyError):
        store.save(gone, tmp_path / "a.kv")
    assert os.listdir(tmp_path) == []


def test_more_provenance_than_a_header_may_have_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_HEADER", 4096 - 8)
    with pytest.raises(RequestError, match="provenance: found a header of 4,096 bytes"):
        store.save(saved[0], tmp_path / "a.kv")
    assert os.listdir(tmp_path) == []


def test_a_block_that_changed_in_memory_is_not_saved(model, tokenizer, tmp_path):
    prefix = publish(model, tokenizer, tokens=5)
    damaged = prefix.block().clone()
    damaged.view(torch.int32)[1, 1, 0, 2, 3] ^= 1
    prefix._block = damaged
    with pytest.raises(StoreError, match=r"kv\[layer 1, V, segment 0\]: found a block in memory that changed"):
        store.save(prefix, tmp_path / "a.kv")
    assert os.listdir(tmp_path) == []


# -- read-only for real ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["copy", "mmap"])
def test_a_write_through_the_blocks_pointer_dies(saved, crashes, way):
    assert crashes[0][f"write {way}"] == -signal.SIGSEGV
    assert saved[1].read_bytes() == saved[2]


def test_control_a_read_through_the_blocks_pointer_lives(crashes):
    assert crashes[0]["read copy"] == crashes[0]["read mmap"] == 0
