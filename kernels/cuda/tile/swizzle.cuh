// Tiles in shared memory: rows of 64 numbers (128 bytes) whose 16-byte chunks are permuted by the row, so that both the
// copies that fill a tile (by row) and ldmatrix (by column) touch every bank once.
#pragma once
#include <cstdint>

constexpr int kTileDepth = 64;  // numbers of k in a stage
constexpr int kTileRowBytes = kTileDepth * 2;

// Byte offset of a chunk (8 numbers) of a row.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * kTileRowBytes + ((chunk ^ (row & 7)) << 4);
}
