// What arch.cuh and numeric.cuh promise of the instructions: fragment layouts against the tables of the PTX manual,
// with every element its own number; shuffles of every width; conversions over all 16-bit numbers and around their
// middles.
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels/device/numeric.cuh"
#include "support.h"

namespace routed_peft::test {
namespace {

template <auto Kernel, class Params>
void on_one_warp(const Params& params) {
  const cudaError_t error = launch<Kernel>(dim3(1), dim3(32), 4096, nullptr, params);
  CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
}

// ---- mma

struct MmaParams {
  const uint32_t* a;  // [32, 4]
  const uint32_t* b;  // [32, 2]
  float* d;           // [32, 4], in and out
};

template <class T>  // float: TF32
__global__ void mma_kernel(const MmaParams p) {
  float d[4];
  uint32_t a[4];
  for (unsigned i = 0; i < 4; ++i) d[i] = p.d[4 * threadIdx.x + i], a[i] = p.a[4 * threadIdx.x + i];
  const uint32_t b0 = p.b[2 * threadIdx.x], b1 = p.b[2 * threadIdx.x + 1];
  if constexpr (std::is_same_v<T, float>) {
    mma_tf32_16x8x8(d, a, b0, b1);
  } else {
    mma_16x8x16<T>(d, a, b0, b1);
  }
  for (unsigned i = 0; i < 4; ++i) p.d[4 * threadIdx.x + i] = d[i];
}

// The manual's elements a_i, b_i, c_i of a lane, group = lane / 4, in_group = lane % 4.
struct Element {
  int row, col;
};
template <class T>
Element a_element(int lane, int i) {
  const int group = lane / 4, in_group = lane % 4;
  if constexpr (std::is_same_v<T, float>) {
    return {i == 0 || i == 2 ? group : group + 8, i == 0 || i == 1 ? in_group : in_group + 4};
  } else {
    return {(0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
  }
}
template <class T>
Element b_element(int lane, int i) {
  const int group = lane / 4, in_group = lane % 4;
  if constexpr (std::is_same_v<T, float>) {
    return {i == 0 ? in_group : in_group + 4, group};
  } else {
    return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
  }
}
Element c_element(int lane, int i) { return {i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1)}; }

// The bits of `value` at place i of an array of registers.
template <class T>
void put(uint32_t* registers, int i, float value) {
  if constexpr (std::is_same_v<T, float>) {
    registers[i] = std::bit_cast<uint32_t>(value) | 0x1FFFu;  // bits that TF32 lacks, to be ignored
  } else {
    registers[i / 2] |= uint32_t{from_float<T>(value).bits} << (16 * (i % 2));
  }
}

template <class T>
void test_mma() {
  constexpr int kDepth = std::is_same_v<T, float> ? 8 : 16, kPerRegister = std::is_same_v<T, float> ? 1 : 2;
  float a[16][kDepth], b[kDepth][8], c[16][8];
  int next = 1;  // whole numbers up to 256 are exact in every type, as are these sums in float
  for (auto& row : a) {
    for (float& value : row) value = static_cast<float>(next++ % 257);
  }
  for (auto& row : b) {
    for (float& value : row) value = static_cast<float>(next++ * 3 % 257);
  }
  for (auto& row : c) {
    for (float& value : row) value = static_cast<float>(next++);
  }
  std::vector<uint32_t> a_registers(32 * 4), b_registers(32 * 2);
  std::vector<float> d(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * kPerRegister; ++i) {
      const Element e = a_element<T>(lane, i);
      put<T>(&a_registers[4 * lane], i, a[e.row][e.col]);
    }
    for (int i = 0; i < 2 * kPerRegister; ++i) {
      const Element e = b_element<T>(lane, i);
      put<T>(&b_registers[2 * lane], i, b[e.row][e.col]);
    }
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = c[c_element(lane, i).row][c_element(lane, i).col];
  }
  on_one_warp<mma_kernel<T>>(MmaParams{a_registers.data(), b_registers.data(), d.data()});
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Element e = c_element(lane, i);
      float expected = c[e.row][e.col];
      for (int k = 0; k < kDepth; ++k) expected += a[e.row][k] * b[k][e.col];
      CHECK(d[4 * lane + i] == expected, "depth %d, lane %d, element %d: %g, not %g", kDepth, lane, i, d[4 * lane + i],
            expected);
    }
  }
}

