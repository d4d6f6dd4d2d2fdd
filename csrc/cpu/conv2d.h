// The CPU kernels of csrc/kernels.h, written once over a vector type: a list of steps, run by one team of threads.
//
// Each instruction set's translation unit defines, in an anonymous namespace, its vector types, `Transpose8` and `family_for`, and
// includes this file (also into an anonymous namespace, so that no symbol compiled for one instruction set can be linked into
// another's code).

#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

#include "tiles.h"
#include "plan.h"
#include "units.h"
#include "images_layout.h"
#include "peak.h"

// The tiles for strips of this width (`lanes` 1: channels last), and the vector type that everything beside them uses.
struct Family {
  TileSet tiles;
  void (*run_unit)(const Plan&, int64_t, float*);
};
inline bool family_for(int strip, int lanes, Family& family);

// Channels last: tiles of up to MR pixels x NV vectors, and of up to MR_TAPS pixels x the whole strip where pointers change by tap.
template <class V, int NV, int MR, int MR_TAPS, int STRIDE>
Family channels_last() {
  Family family;
  add_tiles<V, NV, MR, STRIDE>(family.tiles);
  add_taps_tiles<V, STRIDE / V::N, MR_TAPS, STRIDE>(family.tiles);
  family.run_unit = run_unit<V>;
  return family;
}

// Images innermost: tiles of up to MR pixels x NO channels, one pixel x NO1.
template <class V, int NO1, int NO, int MR, int STRIDE>
Family images_innermost() {
  Family family;
  add_images_tiles<V, NO1, NO, MR, STRIDE>(family.tiles);
  family.run_unit = run_unit<V>;
  return family;
}

struct PlannedStep {
  int kind, slot;
  void (*run_unit)(const Plan&, int64_t, float*);
  Plan conv;
  LayoutPlan layout;
  int64_t units() const { return kind == SLIM_STEP_CONV2D ? conv.units : layout.units; }
  int64_t work() const { return kind == SLIM_STEP_CONV2D ? conv.macs : 0; }
  void run(int64_t unit, float* scratch) const {
    if (kind == SLIM_STEP_CONV2D)
      run_unit(conv, unit, scratch);
    else
      run_layout_unit(layout, unit);
  }
};

inline int plan_step(PlannedStep& planned, const SlimStepF32& step) {
  planned.kind = step.kind;
  planned.slot = step.slot;
  planned.conv.own_offsets = nullptr;
  planned.conv.zeros = nullptr;
  planned.conv.scratch_floats = 0;
  if (step.kind != SLIM_STEP_CONV2D) {
    make_layout_plan(planned.layout, step.conv, step.kind == SLIM_STEP_TO_IMAGES);
    return SLIM_OK;
  }
  Family family;
  if (!family_for(step.conv.strip, step.conv.lanes, family)) return SLIM_ERROR_UNSUPPORTED;
  if (step.conv.lanes > 1 && step.conv.r > MAX_SEGMENTS) return SLIM_ERROR_UNSUPPORTED;
  planned.conv.tiles = family.tiles;
  planned.run_unit = family.run_unit;
  return make_plan(planned.conv, step.conv) ? SLIM_OK : SLIM_ERROR_NO_MEMORY;
}

// About 50 us on a CPU whose pause takes 40 cycles.
constexpr int BARRIER_SPINS = 5000;

// Multiply-adds from which on a thread that is done takes units from others. The data of such a unit then changes cores, twice with the
// next layer, which costs more than a small layer's imbalance.
constexpr int64_t STEAL_MACS = 8000000;

// The next unit of a share, on a cache line of its own.
struct Share {
  int64_t next;
  char line[64 - sizeof(int64_t)];
};

inline int64_t take(Share& share) {
  int64_t unit;
#pragma omp atomic capture
  unit = share.next++;
  return unit;
}

// Where threads meet. libgomp's barrier makes a system call each time; here they spin, and give their core away where that takes long:
// another program may have the core of a thread they wait for.
struct Barrier {
  int arrived, generation;
  char line[64 - 2 * sizeof(int)];

