// The 64-bit sum of a block: sum over its little-endian words w_i of w_i * ((i * GOLDEN) | 1), mod 2**64.
//
// The factor is odd, so it has an inverse: a change of any one word always changes the sum. Addition mod 2**64 has no
// order, so the words may be shared among threads, and a GPU gets the same number. No defence against an attacker: SHA-256 is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace kvkern {

constexpr std::uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr std::size_t WORDS_PER_THREAD = std::size_t{1} << 19;  // 4 MiB: below, a thread costs more than it saves

inline std::uint64_t load_word(const char* from) {
    std::uint64_t word;
    std::memcpy(&word, from, sizeof word);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

inline std::uint64_t sum_words(const char* data, std::size_t words, std::uint64_t start_word) {
    // Four sums: one chain of dependent additions would wait on itself.
    std::uint64_t sums[4] = {0, 0, 0, 0};
    std::uint64_t factor = start_word * GOLDEN;
    std::size_t i = 0;
    for (; i + 4 <= words; i += 4, factor += 4 * GOLDEN)
        for (std::size_t lane = 0; lane < 4; ++lane)
            sums[lane] += load_word(data + 8 * (i + lane)) * ((factor + lane * GOLDEN) | 1);
    for (; i < words; ++i, factor += GOLDEN) sums[0] += load_word(data + 8 * i) * (factor | 1);
    return sums[0] + sums[1] + sums[2] + sums[3];
}

inline std::uint64_t block_sum(const char* data, std::size_t words, std::uint64_t start_word) {
    const std::size_t cores = std::max(1u, std::thread::hardware_concurrency());
    const std::size_t parts = std::min(cores, std::max<std::size_t>(1, words / WORDS_PER_THREAD));
    const auto edge = [&](std::size_t part) { return words / parts * part + std::min(part, words % parts); };

    std::vector<std::uint64_t> sums(parts, 0);
    const auto work = [&](std::size_t part) {
        const std::size_t begin = edge(part);
        sums[part] = sum_words(data + 8 * begin, edge(part + 1) - begin, start_word + begin);
    };

    std::vector<std::thread> threads;
    threads.reserve(parts);
    for (std::size_t part = 1; part < parts; ++part) {
        try {
            threads.emplace_back(work, part);
        } catch (const std::system_error&) {
            work(part);  // no thread to be had: the same sum, later
        }
    }
    work(0);
    for (auto& thread : threads) thread.join();

    std::uint64_t total = 0;
    for (const std::uint64_t sum : sums) total += sum;
    return total;
}

}  // namespace kvkern
