// What the CPU kernels share: code for several levels of x86-64, and when to use several threads.
#pragma once

#include <atomic>

#include <pthread.h>

// One function body, of which the best level is chosen when the module loads (BIASMAP_CLONES), or
// functions that a caller chooses among (BIASMAP_X86_LEVELS).
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#    define BIASMAP_X86_LEVELS
#    define BIASMAP_CLONES                                                                         \
        __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#    define BIASMAP_CLONES
#endif

namespace biasmap {

// Of x86-64, what this machine has; 0 elsewhere, and below 3.
inline int x86_level() {
#if defined(BIASMAP_X86_LEVELS)
    return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 0;
#endif
    return 0;
}

inline std::atomic<bool> forked{false};
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// False in a forked process: fork() does not copy OpenMP's threads, which would be waited for.
inline bool may_use_threads() { return watching_forks == 0 && !forked; }

} // namespace biasmap