// ---- ldmatrix and cp.async

struct LdmatrixParams {
  const uint16_t* x;  // [4, 8, 8]
  uint32_t* out;      // [2, 32, 4]: as it stands, transposed
};

__global__ void ldmatrix_kernel(const LdmatrixParams p) {
  RP_DYNAMIC_SMEM(smem);
  uint16_t* const s = reinterpret_cast<uint16_t*>(smem);  // rows 24 elements apart
  cp_async_16(s + threadIdx.x * 24, p.x + threadIdx.x * 8, true);
  cp_async_16(s + threadIdx.x * 24 + 8, nullptr, false);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  for (int i = 8; i < 16; ++i) {
    if (s[threadIdx.x * 24 + i] != 0) __trap();
  }
  uint32_t r[4];
  ldmatrix_x4(r, s + threadIdx.x * 24);
  for (unsigned i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = r[i];
  ldmatrix_x4_trans(r, s + threadIdx.x * 24);
  for (unsigned i = 0; i < 4; ++i) p.out[4 * (32 + threadIdx.x) + i] = r[i];
}

void test_ldmatrix() {
  std::vector<uint16_t> x(4 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(1000 + i);
  std::vector<uint32_t> out(2 * 32 * 4);
  on_one_warp<ldmatrix_kernel>(LdmatrixParams{x.data(), out.data()});
  for (int transposed = 0; transposed < 2; ++transposed) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        for (int i = 0; i < 2; ++i) {
          const int row = lane / 4, col = lane % 4 * 2 + i;
          const uint16_t expected = x[64 * m + (transposed ? col * 8 + row : row * 8 + col)];
          const uint16_t got = static_cast<uint16_t>(out[4 * (32 * transposed + lane) + m] >> (16 * i));
          CHECK(got == expected, "transposed %d, lane %d, matrix %d: %d, not %d", transposed, lane, m, got, expected);
        }
      }
    }
  }
}

// ---- shuffles and votes

struct ShuffleParams {
  int width;
  int* out;      // [8, 32]
  double* wide;  // [32]
};

__global__ void shuffle_kernel(const ShuffleParams p) {
  const int lane = static_cast<int>(threadIdx.x);
  p.out[lane] = __shfl_sync(~0u, lane, lane * 3, p.width);
  p.out[32 + lane] = __shfl_xor_sync(~0u, lane, 5, p.width);
  p.out[64 + lane] = __shfl_down_sync(~0u, lane, 3u, p.width);
  p.out[96 + lane] = __shfl_up_sync(~0u, lane, 3u, p.width);
  p.wide[lane] = __shfl_xor_sync(~0u, lane + 0x1p-40, 1);
  if (lane < 8) {
    p.out[128 + lane] = static_cast<int>(__ballot_sync(0xFFu, lane % 3 == 0));
  } else {
    p.out[128 + lane] = static_cast<int>(__ballot_sync(~0xFFu, lane % 2 == 0));
  }
  p.out[160 + lane] = __any_sync(~0u, lane == 9) + 2 * __any_sync(~0u, lane == 32);
  p.out[192 + lane] = __all_sync(~0u, lane < 32) + 2 * __all_sync(~0u, lane != 9);
  p.out[224 + lane] = __shfl_sync(lane < 16 ? 0xFFFFu : 0xFFFF0000u, lane, lane < 16 ? 3 : 3);
}

