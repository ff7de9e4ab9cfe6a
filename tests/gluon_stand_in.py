"""What a Gluon kernel for Hopper does, in numpy: the kernel's own source, run by a seeded scheduler that is out to break it.

Each partition of warp_specialize in each program is a thread. One of all runs at a time; at every operation that synchronises,
the scheduler draws who goes on, some of them rarely. What hardware leaves open is drawn too, or at its worst:

    a TMA copy     ends late and in any order, some only when nothing else can go on; until then its buffer is NaN
    a wgmma        reads shared memory, and writes its accumulator, at the wait for it
    shared memory  starts as NaN; so may global memory

A Fault is raised for

    a deadlock; a barrier used before init; more arrivals than a barrier counts, or two by one partition in a phase
    a buffer read while its copy is under way, or by a partition that has not waited for that copy, or before a fence
    a buffer written while a wgmma may read it: that the barriers order the two is required, not that they happen to be so
    a descriptor made where that of a copy lies, without a wait for the copy; an accumulator used before its wait
    a load, store or copy outside its array; an element stored by two partitions
    work that a partition leaves under way at its end

Not modelled: layouts, proxies and fences beyond the one above, divergence inside a warpgroup, time, and the tensor cores' bits.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import random
import sys
import threading
from collections.abc import Callable
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np

LAZY = 0.3
"""Share of copies that end only when nothing else can go on: else a barrier too weak is seldom seen."""


class Fault(AssertionError):
    """What the kernel did and must not."""


class _Stopped(BaseException):
    """Unwinds the other threads after a fault."""


# -- values ------------------------------------------------------------------------------------------------------------


class Value(np.ndarray):
    """A tensor or a scalar in registers. Integers wrap as theirs do; bf16 is fp32 that holds a bf16's value."""

    def to(self, kind: Any) -> Any:
        return kind.cast(self)

    def __iadd__(self, other: Any) -> Value:
        return self + other


def value(x: Any, dtype: Any = None) -> Value:
    return np.asarray(x, dtype).view(Value)


class Kind:
    """An element type: how numpy holds it, and how a value becomes one."""

    def __init__(self, name: str, held: Any, size: int) -> None:
        self.name, self.held, self.size = name, np.dtype(held), size

    def cast(self, x: Any) -> Value:
        if self.name != "bfloat16":
            return value(np.asarray(x).astype(self.held))
        x = np.ascontiguousarray(x, np.float32)
        bits = x.view(np.uint32)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return value(np.where(np.isnan(x), x, even.view(np.float32)))


KINDS = {
    name: Kind(name, held, size)
    for name, held, size in [
        ("float32", np.float32, 4),
        ("bfloat16", np.float32, 2),
        ("float16", np.float16, 2),
        ("int32", np.int32, 4),
        ("int64", np.int64, 8),
    ]
}


class PointerKind:
    def __init__(self, machine: Machine, element: Kind) -> None:
        self.machine, self.element_ty = machine, element

    def cast(self, address: Any) -> Pointer:
        array = self.machine.addresses.get(int(address))
        return Pointer(self.machine, self.element_ty, array, 0)


class Pointer:
    """An array of global memory, and an offset or a tensor of offsets into it."""

    def __init__(self, machine: Machine, element: Kind, array: Array | None, offset: Any) -> None:
        self.machine, self.element, self.array, self.offset = machine, element, array, offset

    @property
    def dtype(self) -> PointerKind:
        return PointerKind(self.machine, self.element)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.machine, self.element, self.array, self.offset + offset)

    def places(self, mask: Any) -> tuple[Array, np.ndarray, np.ndarray]:
        """(array, offsets with 0 where masked off, mask); every element that is touched lies in the array."""
        offsets = np.asarray(self.offset)
        mask = np.broadcast_to(np.asarray(True if mask is None else mask), offsets.shape)
        if self.array is None:
            raise Fault("global memory: an address that is no array's")
        touched = offsets[mask]
        if touched.size and not (touched.min() >= 0 and touched.max() < self.array.data.size):
            raise Fault(f"global memory: {touched.min()} to {touched.max()} of {self.array.data.size} elements")
        return self.array, np.where(mask, offsets, 0), mask


class Array:
    """Global memory: the elements, and which partition stored each."""

    def __init__(self, data: np.ndarray) -> None:
        assert data.flags.c_contiguous
        self.data = data.reshape(-1)
        self.owner: np.ndarray | None = None


# -- shared memory, barriers, tensor cores -----------------------------------------------------------------------------


