// What both files take of AVX-512: compiled for it whatever the compiler's target is, and called where the processor has it.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <cstdint>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

constexpr int64_t LANES = 16;  // of 32 bits

// Which lanes to take of `left` numbers.
inline __mmask16 lanes_left(int64_t left) { return left >= LANES ? 0xFFFF : static_cast<__mmask16>((1 << left) - 1); }

// As they are, or rounded to bfloat16.
AVX512 inline void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
AVX512 inline void store(at::BFloat16* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

// Lane j of vector i becomes lane i of vector j: halves of ever larger groups of lanes change places.
AVX512 inline void transpose(__m512i (&vectors)[LANES]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int64_t half = 1; half < LANES; half *= 2) {
    const __m512i distance = _mm512_set1_epi32(static_cast<int>(half));
    const __mmask16 upper = _mm512_test_epi32_mask(lane, distance);
    // Lanes of the second vector are numbered from 16.
    const __m512i from_second = _mm512_sub_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(LANES)), distance);
    const __m512i to_first = _mm512_mask_mov_epi32(lane, upper, from_second);
    const __m512i to_second = _mm512_mask_mov_epi32(_mm512_add_epi32(lane, distance), upper,
                                                    _mm512_add_epi32(lane, _mm512_set1_epi32(LANES)));
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) {
      if (i & half) continue;
      const __m512i first = vectors[i], second = vectors[i + half];
      vectors[i] = _mm512_permutex2var_epi32(first, to_first, second);
      vectors[i + half] = _mm512_permutex2var_epi32(first, to_second, second);
    }
  }
}
