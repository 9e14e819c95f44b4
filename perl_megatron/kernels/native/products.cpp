// Matrix products of bfloat16 numbers with float32 sums, which torch has on GPUs only.
//
// torch's own interface to oneDNN's small products does the arithmetic (ATen/native/CPUBlas.h): with AVX-512 or AMX, as
// the processor has it. This file cuts a product into blocks, and lays the second operand out as those products take it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>

#include "vectors.h"

namespace {

using at::BFloat16;

constexpr int64_t ROWS = 256;    // of the first operand, in one call; what is left over goes by powers of two, as oneDNN
                                 // makes and keeps code for every size that it is asked for
constexpr int64_t COLUMNS = 64;  // of the second operand, laid out at once
constexpr int64_t DEPTH = 1024;  // summed up at once: its block takes 128 KiB, an eighth of a core's cache

int64_t at_most(int64_t size, int64_t left) {
  return std::min(size, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(left))));
}

// block[k / 2][n][k % 2] of second[k][n], whose columns are contiguous. Two numbers move as one.
AVX512 void lay_out_columns(const BFloat16* second, int64_t stride, int64_t depth, int64_t columns, BFloat16* block) {
  for (int64_t first = 0; first < columns; first += LANES) {
    const int64_t count = std::min(LANES, columns - first);
    for (int64_t first_pair = 0; first_pair < depth / 2; first_pair += LANES) {
      const int64_t pairs = std::min(LANES, depth / 2 - first_pair);
      __m512i vectors[LANES] = {};
      for (int64_t n = 0; n < count; ++n) {
        vectors[n] = _mm512_maskz_loadu_epi32(lanes_left(pairs), second + (first + n) * stride + 2 * first_pair);
      }
      transpose(vectors);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        BFloat16* to = block + ((first_pair + pair) * columns + first) * 2;
        _mm512_mask_storeu_epi32(to, lanes_left(count), vectors[pair]);
      }
    }
  }
}

// The same where the rows of second are contiguous. Two numbers are written as one, which compilers turn into vectors.
AVX512 void lay_out_rows(const BFloat16* second, int64_t stride, int64_t depth, int64_t columns, BFloat16* block) {
  const auto* from = reinterpret_cast<const uint16_t*>(second);
  auto* to = reinterpret_cast<uint32_t*>(block);
  for (int64_t pair = 0; pair < depth / 2; ++pair) {
    const uint16_t* even = from + 2 * pair * stride;
    const uint16_t* odd = even + stride;
    for (int64_t n = 0; n < columns; ++n) {
      to[pair * columns + n] = even[n] | static_cast<uint32_t>(odd[n]) << 16;
    }
  }
}

// The last of an odd number of terms: out += first [M] · second [N], or, without add, out = that.
void last_term(const BFloat16* first, int64_t stride_a, const BFloat16* second, int64_t stride_n, float* out,
               int64_t stride_c, int64_t rows, int64_t columns, bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = static_cast<float>(first[i * stride_a]);
    float* to = out + i * stride_c;
    for (int64_t n = 0; n < columns; ++n) {
      to[n] = (add ? to[n] : 0.0f) + factor * static_cast<float>(second[n * stride_n]);
    }
  }
}

// first [m, terms] · second [terms, n]; the rows of first are contiguous, and either rows or columns of second.
struct Product {
  const BFloat16 *a, *b;
  int64_t m, n, terms, stride_a, stride_b;
  bool by_columns;

  // c [m, columns] = the product's columns from j on, or is added to it. laid_out: room for a block.
  void compute(int64_t j, int64_t columns, float* c, int64_t stride_c, bool add, BFloat16* laid_out) const {
    const int64_t k = terms / 2 * 2;  // in pairs
    for (int64_t p = 0, depth = 0; p < k; p += depth) {
      depth = at_most(DEPTH, k - p);
      if (by_columns) {
        lay_out_columns(b + p + j * stride_b, stride_b, depth, columns, laid_out);
      } else {
        lay_out_rows(b + p * stride_b + j, stride_b, depth, columns, laid_out);
      }
      for (int64_t i = 0, rows = 0; i < m; i += rows) {
        rows = at_most(ROWS, m - i);
        at::native::cpublas::brgemm(rows, columns, depth, stride_a, columns, stride_c, add || p > 0,
                                    a + i * stride_a + p, laid_out, c + i * stride_c);
      }
    }
    if (k < terms) {
      const BFloat16* last = by_columns ? b + k + j * stride_b : b + k * stride_b + j;
      last_term(a + k, stride_a, last, by_columns ? stride_b : 1, c, stride_c, m, columns, add || k > 0);
    }
  }
};

