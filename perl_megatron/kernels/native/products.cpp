// Matrix products of bfloat16 numbers with float32 sums, which torch has on GPUs only.
//
// torch's own interface to oneDNN's small products does the arithmetic (ATen/native/CPUBlas.h): with AVX-512 or AMX, as
// the processor has it. This file cuts a product into blocks, and lays the second operand out as those products take it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

namespace {

using at::BFloat16;

constexpr int64_t ROWS = 64;     // of the first operand, in one call; what is left over goes by powers of two, as oneDNN
                                 // makes and keeps code for every size that it is asked for
constexpr int64_t COLUMNS = 64;  // of the second operand, laid out at once
constexpr int64_t DEPTH = 512;   // summed up at once: its block takes 64 KiB, and sums of sums round less

int64_t at_most(int64_t size, int64_t left) {
  return std::min(size, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(left))));
}

// block[k / 2][n][k % 2] of second[k][n], whose columns are contiguous. Two numbers move as one.
void lay_out_columns(const BFloat16* second, int64_t stride, int64_t depth, int64_t columns, BFloat16* block) {
  constexpr int64_t TILE = 16;
  for (int64_t first_pair = 0; first_pair < depth / 2; first_pair += TILE) {
    const int64_t pairs = std::min(TILE, depth / 2 - first_pair);
    for (int64_t n = 0; n < columns; ++n) {
      const BFloat16* from = second + n * stride + 2 * first_pair;
      BFloat16* to = block + (first_pair * columns + n) * 2;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        std::memcpy(to + pair * columns * 2, from + 2 * pair, 2 * sizeof(BFloat16));
      }
    }
  }
}

// The same where the rows of second are contiguous. Two numbers are written as one, which compilers turn into vectors.
__attribute__((target("avx512f,avx512bw,avx512vl"))) void lay_out_rows(const BFloat16* second, int64_t stride,
                                                                       int64_t depth, int64_t columns,
                                                                       BFloat16* block) {
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

// out [M, N] = first [M, K] · second [K, N], or is added to it. Rows of first and out are contiguous, and either rows or
// columns of second.
void multiply(at::Tensor out, const at::Tensor& first, const at::Tensor& second, bool add) {
  TORCH_CHECK(out.scalar_type() == at::kFloat && first.scalar_type() == at::kBFloat16 &&
                  second.scalar_type() == at::kBFloat16,
              "bfloat16 operands and a float32 result are needed");
  TORCH_CHECK(first.dim() == 2 && second.dim() == 2 && first.size(1) == second.size(0) &&
                  first.size(1) > 0 && out.dim() == 2 && out.size(0) == first.size(0) && out.size(1) == second.size(1),
              "the shapes do not make a product");
  const bool by_columns = second.stride(0) == 1;
  TORCH_CHECK(first.stride(1) == 1 && out.stride(1) == 1 && (by_columns || second.stride(1) == 1),
              "the operands' strides are not supported");
  const int64_t m = first.size(0), n = second.size(1), terms = first.size(1), k = terms / 2 * 2;
  const BFloat16* a = first.const_data_ptr<BFloat16>();
  const BFloat16* b = second.const_data_ptr<BFloat16>();
  float* c = out.mutable_data_ptr<float>();
  const int64_t stride_a = first.stride(0), stride_b = second.stride(by_columns ? 1 : 0), stride_c = out.stride(0);
  const int64_t num_blocks = (n + COLUMNS - 1) / COLUMNS;
  at::parallel_for(0, num_blocks, 1, [&](int64_t first_block, int64_t end_block) {
    const auto block = std::make_unique<uint32_t[]>(std::max<int64_t>(1, std::min(DEPTH, k) / 2 * COLUMNS));
    auto* laid_out = reinterpret_cast<BFloat16*>(block.get());
    for (int64_t j = first_block * COLUMNS; j < std::min(end_block * COLUMNS, n); j += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, n - j);
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
                                      a + i * stride_a + p, laid_out, c + i * stride_c + j);
        }
      }
      if (k < terms) {
        const BFloat16* last = by_columns ? b + k + j * stride_b : b + k * stride_b + j;
        last_term(a + k, stride_a, last, by_columns ? stride_b : 1, c + j, stride_c, m, columns, add || k > 0);
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
