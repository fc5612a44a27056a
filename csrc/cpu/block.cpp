#include "block.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "axial_attention.h"
#include "gate.h"
#include "panels.h"
#include "squeeze.h"
#include "stages.h"

namespace seaattn {
namespace {

constexpr int64_t kTile = 128;  // pixels that pass through all stages together
constexpr int64_t kStrip = 64;  // columns of a wide map that are worked on together
constexpr int64_t kAxisChunk = 64;
constexpr int64_t kAxisDepth = 2 * kPanel;
constexpr int64_t kKept = 32 * 1024;  // lines of a cache: two megabytes

// Cuts a piece of memory, or without one counts what would be cut.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}

  template <typename T = float>
  T* take(int64_t count) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * int64_t(sizeof(T) / sizeof(float)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(piece);
  }
  Panels panels(int64_t count, int64_t pixels) {
    // An odd number of lines from panel to panel: they lie in different sets of a cache.
    const int64_t stride = (pixels | 1) * kPanel;
    return {take(count * stride), stride};
  }
  int64_t used() const {
    return used_;
  }

 private:
  float* base_;
  int64_t used_ = 0;
};

// A part of the map of q, k and v with a frame of one pixel: all rows, or a ring of some.
struct Field {
  Panels panels;
  int64_t rows, pitch, first_column;

  // In pixels, from row -1 and the column before the first on.
  int64_t place(int64_t row, int64_t column) const {
    return (row + 1) % rows * pitch + column - first_column + 1;
  }
};

struct Range {
  int64_t begin, end;
};

// The part of worker `w`.
Range part(int64_t count, int64_t workers, int64_t w) {
  return {count * w / workers, count * (w + 1) / workers};
}

// Whether q, k and v of the whole map are kept: the axis vectors are then their means. Otherwise
// they are projections of the means of x.
bool keeps_field(const BlockSizes& s) {
  return s.height * s.width * s.panels() <= kKept;
}

int64_t strips_of(const BlockSizes& s) {
  return keeps_field(s) ? 1 : (s.width + kStrip - 1) / kStrip;
}

// Scratch of an image, which all workers share.
struct ImageScratch {
  ImageScratch(const BlockSizes& s, Arena& arena)
      : x(arena.panels(panels_of(s.channels),
                       keeps_field(s) ? s.height * s.width : s.height + s.width)),
        axis(arena.take(s.panels() * kPanel * s.axis_length())),
        attended(arena.take(s.values() * s.axis_length())),
        encoded(arena.panels(s.value_panels(), s.height + s.width)) {
    field = {{nullptr, 0}, s.height + 2, s.width + 2, 0};
    if (keeps_field(s)) field.panels = arena.panels(s.panels(), field.rows * field.pitch);
  }

