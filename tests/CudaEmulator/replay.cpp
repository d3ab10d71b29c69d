// Runs a trace again: replay [--schedule N] [--any-bytes] TRACE. With the sanitizers, on what the .NET tests have launched without
// them; with another schedule, to see the same bits. Ends with 1 where a launch fails or, unless any will do, other bytes are read
// than when the trace was made.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "driver.h"

namespace {

FILE* file;

void get(void* to, size_t bytes) {
    if (fread(to, 1, bytes, file) != bytes) {
        fprintf(stderr, "replay: the trace ends early\n");
        exit(2);
    }
}

template<class T> T get() {
    T value;
    get(&value, sizeof value);
    return value;
}

struct Allocation {
    uint64_t bytes, now;
};

std::map<uint64_t, Allocation> allocations;

/// Where an address of the trace is now: an allocation may have moved, but not what lies within it.
uint64_t translate(uint64_t address) {
    auto next = allocations.upper_bound(address);
    if (address == 0 || next == allocations.begin() || (--next, address > next->first + next->second.bytes)) {
        return address;
    }

    return address - next->first + next->second.now;
}

}  // namespace

int main(int count, char** arguments) {
    bool any_bytes = false;
    int next = 1;
    for (; next + 1 < count; next++) {
        const std::string option = arguments[next];
        if (option == "--schedule" && next + 2 < count) {
            emulator::schedule = atoi(arguments[++next]);
        } else if (option == "--any-bytes") {
            any_bytes = true;
        } else {
            break;
        }
    }

    if (next + 1 != count) {
        fprintf(stderr, "replay [--schedule N] [--any-bytes] TRACE\n");
        return 2;
    }

    file = fopen(arguments[next], "rb");
    if (!file) {
        perror(arguments[next]);
        return 2;
    }

    size_t launches = 0, reads = 0, failures = 0;
    const char* last = "nothing";
    std::string buffer;
    for (int event; (event = fgetc(file)) != EOF;) {
        driver::Result result = driver::Success;
        switch ((driver::Event)event) {
            case driver::Event::Allocate: {
                const auto address = get<uint64_t>(), bytes = get<uint64_t>();
                Allocation& allocation = allocations[address];
                allocation.bytes = bytes;
                result = driver::allocate(allocation.now, bytes);
                break;
            }

            case driver::Event::Free: {
                const auto address = get<uint64_t>();
                result = driver::release(allocations.at(address).now);
                allocations.erase(address);
                break;
            }

            case driver::Event::Write: {
                const auto to = get<uint64_t>(), bytes = get<uint64_t>();
                buffer.resize(bytes);
                get(buffer.data(), bytes);
                result = driver::write(translate(to), buffer.data(), bytes);
                break;
            }

            case driver::Event::Copy: {
                const auto to = get<uint64_t>(), from = get<uint64_t>(), bytes = get<uint64_t>();
                result = driver::copy(translate(to), translate(from), bytes);
                break;
            }

            case driver::Event::Fill: {
                const auto to = get<uint64_t>();
                const auto value = get<uint8_t>();
                result = driver::fill(translate(to), value, get<uint64_t>());
                break;
            }

            case driver::Event::Read: {
                const auto from = get<uint64_t>(), bytes = get<uint64_t>(), hash = get<uint64_t>();
                buffer.resize(bytes);
                result = driver::read(buffer.data(), translate(from), bytes);
                reads++;
                if (result == driver::Success && driver::hash(buffer.data(), bytes) != hash) {
                    failures++;
                    if (!any_bytes) {
                        fprintf(stderr, "replay: read %zu, after launch %zu (%s), has other bytes\n", reads, launches, last);
                    }
                }

                break;
            }

            case driver::Event::Launch: {
                std::string name(get<uint32_t>(), ' ');
                get(name.data(), name.size());
                const auto grid = get<dim3>();
                const auto threads = get<unsigned>();
                const auto shared_bytes = get<uint64_t>();
                const emulator::Function* function = emulator::find(name.c_str());
                if (!function) {
                    fprintf(stderr, "replay: there is no kernel %s\n", name.c_str());
                    return 2;
                }

                uint64_t values[64];
                void* pointers[65];
                for (int i = 0; i < function->count; i++) {
                    values[i] = get<uint64_t>();
                    values[i] = function->parameters[i].pointer ? translate(values[i]) : values[i];
                    pointers[i] = &values[i];
                }

                pointers[function->count] = nullptr;
                launches++;
                last = function->name;
                result = driver::launch(*function, grid, threads, shared_bytes, pointers);
                break;
            }

            default:
                fprintf(stderr, "replay: the trace is damaged\n");
                return 2;
        }

        if (result != driver::Success) {
            fprintf(stderr, "replay: error %d after launch %zu (%s)\n", result, launches, last);
            return 1;
        }
    }

    printf("%zu launches, %zu reads, %zu of them with other bytes\n", launches, reads, failures);
    return failures == 0 || any_bytes ? 0 : 1;
}
