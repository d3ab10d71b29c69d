// NCCL as far as the product calls it: ranks are threads of this process. What is queued on a stream runs when something waits for
// it, and waits there for the other ranks as NCCL's kernels do, for ever. Stricter than NCCL: see README.md.
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "driver.h"

namespace {

enum Result { Success, UnhandledCuda, System, Internal, InvalidArgument, InvalidUsage, Remote, InProgress };

constexpr int Bytes = 1;

struct Communicator;

/// What a rank brings to a collective.
struct Call {
    const char* name;
    size_t bytes;
    int root;
    const char* from;

    bool fits(const Call& other) const { return strcmp(name, other.name) == 0 && bytes == other.bytes && root == other.root; }
};

struct Meeting {
    std::map<int, Call> calls;
    int gone = 0;
};

struct Letter {
    const char* from;
    size_t bytes;
    bool taken = false;
    bool fits = true;
};

struct Parting {
    std::map<int, std::pair<int, int>> choices;
    std::map<int, std::shared_ptr<Communicator>> parts;
};

/// The ranks of a communicator.
struct Clique {
    int size = 0;
    std::mutex mutex;
    std::condition_variable changed;
    std::map<int, bool> joined;
    std::map<long, Meeting> meetings;
    std::map<long, Parting> partings;
    std::map<std::pair<int, int>, std::deque<std::shared_ptr<Letter>>> letters;
};

/// A rank's end of it. For a while after each call it is busy, as one that does not block.
struct Communicator {
    std::shared_ptr<Clique> clique;
    int rank = 0;
    long meetings = 0;
    long partings = 0;
    std::atomic<bool> there = false;
    std::atomic<bool> aborted = false;
    std::atomic<int> error = 0;
    std::atomic<int> busy = 0;
};

typedef std::shared_ptr<Communicator> Rank;

struct Id {
    char bytes[128];

    bool operator<(const Id& other) const { return memcmp(bytes, other.bytes, sizeof bytes) < 0; }
};

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cluster_size, least_blocks, most_blocks;
    const char* network_name;
    int split_shares;
};

struct Message {
    bool sends;
    char* memory;
    size_t bytes;
    int peer;
};

std::mutex mutex;
std::map<void*, Rank> ranks;
std::map<Id, std::shared_ptr<Clique>> invitations;
std::string last_error;

thread_local int groups;
thread_local std::vector<Message> group;
thread_local Rank group_rank;
thread_local driver::Stream* group_stream;

Result refuse(Result result, const std::string& why) {
    std::lock_guard lock(mutex);
    last_error = why;
    return result;
}

Rank find(void* handle) {
    std::lock_guard lock(mutex);
    auto found = ranks.find(handle);
    return found == ranks.end() ? nullptr : found->second;
}

void* add(const Rank& rank) {
    std::lock_guard lock(mutex);
    ranks[rank.get()] = rank;
    return rank.get();
}

void fail(const Rank& rank, const std::string& why) {
    refuse(InvalidUsage, why);
    rank->error = InvalidUsage;
}

/// Copies what was named when calls were made, if it is still there when it is touched.
void copy(const Rank& rank, void* to, const void* from, size_t bytes) {
    if (driver::copy((uint64_t)to, (uint64_t)from, bytes) != driver::Success) {
        fail(rank, "memory that was freed while rank " + std::to_string(rank->rank) + " used it");
    }
}

/// Waits until something is so, or the rank's communicator ends.
template<class Condition> bool wait(const Rank& rank, std::unique_lock<std::mutex>& lock, Condition condition) {
    rank->clique->changed.wait(lock, [&] { return rank->aborted || condition(); });
    return !rank->aborted;
}