class Buffer:
    """A tile of shared memory, and what is under way in it."""

    def __init__(self, kind: Kind, shape: tuple[int, ...], layout: Any) -> None:
        self.dtype, self.layout = kind, layout
        self.data = np.full(shape, np.nan, np.float32)
        self.copying = self.reading = 0
        self.unfenced = False
        self.source: tuple[Barrier, int] | None = None
        self.writer: Partition | None = None
        self.reads: dict[Partition, int] = {}

    machine: Machine

    def permute(self, order: tuple[int, int]) -> View:
        assert order == (1, 0)
        return View(self, True)

    def store(self, x: Any) -> None:
        self.machine.pause()
        self.written_by(self.machine.current, "stored")
        self.data = np.asarray(self.dtype.cast(x), np.float32)
        self.unfenced, self.source, self.writer = True, None, self.machine.current
        self.machine.current.stored.append(self)

    def load(self, layout: Any) -> Value:
        """What this partition stored. That no barrier is asked for is right only where a thread loads what it stored itself."""
        self.machine.pause()
        mine = self.machine.current
        if self.writer is not mine:
            raise Fault(f"{mine.name}: loads from a buffer that it has not stored to")
        return value(self.data)

    def written_by(self, partition: Partition, how: str) -> None:
        if self.copying:
            raise Fault(f"{partition.name}: a buffer is {how} while a copy into it is under way")
        if self.reading:
            raise Fault(f"{partition.name}: a buffer is {how} while a wgmma reads it")
        for reader, time in self.reads.items():
            if reader is not partition and partition.clock.get(reader, -1) < time:
                raise Fault(
                    f"{partition.name}: a buffer is {how}, and nothing has said that {reader.name} is done with it"
                )
        self.reads = {}

    def read_by(self, partition: Partition) -> None:
        if self.copying:
            raise Fault(f"{partition.name}: a buffer is read while a copy into it is under way")
        if self.unfenced:
            raise Fault(f"{partition.name}: a buffer is read after a store, without a fence between")
        if self.source is not None and partition.seen.get(self.source[0], 0) <= self.source[1]:
            raise Fault(f"{partition.name}: a buffer is read without a wait for its copy")


class View:
    def __init__(self, buffer: Buffer, transposed: bool) -> None:
        self.buffer, self.transposed = buffer, transposed


class Ring:
    def __init__(self, parts: list[Any], layout: Any) -> None:
        self.parts, self.layout = parts, layout

    def index(self, n: Any) -> Any:
        if not 0 <= int(n) < len(self.parts):
            raise Fault(f"shared memory: buffer {int(n)} of {len(self.parts)}")
        return self.parts[int(n)]


class Barrier:
    def __init__(self) -> None:
        self.count: int | None = None
        self.arrived: list[Partition] = []
        self.bytes = self.completed = 0
        self.clock: dict[Partition, int] = {}
        self.published: dict[Partition, int] = {}

    def used(self) -> int:
        if self.count is None:
            raise Fault("a barrier is used before its init")
        return self.count

    def arrive(self, partition: Partition) -> None:
        if partition in self.arrived or len(self.arrived) == self.used():
            raise Fault(f"{partition.name}: arrives once too often in phase {self.completed} of a barrier")
        self.arrived.append(partition)
        # What this partition did until now is before what follows a wait for this phase.
        partition.clock[partition] = partition.time
        partition.time += 1
        for name, time in partition.clock.items():
            self.clock[name] = max(time, self.clock.get(name, -1))

    def turn(self) -> None:
        if len(self.arrived) == self.used() and self.bytes == 0:
            self.arrived = []
            self.completed += 1
            self.published = dict(self.clock)

    def passes(self, parity: int) -> bool:
        return self.completed & 1 != parity


class Slot:
    """Memory of a descriptor: one for each place in the source that makes one."""

    def __init__(self) -> None:
        self.copies: list[tuple[Barrier, int]] = []
        self.content: tuple[Pointer, list[int], list[int]] | None = None


