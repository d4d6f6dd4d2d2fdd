// The engine of AMX: a product is one instruction on tiles of 16 rows of 64 bytes.
#include <immintrin.h>

#include "pairs.h"
#include "pairs_layers.h"
#include "pairs_vec16.h"

namespace {

struct Amx : PairsVec16 {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  Amx() {
    const Config config;
    memory_is_read();
    _tile_loadconfig(&config);
  }
  ~Amx() { _tile_release(); }

  // GCC 12 does not know that a tile's load reads memory and may drop what was stored for it.
  static inline void memory_is_read() { __asm__ volatile("" ::: "memory"); }

  // The rows of a group at CHUNK_PIXELS pixels.
  template <int KIND>
  static inline void gather(const SlimPairsGroup& group, const PairsChunk& chunk, char* buffer) {
    for (int r = 0; r < group.rows; ++r, buffer += PAIR_ROW) {
      const SlimPairsSource even = group.row[r].even, odd = group.row[r].odd;
      for (int i = 0; i < CHUNK_PIXELS; ++i) {
        const __m512i row = blend<KIND>(row_at(chunk.pixels[i], even), row_at(chunk.pixels[i], odd));
        _mm512_store_si512(buffer + i * GROUP_ROWS * PAIR_ROW, row);
      }
    }
    // Rows that a last group lacks have weights of zero, which must meet finite numbers.
    for (int r = group.rows; r < GROUP_ROWS; ++r, buffer += PAIR_ROW) {
      for (int i = 0; i < CHUNK_PIXELS; ++i)
        _mm512_store_si512(buffer + i * GROUP_ROWS * PAIR_ROW, _mm512_setzero_si512());
    }
  }

  static inline uint64_t taps_of(const PairsChunk& chunk) {
    return chunk.taps[0] | chunk.taps[1] | chunk.taps[2] | chunk.taps[3];
  }

  static inline void gather(const SlimPairsGroup& group, const PairsChunk& chunk, char* buffer) {
    if (group.kind == SLIM_GROUP_DIRECT || (group.taps & taps_of(chunk)) == 0) return;
    if (group.kind == SLIM_GROUP_WHOLE)
      gather<SLIM_GROUP_WHOLE>(group, chunk, buffer);
    else if (group.kind == SLIM_GROUP_MIXED)
      gather<SLIM_GROUP_MIXED>(group, chunk, buffer);
    else
      gather<SLIM_GROUP_SHIFTED>(group, chunk, buffer);
  }

  static inline void multiply(const SlimPairsGroup& group, const Bf16* weights, const PairsChunk& chunk,
                              const char* buffer) {
    if ((group.taps & taps_of(chunk)) == 0) return;
    memory_is_read();
    _tile_loadd(6, weights, 64);
    const char* from[CHUNK_PIXELS];
    for (int i = 0; i < CHUNK_PIXELS; ++i)
      from[i] = group.kind == SLIM_GROUP_DIRECT ? row_at(chunk.pixels[i], group.row[0].even)
                                                : buffer + i * GROUP_ROWS * PAIR_ROW;
    if ((chunk.taps[0] & group.taps) != 0) {
      _tile_loadd(4, from[0], 64);
      _tile_dpbf16ps(0, 6, 4);
    }
    if ((chunk.taps[1] & group.taps) != 0) {
      _tile_loadd(5, from[1], 64);
      _tile_dpbf16ps(1, 6, 5);
    }
    if ((chunk.taps[2] & group.taps) != 0) {
      _tile_loadd(4, from[2], 64);
      _tile_dpbf16ps(2, 6, 4);
    }
    if ((chunk.taps[3] & group.taps) != 0) {
      _tile_loadd(5, from[3], 64);
      _tile_dpbf16ps(3, 6, 5);
    }
  }

  void add_up(const StripGroups& strip, const PairsChunk& chunk, char* buffers, float* sums) const {
    constexpr int64_t BUFFER = CHUNK_PIXELS * GROUP_ROWS * PAIR_ROW, WEIGHTS = PAIRS_STRIP * 2 * GROUP_ROWS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (strip.count > 0) gather(strip.groups[0], chunk, buffers);
    for (int64_t g = 0; g < strip.count; ++g) {
      // The next group's rows are gathered first: tiles wait for what has just been stored.
      if (g + 1 < strip.count) gather(strip.groups[g + 1], chunk, buffers + (g + 1) % 2 * BUFFER);
      multiply(strip.groups[g], strip.weights + g * WEIGHTS, chunk, buffers + g % 2 * BUFFER);
    }
    constexpr int64_t SUM = PAIRS_STRIP * PAIR_IMAGES;
    _tile_stored(0, sums, 64);
    if (chunk.count > 1) _tile_stored(1, sums + SUM, 64);
    if (chunk.count > 2) _tile_stored(2, sums + 2 * SUM, 64);
    if (chunk.count > 3) _tile_stored(3, sums + 3 * SUM, 64);
    memory_is_read();  // nor that their stores write it
  }
};

}  // namespace

extern "C" const SlimPairsEngine slim_pairs_engine_amx = engine_of<Amx>();
