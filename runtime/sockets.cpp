// All-reduce and all-gather among ranks of several hosts, over a connection between any two.
//
// The thread that needs the result sends and receives by itself: nothing is handed to another
// thread, which the scheduler would have to wake. Two ranks, and more of them for few bytes, send each
// other all they have and sum it; of more bytes each rank sums a share for all. In one exchange a rank
// sends to all others and receives from them at the same time.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "sums.h"

namespace spd::sockets {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kSmall = 16 * 1024;  // bytes up to which a delay costs more than sending them
constexpr int64_t kPiece = 8 * 1024 * 1024;  // bytes of a sum at a time, so that room is bounded
constexpr std::chrono::microseconds kSpin(100);
#ifdef MSG_NOSIGNAL
constexpr int kFlags = MSG_DONTWAIT | MSG_NOSIGNAL;
#else
constexpr int kFlags = MSG_DONTWAIT;  // Python ignores the signal
#endif
constexpr int kWaitMs = 50;  // between two looks at whether to go on waiting

// Bytes that go to a rank, and those that come from it.
struct Pair {
  const void* to;
  int64_t to_bytes;
  void* from;
  int64_t from_bytes;
};

class Mesh {
 public:
  // connections[rank] is not used; the others are this object's from now on.
  Mesh(std::vector<int64_t> connections, int rank, double timeout)
      : rank(rank), size(static_cast<int>(connections.size())), peers_(connections.size()),
        timeout_(timeout) {
    for (int other = 0; other < size; ++other) {
      peers_[other].connection = other == rank ? -1 : static_cast<int>(connections[other]);
    }
  }

  ~Mesh() {
    for (const Peer& peer : peers_) {
      if (peer.connection >= 0) {
        close(peer.connection);
      }
    }
  }

  // Exchanges pairs[other] with every other rank; once it has raised it does so again.
  void exchange(const Label& label, const std::vector<Pair>& pairs) {
    TORCH_CHECK(!broken_, "rank ", rank, " lost a connection to another rank before");
    ++steps_;
    try {
      try_exchange(label, pairs);
    } catch (...) {
      broken_ = true;  // what would come next is the rest of this
      for (const Peer& peer : peers_) {
        shutdown(peer.connection, SHUT_WR);  // behind what was sent, so that others learn it
      }
      throw;
    }
  }

  // Has a wait of this rank raise, now and from now on; other threads may ask for it.
  void interrupt() {
    interrupted_.store(true, std::memory_order_relaxed);
  }

  // How many exchanges this rank has begun; other threads may ask.
  uint64_t steps() const {
    return steps_.load(std::memory_order_relaxed);
  }

  // Memory for what comes from each other rank, good until it is asked for again.
  std::vector<char*> rooms(int64_t bytes) {
    if (room_bytes_ < (size - 1) * bytes) {
      room_bytes_ = (size - 1) * bytes;
      room_ = std::make_unique_for_overwrite<char[]>(room_bytes_);
    }
    std::vector<char*> rooms(size, nullptr);
    for (int other = 0; other < size; ++other) {
      rooms[other] = room_.get() + (other - (other > rank)) * bytes;
    }
    return rooms;
  }

  const int rank, size;
  std::mutex mutex;

 private:
  // `sent` and `received` count the label too, which goes before the bytes.
  struct Peer {
    int connection = -1;
    int64_t sent = 0, received = 0;
    Label label;
  };

  static constexpr int64_t kLabel = 4 * sizeof(int64_t);  // without what fills a cache line

  void try_exchange(const Label& label, const std::vector<Pair>& pairs) {
    for (Peer& peer : peers_) {
      peer.sent = peer.received = 0;
    }
    for (auto moved_at = Clock::now();;) {
      bool moved = false, done = true;
      for (int other = 0; other < size; ++other) {  // all know what this is before any raises
        moved |= other != rank && send(other, label, pairs[other]);
      }
      for (int other = 0; other < size; ++other) {
        moved |= other != rank && receive(other, label, pairs[other]);
        done &= other == rank || is_done(other, pairs[other]);
      }
      if (done) {
        break;
      }
      if (moved) {
        moved_at = Clock::now();
      } else if (Clock::now() - moved_at > kSpin) {
        wait(pairs, moved_at);
      }
    }
  }

  bool is_done(int other, const Pair& pair) const {
    return peers_[other].sent == kLabel + pair.to_bytes &&
        peers_[other].received == kLabel + pair.from_bytes;
  }

  // What is left of a label and the bytes behind it; returns how many entries of `left` are used.
  static int left_of(void* label, void* data, int64_t bytes, int64_t done, iovec left[2]) {
    int used = 0;
    if (done < kLabel) {
      left[used++] = {static_cast<char*>(label) + done, static_cast<size_t>(kLabel - done)};
    }
    const int64_t past = std::max<int64_t>(done - kLabel, 0);
    if (past < bytes) {
      left[used++] = {static_cast<char*>(data) + past, static_cast<size_t>(bytes - past)};
    }
    return used;
  }

