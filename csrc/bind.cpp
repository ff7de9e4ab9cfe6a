// kvkern._C: what Python sees of csrc/. Addresses come as integers (tensor.data_ptr()), so no torch header is needed and
// one build serves every torch. Shapes and dtypes are checked by kvkern/cpu.py; here is checked what could write or read
// outside its memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <exception>
#include <memory>
#include <string>
#include <system_error>

#include "append.h"
#include "blocksum.h"
#include "mapping.h"

namespace py = pybind11;
using namespace kvkern;

namespace {

template <class T>
T* pointer(std::uintptr_t address, const char* field, std::int64_t count) {
    if (address == 0 && count > 0) throw std::invalid_argument(std::string(field) + ": found address 0");
    if (address % alignof(T) != 0) throw std::invalid_argument(std::string(field) + ": found an unaligned address");
    return reinterpret_cast<T*>(address);
}

void not_negative(const char* field, std::int64_t value) {
    if (value < 0) throw std::invalid_argument(std::string(field) + ": found " + std::to_string(value) + ", needed 0 or more");
}

void bind_append(std::uintptr_t k, std::uintptr_t v, std::uintptr_t k_pages, std::uintptr_t v_pages,
                 std::uintptr_t page_table, std::uintptr_t seq_lens, std::uintptr_t row_slot, std::uintptr_t row_back,
                 std::int64_t rows, std::int64_t num_kv_heads, std::int64_t row_bytes,
                 std::array<std::int64_t, 2> k_strides, std::array<std::int64_t, 2> v_strides,
                 std::array<std::int64_t, 3> k_page_strides, std::array<std::int64_t, 3> v_page_strides,
                 std::int64_t num_pages, std::int64_t page_tokens, std::int64_t slots, std::int64_t table_width,
                 std::int64_t table_stride) {
    not_negative("rows", rows);
    not_negative("num_kv_heads", num_kv_heads);
    not_negative("row_bytes", row_bytes);
    not_negative("num_pages", num_pages);
    not_negative("slots", slots);
    not_negative("table_width", table_width);
    if (page_tokens < 1) throw std::invalid_argument("page_tokens: found " + std::to_string(page_tokens) + ", needed 1 or more");

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
    not_negative("size_bytes", size_bytes);
    if (size_bytes % 8 != 0)
        throw std::invalid_argument("size_bytes: found " + std::to_string(size_bytes) + ", needed a multiple of 8");
    const char* data = pointer<const char>(address, "address", size_bytes);
    const py::gil_scoped_release unlocked;
    return block_sum(data, static_cast<std::size_t>(size_bytes) / 8, start_word);
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
    m.doc() = "The compiled part of kvkern: protected memory, K0 append, block sums.";
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

    m.def("block_sum", &bind_block_sum, py::arg("address"), py::arg("size_bytes"), py::arg("start_word") = 0,
          "Sum of words times position-dependent odd factors, mod 2**64; start_word is the index of the first word.");
}
