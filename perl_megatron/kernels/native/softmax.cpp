// One tile of logits: added to the sums of its tokens, or turned into its gradient, in one pass each (AVX-512).
//
// What is computed is defined in ../sums.py (Sums) and ../fused.py (Coefficients). A row's sums are added up in one fixed
// order, whatever other rows there are.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "vectors.h"

namespace {

// exp(x) for x ≤ 0, to a relative 2e-7: 2^n · a polynomial of degree 6 (Cody & Waite's reduction). NaN stays NaN.
AVX512 inline __m512 exponential(__m512 x) {
  const __mmask16 vanishes = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-103.97f), _CMP_LT_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
  }
  return _mm512_mask_blend_ps(vanishes, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

struct RowSums {
  float maximum, total, weighted;
};

AVX512 RowSums add_row(const float* z, int64_t columns, RowSums sums, bool entropy) {
  __m512 highest = _mm512_set1_ps(sums.maximum);
  for (int64_t n = 0; n < columns; n += LANES) {
    const __mmask16 mask = lanes_left(columns - n);
    highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_maskz_loadu_ps(mask, z + n));
  }
  const float maximum = _mm512_reduce_max_ps(highest);
  const __m512 shift = _mm512_set1_ps(maximum);
  __m512 total = _mm512_setzero_ps(), weighted = _mm512_setzero_ps();
  for (int64_t n = 0; n < columns; n += LANES) {
    const __mmask16 mask = lanes_left(columns - n);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, z + n), shift);
    const __m512 e = exponential(x);
    total = _mm512_mask_add_ps(total, mask, total, e);
    weighted = _mm512_mask_add_ps(weighted, mask, weighted, _mm512_mul_ps(e, x));
  }
  const float change = sums.maximum - maximum, decay = std::exp(change);
  RowSums result{maximum, sums.total * decay + _mm512_reduce_add_ps(total), 0.0f};
  if (entropy) {
    result.weighted = (sums.weighted + sums.total * change) * decay + _mm512_reduce_add_ps(weighted);
  }
  return result;
}

void add_tile(const at::Tensor& z, const at::Tensor& column, at::Tensor maximum, at::Tensor total, at::Tensor weighted,
              at::Tensor target, bool entropy) {
  const int64_t rows = z.size(0), columns = z.size(1), stride = z.stride(0);
  const float* from = z.const_data_ptr<float>();
  const int64_t* at = column.const_data_ptr<int64_t>();
  float *m = maximum.mutable_data_ptr<float>(), *s = total.mutable_data_ptr<float>();
  float *a = weighted.mutable_data_ptr<float>(), *t = target.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 16, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const float* row = from + i * stride;
      if (at[i] >= 0 && at[i] < columns) t[i] += row[at[i]];
      const RowSums sums = add_row(row, columns, {m[i], s[i], a[i]}, entropy);
      m[i] = sums.maximum;
      s[i] = sums.total;
      a[i] = sums.weighted;
    }
  });
}

template <typename Out>
AVX512 void gradient_row(const float* z, int64_t columns, int64_t column, float maximum, float constant,
                         float by_entropy, float by_log_prob, Out* to) {
  const __m512 shift = _mm512_set1_ps(maximum), outer = _mm512_set1_ps(constant), slope = _mm512_set1_ps(by_entropy);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t n = 0; n < columns; n += LANES) {
    const __mmask16 mask = lanes_left(columns - n);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, z + n), shift);
    const __m512 factor = by_entropy == 0.0f ? outer : _mm512_fmadd_ps(slope, x, outer);
    __m512 gradient = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(exponential(x), factor));
    if (column >= n && column < n + LANES) {
      const __mmask16 here = _mm512_cmpeq_epi32_mask(lane, _mm512_set1_epi32(static_cast<int>(column - n)));
      gradient = _mm512_mask_add_ps(gradient, here, gradient, _mm512_set1_ps(by_log_prob));
    }
    store(to + n, mask, gradient);
  }
}

