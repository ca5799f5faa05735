// Pixels side by side in vectors, tile by tile: of every token that the prompts have among them one
// score and one exponential, then each prompt's softmax as a quotient of sums. Nothing as large as
// the attention matrix is stored.
#include "concept_map.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include <omp.h>

#if defined(__SSE__)
#    include <xmmintrin.h>
#endif

#include "cpu.h"

#define BIASMAP_INLINE inline __attribute__((always_inline))

namespace biasmap {
namespace {

constexpr int64_t kTile = 64;
// Tokens whose scores are summed side by side: as many as AVX2's registers hold.
constexpr int64_t kTokens = 6;
// Below this many products, starting threads costs more than it saves.
constexpr int64_t kParallelProducts = 1 << 18;
// Smallest sum of exponentials that is divided by: its largest terms are then far above the
// smallest of `exponentials`, and those that are not do not count beside them.
constexpr float kSmall = 0x1p-60f;

// One number of every pixel of a tile.
struct alignas(64) Row {
    float at[kTile];
};

// A row in vectors of a processor's own width: wider ones are taken apart through memory.
template <int64_t bytes> struct Vectors {
    typedef float Lanes __attribute__((vector_size(bytes), may_alias));
    typedef int32_t Bits __attribute__((vector_size(bytes), may_alias));
    static constexpr int64_t kCount = kTile * sizeof(float) / bytes;

    static BIASMAP_INLINE const Lanes *of(const Row &row) {
        return reinterpret_cast<const Lanes *>(row.at);
    }
    static BIASMAP_INLINE Lanes *of(Row &row) { return reinterpret_cast<Lanes *>(row.at); }
};

struct Term {
    int64_t token;
    float weight;
};

// A weighted sum over tokens, without those of no weight.
struct Sum {
    const Term *first, *last;
    const Term *begin() const { return first; }
    const Term *end() const { return last; }
};

class Sums {
public:
    Sums(const float *weights, int64_t rows, int64_t tokens) {
        ends_.reserve(static_cast<size_t>(rows + 1));
        ends_.push_back(0);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t t = 0; t < tokens; ++t)
                if (const float weight = weights[row * tokens + t]; weight != 0.0f)
                    terms_.push_back({t, weight});
            ends_.push_back(terms_.size());
        }
    }
    Sum operator[](int64_t row) const {
        const size_t *ends = ends_.data() + row;
        return {terms_.data() + ends[0], terms_.data() + ends[1]};
    }

private:
    std::vector<Term> terms_;
    std::vector<size_t> ends_;
};

// What a thread works in; nothing of it is read before it is written.
struct Space {
    explicit Space(const PromptMapsParams &p) {
        const int64_t depths = p.heads * p.depth, concepts = p.prompts * p.concepts;
        rows.reset(new Row[static_cast<size_t>(depths + 2 * p.tokens + concepts)]);
        columns = rows.get(), found = columns + depths;
        exponentials = found + concepts, own = exponentials + p.tokens;
    }
    std::unique_ptr<Row[]> rows;
    Row *columns;      // of the queries: [heads * d]
    Row *found;        // maps: [P * K]
    Row *exponentials; // of one head: [U]
    Row *own;          // the same of one prompt alone
};

// The queries of `count` pixels: one row for each of their columns. In a last tile that is not
// full, the last pixel is repeated. Pixels in the outer loop: what lies together in memory is read
// together.
void transpose(const PromptMapsParams &p, const float *query, int64_t count, Row *columns) {
    const int64_t pixel = p.strides[1], column = p.strides[2], depths = p.heads * p.depth;
#if defined(__SSE__)
    if (column == 1 && count == kTile && depths % 4 == 0) {
        for (int64_t r = 0; r < kTile; r += 4)
            for (int64_t c = 0; c < depths; c += 4) {
                const float *at = query + r * pixel + c;
                __m128 w = _mm_loadu_ps(at), x = _mm_loadu_ps(at + pixel),
                       y = _mm_loadu_ps(at + 2 * pixel), z = _mm_loadu_ps(at + 3 * pixel);
                _MM_TRANSPOSE4_PS(w, x, y, z);
                _mm_store_ps(columns[c].at + r, w);
                _mm_store_ps(columns[c + 1].at + r, x);
                _mm_store_ps(columns[c + 2].at + r, y);
                _mm_store_ps(columns[c + 3].at + r, z);
            }
        return;
    }
#endif
    for (int64_t r = 0; r < kTile; ++r) {
        const float *at = query + std::min(r, count - 1) * pixel;
        for (int64_t c = 0; c < depths; ++c)
            columns[c].at[r] = at[c * column];
    }
}