  Panels x;         // the map, or its means: rows, then columns
  float* axis;      // (q, k, v; axis_length): channels first
  float* attended;  // (DH, axis_length)
  Panels encoded;   // rows, then columns
  Field field;
};

// Scratch of a worker for each of its kinds of work.
struct SqueezeWork {
  SqueezeWork(const BlockSizes& s, Arena& arena)
      : sums({arena.take(s.width * kPanel), arena.take<double>(s.width * kPanel)}),
        row(arena.take(s.height * kPanel)),
        column(arena.take(s.width * kPanel)) {}
  SqueezeScratch sums;
  float *row, *column;
};

constexpr int64_t kAxisPanels = 4;

struct AxisWork {
  explicit AxisWork(Arena& arena)
      : run(arena.panels(kAxisPanels, kAxisChunk)),
        sums(arena.take<double>(kAxisPanels * run.stride)) {}
  Panels run;
  double* sums;
};

struct MeansWork {
  MeansWork(const BlockSizes& s, Arena& arena)
      : where(arena.take<int32_t>(s.height * s.width)),
        row(arena.take(s.height * kPanel)),
        column(arena.take(s.width * kPanel)) {}
  int32_t* where;
  float *row, *column;
};

struct EncodeWork {
  EncodeWork(const BlockSizes& s, Arena& arena)
      : attended(arena.panels(s.value_panels(), kAxisChunk)) {}
  Panels attended;
};

// Rows of a strip that are finished together.
int64_t rows_of_tile(int64_t columns) {
  return std::max<int64_t>(1, kTile / columns);
}

struct FinishWork {
  FinishWork(const BlockSizes& s, Arena& arena) {
    const int64_t columns = (s.width + strips_of(s) - 1) / strips_of(s);
    const int64_t pixels = std::max(kTile, columns);
    hidden = arena.panels(s.panels(), pixels);
    detail = arena.panels(panels_of(s.channels), pixels);
    weight = arena.panels(panels_of(s.channels), pixels);
    if (!keeps_field(s)) {
      ring.rows = rows_of_tile(columns) + 2;
      ring.pitch = columns + 2;
      ring.panels = arena.panels(s.panels(), ring.rows * ring.pitch);
      x = arena.panels(panels_of(s.channels), kTile);
      where = arena.take<int32_t>(kTile);
    }
  }
  Panels hidden, detail, weight, x;
  Field ring;
  int32_t* where;
};

int64_t worker_scratch(const BlockSizes& s) {
  Arena squeeze(nullptr), axis(nullptr), means(nullptr), attend(nullptr), encode(nullptr),
      finish(nullptr);
  SqueezeWork(s, squeeze);
  AxisWork work(axis);
  MeansWork(s, means);
  attend.take(attend_scratch(std::max(s.height, s.width)));
  EncodeWork(s, encode);
  FinishWork(s, finish);
  return std::max(
      {squeeze.used(), axis.used(), means.used(), attend.used(), encode.used(), finish.used()});
}

int64_t image_scratch(const BlockSizes& s) {
  Arena arena(nullptr);
  ImageScratch(s, arena);
  return arena.used();
}

// The block on some images, by some workers together.
template <typename T>
class Block {
 public:
  Block(const BlockSizes& sizes, const BlockWeights& weights, Range images, MapOf<const T> x,
        MapOf<T> out, int64_t workers, const Run& run, float* scratch)
      : s_(sizes),
        w_(weights),
        first_image_(images.begin),
        x_(x),
        out_(out),
        workers_(workers),
        run_(run) {
    const int64_t count = images.end - images.begin;
    Arena arena(scratch);
    for (int64_t i = 0; i < count; ++i) images_.emplace_back(s_, arena);
    worker_stride_ = worker_scratch(s_);
    worker_base_ = scratch + arena.used();
  }

  void operator()() {
    if (keeps_field(s_)) {
      each(panels_of(s_.channels), &Block::gather);
      each(s_.panels(), &Block::project);
    } else {
      each(panels_of(s_.channels), &Block::squeeze);
      each(s_.panels(), &Block::project_axis);
    }
    each(2 * s_.heads, &Block::attend);
    each(encode_chunks(), &Block::encode);
    if (keeps_field(s_)) {
      each(s_.height * s_.width, &Block::finish_pixels);
    } else {
      each(strips_of(s_) * bands(), &Block::finish_bands);
    }
  }

 private:
  using Step = void (Block::*)(const ImageScratch&, int64_t image, Range units, Arena arena);

  // Shares the units of all images out to the workers.
  void each(int64_t units, Step step) {
    const int64_t total = units * int64_t(images_.size());
    const int64_t workers = std::min(workers_, total);
    run_(workers, [&](int64_t worker) {
      Range mine = part(total, workers, worker);
      while (mine.begin < mine.end) {
        const int64_t image = mine.begin / units, start = image * units;
        const Range of_image = {mine.begin - start, std::min(mine.end - start, units)};
        (this->*step)(images_[image], first_image_ + image, of_image,
                      Arena(worker_base_ + worker * worker_stride_));
        mine.begin = start + of_image.end;
      }
    });
  }

  Pixels<const T> pixels(int64_t image, int64_t panel, int64_t row, int64_t column) const {
    return {
        x_.data + image * x_.image + panel * kPanel * x_.channel + row * x_.row + column * x_.pixel,
        x_.channel, x_.pixel};
  }

  // Where the result of some adjacent pixels will be written.
  Fetch result(int64_t image, int64_t row, int64_t column, int64_t pixels) const {
    const T* data = out_.data + image * out_.image + row * out_.row + column * out_.pixel;
    const auto* bytes = reinterpret_cast<const char*>(data);
    const int64_t size = sizeof(T);
    if (out_.pixel > 1) return {bytes, 0, 1, pixels * out_.pixel * size};
    return {bytes, out_.channel * size, s_.channels, pixels * size};
  }

