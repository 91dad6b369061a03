// All-reduce and all-gather among the ranks of one host, through a memory segment that they share.
//
// The segment has, for each rank, a counter of the pieces that it has published and one of the
// shares that it has summed, and two slots; each slot has an area for every rank's piece and one
// for their sum. Tensors go through it piece by piece, and every rank counts the pieces alike.
// A slot is used again two pieces later: whoever has seen all ranks publish the piece in between
// knows that they have read the one before it, so nothing else has to be waited for.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "sums.h"

namespace spd::shared_memory {
namespace {

constexpr int64_t kSlots = 2;
constexpr int64_t kShared = 64 * 1024;  // bytes from which on ranks sum a share each
constexpr int kSpins = 2000;

struct alignas(kLine) Counter {
  std::atomic<uint64_t> value;
};

class Segment {
 public:
  Segment(int fd, int rank, int size, int64_t piece, double timeout)
      : rank(rank), size(size), piece(piece), timeout_(timeout), bytes_(needed(size, piece)) {
    base_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    TORCH_CHECK(base_ != MAP_FAILED, "the shared segment cannot be mapped");
  }

  ~Segment() {
    munmap(base_, bytes_);
  }

  static int64_t needed(int size, int64_t piece) {
    return size * (2 * kLine + kSlots * kLine) + kSlots * (size + 1) * piece;
  }

  // Makes a piece of this rank known, and waits for those of all others.
  void publish(const Label& label, const void* data, int64_t bytes) {
    ++step_;
    *this->label(rank) = label;
    std::memcpy(area(rank), data, bytes);
    published(rank).store(step_, std::memory_order_release);
    for (int other = 0; other < size; ++other) {
      await(published(other), other);
      check_equal(rank, label, other, *this->label(other), "shared memory");
    }
  }

  // Waits until every rank has summed its share.
  void await_sums() {
    summed(rank).store(step_, std::memory_order_release);
    for (int other = 0; other < size; ++other) {
      await(summed(other), other);
    }
  }

  // Has a wait of this rank raise, now and from now on; other threads may ask for it.
  void interrupt() {
    interrupted_.store(true, std::memory_order_relaxed);
  }

  // How many pieces this rank has published; other threads may ask.
  uint64_t steps() const {
    return published(rank).load(std::memory_order_relaxed);
  }

  // Where a rank's piece is; the sum comes after the last one's.
  char* area(int of) const {
    const int64_t slot = static_cast<int64_t>(step_ % kSlots);
    return base_ + size * (2 + kSlots) * kLine + (slot * (size + 1) + of) * piece;
  }

  const int rank, size;
  const int64_t piece;
  std::mutex mutex;

 private:
  std::atomic<uint64_t>& published(int of) const {
    return reinterpret_cast<Counter*>(base_)[of].value;
  }

  std::atomic<uint64_t>& summed(int of) const {
    return reinterpret_cast<Counter*>(base_)[size + of].value;
  }

  Label* label(int of) const {
    const int64_t slot = static_cast<int64_t>(step_ % kSlots);
    return reinterpret_cast<Label*>(base_ + 2 * size * kLine) + slot * size + of;
  }

