// wgmma: c[64, N] += a[64, 16] b[16, N] by one warpgroup, both operands 16-bit tiles in shared memory, the sum in f32 registers.
//
// Tiles are rows of 64 numbers along k (128 bytes), permuted as tile/swizzle.cuh and the tensor maps do, in groups of eight rows;
// a tile begins at a multiple of 1024 bytes. The next 16 of k are 32 bytes further: descriptor + 2.
// With w the warp of the group, g = lane / 4 and t = lane % 4, a lane holds of every 8 columns j
//   c[4 j ..]: (16 w + g, 8 j + 2 t), (.., + 1), (16 w + g + 8, 8 j + 2 t), (.., + 1)      as mma does for rows 16 w ..
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Before the first product, and after registers that products use were written by anything else.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` committed groups are running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Of a tile at a shared address: rows of 128 bytes, 1024 bytes from eight rows to the next eight, swizzled by 128 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared) {
    return static_cast<uint64_t>((shared & 0x3ffff) >> 4) | 1ull << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

template <class T, int N>
struct Wgmma;

// The registers of N columns: names %0 .. and the numbers they stand for.
#define WGMMA_NAMES_8 "%0,%1,%2,%3"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 "," "%4,%5,%6,%7"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 "," "%8,%9,%10,%11"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 "," "%12,%13,%14,%15"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 "," "%16,%17,%18,%19"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 "," "%20,%21,%22,%23"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 "," "%24,%25,%26,%27"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 "," "%28,%29,%30,%31"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 "," "%32,%33,%34,%35"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 "," "%36,%37,%38,%39"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 "," "%40,%41,%42,%43"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 "," "%44,%45,%46,%47"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 "," "%48,%49,%50,%51"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 "," "%52,%53,%54,%55"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 "," "%56,%57,%58,%59"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 "," "%60,%61,%62,%63"
#define WGMMA_NAMES_136 WGMMA_NAMES_128 "," "%64,%65,%66,%67"
#define WGMMA_NAMES_144 WGMMA_NAMES_136 "," "%68,%69,%70,%71"
#define WGMMA_NAMES_152 WGMMA_NAMES_144 "," "%72,%73,%74,%75"
#define WGMMA_NAMES_160 WGMMA_NAMES_152 "," "%76,%77,%78,%79"
#define WGMMA_NAMES_168 WGMMA_NAMES_160 "," "%80,%81,%82,%83"
#define WGMMA_NAMES_176 WGMMA_NAMES_168 "," "%84,%85,%86,%87"
#define WGMMA_NAMES_184 WGMMA_NAMES_176 "," "%88,%89,%90,%91"
#define WGMMA_NAMES_192 WGMMA_NAMES_184 "," "%92,%93,%94,%95"
#define WGMMA_NAMES_200 WGMMA_NAMES_192 "," "%96,%97,%98,%99"
#define WGMMA_NAMES_208 WGMMA_NAMES_200 "," "%100,%101,%102,%103"
#define WGMMA_NAMES_216 WGMMA_NAMES_208 "," "%104,%105,%106,%107"
#define WGMMA_NAMES_224 WGMMA_NAMES_216 "," "%108,%109,%110,%111"
#define WGMMA_NAMES_232 WGMMA_NAMES_224 "," "%112,%113,%114,%115"
#define WGMMA_NAMES_240 WGMMA_NAMES_232 "," "%116,%117,%118,%119"
#define WGMMA_NAMES_248 WGMMA_NAMES_240 "," "%120,%121,%122,%123"
#define WGMMA_NAMES_256 WGMMA_NAMES_248 "," "%124,%125,%126,%127"
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_8 WGMMA_FOUR(0)
#define WGMMA_SUMS_16 WGMMA_SUMS_8, WGMMA_FOUR(4)
#define WGMMA_SUMS_24 WGMMA_SUMS_16, WGMMA_FOUR(8)
#define WGMMA_SUMS_32 WGMMA_SUMS_24, WGMMA_FOUR(12)
#define WGMMA_SUMS_40 WGMMA_SUMS_32, WGMMA_FOUR(16)
#define WGMMA_SUMS_48 WGMMA_SUMS_40, WGMMA_FOUR(20)
#define WGMMA_SUMS_56 WGMMA_SUMS_48, WGMMA_FOUR(24)
#define WGMMA_SUMS_64 WGMMA_SUMS_56, WGMMA_FOUR(28)
#define WGMMA_SUMS_72 WGMMA_SUMS_64, WGMMA_FOUR(32)
#define WGMMA_SUMS_80 WGMMA_SUMS_72, WGMMA_FOUR(36)
#define WGMMA_SUMS_88 WGMMA_SUMS_80, WGMMA_FOUR(40)
#define WGMMA_SUMS_96 WGMMA_SUMS_88, WGMMA_FOUR(44)
#define WGMMA_SUMS_104 WGMMA_SUMS_96, WGMMA_FOUR(48)
#define WGMMA_SUMS_112 WGMMA_SUMS_104, WGMMA_FOUR(52)
#define WGMMA_SUMS_120 WGMMA_SUMS_112, WGMMA_FOUR(56)
#define WGMMA_SUMS_128 WGMMA_SUMS_120, WGMMA_FOUR(60)
#define WGMMA_SUMS_136 WGMMA_SUMS_128, WGMMA_FOUR(64)
#define WGMMA_SUMS_144 WGMMA_SUMS_136, WGMMA_FOUR(68)
#define WGMMA_SUMS_152 WGMMA_SUMS_144, WGMMA_FOUR(72)
#define WGMMA_SUMS_160 WGMMA_SUMS_152, WGMMA_FOUR(76)
#define WGMMA_SUMS_168 WGMMA_SUMS_160, WGMMA_FOUR(80)
#define WGMMA_SUMS_176 WGMMA_SUMS_168, WGMMA_FOUR(84)
#define WGMMA_SUMS_184 WGMMA_SUMS_176, WGMMA_FOUR(88)
#define WGMMA_SUMS_192 WGMMA_SUMS_184, WGMMA_FOUR(92)
#define WGMMA_SUMS_200 WGMMA_SUMS_192, WGMMA_FOUR(96)
#define WGMMA_SUMS_208 WGMMA_SUMS_200, WGMMA_FOUR(100)
#define WGMMA_SUMS_216 WGMMA_SUMS_208, WGMMA_FOUR(104)
#define WGMMA_SUMS_224 WGMMA_SUMS_216, WGMMA_FOUR(108)
#define WGMMA_SUMS_232 WGMMA_SUMS_224, WGMMA_FOUR(112)
#define WGMMA_SUMS_240 WGMMA_SUMS_232, WGMMA_FOUR(116)
#define WGMMA_SUMS_248 WGMMA_SUMS_240, WGMMA_FOUR(120)
#define WGMMA_SUMS_256 WGMMA_SUMS_248, WGMMA_FOUR(124)

#define WGMMA_OF(type, name, n, a, b)                                                                                   \
    template <>                                                                                                         \
    struct Wgmma<type, n> {                                                                                             \
        static __device__ __forceinline__ void mma(float* d, uint64_t left, uint64_t right) {                           \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name " {" WGMMA_NAMES_##n "}, " a ", " b       \
                         ", 1, 1, 1, 0, 0;"                                                                             \
                         : WGMMA_SUMS_##n                                                                               \
                         : "l"(left), "l"(right));                                                                      \
        }                                                                                                               \
    };
#define WGMMA(n, a, b) WGMMA_OF(__nv_bfloat16, "bf16.bf16", n, a, b) WGMMA_OF(__half, "f16.f16", n, a, b)

WGMMA(8, "%4", "%5")
WGMMA(16, "%8", "%9")
WGMMA(24, "%12", "%13")
WGMMA(32, "%16", "%17")
WGMMA(40, "%20", "%21")
WGMMA(48, "%24", "%25")
WGMMA(56, "%28", "%29")
WGMMA(64, "%32", "%33")
WGMMA(72, "%36", "%37")
WGMMA(80, "%40", "%41")
WGMMA(88, "%44", "%45")
WGMMA(96, "%48", "%49")
WGMMA(104, "%52", "%53")
WGMMA(112, "%56", "%57")
WGMMA(120, "%60", "%61")
WGMMA(128, "%64", "%65")
WGMMA(136, "%68", "%69")
WGMMA(144, "%72", "%73")
WGMMA(152, "%76", "%77")
WGMMA(160, "%80", "%81")
WGMMA(168, "%84", "%85")
WGMMA(176, "%88", "%89")
WGMMA(184, "%92", "%93")
WGMMA(192, "%96", "%97")
WGMMA(200, "%100", "%101")
WGMMA(208, "%104", "%105")
WGMMA(216, "%108", "%109")
WGMMA(224, "%112", "%113")
WGMMA(232, "%116", "%117")
WGMMA(240, "%120", "%121")
WGMMA(248, "%124", "%125")
WGMMA(256, "%128", "%129")

#undef WGMMA
#undef WGMMA_OF
