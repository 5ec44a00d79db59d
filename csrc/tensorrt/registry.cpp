// The two functions that TensorRT looks for in a plugin library, and the log they give access to.
#include "operators.h"
#include "plugin.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <typeinfo>

#define GENREC_EXPORT extern "C" __attribute__((visibility("default")))

namespace genrec {

using nvinfer1::ILogger;
using nvinfer1::ILoggerFinder;

static std::atomic<ILoggerFinder*> finder{nullptr};

// The interfaces of TensorRT-RTX, whose methods stand elsewhere in the table of virtual functions, for there both classes have
// a base. Not in an anonymous namespace: the compiler would see that nobody implements them, and drop the calls.
namespace rtx {
struct Logger : nvinfer1::IVersionedInterface {
  virtual void log(ILogger::Severity, const char*) noexcept = 0;
};
struct Finder : nvinfer1::IVersionedInterface {
  virtual Logger* findLogger() = 0;
};
}  // namespace rtx

#if NV_TENSORRT_MAJOR == 10
// Whether a library built with the headers of TensorRT 10 was loaded by TensorRT-RTX: the finder's base has a versioned name.
static bool is_rtx(const ILoggerFinder& found) {
  const auto* type = dynamic_cast<const abi::__si_class_type_info*>(&typeid(found));
  return type && std::strstr(type->__base_type->name(), "v_1_0");
}
#else
static bool is_rtx(const ILoggerFinder&) { return false; }
#endif

void log_error(const std::string& sentence) noexcept {
  const auto severity = ILogger::Severity::kERROR;
  if (ILoggerFinder* found = finder.load()) {
    if (is_rtx(*found)) {
      rtx::Logger* logger = reinterpret_cast<rtx::Finder*>(found)->findLogger();
      if (logger) return logger->log(severity, sentence.c_str());
    } else if (ILogger* logger = found->findLogger()) {
      return logger->log(severity, sentence.c_str());
    }
  }
  std::fprintf(stderr, "%s\n", sentence.c_str());
}

}  // namespace genrec

GENREC_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { genrec::finder = finder; }

GENREC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {
      genrec::group_layer_norm(),       genrec::add_group_layer_norm(), genrec::relu_attention(),
      genrec::relu_attention_limited(), genrec::moe_route(),            genrec::moe_experts(),
  };
  count = int32_t(std::size(creators));
  return creators;
}
