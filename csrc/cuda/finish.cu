// The second half of the block in one pass over the projected map:
//
//     out = sigma(Wproj act(v + e_row + e_column) + b) * (Wpw act(dw3x3(qkv) + b) + b)
//
// A thread block owns TH x 8 pixels and N channels of the result. Its jobs are the chunks of 64
// channels of v, for the gate, and then those of qkv, for the detail. Of each job a warpgroup
// brings the map with a halo of one pixel and the weights to shared memory, a few jobs ahead; eight
// warps make the activated operand, a lane two channels of one or two columns of pixels, while the
// matrix units multiply that of the job before. Outside of the image the map is 0.
//
// Where tiles are few, a cluster of PARTS blocks shares the jobs of a tile: each sums over its own,
// and finishes its share of the columns from the sums of all.
//
// Weights come as they lie in shared memory, so that one copy brings those of a job:
//
//     weight      (jobs, C'', 64) of T: Wproj by the channels of v, then Wpw by those of qkv
//     depthwise   (jobs, 10, 64) of float32: nine taps and their bias; unread in jobs of the gate
//
// C'' is C up to a multiple of 64. Rows are swizzled (tile.cuh), and what is missing is zero.
//
// T: float16 or bfloat16. Products accumulate in float32, everything between them is float32; the
// map and the operands of products are rounded to T. act is relu or relu6: min(max(z, 0), most).
// The gate of a block without parts waits for the detail in float16, whatever T is: what is below
// 6e-8 becomes 0.

#include "tile.cuh"

namespace seaattn {

constexpr int kWorkers = 256;  // threads that compute; a warpgroup that loads comes after them
constexpr int kThreads = kWorkers + 128;
constexpr int kWidth = 8;   // pixels of a tile along W
constexpr int kPitch = 16;  // rows of shared memory between the rows of a tile with halo

struct Sizes {
  int h, w, c, projected, values;
  int image_rows;  // B * H: row vectors before those of the columns
  long long out_b, out_c, out_p;
  float most;
  int hard;
};

template <int TH, int N, int PARTS>
struct Layout {
  static constexpr int kPixels = TH * kWidth;
  static constexpr int kTiles = kPixels / 64;  // of 64 rows, for the matrix units
  static constexpr int kStages = PARTS > 1 ? 2 : 3;
  static constexpr int kDepthwise = 10 * 64 * 4;
  static constexpr int kMap = (TH + 2) * kPitch * kRow;
  static constexpr int kOperand = kPixels * kRow;
  static constexpr int kWeight = N * kRow;
  static constexpr int kColumnSums = kPixels + 4;  // a column of pixels, float32
  static constexpr int kSums = PARTS > 1 ? N / PARTS * kColumnSums * 4 : 0;  // of one part

