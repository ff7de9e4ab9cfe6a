// A few threads that stay, and work shared among them by a counter.
//
// Which thread takes which unit changes no bit, so there is no schedule to keep: a thread that wakes late finds the work
// done and sleeps again.
//
// They are those of torch wherever its OpenMP is libgomp: its threads spin for milliseconds after an operator of torch, and
// others would share the cores with them; this way they are awake when they are asked. Found at run time, so that csrc needs
// no OpenMP of its own. Elsewhere, and in a forked process, where libgomp hangs, a pool of our own: made by the first call that
// wants it, again after a fork, and never destroyed, its threads sleep in it when the process ends.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace kvkern {

// One floating-point environment for all threads, whatever the caller has set: flushing subnormals changes bits.
inline void guarded(const std::function<void()>& body) {
    struct Environment {
        Environment() {
            std::fegetenv(&was);
            std::fesetenv(FE_DFL_ENV);
        }
        ~Environment() { std::fesetenv(&was); }
        std::fenv_t was;
    } const environment;
    body();
}

// body() in torch's OpenMP threads.
class Team {
public:
    // libgomp's entry for a parallel region, or null: not in this process, or not to be used in it.
    using Entry = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static Entry of_torch() {
        static const Entry entry = reinterpret_cast<Entry>(::dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        return forked_ ? nullptr : entry;
    }

    static void run(Entry entry, std::size_t threads, const std::function<void()>& body) {
        Region region{&body, {}, nullptr};
        entry(&Region::enter, &region, static_cast<unsigned>(threads), 0);
        if (region.failed != nullptr) std::rethrow_exception(region.failed);
    }

private:
    struct Region {
        const std::function<void()>* body;
        std::mutex mutex;
        std::exception_ptr failed;

        // No exception may leave a parallel region.
        static void enter(void* data) {
            auto* region = static_cast<Region*>(data);
            try {
                guarded(*region->body);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(region->mutex);
                region->failed = std::current_exception();
            }
        }
    };

    static inline std::atomic<bool> forked_{false};
    static inline const int watched_ = ::pthread_atfork(nullptr, nullptr, [] { forked_ = true; });
};

class Pool {
public:
    // The pool of this process. After a fork the parent's threads are gone, and its locks are held by nobody: a new one.
    static Pool& of_process() {
        static std::atomic<Pool*> current{nullptr};
        const pid_t self = ::getpid();
        Pool* pool = current.load(std::memory_order_acquire);
        while (pool == nullptr || pool->process_ != self) {
            Pool* made = new Pool(self);
            if (current.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) return *made;
            delete made;
        }
        return *pool;
    }

    // body() in this thread, and beside it in up to threads - 1 others; returns when all have returned. A second caller
    // finds the pool taken and works alone.
    void run(std::size_t threads, const std::function<void()>& body) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (threads < 2 || !turn.owns_lock()) {
            guarded(body);
            return;
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(threads - 1);
            body_ = &body;
            failed_ = nullptr;
            open_ = threads - 1 < size_ ? threads - 1 : size_;
        }
        wake_.notify_all();
        std::exception_ptr failed;
        try {
            guarded(body);
        } catch (...) {
            failed = std::current_exception();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = 0;
        done_.wait(lock, [&] { return active_ == 0; });
        body_ = nullptr;
        if (failed == nullptr) failed = failed_;
        if (failed != nullptr) std::rethrow_exception(failed);
    }

private:
    explicit Pool(pid_t process) : process_(process) {}

    void grow(std::size_t size) {
        while (size_ < size) {
            try {
                std::thread([this] { work(); }).detach();
            } catch (const std::system_error&) {
                return;  // no thread to be had: the same work by fewer
            }
            ++size_;
        }
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return open_ > 0; });
            --open_;
            ++active_;
            const std::function<void()>& body = *body_;
            lock.unlock();
            std::exception_ptr failed;
            try {
                guarded(body);
            } catch (...) {
                failed = std::current_exception();
            }
            lock.lock();
            if (failed != nullptr) failed_ = failed;
            if (--active_ == 0) done_.notify_one();
        }
    }

    const pid_t process_;
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void()>* body_ = nullptr;
    std::exception_ptr failed_;
    std::size_t size_ = 0, open_ = 0, active_ = 0;
};

// unit(index, scratch) for every index, on up to `threads` threads; each has scratch of its own.
template <class Unit>
void share(std::size_t units, std::size_t threads, std::size_t scratch_bytes, const Unit& unit) {
    constexpr std::align_val_t LINE{64};
    std::atomic<std::size_t> next{0};
    const auto body = [&] {
        struct Scratch {
            explicit Scratch(std::size_t bytes) : data(static_cast<float*>(::operator new(bytes, LINE))) {}
            ~Scratch() { ::operator delete(data, LINE); }
            Scratch(const Scratch&) = delete;
            Scratch& operator=(const Scratch&) = delete;
            float* data;
        } const scratch(scratch_bytes);
        for (std::size_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) unit(i, scratch.data);
    };
    const Team::Entry team = Team::of_torch();
    if (threads < 2 || units < 2)
        guarded(body);
    else if (team != nullptr)
        Team::run(team, threads, body);
    else
        Pool::of_process().run(threads < units ? threads : units, body);
}

}  // namespace kvkern
