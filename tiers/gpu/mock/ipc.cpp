// Memory handles for other processes: the allocation is moved into a memfd, which the other process opens
// by way of /proc. Bytes that another process writes count as defined in both.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "state.h"

using namespace mock;

namespace {

struct Handle {  // CUipcMemHandle: 64 bytes
    char magic[8];
    int64_t pid, fd;
    uint64_t size;
    char rest[32];
};
static_assert(sizeof(Handle) == 64, "as large as CUipcMemHandle");
const char magic[8] = "mockipc";

std::map<uint64_t, int>& exported() {  // by base: the file
    static auto* e = new std::map<uint64_t, int>;
    return *e;
}

}  // namespace

extern "C" {

CUresult cuIpcGetMemHandle(Handle* h, CUdeviceptr a) {
    ENTER(cuIpcGetMemHandle);
    auto* al = state().memory->starting(a);
    if (!al || !al->defined) return CUDA_ERROR_INVALID_VALUE;
    auto known = exported().find(a);
    int fd = known == exported().end() ? -1 : known->second;
    if (fd < 0) {
        fd = memfd_create("mock-cuda", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, off_t(al->size)) || pwrite(fd, al->data, al->size, 0) != ssize_t(al->size) ||
            mmap(al->data, al->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
            if (fd >= 0) close(fd);
            return CUDA_ERROR_UNKNOWN;
        }
        exported()[a] = fd;
    }
    std::memset(h, 0, sizeof *h);
    std::memcpy(h->magic, magic, sizeof magic);
    h->pid = getpid();
    h->fd = fd;
    h->size = al->size;
    return CUDA_SUCCESS;
}

// By value, as the driver takes it.
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* out, Handle h, unsigned) {
    ENTER(cuIpcOpenMemHandle_v2);
    if (std::memcmp(h.magic, magic, sizeof magic)) return CUDA_ERROR_INVALID_VALUE;
    if (h.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    char name[64];
    std::snprintf(name, sizeof name, "/proc/%ld/fd/%ld", long(h.pid), long(h.fd));
    int fd = open(name, O_RDWR | O_CLOEXEC);
    if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
    *out = state().memory->allocate(h.size);
    auto* al = *out ? state().memory->starting(*out) : nullptr;
    bool ok = al && mmap(al->data, h.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
    close(fd);
    if (!ok) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(al->defined, 1, h.size);
    return CUDA_SUCCESS;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr a) {
    ENTER_TO_END(cuIpcCloseMemHandle);
    drainAll(entry.lock);
    return state().memory->release(a) ? state().sticky : CUDA_ERROR_INVALID_VALUE;
}

}  // extern "C"

namespace mock {
// The file of an allocation that is freed; others who opened it keep its bytes.
void forgetExported(uint64_t base) {
    auto e = exported().find(base);
    if (e == exported().end()) return;
    close(e->second);
    exported().erase(e);
}
}  // namespace mock