  void wait(int team) {
    const int before = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == team) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, before + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == before; ++spins) {
      if (spins < BARRIER_SPINS)
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

// A step's units in equal shares, one a thread, in order: neighbouring units read the same input, and the next layer's same share
// reads this one's output, so most data stays in its core's cache. A thread that is done takes from the others.
inline void run_together(const PlannedStep& step, Share* shares, int thread, int team, float* scratch) {
  const int64_t units = step.units();
  const int owners = step.work() >= STEAL_MACS ? team : 1;
  for (int i = 0; i < owners; ++i) {
    const int owner = (thread + i) % team;
    const int64_t first = units * owner / team, end = units * (owner + 1) / team;
    for (int64_t unit; first + (unit = take(shares[owner])) < end;) step.run(first + unit, scratch);
  }
}

inline void run_alone(const PlannedStep& step, float* scratch) {
  const int64_t units = step.units();
  for (int64_t unit = 0; unit < units; ++unit) step.run(unit, scratch);
}

// Sleeps for a time that looks random; 0 is no seed. Half of the steps start at once, so that some threads run far ahead of others.
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

inline void run_team(const PlannedStep* steps, int64_t count, Share* shares, Barrier* barrier, int thread, int team, float* scratch,
                     uint32_t seed) {
  for (int64_t i = 0; i < count;) {
    if (steps[i].slot < 0) {
      delay(seed, i, thread);
      run_together(steps[i], shares + i * team, thread, team, scratch);
      ++i;
    } else {
      for (; i < count && steps[i].slot >= 0; ++i) {
        if (steps[i].slot % team != thread) continue;
        delay(seed, i, thread);
        run_alone(steps[i], scratch);
      }
    }
    if (i < count) barrier->wait(team);
  }
}

// One parallel region for all steps: meeting costs a fraction of a new region.
inline int run_planned(const PlannedStep* steps, int64_t count, int team, size_t scratch_bytes, uint32_t seed) {
  int failed = 0;
  if (team <= 1) {
    float* const scratch = scratch_bytes > 0 ? (float*)malloc(scratch_bytes) : nullptr;
    failed = scratch_bytes > 0 && scratch == nullptr;
    for (int64_t i = 0; !failed && i < count; ++i) run_alone(steps[i], scratch);
    free(scratch);
    return failed ? SLIM_ERROR_NO_MEMORY : SLIM_OK;
  }
  // Scratch and shares are there before the region starts: within it every thread must reach every barrier.
  Barrier barrier = {0, 0, {}};
  Share* const shares = (Share*)calloc((size_t)(count * team), sizeof(Share));
  float* const scratch = scratch_bytes > 0 ? (float*)malloc(scratch_bytes * (size_t)team) : nullptr;
  failed = shares == nullptr || (scratch_bytes > 0 && scratch == nullptr);
  if (!failed) {
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num(), present = omp_get_num_threads();
      // A team may come out smaller than asked for; shares are then cut for the smaller one.
      float* const own = scratch + scratch_bytes / sizeof(float) * (size_t)thread;
      run_team(steps, count, shares, &barrier, thread, present, own, seed);
    }
  }
  free(scratch);
  free(shares);
  return failed ? SLIM_ERROR_NO_MEMORY : SLIM_OK;
}

// With a seed other than 0 the threads sleep between steps.
inline int run_steps(const SlimStepF32* steps, int64_t count, int32_t threads, uint32_t seed) {
  PlannedStep* const planned = (PlannedStep*)malloc(sizeof(PlannedStep) * (size_t)max64(count, 1));
  if (planned == nullptr) return SLIM_ERROR_NO_MEMORY;
  int64_t most_units = 1, scratch_floats = 0, done = 0;
  int status = SLIM_OK;
  for (; done < count && status == SLIM_OK; ++done) {
    status = plan_step(planned[done], steps[done]);
    if (status != SLIM_OK) continue;
    most_units = max64(most_units, planned[done].slot >= 0 ? planned[done].slot + 1 : planned[done].units());
    scratch_floats = max64(scratch_floats, planned[done].conv.scratch_floats);
  }
  // Whole cache lines, so that threads do not share one.
  const size_t scratch_bytes = (sizeof(float) * (size_t)scratch_floats + 63) / 64 * 64;
  if (status == SLIM_OK) status = run_planned(planned, count, (int)min64(threads, most_units), scratch_bytes, seed);
  for (int64_t i = 0; i < done; ++i) {
    free(planned[i].conv.own_offsets);
    free(planned[i].conv.zeros);
  }
  free(planned);
  return status;
}
