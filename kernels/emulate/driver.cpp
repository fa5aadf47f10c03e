// A CUDA driver and cuBLAS without a GPU: the entry points that src/ops/device/cuda.rs calls, as one library to be found
// as libcuda.so and libcublas.so. A build with the feature `cuda` runs on it whole, on the kernels of device.cpp.
//
// Work waits in a queue until the stream is waited for, as on a card: what was freed or overwritten too early shows. Memory
// is a pool that keeps what is freed and takes it again for the same size alone. Fresh memory is NaN. What a driver or
// cuBLAS refuses (sizes, types, strides, memory, shared memory of Ada's 99 KB) is refused.
//
//   EMULATED_CUDA_MEMORY     bytes of the card; default 4 GiB
//   EMULATED_CUDA_PAGEABLE   1: the card reads the host's memory itself, when the work is done
#include "device.cpp"

#include <array>
#include <mutex>

namespace {

enum Status { success = 0, invalid_value = 1, out_of_memory = 2, not_initialized = 3, invalid_image = 200, invalid_context = 201, invalid_handle = 400, not_found = 500 };
enum BlasStatus { blas_success = 0, blas_invalid_value = 7, blas_execution_failed = 13, blas_not_supported = 15 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };

using Pointer = unsigned long long;
// A kernel's static shared memory, of which nothing is known here, takes up to 2 KB of either.
constexpr size_t shared_without_asking = 46 << 10, shared_at_most = 97 << 10;

struct Function {
    std::string name;
    Entry entry;
    size_t shared = shared_without_asking;
};

struct Card {
    std::mutex lock;
    bool initialized = false;
    std::vector<std::function<void()>> queue;
    std::map<Pointer, size_t> used;
    std::multimap<size_t, Pointer> kept;
    size_t taken = 0;  // bytes, used and kept
    std::map<std::string, Function> functions;

    size_t memory() const {
        const char* said = std::getenv("EMULATED_CUDA_MEMORY");
        return said ? std::strtoull(said, nullptr, 10) : size_t(4) << 30;
    }
    void finish() {
        for (const auto& work : queue) work();
        queue.clear();
    }
    // Whether all of it lies in one allocation.
    bool holds(Pointer at, size_t bytes) const {
        auto after = used.upper_bound(at);
        return after != used.begin() && (--after, at + bytes <= after->first + after->second);
    }
};

Card& card() {
    static Card* one = new Card;  // never destroyed: the program may end with work in the queue
    return *one;
}
thread_local void* current = nullptr;
char context, stream, module_, pool, handle;  // what handles point to

using Guard = std::lock_guard<std::mutex>;

size_t size_of(int type) { return type == R_32F ? 4 : 2; }

float element(Pointer at, int type) {
    if (type == R_32F) return *reinterpret_cast<float*>(at);
    if (type == R_16F) return __half2float(*reinterpret_cast<__half*>(at));
    return __bfloat162float(*reinterpret_cast<__nv_bfloat16*>(at));
}

void store(Pointer at, int type, float value) {
    if (type == R_32F) *reinterpret_cast<float*>(at) = value;
    else if (type == R_16F) *reinterpret_cast<__half*>(at) = __float2half(value);
    else *reinterpret_cast<__nv_bfloat16*>(at) = __float2bfloat16(value);
}

// `n` lines of `depth` elements each, side by side as stored, or one element of each line after the other.
std::vector<float> lines(Pointer at, int type, int n, int depth, int ld, bool side_by_side) {
    std::vector<float> out;
    for (int i = 0; i < n; ++i)
        for (int l = 0; l < depth; ++l) {
            const size_t index = side_by_side ? size_t(i) * size_t(ld) + size_t(l) : size_t(l) * size_t(ld) + size_t(i);
            out.push_back(element(at + index * size_of(type), type));
        }
    return out;
}

void fail(const char* what, const std::string& which) { std::fprintf(stderr, "emulated driver: %s: %s\n", what, which.c_str()); }

}  // namespace

