"""csrc/ through kvkern.cpu: append against a loop in Python, memory that cannot be written, sums of blocks."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvkern import _C, cpu
from kvkern.errors import DeviceError, DtypeError, KvkernError, RequestError, ShapeError

PAGE = 16
NO_PAGE = 2**31 - 1
WORDS = 1 << 64


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, so that NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


# -- K0 ----------------------------------------------------------------------------------------------------------------


class Step:
    """Rows of a few slots, pages between guard bands full of NaN, unused entries of the page table out of range."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, layout: str, *, rows_per_slot: int = 5) -> None:
        self.heads, self.head_dim, self.slots, self.width = 3, 8, 4, 3
        num_pages = self.slots * self.width + 2
        self.num_pages = num_pages
        free = list(range(num_pages))
        rng.shuffle(free)

        self.seq_lens = torch.zeros(self.slots, dtype=torch.int32)
        # Rows of the table lie further apart than its width, and what lies between is out of range too.
        self.page_table = torch.full((self.slots, self.width + 2), NO_PAGE, dtype=torch.int32)[:, : self.width]
        row_slot, row_back = [], []
        for slot in range(self.slots):
            new = rng.randint(1, rows_per_slot)
            length = rng.randint(new, PAGE * self.width)
            self.seq_lens[slot] = length
            for i in range((length + PAGE - 1) // PAGE):
                self.page_table[slot, i] = free.pop()
            row_slot += [slot] * new
            row_back += list(reversed(range(new)))
        order = list(range(len(row_slot)))
        rng.shuffle(order)
        order.insert(rng.randint(0, len(order)), -1)
        self.row_slot = torch.tensor([row_slot[i] if i >= 0 else -1 for i in order], dtype=torch.int32)
        # A padding row's row_back is never looked at.
        self.row_back = torch.tensor([row_back[i] if i >= 0 else NO_PAGE for i in order], dtype=torch.int32)
        self.rows = len(order)

        self.k, self.v = self.numbers(dtype, layout), self.numbers(dtype, layout)
        self.k_store, self.k_pages = self.pages(dtype, layout)
        self.v_store, self.v_pages = self.pages(dtype, layout)

    def numbers(self, dtype: torch.dtype, layout: str) -> Tensor:
        rows, heads, head_dim = self.rows, self.heads, self.head_dim
        if layout == "head-major":
            return torch.randn(rows, heads, head_dim).to(dtype)
        if layout == "token-major":  # a slice of fused q, k and v
            return torch.randn(rows, 4 * heads, head_dim + 5).to(dtype)[:, heads : 2 * heads, 2 : head_dim + 2]
        return torch.randn(heads, 2 * rows, head_dim).to(dtype).transpose(0, 1)[::2]

    def pages(self, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
        shape = {
            "head-major": (self.num_pages, self.heads, PAGE, self.head_dim),
            "token-major": (self.num_pages, PAGE, self.heads, self.head_dim),
            "interleaved": (self.num_pages, 2, self.heads, PAGE, self.head_dim),
        }[layout]
        size = torch.Size(shape).numel()
        guard = 64
        store = torch.full((size + 2 * guard,), float("nan")).to(dtype)
        pages = store[guard : guard + size].view(shape)
        if layout == "token-major":
            return store, pages.transpose(1, 2)
        return store, pages[:, 1] if layout == "interleaved" else pages

    def tensors(self) -> tuple[Tensor, ...]:
        places = (self.page_table, self.seq_lens, self.row_slot, self.row_back)
        return (self.k, self.v, self.k_pages, self.v_pages, *places)

    def expected(self, *, late: int = 0) -> tuple[Tensor, Tensor]:
        """The two stores after the append, by a loop in Python; `late` tokens too far is the control's mistake."""
        stores = []
        for store, view, rows in ((self.k_store, self.k_pages, self.k), (self.v_store, self.v_pages, self.v)):
            copy = store.clone()
            pages = copy.as_strided(view.shape, view.stride(), view.storage_offset())
            for row in range(self.rows):
                slot = int(self.row_slot[row])
                if slot == -1:
                    continue
                position = int(self.seq_lens[slot]) - 1 - int(self.row_back[row]) + late
                page = int(self.page_table[slot, min(position // PAGE, self.width - 1)])
                pages[min(page, self.num_pages - 1), :, position % PAGE] = rows[row]
            stores.append(copy)
        return stores[0], stores[1]


LAYOUTS = ["head-major", "token-major", "interleaved"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_append_writes_what_a_loop_writes_and_nothing_else(rng: random.Random, dtype: torch.dtype, layout: str) -> None:
    for _ in range(5):
        step = Step(rng, dtype, layout)
        k_store, v_store = step.expected()
        cpu.append(*step.tensors())
        assert torch.equal(bits(step.k_store), bits(k_store))
        assert torch.equal(bits(step.v_store), bits(v_store))


def test_control_append_one_token_late_is_caught(rng: random.Random) -> None:
    step = Step(rng, torch.float32, "head-major")
    late, _ = step.expected(late=1)
    cpu.append(*step.tensors())
    assert not torch.equal(bits(step.k_store), bits(late))


def test_append_moves_bits_not_numbers(rng: random.Random) -> None:
    step = Step(rng, torch.float32, "head-major")
    step.k.view(torch.int32).random_(-(2**31), 2**31 - 1)  # NaN of every payload, denormals, infinities
    k_store, _ = step.expected()
    cpu.append(*step.tensors())
    assert torch.equal(bits(step.k_store), bits(k_store))


def test_append_of_padding_rows_alone_and_of_no_rows_writes_nothing(rng: random.Random) -> None:
    step = Step(rng, torch.float32, "head-major")
    before = bits(step.k_store).clone()
    step.row_slot.fill_(-1)
    cpu.append(*step.tensors())
    step.row_slot, step.row_back = step.row_slot[:0], step.row_back[:0]
    step.k, step.v = step.k[:0], step.v[:0]
    cpu.append(*step.tensors())
    assert torch.equal(bits(step.k_store), before)


def test_append_reaches_pages_beyond_32_bits() -> None:
    apart = (2**31 + 4096) // 4  # page 2 starts past 4 GiB
    store, _mapping = cpu.map_tensor((2 * apart + PAGE * 4,), torch.float32)  # never touched, so never there
    pages = store.as_strided((3, 1, PAGE, 4), (apart, PAGE * 4, 4, 1))
    ones = torch.ones(1, 1, 4)
    int32 = {"dtype": torch.int32}
    table, lens = torch.tensor([[2]], **int32), torch.tensor([PAGE], **int32)
    rows = (table, lens, torch.zeros(1, **int32), torch.zeros(1, **int32))
    cpu.append(ones, ones, pages, pages, *rows)
    assert pages[2, 0].sum() == 4 and torch.equal(pages[2, 0, -1], ones[0, 0])
    assert pages[:2].sum() == 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s.row_slot.__setitem__(-1, s.slots), r"row_slot of row \d+: found 4, needed -1 to 3"),
        (lambda s: s.row_slot.__setitem__(-1, -2), r"row_slot of row \d+: found -2"),
        (lambda s: s.row_slot.__setitem__(-1, -(2**31)), r"row_slot of row \d+: found -2147483648"),
        (lambda s: s.row_back.__setitem__(-1, NO_PAGE), r"suffix position of row \d+: found -\d+, needed 0 to 47"),
        (lambda s: s.row_back.__setitem__(-1, -(2**31)), r"suffix position of row \d+: found 2147\d+"),
        (lambda s: s.seq_lens.fill_(0), r"suffix position of row \d+: found -"),
        (lambda s: s.seq_lens.fill_(PAGE * 3 + 9), r"suffix position of row \d+: found \d+, needed 0 to 47"),
        (lambda s: s.page_table.fill_(NO_PAGE), r"page of row \d+: found 2147483647, needed 0 to 13"),
        (lambda s: s.page_table.fill_(-1), r"page of row \d+: found -1"),
    ],
)
def test_a_row_that_lies_nowhere_is_refused_before_any_write(rng: random.Random, break_it, message: str) -> None:
    step = Step(rng, torch.float32, "head-major")
    step.row_slot[-1], step.row_back[-1] = 0, 0  # the last row is no padding
    before = bits(step.k_store).clone(), bits(step.v_store).clone()
    break_it(step)
    with pytest.raises(IndexError, match=message):
        cpu.append(*step.tensors())
    assert torch.equal(bits(step.k_store), before[0])
    assert torch.equal(bits(step.v_store), before[1])


@pytest.mark.parametrize(
    ("field", "change", "error"),
    [
        ("v", lambda t: t.double(), DtypeError),
        ("k_pages", lambda t: t.half(), DtypeError),
        ("page_table", lambda t: t.long(), DtypeError),
        ("seq_lens", lambda t: t.float(), DtypeError),
        ("row_back", lambda t: t.to(torch.int16), DtypeError),
        ("v", lambda t: t[:, :-1], ShapeError),
        ("k_pages", lambda t: t[:, :-1], ShapeError),
        ("v_pages", lambda t: t[:-1], ShapeError),
        ("k_pages", lambda t: t[:, :, :0], ShapeError),
        ("seq_lens", lambda t: t[:-1], ShapeError),
        ("row_slot", lambda t: t[:-1], ShapeError),
        ("row_back", lambda t: t[None], ShapeError),
        ("page_table", lambda t: t[0], ShapeError),
        ("k", lambda t: t[0], ShapeError),
        ("k", lambda t: torch.stack([t, t], -1)[..., 0], ShapeError),
        ("v_pages", lambda t: torch.stack([t, t], -1)[..., 0], ShapeError),
        ("seq_lens", lambda t: torch.stack([t, t], -1)[..., 0], ShapeError),
        ("page_table", lambda t: t.t().contiguous().t(), ShapeError),
        ("v_pages", lambda t: t.to("meta"), DeviceError),
        ("row_slot", lambda t: t.to("meta"), DeviceError),
    ],
)
def test_append_names_the_tensor_that_does_not_fit(rng: random.Random, field: str, change, error: type) -> None:
    names = ("k", "v", "k_pages", "v_pages", "page_table", "seq_lens", "row_slot", "row_back")
    tensors = dict(zip(names, Step(rng, torch.float32, "head-major").tensors(), strict=True))
    tensors[field] = change(tensors[field])
    with pytest.raises(error) as caught:
        cpu.append(**tensors)
    assert isinstance(caught.value, KvkernError)
    assert field in caught.value.field


def raw_append(**changes: object) -> None:
    numbers, places = torch.zeros(64), torch.zeros(4, dtype=torch.int32)
    arguments: dict[str, object] = {name: numbers.data_ptr() for name in ("k", "v", "k_pages", "v_pages")}
    arguments |= {name: places.data_ptr() for name in ("page_table", "seq_lens", "row_slot", "row_back")}
    arguments |= {"rows": 1, "num_kv_heads": 1, "row_bytes": 4, "k_strides": (4, 4), "v_strides": (4, 4)}
    arguments |= {"k_page_strides": (4, 4, 4), "v_page_strides": (4, 4, 4), "num_pages": 1, "page_tokens": 16}
    arguments |= {"slots": 1, "table_width": 1, "table_stride": 1}
    _C.append(**(arguments | changes))


@pytest.mark.parametrize("field", ["k", "v", "k_pages", "v_pages", "page_table", "seq_lens", "row_slot", "row_back"])
def test_a_null_pointer_is_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found address 0"):
        raw_append(**{field: 0})


@pytest.mark.parametrize(
    "field", ["rows", "num_kv_heads", "row_bytes", "num_pages", "slots", "table_width", "page_tokens"]
)
def test_a_negative_size_is_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found -1"):
        raw_append(**{field: -1})


@pytest.mark.parametrize(
    "changes", [{"k": -1}, {"k": "x"}, {"rows": 1.5}, {"k_strides": (1,)}, {"rows": 2**70}], ids=str
)
def test_what_is_no_address_or_size_is_a_type_error(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        raw_append(**changes)


# -- protected memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 4095, 4096, 4097, (2 << 20) - 1, 2 << 20, (6 << 20) + 4096])
def test_a_mapping_is_zero_writable_and_as_large_as_asked(size: int) -> None:
    mapping = _C.Mapping(size)
    assert mapping.size == size and not mapping.protected
    assert mapping.address % (2 << 20 if size >= 2 << 20 else 4096) == 0
    view = memoryview(mapping)
    assert view.nbytes == size and not view.readonly
    assert not any(view[:64]) and not any(view[-64:])
    view[0], view[-1] = 1, 255
    assert bytes(memoryview(mapping)[-1:]) == b"\xff"


def test_a_mapped_tensor_outlives_the_name_of_its_mapping_and_then_is_unmapped() -> None:
    tensor, mapping = cpu.map_tensor((3, 5, 1 << 18), torch.bfloat16)
    assert tensor.data_ptr() == mapping.address and tensor.shape == (3, 5, 1 << 18)
    address = mapping.address
    part = tensor[1].fill_(2)
    del tensor, mapping
    gc.collect()
    assert part.sum(dtype=torch.float64) == 2 * part.numel()

    def mapped() -> bool:
        spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)

    if Path("/proc/self/maps").exists():
        assert mapped()
        del part
        gc.collect()
        assert not mapped()


def test_many_mappings_leave_no_memory_behind() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc")
    before = resident()
    for _ in range(64):
        cpu.map_tensor((1 << 20,), torch.float32)[0].fill_(1)  # 4 MiB
    assert resident() - before < 64 << 20


def test_protect_closes_the_buffer_to_writers_and_reading_goes_on(recwarn: pytest.WarningsRecorder) -> None:
    tensor, mapping = cpu.map_tensor((1024,), torch.float32)
    tensor.fill_(3)
    mapping.protect()
    mapping.protect()  # twice is once
    assert mapping.protected and memoryview(mapping).readonly
    assert tensor.sum() == 3 * 1024
    with pytest.raises(TypeError):
        memoryview(mapping)[0] = 1
    assert not recwarn.list


# In a child: the write is meant to kill it. Loaded by path, so that it needs neither torch nor the package.
CHILD = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
mode, path = sys.argv[2:]
mapping = _C.Mapping.map_file(path, 4096, 4096) if mode == "file" else _C.Mapping(1 << 22)
before = memoryview(mapping)
if mode in ("pointer", "view"):
    mapping.protect()
print(before[0], flush=True)
if mode == "view":
    before[len(before) - 1] = 1
else:
    ctypes.memset(mapping.address + mapping.size - 1, 1, 1)
print("survived", flush=True)
"""


@pytest.mark.parametrize("mode", ["pointer", "view", "file", "unprotected"])
def test_a_write_to_protected_memory_kills_the_process(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, _C.__file__, mode, str(path)], capture_output=True, text=True, timeout=60
    )
    if mode == "unprotected":  # the control: the same write where it is allowed
        assert (child.returncode, child.stdout) == (0, "0\nsurvived\n"), child.stderr
    else:
        assert (child.returncode, child.stdout) == (-signal.SIGSEGV, "0\n"), child.stderr
    assert path.read_bytes() == bytes(8192)


def test_a_write_through_a_protected_tensor_kills_the_process() -> None:
    code = """
import torch
from kvkern import cpu
tensor, mapping = cpu.map_tensor((2, 4096), torch.float32)
tensor.fill_(1)
mapping.protect()
print(int(tensor.sum()), flush=True)
tensor[1, 17] = 5
print("survived", flush=True)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout) == (-signal.SIGSEGV, "8192\n"), child.stderr


@pytest.mark.parametrize("size", [0, -1, -(2**63), 2**63 - 1])
def test_a_mapping_of_no_possible_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size_bytes: found {size}, needed 1 to"):
        _C.Mapping(size)


def test_a_mapping_too_large_for_the_machine_says_so() -> None:
    with pytest.raises(OSError, match="mmap of 281474976710656 bytes: Cannot allocate memory") as caught:
        _C.Mapping(1 << 48)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(OSError, match="mmap"):
        cpu.map_tensor((1 << 23, 1 << 23), torch.float32)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5), (-1, 4)])
