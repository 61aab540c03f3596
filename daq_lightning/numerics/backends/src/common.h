// What the CPU kernels share: reading a weight in pieces that fit the first-level cache, rounding to the grid
// of a format, and handing out work to threads.
//
// Rounding to the grid is one float32 addition: x + 1.5 * 2^(e + 23 - bits), where `bits` are those of the
// mantissa and 2^e is the binade of x (at least that of the smallest normal number), has no bits below 2^(e -
// bits), and the addition itself rounds to nearest, ties to even. That needs a compiler which neither
// reassociates nor fuses products into sums on its own (-ffp-contract=off).
//
// A weight is cut into cells (groups that share a scale) and a cell into chunks. A unit of work owns its
// outputs, so results do not depend on the number of threads. Loops over elements are plain, for the compiler
// to vectorize: measured, that is as fast as intrinsics and runs on any processor.
//
// Legend: M out, N in, G groups, C chunks of a group, K candidates.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int32_t EXPONENT = 0x7f800000, MAGNITUDE = 0x7fffffff;

#define DAQ_INLINE inline __attribute__((always_inline))

inline int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }
inline float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }

inline float from_half(uint16_t half) {
    // the product rebases the exponent and normalizes subnormals; exponent 31 is infinity or NaN
    const int32_t size = bits_of(float_of((half & 0x7fff) << 13) * 0x1p112f);
    return float_of(size | (int32_t)((uint32_t)(half & 0x8000) << 16) | ((half & 0x7c00) == 0x7c00 ? EXPONENT : 0));
}

}  // namespace

extern "C" {

// A contiguous array, as Python hands it over.
struct Array {
    void* data;
    int64_t bytes;
};

// A matrix whose columns are adjacent.
struct Matrix {
    const void* data;
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    int64_t stride;
    int64_t bytes;  // from data to the end of its memory
};

// A grid of numbers; see ../../formats.
struct Format {
    double max, low, reach, min_normal;
    int64_t mantissa_bits;
    int64_t storage;  // a Storage
};

// How codes lie in memory: as floating point numbers of their own format, as E4M3, or as integers of 8 bits.
enum Storage { OWN = 0, E4M3 = 1, INTEGER = 2 };

// Numbered as METRICS in ../../search/settings.py.
enum Metric { SIGN = 0, COSINE = 1, MSE = 2, HYBRID = 3 };

// How cells and chunks cover a weight.
struct Plan {
    int64_t M, N, cell_rows, cell_cols, chunk_rows, chunk_cols;
};
}

namespace {

// The grid of a format. Loops copy it: what they write could change it otherwise, as far as the compiler
// knows.
struct Grid {
    float max, low, reach;
    int32_t min_normal;  // bits of the smallest normal number
    int32_t shift;       // from float32's mantissa to the format's
    int32_t to_magic;    // bits of 2^e -> bits of 1.5 * 2^(e + shift)
    Storage storage;

    explicit Grid(const Format& format)
        : max((float)format.max),
          low((float)format.low),
          reach((float)format.reach),
          min_normal(bits_of((float)format.min_normal)),
          shift(23 - (int32_t)format.mantissa_bits),
          to_magic(shift << 23 | 1 << 22),
          storage((Storage)format.storage) {}

    // Of a floating point format.
    Grid(double max, double min_normal, int64_t mantissa_bits)
        : Grid(Format{max, -max, max, min_normal, mantissa_bits, OWN}) {}

    // Of codes less a zero point.
    Grid less(int32_t zero) const {
        Grid grid = *this;
        grid.max -= (float)zero;
        grid.low -= (float)zero;
        return grid;
    }

