// The passes over a weight on a CPU that are not a search: sums of given candidates, absmax, codes,
// fingerprint.

#include "abreast.h"

namespace {

// What the sums are taken of.
struct Candidates {
    const Matrix &weight, &base;
    const Cover& cover;
    const Grid grid;
    const int64_t K, reader;
    const float* scale_GK;
    const int8_t* zero_GK;  // or null
};

// The sums of all candidates of each chunk.
void sums_of_chunks(const Candidates& given, int64_t threads, int64_t* counts, double* totals) {
    const Cover& cover = given.cover;
    const int64_t K = given.K;
    parallel(cover.items(), threads, [&] {
        return [&, buffer = std::make_unique<CountedPiece>(), sums = std::vector<Sums>(K)](int64_t item) mutable {
            const int64_t first = item / cover.chunks() * K;
            CountedPiece* piece = buffer.get();
            Fixed fixed;
            Sums plain{};  // beside those of the reader; nobody asked for them
            std::fill(sums.begin(), sums.end(), Sums{});
            each(piece, cover.region(item), given.weight, &given.base, [&] {
                piece->prepare();
                fixed.add(*piece);
                for (int64_t k = 0; k < K; ++k) {
                    const Grid less = given.zero_GK ? given.grid.less(given.zero_GK[first + k]) : given.grid;
                    if (given.reader)
                        piece->add_read((Reader)given.reader, given.scale_GK[first + k], less, plain, sums[k]);
                    else
                        piece->add(given.scale_GK[first + k], less, sums[k]);
                }
            });
            for (int64_t k = 0; k < K; ++k)
                write(fixed, sums[k], counts + item * K + k, totals + item * K + k, cover.items() * K);
        };
    });
}

// The same of small groups, which are one chunk each.
template <int E>
void sums_abreast(const Candidates& given, int64_t threads, int64_t* counts, double* totals) {
    const int64_t G = given.cover.groups(), K = given.K;
    parallel(ceil_div(G, ABREAST), threads, [&] {
        return [&, groups = std::make_unique<Abreast<E>>(), sums = AbreastSums(), plain = AbreastSums()](int64_t item) mutable {
            const int64_t first = item * ABREAST;
            alignas(64) float scale_L[ABREAST];
            groups->load(given.cover, first, given.weight, given.base);
            for (int64_t k = 0; k < K; ++k) {
                for (int64_t l = 0; l < ABREAST; ++l) scale_L[l] = l < groups->count ? given.scale_GK[(first + l) * K + k] : 1;
                if (given.reader)
                    groups->sums_read((Reader)given.reader, scale_L, given.grid, plain, sums);
                else
                    groups->template sums<ALL>(scale_L, given.grid, sums);
                for (int64_t l = 0; l < groups->count; ++l) {
                    const int64_t place = (first + l) * K + k;
                    const Fixed fixed{groups->n[l], groups->changed[l], groups->delta_sq[l]};
                    write(fixed, sums.of(l), counts + place, totals + place, G * K);
                }
            }
        };
    });
}

}  // namespace

