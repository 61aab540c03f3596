// The passes over a weight on a CPU that are not a search: sums of given candidates, absmax, codes, fingerprint.

#include "sums.h"

extern "C" {

// counts: int64 [6, G, C, K] and totals: float64 [4, G, C, K], see write().
void daq_delta_stats(Matrix weight, Matrix base, Plan plan, const float* scale_GK, int64_t K, int64_t threads,
                     int64_t* counts, double* totals) {
    const Cover cover(plan);
    parallel(cover.items(), threads, [&] {
        return [&, buffer = std::make_unique<CountedPiece>(), sums = std::vector<Sums>(K)](int64_t item) mutable {
            const float* scale_K = scale_GK + item / cover.chunks() * K;
            CountedPiece* piece = buffer.get();
            Fixed fixed;
            std::fill(sums.begin(), sums.end(), Sums{});
            each(piece, cover.region(item), weight, &base, [&] {
                piece->prepare();
                fixed.add(*piece);
                for (int64_t k = 0; k < K; ++k) piece->add(scale_K[k], sums[k]);
            });
            for (int64_t k = 0; k < K; ++k)
                write(fixed, sums[k], counts + item * K + k, totals + item * K + k, cover.items() * K);
        };
    });
}

// absmax: float32 [G, C]; NaN or infinity where a chunk holds one.
void daq_absmax(Matrix weight, Plan plan, int64_t threads, float* absmax) {
    const Cover cover(plan);
    parallel(cover.items(), threads, [&] {
        return [&, buffer = std::make_unique<Piece>()](int64_t item) {
            Piece* piece = buffer.get();
            int32_t high = 0;
            each(piece, cover.region(item), weight, nullptr, [&] { high = std::max(high, piece->largest_bits()); });
            absmax[item] = float_of(high);
        };
    });
}

// codes: uint8 [M, N], e4m3.
void daq_quantize(Matrix weight, Plan plan, const float* scale_G, int64_t threads, uint8_t* codes) {
    const Cover cover(plan);
    parallel(cover.M, threads, [&] {
        return [&, buffer = std::make_unique<Piece>()](int64_t row) {
            Piece* piece = buffer.get();
            for (int64_t left = 0; left < cover.N; left += cover.cell_cols) {
                const int64_t group = row / cover.cell_rows * cover.grid_cols() + left / cover.cell_cols;
                uint8_t* out = codes + row * cover.N + left;
                each(piece, {row, left, 1, std::min(cover.cell_cols, cover.N - left)}, weight, nullptr, [&] {
                    encode(piece->w, piece->count, 1.0f / scale_G[group], out);
                    out += piece->count;
                });
            }
        };
    });
}

// sums: one for each row of so many words (the last may be shorter), of folded word * odd number; one thread.
void daq_fold(const uint64_t* words, int64_t count, const uint64_t* odd, int64_t row, uint64_t* sums) {
    for (int64_t start = 0; start < count; start += row) {
        const int64_t end = std::min(row, count - start);
        uint64_t sum = 0;
        for (int64_t i = 0; i < end; ++i) sum += (words[start + i] ^ (words[start + i] >> 32)) * odd[i];
        *sums++ = sum;
    }
}

}  // extern "C"
