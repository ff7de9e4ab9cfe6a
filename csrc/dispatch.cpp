#include "dispatch.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "threads.h"

namespace kvkern {

namespace {

constexpr std::int64_t WORK_PER_THREAD = std::int64_t{1} << 21;  // multiply-adds, some 50 us: below, a wake costs more
constexpr std::int64_t UNITS_PER_THREAD = 3;                     // or the last one is waited for

const std::vector<const Kernels*>& found() {
    static const std::vector<const Kernels*> all = [] {
        std::vector<const Kernels*> list;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(&AVX512BF16);
        if (avx512) list.push_back(&AVX512);
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            list.push_back(&AVX2);  // who has both has F16C
#endif
        list.push_back(&PORTABLE);
        return list;
    }();
    return all;
}

void within(const char* table, std::int64_t index, const char* field, std::int64_t value, std::int64_t begin,
            std::int64_t end) {
    if (value < begin || value >= end)
        throw std::out_of_range(std::string(field) + " of " + table + " " + std::to_string(index) + ": found " +
                                std::to_string(value) + ", needed " + std::to_string(begin) + " to " +
                                std::to_string(end - 1));
}

std::int64_t segments_of(const Node& node) { return (node.tokens + node.segment - 1) / node.segment; }

void check(const PrefixCall& call) {
    const std::int64_t align = call.q.dtype == FP32 ? 4 : 2;
    for (std::int64_t i = 0; i < call.num_items; ++i) {
        const Item& item = call.items[i];
        if (item.row_begin == item.row_end) continue;
        within("item", i, "row begin", item.row_begin, 0, call.q.rows);
        within("item", i, "row end", item.row_end, item.row_begin, call.q.rows + 1);
        within("item", i, "node", item.node, 0, call.num_nodes);
        const Node& node = call.nodes[item.node];
        within("node", item.node, "padded tokens", node.padded, 0, std::int64_t{1} << 40);
        within("node", item.node, "tokens", node.tokens, 1, node.padded + 1);
        within("node", item.node, "tokens in a segment", node.segment, 1, std::int64_t{1} << 40);
        if (node.address == 0 || node.address % align != 0)
            throw std::out_of_range("address of node " + std::to_string(item.node) + ": found " +
                                    std::to_string(node.address) + ", needed that of a block");
        within("item", i, "segment begin", item.seg_begin, 0, segments_of(node));
        within("item", i, "segment end", item.seg_end, item.seg_begin + 1, segments_of(node) + 1);
        const std::int64_t states = item.seg_begin == 0 ? 1 : item.seg_end - item.seg_begin;
        within("item", i, "state", item.state, 0, call.out.slots - states + 1);
    }
}

void check(const SuffixCall& call) {
    for (std::int64_t i = 0; i < call.num_tiles; ++i) {
        const SuffixTile& tile = call.tiles[i];
        if (tile.row_begin == tile.row_end) continue;
        within("suffix tile", i, "row begin", tile.row_begin, 0, call.q.rows);
        within("suffix tile", i, "row end", tile.row_end, tile.row_begin, call.q.rows + 1);
        within("suffix tile", i, "slot", tile.slot, 0, call.slots);
        within("suffix tile", i, "path", tile.path, 0, call.num_paths);
        std::int64_t longest = 0;
        for (std::int64_t row = tile.row_begin; row < tile.row_end; ++row)
            longest = std::max(longest, std::int64_t{call.seq_lens[tile.slot]} - call.row_back[row]);
        within("slot", tile.slot, "suffix length", longest, 0, call.table_width * call.page_tokens + 1);
        const std::int32_t* pages = call.page_table + tile.slot * call.table_stride;
        for (std::int64_t page = 0; page * call.page_tokens < longest; ++page)
            within("slot", tile.slot, "page", pages[page], 0, call.num_pages);
    }
    for (std::int64_t path = 0; path < call.num_paths; ++path) {
        const std::int32_t* flags = call.path_table + path * call.in.slots;
        for (std::int64_t slot = 0; slot < call.in.slots && flags[slot] != 0; ++slot)
            within("path", path, "flag", flags[slot], 1, slot == 0 ? 2 : 3);
    }
}

std::size_t useful(std::int64_t threads, std::int64_t work) {
    return static_cast<std::size_t>(std::max<std::int64_t>(1, std::min(threads, work / WORK_PER_THREAD)));
}

std::size_t bytes(std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); }

// The items that hold rows; those of neighbouring rows as one. A plan cuts them to the tiles of a GPU.
std::vector<Item> joined(const PrefixCall& call) {
    std::vector<Item> items;
    for (std::int64_t i = 0; i < call.num_items; ++i) {
        const Item& item = call.items[i];
        if (item.row_begin == item.row_end) continue;
        Item* last = items.empty() ? nullptr : &items.back();
        if (last != nullptr && last->row_end == item.row_begin && last->node == item.node && last->seg_begin == item.seg_begin &&
            last->seg_end == item.seg_end && last->state == item.state)
            last->row_end = item.row_end;
        else
            items.push_back(item);
    }
    return items;
}

// A node's segments walked apart, for more threads than there are rows to keep busy: a state each, then folded in their order,
// as one who walks them all folds them. The bits are the same.
class Walk {
public:
    Walk(std::int64_t segments, std::int64_t rows, std::int64_t head_dim, std::int64_t place)
        : segments_(segments), rows_(rows), head_dim_(head_dim), place_(place),
          memory_(new float[static_cast<std::size_t>(segments * rows * (head_dim + 2))]) {}

