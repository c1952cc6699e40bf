// Memory and thread helpers shared by the operators. Without OpenMP everything runs on one thread.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dotresize {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// Uninitialised, aligned to a cache line.
template <typename T>
Buffer<T> make_buffer(int64_t count) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// A barrier that gives the core away. OpenMP's own spins; with a neighbour on the core, waiting
// for a thread that cannot run cost a factor of thirty. Here a waiting thread offers the core to
// whoever can run, again and again for about as long as being woken from sleep would take (some
// 50 us), and then sleeps.
class Barrier {
 public:
  explicit Barrier(int parties) : parties_(parties) {}

  // Whoever waits long calls `meanwhile` again and again.
  template <typename Meanwhile>
  void wait(const Meanwhile& meanwhile) {
    if (parties_ == 1) return;
    const int64_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties_) {
      arrived_.store(0, std::memory_order_relaxed);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        phase_.store(phase + 1, std::memory_order_release);
      }
      changed_.notify_all();
      return;
    }
    for (int offer = 0; offer < kOffers; ++offer) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      std::this_thread::yield();
    }
    const auto passed = [&] { return phase_.load(std::memory_order_acquire) != phase; };
    std::unique_lock<std::mutex> lock(mutex_);
    while (!changed_.wait_for(lock, kPatience, passed)) {
      lock.unlock();
      meanwhile();
      lock.lock();
    }
  }

 private:
  static constexpr int kOffers = 100;
  static constexpr auto kPatience = std::chrono::milliseconds(20);
  std::mutex mutex_;
  std::condition_variable changed_;
  const int parties_;
  std::atomic<int> arrived_{0};
  std::atomic<int64_t> phase_{0};
};

}  // namespace dotresize
