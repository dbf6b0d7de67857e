/* trampoline.c is a libcuda to link with that finds the real one at run time.
 *
 * A program linked with the driver's libcuda does not start on a machine without a driver, and
 * gorgonia.org/cu ends the program in its init() when cuInit fails. Linked with this archive, one binary
 * runs everywhere: every call jumps through a slot, cuInit looks for libcuda.so.1, fills the slots and
 * always reports success. What it found is told by every other call:
 *
 *     no libcuda.so.1           CUDA_ERROR_STUB_LIBRARY
 *     the driver's cuInit fails what it returned, CUDA_ERROR_NO_DEVICE for instance
 *     a call the driver lacks   CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND
 *
 * Linking fails if a call is missing in the list. */
#include <dlfcn.h>
#include <pthread.h>

#define CALLS(X) \
	X(cuArray3DCreate_v2) X(cuArray3DGetDescriptor_v2) X(cuArrayCreate_v2) X(cuArrayDestroy)                        \
	X(cuArrayGetDescriptor_v2) X(cuCtxCreate_v2) X(cuCtxDestroy_v2) X(cuCtxDisablePeerAccess)                       \
	X(cuCtxEnablePeerAccess) X(cuCtxGetApiVersion) X(cuCtxGetCacheConfig) X(cuCtxGetCurrent) X(cuCtxGetDevice)      \
	X(cuCtxGetFlags) X(cuCtxGetLimit) X(cuCtxGetSharedMemConfig) X(cuCtxGetStreamPriorityRange)                     \
	X(cuCtxPopCurrent_v2) X(cuCtxPushCurrent_v2) X(cuCtxResetPersistingL2Cache) X(cuCtxSetCacheConfig)              \
	X(cuCtxSetCurrent) X(cuCtxSetLimit) X(cuCtxSetSharedMemConfig) X(cuCtxSynchronize) X(cuDeviceCanAccessPeer)     \
	X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDeviceGetCount) X(cuDeviceGetName) X(cuDeviceGetP2PAttribute)        \
	X(cuDeviceGetUuid) X(cuDevicePrimaryCtxGetState) X(cuDevicePrimaryCtxRelease_v2)                                \
	X(cuDevicePrimaryCtxReset_v2) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxSetFlags_v2)                      \
	X(cuDeviceTotalMem_v2) X(cuDriverGetVersion) X(cuEventCreate) X(cuEventDestroy_v2) X(cuEventElapsedTime)        \
	X(cuEventQuery) X(cuEventRecord) X(cuEventSynchronize) X(cuFuncGetAttribute) X(cuFuncSetAttribute)              \
	X(cuFuncSetCacheConfig) X(cuFuncSetSharedMemConfig) X(cuGetErrorName) X(cuGetErrorString)                       \
	X(cuGraphAddChildGraphNode) X(cuGraphAddDependencies) X(cuGraphAddEmptyNode) X(cuGraphAddHostNode)              \
	X(cuGraphAddKernelNode_v2) X(cuGraphAddMemcpyNode) X(cuGraphAddMemsetNode) X(cuGraphClone) X(cuGraphCreate)     \
	X(cuGraphDestroy) X(cuGraphDestroyNode) X(cuGraphExecDestroy) X(cuGraphGetEdges) X(cuIpcCloseMemHandle)         \
	X(cuIpcGetMemHandle) X(cuIpcOpenMemHandle_v2) X(cuLaunchKernel) X(cuLinkAddData_v2) X(cuLinkAddFile_v2)         \
	X(cuLinkComplete) X(cuLinkCreate_v2) X(cuLinkDestroy) X(cuMemAdvise) X(cuMemAllocManaged)                       \
	X(cuMemAllocPitch_v2) X(cuMemAlloc_v2) X(cuMemFreeHost) X(cuMemFree_v2) X(cuMemGetAddressRange_v2)              \
	X(cuMemGetInfo_v2) X(cuMemHostAlloc) X(cuMemHostRegister_v2) X(cuMemHostUnregister) X(cuMemPrefetchAsync)       \
	X(cuMemcpy) X(cuMemcpy2DAsync_v2) X(cuMemcpy2DUnaligned_v2) X(cuMemcpy2D_v2) X(cuMemcpy3DAsync_v2)              \
	X(cuMemcpy3DPeer) X(cuMemcpy3DPeerAsync) X(cuMemcpy3D_v2) X(cuMemcpyAsync) X(cuMemcpyAtoA_v2)                   \
	X(cuMemcpyAtoD_v2) X(cuMemcpyAtoHAsync_v2) X(cuMemcpyAtoH_v2) X(cuMemcpyDtoA_v2) X(cuMemcpyDtoDAsync_v2)        \
	X(cuMemcpyDtoD_v2) X(cuMemcpyDtoHAsync_v2) X(cuMemcpyDtoH_v2) X(cuMemcpyHtoAAsync_v2) X(cuMemcpyHtoA_v2)        \
	X(cuMemcpyHtoDAsync_v2) X(cuMemcpyHtoD_v2) X(cuMemcpyPeer) X(cuMemcpyPeerAsync) X(cuMemsetD16Async)             \
	X(cuMemsetD16_v2) X(cuMemsetD2D16Async) X(cuMemsetD2D16_v2) X(cuMemsetD2D32Async) X(cuMemsetD2D32_v2)           \
	X(cuMemsetD2D8Async) X(cuMemsetD2D8_v2) X(cuMemsetD32Async) X(cuMemsetD32_v2) X(cuMemsetD8Async)                \
	X(cuMemsetD8_v2) X(cuModuleGetFunction) X(cuModuleGetGlobal_v2) X(cuModuleGetSurfRef) X(cuModuleGetTexRef)      \
	X(cuModuleLoad) X(cuModuleLoadData) X(cuModuleLoadDataEx) X(cuModuleLoadFatBinary) X(cuModuleUnload)            \
	X(cuOccupancyMaxActiveBlocksPerMultiprocessor) X(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)          \
	X(cuPointerGetAttribute) X(cuPointerSetAttribute) X(cuStreamAttachMemAsync) X(cuStreamCreate)                   \
	X(cuStreamCreateWithPriority) X(cuStreamDestroy_v2) X(cuStreamGetFlags) X(cuStreamGetPriority)                  \
	X(cuStreamQuery) X(cuStreamSynchronize) X(cuStreamWaitEvent) X(cuStreamWaitValue32_v2)                          \
	X(cuStreamWriteValue32_v2) X(cuSurfRefGetArray) X(cuSurfRefSetArray) X(cuTexRefGetAddressMode)                  \
	X(cuTexRefGetAddress_v2) X(cuTexRefGetArray) X(cuTexRefGetBorderColor) X(cuTexRefGetFilterMode)                 \
	X(cuTexRefGetFlags) X(cuTexRefGetFormat) X(cuTexRefGetMaxAnisotropy) X(cuTexRefSetAddress2D_v3)                 \
	X(cuTexRefSetAddressMode) X(cuTexRefSetAddress_v2) X(cuTexRefSetArray) X(cuTexRefSetBorderColor)                \
	X(cuTexRefSetFilterMode) X(cuTexRefSetFlags) X(cuTexRefSetFormat) X(cuTexRefSetMaxAnisotropy)                   \
	X(cuTexRefSetMipmapFilterMode) X(cuTexRefSetMipmapLevelBias) X(cuTexRefSetMipmapLevelClamp)

