// Every native entry point of slimkernels and its preconditions.
//
// The caller (slimkernels/kernels/cpu/{conv2d,pooling,weight_gradient,batch_norm}.py for the CPU, kernels/cuda.py,
// cuda_tensor_cores.py and cuda_chain.py for CUDA) has checked device, dtype, strides, bounds and what index tensors
// hold; bindings/ has checked the ranges of all numbers; nothing behind them checks again. Entry points return 0 on
// success and one of the SLIM_ERROR codes otherwise.
//
// C types only: this header is included by translation units built for different instruction sets.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define SLIM_HIDDEN __attribute__((visibility("hidden")))
#else
#define SLIM_HIDDEN
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SLIM_OFFSETS_MARGIN = 16, SLIM_PARTS_MAX_TAPS = 32, SLIM_PAIRS_MAX_TAPS = 63 };
enum { SLIM_OK = 0, SLIM_ERROR_NO_MEMORY = 1, SLIM_ERROR_UNSUPPORTED = 2, SLIM_ERROR_CUDA = 3 };

// ---------------------------------------------------------------- CPU

// Block-sparse 2-D convolution, fp32, channels-last:
//   y[n,p,q,o] = epilogue(bias[o] + sum over stored (tap,c) of weight[o,tap,c] * x[n, iy, ix, c] + residual[n,p,q,o])
//   where tap = i*s + j reads the pixel iy = p*stride_h - pad_h + i*dil_h, ix = q*stride_w - pad_w + j*dil_w
//
// The weight is a *strip pack*: output channels are cut into ceil(c_out / strip) strips of `strip` channels (8, 16, 24
// or 32; images innermost also 1, 2 or 4). For strip i and tap t the entries tap_ptr[i*taps + t] .. tap_ptr[i*taps + t
// + 1] each hold an input channel and `strip` weights (zero where the pattern stores nothing or the channel lies beyond
// c_out). taps = r*s, tap = row*s + column. Entries of one (strip, tap) are sorted by channel.
//
// Input gradients read their weight the other way round: `depth` neighbouring input channels share an entry of one
// output channel. With depth 8 or 16 the strip is 1, lanes is 1, an entry holds `depth` weights, of the channels from
// its own on, all of them below c_in, and pool is 0. Everywhere else depth is 1.
//
// Activations lie channels last (lanes = 1) or images innermost (lanes = the instruction set's vector: 4 scalar, 8
// avx2, 16 avx512): (ceil(n/lanes), h, w, c, lanes), lanes beyond n holding anything finite.
//
// A few images fill a vector in *parts*: each is cut into parts_h x parts_w parts of equal size, row by row, which lie
// innermost as images do. Then n counts parts, and h, w, p and q are sizes of a part; the convolution still reads
// across the borders between them. This is for strips of one channel with images innermost. Preconditions: parts_h *
// parts_w divides lanes and n; p * stride_h == h and q * stride_w == w; with pool p and q are even; r, s <=
// SLIM_PARTS_MAX_TAPS.
//
// Preconditions: x is (n,h,w,c_in), y is (n,p,q,c_out), or (n,p/2,q/2,c_out) with pool, both contiguous in that order
// and not overlapping; residual, where given, lies like y, overlaps it nowhere, and pool is 0; n,p,q,c_out >= 1; every
// channel in [0, c_in); tap_ptr non-decreasing from 0; h*w*c_in*lanes, p*q*c_out*lanes, the entry count and
// (max(dil_h*(r-1), pad_h)*w + max(dil_w*(s-1), pad_w, stride_w) + 1)*c_in*lanes below 2^31; r <= 64 unless lanes = 1.
// A linear layer is h = w = r = s = 1.
//
// offsets, where given, is what slim_entry_offsets writes for a convolution of the same weight, geometry and image
// size: of every entry the elements of x between a pixel's tap (0, 0) and the entry, and behind them
// SLIM_OFFSETS_MARGIN numbers that are read ahead. Of single weights with images innermost it is usually the program of
// cpu/slab_plan.h instead, which holds a copy of the weights.
typedef struct SlimConv2dF32 {
  const float* x;
  float* y;
  const float* bias;        // c_out values, or NULL
  const float* weights;     // (entries, strip * depth)
  const int32_t* channels;  // (entries)
  const int32_t* tap_ptr;   // (ceil(c_out/strip) * r*s + 1)
  const int32_t* offsets;   // (slim_entry_offsets_count), or NULL: computed in the call
  const float* residual;    // added to the sums in front of the ReLU, or NULL
  int64_t n, h, w, c_in, c_out, p, q;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t strip;             // 8, 16, 24 or 32; images innermost also 1, 2 or 4; 1 with a depth
  int32_t depth;             // 1, or input channels of an entry: 8 or 16
  int32_t relu;              // 0 or 1: y = max(y, 0), NaN kept
  int32_t pool;              // 0 or 1: 2x2 stride-2 max-pool (floor) after the ReLU, NaN kept
  int32_t lanes;             // 1, or the vector of the instruction set
  int32_t parts_h, parts_w;  // of an image, 1 and 1 where images are whole
  int32_t engine;            // of a step in pairs: SLIM_ENGINE_*; else 0
  int32_t to_floats;         // of a step in pairs: 0 or 1, y is fp32 with 16 images innermost
} SlimConv2dF32;

