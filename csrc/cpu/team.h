// The threads that run a list of steps together: where they meet, and how they share the units of a step.
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

// Where threads wait for each other. libgomp's barrier makes a system call each time. Here threads spin, and give their
// core away when that takes long, since a thread that they wait for may have lost its core to another program.
struct Barrier {
  int arrived, generation;
  char line[64 - 2 * sizeof(int)];

  void wait(int team) {
    constexpr int SPINS = 5000;  // about 50 us on a CPU whose pause takes 40 cycles
    const int before = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == team) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, before + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == before; ++spins) {
      if (spins < SPINS)
        pause();
      else
        sched_yield();
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
