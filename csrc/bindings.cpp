// slimkernels._C: the entry points of kernels.h for Python. Pointers and streams are integers, 0 for NULL; the status
// code is returned; the GIL is released while a kernel runs.
//
// What can be told without reading memory is checked here and in bindings/: the instruction set, since an unsupported
// one would kill the process, and that every number lies in its range and no offset wraps. What the tensors hold is
// checked in slimkernels/kernels/cpu/{conv2d,pooling,weight_gradient,batch_norm}.py, cuda.py,
// cuda_tensor_cores.py, cuda_chain.py, cuda_low_rank.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/batch_norm.h"
#include "bindings/conv2d.h"
#include "bindings/weight_gradient.h"
#include "cpu/pairs_engine.h"
#include "kernels.h"
#include "slim_build_config.h"
#if SLIM_HAVE_CUDA
#include "bindings/cuda.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

using namespace slim;

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Isa {
  const char* name;
  int (*run_steps)(const SlimStepF32*, int64_t, int32_t);
  int (*run_delayed_steps)(const SlimStepF32*, int64_t, int32_t, uint32_t);
  int (*weight_gradient_f32)(const SlimWeightGradientF32*, int32_t);
  int (*batch_norm_f32)(const SlimBatchNormF32*, int32_t);
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
    list.push_back({"avx512", slim_run_steps_f32_avx512, slim_run_delayed_steps_f32_avx512,
                    slim_weight_gradient_f32_avx512, slim_batch_norm_f32_avx512, slim_multiply_adds_f32_avx512,
                    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("fma")});
#endif
#if SLIM_HAVE_AVX2
    list.push_back({"avx2", slim_run_steps_f32_avx2, slim_run_delayed_steps_f32_avx2, slim_weight_gradient_f32_avx2,
                    slim_batch_norm_f32_avx2, slim_multiply_adds_f32_avx2,
                    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
    list.push_back({"scalar", slim_run_steps_f32_scalar, slim_run_delayed_steps_f32_scalar,
                    slim_weight_gradient_f32_scalar, slim_batch_norm_f32_scalar, slim_multiply_adds_f32_scalar, true});
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

std::vector<std::string> bf16_engines() {
  std::vector<std::string> names;
  if (slim_pairs_engine(SLIM_ENGINE_AMX) != nullptr) names.push_back("amx");
  if (slim_pairs_engine(SLIM_ENGINE_AVX512BF16) != nullptr) names.push_back("avx512_bf16");
  names.push_back("scalar");
  return names;
}

const Isa* supported_isa(const char* name) {
  for (const Isa& isa : compiled_isas()) {
    if (isa.supported && std::strcmp(name, isa.name) == 0) return &isa;
  }
  return nullptr;
}

template <typename T>
std::vector<std::tuple<std::string, size_t, size_t>> members_of() {
  std::vector<std::tuple<std::string, size_t, size_t>> found;
  for (const Member& member : Members<T>::list) found.emplace_back(member.name, member.offset, member.size);
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
  const SlimStepF32 step = {SLIM_STEP_CONV2D, -1, struct_of<SlimConv2dF32>(v)};
  const std::string fault = threads_fit(v[kMembers]) ? run_fault(v, step.conv) : "expected at least one thread";
  if (!fault.empty()) return PyErr_Format(PyExc_ValueError, "conv2d_f32: %s", fault.c_str());
  int status;
  {
    py::gil_scoped_release release;
    status = isa->run_steps(&step, 1, static_cast<int32_t>(v[kMembers]));
  }
  return PyLong_FromLong(status);
}

// What is wrong with a convolution that offsets are asked for.
std::string offsets_fault(const std::array<int64_t, kMembers>& members, const SlimConv2dF32& a) {
  const std::string fault = conv2d_fault(members.data(), a);
  if (!fault.empty()) return fault;
  const int64_t runs = (a.c_out + a.strip - 1) / a.strip * a.r * a.s;
  bool rises = a.tap_ptr[0] == 0;
  for (int64_t i = 0; i < runs && rises; ++i) rises = a.tap_ptr[i] <= a.tap_ptr[i + 1];
  if (!rises) return "tap_ptr does not rise from 0";
  return a.tap_ptr[runs] > 0 && (a.channels == nullptr || a.weights == nullptr) ? "channels or weights are NULL" : "";
}

int64_t entry_offsets_count(const std::array<int64_t, kMembers>& members) {
  const SlimConv2dF32 a = struct_of<SlimConv2dF32>(members.data());
  const std::string fault = offsets_fault(members, a);
  if (!fault.empty()) throw py::value_error("entry_offsets_count: " + fault);
  return slim_entry_offsets_count(&a);
}

void entry_offsets(const std::array<int64_t, kMembers>& members, uintptr_t offsets, int64_t count) {
  const SlimConv2dF32 a = struct_of<SlimConv2dF32>(members.data());
  std::string fault = offsets_fault(members, a);
  if (fault.empty() && count != slim_entry_offsets_count(&a))
    fault = "the offsets have room for " + std::to_string(count) + " numbers";
  if (!fault.empty()) throw py::value_error("entry_offsets: " + fault);
  py::gil_scoped_release release;
  slim_entry_offsets(&a, pointer<int32_t>(offsets));
}

// What is wrong with a step's numbers.
std::string step_fault(int64_t kind, const int64_t* members, const SlimConv2dF32& conv) {
  if (kind >= SLIM_STEP_TO_PAIRS && conv.lanes != 16) return "pairs go with 16 images innermost";
  switch (kind) {
    case SLIM_STEP_CONV2D:       return run_fault(members, conv);
    case SLIM_STEP_TO_IMAGES:
    case SLIM_STEP_FROM_IMAGES:
    case SLIM_STEP_TO_PAIRS:     return layout_fault(members, conv);
    case SLIM_STEP_PAIRS_CONV2D: return pairs_conv_fault(members, conv);
    default:                     return pool_fault(members, conv);
  }
}

// A list of steps that is run again and again; the caller keeps the memory alive. `movable` lists the (address, bytes)
// of memory that may lie elsewhere in a later run: where it lies then, run_at is told.
class Steps {
 public:
  Steps(const std::string& isa, const std::vector<std::array<int64_t, 2 + kMembers>>& steps,
        const std::vector<std::pair<uintptr_t, uintptr_t>>& movable)
      : isa_(supported_isa(isa.c_str())), ranges_(movable.size()) {
    if (isa_ == nullptr) return;  // every run says so
    for (const auto& v : steps) {
      const int64_t* const members = v.data() + 2;
      const SlimConv2dF32 conv = struct_of<SlimConv2dF32>(members);
      std::string fault;
      if (v[0] < SLIM_STEP_CONV2D || v[0] > SLIM_STEP_PAIRS_PADDED_AVERAGE_POOL)
        fault = "kind = " + std::to_string(v[0]) + " is no known step";
      else if (v[1] < -1 || v[1] > kMaxSlot)
        fault = "slot = " + std::to_string(v[1]) + " is out of range";
      else if (conv.x == nullptr || conv.y == nullptr)
        fault = "x or y is NULL";
      else
        fault = step_fault(v[0], members, conv);
      if (!fault.empty()) throw py::value_error("Steps: " + fault);
      for (int pointer : kMoving) {
        for (size_t range = 0; range < movable.size(); ++range) {
          const uintptr_t offset = static_cast<uintptr_t>(members[pointer]) - movable[range].first;
          if (members[pointer] != 0 && offset < movable[range].second)
            moving_.push_back({steps_.size(), pointer, range, offset});
        }
      }
      steps_.push_back({static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1]), conv});
    }
  }
  int run(int32_t threads) const {
    if (!threads_fit(threads)) throw py::value_error("Steps: expected at least one thread");
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    return isa_->run_steps(steps_.data(), static_cast<int64_t>(steps_.size()), threads);
  }
  int run_at(const std::vector<uintptr_t>& addresses, int32_t threads) const {
    if (!threads_fit(threads)) throw py::value_error("Steps: expected at least one thread");
    if (addresses.size() != ranges_ || std::count(addresses.begin(), addresses.end(), uintptr_t(0)) > 0)
      throw py::value_error("Steps: expected the address of every movable memory");
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    std::vector<SlimStepF32> steps = steps_;
    for (const Moving& m : moving_) {
      float* const there = pointer<float>(addresses[m.range] + m.offset);
      SlimConv2dF32& conv = steps[m.step].conv;
      if (m.member == kX) conv.x = there;
      if (m.member == kY) conv.y = there;
      if (m.member == kResidual) conv.residual = there;
    }
    return isa_->run_steps(steps.data(), static_cast<int64_t>(steps.size()), threads);
  }
  int run_delayed(int32_t threads, uint32_t seed) const {
    if (!threads_fit(threads)) throw py::value_error("Steps: expected at least one thread");
    if (isa_ == nullptr) return SLIM_ERROR_UNSUPPORTED;
    py::gil_scoped_release release;
    return isa_->run_delayed_steps(steps_.data(), static_cast<int64_t>(steps_.size()), threads, seed);
  }

 private:
  // A pointer of a step that lies `offset` bytes behind the start of a movable range.
  struct Moving {
    size_t step;
    int member;
    size_t range;
    uintptr_t offset;
  };
  static constexpr int64_t kMaxSlot = 65535;
  static constexpr int kX = 0, kY = 1, kResidual = 7, kMoving[] = {kX, kY, kResidual};
  const Isa* isa_;
  size_t ranges_;
  std::vector<SlimStepF32> steps_;
  std::vector<Moving> moving_;
};

int weight_gradient_f32(const std::string& name, const std::array<int64_t, kCount<SlimWeightGradientF32>>& members,
                        int64_t threads) {
  const SlimWeightGradientF32 a = struct_of<SlimWeightGradientF32>(members.data());
  const std::string fault =
      threads_fit(threads) ? weight_gradient_fault(members.data(), a) : "expected at least one thread";
  if (!fault.empty()) throw py::value_error("weight_gradient_f32: " + fault);
  const Isa* isa = supported_isa(name.c_str());
  if (isa == nullptr) return SLIM_ERROR_UNSUPPORTED;
  py::gil_scoped_release release;
  return isa->weight_gradient_f32(&a, static_cast<int32_t>(threads));
}

int batch_norm_f32(const std::string& name, const std::array<int64_t, kCount<SlimBatchNormF32>>& members,
                   int64_t threads) {
  const SlimBatchNormF32 a = struct_of<SlimBatchNormF32>(members.data());
  const std::string fault = threads_fit(threads) ? batch_norm_fault(members.data(), a) : "expected at least one thread";
  if (!fault.empty()) throw py::value_error("batch_norm_f32: " + fault);
  const Isa* isa = supported_isa(name.c_str());
  if (isa == nullptr) return SLIM_ERROR_UNSUPPORTED;
  py::gil_scoped_release release;
  return isa->batch_norm_f32(&a, static_cast<int32_t>(threads));
}

double multiply_adds_f32(const std::string& name, int64_t iterations, int32_t threads) {
  if (iterations < 0 || !threads_fit(threads))
    throw py::value_error("multiply_adds_f32: expected iterations and threads to run");
  const Isa* isa = supported_isa(name.c_str());
  if (isa == nullptr) return 0;
  py::gil_scoped_release release;
  return isa->multiply_adds_f32(iterations, threads);
}

PyMethodDef kFastFunctions[] = {
    {"conv2d_f32", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(conv2d_f32)), METH_FASTCALL,
     "(isa, members of SlimConv2dF32 in order, threads) -> status"},
    {nullptr, nullptr, 0, nullptr},
};

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of slimkernels; csrc/kernels.h holds every function's preconditions.";
  m.def("isas", &isas, "Instruction sets that are compiled in and supported by this CPU, best first.");
  m.def("bf16_engines", &bf16_engines, "What runs steps in pairs here, best first.");
  m.def("multiply_adds_f32", &multiply_adds_f32,
        "(isa, iterations, threads) -> FLOPs done; 0 where the isa does not run.");
  m.def("conv2d_members", &members_of<SlimConv2dF32>,
        "(name, offset, size) in bytes of every member of SlimConv2dF32.");
  m.def("weight_gradient_members", &members_of<SlimWeightGradientF32>, "The same of SlimWeightGradientF32.");
  m.def("weight_gradient_f32", &weight_gradient_f32,
        "(isa, members of SlimWeightGradientF32 in order, threads) -> status");
  m.def("batch_norm_members", &members_of<SlimBatchNormF32>, "The same of SlimBatchNormF32.");
  m.def("batch_norm_f32", &batch_norm_f32, "(isa, members of SlimBatchNormF32 in order, threads) -> status");
  m.def("entry_offsets_count", &entry_offsets_count, "(members of SlimConv2dF32 in order) -> numbers");
  m.def("entry_offsets", &entry_offsets, "(members of SlimConv2dF32 in order, address of the offsets, their number)");
  py::class_<Steps>(m, "Steps", "Recorded steps of kernels.h; the caller keeps their memory alive.")
      .def(py::init<const std::string&, const std::vector<std::array<int64_t, 2 + kMembers>>&,
                    const std::vector<std::pair<uintptr_t, uintptr_t>>&>(),
           "isa"_a, "steps"_a, "movable"_a = std::vector<std::pair<uintptr_t, uintptr_t>>())
      .def("run", &Steps::run, "threads"_a, "Runs the steps in order; the status.")
      .def("run_at", &Steps::run_at, "addresses"_a, "threads"_a,
           "The same where the movable memory lies at these addresses now.")
      .def("run_delayed", &Steps::run_delayed, "threads"_a, "seed"_a,
           "The same, for tests: threads sleep between steps.");
  m.def("build_info", &build_info, "What this module was compiled with.");
  if (PyModule_AddFunctions(m.ptr(), kFastFunctions) != 0) throw py::error_already_set();
