// How fast this machine reads memory: sums a buffer on several threads, each reading 1 to 8 places of its part side by
// side. read_limit.py compiles it; the best of all is the limit that kernels.mlp_cpu compares with.
#include <chrono>
#include <cstddef>
#include <thread>
#include <vector>

typedef float Vec __attribute__((vector_size(32), aligned(4)));

template <int Streams> static float sum(const float *data, size_t size) {
    const size_t length = size / Streams / 16 * 16;
    Vec acc[Streams][2] = {};
    for (size_t i = 0; i < length; i += 16)
        for (int s = 0; s < Streams; s++)
            for (int k = 0; k < 2; k++) acc[s][k] += *reinterpret_cast<const Vec *>(data + s * length + i + 8 * k);
    float total = 0;
    for (auto &pair : acc)
        for (Vec &v : pair)
            for (int lane = 0; lane < 8; lane++) total += v[lane];
    return total;
}

// Seconds that one pass over `data` took, and the sum, which must not be optimised away.
template <int Streams> static double time_pass(const float *data, size_t size, int threads, float *result) {
    std::vector<std::thread> pool;
    std::vector<float> sums(threads);
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; t++)
        pool.emplace_back([&, t] { sums[t] = sum<Streams>(data + size / threads * t, size / threads); });
    for (auto &thread : pool) thread.join();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    for (float s : sums) *result += s;
    return elapsed.count();
}

extern "C" double read_seconds(const float *data, size_t size, int threads, int streams, float *result) {
    switch (streams) {
    case 1: return time_pass<1>(data, size, threads, result);
    case 2: return time_pass<2>(data, size, threads, result);
    case 4: return time_pass<4>(data, size, threads, result);
    default: return time_pass<8>(data, size, threads, result);
    }
}