def test_a_tensor_of_no_elements_is_not_mapped(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="shape: found"):
        cpu.map_tensor(shape, torch.float32)


def test_a_file_is_mapped_from_its_offset(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "naïve name"
    numbers = torch.randn(4096 // 4 + 700)
    path.write_bytes(bytes(4096) + numbers.numpy().tobytes())
    tensor, mapping = cpu.map_file(path, 4096, (2, 862), torch.float32)
    assert torch.equal(tensor.flatten(), numbers) and mapping.protected and mapping.size == 4 * 1724
    del mapping
    gc.collect()
    path.unlink()
    assert torch.equal(tensor.flatten(), numbers)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (100, 8, "offset: found 100, needed a multiple of 4096"),
        (-4096, 8, "offset: found -4096"),
        (0, 8193, "found 8192 bytes, needed 8193 from offset 0"),
        (4096, 4097, "found 8192 bytes, needed 4097 from offset 4096"),
        (12288, 1, "found 8192 bytes, needed 1 from offset 12288"),
        (2**62, 2**62, "found 8192 bytes, needed"),
        (0, 0, "size_bytes: found 0"),
    ],
)
def test_a_range_that_the_file_does_not_have_is_refused(tmp_path: Path, offset: int, size: int, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with pytest.raises(ValueError, match=message):
        _C.Mapping.map_file(str(path), offset, size)
    if size:
        with pytest.raises(RequestError, match="file range: found"):
            cpu.map_file(path, offset, (size,), torch.uint8)


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"open of .*absent: No such file or directory"):
        cpu.map_file(tmp_path / "absent", 0, (1,), torch.uint8)
    with pytest.raises(RequestError, match="no regular file"):
        cpu.map_file(tmp_path, 0, (1,), torch.uint8)
    with pytest.raises(ValueError, match="path: found a NUL byte"):
        _C.Mapping.map_file("/etc/passwd\0.kv", 0, 1)
    for _ in range(2000):  # more than a process may have open: a failed map leaves no descriptor
        with pytest.raises(ValueError):
            _C.Mapping.map_file(sys.executable, 0, 2**60)


