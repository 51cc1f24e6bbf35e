// Work shared out over torch's threads.

#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/ops/arange.h>

namespace moshi_ttt {

// work(begin, end) for parts of 0 to `count` - 1. at::parallel_for would use one thread: it is in torch's headers, and
// shares out work only in what is compiled with OpenMP. Here torch's library does.
template <typename Work>
void in_parallel(int64_t count, const Work& work) {
  const at::Tensor index = at::arange(count, at::kLong);
  auto iterator = at::TensorIterator::borrowing_nullary_op(index);
  iterator.for_each(
      [&](char** data, const int64_t*, int64_t size) {
        const int64_t begin = *reinterpret_cast<const int64_t*>(data[0]);
        work(begin, begin + size);
      },
      1);
}

}  // namespace moshi_ttt