extern "C" {

int cuInit(unsigned flags) {
    Guard guard(card().lock);
    card().initialized = flags == 0;
    return flags ? invalid_value : success;
}
int cuDriverGetVersion(int* version) { return *version = 13000, success; }
int cuDeviceGetCount(int* count) { return card().initialized ? (*count = 1, success) : not_initialized; }
int cuDeviceGet(int* device, int ordinal) { return ordinal ? 101 : (*device = 0, success); }
int cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, size_t(length), "Emulated CUDA card"), success; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const char* pageable = std::getenv("EMULATED_CUDA_PAGEABLE");
    switch (attribute) {
        case 16: *value = 4; return success;                                       // MULTIPROCESSOR_COUNT
        case 75: *value = 8; return success;                                       // COMPUTE_CAPABILITY_MAJOR
        case 76: *value = 9; return success;                                       // COMPUTE_CAPABILITY_MINOR
        case 88: *value = pageable && *pageable == '1'; return success;            // PAGEABLE_MEMORY_ACCESS
        case 115: *value = 1; return success;                                      // MEMORY_POOLS_SUPPORTED
        default: return fail("unknown attribute", std::to_string(attribute)), invalid_value;
    }
}
int cuDevicePrimaryCtxRetain(void** out, int) { return *out = &context, success; }
int cuDevicePrimaryCtxRelease_v2(int) { return success; }
int cuCtxGetCurrent(void** out) { return *out = current, success; }
int cuCtxSetCurrent(void* to) { return current = to, success; }
int cuCtxSynchronize() {
    Guard guard(card().lock);
    return card().finish(), success;
}
int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case invalid_value: *name = "CUDA_ERROR_INVALID_VALUE"; return success;
        case out_of_memory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return success;
        case not_initialized: *name = "CUDA_ERROR_NOT_INITIALIZED"; return success;
        case invalid_context: *name = "CUDA_ERROR_INVALID_CONTEXT"; return success;
        default: *name = "CUDA_ERROR_UNKNOWN"; return success;
    }
}
int cuGetErrorString(int error, const char** text) {
    return *text = error == out_of_memory ? "out of memory" : "refused by the emulated driver", success;
}

int cuModuleLoadData(void** out, const void* image) {
    if (!current) return invalid_context;
    uint32_t magic;
    if (reinterpret_cast<uintptr_t>(image) % 8) return invalid_image;
    std::memcpy(&magic, image, 4);
    if (magic != 0xba55ed50) return fail("not a fatbin", std::to_string(magic)), invalid_image;
    return *out = &module_, success;
}
int cuModuleGetFunction(void** out, void* of, const char* name) {
    Guard guard(card().lock);
    const auto found = kernels().find(name);
    if (of != &module_) return invalid_handle;
    if (found == kernels().end()) return not_found;
    Function& function = card().functions[name];
    function.name = name;
    function.entry = found->second;
    return *out = &function, success;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8) return fail("unknown attribute of a function", std::to_string(attribute)), invalid_value;
    if (size_t(value) > shared_at_most) return fail("too much shared memory", function->name), invalid_value;
    return function->shared = size_t(value), success;
}

int cuStreamCreate(void** out, unsigned) { return current ? (*out = &stream, success) : invalid_context; }
int cuStreamDestroy_v2(void*) { return success; }
int cuStreamSynchronize(void* of) {
    Guard guard(card().lock);
    return of == &stream ? (card().finish(), success) : invalid_handle;
}

