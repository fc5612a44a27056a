#include "axial_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "elementwise.h"

namespace seaattn {
namespace {

// Terms that are summed before they join a longer sum.
constexpr int64_t kRun = 128;

// As many positions of an axis as a register holds: the compiler keeps sums of wider vectors in
// memory.
template <int kWidth>
struct Vector {
  typedef float Lanes __attribute__((vector_size(kWidth * sizeof(float))));
};
template <int kWidth>
using Lanes = typename Vector<kWidth>::Lanes;

template <int kWidth>
SEAATTN_INLINE Lanes<kWidth> load(const float* from) {
  Lanes<kWidth> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

template <typename Vector>
SEAATTN_INLINE void store(float* to, Vector lanes) {
  std::memcpy(to, &lanes, sizeof(lanes));
}

// kCount rows of a product at once, so that a vector of b is read once for all of them and no sum
// waits for its own last term: sums[t] = sum_r a[t * row_step + r * step] b[r, :].
template <int kCount, int kWidth, typename Sink>
SEAATTN_INLINE void tile(const float* a, int64_t row_step, int64_t step, const float* b,
                         int64_t b_step, int64_t depth, const Sink& sink) {
  Lanes<kWidth> totals[kCount] = {};
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    const int64_t end = std::min(begin + kRun, depth);
    Lanes<kWidth> sums[kCount] = {};
    for (int64_t r = begin; r < end; ++r) {
      const auto of_b = load<kWidth>(b + r * b_step);
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) sums[t] += a[t * row_step + r * step] * of_b;
    }
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) totals[t] += sums[t];
  }
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) sink(t, totals[t]);
}

// sink(row, a[row, :] b) for all rows of a; b is `depth` vectors that lie b_step floats apart.
template <int kWidth, typename Sink>
SEAATTN_INLINE void multiply(const float* a, int64_t rows, int64_t row_step, int64_t step,
                             const float* b, int64_t b_step, int64_t depth, const Sink& sink) {
  int64_t row = 0;
  const auto shifted = [&](int64_t t, Lanes<kWidth> sum) { sink(row + t, sum); };
  for (; row + 8 <= rows; row += 8) {
    tile<8, kWidth>(a + row * row_step, row_step, step, b, b_step, depth, shifted);
  }
  if (row + 4 <= rows) {
    tile<4, kWidth>(a + row * row_step, row_step, step, b, b_step, depth, shifted);
    row += 4;
  }
  for (; row < rows; ++row) {
    tile<1, kWidth>(a + row * row_step, row_step, step, b, b_step, depth, shifted);
  }
}

// The products of kWidth columns of x with every column of y: to[j, :] = factor * sum_c y[c, j]
// x[c, :]. Both are `depth` rows `stride` apart.
template <int kWidth>
SEAATTN_INLINE void columns_by_columns(const float* x, const float* y, int64_t stride,
                                       int64_t depth, int64_t n, float factor, float* to) {
  multiply<kWidth>(y, n, 1, stride, x, stride, depth,
                   [&](int64_t j, Lanes<kWidth> sum) { store(to + j * kWidth, sum * factor); });
}

// In place of n scores of kWidth queries their exponentials; returns the reciprocals of the sums.
template <int kWidth>
SEAATTN_INLINE Lanes<kWidth> exponentials(float* scores, int64_t n) {
  float maximum[kWidth];
  std::fill(maximum, maximum + kWidth, -std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < n; ++j) {
    const float* row = scores + j * kWidth;
#pragma omp simd
    for (int l = 0; l < kWidth; ++l) {
      // NaN comes back by its exponential.
      maximum[l] = choose(row[l] > maximum[l], row[l], maximum[l]);
    }
  }
  Lanes<kWidth> total = {};
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(begin + kRun, n);
    Lanes<kWidth> sum = {};
    for (int64_t j = begin; j < end; ++j) {
      float* row = scores + j * kWidth;
#pragma omp simd
      for (int l = 0; l < kWidth; ++l) row[l] = exponential(row[l] - maximum[l]);
      sum += load<kWidth>(row);
    }
    total += sum;
  }
  return 1.0f / total;
}

