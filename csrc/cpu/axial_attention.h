// Softmax attention of one head along one axis. Raw pointers only: no tensors here.
#pragma once

#include <cstdint>

namespace seaattn {

// Floats of scratch that attend() needs for an axis of n.
constexpr int64_t attend_scratch(int64_t n) {
  return 16 * n;
}

// out[:, i] = sum_j softmax_j(scale * q[:, i] . k[:, j]) v[:, j]
//
// q and k are (d, n), v and out (e, n), in float32; rows are `stride` (`out_stride`) floats apart,
// at least n rounded up to 16. What lies past n is read and written, and means nothing.
void attend(const float* q, const float* k, const float* v, int64_t stride, int64_t n, int64_t d,
            int64_t e, float scale, float* out, int64_t out_stride, float* scratch);

}  // namespace seaattn
