#include "axial_attention.h"

#include "lanes.h"

namespace seaattn {

SEAATTN_CLONES void attend(const float* q, const float* k, const float* v, int64_t stride,
                           int64_t n, int64_t d, int64_t e, float scale, float* out,
                           int64_t out_stride, float* scratch) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Lanes most = all(-__builtin_inff());
    for (int64_t j = 0; j < n; ++j) {
      Lanes score = {};
      for (int64_t c = 0; c < d; ++c) score += load(q + c * stride + i) * k[c * stride + j];
      score *= scale;
      store(scratch + j * kLanes, score);
      most = select(score <= most, most, score);
    }
    Lanes sum = {};
    for (int64_t j = 0; j < n; ++j) {
      const Lanes p = exponential(load(scratch + j * kLanes) - most);
      store(scratch + j * kLanes, p);
      sum += p;
    }
    for (int64_t c = 0; c < e; ++c) {
      Lanes o = {};
      for (int64_t j = 0; j < n; ++j) o += load(scratch + j * kLanes) * v[c * stride + j];
      store(out + c * out_stride + i, o / sum);
    }
  }
}

}  // namespace seaattn
