#include "kernels.h"

#include "driver.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

// .incbin takes no time, where the same bytes as an array take seconds a megabyte.
asm(".section .rodata\n.balign 64\n.hidden genrec_images\n.global genrec_images\ngenrec_images:\n.incbin \"" GENREC_IMAGES
    "\"\n.byte 0\n.previous\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char genrec_images[];

namespace genrec {
namespace {

constexpr Image kImages[] = {
#include "images.inc"
};
constexpr int kFreeShared = 48 << 10;  // bytes that a block has without asking

using Images = std::vector<const Image*>;

const Images& images_of(const std::string& name, const char* kernel) {
  static const auto& all = *[] {  // never freed: plugins may outlive static objects
    auto* images = new std::unordered_map<std::string, Images>;
    for (const Image& image : kImages) {
      (*images)[image.name].push_back(&image);
      (*images)[std::string(image.name) + ", " + image.kernel].push_back(&image);
    }
    return images;
  }();
  static const Images none;
  const auto found = all.find(*kernel ? name + ", " + kernel : name);
  return found == all.end() ? none : found->second;
}

std::string text(const Image& image) {
  return std::string(image.name) + ", " + image.kernel + " for sm_" + std::to_string(image.arch);
}

// How well an image suits a device, 0 where it does not run. Machine code runs on its own major version from its minor one
// on, but from sm_90 on Triton compiles for the "a" architectures, whose code runs on exactly that device.
int rank(const Image& image, int arch) {
  if (image.is_ptx) return arch >= image.arch ? 1 : 0;
  if (image.arch == arch) return 1000;
  return arch < 90 && arch / 10 == image.arch / 10 && arch > image.arch ? image.arch : 0;
}

struct Context {
  int arch = 0, shared = 0;  // of its device: 90 for sm_90; bytes that a block can have
  std::unordered_map<const Image*, CUfunction> functions;
};

std::mutex mutex;

// What is known of the current context; `mutex` is held. An id is never used again, an address may be.
Context& current() {
  static auto& contexts = *new std::map<unsigned long long, Context>;
  const Driver& cuda = Driver::get();
  CUcontext handle = nullptr;
  unsigned long long id = 0;
  cuda.check(cuda.cuCtxGetCurrent(&handle), "asking for the current context");
  require(handle, "no CUDA context is current on this thread");
  cuda.check(cuda.cuCtxGetId(handle, &id), "asking for the context's id");
  Context& context = contexts[id];
  if (!context.arch) {
    CUdevice device;
    cuda.check(cuda.cuCtxGetDevice(&device), "asking for the context's device");
    context.shared = cuda.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
    context.arch = 10 * cuda.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) +
                   cuda.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  }
  return context;
}

CUfunction load(const Image& image, int shared) {
  const Driver& cuda = Driver::get();
  require(image.shared <= shared, text(image) + " takes " + std::to_string(image.shared) +
                                      " bytes of shared memory; a block of this device can have " + std::to_string(shared));
  CUmodule module;
  CUfunction function;
  cuda.check(cuda.cuModuleLoadData(&module, genrec_images + image.offset), "loading " + text(image));
  cuda.check(cuda.cuModuleGetFunction(&function, module, image.entry), "finding the entry of " + text(image));
  if (image.shared > kFreeShared)
    cuda.check(cuda.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, image.shared),
               "asking for the shared memory of " + text(image));
  return function;
}

CUfunction function_of(const Image& image) {
  const std::lock_guard<std::mutex> lock(mutex);
  Context& context = current();
  CUfunction& function = context.functions[&image];
  if (!function) function = load(image, context.shared);
  return function;
}

}  // namespace

int64_t Image::operator[](const char* constant) const {
  for (const Constant* c = constants; c->name; c++)
    if (!std::strcmp(c->name, constant)) return c->value;
  throw std::runtime_error(text(*this) + " has no constant " + constant);
}

bool has_kernels(const std::string& name) { return !images_of(name, "").empty(); }

