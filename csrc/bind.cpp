// kvkern._C: what Python sees of csrc/. Addresses come as integers (tensor.data_ptr()), so no torch header is needed and
// one build serves every torch. Shapes and dtypes are checked by kvkern/cpu.py and kvkern/native.py; here is checked what
// could write or read outside its memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cerrno>
#include <exception>
#include <memory>
#include <string>
#include <system_error>

#include "append.h"
#include "bind_rows.h"
#include "blocksum.h"
#include "dispatch.h"
#include "mapping.h"

namespace py = pybind11;
using namespace kvkern;

namespace {

template <class T>
T* pointer(std::uintptr_t address, const char* field, std::int64_t count, std::int64_t align = alignof(T)) {
    if (address == 0 && count > 0) throw std::invalid_argument(std::string(field) + ": found address 0");
    if (address % static_cast<std::uintptr_t>(align) != 0)
        throw std::invalid_argument(std::string(field) + ": found an unaligned address");
    return reinterpret_cast<T*>(address);
}

void in_range(const char* field, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most)
        throw std::invalid_argument(std::string(field) + ": found " + std::to_string(value) + ", needed " + std::to_string(least) +
                                    " to " + std::to_string(most));
}

// A number of things, or of bytes of a row. The product of two does not overflow.
constexpr std::int64_t MAX_SIZE = std::int64_t{1} << 31;
void check_size(const char* field, std::int64_t value, std::int64_t least = 0) { in_range(field, value, least, MAX_SIZE); }

void bind_append(std::uintptr_t k, std::uintptr_t v, std::uintptr_t k_pages, std::uintptr_t v_pages,
                 std::uintptr_t page_table, std::uintptr_t seq_lens, std::uintptr_t row_slot, std::uintptr_t row_back,
                 std::int64_t rows, std::int64_t num_kv_heads, std::int64_t row_bytes,
                 std::array<std::int64_t, 2> k_strides, std::array<std::int64_t, 2> v_strides,
                 std::array<std::int64_t, 3> k_page_strides, std::array<std::int64_t, 3> v_page_strides,
                 std::int64_t num_pages, std::int64_t page_tokens, std::int64_t slots, std::int64_t table_width,
                 std::int64_t table_stride) {
    check_size("rows", rows);
    check_size("num_kv_heads", num_kv_heads);
    check_size("row_bytes", row_bytes);
    check_size("num_pages", num_pages);
    check_size("slots", slots);
    check_size("table_width", table_width);
    check_size("page_tokens", page_tokens, 1);

    const Source from_k{pointer<const char>(k, "k", rows), k_strides};
    const Source from_v{pointer<const char>(v, "v", rows), v_strides};
    const Pages to_k{pointer<char>(k_pages, "k_pages", num_pages), k_page_strides};
    const Pages to_v{pointer<char>(v_pages, "v_pages", num_pages), v_page_strides};
    const Placement at{pointer<const std::int32_t>(page_table, "page_table", slots * table_width),
                       pointer<const std::int32_t>(seq_lens, "seq_lens", slots),
                       pointer<const std::int32_t>(row_slot, "row_slot", rows),
                       pointer<const std::int32_t>(row_back, "row_back", rows),
                       rows,
                       slots,
                       num_pages,
                       page_tokens,
                       table_width,
                       table_stride};
    const py::gil_scoped_release unlocked;
    append(from_k, from_v, to_k, to_v, at, num_kv_heads, row_bytes);
}

std::uint64_t bind_block_sum(std::uintptr_t address, std::int64_t size_bytes, std::uint64_t start_word) {
    in_range("size_bytes", size_bytes, 0, INT64_MAX);
    if (size_bytes % 8 != 0)
        throw std::invalid_argument("size_bytes: found " + std::to_string(size_bytes) + ", needed a multiple of 8");
    const char* data = pointer<const char>(address, "address", size_bytes);
    const py::gil_scoped_release unlocked;
    return block_sum(data, static_cast<std::size_t>(size_bytes) / 8, start_word);
}

