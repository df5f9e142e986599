// routed_peft._C: queries that carry no tensor. The ops register themselves when this module is loaded (ops.cpp).
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of routed_peft's C++ library.";
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
