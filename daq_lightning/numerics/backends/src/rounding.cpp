// Rounding with curvature: the walk of ../../rounding/definition.py over blocks, with matrix products for the
// sums over the blocks before, element by element within a block.
//
//     block (I, J)      R = E[I, :J] A_in[:J, J]    C = A_out[:I, I]^T (E + R)[:I, J]
//     element (i, j)    R[i, j + 1:] += e_ij A_in[j, j + 1:]    C[i + 1:, j] += (e_ij + R_ij) A_out[i, i + 1:]
//
// A block waits for the one above and the one to the left, and blocks are handed out along diagonals: no thread
// waits for a block that nobody works on. All sums are taken in one order, so the codes do not depend on the
// number of threads.
//
// Legend: M out, N in, K the size of a side.

#include <numeric>

#include "matmul.h"

extern "C" {

// The curvature of one side: H[order][:, order] = A diag(d) A^T. An empty A stands for the identity.
struct Side {
    Array order;       // int64 [K]
    Array unit_upper;  // float32 [K, K]
    Array diagonal;    // float64 [K]
};
}

namespace {

constexpr int64_t GROUP = 8;  // columns that are mixed into one where a part of nearest's loss may do
constexpr int64_t CELL = 32;  // rows and columns of a block that are walked by elements
constexpr int64_t SKEW = 4;   // rows that are walked together, each one element behind the row above
static_assert(BLOCK % CELL == 0 && CELL % COLS<float> == 0 && CELL % ROWS == 0, "cells are multiplied as well");

struct OpenSide {
    const int64_t size, blocks;
    const int64_t* order;
    const float* upper;  // null for the identity
    const double* d;
    Right<float> panels;  // A

    OpenSide(const Side& side, int64_t size, int64_t threads)
        : size(size),
          blocks(ceil_div(size, BLOCK)),
          order((const int64_t*)side.order.data),
          upper(side.unit_upper.bytes ? (const float*)side.unit_upper.data : nullptr),
          d((const double*)side.diagonal.data),
          panels(upper ? size : 0, size) {
        if (!upper) return;
        parallel(blocks, threads, [&] {
            return [&](int64_t block) {  // of columns: nothing below the diagonal is read
                const int64_t end = std::min((block + 1) * BLOCK, size);
                for (int64_t col = block * BLOCK; col < end; col += COLS<float>)
                    for (int64_t k = 0; k < end; ++k)
                        std::memcpy(panels.at(col, k), upper + k * size + col, 4 * std::min(COLS<float>, end - col));
            };
        });
    }

    int64_t length(int64_t block) const { return std::min(BLOCK, size - block * BLOCK); }

    // Above the diagonal of a diagonal block, zeros elsewhere.
    void diagonal_block(int64_t block, float* out) const {
        std::memset(out, 0, 4 * BLOCK * BLOCK);
        const int64_t start = block * BLOCK, count = length(block);
        for (int64_t row = 0; upper && row + 1 < count; ++row) {
            const float* from = upper + (start + row) * size + start;
            std::memcpy(out + row * BLOCK + row + 1, from + row + 1, 4 * (count - row - 1));
        }
    }
};

// What a thread holds of the block it works on.
struct alignas(64) Tile {
    float along[BLOCK * BLOCK];  // R, by rows
    float down[BLOCK * BLOCK];   // C, by columns
    float a_in[BLOCK * BLOCK], a_out[BLOCK * BLOCK];
    float w[BLOCK * BLOCK], scale[BLOCK * BLOCK], reciprocal[BLOCK * BLOCK];
    int8_t zero[BLOCK * BLOCK] = {};
};

// sums += factor * row from `start` to the end of its cell; before `start` the row is zero.
inline void add_from(int64_t start, float factor, const float* row, float* sums) {
    for (int64_t k = start / 16 * 16; k < ceil_div(start, CELL) * CELL; k += 16)
        for (int64_t lane = 0; lane < 16; ++lane) sums[k + lane] += factor * row[k + lane];
}

struct Walk {
    const Matrix& weight;
    const Cover& cover;
    const Grid grid;
    const float* scale_G;
    const int8_t* zero_G;  // null for none
    const OpenSide &in, &out;
    uint8_t* codes;
    const Left<float> errors;              // w, which e replaces: rows of the weight, columns as depth
    const Left<float> moved;               // e + R: columns of the weight, rows as depth
    std::vector<double> losses;            // of blocks
    std::vector<std::atomic<bool>> ready;  // blocks

