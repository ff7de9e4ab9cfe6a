// K1, K2 and the fold in vectors of LANES floats. Included once by each isa_*.cpp, which says LANES and TABLE.
//
// A lane is a row. A score is one chain of multiply-adds over head_dim, an output element one over the keys, a sum one over
// the keys: nothing is ever added across lanes. So how many rows lie side by side, how wide the vectors are and how keys or
// dimensions are blocked in registers cannot change a bit, and only the tiles of keys (attention.h) and fma itself do.
//
// Of a group of rows in vectors of NV * LANES: q and o [head_dim][rows], scores [keys][rows]; keys and values are read
// where they lie and broadcast. Nothing is packed but 16-bit tiles, which are widened once for all rows of a unit.
// Bound by fma where there are rows to fill the vectors, by reading keys and values where there are few.
//
// No function of the standard library is used here, and all has internal linkage; see attention.h.
#include <cstdint>

#include "attention.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvkern {
namespace {

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef std::int32_t IVec __attribute__((vector_size(4 * LANES), may_alias));

constexpr float INF = __builtin_inff();
constexpr int MAX_VECS = 3;
constexpr int UNIT_GROUPS = 4;

inline Vec set1(float x) { return x - Vec{}; }

// a * b + c: one rounding where the instruction set has it, two where it has not. Never left to the compiler.
inline Vec fma(Vec a, Vec b, Vec c) {
#if LANES == 16
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && LANES == 8
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__) && LANES == 4
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// 2^x for x < 128: within 1.2 parts in 2^24 (1.6 without fma), whole numbers exact, 0 below -126, NaN where x is.
inline Vec exp2(Vec x) {
    // The magic number leaves x rounded to an integer in its lowest bits, and 127 more: an exponent.
    const Vec magic = set1(12582912.0f + 127.0f), least = set1(-126.0f);
    const Vec at = least > x ? least : x;
    const Vec t = at + magic;
    const Vec f = at - (t - magic);
    const Vec scale = (Vec)((IVec)t << 23);

    Vec y = set1(0x1.44175ep-13f);
    y = fma(y, f, set1(0x1.5ef5d0p-10f));
    y = fma(y, f, set1(0x1.3b2a54p-7f));
    y = fma(y, f, set1(0x1.c6af9cp-5f));
    y = fma(y, f, set1(0x1.ebfbe0p-3f));
    y = fma(y, f, set1(0x1.62e430p-1f));
    y = fma(y, f, set1(1.0f));
    return (Vec)((IVec)(y * scale) & ~(IVec)(x < least));
}

// A state that has seen no key has m = -inf; a finite pivot keeps -inf - -inf (NaN) out of exp2.
inline Vec pivot_of(Vec m) { return m == set1(-INF) ? set1(0.0f) : m; }

// -- 16 bits to 32 and back --------------------------------------------------------------------------------------------

union Bits {
    float f;
    std::uint32_t u;
};

inline float float_of(std::uint32_t u) {
    Bits bits;
    bits.u = u;
    return bits.f;
}

inline std::uint32_t bits_of(float f) {
    Bits bits;
    bits.f = f;
    return bits.u;
}

inline float widen_half(std::uint16_t h) {
    const std::uint32_t magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
    // The exponent's bias is 15 there and 127 here: a product by 2^112 is exact and makes subnormals normal.
    const std::uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

void widen(Dtype dtype, const char* from, float* to, std::int64_t count) {
    if (dtype == FP32) {
        __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
        return;
    }
    const auto* source = reinterpret_cast<const std::uint16_t*>(from);
    if (dtype == BF16) {
        for (std::int64_t i = 0; i < count; ++i) to[i] = float_of(static_cast<std::uint32_t>(source[i]) << 16);
        return;
    }
    std::int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
    for (; i < count; ++i) to[i] = widen_half(source[i]);
}

// To nearest, ties to even, as torch does it; every NaN becomes the quiet one.
inline std::uint16_t narrow_brain(float x) {
    const std::uint32_t u = bits_of(x);
    return static_cast<std::uint16_t>(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline std::uint16_t narrow_half(float x) {
    const std::uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    std::uint32_t h;
    if (magnitude > 0x7f800000u) {
        h = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
        h = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum rounds at 2^-24, the step of subnormals
        h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        h = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<std::uint16_t>(sign | h);
}

inline void narrow(Dtype dtype, float x, char* to) {
    if (dtype == FP32) {
        __builtin_memcpy(to, &x, sizeof x);
        return;
    }
    const std::uint16_t bits = dtype == BF16 ? narrow_brain(x) : narrow_half(x);
    __builtin_memcpy(to, &bits, sizeof bits);
}

// -- a tile of keys against a group of rows ----------------------------------------------------------------------------

struct Run {  // rows of keys or values, stride floats apart
    const float* data;
    std::int64_t stride;
    int keys;
};

struct Tile {
    Run k[SUFFIX_KEYS], v[SUFFIX_KEYS];
    int runs, keys;
    bool scattered;  // read where they lie, in pages anywhere
};

// No processor foresees the next page: it is asked for while this one is multiplied.
inline void fetch(const Run& run, std::int64_t head_dim) {
    for (int key = 0; key < run.keys; ++key)
        for (std::int64_t d = 0; d < head_dim; d += 16) __builtin_prefetch(run.data + key * run.stride + d);
}

struct Lanes {  // a state in lanes: m, l [rows], o [head_dim][rows]
    float *m, *l, *o;
};

struct Group {
    float* q;  // [head_dim][rows], times scale
    Lanes state, total;
    int vecs;
    std::int64_t first, count;  // packed rows
};

// Broadcasts in a block: with the vectors of rows as many sums as hide the latency of fma, in 16 registers.
constexpr int block_of(int vecs) { return vecs == 1 ? 8 : 4; }

template <int KEYS, int NV>
inline void score_block(const float* q, std::int64_t head_dim, const float* k, std::int64_t stride, float* s) {
    constexpr int ROWS = NV * LANES;
    Vec sum[KEYS][NV];
#pragma GCC unroll 8
    for (int key = 0; key < KEYS; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) sum[key][j] = set1(0.0f);

    for (std::int64_t d = 0; d < head_dim; ++d) {
        Vec row[NV];
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) row[j] = *reinterpret_cast<const Vec*>(q + d * ROWS + j * LANES);
#pragma GCC unroll 8
        for (int key = 0; key < KEYS; ++key) {
            const Vec x = set1(k[key * stride + d]);
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) sum[key][j] = fma(x, row[j], sum[key][j]);
        }
    }

#pragma GCC unroll 8
    for (int key = 0; key < KEYS; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) *reinterpret_cast<Vec*>(s + key * ROWS + j * LANES) = sum[key][j];
}

// Fewer keys than a block has: the block of that many.
template <int KEYS, int NV>
inline void score_rest(const float* q, std::int64_t head_dim, const Run& k, int first, float* s) {
    if constexpr (KEYS > 0) {
        if (k.keys - first == KEYS)
            score_block<KEYS, NV>(q, head_dim, k.data + first * k.stride, k.stride, s + first * NV * LANES);
        else
            score_rest<KEYS - 1, NV>(q, head_dim, k, first, s);
    }
}

template <int NV>
inline void scores(const float* q, std::int64_t head_dim, const Run& k, float* s) {
    constexpr int KEYS = block_of(NV);
    int first = 0;
    for (; first + KEYS <= k.keys; first += KEYS)
        score_block<KEYS, NV>(q, head_dim, k.data + first * k.stride, k.stride, s + first * NV * LANES);
    score_rest<KEYS - 1, NV>(q, head_dim, k, first, s);
}

// o += v^T p over the keys of a run.
template <int NV>
inline void weigh(const float* p, const Run& v, std::int64_t head_dim, float* o) {
    constexpr int ROWS = NV * LANES, DIMS = block_of(NV);
    for (std::int64_t d = 0; d < head_dim; d += DIMS) {
        Vec sum[DIMS][NV];
#pragma GCC unroll 8
        for (int i = 0; i < DIMS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) sum[i][j] = *reinterpret_cast<const Vec*>(o + (d + i) * ROWS + j * LANES);

        const float* value = v.data + d;
        for (int key = 0; key < v.keys; ++key, value += v.stride) {
            Vec row[NV];
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) row[j] = *reinterpret_cast<const Vec*>(p + key * ROWS + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < DIMS; ++i) {
                const Vec x = set1(value[i]);
#pragma GCC unroll 3
                for (int j = 0; j < NV; ++j) sum[i][j] = fma(x, row[j], sum[i][j]);
            }
        }

#pragma GCC unroll 8
        for (int i = 0; i < DIMS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) *reinterpret_cast<Vec*>(o + (d + i) * ROWS + j * LANES) = sum[i][j];
    }
}

// The same for a key that not every row sees. A row that does not see it is left as it is, whatever v holds: 0 * NaN is NaN.
template <int NV>
inline void weigh_seen(const float* p, const float* value, std::int64_t head_dim, const IVec* seen, float* o) {
    constexpr int ROWS = NV * LANES;
    for (std::int64_t d = 0; d < head_dim; ++d) {
        const Vec x = set1(value[d]);
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
            Vec& sum = *reinterpret_cast<Vec*>(o + d * ROWS + j * LANES);
            sum = seen[j] ? fma(x, *reinterpret_cast<const Vec*>(p + j * LANES), sum) : sum;
        }
    }
}

template <int NV>
inline void scale(float* o, std::int64_t head_dim, const Vec* alpha) {
    IVec other = alpha[0] != set1(1.0f);
#pragma GCC unroll 3
    for (int j = 1; j < NV; ++j) other |= alpha[j] != set1(1.0f);
    int any = 0;
    for (int lane = 0; lane < LANES; ++lane) any |= other[lane];
    if (!any) return;
    for (std::int64_t d = 0; d < head_dim; ++d)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) *reinterpret_cast<Vec*>(o + (d * NV + j) * LANES) *= alpha[j];
}

