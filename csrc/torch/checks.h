// What an op asks of its tensors before it reads their memory. The messages for users are in routed_peft/checks.py;
// these keep a direct call from touching memory that is not its own.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "kernels/params.h"

namespace routed_peft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType accumulated_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_size(const char* name, int64_t got, int64_t wanted) {
  STD_TORCH_CHECK(got == wanted, name, " has ", got, " elements or rows where ", wanted, " are needed");
}

// The tensor's memory, which must be there if it has elements (a storage can be resized away).
inline void* data_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  void* data = t.data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, name, " has no memory behind it");
  return data;
}

// Any strides, two dimensions; rows and cols of -1 are free.
inline Matrix matrix_of(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, " must be a matrix on the CPU, got ", t.dim(), " dimensions");
  if (rows >= 0) check_size(name, t.size(0), rows);
  if (cols >= 0) check_size(name, t.size(1), cols);
  return {data_of(name, t), dtype_of(name, t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

inline Matrix matrix_of(const char* name, const MaybeTensor& t, int64_t rows, int64_t cols) {
  return t ? matrix_of(name, *t, rows, cols) : Matrix{};
}

// A contiguous [..., cols] tensor as [rows, cols].
inline Matrix rows_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() >= 2 && t.is_contiguous(), name,
                  " must be contiguous, on the CPU, and have rows");
  const int64_t cols = t.size(t.dim() - 1);
  STD_TORCH_CHECK(cols > 0, name, " must have columns");
  return dense(data_of(name, t), dtype_of(name, t), t.numel() / cols, cols);
}

inline Matrix vector_of(const char* name, const MaybeTensor& t, int64_t size) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1, name, " must be a vector on the CPU");
  check_size(name, t->numel(), size);
  return {data_of(name, *t), dtype_of(name, *t), 1, size, size, size > 1 ? t->stride(0) : 1};
}

template <class T>
const T* array_of(const char* name, const MaybeTensor& t, ScalarType type, int64_t size) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == type, name,
                  " must be contiguous, on the CPU, and of the documented dtype");
  check_size(name, t->numel(), size);
  static const T kNothing{};  // an empty tensor is there, though its memory may not be
  return size == 0 ? &kNothing : static_cast<const T*>(data_of(name, *t));
}

// A contiguous tensor of one dtype and `size` elements, of whatever shape: what a forward saved.
inline void* saved_of(const char* name, const Tensor& t, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type, name, " must be what the forward returned");
  check_size(name, t.numel(), size);
  return data_of(name, t);
}

inline Sequences sequences_of(const char* name, const MaybeTensor& offsets, int64_t count, int64_t rows) {
  if (!offsets) {
    STD_TORCH_CHECK(count > 0 ? rows % count == 0 : rows == 0, name, ": ", rows, " rows cannot be split over ", count);
    return {count, rows, nullptr};
  }
  STD_TORCH_CHECK(offsets->numel() >= 1, name, " must have at least one offset");
  const int64_t samples = offsets->numel() - 1;
  const int64_t* o = array_of<int64_t>(name, offsets, ScalarType::Long, samples + 1);
  STD_TORCH_CHECK(o[0] == 0 && o[samples] == rows, name, " must run from 0 to the ", rows, " rows");
  for (int64_t i = 0; i < samples; ++i) STD_TORCH_CHECK(o[i] <= o[i + 1], name, " must not fall");
  return {samples, rows, o};
}

}  // namespace routed_peft
