// A parallel loop over parts from a lambda, and the number of parts to split work into.
#pragma once

#include "vec.inl.h"

namespace cats::CATS_ISA {

template <class F> static void for_each(const Parallel &parallel, int64_t n, const F &f) {
    parallel.for_each(
        n, [](void *context, int64_t i) { (*static_cast<const F *>(context))(i); },
        const_cast<void *>(static_cast<const void *>(&f)));
}

CATS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Starting a part on a thread costs a few microseconds, so a part should be tens of microseconds of work.
CATS_INLINE int64_t parts_for(const Parallel &parallel, int64_t work, int64_t work_per_part) {
    const int64_t parts = min(parallel.threads, work / work_per_part);
    return parts < 1 ? 1 : parts;
}

} // namespace cats::CATS_ISA
