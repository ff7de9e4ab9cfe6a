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
def block_sum(address: int, size_bytes: int, start_word: int = 0) -> int: ...