extern "C" {

// Which sources and flags this was compiled from; see ../compiling.py.
uint64_t daq_sources() { return DAQ_SOURCES; }

// counts: int64 [6, G, C, K] and totals: float64 [4, G, C, K], see write().
const char* daq_delta_stats(Matrix weight, Matrix base, Plan plan, Format format, Array scale_GK, Array zero_GK,
                            int64_t K, int64_t reader, int64_t threads, Array counts, Array totals) {
    Check check(plan, threads);
    check.format(format);
    const Grid grid(format);
    const Cover& cover = check.cover;
    const bool some = K >= 1 && K <= Check::MOST / cover.items();
    check.need(some, "the number of candidates");
    check.need(reader >= FLOAT32 && reader <= FLOAT16, "the dtype of the reader");
    check.matrix(weight, "weight");
    check.matrix(base, "base");
    check.array<float>(scale_GK, some ? cover.groups() * K : 0, "scales");
    check.zeros(zero_GK, some ? cover.groups() * K : 0, format);
    check.array<int64_t>(counts, some ? 6 * cover.items() * K : 0, "counts");
    check.array<double>(totals, some ? 4 * cover.items() * K : 0, "totals");
    return check.then([&] {
        const Candidates given{weight, base, cover, grid, K, reader, (const float*)scale_GK.data,
                               zero_GK.bytes ? (const int8_t*)zero_GK.data : nullptr};
        const auto sums = given.zero_GK          ? sums_of_chunks
                          : rows_of(16, cover) ? sums_abreast<16>
                          : rows_of(32, cover) ? sums_abreast<32>
                                               : sums_of_chunks;
        sums(given, threads, (int64_t*)counts.data, (double*)totals.data);
    });
}

// absmax: float32 [G, C]; NaN or infinity where a chunk holds one.
const char* daq_absmax(Matrix weight, Plan plan, int64_t threads, Array absmax) {
    Check check(plan, threads);
    const Cover& cover = check.cover;
    check.matrix(weight, "weight");
    check.array<float>(absmax, cover.items(), "absmax");
    return check.then([&] {
        parallel(cover.items(), threads, [&] {
            return [&, buffer = std::make_unique<Piece>()](int64_t item) {
                Piece* piece = buffer.get();
                int32_t high = 0;
                each(piece, cover.region(item), weight, nullptr, [&] { high = std::max(high, piece->largest_bits()); });
                ((float*)absmax.data)[item] = float_of(high);
            };
        });
    });
}

// codes: uint8 [M, N].
const char* daq_quantize(Matrix weight, Plan plan, Format format, Array scale_G, Array zero_G, int64_t threads,
                         Array codes) {
    Check check(plan, threads);
    check.format(format);
    const Grid grid(format);
    const Cover& cover = check.cover;
    check.matrix(weight, "weight");
    check.array<float>(scale_G, cover.groups(), "scales");
    check.zeros(zero_G, cover.groups(), format);
    check.array<uint8_t>(codes, cover.M * cover.N, "codes");
    return check.then([&] {
        parallel(cover.M, threads, [&] {
            return [&, buffer = std::make_unique<Piece>()](int64_t row) {
                Piece* piece = buffer.get();
                for (int64_t left = 0; left < cover.N; left += cover.cell_cols) {
                    const int64_t group = row / cover.cell_rows * cover.grid_cols() + left / cover.cell_cols;
                    const float reciprocal = 1.0f / ((const float*)scale_G.data)[group];
                    const int32_t zero = zero_G.bytes ? ((const int8_t*)zero_G.data)[group] : 0;
                    uint8_t* out = (uint8_t*)codes.data + row * cover.N + left;
                    each(piece, {row, left, 1, std::min(cover.cell_cols, cover.N - left)}, weight, nullptr, [&] {
                        encode(piece->w, piece->count, reciprocal, grid, out, zero);
                        out += piece->count;
                    });
                }
            };
        });
    });
}

// sums: one for each row of so many words (the last may be shorter), of folded word * odd number; one thread.
const char* daq_fold(Array words, int64_t count, Array odd, int64_t row, Array sums) {
    Check check({1, 1, 1, 1, 1, 1}, 1);
    const bool some = count >= 0 && count <= Check::MOST && row >= 1 && row <= Check::MOST;
    check.need(some, "the number of words");
    check.array<uint64_t>(words, count, "words");
    check.array<uint64_t>(odd, row, "odd numbers");
    check.array<uint64_t>(sums, some ? ceil_div(count, row) : 0, "sums");
    return check.then([&] {
        const uint64_t *word = (const uint64_t*)words.data, *factor = (const uint64_t*)odd.data;
        uint64_t* out = (uint64_t*)sums.data;
        for (int64_t start = 0; start < count; start += row) {
            const int64_t end = std::min(row, count - start);
            uint64_t sum = 0;
            for (int64_t i = 0; i < end; ++i) sum += (word[start + i] ^ (word[start + i] >> 32)) * factor[i];
            *out++ = sum;
        }
    });
}

}  // extern "C"
