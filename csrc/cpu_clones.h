// Code compiled for several levels of x86-64: one function body, of which one is chosen when the
// module loads (BIASMAP_CLONES), or functions that a caller chooses among (BIASMAP_X86_LEVELS).
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#    define BIASMAP_X86_LEVELS
#    define BIASMAP_CLONES                                                                         \
        __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#    define BIASMAP_CLONES
#endif
