// A listener for NVTX: writes every push and pop of ranges to the file $NVTX_RECORD, one JSON object a line, with the
// payload's values under the names of its schema. NVTX loads it where NVTX_INJECTION64_PATH names it.
#define NVTX_NO_IMPL
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <nvtx3/nvToolsExt.h>
#include <nvtx3/nvToolsExtPayload.h>

namespace {

struct Field {
  std::string name;
  uint64_t type, offset;
};

struct Schema {
  std::vector<Field> fields;
  size_t size;  // bytes
};

std::mutex lock;
std::FILE* file = std::fopen(std::getenv("NVTX_RECORD"), "w");
std::vector<std::string> domains{""};
std::map<uint64_t, Schema> schemas;

// Every value is an integer of 8 bytes or a fixed array of them; a field's type is a schema that says how many.
std::string payload(const nvtxEventAttributes_t& event) {
  if (event.payloadType != NVTX_PAYLOAD_TYPE_EXT) return "{}";
  const auto& data = *reinterpret_cast<const nvtxPayloadData_t*>(event.payload.ullValue);
  std::string text = "{";
  for (const Field& field : schemas[data.schemaId].fields) {
    text += (text.size() > 1 ? ", \"" : "\"") + field.name + "\": [";
    for (size_t i = 0; i < schemas[field.type].size; i += 8) {
      int64_t value;
      std::memcpy(&value, static_cast<const char*>(data.payload) + field.offset + i, 8);
      text += (i ? ", " : "") + std::to_string(value);
    }
    text += "]";
  }
  return text + "}";
}

int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  std::lock_guard<std::mutex> held(lock);
  const void* message = event->messageType == NVTX_MESSAGE_TYPE_REGISTERED
                            ? static_cast<const void*>(event->message.registered)
                            : static_cast<const void*>(event->message.ascii);
  std::fprintf(file, "{\"domain\": \"%s\", \"push\": \"%s\", \"payload\": %s}\n",
               domains[reinterpret_cast<size_t>(domain)].c_str(), static_cast<const char*>(message),
               payload(*event).c_str());
  std::fflush(file);
  return 0;
}

int NVTX_API pop(nvtxDomainHandle_t domain) {
  std::lock_guard<std::mutex> held(lock);
  std::fprintf(file, "{\"domain\": \"%s\", \"pop\": true}\n", domains[reinterpret_cast<size_t>(domain)].c_str());
  std::fflush(file);
  return 0;
}

nvtxDomainHandle_t NVTX_API create_domain(const char* name) {
  std::lock_guard<std::mutex> held(lock);
  domains.push_back(name);
  return reinterpret_cast<nvtxDomainHandle_t>(domains.size() - 1);
}

nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t, const char* text) {
  return reinterpret_cast<nvtxStringHandle_t>(strdup(text));
}

uint64_t NVTX_API register_schema(nvtxDomainHandle_t, const nvtxPayloadSchemaAttr_t* schema) {
  std::lock_guard<std::mutex> held(lock);
  Schema found{{}, schema->payloadStaticSize};
  for (size_t i = 0; i < schema->numEntries; ++i) {
    const nvtxPayloadSchemaEntry_t& entry = schema->entries[i];
    found.fields.push_back({entry.name ? entry.name : "", entry.type, entry.offset});
  }
  const uint64_t id = NVTX_PAYLOAD_SCHEMA_ID_DYNAMIC_START + schemas.size();
  schemas[id] = found;
  return id;
}

template <typename Function>
void set(NvtxFunctionTable table, int id, Function function) {
  *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" NVTX_DYNAMIC_EXPORT int NVTX_API InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table;
  unsigned int size;
  if (!file || !callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  set(table, NVTX_CBID_CORE2_DomainCreateA, create_domain);
  set(table, NVTX_CBID_CORE2_DomainRegisterStringA, register_string);
  set(table, NVTX_CBID_CORE2_DomainRangePushEx, push);
  set(table, NVTX_CBID_CORE2_DomainRangePop, pop);
  return 1;
}

extern "C" NVTX_DYNAMIC_EXPORT int NVTX_API InitializeInjectionNvtxExtension(nvtxExtModuleInfo_t* module) {
  if (module->moduleId != NVTX_EXT_PAYLOAD_MODULEID) return 0;
  module->segments[0].functionSlots[NVTX3EXT_CBID_nvtxPayloadSchemaRegister] =
      reinterpret_cast<intptr_t>(register_schema);
  return 1;
}