  int64_t channels_of(int64_t panel, int64_t panels) const {
    return std::min(s_.channels - panel * kPanel, panels * kPanel);
  }

  // --- axis vectors of a small map: the means of its q, k and v ---

  void gather(const ImageScratch& to, int64_t image, Range panels, Arena) {
    const int64_t channels = channels_of(panels.begin, panels.end - panels.begin);
    copy_pixels(image, panels.begin, channels, {0, s_.height}, {0, s_.width},
                {0, s_.height * s_.width}, to.x.from(panels.begin));
  }

  // Pixels `range` of a rectangle of x, counted along its rows, to panels.
  void copy_pixels(int64_t image, int64_t panel, int64_t channels, Range rows, Range columns,
                   Range range, Panels to) {
    const int64_t width = columns.end - columns.begin;
    // Rows that follow one another without a gap are one.
    if (x_.row == width * x_.pixel || rows.end - rows.begin == 1) {
      Pixels<const T> from = pixels(image, panel, rows.begin, columns.begin);
      from.data += range.begin * x_.pixel;
      return to_panels(from, channels, range.end - range.begin, to.data, to.stride);
    }
    for (int64_t p = range.begin; p < range.end;) {
      const int64_t row = p / width, column = p % width;
      const int64_t count = std::min(width - column, range.end - p);
      to_panels(pixels(image, panel, rows.begin + row, columns.begin + column), channels, count,
                to.data + (p - range.begin) * kPanel, to.stride);
      p += count;
    }
  }

  void project(const ImageScratch& i, int64_t, Range panels, Arena arena) {
    MeansWork work(s_, arena);
    const int64_t pixels = s_.height * s_.width, count = panels.end - panels.begin;
    const Field& field = i.field;
    for (int64_t p = 0; p < pixels; ++p) {
      work.where[p] = int32_t(field.place(p / s_.width, p % s_.width));
    }
    const Panels to = field.panels.from(panels.begin);
    product(pixels, count, s_.channels, {i.x.data, i.x.stride}, qkv_weight(panels.begin),
            w_.qkv_bias + panels.begin * kPanel, to, work.where, {});
    for (int64_t n = 0; n < count; ++n) {
      float* panel = to.from(n).data;
      clear(panel, 0, field.pitch + 1);
      for (int64_t row = 1; row < s_.height; ++row) {
        clear(panel, field.place(row, -1) - 1, 2);  // the end of one row and the start of the next
      }
      clear(panel, field.place(s_.height, -1) - 1, field.pitch + 1);
      panel_means(panel + field.place(0, 0) * kPanel, s_.height, s_.width, field.pitch, work.row,
                  work.column);
      float* axis = i.axis + (panels.begin + n) * kPanel * s_.axis_length();
      from_panels(work.row, 0, kPanel, s_.height, Pixels<float>{axis, s_.axis_length(), 1});
      from_panels(work.column, 0, kPanel, s_.width,
                  Pixels<float>{axis + s_.column_start(), s_.axis_length(), 1});
    }
  }

  // Outside of the map q, k and v are zero, and not their biases.
  static void clear(float* panel, int64_t place, int64_t pixels) {
    std::fill_n(panel + place * kPanel, pixels * kPanel, 0.0f);
  }

  ConstPanels qkv_weight(int64_t panel) const {
    return ConstPanels{w_.qkv_weight, s_.channels * kPanel}.from(panel);
  }

  // --- axis vectors of a large map: projections of the means of x ---

  void squeeze(const ImageScratch& to, int64_t image, Range panels, Arena arena) {
    SqueezeWork work(s_, arena);
    for (int64_t n = panels.begin; n < panels.end; ++n) {
      const int64_t channels = channels_of(n, 1);
      const Pixels<const T> from = pixels(image, n, 0, 0);
      if (from.pixel_stride == 1) {
        for (int64_t c = 0; c < channels; ++c) {
          squeeze_plane(from.data + c * from.channel_stride, s_.height, s_.width, x_.row,
                        work.row + c * s_.height, work.column + c * s_.width, work.sums);
        }
      } else {
        squeeze_channels(from.data, s_.height, s_.width, channels, from.pixel_stride, work.row,
                         work.column, work.sums);
      }
      const Panels means = to.x.from(n);
      to_panels(Pixels<const float>{work.row, s_.height, 1}, channels, s_.height, means.data, 0);
      to_panels(Pixels<const float>{work.column, s_.width, 1}, channels, s_.width,
                means.data + s_.height * kPanel, 0);
    }
  }