    States states() const {
        float* m = memory_.get();
        return {m, m + segments_ * rows_, m + 2 * segments_ * rows_, segments_};
    }

    void fold(const Kernels& isa, const States& out) const {
        const States all = states();
        float *m = out.m + place_, *l = out.l + place_, *acc = out.acc + place_ * head_dim_;
        std::copy_n(all.m, rows_, m);
        std::copy_n(all.l, rows_, l);
        std::copy_n(all.acc, rows_ * head_dim_, acc);
        for (std::int64_t at = rows_; at < segments_ * rows_; at += rows_)
            isa.fold({rows_, head_dim_, m, l, acc, all.m + at, all.l + at, all.acc + at * head_dim_, m, l, acc});
    }

private:
    std::int64_t segments_, rows_, head_dim_, place_;
    std::unique_ptr<float[]> memory_;
};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* isa : found()) names.emplace_back(isa->name);
    return names;
}

const Kernels& kernels(const std::string& name) {
    for (const Kernels* isa : found())
        if (name.empty() || name == isa->name) return *isa;
    std::string names;
    for (const Kernels* isa : found()) names += (names.empty() ? "" : " or ") + std::string(isa->name);
    throw std::invalid_argument("instruction_set: found " + name + ", needed " + names);
}

void prefix_attention(const Kernels& isa, const PrefixCall& call, std::int64_t threads) {
    check(call);
    const Queries& q = call.q;
    const std::vector<Item> items = joined(call);
    std::int64_t groups = 0, work = 0;
    for (const Item& item : items) {
        const Node& node = call.nodes[item.node];
        const std::int64_t rows = (item.row_end - item.row_begin) * q.group;
        const std::int64_t keys = std::min(item.seg_end * node.segment, node.tokens) - item.seg_begin * node.segment;
        groups += (rows + isa.group_rows - 1) / isa.group_rows * q.num_kv_heads;
        work += rows * keys * 2 * q.head_dim * q.num_kv_heads;
    }
    const std::size_t useful_threads = useful(threads, work);
    // Groups of a unit share each tile of keys, but there must be units enough for every thread.
    const std::int64_t enough = static_cast<std::int64_t>(useful_threads) * UNITS_PER_THREAD;
    const std::int64_t unit_groups =
        useful_threads == 1 ? isa.unit_groups : std::clamp<std::int64_t>(groups / enough, 1, isa.unit_groups);
    const bool by_segment = useful_threads > 1 && groups < enough;

    std::vector<PrefixUnit> units;
    std::vector<Walk> walks;
    for (const Item& item : items) {
        const std::int64_t begin = item.row_begin * q.group, end = item.row_end * q.group, step = unit_groups * isa.group_rows;
        for (std::int64_t head = 0; head < q.num_kv_heads; ++head) {
            const std::int64_t place = (item.state * q.num_kv_heads + head) * q.rows * q.group;
            const std::int64_t between = q.num_kv_heads * q.rows * q.group;
            if (by_segment && item.seg_begin == 0 && item.seg_end > 1) {
                walks.emplace_back(item.seg_end, end - begin, q.head_dim, place + begin);
                for (std::int64_t seg = 0; seg < item.seg_end; ++seg)
                    for (std::int64_t first = begin; first < end; first += step)
                        units.push_back({item.node, head, first, std::min(first + step, end), seg, seg + 1,
                                         walks.back().states(), seg * (end - begin) - begin, 0});
            } else {
                for (std::int64_t first = begin; first < end; first += step)
                    units.push_back({item.node, head, first, std::min(first + step, end), item.seg_begin, item.seg_end, call.out,
                                     place, between});
            }
        }
    }
    share(units.size(), useful_threads, bytes(isa.prefix_scratch(call)),
          [&](std::size_t i, float* scratch) { isa.prefix(call, units[i], scratch); });
    share(walks.size(), useful_threads, 0, [&](std::size_t i, float*) { walks[i].fold(isa, call.out); });
}

void suffix_attention(const Kernels& isa, const SuffixCall& call, std::int64_t threads) {
    check(call);
    std::int64_t work = 0;
    for (std::int64_t i = 0; i < call.num_tiles; ++i) {
        const SuffixTile& tile = call.tiles[i];
        if (tile.row_begin == tile.row_end) continue;
        // A tile costs as much as 8 rows even where it has one.
        const std::int64_t rows = std::max<std::int64_t>(8, (tile.row_end - tile.row_begin) * call.q.group);
        work += rows * call.seq_lens[tile.slot] * 2 * call.q.head_dim * call.q.num_kv_heads;
    }
    // All heads of a tile in one unit, where there are tiles enough: the next head's pages are fetched while one is computed.
    const std::size_t useful_threads = useful(threads, work);
    const std::int64_t heads = call.q.num_kv_heads;
    const bool enough = call.num_tiles >= static_cast<std::int64_t>(useful_threads) * UNITS_PER_THREAD;
    const std::int64_t step = enough || useful_threads == 1 ? heads : 1;
    std::vector<SuffixUnit> units;
    for (std::int64_t i = 0; i < call.num_tiles; ++i)
        for (std::int64_t head = 0; head < heads; head += step) units.push_back({&call.tiles[i], head, head + step});
    share(units.size(), useful_threads, bytes(isa.suffix_scratch(call)),
          [&](std::size_t i, float* scratch) { isa.suffix(call, units[i], scratch); });
}

}  // namespace kvkern
