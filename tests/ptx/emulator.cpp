// Runs PTX, the assembly that Triton and nvcc make for NVIDIA's devices, on memory of the CPU, with the checks of
// compute-sanitizer: what the compilers made of the kernels, and how they are launched, is tried without a device.
//
// The text is parsed once (section "parsing"): each instruction becomes a function of C++ and the numbers of rows. A
// row is a virtual register, a special register or a constant, with one 64-bit word for each thread of a block, so that
// an instruction is done for all threads of a block in one loop. Threads that stand at the same instruction are a
// group; of several groups the one that is furthest behind in the text runs, and groups that meet become one. Words
// hold values of fewer bits in their low ones.
//
// Blocks run one after the other in an order drawn by a seed. Where a kernel orders memory among blocks (atomics,
// acquire, release, a cooperative launch), several of them are there at once, and take turns of some instructions.
//
// What is an error, and ends the launch, or as a race is noted:
//   memory     an access that is not within one registered allocation, the launch's shared memory or the parameters, or
//              that is not aligned to its size
//   init       a read of shared memory that no thread of the block has written
//   race       two warps touch the same bytes, one of them writes, at least one access is weak, and nothing orders them:
//              no barrier of the block, no chain of release and acquire (fences count) through atomics. And two lanes
//              that write different values to the same bytes by one instruction; that threads of a block write the same
//              by one, up to their rounding, is none: what they all have, Triton has them all write, and of a product
//              that is summed over lanes each lane fuses its own. Lanes of one warp that go different
//              ways are taken to be in order: a weaker check than the memory model's. Scopes count as that of the
//              device; what a copy by cp.async writes is there when it is waited for, not before.
//   control    lanes that an instruction of a warp names and that never come or have ended, threads that wait at a
//              barrier for others that never come, a kernel that does not end, a trap
//   unknown    an instruction or a modifier that is not in the table: nothing is skipped
//
// Instructions said to be approximate (ex2.approx, div.full, ...) are exact here, up to their rounding.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using Word = uint64_t;
using std::string;

constexpr int kWarp = 32;
constexpr Word kSharedBase =
    1024;  // where a kernel's own shared memory begins: the first KiB is the system's
// Generic addresses: these windows, and global memory, which is the CPU's, below them.
constexpr Word kSharedWindow = Word(0x71) << 56, kLocalWindow = Word(0x72) << 56,
               kParamWindow = Word(0x73) << 56;
constexpr int64_t kLongest = 20'000'000;  // instructions that a block may take without coming to its end
constexpr size_t kProblems = 8;           // that are told of a launch

struct Fault : std::runtime_error {
  using runtime_error::runtime_error;
};

template <class... Parts>
string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// ---- types --------------------------------------------------------------------------------------------------
// How a word is read as a value, and how a value becomes a word.

// f32z is f32 with .ftz: numbers below the normal ones are zeros.
enum class Type {
  none,
  u8,
  s8,
  u16,
  s16,
  u32,
  s32,
  u64,
  s64,
  f16,
  bf16,
  f32,
  f32z,
  f64,
  pred,
  f16x2,
  bf16x2,
  u16x2,
  s16x2
};
constexpr int kBytes[] = {0, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 4, 8, 1, 4, 4, 4, 4};
// Names of types; those without a sign are taken as unsigned.
const std::map<string, Type> kTypes = {
    {"u8", Type::u8},      {"s8", Type::s8},       {"b8", Type::u8},         {"u16", Type::u16},
    {"s16", Type::s16},    {"b16", Type::u16},     {"u32", Type::u32},       {"s32", Type::s32},
    {"b32", Type::u32},    {"u64", Type::u64},     {"s64", Type::s64},       {"b64", Type::u64},
    {"f16", Type::f16},    {"bf16", Type::bf16},   {"f32", Type::f32},       {"f64", Type::f64},
    {"pred", Type::pred},  {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"u16x2", Type::u16x2},
    {"s16x2", Type::s16x2}};
int bytes_of(Type type) { return kBytes[int(type)]; }

template <class V, Type kType>
struct Plain {
  using Value = V;
  static constexpr Type type = kType;
  static V get(Word word) {
    V value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  static Word put(V value) {
    Word word = 0;
    std::memcpy(&word, &value, sizeof value);
    return word;
  }
};
using U8 = Plain<uint8_t, Type::u8>;
using S8 = Plain<int8_t, Type::s8>;
using U16 = Plain<uint16_t, Type::u16>;
using S16 = Plain<int16_t, Type::s16>;
using U32 = Plain<uint32_t, Type::u32>;
using S32 = Plain<int32_t, Type::s32>;
using U64 = Plain<uint64_t, Type::u64>;
using S64 = Plain<int64_t, Type::s64>;
using F32 = Plain<float, Type::f32>;
using F64 = Plain<double, Type::f64>;
struct Pred : Plain<bool, Type::pred> {
  static bool get(Word word) { return word != 0; }
};
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
struct F32Z : Plain<float, Type::f32z> {
  static float get(Word word) { return flushed(F32::get(word)); }
  static Word put(float value) { return F32::put(flushed(value)); }
};
struct F16 : Plain<float, Type::f16> {
  using Half = Plain<_Float16, Type::f16>;
  static float get(Word word) { return float(Half::get(word)); }
  static Word put(double value) { return Half::put(_Float16(value)); }
};
struct BF16 : Plain<float, Type::bf16> {
  static float get(Word word) { return F32::get((word & 0xffff) << 16); }
  static Word put(float value) {
    const uint32_t bits = uint32_t(F32::put(value));
    return value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
};
// Two values of 16 bits in a word.
template <class T>
struct Two {
  struct Value {
    typename T::Value low, high;
  };
  static constexpr Type type = T::type == Type::f16    ? Type::f16x2
                               : T::type == Type::bf16 ? Type::bf16x2
                               : T::type == Type::u16  ? Type::u16x2
                                                       : Type::s16x2;
  static Value get(Word word) { return {T::get(word), T::get(word >> 16)}; }
  static Word put(Value v) { return T::put(v.low) | T::put(v.high) << 16; }
};

template <class... T>
struct Types {};
using Bits = Types<Pred, U16, U32, U64>;
using Ints = Types<U16, S16, U32, S32, U64, S64>;
using Floats = Types<F16, BF16, F32, F32Z, F64>;
using Wide = Types<F32, F32Z, F64>;
using Values = Types<U16, S16, U32, S32, U64, S64, F16, BF16, F32, F32Z, F64>;
using Numbers = Types<U16, S16, U32, S32, U64, S64, F16, BF16, F32, F32Z, F64, Two<F16>, Two<BF16>>;
using All = Types<U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, F32, F32Z, F64>;

// ---- a parsed kernel ----------------------------------------------------------------------------------------

class Block;
struct Instruction;

// The threads that do an instruction, in ascending order; without a list, all of the block.
struct Lanes {
  const int* list;
  int count;
  template <class F>
  void each(const F& f) const {
    if (list == nullptr)
      for (int t = 0; t < count; ++t) f(t);
    else
      for (int k = 0; k < count; ++k) f(list[k]);
  }
  // f(first thread of the warp, which lanes of it)
  template <class F>
  void each_warp(const F& f) const {
    for (int k = 0; k < count;) {
      const int first = (list ? list[k] : k) / kWarp * kWarp;
      uint32_t mask = 0;
      for (int t; k < count && (t = list ? list[k] : k) < first + kWarp; ++k) mask |= 1u << (t - first);
      f(first, mask);
    }
  }
};

using Run = void (*)(Block&, const Instruction&, Lanes);
enum class Flow {
  next,
  branch,
  exit,
  barrier,
  together,
  trap
};  // together: by all lanes of a warp, or those of a mask
enum class Space { generic, global, shared, local, param };

struct Operand {
  int row = 0;
  int64_t plus = 0;  // of an address
};
struct Instruction {
  Run run = nullptr;
  Flow flow = Flow::next;
  int guard = -1;  // the row of a predicate
  bool unless = false;
  int target = -1;
  std::vector<int> to;  // rows; -1 for what is thrown away
  std::vector<Operand> from;
  Type type = Type::none;
  Space space = Space::generic;
  int mode = 0;  // what an opcode keeps of its modifiers
  bool strong = false, acquires = false, releases = false, transposed = false, negated = false,
       aligned = true;
  int mask = -1;  // which operand names the lanes; -1 for all
  int place = 0;  // in the kernel
  string line, source;
  mutable size_t found = 0;  // the allocation that it met last
};

struct Variable {
  Word address = 0;
  size_t bytes = 0;
};
struct Parameter {
  size_t offset, bytes;
};
struct Kernel {
  string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0, shared_bytes = 0, local_bytes = 0;
  bool dynamic_shared = false;
  int rows = 0;
  std::vector<std::pair<int, Word>> constants;   // row, value
  std::vector<std::pair<int, string>> specials;  // row, name
  std::vector<int> required;                     // threads along x, y, z; none if any
  unsigned most_threads = 1024;
  size_t granule[2] = {16, 16};  // the smallest element that is accessed: elsewhere, and in shared memory
  bool synchronises = false;     // orders memory among blocks
};
struct Module {
  std::map<string, Kernel> kernels;
  std::vector<std::pair<string, std::vector<uint8_t>>> variables;
  string names;
};

// ---- memory -------------------------------------------------------------------------------------------------

struct Allocation {
  Word first, last;  // last: one behind
  string name;
};
std::map<Word, Allocation>& registered() {
  static std::map<Word, Allocation> allocations;
  return allocations;
}
Word& seed() {
  static Word value = 0;
  return value;
}

int& launches() {
  static int count = 0;
  return count;
}

using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t k = 0; k < other.size(); ++k) into[k] = std::max(into[k], other[k]);
}

// Who touched a granule of memory last. An agent is a warp of the launch, a clock counts its barriers and releases,
// and 0 is before the launch. The highest bit of a place says that the access was strong.
constexpr uint32_t kStrong = 1u << 31;
struct Touch {
  uint32_t agent = 0, clock = 0, place = 0;
};
struct Shadow {
  Touch write, read;
  uint32_t step = 0;  // of the write: a number of the instruction as it ran
  uint32_t more = 0;  // where the reads of several warps are kept
};

class Shadows {
 public:
  explicit Shadows(size_t granule) : granule_(granule) {}
  Shadow* at(Word address) {
    const Word page = address / kPage;
    if (page != last_page_) {
      auto& found = pages_[page];
      if (found.empty()) found.resize(kPage / granule_);
      last_ = found.data(), last_page_ = page;
    }
    return last_ + address % kPage / granule_;
  }
  size_t granule() const { return granule_; }

 private:
  static constexpr Word kPage = 4096;
  size_t granule_;
  std::unordered_map<Word, std::vector<Shadow>> pages_;
  Shadow* last_ = nullptr;
  Word last_page_ = ~Word(0);
};

