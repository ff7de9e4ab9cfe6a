"""The compiled part, csrc/. Addresses are integers, sizes and strides bytes."""

from collections.abc import Sequence

class Mapping:
    """Memory of its own pages: zero-filled and writable until protect(). Freed with its last reference."""

    def __init__(self, size_bytes: int) -> None: ...
    @staticmethod
    def map_file(path: str | bytes, offset: int, size_bytes: int) -> Mapping: ...
    def protect(self) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def protected(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def append(
    k: int,
    v: int,
    k_pages: int,
    v_pages: int,
    page_table: int,
    seq_lens: int,
    row_slot: int,
    row_back: int,
    *,
    rows: int,
    num_kv_heads: int,
    row_bytes: int,
    k_strides: Sequence[int],
    v_strides: Sequence[int],
    k_page_strides: Sequence[int],
    v_page_strides: Sequence[int],
    num_pages: int,
    page_tokens: int,
    slots: int,
    table_width: int,
    table_stride: int,
) -> None: ...
def prefer_huge_pages(address: int, size_bytes: int) -> None: ...
def block_sum(address: int, size_bytes: int, start_word: int = 0) -> int: ...
def prefix_attention(
    q: int,
    node_table: int,
    items: int,
    state: tuple[int, int, int],
    *,
    dtype: int,
    shape: Sequence[int],
    q_strides: Sequence[int],
    scale: float,
    num_nodes: int,
    num_items: int,
    num_states: int,
    layer: int,
    threads: int,
    instruction_set: str = "",
) -> None: ...
def suffix_attention(
    q: int,
    k_pages: int,
    v_pages: int,
    page_table: int,
    seq_lens: int,
    row_slot: int,
    row_back: int,
    suffix_tiles: int,
    path_table: int,
    state: tuple[int, int, int],
    o: int,
    lse: int,
    *,
    dtype: int,
    shape: Sequence[int],
    q_strides: Sequence[int],
    k_page_strides: Sequence[int],
    v_page_strides: Sequence[int],
    scale: float,
    num_pages: int,
    page_tokens: int,
    slots: int,
    table_width: int,
    table_stride: int,
    num_tiles: int,
    num_paths: int,
    num_states: int,
    segment: int,
    threads: int,
    instruction_set: str = "",
) -> None: ...
def fold(
    a: tuple[int, int, int],
    b: tuple[int, int, int],
    out: tuple[int, int, int],
    *,
    rows: int,
    head_dim: int,
    instruction_set: str = "",
) -> None: ...
def exp2(x: int, y: int, count: int, *, instruction_set: str = "") -> None: ...
def instruction_sets() -> list[str]: ...
def rms_norm(
    x: int,
    residual: int,
    weight: int,
    out: int,
    sum: int,
    dtype: int,
    shape: Sequence[int],
    strides: Sequence[int],
    eps: float,
    threads: int,
    instruction_set: str = "",
) -> None: ...
def silu_mul(
    gate: int,
    up: int,
    out: int,
    dtype: int,
    shape: Sequence[int],
    strides: Sequence[int],
    threads: int,
    instruction_set: str = "",
) -> None: ...
def append_fused(
    numbers: Sequence[int],
    turns: Sequence[int],
    pages: Sequence[int],
    places: Sequence[int],
    dtype: int,
    shape: Sequence[int],
    strides: Sequence[int],
    turn_strides: Sequence[int],
    page_strides: Sequence[int],
    table: Sequence[int],
    eps: Sequence[float],
    threads: int,
    instruction_set: str = "",
) -> None: ...
