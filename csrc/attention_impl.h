// K1, K2 and the fold in vectors of LANES floats. Included once by each isa_*.cpp, which says LANES and TABLE.
//
// A lane is a row. A score is one chain of multiply-adds over head_dim, an output element one over the keys, a sum one over
// the keys: nothing is ever added across lanes. So how many rows lie side by side, how wide the vectors are and how keys or
// dimensions are blocked in registers cannot change a bit; only the tiles of keys (attention.h) and the kind of product can.
// A link of a chain is a product of fp32 (Single) or, where the instruction set has it, two products of bf16 (Pair): of
// dimensions 2i and 2i + 1, of keys 2i and 2i + 1 of a tile.
//
// Of a group of rows, in vectors of NV * lanes: q and o [head_dim][rows], scores [keys][rows]; in Pairs half as many of q and of
// weights. Keys are read where they lie and broadcast, 32 bits at a time. So are values in fp32 for few rows, which take a line of
// them as a whole. For more rows they are packed first, [head_dim / 8][keys][8]: a block of dimensions would be part of a line
// in many, and those displace each other before the next part is read.
//
// While keys are multiplied their values are fetched, and while values are weighed the next tile's keys: as many bytes as are read.
//
// Bound by multiply-adds where rows fill the vectors (24 sums from 11 loads in 32 registers), by memory where they are few.
//
// No function of the standard library is used here, and all has internal linkage; see attention.h.
#include <cstdint>

#include "attention.h"
#include "vectors.h"

namespace kvkern {
namespace {

constexpr int MAX_VECS = 3;
constexpr std::int64_t GROUP_ROWS = MAX_VECS * LANES;
constexpr int UNIT_GROUPS = static_cast<int>(288 / GROUP_ROWS);
constexpr int DIM_BLOCK = 8;
// Between two packed blocks a line is left: 4,096 bytes apart they would displace each other too.
constexpr std::int64_t GAP = 16;

// -- products ----------------------------------------------------------------------------------------------------------

struct Single {  // 32 bits are one element
    static constexpr int DEPTH = 1;

    template <class V>
    static V mul(V a, V b, V c) {
        return fma(a, b, c);
    }
};

#if defined(__AVX512BF16__)
struct Pair {  // 32 bits are two elements in bf16, the first one low; subnormals count as 0
    static constexpr int DEPTH = 2;

    static Vec mul(Vec a, Vec b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
    static Half mul(Half a, Half b, Half c) { return (Half)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)b); }

    static Vec of(Vec low, Vec high) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                               5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (Vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
    static Half of(Half low, Half high) {
        const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
        return (Half)_mm256_permutexvar_epi16(order, (__m256i)_mm256_cvtne2ps_pbh((__m256)high, (__m256)low));
    }
};
#else
typedef Single Pair;
#endif

inline bool in_pairs(Dtype dtype) { return Pair::DEPTH == 2 && dtype == BF16; }

// -- a tile of keys against a group of rows ----------------------------------------------------------------------------

struct Run {  // keys or values that lie stride bytes apart
    const char* data;
    std::int64_t stride;
    int keys;
};

struct Tile {
    Run k[SUFFIX_KEYS], v[SUFFIX_KEYS];
    int k_runs, v_runs, keys;
    std::int64_t block;               // floats between two blocks of dimensions of a value
    const char* behind[SUFFIX_KEYS];  // memory to be fetched while a run of keys is multiplied,
    const char* next[SUFFIX_KEYS];    // and while a run of values is weighed, so many bytes of it or none
    std::int64_t next_size[SUFFIX_KEYS];
};

struct Lanes {  // a state in lanes: m, l [rows], o [head_dim][rows]
    float *m, *l, *o;
};

struct Group {
    float* q;  // [head_dim][rows], times scale where it is fp32
    Lanes state, total;
    int lanes, vecs;
    std::int64_t rows, first, count;  // lanes * vecs; packed rows
};

template <class V, int N>
struct Form {
    typedef V Vector;
    static constexpr int NV = N;
};

// body(Form) for the vectors that the group's rows lie in.
template <class Body>
inline void by_form(const Group& group, const Body& body) {
    if (group.lanes < LANES)
        body(Form<Half, 1>{});
    else if (group.vecs == 1)
        body(Form<Vec, 1>{});
    else if (group.vecs == 2)
        body(Form<Vec, 2>{});
    else
        body(Form<Vec, 3>{});
}

// Broadcasts in a block: with the vectors of rows as many sums as hide the latency of a product, in the registers there are.
#if LANES == 16
constexpr int block_of(int vecs) { return vecs == 1 ? 16 : 8; }
#else
constexpr int block_of(int vecs) { return vecs == 1 ? 8 : 4; }
#endif

// Kept whole, each with all registers for its own loop.
#define APART __attribute__((noinline))

template <class V, int NV, class E, int KEYS>
APART void score_block(const float* q, std::int64_t depth, const char* k, std::int64_t stride, const char* behind, float scale,
                       float* s) {
    constexpr int ROWS = NV * lanes<V>;
    Vecs<Vecs<V, NV>, KEYS> sum;
#pragma GCC unroll 16
    for (int key = 0; key < KEYS; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) sum[key][j] = V{};

    for (std::int64_t i = 0; i < depth; ++i) {
        __builtin_prefetch(behind + 4 * KEYS * i, 0, 2);
        Vecs<V, NV> row;
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) row[j] = at<V>(q + i * ROWS + j * lanes<V>);
#pragma GCC unroll 16
        for (int key = 0; key < KEYS; ++key) {
            const V x = broadcast<V>(k + key * stride + 4 * i);
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) sum[key][j] = E::mul(x, row[j], sum[key][j]);
        }
    }

#pragma GCC unroll 16
    for (int key = 0; key < KEYS; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j)
            at<V>(s + key * ROWS + j * lanes<V>) = E::DEPTH == 1 ? sum[key][j] : sum[key][j] * set1<V>(scale);
}

