#include "plugin.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace genrec {
namespace {

const char* type_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "fp32";
    case DataType::kHALF: return "fp16";
    case DataType::kBF16: return "bf16";
    default: return "unknown";
  }
}

bool is_of(char type, DataType given, DataType first) {
  switch (type) {
    case 'f': return given == DataType::kFLOAT;
    case 'i': return given == DataType::kINT32;
    case 'l': return given == DataType::kINT64;
    case 'j': return given == DataType::kINT32 || given == DataType::kINT64;
    default: return given == first && (first == DataType::kFLOAT || first == DataType::kHALF || first == DataType::kBF16);
  }
}

template <typename Sizes>
std::string shape_text(const Sizes* sizes, size_t count) {
  std::string text = "(";
  for (size_t i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

std::vector<PluginTensorDesc> largest(const nvinfer1::DynamicPluginTensorDesc* tensors, int count) {
  std::vector<PluginTensorDesc> descs;
  for (int i = 0; i < count; i++) {
    descs.push_back(tensors[i].desc);
    descs.back().dims = tensors[i].max;
  }
  return descs;
}

void read(const Attribute& attribute, const nvinfer1::PluginField& field) {
  using nvinfer1::PluginFieldType;
  const bool is_wide = field.type == PluginFieldType::kINT64, is_integer = is_wide || field.type == PluginFieldType::kINT32;
  require(field.data && field.length == 1 && (attribute.real ? field.type == PluginFieldType::kFLOAT32 : is_integer),
          std::string("attribute ") + attribute.name + " has the wrong type; expected one " +
              (attribute.real ? "float" : "int"));
  if (attribute.real) {
    std::memcpy(attribute.real, field.data, sizeof(float));
  } else if (is_wide) {
    int64_t value;
    std::memcpy(&value, field.data, sizeof value);
    require(value == int32_t(value),
            std::string("attribute ") + attribute.name + " is " + std::to_string(value) + "; expected an int32");
    *attribute.integer = int32_t(value);
  } else {
    std::memcpy(attribute.integer, field.data, sizeof(int32_t));
  }
}

}  // namespace

std::string kernel_name(const char* op, DataType type, std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  std::string name = std::string(op) + " " + type_name(type);
  for (const auto& [key, value] : sizes) name += std::string(" ") + key + "=" + std::to_string(value);
  return name;
}

// Fields are collected anew by whoever asks for them.
Plugin::Plugin(const Plugin&) : IPluginV3(), IPluginV3OneCore(), IPluginV3OneBuild(), IPluginV3OneRuntime() {}

template <typename F>
int32_t Plugin::guarded(const char* where, F&& body) const noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    log_error(std::string("genrec::") + name() + ", " + where + ": " + error.what());
    return 1;
  }
}

