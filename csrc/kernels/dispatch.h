// Runtime values -> template arguments: the one place where a kernel's instantiations are chosen.
#pragma once

#include "kernels/device/numeric.cuh"
#include "kernels/params.h"

namespace routed_peft::cuda {

// body.operator()<T>() for the element type of `dtype`; float64 has no kernels.
template <class Body>
cudaError_t dispatch_float(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body.template operator()<float>();
    case Dtype::kBFloat16:
      return body.template operator()<bfloat16>();
    case Dtype::kFloat16:
      return body.template operator()<half>();
    default:
      return cudaErrorInvalidValue;
  }
}

// body.operator()<width>() for a padded width.
template <class Body>
cudaError_t dispatch_width(int padded_width, const Body& body) {
  switch (padded_width) {
    case 16:
      return body.template operator()<16>();
    case 32:
      return body.template operator()<32>();
    case 64:
      return body.template operator()<64>();
    case 128:
      return body.template operator()<128>();
    case 256:
      return body.template operator()<256>();
    default:
      return cudaErrorInvalidValue;
  }
}

// body.operator()<value>().
template <class Body>
cudaError_t dispatch_bool(bool value, const Body& body) {
  return value ? body.template operator()<true>() : body.template operator()<false>();
}

}  // namespace routed_peft::cuda