/// All ranks show what they bring; each takes what it needs while the others stay.
void meet(const Rank& rank, const Call& call, const std::function<void(const std::map<int, Call>&)>& take) {
    Clique& clique = *rank->clique;
    std::unique_lock lock(clique.mutex);
    const long number = rank->meetings++;
    Meeting& meeting = clique.meetings[number];
    meeting.calls[rank->rank] = call;
    clique.changed.notify_all();
    if (!wait(rank, lock, [&] { return (int)meeting.calls.size() == clique.size; })) {
        return;
    }

    bool fits = true;
    for (const auto& other : meeting.calls) {
        if (!call.fits(other.second)) {
            fits = false;
            fail(rank, "rank " + std::to_string(rank->rank) + " calls " + call.name + " of " + std::to_string(call.bytes) + " bytes, rank " + std::to_string(other.first)
                + " " + other.second.name + " of " + std::to_string(other.second.bytes));
        }
    }

    if (fits) {
        take(meeting.calls);
    }

    meeting.gone++;
    clique.changed.notify_all();
    if (wait(rank, lock, [&] { return meeting.gone >= clique.size; }) && meeting.gone++ == 2 * clique.size - 1) {
        clique.meetings.erase(number);
    }
}

/// Sends all, receives all, and stays until what was sent is taken.
void exchange(const Rank& rank, const std::vector<Message>& messages) {
    Clique& clique = *rank->clique;
    std::unique_lock lock(clique.mutex);
    std::vector<std::shared_ptr<Letter>> sent;
    for (const Message& message : messages) {
        if (message.sends) {
            sent.push_back(std::make_shared<Letter>(Letter{message.memory, message.bytes}));
            clique.letters[{rank->rank, message.peer}].push_back(sent.back());
        }
    }

    clique.changed.notify_all();
    for (const Message& message : messages) {
        if (message.sends) {
            continue;
        }

        auto& box = clique.letters[{message.peer, rank->rank}];
        if (!wait(rank, lock, [&] { return !box.empty(); })) {
            return;
        }

        Letter& letter = *box.front();
        letter.fits = letter.bytes == message.bytes;
        if (letter.fits) {
            copy(rank, message.memory, letter.from, letter.bytes);
        } else {
            fail(rank, "rank " + std::to_string(rank->rank) + " receives " + std::to_string(message.bytes) + " bytes of " + std::to_string(letter.bytes));
        }

        letter.taken = true;
        box.pop_front();
        clique.changed.notify_all();
    }

    for (const auto& letter : sent) {
        if (!wait(rank, lock, [&] { return letter->taken; })) {
            return;
        }

        if (!letter->fits) {
            fail(rank, "rank " + std::to_string(rank->rank) + " sends " + std::to_string(letter->bytes) + " bytes to one that receives another number");
        }
    }
}

/// What every call on a communicator needs.
Result check(const Rank& rank, int type, const driver::Stream* stream) {
    return !rank ? refuse(InvalidArgument, "no such communicator")
        : rank->error != 0 ? (Result)rank->error.load()
        : !rank->there || rank->busy > 0 ? refuse(InvalidUsage, "a call before the one before has ended")
        : type != Bytes || !stream ? refuse(InvalidArgument, "bytes and a stream")
        : !driver::has_context() ? refuse(UnhandledCuda, "no context")
        : Success;
}

Result check(const void* memory, size_t bytes) {
    return driver::holds((uint64_t)memory, bytes) ? Success : refuse(InvalidArgument, "memory that is not of the device");
}

Result begun(const Rank& rank) {
    rank->busy = 2;
    return InProgress;
}

Result queue(const Rank& rank, driver::Stream* stream, std::function<void()> work) {
    driver::put_off(stream, [rank, work = std::move(work)] {
        if (!rank->aborted) {
            work();
        }

        return driver::Success;
    });
    return begun(rank);
}

