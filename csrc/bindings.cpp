// slimkernels._C: the entry points of kernels.h for Python. Pointers and streams are integers, 0 for NULL; the status code is
// returned; the GIL is released while a kernel runs. What can be told without reading memory is checked here: the instruction set,
// since an unsupported one would kill the process, and that every number lies in its range and no offset wraps. What the tensors
// hold is checked in slimkernels/kernels/cpu/conv2d.py, cuda.py and cuda_tensor_cores.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "slim_build_config.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Isa {
  const char* name;
  int (*run_steps)(const SlimStepF32*, int64_t, int32_t);
  int (*run_delayed_steps)(const SlimStepF32*, int64_t, int32_t, uint32_t);
  double (*multiply_adds_f32)(int64_t, int32_t);
  bool supported;
};

const std::vector<Isa>& compiled_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> list;
#if defined(__x86_64__) && (SLIM_HAVE_AVX512 || SLIM_HAVE_AVX2)
    __builtin_cpu_init();  // includes the operating system's consent (XCR0)
#endif
#if SLIM_HAVE_AVX512
    list.push_back({"avx512", slim_run_steps_f32_avx512, slim_run_delayed_steps_f32_avx512, slim_multiply_adds_f32_avx512,
                    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("fma")});
#endif
#if SLIM_HAVE_AVX2
    list.push_back({"avx2", slim_run_steps_f32_avx2, slim_run_delayed_steps_f32_avx2, slim_multiply_adds_f32_avx2,
                    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
    list.push_back({"scalar", slim_run_steps_f32_scalar, slim_run_delayed_steps_f32_scalar, slim_multiply_adds_f32_scalar, true});
    return list;
  }();
  return isas;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : compiled_isas()) {
    if (isa.supported) names.push_back(isa.name);
  }
  return names;
}

const Isa* supported_isa(const char* name) {
  for (const Isa& isa : compiled_isas()) {
    if (isa.supported && std::strcmp(name, isa.name) == 0) return &isa;
  }
  return nullptr;
}

constexpr int64_t kInt32Max = INT32_MAX;
#if SLIM_HAVE_CUDA
constexpr int64_t kMaxPlaces = 65535;  // places of a patch, far more than shared memory holds
#endif

// The members of SlimConv2dF32 by their place in what Python hands over, Conv2dArguments in slimkernels/kernels/cpu/abi.py.
enum Member : int {
  kX, kY, kBias, kWeights, kChannels, kTapPtr, kOffsets,  // pointers
  kN, kH, kW, kCIn, kCOut, kP, kQ,
  kR, kS, kStrideH, kStrideW, kPadH, kPadW, kDilH, kDilW, kStrip, kRelu, kPool, kLanes,
  kMembers
};

// Where a member lies in the struct, in bytes.
struct MemberPlace {
  const char* name;
  size_t offset, size;
};

#define SLIM_PLACE(name) {#name, offsetof(SlimConv2dF32, name), sizeof(SlimConv2dF32::name)}
constexpr MemberPlace kPlaces[kMembers] = {
    SLIM_PLACE(x), SLIM_PLACE(y), SLIM_PLACE(bias), SLIM_PLACE(weights), SLIM_PLACE(channels), SLIM_PLACE(tap_ptr),
    SLIM_PLACE(offsets), SLIM_PLACE(n), SLIM_PLACE(h), SLIM_PLACE(w), SLIM_PLACE(c_in), SLIM_PLACE(c_out), SLIM_PLACE(p),
    SLIM_PLACE(q), SLIM_PLACE(r), SLIM_PLACE(s), SLIM_PLACE(stride_h), SLIM_PLACE(stride_w), SLIM_PLACE(pad_h),
    SLIM_PLACE(pad_w), SLIM_PLACE(dil_h), SLIM_PLACE(dil_w), SLIM_PLACE(strip), SLIM_PLACE(relu), SLIM_PLACE(pool),
    SLIM_PLACE(lanes)};
