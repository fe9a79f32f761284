// Chooses the kernels for this processor, once. CATS_CPU_ISA=portable|avx2|avx512|avx512vnni|avx512bf16 overrides the
// choice.
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace cats {
namespace {

struct Candidate {
    const CpuKernels *kernels;
    bool supported;
};

// Best first. __builtin_cpu_supports also asks whether the operating system saves the registers.
std::vector<Candidate> candidates() {
    std::vector<Candidate> list;
#if defined(__x86_64__)
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
    const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    list.push_back({&avx512bf16::kernels, has_vnni && __builtin_cpu_supports("avx512bf16")});
    list.push_back({&avx512vnni::kernels, has_vnni});
    list.push_back({&avx512::kernels, has_avx512});
    list.push_back({&avx2::kernels, has_avx2});
#endif
    list.push_back({&portable::kernels, true});
    return list;
}

std::string names(bool only_supported) {
    std::string out;
    for (const Candidate &c : candidates())
        if (c.supported || !only_supported) out += (out.empty() ? "" : ", ") + std::string(c.kernels->isa);
    return out;
}

const CpuKernels *choose() {
    const char *wanted = std::getenv("CATS_CPU_ISA");
    for (const Candidate &c : candidates()) {
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
    std::string info = "compiled for " + names(false) + ", of which this processor runs " + names(true) + "; ";
    try {
        return info + "uses " + cpu_kernels().isa;
    } catch (const std::runtime_error &error) {
        return info + "unusable: " + error.what();
    }
}

void *cpu_workspace(int slot, size_t bytes) {
    struct Buffer {
        void *data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffers[kWorkspaceSlots];
    Buffer &buffer = buffers[slot];
    if (bytes > buffer.size) {
        bytes = (bytes + 63) / 64 * 64; // aligned_alloc asks for a multiple
        void *data = std::aligned_alloc(64, bytes);
        if (!data) throw std::bad_alloc();
        std::free(buffer.data);
        buffer.data = data;
        buffer.size = bytes;
    }
    return buffer.data;
}

} // namespace cats