    Walk(const Matrix& weight, const Cover& cover, const Grid& grid, const float* scale_G, const int8_t* zero_G,
         const OpenSide& in, const OpenSide& out, uint8_t* codes)
        : weight(weight), cover(cover), grid(grid), scale_G(scale_G), zero_G(zero_G), in(in), out(out), codes(codes),
          errors(cover.M, cover.N),
          moved(out.upper ? cover.N : 0, cover.M),
          losses(in.blocks * out.blocks), ready(in.blocks * out.blocks) {}

    // The weights in the order of the walk, or the errors of nearest rounding.
    void fill(bool of_nearest, int64_t threads) const {
        parallel(cover.M, threads, [&] {
            return [&, of_row = std::vector<float>(cover.N)](int64_t i) mutable {
                const int64_t row = out.order[i];
                const int64_t first_group = row / cover.cell_rows * cover.grid_cols();
                read(weight, row, 0, cover.N, of_row.data());
                for (int64_t first = 0; of_nearest && first < cover.N; first += cover.cell_cols) {
                    const int64_t group = first_group + first / cover.cell_cols;
                    const Grid less = grid.less(zero_G ? zero_G[group] : 0);
                    const float s = scale_G[group], reciprocal = 1.0f / s;
                    for (int64_t col = first; col < std::min(first + cover.cell_cols, cover.N); ++col)
                        of_row[col] -= less.round(less.saturate(of_row[col] * reciprocal)) * s;
                }
                for (int64_t j = 0; j < cover.N; ++j) *errors.at(i, j) = of_row[in.order[j]];
            };
        });
    }

    // The loss of nearest rounding, or a part of it: the columns of A_out^T E A_in diag(d_in)^(1/2) are mixed in groups
    // of so many, with signs like those of a coin, (sum of +- columns) / sqrt(group). That is a projection, so the part
    // is never more than the whole; and `group` times the part is the whole but for the luck of the signs.
    double nearest_loss(int64_t group, int64_t threads) const {
        const int64_t width = ceil_div(cover.N, group), blocks = ceil_div(width, BLOCK);
        std::vector<float> factor(cover.N);
        for (int64_t j = 0; j < cover.N; ++j) {
            const uint64_t coin = ((uint64_t)j + 1) * 0x9e3779b97f4a7c15u;
            const float size = (float)std::sqrt(in.d[j] / (double)group);
            factor[j] = __builtin_parityll(coin ^ coin >> 29) ? -size : size;
        }
        const Right<float> mixed(in.upper ? width : 0, cover.N);
        parallel(in.upper ? cover.N : 0, threads, [&] {
            return [&](int64_t k) {
                for (int64_t j = k; j < cover.N; ++j) *mixed.at(j % width, k) += factor[j] * in.upper[k * cover.N + j];
            };
        });
        std::vector<double> parts(blocks);
        parallel(blocks, threads, [&] {
            return [&, tile = std::make_unique<Tile>(), strip = Left<float>(BLOCK, cover.M)](int64_t item) {
                const int64_t left = item * BLOCK, cols = std::min(BLOCK, width - left);
                const int64_t depth = std::min(cover.N, (group - 1) * width + left + cols);  // A_in is triangular
                for (int64_t top = 0; top < cover.M; top += BLOCK) {
                    const int64_t rows = std::min(BLOCK, cover.M - top);
                    std::fill(tile->along, tile->along + BLOCK * BLOCK, 0.0f);
                    std::fill(tile->down, tile->down + BLOCK * BLOCK, 0.0f);
                    if (in.upper) multiply(errors, top, mixed, left, BLOCK, 0, depth, tile->along);
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t j = 0; j < cols; ++j) {
                            float& sum = tile->along[i * BLOCK + j];
                            for (int64_t col = left + j; !in.upper && col < cover.N; col += width)
                                sum += factor[col] * *errors.at(top + i, col);
                            *strip.at(j, top + i) = sum;
                            if (!out.upper) tile->down[j * BLOCK + i] = sum;
                        }
                    if (out.upper) multiply(strip, 0, out.panels, top, BLOCK, 0, top + rows, tile->down);
                    for (int64_t j = 0; j < cols; ++j)
                        for (int64_t i = 0; i < rows; ++i) {
                            const double rest = tile->down[j * BLOCK + i];
                            parts[item] += out.d[top + i] * rest * rest;
                        }
                }
            };
        });
        return std::accumulate(parts.begin(), parts.end(), 0.0);
    }

