// Runs a list of steps (convolutions and changes of layout) with one team of threads: the CPU entry points of
// csrc/kernels.h.
//
// Everything here and in the headers below is written once over a vector type. Each instruction set's source file is
// compiled with its own flags, defines its vector type and says in an InstructionSet which tiles it has.
//
//   tiles.h, plan.h, units.h   a convolution: microkernels, how it is cut into units of work, how a unit is run
//   slab_plan.h, slab_tiles.h  the same for single weights with images innermost
//   images_layout.h            a change of layout
//   pooling.h                  a max or average pooling
//   pairs.h, pairs_*           convolutions in bf16, with what is in front of and behind them
//   weight_gradient.h          not a step: the gradient of stored weights
//   team.h                     threads
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels.h"
#include "images_layout.h"
#include "pairs_engine.h"
#include "pairs_plan.h"
#include "plan.h"
#include "pooling.h"
#include "ranges.h"
#include "team.h"
#include "tiles.h"
#include "units.h"

namespace {

// ---------------------------------------------------------------- what an instruction set provides

// The kernels for strips of one width in one layout.
struct StripKernels {
  TileSet tiles;
  void (*run_unit)(const Plan&, int64_t unit, float* scratch);  // NULL: this width has no kernels
};

struct InstructionSet {
  int lanes;  // of its vector, with images innermost
  StripKernels (*channels_last)(int strip);
  StripKernels (*images_innermost)(int strip);
  StripKernels (*deep)(int depth);  // channels last, with several input channels an entry
  void (*run_layout_unit)(const LayoutPlan&, int64_t unit);
  void (*run_pool_unit)(const PoolPlan&, int64_t unit);
};

// Tiles of up to MR pixels x NV vectors, and, tap by tap, of up to MR_TAPS pixels x the whole strip.
template <class V, int NV, int MR, int MR_TAPS, int STRIP>
StripKernels channels_last_kernels() {
  StripKernels kernels;
  add_tiles<V, NV, MR, STRIP>(kernels.tiles);
  add_taps_tiles<V, STRIP / V::N, MR_TAPS, STRIP>(kernels.tiles);
  kernels.run_unit = run_unit<V>;
  return kernels;
}

// Tiles of up to MR pixels x NO channels; one pixel takes NO1 channels.
template <class V, int NO1, int NO, int MR, int STRIP>
StripKernels images_innermost_kernels() {
  StripKernels kernels;
  add_images_tiles<V, NO1, NO, MR, STRIP>(kernels.tiles);
  kernels.tiles.most_pixels_taps = 0;
  kernels.run_unit = run_unit<V>;
  return kernels;
}

// Tiles of up to MR pixels x one channel, whose entries have V::N * NV input channels.
template <class V, int NV, int MR>
StripKernels deep_kernels() {
  StripKernels kernels;
  add_dot_tiles<V, NV, MR>(kernels.tiles);
  kernels.tiles.most_pixels_taps = 0;
  kernels.run_unit = run_unit<V>;
  return kernels;
}

inline StripKernels no_kernels() {
  StripKernels kernels;
  kernels.run_unit = nullptr;
  return kernels;
}

// ---------------------------------------------------------------- one step

struct PlannedStep {
  int kind, slot;
  Plan conv;  // of a convolution
  void (*run_conv_unit)(const Plan&, int64_t unit, float* scratch);
  LayoutPlan layout;  // of a change of layout
  void (*run_layout_unit)(const LayoutPlan&, int64_t unit);
  PoolPlan pool;  // of a pooling
  void (*run_pool_unit)(const PoolPlan&, int64_t unit);
  const SlimPairsEngine* engine;  // of steps in pairs, whose changes of layout have their plan in `layout`
  PairsPlan pairs;
  PairsPoolPlan pairs_pool;