// Scores -> weights, in place; m, l go on, and alpha is what the sums so far are to be multiplied by.
template <int NV>
inline void soften(float* s, int keys, float* m_ptr, float* l_ptr, Vec* alpha) {
    constexpr int ROWS = NV * LANES;
    Vec m[NV], pivot[NV], total[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) m[j] = *reinterpret_cast<const Vec*>(m_ptr + j * LANES);
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) m[j] = max(m[j], *reinterpret_cast<const Vec*>(s + key * ROWS + j * LANES));

#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
        pivot[j] = pivot_of(m[j]);
        alpha[j] = exp2(*reinterpret_cast<const Vec*>(m_ptr + j * LANES) - pivot[j]);
        total[j] = set1(0.0f);
    }
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
            Vec& p = *reinterpret_cast<Vec*>(s + key * ROWS + j * LANES);
            p = exp2(p - pivot[j]);
            total[j] += p;
        }

#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
        Vec& l = *reinterpret_cast<Vec*>(l_ptr + j * LANES);
        *reinterpret_cast<Vec*>(m_ptr + j * LANES) = m[j];
        l = fma(l, alpha[j], total[j]);
    }
}

// The group's state goes on over a tile. seen: keys of the tile that every row sees; lengths [rows]: keys that each sees.
template <int NV>
void step(const Tile& tile, std::int64_t head_dim, const Group& group, int seen, const std::int32_t* lengths, float* s) {
    constexpr int ROWS = NV * LANES;
    int first = 0;
    for (int run = 0; run < tile.runs; first += tile.k[run++].keys) {
        if (tile.scattered) {
            if (run + 1 < tile.runs) fetch(tile.k[run + 1], head_dim);
            fetch(tile.v[run], head_dim);
        }
        scores<NV>(group.q, head_dim, tile.k[run], s + first * ROWS);
    }
    IVec length[NV] = {};
    for (int key = seen; key < tile.keys; ++key)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
            length[j] = *reinterpret_cast<const IVec*>(lengths + j * LANES);
            Vec& score = *reinterpret_cast<Vec*>(s + key * ROWS + j * LANES);
            score = length[j] > key ? score : set1(-INF);
        }

    Vec alpha[NV];
    soften<NV>(s, tile.keys, group.state.m, group.state.l, alpha);
    scale<NV>(group.state.o, head_dim, alpha);
    first = 0;
    for (int run = 0; run < tile.runs; first += tile.v[run++].keys) {
        const Run& v = tile.v[run];
        const int whole = static_cast<int>(min(seen - first < 0 ? 0 : seen - first, v.keys));
        weigh<NV>(s + first * ROWS, Run{v.data, v.stride, whole}, head_dim, group.state.o);
        for (int key = whole; key < v.keys; ++key) {
            IVec mask[NV];
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) mask[j] = length[j] > first + key;
            weigh_seen<NV>(s + (first + key) * ROWS, v.data + key * v.stride, head_dim, mask, group.state.o);
        }
    }
}

