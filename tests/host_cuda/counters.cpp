// Counts what the kernels ask of the memory. g++ calls a function before each load and store of the kernels
// (-fsanitize=thread) and at the beginning of each basic block (-fsanitize-coverage=trace-pc); the functions are here.
//
// Each lane of a warp records its accesses and basic blocks. When the lanes meet, at a barrier or a shuffle, their
// records are merged into the warp's instructions: as long as lanes are at different places, those go on whose place is
// deepest in the calls and then first in the code. So lanes meet again behind a branch, and each pass through a loop is
// an instruction of its own. For this the compiler must leave the blocks in the order of the source. Tensor-core
// instructions and shuffles need the whole warp: where lanes do not meet at one, the process ends with a message.
//
// The environment has the settings:
//   HOST_CUDA_COUNTERS  file to which each launch appends a line of JSON
//   HOST_CUDA_SAMPLE    most blocks of a launch that run; the others are taken to be like them
#include "counters.h"

#include <algorithm>
#include <bit>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <unordered_map>
#include <vector>

namespace mobilemamba::cuda {
extern unsigned char shared_memory[];
}

// Where the library begins and ends in memory; from the linker.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

namespace host_cuda::counters {
namespace {

using mobilemamba::cuda::shared_memory;

constexpr int warp_size = 32, most_threads = 1024, sector_bytes = 32, banks = 32, bank_bytes = 4;
constexpr size_t shared_capacity = 227 * 1024;

enum class Kind : uint8_t { block, load, store, product, shuffle, matrices };

struct Event {
  uint64_t address;  // of an access
  uint32_t place;    // of the instruction, from the library's first byte on
  uint16_t depth;    // of the stack, in units of 16 bytes
  Kind kind;
  uint8_t bytes;
};

/// What one instruction of the kernel did in a launch.
struct Site {
  Kind kind;
  uint64_t times = 0;                              // executed by a warp
  uint64_t sectors = 0, fewest_sectors = 0;        // of global memory
  uint64_t wavefronts = 0, fewest_wavefronts = 0;  // of shared memory
};

/// Which bytes of a page were read and written.
struct Page {
  static constexpr int bits = 12;
  uint32_t read[(1 << bits) / sector_bytes], written[(1 << bits) / sector_bytes];  // a bit for each byte of a sector
};

struct Counts {
  std::map<uint32_t, Site> sites;
  uint64_t run = 0;                              // blocks
  uint64_t barriers = 0, read = 0, written = 0;  // bytes, each counted once
};

struct Recorder {
  std::vector<std::vector<Event>> lanes{most_threads};
  std::vector<Event>* lane = nullptr;  // of the running thread
  uintptr_t stack_begin, stack_end;
  uintptr_t main_stack;
  std::map<std::string, Counts> known;  // by kernel, sizes and parameters
  Counts* counts;
  std::string line;
  std::unordered_map<uint32_t, Site> sites;
  std::unordered_map<uint64_t, Page> pages;
  uint64_t last_page = UINT64_MAX;
  Page* page = nullptr;
};

Recorder& recorder() {
  static Recorder& instance = *new Recorder;
  return instance;
}

bool is_shared(uint64_t address) {
  return address - reinterpret_cast<uintptr_t>(shared_memory) < shared_capacity;
}

uint32_t place_of(const void* caller) {
  return static_cast<uint32_t>(static_cast<const char*>(caller) - __ehdr_start);
}

// Merging ------------------------------------------------------------------------------------------------------------

/// The sectors of global memory that the lanes of an instruction touch.
void count_global(Site& site, const Event* const* events, int count, bool store) {
  uint64_t sector[2 * warp_size];
  uint32_t mask[2 * warp_size];
  int sectors = 0;
  for (int i = 0; i < count; ++i) {
    uint64_t address = events[i]->address;
    for (int left = events[i]->bytes; left > 0;) {
      const int within = address % sector_bytes, part = std::min(left, sector_bytes - within);
      const uint32_t bits = static_cast<uint32_t>(((uint64_t{1} << part) - 1) << within);
      int at = sectors - 1;
      while (at >= 0 && sector[at] != address / sector_bytes)
        --at;
      if (at < 0) sector[at = sectors++] = address / sector_bytes, mask[at] = 0;
      mask[at] |= bits;
      address += part;
      left -= part;
    }
  }
  Recorder& r = recorder();
  uint64_t bytes = 0;
  for (int i = 0; i < sectors; ++i) {
    bytes += std::popcount(mask[i]);
    constexpr int per_page = (1 << Page::bits) / sector_bytes;
    if (const uint64_t number = sector[i] / per_page; number != r.last_page) {
      r.last_page = number;
      r.page = &r.pages[number];
    }
    (store ? r.page->written : r.page->read)[sector[i] % per_page] |= mask[i];
  }
  site.sectors += sectors;
  site.fewest_sectors += (bytes + sector_bytes - 1) / sector_bytes;
}

/// The wavefronts of lanes that access shared memory together: each takes one word of every bank.
void count_wavefronts(Site& site, const Event* const* events, int count) {
  uint64_t words[banks][warp_size];
  int in_bank[banks] = {}, most = 0, distinct = 0;
  for (int i = 0; i < count; ++i)
    for (uint64_t word = events[i]->address / bank_bytes;
         word <= (events[i]->address + events[i]->bytes - 1) / bank_bytes; ++word) {
      const int bank = word % banks;
      int at = 0;
      while (at < in_bank[bank] && words[bank][at] != word)
        ++at;
      if (at < in_bank[bank]) continue;
      words[bank][in_bank[bank]++] = word;
      ++distinct;
      most = std::max(most, in_bank[bank]);
    }
  site.wavefronts += most;
  site.fewest_wavefronts += (distinct + banks - 1) / banks;
}

/// `lanes` has the index of each event's lane in the warp. Half a warp accesses 8 bytes together, a quarter 16 bytes.
void count_shared(Site& site, const Event* const* events, const int* lanes, int count) {
  const int together = warp_size / std::max(1, events[0]->bytes / bank_bytes);
  for (int begin = 0; begin < count;) {
    int end = begin + 1;
    while (end < count && lanes[end] / together == lanes[begin] / together)
      ++end;
    count_wavefronts(site, events + begin, end - begin);
    begin = end;
  }
}

bool needs_warp(Kind kind) {
  return kind == Kind::product || kind == Kind::shuffle || kind == Kind::matrices;
}

/// Which of two lanes goes on: below 0 that of `a`, 0 both. An instruction of the whole warp waits for the others.
int compare(const Event& a, const Event& b) {
  if (needs_warp(a.kind) != needs_warp(b.kind)) return needs_warp(a.kind) ? 1 : -1;
  if (a.depth != b.depth) return a.depth > b.depth ? -1 : 1;
  return a.place < b.place ? -1 : a.place > b.place;
}

void execute(const Event* const* events, const int* lanes, int count) {
  Recorder& r = recorder();
  const Event& first = *events[0];
  Site& site = r.sites[first.place];
  site.kind = first.kind;
  ++site.times;
  if (first.kind == Kind::matrices) {  // four matrices, the rows of each from eight lanes
    for (int begin = 0; begin < count; begin += 8)
      count_wavefronts(site, events + begin, std::min(8, count - begin));
  } else if (first.kind == Kind::load || first.kind == Kind::store) {
    const Event *global[warp_size], *shared[warp_size];
    int shared_lanes[warp_size], globals = 0, shareds = 0;
    for (int i = 0; i < count; ++i)
      if (is_shared(events[i]->address))
        shared_lanes[shareds] = lanes[i], shared[shareds++] = events[i];
      else
        global[globals++] = events[i];
    if (globals > 0) count_global(site, global, globals, first.kind == Kind::store);
    if (shareds > 0) count_shared(site, shared, shared_lanes, shareds);
  }
}

void record(const Caller& caller, Kind kind, uint64_t address, int bytes) {
  Recorder& r = recorder();
  const uintptr_t depth = r.stack_end - reinterpret_cast<uintptr_t>(caller.frame);
  r.lane->push_back(
      {address, place_of(caller.place), static_cast<uint16_t>(depth / 16), kind, static_cast<uint8_t>(bytes)});
}

void access(const Caller& caller, Kind kind, const void* data, int bytes) {
  Recorder& r = recorder();
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (!r.lane || address - r.stack_begin < r.stack_end - r.stack_begin) return;  // a thread's own memory
  const bool in_library = data >= __ehdr_start && data < _end && !is_shared(address);
  const bool constant = in_library || address - r.main_stack < (8 << 20);
  if (constant) return;  // parameters, and what CUDA has in special registers
  for (; bytes > 16; bytes -= 16, data = static_cast<const char*>(data) + 16)
    record(caller, kind, reinterpret_cast<uintptr_t>(data), 16);
  record(caller, kind, reinterpret_cast<uintptr_t>(data), bytes);
}

}  // namespace

// Launches -----------------------------------------------------------------------------------------------------------

/// The parameters, but of each address only what matters: its place in a sector, and which addresses are equal.
static std::string shape_of(const std::string& parameters) {
  std::string shape = parameters;
  std::map<uint64_t, uint64_t> seen;
  for (size_t at = 0; at + 8 <= shape.size(); at += 8) {
    uint64_t word;
    std::memcpy(&word, shape.data() + at, 8);
    if (word < uint64_t{1} << 32 || word >= uint64_t{1} << 47) continue;  // no address
    word = seen.emplace(word, seen.size()).first->second * sector_bytes + word % sector_bytes;
    std::memcpy(shape.data() + at, &word, 8);
  }
  return shape;
}

std::vector<unsigned> blocks_to_run(const void* function, const std::string& parameters, unsigned blocks,
                                    unsigned threads, size_t shared_bytes) {
  Recorder& r = recorder();
  int local;
  r.main_stack = reinterpret_cast<uintptr_t>(&local);
  r.line = "{\"kernel\": " + std::to_string(place_of(function)) + ", \"blocks\": " + std::to_string(blocks) +
           ", \"threads\": " + std::to_string(threads) + ", \"shared\": " + std::to_string(shared_bytes);
  const auto [found, added] = r.known.try_emplace(r.line + shape_of(parameters));
  r.counts = &found->second;
  r.sites.clear();
  r.pages.clear();
  r.last_page = UINT64_MAX;
  std::vector<unsigned> run;
  if (!added) return run;
  // One block of each of as many equal parts of the grid. The first block of each would be a regular pattern, which
  // could hit the borders of images too often.
  const char* most = std::getenv("HOST_CUDA_SAMPLE");
  const uint64_t parts = std::min<uint64_t>(blocks, most ? std::atoi(most) : blocks);
  std::mt19937 random;
  for (uint64_t part = 0; part < parts; ++part) {
    const uint64_t begin = part * blocks / parts, end = (part + 1) * blocks / parts;
    run.push_back(static_cast<unsigned>(begin + random() % (end - begin)));
  }
  r.counts->run = run.size();
  return run;
}

void end_launch() {
  Recorder& r = recorder();
  r.lane = nullptr;
  r.counts->sites.insert(r.sites.begin(), r.sites.end());
  for (const auto& [number, page] : r.pages)
    for (size_t i = 0; i < std::size(page.read); ++i) {
      r.counts->read += std::popcount(page.read[i]);
      r.counts->written += std::popcount(page.written[i]);
    }
  std::string line = r.line + ", \"run\": " + std::to_string(r.counts->run) +
                     ", \"barriers\": " + std::to_string(r.counts->barriers) +
                     ", \"read\": " + std::to_string(r.counts->read) +
                     ", \"written\": " + std::to_string(r.counts->written) + ", \"sites\": [";
  const char* names[] = {"block", "load", "store", "product", "shuffle", "matrices"};
  for (const auto& [place, site] : r.counts->sites) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "%s[%" PRIu32 ", \"%s\", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 "]",
                  line.back() == '[' ? "" : ", ", place, names[static_cast<int>(site.kind)], site.times, site.sectors,
                  site.fewest_sectors, site.wavefronts, site.fewest_wavefronts);
    line += text;
  }
  line += "]}\n";
  std::FILE* file = std::fopen(std::getenv("HOST_CUDA_COUNTERS"), "a");
  if (!file || std::fwrite(line.data(), 1, line.size(), file) != line.size() || std::fclose(file) != 0) {
    std::perror("host_cuda: cannot write the file of HOST_CUDA_COUNTERS");
    std::abort();
  }
}