AVX512 void round_rows(const float* from, int64_t rows, int64_t columns, BFloat16* to, int64_t stride_to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < columns; n += LANES) {
      const __mmask16 mask = lanes_left(columns - n);
      store(to + i * stride_to + n, mask, _mm512_maskz_loadu_ps(mask, from + i * columns + n));
    }
  }
}

// Have fresh memory mapped by one thread a page: below, threads share rows, and would all ask for the same page at once.
void touch(at::Tensor out) {
  constexpr int64_t PAGE = 4096 / sizeof(BFloat16);
  at::parallel_for(0, out.size(0), 64, [&](int64_t first, int64_t end) {
    auto* to = out.mutable_data_ptr<BFloat16>();
    for (int64_t i = first; i < end; ++i) {
      for (int64_t n = 0; n < out.size(1); n += PAGE) to[i * out.stride(0) + n] = 0;
    }
  });
}

// Aligned to cache lines, which vectors would otherwise straddle.
at::DataPtr allocate(size_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

// out [M, N] = first [M, K] · second [K, N], or, where out is float32, is added to it. Each result is rounded once.
void multiply(at::Tensor out, const at::Tensor& first, const at::Tensor& second, bool add) {
  const bool rounds = out.scalar_type() == at::kBFloat16;
  TORCH_CHECK(first.scalar_type() == at::kBFloat16 && second.scalar_type() == at::kBFloat16 &&
                  (out.scalar_type() == at::kFloat || (rounds && !add)),
              "bfloat16 operands and a float32 result, or a bfloat16 one that is not added to, are needed");
  TORCH_CHECK(first.dim() == 2 && second.dim() == 2 && first.size(1) == second.size(0) &&
                  first.size(1) > 0 && out.dim() == 2 && out.size(0) == first.size(0) && out.size(1) == second.size(1),
              "the shapes do not make a product");
  const bool by_columns = second.stride(0) == 1;
  TORCH_CHECK(first.stride(1) == 1 && out.stride(1) == 1 && (by_columns || second.stride(1) == 1),
              "the operands' strides are not supported");
  const Product product{first.const_data_ptr<BFloat16>(), second.const_data_ptr<BFloat16>(), first.size(0),
                        second.size(1), first.size(1), first.stride(0), second.stride(by_columns ? 1 : 0), by_columns};
  if (rounds) touch(out);
  const int64_t num_blocks = (product.n + COLUMNS - 1) / COLUMNS, stride_out = out.stride(0);
  at::parallel_for(0, num_blocks, 1, [&](int64_t first_block, int64_t end_block) {
    const at::DataPtr block = allocate(std::min(DEPTH, product.terms + 1) / 2 * 2 * COLUMNS * sizeof(BFloat16));
    const at::DataPtr sums = allocate(rounds ? product.m * COLUMNS * sizeof(float) : 0);
    auto* laid_out = static_cast<BFloat16*>(block.get());
    auto* c = static_cast<float*>(sums.get());
    for (int64_t j = first_block * COLUMNS; j < std::min(end_block * COLUMNS, product.n); j += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, product.n - j);
      if (rounds) {
        product.compute(j, columns, c, columns, false, laid_out);
        round_rows(c, product.m, columns, out.mutable_data_ptr<BFloat16>() + j, stride_out);
      } else {
        product.compute(j, columns, out.mutable_data_ptr<float>() + j, stride_out, add, laid_out);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(perl_megatron, library) {
  library.def("multiply_(Tensor(a!) out, Tensor first, Tensor second, bool add) -> ()");
}
TORCH_LIBRARY_IMPL(perl_megatron, CPU, library) { library.impl("multiply_", multiply); }