void step(const Tile& tile, std::int64_t head_dim, const Group& group, int seen, const std::int32_t* lengths, float* s) {
    if (group.vecs == 1)
        step<1>(tile, head_dim, group, seen, lengths, s);
    else if (group.vecs == 2)
        step<2>(tile, head_dim, group, seen, lengths, s);
    else
        step<3>(tile, head_dim, group, seen, lengths, s);
}

// -- states ------------------------------------------------------------------------------------------------------------

inline Vec& vec(float* data, std::int64_t index) { return *reinterpret_cast<Vec*>(data + index * LANES); }

void start(const Lanes& state, int vecs, std::int64_t head_dim) {
    for (int j = 0; j < vecs; ++j) {
        vec(state.m, j) = set1(-INF);
        vec(state.l, j) = set1(0.0f);
    }
    for (std::int64_t i = 0; i < head_dim * vecs; ++i) vec(state.o, i) = set1(0.0f);
}

// a = fold(a, b): always left to right, order is part of the result.
void fold(const Lanes& a, const Lanes& b, int vecs, std::int64_t head_dim) {
    Vec alpha[MAX_VECS], beta[MAX_VECS];
    for (int j = 0; j < vecs; ++j) {
        const Vec m = max(vec(a.m, j), vec(b.m, j)), pivot = pivot_of(m);
        alpha[j] = exp2(vec(a.m, j) - pivot);
        beta[j] = exp2(vec(b.m, j) - pivot);
        vec(a.m, j) = m;
        vec(a.l, j) = fma(vec(a.l, j), alpha[j], vec(b.l, j) * beta[j]);
    }
    for (std::int64_t d = 0; d < head_dim; ++d)
        for (int j = 0; j < vecs; ++j) {
            Vec& sum = vec(a.o, d * vecs + j);
            sum = fma(sum, alpha[j], vec(b.o, d * vecs + j) * beta[j]);
        }
}

