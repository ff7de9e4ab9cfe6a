// Mapping: memory of its own pages, so that it can be made read-only for real.
//
// A published prefix is never written again. Memory from malloc shares pages with its neighbours and cannot be
// protected; a mapping can, and a stray write then ends in SIGSEGV at the place of the mistake instead of a wrong answer.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

namespace kvkern {

constexpr std::size_t FILE_ALIGNMENT = 4096;       // where a .kv file puts its data
constexpr std::size_t HUGE_PAGE = std::size_t{2} << 20;  // x86-64, and aarch64 with 4 KiB pages

[[noreturn]] inline void throw_errno(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

inline std::size_t system_page() {
    static const std::size_t size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    return size;
}

inline std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

inline std::size_t checked_size(long long size_bytes) {
    // One huge page of headroom, so that rounding up cannot overflow.
    const long long limit = static_cast<long long>(PTRDIFF_MAX) - 2 * static_cast<long long>(HUGE_PAGE);
    if (size_bytes <= 0 || size_bytes > limit)
        throw std::invalid_argument("size_bytes: found " + std::to_string(size_bytes) + ", needed 1 to " +
                                    std::to_string(limit));
    return static_cast<std::size_t>(size_bytes);
}

// Ask for huge pages under memory that another allocator gave, before it is touched; its ends, which are no whole ones, stay
// as they are. Advice only: a kernel without huge pages refuses it, and the memory is as good.
inline void prefer_huge_pages(std::uintptr_t address, std::size_t size) {
    const std::uintptr_t begin = round_up(address, HUGE_PAGE), end = (address + size) / system_page() * system_page();
#ifdef MADV_HUGEPAGE
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

class Mapping {
public:
    // Anonymous, private, zero-filled, writable until protect().
    explicit Mapping(long long size_bytes) : size_(checked_size(size_bytes)) {
        length_ = round_up(size_, system_page());
        const bool large = length_ >= HUGE_PAGE;
        // Huge pages need an aligned start: map one more, then give the ends back.
        const std::size_t reserve = large ? length_ + HUGE_PAGE : length_;
        void* start = ::mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED) throw_errno("mmap of " + std::to_string(size_) + " bytes");
        base_ = static_cast<char*>(start);
        if (large) {
            trim(base_, reserve);
            prefer_huge_pages(reinterpret_cast<std::uintptr_t>(base_), length_);
        }
        data_ = base_;
    }

    // Bytes [offset, offset + size_bytes) of a file, read-only from the start. What a file that is cut short or
    // rewritten afterwards does is the kernel's affair: SIGBUS, or the new bytes.
    static std::unique_ptr<Mapping> map_file(const std::string& path, long long offset, long long size_bytes) {
        const std::size_t size = checked_size(size_bytes);
        if (path.find('\0') != std::string::npos) throw std::invalid_argument("path: found a NUL byte in it");
        if (offset < 0 || static_cast<unsigned long long>(offset) % FILE_ALIGNMENT != 0)
            throw std::invalid_argument("offset: found " + std::to_string(offset) + ", needed a multiple of " +
                                        std::to_string(FILE_ALIGNMENT));

        const Descriptor file(path);
        struct stat status {};
        if (::fstat(file.number, &status) != 0) throw_errno("fstat of " + path);
        if (!S_ISREG(status.st_mode)) throw std::invalid_argument(path + ": found no regular file, needed one to map");
        // Compared without a sum: offset + size may overflow.
        if (offset > status.st_size || size > static_cast<std::size_t>(status.st_size - offset))
            throw std::invalid_argument(path + ": found " + std::to_string(status.st_size) + " bytes, needed " +
                                        std::to_string(size) + " from offset " + std::to_string(offset));

        // A machine with pages of 64 KiB cannot start at every multiple of 4096.
        const std::size_t lead = static_cast<std::size_t>(offset) % system_page();
        const std::size_t length = round_up(lead + size, system_page());
        void* start = ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE, file.number,
                             static_cast<off_t>(offset - static_cast<long long>(lead)));
        if (start == MAP_FAILED) throw_errno("mmap of " + std::to_string(size) + " bytes of " + path);
        return std::unique_ptr<Mapping>(new Mapping(static_cast<char*>(start), length, lead, size));
    }

    ~Mapping() {
        if (base_ != nullptr) ::munmap(base_, length_);
    }

    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    // From here on a write is SIGSEGV. There is no way back.
    void protect() {
        if (protected_) return;
        if (::mprotect(base_, length_, PROT_READ) != 0)
            throw_errno("mprotect of " + std::to_string(size_) + " bytes");
        protected_ = true;
    }

    char* data() const { return data_; }
    std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(data_); }
    std::size_t size() const { return size_; }
    bool is_protected() const { return protected_; }

private:
    struct Descriptor {
        explicit Descriptor(const std::string& path) : number(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
            if (number < 0) throw_errno("open of " + path);
        }
        ~Descriptor() { ::close(number); }
        Descriptor(const Descriptor&) = delete;
        Descriptor& operator=(const Descriptor&) = delete;
        int number;
    };

    Mapping(char* base, std::size_t length, std::size_t lead, std::size_t size)
        : base_(base), data_(base + lead), length_(length), size_(size), protected_(true) {}

    void trim(char* start, std::size_t reserved) {
        const auto address = reinterpret_cast<std::uintptr_t>(start);
        const std::size_t head = round_up(address, HUGE_PAGE) - address;
        const std::size_t tail = reserved - head - length_;
        base_ = start + head;
        if (head != 0) ::munmap(start, head);
        if (tail != 0) ::munmap(base_ + length_, tail);
    }

    char* base_ = nullptr;
    char* data_ = nullptr;
    std::size_t length_ = 0;
    std::size_t size_ = 0;
    bool protected_ = false;
};

}  // namespace kvkern
