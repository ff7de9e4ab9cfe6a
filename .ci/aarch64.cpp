// K1, K2 and exp2 of one instruction set on a small case, against plain loops in double: for .ci/aarch64.py.
//
//     aarch64 portable        -> a line for each dtype: largest error, and a hash of the bits of every output
//
// Exits with 1 where an error is larger than rounding explains.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/dispatch.h"

using namespace kvkern;

namespace {

constexpr std::int64_t KV_HEADS = 2, GROUP = 3, DIM = 48, PREFIX = 700, PADDED = 768, SEGMENT = 256;
constexpr std::int64_t AGENTS = 5, PAGE = 16, WIDTH = 5, PAGES = AGENTS * WIDTH;
constexpr float SCALE = 0.2f;
constexpr double LOG2_E = 1.4426950408889634074;
const std::int32_t LENGTHS[AGENTS] = {1, 16, 40, 64, 80};

std::uint32_t drawn = 1;
float uniform() {  // multiples of 2^-7 in [-1, 1): the same number in every dtype
    drawn = drawn * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int>(drawn >> 24) - 128) / 128.0f;
}

std::uint16_t half_of(float x) {  // exact, and normal or 0
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t sign = bits >> 16 & 0x8000u, exponent = bits >> 23 & 0xffu;
    return static_cast<std::uint16_t>(x == 0.0f ? sign : sign | (exponent - 112u) << 10 | (bits >> 13 & 0x3ffu));
}

double number_of(Dtype dtype, const char* data) {
    float x;
    if (dtype == FP32) {
        std::memcpy(&x, data, sizeof x);
        return static_cast<double>(x);
    }
    std::uint16_t bits;
    std::memcpy(&bits, data, sizeof bits);
    if (dtype == FP16) {
        const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
        const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
        return (bits & 0x8000) != 0 ? -size : size;
    }
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    std::memcpy(&x, &wide, sizeof x);
    return static_cast<double>(x);
}

std::int64_t size_of(Dtype dtype) { return dtype == FP32 ? 4 : 2; }

struct Numbers {  // drawn ones, in storage
    Dtype dtype;
    std::vector<char> bytes;

    Numbers(Dtype of, std::int64_t count) : dtype(of), bytes(static_cast<std::size_t>(count * size_of(of))) {
        for (std::int64_t i = 0; i < count; ++i) {
            const float x = uniform();
            std::uint32_t wide;
            std::memcpy(&wide, &x, sizeof wide);
            const std::uint16_t narrow = of == FP16 ? half_of(x) : static_cast<std::uint16_t>(wide >> 16);
            char* to = bytes.data() + i * size_of(of);
            if (of == FP32)
                std::memcpy(to, &x, sizeof x);
            else
                std::memcpy(to, &narrow, sizeof narrow);
        }
    }
    double operator[](std::int64_t i) const { return number_of(dtype, bytes.data() + i * size_of(dtype)); }
};

std::uint64_t hash(const void* data, std::size_t size, std::uint64_t so_far) {
    const auto* byte = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < size; ++i) so_far = (so_far ^ byte[i]) * 1099511628211u;
    return so_far;
}

