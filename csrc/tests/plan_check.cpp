// Prints how csrc/cpu/plan.h cuts the convolutions of VGG-19 (32x32 images, seven eighths of the weights pruned) and
// some of ResNet-50 (224x224 images), one line each. tests/cpu_kernels/test_cpp_sources.py compares the lines with
// csrc/tests/plans.txt.
//
//   plan_check
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "../cpu/plan.h"
#include "../kernels.h"

namespace {

struct Layer {
  const char* name;
  int64_t size, c_in, c_out;  // images of size x size
  int32_t kernel, stride;
  bool pool;
};

constexpr Layer kVgg19[] = {
    {"conv1_1", 32, 3, 64, 3, 1, false},   {"conv1_2", 32, 64, 64, 3, 1, true},   {"conv2_1", 16, 64, 128, 3, 1, false},
    {"conv2_2", 16, 128, 128, 3, 1, true}, {"conv3_1", 8, 128, 256, 3, 1, false}, {"conv3_2", 8, 256, 256, 3, 1, false},
    {"conv3_3", 8, 256, 256, 3, 1, false}, {"conv3_4", 8, 256, 256, 3, 1, true},  {"conv4_1", 4, 256, 512, 3, 1, false},
    {"conv4_2", 4, 512, 512, 3, 1, false}, {"conv4_3", 4, 512, 512, 3, 1, false}, {"conv4_4", 4, 512, 512, 3, 1, true},
    {"conv5_1", 2, 512, 512, 3, 1, false}, {"conv5_2", 2, 512, 512, 3, 1, false}, {"conv5_3", 2, 512, 512, 3, 1, false},
    {"conv5_4", 2, 512, 512, 3, 1, true},  {"fc1", 1, 512, 512, 1, 1, false},     {"fc2", 1, 512, 512, 1, 1, false},
    {"fc3", 1, 512, 10, 1, 1, false},
};

constexpr Layer kResnet50[] = {
    {"conv1", 224, 3, 64, 7, 2, false},
    {"layer1.0.conv1", 56, 64, 64, 1, 1, false},
    {"layer1.0.conv2", 56, 64, 64, 3, 1, false},
    {"layer2.0.conv2", 56, 128, 128, 3, 2, false},
    {"layer3.1.conv2", 14, 256, 256, 3, 1, false},
    {"layer4.2.conv3", 7, 512, 2048, 1, 1, false},
};

// A layout and a strip width, with the largest tile that the AVX-512 kernels have for it, and whether images are cut
// into parts.
struct Form {
  int32_t lanes, strip;
  int64_t tile_pixels;
  bool parts;
};

constexpr Form kForms[] = {
    {1, 16, 10, false}, {1, 8, 10, false}, {16, 16, 3, false}, {16, 1, 10, false}, {16, 1, 10, true}};

void print_plan(const char* network, const Layer& layer, int64_t batch, const Form& form) {
  SlimConv2dF32 conv;
  memset(&conv, 0, sizeof conv);
  conv.n = batch;
  conv.h = conv.w = layer.size;
  conv.c_in = layer.c_in;
  conv.c_out = layer.c_out;
  conv.r = conv.s = layer.kernel;
  conv.stride_h = conv.stride_w = layer.stride;
  conv.pad_h = conv.pad_w = layer.kernel / 2;
  conv.dil_h = conv.dil_w = 1;
  conv.p = conv.q = (layer.size - 1) / layer.stride + 1;
  conv.pool = layer.pool;
  conv.relu = 1;
  conv.lanes = form.lanes;
  conv.strip = form.strip;
  conv.depth = 1;
  const int32_t most = conv.pool ? 8 : 4;  // rows and columns of outputs of which each part has one, or two
  conv.parts_h = conv.parts_w = !form.parts || conv.p < 2 + 2 * conv.pool ? 1 : conv.p % most == 0 ? 4 : 2;
  if (form.parts) {
    conv.n *= conv.parts_h * conv.parts_w;
    conv.h /= conv.parts_h;
    conv.w /= conv.parts_w;
    conv.p /= conv.parts_h;
    conv.q /= conv.parts_w;
  }
  const int64_t runs = (layer.c_out + form.strip - 1) / form.strip * layer.kernel * layer.kernel;
  const int64_t channels_kept = layer.c_in < 8 ? layer.c_in : layer.c_in / 8;
  std::vector<int32_t> tap_ptr;
  for (int64_t i = 0; i <= runs; ++i) tap_ptr.push_back(int32_t(i * channels_kept));
  conv.tap_ptr = tap_ptr.data();

  Plan plan;
  decide(plan, conv, form.tile_pixels);
  static const char* const kOrders[] = {"all_taps", "tap_by_tap", "slabs"};
  printf(
      "%s %s batch=%ld lanes=%d strip=%d: %s, images %ld x %ld, rows %ld x %ld, strips %ld x %ld, scratch %ld, macs "
      "%ld",
      network, layer.name, long(batch), form.lanes, form.strip, kOrders[plan.order], long(plan.image_parts),
      long(plan.pixels_per_unit.images), long(plan.row_parts), long(plan.pixels_per_unit.rows), long(plan.strip_parts),
      long(plan.strips_per_unit), long(plan.scratch_floats), long(plan.macs));
  if (plan.order == SLABS) {
    printf(", tiles %ld x %ld, slabs %ld x %ld, plane %ld", long(plan.slabs.rows.tile), long(plan.slabs.columns.tile),
           long(plan.slabs.count), long(plan.slabs.channels), long(plan.slabs.plane));
  }
  printf("\n");
}

}  // namespace

int main() {
  for (const Form& form : kForms) {
    for (int64_t batch : {1, 16, 128}) {
      if ((form.lanes > 1 && batch == 1) != form.parts) continue;  // one image does not fill a vector
      for (const Layer& layer : kVgg19) print_plan("vgg19", layer, batch, form);
    }
    for (int64_t batch : {1, 16}) {
      if ((form.lanes > 1 && batch == 1) != form.parts) continue;
      for (const Layer& layer : kResnet50) print_plan("resnet50", layer, batch, form);
    }
  }
  return 0;
}