// Fewer keys than a block has: blocks of half as many, and so on.
template <class V, int NV, class E, int KEYS>
inline void score_run(const float* q, std::int64_t depth, const Run& k, const char* behind, int first, float scale, float* s) {
    for (; first + KEYS <= k.keys; first += KEYS)
        score_block<V, NV, E, KEYS>(q, depth, k.data + first * k.stride, k.stride, behind + first * depth * 4, scale,
                                    s + first * NV * lanes<V>);
    if constexpr (KEYS > 1) score_run<V, NV, E, KEYS / 2>(q, depth, k, behind, first, scale, s);
}

// o += v^T p over links [0, links) of a run: keys, or pairs of them.
template <class V, int NV, class E>
APART void weigh(const float* p, int links, const Run& v, std::int64_t block, const char* next, std::int64_t next_size,
                 std::int64_t head_dim, float* o) {
    constexpr int ROWS = NV * lanes<V>, DIMS = block_of(NV);
    const std::int64_t stride = v.stride;
    for (std::int64_t d = 0; d < head_dim; d += DIMS) {
        Vecs<Vecs<V, NV>, DIMS> sum;
#pragma GCC unroll 16
        for (int i = 0; i < DIMS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) sum[i][j] = at<V>(o + (d + i) * ROWS + j * lanes<V>);

        const char* value = v.data + (d / DIM_BLOCK * block + d % DIM_BLOCK) * 4;
        std::int64_t fetched = 4 * d * links;
        for (int link = 0; link < links; ++link, value += stride, fetched += 4 * DIMS) {
            __builtin_prefetch(next + min(fetched, next_size), 0, 2);
            Vecs<V, NV> row;
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) row[j] = at<V>(p + link * ROWS + j * lanes<V>);
#pragma GCC unroll 16
            for (int i = 0; i < DIMS; ++i) {
                const V x = broadcast<V>(value + (i / DIM_BLOCK * block + i % DIM_BLOCK) * 4);
#pragma GCC unroll 3
                for (int j = 0; j < NV; ++j) sum[i][j] = E::mul(x, row[j], sum[i][j]);
            }
        }

#pragma GCC unroll 16
        for (int i = 0; i < DIMS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) at<V>(o + (d + i) * ROWS + j * lanes<V>) = sum[i][j];
    }
}

// The same for a link that not every row sees, or sees the first key of. A row that does not see a key is left as it is,
// whatever the value: 0 * NaN is NaN.
template <class V, int NV, class E>
APART void weigh_seen(const float* p, const char* v, std::int64_t block, std::int64_t head_dim, const Int<V>* seen, float* o) {
    constexpr int ROWS = NV * lanes<V>;
    for (std::int64_t d = 0; d < head_dim; ++d) {
        const V x = broadcast<V>(v + (d / DIM_BLOCK * block + d % DIM_BLOCK) * 4);
        const V first = E::DEPTH == 1 ? x : (V)((Int<V>)x & 0xffff);
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
            V& sum = at<V>(o + d * ROWS + j * lanes<V>);
            const V row = at<V>(p + j * lanes<V>);
            sum = seen[j] >= E::DEPTH ? E::mul(x, row, sum) : seen[j] == 1 ? E::mul(first, row, sum) : sum;
        }
    }
}