// Index of packed row 0 of a slot and head.
inline std::int64_t place_of(const Queries& q, std::int64_t slot, std::int64_t head) {
    return (slot * q.num_kv_heads + head) * q.rows * q.group;
}

void load(const States& from, std::int64_t place, const Group& group, std::int64_t head_dim, const Lanes& to) {
    const std::int64_t rows = group.vecs * LANES;
    if (group.count < rows) start(to, group.vecs, head_dim);
    place += group.first;
    for (std::int64_t i = 0; i < group.count; ++i) {
        to.m[i] = from.m[place + i];
        to.l[i] = from.l[place + i];
        const float* acc = from.acc + (place + i) * head_dim;
        for (std::int64_t d = 0; d < head_dim; ++d) to.o[d * rows + i] = acc[d];
    }
}

void store(const Lanes& from, const Group& group, std::int64_t head_dim, const States& to, std::int64_t place) {
    const std::int64_t rows = group.vecs * LANES;
    place += group.first;
    for (std::int64_t i = 0; i < group.count; ++i) {
        to.m[place + i] = from.m[i];
        to.l[place + i] = from.l[i];
        float* acc = to.acc + (place + i) * head_dim;
        for (std::int64_t d = 0; d < head_dim; ++d) acc[d] = from.o[d * rows + i];
    }
}

