// The Triton kernels compiled ahead of time: which image serves a size on the current device, and how it is launched.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace genrec {

constexpr int kParameters = 40, kConstants = 16;  // of a kernel, at most, and one

struct Parameter {
  // "p" pointer, "i" int32, "l" int64, "f" float, a capital one a multiple of 16; not passed: "n" always None, "1" always 1
  char code;
  const char* name;
};
struct Constant {
  const char* name;
  int64_t value;
};

// One row of images.inc. Arrays end with an element of zeros.
struct Image {
  const char *name, *kernel;  // "moe_route fp16 E=4 k=2 renormalize=1", "route_kernel"
  int32_t most;               // the largest size it serves
  int32_t arch;               // 90: machine code for sm_90
  bool is_ptx;                // which any device from `arch` on compiles when it loads it
  int32_t shared, threads;    // bytes and threads of a block
  uint32_t offset;            // in images.bin
  const char* entry;
  Parameter parameters[kParameters];
  Constant constants[kConstants];

  // A constant that the kernel was compiled with.
  int64_t operator[](const char* constant) const;
};

// Whether the library has kernels of this name, for any device: needs no driver.
bool has_kernels(const std::string& name);

// The smallest value of a constant in the images of a kernel, for any device: needs no driver.
int64_t smallest(const std::string& name, const char* kernel, const char* constant);

// An argument of the Python launch, in its order: a pointer, an integer, a float, or None.
struct None {};
class Argument {
 public:
  Argument(None) : kind_('n') {}
  Argument(const void* pointer) : kind_('p'), integer_(reinterpret_cast<intptr_t>(pointer)) {}
  Argument(int64_t integer) : kind_('i'), integer_(integer) {}
  Argument(int32_t integer) : kind_('i'), integer_(integer) {}
  Argument(float real) : kind_('f'), real_(real) {}

  // The eight bytes that the driver reads, or fewer of them; throws where the image was compiled for other values.
  uint64_t pack(const Image& image, const Parameter& parameter) const;

 private:
  char kind_;
  int64_t integer_ = 0;
  float real_ = 0;
};

// Kernels in the current context, each loaded when it is first asked for.
class Launcher {
 public:
  // Without `launches` kernels are loaded and arguments checked, as far as they are known: loading is not allowed while a
  // graph is captured.
  explicit Launcher(void* stream, bool launches = true) : stream_(stream), launches_(launches) {}

  // Whether there is a driver with a current context.
  static bool is_possible() noexcept;

  // The image of a kernel for this device: of the size classes the smallest that holds `size`, or else the largest.
  const Image& find(const std::string& name, const char* kernel, int64_t size = 0) const;

  // Start so many programs; none of them is no launch.
  void launch(const Image& image, int64_t programs, std::initializer_list<Argument> arguments) const;

 private:
  void* stream_;
  bool launches_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace genrec