template <class V, int NV>
inline void rescale(float* o, std::int64_t head_dim, const V* alpha) {
    Int<V> other = alpha[0] != set1<V>(1.0f);
#pragma GCC unroll 3
    for (int j = 1; j < NV; ++j) other |= alpha[j] != set1<V>(1.0f);
    int any = 0;
    for (int lane = 0; lane < lanes<V>; ++lane) any |= other[lane];
    if (!any) return;
    for (std::int64_t d = 0; d < head_dim; ++d)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) at<V>(o + (d * NV + j) * lanes<V>) *= alpha[j];
}

// Scores -> weights, in place; m, l go on, and alpha is what the sums so far are to be multiplied by.
template <class V, int NV, class E>
APART void soften(float* s, int keys, float* m_ptr, float* l_ptr, V* alpha) {
    constexpr int ROWS = NV * lanes<V>;
    Vecs<V, NV> m, pivot, total;
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) m[j] = at<V>(m_ptr + j * lanes<V>);
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) m[j] = max(m[j], at<V>(s + key * ROWS + j * lanes<V>));

#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
        pivot[j] = pivot_of(m[j]);
        alpha[j] = exp2(at<V>(m_ptr + j * lanes<V>) - pivot[j]);
        total[j] = V{};
    }
    int key = 0;
    for (; key + E::DEPTH <= keys; key += E::DEPTH)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
            const V p = exp2(at<V>(s + key * ROWS + j * lanes<V>) - pivot[j]);
            total[j] += p;
            V weight = p;
            if constexpr (E::DEPTH == 2) {
                const V next = exp2(at<V>(s + (key + 1) * ROWS + j * lanes<V>) - pivot[j]);
                total[j] += next;
                weight = E::of(p, next);
            }
            at<V>(s + key / E::DEPTH * ROWS + j * lanes<V>) = weight;
        }
    if constexpr (E::DEPTH == 2)
        if (key < keys)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) {
                const V p = exp2(at<V>(s + key * ROWS + j * lanes<V>) - pivot[j]);
                total[j] += p;
                at<V>(s + key / 2 * ROWS + j * lanes<V>) = E::of(p, V{});
            }

#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
        V& l = at<V>(l_ptr + j * lanes<V>);
        at<V>(m_ptr + j * lanes<V>) = m[j];
        l = fma(l, alpha[j], total[j]);
    }
}

// The group's state goes on over a tile. seen: keys of the tile that every row sees; lengths [rows]: keys that each sees.
// values() makes the tile's values ready, once its keys have been multiplied.
template <class E, class Values>
void step(const Tile& tile, std::int64_t head_dim, const Group& group, float scale, int seen, const std::int32_t* lengths,
          float* s, const Values& values) {
    by_form(group, [&](auto form) {
        using V = typename decltype(form)::Vector;
        constexpr int NV = decltype(form)::NV, ROWS = NV * lanes<V>;
        int first = 0;
        for (int run = 0; run < tile.k_runs; first += tile.k[run++].keys)
            score_run<V, NV, E, block_of(NV)>(group.q, head_dim / E::DEPTH, tile.k[run], tile.behind[run], 0, scale,
                                              s + first * ROWS);
        values();
        Vecs<Int<V>, NV> length = {};
        for (int key = seen; key < tile.keys; ++key)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) {
                length[j] = *reinterpret_cast<const Int<V>*>(lengths + j * lanes<V>);
                V& score = at<V>(s + key * ROWS + j * lanes<V>);
                score = length[j] > key ? score : set1<V>(-INF);
            }

        Vecs<V, NV> alpha;
        soften<V, NV, E>(s, tile.keys, group.state.m, group.state.l, alpha);
        rescale<V, NV>(group.state.o, head_dim, alpha);
        first = 0;
        for (int run = 0; run < tile.v_runs; first += tile.v[run++].keys) {
            const Run& v = tile.v[run];
            const int links = (v.keys + E::DEPTH - 1) / E::DEPTH;
            const int whole = seen == tile.keys ? links : static_cast<int>(min(seen > first ? (seen - first) / E::DEPTH : 0, links));
            const float* p = s + first / E::DEPTH * ROWS;
            weigh<V, NV, E>(p, whole, v, tile.block, tile.next[run], tile.next_size[run], head_dim, group.state.o);
            for (int link = whole; link < links; ++link) {
                Vecs<Int<V>, NV> sees;
#pragma GCC unroll 3
                for (int j = 0; j < NV; ++j) sees[j] = length[j] - (first + link * E::DEPTH);
                weigh_seen<V, NV, E>(p + link * ROWS, v.data + link * v.stride, tile.block, head_dim, sees, group.state.o);
            }
        }
    });
}