    float saturate(float x) const { return std::max(std::min(x, max), low); }
    int32_t magic(float x) const { return std::max(bits_of(x) & EXPONENT, min_normal) + to_magic; }
    float round(float x) const {
        const float m = float_of(magic(x));
        return (x + m) - m;
    }
};

DAQ_INLINE void read(const Matrix& matrix, int64_t row, int64_t col, int64_t count, float* out) {
    const int64_t offset = row * matrix.stride + col;
    const uint16_t* half = (const uint16_t*)matrix.data + offset;
    if (matrix.dtype == 0) {
        std::memcpy(out, (const float*)matrix.data + offset, 4 * count);
    } else if (matrix.dtype == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = float_of((int32_t)((uint32_t)half[i] << 16));
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = from_half(half[i]);
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Region {
    int64_t row, col, rows, cols;
};

struct Cover : Plan {
    explicit Cover(const Plan& plan) : Plan(plan) {}
    int64_t grid_cols() const { return ceil_div(N, cell_cols); }
    int64_t groups() const { return ceil_div(M, cell_rows) * grid_cols(); }
    int64_t chunks_across() const { return ceil_div(cell_cols, chunk_cols); }
    int64_t chunks() const { return ceil_div(cell_rows, chunk_rows) * chunks_across(); }
    int64_t items() const { return groups() * chunks(); }

    Region cell(int64_t group) const {
        const int64_t row = group / grid_cols() * cell_rows, col = group % grid_cols() * cell_cols;
        return {row, col, std::min(cell_rows, M - row), std::min(cell_cols, N - col)};
    }

    // The chunk's part of the weight: empty where a ragged cell ends before it.
    Region region(int64_t item) const {
        const int64_t group = item / chunks(), chunk = item % chunks();
        const int64_t top = group / grid_cols() * cell_rows, left = group % grid_cols() * cell_cols;
        const int64_t row = top + chunk / chunks_across() * chunk_rows, col = left + chunk % chunks_across() * chunk_cols;
        const int64_t rows = std::min({chunk_rows, top + cell_rows - row, M - row});
        const int64_t cols = std::min({chunk_cols, left + cell_cols - col, N - col});
        return rows > 0 && cols > 0 ? Region{row, col, rows, cols} : Region{0, 0, 0, 0};
    }
};

// The first thing that is wrong with the arguments of an entry point. Entry points return it, or nullptr:
// what they are given comes from another language, and writing past a buffer there is a crash somewhere else,
// much later.
struct Check {
    static constexpr int64_t MOST = (int64_t)1 << 40;  // elements: sizes and offsets in bytes stay far from overflow
    Cover cover{Plan{1, 1, 1, 1, 1, 1}};               // of the plan, if that can be trusted
    const char* problem = nullptr;

    Check(const Plan& p, int64_t threads) {
        need(threads >= 1 && threads <= 1 << 16, "the number of threads");
        const bool sizes = p.M >= 1 && p.M <= MOST && p.N >= 1 && p.N <= MOST / p.M;
        const bool cells = p.cell_rows >= 1 && p.cell_rows <= p.M && p.cell_cols >= 1 && p.cell_cols <= p.N;
        const bool chunks = p.chunk_rows >= 1 && p.chunk_rows <= p.cell_rows && p.chunk_cols >= 1 && p.chunk_cols <= p.cell_cols;
        need(sizes && cells && chunks, "the sizes of the weight, its groups and their chunks");
        if (sizes && cells && chunks) cover = Cover(p);
    }

    void need(bool fine, const char* what) {
        if (!problem && !fine) problem = what;
    }

    void matrix(const Matrix& m, const char* what) {
        need(m.dtype >= 0 && m.dtype <= 2, what);
        const int64_t item = m.dtype == 0 ? 4 : 2, elements = m.bytes / item;
        need(m.data && (uintptr_t)m.data % item == 0 && m.stride >= 0 && elements >= cover.N, what);
        need(m.stride == 0 || cover.M - 1 <= (elements - cover.N) / m.stride, what);
    }

    void format(const Format& f) {
        int exponent;
        need(f.max > 0 && f.max <= 0x1p100 && f.mantissa_bits >= 1 && f.mantissa_bits <= 6, "the format");
        need(f.min_normal >= 0x1p-100 && f.min_normal < 2 * f.max && std::frexp(f.min_normal, &exponent) == 0.5, "the format");
        need(f.low < 0 && f.low >= -2 * f.max && f.reach >= f.max && f.reach <= 3 * f.max, "the format");
        need(f.storage >= OWN && f.storage <= INTEGER, "the format");
        need(f.storage != INTEGER || (f.max <= 127 && f.low >= -128), "the format");
        need(f.storage != E4M3 || (f.max <= 448 && f.low >= -448), "the format");
    }

    // Exactly so many: twice the bytes are as wrong as half of them, since then it holds something else.
    template <class T>
    void array(const Array& a, int64_t count, const char* what) {
        need(count >= 0 && count <= 16 * MOST && a.bytes == count * (int64_t)sizeof(T), what);
        need(count == 0 || (a.data && (uintptr_t)a.data % alignof(T) == 0), what);
    }

    // Zero points, or none at all; codes of the format.
    void zeros(const Array& a, int64_t count, const Format& f) {
        if (!a.bytes) return;
        need(f.storage == INTEGER, "zero points of this format");
        array<int8_t>(a, count, "zero points");
        for (int64_t i = 0; !problem && i < count; ++i) {
            const double zero = ((const int8_t*)a.data)[i];
            need(zero >= f.low && zero <= f.max, "zero points");
        }
    }

    // Indices below K.
    void order(const Array& a, int64_t K) {
        array<int64_t>(a, K, "the order");
        for (int64_t k = 0; !problem && k < K; ++k) {
            const int64_t index = ((const int64_t*)a.data)[k];
            need(index >= 0 && index < K, "the order");
        }
    }

    // Does the work if nothing is wrong. No exception may leave for C.
    template <class Work>
    const char* then(const Work& work) const {
        if (problem) return problem;
        try {
            work();
        } catch (...) {
            return "out of memory";
        }
        return nullptr;
    }
};

// Every thread makes one worker and calls it with one item after the other. Throws if one of them did.
template <class MakeWorker>
void parallel(int64_t items, int64_t threads, const MakeWorker& make_worker) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto run = [&] {
        try {
            auto worker = make_worker();
            for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) worker(item);
        } catch (...) {  // leaving a thread, an exception would end the process
            failed = true;
        }
    };
    std::vector<std::thread> others;
    others.reserve(std::min(threads, items));
    try {
        for (int64_t i = 1; i < std::min(threads, items); ++i) others.emplace_back(run);
    } catch (...) {  // the system has no more threads: those that there are do the work
    }
    run();
    for (auto& other : others) other.join();
    if (failed) throw std::bad_alloc();
}

// Up to 1,008 elements in float32: so few that three counts of them fit 32 bits.
struct alignas(64) Piece {
    static constexpr int64_t SIZE = 1008;
    float w[SIZE], b[SIZE];
    int64_t count;