int64_t smallest(const std::string& name, const char* kernel, const char* constant) {
  int64_t least = INT64_MAX;
  for (const Image* image : images_of(name, kernel)) least = std::min(least, (*image)[constant]);
  return least;
}

uint64_t Argument::pack(const Image& image, const Parameter& parameter) const {
  const char code = parameter.code, kind = code | 32;  // of the lower case
  const char* expected = nullptr;
  if (code == 'n') expected = kind_ == 'n' ? nullptr : "None";
  else if (code == '1') expected = kind_ == 'i' && integer_ == 1 ? nullptr : "1";
  else if (kind_ != (kind == 'l' ? 'i' : kind)) expected = "another type";
  else if (code != kind && integer_ % 16) expected = "a multiple of 16";
  else if (kind == 'i' && integer_ != int32_t(integer_)) expected = "an int32";
  if (expected) {
    const std::string value = kind_ == 'n' ? "None" : std::to_string(kind_ == 'f' ? int64_t(real_) : integer_);
    throw std::runtime_error(text(image) + ": " + parameter.name + " is " + value + "; expected " + expected);
  }
  uint64_t bytes = 0;
  if (kind_ == 'f') std::memcpy(&bytes, &real_, sizeof real_);
  else std::memcpy(&bytes, &integer_, sizeof integer_);
  return bytes;
}

bool Launcher::is_possible() noexcept {
  CUcontext context = nullptr;
  try {
    return Driver::get().cuCtxGetCurrent(&context) == CUDA_SUCCESS && context;
  } catch (const std::exception&) {
    return false;
  }
}

const Image& Launcher::find(const std::string& name, const char* kernel, int64_t size) const {
  int arch;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    arch = current().arch;
  }
  const Image* best = nullptr;
  const auto is_better = [&](const Image& a, const Image& b) {
    if (rank(a, arch) != rank(b, arch)) return rank(a, arch) > rank(b, arch);
    const bool a_holds = a.most >= size, b_holds = b.most >= size;
    return a_holds != b_holds ? a_holds : a_holds ? a.most < b.most : a.most > b.most;
  };
  for (const Image* image : images_of(name, kernel))
    if (rank(*image, arch) && (!best || is_better(*image, *best))) best = image;
  if (!best)
    throw std::runtime_error("the library has no kernel " + name + ", " + kernel + " for sm_" + std::to_string(arch));
  return *best;
}

// Sentences are made only where something is wrong: a launch costs the CPU as little as it can.
void Launcher::launch(const Image& image, int64_t programs, std::initializer_list<Argument> arguments) const {
  if (programs == 0) return;  // an empty grid is an error to CUDA
  if (programs > INT32_MAX)
    throw std::runtime_error(text(image) + " would need " + std::to_string(programs) + " blocks; a grid has fewer than 2^31");
  uint64_t values[kParameters + 2] = {};
  void* pointers[kParameters + 2];
  size_t count = 0;
  const Parameter* parameter = image.parameters;
  for (const Argument& argument : arguments) {
    if (!parameter->code) break;
    const uint64_t value = argument.pack(image, *parameter);
    if (parameter->code != 'n' && parameter->code != '1') values[count++] = value;
    parameter++;
  }
  if (parameter->code || arguments.size() != size_t(parameter - image.parameters))
    throw std::runtime_error(text(image) + " takes another number of arguments than " + std::to_string(arguments.size()));
  count += 2;  // Triton's two pointers to scratch memory, which these kernels do not use: null
  for (size_t i = 0; i < count; i++) pointers[i] = &values[i];

  const CUfunction function = function_of(image);
  if (!launches_) return;
  const Driver& cuda = Driver::get();
  const CUresult result = cuda.cuLaunchKernel(function, unsigned(programs), 1, 1, image.threads, 1, 1, image.shared,
                                              static_cast<CUstream>(stream_), pointers, nullptr);
  if (result != CUDA_SUCCESS) cuda.check(result, "launching " + text(image));
}

}  // namespace genrec
