// Tensor checks and registration of both axial attentions of a block. A task is one head along one
// axis of one image, so the bits of a result do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "axial_attention.h"
#include "tensors.h"

namespace seaattn {
namespace {

// Multiply-adds that are worth a thread of their own.
constexpr int64_t kAttentionGrain = 1 << 18;

// Floats that begin with a line of the cache.
class Floats {
 public:
  explicit Floats(int64_t n)
      : data_(static_cast<float*>(::operator new(n * sizeof(float), kLine))), next_(data_.get()) {}

  // The next n of them; n is a multiple of 16.
  float* take(int64_t n) {
    float* taken = next_;
    next_ += n;
    return taken;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* data) const {
      ::operator delete(data, kLine);
    }
  };
  std::unique_ptr<float, Free> data_;
  float* next_;
};

// One of the two axes: its vectors (B, NQ, N) and its position tables of q and of k.
struct Axis {
  const at::Tensor& x;
  std::array<at::Tensor, 2> tables;
  int64_t n, stride;
  std::array<std::vector<Sample>, 2> samples;
  float* positions = nullptr;  // (2, heads * D, stride), of q, then of k

  Axis(const at::Tensor& x, const at::Tensor& table_q, const at::Tensor& table_k)
      : x(x),
        tables{table_q.contiguous(), table_k.contiguous()},
        n(x.size(2)),
        stride(attention_stride(n)) {
    for (int t = 0; t < 2; ++t) {
      samples[t].resize(n);
      sample(points(t), n, samples[t].data());
    }
  }

  int64_t points(int t) const {
    return tables[t].size(2);
  }
};

struct Pair {
  std::array<Axis, 2> axes;
  int64_t batch, heads, d, e;

  int64_t keys() const {
    return heads * d;
  }
  int64_t longest() const {
    return std::max(axes[0].n, axes[1].n);
  }
  int64_t widest() const {
    return std::max(axes[0].stride, axes[1].stride);
  }
  // Image, head and axis; the axis changes first, so that threads get as much of each.
  int64_t tasks() const {
    return batch * heads * 2;
  }
  int64_t grain(int64_t products) const {
    return std::max<int64_t>(1, kAttentionGrain / (products * longest() * longest()));
  }
};

void check_axis(const at::Tensor& x, const at::Tensor& row, const at::Tensor& table_q,
                const at::Tensor& table_k, int64_t keys) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) == row.size(0) && x.size(1) == row.size(1) &&
                  x.size(2) > 0 && x.scalar_type() == row.scalar_type(),
              "axial_attention_pair: row and column must be (B, NQ, H) and (B, NQ, W) of one dtype "
              "and not of length 0, got ",
              row.sizes(), " ", row.scalar_type(), " and ", x.sizes(), " ", x.scalar_type());
  for (const at::Tensor* table : {&table_q, &table_k}) {
    TORCH_CHECK(table->dim() == 3 && table->size(0) == 1 && table->size(1) == keys &&
                    table->size(2) > 0 && table->scalar_type() == row.scalar_type(),
                "axial_attention_pair: tables must be (1, heads*D, P) with heads*D = ", keys,
                ", of the dtype of row, ", row.scalar_type(), ", got ", table->sizes(), " ",
                table->scalar_type());
  }
}

Pair check(const at::Tensor& row, const at::Tensor& column, const at::Tensor& row_q,
           const at::Tensor& row_k, const at::Tensor& column_q, const at::Tensor& column_k,
           int64_t heads, int64_t d) {
  TORCH_CHECK(row.dim() == 3 && heads > 0 && d > 0 && row.size(1) % heads == 0 &&
                  row.size(1) / heads > 2 * d,
              "axial_attention_pair: row must be (B, heads*(2D + E), H), got ", row.sizes(),
              " for heads = ", heads, ", D = ", d);
  check_axis(row, row, row_q, row_k, heads * d);
  check_axis(column, row, column_q, column_k, heads * d);
  return {{Axis(row, row_q, row_k), Axis(column, column_q, column_k)},
          row.size(0),
          heads,
          d,
          row.size(1) / heads - 2 * d};
}

