// What every IPluginV3 of the library shares. An operator derives from Plugin, says what its tensors and attributes are, and
// launches its kernels. What is wrong is thrown as a sentence; TensorRT sees it in its log, and a return code that is not 0.
#pragma once

#include "driver.h"
#include "kernels.h"

#include <NvInferRuntime.h>

#include <string>
#include <utility>
#include <vector>

namespace genrec {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IExprBuilder;
using nvinfer1::IPluginV3;
using nvinfer1::PluginTensorDesc;
using Descs = const PluginTensorDesc*;

// An input or an output.
struct Tensor {
  const char* name;
  char type;  // 'T' the floating-point type of the first tensor, 'f' float32, 'i' int32, 'l' int64, 'j' int32 or int64
  int rank;   // -1 for any
};

// An attribute of the ONNX node: the member that holds it. All of them must be given.
struct Attribute {
  const char* name;
  float* real;       // or
  int32_t* integer;  // which arrives as INT32 or INT64
};

class Plugin : public IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  virtual const char* name() const noexcept = 0;
  virtual std::vector<Tensor> inputs() const = 0;
  virtual std::vector<Tensor> outputs() const = 0;
  virtual std::vector<Attribute> attributes() = 0;
  virtual void check_attributes() const = 0;
  virtual void output_shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder& builder) const = 0;

  // Take the sizes of tensors of the right rank.
  virtual void measure(Descs in) = 0;
  // Throw where the shapes do not fit together, once they are measured.
  virtual void check_shapes(Descs in) const = 0;
  // What the kernels for the measured sizes are called.
  virtual std::string kernels() const = 0;
  // Bytes for the measured sizes, on any device.
  virtual size_t workspace() const { return 0; }
  // Launch for the measured sizes. in, out and workspace are null where nothing but loading is asked for.
  virtual void launch(const Launcher& launcher, const void* const* in, void* const* out, char* workspace) const = 0;

  void configure(const nvinfer1::PluginFieldCollection& fields);

  // TensorRT's side
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
  IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final { return clone(); }
  const char* getPluginName() const noexcept final { return name(); }
  const char* getPluginVersion() const noexcept final { return "1"; }
  const char* getPluginNamespace() const noexcept final { return "genrec"; }
  int32_t getNbOutputs() const noexcept final { return int32_t(outputs().size()); }
  int32_t getOutputDataTypes(DataType* out, int32_t nout, const DataType* in, int32_t nin) const noexcept final;
  int32_t getOutputShapes(const DimsExprs* in, int32_t nin, const DimsExprs*, int32_t, DimsExprs* out, int32_t nout,
                          IExprBuilder& builder) noexcept final;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t nin,
                                 int32_t nout) noexcept final;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nin, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t nout) noexcept final;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nin, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t nout) const noexcept final;
  int32_t onShapeChange(Descs in, int32_t nin, Descs, int32_t nout) noexcept final;
  int32_t enqueue(Descs in, Descs, const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept final;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final;

 protected:
  Plugin() = default;
  Plugin(const Plugin& other);
  // Throws unless an input has this shape; `layout` names the dimensions.
  void expect_shape(Descs in, int index, std::initializer_list<int64_t> shape, const char* layout) const;

 private:
  void measure_known(Descs in);
  void expect_counts(int nin, int nout) const;
  template <typename F>
  int32_t guarded(const char* where, F&& body) const noexcept;

  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Into TensorRT's log, or to stderr where there is none.
void log_error(const std::string& sentence) noexcept;

// An operator's creator.
template <typename Op>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (const Attribute& a : prototype_.attributes())
      fields_.emplace_back(a.name, nullptr,
                           a.real ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32, 1);
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }
  IPluginV3* createPlugin(const char* node, const nvinfer1::PluginFieldCollection* fields,
                          nvinfer1::TensorRTPhase) noexcept override {
    try {
      Op op;
      op.configure(*fields);
      return new Op(op);
    } catch (const std::exception& error) {
      log_error(std::string("genrec::") + prototype_.name() + " (" + node + "): " + error.what());
      return nullptr;
    }
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return prototype_.name(); }
  const char* getPluginVersion() const noexcept override { return "1"; }
  const char* getPluginNamespace() const noexcept override { return "genrec"; }

 private:
  Op prototype_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// "relu_attention fp16 H=2 D=32": the name that genrec/export/kernel_images.py gives to the kernels of an operator.
std::string kernel_name(const char* op, DataType type, std::initializer_list<std::pair<const char*, int64_t>> sizes);

inline int64_t bytes_of(DataType type) { return type == DataType::kFLOAT ? 4 : 2; }  // of a 'T'

}  // namespace genrec