struct Launch {
  Launch(const Kernel& k, Module& module, const unsigned* grid_size, const unsigned* block_size,
         size_t dynamic, void** arguments, bool is_cooperative)
      : kernel(k), cooperative(is_cooperative), shadows(k.granule[0]), random(seed()) {
    std::copy(grid_size, grid_size + 3, grid), std::copy(block_size, block_size + 3, block);
    threads = int(block[0] * block[1] * block[2]);
    warps = (threads + kWarp - 1) / kWarp;
    blocks = size_t(grid[0]) * grid[1] * grid[2];
    shared_bytes = k.shared_bytes + dynamic;
    if (threads < 1 || unsigned(threads) > k.most_threads)
      throw Fault(text("a block of ", threads, " threads, of which it may have 1 to ", k.most_threads));
    for (size_t axis = 0; axis < k.required.size(); ++axis)
      if (unsigned(k.required[axis]) != block[axis])
        throw Fault("a block of another size than it was compiled for");
    if (shared_bytes > 227 << 10)
      throw Fault(text("more shared memory than a block may have: ", shared_bytes));
    parameters.resize(k.parameter_bytes + 16);
    for (size_t p = 0; p < k.parameters.size(); ++p)
      std::memcpy(&parameters[k.parameters[p].offset], arguments[p], k.parameters[p].bytes);
    for (auto& [address, allocation] : registered()) allocations.push_back(allocation);
    for (auto& [name, bytes] : module.variables)
      allocations.push_back({Word(bytes.data()), Word(bytes.data()) + bytes.size(), name});
    if (cooperative)
      allocations.push_back({Word(workspace), Word(workspace) + sizeof workspace, "the grid's barrier"});
    std::sort(allocations.begin(), allocations.end(), [](auto& a, auto& b) { return a.first < b.first; });
    for (size_t a = 1; a < allocations.size();) {  // those that overlap as one
      Allocation &before = allocations[a - 1], &next = allocations[a];
      if (next.first >= before.last) {
        ++a;
        continue;
      }
      before.last = std::max(before.last, next.last);
      if (before.name != next.name) before.name += " and " + next.name;
      allocations.erase(allocations.begin() + long(a));
    }
    synchronises = k.synchronises || cooperative;
  }

  void run();
  void note(const string& problem, uint32_t one, uint32_t other) {
    if (told.insert({one & ~kStrong, other & ~kStrong}).second && problems.size() < kProblems)
      problems.push_back(problem);
  }

  const Kernel& kernel;
  bool cooperative, synchronises;
  unsigned grid[3], block[3];
  int threads, warps;
  size_t blocks, shared_bytes;
  std::vector<uint8_t> parameters;
  std::vector<Allocation> allocations;
  alignas(16) uint8_t workspace[64] = {};
  Shadows shadows;
  std::vector<std::vector<Touch>> several{1};  // reads of a granule by several warps; number 0 is none
  std::vector<uint32_t> unused;
  std::unordered_map<Word, Clock> published;  // at the addresses of atomics
  uint32_t time = 1, step = 0;
  std::mt19937_64 random;
  std::vector<string> problems;
  std::set<std::pair<uint32_t, uint32_t>> told;
};

// ---- a block ------------------------------------------------------------------------------------------------

struct Group {
  int place;
  std::vector<int> threads;
};
struct Waiting {
  int expected = 0;                          // 0: all threads that have not ended
  std::vector<std::pair<int, int>> threads;  // and where each goes on
};
struct Copy {  // by cp.async: bytes on their way to shared memory
  int thread, group;
  Word to;
  int bytes;
  uint8_t data[16];
  const Instruction* by;
};
struct Warp {
  uint32_t agent, first;  // first: the agent that entry 0 of `known` is of
  Clock known;            // what of each agent happened before what this one does now
  Clock fenced, seen;     // what a fence published, and what strong reads saw for a later fence
  uint32_t& now() { return known[agent - first]; }
  bool after(const Touch& touch) const {
    return touch.clock == 0 || touch.agent == agent ||
           (touch.agent - first < known.size() && known[touch.agent - first] >= touch.clock);
  }
};

class Block {
 public:
  explicit Block(Launch& of) : launch(of), threads(of.threads), shadows_granule(of.kernel.granule[1]) {
    words.resize(size_t(of.kernel.rows) * size_t(threads));
    for (auto& [r, value] : of.kernel.constants) std::fill_n(row(r), threads, value);
    shared.resize(of.shared_bytes);
    local.resize(local_stride() * size_t(threads));
    all.resize(size_t(threads));
    for (int t = 0; t < threads; ++t) all[size_t(t)] = t;
  }

  void begin(size_t number);
  bool run(int64_t budget);  // whether it has come to its end

  Word* row(int r) { return &words[size_t(r) * size_t(threads)]; }
  const Word* source(const Instruction& i, size_t k) { return row(i.from[k].row); }
  size_t local_stride() const { return (launch.kernel.local_bytes + 15) / 16 * 16; }
  uint32_t alive_lanes(int first) const { return alive[size_t(first / kWarp)]; }
  Warp& warp_of(int thread) { return warps[size_t(thread / kWarp)]; }

  string where(const Instruction& i, int thread) const {
    const unsigned* n = launch.block;
    const unsigned t = unsigned(thread);
    return text("\n    ", i.line, i.source.empty() ? "" : "  // " + i.source, "\n    ", launch.kernel.name,
                ", block (", index[0], ", ", index[1], ", ", index[2], "), thread (", t % n[0], ", ",
                t / n[0] % n[1], ", ", t / n[0] / n[1], ")");
  }
  [[noreturn]] void fail(const string& what, const Instruction& i, int thread) {
    throw Fault(what + where(i, thread));
  }

  // Where an access lies, checked and noted. `data` is what it writes.
  uint8_t* access(const Instruction& i, Space space, Word address, int bytes, int thread, bool reads,
                  const void* data);
  void acquire(const Instruction& i, Word address, int thread);
  void release(const Instruction& i, Word address, int thread, bool keeps_chain);

  Launch& launch;
  int threads;
  size_t shadows_granule;
  unsigned index[3] = {};
  std::vector<Word> words;
  std::vector<uint8_t> shared, local;
  std::vector<Shadow> shared_shadows;
  std::vector<Warp> warps;
  std::vector<uint32_t> alive;  // lanes of each warp
  int living = 0;
  std::vector<Copy> copies;
  std::vector<int> copy_groups;  // that each thread has committed
  std::vector<Group> ready, stalled;
  std::map<int, Waiting> barriers;

 private:
  void touch(Shadow* shadow, size_t count, size_t granule, const Instruction& i, int thread, bool reads,
             const void* data, const uint8_t* memory);
  void race(const Instruction& i, int thread, const Touch& other, bool other_writes, const uint8_t* memory);
  bool complete(const Instruction& i, Lanes lanes);
  void arrive(const Instruction& i, const Group& group, Lanes lanes);
  void let_go(int number);
  void add_ready(const std::vector<std::pair<int, int>>& at);
  Lanes guarded(const Instruction& i, const Group& group);

  std::vector<int> all, active_;
  int64_t taken_ = 0;
};

void Block::begin(size_t number) {
  index[0] = unsigned(number % launch.grid[0]);
  index[1] = unsigned(number / launch.grid[0] % launch.grid[1]);
  index[2] = unsigned(number / launch.grid[0] / launch.grid[1]);
  const unsigned* n = launch.block;
  for (auto& [r, name] : launch.kernel.specials) {
    const size_t axis = name.size() > 2 && name[name.size() - 2] == '.' ? size_t(name.back() - 'x') : 0;
    const string base = name.substr(0, name.find('.'));
    for (unsigned t = 0; t < unsigned(threads); ++t) {
      const unsigned id[3] = {t % n[0], t / n[0] % n[1], t / n[0] / n[1]};
      const Word workspace = launch.cooperative ? Word(launch.workspace) : 0;
      row(r)[t] = base == "%tid"       ? id[axis]
                  : base == "%ntid"    ? n[axis]
                  : base == "%ctaid"   ? index[axis]
                  : base == "%nctaid"  ? launch.grid[axis]
                  : base == "%laneid"  ? t % kWarp
                  : base == "%warpid"  ? t / kWarp
                  : base == "%envreg1" ? workspace >> 32
                                       : workspace & 0xffffffff;  // %envreg2
    }
  }
  std::fill(shared.begin(), shared.end(), uint8_t(0xff));
  shared_shadows.assign(shared.size() / shadows_granule + 16, Shadow());
  const size_t count = launch.synchronises ? launch.blocks * size_t(launch.warps) : size_t(launch.warps);
  const uint32_t own = uint32_t(number * size_t(launch.warps));
  warps.clear(), alive.clear();
  ++launch.time;
  for (int w = 0; w < launch.warps; ++w) {
    warps.push_back({own + uint32_t(w), launch.synchronises ? 0 : own, Clock(count), {}, {}});
    warps.back().now() = launch.time;
    const int lanes = std::min(kWarp, threads - w * kWarp);
    alive.push_back(lanes == kWarp ? ~0u : (1u << lanes) - 1);
  }
  living = threads;
  copies.clear();
  copy_groups.assign(size_t(threads), 0);
  ready = {{0, all}};
  stalled.clear(), barriers.clear();
  taken_ = 0;
}

Lanes Block::guarded(const Instruction& i, const Group& group) {
  const Lanes whole{int(group.threads.size()) == threads ? nullptr : group.threads.data(),
                    int(group.threads.size())};
  if (i.guard < 0) return whole;
  const Word* guard = row(i.guard);
  active_.clear();
  whole.each([&](int t) {
    if ((guard[t] != 0) != i.unless) active_.push_back(t);
  });
  return int(active_.size()) == whole.count ? whole : Lanes{active_.data(), int(active_.size())};
}

// Whether all lanes that the instruction is of are there.
bool Block::complete(const Instruction& i, Lanes lanes) {
  bool all_there = true;
  lanes.each_warp([&](int first, uint32_t there) {
    const uint32_t living_lanes = alive_lanes(first);
    uint32_t named = living_lanes;
    if (i.mask >= 0) {
      named = uint32_t(source(i, size_t(i.mask))[first + __builtin_ctz(there)]);
      if ((named & there) != there)
        fail("control: a lane that the mask does not name", i, first + __builtin_ctz(there));
      if (named & ~living_lanes)
        fail("control: the mask names lanes that have ended", i, first + __builtin_ctz(there));
    }
    all_there = all_there && (named & ~there) == 0;
  });
  return all_there;
}

void Block::add_ready(const std::vector<std::pair<int, int>>& at) {
  std::map<int, std::vector<int>> by_place;
  for (auto& [thread, place] : at) by_place[place].push_back(thread);
  for (auto& [place, of_place] : by_place) {
    std::sort(of_place.begin(), of_place.end());
    ready.push_back({place, std::move(of_place)});
  }
}

void Block::arrive(const Instruction& i, const Group& group, Lanes lanes) {
  const int number = int(source(i, 0)[group.threads.front()]);
  Waiting& barrier = barriers[number];
  if (i.from.size() > 1) barrier.expected = int(source(i, 1)[group.threads.front()]);
  lanes.each([&](int t) { barrier.threads.push_back({t, group.place + 1}); });
  let_go(number);
}

// Where all have come: all that they did is before what any of them does next.
void Block::let_go(int number) {
  Waiting& barrier = barriers[number];
  if (barrier.threads.empty() || int(barrier.threads.size()) < (barrier.expected ? barrier.expected : living))
    return;
  std::set<int> taking_part;
  for (auto& [thread, place] : barrier.threads) taking_part.insert(thread / kWarp);
  Clock joined;
  for (int w : taking_part) join(joined, warps[size_t(w)].known);
  ++launch.time;
  for (int w : taking_part) {
    warps[size_t(w)].known = joined;
    warps[size_t(w)].now() = launch.time;
  }
  add_ready(barrier.threads);
  barriers.erase(number);
}