  bool is_layout() const { return kind == SLIM_STEP_TO_IMAGES || kind == SLIM_STEP_FROM_IMAGES; }
  int64_t units() const {
    switch (kind) {
      case SLIM_STEP_CONV2D:       return conv.units;
      case SLIM_STEP_TO_IMAGES:
      case SLIM_STEP_FROM_IMAGES:
      case SLIM_STEP_TO_PAIRS:     return layout.units;
      case SLIM_STEP_PAIRS_CONV2D: return pairs.units;
      default:                     return engine != nullptr ? pairs_pool.pool.units : pool.units;
    }
  }
  int64_t macs() const {
    return kind == SLIM_STEP_CONV2D ? conv.macs : kind == SLIM_STEP_PAIRS_CONV2D ? pairs.macs : 0;
  }
  void run(int64_t unit, float* scratch) const {
    switch (kind) {
      case SLIM_STEP_CONV2D:       return run_conv_unit(conv, unit, scratch);
      case SLIM_STEP_TO_IMAGES:
      case SLIM_STEP_FROM_IMAGES:  return run_layout_unit(layout, unit);
      case SLIM_STEP_TO_PAIRS:     return engine->run_layout_unit(&layout, unit);
      case SLIM_STEP_PAIRS_CONV2D: return engine->run_conv_unit(&pairs, unit, scratch);
      default: return engine != nullptr ? engine->run_pool_unit(&pairs_pool, unit) : run_pool_unit(pool, unit);
    }
  }
};

// Plans a step in pairs, as below.
inline int plan_pairs_step(PlannedStep& planned, const SlimStepF32& step) {
  const SlimConv2dF32& conv = step.conv;
  planned.engine = slim_pairs_engine(conv.engine);
  if (planned.engine == nullptr) return SLIM_ERROR_UNSUPPORTED;
  if (step.kind == SLIM_STEP_TO_PAIRS) {
    planned.layout = plan_layout(conv, true);
    return SLIM_OK;
  }
  if (step.kind != SLIM_STEP_PAIRS_CONV2D) {
    planned.pairs_pool = {plan_pool(conv, step.kind - SLIM_STEP_PAIRS_MAX_POOL + SLIM_STEP_MAX_POOL),
                          conv.to_floats != 0};
    return SLIM_OK;
  }
  const size_t pixel = (size_t)(ceil_div(conv.c_in, 2) * PAIR_ROW);
  planned.conv.zeros = (float*)aligned_alloc(PAIR_ROW, pixel);
  if (planned.conv.zeros == nullptr) return SLIM_ERROR_NO_MEMORY;
  memset(planned.conv.zeros, 0, pixel);
  planned.conv.scratch_floats = PAIRS_SCRATCH / (int64_t)sizeof(float);
  planned.pairs = plan_pairs(conv, conv.to_floats != 0, (const char*)planned.conv.zeros);
  return SLIM_OK;
}

// Plans one step and returns a SLIM code. Whatever the code, the caller frees own_offsets and zeros of planned.conv.
inline int plan_step(const InstructionSet& isa, PlannedStep& planned, const SlimStepF32& step) {
  const SlimConv2dF32& conv = step.conv;
  planned.kind = step.kind;
  planned.slot = step.slot;
  planned.conv.own_offsets = nullptr;
  planned.conv.zeros = nullptr;
  planned.conv.scratch_floats = 0;
  planned.engine = nullptr;
  if (step.kind >= SLIM_STEP_TO_PAIRS) return plan_pairs_step(planned, step);
  if (planned.is_layout()) {
    planned.layout = plan_layout(conv, step.kind == SLIM_STEP_TO_IMAGES);
    planned.run_layout_unit = isa.run_layout_unit;
    return SLIM_OK;
  }
  if (step.kind != SLIM_STEP_CONV2D) {
    if (conv.lanes != 1 && conv.lanes != isa.lanes) return SLIM_ERROR_UNSUPPORTED;
    planned.pool = plan_pool(conv, step.kind);
    planned.run_pool_unit = isa.run_pool_unit;
    return SLIM_OK;
  }
  const bool images_innermost = conv.lanes != 1;
  if (images_innermost && (conv.lanes != isa.lanes || conv.r > MAX_SEGMENTS)) return SLIM_ERROR_UNSUPPORTED;
  const StripKernels kernels = conv.depth > 1     ? isa.deep(conv.depth)
                               : images_innermost ? isa.images_innermost(conv.strip)
                                                  : isa.channels_last(conv.strip);
  if (kernels.run_unit == nullptr) return SLIM_ERROR_UNSUPPORTED;
  planned.run_conv_unit = kernels.run_unit;
  return make_plan(planned.conv, conv, kernels.tiles) ? SLIM_OK : SLIM_ERROR_NO_MEMORY;
}

// All units of a step on this thread.
inline void run_alone(const PlannedStep& step, float* scratch) {
  const int64_t units = step.units();
  for (int64_t unit = 0; unit < units; ++unit) step.run(unit, scratch);
}

// Runs what nobody has begun of one thread's share of a step.
inline void run_share(const PlannedStep& step, Share* shares, int owner, int team, Progress& progress, float* scratch) {
  const int64_t first = step.units() * owner / team, end = step.units() * (owner + 1) / team;
  int64_t count = 0;
  for (int64_t unit; first + (unit = take(shares[owner])) < end; ++count) step.run(first + unit, scratch);
  progress.add(count);
}

// This thread's part of a step that the team shares, until the step is done. The units are cut into equal shares, one
// for each thread, in order: neighbouring units read the same input, and the same share of the next layer reads this
// one's output, so most data stays in its core's cache.
//
// In a large step a thread that is done takes units from the others. The data of such a unit changes cores, and does so
// again in the next layer, which costs more than the imbalance of a small step: there it does so only after a long
// wait.
inline void run_together(const PlannedStep& step, Share* shares, int thread, int team, Progress& progress,
                         float* scratch) {
  constexpr int64_t MIN_MACS_TO_STEAL = 8000000;
  const auto run_others = [&] {
    for (int i = 1; i < team; ++i) run_share(step, shares, (thread + i) % team, team, progress, scratch);
  };
  run_share(step, shares, thread, team, progress, scratch);
  if (step.macs() >= MIN_MACS_TO_STEAL) run_others();
  progress.wait(step.units(), run_others);
}

// Consecutive steps with slots, until all are done. Those of the slots that belong to a thread run on it in order,
// unless another thread, after a long wait, finds that they have not been begun.
inline void run_slots(const PlannedStep* steps, int64_t count, Share* shares, int thread, int team, Progress& progress,
                      float* scratch, int64_t first, uint32_t seed) {
  const auto run_slots_of = [&](int owner) {
    if (take(shares[owner]) != 0) return;
    int64_t done = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (steps[i].slot % team != owner) continue;
      delay(seed, first + i, thread);
      run_alone(steps[i], scratch);
      ++done;
    }
    progress.add(done);
  };
  run_slots_of(thread);
  progress.wait(count, [&] {
    for (int i = 1; i < team; ++i) run_slots_of((thread + i) % team);
  });
}

