// What lorry calls of NVIDIA's driver, for tests where there is none: as late with everything as the driver may be. A copy or
// a launch is done when someone waits for it, so that bytes changed too early, an order that is not asked for, a call from a
// thread without context and whatever is not given back are seen. Kernels are run by the test.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using Address = unsigned long long;
using Work = std::function<void()>;

enum Result : int {
    Success = 0, InvalidValue = 1, OutOfMemory = 2, NotInitialized = 3, NoDevice = 100, InvalidDevice = 101, InvalidContext = 201,
    InvalidPtx = 218, NotFound = 500, NotReady = 600, IllegalAddress = 700, CaptureUnsupported = 900, CaptureInvalidated = 901,
    WrongThread = 908,
};

struct Launch { std::string kernel; unsigned grid[3], threads; std::vector<char> args; };
using Hook = void (*)(const char* kernel, const unsigned* grid, unsigned threads, const void* args, size_t bytes);
struct Function { std::string name; size_t argument_bytes; };
struct Module { std::string program; std::vector<Function*> functions; };
struct Graph { std::vector<Launch> launches; };
struct Stream {
    std::deque<Work> work;
    bool capturing = false, broken = false;
    std::thread::id captured_by;
    Graph captured;
};
struct Event { Stream* stream = nullptr; uint64_t recorded = 0, reached = 0; };

struct Machine {
    std::mutex lock;
    int version = 12040, num_devices = 1, major = 9, minor = 0, init = Success;
    size_t total = 64 << 20;
    std::string refusal; // what compiling says, if it fails
    Hook hook = nullptr;
    int retained = 0, late = 0;
    bool initialized = false, fault = false, no_pinned = false;
    std::map<Address, size_t> device, pinned;
    std::multiset<Address> copied; // of pinned memory, by copies under way
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::set<Graph*> graphs;
};
Machine& machine() { static Machine it; return it; }
thread_local bool current = false;

bool is_within(const std::map<Address, size_t>& memory, Address address, size_t bytes) {
    auto after = memory.upper_bound(address);
    return after != memory.begin() && (--after, address + bytes <= after->first + after->second);
}
void* at(Address address) { return (void*)(uintptr_t)address; }

// Does the next thing of a stream.
void advance(Stream* stream) {
    if (stream->work.empty()) return;
    stream->work.front()();
    stream->work.pop_front();
}
void finish(Stream* stream) { while (!stream->work.empty()) advance(stream); }

#define ENTER                                      \
    auto& m = machine();                           \
    std::lock_guard<std::mutex> guard(m.lock);     \
    if (!m.initialized) return NotInitialized;
#define ENTER_CONTEXT                              \
    ENTER                                          \
    if (!current || !m.retained) return InvalidContext; \
    if (m.fault) return IllegalAddress;
// A recording is spoilt by what cannot be part of it.
#define NOT_RECORDED(stream)                                                                         \
    if (stream->capturing) { stream->broken = true; return CaptureUnsupported; }
#define NO_RECORDING_HERE                                                                            \
    for (Stream* s : m.streams) if (s->captured_by == std::this_thread::get_id()) NOT_RECORDED(s)

Work copy(Address to, std::function<const void*()> from, size_t bytes) {
    return [=] {
        auto& m = machine();
        if (is_within(m.device, to, bytes)) std::memcpy(at(to), from(), bytes);
        else m.fault = true;
    };
}
Work work_of(const Launch& launch) {
    return [launch] {
        machine().hook(launch.kernel.c_str(), launch.grid, launch.threads, launch.args.data(), launch.args.size());
    };
}

} // namespace