int cuDeviceGetDefaultMemPool(void** out, int) { return *out = &pool, success; }
int cuMemPoolSetAttribute(void*, int attribute, void* value) {
    return attribute == 4 && *static_cast<uint64_t*>(value) == UINT64_MAX ? success : invalid_value;  // RELEASE_THRESHOLD
}
int cuMemPoolTrimTo(void*, size_t) {
    Guard guard(card().lock);
    card().finish();  // what is freed was filled in the queue
    for (const auto& [bytes, at] : card().kept) {
        card().taken -= bytes;
        std::free(reinterpret_cast<void*>(at));
    }
    return card().kept.clear(), success;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    Guard guard(card().lock);
    *total = card().memory();
    return *free = *total - card().taken, success;
}
int cuMemAllocAsync(Pointer* out, size_t bytes, void* on) {
    Guard guard(card().lock);
    if (on != &stream || !bytes) return invalid_value;
    const auto same = card().kept.find(bytes);
    if (same != card().kept.end()) {
        *out = same->second;
        card().kept.erase(same);
    } else {
        if (card().taken + bytes > card().memory()) return out_of_memory;
        card().taken += bytes;
        *out = reinterpret_cast<Pointer>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    }
    card().used[*out] = bytes;
    card().queue.push_back([at = *out, bytes] { std::memset(reinterpret_cast<void*>(at), 0xff, bytes); });
    return success;
}
int cuMemFreeAsync(Pointer at, void* on) {
    Guard guard(card().lock);
    const auto found = card().used.find(at);
    if (on != &stream || found == card().used.end()) return fail("free of nothing", std::to_string(at)), invalid_value;
    const size_t bytes = found->second;
    card().kept.emplace(bytes, at);
    card().used.erase(found);
    card().queue.push_back([at, bytes] { std::memset(reinterpret_cast<void*>(at), 0xff, bytes); });
    return success;
}
int cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void*) {
    Guard guard(card().lock);
    if (!card().holds(to, bytes)) return fail("upload out of bounds", std::to_string(bytes)), invalid_value;
    int reads_host = 0;
    cuDeviceGetAttribute(&reads_host, 88, 0);
    if (reads_host) {
        card().queue.push_back([=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
        return success;
    }
    std::vector<char> staged(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    card().queue.push_back([to, staged] { std::memcpy(reinterpret_cast<void*>(to), staged.data(), staged.size()); });
    return success;
}
int cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void*) {
    Guard guard(card().lock);
    if (!card().holds(from, bytes)) return fail("download out of bounds", std::to_string(bytes)), invalid_value;
    card().queue.push_back([=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
    return success;
}
int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void*) {
    Guard guard(card().lock);
    if (!card().holds(to, bytes) || !card().holds(from, bytes)) return fail("copy out of bounds", std::to_string(bytes)), invalid_value;
    card().queue.push_back([=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return success;
}
int cuMemsetD8Async(Pointer at, unsigned char value, size_t bytes, void*) {
    Guard guard(card().lock);
    if (!card().holds(at, bytes)) return fail("fill out of bounds", std::to_string(bytes)), invalid_value;
    card().queue.push_back([=] { std::memset(reinterpret_cast<void*>(at), value, bytes); });
    return success;
}

int cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned width, unsigned height, unsigned depth,
                   unsigned shared, void* on, void** args, void** extra) {
    Guard guard(card().lock);
    const bool shaped = x && y && z && x < 1u << 31 && y < 65536 && z < 65536 && width && height && depth == 1 && size_t(width) * height <= 1024;
    if (!shaped || shared > function->shared || on != &stream || extra)
        return fail("launch refused", function->name), invalid_value;
    // The arguments are copied now: their memory is the caller's.
    const auto launch = function->entry.with({dim3(x, y, z), dim3(width, height), shared}, args);
    card().queue.push_back(launch);
    return success;
}

int cublasCreate_v2(void** out) { return *out = &handle, blas_success; }
int cublasDestroy_v2(void*) { return blas_success; }
int cublasSetStream_v2(void*, void* on) { return on == &stream ? blas_success : blas_invalid_value; }
int cublasSetWorkspace_v2(void*, void* at, size_t bytes) {
    Guard guard(card().lock);
    return card().holds(reinterpret_cast<Pointer>(at), bytes) ? blas_success : blas_invalid_value;
}
int cublasSetMathMode(void*, int mode) { return mode == 16 ? blas_success : blas_invalid_value; }  // DISALLOW_REDUCED_PRECISION

// Column-major C = alpha op(A) op(B) + beta C, as cuBLAS has it.
int cublasGemmEx(void*, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b,
                 int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int) {
    Guard guard(card().lock);
    const bool compute_known = compute == COMPUTE_32F || (compute == COMPUTE_32F_FAST_TF32 && type_a == R_32F);
    if (type_a != type_b || (type_c != type_a && type_c != R_32F) || !compute_known)
        return fail("types of a product", std::to_string(type_a) + " " + std::to_string(type_b) + " " + std::to_string(type_c)), blas_not_supported;
    if (m <= 0 || n <= 0 || k <= 0 || lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m)
        return fail("sizes of a product", std::to_string(m) + " " + std::to_string(n) + " " + std::to_string(k)), blas_invalid_value;
    const auto [pa, pb, pc] = std::array{Pointer(a), Pointer(b), Pointer(c)};
    const auto bytes = [](int columns, int ld, int rows, int type) { return (size_t(columns - 1) * size_t(ld) + size_t(rows)) * size_of(type); };
    if (!card().holds(pa, op_a ? bytes(m, lda, k, type_a) : bytes(k, lda, m, type_a)) ||
        !card().holds(pb, op_b ? bytes(k, ldb, n, type_b) : bytes(n, ldb, k, type_b)) || !card().holds(pc, bytes(n, ldc, m, type_c)))
        return fail("a product out of bounds", std::to_string(m) + " " + std::to_string(n) + " " + std::to_string(k)), blas_execution_failed;
    const float factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    card().queue.push_back([=] {
        const std::vector<float> rows = lines(pa, type_a, m, k, lda, op_a), columns = lines(pb, type_b, n, k, ldb, !op_b);
        for (int j = 0; j < n; ++j)
            for (int i = 0; i < m; ++i) {
                const float *row = &rows[size_t(i) * size_t(k)], *column = &columns[size_t(j) * size_t(k)];
                float sums[8] = {};
                for (int l = 0; l < k; ++l) sums[l % 8] += row[l] * column[l];
                const float sum = std::accumulate(sums, sums + 8, 0.0f);
                const Pointer at = pc + (size_t(j) * size_t(ldc) + size_t(i)) * size_of(type_c);
                store(at, type_c, factor * sum + (keep != 0.0f ? keep * element(at, type_c) : 0.0f));
            }
    });
    return blas_success;
}

}  // extern "C"
