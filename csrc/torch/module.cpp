// routed_peft._C: what carries no tensor. The ops register themselves when this module is loaded (ops.cpp).
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "kernels/plan.h"

namespace py = pybind11;
namespace plan = routed_peft::plan;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of routed_peft's C++ library.";
  m.def(
      "force",
      [](const std::string& choice, int value) {
        using plan::Forced;
        const std::map<std::string, int Forced::*> choices = {{"rank_one", &Forced::rank_one},
                                                              {"gram_order", &Forced::gram_order},
                                                              {"library_gemm", &Forced::library_gemm},
                                                              {"library_base", &Forced::library_base},
                                                              {"by_lines", &Forced::by_lines},
                                                              {"split", &Forced::split},
                                                              {"reduction_splits", &Forced::reduction_splits}};
        const auto found = choices.find(choice);
        if (found == choices.end()) throw py::value_error("there is no choice '" + choice + "' in csrc/kernels/plan.h");
        const bool count = choice == "reduction_splits";
        if (value < -1 || value > (count ? 16 : 1) || (count && value == 0)) {
          throw py::value_error("value " + std::to_string(value) + " is none of " + choice);
        }
        plan::forced.*found->second = value;
      },
      py::arg("choice"), py::arg("value"),
      "For benchmarks of the planner: what a choice of csrc/kernels/plan.h comes out as from now on; -1 is as "
      "planned. Not for calls that are traced: their shapes are those of the plan.");
  m.def("build_info", [] {
    py::dict info;
    info["torch_headers"] = TORCH_VERSION;
    info["stable_abi"] = "2.11";
    info["compiler"] = __VERSION__;
#ifdef USE_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    info["cpu_isa"] = routed_peft::cpu::isa<float>().name;
    return info;
  });
}
