// The axial attention of the block from the projected map, up to the encoded axis vectors:
//
//     q, k, v = mean of the map along the other axis, q and k + position
//     o       = softmax(D^-0.5 q^T k) v                       along each axis, per head
//     e       = We act(o) + b                                 (DH, DH), row and column
//
//     map            (B H W, NQ) of T: heads*D channels of q, as many of k, heads*E of v
//     position       (H + W, 2 heads*D) float32: of q, then of k
//     encode_weight  (2, DH, pitch) of T: of the row, of the column; DH = heads*E, pitch is DH
//                    rounded up to 16
//     encode_bias    (2, DH) float32
//     scratch        as output: act(o)
//     output         (B H + B W, pitch) of T: of the rows, then of the columns; the channels from
//                    DH on are left as they are
//
// A cluster owns an image, a thread block of it one head: it reads the channels of its head once,
// makes the axis vectors and the attention of both axes in shared memory, and shares act(o) with
// the others through scratch. Then it makes its E channels of the encoding from all heads.
//
// T: float16 or bfloat16. The means and the attention are float32, as are the sums of products;
// act(o) and e are rounded to T. act is relu or relu6: min(max(z, 0), most). All sums have a fixed
// order.
//
// Launch: grid B*heads, 256 threads, `Layout` for the shared memory; an entry for each number of
// heads, the size of its cluster. 1 <= H, W <= 64.

#include "common.cuh"

namespace seaattn {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAcross = 4;           // pixels of a row that a thread reads at once
constexpr int kBlock = 4 * kAcross;  // and those of its warp

// What lies where in shared memory, in bytes. After the attention the operand of the encoding takes
// the place of everything before.
template <int D, int E>
struct Layout {
  static constexpr int kChannels = 2 * D + E;          // of a head
  static constexpr int kVector = D % 8 == 0 ? 8 : 4;   // channels of a load
  static constexpr int kPieces = kChannels / kVector;  // loads of a pixel
  static constexpr int kGroups = (kPieces + 7) / 8;    // of eight loads
  static constexpr int kAhead = kGroups == 2 ? 3 : 4;  // rows in flight; four would spill
  static constexpr int kBandBits = kGroups == 1 ? 3 : kGroups == 2 ? 2 : 1;  // one warp a part
  static constexpr int kPitch = kChannels + 4;  // of an axis vector, in floats
  int block_bits, band_bits;  // the map in 2^bits parts, whose sums are apart: of columns, of rows
  int first_column, vectors;  // axis vectors: of rows, of columns from `first_column` on
  int score_pitch;            // in floats
  int operand_pitch;          // in elements of T
  int at_scores, at_row, at_column, bytes;