// The tables at every position of both axes, once for all images; the result owns them.
template <typename T>
Floats interpolate_tables(Pair& pair) {
  Floats owner(2 * pair.keys() * (pair.axes[0].stride + pair.axes[1].stride));
  for (Axis& axis : pair.axes) {
    axis.positions = owner.take(2 * pair.keys() * axis.stride);
    for (int t = 0; t < 2; ++t) {
      interpolate(axis.tables[t].template const_data_ptr<T>(), pair.keys(), axis.points(t),
                  axis.samples[t].data(), axis.n, axis.positions + t * pair.keys() * axis.stride,
                  axis.stride);
    }
  }
  return owner;
}

// q, k and v of one head along one axis, in memory of a thread.
struct Head {
  float *q, *k, *v;

  Head(Floats& memory, const Pair& pair)
      : q(memory.take(pair.d * pair.widest())),
        k(memory.take(pair.d * pair.widest())),
        v(memory.take(pair.e * pair.widest())) {}

  static int64_t size(const Pair& pair) {
    return (2 * pair.d + pair.e) * pair.widest();
  }

  template <typename T>
  void read(const Pair& pair, const Axis& axis, int64_t b, int64_t head) {
    const int64_t keys = pair.keys(), channel_step = axis.x.stride(1), step = axis.x.stride(2);
    const T* x = axis.x.template const_data_ptr<T>() + b * axis.x.stride(0);
    const int64_t of_q = head * pair.d, of_k = keys + of_q, of_v = 2 * keys + head * pair.e;
    gather(x + of_q * channel_step, channel_step, step, pair.d, axis.n,
           axis.positions + of_q * axis.stride, axis.stride, q);
    gather(x + of_k * channel_step, channel_step, step, pair.d, axis.n,
           axis.positions + of_k * axis.stride, axis.stride, k);
    gather(x + of_v * channel_step, channel_step, step, pair.e, axis.n, nullptr, axis.stride, v);
  }
};