// One step of a recorded network. A layout step copies x, channels last (n,h,w,c_in), into y, images innermost, or the
// other way round, and reads of `conv` just x, y, n, h, w, c_in, lanes, parts_h and parts_w.
//
// A pooling step writes the largest number (NaN kept) or the mean of a window of x, (n,h,w,c_in), into y, (n,p,q,c_in),
// both in the layout of `lanes`: the pixels iy, ix of the taps as above that lie inside the image. The padded mean
// divides by r * s, as if the padding held zeros, the other one by the number of pixels inside. It reads x, y, n, h, w,
// c_in, p, q, r, s, the strides, paddings and dilations, and lanes; images are whole.
// Steps in *pairs* take bf16, (ceil(n/16), h, w, ceil(c/2), 16 images, 2 channels), images beyond n holding anything
// finite; their pointers are cast. SLIM_STEP_TO_PAIRS copies x, fp32 channels last, into y and reads n, h, w and c_in,
// lanes being 16. The convolution multiplies numbers of bf16 exactly and adds in fp32, denormals being zero on some
// engines; it has r * s <= SLIM_PAIRS_MAX_TAPS and lanes = 16, and as its weight
//   channels: a SlimPairsGroup for each group of up to 16 rows, an even and an odd channel each
//   weights:  (groups, 16 output channels, 16 rows, 2) in bf16, 0 where a group or the output has less
//   tap_ptr:  (ceil(c_out/16) + 1), the first group of each strip of 16 output channels, not decreasing from 0
// y and a residual are in pairs, or y is fp32 with 16 images innermost (to_floats), and is then what residuals are
// added to all the same. Bias is fp32, 2x2 pools as above, images whole. Poolings in pairs are as those above. All
// pointers but the bias and an fp32 x are multiples of 64, channels and tap_ptr of 8.
enum {
  SLIM_STEP_CONV2D = 0,
  SLIM_STEP_TO_IMAGES = 1,
  SLIM_STEP_FROM_IMAGES = 2,
  SLIM_STEP_MAX_POOL = 3,
  SLIM_STEP_AVERAGE_POOL = 4,
  SLIM_STEP_PADDED_AVERAGE_POOL = 5,
  SLIM_STEP_TO_PAIRS = 6,
  SLIM_STEP_PAIRS_CONV2D = 7,
  SLIM_STEP_PAIRS_MAX_POOL = 8,
  SLIM_STEP_PAIRS_AVERAGE_POOL = 9,
  SLIM_STEP_PAIRS_PADDED_AVERAGE_POOL = 10
};
enum { SLIM_ENGINE_SCALAR = 1, SLIM_ENGINE_AVX512BF16 = 2, SLIM_ENGINE_AMX = 3 };

// Where the number in an even or an odd place of a row comes from: a tap, SLIM_PAIRS_MAX_TAPS for none (zeros); and the
// bytes from a pixel's first pair of channels to its own. That is a multiple of 64, of an odd channel in an even place
// 2 more, and of an even channel in an odd place 2 less; of none it is 0.
typedef struct SlimPairsSource {
  int32_t tap, row;
} SlimPairsSource;
typedef struct SlimPairsRow {
  SlimPairsSource even, odd;
} SlimPairsRow;
// WHOLE: both sources of each row are one pair. DIRECT: and the 16 rows are neighbouring pairs of one tap. SHIFTED:
// some source is no multiple of 64.
enum { SLIM_GROUP_MIXED = 0, SLIM_GROUP_WHOLE = 1, SLIM_GROUP_DIRECT = 2, SLIM_GROUP_SHIFTED = 3 };
typedef struct SlimPairsGroup {
  int32_t rows;          // 1 to 16
  int32_t kind;          // SLIM_GROUP_*
  uint64_t taps;         // a bit for each tap of its sources
  SlimPairsRow row[16];  // those beyond `rows` are not read
} SlimPairsGroup;