  static constexpr int kAtMap = 0;
  static constexpr int kAtWeight = kAtMap + kStages * kMap;
  static constexpr int kAtOperand = kAtWeight + kStages * kWeight;
  static constexpr int kAtDepthwise = kAtOperand + 2 * kOperand;
  static constexpr int kAtBias = kAtDepthwise + kStages * kDepthwise;  // of proj, then of pw
  static constexpr int kAtBarriers = kAtBias + 2 * N * 4;
  static constexpr int kAtSums = kAtBarriers + 128;
  static constexpr int kBytes = kAtSums + 2 * PARTS * kSums + 1024;  // to begin at 1024 bytes
  // The result goes through shared memory: columns of pixels, eight elements apart.
  static_assert(N * (kPixels + 8) * 2 <= kAtDepthwise && kPixels * (N + 8) * 2 <= kAtDepthwise);
  // Columns of a warpgroup, and of an instruction.
  static constexpr int kColumns = kTiles == 2 ? N : N / 2;
  static constexpr int kWide = kColumns <= 128 ? kColumns : kColumns / 2;
  static constexpr int kProducts = kColumns / kWide;
  // Columns of pixels of a warp, and the threads that make the operand of a warpgroup.
  static constexpr int kWalks = kTiles;
  static constexpr int kTeam = kTiles == 2 ? 128 : 256;
};

// A warp walks down WALKS columns of eight pixels from (row, column) of the tile on, a lane has two
// channels.
template <typename T, int WALKS>
__device__ void depthwise(char* to, const char* map, const char* weights, int row, int column,
                          float most) {
  using P = Pair<T>;
  using Two = typename P::type;
  const int lane = afresh(threadIdx.x) % 32, piece = lane / 4, inner = lane % 4 * 4;
  float2 weight[9];
#pragma unroll
  for (int i = 0; i < 9; ++i)
    weight[i] = *reinterpret_cast<const float2*>(weights + i * 256 + lane * 8);
  const float2 bias = *reinterpret_cast<const float2*>(weights + 9 * 256 + lane * 8);
  const char* from[WALKS + 2];
#pragma unroll
  for (int i = 0; i < WALKS + 2; ++i)
    from[i] = map + (row * kPitch + column + i) * kRow + swizzled(piece, column + i) + inner;
  char* at[WALKS];
  float2 above[WALKS], here[WALKS];  // sums of the rows above and of the row in hand
#pragma unroll
  for (int i = 0; i < WALKS; ++i) {
    at[i] = to + (row * kWidth + column + i) * kRow + swizzled(piece, column + i) + inner;
    above[i] = here[i] = bias;
  }
#pragma unroll
  for (int y = 0; y < 10; ++y) {
    float2 x[WALKS + 2];
#pragma unroll
    for (int i = 0; i < WALKS + 2; ++i)
      x[i] = P::wide(*reinterpret_cast<const Two*>(from[i] + y * kPitch * kRow));
#pragma unroll
    for (int i = 0; i < WALKS; ++i) {
      auto add = [&](float2 sum, int tap) {
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          sum.x = fmaf(x[i + j].x, weight[tap + j].x, sum.x);
          sum.y = fmaf(x[i + j].y, weight[tap + j].y, sum.y);
        }
        return sum;
      };
      if (y >= 2) {
        const float2 z = add(above[i], 6);
        *reinterpret_cast<Two*>(at[i] + (y - 2) * kWidth * kRow) =
            P::narrow(clamped(z.x, most), clamped(z.y, most));
      }
      above[i] = add(here[i], 3);
      here[i] = add(bias, 0);
    }
  }
}

// act(v + e_row + e_column) of the same pixels, of 64 channels from `n` of v on. Pixels outside of
// the image get what lies at its border: nobody reads their results.
template <typename T, int WALKS>
__device__ void add_axes(char* to, const char* map, const T* axis, int y0, int x0, int n, int row,
                         int column, const Sizes& s) {
  using P = Pair<T>;
  using Two = typename P::type;
  const int lane = afresh(threadIdx.x) % 32, piece = lane / 4, inner = lane % 4 * 4;
  n += 2 * lane;
  const bool inside = n < s.values;
  if (!inside) n = 0;
  const long long image = afresh(blockIdx.x);
  const int pitch = (s.values + 15) / 16 * 16;
  const T* rows = axis + image * s.h * pitch;
  const T* columns = axis + (s.image_rows + image * s.w) * pitch;
  Two e_row[8], e_column[WALKS];
#pragma unroll
  for (int y = 0; y < 8; ++y)
    e_row[y] =
        *reinterpret_cast<const Two*>(rows + (long long)min(y0 + row + y, s.h - 1) * pitch + n);
#pragma unroll
  for (int i = 0; i < WALKS; ++i)
    e_column[i] = *reinterpret_cast<const Two*>(
        columns + (long long)min(x0 + column + i, s.w - 1) * pitch + n);
#pragma unroll
  for (int i = 0; i < WALKS; ++i) {
    const float2 e = P::wide(e_column[i]);
    const char* from = map + ((row + 1) * kPitch + column + i + 1) * kRow +
                       swizzled(piece, column + i + 1) + inner;
    char* at = to + (row * kWidth + column + i) * kRow + swizzled(piece, column + i) + inner;
#pragma unroll
    for (int y = 0; y < 8; ++y) {
      const float2 r = P::wide(e_row[y]);
      float2 v = P::wide(*reinterpret_cast<const Two*>(from + y * kPitch * kRow));
      v.x += r.x + e.x, v.y += r.y + e.y;
      // Past the last value the operand must be finite: its weight is 0.
      *reinterpret_cast<Two*>(at + y * kWidth * kRow) =
          inside ? P::narrow(clamped(v.x, s.most), clamped(v.y, s.most)) : P::narrow(0, 0);
    }
  }
}

