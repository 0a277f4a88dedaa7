// From images to gap or flatten on a CPU: K and T of one first image with sixteen second images, in one pass.
//
// Fix the offset (a, d) of two pixels: p = (r, c) in the first image, q = (r + a, c + d) in the second. The elements K[p, q] of
// one offset form a picture of h - |a| rows and w - |d| columns. A conv moves p and q together, so that it is an ordinary
// 3 x 3 window within this picture, which never reads another offset, whatever the depth; beyond its edges are zeros. So each
// picture goes through all convs and relus of a resolution alone, in place, and stays in the cache (64 KB for 32 x 32).
//
//   vec     an element of a picture: sixteen numbers, one for each second image
//   conv    the sum of three columns is computed once for each row, and kept for the three rows whose window it is in
//   relu    in the same pass: reads K and T once, writes both once
//   pool    p and q are halved: offset a goes to a / 2, or, if a is odd, to (a - 1) / 2 or (a + 1) / 2, as r is even or odd.
//           All pictures with the same row offset form a plane. The offsets a come in ascending order, so that plane A of the
//           next resolution is complete after a = 2 A + 1, goes on at once, and only two planes of a resolution are kept.
//   gap     is the mean over all pictures; flatten is that of picture (0, 0)
//
// Cost of an element and layer, sixteen at a time: about 32 instructions of a vector unit for K, 47 for K and T.
// Letters as in fused.py; cpu.py builds this file and calls it.                     Proved by: fast/test_fast.py

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));  // a vec in an array of JAX
typedef int bits __attribute__((vector_size(4 * LANES)));
constexpr float ANGLE[] = {COEFFICIENTS};        // kernel.ANGLE, low power first
constexpr int DEGREE = sizeof ANGLE / sizeof *ANGLE - 1;
constexpr float NEAR_ONE = 16 * 1.1920929e-7f;  // as in kernel.kappas

struct Stage {                                 // one resolution
  int h, w, convs, most;                       // most: the largest |a| and |d| that are needed
  const float *w2_b2, *std1, *inverse1;        // (convs, 2), (convs, h, w), (convs, h, w)
  const unaligned *std2, *inverse2;            // (convs, h, w)
  std::vector<long> start;                     // where the picture of d + most starts in a plane
  std::unique_ptr<vec[]> plane[2][2];          // [a modulo 2][K, T]
};

inline vec square_root(vec x) {
  for (int lane = 0; lane < LANES; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

// sums[c] = row[c - 1] + row[c] + row[c + 1]
inline void three_columns(const vec* row, int columns, vec* sums) {
  vec left = {}, middle = row[0];
  for (int c = 0; c < columns; ++c) {
    vec right = c + 1 < columns ? row[c + 1] : vec{};
    sums[c] = left + middle + right;
    left = middle, middle = right;
  }
}

// One conv and one relu of a picture, in place; formulas as in fused.conv_relu.   reads_T: false if T = 0 before the conv.
// The other pointers are to the picture's first pixel in images of w columns.   sums: room for 6 w.
template <int states, bool reads_T>
void conv_relu(vec* K, vec* T, int rows, int columns, int w, const float* w2_b2, const float* std1, const float* inverse1,
               const unaligned* std2, const unaligned* inverse2, vec* sums) {
  const float w2 = w2_b2[0], b2 = w2_b2[1];
  vec *above[2], *here[2], *below[2];
  for (int k = 0; k <= reads_T; ++k) {
    above[k] = sums + 3 * k * w, here[k] = above[k] + w, below[k] = here[k] + w;
    std::fill_n(above[k], columns, vec{});
    three_columns(k ? T : K, columns, here[k]);
  }
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k <= reads_T; ++k)
      if (r + 1 < rows) three_columns((k ? T : K) + columns, columns, below[k]);
      else std::fill_n(below[k], columns, vec{});
    for (int c = 0; c < columns; ++c) {
      const vec conv = w2 * (above[0][c] + here[0][c] + below[0][c]) + b2;
      const vec scale = std1[c] * std2[c], cosine = conv * (inverse1[c] * inverse2[c]);
      vec t = 1 - (vec)((bits)cosine & 0x7fffffff);  // 1 - |cosine|
      t = t < NEAR_ONE ? vec{} : t;
      vec g = vec{} + ANGLE[DEGREE], h = vec{} + ANGLE[DEGREE] / (DEGREE + 1.5f);
#pragma GCC unroll 16
      for (int k = DEGREE - 1; k >= 0; --k) g = g * t + ANGLE[k], h = h * t + ANGLE[k] / (k + 1.5f);
      const vec root = square_root(t), angle = root * g;
      K[c] = scale * ((cosine > 0 ? cosine : vec{}) + t * root * h);
      if (states == 2) {
        const vec tangent = reads_T ? conv + w2 * (above[1][c] + here[1][c] + below[1][c]) : conv;
        T[c] = scale == 0 ? vec{} : 0.5f * (cosine < 0 ? angle : 1 - angle) * tangent;
      }
    }
    for (int k = 0; k <= reads_T; ++k) std::swap(above[k], here[k]), std::swap(here[k], below[k]);
    K += columns, T += columns, std1 += w, inverse1 += w, std2 += w, inverse2 += w;
  }
}