  // Thirty-two terms are summed in float32, these sums in float64: the projection of a mean rounds
  // once where the mean of a projection averages the roundings of a whole row.
  void project_axis(const ImageScratch& i, int64_t, Range panels, Arena arena) {
    AxisWork work(arena);
    for (int64_t n = panels.begin; n < panels.end; n += kAxisPanels) {
      const int64_t count = std::min(kAxisPanels, panels.end - n);
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t start = axis * s_.height, length = axis == 0 ? s_.height : s_.width;
        for (int64_t p = 0; p < length; p += kAxisChunk) {
          const int64_t pixels = std::min(kAxisChunk, length - p);
          std::fill(work.sums, work.sums + count * work.run.stride, 0.0);
          for (int64_t c = 0; c < s_.channels; c += kAxisDepth) {
            const ConstPanels means = ConstPanels{i.x.data, i.x.stride}.from(c / kPanel);
            const ConstPanels weight = qkv_weight(n);
            product(pixels, count, std::min(kAxisDepth, s_.channels - c),
                    {means.data + (start + p) * kPanel, means.stride},
                    {weight.data + c * kPanel, weight.stride}, nullptr, work.run, nullptr, {});
            for (int64_t k = 0; k < count; ++k) {
              add_run(pixels * kPanel, work.run.from(k).data, work.sums + k * work.run.stride);
            }
          }
          for (int64_t k = 0; k < count; ++k) {
            round_sums(pixels, work.sums + k * work.run.stride, w_.qkv_bias + (n + k) * kPanel,
                       work.run.from(k).data);
          }
          from_panels(
              work.run.data, work.run.stride, count * kPanel, pixels,
              Pixels<float>{i.axis + n * kPanel * s_.axis_length() + axis * s_.column_start() + p,
                            s_.axis_length(), 1});
        }
      }
    }
  }

  // --- attention along both axes, and its encoding ---