Result message(bool sends, void* memory, size_t bytes, int type, int peer, void* communicator, driver::Stream* stream) {
    const Rank rank = find(communicator);
    if (const Result result = check(rank, type, stream)) {
        return result;
    }

    if (const Result result = check(memory, bytes)) {
        return result;
    }

    if (peer < 0 || peer >= rank->clique->size) {
        return refuse(InvalidArgument, "no such rank");
    }

    const Message one = {sends, (char*)memory, bytes, peer};
    if (groups == 0) {
        return queue(rank, stream, [=] { exchange(rank, {one}); });
    }

    if (group_rank && (group_rank != rank || group_stream != stream)) {
        return refuse(InvalidUsage, "a group of two communicators or streams");
    }

    group_rank = rank;
    group_stream = stream;
    group.push_back(one);
    return Success;
}

Result check(const Config* config) {
    return config && config->size == sizeof(Config) && config->magic == 0xcafebeef && config->version == 21700 && config->blocking == 0
        ? Success
        : refuse(InvalidArgument, "a configuration of 2.17 that does not block");
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
    const char* value = getenv("TINYLLAMA_NCCL_VERSION");
    *version = value ? atoi(value) : 22203;
    return Success;
}

int ncclGetUniqueId(Id* id) {
    static std::atomic<long> ids;
    if (int error = driver::planned_failure("ncclGetUniqueId")) {
        return error;
    }

    memset(id, 0x5a, sizeof *id);
    const long number = ++ids;
    memcpy(id, &number, sizeof number);
    std::lock_guard lock(mutex);
    invitations[*id] = std::make_shared<Clique>();
    return Success;
}

int ncclCommInitRankConfig(void** communicator, int size, Id id, int number, const Config* config) {
    if (const Result result = check(config)) {
        return result;
    }

    std::shared_ptr<Clique> clique;
    {
        std::lock_guard lock(mutex);
        auto found = invitations.find(id);
        if (found == invitations.end()) {
            return InvalidArgument;
        }

        clique = found->second;
    }

    auto rank = std::make_shared<Communicator>();
    std::lock_guard lock(clique->mutex);
    if (number < 0 || number >= size || (clique->size != 0 && clique->size != size) || clique->joined[number] || !driver::has_context()) {
        return refuse(InvalidArgument, "a rank that is there, of another number of ranks, or without a context");
    }

    clique->size = size;
    clique->joined[number] = true;
    rank->clique = clique;
    rank->rank = number;
    rank->there = true;
    *communicator = add(rank);
    return begun(rank);
}

int ncclCommSplit(void* communicator, int color, int key, void** part, const Config* config) {
    const Rank rank = find(communicator);
    if (const Result result = check(rank, Bytes, (driver::Stream*)1)) {
        return result;
    }

    if (const Result result = check(config)) {
        return result;
    }

    if (color < 0) {
        return refuse(InvalidArgument, "a colour below 0");
    }

    auto own = std::make_shared<Communicator>();
    own->clique = std::make_shared<Clique>();
    Clique& clique = *rank->clique;
    std::lock_guard lock(clique.mutex);
    const long number = rank->partings++;
    Parting& parting = clique.partings[number];
    parting.choices[rank->rank] = {color, key};
    parting.parts[rank->rank] = own;
    *part = add(own);
    if ((int)parting.parts.size() == clique.size) {
        std::map<int, std::vector<std::pair<int, int>>> colors;
        for (const auto& choice : parting.choices) {
            colors[choice.second.first].push_back({choice.second.second, choice.first});
        }

        for (auto& members : colors) {
            std::sort(members.second.begin(), members.second.end());
            auto together = std::make_shared<Clique>();
            together->size = (int)members.second.size();
            for (int i = 0; i < together->size; i++) {
                Communicator& member = *parting.parts[members.second[i].second];
                together->joined[i] = true;
                member.clique = together;
                member.rank = i;
                member.there = true;
            }
        }

        clique.partings.erase(number);
    }

    return begun(rank);
}

int ncclCommFinalize(void* communicator) {
    const Rank rank = find(communicator);
    return rank ? begun(rank) : InvalidArgument;
}

