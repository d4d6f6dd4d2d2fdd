// The CPU kernels of csrc/kernels.h, written once over a vector type: a list of steps, run by one team of threads.
//
// Each instruction set's translation unit defines, in an anonymous namespace, its vector types, `Transpose8` and `tiles_for`, and
// includes this file (also into an anonymous namespace, so that no symbol compiled for one instruction set can be linked into
// another's code).

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

struct PlannedStep {
  int kind;
  void (*run_unit)(const Plan&, int64_t, float*);
  Plan conv;
  LayoutPlan layout;
  int64_t units() const { return kind == SLIM_STEP_CONV2D ? conv.units : layout.units; }
  void run(int64_t unit, float* scratch) const {
    if (kind == SLIM_STEP_CONV2D)
      run_unit(conv, unit, scratch);
    else
      run_layout_unit(layout, unit);
  }
};

inline int plan_step(PlannedStep& planned, const SlimStepF32& step) {
  planned.kind = step.kind;
  planned.conv.own_offsets = nullptr;
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

// One parallel region for all steps: threads meet at a barrier behind each, which costs a fraction of a new region.
inline int run_steps(const SlimStepF32* steps, int64_t count, int32_t threads) {
  PlannedStep* const planned = (PlannedStep*)malloc(sizeof(PlannedStep) * (size_t)max64(count, 1));
  if (planned == nullptr) return SLIM_ERROR_NO_MEMORY;
  int64_t most_units = 1, scratch_floats = 0, done = 0;
  int status = SLIM_OK;
  for (; done < count && status == SLIM_OK; ++done) {
    status = plan_step(planned[done], steps[done]);
    if (status != SLIM_OK) continue;
    most_units = max64(most_units, planned[done].units());
    scratch_floats = max64(scratch_floats, planned[done].conv.scratch_floats);
  }
  const size_t scratch_bytes = sizeof(float) * (size_t)scratch_floats;
  const int team = (int)min64(threads, most_units);
  if (status == SLIM_OK && team <= 1) {
    float* const scratch = scratch_bytes > 0 ? (float*)malloc(scratch_bytes) : nullptr;
    if (scratch_bytes > 0 && scratch == nullptr) status = SLIM_ERROR_NO_MEMORY;
    for (int64_t i = 0; status == SLIM_OK && i < count; ++i)
      for (int64_t unit = 0; unit < planned[i].units(); ++unit) planned[i].run(unit, scratch);
    free(scratch);
  } else if (status == SLIM_OK) {
    int failed = 0;
#pragma omp parallel num_threads(team) reduction(| : failed)
    {
      float* const scratch = scratch_bytes > 0 ? (float*)malloc(scratch_bytes) : nullptr;
      const int usable = scratch_bytes == 0 || scratch != nullptr;
      if (!usable) failed = 1;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t units = planned[i].units();
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < units; ++unit)
          if (usable) planned[i].run(unit, scratch);
      }
      free(scratch);
    }
    if (failed) status = SLIM_ERROR_NO_MEMORY;
  }
  for (int64_t i = 0; i < done; ++i) free(planned[i].conv.own_offsets);
  free(planned);
  return status;
}