using Addresses = std::array<std::uintptr_t, 3>;

std::int64_t size_of(Dtype dtype) { return dtype == FP32 ? 4 : 2; }

template <std::size_t N>
void whole_elements(const char* field, const std::array<std::int64_t, N>& strides, std::int64_t size) {
    for (const std::int64_t stride : strides)
        if (stride % size != 0)
            throw std::invalid_argument(std::string(field) + ": found " + std::to_string(stride) +
                                        " bytes, needed a multiple of " + std::to_string(size));
}

Queries queries(std::uintptr_t q, int dtype, std::array<std::int64_t, 4> shape, std::array<std::int64_t, 2> strides, float scale) {
    const auto [rows, num_kv_heads, group, head_dim] = shape;
    for (const std::int64_t size : shape) check_size("shape", size);
    if (dtype < FP32 || dtype > BF16) throw std::invalid_argument("dtype: found " + std::to_string(dtype) + ", needed 0 to 2");
    if (group < 1 || head_dim % 16 != 0 || head_dim < 16)
        throw std::invalid_argument("shape: needed a group of at least 1 and a head_dim that is a multiple of 16");
    const std::int64_t size = size_of(static_cast<Dtype>(dtype));
    whole_elements("q_strides", strides, size);
    return {pointer<const char>(q, "q", rows, size), strides[0], strides[1], rows, num_kv_heads, group, head_dim, scale,
            static_cast<Dtype>(dtype)};
}

States states(const Addresses& parts, std::int64_t slots, std::int64_t rows) {
    check_size("num_states", slots);
    return {pointer<float>(parts[0], "m", slots * rows), pointer<float>(parts[1], "l", slots * rows),
            pointer<float>(parts[2], "acc", slots * rows), slots};
}

void bind_prefix_attention(std::uintptr_t q, std::uintptr_t node_table, std::uintptr_t items, const Addresses& state, int dtype,
                           std::array<std::int64_t, 4> shape, std::array<std::int64_t, 2> q_strides, float scale,
                           std::int64_t num_nodes, std::int64_t num_items, std::int64_t num_states, std::int64_t layer,
                           std::int64_t threads, const std::string& instruction_set) {
    check_size("num_nodes", num_nodes);
    check_size("num_items", num_items);
    check_size("layer", layer);
    const Kernels& isa = kernels(instruction_set);
    PrefixCall call{};
    call.q = queries(q, dtype, shape, q_strides, scale);
    call.nodes = pointer<const Node>(node_table, "node_table", num_nodes);
    call.num_nodes = num_nodes;
    call.items = pointer<const Item>(items, "items", num_items);
    call.num_items = num_items;
    call.layer = layer;
    call.out = states(state, num_states, call.q.rows);
    const py::gil_scoped_release unlocked;
    prefix_attention(isa, call, threads);
}