extern "C" {

// ---- For tests ---------------------------------------------------------------------------------------------------------

void libcuda_set(int version, int num_devices, int major, int init, const char* refusal, Hook hook) {
    auto& m = machine();
    m.version = version, m.num_devices = num_devices, m.major = major, m.init = init;
    m.refusal = refusal, m.hook = hook, m.initialized = m.fault = m.no_pinned = false, m.late = 0;
}
// Whether there is no more page-locked memory.
void libcuda_set_no_pinned(bool no_pinned) {
    auto& m = machine();
    std::lock_guard<std::mutex> guard(m.lock);
    m.no_pinned = no_pinned;
}
// Streams, events, memory and so on that were not given back, and memory of the host that was given back too early.
int libcuda_left() {
    auto& m = machine();
    return m.retained + m.late + m.device.size() + m.pinned.size() + m.streams.size() + m.events.size() + m.modules.size()
         + m.graphs.size();
}

// ---- The driver --------------------------------------------------------------------------------------------------------

int cuDriverGetVersion(int* version) { *version = machine().version; return Success; }
int cuInit(unsigned) {
    auto& m = machine();
    std::lock_guard<std::mutex> guard(m.lock);
    if (m.init != Success) return m.init;
    if (m.num_devices == 0) return NoDevice;
    m.initialized = true;
    return Success;
}
int cuGetErrorName(int error, const char** name) {
    *name = error == InvalidContext ? "CUDA_ERROR_INVALID_CONTEXT" : error == IllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
    return Success;
}
int cuGetErrorString(int error, const char** text) {
    static thread_local char buffer[32];
    std::snprintf(buffer, sizeof buffer, "error %d", error);
    *text = buffer;
    return Success;
}
int cuDeviceGetCount(int* count) { ENTER *count = m.num_devices; return Success; }
int cuDeviceGet(int* device, int ordinal) {
    ENTER
    if (ordinal < 0 || ordinal >= m.num_devices) return InvalidDevice;
    *device = ordinal;
    return Success;
}
int cuDeviceGetName(char* name, int len, int device) { ENTER std::snprintf(name, len, "Card %d", device); return Success; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER
    // Capability major and minor; of several devices only the last is as new as it was said.
    *value = attribute == 75 ? (device == m.num_devices - 1 ? m.major : 7) : attribute == 76 ? m.minor : 0;
    return Success;
}
int cuDevicePrimaryCtxRetain(void** context, int) { ENTER m.retained++; *context = &m; return Success; }
int cuDevicePrimaryCtxRelease_v2(int) { ENTER m.retained--; return Success; }
int cuCtxSetCurrent(void* context) { ENTER current = context == &m; return Success; }

int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
    ENTER_CONTEXT
    if (!m.refusal.empty()) {
        for (unsigned i = 0; i < count; i++) // 5: where errors are written
            if (options[i] == 5) std::strcpy((char*)values[i], m.refusal.c_str());
        return InvalidPtx;
    }
    *module = *m.modules.insert(new Module{(const char*)image, {}}).first;
    return Success;
}
int cuModuleUnload(void* module) {
    ENTER_CONTEXT
    for (Function* function : ((Module*)module)->functions) delete function;
    m.modules.erase((Module*)module);
    delete (Module*)module;
    return Success;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER_CONTEXT
    auto& program = ((Module*)module)->program;
    auto parameter = program.find(std::string(name) + "_param_0[");
    if (parameter == std::string::npos) return NotFound;
    size_t bytes = std::strtoul(program.c_str() + program.find('[', parameter) + 1, nullptr, 10);
    ((Module*)module)->functions.push_back(new Function{name, bytes});
    *function = ((Module*)module)->functions.back();
    return Success;
}
int cuFuncLoad(void*) { ENTER_CONTEXT return Success; }