// Values of the keys at row(0) to row(tile.keys - 1), packed, in runs of `run` keys.
template <class E, class Row>
inline void pack(Dtype dtype, const Row& row, int run, std::int64_t head_dim, float* to, Tile& tile) {
    const int links = (tile.keys + E::DEPTH - 1) / E::DEPTH;
    if (run % E::DEPTH != 0) run = tile.keys;
    tile.block = links * DIM_BLOCK + GAP;
    tile.v_runs = 0;
    for (int first = 0; first < tile.keys; first += run)
        tile.v[tile.v_runs++] = Run{reinterpret_cast<const char*>(to + first / E::DEPTH * DIM_BLOCK), 4 * DIM_BLOCK,
                                    static_cast<int>(min(run, tile.keys - first))};
    for (int link = 0; link < links; ++link, to += DIM_BLOCK) {
        const char* from = row(link * E::DEPTH);
        if constexpr (E::DEPTH == 1) {
            const std::int64_t size = size_of(dtype);
            for (std::int64_t d = 0; d < head_dim; d += DIM_BLOCK)
                widen(dtype, from + d * size, to + d / DIM_BLOCK * tile.block, DIM_BLOCK);
        } else {
            const char* second = link * 2 + 1 < tile.keys ? row(link * 2 + 1) : nullptr;
            for (std::int64_t d = 0; d < head_dim; d += 2 * DIM_BLOCK) {
                typedef std::uint16_t Elements __attribute__((vector_size(4 * DIM_BLOCK)));
                Elements first, other = {};
                __builtin_memcpy(&first, from + 2 * d, sizeof first);
                if (second != nullptr) __builtin_memcpy(&other, second + 2 * d, sizeof other);
                const auto pairs = __builtin_shufflevector(first, other, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                                           24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
                float* block = to + d / DIM_BLOCK * tile.block;
                __builtin_memcpy(block, &pairs, sizeof pairs / 2);
                __builtin_memcpy(block + tile.block, reinterpret_cast<const char*>(&pairs) + sizeof pairs / 2, sizeof pairs / 2);
            }
        }
    }
}

// -- states ------------------------------------------------------------------------------------------------------------

void start(const Lanes& state, std::int64_t rows, std::int64_t head_dim) {
    for (std::int64_t i = 0; i < rows; ++i) {
        state.m[i] = -INF;
        state.l[i] = 0.0f;
    }
    __builtin_memset(state.o, 0, static_cast<std::size_t>(head_dim * rows) * sizeof(float));
}

// a = fold(a, b): always left to right, order is part of the result.
void fold(const Lanes& a, const Lanes& b, const Group& group, std::int64_t head_dim) {
    by_form(group, [&](auto form) {
        using V = typename decltype(form)::Vector;
        constexpr int NV = decltype(form)::NV;
        Vecs<V, NV> alpha, beta;
        for (int j = 0; j < NV; ++j) {
            const int i = j * lanes<V>;
            const V m_a = at<V>(a.m + i), m_b = at<V>(b.m + i), m = max(m_a, m_b), pivot = pivot_of(m);
            alpha[j] = exp2(m_a - pivot);
            beta[j] = exp2(m_b - pivot);
            at<V>(a.m + i) = m;
            at<V>(a.l + i) = fma(at<V>(a.l + i), alpha[j], at<V>(b.l + i) * beta[j]);
        }
        for (std::int64_t d = 0; d < head_dim; ++d)
            for (int j = 0; j < NV; ++j) {
                const std::int64_t i = (d * NV + j) * lanes<V>;
                at<V>(a.o + i) = fma(at<V>(a.o + i), alpha[j], at<V>(b.o + i) * beta[j]);
            }
    });
}

void load(const States& from, std::int64_t place, const Group& group, std::int64_t head_dim, const Lanes& to) {
    if (group.count < group.rows) start(to, group.rows, head_dim);
    place += group.first;
    for (std::int64_t i = 0; i < group.count; ++i) {
        to.m[i] = from.m[place + i];
        to.l[i] = from.l[place + i];
        const float* acc = from.acc + (place + i) * head_dim;
        for (std::int64_t d = 0; d < head_dim; ++d) to.o[d * group.rows + i] = acc[d];
    }
}

void store(const Lanes& from, const Group& group, std::int64_t head_dim, const States& to, std::int64_t place) {
    place += group.first;
    for (std::int64_t i = 0; i < group.count; ++i) {
        to.m[place + i] = from.m[i];
        to.l[place + i] = from.l[i];
        float* acc = to.acc + (place + i) * head_dim;
        for (std::int64_t d = 0; d < head_dim; ++d) acc[d] = from.o[d * group.rows + i];
    }
}

// Rows as lanes; lanes without a row hold 0. line: head_dim floats.
template <class E>
void load_queries(const Queries& q, std::int64_t head, const Group& group, float* line) {
    const std::int64_t depth = q.head_dim / E::DEPTH;
    if (group.count < group.rows)
        __builtin_memset(group.q, 0, static_cast<std::size_t>(depth * group.rows) * sizeof(float));
    for (std::int64_t i = 0; i < group.count; ++i) {
        const std::int64_t row = (group.first + i) / q.group, g = (group.first + i) % q.group;
        const char* from = q.data + row * q.stride_row + (head * q.group + g) * q.stride_head;
        if constexpr (E::DEPTH == 1) {
            widen(q.dtype, from, line, q.head_dim);
            for (std::int64_t d = 0; d < depth; ++d) group.q[d * group.rows + i] = line[d] * q.scale;
        } else {
            for (std::int64_t d = 0; d < depth; ++d) __builtin_memcpy(group.q + d * group.rows + i, from + 4 * d, 4);
        }
    }
}

// -- memory ------------------------------------------------------------------------------------------------------------

inline std::int64_t packed_floats(int keys, std::int64_t head_dim) { return head_dim / DIM_BLOCK * (keys * DIM_BLOCK + GAP); }

inline std::int64_t group_floats(std::int64_t head_dim) { return GROUP_ROWS * (3 * head_dim + 4); }

// Memory of a thread in the order it is taken. Every size is a multiple of LANES, so every part is aligned.
struct Memory {
    float* next;

    float* take(std::int64_t floats) {
        float* part = next;
        next += floats;
        return part;
    }

    Lanes state(std::int64_t head_dim) {
        Lanes state;
        state.m = take(GROUP_ROWS);
        state.l = take(GROUP_ROWS);
        state.o = take(GROUP_ROWS * head_dim);
        return state;
    }

    Group group(std::int64_t head_dim, std::int64_t first, std::int64_t last) {
        Group group;
        group.q = take(GROUP_ROWS * head_dim);
        group.state = state(head_dim);
        group.total = state(head_dim);
        group.first = first;
        group.count = min(GROUP_ROWS, last - first);
        group.lanes = group.count <= lanes<Half> ? lanes<Half> : LANES;
        group.vecs = static_cast<int>((group.count + group.lanes - 1) / group.lanes);
        group.rows = group.lanes * group.vecs;
        return group;
    }
};

inline void swap(Lanes& a, Lanes& b) {
    const Lanes c = a;
    a = b;
    b = c;
}

// -- K1 ----------------------------------------------------------------------------------------------------------------

std::int64_t prefix_scratch(const PrefixCall& call) {
    const std::int64_t d = call.q.head_dim;
    return UNIT_GROUPS * group_floats(d) + GROUP_ROWS * PREFIX_KEYS + PREFIX_KEYS * d + packed_floats(PREFIX_KEYS, d) + d;
}

template <class E>
void prefix_of(const PrefixCall& call, const PrefixUnit& unit, float* scratch) {
    const Queries& q = call.q;
    const Node& node = call.nodes[unit.node];
    const std::int64_t d = q.head_dim, size = size_of(q.dtype), line_bytes = d * size, head_bytes = node.padded * line_bytes;
    const char* keys = reinterpret_cast<const char*>(node.address) + (2 * call.layer * q.num_kv_heads + unit.head) * head_bytes;
    const char* values = keys + q.num_kv_heads * head_bytes;
    const bool widened = E::DEPTH == 1 && q.dtype != FP32;

    Memory memory{scratch};
    float* s = memory.take(GROUP_ROWS * PREFIX_KEYS);
    float* k_wide = memory.take(PREFIX_KEYS * d);
    float* line = memory.take(d);
    Tile tile;
    tile.k_runs = 1;
    float* packed = memory.take(packed_floats(PREFIX_KEYS, d));
    Group groups[UNIT_GROUPS];
    int count = 0;
    for (std::int64_t first = unit.first; first < unit.last; first += GROUP_ROWS) {
        groups[count] = memory.group(d, first, unit.last);
        load_queries<E>(q, unit.head, groups[count++], line);
    }

    const bool in_place = E::DEPTH == 1 && !widened && count == 1 && groups[0].vecs == 1;

    for (std::int64_t seg = unit.seg_begin; seg < unit.seg_end; ++seg) {
        for (int g = 0; g < count; ++g) start(groups[g].state, groups[g].rows, d);
        const std::int64_t end = min((seg + 1) * node.segment, node.tokens);
        for (std::int64_t first = seg * node.segment; first < end; first += PREFIX_KEYS) {
            tile.keys = static_cast<int>(min(PREFIX_KEYS, end - first));
            const char *k = keys + first * line_bytes, *v = values + first * line_bytes;
            if (widened) widen(q.dtype, k, k_wide, tile.keys * d);
            tile.k[0] = widened ? Run{reinterpret_cast<const char*>(k_wide), 4 * d, tile.keys} : Run{k, line_bytes, tile.keys};
            tile.behind[0] = v;
            tile.next[0] = k + PREFIX_KEYS * line_bytes;
            tile.next_size[0] = first + PREFIX_KEYS < end ? PREFIX_KEYS * line_bytes : 0;
            for (int g = 0; g < count; ++g) {
                step<E>(tile, d, groups[g], q.scale, tile.keys, nullptr, s, [&] {
                    if (in_place) {
                        tile.v_runs = 1;
                        tile.block = DIM_BLOCK;
                        tile.v[0] = Run{v, line_bytes, tile.keys};
                    } else if (g == 0) {
                        pack<E>(q.dtype, [&](int key) { return v + key * line_bytes; }, tile.keys, d, packed, tile);
                    }
                });
                tile.behind[0] = k;
                tile.next_size[0] = 0;
            }
        }

        for (int g = 0; g < count; ++g) {
            Group& group = groups[g];
            if (unit.seg_begin > 0)
                store(group.state, group, d, unit.out, unit.place + (seg - unit.seg_begin) * unit.segment_rows);
            else if (seg == 0)
                swap(group.state, group.total);
            else
                fold(group.total, group.state, group, d);
        }
    }
    if (unit.seg_begin == 0)
        for (int g = 0; g < count; ++g) store(groups[g].total, groups[g], d, unit.out, unit.place);
}

void prefix(const PrefixCall& call, const PrefixUnit& unit, float* scratch) {
    if (in_pairs(call.q.dtype))
        prefix_of<Pair>(call, unit, scratch);
    else
        prefix_of<Single>(call, unit, scratch);
}

// -- K2 ----------------------------------------------------------------------------------------------------------------

std::int64_t suffix_scratch(const SuffixCall& call) {
    const std::int64_t d = call.q.head_dim;
    return 2 * group_floats(d) + GROUP_ROWS * SUFFIX_KEYS + SUFFIX_KEYS * d + packed_floats(SUFFIX_KEYS, d) + d +
           2 * GROUP_ROWS;
}

// Within a node over its segments, then along the path over its nodes, the first one as it is. -> group.state
void path_state(const SuffixCall& call, const Group& group, const std::int32_t* flags, std::int64_t head, const Lanes& next) {
    const std::int64_t d = call.q.head_dim;
    const Lanes &total = group.state, &node = group.total;
    int nodes = 0;
    for (std::int64_t slot = 0; slot < call.in.slots && flags[slot] != 0; ++slot) {
        const std::int64_t place = (slot * call.q.num_kv_heads + head) * call.q.rows * call.q.group;
        if (flags[slot] == 1) {
            if (nodes > 1) fold(total, node, group, d);
            load(call.in, place, group, d, nodes == 0 ? total : node);
            ++nodes;
        } else {
            load(call.in, place, group, d, next);
            fold(nodes == 1 ? total : node, next, group, d);
        }
    }
    if (nodes == 0) start(total, group.rows, d);
    if (nodes > 1) fold(total, node, group, d);
}

struct Pages {  // of one agent and head: where a token's key and value lie
    const SuffixCall& call;
    const std::int32_t* table;
    std::int64_t head;

    const char* row(const TokenPages& pages, std::int64_t token) const {
        return pages.data + table[token / call.page_tokens] * pages.stride_page + head * pages.stride_head +
               token % call.page_tokens * pages.stride_token;
    }
};

// Keys of tokens [first, first + keys), where they lie or widened.
template <class E>
void gather(const Pages& pages, std::int64_t first, int keys, float* k_wide, Tile& tile) {
    const SuffixCall& call = pages.call;
    const std::int64_t d = call.q.head_dim;
    const bool widened = E::DEPTH == 1 && call.q.dtype != FP32;
    tile.keys = keys;
    tile.k_runs = 0;
    for (int done = 0; done < keys;) {
        const std::int64_t token = first + done;
        const int run = static_cast<int>(min(call.page_tokens - token % call.page_tokens, keys - done));
        const char* k = pages.row(call.k, token);
        tile.behind[tile.k_runs] = pages.row(call.v, token);
        if (!widened)
            tile.k[tile.k_runs++] = Run{k, call.k.stride_token, run};
        else
            for (int i = 0; i < run; ++i)
                widen(call.q.dtype, k + i * call.k.stride_token, k_wide + (done + i) * d, d);
        done += run;
    }
    if (widened) tile.k[tile.k_runs++] = Run{reinterpret_cast<const char*>(k_wide), 4 * d, keys};
}

// o = acc / l and lse = ln(2^m l); 0 and -inf where no key was seen.
void finish(const SuffixCall& call, const Group& group, std::int64_t head, float* line) {
    const Queries& q = call.q;
    const std::int64_t d = q.head_dim, size = size_of(q.dtype);
    for (std::int64_t i = 0; i < group.count; ++i) {
        const std::int64_t row = (group.first + i) / q.group, g = (group.first + i) % q.group;
        if (call.row_slot[row] < 0) continue;
        const std::int64_t out = (row * q.num_kv_heads + head) * q.group + g;
        const float l = group.state.l[i], divisor = l == 0.0f ? 1.0f : l;
        call.lse[out] = l == 0.0f ? -INF : (group.state.m[i] + __builtin_log2f(l)) * 0x1.62e430p-1f;
        for (std::int64_t n = 0; n < d; ++n) line[n] = group.state.o[n * group.rows + i];
        for (std::int64_t n = 0; n < d; ++n) line[n] /= divisor;
        narrow(q.dtype, line, call.o + out * d * size, d);
    }
}

// What is to be fetched beside the values of a tile: the keys of [first, first + keys), run for run.
void coming(const Pages& pages, std::int64_t first, std::int64_t keys, Tile& tile) {
    const SuffixCall& call = pages.call;
    for (int run = 0; run < SUFFIX_KEYS; ++run) {
        tile.next[run] = tile.k[0].data;
        tile.next_size[run] = 0;
    }
    int run = 0;
    for (std::int64_t token = first; token < first + keys; ++run) {
        const std::int64_t page_end = (token / call.page_tokens + 1) * call.page_tokens, end = min(page_end, first + keys);
        tile.next[run] = pages.row(call.k, token);
        tile.next_size[run] = (end - token) * call.k.stride_token;
        token = end;
    }
}

template <class E>
void suffix_of(const SuffixCall& call, const SuffixUnit& unit, std::int64_t head, float* scratch) {
    const Queries& q = call.q;
    const SuffixTile& rows = *unit.tile;
    const std::int64_t d = q.head_dim, last = rows.row_end * q.group;
    const std::int32_t* table = call.page_table + rows.slot * call.table_stride;
    const Pages pages{call, table, head}, next_head{call, table, head + 1};
    for (std::int64_t first = rows.row_begin * q.group; first < last; first += GROUP_ROWS) {
        Memory memory{scratch};
        float* s = memory.take(GROUP_ROWS * SUFFIX_KEYS);
        auto* lengths = reinterpret_cast<std::int32_t*>(memory.take(GROUP_ROWS));
        auto* ahead = reinterpret_cast<std::int32_t*>(memory.take(GROUP_ROWS));
        float* k_wide = memory.take(SUFFIX_KEYS * d);
        float* line = memory.take(d);
        float* packed = memory.take(packed_floats(SUFFIX_KEYS, d));
        Tile tile;
        Group group = memory.group(d, first, last);
        const Lanes next = memory.state(d);
        const bool in_place = E::DEPTH == 1 && q.dtype == FP32 && group.vecs == 1;
        load_queries<E>(q, head, group, line);

        // Lanes without a row see what the first one sees.
        std::int64_t shortest = INT32_MAX, longest = 0;
        for (std::int64_t i = 0; i < group.rows; ++i) {
            const std::int64_t row = (group.first + (i < group.count ? i : 0)) / q.group;
            const std::int64_t length = std::int64_t{call.seq_lens[rows.slot]} - call.row_back[row];
            lengths[i] = static_cast<std::int32_t>(length < 0 ? 0 : length);
            shortest = min(shortest, lengths[i]);
            longest = lengths[i] > longest ? lengths[i] : longest;
        }
        // No processor foresees the first page.
        if (longest > 0 && head == unit.head_begin)
            for (std::int64_t i = 0; i < min(longest, call.page_tokens) * call.k.stride_token; i += 64)
                __builtin_prefetch(pages.row(call.k, 0) + i);

        path_state(call, group, call.path_table + rows.path * call.in.slots, head, next);
        swap(group.state, group.total);
        for (std::int64_t segment = 0; segment < longest; segment += call.segment) {
            // The first segment goes on from the path's state, every later one starts afresh and is folded in order.
            if (segment == 0)
                swap(group.state, group.total);
            else
                start(group.state, group.rows, d);
            const std::int64_t end = min(segment + call.segment, longest);
            for (std::int64_t begin = segment; begin < end; begin += SUFFIX_KEYS) {
                gather<E>(pages, begin, static_cast<int>(min(SUFFIX_KEYS, end - begin)), k_wide, tile);
                if (begin + SUFFIX_KEYS < longest)
                    coming(pages, begin + SUFFIX_KEYS, min(SUFFIX_KEYS, longest - begin - SUFFIX_KEYS), tile);
                else
                    coming(next_head, 0, head + 1 < unit.head_end ? min(SUFFIX_KEYS, longest) : 0, tile);
                for (std::int64_t i = 0; i < group.rows; ++i) ahead[i] = lengths[i] - static_cast<std::int32_t>(begin);
                const std::int64_t seen = shortest - begin < 0 ? 0 : shortest - begin;
                step<E>(tile, d, group, q.scale, static_cast<int>(min(seen, tile.keys)), ahead, s, [&] {
                    const int run = static_cast<int>(min(call.page_tokens, SUFFIX_KEYS));
                    if (in_place) {
                        tile.v_runs = tile.k_runs;
                        tile.block = DIM_BLOCK;
                        for (int i = 0; i < tile.v_runs; ++i)
                            tile.v[i] = Run{tile.behind[i], call.v.stride_token, tile.k[i].keys};
                    } else {
                        pack<E>(q.dtype, [&](int key) { return pages.row(call.v, begin + key); }, run, d, packed, tile);
                    }
                });
            }
            if (segment == 0)
                swap(group.state, group.total);
            else
                fold(group.total, group.state, group, d);
        }
        swap(group.state, group.total);
        finish(call, group, head, line);
    }
}

void suffix(const SuffixCall& call, const SuffixUnit& unit, float* scratch) {
    for (std::int64_t head = unit.head_begin; head < unit.head_end; ++head) {
        if (in_pairs(call.q.dtype))
            suffix_of<Pair>(call, unit, head, scratch);
        else
            suffix_of<Single>(call, unit, head, scratch);
    }
}

// -- the fold alone, and exp2 ------------------------------------------------------------------------------------------

void fold_rows(const FoldCall& call) {
    for (std::int64_t row = 0; row < call.rows; ++row) {
        const Vec m_a = set1(call.m_a[row]), m_b = set1(call.m_b[row]);
        const Vec m = max(m_a, m_b), pivot = pivot_of(m);
        const float alpha = exp2(m_a - pivot)[0], beta = exp2(m_b - pivot)[0];
        call.m[row] = m[0];
        call.l[row] = fma(call.l_a[row], alpha, call.l_b[row] * beta);
        for (std::int64_t i = row * call.head_dim; i < (row + 1) * call.head_dim; ++i)
            call.acc[i] = fma(call.acc_a[i], alpha, call.acc_b[i] * beta);
    }
}

void exp2_all(const float* x, float* y, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) y[i] = exp2(set1(x[i]))[0];
}

}  // namespace

const Kernels TABLE = {NAME,           static_cast<int>(GROUP_ROWS), UNIT_GROUPS, prefix_scratch,
                       suffix_scratch, prefix,                       suffix,      fold_rows,
                       exp2_all};

}  // namespace kvkern
