// The instructions that arch.cuh spells in PTX, by the fragment layouts of the PTX manual: lane = 4 g + q holds row g
// of A and D and column g of B.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulator/block.h"
#include "emulator/half.h"

namespace routed_peft::emulator {

inline void bring(Lane& lane, const float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::memcpy(lane.in, a, 16);
  lane.in[4] = b0;
  lane.in[5] = b1;
  std::memcpy(lane.in + 6, d, 16);
}

typedef float Row8 __attribute__((vector_size(32)));

// Each D element of a lane is its own plus the product's, summed in the order of k.
template <int kDepth>
void multiply(Lane (&lanes)[32], const float (&a)[16][kDepth], const Row8 (&b)[kDepth]) {
  for (int i = 0; i < 16; ++i) {
    Row8 sum = {};
    for (int k = 0; k < kDepth; ++k) sum += a[i][k] * b[k];
    for (int j = 0; j < 8; ++j) {
      Lane& lane = lanes[i % 8 * 4 + j / 2];
      const int e = i / 8 * 2 + j % 2;
      lane.out[e] = std::bit_cast<uint32_t>(std::bit_cast<float>(lane.in[6 + e]) + sum[j]);
    }
  }
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 std::source_location at = std::source_location::current()) {
  Block& block = Block::current();
  bring(block.lane(), d, a, b0, b1);
  const Lane& mine = block.meet(~0u, {"mma_16x8x16", at}, [](Lane(&lanes)[32]) {
    float x[16][16];
    Row8 y[16];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int h = 0; h < 2; ++h) {
        const auto value = [&](int i) { return to_float(T{static_cast<uint16_t>(lanes[lane].in[i] >> (16 * h))}); };
        const int k = 2 * q + h;
        x[g][k] = value(0), x[g + 8][k] = value(1), x[g][k + 8] = value(2), x[g + 8][k + 8] = value(3);
        y[k][g] = value(4), y[k + 8][g] = value(5);
      }
    }
    multiply<16>(lanes, x, y);
  });
  std::memcpy(d, mine.out, 16);
}

inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                            std::source_location at = std::source_location::current()) {
  Block& block = Block::current();
  bring(block.lane(), d, a, b0, b1);
  const Lane& mine = block.meet(~0u, {"mma_tf32_16x8x8", at}, [](Lane(&lanes)[32]) {
    float x[16][8];
    Row8 y[8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      // the hardware does not look at the low 13 bits
      const auto value = [&](int i) { return std::bit_cast<float>(lanes[lane].in[i] & 0xFFFFE000u); };
      x[g][q] = value(0), x[g + 8][q] = value(1), x[g][q + 4] = value(2), x[g + 8][q + 4] = value(3);
      y[q][g] = value(4), y[q + 4][g] = value(5);
    }
    multiply<8>(lanes, x, y);
  });
  std::memcpy(d, mine.out, 16);
}

// To nearest, ties away from zero; the bits that TF32 lacks are zero.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7F800000u) == 0x7F800000u) return (bits & 0x7FFFFFu) != 0 ? 0x7FFFE000u : bits;
  return (bits + 0x1000u) & 0xFFFFE000u;
}

inline void check_shared(const void* at, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) throw Error(std::string(what) + ": not 16-byte aligned");
  if (!Block::current().shared().contains(at, 16)) throw Error(std::string(what) + ": outside of shared memory");
}

// Lane 8 m + i brings row i of matrix m, eight 16-bit elements. Transposed, a lane gets what it would get of the
// transposed matrices.
template <bool kTranspose>
void ldmatrix_x4(uint32_t (&r)[4], const void* row, std::source_location at = std::source_location::current()) {
  check_shared(row, "ldmatrix");
  Block& block = Block::current();
  block.lane().row = row;
  const Lane& mine = block.meet(~0u, {kTranspose ? "ldmatrix_x4_trans" : "ldmatrix_x4", at}, [](Lane(&lanes)[32]) {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], lanes[8 * m + i].row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        const uint32_t low = kTranspose ? matrix[2 * q][g] : matrix[g][2 * q];
        const uint32_t high = kTranspose ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
        lanes[lane].out[m] = low | high << 16;
      }
    }
  });
  std::memcpy(r, mine.out, 16);
}

inline void cp_async_16(void* smem, const void* gmem, bool valid) {
  check_shared(smem, "cp.async to");
  std::array<uint32_t, 4> data = {};
  if (valid) {
    if (reinterpret_cast<uintptr_t>(gmem) % 16 != 0) throw Error("cp.async from: not 16-byte aligned");
    std::memcpy(data.data(), gmem, 16);
  }
  Block::current().copy(smem, data);
}

inline void named_barrier(int id, int threads, std::source_location at = std::source_location::current()) {
  if (id < 1) throw Error("named_barrier: 0 is __syncthreads");
  Block::current().barrier(static_cast<unsigned>(id), static_cast<unsigned>(threads), {"named_barrier", at});
}

}  // namespace routed_peft::emulator
