// AMX's tiles on a processor without them, so that what the CPU path lays out for them is tested on any machine that
// has products of bfloat16 pairs: with ROUTED_PEFT_ISA=amx, kernels of the same interface that multiply one number
// after the other.
#pragma once

#include <bit>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "cpu/isa.h"

namespace routed_peft::test {

inline thread_local bool tiles_open = false;

inline float number(uint32_t unit, bool second) {
  return std::bit_cast<float>(second ? unit & 0xFFFF0000u : unit << 16);
}

template <int kTiles, int kVectors>
void tiles_by_hand(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_col, const uint32_t* panel,
                   int64_t panel_row, bool add, float* c, int64_t ldc, cpu::Wanted& wanted) {
  CHECK(tiles_open && a_col == 1 && depth > 0 && depth % 16 == 0, "depth %d", int(depth));
  for (int64_t k = 0; k < depth; k += cpu::Wanted::kSteps) wanted.ask();
  for (int64_t i = 0; i < 16 * kTiles; ++i) {
    for (int64_t j = 0; j < 16 * kVectors; ++j) {
      float sum = add ? c[i * ldc + j] : 0;
      for (int64_t k = 0; k < depth; ++k) {
        const uint32_t left = a[i * a_row + k], right = panel[k * panel_row + j];
        sum += number(left, false) * number(right, false) + number(left, true) * number(right, true);
      }
      c[i * ldc + j] = sum;
    }
  }
}

// The same for float32 in three parts.
template <int kTiles, int kVectors>
void split_tiles_by_hand(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_col, const uint32_t* panel,
                         int64_t panel_row, bool add, float* c, int64_t ldc, cpu::Wanted& wanted) {
  CHECK(tiles_open && a_col == 1 && depth > 0 && depth % (16 * cpu::kParts) == 0, "depth %d", int(depth));
  for (int64_t k = 0; k < depth; k += cpu::Wanted::kSteps) wanted.ask();
  for (int64_t i = 0; i < 16 * kTiles; ++i) {
    for (int64_t j = 0; j < 16 * kVectors; ++j) {
      float sum = add ? c[i * ldc + j] : 0;
      for (int64_t k = 0; k < depth; k += 16 * cpu::kParts) {
        for (int64_t left = cpu::kParts - 1; left >= 0; --left) {
          for (int64_t right = cpu::kParts - 1 - left; right >= 0; --right) {
            float first = 0, second = 0;  // of a tile, before they are added to the sum
            for (int64_t unit = 0; unit < 16; ++unit) {
              const uint32_t x = a[i * a_row + k + 16 * left + unit];
              const uint32_t y = panel[(k + 16 * right + unit) * panel_row + j];
              first += number(x, false) * number(y, false);
              second += number(x, true) * number(y, true);
            }
            sum += first + second;
          }
        }
      }
      c[i * ldc + j] = sum;
    }
  }
}

inline void use_tiles() {
  const char* wanted = std::getenv("ROUTED_PEFT_ISA");
  auto& set = const_cast<cpu::Isa<float>&>(cpu::isa<float>());
  if (wanted == nullptr || std::strcmp(wanted, "amx") != 0 || set.processor.tiles) return;
  if (!set.processor.native_bfloat16) return;
  set.processor.tiles = true;
  set.half.row_step = set.half.unit_step = 16;
  const cpu::Isa<float>::Micro<uint32_t> micro[3][2] = {{tiles_by_hand<1, 1>, tiles_by_hand<1, 2>},
                                                        {tiles_by_hand<2, 1>, tiles_by_hand<2, 2>}};
  const cpu::Isa<float>::Micro<uint32_t> split_micro[3][2] = {{split_tiles_by_hand<1, 1>, split_tiles_by_hand<1, 2>},
                                                              {split_tiles_by_hand<2, 1>, split_tiles_by_hand<2, 2>}};
  std::memcpy(set.half.micro, micro, sizeof(micro));
  std::memcpy(set.half.split_micro, split_micro, sizeof(split_micro));
  set.half.open = [] { tiles_open = true; };
  set.half.close = [] { tiles_open = false; };
}

}  // namespace routed_peft::test