// Rows as lanes, times scale; lanes without a row hold 0. line: head_dim floats.
void load_queries(const Queries& q, std::int64_t head, const Group& group, float* line) {
    const std::int64_t rows = group.vecs * LANES;
    for (std::int64_t i = 0; i < q.head_dim * group.vecs; ++i) vec(group.q, i) = set1(0.0f);
    for (std::int64_t i = 0; i < group.count; ++i) {
        const std::int64_t row = (group.first + i) / q.group, g = (group.first + i) % q.group;
        widen(q.dtype, q.data + row * q.stride_row + (head * q.group + g) * q.stride_head, line, q.head_dim);
        for (std::int64_t d = 0; d < q.head_dim; ++d) group.q[d * rows + i] = line[d] * q.scale;
    }
}

// -- memory ------------------------------------------------------------------------------------------------------------

constexpr std::int64_t GROUP_ROWS = MAX_VECS * LANES;

inline std::int64_t group_floats(std::int64_t head_dim) { return GROUP_ROWS * (3 * head_dim + 4); }

// Memory of a thread in the order it is taken. Every size is a multiple of LANES, so every part is aligned.
struct Memory {
    float* at;

    float* take(std::int64_t floats) {
        float* part = at;
        at += floats;
        return part;
    }

    Lanes state(std::int64_t head_dim) {
        Lanes lanes;
        lanes.m = take(GROUP_ROWS);
        lanes.l = take(GROUP_ROWS);
        lanes.o = take(GROUP_ROWS * head_dim);
        return lanes;
    }

    Group group(std::int64_t head_dim, std::int64_t first, std::int64_t last) {
        Group group;
        group.q = take(GROUP_ROWS * head_dim);
        group.state = state(head_dim);
        group.total = state(head_dim);
        group.first = first;
        group.count = min(GROUP_ROWS, last - first);
        group.vecs = static_cast<int>((group.count + LANES - 1) / LANES);
        return group;
    }
};

inline void swap(Lanes& a, Lanes& b) {
    const Lanes c = a;
    a = b;
    b = c;
}

inline std::int64_t size_of(Dtype dtype) { return dtype == FP32 ? 4 : 2; }

// -- K1 ----------------------------------------------------------------------------------------------------------------

std::int64_t prefix_scratch(const PrefixCall& call) {
    const std::int64_t d = call.q.head_dim;
    return UNIT_GROUPS * group_floats(d) + GROUP_ROWS * PREFIX_KEYS + 2 * PREFIX_KEYS * d + d;
}

void prefix(const PrefixCall& call, const PrefixUnit& unit, float* scratch) {
    const Queries& q = call.q;
    const Item& item = *unit.item;
    const Node& node = call.nodes[item.node];
    const std::int64_t d = q.head_dim, size = size_of(q.dtype), head_bytes = node.padded * d * size;
    const char* keys = reinterpret_cast<const char*>(node.address) + (2 * call.layer * q.num_kv_heads + unit.head) * head_bytes;
    const char* values = keys + q.num_kv_heads * head_bytes;

    Memory memory{scratch};
    float* s = memory.take(GROUP_ROWS * PREFIX_KEYS);
    float* k_wide = memory.take(PREFIX_KEYS * d);
    float* v_wide = memory.take(PREFIX_KEYS * d);
    float* line = memory.take(d);
    Group groups[UNIT_GROUPS];
    int count = 0;
    for (std::int64_t first = unit.first; first < unit.last; first += GROUP_ROWS) {
        groups[count] = memory.group(d, first, unit.last);
        load_queries(q, unit.head, groups[count++], line);
    }

    Tile tile;
    tile.runs = 1;
    tile.scattered = false;
    for (std::int64_t seg = item.seg_begin; seg < item.seg_end; ++seg) {
        for (int g = 0; g < count; ++g) start(groups[g].state, groups[g].vecs, d);
        const std::int64_t end = min((seg + 1) * node.segment, node.tokens);
        for (std::int64_t first = seg * node.segment; first < end; first += PREFIX_KEYS) {
            tile.keys = static_cast<int>(min(PREFIX_KEYS, end - first));
            const char *k = keys + first * d * size, *v = values + first * d * size;
            if (q.dtype == FP32) {
                tile.k[0] = Run{reinterpret_cast<const float*>(k), d, tile.keys};
                tile.v[0] = Run{reinterpret_cast<const float*>(v), d, tile.keys};
            } else {
                widen(q.dtype, k, k_wide, tile.keys * d);
                widen(q.dtype, v, v_wide, tile.keys * d);
                tile.k[0] = Run{k_wide, d, tile.keys};
                tile.v[0] = Run{v_wide, d, tile.keys};
            }
            for (int g = 0; g < count; ++g) step(tile, d, groups[g], tile.keys, nullptr, s);
        }

        for (int g = 0; g < count; ++g) {
            Group& group = groups[g];
            if (item.seg_begin > 0)
                store(group.state, group, d, call.out, place_of(q, item.state + seg - item.seg_begin, unit.head));
            else if (seg == 0)
                swap(group.state, group.total);
            else
                fold(group.total, group.state, group.vecs, d);
        }
    }
    if (item.seg_begin == 0)
        for (int g = 0; g < count; ++g)
            store(groups[g].total, groups[g], d, call.out, place_of(q, item.state, unit.head));
}

