// Matrix products of panels, in one fixed order: a result depends neither on the number of threads nor on where
// it lies, which no BLAS promises.
//
// Both factors are packed beforehand, depth first: `left` in panels of ROWS rows, `right` in panels of COLS
// columns, so that the innermost loop reads adjacent memory only. A block of BLOCK x BLOCK results stays in the
// cache while depth goes by.

#pragma once

#include <cstdlib>

#include "common.h"

namespace {

constexpr int64_t BLOCK = 128;  // rows and columns of a block
constexpr int64_t DEPTH = 256;  // of a pass: so much of a block's factors fits the second-level cache

#if defined(__AVX512F__)
constexpr int64_t VECTOR = 64, ROWS = 8;  // bytes of a register; ROWS * 2 of them hold the sums
#elif defined(__AVX__)
constexpr int64_t VECTOR = 32, ROWS = 4;
#else
constexpr int64_t VECTOR = 16, ROWS = 4;
#endif

template <class T>
constexpr int64_t LANES = VECTOR / (int64_t)sizeof(T);
template <class T>
constexpr int64_t COLS = 2 * LANES<T>;

// The one place where a product may be fused into a sum: these are not held against other backends bit by bit.
#if defined(__clang__)
#define DAQ_FUSE_HERE
#define DAQ_FUSE_BELOW _Pragma("clang fp contract(fast)")
#else
#define DAQ_FUSE_HERE __attribute__((optimize("fp-contract=fast")))
#define DAQ_FUSE_BELOW
#endif

// out[ROWS, COLS], BLOCK apart, += left[depth, ROWS]^T right[depth, COLS]
template <class T>
__attribute__((noinline)) DAQ_FUSE_HERE void multiply_panels(int64_t depth, const T* left, const T* right, T* out) {
    DAQ_FUSE_BELOW
    typedef T Lanes __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
    Lanes sums[ROWS][2] = {};
    for (int64_t k = 0; k < depth; ++k, left += ROWS, right += COLS<T>) {
        const Lanes one = *(const Lanes*)right, two = *(const Lanes*)(right + LANES<T>);
        for (int64_t row = 0; row < ROWS; ++row) {
            sums[row][0] += left[row] * one;
            sums[row][1] += left[row] * two;
        }
    }
    for (int64_t row = 0; row < ROWS; ++row, out += BLOCK) {
        *(Lanes*)out += sums[row][0];
        *(Lanes*)(out + LANES<T>) += sums[row][1];
    }
}

// A matrix in panels of so many rows (or columns), each with all of its depth; zeros fill up the last block. Memory
// that is never written, such as below the diagonal of a triangle, is never taken from the system.
template <class T, int64_t WIDTH>
struct Panels {
    int64_t depth;
    std::unique_ptr<void, decltype(&std::free)> data;

    Panels(int64_t count, int64_t depth)
        : depth(depth), data(std::calloc(ceil_div(count, BLOCK) * BLOCK * depth + 1, sizeof(T)), std::free) {
        if (!data) throw std::bad_alloc();
    }

    T* at(uint64_t index, int64_t k) const {
        return (T*)data.get() + (index / WIDTH * depth + k) * WIDTH + index % WIDTH;
    }
};

template <class T>
using Left = Panels<T, ROWS>;
template <class T>
using Right = Panels<T, COLS<T>>;

// out[size, size], BLOCK apart, += the products of so many rows of `left`, from i, with as many columns of `right`,
// from j, over the depths from `first` to `last`. `size` is a multiple of ROWS and COLS.
template <class T>
void multiply(const Left<T>& left, int64_t i, const Right<T>& right, int64_t j, int64_t size, int64_t first,
              int64_t last, T* out) {
    for (int64_t k = first; k < last; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, last - k);
        for (int64_t col = 0; col < size; col += COLS<T>)
            for (int64_t row = 0; row < size; row += ROWS)
                multiply_panels(depth, left.at(i + row, k), right.at(j + col, k), out + row * BLOCK + col);
    }
}

}  // namespace