# -- the sum of a block ------------------------------------------------------------------------------------------------


def sum_by_hand(data: bytes, start_word: int = 0) -> int:
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum(w * (((i + start_word) * 0x9E3779B97F4A7C15 % WORDS) | 1) for i, w in enumerate(words)) % WORDS


def random_words(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64)


@pytest.mark.parametrize("start", [0, 1, 12345, 2**31, 2**63 - 2, 2**63, 2**64 - 3])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 257])
def test_the_sum_is_the_same_by_hand_in_cpp_and_in_torch(rng: random.Random, count: int, start: int) -> None:
    words = random_words(count)
    by_hand = sum_by_hand(words.numpy().tobytes(), start)
    assert cpu.block_sum(words, start_word=start) == by_hand
    assert cpu.block_sum_torch(words, start_word=start) == by_hand


@pytest.mark.parametrize("count", [(1 << 19) - 1, (1 << 20) + 3, 3 << 20])
def test_the_sum_over_many_threads_is_the_sum_of_its_parts(rng: random.Random, count: int) -> None:
    words = random_words(count)
    whole = cpu.block_sum(words)
    cut = rng.randrange(count)
    assert whole == (cpu.block_sum(words[:cut]) + cpu.block_sum(words[cut:], start_word=cut)) % WORDS
    assert whole == cpu.block_sum_torch(words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_the_sum_of_a_view_is_that_of_its_copy(rng: random.Random, dtype: torch.dtype) -> None:
    block = torch.randn(2, 2, 3, 256, 8).mul(50).to(dtype)
    views = [block[1, 0, :, 128:200], block[:, 1], block[..., ::2], block.transpose(2, 3), block[0, 0, 1].t()]
    for view in [*views, block[:0], block[0, 0, 0, 0]]:
        by_hand = sum_by_hand(bits(view).numpy().tobytes())
        assert cpu.block_sum(view) == by_hand
        assert cpu.block_sum_torch(view) == by_hand


def test_sums_of_several_blocks_are_those_of_each(rng: random.Random) -> None:
    blocks = [(random_words(rng.randrange(1, 50)), rng.choice([0, 7, 2**63 - 3, 2**64 - 1])) for _ in range(20)]
    each = [cpu.block_sum(words, start_word=start) for words, start in blocks]
    assert cpu.block_sums(blocks) == each and cpu.block_sums([]) == []
    # As they are read back from a GPU, in one tensor.
    together = torch.stack([cpu._sum_where_it_lies(words, start) for words, start in blocks])
    assert [value % WORDS for value in together.tolist()] == each


def test_every_flipped_bit_and_every_swap_changes_the_sum(rng: random.Random) -> None:
    words = random_words(1000)
    whole = cpu.block_sum(words)
    for _ in range(300):
        where, bit = rng.randrange(1000), rng.randrange(64)
        changed = words.clone()
        changed[where] ^= (1 << bit) - (WORDS if bit == 63 else 0)
        assert cpu.block_sum(changed) != whole, (where, bit)
        # Anywhere, and next to it: words of one group of four are summed side by side.
        for other in (rng.choice([i for i in range(1000) if i != where]), where ^ 1, where ^ 2, where ^ 3):
            changed = words.clone()
            changed[[where, other]] = words[[other, where]]
            assert cpu.block_sum(changed) != whole, (where, other)


def test_control_a_sum_without_positions_misses_a_swap() -> None:
    words = random_words(10)
    swapped = words.flip(0)
    assert words.sum() == swapped.sum()
    assert cpu.block_sum(words) != cpu.block_sum(swapped)


def test_a_part_of_a_word_and_no_address_are_refused() -> None:
    with pytest.raises(ShapeError, match="block: found 12 bytes, needed a multiple of 8"):
        cpu.block_sum(torch.zeros(3))
    with pytest.raises(ValueError, match="size_bytes: found 9, needed a multiple of 8"):
        _C.block_sum(torch.zeros(4).data_ptr(), 9)
    with pytest.raises(ValueError, match="size_bytes: found -8"):
        _C.block_sum(torch.zeros(4).data_ptr(), -8)
    with pytest.raises(ValueError, match="address: found address 0"):
        _C.block_sum(0, 8)
    assert _C.block_sum(0, 0) == 0


@pytest.mark.parametrize("work", ["sum", "append", "none"])
def test_other_threads_run_while_csrc_works(rng: random.Random, work: str) -> None:
    step, words = Step(rng, torch.float32, "head-major"), random_words(1 << 16)
    gate, ran = threading.Lock(), []

    def wait() -> None:
        with gate:
            ran.append(1)

    interval = sys.getswitchinterval()
    gate.acquire()
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        sys.setswitchinterval(100)  # nobody takes the interpreter's lock from here on: it has to be given
        gate.release()
        for _ in range(20_000):
            if work == "sum":
                cpu.block_sum(words)
            elif work == "append":
                cpu.append(*step.tensors())
            if ran:
                break
        assert bool(ran) == (work != "none")  # none: the control
    finally:
        sys.setswitchinterval(interval)
        thread.join()
