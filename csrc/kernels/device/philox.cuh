// Dropout's random numbers: Philox4x32-7 (Salmon et al., SC 2011), one map for CPU and CUDA.
//
// The map is by coordinates of the logical tensor [rows, cols], so every tiling, both directions and every device draw
// the same mask. Element (row, c), with t = c % 16, q = (t % 8) / 2 and slot = 4·((c % 64) / 16) + 2·(t / 8) + t % 2,
// takes halfword slot % 8 of the call with counter (row_lo, row_hi, 4·(c / 64) + q, 2·stream + slot / 8), and is
// dropped if that halfword is below threshold = round(65536 p). One mma fragment (four k16 A blocks, or eight n8 C
// tiles) of a thread is exactly the 16 slots of one (row, q), which is why the columns are dealt this way.
#pragma once

#include <cstdint>

#include "kernels/device/host_device.h"

namespace routed_peft {

constexpr int kPhiloxRounds = 7;

struct PhiloxWords {
  uint32_t word[4];
};

RP_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Which call and which of its halfwords belong to a column.
struct DropoutSlot {
  uint32_t counter2;  // 4·(c / 64) + q
  uint32_t half;      // slot / 8
  uint32_t halfword;  // slot % 8
};

RP_HOST_DEVICE DropoutSlot dropout_slot(int64_t column) {
  const uint32_t in_block = static_cast<uint32_t>(column % 64), t = in_block % 16;
  const uint32_t slot = 4 * (in_block / 16) + 2 * (t / 8) + t % 2;
  return {static_cast<uint32_t>(4 * (column / 64)) + (t % 8) / 2, slot / 8, slot % 8};
}

RP_HOST_DEVICE bool dropout_keeps(uint64_t seed, uint32_t stream, uint32_t threshold, int64_t row, int64_t column) {
  const DropoutSlot s = dropout_slot(column);
  const PhiloxWords words =
      philox(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), s.counter2,
             2 * stream + s.half);
  const uint32_t halfword = (words.word[s.halfword / 2] >> (16 * (s.halfword % 2))) & 0xFFFFu;
  return halfword >= threshold;
}

}  // namespace routed_peft