int cuStreamCreate(void** stream, unsigned) { ENTER_CONTEXT *stream = *m.streams.insert(new Stream).first; return Success; }
int cuStreamDestroy_v2(void* stream) { ENTER_CONTEXT m.streams.erase((Stream*)stream); delete (Stream*)stream; return Success; }
int cuStreamSynchronize(void* stream) {
    ENTER_CONTEXT
    NOT_RECORDED(((Stream*)stream))
    finish((Stream*)stream);
    return m.fault ? IllegalAddress : Success;
}
int cuEventCreate(void** event, unsigned) { ENTER_CONTEXT *event = *m.events.insert(new Event).first; return Success; }
int cuEventDestroy_v2(void* event) { ENTER_CONTEXT m.events.erase((Event*)event); return Success; }
int cuEventRecord(void* event, void* stream) {
    ENTER_CONTEXT
    NOT_RECORDED(((Stream*)stream))
    auto* e = (Event*)event;
    e->stream = (Stream*)stream;
    uint64_t number = ++e->recorded;
    // It may be destroyed before it is reached, so that its memory is kept.
    e->stream->work.push_back([=] { e->reached = number; });
    return Success;
}
int cuEventSynchronize(void* event) {
    ENTER_CONTEXT
    auto* e = (Event*)event;
    while (e->reached < e->recorded) advance(e->stream);
    return m.fault ? IllegalAddress : Success;
}
// Nothing is done before somebody asks, and then one thing.
int cuEventQuery(void* event) {
    ENTER_CONTEXT
    auto* e = (Event*)event;
    if (e->reached == e->recorded) return Success;
    advance(e->stream);
    return m.fault ? IllegalAddress : NotReady;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER_CONTEXT
    *free = *total = m.total;
    for (auto& [address, bytes] : m.device) *free -= bytes;
    return Success;
}
int cuMemAlloc_v2(Address* address, size_t bytes) {
    ENTER_CONTEXT
    NO_RECORDING_HERE
    if (bytes == 0) return InvalidValue;
    size_t used = 0;
    for (auto& [_, taken] : m.device) used += taken;
    if (used + bytes > m.total) return OutOfMemory;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xA5, bytes);
    m.device[*address = (uintptr_t)memory] = bytes;
    return Success;
}
int cuMemFree_v2(Address address) {
    ENTER_CONTEXT
    NO_RECORDING_HERE
    for (Stream* stream : m.streams) finish(stream);
    if (!m.device.erase(address)) return InvalidValue;
    std::free(at(address));
    return Success;
}
int cuMemHostAlloc(void** start, size_t bytes, unsigned) {
    ENTER_CONTEXT
    if (m.no_pinned) return OutOfMemory;
    m.pinned[(uintptr_t)(*start = std::malloc(bytes))] = bytes;
    return Success;
}
int cuMemFreeHost(void* start) {
    ENTER_CONTEXT
    auto copied = m.copied.lower_bound((uintptr_t)start);
    m.late += copied != m.copied.end() && *copied < (uintptr_t)start + m.pinned[(uintptr_t)start];
    m.pinned.erase((uintptr_t)start);
    std::free(start);
    return Success;
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
    ENTER_CONTEXT
    NOT_RECORDED(((Stream*)stream))
    // Of other memory the driver would take a copy first, and whoever asks would wait for it.
    if (!is_within(m.pinned, (uintptr_t)from, bytes)) return InvalidValue;
    m.copied.insert((uintptr_t)from);
    ((Stream*)stream)->work.push_back(copy(to, [=] {
        machine().copied.erase(machine().copied.find((uintptr_t)from));
        return from;
    }, bytes));
    return Success;
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
    ENTER_CONTEXT
    NOT_RECORDED(((Stream*)stream))
    ((Stream*)stream)->work.push_back([=] {
        auto& m = machine();
        if (is_within(m.device, from, bytes) && is_within(m.pinned, (uintptr_t)to, bytes)) std::memcpy(to, at(from), bytes);
        else m.fault = true;
    });
    return Success;
}
int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
    ENTER_CONTEXT
    NOT_RECORDED(((Stream*)stream))
    std::vector<char> values(bytes, value);
    ((Stream*)stream)->work.push_back(copy(to, [values] { return values.data(); }, bytes));
    return Success;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, void* stream,
                   void** parameters, void**) {
    ENTER_CONTEXT
    if (!x || !y || !z) return InvalidValue;
    auto* f = (Function*)function;
    auto* s = (Stream*)stream;
    const char* args = (const char*)parameters[0];
    Launch launch{f->name, {x, y, z}, threads, {args, args + f->argument_bytes}};
    if (s->capturing) s->captured.launches.push_back(launch);
    else s->work.push_back(work_of(launch));
    return Success;
}
int cuStreamBeginCapture_v2(void* stream, int mode) {
    ENTER_CONTEXT
    NOT_RECORDED(((Stream*)stream))
    if (mode != 1) return InvalidValue; // other threads would be disturbed
    ((Stream*)stream)->capturing = true;
    ((Stream*)stream)->captured_by = std::this_thread::get_id();
    return Success;
}
int cuStreamEndCapture(void* stream, void** graph) {
    ENTER_CONTEXT
    auto* s = (Stream*)stream;
    if (!s->capturing) return InvalidValue;
    if (s->captured_by != std::this_thread::get_id()) return WrongThread;
    bool broken = s->broken;
    Graph captured;
    std::swap(captured, s->captured);
    s->capturing = s->broken = false;
    s->captured_by = {};
    if (broken) return CaptureInvalidated;
    *graph = *m.graphs.insert(new Graph(captured)).first;
    return Success;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    ENTER_CONTEXT
    *executable = *m.graphs.insert(new Graph(*(Graph*)graph)).first;
    return Success;
}
int cuGraphDestroy(void* graph) { ENTER_CONTEXT m.graphs.erase((Graph*)graph); delete (Graph*)graph; return Success; }
int cuGraphExecDestroy(void* graph) { ENTER_CONTEXT m.graphs.erase((Graph*)graph); delete (Graph*)graph; return Success; }
int cuGraphLaunch(void* graph, void* stream) {
    ENTER_CONTEXT
    for (auto& launch : ((Graph*)graph)->launches) ((Stream*)stream)->work.push_back(work_of(launch));
    return Success;
}

} // extern "C"
