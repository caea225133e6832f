// Fused optimizer steps on the CPU, called from __init__.py through ctypes; no header of torch's.
//
// Vectors are written out (GCC's and clang's vector types) instead of left to the vectorizer: an
// update is one long chain of dependent operations, whose latency is hidden only where several
// vectors go through it side by side, and GCC turns a clamp into masks. Every element goes
// through the same instructions, those of a tail in a padded copy.
//
// The arithmetic is that of megatron_s3/rules: single IEEE operations, none contracted
// (-ffp-contract=off), so that the results are the same bits.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // floats in a register
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
#if defined(__AVX512F__)
constexpr int LANES = 4;  // registers side by side; there are 32
#else
constexpr int LANES = 2;
#endif
constexpr int BLOCK = WIDTH * LANES;
constexpr int64_t CHUNK = 1 << 16;  // elements to a row of statistics

typedef float Float __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Int __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));  // whose sums may overflow
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Byte __attribute__((vector_size(WIDTH)));
typedef Float Floats[LANES];

#define INLINE static inline __attribute__((always_inline))
#define EACH for (int k = 0; k < LANES; ++k)

// FRACTION and REMAINDER: int8 and int16, see megatron_s3/kernels/compact.py.
enum Dtype : int64_t { NONE, FLOAT32, BFLOAT16, FLOAT16, FRACTION, REMAINDER };

// What operands.py has of each tensor and the step's table has, all fields of 8 bytes.
struct Array {
  char* data;
  Dtype dtype;
};

struct Operands {
  Array grad;
  int64_t count;
  Array param, model_param, state[4];  // a rule has its first STATES states
};

// Begins every rule's Scalars.
struct Rates {
  float lr, decay, seed;
};

#include "declarations.h"  // made from the rules' KernelForms

INLINE int64_t size_of(Dtype dtype) {
  return dtype == NONE ? 0 : dtype == FLOAT32 ? 4 : dtype == FRACTION ? 1 : 2;
}

// ---- loading and storing -----------------------------------------------------------------------

template <class T>
INLINE T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
INLINE void write(char* to, const T& value) {
  std::memcpy(to, &value, sizeof value);
}

// ---- what compilers make too much of by themselves ----------------------------------------------

// b < a ? b : a and b > a ? b : a, so that a NaN in a stays.
#if defined(__AVX512F__)
INLINE Float at_most(const Float& a, const Float& b) {
  return (Float)_mm512_min_ps((__m512)b, (__m512)a);
}
INLINE Float at_least(const Float& a, const Float& b) {
  return (Float)_mm512_max_ps((__m512)b, (__m512)a);
}
INLINE Int widened(const Half& bits) { return (Int)_mm512_cvtepu16_epi32((__m256i)bits); }
INLINE Half narrowed(const Int& bits) { return (Half)_mm512_cvtepi32_epi16((__m512i)bits); }
INLINE Float root(const Float& x) { return (Float)_mm512_sqrt_ps((__m512)x); }
#else
INLINE Float at_most(const Float& a, const Float& b) { return b < a ? b : a; }
INLINE Float at_least(const Float& a, const Float& b) { return b > a ? b : a; }
INLINE Int widened(const Half& bits) { return __builtin_convertvector(bits, Int); }
INLINE Half narrowed(const Int& bits) { return __builtin_convertvector(bits, Half); }
INLINE Float root(const Float& x) {
  Float y;
  for (int j = 0; j < WIDTH; ++j) y[j] = __builtin_sqrtf(x[j]);
  return y;
}
#endif

// ---- dtypes --------------------------------------------------------------------------------------

INLINE Float from_bfloat16(const Half& bits) { return (Float)(widened(bits) << 16); }

// Round to nearest even. A NaN is only cut off, its quiet bit stays: arithmetic makes no other.
INLINE Half to_bfloat16(const Float& x) {
  const Int bits = (Int)x;
  const Int up = (x == x) & (((bits >> 16) & 1) + 0x7fff);
  return narrowed((bits + up) >> 16);
}