bool Block::run(int64_t budget) {
  const std::vector<Instruction>& code = launch.kernel.code;
  while (living > 0) {
    if (budget <= 0) return false;
    if (ready.empty()) {
      if (!stalled.empty())
        fail("control: lanes wait for others of their warp that do not come", code[size_t(stalled[0].place)],
             stalled[0].threads[0]);
      throw Fault(text("control: ", barriers.begin()->second.threads.size(), " threads wait at barrier ",
                       barriers.begin()->first, " for others that never come\n    ", launch.kernel.name,
                       ", block (", index[0], ", ", index[1], ", ", index[2], ")"));
    }
    auto behind =
        std::min_element(ready.begin(), ready.end(), [](auto& a, auto& b) { return a.place < b.place; });
    Group group = std::move(*behind);
    ready.erase(behind);
    for (auto* others : {&ready, &stalled})
      for (size_t k = others->size(); k-- > 0;)
        if ((*others)[k].place == group.place) {
          group.threads.insert(group.threads.end(), (*others)[k].threads.begin(), (*others)[k].threads.end());
          others->erase(others->begin() + long(k));
          std::sort(group.threads.begin(), group.threads.end());
        }
    int meets = std::numeric_limits<int>::max();
    for (auto* others : {&ready, &stalled})
      for (const Group& other : *others)
        if (other.place > group.place) meets = std::min(meets, other.place);

    for (bool goes_on = true; goes_on;) {
      const Instruction& i = code[size_t(group.place)];
      const Lanes lanes = guarded(i, group);
      ++launch.step, --budget;
      if (++taken_ > kLongest) fail("control: the block does not come to its end", i, group.threads[0]);
      switch (i.flow) {
        case Flow::together:
          if (!complete(i, lanes)) {
            stalled.push_back(std::move(group));
            goes_on = false;
            break;
          }
          [[fallthrough]];
        case Flow::next:
          if (lanes.count > 0) i.run(*this, i, lanes);
          ++group.place;
          break;
        case Flow::branch:
          if (lanes.count == int(group.threads.size())) {
            group.place = i.target;
          } else if (lanes.count == 0) {
            ++group.place;
          } else {
            Group others{group.place + 1, {}};
            std::set_difference(group.threads.begin(), group.threads.end(), lanes.list,
                                lanes.list + lanes.count, std::back_inserter(others.threads));
            ready.push_back({i.target, std::vector<int>(lanes.list, lanes.list + lanes.count)});
            ready.push_back(std::move(others));
            goes_on = false;
            break;
          }
          if (!ready.empty() || !stalled.empty()) {
            ready.push_back(std::move(group));
            goes_on = false;
          }
          break;
        case Flow::exit: {
          std::vector<int> staying;
          lanes.each([&](int t) { alive[size_t(t / kWarp)] &= ~(1u << t % kWarp); });
          living -= lanes.count;
          for (int t : group.threads)
            if (alive_lanes(t) >> t % kWarp & 1) staying.push_back(t);
          if (!staying.empty()) ready.push_back({group.place + 1, std::move(staying)});
          for (auto next = barriers.begin(); next != barriers.end();) let_go((next++)->first);
          goes_on = false;
          break;
        }
        case Flow::barrier: {
          if (i.aligned && !complete(i, lanes)) {
            stalled.push_back(std::move(group));
          } else {
            std::vector<int> passing;
            if (lanes.count < int(group.threads.size())) {
              std::vector<int> here;
              lanes.each([&](int t) { here.push_back(t); });
              std::set_difference(group.threads.begin(), group.threads.end(), here.begin(), here.end(),
                                  std::back_inserter(passing));
            }
            if (lanes.count > 0) arrive(i, group, lanes);
            if (!passing.empty()) ready.push_back({group.place + 1, std::move(passing)});
          }
          goes_on = false;
          break;
        }
        case Flow::trap:
          if (lanes.count > 0) fail("control: a trap", i, group.threads[0]);
          ++group.place;
          break;
      }
      if (goes_on && (budget <= 0 || group.place >= meets)) {
        ready.push_back(std::move(group));
        goes_on = false;
      }
    }
  }
  return true;
}

// ---- checks of memory ---------------------------------------------------------------------------------------

uint8_t* Block::access(const Instruction& i, Space space, Word address, int bytes, int thread, bool reads,
                       const void* data) {
  const char* doing = data == nullptr ? "reads " : reads ? "changes " : "writes ";
  if (space == Space::generic) {
    space = address >> 56 == kSharedWindow >> 56  ? Space::shared
            : address >> 56 == kLocalWindow >> 56 ? Space::local
            : address >> 56 == kParamWindow >> 56 ? Space::param
                                                  : Space::global;
    if (space != Space::global) address &= (Word(1) << 56) - 1;
  }
  if (address % Word(bytes))
    fail(text("memory: misaligned: ", doing, bytes, " bytes at ", std::hex, "0x", address), i, thread);
  const auto within = [&](const char* what, Word first, Word size) {
    if (address < first || address + Word(bytes) > first + size)
      fail(text("memory: out of bounds: ", doing, bytes, " bytes at ", int64_t(address - first), " of ", size,
                " bytes of ", what),
           i, thread);
    return address - first;
  };
  if (space == Space::param)
    return &launch.parameters[within("parameters", 0, launch.kernel.parameter_bytes)];
  if (space == Space::local) {
    return &local[size_t(thread) * local_stride() + within("local memory", 0, launch.kernel.local_bytes)];
  }
  if (space == Space::shared) {
    const Word at = within("shared memory", kSharedBase, shared.size());
    Shadow* shadow = &shared_shadows[at / shadows_granule];
    if (reads)
      for (int k = 0; k < bytes / int(shadows_granule); ++k)
        if (shadow[k].write.clock == 0)
          fail(
              text("init: ", doing, "shared memory that nobody wrote, byte ", at + Word(k) * shadows_granule),
              i, thread);
    touch(shadow, size_t(bytes) / shadows_granule, shadows_granule, i, thread, reads, data, &shared[at]);
    return &shared[at];
  }
  const std::vector<Allocation>& all_of = launch.allocations;
  const auto holds = [&](const Allocation& a) {
    return address >= a.first && address + Word(bytes) <= a.last;
  };
  if (i.found >= all_of.size() || !holds(all_of[i.found])) {
    auto next = std::upper_bound(all_of.begin(), all_of.end(), address,
                                 [](Word at, auto& a) { return at < a.first; });
    if (next == all_of.begin() || !holds(*(next - 1))) {
      string near = "no allocation";
      if (next != all_of.begin())
        near = text((next - 1)->name, " + ", address - (next - 1)->first, ", of ",
                    (next - 1)->last - (next - 1)->first, " bytes");
      if (next != all_of.end()) near += text(", ", next->first - address, " bytes before ", next->name);
      fail(text("memory: out of bounds: ", doing, bytes, " bytes at 0x", std::hex, address, ": ", near), i,
           thread);
    }
    i.found = size_t(next - 1 - all_of.begin());
  }
  uint8_t* memory = reinterpret_cast<uint8_t*>(address);
  const size_t granule = launch.shadows.granule();
  touch(launch.shadows.at(address), size_t(bytes) / granule, granule, i, thread, reads, data, memory);
  return memory;
}

void Block::race(const Instruction& i, int thread, const Touch& other, bool other_writes,
                 const uint8_t* memory) {
  const Instruction& by = launch.kernel.code[other.place & ~kStrong];
  const unsigned number = other.agent / unsigned(launch.warps), *n = launch.grid;
  string name = "shared memory";
  size_t offset = size_t(memory - shared.data());
  if (offset >= shared.size())
    for (const Allocation& a : launch.allocations)
      if (Word(memory) >= a.first && Word(memory) < a.last)
        name = a.name, offset = size_t(Word(memory) - a.first);
  launch.note(text("race: ", name, " + ", offset, ", with nothing between this", where(i, thread), "\n  and ",
                   other_writes ? "the write" : "the read", " by warp ", other.agent % unsigned(launch.warps),
                   " of block (", number % n[0], ", ", number / n[0] % n[1], ", ", number / n[0] / n[1],
                   ")\n    ", by.line, by.source.empty() ? "" : "  // " + by.source),
              uint32_t(i.place), other.place);
}

// Whether numbers are the same, but for their rounding.
bool same_values(const uint8_t* one, const void* other, size_t bytes, size_t element) {
  const uint8_t* two = static_cast<const uint8_t*>(other);
  if (std::memcmp(one, two, bytes) == 0) return true;
  if (element < 2) return false;
  for (size_t k = 0; k < bytes; k += element) {
    Word a = 0, b = 0;
    std::memcpy(&a, one + k, element), std::memcpy(&b, two + k, element);
    if (a == b) continue;
    const double x = element == 8 ? F64::get(a) : element == 4 ? F32::get(a) : BF16::get(a);
    const double y = element == 8 ? F64::get(b) : element == 4 ? F32::get(b) : BF16::get(b);
    const double least = element == 8 ? 0x1p-40 : element == 4 ? 0x1p-12 : 0x1p-5;
    if (!(std::fabs(x - y) <= least * std::fmax(std::fabs(x), std::fabs(y)))) return false;
  }
  return true;
}

string shown(const void* value, Type type) {
  Word word = 0;
  std::memcpy(&word, value, size_t(bytes_of(type)));
  return text("0x", std::hex, word, " (", bytes_of(type) == 8 ? F64::get(word) : F32::get(word), ")");
}

void Block::touch(Shadow* shadow, size_t count, size_t granule, const Instruction& i, int thread, bool reads,
                  const void* data, const uint8_t* memory) {
  Warp& warp = warp_of(thread);
  const Touch now{warp.agent, warp.now(), uint32_t(i.place) | (i.strong ? kStrong : 0)};
  const auto races = [&](const Touch& other) {
    return !warp.after(other) && !(i.strong && (other.place & kStrong));
  };
  const bool alike = data != nullptr && same_values(memory, data, count * granule, size_t(bytes_of(i.type)));
  for (size_t k = 0; k < count; ++k, memory += granule) {
    Shadow& s = shadow[k];
    const bool same = data != nullptr && !reads && alike &&
                      s.write.agent / unsigned(launch.warps) == now.agent / unsigned(launch.warps) &&
                      ((s.write.place ^ now.place) & ~kStrong) == 0;
    if (!same && races(s.write)) race(i, thread, s.write, true, memory);
    if (data != nullptr) {
      if (!same && !reads && s.write.agent == now.agent && s.write.clock == now.clock &&
          s.step == launch.step)
        launch.note(text("race: two lanes write different values by one instruction: ", shown(data, i.type),
                         " over ", shown(memory - k * granule, i.type), where(i, thread)),
                    uint32_t(i.place), uint32_t(i.place));
      if (races(s.read)) race(i, thread, s.read, false, memory);
      if (s.more) {
        for (const Touch& read : launch.several[s.more])
          if (races(read)) race(i, thread, read, false, memory);
        launch.several[s.more].clear();
        launch.unused.push_back(s.more);
        s.more = 0;
      }
      s.write = now, s.step = launch.step, s.read = Touch();
    } else if (s.more) {
      auto& of = launch.several[s.more];
      of.erase(std::remove_if(of.begin(), of.end(), [&](const Touch& read) { return warp.after(read); }),
               of.end());
      of.push_back(now);
    } else if (warp.after(s.read)) {
      s.read = now;
    } else {
      if (launch.unused.empty())
        launch.unused.push_back(uint32_t(launch.several.size())), launch.several.emplace_back();
      s.more = launch.unused.back();
      launch.unused.pop_back();
      launch.several[s.more] = {s.read, now};
      s.read = Touch();
    }
  }
}

void Block::acquire(const Instruction& i, Word address, int thread) {
  if (!launch.synchronises || !i.strong) return;
  auto found = launch.published.find(address);
  if (found == launch.published.end()) return;
  Warp& warp = warp_of(thread);
  join(i.acquires ? warp.known : warp.seen, found->second);
}

// `keeps_chain`: what others published there is still seen behind an atomic that reads and writes.
void Block::release(const Instruction& i, Word address, int thread, bool keeps_chain) {
  if (!launch.synchronises || !i.strong) return;
  Warp& warp = warp_of(thread);
  Clock& here = launch.published[address];
  if (!keeps_chain) here.clear();
  join(here, i.releases ? warp.known : warp.fenced);
  if (i.releases) warp.now() = ++launch.time;
}

// ---- operations ---------------------------------------------------------------------------------------------

template <class T>
constexpr bool kTwo = false;
template <class T>
constexpr bool kTwo<Two<T>> = true;