std::tuple<at::Tensor, at::Tensor> axial_attention_pair(
    const at::Tensor& row, const at::Tensor& column, const at::Tensor& row_q,
    const at::Tensor& row_k, const at::Tensor& column_q, const at::Tensor& column_k, int64_t heads,
    int64_t key_dim, double scale) {
  Pair pair = check(row, column, row_q, row_k, column_q, column_k, heads, key_dim);
  const int64_t e = pair.e, values = heads * e;
  const std::array<at::Tensor, 2> out = {
      at::empty({pair.batch, values, pair.axes[0].n}, row.options()),
      at::empty({pair.batch, values, pair.axes[1].n}, row.options())};

  SEAATTN_DISPATCH(row.scalar_type(), "axial_attention_pair", [&] {
    const Floats positions = interpolate_tables<scalar_t>(pair);
    const std::array<scalar_t*, 2> to = {out[0].mutable_data_ptr<scalar_t>(),
                                         out[1].mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, pair.tasks(), pair.grain(key_dim + e), [&](int64_t begin, int64_t end) {
      const int64_t widest = pair.widest();
      Floats memory(Head::size(pair) + e * widest + attend_scratch(pair.longest()));
      Head h(memory, pair);
      float* result = memory.take(e * widest);
      float* scratch = memory.take(attend_scratch(pair.longest()));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / (2 * heads), head = task / 2 % heads;
        const Axis& axis = pair.axes[task % 2];
        h.read<scalar_t>(pair, axis, b, head);
        attend(h.q, h.k, h.v, axis.stride, axis.n, key_dim, e, static_cast<float>(scale), result,
               axis.stride, scratch);
        scatter(result, axis.stride, e, axis.n, to[task % 2] + (b * values + head * e) * axis.n);
      }
    });
  });
  return {out[0], out[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
axial_attention_pair_backward(const at::Tensor& row_gradient, const at::Tensor& column_gradient,
                              const at::Tensor& row, const at::Tensor& column,
                              const at::Tensor& row_q, const at::Tensor& row_k,
                              const at::Tensor& column_q, const at::Tensor& column_k, int64_t heads,
                              int64_t key_dim, double scale) {
  Pair pair = check(row, column, row_q, row_k, column_q, column_k, heads, key_dim);
  const int64_t d = key_dim, e = pair.e, keys = pair.keys(), values = heads * e;
  const std::array<const at::Tensor*, 2> gradients = {&row_gradient, &column_gradient};
  std::array<at::Tensor, 2> dx;
  std::array<std::array<at::Tensor, 2>, 2> dtables;
  for (int a = 0; a < 2; ++a) {
    const Axis& axis = pair.axes[a];
    const std::array<int64_t, 3> expected = {pair.batch, values, axis.n};
    TORCH_CHECK(
        gradients[a]->sizes() == expected && gradients[a]->scalar_type() == row.scalar_type(),
        "axial_attention_pair_backward: a gradient must be ", at::IntArrayRef(expected), " ",
        row.scalar_type(), ", got ", gradients[a]->sizes(), " ", gradients[a]->scalar_type());
    dx[a] = at::empty(axis.x.sizes(), row.options());
    for (int t = 0; t < 2; ++t) {
      dtables[a][t] = at::empty(axis.tables[t].sizes(), row.options());
    }
  }

  SEAATTN_DISPATCH(row.scalar_type(), "axial_attention_pair_backward", [&] {
    const Floats positions = interpolate_tables<scalar_t>(pair);
    // The gradients of q and k of every image, in float32: those of the tables are sums of them.
    const int64_t strides = pair.axes[0].stride + pair.axes[1].stride;
    Floats of_images(pair.batch * 2 * keys * strides);
    const std::array<float*, 2> dqk = {of_images.take(pair.batch * 2 * keys * pair.axes[0].stride),
                                       of_images.take(pair.batch * 2 * keys * pair.axes[1].stride)};
    const std::array<scalar_t*, 2> to = {dx[0].mutable_data_ptr<scalar_t>(),
                                         dx[1].mutable_data_ptr<scalar_t>()};
    const int64_t products = 3 * d + 2 * e;
    at::parallel_for(0, pair.tasks(), pair.grain(products), [&](int64_t begin, int64_t end) {
      const int64_t widest = pair.widest();
      Floats memory(Head::size(pair) + 2 * e * widest + attend_backward_scratch(pair.longest()));
      Head h(memory, pair);
      float* upstream = memory.take(e * widest);
      float* dv = memory.take(e * widest);
      float* scratch = memory.take(attend_backward_scratch(pair.longest()));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t a = task % 2, b = task / (2 * heads), head = task / 2 % heads;
        const Axis& axis = pair.axes[a];
        const at::Tensor& g = *gradients[a];
        h.read<scalar_t>(pair, axis, b, head);
        gather(g.const_data_ptr<scalar_t>() + b * g.stride(0) + head * e * g.stride(1), g.stride(1),
               g.stride(2), e, axis.n, nullptr, axis.stride, upstream);
        float* dq = dqk[a] + (b * 2 * keys + head * d) * axis.stride;
        float* dk = dq + keys * axis.stride;
        attend_backward(upstream, h.q, h.k, h.v, axis.stride, axis.n, d, e,
                        static_cast<float>(scale), dq, dk, dv, scratch);
        scalar_t* image = to[a] + b * (2 * keys + values) * axis.n;
        scatter(dq, axis.stride, d, axis.n, image + head * d * axis.n);
        scatter(dk, axis.stride, d, axis.n, image + (keys + head * d) * axis.n);
        scatter(dv, axis.stride, e, axis.n, image + (2 * keys + head * e) * axis.n);
      }
    });

    for (int a = 0; a < 2; ++a) {
      const Axis& axis = pair.axes[a];
      const int64_t grain = std::max<int64_t>(1, kGrain / ((pair.batch + 4) * axis.n));
      at::parallel_for(0, 2 * keys, grain, [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(axis.n + std::max(axis.points(0), axis.points(1)));
        for (int64_t c = begin; c < end; ++c) {
          const int64_t t = c / keys, points = axis.points(t);
          interpolate_backward(
              dqk[a] + c * axis.stride, pair.batch, 2 * keys * axis.stride, axis.samples[t].data(),
              axis.n, points, scratch.data(),
              dtables[a][t].template mutable_data_ptr<scalar_t>() + c % keys * points);
        }
      });
    }
  });
  return {dx[0], dx[1], dtables[0][0], dtables[0][1], dtables[1][0], dtables[1][1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(seaattn_kernels, CPU, library) {
  library.impl("axial_attention_pair.cpu", axial_attention_pair);
  library.impl("axial_attention_pair_backward.cpu", axial_attention_pair_backward);
}

}  // namespace seaattn