// Whether the CPU's own instruction has written them: it rounds as above, but takes denormals for 0.
INLINE bool write_bfloat16(char* to, const Floats& values) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
  constexpr int DENORMAL = 0x20;
  __mmask16 denormal = 0;
  EACH denormal |= _mm512_fpclass_ps_mask((__m512)values[k], DENORMAL);
  if (denormal) return false;
  EACH write(to + k * sizeof(Half), _mm512_cvtneps_pbh((__m512)values[k]));
  return true;
#else
  return false;
#endif
}

INLINE Float from_float16(const Half& half) {
  const Int bits = widened(half);
  const Int magnitude = bits & 0x7fff;
  Int wide = (magnitude << 13) + 0x38000000;
  wide = magnitude > 0x7bff ? (magnitude << 13) | 0x7f800000 : wide;  // inf, NaN
  const Float denormal = __builtin_convertvector(magnitude, Float) * 0x1p-24f;
  wide = magnitude < 0x0400 ? (Int)denormal : wide;
  return (Float)(wide | ((bits & 0x8000) << 16));
}

// Round to nearest even, denormals too; what rounds to 65536 or more is inf.
INLINE Half to_float16(const Float& x) {
  const Int magnitude = (Int)x & 0x7fffffff;
  Int half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  half = magnitude > 0x477fffff ? Int{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Int{} + 0x7e00 : half;
  const Int denormal = (Int)((Float)magnitude + 0.5f) - 0x3f000000;  // the addition rounds
  half = magnitude < 0x38800000 ? denormal : half;
  return narrowed(half | (((Int)x >> 16) & 0x8000));
}

// The dtype is the same for all of a tensor: a branch that costs nothing.
INLINE void load(Floats& out, const Array& array, int64_t i) {
  const char* from = array.data + i * size_of(array.dtype);
  if (array.dtype == FLOAT32) {
    EACH out[k] = read<Float>(from + k * sizeof(Float));
  } else if (array.dtype == BFLOAT16) {
    EACH out[k] = from_bfloat16(read<Half>(from + k * sizeof(Half)));
  } else {
    EACH out[k] = from_float16(read<Half>(from + k * sizeof(Half)));
  }
}

INLINE void store(const Array& array, int64_t i, const Floats& values) {
  char* to = array.data + i * size_of(array.dtype);
  if (array.dtype == FLOAT32) {
    EACH write(to + k * sizeof(Float), values[k]);
  } else if (array.dtype == BFLOAT16) {
    if (!write_bfloat16(to, values)) EACH write(to + k * sizeof(Half), to_bfloat16(values[k]));
  } else if (array.dtype == FLOAT16) {
    EACH write(to + k * sizeof(Half), to_float16(values[k]));
  }
}

// ---- fewer bytes: megatron_s3/kernels/compact.py -------------------------------------------------

constexpr float LARGEST = 127;

INLINE void load_fractions(Floats& out, const Array& array, int64_t i, const Floats& whole) {
  const char* from = array.data + i;
  EACH {
    const Byte codes = read<Byte>(from + k * sizeof(Byte));
    out[k] = __builtin_convertvector(__builtin_convertvector(codes, Int), Float);
    out[k] = out[k] * (1 / LARGEST) * whole[k];
  }
}

INLINE Bits mixed(Bits h, int shift, uint32_t factor) { return (h ^ (h >> shift)) * factor; }

// Odd multiples of 2**-17 in (0, 1).
INLINE Float noise(const Float& grad, const Float& whole, float seed) {
  Bits h = (Bits)grad * 0x9e3779b1 ^ (Bits)whole * 0x85ebca6b;
  h ^= uint32_t(seed) * 0xc2b2ae35;
  h = mixed(mixed(h, 15, 0x7feb352d), 15, 0x846ca68b);
  h = (h ^ (h >> 16)) >> 16;
  return (__builtin_convertvector((Int)h, Float) + 0.5f) * 0x1p-16f;
}

INLINE Float floor(const Float& x) {
  const Int cut = __builtin_convertvector(x, Int);
  return __builtin_convertvector(cut + (__builtin_convertvector(cut, Float) > x), Float);
}

// whole: as it is stored.
INLINE void store_fractions(const Array& array, int64_t i, const Floats& values,
                            const Floats& whole, const Floats& noise) {
  char* to = array.data + i;
  EACH {
    Float x = values[k] / whole[k] * LARGEST;
    x = (Float)((Int)x & (x == x) & (whole[k] != 0.0f));
    x = at_least(at_most(x, Float{} + LARGEST), Float{} - LARGEST);
    x = floor(x + noise[k]);  // the sum is below 128
    write(to + k * sizeof(Byte), __builtin_convertvector(__builtin_convertvector(x, Int), Byte));
  }
}

// States in bfloat16 have no denormal numbers.
INLINE void flush(Floats& values) {
  EACH values[k] = (Float)((Int)values[k] & ~(((Int)values[k] & 0x7fffffff) < 0x00800000));
}

INLINE void load_joined(Floats& out, const Array& high, const Array& low, int64_t i) {
  EACH {
    const int64_t at = (i + k * WIDTH) * 2;
    const Bits upper = (Bits)widened(read<Half>(high.data + at)) << 16;
    const Int lower = (Int)((Bits)widened(read<Half>(low.data + at)) << 16) >> 16;
    out[k] = (Float)(upper + (Bits)lower);
  }
}

INLINE void store_split(const Array& high, const Array& low, int64_t i, const Floats& values) {
  EACH {
    const int64_t at = (i + k * WIDTH) * 2;
    const Bits bits = (Bits)values[k];
    const Int number = values[k] == values[k];
    const Bits upper = number ? (bits + 0x8000) >> 16 : bits >> 16 | 0x40;
    write(high.data + at, narrowed((Int)upper));
    write(low.data + at, narrowed((Int)bits & number));
  }
}

// ---- what rules are made of ----------------------------------------------------------------------

// w**(-1/3), relative error below 1e-7 for w in [2**-66, 2**7]: a third of the bits is a first
// guess, one polynomial step does the rest.
INLINE void inverse_cube_root(Floats& y, const Floats& w) {
  Floats c, q;
  EACH y[k] = __builtin_convertvector((Int)w[k], Float);
  EACH y[k] = 1419900000.0f - y[k] * 0.3333333432674408f;
  EACH y[k] = (Float)__builtin_convertvector(y[k], Int);
  EACH c[k] = w[k] * y[k];
  EACH c[k] = c[k] * y[k];
  EACH c[k] = c[k] * y[k];
  EACH c[k] = 1.0f - c[k];
  EACH q[k] = 0.12691685557365417f * c[k] + 0.14565744996070862f;
  EACH q[k] = q[k] * c[k] + 0.17282718420028687f;
  EACH q[k] = q[k] * c[k] + 0.22221696376800537f;
  EACH q[k] = q[k] * c[k] + 0.3333333432674408f;
  EACH c[k] = y[k] * c[k];
  EACH c[k] = c[k] * q[k];
  EACH y[k] = y[k] + c[k];
}

template <int P>
INLINE void power(Floats& x) {
  Floats y;
  if (P == 2) EACH x[k] = x[k] * x[k];
  if (P == 3) EACH y[k] = x[k] * x[k];
  if (P == 3) EACH x[k] = y[k] * x[k];
}

// 0 of 0 and of NaN, as torch's.
INLINE Float sign(const Float& x) {
  const Float zero = {};
  return __builtin_convertvector((x < zero) - (x > zero), Float);
}

INLINE void average(Floats& of, float beta, float one_minus_beta, const Floats& x) {
  Floats share;
  EACH share[k] = one_minus_beta * x[k];
  EACH of[k] = beta * of[k] + share[k];
}

// ---- what every rule shares ---------------------------------------------------------------------

typedef double Double __attribute__((vector_size(4 * WIDTH)));  // half as many as in a Float

INLINE Float magnitude(const Float& x) { return (Float)((Int)x & 0x7fffffff); }
INLINE Float without_nan(const Float& x) { return (Float)((Int)x & (x == x)); }

typedef Double Doubles[2];

INLINE void widen(Doubles& wide, const Float& x) {
#if defined(__AVX512F__)
  wide[0] = (Double)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  wide[1] = (Double)_mm512_cvtps_pd((__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
#else
  typedef float HalfOf __attribute__((vector_size(2 * WIDTH)));
  HalfOf halves[2];
  std::memcpy(halves, &x, sizeof halves);
  for (int h = 0; h < 2; ++h) wide[h] = __builtin_convertvector(halves[h], Double);
#endif
}

INLINE void add_to(Doubles& sums, const Float& x) {
  Doubles wide;
  widen(wide, x);
  for (int h = 0; h < 2; ++h) sums[h] = sums[h] + wide[h];
}

// Squares may be too small or too large for a float.
INLINE void add_squares(Doubles& sums, const Float& x) {
  Doubles wide;
  widen(wide, x);
  for (int h = 0; h < 2; ++h) sums[h] = sums[h] + wide[h] * wide[h];
}

// megatron_s3/kernels/statistics.py. One accumulator a lane of a register, sums in double.
struct Statistics {
  static constexpr int FIELDS = 8;
  Doubles sum_abs_update = {}, sum_sq_update = {}, sum_sq_param = {}, sum_sq_grad = {};
  Float max_abs_update = {};
  Int large_updates = {}, zero_grads = {}, nonfinite_grads = {};
  int padding = 0;  // zeros among zero_grads that are no elements

  // The first `count` elements of a block.
  __attribute__((noinline)) void add_some(Floats& update, Floats& grad, Floats& param, int count) {
    const int bytes = 4 * count;
    for (Floats* values : {&update, &grad, &param}) {
      std::memset((char*)values + bytes, 0, sizeof(Floats) - bytes);
    }
    padding += BLOCK - count;
    add(update, grad, param);
  }

  inline __attribute__((always_inline)) void add(const Floats& update, const Floats& grad,
                                                 const Floats& param) {
    EACH {
      const Float u = without_nan(magnitude(update[k]));
      const Int finite = magnitude(grad[k]) < __builtin_inff();
      add_to(sum_abs_update, u);
      add_squares(sum_sq_update, u);
      max_abs_update = max_abs_update < u ? u : max_abs_update;
      large_updates -= u > 0.9f;
      zero_grads -= grad[k] == 0.0f;
      nonfinite_grads += finite + 1;
      add_squares(sum_sq_grad, (Float)((Int)grad[k] & finite));
      add_squares(sum_sq_param, without_nan(param[k]));
    }
  }

  void write_row(double* row) const {
    for (int f = 0; f < FIELDS; ++f) row[f] = 0;
    for (int j = 0; j < WIDTH; ++j) {
      const int h = j / (WIDTH / 2), i = j % (WIDTH / 2);
      row[0] += sum_abs_update[h][i];
      row[1] = row[1] < max_abs_update[j] ? max_abs_update[j] : row[1];
      row[2] += sum_sq_update[h][i];
      row[3] += large_updates[j];
      row[4] += sum_sq_param[h][i];
      row[5] += sum_sq_grad[h][i];
      row[6] += zero_grads[j];
      row[7] += nonfinite_grads[j];
    }
    row[6] -= padding;
  }
};

template <int STATES>
INLINE void load_state(Floats (&state)[STATES], const Operands& o, int64_t i, int j) {
  if (j + 1 < STATES && o.state[j].dtype == FRACTION) {
    load_fractions(state[j], o.state[j], i, state[j + 1]);
  } else {
    load(state[j], o.state[j], i);
  }
}

// The state after it has been stored, and is as it was before it was rounded.
template <int STATES>
INLINE void store_state(Floats (&state)[STATES], const Operands& o, int64_t i, int j,
                        const Floats& grad, float seed) {
  if (j + 1 < STATES && o.state[j].dtype == FRACTION) {
    Floats whole, random;
    EACH random[k] = noise(grad[k], state[j + 1][k], seed);
    load(whole, o.state[j + 1], i);
    store_fractions(o.state[j], i, state[j], whole, random);
  } else {
    Floats stored;
    EACH stored[k] = state[j][k];
    if (o.state[j].dtype == BFLOAT16) flush(stored);
    store(o.state[j], i, stored);
  }
}

// Elements from begin to end, whole blocks; of a block `count` elements enter the statistics.
template <class Rule>
__attribute__((noinline)) void blocks(const Operands& operands, int64_t begin, int64_t end,
                                      const float* scalars, Statistics* statistics, int count) {
  const Operands o = operands;
  const auto s = read<typename Rule::Scalars>((const char*)scalars);
  for (int64_t i = begin; i < end; i += BLOCK) {
    Floats g, x, u, state[Rule::STATES];
    load(g, o.grad, i);
#pragma GCC unroll 4
    for (int j = Rule::STATES - 1; j >= 0; --j) load_state(state, o, i, j);
    Rule::update(u, state, g, s);
#pragma GCC unroll 4
    for (int j = Rule::STATES - 1; j >= 0; --j) store_state(state, o, i, j, g, s.seed);
    if (o.param.dtype == REMAINDER) {
      load_joined(x, o.model_param, o.param, i);
      EACH x[k] = x[k] * s.decay - s.lr * u[k];
      store_split(o.model_param, o.param, i, x);
    } else {
      load(x, o.param, i);
      EACH x[k] = x[k] * s.decay - s.lr * u[k];
      store(o.param, i, x);
      if (o.model_param.dtype != NONE) store(o.model_param, i, x);
    }
    if (statistics && count == BLOCK) statistics->add(u, g, x);
    if (statistics && count < BLOCK) statistics->add_some(u, g, x, count);
  }
}

template <class Rule>
void chunk(const Operands& o, int64_t begin, int64_t end, const float* scalars,
           Statistics* statistics) {
  const int64_t whole = end - (end - begin) % BLOCK;
  blocks<Rule>(o, begin, whole, scalars, statistics, BLOCK);
  if (whole == end) return;

  constexpr int ARRAYS = 3 + Rule::STATES;
  alignas(64) char padded[ARRAYS][BLOCK * 4] = {};
  Operands tail = o;
  Array* arrays[ARRAYS] = {&tail.param, &tail.grad, &tail.model_param};
  for (int j = 0; j < Rule::STATES; ++j) arrays[3 + j] = &tail.state[j];
  char* at[ARRAYS];
  int64_t bytes[ARRAYS];
  for (int a = 0; a < ARRAYS; ++a) {
    const int64_t size = size_of(arrays[a]->dtype);
    at[a] = arrays[a]->data + whole * size;
    bytes[a] = (end - whole) * size;
    if (bytes[a]) std::memcpy(padded[a], at[a], bytes[a]);
    arrays[a]->data = padded[a];
  }
  blocks<Rule>(tail, 0, BLOCK, scalars, statistics, int(end - whole));
  for (int a = 0; a < ARRAYS; ++a) {
    if (bytes[a] && arrays[a] != &tail.grad) std::memcpy(at[a], padded[a], bytes[a]);
  }
}

typedef void (*Chunk)(const Operands&, int64_t, int64_t, const float*, Statistics*);

// Denormals are numbers here, whatever some library or thread has set (flush to zero).
struct IeeeArithmetic {
#ifdef __x86_64__
  unsigned saved = _mm_getcsr();
  IeeeArithmetic() { _mm_setcsr(0x1f80); }
  ~IeeeArithmetic() { _mm_setcsr(saved); }
#endif
};

}  // namespace

#include "rules.h"  // the plugin's, or another's

extern "C" {

int64_t chunk_elements() { return CHUNK; }

// Every chunk whose first element, counted over all operands, lies in [begin, end).
// scalars: the rule's. rows: one of eight doubles for every chunk of all operands, or null.
void step(Chunk chunk, const Operands* operands, int64_t count, int64_t begin, int64_t end,
          const float* scalars, double* rows) {
  const IeeeArithmetic ieee;
  int64_t before = 0, row = 0;
  for (int64_t t = 0; t < count; before += operands[t].count, ++t) {
    const int64_t n = operands[t].count;
    if (before + n <= begin || before >= end) {
      row += (n + CHUNK - 1) / CHUNK;
      continue;
    }
    for (int64_t i = 0; i < n; i += CHUNK, ++row) {
      if (before + i < begin || before + i >= end) continue;
      const int64_t stop = i + CHUNK < n ? i + CHUNK : n;
      if (rows) {
        Statistics statistics;
        chunk(operands[t], i, stop, scalars, &statistics);
        statistics.write_row(rows + Statistics::FIELDS * row);
      } else {
        chunk(operands[t], i, stop, scalars, nullptr);
      }
    }
  }
}
}
