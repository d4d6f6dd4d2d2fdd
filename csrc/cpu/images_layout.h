// Between channels last (n, h, w, c) and images innermost (ceil(n / lanes), h, w, c, lanes); included into an anonymous namespace.
// `Transpose8::run` is the instruction set's.

struct LayoutPlan {
  const SlimConv2dF32* a;
  int to_images;
  int64_t pixels, pixel_step, pixel_units, units;
};

// Bytes that one unit reads: small enough for L2 to hold both sides.
constexpr int64_t LAYOUT_UNIT_BYTES = 128 * 1024;

inline void make_layout_plan(LayoutPlan& plan, const SlimConv2dF32& a, int to_images) {
  plan.a = &a;
  plan.to_images = to_images;
  plan.pixels = a.h * a.w;
  plan.pixel_step = min64(plan.pixels, max64(1, LAYOUT_UNIT_BYTES / (4 * a.c_in * a.lanes)));
  plan.pixel_units = ceil_div(plan.pixels, plan.pixel_step);
  plan.units = ceil_div(a.n, a.lanes) * plan.pixel_units;
}

// rows x columns floats into columns x rows.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) Transpose8::run(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    for (; j < columns; ++j)
      for (int64_t k = i; k < i + 8; ++k) to[j * to_stride + k] = from[k * from_stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

inline void run_layout_unit(const LayoutPlan& plan, int64_t index) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t group = index / plan.pixel_units, first = index % plan.pixel_units * plan.pixel_step;
  const int64_t last = min64(plan.pixels, first + plan.pixel_step);
  const int64_t image0 = group * a.lanes, present = min64(a.lanes, a.n - image0), image = plan.pixels * a.c_in;
  for (int64_t i = first; i < last; ++i) {
    const int64_t near = image0 * image + i * a.c_in, far = (group * plan.pixels + i) * a.c_in * a.lanes;
    if (plan.to_images) {
      transpose(a.x + near, image, a.y + far, a.lanes, present, a.c_in);
      for (int64_t c = 0; present < a.lanes && c < a.c_in; ++c)
        for (int64_t k = present; k < a.lanes; ++k) a.y[far + c * a.lanes + k] = 0;
    } else {
      transpose(a.x + far, a.lanes, a.y + near, image, a.c_in, present);
    }
  }
}
