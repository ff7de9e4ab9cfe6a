// K1 and K2 on the CPU: what they are given, and the table of functions that each instruction set fills.
//
// Plain structs only: this header is compiled with the flags of every instruction set, and an inline function of the
// standard library compiled with one of them could end up in code that runs without it.
#pragma once

#include <cstdint>

namespace kvkern {

// Keys of a tile, counted from the start of a segment. They decide which keys share a maximum: a change of one changes bits.
constexpr int PREFIX_KEYS = 128;
constexpr int SUFFIX_KEYS = 64;

enum Dtype : int { FP32 = 0, FP16 = 1, BF16 = 2 };

// Queries [rows, num_kv_heads * group, head_dim], the last stride 1, the others in bytes. Packed row = row * group + g.
struct Queries {
    const char* data;
    std::int64_t stride_row, stride_head;
    std::int64_t rows, num_kv_heads, group, head_dim;
    float scale;  // sm_scale * log2(e): scores are in base 2
    Dtype dtype;  // of keys and values too
};

// m, l [slots, num_kv_heads, rows * group] and acc [..., head_dim].
struct States {
    float *m, *l, *acc;
    std::int64_t slots;
};

struct Node {  // a row of the node table; the block lies at [layer, 2, num_kv_heads, padded, head_dim]
    std::int64_t address, tokens, padded, segment;
};

struct Item {
    std::int32_t node, row_begin, row_end, seg_begin, seg_end, state;
};

struct PrefixCall {
    Queries q;
    const Node* nodes;
    std::int64_t num_nodes;
    const Item* items;
    std::int64_t num_items, layer;
    States out;
};

// Packed rows [first, last) against segments of a node's head. From segment 0 on they are folded into one state, whose row 0
// would lie at `place`; from a later one on each is a state of its own, segment_rows further than the one before it.
struct PrefixUnit {
    std::int64_t node, head, first, last, seg_begin, seg_end;
    States out;
    std::int64_t place, segment_rows;
};

struct TokenPages {  // [num_pages, num_kv_heads, page_tokens, head_dim], strides in bytes
    const char* data;
    std::int64_t stride_page, stride_head, stride_token;
};

struct SuffixTile {
    std::int32_t slot, row_begin, row_end, path;
};

struct SuffixUnit {
    const SuffixTile* tile;
    std::int64_t head_begin, head_end;
};

struct SuffixCall {
    Queries q;
    TokenPages k, v;
    std::int64_t num_pages, page_tokens;
    const std::int32_t* page_table;  // [slots, table_width], rows table_stride entries apart
    std::int64_t slots, table_width, table_stride;
    const std::int32_t *seq_lens, *row_slot, *row_back;
    const SuffixTile* tiles;
    std::int64_t num_tiles;
    const std::int32_t* path_table;  // [num_paths, in.slots]
    std::int64_t num_paths, segment;
    States in;
    char* o;     // [rows, num_kv_heads * group, head_dim] like q, contiguous
    float* lse;  // [rows, num_kv_heads * group]
};

struct FoldCall {  // rows of two states -> rows of their fold; out may be one of them
    std::int64_t rows, head_dim;
    const float *m_a, *l_a, *acc_a, *m_b, *l_b, *acc_b;
    float *m, *l, *acc;
};

struct Kernels {
    const char* name;
    int group_rows;   // rows that share a pass over the keys
    int unit_groups;  // groups that share a tile of keys: only speed follows from it
    // Floats of memory of its own that a thread needs, aligned to 64 bytes.
    std::int64_t (*prefix_scratch)(const PrefixCall&);
    std::int64_t (*suffix_scratch)(const SuffixCall&);
    void (*prefix)(const PrefixCall&, const PrefixUnit&, float* scratch);
    void (*suffix)(const SuffixCall&, const SuffixUnit&, float* scratch);
    void (*fold)(const FoldCall&);
    void (*exp2)(const float* x, float* y, std::int64_t count);
};

extern const Kernels PORTABLE;
#if defined(__x86_64__)
extern const Kernels AVX2, AVX512, AVX512BF16;
#endif

}  // namespace kvkern