void begin_thread(int thread, const unsigned char* stack, size_t stack_bytes) {
  Recorder& r = recorder();
  r.lane = &r.lanes[thread];
  r.stack_begin = reinterpret_cast<uintptr_t>(stack);
  r.stack_end = r.stack_begin + stack_bytes;
}

void meet(int begin, int end) {
  Recorder& r = recorder();
  const int count = end - begin;
  size_t next[warp_size] = {};
  for (;;) {
    const Event* events[warp_size];
    int lanes[warp_size], chosen = 0;
    for (int lane = 0; lane < count; ++lane) {
      const std::vector<Event>& trace = r.lanes[begin + lane];
      if (next[lane] == trace.size()) continue;
      const Event* event = &trace[next[lane]];
      if (chosen > 0) {
        const int order = compare(*event, *events[0]);
        if (order > 0) continue;
        if (order < 0) chosen = 0;
      }
      lanes[chosen] = lane;
      events[chosen++] = event;
    }
    if (chosen == 0) break;
    if (needs_warp(events[0]->kind) && chosen != warp_size) {
      std::fprintf(stderr, "host_cuda: %d lanes are at an instruction of the whole warp at %#x\n", chosen,
                   events[0]->place);
      std::abort();
    }
    execute(events, lanes, chosen);
    for (int i = 0; i < chosen; ++i)
      ++next[lanes[i]];
  }
  for (int i = begin; i < end; ++i)
    r.lanes[i].clear();
}