void bind_suffix_attention(std::uintptr_t q, std::uintptr_t k_pages, std::uintptr_t v_pages, std::uintptr_t page_table,
                           std::uintptr_t seq_lens, std::uintptr_t row_slot, std::uintptr_t row_back,
                           std::uintptr_t suffix_tiles, std::uintptr_t path_table, const Addresses& state, std::uintptr_t o,
                           std::uintptr_t lse, int dtype, std::array<std::int64_t, 4> shape,
                           std::array<std::int64_t, 2> q_strides, std::array<std::int64_t, 3> k_page_strides,
                           std::array<std::int64_t, 3> v_page_strides, float scale, std::int64_t num_pages,
                           std::int64_t page_tokens, std::int64_t slots, std::int64_t table_width, std::int64_t table_stride,
                           std::int64_t num_tiles, std::int64_t num_paths, std::int64_t num_states, std::int64_t segment,
                           std::int64_t threads, const std::string& instruction_set) {
    check_size("num_pages", num_pages);
    check_size("slots", slots);
    check_size("table_width", table_width);
    check_size("num_tiles", num_tiles);
    check_size("num_paths", num_paths);
    check_size("num_states", num_states);
    check_size("page_tokens", page_tokens, 1);
    check_size("segment", segment, 1);
    const Kernels& isa = kernels(instruction_set);
    SuffixCall call{};
    call.q = queries(q, dtype, shape, q_strides, scale);
    const std::int64_t size = size_of(call.q.dtype);
    whole_elements("k_page_strides", k_page_strides, size);
    whole_elements("v_page_strides", v_page_strides, size);
    call.k = {pointer<const char>(k_pages, "k_pages", num_pages, size), k_page_strides[0], k_page_strides[1], k_page_strides[2]};
    call.v = {pointer<const char>(v_pages, "v_pages", num_pages, size), v_page_strides[0], v_page_strides[1], v_page_strides[2]};
    call.num_pages = num_pages;
    call.page_tokens = page_tokens;
    call.page_table = pointer<const std::int32_t>(page_table, "page_table", slots * table_width);
    call.slots = slots;
    call.table_width = table_width;
    call.table_stride = table_stride;
    call.seq_lens = pointer<const std::int32_t>(seq_lens, "seq_lens", slots);
    call.row_slot = pointer<const std::int32_t>(row_slot, "row_slot", call.q.rows);
    call.row_back = pointer<const std::int32_t>(row_back, "row_back", call.q.rows);
    call.tiles = pointer<const SuffixTile>(suffix_tiles, "suffix_tiles", num_tiles);
    call.num_tiles = num_tiles;
    call.path_table = pointer<const std::int32_t>(path_table, "path_table", num_paths * num_states);
    call.num_paths = num_paths;
    call.segment = segment;
    call.in = states(state, num_states, call.q.rows);
    call.o = pointer<char>(o, "o", call.q.rows, size);
    call.lse = pointer<float>(lse, "lse", call.q.rows);
    const py::gil_scoped_release unlocked;
    suffix_attention(isa, call, threads);
}

void bind_fold(const Addresses& a, const Addresses& b, const Addresses& out, std::int64_t rows, std::int64_t head_dim,
               const std::string& instruction_set) {
    check_size("rows", rows);
    check_size("head_dim", head_dim);
    const Kernels& isa = kernels(instruction_set);
    const States from = states(a, 1, rows), next = states(b, 1, rows), to = states(out, 1, rows);
    const FoldCall call{rows, head_dim, from.m, from.l, from.acc, next.m, next.l, next.acc, to.m, to.l, to.acc};
    const py::gil_scoped_release unlocked;
    isa.fold(call);
}

void bind_exp2(std::uintptr_t x, std::uintptr_t y, std::int64_t count, const std::string& instruction_set) {
    check_size("count", count);
    kernels(instruction_set).exp2(pointer<const float>(x, "x", count), pointer<float>(y, "y", count), count);
}

