#include "product.h"

#include <algorithm>

#include "simd.h"

namespace seaattn {
namespace {

// Terms that are summed in registers before they join the sum in memory: fewer roundings of a large
// sum, and weights that stay in the first cache while all pixels pass.
constexpr int64_t kMostDepth = 12;  // panels

// Weights that will be needed next, to be fetched into the second cache meanwhile: `lines` of each
// panel for every sixteen terms.
struct Ahead {
  const float* weight;
  int64_t lines;
};

constexpr int64_t kLine = 64;

// Spreads a Fetch over so many steps.
class Fetcher {
 public:
  Fetcher(const Fetch& fetch, int64_t steps)
      : fetch_(fetch), per_step_((fetch.rows * lines() + steps - 1) / steps) {}

  SEAATTN_INLINE void step() {
    for (int64_t l = 0; l < per_step_ && row_ < fetch_.rows; ++l) {
      __builtin_prefetch(fetch_.data + row_ * fetch_.stride + at_, 0, 2);
      at_ += kLine;
      if (at_ >= fetch_.bytes) {
        at_ = 0;
        ++row_;
      }
    }
  }

 private:
  int64_t lines() const {
    return (fetch_.bytes + kLine - 1) / kLine;
  }
  const Fetch fetch_;
  const int64_t per_step_;
  int64_t row_ = 0, at_ = 0;
};

// The sums of `kRows` pixels by `kPanels` panels, in registers.
template <int kWidth, int kRows, int kPanels>
struct Tile {
  typedef typename Vectors<kWidth>::Float Vector;
  static constexpr int kVectors = kPanels * kPanel / kWidth;

  // Of vector n: its panel, and its first lane there.
  static constexpr int64_t panel(int n) {
    return n * kWidth / kPanel;
  }
  static constexpr int64_t lane(int n) {
    return n * kWidth % kPanel;
  }

  SEAATTN_INLINE static Vector& at(Panels out, const int32_t* where, int r, int n) {
    const int64_t place = where == nullptr ? r : where[r];
    return *(Vector*)(out.data + panel(n) * out.stride + place * kPanel + lane(n));
  }

  SEAATTN_INLINE void add(const float* a, const float* weight, int64_t weight_stride) {
    Vector columns[kVectors];
    for (int n = 0; n < kVectors; ++n) {
      columns[n] = *(const Vector*)(weight + panel(n) * weight_stride + lane(n));
    }
    for (int r = 0; r < kRows; ++r) {
      const Vector value = a[r * kPanel] - Vector{};
      for (int n = 0; n < kVectors; ++n) sum[r][n] += value * columns[n];
    }
  }

