// torch's parallel_for for ThreadSanitizer, which does not understand the barriers of GNU OpenMP, on which torch's own
// threads meet. The kernels go parallel through these two functions of torch alone, and a build with
// GENREC_SANITIZERS=thread links them in, hidden, which is nearer than torch's. Every share has a thread of its own,
// started and joined in ways that the sanitizer follows.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace {

int64_t threads = 1, overlap = 0, most = 0;

}  // namespace

// For the tests. With shared > 0 every share also does so many items of the next one: a race that has to be found. Returns
// into how many shares a loop was cut since the last call, at most.
extern "C" __attribute__((visibility("default"))) int64_t genrec_threads(int64_t count, int64_t shared) {
  threads = count;
  overlap = shared;
  return std::exchange(most, 0);
}

extern "C" int32_t torch_get_num_threads(uint32_t* count) {
  *count = uint32_t(threads);
  return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*run)(int64_t begin, int64_t end, void* context), void* context) {
  if (begin >= end) return 0;
  const int64_t size = end - begin, shares = std::min(threads, (size + grain - 1) / grain);
  const int64_t share = (size + shares - 1) / shares;
  std::vector<std::thread> started;
  for (int64_t first = begin; first < end; first += share)
    started.emplace_back(run, first, std::min(end, first + share + overlap), context);
  most = std::max(most, int64_t(started.size()));
  for (std::thread& thread : started) thread.join();
  return 0;
}