  bool send(int other, const Label& label, const Pair& pair) {
    Peer& peer = peers_[other];
    if (peer.sent == kLabel + pair.to_bytes) {
      return false;
    }
    iovec left[2];
    msghdr message{};
    message.msg_iov = left;
    message.msg_iovlen = left_of(
        const_cast<Label*>(&label), const_cast<void*>(pair.to), pair.to_bytes, peer.sent, left);
    const ssize_t sent = sendmsg(peer.connection, &message, kFlags);
    return count(sent, peer.sent, other);
  }

  bool receive(int other, const Label& label, const Pair& pair) {
    Peer& peer = peers_[other];
    if (peer.received == kLabel + pair.from_bytes) {
      return false;
    }
    iovec left[2];
    msghdr message{};
    message.msg_iov = left;
    message.msg_iovlen = left_of(&peer.label, pair.from, pair.from_bytes, peer.received, left);
    const int64_t before = peer.received;
    const ssize_t received = recvmsg(peer.connection, &message, MSG_DONTWAIT);
    TORCH_CHECK(received != 0, "rank ", rank, " lost its connection to rank ", other, ": closed");
    const bool moved = count(received, peer.received, other);
    if (before < kLabel && peer.received >= kLabel) {
      check_equal(rank, label, other, peer.label, "sockets");
    }
    return moved;
  }

  bool count(ssize_t bytes, int64_t& total, int other) const {
    if (bytes < 0) {
      TORCH_CHECK(
          errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR, "rank ", rank,
          " lost its connection to rank ", other, ": ", std::strerror(errno));
      return false;
    }
    total += bytes;
    return bytes > 0;
  }

  // Sleeps until something can be sent or received.
  void wait(const std::vector<Pair>& pairs, Clock::time_point since) const {
    TORCH_CHECK(
        !interrupted_.load(std::memory_order_relaxed), "rank ", rank,
        " lost its connection to another rank: interrupted");
    std::vector<pollfd> asked;
    std::string late;
    for (int other = 0; other < size; ++other) {
      if (other != rank && !is_done(other, pairs[other])) {
        const bool sends = peers_[other].sent < kLabel + pairs[other].to_bytes;
        const bool receives = peers_[other].received < kLabel + pairs[other].from_bytes;
        const int events = (sends ? POLLOUT : 0) | (receives ? POLLIN : 0);
        asked.push_back({peers_[other].connection, static_cast<short>(events), 0});
        late += (late.empty() ? "" : ", ") + std::to_string(other);
      }
    }
    if (poll(asked.data(), asked.size(), kWaitMs) > 0) {
      return;
    }
    const std::chrono::duration<double> waited = Clock::now() - since;
    TORCH_CHECK(
        waited.count() < timeout_, "rank ", rank, " waited ", timeout_, " s for rank ", late,
        " at a socket (timed out)");
  }

