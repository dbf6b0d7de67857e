// Loops over the lanes of a warp.
#pragma once
#include <cmath>
#include <cstdint>

namespace ptx {

// All lanes in one loop that can be vectorised, or the active ones.
template <class F>
inline void lanes(uint32_t m, F f) {
    if (m == 0xffffffffu) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) f(i);
    } else {
        for (; m; m &= m - 1) f(__builtin_ctz(m));
    }
}

// Subnormals to zero, as .ftz asks.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace ptx