  __host__ __device__ Layout(int h, int w, int heads) {
    block_bits = w <= kBlock ? 0 : w <= 2 * kBlock ? 1 : 2;
    band_bits = kBandBits > block_bits ? kBandBits - block_bits : 0;
    first_column = (h + 3) / 4 * 4;
    vectors = first_column + (w + 3) / 4 * 4;
    score_pitch = ((h > w ? h : w) + 3) / 4 * 4 + 4;
    at_scores = vectors * kPitch * 4;
    at_row = at_scores + kWarps * 8 * score_pitch * 4;
    at_column = at_row + (h << block_bits) * kChannels * 4;
    bytes = at_column + (w << band_bits) * kChannels * 4;
    operand_pitch = (heads * E + 31) / 32 * 32;
    operand_pitch += operand_pitch / 32 % 2 ? 0 : 32;  // two rows are 64 bytes apart, modulo 128
    const int operand = (h + (w + 15) / 16 * 16) * operand_pitch * 2;
    bytes = bytes > operand ? bytes : operand;
  }
};

// The sums of the map of one head along rows and columns, in parts:
//
//     row     (blocks, H, channels): the part of a row in a block of 16 columns
//     column  (bands, W, channels): the part of a column in the rows band, band + bands, ...
//
// A warp reads 8 pieces of 4 pixels at once. In `column` the first four channels of all pieces come
// before the others: that way threads store to different banks.
template <typename T, int D, int E>
__device__ void sum_map(const T* map, float* row, float* column, const Layout<D, E>& layout, int H,
                        int W, int heads, int head) {
  using L = Layout<D, E>;
  constexpr int V = L::kVector, WORDS = V / 2, kAhead = L::kAhead;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int projected = heads * L::kChannels;
  const int bands = 1 << layout.band_bits;
  // As many as warps, but in three groups.
  const int tasks = L::kGroups < 3 ? kWarps : L::kGroups << (layout.block_bits + layout.band_bits);
#pragma unroll 1
  for (int task = warp; task < tasks; task += kWarps) {
    const int piece = task % L::kGroups * 8 + lane % 8;
    const int block = task / L::kGroups & ((1 << layout.block_bits) - 1);
    const int band = task / L::kGroups >> layout.block_bits;
    const int first = block * kBlock + lane / 8;  // and every fourth column from there
    const bool real = piece < L::kPieces;
    const int width = real ? W - first : 0;
    const int c = piece * V;
    const int channel = c < D       ? head * D + c
                        : c < 2 * D ? (heads - 1 + head) * D + c
                                    : 2 * heads * D + head * E + c - 2 * D;
    const T* next = map + channel + (band * W + first) * projected;
    const int down = (W << layout.band_bits) * projected;
    float* const to_row = row + block * H * L::kChannels + c + lane / 8 * (V / 4);

    uint32_t words[kAhead][kAcross][WORDS];
    float sums[kAcross][V];
#pragma unroll
    for (int i = 0; i < kAcross; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[i][v] = 0;

    auto load = [&](uint32_t (&x)[kAcross][WORDS], int h) {
#pragma unroll
      for (int i = 0; i < kAcross; ++i)
        load_words(x[i], next + 4 * i * projected, h < H && 4 * i < width);
      next += down;
    };
#pragma unroll
    for (int r = 0; r < kAhead; ++r) load(words[r], band + r * bands);
#pragma unroll 1
    for (int start = band; start < H; start += kAhead * bands) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int h = start + r * bands;
        if (h >= H) break;
        float sum[V];
#pragma unroll
        for (int i = 0; i < kAcross; ++i) {
#pragma unroll
          for (int n = 0; n < WORDS; ++n) {
            using P = Pair<T>;
            const float2 x = P::wide(reinterpret_cast<typename P::type&>(words[r][i][n]));
            sum[2 * n] = i ? sum[2 * n] + x.x : x.x;
            sum[2 * n + 1] = i ? sum[2 * n + 1] + x.y : x.y;
            sums[i][2 * n] += x.x;
            sums[i][2 * n + 1] += x.y;
          }
        }
        load(words[r], h + kAhead * bands);
        // Of the four threads with this piece each takes a quarter of its channels.
        const bool upper = lane & 16, odd = lane & 8;
#pragma unroll
        for (int v = 0; v < V / 2; ++v) {
          const float other = upper ? sum[v] : sum[v + V / 2];
          sum[v] = (upper ? sum[v + V / 2] : sum[v]) + __shfl_xor_sync(~0u, other, 16);
        }
#pragma unroll
        for (int v = 0; v < V / 4; ++v) {
          const float other = odd ? sum[v] : sum[v + V / 4];
          sum[v] = (odd ? sum[v + V / 4] : sum[v]) + __shfl_xor_sync(~0u, other, 8);
        }
        if (real) {
          float* to = to_row + h * L::kChannels;
          if constexpr (V == 8)
            *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
          else
            *to = sum[0];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAcross; ++i) {
      if (4 * i < width) {
        float* to = column + (band * W + first + 4 * i) * L::kChannels + piece * 4;
#pragma unroll
        for (int part = 0; part < V / 4; ++part)
          *reinterpret_cast<float4*>(to + part * (L::kPieces * 4)) =
              make_float4(sums[i][4 * part], sums[i][4 * part + 1], sums[i][4 * part + 2],
                          sums[i][4 * part + 3]);
      }
    }
  }
}

// The axis vectors, where the positions of q and k lie already. The q are in units of the exponent
// of two. Vectors beyond an axis are 0.
template <int D, int E>
__device__ void make_vectors(float* vectors, const float* row, const float* column,
                             const Layout<D, E>& layout, int H, int W) {
  using L = Layout<D, E>;
  constexpr int kQuads = L::kChannels / 4;
  const float scale = 1.4426950408889634f / sqrtf(static_cast<float>(D));
  const float of_h = __fdividef(1.0f, H), of_w = __fdividef(1.0f, W);
#pragma unroll 1
  for (int at = threadIdx.x; at < layout.vectors * kQuads; at += kThreads) {
    const int quad = at % kQuads, n = at / kQuads;
    const int c = quad % L::kPieces * L::kVector + quad / L::kPieces * 4;
    const bool of_row = n < layout.first_column;
    const int i = of_row ? n : n - layout.first_column;
    const int length = of_row ? H : W;
    const int parts = 1 << (of_row ? layout.block_bits : layout.band_bits);
    const float* from =
        (of_row ? row + c : column + quad * 4) + (i < length ? i : 0) * L::kChannels;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const float4 x = *reinterpret_cast<const float4*>(from + part * length * L::kChannels);
      sum.x += x.x;
      sum.y += x.y;
      sum.z += x.z;
      sum.w += x.w;
    }
    const float factor = of_row ? of_w : of_h;
    float4* to = reinterpret_cast<float4*>(vectors + n * L::kPitch + c);
    float4 mean = make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
    if (i < length && c < 2 * D) {
      const float4 position = *to;
      const float unit = c < D ? scale : 1.0f;
      mean.x = (mean.x + position.x) * unit;
      mean.y = (mean.y + position.y) * unit;
      mean.z = (mean.z + position.z) * unit;
      mean.w = (mean.w + position.w) * unit;
    }
    *to = i < length ? mean : make_float4(0, 0, 0, 0);
  }
}

// act(o) of both axes to scratch. A warp takes 4 Q queries at a time: eight threads have the keys
// of Q queries, then each thread has Q queries and four channels.
template <int Q, typename T, int D, int E>
__device__ void attend(const float* vectors, float* scores, T* row_out, T* column_out,
                       const Layout<D, E>& layout, int H, int W, int pitch, float most) {
  using L = Layout<D, E>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_tasks = (H + 4 * Q - 1) / (4 * Q), tasks = row_tasks + (W + 4 * Q - 1) / (4 * Q);
  const int score_pitch = layout.score_pitch;
  scores += warp * 8 * score_pitch;
#pragma unroll 1
  for (int task = warp; task < tasks; task += kWarps) {
    const bool of_row = task < row_tasks;
    const int N = of_row ? H : W, padded = (N + 3) / 4 * 4;
    const int first = (of_row ? task : task - row_tasks) * 4 * Q;
    const float* axis = vectors + (of_row ? 0 : layout.first_column) * L::kPitch;
    T* out = of_row ? row_out : column_out;
    {
      const int group = lane / 8, key = lane % 8;
      float4 q[Q][D / 4];
      float largest[Q], total[Q];
      float* mine[Q];
#pragma unroll
      for (int n = 0; n < Q; ++n) {
        const int i = first + group + 4 * n;
        const float* from = axis + (i < N ? i : N - 1) * L::kPitch;
#pragma unroll
        for (int d = 0; d < D / 4; ++d) q[n][d] = reinterpret_cast<const float4*>(from)[d];
        mine[n] = scores + (group + 4 * n) * score_pitch;
        largest[n] = -INFINITY;
        total[n] = 0;
      }
#pragma unroll 2
      for (int j = key; j < N; j += 8) {
        const float4* from = reinterpret_cast<const float4*>(axis + j * L::kPitch + D);
        float4 sum[Q];
#pragma unroll
        for (int n = 0; n < Q; ++n) sum[n] = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int d = 0; d < D / 4; ++d) {
          const float4 k = from[d];
#pragma unroll
          for (int n = 0; n < Q; ++n) {
            sum[n].x = fmaf(q[n][d].x, k.x, sum[n].x);
            sum[n].y = fmaf(q[n][d].y, k.y, sum[n].y);
            sum[n].z = fmaf(q[n][d].z, k.z, sum[n].z);
            sum[n].w = fmaf(q[n][d].w, k.w, sum[n].w);
          }
        }
#pragma unroll
        for (int n = 0; n < Q; ++n) {
          const float s = (sum[n].x + sum[n].y) + (sum[n].z + sum[n].w);
          mine[n][j] = s;
          largest[n] = fmaxf(largest[n], s);  // a NaN comes back with its exponential
        }
      }
#pragma unroll
      for (int n = 0; n < Q; ++n)
#pragma unroll
        for (int step = 1; step < 8; step *= 2)
          largest[n] = fmaxf(largest[n], __shfl_xor_sync(~0u, largest[n], step));
#pragma unroll 2
      for (int j = key; j < padded; j += 8) {
#pragma unroll
        for (int n = 0; n < Q; ++n) {
          const float p = j < N ? exp2f(mine[n][j] - largest[n]) : 0.0f;
          mine[n][j] = p;
          total[n] += p;
        }
      }
#pragma unroll
      for (int n = 0; n < Q; ++n) {
#pragma unroll
        for (int step = 1; step < 8; step *= 2) total[n] += __shfl_xor_sync(~0u, total[n], step);
        if (key == 0) mine[n][score_pitch - 1] = __fdividef(1.0f, total[n]);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int at = lane; at < E; at += 32) {
      const int group = at / (E / 4), e = at % (E / 4) * 4;
      const float* p = scores + group * score_pitch;
      const float* from = axis + 2 * D + e;
      float4 sum[Q];
#pragma unroll
      for (int n = 0; n < Q; ++n) sum[n] = make_float4(0, 0, 0, 0);
#pragma unroll 2
      for (int j = 0; j < padded; j += 4) {
        float part[Q][4];
#pragma unroll
        for (int n = 0; n < Q; ++n) {
          const float4 x = *reinterpret_cast<const float4*>(p + 4 * n * score_pitch + j);
          part[n][0] = x.x;
          part[n][1] = x.y;
          part[n][2] = x.z;
          part[n][3] = x.w;
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const float4 v = *reinterpret_cast<const float4*>(from + (j + u) * L::kPitch);
#pragma unroll
          for (int n = 0; n < Q; ++n) {
            sum[n].x = fmaf(part[n][u], v.x, sum[n].x);
            sum[n].y = fmaf(part[n][u], v.y, sum[n].y);
            sum[n].z = fmaf(part[n][u], v.z, sum[n].z);
            sum[n].w = fmaf(part[n][u], v.w, sum[n].w);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < Q; ++n) {
        const int i = first + group + 4 * n;
        if (i < N) {
          const float inverse = p[4 * n * score_pitch + score_pitch - 1];
          const auto low =
              Pair<T>::narrow(clamped(sum[n].x * inverse, most), clamped(sum[n].y * inverse, most));
          const auto high =
              Pair<T>::narrow(clamped(sum[n].z * inverse, most), clamped(sum[n].w * inverse, most));
          uint2 both;
          both.x = reinterpret_cast<const uint32_t&>(low);
          both.y = reinterpret_cast<const uint32_t&>(high);
          *reinterpret_cast<uint2*>(out + i * pitch + e) = both;
        }
      }
    }
    __syncwarp();
  }
}

template <typename T, int D, int E>
__device__ void axis(const T* map, const float* position, const T* encode_weight,
                     const float* encode_bias, T* scratch, T* output, int B, int H, int W,
                     int heads, float most) {
  using L = Layout<D, E>;
  SEAATTN_SHARED_MEMORY(memory);
  const L layout(H, W, heads);
  const int head = blockIdx.x % heads, b = blockIdx.x / heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int values = heads * E, pitch = (values + 15) / 16 * 16;
  let_next_kernel_start();

  float* vectors = reinterpret_cast<float*>(memory);
  float* scores = reinterpret_cast<float*>(memory + layout.at_scores);
  float* row = reinterpret_cast<float*>(memory + layout.at_row);
  float* column = reinterpret_cast<float*>(memory + layout.at_column);
#pragma unroll 1
  for (int at = threadIdx.x; at < (H + W) * (D / 2); at += kThreads) {
    const int c = at % (D / 2) * 4, n = at / (D / 2);  // channel of q or k of this head
    const int from = c < D ? head * D + c : (heads - 1 + head) * D + c;
    copy_async(vectors + (n < H ? n : n - H + layout.first_column) * L::kPitch + c,
               position + n * (2 * heads * D) + from);
  }
  wait_for_previous_kernel();

  sum_map<T, D, E>(map + static_cast<int64_t>(b) * H * W * (heads * L::kChannels), row, column,
                   layout, H, W, heads, head);
  copies_done();
  __syncthreads();
  make_vectors<D, E>(vectors, row, column, layout, H, W);
  __syncthreads();

  const int64_t of_rows = static_cast<int64_t>(b) * H * pitch;
  const int64_t of_columns = (static_cast<int64_t>(B) * H + static_cast<int64_t>(b) * W) * pitch;
  T* row_scratch = scratch + of_rows + head * E;
  T* column_scratch = scratch + of_columns + head * E;
  if ((H + 3) / 4 + (W + 3) / 4 <= kWarps)
    attend<1, T, D, E>(vectors, scores, row_scratch, column_scratch, layout, H, W, pitch, most);
  else
    attend<2, T, D, E>(vectors, scores, row_scratch, column_scratch, layout, H, W, pitch, most);
  cluster_arrive();

  // A warp makes eight channels of an axis. As all sums go over all channels, a thread takes eight
  // neighbours of both factors at once: two steps of the matrix unit, whichever order it sees.
  constexpr int kSteps = E / 4;  // of 32 channels, with eight heads
  constexpr int kTasks = 2 * E / 8;
  uint32_t weight[kSteps][4];
  float2 bias;
  auto load_weight = [&](int task) {
    const int of = task / (E / 8), n = head * E + task % (E / 8) * 8 + lane / 4;
    const T* from = encode_weight + (of * values + n) * pitch + lane % 4 * 8;
    bias = __ldg(
        reinterpret_cast<const float2*>(encode_bias + of * values + n - lane / 4 + lane % 4 * 2));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (step * 32 + lane % 4 * 8 < values)
        x = __ldg(reinterpret_cast<const uint4*>(from + step * 32));
      weight[step][0] = x.x;
      weight[step][1] = x.y;
      weight[step][2] = x.z;
      weight[step][3] = x.w;
    }
  };
  load_weight(warp);
  cluster_wait();

  T* operand = reinterpret_cast<T*>(memory);
#pragma unroll 2
  for (int n = warp; n < H + W; n += kWarps) {
    const T* from = scratch + (n < H ? of_rows + n * pitch : of_columns + (n - H) * pitch);
#pragma unroll 1
    for (int c = lane * 8; c < values; c += 256)
      copy_async(operand + n * layout.operand_pitch + c, from + c);
  }
  copies_done();
  __syncthreads();

#pragma unroll 1
  for (int task = warp; task < kTasks; task += kWarps) {
    if (task != warp) load_weight(task);
    const int of = task / (E / 8), n = head * E + task % (E / 8) * 8 + lane % 4 * 2;
    const int length = of ? W : H;
    T* out = output + (of ? of_columns : of_rows) + n;
#pragma unroll 1
    for (int m = lane / 4; m - lane / 4 < length; m += 16) {
      const T* from = operand + ((of ? H : 0) + m) * layout.operand_pitch + lane % 4 * 8;
      float sums[4][4] = {};  // four, because a product waits for the one it adds to
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step * 32 >= values) break;
        uint4 x = make_uint4(0, 0, 0, 0), y = x;
        if (step * 32 + lane % 4 * 8 < values) {
          x = *reinterpret_cast<const uint4*>(from + step * 32);
          y = *reinterpret_cast<const uint4*>(from + 8 * layout.operand_pitch + step * 32);
        }
        multiply<T>(sums[step % 2 * 2], x.x, y.x, x.y, y.y, weight[step][0], weight[step][1]);
        multiply<T>(sums[step % 2 * 2 + 1], x.z, y.z, x.w, y.w, weight[step][2], weight[step][3]);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int i = m + 8 * part;
        if (i < length) {
          const float first =
              (sums[0][2 * part] + sums[1][2 * part]) + (sums[2][2 * part] + sums[3][2 * part]);
          const float second = (sums[0][2 * part + 1] + sums[1][2 * part + 1]) +
                               (sums[2][2 * part + 1] + sums[3][2 * part + 1]);
          *reinterpret_cast<typename Pair<T>::type*>(out + i * pitch) =
              Pair<T>::narrow(first + bias.x, second + bias.y);
        }
      }
    }
  }
}

}  // namespace seaattn