#if SLIM_HAVE_CUDA
  m.attr("CUDA_MAX_FUSED_RANK") = int(SLIM_CUDA_MAX_FUSED_RANK);
  m.def("cuda_bsr_conv2d", &cuda_bsr_conv2d, "(members of SlimCudaBsrConv2d in order) -> status");
  m.def("cuda_resident_conv2d", &cuda_resident_conv2d, "(members of SlimCudaResidentConv2d in order) -> status");
  m.def("cuda_stem_conv2d", &cuda_stem_conv2d, "(members of SlimCudaStemConv2d in order) -> status");
  m.def("cuda_chain_conv2d", &cuda_chain_conv2d,
        "([members of SlimCudaChainLayer in order, ...], members of SlimCudaChain from counters on, without count) -> "
        "status");
  m.def("cuda_chain_groups", &cuda_chain_groups,
        "(group, barrier, dtype, device) -> groups of thread blocks that run at the same time, or minus the status");
  m.def("cuda_weight_gradient", &cuda_weight_gradient, "(members of SlimCudaWeightGradient in order) -> status");
  m.def("cuda_low_rank_linear", &cuda_low_rank_linear, "(members of SlimCudaLowRankLinear in order) -> status");
  m.def("cuda_low_rank", &cuda_low_rank, "(members of SlimCudaLowRank in order) -> status");
  m.def("cuda_error_message", &slim_cuda_error_message, "The last CUDA error of this thread.");
  m.def("cuda_unavailable_reason", &slim_cuda_unavailable_reason,
        "None when the driver serves this build, else why not.");
#endif
}