    void wait_for(int64_t I, int64_t J) const {
        if (I < 0 || J < 0) return;
        while (!ready[I * in.blocks + J].load(std::memory_order_acquire)) std::this_thread::yield();
    }

    void block(int64_t I, int64_t J, Tile& tile) {
        const int64_t top = I * BLOCK, left = J * BLOCK, rows = out.length(I), cols = in.length(J);
        open(top, left, rows, cols, tile);
        in.diagonal_block(J, tile.a_in);
        out.diagonal_block(I, tile.a_out);
        std::fill(tile.along, tile.along + BLOCK * BLOCK, 0.0f);
        std::fill(tile.down, tile.down + BLOCK * BLOCK, 0.0f);
        wait_for(I, J - 1);
        if (in.upper) multiply(errors, top, in.panels, left, BLOCK, 0, left, tile.along);
        wait_for(I - 1, J);
        if (out.upper) multiply(moved, left, out.panels, top, BLOCK, 0, top, tile.down);
        double loss = 0;
        for (int64_t i = 0; i < rows; i += CELL)
            for (int64_t j = 0; j < cols; j += CELL)
                loss += cell(i, std::min(i + CELL, rows), j, std::min(j + CELL, cols), top, left, tile);
        losses[I * in.blocks + J] = loss;
        ready[I * in.blocks + J].store(true, std::memory_order_release);
        close(top, left, rows, cols, tile);
    }

    // Some rows and columns of a block, after those above and to the left; their loss.
    double cell(int64_t i, int64_t i_end, int64_t j, int64_t j_end, int64_t top, int64_t left, Tile& tile) const {
        if (in.upper) multiply(errors, top + i, in.panels, left + j, CELL, left, left + j, tile.along + i * BLOCK + j);
        if (out.upper) multiply(moved, left + j, out.panels, top + i, CELL, top, top + i, tile.down + j * BLOCK + i);
        double loss = 0;
        for (int64_t first = i; first < i_end; first += SKEW)
            for (int64_t step = j; step < j_end + SKEW - 1; ++step)
                for (int64_t row = first; row < std::min(first + SKEW, i_end); ++row) {
                    const int64_t col = step - (row - first);
                    if (col < j || col >= j_end) continue;
                    loss += out.d[top + row] * in.d[left + col] * round(row, col, top, left, tile);
                }
        return loss;
    }

