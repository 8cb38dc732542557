// `sere::expert_mlp` on a CPU: each active expert's weights are read from memory once, those of others not at all.
//
// Three phases, each cut into tasks that the threads take in turn:
//   1. act[row]  = activation(gate_up[expert] x[token] + bias)      a row: one token at one of its experts
//   2. outs[row] = (down[expert] act[row] + bias) * weight of the row
//   3. out[token] = sum of its rows, experts in ascending order
// Sums are in fp32. One task computes an element from first to last, in an order that depends on neither the number of
// threads nor the other tokens. Vectors are those of GCC and Clang, so no instruction set is named.
#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// A product and a sum in one instruction.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TOKENS = 4;  // of one tile
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int TOKENS = 2;
#else
constexpr int LANES = 4;
constexpr int TOKENS = 4;
#endif
constexpr int ROWS = 4;                         // of weights, in one tile
constexpr int SUMS = TOKENS * ROWS;             // vectors of sums of one tile, a multiple of LANES
constexpr int AHEAD = 16;                       // rows of weights, as they lie, that are fetched before their use
constexpr int64_t STEP = 64;                    // columns of the activation, or of the result, of one task
constexpr int64_t MOST_ROWS = 64;               // whose first projection is on the stack at once
static_assert(SUMS % LANES == 0 && ROWS == 4);

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Lanes __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// Numbers of any of the three dtypes, one or LANES of them, to fp32 and back.

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  const uint32_t bits = rest << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;  // the exponent's other bias; exact, of subnormal numbers too
  uint32_t result;
  std::memcpy(&result, &value, 4);
  if (rest >= 0x7c00) result = bits | 0x7f800000;  // infinite, or no number
  result |= sign;
  std::memcpy(&value, &result, 4);
  return value;
}

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vector load(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}

inline Vector load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vector v;
  for (int i = 0; i < LANES; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// GCC would load a value again for each product that it is part of, and loads are what such a loop waits for.
inline Vector in_register(Vector v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX__)
  asm("" : "+x"(v));
#endif
  return v;
}

// The first `count` numbers, then zeros.
template <typename W>
inline Vector load_part(const W* p, int64_t count) {
  W padded[LANES] = {};
  std::memcpy(padded, p, count * sizeof(W));
  return load(padded);
}

inline void narrow(float x, float* p) { *p = x; }

inline void narrow(float x, BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline void narrow(float x, Float16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to no finite number
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: the sum's last bit is worth 2^-24
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&half, &value, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(half | sign);
}

// As it is after rounding to D.
template <typename D>
inline float rounded(float x) {
  D narrowed;
  narrow(x, &narrowed);
  return widen(narrowed);
}

#if defined(__clang__)
template <int HIGH, int... I>
inline Vector interleave(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + HIGH * LANES / 2 + (I % 2) * LANES)...);
}
template <int HIGH>
inline Vector interleave(Vector a, Vector b) {
  return interleave<HIGH>(a, b, std::make_integer_sequence<int, LANES>());
}
#else
template <int HIGH>
inline Vector interleave(Vector a, Vector b) {
  Lanes order;
  for (int i = 0; i < LANES; ++i) order[i] = i / 2 + HIGH * LANES / 2 + (i % 2) * LANES;
  return __builtin_shuffle(a, b, order);
}
#endif

// Lane i: the sum of all lanes of v[i].
inline Vector add_lanes(Vector* v) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      v[i] = interleave<0>(v[i], v[i + half]) + interleave<1>(v[i], v[i + half]);
  return v[0];
}

// Weights [experts, outputs, inputs] in any of the layouts that have a step of 1 along outputs or inputs.
struct Matrix {
  const void* data;
  int64_t expert, output, input;  // steps, in elements
  bool rows() const { return input == 1; }
};

// out[t * step + n] = w[n] . x[t] for T tokens and N rows of weights, both up to one tile.
template <typename W, int T>
inline void multiply_rows(const W* w, int64_t step, int N, const float* const* x, int64_t inputs, bool fetch,
                          float* out, int64_t out_step) {
  const W* row[ROWS];
  for (int n = 0; n < ROWS; ++n) row[n] = w + (n < N ? n : 0) * step;
  Vector sums[SUMS] = {};
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) {
    Vector weights[ROWS];
#pragma GCC unroll 4
    for (int n = 0; n < ROWS; ++n) {
      if (fetch) __builtin_prefetch(row[n] + ROWS * step + k, 0, 2);
      weights[n] = load(row[n] + k);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Vector values = in_register(load(x[t] + k));
#pragma GCC unroll 4
      for (int n = 0; n < ROWS; ++n) sums[t * ROWS + n] += weights[n] * values;
    }
  }
  if (k < inputs)
    for (int t = 0; t < T; ++t)
      for (int n = 0; n < ROWS; ++n)
        sums[t * ROWS + n] += load_part(row[n] + k, inputs - k) * load_part(x[t] + k, inputs - k);
  alignas(64) float values[SUMS];
  for (int i = 0; i < SUMS; i += LANES) {
    const Vector added = add_lanes(sums + i);
    std::memcpy(values + i, &added, sizeof added);
  }
  for (int t = 0; t < T; ++t)
    for (int n = 0; n < N; ++n) out[t * out_step + n] = values[t * ROWS + n];
}

