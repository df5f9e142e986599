// What a kernel does in every mode of the emulator: the right thing, something wrong, or an error.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/device/arch.cuh"

namespace routed_peft::test {

// What a kernel did: its result, or the error that came out of the launch.
struct Outcome {
  std::string mode, error;
  std::vector<float> out;
};

// run(out) in every mode, with one and with two OS threads.
inline std::vector<Outcome> in_every_mode(size_t outputs, const std::function<cudaError_t(float*)>& run) {
  const emulator::Options before = emulator::options();
  std::vector<Outcome> outcomes;
  for (int threads : {1, 2}) {
    for (emulator::Options mode : emulator::modes()) {
      mode.threads = threads;
      mode.seed = static_cast<unsigned>(outcomes.size());
      emulator::set_options(mode);
      Outcome outcome{to_string(mode), "", std::vector<float>(outputs, std::numeric_limits<float>::quiet_NaN())};
      try {
        const cudaError_t error = run(outcome.out.data());
        CHECK(error == cudaSuccess, "%s: %s", outcome.mode.c_str(), cudaGetErrorString(error));
      } catch (const emulator::Error& error) {
        outcome.error = error.what();
      }
      outcomes.push_back(outcome);
    }
  }
  emulator::set_options(before);
  return outcomes;
}

inline void expect_right(const std::vector<float>& expected, const std::function<cudaError_t(float*)>& run) {
  for (const Outcome& o : in_every_mode(expected.size(), run)) {
    CHECK(o.error.empty(), "%s: %s", o.mode.c_str(), o.error.c_str());
    for (size_t i = 0; i < expected.size(); ++i) {
      CHECK(o.out[i] == expected[i], "%s: [%zu] is %g, not %g", o.mode.c_str(), i, o.out[i], expected[i]);
    }
  }
}

// In every mode an error that says `what`: found as such, or only because nothing could go on.
inline void expect_error(const char* what, const std::function<cudaError_t(float*)>& run, bool deadlock = false) {
  for (const Outcome& o : in_every_mode(1024, run)) {
    CHECK(o.error.find(what) != std::string::npos && deadlock == (o.error.find("deadlock") != std::string::npos),
          "%s: not caught as '%s' but '%s'", o.mode.c_str(), what, o.error.c_str());
  }
}

// A wrong number in so many modes, in kAll of them at most.
constexpr size_t kAll = 12;
inline void expect_wrong(const std::vector<float>& expected, const std::function<cudaError_t(float*)>& run,
                         size_t at_least = 1) {
  size_t wrong = 0;
  for (const Outcome& o : in_every_mode(expected.size(), run)) {
    CHECK(o.error.empty(), "%s: %s", o.mode.c_str(), o.error.c_str());
    wrong += o.out != expected;
  }
  CHECK(wrong >= at_least, "wrong in %zu modes, not %zu", wrong, at_least);
}

// In an AddressSanitizer build the child dies of it; otherwise the guards tell at the end of the block.
inline void expect_out_of_bounds(const char* what, const std::function<cudaError_t(float*)>& run) {
  if (!RP_EMULATOR_ASAN) return expect_error(what, run);
  int ends[2];
  CHECK(pipe(ends) == 0, "pipe");
  const pid_t child = fork();
  CHECK(child >= 0, "fork");
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    std::vector<float> out(1024);
    run(out.data());
    _exit(0);
  }
  close(ends[1]);
  std::string report;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) report.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, "waitpid");
  CHECK(!(WIFEXITED(status) && WEXITSTATUS(status) == 0) && report.find("AddressSanitizer") != std::string::npos,
        "not caught (%s): %s", what, report.c_str());
}

}  // namespace routed_peft::test