template <typename T, int TH, int N, int PARTS, int BLOCKS>
__device__ void finish(const T* map, const T* axis, const T* weight, const float* depthwise_weight,
                       const float* pw_bias, const float* proj_bias, T* out, const Sizes& s) {
  using L = Layout<TH, N, PARTS>;
  using P = Pair<T>;
  using Two = typename P::type;
  SEAATTN_SHARED_MEMORY(unaligned);
  char* shared = unaligned + (-shared_address(unaligned) & 1023);
  char *maps = shared + L::kAtMap, *weights = shared + L::kAtWeight,
       *operands = shared + L::kAtOperand, *taps = shared + L::kAtDepthwise;
  float* biases = reinterpret_cast<float*>(shared + L::kAtBias);
  Barrier* map_here = reinterpret_cast<Barrier*>(shared + L::kAtBarriers);
  Barrier *weight_here = map_here + L::kStages, *map_free = weight_here + L::kStages,
          *weight_free = map_free + L::kStages;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::kStages; ++i) {
      prepare(map_here + i, kArrivals), prepare(weight_here + i, kArrivals);
      prepare(map_free + i, kWorkers / 32), prepare(weight_free + i, kWorkers / 32);
    }
    prepared();
  }
  const int part = blockIdx.z % PARTS, c0 = blockIdx.z / PARTS * N;
  const int across = (s.w + kWidth - 1) / kWidth;
  const int y0 = blockIdx.y / across * TH, x0 = blockIdx.y % across * kWidth;
  const long long image = blockIdx.x;

  // The jobs of this part: chunks of v, then of the whole map.
  const int all_gates = (s.values + 63) / 64, all_chunks = (s.projected + 63) / 64;
  const int first_gate = all_gates * part / PARTS;
  const int gates = all_gates * (part + 1) / PARTS - first_gate;
  const int first_chunk = all_chunks * part / PARTS;
  const int jobs = gates + all_chunks * (part + 1) / PARTS - first_chunk;

  let_next_kernel_start();
  __syncthreads();
  if constexpr (PARTS > 1) cluster_arrive();

  if (warp >= kWorkers / 32) {
    give_registers<BLOCKS == 1 ? 64 : 48>();
    // The warpgroup that loads. A thread copies the same pieces of the map in every job.
    constexpr int kSlots = (TH + 2) * 10, kCopies = (kSlots + 15) / 16;
    const int thread = threadIdx.x % 128, piece = thread % 8;
    const int all_columns = (s.c + 63) / 64 * 64;
    map += image * s.h * s.w * s.projected;
    int pixel[kCopies];  // negative: outside of the image
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int slot = thread / 8 + i * 16, y = y0 + slot / 10 - 1, x = x0 + slot % 10 - 1;
      pixel[i] = y >= 0 && y < s.h && x >= 0 && x < s.w ? y * s.w + x : -1;
    }
    for (int j = 0; j < jobs; ++j) {
      const int stage = j % L::kStages, before = j / L::kStages - 1;
      const int job = j < gates ? first_gate + j : all_gates + first_chunk + j - gates;
      const int n =
          (j < gates ? s.projected - s.values + 64 * job : 64 * (job - all_gates)) + piece * 8;
      if (before >= 0) wait(weight_free + stage, before & 1);
      copy_whole(weights + stage * L::kWeight,
                 reinterpret_cast<const char*>(weight) + ((long long)job * all_columns + c0) * kRow,
                 min(N, all_columns - c0) * kRow, weight_here + stage);
      if (before >= 0) wait(map_free + stage, before & 1);
      if (j == 0) wait_for_previous_kernel();
      char* to = maps + stage * L::kMap;
      const T* from = map + n;
      const long long stride = afresh(s.projected);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int slot = thread / 8 + i * 16, row = slot / 10, column = slot % 10;
        const bool inside = pixel[i] >= 0 && n < s.projected;
        if (kSlots % 16 == 0 || i + 1 < kCopies || slot < kSlots)
          copy_async(to + (row * kPitch + column) * kRow + swizzled(piece, column),
                     inside ? from + pixel[i] * stride : map, inside);
      }
      copy_whole(taps + stage * L::kDepthwise,
                 reinterpret_cast<const char*>(depthwise_weight) + job * L::kDepthwise,
                 L::kDepthwise, map_here + stage);
    }
    if constexpr (PARTS > 1) cluster_wait(), cluster_arrive(), cluster_wait();
    return;
  }
  take_registers<BLOCKS == 1 ? 216 : 96>();