void test_shuffles() {
  for (int width : {32, 16, 8, 4, 2}) {
    std::vector<int> out(8 * 32);
    std::vector<double> wide(32);
    on_one_warp<shuffle_kernel>(ShuffleParams{width, out.data(), wide.data()});
    for (int lane = 0; lane < 32; ++lane) {
      const int first = lane / width * width, in = lane % width, other = lane ^ 5;
      const int expected[] = {first + lane * 3 % width,
                              other < first + width ? other : lane,
                              in + 3 < width ? lane + 3 : lane,
                              in >= 3 ? lane - 3 : lane,
                              lane < 8 ? 0x49 : 0x55555500,
                              1,
                              1,
                              lane < 16 ? 3 : -1};
      for (int i = 0; i < 8; ++i) {
        CHECK(out[32 * i + lane] == expected[i], "width %d, lane %d, number %d: %d, not %d", width, lane, i,
              out[32 * i + lane], expected[i]);
      }
      CHECK(wide[lane] == (lane ^ 1) + 0x1p-40, "lane %d: %a", lane, wide[lane]);
    }
  }
}

// ---- numbers

template <class T>
void test_half(Dtype dtype) {
  const auto check = [&](float value) {
    const uint16_t got = from_float<T>(value).bits, expected = half_bits(dtype, static_cast<double>(value));
    const bool same = std::isnan(value) ? std::isnan(half_value(dtype, got)) : got == expected;
    CHECK(same, "%a: %04x, not %04x", static_cast<double>(value), got, expected);
  };
  std::vector<T> numbers(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T number = numbers[bits] = {static_cast<uint16_t>(bits)};
    const double value = half_value(dtype, number.bits);
    CHECK(std::isnan(value) ? std::isnan(to_float(number)) : to_float(number) == value, "%04x: %a", bits,
          static_cast<double>(to_float(number)));
    CHECK(std::isnan(value) || from_float<T>(to_float(number)).bits == bits, "%04x", bits);
    CHECK(std::isnan(value) || load_as_float(numbers.data(), dtype, bits) == value, "%04x", bits);
    const T above{static_cast<uint16_t>(bits + 1)};
    const float middle = static_cast<float>((value + half_value(dtype, above.bits)) / 2);
    if (!std::isfinite(middle)) continue;
    for (float x : {middle, std::nextafter(middle, HUGE_VALF), std::nextafter(middle, -HUGE_VALF)}) check(x);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (float x : {kInfinity, -kInfinity, std::nanf(""), std::numeric_limits<float>::max(), 65519.f, 65520.f}) check(x);
  const float2 pair = unpack2<T>(pack2<T>(1.5f, -3.f));
  CHECK(pair.x == 1.5f && pair.y == -3.f && (pack2<T>(1.5f, -3.f) & 0xFFFFu) == from_float<T>(1.5f).bits, "%g %g",
        pair.x, pair.y);
}

void test_numbers() {
  test_half<bfloat16>(Dtype::kBFloat16);
  test_half<half>(Dtype::kFloat16);
  const std::vector<double> wide = {0, 1 + 0x1p-30};
  const std::vector<float> narrow = {0, 3.25f};
  CHECK(load_as_float(wide.data(), Dtype::kFloat64, 1) == 1, "float64");
  CHECK(load_as_float(narrow.data(), Dtype::kFloat32, 1) == 3.25f, "float32");

  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float step = 0x1p-10f;  // between TF32 numbers from 1 to 2
  const std::pair<float, float> cases[] = {{1 + step / 2, 1 + step},     {1 + step / 2 - 0x1p-23f, 1},
                                           {-1 - step / 2, -1 - step},   {1 + 1.5f * step, 1 + 2 * step},
                                           {0x1.fffffep127f, kInfinity}, {-kInfinity, -kInfinity},
                                           {0x1.ffcp127f, 0x1.ffcp127f}, {0x1p-149f * 0x1000, 0x1p-149f * 0x2000}};
  for (const auto& [value, expected] : cases) {
    CHECK(to_tf32(value) == std::bit_cast<uint32_t>(expected), "%a: %08x", static_cast<double>(value), to_tf32(value));
  }
  CHECK(std::isnan(std::bit_cast<float>(to_tf32(std::nanf("")))), "NaN");
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft;
  test::test_mma<bfloat16>();
  test::test_mma<half>();
  test::test_mma<float>();
  test::test_ldmatrix();
  test::test_shuffles();
  test::test_numbers();
}
