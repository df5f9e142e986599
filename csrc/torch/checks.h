// What an op asks of its tensors before anything touches their memory. The messages for users are in
// routed_peft/checks.py; these keep a direct call from touching memory that is not its own.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "kernels/params.h"

namespace routed_peft {

using torch::headeronly::DeviceType;
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

inline ScalarType type_of(Dtype dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  return kTypes[static_cast<int>(dtype)];
}

inline Dtype accumulated_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }
inline ScalarType accumulated_type(Dtype dtype) { return type_of(accumulated_dtype(dtype)); }

inline void check_size(const char* name, int64_t got, int64_t wanted) {
  STD_TORCH_CHECK(got == wanted, name, " has ", got, " elements or rows where ", wanted, " are needed");
}

// Where the tensors of a call lie. Their values (offsets, index, seed) are looked at where they are `readable`; on a
// device that would wait for it, so there the kernels take them as they are and guard every access.
struct Place {
  torch::stable::Device device;
  bool readable;

  bool is_cpu() const { return device.type() == DeviceType::CPU; }
  std::string name() const { return is_cpu() ? "the CPU" : "cuda:" + std::to_string(device.index()); }
  bool holds(const Tensor& t) const {
    return is_cpu() ? t.is_cpu() : t.is_cuda() && t.get_device_index() == device.index();
  }

  // The tensor's memory, which must be there if it has elements (a storage can be resized away).
  void* data_of(const char* what, const Tensor& t) const {
    STD_TORCH_CHECK(holds(t), what, " must be on ", name());
    void* data = t.data_ptr();
    STD_TORCH_CHECK(data != nullptr || t.numel() == 0, what, " has no memory behind it");
    return data;
  }

  // Any strides, two dimensions; rows and cols of -1 are free.
  Matrix matrix_of(const char* what, const Tensor& t, int64_t rows, int64_t cols) const {
    STD_TORCH_CHECK(t.dim() == 2, what, " must be a matrix, got ", t.dim(), " dimensions");
    if (rows >= 0) check_size(what, t.size(0), rows);
    if (cols >= 0) check_size(what, t.size(1), cols);
    return {data_of(what, t), dtype_of(what, t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
  }
  Matrix matrix_of(const char* what, const MaybeTensor& t, int64_t rows, int64_t cols) const {
    return t ? matrix_of(what, *t, rows, cols) : Matrix{};
  }

  // A contiguous [..., cols] tensor as [rows, cols].
  Matrix rows_of(const char* what, const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() >= 2 && t.is_contiguous(), what, " must be contiguous and have rows");
    const int64_t cols = t.size(t.dim() - 1);
    STD_TORCH_CHECK(cols > 0, what, " must have columns");
    return dense(data_of(what, t), dtype_of(what, t), t.numel() / cols, cols);
  }

  Matrix vector_of(const char* what, const MaybeTensor& t, int64_t size) const {
    if (!t) return {};
    STD_TORCH_CHECK(t->dim() == 1, what, " must be a vector");
    check_size(what, t->numel(), size);
    return {data_of(what, *t), dtype_of(what, *t), 1, size, size, size > 1 ? t->stride(0) : 1};
  }

  template <class T>
  const T* array_of(const char* what, const MaybeTensor& t, ScalarType type, int64_t size) const {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == type, what,
                    " must be contiguous and of the documented dtype");
    check_size(what, t->numel(), size);
    void* data = data_of(what, *t);
    static const T kNothing{};  // an empty tensor is there, though its memory may not be
    return size == 0 ? &kNothing : static_cast<const T*>(data);
  }

  // A contiguous tensor of one dtype and `size` elements, of whatever shape: what a forward saved.
  void* saved_of(const char* what, const Tensor& t, ScalarType type, int64_t size) const {
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type, what, " must be what the forward returned");
    check_size(what, t.numel(), size);
    return data_of(what, t);
  }

  Sequences sequences_of(const char* what, const MaybeTensor& offsets, int64_t count, int64_t rows) const {
    if (!offsets) {
      STD_TORCH_CHECK(count > 0 ? rows % count == 0 : rows == 0, what, ": ", rows, " rows cannot be split over ",
                      count);
      return {count, rows, nullptr};
    }
    STD_TORCH_CHECK(offsets->numel() >= 1, what, " must have at least one offset");
    const int64_t samples = offsets->numel() - 1;
    STD_TORCH_CHECK(samples > 0 || rows == 0, what, " has no samples for the ", rows, " rows");
    const int64_t* o = array_of<int64_t>(what, offsets, ScalarType::Long, samples + 1);
    if (readable) {
      STD_TORCH_CHECK(o[0] == 0 && o[samples] == rows, what, " must run from 0 to the ", rows, " rows");
      for (int64_t i = 0; i < samples; ++i) STD_TORCH_CHECK(o[i] <= o[i + 1], what, " must not fall");
    }
    return {samples, rows, o};
  }
};

}  // namespace routed_peft
