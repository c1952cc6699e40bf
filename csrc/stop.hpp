// How a kernel that runs for long hears of Ctrl-C, and how work is shared out among threads that
// listen. Only the thread that Python called may ask it for signals; the others read a flag.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>

namespace dotresize {

// Whether the calling thread hears of signals at all, and whether a handler has raised in it. Set
// once, by module.cpp; null without Python.
inline bool (*hears_signals)() = nullptr;
inline bool (*signal_raised)() = nullptr;

// Thrown where a kernel has stopped early; what it was to write is then unspecified.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

// Made by the thread that Python called, at the start of an operator, and shared with its team.
class Stop {
 public:
  // To be asked between blocks of work, a few milliseconds apart at most. Any thread may.
  bool asked() {
    if (asked_.load(std::memory_order_relaxed)) return true;
    if (!listens_ || std::this_thread::get_id() != caller_) return false;
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return false;
    next_ = now + kPause;
    if (signal_raised()) asked_.store(true, std::memory_order_relaxed);
    return asked_.load(std::memory_order_relaxed);
  }

  // Throws if anybody asked.
  void check() const {
    if (asked_.load(std::memory_order_relaxed)) throw Interrupted();
  }

  // The caller goes on listening until `done` reaches `count`; other threads return at once.
  void listen(const std::atomic<int64_t>& done, int64_t count) {
    if (!listens_ || std::this_thread::get_id() != caller_) return;
    const auto start = std::chrono::steady_clock::now();
    while (done.load(std::memory_order_acquire) < count && !asked()) {
      // Sleeping costs up to its own length, so that only a long wait is slept through.
      if (std::chrono::steady_clock::now() - start < kPause) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }

 private:
  // Between two looks, each of which takes the interpreter's lock.
  static constexpr auto kPause = std::chrono::milliseconds(50);
  const std::thread::id caller_ = std::this_thread::get_id();
  const bool listens_ = hears_signals != nullptr && hears_signals();
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kPause;
  std::atomic<bool> asked_{false};
};

// Calls work(index) for every index below `count`, each on one thread, in rising order as threads
// come free. Each thread makes its own `work` by make_work(); of exceptions both may throw
// std::bad_alloc alone. Throws that, or Interrupted, after all threads have ended.
template <typename MakeWork>
void share_out(int64_t count, int num_threads, Stop& stop, const MakeWork& make_work) {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> out_of_memory{false};
  const int team = static_cast<int>(count < num_threads ? count : num_threads);
#pragma omp parallel num_threads(team < 1 ? 1 : team) if (team > 1)
  {
    try {
      auto work = make_work();
      for (int64_t index = next++; index < count && !out_of_memory; index = next++) {
        if (stop.asked()) break;
        work(index);
        done.fetch_add(1, std::memory_order_release);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      done.fetch_add(count, std::memory_order_release);  // nobody waits for the rest
    }
    stop.listen(done, count);
  }
  if (out_of_memory) throw std::bad_alloc();
  stop.check();
}

}  // namespace dotresize