// std::system_error -> OSError(errno, "what failed: errno text").
void translate(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const std::system_error& failure) {
        PyErr_SetObject(PyExc_OSError, py::make_tuple(failure.code().value(), failure.what()).ptr());
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of kvkern: protected memory, block sums, and K0, K1 and K2 on the CPU.";
    py::register_local_exception_translator(&translate);

    py::class_<Mapping>(m, "Mapping", py::buffer_protocol(),
                        "Memory of its own pages: zero-filled and writable until protect(). Freed with its last reference.")
        .def(py::init<long long>(), py::arg("size_bytes"), py::call_guard<py::gil_scoped_release>())
        .def_static("map_file", &Mapping::map_file, py::arg("path"), py::arg("offset"), py::arg("size_bytes"),
                    py::call_guard<py::gil_scoped_release>(),
                    "Bytes [offset, offset + size_bytes) of a file, read-only; offset a multiple of 4096.")
        .def("protect", &Mapping::protect, py::call_guard<py::gil_scoped_release>(),
             "Make the pages read-only for good: a write through any pointer is SIGSEGV.")
        .def_property_readonly("address", &Mapping::address)
        .def_property_readonly("size", &Mapping::size, "In bytes, as asked for.")
        .def_property_readonly("protected", &Mapping::is_protected)
        .def_buffer([](Mapping& mapping) {
            return py::buffer_info(mapping.data(), 1, py::format_descriptor<unsigned char>::format(), 1,
                                   {static_cast<py::ssize_t>(mapping.size())}, {py::ssize_t{1}}, mapping.is_protected());
        });

    m.def("append", &bind_append, py::arg("k"), py::arg("v"), py::arg("k_pages"), py::arg("v_pages"),
          py::arg("page_table"), py::arg("seq_lens"), py::arg("row_slot"), py::arg("row_back"), py::kw_only(),
          py::arg("rows"), py::arg("num_kv_heads"), py::arg("row_bytes"), py::arg("k_strides"), py::arg("v_strides"),
          py::arg("k_page_strides"), py::arg("v_page_strides"), py::arg("num_pages"), py::arg("page_tokens"),
          py::arg("slots"), py::arg("table_width"), py::arg("table_stride"),
          "K0: scatter k and v rows to their pages. Addresses and strides in bytes, table_stride in entries.");

    m.def(
        "prefer_huge_pages",
        [](std::uintptr_t address, std::int64_t size_bytes) {
            in_range("size_bytes", size_bytes, 0, INT64_MAX);
            prefer_huge_pages(address, static_cast<std::size_t>(size_bytes));
        },
        py::arg("address"), py::arg("size_bytes"), "Advise huge pages for memory that has not been touched; nothing else changes.");

    m.def("block_sum", &bind_block_sum, py::arg("address"), py::arg("size_bytes"), py::arg("start_word") = 0,
          "Sum of words times position-dependent odd factors, mod 2**64; start_word is the index of the first word.");

    m.def("prefix_attention", &bind_prefix_attention, py::arg("q"), py::arg("node_table"), py::arg("items"), py::arg("state"),
          py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("q_strides"), py::arg("scale"), py::arg("num_nodes"),
          py::arg("num_items"), py::arg("num_states"), py::arg("layer"), py::arg("threads"), py::arg("instruction_set") = "",
          "K1. shape: rows, num_kv_heads, G, head_dim; dtype 0 fp32, 1 fp16, 2 bf16; scale: sm_scale * log2(e).");

    m.def("suffix_attention", &bind_suffix_attention, py::arg("q"), py::arg("k_pages"), py::arg("v_pages"),
          py::arg("page_table"), py::arg("seq_lens"), py::arg("row_slot"), py::arg("row_back"), py::arg("suffix_tiles"),
          py::arg("path_table"), py::arg("state"), py::arg("o"), py::arg("lse"), py::kw_only(), py::arg("dtype"),
          py::arg("shape"), py::arg("q_strides"), py::arg("k_page_strides"), py::arg("v_page_strides"), py::arg("scale"),
          py::arg("num_pages"), py::arg("page_tokens"), py::arg("slots"), py::arg("table_width"), py::arg("table_stride"),
          py::arg("num_tiles"), py::arg("num_paths"), py::arg("num_states"), py::arg("segment"), py::arg("threads"),
          py::arg("instruction_set") = "", "K2. As prefix_attention; o and lse of rows that no tile holds are left as they are.");

    m.def("fold", &bind_fold, py::arg("a"), py::arg("b"), py::arg("out"), py::kw_only(), py::arg("rows"), py::arg("head_dim"),
          py::arg("instruction_set") = "", "K3: states of contiguous rows, each (m, l, acc); out may be one of them.");

    m.def("exp2", &bind_exp2, py::arg("x"), py::arg("y"), py::arg("count"), py::kw_only(), py::arg("instruction_set") = "",
          "The kernels' own exp2, so that it can be judged.");

    bind_rows(m);

    m.def("instruction_sets", &instruction_sets, "Instruction sets that run here, the best one, which is the default, first.");
}
