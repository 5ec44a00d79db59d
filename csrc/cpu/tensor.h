// What the operators' files share: torch's stable tensors seen as plain memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <new>

namespace genrec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype of what kernels compute in.
template <typename C> constexpr ScalarType kType = ScalarType::Float;
template <> inline constexpr ScalarType kType<double> = ScalarType::Double;

// Every call through the dispatcher costs more than a microsecond: none where there is nothing to do.
inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}
inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Memory for a result, contiguous. torch::stable::new_empty finds the operator by its name, which takes longer than a small
// norm; this one is a function call.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes.data(), sizes.size(), &dtype, &layout, &device, -1, nullptr, &result));
  return Tensor(result);
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Memory without initial values that begins with a cache line.
struct FreeBuffer {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <typename T> using Buffer = std::unique_ptr<T[], FreeBuffer>;
template <typename T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64))));
}

}  // namespace genrec