int ncclCommAbort(void* communicator) {
    const Rank rank = find(communicator);
    if (!rank) {
        return InvalidArgument;
    }

    {
        std::lock_guard lock(rank->clique->mutex);
        rank->aborted = true;
        rank->clique->changed.notify_all();
    }

    std::lock_guard lock(mutex);
    ranks.erase(communicator);
    return Success;
}

int ncclCommDestroy(void* communicator) {
    const Rank rank = find(communicator);
    if (!rank || rank->busy > 0) {
        return InvalidUsage;
    }

    std::lock_guard lock(mutex);
    ranks.erase(communicator);
    return Success;
}

// Busy until all ranks are there, and for two looks after each call.
int ncclCommGetAsyncError(void* communicator, int* error) {
    const Rank rank = find(communicator);
    if (!rank) {
        return InvalidArgument;
    }

    if (int planned = driver::planned_failure("ncclCommGetAsyncError")) {
        *error = planned;
        return Success;
    }

    bool whole = false;
    if (rank->there) {
        std::lock_guard lock(rank->clique->mutex);
        whole = (int)rank->clique->joined.size() == rank->clique->size;
    }

    *error = rank->error != 0 ? rank->error.load() : !whole || (rank->busy > 0 && rank->busy-- > 0) ? (int)InProgress : (int)Success;
    return Success;
}

const char* ncclGetErrorString(int result) {
    static const char* const names[] = {
        "no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument", "invalid usage",
        "remote process exited or there was a network error", "NCCL operation in progress"};
    return result >= 0 && result <= InProgress ? names[result] : "unknown result code";
}

const char* ncclGetLastError(void*) {
    std::lock_guard lock(mutex);
    static thread_local std::string copy;
    copy = last_error;
    return copy.c_str();
}

int ncclGroupStart() {
    groups++;
    return Success;
}

int ncclGroupEnd() {
    if (groups == 0) {
        return refuse(InvalidUsage, "the end of no group");
    }

    if (--groups > 0 || !group_rank) {
        return Success;
    }

    const Rank rank = std::exchange(group_rank, nullptr);
    return queue(rank, group_stream, [rank, messages = std::exchange(group, {})] { exchange(rank, messages); });
}

int ncclSend(void* memory, size_t count, int type, int peer, void* communicator, driver::Stream* stream) {
    return message(true, memory, count, type, peer, communicator, stream);
}

int ncclRecv(void* memory, size_t count, int type, int peer, void* communicator, driver::Stream* stream) {
    return message(false, memory, count, type, peer, communicator, stream);
}

int ncclAllGather(const char* from, char* to, size_t count, int type, void* communicator, driver::Stream* stream) {
    const Rank rank = find(communicator);
    if (const Result result = check(rank, type, stream)) {
        return result;
    }

    if (check(from, count) != Success || check(to, count * rank->clique->size) != Success) {
        return InvalidArgument;
    }

    return queue(rank, stream, [=] {
        meet(rank, {"all-gather", count, 0, from}, [=](const std::map<int, Call>& calls) {
            for (const auto& call : calls) {
                if (to + call.first * count != call.second.from) {
                    copy(rank, to + call.first * count, call.second.from, count);
                }
            }
        });
    });
}

int ncclBroadcast(const char* from, char* to, size_t count, int type, int root, void* communicator, driver::Stream* stream) {
    const Rank rank = find(communicator);
    if (const Result result = check(rank, type, stream)) {
        return result;
    }

    if (check(from, count) != Success || check(to, count) != Success || root < 0 || root >= rank->clique->size) {
        return InvalidArgument;
    }

    return queue(rank, stream, [=] {
        meet(rank, {"broadcast", count, root, from}, [=](const std::map<int, Call>& calls) {
            if (rank->rank != root) {
                copy(rank, to, calls.at(root).from, count);
            }
        });
    });
}

}  // extern "C"
