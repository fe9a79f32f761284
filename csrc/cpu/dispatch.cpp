// Chooses the kernels for this processor, once. CATS_CPU_ISA=portable|avx2|avx512|avx512bf16 overrides the choice.
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "kernels.h"

namespace cats {
namespace {

struct Candidate {
    const CpuKernels *kernels;
    bool supported;
};

// Best first. __builtin_cpu_supports also asks whether the operating system saves the registers.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&avx512bf16::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")},
    {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl")},
    {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
    {&portable::kernels, true},
};

std::string names(bool only_supported) {
    std::string out;
    for (const Candidate &c : kCandidates)
        if (c.supported || !only_supported) out += (out.empty() ? "" : ", ") + std::string(c.kernels->isa);
    return out;
}

const CpuKernels *choose() {
    const char *wanted = std::getenv("CATS_CPU_ISA");
    for (const Candidate &c : kCandidates) {
        if (wanted && *wanted ? std::string(wanted) != c.kernels->isa : !c.supported) continue;
        if (!c.supported)
            throw std::runtime_error("CATS_CPU_ISA=" + std::string(wanted) +
                                     ": this processor cannot run these kernels, only " + names(true));
        return c.kernels;
    }
    throw std::runtime_error("CATS_CPU_ISA must be one of " + names(false) + ", got '" + wanted + "'");
}

} // namespace

const CpuKernels &cpu_kernels() {
    static const CpuKernels *chosen = choose();
    return *chosen;
}

std::string cpu_kernels_info() {
    std::string info = "compiled for " + names(false) + "; ";
    try {
        return info + "uses " + cpu_kernels().isa;
    } catch (const std::runtime_error &error) { return info + "unusable: " + error.what(); }
}

void *cpu_workspace(size_t bytes) {
    struct Free {
        void operator()(void *p) const { std::free(p); }
    };
    thread_local std::unique_ptr<void, Free> memory;
    thread_local size_t size = 0;
    if (bytes > size) {
        size = 0;
        memory.reset(); // before allocating, so that never both are held
        bytes = (bytes + 63) / 64 * 64;
        memory.reset(std::aligned_alloc(64, bytes));
        if (!memory) throw std::bad_alloc();
        size = bytes;
    }
    return memory.get();
}

} // namespace cats