class Copy:
    def __init__(
        self, program: int, slot: Slot, first: list[int], barrier: Barrier, buffer: Buffer, lazy: bool
    ) -> None:
        self.program, self.slot, self.first, self.lazy = program, slot, first, lazy
        self.barrier, self.buffer = barrier, buffer

    def end(self) -> None:
        """The descriptor and what it describes are read only now."""
        assert self.slot.content is not None
        pointer, (rows, columns), block = self.slot.content
        first, second = self.first
        if second != 0 or block[1] != columns or first < 0:
            raise Fault("a copy of a tile that is not whole rows")
        tile = np.zeros(block, np.float32)
        inside = max(0, min(block[0], rows - first))
        if inside:
            whole = pointer + (first * columns + np.arange(inside * columns).reshape(inside, columns))
            array, offsets, _ = whole.places(None)
            tile[:inside] = array.data[offsets]
        self.buffer.data = tile
        self.buffer.copying -= 1
        self.barrier.bytes -= tile.size * self.buffer.dtype.size
        self.barrier.turn()


class Product:
    """A wgmma under way. It is no tensor: whatever is done with it but a wait is a fault."""

    def __init__(self, a: Any, b: View, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.buffers = [x.buffer if isinstance(x, View) else x for x in (a, b) if not isinstance(x, Value)]
        self.result: Value | None = None

    def end(self, partition: Partition) -> None:
        for buffer in self.buffers:
            buffer.reading -= 1
            buffer.read_by(partition)
            buffer.reads[partition] = partition.time
        a = np.asarray(self.a.data if isinstance(self.a, Buffer) else self.a, np.float32)
        b = self.b.buffer.data.T if self.b.transposed else self.b.buffer.data
        self.result = value(a @ b if self.acc is None else np.asarray(self.acc) + a @ b)

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"an accumulator is used before the wait for it: {name}")

    def _early(self, *_: Any) -> Any:
        raise Fault("an accumulator is used before the wait for it")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __getitem__ = __array__ = _early


# -- the scheduler -----------------------------------------------------------------------------------------------------


def _always() -> bool:
    return True


class Partition:
    def __init__(self, number: int, program: int, name: str, call: Callable[[], None], weight: float) -> None:
        self.number, self.program, self.name, self.call, self.weight = number, program, name, call, weight
        self.lock = threading.Lock()
        self.lock.acquire()
        self.ready: Callable[[], bool] = _always
        self.products: list[Product] = []
        self.stored: list[Buffer] = []
        self.slots: dict[int, Slot] = {}
        # Completed phases of a barrier that a wait has shown; what is known of others' time; own time.
        self.seen: dict[Barrier, int] = {}
        self.clock: dict[Partition, int] = {}
        self.time = 0


class Machine:
    """Global memory and one launch."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.addresses: dict[int, Array] = {}
        self.partitions: list[Partition] = []
        self.copies: list[Copy] = []
        self.failure: BaseException | None = None
        self.programs = 0
        self.switches = 0

    def pointer(self, data: np.ndarray, kind: str) -> Pointer:
        assert data.dtype == KINDS[kind].held
        return Pointer(self, KINDS[kind], Array(data), 0)

    def address(self, data: np.ndarray) -> int:
        """An address under which a kernel finds this array."""
        found = (len(self.addresses) + 1) << 40
        self.addresses[found] = Array(data)
        return found

    def launch(self, text: str, kernel: str, programs: int, *args: Any, **constants: int) -> None:
        """Run a kernel of this source text. Raises Fault for what it must not do, and whatever its code raises."""
        namespace = Names(self).of_module()
        exec(_code(text), namespace)
        # Constants that are not given are the module's own.
        own = {n: namespace[n] for n in inspect.signature(namespace[kernel]).parameters if n in namespace}
        self.programs = programs
        for program in range(programs):
            self.current = Partition(-1, program, f"program {program}", lambda: None, 1.0)
            with np.errstate(all="ignore"):
                namespace[kernel](*args, **own | constants)
        self.run()

    def run(self) -> None:
        threads = [threading.Thread(target=self._body, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        self._hand_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pause(self, ready: Callable[[], bool] = _always) -> None:
        """Let the scheduler draw who goes on; back here when it is this partition's turn, and it is ready."""
        mine = self.current
        mine.ready = ready
        if self._choose() is mine:
            return
        self.current.lock.release()
        mine.lock.acquire()
        if self.failure is not None:
            raise _Stopped

    def _choose(self) -> Partition:
        """Ends copies until a partition is drawn; it is `current` then."""
        while True:
            self.switches += 1
            ready: list[Any] = [p for p in self.partitions if p.ready()]
            eager = [c for c in self.copies if not c.lazy]
            options = ready + eager or self.copies
            if not options:
                waiting = ", ".join(p.name for p in self.partitions)
                raise Fault(f"deadlock: {waiting} wait, and nothing is under way")
            weights = [p.weight for p in ready] + [0.5] * len(eager)
            chosen = self.random.choices(options, weights or None)[0]
            if isinstance(chosen, Partition):
                self.current = chosen
                return chosen
            self.copies.remove(chosen)
            chosen.end()

    def _body(self, partition: Partition) -> None:
        partition.lock.acquire()
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):
                    partition.call()
                if partition.products:
                    raise Fault(f"{partition.name} ends while a wgmma is under way")
                self.partitions.remove(partition)
                if not any(p.program == partition.program for p in self.partitions) and any(
                    c.program == partition.program for c in self.copies
                ):
                    raise Fault(f"program {partition.program} ends while a copy is under way")
                if self.partitions:
                    self._hand_on()
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = error
            for other in self.partitions:
                if other is not partition:
                    other.lock.release()

    def _hand_on(self) -> None:
        self._choose().lock.release()