// scores[t] = sum over c of keys[t][c] * columns[c], of `count` tokens
template <int64_t bytes, int64_t count>
BIASMAP_INLINE void multiply(const float *keys, int64_t depth, const Row *columns, Row *scores) {
    using V = Vectors<bytes>;
    for (int64_t v = 0; v < V::kCount; ++v) {
        typename V::Lanes sums[count];
#pragma GCC unroll 6
        for (int64_t i = 0; i < count; ++i)
            sums[i] = typename V::Lanes{};
        for (int64_t c = 0; c < depth; ++c) {
            const auto column = V::of(columns[c])[v];
#pragma GCC unroll 6
            for (int64_t i = 0; i < count; ++i)
                sums[i] += keys[i * depth + c] * column;
        }
#pragma GCC unroll 6
        for (int64_t i = 0; i < count; ++i)
            V::of(scores[i])[v] = sums[i];
    }
}

template <int64_t bytes, int64_t count = kTokens>
BIASMAP_INLINE void multiply(const float *keys, int64_t tokens, int64_t depth, const Row *columns,
                             Row *scores) {
    for (; tokens >= count; tokens -= count, keys += count * depth, scores += count)
        multiply<bytes, count>(keys, depth, columns, scores);
    if constexpr (count > 1)
        multiply<bytes, count - 1>(keys, tokens, depth, columns, scores);
}

// Scores to e^a with a = score - the pixel's largest, as a power of two: relative error
// 2e-7 - 6e-8 a; 2^-126 instead of less.
template <int64_t bytes> BIASMAP_INLINE void exponentials(int64_t tokens, Row *scores) {
    using V = Vectors<bytes>;
    using Lanes = typename V::Lanes;
    constexpr float kLogE = 1.44269504f, kLeast = -126.0f;
    // 1.5 * 2^23: adding it rounds to an integer; 127: that, in the lowest bits, is an exponent.
    constexpr float kRound = 12582912.0f + 127.0f;
    for (int64_t v = 0; v < V::kCount; ++v) {
        Lanes top = V::of(scores[0])[v];
        for (int64_t t = 1; t < tokens; ++t) {
            const Lanes score = V::of(scores[t])[v];
            top = score > top ? score : top;
        }
        for (int64_t t = 0; t < tokens; ++t) {
            Lanes x = (V::of(scores[t])[v] - top) * kLogE;
            x = x < kLeast ? Lanes{} + kLeast : x; // a NaN stays
            const Lanes rounded = x + kRound;
            const Lanes r = x - (rounded - kRound);
            Lanes p = r * 1.3264727e-3f + 9.6715126e-3f; // minimax with p(0) = 1, |r| <= 1/2
            p = p * r + 5.5507337e-2f;
            p = p * r + 2.4022242e-1f;
            p = p * r + 6.9314698e-1f;
            p = p * r + 1.0f;
            V::of(scores[t])[v] =
                p * reinterpret_cast<Lanes>(reinterpret_cast<typename V::Bits>(rounded) << 23);
        }
    }
}

template <int64_t bytes>
BIASMAP_INLINE void add_up(Sum sum, const Row *rows,
                           typename Vectors<bytes>::Lanes (&total)[Vectors<bytes>::kCount]) {
    for (const Term &term : sum)
#pragma GCC unroll 16
        for (int64_t v = 0; v < Vectors<bytes>::kCount; ++v)
            total[v] += term.weight * Vectors<bytes>::of(rows[term.token])[v];
}

// Whether all are large enough to divide by: a NaN is not.
BIASMAP_INLINE bool divisible(const Row &sums) {
    int small = 0;
#pragma omp simd reduction(+ : small)
    for (int64_t r = 0; r < kTile; ++r)
        small += !(sums.at[r] >= kSmall);
    return small == 0;
}

// Adds one prompt's softmax, summed over the tokens of each of its concepts, from exponentials.
// Adds nothing and returns false where `checked` finds their sum too small to divide by.
template <int64_t bytes>
BIASMAP_INLINE bool add_prompt(Sum tokens, const Sums &weights, int64_t prompt, int64_t concepts,
                               const Row *exponentials, bool checked, Row *found) {
    using V = Vectors<bytes>;
    typename V::Lanes sums[V::kCount] = {};
    add_up<bytes>(tokens, exponentials, sums);
    if (checked) {
        Row copy;
        std::copy_n(sums, V::kCount, V::of(copy));
        if (!divisible(copy))
            return false;
    }
    for (int64_t k = prompt * concepts; k < (prompt + 1) * concepts; ++k) {
        typename V::Lanes part[V::kCount] = {};
        add_up<bytes>(weights[k], exponentials, part);
        for (int64_t v = 0; v < V::kCount; ++v)
            V::of(found[k])[v] += part[v] / sums[v];
    }
    return true;
}

