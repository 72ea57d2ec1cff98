// The stem of a ResNet in one kernel: 7 x 7 convolution of 3 channels with stride 2 and padding 3, bias, ReLU, and max
// pooling of 3 x 3 with stride 2 and padding 1; 64 channels come out. Compute capability 8.0 and up.
//
// A block makes tiles of HEIGHT x WIDTH pooled positions. The pixels under a tile come to shared memory, zeros beyond
// the borders; tensor cores multiply; the convolution's results go to shared memory, rounded, and are pooled from there.
// Rounding and the maximum commute, so the outputs are rounded once. Weights stay in registers: a warp makes 32 of the
// channels, 16 positions at a time. Where there are more tiles than blocks, the pixels of a block's next tile are under
// way while it pools.
//
// The depth. In memory [N, H, W, 3] the 7 taps of a kernel row are 21 numbers in a row, and they begin 6 numbers further
// for the next position. Copies of 16 bytes put the first of them at an odd place, so a kernel row has 22 numbers here,
// the first under a weight of 0: 11 pairs, each a word. Lane t of the four that share a position takes 20 pairs: t and
// 4 + t of the 7 kernel rows (slots 0 to 13), and the last three of kernel rows t and 4 + t, the eighth of which has
// weights of 0 (slots 14 to 19). So all addresses are one of two per position plus a constant. Pixels under weights of 0
// must be finite, as all pixels are taken to be: one that is not also spoils outputs beside its windows.
//
// Images may also come as float32 planes or as bytes (Source; raw_pixels.cuh): the kernel then is the network's first.
//
// For training, where a batch norm follows, the results of the convolution can be stored as they are (not `pooled`).
#pragma once

#include "common/device.cuh"
#include "raw_pixels.cuh"

namespace fm_stem {

constexpr int kChannels = 64, kTaps = 7;
constexpr int kSteps = 10;      // of 16 numbers of the depth
constexpr int kShare = 32;      // channels of a warp
constexpr int kNear = 14;       // slots 0 to 13: two pairs of each kernel row
constexpr int kPixelBytes = 2 * kInputs * 2;  // from one position of the convolution to the next
static_assert(kTaps * 2 == kNear);

// HEIGHT x WIDTH pooled positions; GROUPS warps share the positions, for each half of the channels; so many blocks
// should fit a multiprocessor.
template <int HEIGHT, int WIDTH, int GROUPS, int RESIDENT>
struct Tile {
  static_assert(WIDTH % 2 == 0, "the pixels of a tile must begin at a multiple of 16 bytes");
  static constexpr int kHeight = HEIGHT, kWidth = WIDTH, kGroups = GROUPS, kResident = RESIDENT;
  static constexpr int kThreads = GROUPS * 2 * 32, kBlockThreads = kThreads;  // of a tile, and of a block
  static constexpr int kRows = 2 * HEIGHT + 1, kColumns = 2 * WIDTH + 1;  // of the convolution
  static constexpr int kPositions = kRows * kColumns;
  static constexpr int kProducts = (kPositions + 15) / 16;  // of 16 positions
  static constexpr int kPixelRows = 2 * (kRows - 1) + kTaps + 1;
  static constexpr int kChunks = (6 * (kColumns - 1) + 22 + kChunk - 1) / kChunk;  // of a row of pixels
  // The least pitch of 8 or 24 banks more than a multiple of 32: see the loads in multiply.
  static constexpr int kPitch = ((kChunks * 16 - 32 + 63) / 64 * 64) + 32;
  static constexpr int kPixelBytes = kPixelRows * kPitch;
  static constexpr int kSharedBytes = kPixelBytes + kProducts * 16 * kChannels * 2;
  static __device__ __forceinline__ int thread() { return threadIdx.x; }  // of those of a tile
};

// Source: Images<T>, Planes or Bytes.
template <typename T, typename Source>
struct Problem {
  Source images;
  const T* weight;    // in the order of lay_out_stem
  const float* bias;  // [64]
  T* out;             // [images, out_height, out_width, 64]; the convolution's own unless `pooled`
  int middle_height, middle_width;  // of the convolution
  int out_height, out_width;
  int tiles_down, tiles_across, tiles;
  bool pooled;
};

// The first pooled position of a tile.
struct Place {
  int image, row, column;
};

template <typename Cut, typename T, typename Source>
__device__ __forceinline__ Place place_of(const Problem<T, Source>& p, int tile) {
  const int across = tile % p.tiles_across, rest = tile / p.tiles_across;
  return {rest / p.tiles_down, rest % p.tiles_down * Cut::kHeight, across * Cut::kWidth};
}

// Starts the copies of a tile's pixels. Its first row is 2 (2 row - 1) - 3 of the image; its first number is the third
// before that row's pixel 2 (2 column - 1) - 3, hence a multiple of 8.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void load_tile(const Problem<T, Source>& p, fm::SharedAddress pixels, const Place& place) {
  load_images<Cut, T>(p.images, pixels, place.image, 4 * place.row - 5, 12 * place.column - 16);
}