struct Network {
  int states, channels;
  std::vector<Stage> stages;
  const float* x1;                             // (channels, h, w)
  const unaligned* x2;                         // (channels, h, w)
  std::unique_ptr<vec[]> picture[2], sums;     // K and T at the first resolution
  double total[2][LANES];

  // Adds picture (a, d) of stage s to the planes of stage s + 1.
  void pool(int s, int a, int d, const vec* picture, int state) {
    const Stage &one = stages[s], &next = stages[s + 1];
    const int rows = one.h - std::abs(a), columns = one.w - std::abs(d), r0 = std::max(0, -a), c0 = std::max(0, -d);
    for (int r = 0; r < rows; ++r)
      for (int even = 0; even < std::min(2, columns); ++even) {  // every second column goes to the same picture
        const int P = (r0 + r) / 2, A = (r0 + r + a) / 2 - P, Q = (c0 + even) / 2, D = (c0 + even + d) / 2 - Q;
        if (std::max(std::abs(A), std::abs(D)) > next.most) continue;
        vec* to = &next.plane[A & 1][state][next.start[D + next.most]]
                  + (P - std::max(0, -A)) * (next.w - std::abs(D)) + Q - std::max(0, -D);
        for (int c = even; c < columns; c += 2) *to++ += picture[r * columns + c] / 16;
      }
  }

  void inputs(int a, int d, int rows, int columns, vec* K) {
    const int w = stages[0].w, size = stages[0].h * w;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        const int p = (std::max(0, -a) + r) * w + std::max(0, -d) + c, q = p + a * w + d;
        vec sum = {};
        for (int k = 0; k < channels; ++k) sum += x1[k * size + p] * x2[k * size + q];
        *K++ = sum / (float)channels;
      }
  }

  // All pictures of row offset a at stage s, and of the next stage's offset that is complete after them.
  void run(int s, int a) {
    Stage& one = stages[s];
    const bool last = s + 1 == (int)stages.size();
    const int rows = one.h - std::abs(a), most = std::min(one.most, one.w - 1);
    const int opened = (a + 1) / 2, completed = (a - 1) / 2;  // offsets of the next stage, if a is odd
    if (!last && a % 2 && std::abs(opened) <= stages[s + 1].most)
      for (int k = 0; k < states; ++k) std::fill_n(stages[s + 1].plane[opened & 1][k].get(), stages[s + 1].start.back(), vec{});
    for (int d = -most; d <= most; ++d) {
      const int columns = one.w - std::abs(d);
      vec* x[2];
      for (int k = 0; k < 2; ++k) x[k] = s && k < states ? &one.plane[a & 1][k][one.start[d + one.most]] : picture[k].get();
      if (s == 0) {
        inputs(a, d, rows, columns, x[0]);
        if (one.convs == 0) std::fill_n(x[1], rows * columns, vec{});
      }
      for (int k = 0; k < one.convs; ++k) {
        const long p = ((long)k * one.h + std::max(0, -a)) * one.w + std::max(0, -d), q = p + a * one.w + d;
        auto layer = states == 1 ? conv_relu<1, false> : s || k ? conv_relu<2, true> : conv_relu<2, false>;
        layer(x[0], x[1], rows, columns, one.w, one.w2_b2 + 2 * k, one.std1 + p, one.inverse1 + p, one.std2 + q,
              one.inverse2 + q, sums.get());
      }
      for (int k = 0; k < states; ++k) {
        if (!last) { pool(s, a, d, x[k], k); continue; }
        for (int r = 0; r < rows; ++r) {  // a row in float32, the rows in float64
          vec sum = {};
          for (int c = 0; c < columns; ++c) sum += x[k][r * columns + c];
          for (int lane = 0; lane < LANES; ++lane) total[k][lane] += sum[lane];
        }
      }
    }
    if (!last && a % 2 && std::abs(completed) <= stages[s + 1].most) run(s + 1, completed);
  }
};