#undef SLIM_PLACE

// Whether the places follow each other without a gap and fill the struct: then none is missing and none comes twice.
constexpr bool places_fill_the_struct() {
  size_t end = 0;
  for (const MemberPlace& place : kPlaces) {
    if (place.offset != end) return false;
    end += place.size;
  }
  return end == sizeof(SlimConv2dF32);
}
static_assert(places_fill_the_struct(), "kPlaces lists the members of SlimConv2dF32 in order");

// The range that a number must lie in.
struct Bound {
  const char* name;
  int64_t low, high;
};

// The first of the numbers that lies outside its range, or -1.
int outside(const int64_t* values, const Bound* bounds, int count) {
  for (int i = 0; i < count; ++i) {
    if (values[i] < bounds[i].low || values[i] > bounds[i].high) return i;
  }
  return -1;
}

// The members behind the pointers. n is the only size that may pass int32: offsets across images are 64-bit.
constexpr int kPointers = kN;
constexpr Bound kConv2dBounds[kMembers - kPointers] = {
    {"n", 1, INT64_MAX}, {"h", 0, kInt32Max}, {"w", 0, kInt32Max}, {"c_in", 1, kInt32Max}, {"c_out", 1, kInt32Max},
    {"p", 1, kInt32Max}, {"q", 1, kInt32Max}, {"r", 1, kInt32Max}, {"s", 1, kInt32Max}, {"stride_h", 1, kInt32Max},
    {"stride_w", 1, kInt32Max}, {"pad_h", 0, kInt32Max}, {"pad_w", 0, kInt32Max}, {"dil_h", 1, kInt32Max},
    {"dil_w", 1, kInt32Max}, {"strip", 1, 32}, {"relu", 0, 1}, {"pool", 0, 1}, {"lanes", 1, 16}};
constexpr Bound kLayoutBounds[4] = {{"n", 1, INT64_MAX}, {"h", 0, kInt32Max}, {"w", 0, kInt32Max}, {"c_in", 1, kInt32Max}};

bool is_one_of(int64_t value, std::initializer_list<int64_t> legal) {
  for (int64_t one : legal) {
    if (value == one) return true;
  }
  return false;
}

// Whether a * b * c <= 2^31 - 1, all of them from 0 to 2^31 - 1.
bool product_fits(int64_t a, int64_t b, int64_t c) {
  if (a == 0 || b == 0 || c == 0) return true;
  return a <= kInt32Max / b && a * b <= kInt32Max / c;
}

int64_t output_size(int64_t size, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t left = size + 2 * pad - dilation * (taps - 1) - 1;
  return left < 0 ? 0 : left / stride + 1;
}

// "" where the members are what kernels.h asks for, as far as numbers tell, else what is wrong with them.
std::string conv2d_fault(const int64_t* v) {
  const int at = outside(v + kPointers, kConv2dBounds, kMembers - kPointers);
  if (at >= 0) return std::string(kConv2dBounds[at].name) + " = " + std::to_string(v[kPointers + at]) + " is out of range";
  const int64_t h = v[kH], w = v[kW], c_in = v[kCIn], c_out = v[kCOut], p = v[kP], q = v[kQ], r = v[kR], s = v[kS];
  const int64_t stride_w = v[kStrideW], pad_h = v[kPadH], pad_w = v[kPadW], dil_h = v[kDilH], dil_w = v[kDilW];
  const int64_t strip = v[kStrip], lanes = v[kLanes];
  if (!is_one_of(strip, {1, 2, 4, 8, 16, 24, 32})) return "strip = " + std::to_string(strip) + " is no known width";
  if (!is_one_of(lanes, {1, 4, 8, 16})) return "lanes = " + std::to_string(lanes) + " is no known vector";
  if (v[kTapPtr] == 0) return "tap_ptr is NULL";
  if (!product_fits(h, w, c_in * lanes) || c_in * lanes > kInt32Max) return "an image has 2^31 elements or more";
  if (!product_fits(p, q, c_out * lanes) || c_out * lanes > kInt32Max) return "an output has 2^31 elements or more";
  if (!product_fits(r, s, (c_out + strip - 1) / strip)) return "tap_ptr has 2^31 elements or more";
  // Both factors of each product fit 31 bits; the sum below is at most 2^62 + 2^31.
  const int64_t down = std::max(dil_h * (r - 1), pad_h), right = std::max({dil_w * (s - 1), pad_w, stride_w}) + 1;
  if (down > kInt32Max || right > kInt32Max || down * w + right > kInt32Max / (c_in * lanes)) return "an offset is 2^31 or more";
  return "";
}

