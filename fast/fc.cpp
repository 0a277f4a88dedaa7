// K v of a fully connected network on a CPU: a tile is computed, multiplied from both sides, and never leaves the cache.
//
//   S_ij = <x_i, x'_j> / d                   12 x 256 elements at a time
//   dense and relu, layer by layer           in place, formulas as in kernel.py
//   y_i += K_ij v'_j,   y'_j += K_ij v_i     in float64
//
// Cost of an element on AVX-512, in vector instructions: d / 16 for S, about 20 / 16 for each layer of K and 33 / 16 of K and T,
// c / 4 for both products with c columns.
// cpu.py builds this file; fc.py calls it for large/on_the_fly.py.                       Proved by: fast/test_fc.py

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, DEEP = 12, COLUMNS = 10;  // floats of a vector, rows of S and columns of v in registers at once
#else
constexpr int LANES = 8, DEEP = 6, COLUMNS = 5;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));          // a vec in an array of NumPy
typedef int bits __attribute__((vector_size(4 * LANES)));
typedef double wide __attribute__((vector_size(4 * LANES)));                      // LANES / 2 doubles
typedef double loose_wide __attribute__((vector_size(4 * LANES), aligned(8)));
constexpr int ROWS = 12, COLS = 256, PANEL = 2 * LANES;
constexpr float ANGLE[] = {COEFFICIENTS};        // kernel.ANGLE, low power first
constexpr int DEGREE = sizeof ANGLE / sizeof *ANGLE - 1;
constexpr float NEAR_ONE = 16 * 1.1920929e-7f;  // as in kernel.kappas

struct Block {                 // of inputs, `n` of them
  long n;
  const float *x;              // rows: (n, d); columns: panels (n / PANEL, d, PANEL)
  const float *std, *inverse;  // (layers, n): sqrt(k(x, x) / 2) before each relu, and 1 / sqrt(k(x, x)), or 0
  const double* v;             // rows: (n, c), or none; columns: (c, n)
  double* y;                   // as v
};

// S[r][j] = sum over k of a[r][k] b[k][j], DEEP rows and one panel
static void panel(const float* a, const float* b, long d, float* S) {
  vec sum[DEEP][2] = {};
  for (long k = 0; k < d; ++k) {
    const vec left = ((const loose*)b)[2 * k], right = ((const loose*)b)[2 * k + 1];
#pragma GCC unroll 12
    for (int r = 0; r < DEEP; ++r) sum[r][0] += a[r * d + k] * left, sum[r][1] += a[r * d + k] * right;
  }
  for (int r = 0; r < DEEP; ++r)
    for (int u = 0; u < 2; ++u) ((vec*)(S + r * COLS))[u] = sum[r][u];
}

