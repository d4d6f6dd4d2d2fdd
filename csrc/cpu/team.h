// The threads that run a list of steps together: how they share the units of a step, and wait until it is done.
#pragma once
#include <sched.h>
#include <stdint.h>
#include <time.h>

// Declared here, because not every compiler that knows -fopenmp comes with omp.h. torch's OpenMP runtime provides them.
#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
#else
namespace {
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
}  // namespace
#endif

namespace {

// The next unit of one thread's share of a step, on a cache line of its own.
struct Share {
  int64_t next;
  char line[64 - sizeof(int64_t)];
};

// Takes the next unit of a share; several threads may do so at the same time.
inline int64_t take(Share& share) {
  int64_t unit;
#pragma omp atomic capture
  unit = share.next++;
  return unit;
}

// How much of a step is done, on a cache line of its own.
struct Progress {
  int64_t done;
  char line[64 - sizeof(int64_t)];

  // What this thread has written is seen by all who find that so much is done.
  void add(int64_t count) {
    if (count > 0) __atomic_add_fetch(&done, count, __ATOMIC_ACQ_REL);
  }

  // Waits until all is done. Threads wait for work and not for each other: a thread that has lost its core to another
  // program holds nobody up unless it is in the middle of a unit. They spin at first, since a system call takes longer
  // than most waits. When that takes long, `help` runs what others have not begun, once, and then this thread gives
  // its core away.
  template <class Help>
  void wait(int64_t all, Help help) {
    constexpr int SPINS = 5000;  // about 50 us on a CPU whose pause takes 40 cycles
    for (int spins = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < all; ++spins) {
      if (spins < SPINS) {
        pause();
      } else {
        if (spins == SPINS) help();
        sched_yield();
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
};

// For tests: sleeps for a time that looks random and follows from the seed, the step and the thread; not at all with
// seed 0. Half of the steps start at once, so that some threads run far ahead of others.
inline void delay(uint32_t seed, int64_t step, int thread) {
  if (seed == 0) return;
  uint32_t mixed = seed * 2654435761u ^ (uint32_t)step * 2246822519u ^ (uint32_t)(thread + 1) * 3266489917u;
  mixed = (mixed ^ mixed >> 15) * 739982445u;
  mixed = (mixed ^ mixed >> 12) * 695872825u;
  mixed ^= mixed >> 15;
  if (mixed % 2 == 0) return;
  const struct timespec time = {0, (long)(mixed / 2 % 300 * 1000)};
  nanosleep(&time, nullptr);
}

}  // namespace