std::string layout_fault(const int64_t* v) {
  const int at = outside(v + kPointers, kLayoutBounds, 4);
  if (at >= 0) return std::string(kLayoutBounds[at].name) + " = " + std::to_string(v[kPointers + at]) + " is out of range";
  const int64_t n = v[kN], h = v[kH], w = v[kW], c = v[kCIn], lanes = v[kLanes];
  if (!is_one_of(lanes, {4, 8, 16})) return "lanes = " + std::to_string(lanes) + " is no known vector";
  if (!product_fits(h, w, c * lanes) || c * lanes > kInt32Max) return "an image has 2^31 elements or more";
  return n > (INT64_MAX >> 3) / std::max(h * w * c * lanes, lanes) ? "n is out of range" : "";
}

SlimConv2dF32 conv2d_of(const int64_t* v) {
  SlimConv2dF32 a;
  for (int i = 0; i < kMembers; ++i) {
    void* const at = reinterpret_cast<char*>(&a) + kPlaces[i].offset;
    const int32_t narrow = static_cast<int32_t>(v[i]);
    std::memcpy(at, kPlaces[i].size == sizeof(narrow) ? static_cast<const void*>(&narrow) : &v[i], kPlaces[i].size);
  }
  return a;
}

// The same of a convolution that is about to run: its tensors are there, and its output has the size that follows from the input's.
std::string run_fault(const int64_t* v) {
  const std::string fault = conv2d_fault(v);
  if (!fault.empty()) return fault;
  const int64_t n = v[kN], h = v[kH], w = v[kW], c_in = v[kCIn], c_out = v[kCOut], p = v[kP], q = v[kQ];
  const int64_t pool = v[kPool], lanes = v[kLanes];
  if (v[kX] == 0 || v[kY] == 0) return "x or y is NULL";
  if (p != output_size(h, v[kR], v[kStrideH], v[kPadH], v[kDilH]) || q != output_size(w, v[kS], v[kStrideW], v[kPadW], v[kDilW]) ||
      p <= pool || q <= pool)
    return "p or q is not the size of the output";
  if (n > (INT64_MAX >> 3) / std::max({h * w * c_in * lanes, p * q * c_out * lanes, lanes})) return "n is out of range";
  return "";
}

std::vector<std::tuple<std::string, size_t, size_t>> conv2d_members() {
  std::vector<std::tuple<std::string, size_t, size_t>> found;
  for (const MemberPlace& place : kPlaces) found.emplace_back(place.name, place.offset, place.size);
  return found;
}

bool threads_fit(int64_t threads) { return threads >= 1 && threads <= kInt32Max; }