// Scores of one prompt to exponentials of their differences from its own largest.
void own_exponentials(Sum tokens, Row *scores) {
    for (int64_t r = 0; r < kTile; ++r) {
        float top = scores[tokens.first->token].at[r];
        for (const Term &term : tokens)
            top = std::max(top, scores[term.token].at[r]);
        for (const Term &term : tokens)
            scores[term.token].at[r] = std::exp(scores[term.token].at[r] - top);
    }
}

struct Prompts {
    Sums members, weights;
    explicit Prompts(const PromptMapsParams &p)
        : members(p.members, p.prompts, p.tokens),
          weights(p.weights, p.prompts * p.concepts, p.tokens) {}
};

// The maps of a tile, of all heads, to `space.found`, from its columns.
template <int64_t bytes>
BIASMAP_INLINE void map_tile_in(const PromptMapsParams &p, const Prompts &prompts,
                                const Space &space) {
    std::fill_n(space.found, p.prompts * p.concepts, Row{});
    for (int64_t head = 0; head < p.heads; ++head) {
        const float *keys = p.keys + head * p.tokens * p.depth;
        const Row *columns = space.columns + head * p.depth;
        multiply<bytes>(keys, p.tokens, p.depth, columns, space.exponentials);
        exponentials<bytes>(p.tokens, space.exponentials);
        for (int64_t prompt = 0; prompt < p.prompts; ++prompt) {
            const Sum tokens = prompts.members[prompt];
            if (add_prompt<bytes>(tokens, prompts.weights, prompt, p.concepts, space.exponentials,
                                  true, space.found))
                continue;
            // All of its scores are far below another prompt's.
            multiply<bytes>(keys, p.tokens, p.depth, columns, space.own);
            own_exponentials(tokens, space.own);
            add_prompt<bytes>(tokens, prompts.weights, prompt, p.concepts, space.own, false,
                              space.found);
        }
    }
}

void map_tile_baseline(const PromptMapsParams &p, const Prompts &prompts, const Space &space) {
    map_tile_in<16>(p, prompts, space);
}

#if defined(BIASMAP_X86_LEVELS)
__attribute__((target("arch=x86-64-v3"))) void
map_tile_v3(const PromptMapsParams &p, const Prompts &prompts, const Space &space) {
    map_tile_in<32>(p, prompts, space);
}

__attribute__((target("arch=x86-64-v4"))) void
map_tile_v4(const PromptMapsParams &p, const Prompts &prompts, const Space &space) {
    map_tile_in<64>(p, prompts, space);
}
#endif

using MapTile = void (*)(const PromptMapsParams &, const Prompts &, const Space &);

// That of the widest vectors that this processor has.
MapTile map_tile_here() {
#if defined(BIASMAP_X86_LEVELS)
    if (const int level = x86_level())
        return level == 4 ? map_tile_v4 : map_tile_v3;
#endif
    return map_tile_baseline;
}

// Adds the tile's maps of image `b` to a target.
void add_tile(const PromptMapsParams &p, const PromptMaps &maps, int64_t b, int64_t first,
              int64_t count, const Space &space) {
    for (int64_t prompt = 0; prompt < maps.prompts; ++prompt)
        for (int64_t k = 0; k < p.concepts; ++k) {
            const Row &row = space.found[prompt * p.concepts + k];
            float *map = maps.data + prompt * maps.strides[0] + b * maps.strides[1] +
                         k * maps.strides[2] + first;
            for (int64_t r = 0; r < count; ++r)
                map[r] += row.at[r];
        }
}

} // namespace

void prompt_maps_cpu(const PromptMapsParams &p) {
    static const MapTile map_tile = map_tile_here();
    const Prompts prompts(p);
    const int64_t tiles = (p.pixels + kTile - 1) / kTile;
    const bool parallel =
        may_use_threads() && p.batch * p.heads * p.pixels * p.depth * p.tokens > kParallelProducts;
    std::vector<Space> spaces;
    for (int thread = parallel ? omp_get_max_threads() : 1; thread > 0; --thread)
        spaces.emplace_back(p);

#pragma omp parallel for if (parallel) collapse(2) schedule(static)
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const Space &space = spaces[static_cast<size_t>(omp_get_thread_num())];
            const int64_t first = tile * kTile, count = std::min(kTile, p.pixels - first);
            transpose(p, p.query + b * p.strides[0] + first * p.strides[1], count, space.columns);
            map_tile(p, prompts, space);
            for (int64_t target = 0; target < p.targets; ++target)
                add_tile(p, p.maps[target], b, first, count, space);
        }
}

} // namespace biasmap
