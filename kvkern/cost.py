"""What a document and its agents take, in memory and in money, by arithmetic alone.

Memory: `fit`. Money: `price`, after arXiv 2606.13361; presets, files and the table of `kvkern cost` are in pricing.py. No torch is
imported here until a Geometry is at hand.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvkern.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from kvkern.geometry import Geometry

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """ "24GiB", "512M" or "1000000" -> bytes; K, M, G and T are powers of 1,024. Raises RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise RequestError(
            "memory", found=repr(text), needed="a number of bytes such as 24GiB or 512M", do="write it so"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def render_bytes(n: float) -> str:
    """Bytes for a reader: 165.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


@dataclass(frozen=True)
class Fit:
    """What a memory budget holds beside the weights.

    agents               suffixes of suffix_tokens that fit beside one copy of the document
    agents_expanded      the same if each agent had its own copy of the document's KV
    prefix_bytes         the document's KV, padded to 128 tokens
    suffix_bytes         one agent's pages, whole pages of 16 tokens
    weights_bytes        the model's weights
    memory_bytes         the budget
    token_bytes          K and V of one token over all layers
    """

    document_tokens: int
    suffix_tokens: int
    memory_bytes: int
    weights_bytes: int
    token_bytes: int
    prefix_bytes: int
    suffix_bytes: int
    agents: int
    agents_expanded: int


def fit(
    geometry: Geometry, *, document_tokens: int, suffix_tokens: int, memory_bytes: int, weights_bytes: int = 0
) -> Fit:
    """How many agents fit. Activations are not counted: leave room for them in the budget.

    Raises RequestError for a number below 1, CapacityError where weights and document alone are larger than the budget.
    """
    from kvkern.geometry import PAGE, pad_tokens

    for name, value in (("document_tokens", document_tokens), ("suffix_tokens", suffix_tokens)):
        if value < 1:
            raise RequestError(name, found=value, needed="at least 1", do="give a number of tokens")
    token = geometry.token_bytes()
    prefix = pad_tokens(document_tokens) * token
    suffix = -(-suffix_tokens // PAGE) * PAGE * token
    left = memory_bytes - weights_bytes - prefix
    if left < suffix:
        raise CapacityError(
            "memory",
            found=render_bytes(memory_bytes),
            needed=f"at least {render_bytes(weights_bytes + prefix + suffix)} for weights, document and one agent",
            do="give more memory, or a shorter document",
        )
    return Fit(
        document_tokens=document_tokens,
        suffix_tokens=suffix_tokens,
        memory_bytes=memory_bytes,
        weights_bytes=weights_bytes,
        token_bytes=token,
        prefix_bytes=prefix,
        suffix_bytes=suffix,
        agents=left // suffix,
        agents_expanded=(memory_bytes - weights_bytes) // (prefix + suffix),
    )


# -- money -------------------------------------------------------------------------------------------------------------

MONTH_HOURS = 720.0
"""Hours of a month: 30 days."""

LEAST, MOST = 1e-12, 1e15
"""What an input may be, if it is not 0: no product or ratio of such numbers leaves a float."""


def _input(text: str, *, zero: bool = False, whole: bool = False, default: Any = dataclasses.MISSING) -> Any:
    """A field with its unit. zero: it may be 0; whole: an integer."""
    return dataclasses.field(default=default, metadata={"help": text, "zero": zero, "whole": whole})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the cost of reading one document is computed from. Seconds are those of one machine and of this document.

    Raises RequestError, naming the field, for what is no number, not finite, negative, 0 where that has no meaning, or
    beyond 1e15.
    """

    tokens: int = _input("tokens of the document", whole=True)
    token_bytes: float = _input("bytes of K and V of one token, over all layers")
    gb_bytes: float = _input("bytes of the GB that prices are for")
    prefill_seconds: float = _input("seconds to compute the document's KV")
    reuse_seconds: float = _input("seconds of one step over KV that is there", zero=True)
    prefill_price: float = _input("dollars for 1,000,000 prompt tokens, by the list")
    cache_read_factor: float = _input("price of a cached token, as a share of --prefill-price", zero=True)
    egress_gb: float = _input("dollars for a GB that leaves the host", zero=True)
    gpu_gb_hour: float = _input("dollars for a GB of GPU memory for an hour", zero=True)
    cpu_gb_hour: float = _input("dollars for a GB of CPU memory for an hour", zero=True)
    disk_gb_month: float = _input("dollars for a GB on disk for 30 days", zero=True)
    cpu_bytes_per_s: float = _input("bytes a second from CPU memory to where the KV is used")
    disk_bytes_per_s: float = _input("bytes a second from disk to where the KV is used")
    reads_month: float = _input("reads of the document in 30 days", zero=True)
    agents: float = _input("agents that read it once each, in all", zero=True)
    gpu_hour: float | None = _input("dollars for an hour of the machine that the seconds are of", default=None)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, zero, whole = getattr(self, field.name), field.metadata["zero"], field.metadata["whole"]
            if value is None and field.default is None:
                continue
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not ((zero and value == 0) or LEAST <= value <= MOST):
                kind = "a whole number from 1" if whole else f"a number from {LEAST:.0e}"
                needed = f"{'0, or ' if zero else ''}{kind} to {MOST:.0e}"
                do = f"give {field.metadata['help']}"
                raise RequestError(field.name, found=f"{value!r:.40}", needed=needed, do=do)

    @property
    def kv_bytes(self) -> float:
        return self.tokens * self.token_bytes

    @property
    def kv_gb(self) -> float:
        """The document's KV in units of gb_bytes."""
        return self.kv_bytes / self.gb_bytes

    @property
    def speedup(self) -> float:
        """Prefill by reuse, in seconds; inf where reuse takes none."""
        return self.prefill_seconds / self.reuse_seconds if self.reuse_seconds else math.inf

    @property
    def list_prefill(self) -> float:
        """Dollars of one prefill by the list."""
        return self.tokens * self.prefill_price / 1e6

    @property
    def gpu_prefill(self) -> float | None:
        """Dollars of one prefill by its seconds and the price of the machine; None where that is not given."""
        return None if self.gpu_hour is None else self.prefill_seconds * self.gpu_hour / 3600


def kv_token_bytes(*, layers: int, num_kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of K and V of one token over all layers; arXiv 2606.13361: 2 * 36 * 8 * 128 * 2 = 147,456 for Qwen3-4B in fp16."""
    sizes = {"layers": layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "element_bytes": element_bytes}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1_000_000:
            raise RequestError(
                f"geometry.{name}",
                found=repr(size),
                needed="a whole number from 1 to 1e+06",
                do="see the model's config",
            )
    return 2 * layers * num_kv_heads * head_dim * element_bytes


def break_even_reads(prefill: float, reuse: float) -> float:
    """N* of arXiv 2606.13361: prefill / (prefill - reuse), both in seconds or both in dollars; inf where reuse saves nothing.

    With N reads, one prefill and N reuses cost less than N prefills exactly if N > N*.
    """
    return prefill / (prefill - reuse) if reuse < prefill else math.inf


@dataclass(frozen=True)
class Hosting:
    """The document's KV kept in one kind of memory. Dollars; seconds as dear as in the Costs that this is part of.

    tier               "GPU memory", "CPU memory" or "disk"
    gb_hours_month     GB times hours of a month
    rent_month         for these, whatever is read
    read_seconds       of one read: load and reuse; nothing is loaded from GPU memory
    read               dollars of these
    pays_from_reads    reads a month above which rent_month + reads * read is less than reads * prefill; inf: never
    month              rent_month + reads_month * read
    """

    tier: str
    gb_hours_month: float
    rent_month: float
    read_seconds: float
    read: float
    pays_from_reads: float
    month: float


@dataclass(frozen=True)
class Costs:
    """What reading a document costs, in dollars; without a word on time: of one read.

    prefill            the document computed
    reuse              one step over KV that is there, its seconds as dear as those of the prefill
    saved              prefill - reuse; negative where reuse is slower
    tariff             what a buyer pays for a cached read, always by the list: cache_read_factor * tokens * prefill_price
    tariff_inside      reuse < tariff < prefill: a host earns by it, and a buyer saves
    egress             the KV sent to whoever reads: kv_gb * egress_gb. Whoever gets it still has to reuse it
    egress_by_prefill  egress / prefill
    egress_pays_below  dollars a GB below which to send it and reuse it costs less than to compute it; 0 or less: at no price
    gpu_hour           of the machine, at this price of a prefill
    month_prefill      reads_month * prefill
    month_egress       reads_month * (egress + reuse)
    month_tariff       reads_month * tariff
    hosting            of each tier, without the one prefill
    agents_prefill     agents * prefill
    agents_reuse       prefill + agents * reuse
    """

    prefill: float
    reuse: float
    saved: float
    tariff: float
    tariff_inside: bool
    egress: float
    egress_by_prefill: float
    egress_pays_below: float
    gpu_hour: float
    month_prefill: float
    month_egress: float
    month_tariff: float
    hosting: tuple[Hosting, ...]
    agents_prefill: float
    agents_reuse: float


def price(inputs: Inputs, prefill: float) -> Costs:
    """Costs where one prefill costs so many dollars: inputs.list_prefill, or inputs.gpu_prefill by measured seconds.

    With the inputs of arXiv 2606.13361 (preset "paper" of `kvkern cost`, 3,774 tokens) and list_prefill these are its figures
    to their printed precision: prefill $0.0189, egress $0.049 = 2.6 times that, $1.51 M against $0.03 M of 80 million agents.
    Some of them follow under an assumption only:

    0.54 GB, $0.049, 2.6   3,774 * 147,456 = 556,498,944 bytes are 0.556 GB of 1e9 bytes ($0.0501, 2.65) or 0.518 of 2**30
                           ($0.0466, 2.47). All three figures follow from a GB of 1,024 * 1e6 bytes: 0.543 GB, $0.0489,
                           2.59. That is the preset's gb_bytes; it is inferred from the figures.
    $0.03 M                the list price of a prefill, divided by 49.7 (14.71 s / 0.296 s), 80 million times: reuse is one step
                           over resident KV, a second of it as dear as one of prefill. Loading and hosting are not in it;
                           the one prefill is, and is 2 cents.
    0.1x inside            at 3,774 tokens, where reuse costs 0.020 of a prefill. At 255 tokens it costs 0.116 (8.6x), and a
                           tariff of 0.1x does not cover it.
    """
    reuse = prefill * (inputs.reuse_seconds / inputs.prefill_seconds)
    egress, tariff, reads = (
        inputs.kv_gb * inputs.egress_gb,
        inputs.cache_read_factor * inputs.list_prefill,
        inputs.reads_month,
    )
    tiers = (
        ("GPU memory", inputs.gpu_gb_hour, 0.0),
        ("CPU memory", inputs.cpu_gb_hour, inputs.kv_bytes / inputs.cpu_bytes_per_s),
        ("disk", inputs.disk_gb_month / MONTH_HOURS, inputs.kv_bytes / inputs.disk_bytes_per_s),
    )
    return Costs(
        prefill=prefill,
        reuse=reuse,
        saved=prefill - reuse,
        tariff=tariff,
        tariff_inside=reuse < tariff < prefill,
        egress=egress,
        egress_by_prefill=egress / prefill,
        egress_pays_below=(prefill - reuse) / inputs.kv_gb,
        gpu_hour=prefill / inputs.prefill_seconds * 3600,
        month_prefill=reads * prefill,
        month_egress=reads * (egress + reuse),
        month_tariff=reads * tariff,
        hosting=tuple(_host(inputs, prefill, *tier) for tier in tiers),
        agents_prefill=inputs.agents * prefill,
        agents_reuse=prefill + inputs.agents * reuse,
    )


def _host(inputs: Inputs, prefill: float, tier: str, gb_hour: float, load_seconds: float) -> Hosting:
    """One tier: what it costs to keep the KV there for a month, and to read it from there."""
    gb_hours = inputs.kv_gb * MONTH_HOURS
    rent, seconds = gb_hours * gb_hour, load_seconds + inputs.reuse_seconds
    read = prefill * (seconds / inputs.prefill_seconds)
    return Hosting(
        tier=tier,
        gb_hours_month=gb_hours,
        rent_month=rent,
        read_seconds=seconds,
        read=read,
        pays_from_reads=rent / (prefill - read) if read < prefill else math.inf,
        month=rent + inputs.reads_month * read,
    )
