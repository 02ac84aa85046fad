// Numbers that all CPU kernels share: bits of floats, bf16, E4M3 and E2M1, each bit for bit as formats.py has them.
//
// Every float operation below is one IEEE fp32 rounding; the kernels are compiled with -ffp-contract=off and without -ffast-math.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr float FLT_MAXIMUM = 3.402823466e+38f;
constexpr uint32_t INF_BITS = 0x7f800000u;

inline float as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

struct bf16 { uint16_t u; };
inline float load(const float* p) { return *p; }
inline float load(const bf16* p) { return as_float(uint32_t(p->u) << 16); }
inline void store(float* p, float v) { *p = v; }
inline uint32_t round_bf16_bits(uint32_t u) { return (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u; }  // NaN stays NaN: payloads come from bf16
inline void store(bf16* p, float v) { p->u = uint16_t(as_bits(v) >> 16); }                                // exact values only

// E4M3 decode value of v >= 0: RTNE, saturating at 448, subnormals kept; NaN gives 448. Returns the value, as fp32.
inline float round_e4m3(float v) {
    float c = v < 448.0f ? v : 448.0f;
    uint32_t u = as_bits(c);
    float normal = as_float((u + 0x7ffffu + ((u >> 20) & 1u)) & 0xfff00000u);
    float small = (c + 24576.0f) - 24576.0f;                       // 1.5 * 2^23 * 2^-9: the subnormal step
    float r = c < 0.015625f ? small : normal;
    return r < 448.0f ? r : 448.0f;
}
inline uint8_t e4m3_byte(float s) {                                // of a value on the E4M3 grid
    uint32_t u = as_bits(s);
    uint32_t normal = (u >> 20) - (120u << 3);
    uint32_t small = uint32_t(int32_t(s * 512.0f));
    return uint8_t(s < 0.015625f ? small : normal);
}
inline float e4m3_value(uint8_t b) {
    uint32_t normal = (uint32_t(b) << 20) + (120u << 23);
    return b < 8 ? float(b) * 0.001953125f : as_float(normal);
}

// |y| -> value on the E2M1 grid. RTNE, ties to the even code; NaN gives 6.
inline float e2m1_nearest(float a) {
    a = a < 6.0f ? a : 6.0f;
    float magic = a < 2.0f ? 6291456.0f : (a < 4.0f ? 12582912.0f : 25165824.0f);      // 1.5 * 2^23 * step
    return (a + magic) - magic;
}
inline float e2m1_value(uint32_t code) {                           // with the sign, by bits: -0.0 is code 8
    uint32_t m = code & 7u;
    uint32_t big = (m + 252u) << 22;
    uint32_t small = m == 1u ? 0x3f000000u : 0u;
    return as_float((m < 2u ? small : big) | ((code & 8u) << 28));
}
// A scale, or 0 in place of a subnormal one of a block of 16 codes that are all 0: products with it would be slow, and are 0 anyway.
inline float unless_of_zeros(float scale, const uint8_t* codes) {
    uint64_t all; std::memcpy(&all, codes, 8);
    return as_bits(scale) - 1u < 0x7fffffu && !(all & 0x7777777777777777u) ? 0.0f : scale;
}
inline void store_round(float* p, float v) { *p = v; }
inline void store_round(bf16* p, float v) {
    uint32_t u = as_bits(v);
    p->u = uint16_t((u & 0x7fffffffu) > INF_BITS ? 0x7fc0u : round_bf16_bits(u) >> 16);
}

}  // namespace
