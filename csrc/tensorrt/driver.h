// The CUDA driver, opened when a kernel is first needed: the library links to nothing of CUDA, and it loads, registers and
// builds engines on a machine without a GPU. GENREC_LIBCUDA names another library; the tests' records what it is asked to do.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace genrec {

// Throws the sentence where something is not as it must be.
inline void require(bool holds, const std::string& sentence) {
  if (!holds) throw std::runtime_error(sentence);
}

#define GENREC_DRIVER(X)                                                                                       \
  X(cuInit) X(cuGetErrorString) X(cuCtxGetCurrent) X(cuCtxGetId) X(cuCtxGetDevice) X(cuDeviceGetAttribute)     \
  X(cuModuleLoadData) X(cuModuleGetFunction) X(cuFuncSetAttribute) X(cuLaunchKernel)

struct Driver {
#define GENREC_DECLARE(name) decltype(&::name) name;
  GENREC_DRIVER(GENREC_DECLARE)
#undef GENREC_DECLARE

  // Throws where there is no driver; the next call tries again.
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(CUresult result, const std::string& what) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    cuGetErrorString(result, &text);
    throw std::runtime_error(what + " failed: CUDA driver error " + std::to_string(result) + ", " + (text ? text : "unknown"));
  }

  int attribute(CUdevice_attribute attribute, CUdevice device) const {
    int value = 0;
    check(cuDeviceGetAttribute(&value, attribute, device), "asking for an attribute of the device");
    return value;
  }

 private:
  Driver() {
    const char* name = std::getenv("GENREC_LIBCUDA");
    void* library = dlopen(name ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    require(library, std::string("there is no CUDA driver: ") + (library ? "" : dlerror()));
#define GENREC_BIND(name)                                             \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name));    \
  require(name, "the CUDA driver has no " #name "; expected one of CUDA 12.0 or later");
    GENREC_DRIVER(GENREC_BIND)
#undef GENREC_BIND
    check(cuInit(0), "cuInit");
  }
};

}  // namespace genrec
