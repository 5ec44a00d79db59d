// Takes a plugin of libgenrec_trt.so through what TensorRT does with it, without TensorRT: creator, fields, a second plugin
// from the serialized fields, its clone in a context; then types, formats, workspace, shapes and launch. For ctypes.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Log : ILogger {
  std::string text;
  void log(Severity, const char* sentence) noexcept override { text += std::string(sentence) + "\n"; }
};
Log logger;
struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

struct Failed {
  std::string step;
};
void expect(bool holds, const std::string& step) {
  if (!holds) throw Failed{step};
}

template <typename T>
T* part(IPluginV3& plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin.getCapabilityInterface(type));
}

}  // namespace

struct HarnessField {
  const char* name;
  int32_t type;
  const void* data;
};
struct HarnessTensor {
  int32_t type, rank;
  int64_t shape[8], largest[8];  // now, and in the profile
  void* data;
};

// The workspace that the plugin asks for. `message` gets the step that failed and what the plugin logged, "" where none did.
extern "C" size_t harness_run(const char* library, const char* op, const HarnessField* given, int fields,
                              const HarnessTensor* tensors, int nin, int nout, bool launches, void* workspace, void* stream,
                              char* message, size_t capacity) {
  size_t bytes = 0;
  *message = 0;
  logger.text.clear();
  try {
    void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    expect(opened, "load");
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(opened, "setLoggerFinder"))(&finder);
    int32_t count = 0;
    auto* const* creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(opened, "getCreators"))(count);
    IPluginCreatorV3One* creator = nullptr;
    for (int i = 0; i < count; i++) {
      auto* candidate = static_cast<IPluginCreatorV3One*>(creators[i]);
      if (!std::strcmp(candidate->getPluginName(), op) && !std::strcmp(candidate->getPluginNamespace(), "genrec")) creator = candidate;
    }
    expect(creator, "creator");

    std::vector<PluginField> list;
    for (int i = 0; i < fields; i++) list.emplace_back(given[i].name, given[i].data, PluginFieldType(given[i].type), 1);
    const PluginFieldCollection collection{fields, list.data()};
    const std::unique_ptr<IPluginV3> first(creator->createPlugin("node", &collection, TensorRTPhase::kBUILD));
    expect(first != nullptr, "create");
    const auto* serialized = part<IPluginV3OneRuntime>(*first, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
    const std::unique_ptr<IPluginV3> second(creator->createPlugin("node", serialized, TensorRTPhase::kRUNTIME));
    expect(second != nullptr, "create again");
    auto* build = part<IPluginV3OneBuild>(*second, PluginCapabilityType::kBUILD);

    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<PluginTensorDesc> descs;
    std::vector<DataType> types;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (int i = 0; i < nin + nout; i++) {
      Dims shape{tensors[i].rank, {}}, largest{tensors[i].rank, {}};
      std::memcpy(shape.d, tensors[i].shape, sizeof shape.d);
      std::memcpy(largest.d, tensors[i].largest, sizeof largest.d);
      descs.push_back({shape, DataType(tensors[i].type), TensorFormat::kLINEAR, 1.f});
      dynamic.push_back({descs[i], shape, largest, largest});
      types.push_back(descs[i].type);
      if (i < nin) inputs.push_back(tensors[i].data);
      else outputs.push_back(tensors[i].data);
    }
    std::vector<DataType> made(nout);
    expect(build->getNbOutputs() == nout && !build->getOutputDataTypes(made.data(), nout, types.data(), nin), "types");
    for (int i = 0; i < nin + nout; i++)
      expect(build->supportsFormatCombination(i, dynamic.data(), nin, nout), "format of tensor " + std::to_string(i));
    for (int i = 0; i < nout; i++) expect(made[i] == types[nin + i], "types");
    expect(!build->configurePlugin(dynamic.data(), nin, dynamic.data() + nin, nout), "configure");
    bytes = build->getWorkspaceSize(dynamic.data(), nin, dynamic.data() + nin, nout);

    const std::unique_ptr<IPluginV3> third(
        part<IPluginV3OneRuntime>(*second, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr));
    auto* run = part<IPluginV3OneRuntime>(*third, PluginCapabilityType::kRUNTIME);
    expect(!run->onShapeChange(descs.data(), nin, descs.data() + nin, nout), "shapes");
    if (launches)
      expect(!run->enqueue(descs.data(), descs.data() + nin, inputs.data(), outputs.data(), workspace,
                           static_cast<cudaStream_t>(stream)), "enqueue");
  } catch (const Failed& failed) {
    std::snprintf(message, capacity, "%s: %s", failed.step.c_str(), logger.text.c_str());
  }
  return bytes;
}