void barrier() {
  ++recorder().counts->barriers;
}

void product(const Caller& caller) {
  record(caller, Kind::product, 0, 0);
}

void shuffle(const Caller& caller) {
  record(caller, Kind::shuffle, 0, 0);
}

void load_matrices(const Caller& caller, const void* shared_row) {
  record(caller, Kind::matrices, reinterpret_cast<uintptr_t>(shared_row), 16);
}

void copy_async(const Caller& caller, const void* shared, const void* global, int bytes) {
  if (bytes > 0) access(caller, Kind::load, global, bytes);
  // The instruction's second event has a place of its own, one byte on.
  access({static_cast<const char*>(caller.place) + 1, caller.frame}, Kind::store, shared, 16);
}

}  // namespace host_cuda::counters

// What the compiler calls ---------------------------------------------------------------------------------------------

using host_cuda::counters::access, host_cuda::counters::Kind, host_cuda::counters::recorder;

#define HOST_CUDA_CALL(name, kind, bytes)                                  \
  extern "C" __attribute__((visibility("hidden"))) void name(void* data) { \
    access(HOST_CUDA_CALLER, Kind::kind, data, bytes);                     \
  }

HOST_CUDA_CALL(__tsan_read1, load, 1)
HOST_CUDA_CALL(__tsan_read2, load, 2)
HOST_CUDA_CALL(__tsan_read4, load, 4)
HOST_CUDA_CALL(__tsan_read8, load, 8)
HOST_CUDA_CALL(__tsan_read16, load, 16)
HOST_CUDA_CALL(__tsan_write1, store, 1)
HOST_CUDA_CALL(__tsan_write2, store, 2)
HOST_CUDA_CALL(__tsan_write4, store, 4)
HOST_CUDA_CALL(__tsan_write8, store, 8)
HOST_CUDA_CALL(__tsan_write16, store, 16)

extern "C" {
__attribute__((visibility("hidden"))) void __tsan_read_range(void* data, size_t bytes) {
  access(HOST_CUDA_CALLER, Kind::load, data, static_cast<int>(bytes));
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* data, size_t bytes) {
  access(HOST_CUDA_CALLER, Kind::store, data, static_cast<int>(bytes));
}
__attribute__((visibility("hidden"))) void __sanitizer_cov_trace_pc() {
  if (recorder().lane) host_cuda::counters::record(HOST_CUDA_CALLER, Kind::block, 0, 0);
}
__attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("hidden"))) void __tsan_func_exit() {}
__attribute__((visibility("hidden"))) void __tsan_init() {}
/// Of the guard of a function's static variable, on the host.
__attribute__((visibility("hidden"))) unsigned char __tsan_atomic8_load(const volatile unsigned char* data, int) {
  return *data;
}
}