// to[l, j] = from[j, l] for kWidth l, in squares of four; n rounds up to four.
template <int kWidth>
SEAATTN_INLINE void transpose(const float* from, int64_t n, float* to, int64_t stride) {
  for (int64_t j = 0; j < n; j += 4) {
    for (int64_t l = 0; l < kWidth; l += 4) {
      const float* rows = from + j * kWidth + l;
      const Lanes<4> a = load<4>(rows), b = load<4>(rows + kWidth), c = load<4>(rows + 2 * kWidth),
                     d = load<4>(rows + 3 * kWidth);
      const Lanes<4> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                     cd = __builtin_shufflevector(c, d, 0, 4, 1, 5),
                     ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                     cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      float* out = to + l * stride + j;
      store(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
      store(out + stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
      store(out + 2 * stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
      store(out + 3 * stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    }
  }
}

// to (rows, n) = or += the product of `count` columns of x (rows, count) with the transposed
// weights (count, n), whose rows lie attention_stride(n) apart.
template <int kWidth>
SEAATTN_INLINE void add_products(const float* x, int64_t rows, int64_t count, const float* weights,
                                 int64_t n, int64_t stride, bool first, float* to) {
  const int64_t step = attention_stride(n);
  for (int64_t j = 0; j < n; j += kWidth) {
    multiply<kWidth>(x, rows, stride, 1, weights + j, step, count,
                     [&](int64_t row, Lanes<kWidth> sum) {
                       float* at = to + row * stride + j;
                       store(at, first ? sum : load<kWidth>(at) + sum);
                     });
  }
}

template <typename Set>
SEAATTN_INLINE void attend_body(const float* q, const float* k, const float* v, int64_t stride,
                                int64_t n, int64_t d, int64_t e, float scale, float* out,
                                int64_t out_stride, float* scratch) {
  constexpr int kWidth = Set::kWidth;
  for (int64_t i = 0; i < n; i += kWidth) {
    columns_by_columns<kWidth>(q + i, k, stride, d, n, scale, scratch);
    const auto reciprocal = exponentials<kWidth>(scratch, n);
    multiply<kWidth>(v, e, stride, 1, scratch, kWidth, n, [&](int64_t c, Lanes<kWidth> sum) {
      store(out + c * out_stride + i, sum * reciprocal);
    });
  }
}

template <typename Set>
SEAATTN_INLINE void attend_backward_body(const float* gradient, const float* q, const float* k,
                                         const float* v, int64_t stride, int64_t n, int64_t d,
                                         int64_t e, float scale, float* dq, float* dk, float* dv,
                                         float* scratch) {
  constexpr int kWidth = Set::kWidth;
  float* p = scratch;
  float* ds = p + kWidth * padded(n);
  float* transposed = ds + kWidth * padded(n);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, n - i);
    columns_by_columns<kWidth>(q + i, k, stride, d, n, scale, p);
    const Lanes<kWidth> reciprocal = exponentials<kWidth>(p, n);
    columns_by_columns<kWidth>(gradient + i, v, stride, e, n, 1.0f, ds);
    Lanes<kWidth> inner = {};
    for (int64_t begin = 0; begin < n; begin += kRun) {
      const int64_t end = std::min(begin + kRun, n);
      Lanes<kWidth> sum = {};
      for (int64_t j = begin; j < end; ++j) {
        const Lanes<kWidth> weight = load<kWidth>(p + j * kWidth) * reciprocal;
        store(p + j * kWidth, weight);
        sum += weight * load<kWidth>(ds + j * kWidth);
      }
      inner += sum;
    }
    for (int64_t j = 0; j < n; ++j) {
      float* at = ds + j * kWidth;
      store(at, load<kWidth>(p + j * kWidth) * (load<kWidth>(at) - inner) * scale);
    }
    multiply<kWidth>(k, d, stride, 1, ds, kWidth, n,
                     [&](int64_t c, Lanes<kWidth> sum) { store(dq + c * stride + i, sum); });
    transpose<kWidth>(p, n, transposed, attention_stride(n));
    add_products<kWidth>(gradient + i, e, count, transposed, n, stride, i == 0, dv);
    transpose<kWidth>(ds, n, transposed, attention_stride(n));
    add_products<kWidth>(q + i, d, count, transposed, n, stride, i == 0, dk);
  }
}

}  // namespace

SEAATTN_VERSIONS(attend,
                 (const float* q, const float* k, const float* v, int64_t stride, int64_t n,
                  int64_t d, int64_t e, float scale, float* out, int64_t out_stride,
                  float* scratch),
                 (q, k, v, stride, n, d, e, scale, out, out_stride, scratch))
SEAATTN_VERSIONS(attend_backward,
                 (const float* gradient, const float* q, const float* k, const float* v,
                  int64_t stride, int64_t n, int64_t d, int64_t e, float scale, float* dq,
                  float* dk, float* dv, float* scratch),
                 (gradient, q, k, v, stride, n, d, e, scale, dq, dk, dv, scratch))

void sample(int64_t points, int64_t n, Sample* samples) {
  const double step = static_cast<double>(points) / n;
  for (int64_t i = 0; i < n; ++i) {
    const double at = std::max(0.0, (i + 0.5) * step - 0.5);
    const int64_t low = std::min(static_cast<int64_t>(at), points - 1);
    samples[i] = {low, std::min(low + 1, points - 1), static_cast<float>(at - low)};
  }
}

namespace {

template <typename T>
SEAATTN_INLINE void gather_body(const T* x, int64_t channel_step, int64_t step, int64_t channels,
                                int64_t n, const float* positions, int64_t stride, float* to) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = x + c * channel_step;
    float* row = to + c * stride;
    if (step == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) row[i] = widen(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) row[i] = widen(from[i * step]);
    }
    if (positions) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) row[i] += positions[c * stride + i];
    }
  }
}