// The same for weights whose outputs lie side by side: `columns` of them, N vectors, the last of which may be a part.
template <typename W, int T, int N>
inline void multiply_columns(const W* w, int64_t step, int64_t columns, const float* const* x, int64_t inputs,
                             bool fetch, float* out, int64_t out_step) {
  const bool whole = columns == N * LANES;
  Vector sums[T * N] = {};
  for (int64_t k = 0; k < inputs; ++k) {
    Vector weights[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const W* p = w + k * step + n * LANES;
      if (fetch) __builtin_prefetch(p + AHEAD * step, 0, 2);
      weights[n] = whole || n < N - 1 ? load(p) : load_part(p, columns - n * LANES);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[t * N + n] += weights[n] * x[t][k];
  }
  for (int t = 0; t < T; ++t) std::memcpy(out + t * out_step, sums + t * N, columns * sizeof(float));
}

template <typename W>
using Tile = void (*)(const W*, int64_t, int, const float* const*, int64_t, bool, float*, int64_t);

template <typename W, int T>
void tile(const W* w, int64_t step, int N, const float* const* x, int64_t inputs, bool fetch, float* out, int64_t s) {
  fetch ? multiply_rows<W, T>(w, step, N, x, inputs, true, out, s)
        : multiply_rows<W, T>(w, step, N, x, inputs, false, out, s);
}

template <typename W, int T>
void tile_of_columns(const W* w, int64_t step, int N, const float* const* x, int64_t inputs, bool fetch, float* out,
                     int64_t s) {
  switch ((N + LANES - 1) / LANES) {
    case 1: return multiply_columns<W, T, 1>(w, step, N, x, inputs, fetch, out, s);
    case 2: return multiply_columns<W, T, 2>(w, step, N, x, inputs, fetch, out, s);
    case 3: return multiply_columns<W, T, 3>(w, step, N, x, inputs, fetch, out, s);
    default: return multiply_columns<W, T, 4>(w, step, N, x, inputs, fetch, out, s);
  }
}

// out[t * out_step + n - first] = weights[expert, n] . x[t] for n in [first, last) and `tokens` rows of x.
template <typename W>
void multiply(const Matrix& m, int64_t expert, int64_t first, int64_t last, const float* const* x, int64_t tokens,
              int64_t inputs, float* out, int64_t out_step) {
  static const Tile<W> of_rows[] = {tile<W, 1>, tile<W, 2>, tile<W, TOKENS == 4 ? 3 : 1>, tile<W, TOKENS>};
  static const Tile<W> of_columns[] = {tile_of_columns<W, 1>, tile_of_columns<W, 2>,
                                       tile_of_columns<W, TOKENS == 4 ? 3 : 1>, tile_of_columns<W, TOKENS>};
  const W* w = (const W*)m.data + expert * m.expert;
  const Tile<W>* tiles = m.rows() ? of_rows : of_columns;
  const int64_t step = m.rows() ? m.output : m.input, width = m.rows() ? ROWS : ROWS * LANES;
  for (int64_t n = first; n < last; n += width) {
    const int64_t count = last - n < width ? last - n : width;
    for (int64_t t = 0; t < tokens; t += TOKENS) {
      const int64_t some = tokens - t < TOKENS ? tokens - t : TOKENS;
      // The first pass over these rows fetches the next ones, while it waits for nothing.
      tiles[some - 1](w + n * m.output, step, int(count), x + t, inputs, t == 0,
                      out + t * out_step + n - first, out_step);
    }
  }
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// By `activation_number` in reference.py.
enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, GPT_OSS };

inline float activate(int activation, float x) {
  switch (activation) {
    case SILU: return x * sigmoid(x);
    case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * x * (1 + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case RELU: return x < 0 ? 0 : x;
    default: return x < 0 ? 0 : x * x;
  }
}

inline float clamp(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

inline float activate(int activation, float gate, float up) {
  if (activation != GPT_OSS) return activate(activation, gate) * up;
  gate = gate > 7 ? 7 : gate;
  return (clamp(up, -7, 7) + 1) * (gate * sigmoid(gate * 1.702f));
}

struct Layer {
  const void* hidden;        // [tokens, width]
  int64_t hidden_row, hidden_column;
  const int64_t* ids;        // [tokens, slots]
  const float* slot_weights; // [tokens, slots]
  Matrix gate_up, down;
  const void *gate_up_bias, *down_bias;  // [experts, gates * inner], [experts, width], or null
  void* out;                 // [tokens, width]
  int64_t tokens, slots, experts, width, inner;
  int32_t activation, gated, interleaved, threads;
};

// Which tokens go to which expert. A token that names an expert twice is one row with both weights.
struct Plan {
  std::vector<int64_t> experts, first_row;           // active ones, ascending; where their rows begin, and the end
  std::vector<int64_t> token;                        // of each row
  std::vector<float> weight;                         // of each row
  std::vector<int64_t> first_of_token, row_of_token; // rows of each token, ascending

  explicit Plan(const Layer& l) : first_of_token(l.tokens + 1, 0) {
    std::vector<int64_t> start(l.experts + 1, 0), last(l.experts, -1);
    const int64_t count = l.tokens * l.slots;
    for (int64_t s = 0; s < count; ++s)
      if (names(l, s) && last[l.ids[s]] != s / l.slots) {
        last[l.ids[s]] = s / l.slots;
        ++start[l.ids[s] + 1];
        ++first_of_token[s / l.slots + 1];
      }
    for (int64_t e = 0; e < l.experts; ++e) {
      if (start[e + 1] > 0) {
        experts.push_back(e);
        first_row.push_back(start[e]);
      }
      start[e + 1] += start[e];
    }
    first_row.push_back(start[l.experts]);
    token.assign(start[l.experts], -1);
    weight.assign(start[l.experts], 0);
    for (int64_t s = 0; s < count; ++s) {
      if (!names(l, s)) continue;
      // Slots come token by token: the expert's last row is this token's, or it gets a new one.
      int64_t& next = start[l.ids[s]];
      const int64_t t = s / l.slots;
      const bool again = last[l.ids[s]] == -2 - t;
      last[l.ids[s]] = -2 - t;
      const int64_t row = again ? next - 1 : next++;
      token[row] = t;
      weight[row] += l.slot_weights[s];
    }
    for (int64_t t = 0; t < l.tokens; ++t) first_of_token[t + 1] += first_of_token[t];
    row_of_token.resize(token.size());
    std::vector<int64_t> place(first_of_token.begin(), first_of_token.end() - 1);
    for (size_t row = 0; row < token.size(); ++row) row_of_token[place[token[row]]++] = int64_t(row);
  }

  static bool names(const Layer& l, int64_t slot) { return l.ids[slot] >= 0 && l.ids[slot] < l.experts; }
};

template <typename D>
inline float bias_of(const void* bias, int64_t index) {
  return bias == nullptr ? 0 : widen(((const D*)bias)[index]);
}

template <typename D>
class Experts {
 public:
  explicit Experts(const Layer& layer)
      : l(layer), plan(layer), x(l.tokens * l.width), act(plan.token.size() * l.inner),
        outs(plan.token.size() * l.width) {}

  void run() {
    const int64_t rows = int64_t(plan.experts.size());
    const int64_t inner_tasks = tasks(l.inner, STEP), width_tasks = tasks(l.width, STEP);
    std::atomic<int64_t> first{0}, second{0};
    // By one thread: little work, and where other programs run a barrier waits for a thread that has no core.
    for (int64_t t = 0; t < l.tokens; ++t) widen_token(t);
#pragma omp parallel num_threads(l.threads)
    {
      for (int64_t i; (i = first.fetch_add(1)) < rows * inner_tasks;)
        up(i / inner_tasks, i % inner_tasks * STEP);
#pragma omp barrier
      for (int64_t i; (i = second.fetch_add(1)) < rows * width_tasks;)
        down(i / width_tasks, i % width_tasks * STEP);
#pragma omp barrier
#pragma omp for nowait
      for (int64_t t = 0; t < l.tokens; ++t) sum(t);
    }
  }

 private:
  static int64_t tasks(int64_t size, int64_t step) { return (size + step - 1) / step; }
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  void widen_token(int64_t t) {
    const D* row = (const D*)l.hidden + t * l.hidden_row;
    for (int64_t i = 0; i < l.width; ++i) x[t * l.width + i] = widen(row[i * l.hidden_column]);
  }

  // Columns [begin, begin + STEP) of the activation, for all rows of one active expert.
  void up(int64_t index, int64_t begin) {
    const int64_t expert = plan.experts[index], end = least(begin + STEP, l.inner), columns = end - begin;
    const int64_t gates = l.gated ? 2 : 1, step = gates * STEP;
    float projected[MOST_ROWS * 2 * STEP];
    const float* inputs[MOST_ROWS];
    for (int64_t row = plan.first_row[index]; row < plan.first_row[index + 1]; row += MOST_ROWS) {
      const int64_t count = least(MOST_ROWS, plan.first_row[index + 1] - row);
      for (int64_t r = 0; r < count; ++r) inputs[r] = &x[plan.token[row + r] * l.width];
      if (l.interleaved) {
        multiply<D>(l.gate_up, expert, gates * begin, gates * end, inputs, count, l.width, projected, step);
      } else {
        multiply<D>(l.gate_up, expert, begin, end, inputs, count, l.width, projected, step);
        if (l.gated)
          multiply<D>(l.gate_up, expert, l.inner + begin, l.inner + end, inputs, count, l.width,
                      projected + STEP, step);
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < columns; ++c)
          act[(row + r) * l.inner + begin + c] = rounded<D>(activated(expert, begin + c, c, projected + r * step));
    }
  }

  float activated(int64_t expert, int64_t column, int64_t c, const float* projected) const {
    const int64_t bias = expert * l.inner * (l.gated ? 2 : 1);
    if (!l.gated) return activate(l.activation, projected[c] + bias_of<D>(l.gate_up_bias, bias + column));
    const int64_t gate = l.interleaved ? 2 * column : column, up = l.interleaved ? gate + 1 : l.inner + column;
    return activate(l.activation,
                    projected[l.interleaved ? 2 * c : c] + bias_of<D>(l.gate_up_bias, bias + gate),
                    projected[l.interleaved ? 2 * c + 1 : STEP + c] + bias_of<D>(l.gate_up_bias, bias + up));
  }

  // Columns [begin, begin + STEP) of what all rows of one active expert give.
  void down(int64_t index, int64_t begin) {
    const int64_t expert = plan.experts[index], end = least(begin + STEP, l.width);
    const float* inputs[MOST_ROWS];
    for (int64_t row = plan.first_row[index]; row < plan.first_row[index + 1]; row += MOST_ROWS) {
      const int64_t count = least(MOST_ROWS, plan.first_row[index + 1] - row);
      for (int64_t r = 0; r < count; ++r) inputs[r] = &act[(row + r) * l.inner];
      multiply<D>(l.down, expert, begin, end, inputs, count, l.inner, &outs[row * l.width + begin], l.width);
      for (int64_t r = row; r < row + count; ++r)
        for (int64_t c = begin; c < end; ++c)
          outs[r * l.width + c] = (outs[r * l.width + c] + bias_of<D>(l.down_bias, expert * l.width + c)) *
                                  plan.weight[r];
    }
  }

  void sum(int64_t t) {
    D* out = (D*)l.out + t * l.width;
    float total[LANES];
    for (int64_t begin = 0; begin < l.width; begin += LANES) {
      const int64_t count = least(LANES, l.width - begin);
      for (int64_t c = 0; c < LANES; ++c) total[c] = 0;
      for (int64_t i = plan.first_of_token[t]; i < plan.first_of_token[t + 1]; ++i)
        for (int64_t c = 0; c < count; ++c) total[c] += outs[plan.row_of_token[i] * l.width + begin + c];
      for (int64_t c = 0; c < count; ++c) narrow(total[c], out + begin + c);
    }
  }

  const Layer& l;
  Plan plan;
  // Written before they are read: no zeros are needed.
  struct Buffer {
    float* data;
    explicit Buffer(int64_t count) : data(new float[count]) {}
    ~Buffer() { delete[] data; }
    Buffer(const Buffer&) = delete;
    float& operator[](int64_t i) const { return data[i]; }
  } x, act, outs;
};

}  // namespace

// 0, or 1 where there is no memory. dtype, of hidden, weights, biases and out: 0 fp32, 1 bf16, 2 fp16.
extern "C" int sere_expert_mlp(const Layer* layer, int dtype) {
  try {
    switch (dtype) {
      case 0: Experts<float>(*layer).run(); break;
      case 1: Experts<BFloat16>(*layer).run(); break;
      default: Experts<Float16>(*layer).run();
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