  Vector sum[kRows][kVectors];
};

// Added to `bias`, to zero without one, or with `more` to what `out` holds.
template <int kWidth, int kRows, int kPanels>
SEAATTN_INLINE void product_tile(int64_t depth, ConstPanels a, ConstPanels weight,
                                 const float* bias, bool more, Panels out, const int32_t* where,
                                 Ahead ahead) {
  typedef Tile<kWidth, kRows, kPanels> Tile;
  typedef typename Tile::Vector Vector;
  Tile tile;
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < Tile::kVectors; ++n) tile.sum[r][n] = Vector{};
  }
  for (; depth >= kPanel; depth -= kPanel) {
    for (int64_t k = 0; k < kPanel; ++k) {
      tile.add(a.data + k, weight.data + k * kPanel, weight.stride);
    }
    a.data += a.stride;
    weight.data += kPanel * kPanel;
    for (int64_t l = 0; l < ahead.lines; ++l, ahead.weight += kPanel) {
      for (int n = 0; n < kPanels; ++n) __builtin_prefetch(ahead.weight + n * weight.stride, 0, 2);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    tile.add(a.data + k, weight.data + k * kPanel, weight.stride);
  }
  for (int n = 0; n < Tile::kVectors; ++n) {
    const Vector start = more || bias == nullptr ? Vector{} : *(const Vector*)(bias + n * kWidth);
    for (int r = 0; r < kRows; ++r) {
      Vector& to = Tile::at(out, where, r, n);
      to = (more ? to : start) + tile.sum[r][n];
    }
  }
}

// The tile of `count` <= kRows rows.
template <int kWidth, int kRows, int kPanels>
SEAATTN_INLINE void product_rows(int64_t count, int64_t depth, ConstPanels a, ConstPanels weight,
                                 const float* bias, bool more, Panels out, const int32_t* where,
                                 Ahead ahead) {
  if constexpr (kRows > 0) {
    if (count == kRows) {
      product_tile<kWidth, kRows, kPanels>(depth, a, weight, bias, more, out, where, ahead);
    } else {
      product_rows<kWidth, kRows - 1, kPanels>(count, depth, a, weight, bias, more, out, where,
                                               ahead);
    }
  }
}

constexpr int64_t blocks_of(int64_t pixels, int rows) {
  return (pixels + rows - 1) / rows;
}

constexpr int64_t runs_of(int64_t depth) {
  return (panels_of(depth) + kMostDepth - 1) / kMostDepth;
}

// All pixels by `panels` <= kPanels panels.
template <int kWidth, int kRows, int kPanels>
SEAATTN_INLINE void product_panels(int64_t panels, int64_t pixels, int64_t depth, ConstPanels a,
                                   ConstPanels weight, const float* bias, Panels out,
                                   const int32_t* where, bool last_panels, Fetcher& fetcher) {
  if constexpr (kPanels > 0) {
    if (panels < kPanels) {
      product_panels<kWidth, kRows, kPanels - 1>(panels, pixels, depth, a, weight, bias, out, where,
                                                 last_panels, fetcher);
      return;
    }
    // Blocks and runs of like size: none is a small remainder.
    const int64_t blocks = blocks_of(pixels, kRows), runs = runs_of(depth), all = panels_of(depth);
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t first = all * run / runs, last = all * (run + 1) / runs;
      const int64_t terms = std::min(last * kPanel, depth) - first * kPanel;
      const ConstPanels rows = a.from(first);
      const ConstPanels columns = {weight.data + first * kPanel * kPanel, weight.stride};
      const bool last_run = run + 1 == runs;
      const float* next =
          last_run ? weight.data + kPanels * weight.stride : weight.data + last * kPanel * kPanel;
      const int64_t lines = last_run && last_panels ? 0 : (kPanel + blocks - 1) / blocks;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t p = pixels * block / blocks, end = pixels * (block + 1) / blocks;
        product_rows<kWidth, kRows, kPanels>(
            end - p, terms, {rows.data + p * kPanel, rows.stride}, columns, bias, run > 0,
            {where == nullptr ? out.data + p * kPanel : out.data, out.stride},
            where == nullptr ? nullptr : where + p,
            {next + block * lines * (last - first) * kPanel, block * lines < kPanel ? lines : 0});
        fetcher.step();
      }
    }
  }
}

template <typename Isa>
SEAATTN_INLINE void product_body(int64_t pixels, int64_t panels, int64_t depth, ConstPanels a,
                                 ConstPanels weight, const float* bias, Panels out,
                                 const int32_t* where, const Fetch& fetch) {
  const int64_t groups = (panels + Isa::kPanels - 1) / Isa::kPanels;
  Fetcher fetcher(fetch, groups * runs_of(depth) * blocks_of(pixels, Isa::kRows));
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t n = panels * group / groups, end = panels * (group + 1) / groups;
    product_panels<Isa::kWidth, Isa::kRows, Isa::kPanels>(
        end - n, pixels, depth, a, weight.from(n), bias == nullptr ? nullptr : bias + n * kPanel,
        out.from(n), where, end == panels, fetcher);
  }
}

}  // namespace

SEAATTN_VERSIONS(product,
                 (int64_t pixels, int64_t panels, int64_t depth, ConstPanels a, ConstPanels weight,
                  const float* bias, Panels out, const int32_t* where, const Fetch& fetch),
                 (pixels, panels, depth, a, weight, bias, out, where, fetch))

}  // namespace seaattn
