// slimkernels._C: the entry points of kernels.h for Python. Pointers and streams are integers, 0 for NULL; the status code is
// returned; the GIL is released while a kernel runs. Nothing is checked here but the instruction set, since an unsupported one
// would kill the process.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string>
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

constexpr int kMembers = 26;  // of SlimConv2dF32

SlimConv2dF32 conv2d_of(const int64_t* v) {
  const auto i32 = [v](int i) { return static_cast<int32_t>(v[i]); };
  return {pointer<const float>(v[0]),   pointer<float>(v[1]),         pointer<const float>(v[2]),  pointer<const float>(v[3]),
          pointer<const int32_t>(v[4]), pointer<const int32_t>(v[5]), pointer<const int32_t>(v[6]),
          v[7], v[8], v[9], v[10], v[11], v[12], v[13],                            // n h w c_in c_out p q
          i32(14), i32(15), i32(16), i32(17), i32(18), i32(19), i32(20), i32(21),  // r s stride pad dil
          i32(22), i32(23), i32(24), i32(25)};                                     // strip relu pool lanes
}

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
  const SlimStepF32 step = {SLIM_STEP_CONV2D, -1, conv2d_of(v)};
  int status;
  {
    py::gil_scoped_release release;
    status = isa->run_steps(&step, 1, static_cast<int32_t>(v[kMembers]));
  }
  return PyLong_FromLong(status);
}

void entry_offsets(const std::array<int64_t, kMembers>& members, uintptr_t offsets) {
  const SlimConv2dF32 a = conv2d_of(members.data());
  py::gil_scoped_release release;
  slim_entry_offsets(&a, pointer<int32_t>(offsets));
}

// A list of steps that is run again and again on the same memory; the caller keeps that alive.
class Steps {
 public:
  Steps(const std::string& isa, const std::vector<std::array<int64_t, 2 + kMembers>>& steps) : isa_(supported_isa(isa.c_str())) {
    for (const auto& v : steps) steps_.push_back({static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1]), conv2d_of(v.data() + 2)});
  }
  int run(int32_t threads) const {
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    return isa_->run_steps(steps_.data(), static_cast<int64_t>(steps_.size()), threads);
  }
  int run_delayed(int32_t threads, uint32_t seed) const {
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    return isa_->run_delayed_steps(steps_.data(), static_cast<int64_t>(steps_.size()), threads, seed);
  }

 private:
  const Isa* isa_;
  std::vector<SlimStepF32> steps_;
};

double multiply_adds_f32(const std::string& name, int64_t iterations, int32_t threads) {
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
int cuda_bsr_conv2d(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t values, uintptr_t crow_indices, uintptr_t col_indices,
                    int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_out, int64_t p, int64_t q, int32_t r, int32_t s,
                    int32_t stride_h, int32_t stride_w, int32_t pad_h, int32_t pad_w, int32_t dil_h, int32_t dil_w,
                    int32_t block_out, int32_t block_in, int32_t relu, int32_t dtype, int32_t device, uintptr_t stream) {
  const SlimCudaBsrConv2d a = {pointer<const void>(x), pointer(y), pointer<const void>(bias), pointer<const void>(values),
                               pointer<const int32_t>(crow_indices), pointer<const int32_t>(col_indices),
                               n, h, w, c_in, c_out, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
                               block_out, block_in, relu, dtype, device, pointer(stream)};
  py::gil_scoped_release release;
  return slim_cuda_bsr_conv2d(&a);
}

int cuda_low_rank_linear(uintptr_t x, uintptr_t y, uintptr_t bias, uintptr_t u, uintptr_t v, int64_t m, int64_t in, int64_t out,
                         int64_t rank, int32_t relu, int32_t dtype, int32_t device, uintptr_t stream) {
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
  m.def("entry_offsets", &entry_offsets, "(members of SlimConv2dF32 in order, address of the offsets)");
  py::class_<Steps>(m, "Steps", "Recorded steps of kernels.h; the caller keeps their memory alive.")
      .def(py::init<const std::string&, const std::vector<std::array<int64_t, 2 + kMembers>>&>(), "isa"_a, "steps"_a)
      .def("run", &Steps::run, "threads"_a, "Runs the steps in order; the status.")
      .def("run_delayed", &Steps::run_delayed, "threads"_a, "seed"_a, "The same, for tests: threads sleep between steps.");
  m.def("build_info", &build_info, "What this module was compiled with.");
  if (PyModule_AddFunctions(m.ptr(), kFastFunctions) != 0) throw py::error_already_set();
#if SLIM_HAVE_CUDA
  m.attr("CUDA_MAX_FUSED_RANK") = int(SLIM_CUDA_MAX_FUSED_RANK);
  m.def("cuda_bsr_conv2d", &cuda_bsr_conv2d, "(members of SlimCudaBsrConv2d in order) -> status");
  m.def("cuda_low_rank_linear", &cuda_low_rank_linear, "(members of SlimCudaLowRankLinear in order) -> status");
  m.def("cuda_error_message", &slim_cuda_error_message, "The last CUDA error of this thread.");
  m.def("cuda_unavailable_reason", &slim_cuda_unavailable_reason, "None when the driver serves this build, else why not.");
#endif
}