// The one function a forward pass calls per layer: pybind11's conversion of its arguments costs 1.5 us, this 0.3 us.
PyObject* conv2d_f32(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 1 + kMembers + 1;
  if (count != kArguments) {
    return PyErr_Format(PyExc_TypeError, "conv2d_f32: expected %zd arguments, got %zd", kArguments, count);
  }
  const char* name = PyUnicode_AsUTF8(args[0]);
  if (name == nullptr) return nullptr;
  int64_t v[kMembers + 1];
  for (Py_ssize_t i = 0; i <= kMembers; ++i) {
    v[i] = PyLong_AsLongLong(args[i + 1]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const Isa* isa = supported_isa(name);
  if (isa == nullptr) return PyLong_FromLong(SLIM_ERROR_UNSUPPORTED);
  const std::string fault = threads_fit(v[kMembers]) ? run_fault(v) : "expected at least one thread";
  if (!fault.empty()) return PyErr_Format(PyExc_ValueError, "conv2d_f32: %s", fault.c_str());
  const SlimStepF32 step = {SLIM_STEP_CONV2D, -1, conv2d_of(v)};
  int status;
  {
    py::gil_scoped_release release;
    status = isa->run_steps(&step, 1, static_cast<int32_t>(v[kMembers]));
  }
  return PyLong_FromLong(status);
}

void entry_offsets(const std::array<int64_t, kMembers>& members, uintptr_t offsets, int64_t count) {
  std::string fault = conv2d_fault(members.data());
  const SlimConv2dF32 a = conv2d_of(members.data());
  if (fault.empty()) {
    const int64_t runs = (a.c_out + a.strip - 1) / a.strip * a.r * a.s;
    bool rises = a.tap_ptr[0] == 0;
    for (int64_t i = 0; i < runs && rises; ++i) rises = a.tap_ptr[i] <= a.tap_ptr[i + 1];
    if (!rises) fault = "tap_ptr does not rise from 0";
    else if (count - SLIM_OFFSETS_MARGIN != a.tap_ptr[runs]) fault = "the offsets have room for " + std::to_string(count) + " numbers";
  }
  if (!fault.empty()) throw py::value_error("entry_offsets: " + fault);
  py::gil_scoped_release release;
  slim_entry_offsets(&a, pointer<int32_t>(offsets));
}

// A list of steps that is run again and again on the same memory; the caller keeps that alive.
class Steps {
 public:
  Steps(const std::string& isa, const std::vector<std::array<int64_t, 2 + kMembers>>& steps) : isa_(supported_isa(isa.c_str())) {
    if (isa_ == nullptr) return;  // every run says so
    for (const auto& v : steps) {
      const int64_t* const members = v.data() + 2;
      std::string fault;
      if (!is_one_of(v[0], {SLIM_STEP_CONV2D, SLIM_STEP_TO_IMAGES, SLIM_STEP_FROM_IMAGES}))
        fault = "kind = " + std::to_string(v[0]) + " is no known step";
      else if (v[1] < -1 || v[1] > kMaxSlot)
        fault = "slot = " + std::to_string(v[1]) + " is out of range";
      else if (members[kX] == 0 || members[kY] == 0)
        fault = "x or y is NULL";
      else
        fault = v[0] == SLIM_STEP_CONV2D ? run_fault(members) : layout_fault(members);
      if (!fault.empty()) throw py::value_error("Steps: " + fault);
      steps_.push_back({static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1]), conv2d_of(members)});
    }
  }
  int run(int32_t threads) const {
    if (!threads_fit(threads)) throw py::value_error("Steps: expected at least one thread");
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    return isa_->run_steps(steps_.data(), static_cast<int64_t>(steps_.size()), threads);
  }
  int run_delayed(int32_t threads, uint32_t seed) const {
    if (!threads_fit(threads)) throw py::value_error("Steps: expected at least one thread");
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    return isa_->run_delayed_steps(steps_.data(), static_cast<int64_t>(steps_.size()), threads, seed);
  }

 private:
  static constexpr int64_t kMaxSlot = 65535;
  const Isa* isa_;
  std::vector<SlimStepF32> steps_;
};

double multiply_adds_f32(const std::string& name, int64_t iterations, int32_t threads) {
  if (iterations < 0 || !threads_fit(threads)) throw py::value_error("multiply_adds_f32: expected iterations and threads to run");
  const Isa* isa = supported_isa(name.c_str());
  if (isa == nullptr) return 0;
  py::gil_scoped_release release;
  return isa->multiply_adds_f32(iterations, threads);
}

