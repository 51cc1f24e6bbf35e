// Matrices in memory as the products of the hybrid layer's C++ take them: rows of whole vectors, zero behind their end.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

namespace hybrid {

using namespace moshi_ttt;  // vectors.h and parallel.h

// How many rows of a product are summed at once beside one another: for two vectors of a row and for one. The sums and
// what they are made of are to stay in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kTall = 16;
#else
constexpr int kRows = 4, kTall = 8;
#endif

template <typename T>
inline typename Lanes<T>::type load(const T* from) {
  typename Lanes<T>::type vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T>
inline void store(T* to, const typename Lanes<T>::type& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// `count` rounded up to whole vectors.
template <typename T>
int64_t padded(int64_t count) {
  return (count + Lanes<T>::count - 1) / Lanes<T>::count * Lanes<T>::count;
}

// Numbers from one row of `count` to the next. Rows a large power of two apart would share a few lines of the cache.
template <typename T>
int64_t pitch_of(int64_t count) {
  const int64_t whole = padded<T>(count);
  return whole * int64_t(sizeof(T)) % 1024 ? whole : whole + Lanes<T>::count;
}

template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t pitch = 0;

  T* row(int64_t i) const { return data + i * pitch; }
};

// Owns memory, zero at first; rows begin at whole vectors.
template <typename T>
class Store {
 public:
  T* numbers(int64_t count) {
    const size_t bytes = size_t((std::max<int64_t>(count, 1) * int64_t(sizeof(T)) + 63) / 64 * 64);
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    parts_.emplace_back(static_cast<T*>(memory));
    return parts_.back().get();
  }

  Matrix<T> matrix(int64_t rows, int64_t columns) {
    const int64_t pitch = pitch_of<T>(columns);
    return {numbers(rows * pitch), pitch};
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<T, Free>> parts_;
};

}  // namespace hybrid