# -- the names of the language -----------------------------------------------------------------------------------------


class Names:
    """gl, tma, mbarrier and the rest, as a module that imports them sees them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def of_module(self) -> dict[str, Any]:
        gluon = SimpleNamespace(jit=lambda f=None, **_: f if f is not None else lambda g: g)
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: "mbarrier", init=self.init, wait=self.wait, arrive=self.arrive, expect=self.expect
        )
        tma = SimpleNamespace(
            make_tensor_descriptor=self.make_tensor_descriptor,
            async_copy_global_to_shared=self.async_copy_global_to_shared,
        )
        gl = SimpleNamespace(
            **KINDS,
            constexpr=int,
            NVMMADistributedLayout=lambda *a, **k: "registers",
            NVMMASharedLayout=lambda *a, **k: "shared",
            SwizzledSharedLayout=lambda *a, **k: "swizzled",
            SliceLayout=lambda *a: "slice",
            BlockedLayout=lambda *a: "blocked",
            DotOperandLayout=lambda *a: "operand",
            program_id=lambda axis: self.machine.current.program,
            num_programs=lambda axis: self.machine.programs,
            static_range=range,
            arange=lambda a, b, layout: value(np.arange(a, b, dtype=np.int32)),
            zeros=lambda shape, kind, layout: value(np.zeros(shape, kind.held)),
            full=lambda shape, x, kind, layout: value(np.full(shape, x, kind.held)),
            where=lambda c, a, b: value(np.where(c, *_alike(a, b))),
            minimum=lambda a, b: value(np.minimum(a, b)),
            maximum=lambda a, b: value(np.fmax(a, b)),
            max=lambda a, axis: value(np.fmax.reduce(a, axis)),
            sum=lambda a, axis: value(np.sum(np.asarray(a), axis, dtype=np.float32)),
            exp2=lambda a: value(np.exp2(a)),
            fma=_fma,
            convert_layout=lambda a, layout: a,
            load=self.load,
            store=self.store,
            allocate_shared_memory=self.allocate_shared_memory,
            warp_specialize=self.warp_specialize,
        )
        return {
            "gluon": gluon,
            "gl": gl,
            "tma": tma,
            "mbarrier": mbarrier,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
            "fence_async_shared": self.fence_async_shared,
            "range": lambda *ends: (value(n, np.int32) for n in range(*map(int, ends))),
            "math": math,
        }

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
        array, offsets, mask = pointer.places(mask)
        found = array.data[offsets]
        return value(found if other is None else np.where(mask, found, np.asarray(other, found.dtype)))

    def store(self, pointer: Pointer, x: Any, mask: Any = None) -> None:
        array, offsets, mask = pointer.places(mask)
        if array.owner is None:
            array.owner = np.full(array.data.size, -1, np.int16)
        me = self.machine.current.number
        places = offsets[mask]
        if (~np.isin(array.owner[places], (-1, me))).any():
            raise Fault(f"{self.machine.current.name}: stores where another partition has stored")
        array.owner[places] = me
        array.data[places] = np.broadcast_to(np.asarray(x), offsets.shape)[mask]

    def allocate_shared_memory(self, kind: Kind, shape: list[int], layout: Any) -> Any:
        if layout == "mbarrier":
            return Ring([Barrier() for _ in range(shape[0])], layout)
        parts = [Buffer(kind, tuple(shape[-2:]), layout) for _ in range(shape[0] if len(shape) == 3 else 1)]
        for part in parts:
            part.machine = self.machine
        return Ring(parts, layout) if len(shape) == 3 else parts[0]

    def warp_specialize(self, calls: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert len(calls) == len(warps) + 1 == len(registers) + 1
        machine = self.machine
        for n, (function, args) in enumerate(calls):
            parameters = len(inspect.signature(function).parameters)
            assert parameters == len(args), (
                f"{function.__name__} takes {parameters} arguments, and is given {len(args)}"
            )
            program, number = machine.current.program, len(machine.partitions)
            name = f"program {program}, partition {n} ({function.__name__})"
            weight = machine.random.choice((1.0, 1.0, 0.25, 0.03))
            machine.partitions.append(Partition(number, program, name, functools.partial(function, *args), weight))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if not pred:
            return
        barrier.used()
        parity = int(phase)
        assert parity in (0, 1)
        self.machine.pause(lambda: barrier.passes(parity))
        mine = self.machine.current
        mine.seen[barrier] = barrier.completed
        for name, time in barrier.published.items():
            mine.clock[name] = max(time, mine.clock.get(name, -1))

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        assert count == 1
        if pred:
            self.machine.pause()
            barrier.arrive(self.machine.current)
            barrier.turn()

    def expect(self, barrier: Barrier, size: Any, pred: Any = True) -> None:
        """An arrival that first raises the bytes to come."""
        if pred:
            self.machine.pause()
            barrier.bytes += int(size)
            barrier.arrive(self.machine.current)
            barrier.turn()

    def make_tensor_descriptor(
        self, pointer: Pointer, shape: list[Any], strides: list[Any], block: list[int], layout: Any
    ) -> Slot:
        assert [int(s) for s in strides] == [int(shape[1]), 1] and layout == "shared"
        self.machine.pause()
        # One for each place in the source: in a loop, the next is made where the one before lay.
        slot = self.machine.current.slots.setdefault(sys._getframe(1).f_lineno, Slot())
        mine = self.machine.current
        if any(mine.seen.get(barrier, 0) <= phase for barrier, phase in slot.copies):
            raise Fault(f"{mine.name}: makes a descriptor where lies that of a copy it has not waited for")
        slot.copies = []
        slot.content = (pointer, [int(n) for n in shape], list(block))
        return slot

    def async_copy_global_to_shared(
        self, slot: Slot, first: list[Any], barrier: Barrier, buffer: Buffer, pred: Any = True
    ) -> None:
        if not pred:
            return
        machine = self.machine
        machine.pause()
        buffer.written_by(machine.current, "copied to")
        buffer.data = np.full(buffer.data.shape, np.nan, np.float32)
        buffer.copying += 1
        buffer.source = (barrier, barrier.completed)
        slot.copies.append(buffer.source)
        barrier.used()
        lazy = machine.random.random() < LAZY
        machine.copies.append(Copy(machine.current.program, slot, [int(n) for n in first], barrier, buffer, lazy))

    def warpgroup_mma(self, a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        assert isinstance(acc, Value), "an accumulator is used before the wait for it"
        mine = self.machine.current
        product = Product(a, b if isinstance(b, View) else View(b, False), acc if use_acc else None)
        for buffer in product.buffers:
            buffer.read_by(mine)
            buffer.reading += 1
        mine.products.append(product)
        return product if is_async else self.warpgroup_mma_wait(0, deps=(product,))

    def warpgroup_mma_wait(self, left: int, deps: tuple[Product, ...]) -> Value:
        self.machine.pause()
        mine = self.machine.current
        while len(mine.products) > left:
            mine.products.pop(0).end(mine)
        (dep,) = deps
        if dep.result is None:
            raise Fault(f"{mine.name}: an accumulator is used after a wait that leaves it under way")
        return dep.result

    def fence_async_shared(self) -> None:
        for buffer in self.machine.current.stored:
            buffer.unfenced = False
        self.machine.current.stored = []


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """A Python number beside a tensor takes the tensor's type."""
    if isinstance(b, float | int) and isinstance(a, Value):
        return a, a.dtype.type(b)
    if isinstance(a, float | int) and isinstance(b, Value):
        return b.dtype.type(a), b
    return a, b


def _fma(a: Any, b: Any, c: Any) -> Value:
    return value((np.asarray(a, np.float64) * b + c).astype(np.float32))


@functools.cache
def _code(text: str) -> CodeType:
    """The module without its imports and launchers: constants, and what it defines if Gluon is there."""
    tree = ast.parse(text)
    tree.body = [
        n for n in tree.body if isinstance(n, ast.If) or (isinstance(n, ast.Assign) and "torch" not in ast.dump(n))
    ]
    return compile(tree, "kernel", "exec")