// clang-format off
// Cluster dimensions need compute capability 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SEAATTN_CLUSTER(SIZE)
#else
#define SEAATTN_CLUSTER(SIZE) __cluster_dims__(SIZE, 1, 1)
#endif
#define SEAATTN_ENTRY(NAME, T, D, E, HEADS)                                                        \
  extern "C" __global__ void SEAATTN_CLUSTER(HEADS) __launch_bounds__(seaattn::kThreads, 2)        \
      axis_##NAME##_##D##_##E##_##HEADS(const T* map, const float* position,                       \
                                        const T* encode_weight, const float* encode_bias,          \
                                        T* scratch, T* output, int B, int H, int W, float most) {  \
    seaattn::axis<T, D, E>(map, position, encode_weight, encode_bias, scratch, output, B, H, W,    \
                           HEADS, most);                                                           \
  }
#define SEAATTN_ENTRIES(NAME, T)     \
  SEAATTN_ENTRY(NAME, T, 16, 32, 4)  \
  SEAATTN_ENTRY(NAME, T, 16, 32, 6)  \
  SEAATTN_ENTRY(NAME, T, 16, 32, 8)  \
  SEAATTN_ENTRY(NAME, T, 24, 48, 4)  \
  SEAATTN_ENTRY(NAME, T, 24, 48, 6)  \
  SEAATTN_ENTRY(NAME, T, 24, 48, 8)  \
  SEAATTN_ENTRY(NAME, T, 20, 40, 8)
SEAATTN_ENTRIES(f16, __half)
SEAATTN_ENTRIES(bf16, __nv_bfloat16)
// clang-format on