// A lane's weights: of a step and two of its four tiles of 8 channels, 16 bytes.
struct Weights {
  uint4 words[kSteps][2];
  float bias[8];
};

template <typename T, typename Source>
__device__ __forceinline__ void load_weights(const Problem<T, Source>& p, int half, int lane, Weights& weights) {
  const uint4* const from = reinterpret_cast<const uint4*>(p.weight) + half * kSteps * 2 * 32 + lane;
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    weights.words[step][0] = from[step * 64];
    weights.words[step][1] = from[step * 64 + 32];
  }
#pragma unroll
  for (int i = 0; i < 8; i++) weights.bias[i] = p.bias[half * kShare + lane % 4 * 8 + i];
}

// Where a lane finds a position's pairs: near those of slots 0 to 13, far the others.
struct Pairs {
  const unsigned char *near, *far;

  // Banks, for the eight positions q and four lanes t of one load: near 3 q + t, where the same bank means the same
  // word; far 3 q + (8 or 24) t, all different. Only a step to the next row within the eight can collide.
  template <int PITCH>
  __device__ __forceinline__ uint32_t load(int slot) const {
    const int late = slot - kNear;
    const unsigned char* const from =
        slot < kNear ? near + slot / 2 * PITCH + slot % 2 * 16 : far + late / 3 * 4 * PITCH + late % 3 * 4;
    return *reinterpret_cast<const uint32_t*>(from);
  }
};

template <typename Cut>
__device__ __forceinline__ Pairs pairs_of(const unsigned char* pixels, int position, int lane) {
  const int inside = min(position, Cut::kPositions - 1);
  const unsigned char* const from =
      pixels + inside / Cut::kColumns * 2 * Cut::kPitch + inside % Cut::kColumns * kPixelBytes;
  return {from + lane % 4 * 4, from + lane % 4 * Cut::kPitch + 32};
}

// Byte of the eight channels `chunk` of a position among the results. The halves of odd positions are swapped: then the
// two positions that eight lanes store lie in different banks; eight lanes that pool read all of one position.
__device__ __forceinline__ int result_byte(int position, int chunk) {
  return position * kChannels * 2 + (chunk ^ (position % 2 * 4)) * 16;
}

// Rounded sums of a lane: row 0 or 1 of its two, eight channels.
template <typename T>
__device__ __forceinline__ uint4 rounded(const float (&sums)[4][4], int row) {
  return {fm::pack<T>(sums[0][2 * row], sums[0][2 * row + 1]), fm::pack<T>(sums[1][2 * row], sums[1][2 * row + 1]),
          fm::pack<T>(sums[2][2 * row], sums[2][2 * row + 1]), fm::pack<T>(sums[3][2 * row], sums[3][2 * row + 1])};
}

// The convolution of a tile, without the ReLU; positions beyond the image get 0, which pooling behind a ReLU ignores.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void multiply(const Problem<T, Source>& p, const unsigned char* pixels,
                                         fm::SharedAddress results, const Weights& weights, const Place& place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp / Cut::kGroups;
  for (int product = warp % Cut::kGroups; product < Cut::kProducts; product += Cut::kGroups) {
    const int first = product * 16 + lane / 4;
    const Pairs low = pairs_of<Cut>(pixels, first, lane), high = pairs_of<Cut>(pixels, first + 8, lane);
    float sums[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      sums[j][0] = sums[j][2] = weights.bias[2 * j];
      sums[j][1] = sums[j][3] = weights.bias[2 * j + 1];
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const uint32_t a[4] = {low.load<Cut::kPitch>(2 * step), high.load<Cut::kPitch>(2 * step),
                             low.load<Cut::kPitch>(2 * step + 1), high.load<Cut::kPitch>(2 * step + 1)};
#pragma unroll
      for (int two = 0; two < 2; two++) {
        const uint4 b = weights.words[step][two];
        fm::multiply_add_16x8x16<T>(sums[2 * two], a, b.x, b.y);
        fm::multiply_add_16x8x16<T>(sums[2 * two + 1], a, b.z, b.w);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int position = first + 8 * row;
      const int y = 2 * place.row - 1 + position / Cut::kColumns, x = 2 * place.column - 1 + position % Cut::kColumns;
      const bool inside = y >= 0 && y < p.middle_height && x >= 0 && x < p.middle_width;
      fm::store_shared(results + result_byte(position, half * 4 + lane % 4), inside ? rounded<T>(sums, row) : uint4{});
    }
  }
}

template <typename T>
__device__ __forceinline__ void keep_larger(uint4& best, const uint4& other) {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Two a[4], b[4];
  memcpy(a, &best, 16), memcpy(b, &other, 16);
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = __hmax2_nan(a[i], b[i]);
  memcpy(&best, a, 16);
}