// -- K2 ----------------------------------------------------------------------------------------------------------------

std::int64_t suffix_scratch(const SuffixCall& call) {
    const std::int64_t d = call.q.head_dim;
    return 2 * group_floats(d) + GROUP_ROWS * SUFFIX_KEYS + 2 * SUFFIX_KEYS * d + d + 2 * GROUP_ROWS;
}

// Within a node over its segments, then along the path over its nodes, the first one as it is. -> group.state
void path_state(const SuffixCall& call, const Group& group, const std::int32_t* flags, std::int64_t head, const Lanes& next) {
    const std::int64_t d = call.q.head_dim;
    const Lanes &total = group.state, &node = group.total;
    start(total, group.vecs, d);
    int nodes = 0;
    for (std::int64_t slot = 0; slot < call.in.slots && flags[slot] != 0; ++slot) {
        const std::int64_t place = place_of(call.q, slot, head);
        if (flags[slot] == 1) {
            if (nodes > 1) fold(total, node, group.vecs, d);
            load(call.in, place, group, d, nodes == 0 ? total : node);
            ++nodes;
        } else {
            load(call.in, place, group, d, next);
            fold(nodes == 1 ? total : node, next, group.vecs, d);
        }
    }
    if (nodes > 1) fold(total, node, group.vecs, d);
}

// Keys and values of the slot's tokens [first, first + keys): where they lie in fp32, widened into one run otherwise.
void gather(const SuffixCall& call, std::int64_t slot, std::int64_t head, std::int64_t first, int keys, float* k_wide,
            float* v_wide, Tile& tile) {
    const std::int64_t d = call.q.head_dim;
    const std::int32_t* pages = call.page_table + slot * call.table_stride;
    tile.keys = keys;
    tile.runs = 0;
    tile.scattered = call.q.dtype == FP32;
    for (int done = 0; done < keys;) {
        const std::int64_t page = pages[(first + done) / call.page_tokens], token = (first + done) % call.page_tokens;
        const int run = static_cast<int>(min(call.page_tokens - token, keys - done));
        const char* k = call.k.data + page * call.k.stride_page + head * call.k.stride_head + token * call.k.stride_token;
        const char* v = call.v.data + page * call.v.stride_page + head * call.v.stride_head + token * call.v.stride_token;
        if (call.q.dtype == FP32) {
            tile.k[tile.runs] = Run{reinterpret_cast<const float*>(k), call.k.stride_token / 4, run};
            tile.v[tile.runs++] = Run{reinterpret_cast<const float*>(v), call.v.stride_token / 4, run};
        } else {
            for (int i = 0; i < run; ++i) {
                widen(call.q.dtype, k + i * call.k.stride_token, k_wide + (done + i) * d, d);
                widen(call.q.dtype, v + i * call.v.stride_token, v_wide + (done + i) * d, d);
            }
        }
        done += run;
    }
    if (call.q.dtype != FP32) {
        tile.runs = 1;
        tile.k[0] = Run{k_wide, d, keys};
        tile.v[0] = Run{v_wide, d, keys};
    }
}

