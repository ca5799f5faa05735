// One function body, compiled for several instruction sets and chosen when the module loads.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#    define BIASMAP_CLONES                                                                         \
        __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#    define BIASMAP_CLONES
#endif