PyMethodDef kFastFunctions[] = {
    {"conv2d_f32", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(conv2d_f32)), METH_FASTCALL,
     "(isa, members of SlimConv2dF32 in order, threads) -> status"},
    {nullptr, nullptr, 0, nullptr}};

py::dict build_info() {
  py::dict info;
  std::vector<std::string> names;
  for (const Isa& isa : compiled_isas()) names.push_back(isa.name);
  info["isas"] = names;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["openmp"] = bool(SLIM_HAVE_OPENMP);
#if defined(__SANITIZE_ADDRESS__)
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  info["cuda"] = bool(SLIM_HAVE_CUDA);
  info["cuda_archs"] = SLIM_CUDA_ARCHS;
#if SLIM_HAVE_CUDA
  info["cuda_version"] = slim_cuda_version();
#else
  info["cuda_version"] = py::none();
#endif
  return info;
}

#if SLIM_HAVE_CUDA
void check_cuda(const char* name, const int64_t* values, const Bound* bounds, int count) {
  const int at = outside(values, bounds, count);
  if (at >= 0) throw py::value_error(std::string(name) + ": " + bounds[at].name + " = " + std::to_string(values[at]) + " is out of range");
}

int cuda_bsr_conv2d(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t values, uintptr_t crow_indices, uintptr_t col_indices,
                    int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_out, int64_t p, int64_t q, int32_t r, int32_t s,
                    int32_t stride_h, int32_t stride_w, int32_t pad_h, int32_t pad_w, int32_t dil_h, int32_t dil_w,
                    int32_t block_out, int32_t block_in, int32_t relu, int32_t dtype, int32_t device, uintptr_t stream) {
  const int64_t numbers[] = {n, h, w, c_in, c_out, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, block_out, block_in,
                             relu, dtype, device};
  constexpr Bound bounds[] = {
      {"n", 1, INT64_MAX}, {"h", 0, kInt32Max}, {"w", 0, kInt32Max}, {"c_in", 1, kInt32Max}, {"c_out", 1, kInt32Max},
      {"p", 1, kInt32Max}, {"q", 1, kInt32Max}, {"r", 1, kInt32Max}, {"s", 1, kInt32Max}, {"stride_h", 1, kInt32Max},
      {"stride_w", 1, kInt32Max}, {"pad_h", 0, kInt32Max}, {"pad_w", 0, kInt32Max}, {"dil_h", 1, kInt32Max},
      {"dil_w", 1, kInt32Max}, {"block_out", 1, kInt32Max}, {"block_in", 1, kInt32Max}, {"relu", 0, 1},
      {"dtype", SLIM_DTYPE_F32, SLIM_DTYPE_BF16}, {"device", 0, kInt32Max}};
  check_cuda("cuda_bsr_conv2d", numbers, bounds, sizeof(bounds) / sizeof(bounds[0]));
  if (!product_fits(r, s, (c_in + block_in - 1) / block_in * block_in) || c_in > kInt32Max - block_in)
    throw py::value_error("cuda_bsr_conv2d: an output channel has 2^31 weights or more");
  const SlimCudaBsrConv2d a = {pointer<const void>(x), pointer(y), pointer<const void>(bias), pointer<const void>(values),
                               pointer<const int32_t>(crow_indices), pointer<const int32_t>(col_indices),
                               n, h, w, c_in, c_out, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
                               block_out, block_in, relu, dtype, device, pointer(stream)};
  py::gil_scoped_release release;
  return slim_cuda_bsr_conv2d(&a);
}

// What the two plans of a tile have in common, in the order of their members.
struct TilePlan {
  int64_t n, h, w, c_in, c_out, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, pool;
  int64_t images, rows, cols, patch_row, patch_image, patch, load_top, load_left, load_rows, load_cols;
};