// o = acc / l and lse = ln(2^m l); 0 and -inf where no key was seen.
void finish(const SuffixCall& call, const Group& group, std::int64_t head, float* line) {
    const Queries& q = call.q;
    const std::int64_t d = q.head_dim, rows = group.vecs * LANES, size = size_of(q.dtype);
    for (int j = 0; j < group.vecs; ++j) {
        const Vec l = vec(group.state.l, j), divisor = l == set1(0.0f) ? set1(1.0f) : l;
        for (std::int64_t i = 0; i < d; ++i) vec(group.state.o, i * group.vecs + j) /= divisor;
    }
    for (std::int64_t i = 0; i < group.count; ++i) {
        const std::int64_t row = (group.first + i) / q.group, g = (group.first + i) % q.group;
        if (call.row_slot[row] < 0) continue;
        const std::int64_t out = (row * q.num_kv_heads + head) * q.group + g;
        const float l = group.state.l[i];
        call.lse[out] = l == 0.0f ? -INF : (group.state.m[i] + __builtin_log2f(l)) * 0x1.62e430p-1f;
        for (std::int64_t n = 0; n < d; ++n) line[n] = group.state.o[n * rows + i];
        char* o = call.o + out * d * size;
        for (std::int64_t n = 0; n < d; ++n) narrow(q.dtype, line[n], o + n * size);
    }
}

void suffix(const SuffixCall& call, const SuffixTile& tile, std::int64_t head, float* scratch) {
    const Queries& q = call.q;
    const std::int64_t d = q.head_dim, last = tile.row_end * q.group;
    for (std::int64_t first = tile.row_begin * q.group; first < last; first += GROUP_ROWS) {
        Memory memory{scratch};
        float* s = memory.take(GROUP_ROWS * SUFFIX_KEYS);
        auto* lengths = reinterpret_cast<std::int32_t*>(memory.take(GROUP_ROWS));
        auto* ahead = reinterpret_cast<std::int32_t*>(memory.take(GROUP_ROWS));
        float* k_wide = memory.take(SUFFIX_KEYS * d);
        float* v_wide = memory.take(SUFFIX_KEYS * d);
        float* line = memory.take(d);
        Group group = memory.group(d, first, last);
        const Lanes next = memory.state(d);
        load_queries(q, head, group, line);

        // Lanes without a row see what the first one sees.
        std::int64_t shortest = INT32_MAX, longest = 0;
        for (std::int64_t i = 0; i < group.vecs * LANES; ++i) {
            const std::int64_t row = (group.first + (i < group.count ? i : 0)) / q.group;
            const std::int64_t length = std::int64_t{call.seq_lens[tile.slot]} - call.row_back[row];
            lengths[i] = static_cast<std::int32_t>(length < 0 ? 0 : length);
            shortest = min(shortest, lengths[i]);
            longest = lengths[i] > longest ? lengths[i] : longest;
        }

        Tile keys;
        if (longest > 0) {
            gather(call, tile.slot, head, 0, static_cast<int>(min(SUFFIX_KEYS, longest)), k_wide, v_wide, keys);
            if (keys.scattered) fetch(keys.k[0], d);
        }
        path_state(call, group, call.path_table + tile.path * call.in.slots, head, next);
        swap(group.state, group.total);
        for (std::int64_t segment = 0; segment < longest; segment += call.segment) {
            // The first segment goes on from the path's state, every later one starts afresh and is folded in order.
            if (segment == 0)
                swap(group.state, group.total);
            else
                start(group.state, group.vecs, d);
            const std::int64_t end = min(segment + call.segment, longest);
            for (std::int64_t at = segment; at < end; at += SUFFIX_KEYS) {
                if (at > 0)
                    gather(call, tile.slot, head, at, static_cast<int>(min(SUFFIX_KEYS, end - at)), k_wide, v_wide, keys);
                for (std::int64_t i = 0; i < group.vecs * LANES; ++i) ahead[i] = lengths[i] - static_cast<std::int32_t>(at);
                const std::int64_t seen = shortest - at < 0 ? 0 : shortest - at;
                step(keys, d, group, static_cast<int>(min(seen, keys.keys)), ahead, s);
            }
            if (segment == 0)
                swap(group.state, group.total);
            else
                fold(group.total, group.state, group.vecs, d);
        }
        swap(group.state, group.total);
        finish(call, group, head, line);
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