template <auto F, class R, class... A, size_t... K>
void apply(Block& b, const Instruction& i, Lanes lanes, std::index_sequence<K...>) {
  Word* const to = b.row(i.to[0]);
  const Word* const from[] = {b.source(i, K)...};
  lanes.each([&](int t) {
    if constexpr (kTwo<R>)
      to[t] = R::put({F(A::get(from[K][t]).low...), F(A::get(from[K][t]).high...)});
    else
      to[t] = R::put(typename R::Value(F(A::get(from[K][t])...)));
  });
}
template <auto F, class R, class... A>
void elementwise(Block& b, const Instruction& i, Lanes lanes) {
  apply<F, R, A...>(b, i, lanes, std::index_sequence_for<A...>());
}

struct Mnemonic {
  string name;
  std::set<string> modifiers;
  Type type = Type::none,
       other = Type::none;  // the last one and the one before: of cvt, the source's and the result's
  bool has(const char* modifier) const { return modifiers.count(modifier) != 0; }
};

// What results and operands an operation of type T has.
template <class T>
struct Doubled;
template <>
struct Doubled<U16> {
  using Type = U32;
};
template <>
struct Doubled<S16> {
  using Type = S32;
};
template <>
struct Doubled<U32> {
  using Type = U64;
};
template <>
struct Doubled<S32> {
  using Type = S64;
};
struct Unary {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T>;
};
struct Binary {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T, T>;
};
struct Ternary {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T, T, T>;
};
struct Shift {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T, U32>;
};
struct Choice {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T, T, Pred>;
};
struct Count {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, U32, T>;
};
struct Extract {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T, U32, U32>;
};
struct Insert {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, T, T, T, U32, U32>;
};
struct Product {
  template <auto F, class T>
  static constexpr Run run = elementwise<F, typename Doubled<T>::Type, T, T>;
};
struct ProductSum {
  using Of = void;
  template <auto F, class T>
  static constexpr Run run = elementwise<F, typename Doubled<T>::Type, T, T, typename Doubled<T>::Type>;
};

// What `of` makes of the one of some types that an instruction has; null if it has another one.
template <class... T, class F>
Run pick(Type type, Types<T...>, const F& of) {
  Run run = nullptr;
  ((T::type == type ? void(run = of(T())) : void()), ...);
  return run;
}
template <class Shape, auto F, class List>
Run make(const Mnemonic& m, Instruction&) {
  return pick(m.type, List(), [](auto type) { return Shape::template run<F, decltype(type)>; });
}

template <class T>
constexpr bool kFloating = std::is_floating_point_v<T>;

constexpr auto add = [](auto a, auto b) { return a + b; };
constexpr auto multiply = [](auto a, auto b) { return a * b; };
constexpr auto high = [](auto a, auto b) {
  using V = decltype(a);
  using Double = std::conditional_t<std::is_signed_v<V>, __int128, unsigned __int128>;
  return V((Double(a) * Double(b)) >> (8 * sizeof(V)));
};
constexpr auto widened = [](auto a, auto b) {
  using Double = std::conditional_t<std::is_signed_v<decltype(a)>, int64_t, uint64_t>;
  return Double(a) * Double(b);
};
constexpr auto multiply_add = [](auto a, auto b, auto c) {
  if constexpr (kFloating<decltype(a)>)
    return std::fma(a, b, c);
  else
    return a * b + c;
};
constexpr auto high_add = [](auto a, auto b, auto c) { return high(a, b) + c; };
constexpr auto widened_add = [](auto a, auto b, auto c) { return widened(a, b) + c; };
constexpr auto divide = [](auto a, auto b) {
  if constexpr (kFloating<decltype(a)>)
    return a / b;
  else if constexpr (std::is_signed_v<decltype(a)>)
    return b == 0 ? decltype(a)(-1) : b == -1 ? decltype(a)(-a) : decltype(a)(a / b);
  else
    return b == 0 ? decltype(a)(-1) : decltype(a)(a / b);
};
constexpr auto remainder = [](auto a, auto b) {
  if constexpr (std::is_signed_v<decltype(a)>)
    return b == -1 ? decltype(a)(0) : b == 0 ? a : decltype(a)(a % b);
  else
    return b == 0 ? a : decltype(a)(a % b);
};
constexpr auto smaller = [](auto a, auto b) {
  if constexpr (!kFloating<decltype(a)>)
    return a < b ? a : b;
  else
    return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
};
constexpr auto larger = [](auto a, auto b) {
  if constexpr (!kFloating<decltype(a)>)
    return a > b ? a : b;
  else
    return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
};
constexpr auto smaller_or_nan = [](auto a, auto b) { return a != a ? a : b != b ? b : smaller(a, b); };
constexpr auto larger_or_nan = [](auto a, auto b) { return a != a ? a : b != b ? b : larger(a, b); };
constexpr auto inverted = [](auto a) {
  if constexpr (std::is_same_v<decltype(a), bool>)
    return !a;
  else
    return ~a;
};
template <class V>
constexpr uint32_t kWidth = 8 * sizeof(V);
constexpr auto shift_left = [](auto a, uint32_t by) {
  return by < kWidth<decltype(a)> ? decltype(a)(a << by) : decltype(a)(0);
};
constexpr auto shift_right = [](auto a, uint32_t by) {
  return decltype(a)(a >> std::min(by, kWidth<decltype(a)> - 1) >> (by >= kWidth<decltype(a)>));
};
constexpr auto extract = [](auto a, uint32_t from, uint32_t count) {
  using V = decltype(a);
  const int bits = int(kWidth<V>), first = int(from & 255), length = int(count & 255);
  const auto bit = [&](int at) { return a >> std::min(at, bits - 1) & 1; };
  const V sign = V(std::is_signed_v<V> && length > 0 ? bit(std::min(first + length - 1, bits - 1)) : 0);
  const auto low = std::make_unsigned_t<V>(first < bits ? std::make_unsigned_t<V>(a) >> first : 0);
  const int there = std::max(0, std::min(length, bits - first));
  const auto mask = there >= bits ? ~std::make_unsigned_t<V>(0) : (std::make_unsigned_t<V>(1) << there) - 1;
  return V((low & mask) | (sign ? ~mask : 0));
};
constexpr auto insert = [](auto a, auto into, uint32_t at, uint32_t count) {
  using V = decltype(a);
  const uint32_t first = at & 255, length = count & 255;
  if (first >= kWidth<V> || length == 0) return into;
  const V mask = V((length >= kWidth<V> ? ~V(0) : (V(1) << length) - 1) << first);
  return V((into & ~mask) | (V(a << first) & mask));
};
constexpr auto permute = [](uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = a | uint64_t(b) << 32;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t pick = which >> 4 * k & 15;
    uint32_t byte = uint32_t(both >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * k;
  }
  return result;
};
constexpr auto count_leading = [](auto a) {
  if constexpr (sizeof a == 8)
    return a ? __builtin_clzll(a) : 64;
  else
    return a ? __builtin_clz(a) : 32;
};
constexpr auto reversed = [](auto a) {
  decltype(a) result = 0;
  for (uint32_t k = 0; k < kWidth<decltype(a)>; ++k) result |= (a >> k & 1) << (kWidth<decltype(a)> - 1 - k);
  return result;
};
// Elementary functions as those of fp64, rounded once.
constexpr auto power_of_2 = [](auto a) { return std::exp2(double(a)); };
constexpr auto logarithm_of_2 = [](auto a) { return std::log2(double(a)); };
constexpr auto reciprocal = [](auto a) { return 1 / a; };
constexpr auto reciprocal_root = [](auto a) { return 1 / std::sqrt(double(a)); };

Run make_sum(const Mnemonic& m, Instruction& i) {
  constexpr auto of_half = [](auto a, auto b) { return decltype(a)(a + b); };
  const Run two = make<Binary, of_half, Types<Two<U16>, Two<S16>>>(m, i);
  return two != nullptr ? two : make<Binary, add, Numbers>(m, i);
}
Run make_multiply(const Mnemonic& m, Instruction& i) {
  return m.has("wide") ? make<Product, widened, Types<U16, S16, U32, S32>>(m, i)
         : m.has("hi") ? make<Binary, high, Ints>(m, i)
                       : make<Binary, multiply, Numbers>(m, i);
}
Run make_multiply_add(const Mnemonic& m, Instruction& i) {
  return m.has("wide") ? make<ProductSum, widened_add, Types<U16, S16, U32, S32>>(m, i)
         : m.has("hi") ? make<Ternary, high_add, Ints>(m, i)
                       : make<Ternary, multiply_add, Numbers>(m, i);
}
Run make_smaller(const Mnemonic& m, Instruction& i) {
  return m.has("NaN") ? make<Binary, smaller_or_nan, Numbers>(m, i) : make<Binary, smaller, Numbers>(m, i);
}
Run make_larger(const Mnemonic& m, Instruction& i) {
  return m.has("NaN") ? make<Binary, larger_or_nan, Numbers>(m, i) : make<Binary, larger, Numbers>(m, i);
}

// lop3: the third of its sources' truth tables is an immediate.
void logic(Block& b, const Instruction& i, Lanes lanes) {
  Word* const to = b.row(i.to[0]);
  const Word *x = b.source(i, 0), *y = b.source(i, 1), *z = b.source(i, 2), *table = b.source(i, 3);
  lanes.each([&](int t) {
    Word result = 0;
    for (int k = 0; k < 8; ++k)
      if (table[t] >> k & 1)
        result |= (k & 4 ? x[t] : ~x[t]) & (k & 2 ? y[t] : ~y[t]) & (k & 1 ? z[t] : ~z[t]);
    to[t] = uint32_t(result);
  });
}

// setp: bits of what is true: less, equal, greater, neither.
const std::map<string, int> kComparisons = {{"lt", 1},   {"eq", 2},   {"le", 3},   {"gt", 4},   {"ne", 5},
                                            {"ge", 6},   {"num", 7},  {"nan", 8},  {"ltu", 9},  {"equ", 10},
                                            {"leu", 11}, {"gtu", 12}, {"neu", 13}, {"geu", 14}, {"lo", 1},
                                            {"ls", 3},   {"hi", 4},   {"hs", 6}};
template <class V>
bool compared(int which, V a, V b) {
  return which >> (a < b ? 0 : a == b ? 1 : a > b ? 2 : 3) & 1;
}
template <class T>
void compare(Block& b, const Instruction& i, Lanes lanes) {
  const Word *x = b.source(i, 0), *y = b.source(i, 1), *with = i.from.size() > 2 ? b.source(i, 2) : nullptr;
  const int which = i.mode & 15, combined = i.mode >> 4;
  const auto combine = [&](bool found, int t) {
    if (with == nullptr) return found;
    const bool other = (with[t] != 0) != i.negated;
    return combined == 1 ? found && other : combined == 2 ? found || other : found != other;
  };
  lanes.each([&](int t) {
    bool results[2];
    if constexpr (kTwo<T>) {
      const auto one = T::get(x[t]), other = T::get(y[t]);
      results[0] = combine(compared(which, one.low, other.low), t);
      results[1] = combine(compared(which, one.high, other.high), t);
    } else {
      const bool found = compared(which, T::get(x[t]), T::get(y[t]));
      results[0] = combine(found, t), results[1] = combine(!found, t);
    }
    for (size_t k = 0; k < i.to.size(); ++k)
      if (i.to[k] >= 0) b.row(i.to[k])[t] = results[k];
  });
}
Run make_compare(const Mnemonic& m, Instruction& i) {
  for (const string& modifier : m.modifiers)
    if (kComparisons.count(modifier)) i.mode = kComparisons.at(modifier);
  i.mode |= (m.has("and") ? 1 : m.has("or") ? 2 : m.has("xor") ? 3 : 0) << 4;
  return pick(m.type, Numbers(), [](auto type) -> Run { return compare<decltype(type)>; });
}