static int failure = 34; /* CUDA_ERROR_STUB_LIBRARY */

static int fail(void) { return failure; }
static int missing(void) { return 302; /* CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND */ }

#define SLOT(name) __attribute__((used, visibility("hidden"))) void *kvtier_slot_##name = (void *)fail;
CALLS(SLOT)

/* A jump leaves registers and stack as the caller made them, so that no trampoline needs to know its parameters. */
#if defined(__x86_64__)
#define JUMP(name) "jmp *kvtier_slot_" #name "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(name) \
	"adrp x16, kvtier_slot_" #name "\n" \
	"ldr x16, [x16, :lo12:kvtier_slot_" #name "]\n" \
	"br x16\n"
#else
#error "no trampoline for this processor"
#endif

#define TRAMPOLINE(name) \
	__asm__(".text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n" JUMP(name));
CALLS(TRAMPOLINE)

static void fill(void *library) {
#define FILL(name) \
	if (!library) { \
		kvtier_slot_##name = (void *)fail; \
	} else if (!(kvtier_slot_##name = dlsym(library, #name))) { \
		kvtier_slot_##name = (void *)missing; \
	}
	CALLS(FILL)
}

static void load(void) {
	void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
	int (*init)(unsigned) = library ? (int (*)(unsigned))dlsym(library, "cuInit") : 0;
	if (!init) {
		return;
	}
	failure = init(0);
	fill(failure ? 0 : library);
}

int cuInit(unsigned flags) {
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	(void)flags;
	pthread_once(&once, load);
	return 0;
}
