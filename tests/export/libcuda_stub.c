// Stands in for libcuda.so.1: remembers the calls as JSON, one a line, and runs nothing. It answers for a device of one
// compute capability and for the current context, both set by `stub_use`. How many bytes an argument has is read from the
// image itself, as a GPU would.
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 64, KPARAM_INFO = 0x17, SIZED = 4 };
typedef struct {
  const void *image;
  int count, sizes[MOST];
} Module;

static char record[1 << 20];
static size_t used;
static int capability = 80;
static uintptr_t context = 1;

static void note(const char *format, ...) {
  va_list values;
  va_start(values, format);
  used += vsnprintf(record + used, sizeof record - used, format, values);
  va_end(values);
}

void stub_use(int device_capability, uintptr_t current_context) {
  capability = device_capability;
  context = current_context;
}

// The calls since the last time.
const char *stub_calls(void) {
  static char calls[sizeof record];
  memcpy(calls, record, used);
  calls[used] = 0;
  used = 0;
  return calls;
}

static size_t size_of(const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(image, ELFMAG, SELFMAG)) return strlen(image) + 1;
  return header->e_shoff + header->e_shnum * sizeof(Elf64_Shdr);
}

static void sizes_of_ptx(Module *module, const char *text) {
  const char *place = strstr(text, ".entry"), *end = strchr(place, ')');
  while ((place = strstr(place, ".param .")) && place < end) {
    place += strlen(".param .");
    module->sizes[module->count++] = atoi(place + 1) / 8;  // u64, u32, f32
  }
}

// .nv.info.<kernel>: records of a format, an attribute and two bytes, which are the size of what follows if SIZED.
static void sizes_of_cubin(Module *module, const unsigned char *file) {
  const Elf64_Ehdr *header = (const void *)file;
  const Elf64_Shdr *sections = (const void *)(file + header->e_shoff);
  const char *names = (const char *)file + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++) {
    if (strncmp(names + sections[i].sh_name, ".nv.info.", 9)) continue;
    const unsigned char *at = file + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) {
      int size = at[0] == SIZED ? at[2] | at[3] << 8 : 0;
      if (size && at[1] == KPARAM_INFO) {  // index, ordinal, offset, and the size above 18 bits of other things
        int ordinal = at[8] | at[9] << 8;
        uint32_t word;
        memcpy(&word, at + 12, 4);
        module->sizes[ordinal] = word >> 18;
        if (ordinal >= module->count) module->count = ordinal + 1;
      }
      at += 4 + size;
    }
  }
}

int cuInit(unsigned flags) { return flags != 0; }
int cuGetErrorString(int error, const char **text) {
  *text = error == 1 ? "invalid argument" : "something else";
  return 0;
}
int cuCtxGetCurrent(uintptr_t *current) {
  *current = context;
  return 0;
}
int cuCtxGetId(uintptr_t current, unsigned long long *id) {
  *id = current;
  return 0;
}
int cuCtxGetDevice(int *device) {
  *device = 0;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int major = capability / 10, large = capability == 80 || major == 9 || major == 10;
  *value = attribute == 75 ? major : attribute == 76 ? capability % 10 : attribute == 97 ? (large ? 163 : 99) << 10 : -1;
  return device;
}
int cuModuleLoadData(Module **module, const void *image) {
  *module = calloc(1, sizeof **module);
  (*module)->image = image;
  if (memcmp(image, ELFMAG, SELFMAG)) sizes_of_ptx(*module, image);
  else sizes_of_cubin(*module, image);
  note("{\"call\": \"load\", \"image\": %llu, \"size\": %zu}\n", (unsigned long long)(uintptr_t)image, size_of(image));
  return 0;
}
int cuModuleGetFunction(Module **function, Module *module, const char *name) {
  *function = module;
  return *name == 0;
}
int cuFuncSetAttribute(Module *function, int attribute, int value) {
  note("{\"call\": \"attribute\", \"attribute\": %d, \"value\": %d}\n", attribute, value);
  return function == NULL;
}
int cuLaunchKernel(Module *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, uintptr_t stream, void **arguments, void **extra) {
  note("{\"call\": \"launch\", \"image\": %llu, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, "
       "\"arguments\": [", (unsigned long long)(uintptr_t)function->image, gx, gy, gz, bx, by, bz, shared, (unsigned long long)stream);
  for (int i = 0; i < function->count; i++) {
    unsigned long long value = 0;
    memcpy(&value, arguments[i], function->sizes[i]);
    note("%s[%d, %llu]", i ? ", " : "", function->sizes[i], value);
  }
  note("]}\n");
  return gx == 0 || extra != NULL;
}
