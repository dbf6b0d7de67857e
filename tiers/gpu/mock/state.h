// What the mock driver knows: one device, its streams and objects, what is to go wrong, what was counted.
#pragma once
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "abi.h"
#include "machine.h"

namespace mock {

struct Stream;
struct Context;

// A point of a stream's work. Done when everything before it has run.
struct Record {
    bool done = false;
    double milliseconds = 0;
    std::shared_ptr<Stream> on;
};

// Work that runs only when somebody waits for it.
struct Stream {
    std::deque<std::function<void()>> work;
    bool busy = false;         // somebody runs a piece of it
    bool blocking = true;      // takes part in the order of the default stream
    unsigned flags = 0;
    int priority = 0;
    Context* owner = nullptr;
};

struct Event {
    std::shared_ptr<Record> record;  // the newest
    unsigned flags = 0;
    Context* owner = nullptr;
};

struct Context { CUdevice device = 0; bool primary = false; unsigned flags = 0; };

struct Function {
    std::shared_ptr<ptx::Kernel> kernel;
    int maxDynamicShared;
};
inline int threadsLimit(const ptx::Kernel& k) { return k.maxThreads ? int(k.maxThreads) : 1024; }

struct Module {
    std::shared_ptr<ptx::Module> code;
    std::map<std::string, std::unique_ptr<Function>> functions;
    std::vector<uint64_t> placed;    // allocations of variables
    Context* owner = nullptr;
};

struct Failure { int after; CUresult result; };  // after more calls

struct State {
    std::mutex lock;
    std::condition_variable changed;
    bool initialised = false;
    std::unique_ptr<ptx::DeviceMemory> memory;
    CUresult sticky = CUDA_SUCCESS;    // the device is dead; every call says so
    std::string lastError;
    ptx::LaunchConfig settings;        // seed, checks
    bool stalled = false;              // nothing that is queued is done, and whoever waits for it does not return
    bool strictFree = false;           // freeing does not wait for queued work

    std::shared_ptr<Stream> null = std::make_shared<Stream>();
    std::map<Stream*, std::shared_ptr<Stream>> streams;
    std::vector<std::shared_ptr<Stream>> orphans;  // destroyed, with work left
    std::map<Event*, std::unique_ptr<Event>> events;
    std::set<Context*> contexts;
    Context primary;
    int primaryUses = 0;
    std::map<Module*, std::unique_ptr<Module>> modules;
    std::set<Function*> functions;
    std::map<uint64_t, uint64_t> pinned;           // cuMemHostAlloc's, which it has to unmap
    std::map<uint64_t, Context*> owners;           // of device and pinned memory

    std::map<std::string, Failure> failures;
    int dropWaitIn = 0;                            // the n-th cuStreamWaitEvent from now is ignored
    std::string dropSyncOf;                        // kernel whose n-th synchronisation is left out
    int dropSync = 0;
    std::map<std::string, uint64_t> calls;
    std::map<std::string, ptx::Counters> counters; // by kernel
    uint64_t pageableBytes = 0;                    // copied asynchronously from and to host memory that is not pinned
    FILE* log = nullptr;                           // takes a line for each launch
};
State& state();

// A call of the API: holds the lock, counts itself, and knows whether it may go on.
struct Entry {
    std::unique_lock<std::mutex> lock;
    CUresult refused = CUDA_SUCCESS;
    enum Needs { nothing, device, context };
    Entry(const char* name, Needs);
};
#define ENTER(name) Entry entry(#name, Entry::context); if (entry.refused) return entry.refused
// For calls that end something: on a dead device they do so and still return the error.
#define ENTER_TO_END(name) Entry entry(#name, Entry::context); if (entry.refused && entry.refused != state().sticky) return entry.refused
#define ENTER_DEVICE(name) Entry entry(#name, Entry::device); if (entry.refused) return entry.refused
#define ENTER_ANY(name) Entry entry(#name, Entry::nothing); if (entry.refused) return entry.refused

// ---- streams.cpp ----
Stream* known(void* handle);                       // nullptr if there is none; the default for 0, 1 and 2
void enqueue(Stream*, std::function<void()>);
std::shared_ptr<Record> mark(Stream*);
void await(Stream*, std::shared_ptr<Record>);      // queued: the stream waits for the record
void runUntil(std::unique_lock<std::mutex>&, std::shared_ptr<Stream>, const std::shared_ptr<Record>&);
void drain(std::unique_lock<std::mutex>&, Stream*);
void drainAll(std::unique_lock<std::mutex>&);
void beforeFree(std::unique_lock<std::mutex>&);    // waits for what is queued, unless strictFree
void joinDefault(std::unique_lock<std::mutex>&);   // what a synchronous call of the default stream waits for
bool step(std::unique_lock<std::mutex>&, Stream*); // runs one piece; false if there was none
void callHost(void (*)(void*), void*);             // from within a piece of work
double now();

void forgetExported(uint64_t base);                // ipc.cpp: the allocation is gone

// ---- what calls that end things share with the end of a context ----
bool freeDevice(uint64_t base);                    // copies.cpp
bool freeHost(void*);
void unload(Module*);                              // modules.cpp

// ---- control.cpp ----
void fail(CUresult, const std::string& what);      // makes it sticky
void say(const std::string&);                      // to stderr and mock_last_error
Context*& current();

}  // namespace mock
