// How the tensor-core convolutions bring their input into shared memory: a few channels, a slab, of all pixels that a
// tile reads.
#pragma once
#include "sparse_tile.cuh"

namespace slim {
namespace {

constexpr int kBatch = 4;

// The slab that a tile begins with, of those that hold any step. Thread blocks that all began with the first would read
// the same few bytes of every pixel at the same time, from a part of L2 where a pixel is as long as a power of two.
SLIM_DEVICE int first_slab(int tile, int live_count) { return live_count ? tile % live_count : 0; }

// Fills the slabs of a group's ring, ahead of their use. An entry of its table of pixels: place in a slab in bytes,
// distance in x from the patch's corner in bytes, row << 16 | column, and image. SWIZZLED: places are as `swizzled` has
// them for a pixel's first chunk, and an entry of the list of slabs takes 16 bytes.
template <typename T, bool SWIZZLED = false>
struct Loader {
  static constexpr int kOfChunk = 16 / int(sizeof(T));  // channels of 16 bytes
  const SlimCudaResidentConv2d& a;
  uint32_t first_pixel, live, ring;  // first_pixel: this thread's entry of the table of pixels
  int stage_bytes, live_count, tile, tile_step, tiles, at = 0, left = 0, slot = 0;  // left: slabs of the tile
  int pixel_step, pixel_count, chunk;  // pixel_count: of the table, from this thread's entry on
  const unsigned char* corner;         // the first pixel of the tile's patch, which may lie outside the image
  int32_t images_left, y, x;

  SLIM_DEVICE void start_tile() {
    if (tile >= tiles) return;
    at = first_slab(tile, live_count);
    left = live_count;
    const TilePosition p = tile_position(a, tile);
    y = p.y * a.stride_h - a.pad_h + a.load_top;
    x = p.x * a.stride_w - a.pad_w + a.load_left;
    images_left = int(a.n - p.image < kNoImage ? a.n - p.image : kNoImage);
    corner = static_cast<const unsigned char*>(a.x) + ((p.image * a.h + y) * a.w + x) * a.c_in * int64_t(sizeof(T));
  }
  SLIM_DEVICE void fill() {
    if (tile < tiles) {
      const int channel = int(hw::load_shared_32(live + at * (SWIZZLED ? 16 : 4))) * a.slab + chunk * kOfChunk;
      const uint32_t to = ring + slot * stage_bytes, in_pixel = chunk * 16;
      const int images = channel < a.c_in ? images_left : 0;
      const unsigned height = unsigned(a.h), width = unsigned(a.w);
      const unsigned char* const from = corner + channel * int(sizeof(T));
      for (int i = 0; i < pixel_count; i += kBatch * pixel_step) {
        uint4 pixel[kBatch];  // all are read before the first copy: each of these loads takes long
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (i + k * pixel_step < pixel_count) pixel[k] = hw::load_shared_128(first_pixel + (i + k * pixel_step) * 16);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (i + k * pixel_step >= pixel_count) break;
          // No &&: what a branch would save is less than what it costs.
          const bool inside = (int(pixel[k].w) < images) & (unsigned(y + int(pixel[k].z >> 16)) < height) &
                              (unsigned(x + int(pixel[k].z & 0xffff)) < width);
          const uint32_t place = SWIZZLED ? pixel[k].x ^ in_pixel : pixel[k].x + in_pixel;
          hw::copy_async_16(to + place, from + int(pixel[k].y), inside);
        }
      }
      if (++at == live_count) at = 0;
      if (--left == 0) {
        tile += tile_step;
        start_tile();
      }
      if (++slot == a.stages) slot = 0;
    }
  }
};

}  // namespace
}  // namespace slim
