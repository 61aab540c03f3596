// H[order][:, order] = A diag(d) A^T, A unit upper triangular: the Cholesky factorization from the last row and
// column to the first, in blocks, with U = A diag(sqrt(d)).
//
//     U_JJ U_JJ^T = H_JJ - sum_{k > J} U_Jk U_Jk^T
//     U_IJ        = (H_IJ - sum_{k > J} U_Ik U_Jk^T) U_JJ^-T          I < J
//
// Every block is summed in one order by one thread, so that the result does not depend on their number. Blocks
// are handed out so that no thread waits for one that nobody works on. Diagonal blocks are factored in float64.

#include "matmul.h"

namespace {

template <class T>
struct Upper {
    const int64_t K, blocks;
    const T* H;
    const int64_t* order;
    double* d;
    const Left<T> left;
    const Right<T> right;                  // both hold U, by rows
    std::vector<double> diagonal_blocks;   // of U
    std::vector<std::atomic<bool>> ready;  // blocks

    Upper(int64_t K, const T* H, const int64_t* order, double* d)
        : K(K), blocks(ceil_div(K, BLOCK)), H(H), order(order), d(d), left(K, K), right(K, K),
          diagonal_blocks(blocks * BLOCK * BLOCK), ready(blocks * blocks) {}

    void wait_for(int64_t I, int64_t J) const {
        if (J >= blocks) return;
        while (!ready[I * blocks + J].load(std::memory_order_acquire)) std::this_thread::yield();
    }

    int64_t length(int64_t block) const { return std::min(BLOCK, K - block * BLOCK); }

    // `rest` holds the block transposed: rows of J, columns of I.
    void block(int64_t I, int64_t J, T* rest) const {
        const int64_t top = I * BLOCK, first = J * BLOCK, rows = length(I), cols = length(J);
        std::fill(rest, rest + BLOCK * BLOCK, T(0));
        wait_for(I, J + 1);
        wait_for(J, J + 1);
        multiply(left, first, right, top, BLOCK, std::min(first + BLOCK, K), K, rest);
        for (int64_t j = 0; j < cols; ++j) {
            const T* row = H + order[first + j] * K;
            for (int64_t i = 0; i < rows; ++i) rest[j * BLOCK + i] = row[order[top + i]] - rest[j * BLOCK + i];
        }
    }

    void work(int64_t I, int64_t J, T* rest) {
        const int64_t top = I * BLOCK, first = J * BLOCK, rows = length(I), cols = length(J);
        double* U_JJ = diagonal_blocks.data() + J * BLOCK * BLOCK;  // transposed as well
        block(I, J, rest);
        if (I == J) {
            std::copy(rest, rest + BLOCK * BLOCK, U_JJ);
            factor(cols, U_JJ, d + first);
            std::copy(U_JJ, U_JJ + BLOCK * BLOCK, rest);
        } else {
            wait_for(J, J);
            solve(cols, U_JJ, rest);
        }
        for (int64_t j = 0; j < cols; ++j)
            for (int64_t i = 0; i < (I == J ? j + 1 : rows); ++i)
                *left.at(top + i, first + j) = *right.at(top + i, first + j) = rest[j * BLOCK + i];
        ready[I * blocks + J].store(true, std::memory_order_release);
    }

    // A diagonal block in place, by columns of U; a pivot that is not positive shows in d.
    static void factor(int64_t count, double* U, double* d) {
        for (int64_t j = count - 1; j >= 0; --j) {
            double* column = U + j * BLOCK;
            d[j] = column[j];
            const double root = std::sqrt(d[j] > 0 ? d[j] : 1.0);
            for (int64_t i = 0; i < j; ++i) column[i] /= root;
            column[j] = root;
            for (int64_t k = 0; k < j; ++k)
                for (int64_t i = 0; i <= k; ++i) U[k * BLOCK + i] -= column[k] * column[i];
        }
    }

    // rest <- U_JJ^-1 rest: row after row, from the last.
    DAQ_FUSE_HERE static void solve(int64_t count, const double* U_JJ, T* rest) {
        DAQ_FUSE_BELOW
        for (int64_t j = count - 1; j >= 0; --j) {
            T* row = rest + j * BLOCK;
            for (int64_t k = j + 1; k < count; ++k) {
                const T factor = (T)U_JJ[k * BLOCK + j], *other = rest + k * BLOCK;
                for (int64_t i = 0; i < BLOCK; ++i) row[i] -= factor * other[i];
            }
            const T reciprocal = (T)(1 / U_JJ[j * BLOCK + j]);
            for (int64_t i = 0; i < BLOCK; ++i) row[i] *= reciprocal;
        }
    }

    void write(int64_t row, float* out) const {
        std::fill(out, out + row, 0.0f);
        for (int64_t j = row; j < K; ++j) {
            const int64_t in_block = j % BLOCK;
            out[j] = j == row ? 1.0f : (float)(*left.at(row, j) / diagonal_blocks[j * BLOCK + in_block]);
        }
    }
};

template <class T>
void unit_upper(int64_t K, const Array& matrix, const Array& order, int64_t threads, float* out, double* d) {
    Upper<T> upper(K, (const T*)matrix.data, (const int64_t*)order.data, d);
    std::vector<std::pair<int64_t, int64_t>> blocks;
    for (int64_t J = upper.blocks - 1; J >= 0; --J)
        for (int64_t I = J; I >= 0; --I) blocks.emplace_back(I, J);
    parallel(blocks.size(), threads, [&] {
        return [&, rest = std::vector<T>(BLOCK * BLOCK)](int64_t item) mutable {
            upper.work(blocks[item].first, blocks[item].second, rest.data());
        };
    });
    parallel(K, threads, [&] { return [&](int64_t row) { upper.write(row, out + row * K); }; });
}

}  // namespace

extern "C" {

// matrix: float32 or, with bits 64, float64 [K, K]; order: int64 [K]; unit_upper: float32 [K, K]; diagonal: float64
// [K], the pivots: one that is not positive makes all else meaningless.
const char* daq_unit_upper(Array matrix, Array order, int64_t K, int64_t bits, int64_t threads, Array unit_upper_KK,
                           Array diagonal) {
    Check check({1, 1, 1, 1, 1, 1}, threads);
    const bool some = K >= 1 && K <= 1 << 20;
    check.need(some, "the size of the matrix");
    if (!some) return check.problem;
    check.need(bits == 32 || bits == 64, "the dtype of the matrix");
    if (bits == 64)
        check.array<double>(matrix, K * K, "the matrix");
    else
        check.array<float>(matrix, K * K, "the matrix");
    check.order(order, K);
    check.array<float>(unit_upper_KK, K * K, "the unit upper triangle");
    check.array<double>(diagonal, K, "the diagonal");
    return check.then([&] {
        const auto run = bits == 64 ? unit_upper<double> : unit_upper<float>;
        run(K, matrix, order, threads, (float*)unit_upper_KK.data, (double*)diagonal.data);
    });
}

}  // extern "C"