// rows: how many of the n1 first images are wanted.  x1: (n1, channels, h, w).  x2: (channels, h, w, 16).  w2_b2: (convs, 2).
// std1, inverse1: (n1, numbers of all convs in one row); std2, inverse2: (those numbers, 16).   out: (states, n1, 16).
// convs: how many there are at each resolution.   flatten: take p = q only.
static ffi::Error run(ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::F32> x1, ffi::Buffer<ffi::F32> std1,
                      ffi::Buffer<ffi::F32> inverse1, ffi::Buffer<ffi::F32> x2, ffi::Buffer<ffi::F32> std2,
                      ffi::Buffer<ffi::F32> inverse2, ffi::Buffer<ffi::F32> w2_b2, ffi::ResultBuffer<ffi::F32> out,
                      ffi::Span<const int64_t> convs, bool flatten) {
  const auto shape = x1.dimensions();
  const long n1 = shape[0], h = shape[2], w = shape[3], numbers = std1.dimensions()[1], stages = convs.size();
  Network net;
  net.states = out->dimensions()[0], net.channels = shape[1], net.x2 = (const unaligned*)x2.typed_data();
  net.sums.reset(new vec[6 * w]);
  for (auto& picture : net.picture) picture.reset(new vec[h * w]);
  std::vector<long> first(1, 0);               // of each stage's numbers in std1 and std2
  long conv = 0;
  for (int s = 0; s < stages; ++s) {
    net.stages.emplace_back();
    Stage& one = net.stages.back();
    one.h = h >> s, one.w = w >> s, one.convs = convs[s];
    one.most = std::max(one.h, one.w) - 1;
    if (flatten) one.most = std::min(one.most, (1 << (stages - 1 - s)) - 1);
    one.w2_b2 = w2_b2.typed_data() + 2 * conv;
    one.std2 = (const unaligned*)std2.typed_data() + first[s];
    one.inverse2 = (const unaligned*)inverse2.typed_data() + first[s];
    conv += convs[s];
    first.push_back(first[s] + convs[s] * one.h * one.w);
    one.start.push_back(0);
    for (int d = -one.most; d <= one.most; ++d)
      one.start.push_back(one.start.back() + one.h * std::max(0, one.w - std::abs(d)));
    for (int k = 0; s && k < 2 * net.states; ++k) one.plane[k % 2][k / 2].reset(new vec[one.start.back()]);
  }
  const double positions = net.stages.back().h * net.stages.back().w;
  std::fill_n(out->typed_data(), out->element_count(), 0.f);
  for (long i = 0; i < std::min<long>(n1, rows.typed_data()[0]); ++i) {
    net.x1 = x1.typed_data() + i * net.channels * h * w;
    for (int s = 0; s < stages; ++s) {
      net.stages[s].std1 = std1.typed_data() + i * numbers + first[s];
      net.stages[s].inverse1 = inverse1.typed_data() + i * numbers + first[s];
    }
    std::fill_n(net.total[0], 2 * LANES, 0.);
    const int most = std::min<int>(net.stages[0].most, h - 1);
    for (int a = -most; a <= most; ++a) net.run(0, a);
    for (int k = 0; k < net.states; ++k)
      for (int lane = 0; lane < LANES; ++lane)
        out->typed_data()[(k * n1 + i) * LANES + lane] = net.total[k][lane] / (flatten ? positions : positions * positions);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(network, run, ffi::Ffi::Bind()
                              .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                              .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                              .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
                              .Attr<ffi::Span<const int64_t>>("convs").Attr<bool>("flatten"));
