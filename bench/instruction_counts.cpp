// One call of K1 or K2 on one thread, for a counter of instructions: instruction_counts ISA KERNEL DTYPE ROWS TOKENS
//
// Memory and its contents are the same whatever TOKENS is (up to 256): what differs between two of them is the kernel's loops.
#include <cstdlib>
#include <string>
#include <vector>

#include "dispatch.h"

using namespace kvkern;

constexpr std::int64_t HEADS = 2, GROUP = 4, HEAD_DIM = 128, MOST_TOKENS = 256, PAGE_TOKENS = 64, SEGMENT = 1024;
constexpr std::int64_t PAGES = MOST_TOKENS / PAGE_TOKENS;

template <class T>
T* memory(std::int64_t count, T value) {
    T* data = static_cast<T*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64));
    for (std::int64_t i = 0; i < count; ++i) data[i] = value;
    return data;
}

// The same in every run, and numbers of either dtype: between 0.5 and 1, some negative.
char* elements(std::int64_t count, Dtype dtype) {
    const std::int64_t words = dtype == FP32 ? count : count / 2;
    std::uint32_t *data = memory<std::uint32_t>(words, 0), state = 1;
    for (std::int64_t i = 0; i < words; ++i)
        data[i] = 0x3f003f00u | ((state = state * 1664525u + 1013904223u) >> 4 & 0x807f807fu);
    return reinterpret_cast<char*>(data);
}

States states(std::int64_t rows) {
    const std::int64_t count = HEADS * rows * GROUP;
    return {memory(count, 0.0f), memory(count, 0.0f), memory(count * HEAD_DIM, 0.0f), 1};
}

int main(int count, char** given) {
    const std::vector<std::string> words(given, given + count);
    const Kernels& isa = words.at(1) == "avx2" ? AVX2 : PORTABLE;
    const Dtype dtype = words.at(3) == "bf16" ? BF16 : FP32;
    const std::int64_t size = dtype == FP32 ? 4 : 2, rows = std::stol(words.at(4)), tokens = std::stol(words.at(5));
    const std::int64_t width = HEADS * GROUP * HEAD_DIM;
    const Queries q{elements(rows * width, dtype), width * size, HEAD_DIM * size, rows, HEADS, GROUP, HEAD_DIM, 0.1f, dtype};

    if (words.at(2) == "K1") {
        const char* block = elements(2 * HEADS * MOST_TOKENS * HEAD_DIM, dtype);
        const Node node{reinterpret_cast<std::int64_t>(block), tokens, MOST_TOKENS, SEGMENT};
        const Item item{0, 0, static_cast<std::int32_t>(rows), 0, 1, 0};
        prefix_attention(isa, PrefixCall{q, &node, 1, &item, 1, 0, states(rows)}, 1);
        return 0;
    }
    // K2: a row is an agent, with pages of its own.
    const std::int64_t page = HEADS * PAGE_TOKENS * HEAD_DIM;
    const TokenPages k{elements(rows * PAGES * page, dtype), page * size, PAGE_TOKENS * HEAD_DIM * size, HEAD_DIM * size};
    const TokenPages v{elements(rows * PAGES * page, dtype), k.stride_page, k.stride_head, k.stride_token};
    std::int32_t* table = memory<std::int32_t>(rows * PAGES, 0);
    for (std::int32_t i = 0; i < rows * PAGES; ++i) table[i] = i;
    std::int32_t* slots = memory<std::int32_t>(rows, 0);
    SuffixTile* tiles = memory(rows, SuffixTile{});
    for (std::int32_t i = 0; i < rows; ++i) {
        slots[i] = i;
        tiles[i] = SuffixTile{i, i, i + 1, 0};
    }
    const std::int32_t* lengths = memory(rows, static_cast<std::int32_t>(tokens));
    const std::int32_t* zeros = memory<std::int32_t>(rows, 0);
    suffix_attention(isa,
                     SuffixCall{q, k, v, rows * PAGES, PAGE_TOKENS, table, rows, PAGES, PAGES, lengths, slots, zeros, tiles, rows,
                                zeros, 1, SEGMENT, states(rows), elements(rows * width, dtype),
                                memory(rows * HEADS * GROUP, 0.0f)},
                     1);
    return 0;
}
