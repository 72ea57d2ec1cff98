// Vectors of the widest register of one instruction set: exp, reductions, dropout bits. Included only by *_simd.cpp
// files, whose namespace keeps the code of the instruction sets apart; for the same reason nothing of the standard
// library is used here (an inline function compiled for AVX-512 could be linked into the baseline).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 intrinsics start from undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace FM_SIMD_NS::attention {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));

template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}

template <class A>
inline Vec<A> max(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// v in the lanes below `count`, -inf above.
template <class A>
inline Vec<A> keep_first(Vec<A> v, int64_t count) {
  using Bits = typename VectorOf<A>::bits;
  Bits index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  using Index = decltype(+index[0]);
  return index < static_cast<Index>(count) ? v : splat(-kInfinity<A>);
}

// exp(x) to about one unit in the last place; 0 below the smallest normal number, NaN for NaN. x = n ln 2 + r with
// |r| <= ln 2 / 2, a Taylor polynomial of exp(r), and 2^n built from its exponent bits.
inline Vec<float> exp(Vec<float> x) {
  using Bits = VectorOf<float>::bits;
  constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec<float> clamped = x < -87.0f ? splat(-87.0f) : (x > 88.0f ? splat(88.0f) : x);
  const Vec<float> shifted = clamped * 1.44269504088896341f + shifter;
  const Vec<float> n = shifted - shifter;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits exponent = ((Bits)shifted + (127 - 0x4B400000)) << 23;
  const Vec<float> y = p * (Vec<float>)exponent;
  return x < -87.0f ? Vec<float>{} : (x > 88.0f ? splat(kInfinity<float>) : y);
}

inline Vec<double> exp(Vec<double> x) {
  using Bits = VectorOf<double>::bits;
  constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> clamped = x < -708.0 ? splat(-708.0) : (x > 709.0 ? splat(709.0) : x);
  const Vec<double> shifted = clamped * 1.4426950408889634074 + shifter;
  const Vec<double> n = shifted - shifter;
  const Vec<double> r = (clamped - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  constexpr double inverse_factorial[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                                          1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800,
                                          1.0 / 479001600, 1.0 / 6227020800.0};
  Vec<double> p = splat(inverse_factorial[13]);
  for (int i = 12; i >= 0; --i) p = p * r + inverse_factorial[i];
  const Bits exponent = ((Bits)shifted + (1023 - 0x4338000000000000LL)) << 52;
  const Vec<double> y = p * (Vec<double>)exponent;
  return x < -708.0 ? Vec<double>{} : (x > 709.0 ? splat(kInfinity<double>) : y);
}

#if defined(__x86_64__)
// The lanes added, or the larger ones kept, until 128 bits are left.
inline __m128 fold_sum(Vec<float> v) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  return (__m128)v;
#endif
}

inline __m128d fold_sum(Vec<double> v) {
#if defined(__AVX512F__)
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
  return _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
#elif defined(__AVX2__)
  return _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
#else
  return (__m128d)v;
#endif
}

inline __m128 fold_max(Vec<float> v) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  return (__m128)v;
#endif
}

inline __m128d fold_max(Vec<double> v) {
#if defined(__AVX512F__)
  const __m256d half = _mm256_max_pd(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
  return _mm_max_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
#elif defined(__AVX2__)
  return _mm_max_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
#else
  return (__m128d)v;
#endif
}

inline float sum_lanes(Vec<float> v) {
  const __m128 four = fold_sum(v);
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline double sum_lanes(Vec<double> v) {
  const __m128d two = fold_sum(v);
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

inline float max_lanes(Vec<float> v) {
  const __m128 four = fold_max(v);
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline double max_lanes(Vec<double> v) {
  const __m128d two = fold_max(v);
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

// out[i] = sum of the lanes of v[i], i < 4.
inline void sum_lanes_of_four(const Vec<float>* v, float* out) {
  __m128 a = fold_sum(v[0]), b = fold_sum(v[1]), c = fold_sum(v[2]), d = fold_sum(v[3]);
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

inline void sum_lanes_of_four(const Vec<double>* v, double* out) {
  const __m128d a = fold_sum(v[0]), b = fold_sum(v[1]), c = fold_sum(v[2]), d = fold_sum(v[3]);
  _mm_storeu_pd(out, _mm_add_pd(_mm_unpacklo_pd(a, b), _mm_unpackhi_pd(a, b)));
  _mm_storeu_pd(out + 2, _mm_add_pd(_mm_unpacklo_pd(c, d), _mm_unpackhi_pd(c, d)));
}
#else
inline float sum_lanes(Vec<float> v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline double sum_lanes(Vec<double> v) { return v[0] + v[1]; }

template <class V>
inline auto max_lanes(V v) {
  auto top = v[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(top); ++i) top = v[i] > top ? v[i] : top;
  return top;
}

template <class V, class A>
inline void sum_lanes_of_four(const V* v, A* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(v[i]);
}
#endif

// The high and low halves of the 64-bit products x * factor.
inline void multiply_wide(VecU32 x, uint32_t factor, VecU32& high, VecU32& low) {
  low = x * factor;
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32((__m512i)x, f);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), f);
  high = (VecU32)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32((__m256i)x, f);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), f);
  high = (VecU32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kLanes<uint32_t>; ++i) {
    high[i] = static_cast<uint32_t>((static_cast<uint64_t>(x[i]) * factor) >> 32);
  }
#endif
}

// Dropout is a pure function of (seed, batch and head, query, key): Philox2x32 with 7 rounds, keyed by the seed and
// the head. Every backend computes the same bits, and the row and column passes of the backward agree.
struct DropoutHead {
  uint32_t key;        // of this batch element and head
  uint32_t threshold;  // keep where the random number is at least this
};

inline VecU32 dropout_random(VecU32 key_token, VecU32 query_token, uint32_t key) {
  VecU32 x0 = key_token, x1 = query_token;
  for (int round = 0; round < 7; ++round) {
    VecU32 high, low;
    multiply_wide(x0, 0xD256D193u, high, low);
    x0 = high ^ key ^ x1;
    x1 = low;
    key += 0x9E3779B9u;
  }
  return x0;
}

// factor[i] = kept ? 1 / (1 - p) : 0 for the pairs of one fixed token with tokens[0..n); both arrays may be read and
// written up to the next multiple of 16.
template <class A>
inline void dropout_factors(A* factor, int n, const uint32_t* tokens, uint32_t fixed, bool tokens_are_keys,
                            DropoutHead head, A inverse_keep) {
  constexpr int lanes = kLanes<uint32_t>;
  for (int i = 0; i < n; i += lanes) {
    VecU32 varying;
    std::memcpy(&varying, tokens + i, sizeof(varying));
    const VecU32 constant = fixed - VecU32{};
    const VecU32 random = tokens_are_keys ? dropout_random(varying, constant, head.key)
                                          : dropout_random(constant, varying, head.key);
    uint32_t lane[lanes];
    std::memcpy(lane, &random, sizeof(random));
    for (int j = 0; j < lanes; ++j) factor[i + j] = lane[j] >= head.threshold ? inverse_keep : A(0);
  }
}

}  // namespace FM_SIMD_NS::attention
