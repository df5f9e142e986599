// The loops of an instruction set but for the micro kernels, which test_gemm.cpp has: conversions, dot and axpy.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "support.h"

namespace routed_peft::test {
namespace {

void chosen_set() {
  const char* wanted = std::getenv("ROUTED_PEFT_ISA");
  std::printf("instruction set: %s, asked for: %s\n", cpu::isa<float>().name, wanted ? wanted : "any");
  CHECK(std::strcmp(cpu::isa<float>().name, cpu::isa<double>().name) == 0, "two sets at once");
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class Acc>
void half_round_trips() {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) {
    std::vector<uint16_t> all(65536), back(65536);
    std::vector<Acc> values(65536);
    for (size_t i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    cpu::isa<Acc>().load(all.data(), dtype, 65536, values.data());
    cpu::isa<Acc>().store(values.data(), 65536, dtype, back.data());
    for (size_t i = 0; i < 65536; ++i) {
      CHECK(same(double(values[i]), half_value(dtype, all[i])), "%04zx is read as %g", i, double(values[i]));
      CHECK(std::isnan(values[i]) ? std::isnan(half_value(dtype, back[i])) : back[i] == all[i],
            "%04zx comes back as %04x", i, back[i]);
    }
    // tails of every length, from every alignment
    for (int64_t n = 0; n < 70; ++n) {
      const std::vector<uint16_t> some(all.begin() + 15000, all.begin() + 15000 + n);
      std::vector<Acc> read(static_cast<size_t>(n));
      std::vector<uint16_t> written(static_cast<size_t>(n));
      cpu::isa<Acc>().load(some.data(), dtype, n, read.data());
      cpu::isa<Acc>().store(read.data(), n, dtype, written.data());
      CHECK(written == some, "a run of %d", int(n));
    }
  }
}

template <class Acc>
void check_rounding(Dtype dtype, const std::vector<Acc>& values) {
  std::vector<uint16_t> stored(values.size());
  cpu::isa<Acc>().store(values.data(), static_cast<int64_t>(values.size()), dtype, stored.data());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t expected = half_bits(dtype, static_cast<double>(static_cast<float>(values[i])));
    const bool right = std::isnan(values[i]) ? std::isnan(half_value(dtype, stored[i])) : stored[i] == expected;
    CHECK(right, "%a is stored as %04x, not %04x", double(values[i]), stored[i], expected);
  }
}

void rounding() {
  Random random(6);
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) {
    std::vector<float> values;
    // each number, the middle between it and the next, and the neighbours of both
    for (uint32_t bits = 0; bits < 65535; ++bits) {
      const double here = half_value(dtype, static_cast<uint16_t>(bits)),
                   next = half_value(dtype, static_cast<uint16_t>(bits + 1));
      for (const double center : {here, (here + next) / 2}) {
        const float value = static_cast<float>(center);
        values.insert(values.end(), {value, std::nextafter(value, -INFINITY), std::nextafter(value, INFINITY)});
      }
    }
    for (const float value :
         {65504.0f, 65519.996f, 65520.0f, 65536.0f, 1e30f, 3.38e38f, 3.3961e38f, 3.4028235e38f, INFINITY, NAN, 0.0f,
          1e-45f, 1.1754942e-38f, 5.9604645e-8f, 2.9802322e-8f, 2.9802326e-8f, 6.1035156e-5f}) {
      values.insert(values.end(), {value, -value});
    }
    for (int i = 0; i < 100000; ++i) {  // any float, NaNs and subnormals among them
      const uint32_t bits = static_cast<uint32_t>(random.bits());
      float value;
      std::memcpy(&value, &bits, sizeof value);
      values.push_back(value);
    }
    check_rounding(dtype, values);
    check_rounding(dtype, std::vector<double>(values.begin(), values.end()));
  }
}

template <class Acc>
void wide_conversions() {
  const std::vector<double> doubles = {0.1, -3.5, 1e-40, 1e300, -1e-300, INFINITY, 16777217.0};
  const int64_t n = static_cast<int64_t>(doubles.size());
  std::vector<Acc> loaded(doubles.size());
  cpu::isa<Acc>().load(doubles.data(), Dtype::kFloat64, n, loaded.data());
  for (size_t i = 0; i < doubles.size(); ++i) CHECK(loaded[i] == static_cast<Acc>(doubles[i]), "%g", doubles[i]);
  std::vector<float> floats(doubles.size());
  cpu::isa<Acc>().store(loaded.data(), n, Dtype::kFloat32, floats.data());
  for (size_t i = 0; i < doubles.size(); ++i) CHECK(floats[i] == static_cast<float>(loaded[i]), "%g", doubles[i]);
  cpu::isa<Acc>().load(floats.data(), Dtype::kFloat32, n, loaded.data());
  std::vector<double> back(doubles.size());
  cpu::isa<Acc>().store(loaded.data(), n, Dtype::kFloat64, back.data());
  for (size_t i = 0; i < doubles.size(); ++i) CHECK(back[i] == static_cast<double>(floats[i]), "%g", doubles[i]);
}

template <class Acc>
void dot_and_axpy() {
  Random random(7);
  for (int64_t n = 0; n < 300; ++n) {
    std::vector<Acc> a(static_cast<size_t>(n)), b(a), sum;
    for (Acc& value : a) value = static_cast<Acc>(random.uniform());
    for (Acc& value : b) value = static_cast<Acc>(random.uniform());
    const double unit = epsilon(sizeof(Acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
    double expected = 0;
    for (size_t i = 0; i < a.size(); ++i) expected += double(a[i]) * double(b[i]);
    CHECK(std::abs(double(cpu::isa<Acc>().dot(a.data(), b.data(), n)) - expected) <= double(n) * 4 * unit, "dot of %d",
          int(n));
    sum = b;
    cpu::isa<Acc>().axpy(n, Acc(0.75), a.data(), sum.data());
    for (size_t i = 0; i < a.size(); ++i) {
      CHECK(std::abs(double(sum[i]) - (double(b[i]) + 0.75 * double(a[i]))) <= 4 * unit, "axpy of %d", int(n));
    }
  }
}

float part(uint32_t unit, bool second) { return std::bit_cast<float>(second ? unit & 0xFFFF0000u : unit << 16); }

// A number of a step in its three parts, `apart` units from one another: the nearest of bfloat16, the nearest to the
// rest, and what is left, exactly.
void check_parts(float number, const uint32_t* unit, int64_t apart, bool second, const char* what) {
  float rest = number;
  for (int64_t i = 0; i < cpu::kParts; ++i) {
    const float got = part(unit[i * apart], second);
    CHECK(got == half_value(Dtype::kBFloat16, half_bits(Dtype::kBFloat16, rest)), "%s: part %d of %a is %a", what,
          int(i), double(number), double(got));
    rest -= got;
  }
  CHECK(rest == 0, "%s: %a is left of %a", what, double(rest), double(number));
}

// float32 in parts: lines along k, and lines of k in panels of one vector or two; every tail.
void parts() {
  const auto& half = cpu::isa<float>().half;
  if (half.split_lines == nullptr) return;
  constexpr int64_t kStep = cpu::kSplitStep, kHalf = kStep / 2, kUnits = kHalf * cpu::kParts, kStride = 101;
  constexpr uint32_t kUntouched = 0xFFFFFFFF;
  Random random(8);
  std::vector<float> from(70 * kStride);
  for (float& number : from)
    number = static_cast<float>(random.uniform() * std::pow(10, double(random.below(20)) - 10));
  for (int64_t n = 1; n <= 100; ++n) {
    constexpr int64_t kLines = 3;
    const int64_t steps = (n + kStep - 1) / kStep, stride = steps * kUnits + 16;
    std::vector<uint32_t> to(size_t(kLines * stride), kUntouched);
    half.split_lines(from.data(), kStride, kLines, n, to.data(), stride);
    for (int64_t line = 0; line < kLines; ++line) {
      for (int64_t k = 0; k < steps * kStep; ++k) {
        const uint32_t* unit = to.data() + line * stride + k / kStep * kUnits + k % kHalf;
        check_parts(k < n ? from[size_t(line * kStride + k)] : 0, unit, kHalf, k % kStep >= kHalf, "lines");
      }
      for (int64_t i = steps * kUnits; i < stride; ++i) {
        CHECK(to[size_t(line * stride + i)] == kUntouched, "beside a line of %d", int(n));
      }
    }
  }
  for (const int64_t width : {16, 32}) {
    for (const int64_t depth : {1, 15, 16, 17, 31, 32, 33, 64, 70}) {
      for (const int64_t n : {1, 15, 16, 17, 32, 33, 63, 64, 100}) {
        const int64_t steps = (depth + kStep - 1) / kStep, panels = (n + width - 1) / width;
        const int64_t laid = steps * kUnits * width, panel = laid + 32;
        std::vector<uint32_t> to(size_t(panels * panel), kUntouched);
        half.lay_split(from.data(), kStride, depth, n, width, panel, to.data());
        for (int64_t p = 0; p < panels; ++p) {
          for (int64_t k = 0; k < steps * kStep; ++k) {
            for (int64_t i = 0; i < width; ++i) {
              const int64_t column = p * width + i;
              const uint32_t* unit = to.data() + p * panel + (k / kStep * kUnits + k % kHalf) * width + i;
              const float number = k < depth && column < n ? from[size_t(k * kStride + column)] : 0;
              check_parts(number, unit, kHalf * width, k % kStep >= kHalf, "panels");
            }
          }
          for (int64_t i = laid; i < panel; ++i) {
            CHECK(to[size_t(p * panel + i)] == kUntouched, "beside a panel of %d", int(n));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  chosen_set();
  half_round_trips<float>();
  half_round_trips<double>();
  rounding();
  wide_conversions<float>();
  wide_conversions<double>();
  dot_and_axpy<float>();
  dot_and_axpy<double>();
  parts();
}