typedef struct SlimStepF32 {
  int32_t kind;
  int32_t slot;  // -1: all threads share the step; from 0 on: one thread runs it
  SlimConv2dF32 conv;
} SlimStepF32;

// Runs the steps one after the other with one team of threads (>= 1; with 1 no parallel region is entered). Steps with
// a slot that follow each other in the list may run at the same time: each waits only for the steps of its own slot,
// and must touch nothing that another slot writes.
SLIM_HIDDEN int slim_run_steps_f32_scalar(const SlimStepF32* steps, int64_t count, int32_t threads);
SLIM_HIDDEN int slim_run_steps_f32_avx2(const SlimStepF32* steps, int64_t count, int32_t threads);
SLIM_HIDDEN int slim_run_steps_f32_avx512(const SlimStepF32* steps, int64_t count, int32_t threads);

// The same for tests: in front of its part of a step each thread sleeps for up to 300 microseconds, which follow from
// the seed (not 0), the step and the thread. Steps that must not run at the same time then do, wherever nothing keeps
// them apart.
SLIM_HIDDEN int slim_run_delayed_steps_f32_scalar(const SlimStepF32* steps, int64_t count, int32_t threads,
                                                  uint32_t seed);
SLIM_HIDDEN int slim_run_delayed_steps_f32_avx2(const SlimStepF32* steps, int64_t count, int32_t threads,
                                                uint32_t seed);
SLIM_HIDDEN int slim_run_delayed_steps_f32_avx512(const SlimStepF32* steps, int64_t count, int32_t threads,
                                                  uint32_t seed);

// The offsets of a convolution's entries and how many numbers they are; of `a`, n, x, y and bias are not read.
SLIM_HIDDEN int64_t slim_entry_offsets_count(const SlimConv2dF32* a);
SLIM_HIDDEN void slim_entry_offsets(const SlimConv2dF32* a, int32_t* offsets);

// The gradient of the weights that a block-sparse convolution stores, fp32, channels last:
//   values_grad[b,o,c] = sum over n,p,q of grad[n,p,q,O] * x[n, iy, ix, C]
//   of the output channel O = i*block_out + o and the input channel C = g*block_in + c at the tap of block b, which
//   lies in block row i and block column tap*ceil(c_in/block_in) + g; 0 where O or C does not exist
//
// Preconditions: x is (n,h,w,c_in), grad is (n,p,q,c_out), values_grad is (crow_indices[last],block_out,block_in), all
// contiguous in that order, values_grad overlapping nothing; crow_indices is (ceil(c_out/block_out) + 1), not
// decreasing from 0; col_indices rises in each block row and lies in [0, r*s*ceil(c_in/block_in)); block_out is a
// multiple of 8; n,h,w,p,q,c_in,c_out >= 1; h*w*c_in and p*q*c_out below 2^31.
typedef struct SlimWeightGradientF32 {
  const float* x;
  const float* grad;
  float* values_grad;
  const int32_t* crow_indices;
  const int32_t* col_indices;
  int64_t n, h, w, c_in, c_out, p, q;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t block_out, block_in;
} SlimWeightGradientF32;

SLIM_HIDDEN int slim_weight_gradient_f32_scalar(const SlimWeightGradientF32* a, int32_t threads);
SLIM_HIDDEN int slim_weight_gradient_f32_avx2(const SlimWeightGradientF32* a, int32_t threads);
SLIM_HIDDEN int slim_weight_gradient_f32_avx512(const SlimWeightGradientF32* a, int32_t threads);