// "" where a tile reads and writes inside its patch and no offset wraps, else what is wrong.
std::string tile_plan_fault(const TilePlan& t) {
  if (t.c_in % 8 != 0 || t.c_out % 8 != 0) return "c_in and c_out are not multiples of 8";
  if (t.p != output_size(t.h, t.r, t.stride_h, t.pad_h, t.dil_h) || t.q != output_size(t.w, t.s, t.stride_w, t.pad_w, t.dil_w) ||
      t.p <= t.pool || t.q <= t.pool)
    return "p or q is not the size of the output";
  if (t.rows % 2 != 0 || t.cols % 2 != 0) return "a tile's rows and columns are not even";
  if (!product_fits(t.images * t.h, t.w, 2 * t.c_in) || !product_fits(t.images * t.p, t.q, t.c_out)) return "the images of a tile have 2^31 bytes or more";
  if (t.images * t.load_rows * t.load_cols > kMaxPlaces) return "a tile reads too many pixels";
  // All factors are at most 2^16 but the dilations, whose products with the places between rows stay below 2^62.
  const int64_t before = (t.images - 1) * t.patch_image;
  const int64_t reach = ((t.rows - 1) * t.stride_h + (t.r - 1) * t.dil_h) * t.patch_row + (t.cols - 1) * t.stride_w + (t.s - 1) * t.dil_w;
  const int64_t loads = (t.load_top + t.load_rows - 1) * t.patch_row + t.load_left + t.load_cols - 1;
  if (before + std::max(reach, loads) >= t.patch) return "a tile reaches beyond its patch";
  const int64_t tiles = (t.p + t.rows - 1) / t.rows * ((t.q + t.cols - 1) / t.cols);
  if ((t.n + t.images - 1) / t.images > kInt32Max / tiles) return "there are 2^31 tiles or more";
  return "";
}

// Ranges of the members of SlimCudaResidentConv2d and SlimCudaStemConv2d that both have.
#define SLIM_GEOMETRY_BOUNDS                                                                                                        \
  {"r", 1, kMaxPlaces}, {"s", 1, kMaxPlaces}, {"stride_h", 1, kMaxPlaces}, {"stride_w", 1, kMaxPlaces}, {"pad_h", 0, kMaxPlaces},   \
      {"pad_w", 0, kMaxPlaces}, {"dil_h", 1, kMaxPlaces}, {"dil_w", 1, kMaxPlaces}, {"relu", 0, 1}, {"pool", 0, 1},                 \
      {"tile_images", 1, kMaxPlaces}, {"tile_rows", 2, kMaxPlaces}, {"tile_cols", 2, kMaxPlaces}, {"patch_row", 1, kMaxPlaces},     \
      {"patch_image", 0, kMaxPlaces}, {"patch", 1, kMaxPlaces}, {"load_top", 0, kMaxPlaces}, {"load_left", 0, kMaxPlaces},          \
      {"load_rows", 1, kMaxPlaces}, {"load_cols", 1, kMaxPlaces}

template <size_t N>
std::array<int64_t, N> numbers_of(const char* name, const py::args& args) {
  if (args.size() != N) throw py::type_error(std::string(name) + ": expected " + std::to_string(N) + " arguments, got " + std::to_string(args.size()));
  std::array<int64_t, N> v;
  for (size_t i = 0; i < N; ++i) v[i] = py::cast<int64_t>(args[i]);
  return v;
}

