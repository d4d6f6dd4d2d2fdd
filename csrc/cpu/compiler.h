// What the kernels ask of the compiler beyond standard C++.
#pragma once

// In front of every loop over accumulators. Only when such a loop disappears completely, before the compiler splits
// arrays into scalars, do the accumulators live in registers; otherwise each multiply-add would load and store them.
#define SLIM_UNROLL _Pragma("GCC unroll 16")

// For the pieces of a microkernel, which take accumulators by reference: a real call would force those into memory.
#define SLIM_ALWAYS_INLINE inline __attribute__((always_inline))
