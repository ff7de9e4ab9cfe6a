// The way from bind.cpp to the kernels: which instruction set, every index checked, work cut into units and shared.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"

namespace kvkern {

// Names of the instruction sets that run here, the best one first.
std::vector<std::string> instruction_sets();

// The kernels of this name, of the best instruction set for "". Throws std::invalid_argument for one that does not run here.
const Kernels& kernels(const std::string& name);

// K1 and K2 on up to `threads` threads. Throw std::out_of_range for an index outside its table; nothing is written then.
void prefix_attention(const Kernels& isa, const PrefixCall& call, std::int64_t threads);
void suffix_attention(const Kernels& isa, const SuffixCall& call, std::int64_t threads);

}  // namespace kvkern