    // Weights, scales and their reciprocals of a block.
    void open(int64_t top, int64_t left, int64_t rows, int64_t cols, Tile& tile) const {
        int64_t group[BLOCK];
        for (int64_t j = 0; j < cols; ++j) group[j] = in.order[left + j] / cover.cell_cols;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = out.order[top + i], of_row = row / cover.cell_rows * cover.grid_cols();
            for (int64_t j = 0; j < cols; ++j) {
                tile.w[i * BLOCK + j] = *errors.at(top + i, left + j);
                tile.scale[i * BLOCK + j] = scale_G[of_row + group[j]];
            }
            for (int64_t j = 0; zero_G && j < cols; ++j) tile.zero[i * BLOCK + j] = zero_G[of_row + group[j]];
            for (int64_t j = 0; j < cols; ++j) tile.reciprocal[i * BLOCK + j] = 1.0f / tile.scale[i * BLOCK + j];
        }
    }

    // One element. Returns (e + R + C)^2, its part of the loss.
    double round(int64_t i, int64_t j, int64_t top, int64_t left, Tile& tile) const {
        const int64_t here = i * BLOCK + j;
        const float w = tile.w[here], along = tile.along[here], down = tile.down[j * BLOCK + i];
        const float scaled = (w + (along + down)) * tile.reciprocal[here];
        const Grid less = grid.less(tile.zero[here]);
        const float error = w - less.round(less.saturate(scaled)) * tile.scale[here], both = error + along;
        tile.w[here] = scaled;
        if (in.upper) {
            *errors.at(top + i, left + j) = error;
            add_from(j + 1, error, tile.a_in + j * BLOCK, tile.along + i * BLOCK);
        }
        if (out.upper) {
            *moved.at(left + j, top + i) = both;
            add_from(i + 1, both, tile.a_out + i * BLOCK, tile.down + j * BLOCK);
        }
        const double rest = both + down;
        return rest * rest;
    }

    // The codes of a block, whose weights have become those that were rounded, divided by their scales.
    void close(int64_t top, int64_t left, int64_t rows, int64_t cols, const Tile& tile) const {
        uint8_t of_row[BLOCK];
        for (int64_t i = 0; i < rows; ++i) {
            encode(tile.w + i * BLOCK, cols, 1.0f, grid, of_row);
            for (int64_t j = 0; zero_G && j < cols; ++j)
                encode(tile.w + i * BLOCK + j, 1, 1.0f, grid, of_row + j, tile.zero[i * BLOCK + j]);
            uint8_t* to = codes + out.order[top + i] * cover.N;
            for (int64_t j = 0; j < cols; ++j) to[in.order[left + j]] = of_row[j];
        }
    }
};

}  // namespace

extern "C" {

// codes: uint8 [M, N]; losses: float64 [3]: of the codes, of nearest rounding or a part of it, and which part: a
// part suffices where it is larger than all of the first.
const char* daq_walk(Matrix weight, Plan plan, Format format, Array scale_G, Array zero_G, Side inputs, Side outputs,
                     int64_t threads, Array codes, Array losses) {
    Check check(plan, threads);
    check.format(format);
    const Cover& cover = check.cover;
    check.matrix(weight, "weight");
    check.array<float>(scale_G, cover.groups(), "scales");
    check.zeros(zero_G, cover.groups(), format);
    check.array<uint8_t>(codes, cover.M * cover.N, "codes");
    check.array<double>(losses, 3, "losses");
    const int64_t sizes[2] = {cover.N, cover.M};
    for (int64_t which = 0; which < 2; ++which) {
        const Side& side = which ? outputs : inputs;
        check.need(sizes[which] <= 1 << 20, "the size of the curvature");
        const int64_t K = std::min<int64_t>(sizes[which], 1 << 20);
        check.order(side.order, K);
        check.array<double>(side.diagonal, K, "the diagonal of the curvature");
        if (side.unit_upper.bytes) check.array<float>(side.unit_upper, K * K, "the curvature");
    }
    return check.then([&] {
        const OpenSide in(inputs, cover.N, threads), out(outputs, cover.M, threads);
        const int8_t* zeros = zero_G.bytes ? (const int8_t*)zero_G.data : nullptr;
        Walk walk(weight, cover, Grid(format), (const float*)scale_G.data, zeros, in, out, (uint8_t*)codes.data);
        walk.fill(false, threads);
        std::vector<std::pair<int64_t, int64_t>> blocks;
        for (int64_t diagonal = 0; diagonal < in.blocks + out.blocks - 1; ++diagonal)
            for (int64_t I = 0; I < out.blocks; ++I)
                if (diagonal >= I && diagonal - I < in.blocks) blocks.emplace_back(I, diagonal - I);
        parallel(blocks.size(), threads, [&] {
            return [&, tile = std::make_unique<Tile>()](int64_t item) {
                walk.block(blocks[item].first, blocks[item].second, *tile);
            };
        });
        double* found = (double*)losses.data;
        found[0] = std::accumulate(walk.losses.begin(), walk.losses.end(), 0.0);
        walk.fill(true, threads);
        for (const int64_t group : {GROUP, (int64_t)1}) {
            if (group > 1 && in.blocks < group) continue;  // the whole costs little
            found[1] = walk.nearest_loss(group, threads);
            found[2] = 1.0 / (double)group;
            if (found[1] > found[0]) break;
        }
    });
}

}  // extern "C"