void Plugin::configure(const nvinfer1::PluginFieldCollection& fields) {
  for (const Attribute& attribute : attributes()) {
    const nvinfer1::PluginField* found = nullptr;
    for (int i = 0; i < fields.nbFields; i++)
      if (!std::strcmp(fields.fields[i].name, attribute.name)) found = &fields.fields[i];
    require(found, std::string("attribute ") + attribute.name + " is missing");
    read(attribute, *found);
    require(!attribute.real || std::isfinite(*attribute.real), std::string("attribute ") + attribute.name + " is not finite");
  }
  check_attributes();
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

void Plugin::expect_counts(int nin, int nout) const {
  require(size_t(nin) == inputs().size() && size_t(nout) == outputs().size(),
          "there are " + std::to_string(nin) + " inputs and " + std::to_string(nout) + " outputs; expected " +
              std::to_string(inputs().size()) + " and " + std::to_string(outputs().size()));
}

void Plugin::expect_shape(Descs in, int index, std::initializer_list<int64_t> shape, const char* layout) const {
  const Dims& dims = in[index].dims;
  require(size_t(dims.nbDims) == shape.size() && std::equal(shape.begin(), shape.end(), dims.d),
          std::string(inputs()[index].name) + " has shape " + shape_text(dims.d, dims.nbDims) + "; expected " + layout + " = " +
              shape_text(shape.begin(), shape.size()));
}

// Measure, where the library has kernels for what is measured.
void Plugin::measure_known(Descs in) {
  const std::vector<Tensor> tensors = inputs();
  for (size_t i = 0; i < tensors.size(); i++)
    require(tensors[i].rank < 0 || tensors[i].rank == in[i].dims.nbDims,
            std::string(tensors[i].name) + " has shape " + shape_text(in[i].dims.d, in[i].dims.nbDims) + "; expected " +
                std::to_string(tensors[i].rank) + " dimensions");
  measure(in);
  require(has_kernels(kernels()), "the library was built without the kernels " + kernels());
}

int32_t Plugin::getOutputDataTypes(DataType* out, int32_t nout, const DataType* in, int32_t nin) const noexcept {
  return guarded("types", [&] {
    expect_counts(nin, nout);
    const std::vector<Tensor> tensors = outputs();
    for (int i = 0; i < nout; i++)
      out[i] = tensors[i].type == 'f' ? DataType::kFLOAT : tensors[i].type == 'i' ? DataType::kINT32 : in[0];
  });
}

int32_t Plugin::getOutputShapes(const DimsExprs* in, int32_t nin, const DimsExprs*, int32_t, DimsExprs* out, int32_t nout,
                                IExprBuilder& builder) noexcept {
  return guarded("output shapes", [&] {
    expect_counts(nin, nout);
    const std::vector<Tensor> tensors = inputs();
    for (int i = 0; i < nin; i++)
      require(tensors[i].rank < 0 || tensors[i].rank == in[i].nbDims,
              std::string(tensors[i].name) + " has " + std::to_string(in[i].nbDims) + " dimensions; expected " +
                  std::to_string(tensors[i].rank));
    output_shapes(in, out, builder);
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t nin,
                                       int32_t nout) noexcept {
  std::vector<Tensor> expected = inputs();
  for (const Tensor& output : outputs()) expected.push_back(output);
  const PluginTensorDesc& given = tensors[position].desc;
  return size_t(nin + nout) == expected.size() && given.format == nvinfer1::TensorFormat::kLINEAR &&
         is_of(expected[position].type, given.type, tensors[0].desc.type);
}

// The largest shapes of a profile need not fit together, but what a model fixes is in them: an engine whose kernels are
// missing is not built.
int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nin,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t nout) noexcept {
  return guarded("configuration", [&] {
    expect_counts(nin, nout);
    measure_known(largest(in, nin).data());
  });
}

size_t Plugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nin,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t nout) const noexcept {
  size_t bytes = 0;
  guarded("workspace", [&] {
    expect_counts(nin, nout);
    const std::unique_ptr<Plugin> copy(static_cast<Plugin*>(const_cast<Plugin*>(this)->clone()));
    copy->measure_known(largest(in, nin).data());
    bytes = copy->workspace();
  });
  return bytes;
}

int32_t Plugin::onShapeChange(Descs in, int32_t nin, Descs, int32_t nout) noexcept {
  return guarded("shapes", [&] {
    expect_counts(nin, nout);
    measure_known(in);
    check_shapes(in);
    if (!Launcher::is_possible()) return;
    const std::vector<const void*> no_inputs(nin);
    const std::vector<void*> no_outputs(nout);
    launch(Launcher(nullptr, false), no_inputs.data(), no_outputs.data(), nullptr);
  });
}

int32_t Plugin::enqueue(Descs, Descs, const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  return guarded("launch", [&] { launch(Launcher(stream), inputs, outputs, static_cast<char*>(workspace)); });
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  fields_.clear();
  for (const Attribute& a : attributes()) {
    if (a.real) fields_.emplace_back(a.name, a.real, nvinfer1::PluginFieldType::kFLOAT32, 1);
    else fields_.emplace_back(a.name, a.integer, nvinfer1::PluginFieldType::kINT32, 1);
  }
  collection_ = {int32_t(fields_.size()), fields_.data()};
  return &collection_;
}

}  // namespace genrec