  std::vector<Peer> peers_;
  std::unique_ptr<char[]> room_;
  int64_t room_bytes_ = 0;
  const double timeout_;
  std::atomic<uint64_t> steps_ = 0;
  std::atomic<bool> interrupted_ = false;
  bool broken_ = false;
};

std::mutex meshes_mutex;
std::unordered_map<std::string, std::shared_ptr<Mesh>> meshes;

std::shared_ptr<Mesh> mesh_of(const std::string& group) {
  std::lock_guard<std::mutex> lock(meshes_mutex);
  const auto found = meshes.find(group);
  TORCH_CHECK(found != meshes.end(), "no sockets for the group ", group);
  return found->second;
}

// Each rank sums everything.
template <typename T>
void reduce_small(Mesh& mesh, const Label& label, const T* in, T* out, int64_t elements) {
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
  const std::vector<char*> rooms = mesh.rooms(bytes);
  std::vector<Pair> pairs(mesh.size);
  std::vector<const T*> parts(mesh.size);
  for (int other = 0; other < mesh.size; ++other) {
    T* const from = reinterpret_cast<T*>(rooms[other]);
    pairs[other] = {in, bytes, from, bytes};
    parts[other] = other == mesh.rank ? in : from;
  }
  mesh.exchange(label, pairs);
  sum(parts, out, 0, elements);
}

// Each rank sums a share, and sends it to the others.
template <typename T>
void reduce_large(Mesh& mesh, const Label& label, const T* in, T* out, int64_t elements) {
  const auto bytes_of = [](int64_t count) { return count * static_cast<int64_t>(sizeof(T)); };
  const int64_t share = (elements + mesh.size - 1) / mesh.size;
  const auto first = [&](int rank) { return std::min(elements, share * rank); };
  const auto count = [&](int rank) { return first(rank + 1) - first(rank); };
  const int64_t begin = first(mesh.rank), own = count(mesh.rank);
  const std::vector<char*> rooms = mesh.rooms(bytes_of(own));
  std::vector<Pair> pairs(mesh.size);
  std::vector<const T*> parts(mesh.size);
  for (int other = 0; other < mesh.size; ++other) {
    T* const from = reinterpret_cast<T*>(rooms[other]);
    pairs[other] = {in + first(other), bytes_of(count(other)), from, bytes_of(own)};
    parts[other] = other == mesh.rank ? in + begin : from;
  }
  mesh.exchange(label, pairs);
  sum(parts, out + begin, 0, own);
  for (int other = 0; other < mesh.size; ++other) {
    pairs[other] = {
        out + begin, bytes_of(own), out + first(other), bytes_of(count(other))};
  }
  mesh.exchange(label, pairs);
}

template <typename T>
void reduce(Mesh& mesh, const T* in, T* out, int64_t elements, int64_t dtype) {
  const int64_t each = kPiece / static_cast<int64_t>(sizeof(T));
  for (int64_t begin = 0; begin < elements; begin += each) {
    const int64_t count = std::min(each, elements - begin);
    const Label label{0, dtype, elements, begin};
    if (mesh.size == 2 || count * static_cast<int64_t>(sizeof(T)) <= kSmall) {
      reduce_small(mesh, label, in + begin, out + begin, count);
    } else {
      reduce_large(mesh, label, in + begin, out + begin, count);
    }
  }
}

at::Tensor all_reduce(const at::Tensor& partial, const std::string group) {
  const auto mesh = mesh_of(group);
  const at::Tensor in = partial.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options());
  std::lock_guard<std::mutex> lock(mesh->mutex);
  with_numbers_of(in, out, [&](const auto* from, auto* to) {
    reduce(*mesh, from, to, in.numel(), static_cast<int64_t>(in.scalar_type()));
  });
  return out;
}

// [n, ...] -> [ranks * n, ...], one rank's after the other.
at::Tensor all_gather(const at::Tensor& shard, const std::string group, int64_t ranks) {
  const auto mesh = mesh_of(group);
  TORCH_CHECK(ranks == mesh->size, group, " has ", mesh->size, " ranks");
  const at::Tensor in = shard.contiguous();
  auto sizes = in.sizes().vec();
  TORCH_CHECK(!sizes.empty(), "a single number has no dimension to gather along");
  sizes[0] *= mesh->size;
  at::Tensor out = at::empty(sizes, in.options());
  std::lock_guard<std::mutex> lock(mesh->mutex);
  const auto bytes = static_cast<int64_t>(in.nbytes());
  const void* const source = in.const_data_ptr();
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  std::vector<Pair> pairs(mesh->size);
  for (int other = 0; other < mesh->size; ++other) {
    pairs[other] = {source, bytes, target + other * bytes, bytes};
  }
  mesh->exchange({1, static_cast<int64_t>(in.scalar_type()), bytes, 0}, pairs);
  if (bytes) {
    std::memcpy(target + mesh->rank * bytes, source, bytes);
  }
  return out;
}

void open_mesh(
    const std::string group, const std::vector<int64_t> connections, int64_t rank,
    double timeout) {
  auto made = std::make_shared<Mesh>(connections, static_cast<int>(rank), timeout);
  std::lock_guard<std::mutex> lock(meshes_mutex);
  TORCH_CHECK(meshes.emplace(group, made).second, group, " has sockets already");
}

void close_mesh(const std::string group) {
  std::lock_guard<std::mutex> lock(meshes_mutex);
  meshes.erase(group);
}

void interrupt(const std::string group) {
  mesh_of(group)->interrupt();
}

int64_t steps(const std::string group) {
  return static_cast<int64_t>(mesh_of(group)->steps());
}

}  // namespace

TORCH_LIBRARY(spd_sockets, library) {
  library.def("all_reduce(Tensor partial, str group) -> Tensor");
  library.def("all_gather(Tensor shard, str group, int ranks) -> Tensor");
  library.def(
      "open_mesh(str group, int[] connections, int rank, float timeout) -> ()", &open_mesh);
  library.def("close_mesh(str group) -> ()", &close_mesh);
  library.def("interrupt(str group) -> ()", &interrupt);
  library.def("steps(str group) -> int", &steps);
}

TORCH_LIBRARY_IMPL(spd_sockets, CPU, library) {
  library.impl("all_reduce", &all_reduce);
  library.impl("all_gather", &all_gather);
}

}  // namespace spd::sockets
