// Row kernels for Python: addresses and sizes checked, work shared among threads.
#include "bind_rows.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "append.h"
#include "dispatch.h"
#include "rows.h"
#include "threads.h"

namespace py = pybind11;
using namespace kvkern;

namespace {

constexpr std::int64_t WORK_PER_THREAD = std::int64_t{1} << 15;  // elements: below, a wake costs more
constexpr std::int64_t MAX_SIZE = std::int64_t{1} << 24;
constexpr std::int64_t MAX_COUNT = std::int64_t{1} << 31;  // of rows, slots, pages: the product of two does not overflow

const RowKernels& row_kernels(const std::string& name) {
    const std::string chosen = kernels(name).name;
#if defined(__x86_64__)
    for (const RowKernels* isa : {&ROWS_AVX512BF16, &ROWS_AVX512, &ROWS_AVX2})
        if (chosen == isa->name) return *isa;
#endif
    return ROWS_PORTABLE;
}

void needed(bool good, const std::string& field, const std::string& what) {
    if (!good) throw std::invalid_argument(field + ": needed " + what);
}

bool is_count(std::int64_t value) { return value >= 0 && value <= MAX_COUNT; }

std::int64_t size_in(int dtype) {
    needed(dtype >= FP32 && dtype <= BF16, "dtype", "0 to 2");
    return dtype == FP32 ? 4 : 2;
}

template <class T = char>
T* elements(std::uintptr_t address, const char* field, std::int64_t count, std::int64_t align) {
    needed(address != 0 || count == 0, field, "an address, found 0");
    needed(address % static_cast<std::uintptr_t>(align) == 0, field, "an aligned address");
    return reinterpret_cast<T*>(address);
}

template <std::size_t N>
void aligned(const char* field, const std::array<std::int64_t, N>& strides, std::int64_t align) {
    for (const std::int64_t stride : strides) needed(stride % align == 0, field, "strides of whole elements");
}

// row(index, scratch) of all rows, some rows a unit.
template <class Row>
void share_rows(std::int64_t rows, std::int64_t size, std::int64_t floats, std::int64_t threads, const Row& row) {
    const std::int64_t most = std::max<std::int64_t>(1, std::min(threads, rows * size / WORK_PER_THREAD));
    const std::int64_t step = most == 1 ? std::max<std::int64_t>(rows, 1) : std::max<std::int64_t>(1, rows / (4 * most));
    share(static_cast<std::size_t>((rows + step - 1) / step), static_cast<std::size_t>(most),
          static_cast<std::size_t>(floats) * sizeof(float), [&](std::size_t unit, float* scratch) {
              const std::int64_t first = static_cast<std::int64_t>(unit) * step;
              for (std::int64_t i = first; i < std::min(first + step, rows); ++i) row(i, scratch);
          });
}

void bind_norm(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t out, std::uintptr_t sum, int dtype,
               std::array<std::int64_t, 2> shape, std::array<std::int64_t, 2> strides, float eps, std::int64_t threads,
               const std::string& instruction_set) {
    const std::int64_t align = size_in(dtype);
    needed(is_count(shape[0]) && shape[1] >= 1 && shape[1] <= MAX_SIZE, "shape", "rows and 1 to 2^24 elements in each");
    needed((residual == 0) == (sum == 0), "sum", "an address where there is a residual");
    aligned("x, residual", strides, align);
    const RowNorm call{elements<const char>(x, "x", shape[0], align), elements<const char>(residual, "residual", 0, align),
                       elements<const char>(weight, "weight", 1, align), elements(out, "out", shape[0], align),
                       elements(sum, "sum", 0, align), shape[0], shape[1], strides[0], strides[1], eps, static_cast<Dtype>(dtype)};
    const RowKernels& isa = row_kernels(instruction_set);
    const py::gil_scoped_release unlocked;
    share_rows(call.rows, call.size, 2 * call.size, threads,
               [&](std::int64_t row, float* scratch) { isa.norm(call, row, scratch); });
}

void bind_gate(std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out, int dtype, std::array<std::int64_t, 2> shape,
               std::array<std::int64_t, 2> strides, std::int64_t threads, const std::string& instruction_set) {
    const std::int64_t align = size_in(dtype);
    needed(is_count(shape[0]) && shape[1] >= 1 && shape[1] <= MAX_SIZE, "shape", "rows and 1 to 2^24 elements in each");
    aligned("gate, up", strides, align);
    const RowGate call{elements<const char>(gate, "gate", shape[0], align), elements<const char>(up, "up", shape[0], align),
                       elements(out, "out", shape[0], align), shape[0], shape[1], strides[0], strides[1],
                       static_cast<Dtype>(dtype)};
    const RowKernels& isa = row_kernels(instruction_set);
    const py::gil_scoped_release unlocked;
    share_rows(call.rows, call.size, 2 * (call.size + 16), threads,
               [&](std::int64_t row, float* scratch) { isa.gate(call, row, scratch); });
}

using Addresses = std::array<std::uintptr_t, 4>;

// numbers: q, k, v, out; turns: q_norm, k_norm (0 for none), cos, sin; pages: k and v; places: page_table, seq_lens, row_slot,
// row_back. shape: rows, query heads, kv heads, head_dim; table: slots, width, stride, pages, tokens of a page.
void bind_append_fused(const Addresses& numbers, const Addresses& turns, std::array<std::uintptr_t, 2> pages,
                       const Addresses& places, int dtype, std::array<std::int64_t, 4> shape,
                       std::array<std::int64_t, 6> strides, std::array<std::int64_t, 2> turn_strides,
                       std::array<std::int64_t, 6> page_strides, std::array<std::int64_t, 5> table, std::array<float, 2> eps,
                       std::int64_t threads, const std::string& instruction_set) {
    const std::int64_t align = size_in(dtype);
    const auto [rows, heads, kv_heads, head_dim] = shape;
    const auto [slots, width, table_stride, num_pages, page_tokens] = table;
    needed(is_count(rows) && heads >= 1 && heads <= MAX_SIZE && kv_heads >= 1 && kv_heads <= MAX_SIZE, "shape", "rows and heads");
    needed(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= MAX_SIZE, "shape", "an even head_dim");
    needed(is_count(slots) && is_count(width) && is_count(num_pages) && is_count(page_tokens) && page_tokens >= 1, "table",
           "sizes of 0 to 2^31, pages of 1 token or more");
    aligned("q, k, v", strides, align);
    aligned("cos, sin", turn_strides, align);
    aligned("pages", page_strides, align);
    const char* q = elements<const char>(numbers[0], "q", rows, align);
    const char* k = elements<const char>(numbers[1], "k", rows, align);
    const Source v{elements<const char>(numbers[2], "v", rows, align), {strides[4], strides[5]}};
    char* out = elements(numbers[3], "out", rows, align);
    const char* q_norm = elements<const char>(turns[0], "q_norm", 0, align);
    const char* k_norm = elements<const char>(turns[1], "k_norm", 0, align);
    const char* cos = elements<const char>(turns[2], "cos", rows, align);
    const char* sin = elements<const char>(turns[3], "sin", rows, align);
    const Pages k_pages{elements(pages[0], "k_pages", num_pages, align), {page_strides[0], page_strides[1], page_strides[2]}};
    const Pages v_pages{elements(pages[1], "v_pages", num_pages, align), {page_strides[3], page_strides[4], page_strides[5]}};
    const Placement at{elements<const std::int32_t>(places[0], "page_table", slots * width, 4),
                       elements<const std::int32_t>(places[1], "seq_lens", slots, 4),
                       elements<const std::int32_t>(places[2], "row_slot", rows, 4),
                       elements<const std::int32_t>(places[3], "row_back", rows, 4),
                       rows, slots, num_pages, page_tokens, width, table_stride};
    const RowKernels& isa = row_kernels(instruction_set);
    const std::int64_t kv = kv_heads, dim = head_dim, all = heads;
    const py::gil_scoped_release unlocked;
    for (std::int64_t row = 0; row < at.rows; ++row)
        if (at.row_slot[row] != -1) locate(at, row);
    share_rows(at.rows, (all + 2 * kv) * dim, 4 * dim, threads, [&](std::int64_t row, float* scratch) {
        HeadTurn turn{nullptr, q_norm, cos + row * turn_strides[0], sin + row * turn_strides[1], nullptr, dim, eps[0],
                      static_cast<Dtype>(dtype)};
        for (std::int64_t head = 0; head < all; ++head) {
            turn.x = q + row * strides[0] + head * strides[1];
            turn.out = out + (row * all + head) * dim * align;
            isa.turn(turn, scratch);
        }
        if (at.row_slot[row] == -1) return;
        const Cell cell = locate(at, row);
        turn.weight = k_norm;
        turn.eps = eps[1];
        for (std::int64_t head = 0; head < kv; ++head) {
            turn.x = k + row * strides[2] + head * strides[3];
            turn.out = k_pages.data + cell.page * k_pages.strides[0] + head * k_pages.strides[1] + cell.token * k_pages.strides[2];
            isa.turn(turn, scratch);
        }
        copy_row(v, v_pages, row, cell, kv, dim * align);
    });
}

}  // namespace

void bind_rows(py::module_& m) {
    m.def("rms_norm", &bind_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("out"), py::arg("sum"),
          py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("eps"), py::arg("threads"),
          py::arg("instruction_set") = "", "RMS norm of rows, or of x + residual, which goes to sum; 0 for no residual.");
    m.def("silu_mul", &bind_gate, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("dtype"), py::arg("shape"),
          py::arg("strides"), py::arg("threads"), py::arg("instruction_set") = "", "silu(gate) * up.");
    m.def("append_fused", &bind_append_fused, py::arg("numbers"), py::arg("turns"), py::arg("pages"), py::arg("places"),
          py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("turn_strides"), py::arg("page_strides"),
          py::arg("table"), py::arg("eps"), py::arg("threads"), py::arg("instruction_set") = "",
          "K0 with norm and RoPE of q and k before it. Strides in bytes.");
}