// cvt. Modes: the rounding, and 16 for .sat.
enum Rounding { kNearest, kNearestInt, kZeroInt, kDownInt, kUpInt, kZero, kDown, kUp, kSaturated = 16 };
double to_whole(double x, int rounding) {
  return rounding == kNearestInt ? std::nearbyint(x)
         : rounding == kZeroInt  ? std::trunc(x)
         : rounding == kDownInt  ? std::floor(x)
         : rounding == kUpInt    ? std::ceil(x)
                                 : x;
}
template <class D, class A>
void convert(Block& b, const Instruction& i, Lanes lanes) {
  using To = typename D::Value;
  using From = typename A::Value;
  Word* const to = b.row(i.to[0]);
  const Word* from = b.source(i, 0);
  const int rounding = i.mode & 15;
  lanes.each([&](int t) {
    const From x = A::get(from[t]);
    if constexpr (!kFloating<To> && !kFloating<From>) {
      To result = To(x);
      if (i.mode & kSaturated) {
        const __int128 least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
        result = To(std::min(std::max(__int128(x), least), most));
      }
      to[t] = D::put(result);
      if constexpr (std::is_signed_v<To>) to[t] = Word(int64_t(result));  // into a wider register
    } else if constexpr (!kFloating<To>) {
      const double whole = to_whole(double(x), rounding);
      const double least = double(std::numeric_limits<To>::min()),
                   most = double(std::numeric_limits<To>::max());
      const To result = whole != whole   ? To(0)
                        : whole <= least ? std::numeric_limits<To>::min()
                        : whole >= most  ? std::numeric_limits<To>::max()
                                         : To(whole);
      to[t] = D::put(result);
    } else if constexpr (!kFloating<From>) {
      to[t] = D::put(To(x));
    } else {
      double value = to_whole(double(x), rounding);
      if (i.mode & kSaturated) value = value != value || value < 0 ? 0 : std::min(value, 1.0);
      To result = To(value);
      if (rounding >= kZero && double(result) != value && std::isfinite(value)) {
        const bool up = rounding == kUp || (rounding == kZero && value < 0);
        if (up != (double(result) > value))
          result = std::nextafter(result, up ? To(INFINITY) : To(-INFINITY));
      }
      to[t] = std::is_same_v<D, F16> ? F16::put(value) : D::put(result);
    }
  });
}
template <class T>
void narrow_two(Block& b, const Instruction& i, Lanes lanes) {  // the first source goes to the high half
  Word* const to = b.row(i.to[0]);
  const Word *upper = b.source(i, 0), *lower = b.source(i, 1);
  lanes.each([&](int t) { to[t] = T::put({F32::get(lower[t]), F32::get(upper[t])}); });
}
Run make_convert(const Mnemonic& m, Instruction& i) {
  const char* const names[] = {"rn", "rni", "rzi", "rmi", "rpi", "rz", "rm", "rp"};
  for (int k = 0; k < 8; ++k)
    if (m.has(names[k])) i.mode = k;
  if (i.mode >= kZero && m.other != Type::f32 && m.other != Type::f64) return nullptr;
  if (m.has("sat")) i.mode |= kSaturated;
  if (m.type == Type::f32 && m.other == Type::bf16x2) return m.has("rn") ? narrow_two<Two<BF16>> : nullptr;
  if (m.type == Type::f32 && m.other == Type::f16x2) return m.has("rn") ? narrow_two<Two<F16>> : nullptr;
  return pick(m.other, All(), [&](auto to) {
    return pick(m.type, All(), [](auto from) -> Run { return convert<decltype(to), decltype(from)>; });
  });
}

// mov, of one register, or of parts of one.
void pack(Block& b, const Instruction& i, Lanes lanes) {
  const int bits = 8 * i.mode;
  const Word mask = bits == 64 ? ~Word(0) : (Word(1) << bits) - 1;
  lanes.each([&](int t) {
    Word whole = 0;
    if (i.from.size() == 1)
      whole = b.source(i, 0)[t];
    else
      for (size_t k = 0; k < i.from.size(); ++k) whole |= (b.source(i, k)[t] & mask) << (size_t(bits) * k);
    if (i.to.size() == 1)
      b.row(i.to[0])[t] = whole;
    else
      for (size_t k = 0; k < i.to.size(); ++k)
        if (i.to[k] >= 0) b.row(i.to[k])[t] = whole >> (size_t(bits) * k) & mask;
  });
}
constexpr auto same = [](auto a) { return a; };
Run make_move(const Mnemonic& m, Instruction& i) {
  const size_t parts = std::max(i.to.size(), i.from.size());
  if (parts == 1)
    return pick(m.type == Type::pred    ? m.type
                : bytes_of(m.type) == 2 ? Type::u16
                : bytes_of(m.type) == 4 ? Type::u32
                                        : Type::u64,
                Bits(), [](auto type) { return Unary::run<same, decltype(type)>; });
  i.mode = bytes_of(m.type) / int(parts);
  return i.mode > 0 && (i.to.size() == 1 || i.from.size() == 1) ? pack : nullptr;
}
void zeros(Block& b, const Instruction& i, Lanes lanes) {
  lanes.each([&](int t) { b.row(i.to[0])[t] = 0; });
}
Run make_address(const Mnemonic& m, Instruction& i) {
  const bool away = m.has("to");
  switch (i.space) {
    case Space::global: return elementwise<same, U64, U64>;
    case Space::shared:
      return away ? elementwise<[](Word a) { return a - kSharedWindow; }, U64, U64>
                  : elementwise<[](Word a) { return a + kSharedWindow; }, U64, U64>;
    case Space::local:
      return away ? elementwise<[](Word a) { return a - kLocalWindow; }, U64, U64>
                  : elementwise<[](Word a) { return a + kLocalWindow; }, U64, U64>;
    case Space::param:
      return away ? nullptr : Run(elementwise<[](Word a) { return a + kParamWindow; }, U64, U64>);
    default: return nullptr;
  }
}

// ---- loads, stores, atomics

Word address_of(const Word* row, const Operand& operand, Space space, int thread) {
  const Word at = row[thread];
  if (space == Space::shared && at <= 0xffffffffu) return uint32_t(at + Word(operand.plus));
  return at + Word(operand.plus);
}
void load(Block& b, const Instruction& i, Lanes lanes) {
  const Word* addresses = b.source(i, 0);
  const int bytes = bytes_of(i.type), unused = 64 - 8 * bytes;
  const bool sign = i.type == Type::s8 || i.type == Type::s16 || i.type == Type::s32;
  lanes.each([&](int t) {
    const Word at = address_of(addresses, i.from[0], i.space, t);
    const uint8_t* memory = b.access(i, i.space, at, bytes * int(i.to.size()), t, true, nullptr);
    for (size_t k = 0; k < i.to.size(); ++k) {
      Word word = 0;
      std::memcpy(&word, memory + k * size_t(bytes), size_t(bytes));
      if (sign) word = Word(int64_t(word << unused) >> unused);
      if (i.to[k] >= 0) b.row(i.to[k])[t] = word;
    }
    b.acquire(i, at, t);
  });
}
void store(Block& b, const Instruction& i, Lanes lanes) {
  const Word* addresses = b.source(i, 0);
  const size_t bytes = size_t(bytes_of(i.type)), count = i.from.size() - 1;
  lanes.each([&](int t) {
    const Word at = address_of(addresses, i.from[0], i.space, t);
    uint8_t values[32];
    for (size_t k = 0; k < count; ++k) std::memcpy(values + k * bytes, b.source(i, k + 1) + t, bytes);
    std::memcpy(b.access(i, i.space, at, int(bytes * count), t, false, values), values, bytes * count);
    b.release(i, at, t, false);
  });
}
Run make_load(const Mnemonic& m, Instruction& i) {
  const size_t count = m.has("v2") ? 2 : m.has("v4") ? 4 : 1;
  return m.type != Type::none && i.to.size() == count && size_t(bytes_of(m.type)) * count <= 16 ? load
                                                                                                : nullptr;
}
Run make_store(const Mnemonic& m, Instruction& i) {
  const size_t count = m.has("v2") ? 2 : m.has("v4") ? 4 : 1;
  return m.type != Type::none && i.from.size() == 1 + count && size_t(bytes_of(m.type)) * count <= 16
             ? store
             : nullptr;
}