// A maximum that begins at 0 is the ReLU as well; what is not a number stays so.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void pool(const Problem<T, Source>& p, fm::SharedAddress results, const Place& place) {
  constexpr int kEighths = kChannels / 8;
  for (int i = Cut::thread(); i < Cut::kHeight * Cut::kWidth * kEighths; i += Cut::kThreads) {
    const int chunk = i % kEighths, row = i / kEighths / Cut::kWidth, column = i / kEighths % Cut::kWidth;
    const int y = place.row + row, x = place.column + column;
    if (y >= p.out_height || x >= p.out_width) continue;
    uint4 best{};
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
      const int position = (2 * row + tap / 3) * Cut::kColumns + 2 * column + tap % 3;
      keep_larger<T>(best, fm::load_shared<uint4>(results + result_byte(position, chunk)));
    }
    const int64_t at = (static_cast<int64_t>(place.image) * p.out_height + y) * p.out_width + x;
    *reinterpret_cast<uint4*>(p.out + at * kChannels + chunk * 8) = best;
  }
}

// The convolution's results without the ReLU: two by two of them belong to each pooled position of the tile.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void store(const Problem<T, Source>& p, fm::SharedAddress results, const Place& place) {
  constexpr int kEighths = kChannels / 8, kAcross = 2 * Cut::kWidth;
  for (int i = Cut::thread(); i < 2 * Cut::kHeight * kAcross * kEighths; i += Cut::kThreads) {
    const int chunk = i % kEighths, row = i / kEighths / kAcross, column = i / kEighths % kAcross;
    const int y = 2 * place.row + row, x = 2 * place.column + column;
    if (y >= p.middle_height || x >= p.middle_width) continue;
    const int64_t at = (static_cast<int64_t>(place.image) * p.middle_height + y) * p.middle_width + x;
    *reinterpret_cast<uint4*>(p.out + at * kChannels + chunk * 8) =
        fm::load_shared<uint4>(results + result_byte((row + 1) * Cut::kColumns + column + 1, chunk));
  }
}

template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void finish(const Problem<T, Source>& p, fm::SharedAddress results, const Place& place) {
  if (p.pooled) pool<Cut>(p, results, place);
  else store<Cut>(p, results, place);
}

template <typename T, typename Cut, typename Source>
__global__ void __launch_bounds__(Cut::kThreads, Cut::kResident)
    stem_kernel(const __grid_constant__ Problem<T, Source> p) {
  unsigned char* const pixels = fm::dynamic_shared();
  const fm::SharedAddress pixels_address = fm::shared_address(pixels);
  const fm::SharedAddress results = pixels_address + Cut::kPixelBytes;
  fm::launch_dependents();
  Weights weights;  // are there before the kernel in front of this one has finished
  load_weights(p, threadIdx.x / 32 / Cut::kGroups, threadIdx.x % 32, weights);
  fm::wait_for_previous_grid();

  load_tile<Cut>(p, pixels_address, place_of<Cut>(p, blockIdx.x));
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const Place place = place_of<Cut>(p, tile);
    fm::copy_async_wait<0>();
    __syncthreads();  // the pixels are there, and the results of the tile before are pooled
    multiply<Cut>(p, pixels, results, weights, place);
    __syncthreads();
    if (tile + gridDim.x < p.tiles) load_tile<Cut>(p, pixels_address, place_of<Cut>(p, tile + gridDim.x));
    finish<Cut>(p, results, place);
  }
}

// Every tile that the op knows. A thread needs about 150 registers, so 384 threads of a multiprocessor have them without
// spilling, and four groups of warps twice would not. Calls `with(Tile{})` for the one of this size, and says whether
// there is one.
template <typename With>
bool choose_tile(int64_t height, int64_t width, const With& with) {
  if (height == 4 && width == 4) return with(Tile<4, 4, 3, 2>{}), true;
  if (height == 7 && width == 4) return with(Tile<7, 4, 5, 1>{}), true;
  if (height == 4 && width == 8) return with(Tile<4, 8, 5, 1>{}), true;
  if (height == 7 && width == 8) return with(Tile<7, 8, 3, 2>{}), true;
  return false;
}

// Sizes that follow from those of the input.
template <typename Cut, typename T, typename Source>
Problem<T, Source> make_problem(const Source& source, const T* weight, const float* bias, T* out, int images,
                                bool pooled) {
  Problem<T, Source> p{source, weight, bias, out};
  p.middle_height = (source.height - 1) / 2 + 1, p.middle_width = (source.width - 1) / 2 + 1;
  p.out_height = (p.middle_height - 1) / 2 + 1, p.out_width = (p.middle_width - 1) / 2 + 1;
  p.tiles_down = (p.out_height + Cut::kHeight - 1) / Cut::kHeight;
  p.tiles_across = (p.out_width + Cut::kWidth - 1) / Cut::kWidth;
  p.tiles = images * p.tiles_down * p.tiles_across;
  p.pooled = pooled;
  return p;
}

}  // namespace fm_stem
