// One tile of the CPU's concept maps in vectors of 16 or 32 bytes, or as this processor does it.
#include "concept_map_cpu.cpp"

using namespace biasmap;

// Whether it could.
extern "C" bool map_of_tile(int64_t bytes, const float *query, const float *keys,
                            const float *members, const float *weights, int64_t heads,
                            int64_t depth, int64_t tokens, int64_t prompts, int64_t concepts,
                            float *maps) {
    MapTile map_tile = bytes == 16 ? map_tile_baseline : map_tile_here();
    if (bytes == 32) {
#if defined(BIASMAP_X86_LEVELS)
        if (!__builtin_cpu_supports("x86-64-v3"))
            return false;
        map_tile = map_tile_v3;
#else
        return false;
#endif
    }
    PromptMapsParams p{};
    p.query = query, p.keys = keys, p.members = members, p.weights = weights;
    p.strides[1] = heads * depth, p.strides[2] = 1;
    p.batch = 1, p.pixels = kTile;
    p.heads = heads, p.depth = depth, p.tokens = tokens, p.prompts = prompts;
    p.concepts = concepts;
    const Space space(p);
    transpose(p, query, kTile, space.columns);
    map_tile(p, Prompts(p), space);
    for (int64_t i = 0; i < prompts * concepts; ++i)
        std::copy_n(space.found[i].at, kTile, maps + i * kTile);
    return true;
}