    void extremes(float& smallest, float& largest) const {
        for (int64_t i = 0; i < count; ++i) smallest = std::min(smallest, w[i]), largest = std::max(largest, w[i]);
    }

    int32_t largest_bits() const {  // of |w|; those of NaN and infinity are the largest
        int32_t high = 0;
        for (int64_t i = 0; i < count; ++i) high = std::max(high, bits_of(w[i]) & MAGNITUDE);
        return high;
    }
};

// Fills one piece after the other, of about equal sizes, and calls use() for each, which may move on to
// another one.
template <class APiece, class Use>
void each(APiece*& piece, const Region& region, const Matrix& weight, const Matrix* base, const Use& use) {
    const int64_t elements = region.rows * region.cols, pieces = ceil_div(elements, Piece::SIZE);
    const int64_t size = pieces ? std::min(Piece::SIZE, ceil_div(ceil_div(elements, pieces), 16) * 16) : 0;
    piece->count = 0;
    for (int64_t row = region.row; row < region.row + region.rows; ++row) {
        for (int64_t done = 0; done < region.cols;) {
            const int64_t run = std::min(region.cols - done, size - piece->count);
            read(weight, row, region.col + done, run, piece->w + piece->count);
            if (base) read(*base, row, region.col + done, run, piece->b + piece->count);
            done += run;
            piece->count += run;
            if (piece->count == size) {
                use();
                piece->count = 0;
            }
        }
    }
    if (piece->count) use();
}

// The floating point code of the nearest value, of one within the range.
inline uint8_t code_of(float x, const Grid& grid) {
    const float size = float_of(bits_of(x) & MAGNITUDE);
    const int32_t m = grid.magic(x), steps = bits_of(size + float_of(m)) - m;   // of 2^(e - bits)
    const int32_t below = (m - grid.to_magic - grid.min_normal) >> grid.shift;  // codes below the binade
    return (uint8_t)((below + steps) | ((bits_of(x) >> 24) & 0x80));
}

const Grid OF_E4M3{448, 0x1p-6, 3};

// One row of codes, a few elements at a time.
inline void encode(const float* w, int64_t count, float reciprocal, const Grid grid, uint8_t* codes, int32_t zero = 0) {
    if (grid.storage == INTEGER) {
        const Grid whole = grid.less(zero);
        for (int64_t i = 0; i < count; ++i)
            codes[i] = (uint8_t)((int32_t)whole.round(whole.saturate(w[i] * reciprocal)) + zero);
    } else if (grid.storage == E4M3) {
        const Grid stored = OF_E4M3;
        for (int64_t i = 0; i < count; ++i) {
            const float x = grid.saturate(w[i] * reciprocal), size = std::fabs(grid.round(x));
            codes[i] = (uint8_t)(code_of(size, stored) | ((bits_of(x) >> 24) & 0x80));  // also of -0
        }
    } else {
        for (int64_t i = 0; i < count; ++i) codes[i] = code_of(grid.saturate(w[i] * reciprocal), grid);
    }
}

}  // namespace