  void attend(const ImageScratch& i, int64_t, Range units, Arena arena) {
    float* scratch = arena.take(attend_scratch(std::max(s_.height, s_.width)));
    const int64_t line = s_.axis_length(), keys = s_.heads * s_.key_dim;
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const bool of_columns = unit >= s_.heads;
      const int64_t head = unit % s_.heads, start = of_columns ? s_.column_start() : 0;
      const int64_t length = of_columns ? s_.width : s_.height;
      const int64_t q = head * s_.key_dim * line + start, k = q + keys * line;
      const int64_t v = (s_.key_panels() * kPanel + head * s_.value_dim) * line + start;
      for (int64_t d = 0; d < s_.key_dim; ++d) {
        for (int64_t n = 0; n < length; ++n) {
          i.axis[q + d * line + n] += w_.position[q + d * line + n];
          i.axis[k + d * line + n] += w_.position[k + d * line + n];
        }
      }
      seaattn::attend(i.axis + q, i.axis + k, i.axis + v, line, length, s_.key_dim, s_.value_dim,
                      1.0f / std::sqrt(static_cast<float>(s_.key_dim)),
                      i.attended + head * s_.value_dim * line + start, line, scratch);
    }
  }

  int64_t encode_chunks() const {
    return (s_.height + kAxisChunk - 1) / kAxisChunk + (s_.width + kAxisChunk - 1) / kAxisChunk;
  }

  void encode(const ImageScratch& i, int64_t, Range chunks, Arena arena) {
    EncodeWork work(s_, arena);
    const int64_t of_rows = (s_.height + kAxisChunk - 1) / kAxisChunk;
    const int64_t values = s_.values(), panels = s_.value_panels();
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const bool of_columns = chunk >= of_rows;
      const int64_t length = of_columns ? s_.width : s_.height;
      const int64_t p = (of_columns ? chunk - of_rows : chunk) * kAxisChunk;
      const int64_t pixels = std::min(kAxisChunk, length - p);
      // Whole vectors: an axis is filled up to a multiple of sixteen.
      to_panels(Pixels<const float>{i.attended + (of_columns ? s_.column_start() : 0) + p,
                                    s_.axis_length(), 1},
                values, panels_of(pixels) * kPanel, work.attended.data, work.attended.stride);
      for (int64_t n = 0; n < panels; ++n) {
        activate(pixels * kPanel, work.attended.from(n).data, s_.activation, s_.negative_slope);
      }
      product(pixels, panels, values, {work.attended.data, work.attended.stride},
              {w_.encode_weight + of_columns * panels * values * kPanel, values * kPanel},
              w_.encode_bias + of_columns * panels * kPanel,
              {i.encoded.data + ((of_columns ? s_.height : 0) + p) * kPanel, i.encoded.stride},
              nullptr, {});
    }
  }

  // --- the gate ---

  void finish_pixels(const ImageScratch& i, int64_t image, Range pixels, Arena arena) {
    FinishWork work(s_, arena);
    const int64_t count = pixels.end - pixels.begin, tiles = (count + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      const Range tile = part(count, tiles, t);
      finish(i, image, i.field, {0, s_.width}, {pixels.begin + tile.begin, pixels.begin + tile.end},
             work);
    }
  }

  // Bands of rows to a strip. The rows beside a band are made twice.
  int64_t bands() const {
    const int64_t units = strips_of(s_) * int64_t(images_.size());
    const int64_t wanted = workers_ / std::gcd(workers_, units);
    return std::max<int64_t>(1, std::min(wanted, s_.height / 4));
  }

  void finish_bands(const ImageScratch& i, int64_t image, Range units, Arena arena) {
    FinishWork work(s_, arena);
    const int64_t bands = this->bands(), strips = strips_of(s_);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      finish_band(i, image, part(s_.height, bands, unit % bands),
                  part(s_.width, strips, unit / bands), work);
    }
  }

  void finish_band(const ImageScratch& i, int64_t image, Range rows, Range columns,
                   FinishWork& work) {
    Field& ring = work.ring;
    ring.first_column = columns.begin;
    const int64_t width = columns.end - columns.begin, step = rows_of_tile(width);
    for (int64_t n = 0; n < s_.panels(); ++n) {
      float* panel = ring.panels.from(n).data;
      for (int64_t row = 0; row < ring.rows; ++row) {
        clear(panel, row * ring.pitch, 1);
        clear(panel, row * ring.pitch + width + 1, 1);
      }
      if (rows.begin == 0) clear(panel, 0, ring.pitch);
    }
    int64_t made = std::max<int64_t>(0, rows.begin - 1);
    for (int64_t row = rows.begin; row < rows.end; row += step) {
      const int64_t end = std::min(row + step, rows.end);
      const int64_t needed = std::min(end + 1, s_.height);
      make_rows(image, {made, needed}, columns, work);
      if (end == s_.height) {
        for (int64_t n = 0; n < s_.panels(); ++n) {
          clear(ring.panels.from(n).data, (end + 1) % ring.rows * ring.pitch, ring.pitch);
        }
      }
      made = needed;
      finish(i, image, ring, columns, {row * width, end * width}, work);
    }
  }

  // q, k and v of some rows of a strip and of the column on each side.
  void make_rows(int64_t image, Range rows, Range columns, FinishWork& work) {
    const Range wide = {std::max<int64_t>(0, columns.begin - 1),
                        std::min(columns.end + 1, s_.width)};
    const int64_t width = wide.end - wide.begin, count = (rows.end - rows.begin) * width;
    const int64_t tiles = (count + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      const Range tile = part(count, tiles, t);
      copy_pixels(image, 0, s_.channels, rows, wide, tile, work.x);
      for (int64_t p = tile.begin; p < tile.end; ++p) {
        work.where[p - tile.begin] =
            int32_t(work.ring.place(rows.begin + p / width, wide.begin + p % width));
      }
      product(tile.end - tile.begin, s_.panels(), s_.channels, {work.x.data, work.x.stride},
              qkv_weight(0), w_.qkv_bias, work.ring.panels, work.where, {});
    }
  }

  // Pixels `range` of a strip, counted along its rows.
  void finish(const ImageScratch& i, int64_t image, const Field& field, Range columns, Range range,
              FinishWork& work) {
    const int64_t width = columns.end - columns.begin, pixels = range.end - range.begin;
    Segment segments[kTile];
    int64_t count = 0;
    for (int64_t p = range.begin; p < range.end; p += segments[count++].pixels) {
      const int64_t row = p / width, column = columns.begin + p % width;
      segments[count] = {(field.place(row - 1, column - 1)) * kPanel,
                         (field.place(row, column - 1)) * kPanel,
                         (field.place(row + 1, column - 1)) * kPanel,
                         row,
                         column,
                         std::min(columns.end - column, range.end - p)};
    }
    const int64_t panels = s_.panels(), channel_panels = panels_of(s_.channels);
    for (int64_t n = 0; n < panels; ++n) {
      depthwise(field.panels.from(n).data, segments, count, w_.dw_weight + n * 9 * kPanel,
                w_.dw_bias + n * kPanel, s_.activation, s_.negative_slope,
                work.hidden.from(n).data);
    }
    const ConstPanels hidden = {work.hidden.data, work.hidden.stride};
    product(pixels, channel_panels, panels * kPanel, hidden,
            {w_.pw_weight, panels * kPanel * kPanel}, w_.pw_bias, work.detail, nullptr, {});
    for (int64_t n = 0; n < s_.value_panels(); ++n) {
      const float* row = i.encoded.from(n).data;
      mix(field.panels.from(s_.key_panels() + n).data, segments, count, row,
          row + s_.height * kPanel, s_.activation, s_.negative_slope, work.hidden.from(n).data);
    }
    product(pixels, channel_panels, s_.values(), hidden, {w_.proj_weight, s_.values() * kPanel},
            w_.proj_bias, work.weight, nullptr,
            result(image, segments[0].row, segments[0].column, pixels));
    for (int64_t n = 0; n < channel_panels; ++n) {
      float* weight = work.weight.from(n).data;
      gate(weight, work.detail.from(n).data, pixels * kPanel, s_.hard, weight);
    }
    for (int64_t k = 0; k < count;) {
      const Segment& first = segments[k];
      int64_t together = first.pixels, p = first.row * width + first.column - columns.begin;
      ++k;
      if (out_.row == width * out_.pixel) {
        for (; k < count; ++k) together += segments[k].pixels;
      }
      from_panels(work.weight.data + (p - range.begin) * kPanel, work.weight.stride, s_.channels,
                  together,
                  Pixels<T>{out_.data + image * out_.image + first.row * out_.row +
                                first.column * out_.pixel,
                            out_.channel, out_.pixel});
    }
  }

  const BlockSizes& s_;
  const BlockWeights& w_;
  const int64_t first_image_;
  const MapOf<const T> x_;
  const MapOf<T> out_;
  const int64_t workers_;
  const Run& run_;
  std::vector<ImageScratch> images_;
  float* worker_base_;
  int64_t worker_stride_;
};

}  // namespace