int cuda_resident_conv2d(const py::args& args) {
  const auto v = numbers_of<42>("cuda_resident_conv2d", args);
  constexpr Bound bounds[] = {
      {"n", 1, INT64_MAX >> 8}, {"h", 1, kInt32Max}, {"w", 1, kInt32Max}, {"c_in", 1, kInt32Max}, {"c_out", 1, kInt32Max}, {"p", 1, kInt32Max},
      {"q", 1, kInt32Max}, SLIM_GEOMETRY_BOUNDS, {"slab", 16, 128}, {"stages", 2, 8}, {"steps", 0, kMaxPlaces}, {"variant", 0, 2},
      {"blocks", 1, kInt32Max}, {"overlap", 0, 1}, {"dtype", SLIM_DTYPE_F16, SLIM_DTYPE_BF16}, {"device", 0, kInt32Max}};
  check_cuda("cuda_resident_conv2d", v.data() + 6, bounds, sizeof(bounds) / sizeof(bounds[0]));
  const auto i = [&v](int at) { return static_cast<int32_t>(v[at]); };
  const SlimCudaResidentConv2d a = {
      pointer<const void>(v[0]), pointer(v[1]), pointer<const void>(v[2]), pointer<const void>(v[3]), pointer<const int32_t>(v[4]),
      pointer<const int32_t>(v[5]), v[6], v[7], v[8], v[9], v[10], v[11], v[12], i(13), i(14), i(15), i(16), i(17), i(18), i(19), i(20), i(21),
      i(22), i(23), i(24), i(25), i(26), i(27), i(28), i(29), i(30), i(31), i(32), i(33), i(34), i(35), i(36), i(37), i(38), i(39), i(40),
      pointer(v[41])};
  std::string fault = tile_plan_fault({a.n, a.h, a.w, a.c_in, a.c_out, a.p, a.q, a.r, a.s, a.stride_h, a.stride_w, a.pad_h, a.pad_w, a.dil_h,
                                       a.dil_w, a.pool, a.tile_images, a.tile_rows, a.tile_cols, a.patch_row, a.patch_image, a.patch,
                                       a.load_top, a.load_left, a.load_rows, a.load_cols});
  const int64_t channels = a.variant == 2 ? 64 : 128;
  if (fault.empty() && !is_one_of(a.slab, {16, 32, 64, 128})) fault = "slab = " + std::to_string(a.slab) + " is no known width";
  if (fault.empty() && a.blocks < (a.c_out + channels - 1) / channels) fault = "there are fewer blocks than rows of channels";
  if (!fault.empty()) throw py::value_error("cuda_resident_conv2d: " + fault);
  py::gil_scoped_release release;
  return slim_cuda_resident_conv2d(&a);
}

int cuda_stem_conv2d(const py::args& args) {
  const auto v = numbers_of<40>("cuda_stem_conv2d", args);
  constexpr Bound bounds[] = {
      {"n", 1, INT64_MAX >> 8}, {"h", 1, kInt32Max}, {"w", 2, kMaxPlaces}, {"c_out", 1, 64}, {"p", 1, kInt32Max}, {"q", 1, kInt32Max},
      SLIM_GEOMETRY_BOUNDS, {"steps", 0, kMaxPlaces}, {"variant", 0, 1}, {"blocks", 1, kInt32Max}, {"overlap", 0, 1},
      {"dtype", SLIM_DTYPE_F16, SLIM_DTYPE_BF16}, {"device", 0, kInt32Max}};
  check_cuda("cuda_stem_conv2d", v.data() + 7, bounds, sizeof(bounds) / sizeof(bounds[0]));
  const auto i = [&v](int at) { return static_cast<int32_t>(v[at]); };
  const SlimCudaStemConv2d a = {
      pointer<const void>(v[0]), pointer(v[1]), pointer<const void>(v[2]), pointer<const void>(v[3]), pointer<const void>(v[4]),
      pointer<const void>(v[5]), pointer<const int32_t>(v[6]), v[7], v[8], v[9], v[10], v[11], v[12], i(13), i(14), i(15), i(16), i(17), i(18),
      i(19), i(20), i(21), i(22), i(23), i(24), i(25), i(26), i(27), i(28), i(29), i(30), i(31), i(32), i(33), i(34), i(35), i(36), i(37), i(38),
      pointer(v[39])};
  std::string fault = tile_plan_fault({a.n, a.h, a.w, 64, a.c_out, a.p, a.q, a.r, a.s, a.stride_h, a.stride_w, a.pad_h, a.pad_w, a.dil_h,
                                       a.dil_w, a.pool, a.tile_images, a.tile_rows, a.tile_cols, a.patch_row, a.patch_image, a.patch,
                                       a.load_top, a.load_left, a.load_rows, a.load_cols});
  if (fault.empty() && (a.w % 2 != 0 || a.load_cols != a.w || a.load_left != a.pad_w || a.tile_cols < a.q || a.tile_images != 1))
    fault = "a tile is not made of whole rows of one image of even width";
  if (fault.empty() && (a.load_rows + 2) * a.w * 3 / 2 > 1024) fault = "the rows of a tile hold more than 1024 words";
  if (!fault.empty()) throw py::value_error("cuda_stem_conv2d: " + fault);
  py::gil_scoped_release release;
  return slim_cuda_stem_conv2d(&a);
}
#undef SLIM_GEOMETRY_BOUNDS

