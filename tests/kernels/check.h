// CHECK(condition, "format", ...): all that these tests need of a framework.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace routed_peft::test {

[[noreturn, gnu::format(printf, 4, 5)]] inline void fail(const char* file, int line, const char* condition,
                                                         const char* format, ...) {
  std::fprintf(stderr, "%s:%d: %s: ", file, line, condition);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::exit(1);
}

}  // namespace routed_peft::test

#define CHECK(condition, ...) \
  ((condition) ? void() : ::routed_peft::test::fail(__FILE__, __LINE__, #condition, __VA_ARGS__))