// Batch norm of a training step, fp32, channels last, with the ReLU and the 2x2 stride-2 max-pool (floor) behind it:
//   z = (x + shift) * scale + bias;  the output is z, relu(z) or, with pool, the pool of relu(z); NaN kept
// One of four passes over x:
//   SLIM_NORM_MOMENTS         sums: of each channel the mean of x, and the mean of the squared distances from it
//   SLIM_NORM_OUTPUT          y: the output
//   SLIM_NORM_GRADIENT_SUMS   sums: the sum of g, and the sum of g * (x + shift), where g is the gradient of z
//   SLIM_NORM_INPUT_GRADIENT  y, like x: g * scale + (x + shift) * slope + constant
// `grad` is the gradient of the output. In a window it goes to the first of equal maxima; where z <= 0 there is none.
//
// Preconditions: x is (n,h,w,c), the output (n,h,w,c), or (n,h/2,w/2,c) with pool, both contiguous in that order;
// coefficients is (5,c): shift, scale, bias, slope, constant (the last two of the gradient alone), sums is (2,c); what
// is written overlaps nothing; n,h,w,c >= 1, with pool h,w >= 2 and relu is 1; h*w*c below 2^31. What a pass does not
// need may be NULL.
enum { SLIM_NORM_MOMENTS = 0, SLIM_NORM_OUTPUT = 1, SLIM_NORM_GRADIENT_SUMS = 2, SLIM_NORM_INPUT_GRADIENT = 3 };
typedef struct SlimBatchNormF32 {
  const float* x;
  const float* grad;
  const float* coefficients;
  float* y;
  double* sums;
  int64_t n, h, w, c;
  int32_t which, relu, pool;
} SlimBatchNormF32;

SLIM_HIDDEN int slim_batch_norm_f32_scalar(const SlimBatchNormF32* a, int32_t threads);
SLIM_HIDDEN int slim_batch_norm_f32_avx2(const SlimBatchNormF32* a, int32_t threads);
SLIM_HIDDEN int slim_batch_norm_f32_avx512(const SlimBatchNormF32* a, int32_t threads);

// The multiply-add ceiling: runs that many rounds of independent multiply-adds and returns the FLOPs done; the caller
// times it.
SLIM_HIDDEN double slim_multiply_adds_f32_scalar(int64_t iterations, int32_t threads);
SLIM_HIDDEN double slim_multiply_adds_f32_avx2(int64_t iterations, int32_t threads);
SLIM_HIDDEN double slim_multiply_adds_f32_avx512(int64_t iterations, int32_t threads);

// In Python, with the members of SlimConv2dF32 in order, pointers as integers, 0 for NULL:
// _C.conv2d_f32(isa, x, y, bias, weights, channels, tap_ptr, offsets, residual, n, h, w, c_in, c_out, p, q, r, s,
//               stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, strip, depth, relu, pool, lanes, parts_h, parts_w,
//               engine, to_floats, threads).
// _C.weight_gradient_f32(isa, (members of SlimWeightGradientF32 in order), threads).
// _C.Steps(isa, [(kind, slot, members in order), ...]).run(threads) or, in tests, .run_delayed(threads, seed);
// _C.entry_offsets_count(members in order); _C.entry_offsets(members in order, offsets, their number).

// ---------------------------------------------------------------- CUDA

// Every entry launches on `stream` (a cudaStream_t) of `device` and returns without waiting; the calling thread's
// current device is restored. Sums are fp32 whatever the dtype. Offsets are 64-bit. SLIM_ERROR_UNSUPPORTED: more tiles
// than a grid holds.

enum { SLIM_DTYPE_F32 = 0, SLIM_DTYPE_F16 = 1, SLIM_DTYPE_BF16 = 2 };