const char* const kAtomics[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
template <class T>
void atomic(Block& b, const Instruction& i, Lanes lanes) {
  using V = typename T::Value;
  lanes.each([&](int t) {
    const Word at = address_of(b.source(i, 0), i.from[0], i.space, t);
    const V x = T::get(b.source(i, 1)[t]);
    Word word = 0;
    uint8_t* memory = b.access(i, i.space, at, sizeof(V), t, true, &word);
    b.acquire(i, at, t);
    std::memcpy(&word, memory, sizeof(V));
    const V old = T::get(word);
    V now = x;
    if (i.mode == 0) now = V(old + x);
    if (i.mode == 1) now = smaller(old, x);
    if (i.mode == 2) now = larger(old, x);
    if constexpr (!kFloating<V>) {
      if (i.mode == 3) now = old & x;
      if (i.mode == 4) now = old | x;
      if (i.mode == 5) now = old ^ x;
      if (i.mode == 8) now = old >= x ? 0 : V(old + 1);
      if (i.mode == 9) now = old == 0 || old > x ? x : V(old - 1);
    }
    if (i.mode == 7) now = old == x ? T::get(b.source(i, 2)[t]) : old;
    const Word result = T::put(now);
    std::memcpy(memory, &result, sizeof(V));
    b.release(i, at, t, true);
    if (!i.to.empty() && i.to[0] >= 0) b.row(i.to[0])[t] = T::put(old);
  });
}
Run make_atomic(const Mnemonic& m, Instruction& i) {
  i.mode = -1;
  for (int k = 0; k < 10; ++k)
    if (m.has(kAtomics[k])) i.mode = k;
  i.strong = true;
  switch (i.mode < 0 ? Type::none : m.type) {
    case Type::u32: return atomic<U32>;
    case Type::s32: return atomic<S32>;
    case Type::u64: return atomic<U64>;
    case Type::s64: return atomic<S64>;
    case Type::f32: return i.mode == 0 ? atomic<F32> : nullptr;
    case Type::f64: return i.mode == 0 ? atomic<F64> : nullptr;
    default: return nullptr;
  }
}
void fence(Block& b, const Instruction&, Lanes lanes) {
  if (!b.launch.synchronises) return;
  lanes.each_warp([&](int first, uint32_t) {
    Warp& warp = b.warp_of(first);
    join(warp.known, warp.seen);
    warp.fenced = warp.known;
    warp.now() = ++b.launch.time;
  });
}

// cp.async: what is copied arrives when it is waited for.
void copy(Block& b, const Instruction& i, Lanes lanes) {
  lanes.each([&](int t) {
    Copy copied{t,
                b.copy_groups[size_t(t)],
                address_of(b.source(i, 0), i.from[0], Space::shared, t),
                int(b.source(i, 2)[t]),
                {},
                &i};
    const int bytes = i.from.size() > 3 ? int(b.source(i, 3)[t]) : copied.bytes;  // the others are zeros
    if (bytes > copied.bytes || copied.bytes > 16) b.fail("memory: a copy of more bytes than it says", i, t);
    const Word from = address_of(b.source(i, 1), i.from[1], Space::global, t);
    if (bytes > 0) {
      uint8_t all_of[16];
      for (int k = 0; k < bytes;) {  // by parts that are aligned
        int part = bytes - k;
        while (part & (part - 1)) part &= part - 1;
        std::memcpy(all_of + k, b.access(i, Space::global, from + Word(k), part, t, true, nullptr),
                    size_t(part));
        k += part;
      }
      std::memcpy(copied.data, all_of, size_t(bytes));
    }
    b.access(i, Space::shared, copied.to, copied.bytes, t, false, copied.data);
    b.copies.push_back(copied);
  });
}
void commit(Block& b, const Instruction&, Lanes lanes) {
  lanes.each([&](int t) { ++b.copy_groups[size_t(t)]; });
}
void wait_for_copies(Block& b, const Instruction& i, Lanes lanes) {
  std::vector<int> arrived(size_t(b.threads), -1);  // groups before this one
  lanes.each([&](int t) {
    arrived[size_t(t)] =
        i.from.empty() ? std::numeric_limits<int>::max() : b.copy_groups[size_t(t)] - int(b.source(i, 0)[t]);
  });
  std::vector<Copy> left;
  for (Copy& c : b.copies) {
    if (c.group >= arrived[size_t(c.thread)]) {
      left.push_back(c);
      continue;
    }
    std::memcpy(b.access(*c.by, Space::shared, c.to, c.bytes, c.thread, false, c.data), c.data,
                size_t(c.bytes));
  }
  b.copies = std::move(left);
}
Run make_copy(const Mnemonic& m, Instruction& i) {
  if (m.has("commit_group")) return commit;
  if (m.has("wait_group") || m.has("wait_all")) return wait_for_copies;
  return (m.has("ca") || m.has("cg")) && m.has("shared") && m.has("global") && i.from.size() >= 3 &&
                 i.from.size() <= 4
             ? copy
             : nullptr;
}

// ---- by all lanes of a warp

void shuffle(Block& b, const Instruction& i, Lanes lanes) {
  const Word *from = b.source(i, 0), *by = b.source(i, 1), *limits = b.source(i, 2);
  Word* const to = b.row(i.to[0]);
  lanes.each_warp([&](int first, uint32_t there) {
    Word before[kWarp] = {};
    for (int l = 0; l < kWarp; ++l)
      if (there >> l & 1) before[l] = from[first + l];
    for (int l = 0; l < kWarp; ++l) {
      if (!(there >> l & 1)) continue;
      const int t = first + l, step = int(by[t] & 31), clamp = int(limits[t] & 31),
                segment = int(limits[t] >> 8 & 31);
      const int last = (l & segment) | (clamp & ~segment), least = l & segment;
      int source = i.mode == 0   ? l - step
                   : i.mode == 1 ? l + step
                   : i.mode == 2 ? l ^ step
                                 : least | (step & ~segment);
      const bool inside = i.mode == 0 ? source >= last : source <= last;
      if (!inside) source = l;
      if (!(there >> source & 1))
        b.fail(text("control: a shuffle reads lane ", source, ", which is not there"), i, t);
      to[t] = before[source];
      if (i.to.size() > 1 && i.to[1] >= 0) b.row(i.to[1])[t] = inside;
    }
  });
}
Run make_shuffle(const Mnemonic& m, Instruction& i) {
  i.mode = m.has("up") ? 0 : m.has("down") ? 1 : m.has("bfly") ? 2 : m.has("idx") ? 3 : -1;
  return i.mode >= 0 && bytes_of(m.type) == 4 ? shuffle : nullptr;
}
void vote(Block& b, const Instruction& i, Lanes lanes) {
  const Word* given = b.source(i, 0);
  lanes.each_warp([&](int first, uint32_t there) {
    uint32_t yes = 0;
    for (int l = 0; l < kWarp; ++l)
      if (there >> l & 1) yes |= uint32_t((given[first + l] != 0) != i.negated) << l;
    const Word result = i.mode == 0   ? yes == there
                        : i.mode == 1 ? yes != 0
                        : i.mode == 2 ? yes == 0 || yes == there
                                      : yes;
    for (int l = 0; l < kWarp; ++l)
      if (there >> l & 1) b.row(i.to[0])[first + l] = result;
  });
}
Run make_vote(const Mnemonic& m, Instruction& i) {
  i.mode = m.has("all") ? 0 : m.has("any") ? 1 : m.has("uni") ? 2 : m.has("ballot") ? 3 : -1;
  return i.mode >= 0 ? vote : nullptr;
}
void active_mask(Block& b, const Instruction& i, Lanes lanes) {
  lanes.each_warp([&](int first, uint32_t there) {
    for (int l = 0; l < kWarp; ++l)
      if (there >> l & 1) b.row(i.to[0])[first + l] = there;
  });
}
void nothing(Block&, const Instruction&, Lanes) {}

// Matrices of 8 x 8 values of 16 bits: row r of matrix m is at the address of lane 8 m + r, and lane l has two neighbours
// of row l / 4, or transposed, of column l / 4.
void matrices(Block& b, const Instruction& i, Lanes lanes) {
  const bool loads = !i.to.empty();
  const size_t count = loads ? i.to.size() : i.from.size() - 1;
  const Word* addresses = b.source(i, 0);
  lanes.each_warp([&](int first, uint32_t) {
    for (size_t m = 0; m < count; ++m) {
      uint16_t values[8][8];
      Word* const words = loads ? b.row(i.to[m]) : nullptr;
      const Word* const given = loads ? nullptr : b.source(i, m + 1);
      for (int turn = 0; turn < 2; ++turn)
        if ((turn == 0) == loads)
          for (int r = 0; r < 8; ++r) {
            const int t = first + int(m) * 8 + r;
            const Word at = address_of(addresses, i.from[0], i.space, t);
            uint8_t* memory = b.access(i, i.space, at, 16, t, loads, loads ? nullptr : values[r]);
            loads ? std::memcpy(values[r], memory, 16) : std::memcpy(memory, values[r], 16);
          }
        else
          for (int l = 0; l < kWarp; ++l)
            for (int half = 0; half < 2; ++half) {
              const int one = l / 4, other = l % 4 * 2 + half;
              uint16_t& value = i.transposed ? values[other][one] : values[one][other];
              if (!loads)
                value = uint16_t(given[first + l] >> 16 * half);
              else
                words[first + l] = (half ? words[first + l] & 0xffff : 0) | Word(value) << 16 * half;
            }
    }
  });
}
Run make_matrices(const Mnemonic& m, Instruction& i) {
  const size_t count = m.has("x1") ? 1 : m.has("x2") ? 2 : m.has("x4") ? 4 : 0;
  i.transposed = m.has("trans");
  const bool fits = (i.to.empty() ? i.from.size() == 1 + count : i.to.size() == count && i.from.size() == 1);
  return m.has("m8n8") && count && fits && bytes_of(m.type) == 2 ? matrices : nullptr;
}
// mma in fp64, of m16n8k16 and m8n8k4.
void product(Block& b, const Instruction& i, Lanes lanes) {
  const int rows = i.mode, terms = rows == 16 ? 16 : 4, of_x = rows * terms / kWarp, of_y = 8 * terms / kWarp;
  lanes.each_warp([&](int first, uint32_t) {
    double x[16][16], y[16][8], z[16][8];
    for (int l = 0; l < kWarp; ++l) {
      const auto given = [&](int k) { return F64::get(b.source(i, size_t(k))[first + l]); };
      for (int k = 0; k < of_x; ++k) x[l / 4 + k % 2 * 8][k / 2 * 4 + l % 4] = given(k);
      for (int k = 0; k < of_y; ++k) y[k * 4 + l % 4][l / 4] = given(of_x + k);
      for (int k = 0; k < rows / 4; ++k) z[l / 4 + k / 2 * 8][l % 4 * 2 + k % 2] = given(of_x + of_y + k);
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < 8; ++c)
        for (int k = 0; k < terms; ++k) z[r][c] = std::fma(x[r][k], y[k][c], z[r][c]);
    for (int l = 0; l < kWarp; ++l)
      for (int k = 0; k < rows / 4; ++k)
        b.row(i.to[size_t(k)])[first + l] = F64::put(z[l / 4 + k / 2 * 8][l % 4 * 2 + k % 2]);
  });
}
Run make_product(const Mnemonic& m, Instruction& i) {
  i.mode = m.has("m16n8k16") ? 16 : m.has("m8n8k4") ? 8 : 0;
  const size_t given = i.mode == 16 ? 16 : 4;
  const bool fits = m.type == Type::f64 && i.to.size() == size_t(i.mode / 4) && i.from.size() == given;
  return i.mode && fits && m.has("row") && m.has("col") ? product : nullptr;
}

// ---- the table of opcodes -----------------------------------------------------------------------------------

Run make_barrier(const Mnemonic& m, Instruction& i) {
  if (!m.has("sync")) return nullptr;
  if (m.has("warp")) {
    i.flow = Flow::together, i.mask = 0;
  } else {
    i.aligned = m.name == "bar" || m.has("aligned");
  }
  return i.from.empty() ? nullptr : nothing;
}
Run make_nothing(const Mnemonic&, Instruction&) { return nothing; }
template <Run run>
Run make_always(const Mnemonic&, Instruction&) {
  return run;
}

struct Opcode {
  const char* modifiers;  // besides types
  Run (*make)(const Mnemonic&, Instruction&);
  int results = 1;
  Flow flow = Flow::next;
  int mask = -1;  // the operand that names lanes
};
const char kMemory[] =
    "weak volatile relaxed acquire release acq_rel cta gpu sys global shared shared::cta local param const "
    "nc ca cg cs cv lu v2 v4 L1::evict_first L1::evict_last L1::no_allocate L2::cache_hint L2::128B L2::256B";
const std::map<string, Opcode> kOpcodes = {
    {"abs",
     {"ftz", make<Unary,
                  [](auto a) {
                    return decltype(a)(a < 0 || (kFloating<decltype(a)> && std::signbit(double(a))) ? -a : a);
                  },
                  Numbers>}},
    {"activemask", {"", make_always<active_mask>}},
    {"add", {"rn ftz", make_sum}},
    {"and", {"", make<Binary, [](auto a, auto b) { return a & b; }, Bits>}},
    {"atom",
     {"relaxed acquire release acq_rel cta gpu sys global shared shared::cta add min max and or xor exch cas "
      "inc dec",
      make_atomic}},
    {"bar", {"sync warp cta", make_barrier, 0, Flow::barrier}},
    {"barrier", {"sync cta aligned", make_barrier, 0, Flow::barrier}},
    {"bfe", {"", make<Extract, extract, Types<U32, S32, U64, S64>>}},
    {"bfi", {"", make<Insert, insert, Types<U32, U64>>}},
    {"bra", {"uni", make_nothing, 0, Flow::branch}},
    {"brev", {"", make<Unary, reversed, Types<U32, U64>>}},
    {"clz", {"", make<Count, count_leading, Types<U32, U64>>}},
    {"copysign",
     {"", make<Binary, [](auto sign, auto a) { return std::copysign(a, sign); }, Types<F32, F64>>}},
    {"cos", {"approx ftz", make<Unary, [](auto a) { return std::cos(double(a)); }, Wide>}},
    {"cp", {"async ca cg shared shared::cta global commit_group wait_group wait_all L2::128B", make_copy, 0}},
    {"createpolicy", {"fractional L2::evict_first L2::evict_last L2::evict_normal", make_always<zeros>}},
    {"cvt", {"rn rni rzi rmi rpi rz rm rp ftz sat", make_convert}},
    {"cvta", {"to global shared local param", make_address}},
    {"div", {"rn full approx ftz", make<Binary, divide, Numbers>}},
    {"ex2", {"approx ftz", make<Unary, power_of_2, Wide>}},
    {"exit", {"", make_nothing, 0, Flow::exit}},
    {"fence", {"sc acq_rel cta gpu sys", make_always<fence>, 0}},
    {"fma", {"rn ftz", make<Ternary, multiply_add, Numbers>}},
    {"ld", {kMemory, make_load}},
    {"ldmatrix", {"sync aligned m8n8 x1 x2 x4 trans shared shared::cta", make_matrices, 1, Flow::together}},
    {"lg2", {"approx ftz", make<Unary, logarithm_of_2, Wide>}},
    {"lop3", {"", make_always<logic>}},
    {"mad", {"lo hi wide rn ftz", make_multiply_add}},
    {"max", {"NaN ftz", make_larger}},
    {"membar", {"cta gl sys", make_always<fence>, 0}},
    {"min", {"NaN ftz", make_smaller}},
    {"mma", {"sync aligned m16n8k16 m8n8k4 row col", make_product, 1, Flow::together}},
    {"mov", {"", make_move}},
    {"mul", {"lo hi wide rn ftz", make_multiply}},
    {"neg", {"ftz", make<Unary, [](auto a) { return -a; }, Numbers>}},
    {"not", {"", make<Unary, inverted, Bits>}},
    {"or", {"", make<Binary, [](auto a, auto b) { return a | b; }, Bits>}},
    {"popc", {"", make<Count, [](auto a) { return __builtin_popcountll(a); }, Types<U32, U64>>}},
    {"prmt", {"", make<Ternary, permute, Types<U32>>}},
    {"rcp", {"rn approx ftz", make<Unary, reciprocal, Wide>}},
    {"red",
     {"relaxed acquire release acq_rel cta gpu sys global shared shared::cta add min max and or xor inc dec",
      make_atomic, 0}},
    {"rem", {"", make<Binary, remainder, Ints>}},
    {"ret", {"uni", make_nothing, 0, Flow::exit}},
    {"rsqrt", {"approx ftz", make<Unary, reciprocal_root, Wide>}},
    {"selp", {"", make<Choice, [](auto a, auto b, bool first) { return first ? a : b; }, Values>}},
    {"setp", {"eq ne lt le gt ge equ neu ltu leu gtu geu num nan lo ls hi hs and or xor ftz", make_compare}},
    {"shfl", {"sync up down bfly idx", make_shuffle, 1, Flow::together, 3}},
    {"shl", {"", make<Shift, shift_left, Types<U16, U32, U64>>}},
    {"shr", {"", make<Shift, shift_right, Ints>}},
    {"sin", {"approx ftz", make<Unary, [](auto a) { return std::sin(double(a)); }, Wide>}},
    {"sqrt", {"rn approx ftz", make<Unary, [](auto a) { return std::sqrt(a); }, Wide>}},
    {"st", {kMemory, make_store, 0}},
    {"stmatrix", {"sync aligned m8n8 x1 x2 x4 trans shared shared::cta", make_matrices, 0, Flow::together}},
    {"sub", {"rn ftz", make<Binary, [](auto a, auto b) { return a - b; }, Numbers>}},
    {"tanh", {"approx ftz", make<Unary, [](auto a) { return std::tanh(double(a)); }, Wide>}},
    {"trap", {"", make_nothing, 0, Flow::trap}},
    {"vote", {"sync all any uni ballot", make_vote, 1, Flow::together, 1}},
    {"xor", {"", make<Binary, [](auto a, auto b) { return a ^ b; }, Bits>}},
};

// ---- parsing ------------------------------------------------------------------------------------------------

std::vector<string> split(const string& whole, const char* at) {
  std::vector<string> parts;
  for (size_t p = 0; p < whole.size();) {
    const size_t first = whole.find_first_not_of(at, p);
    if (first == string::npos) break;
    p = std::min(whole.find_first_of(at, first), whole.size());
    parts.push_back(whole.substr(first, p - first));
  }
  return parts;
}
string stripped(const string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n");
  return first == string::npos ? "" : s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}
bool named(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

class Parser {
 public:
  Parser(const string& ptx, Module& into) : text_(ptx), module_(into) {}

  void parse() {
    for (size_t p = 0; (p = text_.find("\n\t.file", p)) != string::npos;
         ++p)  // often behind what refers to them
      file(text_.substr(p + 2, text_.find('\n', p + 1) - p - 2));
    for (string word; !(word = peek()).empty();) {
      if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file") {
        line();
      } else if (word == ".section") {
        skip_braces();
      } else {
        const string head = until(";{");
        const bool entry = head.find(".entry") != string::npos;
        if (entry && text_[at_] == '{')
          kernel(head);
        else if (entry || head.find(".func") != string::npos) {
          if (text_[at_] == '{')
            skip_braces();
          else
            ++at_;
        } else
          variable(head);
      }
    }
    for (auto& [name, kernel] : module_.kernels) module_.names += name + "\n";
  }

 private:
  // -- text

  void skip() {
    for (;;) {
      while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (text_.compare(at_, 2, "//") == 0)
        at_ = std::min(text_.find('\n', at_), text_.size());
      else if (text_.compare(at_, 2, "/*") == 0)
        at_ = std::min(text_.find("*/", at_), text_.size() - 2) + 2;
      else
        return;
    }
  }
  string peek() {
    skip();
    size_t end = at_;
    while (end < text_.size() && named(text_[end])) ++end;
    return text_.substr(at_, std::max(end - at_, size_t(at_ < text_.size())));
  }
  string line() {
    const size_t end = std::min(text_.find('\n', at_), text_.size());
    string found = text_.substr(at_, end - at_);
    at_ = end;
    return found;
  }
  // Without comments, up to one of these characters, where `at_` stays.
  string until(const char* ends) {
    string found;
    for (skip(); at_ < text_.size() && std::strchr(ends, text_[at_]) == nullptr; ++at_) {
      if (text_.compare(at_, 2, "//") == 0) skip(), found += ' ';
      if (text_[at_] == '"')
        while (text_[++at_] != '"') {
        }
      if (std::strchr(ends, text_[at_])) break;
      found += text_[at_];
    }
    return stripped(found);
  }
  void skip_braces() {
    at_ = std::min(text_.find('{', at_), text_.size());
    for (int depth = 0; at_ < text_.size(); ++at_) {
      depth += (text_[at_] == '{') - (text_[at_] == '}');
      if (depth == 0) return void(++at_);
    }
  }
  void file(const string& line) {
    const auto quoted = split(line, "\"");
    if (quoted.size() < 2) return;
    files_[std::atoi(split(line, " \t")[1].c_str())] = quoted[1].substr(quoted[1].rfind('/') + 1);
  }

  // -- declarations

  static size_t aligned(size_t offset, size_t to) { return (offset + to - 1) / to * to; }
  static size_t after(const std::vector<string>& words, const char* what, size_t otherwise) {
    for (size_t k = 0; k + 1 < words.size(); ++k)
      if (words[k] == what) return size_t(std::stoul(words[k + 1]));
    return otherwise;
  }
  // ".align 8 .b8 name[12]": its name, its bytes, its alignment
  struct Declared {
    string name;
    size_t bytes = 0, align = 1;
  };
  static Declared declared(const string& text_of) {
    Declared found;
    size_t element = 0;
    const auto words = split(text_of.substr(0, text_of.find('=')), " \t\r\n");
    for (const string& word : words)
      if (word[0] == '.' && kTypes.count(word.substr(1)))
        element = size_t(bytes_of(kTypes.at(word.substr(1))));
    const auto parts = split(words.back(), "[]");
    found.name = parts[0];
    const bool array = words.back().find('[') != string::npos;
    found.bytes = array ? parts.size() > 1 ? element * size_t(std::stoul(parts[1])) : 0 : element;
    found.align = array ? after(words, ".align", element) : element;
    return found;
  }
  void variable(const string& head) {
    const Declared found = declared(head);
    string values;
    if (text_[at_] == '{') ++at_, values = until("}"), ++at_, until(";");
    ++at_;
    if (head.find(".shared") != string::npos) {
      if (found.bytes == 0)
        dynamic_.insert(found.name);
      else
        shared(found, module_shared_, module_shared_bytes_);
    } else {
      std::vector<uint8_t> bytes(found.bytes);
      const auto each = split(values, ", \n\t");
      const size_t size = each.empty() ? 1 : found.bytes / each.size();
      for (size_t k = 0; k < each.size(); ++k) {
        const Word value = immediate(each[k]);
        std::memcpy(&bytes[k * size], &value, std::min(size, sizeof value));
      }
      module_.variables.emplace_back(found.name, std::move(bytes));
      variables_[found.name] = Word(module_.variables.back().second.data());
    }
  }
  static void shared(const Declared& found, std::map<string, Word>& names, size_t& bytes) {
    bytes = aligned(bytes, found.align);
    names[found.name] = kSharedBase + bytes;
    bytes += found.bytes;
  }

  void kernel(const string& head) {
    const size_t open = head.find('('), close = head.rfind(')');
    const string name = stripped(split(head.substr(head.find(".entry") + 6), " \t\r\n(")[0]);
    kernel_ = Kernel();
    kernel_.name = name;
    symbols_ = module_shared_;
    kernel_.shared_bytes = module_shared_bytes_;
    if (open != string::npos)
      for (const string& one : split(head.substr(open + 1, close - open - 1), ",")) {
        if (stripped(one).empty()) continue;
        const Declared found = declared(stripped(one));
        kernel_.parameter_bytes = aligned(kernel_.parameter_bytes, found.align);
        symbols_[found.name] = kernel_.parameter_bytes;
        kernel_.parameters.push_back({kernel_.parameter_bytes, found.bytes});
        kernel_.parameter_bytes += found.bytes;
      }
    const auto words = split(open == string::npos ? head : head.substr(close + 1), " ,\t\r\n");
    for (size_t k = 0; k < words.size(); ++k)
      if (words[k] == ".reqntid" || words[k] == ".maxntid") {
        std::vector<int> sizes;
        while (k + 1 < words.size() && std::isdigit(static_cast<unsigned char>(words[k + 1][0])))
          sizes.push_back(std::stoi(words[++k]));
        kernel_.most_threads = 1;
        for (int size : sizes) kernel_.most_threads *= unsigned(size);
        if (words[k - sizes.size()] == ".reqntid") sizes.resize(3, 1), kernel_.required = sizes;
      }
    body();
    module_.kernels[name] = std::move(kernel_);
  }

  // -- instructions

  void body() {
    scopes_.assign(1, {});
    ranges_.clear(), labels_.clear(), jumps_.clear(), constants_.clear(), specials_.clear();
    source_.clear();
    ++at_;
    for (int depth = 1; depth > 0;) {
      const string word = peek();
      if (word.empty()) throw Fault("the text ends within " + kernel_.name);
      if (word == "{" || word == "}") {
        ++at_;
        depth += word == "{" ? 1 : -1;
        if (word == "{")
          scopes_.emplace_back();
        else
          scopes_.pop_back();
      } else if (word == ".loc") {
        const auto parts = split(line(), " \t,");
        source_ = text(files_[std::stoi(parts[1])], ":", parts[2]);
      } else if (word == ".reg") {
        const auto parts = split(until(";").substr(4), " ,\t\r\n");
        for (size_t k = 1; k < parts.size(); ++k) {
          if (parts[k].back() == '>')
            ranges_.insert(parts[k].substr(0, parts[k].find('<')));
          else
            scopes_.back()[parts[k]] = kernel_.rows++;
        }
        ++at_;
      } else if (word == ".shared" || word == ".local") {
        const Declared found = declared(until(";"));
        ++at_;
        if (word == ".shared") {
          shared(found, symbols_, kernel_.shared_bytes);
        } else {
          symbols_[found.name] = aligned(kernel_.local_bytes, found.align);
          kernel_.local_bytes = symbols_[found.name] + found.bytes;
        }
      } else if (word == ".pragma") {
        until(";"), ++at_;
      } else if (word[0] != '@' && text_.compare(at_ + word.size(), 1, ":") == 0 &&
                 text_.compare(at_ + word.size(), 2, "::") != 0) {
        labels_[word] = int(kernel_.code.size());
        at_ += word.size() + 1;
      } else {
        instruction(until(";"));
        ++at_;
      }
    }
    instruction("ret");
    for (auto& [from, label] : jumps_) {
      if (!labels_.count(label)) throw Fault("no label " + label + " in " + kernel_.name);
      kernel_.code[size_t(from)].target = labels_[label];
    }
    for (auto& [value, row] : constants_) kernel_.constants.push_back({row, value});
    for (auto& [name, row] : specials_) kernel_.specials.push_back({row, name});
    kernel_.shared_bytes = aligned(kernel_.shared_bytes, 16);
  }

  [[noreturn]] void unknown(const string& why, const string& line) {
    throw Fault("unknown: " + why + ": " + line + (source_.empty() ? "" : "  // " + source_) + "\n    in " +
                kernel_.name);
  }

  static Word immediate(const string& s) {
    if (s.size() > 2 && s[0] == '0' && std::strchr("fFdD", s[1]))
      return std::stoull(s.substr(2), nullptr, 16);
    return s[0] == '-' ? Word(std::stoll(s, nullptr, 0)) : Word(std::stoull(s, nullptr, 0));
  }
  int constant(Word value) {
    auto [found, fresh] = constants_.emplace(value, kernel_.rows);
    kernel_.rows += fresh;
    return found->second;
  }
  int row(const string& name, const string& line) {
    static const std::set<string> specials = {"%tid",    "%ntid",   "%ctaid",   "%nctaid",
                                              "%laneid", "%warpid", "%envreg1", "%envreg2"};
    for (size_t k = scopes_.size(); k-- > 0;)
      if (auto found = scopes_[k].find(name); found != scopes_[k].end()) return found->second;
    if (specials.count(name.substr(0, name.find('.')))) {
      auto [found, fresh] = specials_.emplace(name, kernel_.rows);
      kernel_.rows += fresh;
      return found->second;
    }
    if (ranges_.count(name.substr(0, name.find_last_not_of("0123456789") + 1)))
      return scopes_[0][name] = kernel_.rows++;
    if (dynamic_.count(name)) return constant(kSharedBase + aligned(kernel_.shared_bytes, 16));
    if (symbols_.count(name)) return constant(symbols_[name]);
    if (variables_.count(name)) return constant(variables_[name]);
    if (std::isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') return constant(immediate(name));
    unknown("operand " + name, line);
  }
  void operands(const string& list, bool result, Instruction& i) {
    string rest = list;
    bool first = true;
    while (!rest.empty()) {
      const char open = rest[0];
      const size_t close = open == '{' ? rest.find('}') : open == '[' ? rest.find(']') : 0;
      const size_t end = std::min(rest.find(',', close), rest.size());
      string one = stripped(rest.substr(0, end));
      rest = end < rest.size() ? stripped(rest.substr(end + 1)) : "";
      const bool into = result && std::exchange(first, false);
      if (open == '[') {
        one = stripped(one.substr(1, one.size() - 2));
        const size_t plus = one.find('+');
        i.from.push_back({row(stripped(one.substr(0, plus)), i.line), 0});
        if (plus != string::npos) i.from.back().plus = int64_t(immediate(stripped(one.substr(plus + 1))));
        continue;
      }
      for (string name : split(one, "{}|, \t\r\n")) {
        if (name[0] == '!') i.negated = true, name = name.substr(1);
        if (into)
          i.to.push_back(name == "_" ? -1 : row(name, i.line));
        else
          i.from.push_back({row(name, i.line), 0});
      }
    }
  }

  void instruction(const string& line) {
    Instruction i;
    i.line = line, i.source = source_, i.place = int(kernel_.code.size());
    for (char& c : i.line)
      if (std::isspace(static_cast<unsigned char>(c))) c = ' ';
    string rest = i.line;
    if (rest[0] == '@') {
      const size_t end = rest.find(' ');
      i.unless = rest[1] == '!';
      i.guard = row(rest.substr(1 + i.unless, end - 1 - i.unless), line);
      rest = stripped(rest.substr(end));
    }
    const size_t end = std::min(rest.find(' '), rest.size());
    Mnemonic m;
    const auto words = split(rest.substr(0, end), ".");
    m.name = words[0];
    const auto opcode = kOpcodes.find(m.name);
    if (opcode == kOpcodes.end()) unknown("opcode", line);
    const Opcode& of = opcode->second;
    const auto known = split(of.modifiers, " ");
    for (size_t k = 1; k < words.size(); ++k) {
      const string& word = words[k];
      if (std::find(known.begin(), known.end(), word) != known.end())
        m.modifiers.insert(word);
      else if (auto type = kTypes.find(word); type != kTypes.end())
        m.other = std::exchange(m.type, type->second);
      else
        unknown("modifier ." + word, line);
    }
    i.flow = of.flow, i.mask = of.mask;
    const string list = stripped(rest.substr(end));
    if (i.flow == Flow::branch)
      jumps_.push_back({i.place, list});
    else
      operands(list, of.results > 0, i);
    if (m.has("L2::cache_hint") && !i.from.empty()) i.from.pop_back();
    i.space = m.has("global") || m.has("const")         ? Space::global
              : m.has("shared") || m.has("shared::cta") ? Space::shared
              : m.has("local")                          ? Space::local
              : m.has("param")                          ? Space::param
                                                        : Space::generic;
    i.acquires = m.has("acquire") || m.has("acq_rel"), i.releases = m.has("release") || m.has("acq_rel");
    i.strong = i.acquires || i.releases || m.has("relaxed") || m.has("volatile");
    i.type = m.type;
    if (m.has("ftz")) {
      if (m.type == Type::f32) m.type = Type::f32z;
      if (m.other == Type::f32) m.other = Type::f32z;
    }
    i.run = of.make(m, i);
    if (i.run == nullptr || (i.mask >= 0 && size_t(i.mask) >= i.from.size())) unknown("form", line);
    if (i.to.size() > 0 && i.to[0] < 0 && m.name != "mov" && m.name != "ld" && m.name != "setp" &&
        m.name != "atom")
      unknown("result", line);
    note_memory(m, i);
    kernel_.code.push_back(std::move(i));
  }
  void note_memory(const Mnemonic& m, const Instruction& i) {
    const bool matrix = m.name == "ldmatrix" || m.name == "stmatrix",
               copies = m.name == "cp" && i.from.size() > 1;
    if (m.name == "ld" || m.name == "st" || m.name == "atom" || m.name == "red" || matrix || copies) {
      const size_t bytes = copies ? 4 : size_t(bytes_of(i.type));
      if (i.space != Space::shared || copies) kernel_.granule[0] = std::min(kernel_.granule[0], bytes);
      if (i.space == Space::shared || i.space == Space::generic || copies)
        kernel_.granule[1] = std::min(kernel_.granule[1], bytes);
      if (i.strong && i.space != Space::shared) kernel_.synchronises = true;
    }
  }

  const string& text_;
  Module& module_;
  size_t at_ = 0;
  std::map<int, string> files_;
  std::map<string, Word> variables_, symbols_, module_shared_;
  size_t module_shared_bytes_ = 0;
  std::set<string> dynamic_;
  Kernel kernel_;
  string source_;
  std::vector<std::unordered_map<string, int>> scopes_;
  std::set<string> ranges_;
  std::map<string, int> labels_, specials_;
  std::vector<std::pair<int, string>> jumps_;
  std::map<Word, int> constants_;
};

// ---- a launch -----------------------------------------------------------------------------------------------

void Launch::run() {
  std::vector<size_t> order(blocks);
  for (size_t k = 0; k < blocks; ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), random);
  // Of a kernel that only orders memory nobody has promised how many blocks are there at once.
  const size_t some[] = {1, 2, 5, blocks};
  const size_t at_once = cooperative ? blocks : synchronises ? some[random() % 4] : 1;
  std::vector<std::unique_ptr<Block>> there, spare;
  for (size_t next = 0; next < blocks || !there.empty();) {
    while (next < blocks && there.size() < at_once) {
      if (spare.empty()) spare.push_back(std::make_unique<Block>(*this));
      there.push_back(std::move(spare.back()));
      spare.pop_back();
      there.back()->begin(order[next++]);
    }
    const size_t chosen = size_t(random() % there.size());
    if (there[chosen]->run(there.size() > 1 ? int64_t(1 + random() % 400) : kLongest * 2)) {
      spare.push_back(std::move(there[chosen]));
      there.erase(there.begin() + long(chosen));
    }
  }
}

int failed(const string& what, char* error, size_t bytes) {
  if (error != nullptr && bytes > 0) std::snprintf(error, bytes, "%s", what.c_str());
  return 1;
}

}  // namespace

