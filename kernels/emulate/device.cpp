// The kernels as a library for the host: launched by name with packed arguments, as a driver does. The tests' emulated
// device loads it, so that the whole model runs through the same launches as on a GPU.
#include "../attention.cu"
#include "../attention_mma.cu"
#include "../clip.cu"
#include "../glu.cu"
#include "../head.cu"
#include "../lora.cu"
#include "../lora_mma.cu"
#include "../nf4.cu"
#include "../nf4_product.cu"
#include "../norm.cu"
#include "../optimizer.cu"
#include "../quantized.cu"
#include "../rope.cu"
#include "../rows.cu"

#include <map>
#include <string>
#include <tuple>

namespace {

struct Shape {
    dim3 grid, block;
    size_t shared;
};
// A kernel by its parameters.
struct Entry {
    std::vector<size_t> sizes;
    // A launch of it, with copies of its arguments.
    std::function<std::function<void()>(const Shape&, void** args)> with;
};

template <class... A, size_t... I>
std::tuple<A...> copies(void** args, std::index_sequence<I...>) {
    return {*static_cast<A*>(args[I])...};
}

template <class... A>
Entry entry(void (*kernel)(A...)) {
    const auto with = [kernel](const Shape& shape, void** args) {
        return [=, args = copies<A...>(args, std::index_sequence_for<A...>{})] {
            emulate::launch(shape.grid, shape.block, shape.shared, [&] { std::apply(kernel, args); });
        };
    };
    return {{sizeof(A)...}, with};
}

const std::map<std::string, Entry>& kernels() {
#define ONE(name) {#name, entry(name)},
#define TYPED(name) ONE(name##_f32) ONE(name##_bf16) ONE(name##_f16)
#define HALF(name) ONE(name##_bf16) ONE(name##_f16)
#define HALVES(name) ONE(name##_bf16_d64) ONE(name##_bf16_d128) ONE(name##_bf16_d256) ONE(name##_f16_d64) ONE(name##_f16_d128) ONE(name##_f16_d256)
#define SIZED(name) ONE(name##_f32_d64) ONE(name##_f32_d128) ONE(name##_f32_d256) HALVES(name)
    static const std::map<std::string, Entry> all = {
        TYPED(rms_norm_fwd) TYPED(rms_norm_bwd) TYPED(layer_norm_fwd) TYPED(layer_norm_bwd)
        TYPED(rope) TYPED(glu_fwd) TYPED(glu_bwd) TYPED(activation_fwd) TYPED(activation_bwd)
        TYPED(clip_fwd) TYPED(clip_bwd) TYPED(cross_entropy) TYPED(transform_logits)
        TYPED(dropout) TYPED(add) TYPED(add_bias)
        ONE(add_f32_to_bf16) ONE(add_f32_to_f16) ONE(add_bf16_to_f32) ONE(add_f16_to_f32)
        HALF(lora_down) HALF(lora_up) HALF(lora_down_grad) HALF(lora_gradients)
        TYPED(gather_rows) TYPED(scatter_add_rows) TYPED(scale_rows) TYPED(dot_rows) TYPED(copy_rows)
        TYPED(nf4_quantize) TYPED(nf4_dequantize) TYPED(nf4_dequantize_double) TYPED(int8_dequantize) TYPED(int8_product)
        ONE(nf4_absmax_mean) ONE(nf4_quantize_absmax)
        TYPED(nf4_product) HALF(nf4_product_mma)
        HALF(nf4_product_many) HALF(nf4_product_many_backward)
        ONE(adamw_f32) ONE(sum_squares_f32) ONE(sum_partials_f32) ONE(scale_f32)
        SIZED(attention_fwd) SIZED(attention_bwd_dq) SIZED(attention_bwd_dkv) TYPED(attention_bwd_delta)
        HALVES(attention_mma_fwd) HALVES(attention_mma_bwd_dq) HALVES(attention_mma_bwd_dkv)
    };
    return all;
}

}  // namespace

// 0: done; 1: there is no such kernel; 2: its parameters are others. One launch at a time.
extern "C" int emulate_launch(const char* name, const unsigned grid[3], const unsigned block[2], size_t shared, void** args,
                              const unsigned char* sizes, size_t count) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    const Entry& kernel = found->second;
    if (!std::equal(sizes, sizes + count, kernel.sizes.begin(), kernel.sizes.end())) return 2;
    kernel.with({dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1]), shared}, args)();
    return 0;
}
