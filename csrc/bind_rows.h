// Row kernels (rows.h) for Python; called by bind.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_rows(pybind11::module_& m);
