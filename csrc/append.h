// K0 append: the rows of a step go to the suffix pages of their agents.
//
// Row r of slot s = row_slot[r] lies at suffix position seq_lens[s] - 1 - row_back[r]: seq_lens counts the suffix with
// this step's rows already in it. Bytes are moved, not numbers, so one source serves every dtype and a NaN keeps its bits.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvkern {

struct Source {  // k or v of the rows: [rows, num_kv_heads, head_dim], strides in bytes, a head's row contiguous
    const char* data;
    std::array<std::int64_t, 2> strides;  // row, head
};

struct Pages {  // [num_pages, num_kv_heads, page_tokens, head_dim], strides in bytes, a token's row contiguous
    char* data;
    std::array<std::int64_t, 3> strides;  // page, head, token
};

struct Placement {
    const std::int32_t* page_table;  // [slots, table_width]
    const std::int32_t* seq_lens;    // [slots]
    const std::int32_t* row_slot;    // [rows], -1: a row that only fills a bucket
    const std::int32_t* row_back;    // [rows]
    std::int64_t rows, slots, num_pages, page_tokens;
    std::int64_t table_width, table_stride;  // in entries
};

struct Cell {
    std::int64_t page, token;
};

[[noreturn]] inline void refuse_row(std::int64_t row, const std::string& field, std::int64_t found, std::int64_t begin,
                                    std::int64_t end) {
    throw std::out_of_range(field + " of row " + std::to_string(row) + ": found " + std::to_string(found) +
                            ", needed " + std::to_string(begin) + " to " + std::to_string(end - 1));
}

inline Cell locate(const Placement& at, std::int64_t row) {
    const std::int64_t slot = at.row_slot[row];
    if (slot < 0 || slot >= at.slots) refuse_row(row, "row_slot", slot, -1, at.slots);

    const std::int64_t position = std::int64_t{at.seq_lens[slot]} - 1 - at.row_back[row];
    const std::int64_t capacity = at.table_width * at.page_tokens;
    if (position < 0 || position >= capacity) refuse_row(row, "suffix position", position, 0, capacity);

    const std::int64_t page = at.page_table[slot * at.table_stride + position / at.page_tokens];
    if (page < 0 || page >= at.num_pages) refuse_row(row, "page", page, 0, at.num_pages);
    return {page, position % at.page_tokens};
}

inline void copy_row(const Source& from, const Pages& to, std::int64_t row, Cell cell, std::int64_t num_kv_heads,
                     std::int64_t row_bytes) {
    const char* source = from.data + row * from.strides[0];
    char* target = to.data + cell.page * to.strides[0] + cell.token * to.strides[2];
    for (std::int64_t head = 0; head < num_kv_heads; ++head)
        std::memcpy(target + head * to.strides[1], source + head * from.strides[1],
                    static_cast<std::size_t>(row_bytes));
}

// Every row is checked before the first is written: a bad page table leaves the pages as they were.
inline void append(const Source& k, const Source& v, const Pages& k_pages, const Pages& v_pages, const Placement& at,
                   std::int64_t num_kv_heads, std::int64_t row_bytes) {
    for (std::int64_t row = 0; row < at.rows; ++row)
        if (at.row_slot[row] != -1) locate(at, row);

    for (std::int64_t row = 0; row < at.rows; ++row) {
        if (at.row_slot[row] == -1) continue;
        const Cell cell = locate(at, row);
        copy_row(k, k_pages, row, cell, num_kv_heads, row_bytes);
        copy_row(v, v_pages, row, cell, num_kv_heads, row_bytes);
    }
}

}  // namespace kvkern