int64_t block_scratch(const BlockSizes& sizes, int64_t images, int64_t threads) {
  const int64_t together = images < threads ? images : threads;
  return together * image_scratch(sizes) + threads * worker_scratch(sizes);
}

template <typename T>
void run_block(const BlockSizes& sizes, const BlockWeights& weights, int64_t images,
               MapOf<const T> x, MapOf<T> out, int64_t threads, const Run& run, float* scratch) {
  // Whole images to each thread while there are enough, and the rest by all threads together.
  const int64_t alone = images / threads * threads;
  const Run inline_run = [](int64_t count, const std::function<void(int64_t)>& task) {
    for (int64_t i = 0; i < count; ++i) task(i);
  };
  const int64_t stride = image_scratch(sizes) + worker_scratch(sizes);
  if (alone > 0) {
    run(threads, [&](int64_t thread) {
      const Range mine = part(alone, threads, thread);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        Block<T>(sizes, weights, {i, i + 1}, x, out, 1, inline_run, scratch + thread * stride)();
      }
    });
  }
  if (alone < images) {
    Block<T>(sizes, weights, {alone, images}, x, out, threads, run, scratch)();
  }
}

template void run_block(const BlockSizes&, const BlockWeights&, int64_t, MapOf<const float>,
                        MapOf<float>, int64_t, const Run&, float*);
template void run_block(const BlockSizes&, const BlockWeights&, int64_t, MapOf<const c10::Half>,
                        MapOf<c10::Half>, int64_t, const Run&, float*);
template void run_block(const BlockSizes&, const BlockWeights&, int64_t, MapOf<const c10::BFloat16>,
                        MapOf<c10::BFloat16>, int64_t, const Run&, float*);

}  // namespace seaattn