template <typename T>
SEAATTN_INLINE void scatter_body(const float* from, int64_t stride, int64_t channels, int64_t n,
                                 T* to) {
  for (int64_t c = 0; c < channels; ++c) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[c * n + i] = narrow<T>(from[c * stride + i]);
  }
}

template <typename T>
SEAATTN_INLINE void interpolate_body(const T* table, int64_t channels, int64_t points,
                                     const Sample* samples, int64_t n, float* to, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      const auto [low, high, weight] = samples[i];
      to[c * stride + i] = (1.0f - weight) * widen(table[c * points + low]) +
                           weight * widen(table[c * points + high]);
    }
  }
}

template <typename T>
SEAATTN_INLINE void interpolate_backward_body(const float* gradient, int64_t batch,
                                              int64_t batch_step, const Sample* samples, int64_t n,
                                              int64_t points, double* scratch, T* table) {
  double* sums = scratch;
  double* of_points = scratch + n;
  std::fill(scratch, scratch + n + points, 0.0);
  for (int64_t b = 0; b < batch; ++b) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += gradient[b * batch_step + i];
  }
  for (int64_t i = 0; i < n; ++i) {
    const auto [low, high, weight] = samples[i];
    of_points[low] += (1.0f - weight) * sums[i];
    of_points[high] += weight * sums[i];
  }
  for (int64_t p = 0; p < points; ++p) table[p] = narrow<T>(static_cast<float>(of_points[p]));
}

}  // namespace

// Clones need functions that are no templates: one set for each dtype.
#define SEAATTN_INSTANTIATE(T)                                                                    \
  template <>                                                                                     \
  SEAATTN_CLONES void gather<T>(const T* x, int64_t channel_step, int64_t step, int64_t channels, \
                                int64_t n, const float* positions, int64_t stride, float* to) {   \
    gather_body(x, channel_step, step, channels, n, positions, stride, to);                       \
  }                                                                                               \
  template <>                                                                                     \
  SEAATTN_CLONES void scatter<T>(const float* from, int64_t stride, int64_t channels, int64_t n,  \
                                 T* to) {                                                         \
    scatter_body(from, stride, channels, n, to);                                                  \
  }                                                                                               \
  template <>                                                                                     \
  SEAATTN_CLONES void interpolate<T>(const T* table, int64_t channels, int64_t points,            \
                                     const Sample* samples, int64_t n, float* to,                 \
                                     int64_t stride) {                                            \
    interpolate_body(table, channels, points, samples, n, to, stride);                            \
  }                                                                                               \
  template <>                                                                                     \
  SEAATTN_CLONES void interpolate_backward<T>(                                                    \
      const float* gradient, int64_t batch, int64_t batch_step, const Sample* samples, int64_t n, \
      int64_t points, double* scratch, T* table) {                                                \
    interpolate_backward_body(gradient, batch, batch_step, samples, n, points, scratch, table);   \
  }

SEAATTN_INSTANTIATE(float)
SEAATTN_INSTANTIATE(c10::Half)
SEAATTN_INSTANTIATE(c10::BFloat16)

}  // namespace seaattn
