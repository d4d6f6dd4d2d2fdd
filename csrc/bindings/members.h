// How numbers from Python become a struct of kernels.h: a table names the members of each struct, where they lie and
// what they may be.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <cstring>
#include <initializer_list>
#include <iterator>
#include <string>

namespace slim {

constexpr int64_t kInt32Max = INT32_MAX;

// What a number may be, both ends included.
struct Range {
  int64_t low, high;
};
constexpr Range kAddress = {INT64_MIN, INT64_MAX};
constexpr Range kImages = {1, INT64_MAX};  // the only size that may pass int32: offsets across images are 64-bit
constexpr Range kNatural = {0, kInt32Max};
constexpr Range kPositive = {1, kInt32Max};
constexpr Range kFlag = {0, 1};

// A member of a struct in kernels.h: where it lies, in bytes, and what Python may hand over for it.
struct Member {
  const char* name;
  size_t offset, size;
  Range range;
};

// The list of a struct's members in order: for each of them Python hands over one number.
template <typename T>
struct Members;

#define SLIM_MEMBER(name, range) {#name, offsetof(Struct, name), sizeof(Struct::name), range}

template <typename T>
constexpr int kCount = static_cast<int>(std::size(Members<T>::list));

// Whether the members follow each other as C lays them out and fill the struct: then none is missing and none comes
// twice.
template <typename T>
constexpr bool members_fill_the_struct() {
  size_t end = 0;
  for (const Member& member : Members<T>::list) {
    if (member.size != sizeof(int32_t) && member.size != sizeof(int64_t)) return false;
    end = (end + member.size - 1) / member.size * member.size;
    if (member.offset != end) return false;
    end += member.size;
  }
  return (end + alignof(T) - 1) / alignof(T) * alignof(T) == sizeof(T);
}

// The first of `count` members from `first` on whose number is out of its range, as a sentence; "" where none is.
template <typename T>
std::string range_fault(const int64_t* numbers, int first = 0, int count = kCount<T>) {
  for (int i = first; i < first + count; ++i) {
    const Member& member = Members<T>::list[i];
    if (numbers[i] < member.range.low || numbers[i] > member.range.high)
      return std::string(member.name) + " = " + std::to_string(numbers[i]) + " is out of range";
  }
  return "";
}

// The struct of these numbers, one a member. Numbers out of their range are cut: `range_fault` finds those.
template <typename T>
T struct_of(const int64_t* numbers) {
  T a{};
  for (int i = 0; i < kCount<T>; ++i) {
    const Member& member = Members<T>::list[i];
    char* const at = reinterpret_cast<char*>(&a) + member.offset;
    if (member.size == sizeof(int64_t)) {
      std::memcpy(at, &numbers[i], sizeof(int64_t));
    } else {
      const int32_t narrow = static_cast<int32_t>(numbers[i]);
      std::memcpy(at, &narrow, sizeof(narrow));
    }
  }
  return a;
}

inline bool is_one_of(int64_t value, std::initializer_list<int64_t> legal) {
  for (int64_t one : legal) {
    if (value == one) return true;
  }
  return false;
}

// Whether a * b * c <= 2^31 - 1, all of them from 0 to 2^31 - 1.
inline bool product_fits(int64_t a, int64_t b, int64_t c) {
  if (a == 0 || b == 0 || c == 0) return true;
  return a <= kInt32Max / b && a * b <= kInt32Max / c;
}

inline int64_t output_size(int64_t size, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t left = size + 2 * pad - dilation * (taps - 1) - 1;
  return left < 0 ? 0 : left / stride + 1;
}

}  // namespace slim
