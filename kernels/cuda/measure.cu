// What benchmarks measure a layer against, and what they feed it with.
//
// moe_lora_noise_{bf16,f16}: signed noise, about normal, a function of (seed, index) alone.
// moe_lora_read: reads memory in order and keeps nothing; the bandwidth that no layer can exceed.
//
// Cost: every byte written, or read, once.
#include "mma/number.cuh"
#include "params.cuh"

namespace {

constexpr int kMeasureThreads = 512;
constexpr int kReadAhead = 8;  // 16-byte reads in flight a thread

// splitmix64.
__device__ __forceinline__ uint32_t random_bits(uint64_t index, uint32_t seed) {
    uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1b54a32d192ed03ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z ^ (z >> 31));
}

template <class T>
__device__ __forceinline__ void noise(const NoiseParams& p) {
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * kMeasureThreads;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kMeasureThreads + threadIdx.x; i < p.count; i += step) {
        const uint32_t bits = random_bits(i, p.seed);
        // The sum of four bytes has mean 510 and standard deviation 147.8; the rest spreads it between whole numbers.
        const int sum = static_cast<int>((bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24)) - 510;
        const float value = (sum + (static_cast<int>(bits % 251) - 125) * 0.004f) * (1.0f / 147.8f) * p.deviation;
        reinterpret_cast<T*>(p.out)[i] = narrow<T>(i % p.width < p.filled ? value : 0.0f);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kMeasureThreads) moe_lora_noise_bf16(const NoiseParams p) {
    noise<bf16>(p);
}

extern "C" __global__ void __launch_bounds__(kMeasureThreads) moe_lora_noise_f16(const NoiseParams p) {
    noise<f16>(p);
}

extern "C" __global__ void __launch_bounds__(kMeasureThreads) moe_lora_read(const ReadParams p) {
    const auto* from = reinterpret_cast<const uint4*>(p.from);
    const uint64_t count = p.bytes / 16, step = static_cast<uint64_t>(gridDim.x) * kMeasureThreads * kReadAhead;
    uint32_t all = 0;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kMeasureThreads * kReadAhead + threadIdx.x; i < count; i += step) {
        uint4 values[kReadAhead];
#pragma unroll
        for (int j = 0; j < kReadAhead; ++j) {
            const uint64_t at = i + j * kMeasureThreads;
            values[j] = __ldg(from + (at < count ? at : 0));
        }
#pragma unroll
        for (int j = 0; j < kReadAhead; ++j) all ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
    // Almost never true, but no compiler knows.
    if (all == 0x9e3779b9) *reinterpret_cast<uint32_t*>(p.sink) = all;
}