#pragma unroll
  for (int i = threadIdx.x; i < 2 * N; i += kWorkers) {
    const int c = c0 + i % N;
    biases[i] = c < s.c ? (i < N ? proj_bias : pw_bias)[c] : 0;
  }
  if constexpr (L::kTiles == 2) meet(3, kWorkers);  // the warpgroups meet no more until the end
  const int group = warp / 4;
  // The pixels whose operand this warp makes.
  const int walk_row = L::kTiles == 2 ? group * 8 : 0;
  const int walk_column = L::kTiles == 2 ? warp % 4 * 2 : warp;
  // Results of a warpgroup, and of a thread in a fragment.
  const int tile_row = L::kTiles == 2 ? group * 64 : 0;
  const int first_column = L::kTiles == 2 ? 0 : group * L::kColumns;
  const int fragment_row = warp % 4 * 16 + lane / 4, fragment_column = lane % 4 * 2;

  float acc[L::kProducts][L::kWide / 2];
  __half2 gate[L::kProducts][L::kWide / 4];

  // Of the job before the first there is nothing to multiply: its sums are garbage, and forgotten.
  auto start_product = [&](int j) {
    const int stage = (j + L::kStages) % L::kStages;
    if (j >= 0) wait(weight_here + stage, j / L::kStages & 1);
    const char* a = operands + (j & 1) * L::kOperand + tile_row * kRow;
    const char* b = weights + stage * L::kWeight + first_column * kRow;
    products_begin();
#pragma unroll
    for (int i = 0; i < L::kProducts; ++i)
      product<T>(acc[i], a, b + i * L::kWide * kRow, j != 0 && j != gates);
    products_end();
  };
  // Sums go to the block that finishes their column.
  auto send_sums = [&](int kind) {
#pragma unroll
    for (int i = 0; i < L::kProducts; ++i) {
#pragma unroll
      for (int k = 0; k < L::kWide / 2; ++k) {
        constexpr int kShare = N / PARTS;
        const int c = first_column + i * L::kWide + k / 4 * 8 + fragment_column + k % 2;
        const int r = tile_row + fragment_row + k / 2 % 2 * 8;
        store_in(c / kShare,
                 shared + L::kAtSums + (part * 2 + kind) * L::kSums +
                     (c % kShare * L::kColumnSums + r) * 4,
                 acc[i][k]);
      }
    }
  };
  auto weigh = [&](float z) {
    return s.hard ? clamped(z + 3, 6) * (1.0f / 6) : __fdividef(1, 1 + __expf(-z));
  };
  auto close_gate = [&](auto sigmoid) {
#pragma unroll
    for (int i = 0; i < L::kProducts; ++i) {
#pragma unroll
      for (int k = 0; k < L::kWide / 4; ++k) {
        const float2 bias = *reinterpret_cast<const float2*>(
            biases + first_column + fragment_column + (i * L::kWide + k / 2 * 8));
        gate[i][k] = __floats2half2_rn(sigmoid(acc[i][2 * k] + bias.x),  // in [0, 1]
                                       sigmoid(acc[i][2 * k + 1] + bias.y));
      }
    }
  };

  wait_for_previous_kernel();
  for (int j = 0; j < jobs; ++j) {
    // The operand of job j is made while the matrix units multiply that of the job before.
    start_product(j - 1);
    const int stage = j % L::kStages;
    wait(map_here + stage, j / L::kStages & 1);
    char* to = operands + (j & 1) * L::kOperand;
    const char* from = maps + stage * L::kMap;
    if (j < gates)
      add_axes<T, L::kWalks>(to, from, axis, y0, x0, 64 * (first_gate + j), walk_row, walk_column,
                             s);
    else
      depthwise<T, L::kWalks>(to, from, taps + stage * L::kDepthwise, walk_row, walk_column,
                              s.most);
    publish();
    __syncwarp();
    if (lane == 0) arrive(map_free + stage);
    products_wait();
    if (j > 0 && lane == 0) arrive(weight_free + (j - 1) % L::kStages);
    // The operand is there.
    if (L::kTiles == 1 || group == 0)
      meet(1, L::kTeam);
    else
      meet(2, L::kTeam);
    if (j == gates) {  // what was multiplied last completes the gate
      if constexpr (PARTS > 1) {
        cluster_wait();  // all have started
        if (gates == 0) {
#pragma unroll
          for (int i = 0; i < L::kProducts; ++i)
#pragma unroll
            for (int k = 0; k < L::kWide / 2; ++k) acc[i][k] = 0;
        }
        send_sums(0);
      } else if (s.hard) {
        close_gate([](float z) { return clamped(z + 3, 6) * (1.0f / 6); });
      } else {
        close_gate([](float z) { return __fdividef(1, 1 + __expf(-z)); });
      }
    }
  }
  start_product(jobs - 1);
  products_wait();
  out += image * s.out_b;

  if constexpr (PARTS > 1) {
    send_sums(1);
    cluster_arrive(), cluster_wait();
    // This block's share of the columns, four pixels a thread at a time.
    constexpr int kShare = N / PARTS;
    for (int i = threadIdx.x; i < kShare * L::kPixels / 4; i += kWorkers) {
      const int mine = i / (L::kPixels / 4), r = i % (L::kPixels / 4) * 4;
      const int local = part * kShare + mine, c = c0 + local;
      const int y = y0 + r / kWidth, x = x0 + r % kWidth;
      float sums[2][4] = {};
#pragma unroll
      for (int k = 0; k < 2 * PARTS; ++k) {
        const float4 z = *reinterpret_cast<const float4*>(shared + L::kAtSums + k * L::kSums +
                                                          (mine * L::kColumnSums + r) * 4);
        sums[k % 2][0] += z.x, sums[k % 2][1] += z.y;
        sums[k % 2][2] += z.z, sums[k % 2][3] += z.w;
      }
      if (c < s.c && y < s.h) {
        T* to = out + c * s.out_c + (long long)y * s.w * s.out_p;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (x + k < s.w)
            to[(x + k) * s.out_p] =
                T(weigh(sums[0][k] + biases[local]) * (sums[1][k] + biases[N + local]));
      }
    }
    return;
  }

  meet(3, kWorkers);  // shared memory is free
  // Pixels of a column lie side by side, or, where the result is that of channels_last, channels of
  // a pixel.
  const bool by_channels = s.out_c == 1;
  constexpr int kColumn = L::kPixels + 8, kPixel = N + 8;
  T* staged = reinterpret_cast<T*>(shared);
  auto stage_results = [&](int pixel_step, int channel_step) {
    T* at = staged + (tile_row + fragment_row) * pixel_step +
            (first_column + fragment_column) * channel_step;
    const float* bias = biases + N + first_column + fragment_column;
#pragma unroll
    for (int i = 0; i < L::kProducts; ++i) {
#pragma unroll
      for (int k = 0; k < L::kWide / 4; ++k) {
        const int c = i * L::kWide + k / 2 * 8;
        const float2 weight = __half22float2(gate[i][k]);
        const float2 b = *reinterpret_cast<const float2*>(bias + c);
        const Two result =
            P::narrow(weight.x * (acc[i][2 * k] + b.x), weight.y * (acc[i][2 * k + 1] + b.y));
        T* to = at + k % 2 * 8 * pixel_step + c * channel_step;
        to[0] = result.x;
        to[channel_step] = result.y;
      }
    }
  };
  if (by_channels)
    stage_results(kPixel, 1);
  else
    stage_results(1, kColumn);
  meet(3, kWorkers);
  if (by_channels) {
    const bool whole = s.c % 8 == 0 && s.out_p % 8 == 0 && s.out_b % 8 == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < L::kPixels * (N / 8); i += kWorkers) {
      const int r = i / (N / 8), local = i % (N / 8) * 8, c = c0 + local;
      const int y = y0 + r / kWidth, x = x0 + r % kWidth;
      if (y >= s.h || x >= s.w) continue;
      const T* line = staged + r * kPixel + local;
      T* to = out + ((long long)y * s.w + x) * s.out_p + c;
      if (whole && c < s.c) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(line);
      } else {
#pragma unroll 1
        for (int k = 0; k < min(8, s.c - c); ++k) to[k] = line[k];
      }
    }
    return;
  }
  const bool whole = s.out_p == 1 && s.w % 8 == 0 && s.out_c % 8 == 0 && s.out_b % 8 == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < N * TH; i += kWorkers) {
    const int c = c0 + i / TH, y = y0 + i % TH;
    if (c >= s.c || y >= s.h) continue;
    const T* line = staged + i / TH * kColumn + i % TH * kWidth;
    T* to = out + c * s.out_c + (long long)y * s.w * s.out_p;
    if (whole) {
      *reinterpret_cast<uint4*>(to + x0) = *reinterpret_cast<const uint4*>(line);
    } else {
#pragma unroll 1
      for (int x = x0; x < min(x0 + kWidth, s.w); ++x) to[x * s.out_p] = line[x - x0];
    }
  }
}

}  // namespace seaattn