// ---- the interface ------------------------------------------------------------------------------------------

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Memory that kernels may touch. A name is for messages.
EXPORTED void ptx_register(const void* first, size_t bytes, const char* name) {
  if (bytes == 0) return;
  Allocation& known = registered()[Word(first)];
  if (known.last - known.first < bytes) known = {Word(first), Word(first) + bytes, name};
}
EXPORTED void ptx_unregister(const void* first) { registered().erase(Word(first)); }
EXPORTED void ptx_unregister_all() { registered().clear(); }
// How many launches there were.
EXPORTED int ptx_launches() { return launches(); }
// Of the order of blocks, and of their turns.
EXPORTED void ptx_seed(uint64_t value) { seed() = value; }

// A module, or null with the reason in `error`.
EXPORTED void* ptx_load(const char* ptx, char* error, size_t bytes) {
  try {
    auto module = std::make_unique<Module>();
    const string copied = ptx;
    Parser(copied, *module).parse();
    return module.release();
  } catch (const std::exception& fault) {
    failed(fault.what(), error, bytes);
    return nullptr;
  }
}
EXPORTED void ptx_free(void* module) { delete static_cast<Module*>(module); }
// The names of a module's kernels, one a line.
EXPORTED const char* ptx_kernels(void* module) { return static_cast<Module*>(module)->names.c_str(); }
// How many parameters a kernel has, with the bytes of each; -1 if there is none of that name.
EXPORTED int ptx_parameters(void* module, const char* kernel, size_t* sizes, int most) {
  const auto& kernels = static_cast<Module*>(module)->kernels;
  const auto found = kernels.find(kernel);
  if (found == kernels.end()) return -1;
  const auto& parameters = found->second.parameters;
  for (int k = 0; k < std::min(most, int(parameters.size())); ++k) sizes[k] = parameters[size_t(k)].bytes;
  return int(parameters.size());
}
// Threads of a block at most, bytes of shared memory that are the kernel's own, and of local memory a thread.
EXPORTED int ptx_attributes(void* module, const char* kernel, int* threads, size_t* shared, size_t* local) {
  const auto& kernels = static_cast<Module*>(module)->kernels;
  const auto found = kernels.find(kernel);
  if (found == kernels.end()) return -1;
  *threads = int(found->second.most_threads), *shared = found->second.shared_bytes,
  *local = found->second.local_bytes;
  return 0;
}

// Runs a kernel to its end. `parameters` are pointers to the arguments' values, as those of cuLaunchKernel. 0, or 1 with
// what is wrong in `error`.
EXPORTED int ptx_launch(void* module, const char* kernel, const unsigned grid[3], const unsigned block[3],
                        unsigned shared_bytes, void** parameters, int cooperative, char* error,
                        size_t bytes) {
  ++launches();
  try {
    auto& of = *static_cast<Module*>(module);
    const auto found = of.kernels.find(kernel);
    if (found == of.kernels.end()) throw Fault(text("no kernel ", kernel));
    Launch launch(found->second, of, grid, block, shared_bytes, parameters, cooperative != 0);
    string problems;
    try {
      launch.run();
    } catch (const Fault& fault) {
      launch.problems.push_back(fault.what());
    }
    for (const string& problem : launch.problems) problems += problem + "\n";
    return problems.empty() ? 0 : failed(problems, error, bytes);
  } catch (const std::exception& fault) {
    return failed(fault.what(), error, bytes);
  }
}