  void await(const std::atomic<uint64_t>& counter, int other) const {
    std::chrono::steady_clock::time_point began;
    for (int64_t turn = 0; counter.load(std::memory_order_acquire) < step_; ++turn) {
      if (turn < kSpins) {
        pause();
        continue;
      }
      TORCH_CHECK(
          !interrupted_.load(std::memory_order_relaxed), "rank ", rank,
          " lost its connection to rank ", other, " through shared memory");
      // The other rank may need this core.
      sched_yield();
      if (turn == kSpins) {
        began = std::chrono::steady_clock::now();
      } else if (turn % 256 == 0) {
        const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - began;
        TORCH_CHECK(
            waited.count() < timeout_, "rank ", rank, " waited ", timeout_,
            " s for rank ", other, " in shared memory (timed out)");
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const double timeout_;
  const int64_t bytes_;
  char* base_;
  uint64_t step_ = 0;
  std::atomic<bool> interrupted_ = false;
};

std::mutex segments_mutex;
std::unordered_map<std::string, std::shared_ptr<Segment>> segments;

std::shared_ptr<Segment> segment_of(const std::string& group) {
  std::lock_guard<std::mutex> lock(segments_mutex);
  const auto found = segments.find(group);
  TORCH_CHECK(found != segments.end(), "no shared segment for the group ", group);
  return found->second;
}

// Where the piece of every rank is.
template <typename T>
std::vector<const T*> parts_of(const Segment& segment, const T* own) {
  std::vector<const T*> parts(segment.size);
  for (int rank = 0; rank < segment.size; ++rank) {
    parts[rank] = rank == segment.rank ? own : reinterpret_cast<const T*>(segment.area(rank));
  }
  return parts;
}

template <typename T>
void reduce(Segment& segment, const T* in, T* out, int64_t elements, int64_t dtype) {
  const int64_t each = segment.piece / static_cast<int64_t>(sizeof(T));
  for (int64_t begin = 0; begin < elements; begin += each) {
    const int64_t count = std::min(each, elements - begin);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    segment.publish({0, dtype, elements, begin}, in + begin, bytes);
    const auto parts = parts_of<T>(segment, in + begin);
    if (segment.size == 2 || bytes < kShared) {
      sum(parts, out + begin, 0, count);
      continue;
    }
    // Each rank sums a share: less to read, the more ranks there are.
    const int64_t share = (count + segment.size - 1) / segment.size;
    const int64_t first = std::min(count, share * segment.rank);
    T* const whole = reinterpret_cast<T*>(segment.area(segment.size));
    sum(parts, whole, first, std::min(count, first + share));
    segment.await_sums();
    std::memcpy(out + begin, whole, bytes);
  }
}

at::Tensor all_reduce(const at::Tensor& partial, const std::string group) {
  const auto segment = segment_of(group);
  const at::Tensor in = partial.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options());
  std::lock_guard<std::mutex> lock(segment->mutex);
  with_numbers_of(in, out, [&](const auto* from, auto* to) {
    reduce(*segment, from, to, in.numel(), static_cast<int64_t>(in.scalar_type()));
  });
  return out;
}

// [n, ...] -> [ranks * n, ...], one rank's after the other.
at::Tensor all_gather(const at::Tensor& shard, const std::string group, int64_t ranks) {
  const auto segment = segment_of(group);
  TORCH_CHECK(ranks == segment->size, group, " has ", segment->size, " ranks");
  const at::Tensor in = shard.contiguous();
  auto sizes = in.sizes().vec();
  TORCH_CHECK(!sizes.empty(), "a single number has no dimension to gather along");
  sizes[0] *= segment->size;
  at::Tensor out = at::empty(sizes, in.options());
  std::lock_guard<std::mutex> lock(segment->mutex);
  const auto dtype = static_cast<int64_t>(in.scalar_type());
  const auto bytes = static_cast<int64_t>(in.nbytes());
  const char* const source = static_cast<const char*>(in.const_data_ptr());
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t begin = 0; begin < bytes; begin += segment->piece) {
    const int64_t count = std::min(segment->piece, bytes - begin);
    segment->publish({1, dtype, bytes, begin}, source + begin, count);
    for (int rank = 0; rank < segment->size; ++rank) {
      const char* const piece = rank == segment->rank ? source + begin : segment->area(rank);
      std::memcpy(target + rank * bytes + begin, piece, count);
    }
  }
  return out;
}

void open_segment(
    const std::string group, int64_t fd, int64_t rank, int64_t size, int64_t piece,
    double timeout) {
  auto made = std::make_shared<Segment>(fd, rank, size, piece, timeout);
  std::lock_guard<std::mutex> lock(segments_mutex);
  TORCH_CHECK(segments.emplace(group, made).second, group, " has a segment already");
}

void close_segment(const std::string group) {
  std::lock_guard<std::mutex> lock(segments_mutex);
  segments.erase(group);
}

void interrupt(const std::string group) {
  segment_of(group)->interrupt();
}

int64_t steps(const std::string group) {
  return static_cast<int64_t>(segment_of(group)->steps());
}

int64_t segment_bytes(int64_t size, int64_t piece) {
  return Segment::needed(size, piece);
}

}  // namespace

TORCH_LIBRARY(spd_shared_memory, library) {
  library.def("all_reduce(Tensor partial, str group) -> Tensor");
  library.def("all_gather(Tensor shard, str group, int ranks) -> Tensor");
  library.def(
      "open_segment(str group, int fd, int rank, int size, int piece, float timeout) -> ()",
      &open_segment);
  library.def("close_segment(str group) -> ()", &close_segment);
  library.def("interrupt(str group) -> ()", &interrupt);
  library.def("steps(str group) -> int", &steps);
  library.def("segment_bytes(int size, int piece) -> int", &segment_bytes);
}

TORCH_LIBRARY_IMPL(spd_shared_memory, CPU, library) {
  library.impl("all_reduce", &all_reduce);
  library.impl("all_gather", &all_gather);
}

}  // namespace spd::shared_memory