// to[n][i] = from[i][n] for 32 rows i and 16 columns n. Two rows make a vector of pairs.
AVX512 void transpose_block(const at::BFloat16* from, int64_t stride, at::BFloat16* to, int64_t stride_to) {
  __m512i pairs[LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    const auto* even = reinterpret_cast<const __m256i*>(from + 2 * i * stride);
    const auto* odd = reinterpret_cast<const __m256i*>(from + (2 * i + 1) * stride);
    pairs[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(even)),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16));
  }
  transpose(pairs);
  for (int64_t n = 0; n < LANES; ++n) _mm512_storeu_si512(to + n * stride_to, pairs[n]);
}

// to[n][i] = from[i][n] for up to 32 rows, which are in the cache.
void transpose_rows(const at::BFloat16* from, int64_t stride, int64_t rows, int64_t columns, at::BFloat16* to,
                    int64_t stride_to) {
  int64_t n = 0;
  if (rows == 2 * LANES) {
    for (; n + LANES <= columns; n += LANES) transpose_block(from + n, stride, to + n * stride_to, stride_to);
  }
  for (; n < columns; ++n) {
    for (int64_t i = 0; i < rows; ++i) to[n * stride_to + i] = from[i * stride + n];
  }
}

// What the gradient of a tile is made of, see Coefficients. by_entropy may be missing.
struct Parts {
  const int64_t* column;
  const float *maximum, *constant, *by_entropy, *by_log_prob;
};

template <typename Out>
void gradient_rows(const at::Tensor& z, const Parts& parts, at::Tensor& out, int64_t first, int64_t end) {
  Out* to = out.mutable_data_ptr<Out>();
  const float* from = z.const_data_ptr<float>();
  for (int64_t i = first; i < end; ++i) {
    gradient_row<Out>(from + i * z.stride(0), z.size(1), parts.column[i], parts.maximum[i], parts.constant[i],
                      parts.by_entropy ? parts.by_entropy[i] : 0.0f, parts.by_log_prob[i], to + i * out.stride(0));
  }
}

// out may be z itself where it is float32. transposed: the same by columns, for bfloat16 alone.
void gradient_tile(const at::Tensor& z, const at::Tensor& column, const at::Tensor& maximum, const at::Tensor& constant,
                   const std::optional<at::Tensor>& by_entropy, const at::Tensor& by_log_prob, at::Tensor out,
                   std::optional<at::Tensor> transposed) {
  const Parts parts{column.const_data_ptr<int64_t>(), maximum.const_data_ptr<float>(),
                    constant.const_data_ptr<float>(), by_entropy ? by_entropy->const_data_ptr<float>() : nullptr,
                    by_log_prob.const_data_ptr<float>()};
  constexpr int64_t ROWS = 2 * LANES;
  const int64_t rows = z.size(0);
  at::parallel_for(0, (rows + ROWS - 1) / ROWS, 1, [&](int64_t first_block, int64_t end_block) {
    for (int64_t first = first_block * ROWS; first < std::min(end_block * ROWS, rows); first += ROWS) {
      const int64_t end = std::min(first + ROWS, rows);
      if (out.scalar_type() == at::kFloat) {
        gradient_rows<float>(z, parts, out, first, end);
        continue;
      }
      gradient_rows<at::BFloat16>(z, parts, out, first, end);
      if (transposed) {
        transpose_rows(out.const_data_ptr<at::BFloat16>() + first * out.stride(0), out.stride(0), end - first,
                       z.size(1), transposed->mutable_data_ptr<at::BFloat16>() + first, transposed->stride(0));
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(perl_megatron, library) {
  library.def(
      "add_tile_(Tensor z, Tensor column, Tensor(a!) maximum, Tensor(b!) total, Tensor(c!) weighted, Tensor(d!) target, "
      "bool entropy) -> ()");
  library.def(
      "gradient_tile_(Tensor z, Tensor column, Tensor maximum, Tensor constant, Tensor? by_entropy, Tensor by_log_prob, "
      "Tensor(a!) out, Tensor(b!)? transposed) -> ()");
}
TORCH_LIBRARY_IMPL(perl_megatron, CPU, library) {
  library.impl("add_tile_", add_tile);
  library.impl("gradient_tile_", gradient_tile);
}