int cuda_low_rank_linear(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t u, uintptr_t v, int64_t m, int64_t in, int64_t out,
                         int64_t rank, int32_t relu, int32_t dtype, int32_t device, uintptr_t stream) {
  const int64_t numbers[] = {m, in, out, rank, relu, dtype, device};
  constexpr Bound bounds[] = {{"m", 1, INT64_MAX}, {"in", 1, kInt32Max}, {"out", 1, kInt32Max}, {"rank", 1, SLIM_CUDA_MAX_FUSED_RANK},
                              {"relu", 0, 1}, {"dtype", SLIM_DTYPE_F32, SLIM_DTYPE_BF16}, {"device", 0, kInt32Max}};
  check_cuda("cuda_low_rank_linear", numbers, bounds, sizeof(bounds) / sizeof(bounds[0]));
  const SlimCudaLowRankLinear a = {pointer<const void>(x), pointer(y), pointer<const void>(bias), pointer<const void>(u),
                                   pointer<const void>(v), m, in, out, rank, relu, dtype, device, pointer(stream)};
  py::gil_scoped_release release;
  return slim_cuda_low_rank_linear(&a);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of slimkernels; csrc/kernels.h holds every function's preconditions.";
  m.def("isas", &isas, "Instruction sets that are compiled in and supported by this CPU, best first.");
  m.def("multiply_adds_f32", &multiply_adds_f32, "(isa, iterations, threads) -> FLOPs done; 0 where the isa does not run.");
  m.def("conv2d_members", &conv2d_members, "(name, offset, size) in bytes of every member of SlimConv2dF32.");
  m.def("entry_offsets", &entry_offsets, "(members of SlimConv2dF32 in order, address of the offsets, their number)");
  py::class_<Steps>(m, "Steps", "Recorded steps of kernels.h; the caller keeps their memory alive.")
      .def(py::init<const std::string&, const std::vector<std::array<int64_t, 2 + kMembers>>&>(), "isa"_a, "steps"_a)
      .def("run", &Steps::run, "threads"_a, "Runs the steps in order; the status.")
      .def("run_delayed", &Steps::run_delayed, "threads"_a, "seed"_a, "The same, for tests: threads sleep between steps.");
  m.def("build_info", &build_info, "What this module was compiled with.");
  if (PyModule_AddFunctions(m.ptr(), kFastFunctions) != 0) throw py::error_already_set();
#if SLIM_HAVE_CUDA
  m.attr("CUDA_MAX_FUSED_RANK") = int(SLIM_CUDA_MAX_FUSED_RANK);
  m.def("cuda_bsr_conv2d", &cuda_bsr_conv2d, "(members of SlimCudaBsrConv2d in order) -> status");
  m.def("cuda_resident_conv2d", &cuda_resident_conv2d, "(members of SlimCudaResidentConv2d in order) -> status");
  m.def("cuda_stem_conv2d", &cuda_stem_conv2d, "(members of SlimCudaStemConv2d in order) -> status");
  m.def("cuda_low_rank_linear", &cuda_low_rank_linear, "(members of SlimCudaLowRankLinear in order) -> status");
  m.def("cuda_error_message", &slim_cuda_error_message, "The last CUDA error of this thread.");
  m.def("cuda_unavailable_reason", &slim_cuda_unavailable_reason, "None when the driver serves this build, else why not.");
#endif
}