static inline vec square_root(vec x) {
  for (int lane = 0; lane < LANES; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

// One dense layer and one relu of a row of K, and of T
template <int states>
static inline void dense_relu(vec* K, vec* T, int vectors, float w2, float b2, float std1, float inverse1, const float* std2,
                              const float* inverse2) {
  for (int j = 0; j < vectors; ++j) {
    const vec dense = w2 * K[j] + b2, cosine = dense * (inverse1 * ((const loose*)inverse2)[j]);
    vec t = 1 - (vec)((bits)cosine & 0x7fffffff);  // 1 - |cosine|
    t = t < NEAR_ONE ? vec{} : t;
    vec g = vec{} + ANGLE[DEGREE], h = vec{} + ANGLE[DEGREE] / (DEGREE + 1.5f);
#pragma GCC unroll 16
    for (int k = DEGREE - 1; k >= 0; --k) g = g * t + ANGLE[k], h = h * t + ANGLE[k] / (k + 1.5f);
    const vec root = square_root(t);
    K[j] = std1 * ((const loose*)std2)[j] * ((cosine > 0 ? cosine : vec{}) + t * root * h);
    if (states == 2) {
      const vec angle = root * g;
      T[j] = 0.5f * (cosine < 0 ? angle : 1 - angle) * (dense + w2 * T[j]);
    }
  }
}

// the sum of the lanes
static inline double total(wide x) {
  typedef double part __attribute__((vector_size(2 * LANES)));
  part parts[2];
  std::memcpy(parts, &x, sizeof x);
  parts[0] += parts[1];
  double sum = 0;
  for (int lane = 0; lane < LANES / 4; ++lane) sum += parts[0][lane];
  return sum;
}

// y1 += K v2 and, where v1 is given, y2 += K^T v1, for C columns of v.   v1, y1: (rows, columns).   v2, y2: (C, COLS).
template <int C>
static void multiply(const wide* K, int rows, int cols, const double* v1, double* y1, const double* v2, double* y2,
                     long columns) {
  constexpr int HALF = LANES / 2, ROW = COLS / HALF;
  for (int r = 0; r < rows; r += 2) {  // the row after the last is not used
    wide sum[2][C] = {};
    for (int s = 0; s < cols / HALF; ++s) {
      const wide first = K[r * ROW + s], second = K[(r + 1) * ROW + s];
#pragma GCC unroll 10
      for (int k = 0; k < C; ++k) {
        const wide v = ((const loose_wide*)v2)[k * ROW + s];
        sum[0][k] += first * v, sum[1][k] += second * v;
      }
    }
#pragma GCC unroll 10
    for (int k = 0; k < C; ++k) {
      y1[r * columns + k] += total(sum[0][k]);
      if (r + 1 < rows) y1[(r + 1) * columns + k] += total(sum[1][k]);
    }
  }
  if (!v1) return;
  for (int s = 0; s < cols / HALF; s += 2) {
    wide sum[2][C];
#pragma GCC unroll 10
    for (int k = 0; k < C; ++k)
      sum[0][k] = ((loose_wide*)y2)[k * ROW + s], sum[1][k] = ((loose_wide*)y2)[k * ROW + s + 1];
    for (int r = 0; r < rows; ++r) {
      const wide left = K[r * ROW + s], right = K[r * ROW + s + 1];
#pragma GCC unroll 10
      for (int k = 0; k < C; ++k) sum[0][k] += left * v1[r * columns + k], sum[1][k] += right * v1[r * columns + k];
    }
#pragma GCC unroll 10
    for (int k = 0; k < C; ++k)
      ((loose_wide*)y2)[k * ROW + s] = sum[0][k], ((loose_wide*)y2)[k * ROW + s + 1] = sum[1][k];
  }
}

template <int... C>
static void multiply_by(int count, std::integer_sequence<int, C...>, const wide* K, int rows, int cols, const double* v1,
                        double* y1, const double* v2, double* y2, long columns) {
  ((count == C + 1 ? multiply<C + 1>(K, rows, cols, v1, y1, v2, y2, columns) : void()), ...);
}

template <int states>
static void run(long d, long layers, const float* w2, const float* b2, long columns, const Block& one, const Block& two) {
  alignas(64) static thread_local float K[ROWS * COLS], T[ROWS * COLS];
  alignas(64) static thread_local double exact[ROWS * COLS];
  std::vector<double> v2(columns * COLS), y2(columns * COLS);  // of 256 columns of K: they stay in cache
  for (long j = 0; j < two.n; j += COLS) {
    const int cols = std::min<long>(COLS, two.n - j);
    for (long c = 0; c < columns; ++c) std::copy_n(two.v + c * two.n + j, cols, &v2[c * COLS]);
    std::fill(y2.begin(), y2.end(), 0.);
    for (long i = 0; i < one.n; i += ROWS) {
      const int rows = std::min<long>(ROWS, one.n - i), vectors = cols / LANES;
      for (int p = 0; p < cols; p += PANEL)
        for (int r = 0; r < ROWS; r += DEEP) panel(one.x + (i + r) * d, two.x + (j + p) * d, d, K + r * COLS + p);
      for (int r = 0; r < rows; ++r) {
        vec *k = (vec*)(K + r * COLS), *t = (vec*)(T + r * COLS);
        for (int s = 0; s < vectors; ++s) k[s] /= (float)d;
        if (states == 2) std::fill_n(t, vectors, vec{});
        for (long l = 0; l < layers; ++l)
          dense_relu<states>(k, t, vectors, w2[l], b2[l], one.std[l * one.n + i + r], one.inverse[l * one.n + i + r],
                             two.std + l * two.n + j, two.inverse + l * two.n + j);
        for (int s = 0; s < vectors; ++s) {
          k[s] = w2[layers] * k[s] + b2[layers];
          if (states == 2) t[s] = k[s] + w2[layers] * t[s];
        }
      }
      for (int r = 0; r < rows; ++r)
        for (int k = 0; k < cols; ++k) exact[r * COLS + k] = (states == 2 ? T : K)[r * COLS + k];
      for (long c = 0; c < columns; c += COLUMNS)
        multiply_by(std::min<long>(COLUMNS, columns - c), std::make_integer_sequence<int, COLUMNS>(), (const wide*)exact,
                    rows, cols, one.v ? one.v + i * columns + c : nullptr, one.y + i * columns + c, &v2[c * COLS],
                    &y2[c * COLS], columns);
    }
    for (long c = 0; one.v && c < columns; ++c)
      for (int k = 0; k < cols; ++k) two.y[c * two.n + j + k] += y2[c * COLS + k];
  }
}

extern "C" int panel_columns() { return PANEL; }
extern "C" int rows_at_once() { return ROWS; }

// y1 (n1, c) += K v2, and unless v1 is null y2 (c, n2) += (K^T v1)^T.   w2, b2: of the layers and of the last dense layer.
// x1: (n1, d), and ROWS more rows that are not used.   x2, std2, inverse2, v2, y2: n2 is a multiple of PANEL; v2 is 0 where
// there is no input.
extern "C" void product(int states, long d, long layers, const float* w2, const float* b2, long columns, long n1,
                        const float* x1, const float* std1, const float* inverse1, const double* v1, double* y1, long n2,
                        const float* x2, const float* std2, const float* inverse2, const double* v2, double* y2) {
  const Block one{n1, x1, std1, inverse1, v1, y1}, two{n2, x2, std2, inverse2, v2, y2};
  (states == 2 ? run<2> : run<1>)(d, layers, w2, b2, columns, one, two);
}