// ---------------------------------------------------------------- all steps

// One thread's part of all steps. `shares` has `team` of them for each step, `progress` one.
inline void run_team(const PlannedStep* steps, int64_t count, Share* shares, Progress* progress, int thread, int team,
                     float* scratch, uint32_t seed) {
  for (int64_t i = 0, end; i < count; i = end) {
    Share* const own = shares + i * team;
    end = i + 1;
    if (steps[i].slot < 0) {
      delay(seed, i, thread);
      run_together(steps[i], own, thread, team, progress[i], scratch);
    } else {
      while (end < count && steps[end].slot >= 0) ++end;
      run_slots(steps + i, end - i, own, thread, team, progress[i], scratch, i, seed);
    }
  }
}

inline int run_on_one_thread(const PlannedStep* steps, int64_t count, size_t scratch_bytes) {
  float* const scratch = scratch_bytes > 0 ? (float*)malloc(scratch_bytes) : nullptr;
  if (scratch_bytes > 0 && scratch == nullptr) return SLIM_ERROR_NO_MEMORY;
  for (int64_t i = 0; i < count; ++i) run_alone(steps[i], scratch);
  free(scratch);
  return SLIM_OK;
}

// One parallel region for all steps: to wait for a step costs a fraction of a new region.
inline int run_on_team(const PlannedStep* steps, int64_t count, int team, size_t scratch_bytes, uint32_t seed) {
  // Memory is allocated before the region starts, because within it every thread must do its part.
  Share* const shares = (Share*)calloc((size_t)(count * team), sizeof(Share));
  Progress* const progress = (Progress*)calloc((size_t)count, sizeof(Progress));
  float* const scratch = scratch_bytes > 0 ? (float*)malloc(scratch_bytes * (size_t)team) : nullptr;
  const bool failed = shares == nullptr || progress == nullptr || (scratch_bytes > 0 && scratch == nullptr);
  if (!failed) {
#pragma omp parallel num_threads(team)
    {
      // The team may come out smaller than asked for; shares are then cut for the smaller one.
      const int thread = omp_get_thread_num(), present = omp_get_num_threads();
      float* const own = scratch + scratch_bytes / sizeof(float) * (size_t)thread;
      run_team(steps, count, shares, progress, thread, present, own, seed);
    }
  }
  free(scratch);
  free(progress);
  free(shares);
  return failed ? SLIM_ERROR_NO_MEMORY : SLIM_OK;
}

// Plans and runs the steps. With a seed other than 0 the threads sleep between them.
inline int run_steps(const InstructionSet& isa, const SlimStepF32* steps, int64_t count, int32_t threads,
                     uint32_t seed) {
  PlannedStep* const planned = (PlannedStep*)malloc(sizeof(PlannedStep) * (size_t)max64(count, 1));
  if (planned == nullptr) return SLIM_ERROR_NO_MEMORY;
  int64_t useful_threads = 1, scratch_floats = 0, done = 0;
  int status = SLIM_OK;
  for (; done < count && status == SLIM_OK; ++done) {
    const PlannedStep& step = planned[done];
    status = plan_step(isa, planned[done], steps[done]);
    if (status != SLIM_OK) continue;
    useful_threads = max64(useful_threads, step.slot >= 0 ? step.slot + 1 : step.units());
    scratch_floats = max64(scratch_floats, step.conv.scratch_floats);
  }
  if (status == SLIM_OK) {
    const int team = (int)min64(threads, useful_threads);
    // Whole cache lines, so that threads do not share one.
    const size_t scratch_bytes = (sizeof(float) * (size_t)scratch_floats + 63) / 64 * 64;
    status = team <= 1 ? run_on_one_thread(planned, count, scratch_bytes)
                       : run_on_team(planned, count, team, scratch_bytes, seed);
  }
  for (int64_t i = 0; i < done; ++i) {
    free(planned[i].conv.own_offsets);
    free(planned[i].conv.zeros);
  }
  free(planned);
  return status;
}

}  // namespace