// Block-sparse 2-D convolution, channels-last, directly on the BSR weight (slimkernels.formats.BSRWeight):
//   y[n,p,q,o] = epilogue(bias[o] + sum over stored (tap,c) of weight[o,tap,c] * x[n, iy, ix, c])
//   where tap = i*s + j reads the pixel iy = p*stride_h - pad_h + i*dil_h, ix = q*stride_w - pad_w + j*dil_w
// Preconditions: x is (n,h,w,c_in), y is (n,p,q,c_out), values is (nnz_blocks,block_out,block_in), all contiguous in
// that order and of `dtype`; crow_indices is (ceil(c_out/block_out) + 1), col_indices is (nnz_blocks), every column in
// [0, r*s*ceil(c_in/block_in)); n,p,q,c_out >= 1; r*s*c_in rounded up to blocks below 2^31.
// A linear layer is h = w = r = s = 1.
typedef struct SlimCudaBsrConv2d {
  const void* x;
  void* y;
  const void* bias;  // c_out values of `dtype`, or NULL
  const void* values;
  const int32_t* crow_indices;
  const int32_t* col_indices;
  int64_t n, h, w, c_in, c_out, p, q;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t block_out, block_in;
  int32_t relu;  // 0 or 1: y = max(y, 0), NaN kept
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaBsrConv2d;

// The same convolution on tensor cores, bf16, fp16, or float32 multiplied in TF32, from weights packed for it
// (slimkernels/kernels/resident_plan.py). What is said of 16 input channels holds of 8 of float32:
//   group_start: (columns, ceil(c_in/16) + 1), a column being 16, 32, 64 or 128 output channels (by `variant`): the
//                first step of each group of 16 input channels, rising through all columns; the last entry of a column
//                is the first of the next
//   taps:        (steps) tap << 16 | group, in that order
//   weights:     (steps + 1, column * 16) in the order in which lanes hold them, the last step zero; float32 as numbers
//                of TF32, the low 13 bits zero
// Float32 has the variants 0, 4 and 6. The rest is the plan of a tile: tile_images x tile_rows x tile_cols output
// pixels, even numbers of rows and columns, at most as many as the variant has. Its input lies in shared memory as a
// patch of places: a pixel's right neighbour one place on, the one below patch_row, the next image patch_image; of each
// image load_rows x load_cols places from (load_top, load_left) are read from x, the others are zero. An input gradient
// also asks for outputs that are not neighbours in y, and for p and q other than the size of the output; what they read
// beyond the image is zero. Preconditions: the channels of a pixel of y are neighbours; y_image, y_row and y_pixel are
// multiples of 8.
typedef struct SlimCudaResidentConv2d {
  const void* x;
  void* y;
  const void* bias;  // c_out values of `dtype`, or NULL
  const void* weights;
  const int32_t* group_start;
  const int32_t* taps;
  int64_t n, h, w, c_in, c_out, p, q;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t relu, pool;  // 0 or 1: y = max(y, 0); 2x2 stride-2 max-pool after it; both keep NaN
  int32_t tile_images, tile_rows, tile_cols, patch_row, patch_image, patch, load_top, load_left, load_rows, load_cols;
  int32_t y_image, y_row, y_pixel;  // elements of y from an image, a row and a pixel to the next; 0 where there is none
  int32_t slab;                     // input channels in a stage of the ring: 32, 64, 128 or 256 bytes of them
  int32_t stages;                   // 2 to 8
  int32_t steps;                    // the most steps that one thread block has
  int32_t slots;                    // places for weights where they stream by, 3 or more; else 0
  int32_t columns;                  // of a thread block, 1 up to the variant's
  int32_t variant, blocks;
  // 0 or 1: it may begin before the kernel in front of it has ended; that one wrote neither weights nor indices.
  int32_t overlap;
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaResidentConv2d;

// The first two convolutions of a network in one kernel: a dense 3x3 one (stride 1, padding 1) of images (n,h,w,3) to
// 64 channels with ReLU, and the block-sparse one of those to at most 64 channels, planned and packed as above with
// whole rows and one image in a tile, a column of 64 channels and one slab.
//   first_weights: (2, 4, 32, 8) as lanes hold the 64 x 32 matrix of 30 products a channel, row by row of taps:
//                  nine and a zero
// Preconditions: w even; tile_images 1, load_cols w; (load_rows + 2) * 3 w / 2 at most 1024.
typedef struct SlimCudaStemConv2d {
  const void* x;
  void* y;
  const void* first_weights;
  const void* first_bias;  // 64 values of `dtype`, or NULL
  const void* weights;
  const void* bias;  // c_out values of `dtype`, or NULL
  const int32_t* taps;
  int64_t n, h, w, c_out, p, q;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t relu, pool;
  int32_t tile_images, tile_rows, tile_cols, patch_row, patch_image, patch, load_top, load_left, load_rows, load_cols;
  int32_t steps;
  int32_t variant, blocks;
  // 0 or 1: it may begin before the kernel in front of it has ended; that one wrote neither weights nor indices.
  int32_t overlap;
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaStemConv2d;

// A chain of block-sparse convolutions of a few images in one launch, bf16 or fp16 (slimkernels/kernels/chain_plan.py).
// `images` neighbouring images are taken through all layers by a group of `group` thread blocks, which wait for each
// other between two layers. A layer:
//   weights: (steps, 512): 32 output channels x 16 input channels in the order in which lanes hold them
//   starts:  (ceil(c_out/32) + 1): the first step of each column of 32 output channels, not decreasing
//   steps:   (steps, 4): of each step the first input channel, how many pixels down and to the right of
//            (row * stride_h, column * stride_w) it reads, and c_in less the first input channel; and 12 steps more,
//            which are read and not used
// Preconditions: x of a group is (images,h,w,c_in) and y (images,p,q,c_out), or (images,p/2,q/2,c_out) with pool, the
// next group's x_group and y_group bytes on; all addresses multiples of 16; c_in and c_out multiples of 8. A layer
// reads what the one in front wrote and writes nothing that a group reads or writes in the same layer, or another group
// in any.
typedef struct SlimCudaChainLayer {
  const void* x;
  void* y;
  const void* bias;  // c_out values of `dtype`, or NULL
  const void* weights;
  const int32_t* starts;
  const int32_t* steps;
  int64_t x_group, y_group;
  int32_t h, w, c_in, c_out, p, q;
  int32_t stride_h, stride_w;
  int32_t relu, pool;  // as in SlimCudaResidentConv2d
  int32_t row_bits;    // 2^row_bits of a block's eight warps share out pixels, 0 to 3, and the rest the steps of each
} SlimCudaChainLayer;

enum { SLIM_CUDA_MAX_CHAIN = 32 };
enum { SLIM_CHAIN_CLUSTER = 0, SLIM_CHAIN_COUNTER = 1 };
typedef struct SlimCudaChain {
  const SlimCudaChainLayer* layers;  // in the host's memory
  int32_t* counters;  // SLIM_CHAIN_COUNTER: a zero for each group, which the launch overwrites; else NULL
  int64_t n;
  int32_t count;    // of layers, at most SLIM_CUDA_MAX_CHAIN
  int32_t images;   // of a group
  int32_t group;    // thread blocks: a cluster of up to 16, or with SLIM_CHAIN_COUNTER any number
  int32_t barrier;  // SLIM_CHAIN_CLUSTER needs sm_90; SLIM_CHAIN_COUNTER that all blocks can run at the same time
  // 0 or 1: it may begin before the kernel in front of it has ended; that one wrote neither weights, steps, starts,
  // bias nor counters.
  int32_t overlap;
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaChain;

// The gradient of the weights that a block-sparse convolution stores, on tensor cores, bf16 or fp16, as
// SlimWeightGradientF32 defines it; sums in fp32, of `parts` parts of the pixels, added in their order and rounded
// once. Preconditions: x is (n,h,w,c_in), grad is (n,p,q,c_out), values_grad is (elements / (block_out*block_in),
// block_out, block_in), of `dtype` and 16 bytes aligned; partial is (parts, elements); crow_indices and col_indices as
// above, at most elements / (block_out*block_in) blocks stored; part_pixels a multiple of 32, parts = ceil(n*p*q /
// part_pixels); chunks at least the sum over block rows of ceil(stored blocks * block_in / 16 / the variant's pieces)
// times block_out / the variant's channels; step_n, step_p and step_q are how many images, rows and columns 32 pixels
// further is.
typedef struct SlimCudaWeightGradient {
  const void* x;
  const void* grad;
  void* values_grad;
  float* partial;
  const int32_t* crow_indices;
  const int32_t* col_indices;
  int64_t n, h, w, c_in, c_out, p, q;
  int64_t elements, part_pixels;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t block_out, block_in;
  int32_t step_n, step_p, step_q;
  int32_t parts, chunks;
  int32_t stages;   // 2 to 8
  int32_t variant;  // 128, 64, 32 or 16 output channels of a piece
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaWeightGradient;

// Fused low-rank linear layer: y = epilogue((x V^T) U^T + bias), the (m, rank) product held in shared memory as fp32.
// Preconditions: x is (m,in), v is (rank,in), u is (out,rank), y is (m,out), all contiguous and of `dtype`;
// m,in,out >= 1; 1 <= rank <= SLIM_CUDA_MAX_FUSED_RANK.
typedef struct SlimCudaLowRankLinear {
  const void* x;
  void* y;
  const void* bias;  // out values of `dtype`, or NULL
  const void* u;
  const void* v;
  int64_t m, in, out, rank;
  int32_t relu;
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaLowRankLinear;

// Two factors on tensor cores, bf16 or fp16, their intermediate in shared memory as `dtype`:
//   h[n,p,q,k] = sum over (tap,c) of v[k,tap,c] * x[n, iy, ix, c], tap and pixel as SlimCudaBsrConv2d has them
//   y[n,p,q,o] = epilogue(bias[o] + sum over k of u[o,k] * h[n,p,q,k])
// A linear layer is h = w = p = q = r = s = 1. `variant` is the tile (slimkernels/kernels/low_rank_plan.py), `stages`
// the depth of the ring, `splits` the thread blocks that share the output channels of a tile of rows. With
// depth_splits > 1 so many blocks share the first product of a tile and a second kernel adds up what they wrote to
// `partial`, depth_splits * tiles * rows * rank fp32 numbers of the variant's sizes; with `overlap`, for compute
// capability 9.0 alone, it begins before the first has ended.
// Preconditions: x is (n,h,w,c_in), v is (rank,r,s,c_in), u is (c_out,u_row), y is (n,p,q,c_out), all contiguous, of
// `dtype`, at addresses that 16 divides; c_in, c_out and u_row are multiples of 8; rank <= u_row, and u holds finite
// numbers from `rank` on; rank at most the variant's; n*p*q below 2^31 - 128, 2*h*w*c_in below 2^31, r*s*c_in and c_out
// below 2^30.
typedef struct SlimCudaLowRank {
  const void* x;
  void* y;
  const void* bias;  // c_out values of `dtype`, or NULL
  const void* u;
  const void* v;
  void* partial;  // or NULL with depth_splits = 1
  int64_t n, h, w, c_in, c_out, p, q;
  int32_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t rank, u_row;
  int32_t relu;  // 0 or 1: y = max(y, 0), NaN kept
  int32_t variant, stages, splits, depth_splits, overlap;
  int32_t dtype;
  int32_t device;
  void* stream;
} SlimCudaLowRank;

// (32 + 1) fp32 rows of this length and the staging tiles fill 97 000 of the 101 376 bytes of shared memory that every
// GPU from sm_80 on offers to one block.
enum { SLIM_CUDA_MAX_FUSED_RANK = 640 };

SLIM_HIDDEN int slim_cuda_bsr_conv2d(const SlimCudaBsrConv2d* a);
SLIM_HIDDEN int slim_cuda_resident_conv2d(const SlimCudaResidentConv2d* a);
SLIM_HIDDEN int slim_cuda_stem_conv2d(const SlimCudaStemConv2d* a);
SLIM_HIDDEN int slim_cuda_chain_conv2d(const SlimCudaChain* a);
// How many groups of so many thread blocks the device runs at the same time; 0 where it cannot run one.
SLIM_HIDDEN int slim_cuda_chain_groups(int32_t group, int32_t barrier, int32_t dtype, int32_t device, int32_t* groups);
SLIM_HIDDEN int slim_cuda_weight_gradient(const SlimCudaWeightGradient* a);
SLIM_HIDDEN int slim_cuda_low_rank_linear(const SlimCudaLowRankLinear* a);
SLIM_HIDDEN int slim_cuda_low_rank(const SlimCudaLowRank* a);

// NULL when the driver serves this build's CUDA runtime, else CUDA's reason (no device, driver too old, ...).
SLIM_HIDDEN const char* slim_cuda_unavailable_reason(void);
// The last CUDA error of the calling thread, "" before any.
SLIM_HIDDEN const char* slim_cuda_error_message(void);
// CUDART_VERSION of this build, 13000 for CUDA 13.0.
SLIM_HIDDEN int slim_cuda_version(void);

// In Python, with the members of their structs in order: _C.cuda_bsr_conv2d(x, y, bias, ..., stream),
// _C.cuda_resident_conv2d, _C.cuda_stem_conv2d, _C.cuda_weight_gradient, _C.cuda_low_rank_linear(x, y, ..., stream);
// _C.cuda_chain_conv2d([(members of a layer in order), ...], counters, n, images, ..., stream) without `count`;
// _C.cuda_chain_groups(group, barrier, dtype, device).

#ifdef __cplusplus
}
#endif