// clang-format off
// Cluster dimensions need compute capability 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SEAATTN_CLUSTER(SIZE)
#else
#define SEAATTN_CLUSTER(SIZE) __cluster_dims__(1, 1, SIZE)
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SEAATTN_BLOCKS(COUNT) 1
#else
#define SEAATTN_BLOCKS(COUNT) COUNT
#endif
#define SEAATTN_ENTRY(NAME, T, TH, N, PARTS, BLOCKS)                                               \
  extern "C" __global__ void SEAATTN_CLUSTER(PARTS)                                                \
      __launch_bounds__(seaattn::kThreads, SEAATTN_BLOCKS(BLOCKS)) finish_##NAME##_##TH##_##N##_##PARTS(           \
          const T* map, const T* axis, const T* weight, const float* depthwise_weight,             \
          const float* pw_bias, const float* proj_bias, T* out, int h, int w, int c,               \
          int projected, int values, int image_rows, long long out_b, long long out_c,             \
          long long out_p, float most, int hard) {                                                 \
    seaattn::finish<T, TH, N, PARTS, BLOCKS>(                                                      \
        map, axis, weight, depthwise_weight, pw_bias, proj_bias, out,                              \
        {h, w, c, projected, values, image_rows, out_b, out_c, out_p, most, hard});                \
  }
#define SEAATTN_ENTRIES(NAME, T)         \
  SEAATTN_ENTRY(NAME, T, 8, 64, 8, 2)    \
  SEAATTN_ENTRY(NAME, T, 8, 64, 4, 2)    \
  SEAATTN_ENTRY(NAME, T, 8, 64, 1, 2)    \
  SEAATTN_ENTRY(NAME, T, 8, 128, 1, 1)   \
  SEAATTN_ENTRY(NAME, T, 8, 192, 1, 1)   \
  SEAATTN_LARGE_ENTRIES(NAME, T)
// Where warpgroups cannot trade registers, these have too few.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SEAATTN_LARGE_ENTRIES(NAME, T)
#else
#define SEAATTN_LARGE_ENTRIES(NAME, T)   \
  SEAATTN_ENTRY(NAME, T, 8, 256, 1, 1)   \
  SEAATTN_ENTRY(NAME, T, 16, 128, 1, 1)  \
  SEAATTN_ENTRY(NAME, T, 16, 192, 1, 1)
#endif
SEAATTN_ENTRIES(f16, __half)
SEAATTN_ENTRIES(bf16, __nv_bfloat16)
// clang-format on
