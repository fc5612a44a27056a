// Softmax attention along one axis, of one head, and its gradients; what brings vectors to and from
// its layout. Raw pointers only: no tensors here.
//
//   s[i, j] = scale * sum_d q[d, i] k[d, j]      p[i, :] = softmax(s[i, :])
//   out[e, i] = sum_j p[i, j] v[e, j]
//
// Matrices are float32 and channel-major: q, k (d, n), v and out (e, n). Rows lie `stride` floats
// apart, at least padded(n): positions are worked on by whole registers of up to sixteen. What lies
// beyond n in a row is readable and writable, and means nothing before and after: NaN there reaches
// no result.
// Sums run in float32, short ones first, so that an axis of a thousand is as exact as one of
// sixteen. NaN goes through as in PyTorch.
#pragma once

#include <cstdint>

namespace seaattn {

// n rounded up to whole vectors.
constexpr int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}

// A stride for rows of n whose rows do not all fall on the same lines of a cache.
constexpr int64_t attention_stride(int64_t n) {
  return padded(n) + (padded(n) % 256 == 0 ? 16 : 0);
}

// Floats of scratch for attend: the scores of a register of queries.
constexpr int64_t attend_scratch(int64_t n) {
  return n * 16;
}

void attend(const float* q, const float* k, const float* v, int64_t stride, int64_t n, int64_t d,
            int64_t e, float scale, float* out, int64_t out_stride, float* scratch);

// Floats of scratch for attend_backward: weights and their gradients for a register of queries, and
// one of these transposed.
constexpr int64_t attend_backward_scratch(int64_t n) {
  return 16 * (2 * padded(n) + attention_stride(n));
}

// dq, dk and dv from the gradient of out, (e, n). All rows lie `stride` floats apart.
//
//   dv[e, j] = sum_i p[i, j] dout[e, i]          dp[i, j] = sum_e dout[e, i] v[e, j]
//   ds[i, j] = scale * p[i, j] (dp[i, j] - sum_j p[i, j] dp[i, j])
//   dq[d, i] = sum_j ds[i, j] k[d, j]            dk[d, j] = sum_i ds[i, j] q[d, i]
void attend_backward(const float* gradient, const float* q, const float* k, const float* v,
                     int64_t stride, int64_t n, int64_t d, int64_t e, float scale, float* dq,
                     float* dk, float* dv, float* scratch);

// to[c, i] = x[c, i] (+ positions[c, i]), where x[c, i] is x[c * channel_step + i * step]. Rows of
// `to` and `positions`, which may be null, lie `stride` floats apart.
template <typename T>
void gather(const T* x, int64_t channel_step, int64_t step, int64_t channels, int64_t n,
            const float* positions, int64_t stride, float* to);

// The rows of a matrix, one behind the other.
template <typename T>
void scatter(const float* from, int64_t stride, int64_t channels, int64_t n, T* to);

// Where position i of an axis lies in a table: between `low` and `high`, with `weight` for high.
struct Sample {
  int64_t low, high;
  float weight;
};

// Linear interpolation of `points` to n, align_corners=False.
void sample(int64_t points, int64_t n, Sample* samples);

// to[c, i] = the table (channels, points) at position i.
template <typename T>
void interpolate(const T* table, int64_t channels, int64_t points, const Sample* samples, int64_t n,
                 float* to, int64_t stride);

// The adjoint of one row of it, summed over `batch` gradients that lie `batch_step` floats apart,
// always in the same order. `scratch` holds n + points numbers.
template <typename T>
void interpolate_backward(const float* gradient, int64_t batch, int64_t batch_step,
                          const Sample* samples, int64_t n, int64_t points, double* scratch,
                          T* table);

}  // namespace seaattn