bool attention(const Kernels& isa, Dtype dtype, const char* name) {
    const std::int64_t size = size_of(dtype), heads = KV_HEADS * GROUP, slots = 1, rows = AGENTS;
    const Numbers q(dtype, rows * heads * DIM), block(dtype, 2 * KV_HEADS * PADDED * DIM), k(dtype, PAGES * KV_HEADS * PAGE * DIM),
        v(dtype, PAGES * KV_HEADS * PAGE * DIM);
    const auto count = static_cast<std::size_t>(slots * rows * heads);
    std::vector<float> m(count), l(count), acc(count * DIM), lse(count);
    std::vector<char> o(count * static_cast<std::size_t>(DIM * size));
    std::vector<std::int32_t> table, row_slot, row_back(AGENTS, 0);
    std::vector<SuffixTile> tiles;
    for (std::int32_t i = 0; i < AGENTS; ++i) {
        for (std::int32_t page = 0; page < WIDTH; ++page) table.push_back(page * static_cast<std::int32_t>(AGENTS) + i);
        row_slot.push_back(i);
        tiles.push_back({i, i, i + 1, 0});
    }
    const std::int32_t path[] = {1};
    const Node node{static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(block.bytes.data())), PREFIX, PADDED, SEGMENT};
    const Item item{0, 0, AGENTS, 0, static_cast<std::int32_t>((PREFIX + SEGMENT - 1) / SEGMENT), 0};

    PrefixCall first{};
    first.q = {q.bytes.data(), heads * DIM * size,        DIM * size, rows, KV_HEADS, GROUP, DIM,
               static_cast<float>(SCALE * LOG2_E), dtype};
    first.nodes = &node;
    first.num_nodes = 1;
    first.items = &item;
    first.num_items = 1;
    first.out = {m.data(), l.data(), acc.data(), slots};
    prefix_attention(isa, first, 2);

    SuffixCall then{};
    then.q = first.q;
    then.k = {k.bytes.data(), KV_HEADS * PAGE * DIM * size, PAGE * DIM * size, DIM * size};
    then.v = {v.bytes.data(), KV_HEADS * PAGE * DIM * size, PAGE * DIM * size, DIM * size};
    then.num_pages = PAGES;
    then.page_tokens = PAGE;
    then.page_table = table.data();
    then.slots = AGENTS;
    then.table_width = then.table_stride = WIDTH;
    then.seq_lens = LENGTHS;
    then.row_slot = row_slot.data();
    then.row_back = row_back.data();
    then.tiles = tiles.data();
    then.num_tiles = AGENTS;
    then.path_table = path;
    then.num_paths = 1;
    then.segment = 48;
    then.in = first.out;
    then.o = o.data();
    then.lse = lse.data();
    suffix_attention(isa, then, 2);

    double worst = 0.0, worst_lse = 0.0;
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t head = 0; head < heads; ++head) {
            const std::int64_t kv = head / GROUP, out = row * heads + head, keys = PREFIX + LENGTHS[row];
            // Where key i lies: in the block, or in a page; its value lies `behind` it, or at the same place of v.
            const auto place = [&](std::int64_t i) {
                if (i < PREFIX) return (kv * PADDED + i) * DIM;
                const std::int64_t at = i - PREFIX, page = table[static_cast<std::size_t>(row * WIDTH + at / PAGE)];
                return ((page * KV_HEADS + kv) * PAGE + at % PAGE) * DIM;
            };
            std::vector<double> right(DIM, 0.0);
            double sum = 0.0;
            for (std::int64_t i = 0; i < keys; ++i) {
                double score = 0.0;
                for (std::int64_t d = 0; d < DIM; ++d)
                    score += q[out * DIM + d] * (i < PREFIX ? block[place(i) + d] : k[place(i) + d]);
                const double weight = std::exp(score * static_cast<double>(SCALE));
                sum += weight;
                for (std::int64_t d = 0; d < DIM; ++d)
                    right[static_cast<std::size_t>(d)] +=
                        weight * (i < PREFIX ? block[KV_HEADS * PADDED * DIM + place(i) + d] : v[place(i) + d]);
            }
            for (std::int64_t d = 0; d < DIM; ++d) {
                const double found = number_of(dtype, o.data() + (out * DIM + d) * size);
                worst = std::fmax(worst, std::fabs(found - right[static_cast<std::size_t>(d)] / sum));
            }
            const double error = std::fabs(static_cast<double>(lse[static_cast<std::size_t>(out)]) - std::log(sum));
            worst_lse = std::fmax(worst_lse, error);
        }

    std::uint64_t bits = hash(m.data(), m.size() * sizeof(float), 1469598103934665603u);
    bits = hash(l.data(), l.size() * sizeof(float), bits);
    bits = hash(acc.data(), acc.size() * sizeof(float), bits);
    bits = hash(o.data(), o.size(), bits);  // not lse: its logarithm is the machine's
    // |o| < 0.5: half a unit in the last place of its dtype, and what fp32 sums of 780 terms lose.
    const double bound = 2e-6 + (dtype == FP16 ? 0x1p-12 : dtype == BF16 ? 0x1p-9 : 0.0);
    const bool right = worst <= bound && worst_lse <= 1e-5;
    std::printf("%s %016llx max error %.2e of o, %.2e of lse%s\n", name, static_cast<unsigned long long>(bits), worst, worst_lse,
                right ? "" : ": TOO LARGE");
    return right;
}

bool powers(const Kernels& isa) {
    std::vector<float> x, y;
    for (float at = -130.0f; at < 1.0f; at += 0.0078f) x.push_back(at);
    y.resize(x.size());
    isa.exp2(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    double worst = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double right = std::exp2(static_cast<double>(x[i]));
        if (x[i] >= -126.0f) worst = std::fmax(worst, std::fabs(static_cast<double>(y[i]) - right) / right);
    }
    const bool right = worst <= 0x1p-23;
    std::printf("exp2 %016llx max relative error %.2e%s\n",
                static_cast<unsigned long long>(hash(y.data(), y.size() * sizeof(float), 1469598103934665603u)), worst,
                right ? "" : ": TOO LARGE");
    return right;
}

}  // namespace

int main(int count, char** words) {
    const Kernels& isa = kernels(count > 1 ? words[1] : "");
    const bool right[] = {powers(isa), attention(isa, FP32, "fp32"), attention(isa, FP16, "fp16"), attention(isa, BF16, "bf16")};
    for (const bool each : right)
        if (!each) return 1;
    return 0;
}
