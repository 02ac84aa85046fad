// Templates of the CPU's quantization kernels: operands of convolutions and linear layers, in one pass over memory each.
//
// native.cpp makes the kernels of NVFP4 of them, block_formats.cpp those of the formats beside it. A format is a type F that says
// how a block's scale is made, how its values are divided by it, and its byte; see Scale, which is NVFP4's.
// Numerics: those of formats.py, bit for bit. Every float operation below is one IEEE fp32 rounding; the file is compiled
// with -ffp-contract=off and without -ffast-math. amax is taken on the integer image of |x|, so NaN > inf > finite.
//
// An operand is a row-major array of B images; an image is L rows of `run` = Wp * C contiguous values (Wp pixels, C channels).
// Rowwise blocks: 16 channels of one pixel and one group (the last block of a group may be shorter).
// Columnwise blocks: 16 images at one (row, pixel, channel); "images" may be folded strips, given by a table of row pointers.
#pragma once
#include "numbers.h"
#include <cmath>
#include <algorithm>
#include <vector>
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int CHUNK = 64;                 // columns worked on at once: 16 x 64 floats stay in the L1 cache
constexpr int SIGN[16] = {1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1};

// 8 bytes of codes to 16 values times a scale.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline void unpack_block(const uint8_t* data, float s, float* v) {
    const __m512 grid = _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f);
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
    const __m128i codes = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi16(0x0f0f));
    _mm512_storeu_ps(v, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), grid), _mm512_set1_ps(s)));
}
#elif defined(__AVX2__)
inline void unpack_block(const uint8_t* data, float s, float* v) {
    const __m256 grid = _mm256_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);       // permutevar8x32 reads 3 bits of a code
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
    const __m128i codes = _mm_or_si128(pairs, _mm_slli_epi16(pairs, 4));               // each byte's low 4 bits are a code
    for (int half = 0; half < 2; ++half) {
        const __m256i c = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(codes, 8) : codes);
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(8)), 28);
        const __m256 value = _mm256_or_ps(_mm256_permutevar8x32_ps(grid, c), _mm256_castsi256_ps(sign));
        _mm256_storeu_ps(v + 8 * half, _mm256_mul_ps(value, _mm256_set1_ps(s)));
    }
}
#else
inline void unpack_block(const uint8_t* data, float s, float* v) {
    for (int k = 0; k < 16; ++k) v[k] = e2m1_value(data[k / 2] >> (k % 2 * 4) & 15u) * s;
}
#endif
inline uint32_t sign_of(uint32_t bits) { return (bits & 0x7fffffffu) > INF_BITS ? 0u : bits & 0x80000000u; }   // NaN: none

constexpr int64_t RECORD = 20;            // bytes, see integer.cpp: 16 of 2 * value + 12, then the scale / 2
constexpr int NB = 16;                    // rowwise blocks worked on at once

// The largest |v| of each of NB blocks, on its bits.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Pairs of blocks are folded into one register, which leaves half of what each had, until one register holds one number of each.
inline void block_amaxes(const float (*v)[16], float* out) {
    __m512i m[NB];
    for (int b = 0; b < NB; ++b) m[b] = _mm512_and_si512(_mm512_loadu_si512(v[b]), _mm512_set1_epi32(0x7fffffff));
    for (int i = 0; i < 8; ++i) m[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]), _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]));
    for (int i = 0; i < 4; ++i) m[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(m[2 * i], m[2 * i + 1]), _mm512_unpackhi_epi64(m[2 * i], m[2 * i + 1]));
    for (int n = 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) m[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(m[2 * i], m[2 * i + 1], 0x88), _mm512_shuffle_i32x4(m[2 * i], m[2 * i + 1], 0xdd));
    _mm512_storeu_si512(out, m[0]);
}
#elif defined(__AVX2__)
inline void block_amaxes(const float (*v)[16], float* out) {      // pairs of blocks are folded, as above
    const __m256i keep = _mm256_set1_epi32(0x7fffffff);
    for (int b = 0; b < NB; b += 8) {
        __m256i m[8];
        for (int i = 0; i < 8; ++i) {
            const __m256i* p = reinterpret_cast<const __m256i*>(v[b + i]);
            m[i] = _mm256_max_epu32(_mm256_and_si256(_mm256_loadu_si256(p), keep), _mm256_and_si256(_mm256_loadu_si256(p + 1), keep));
        }
        for (int i = 0; i < 4; ++i) m[i] = _mm256_max_epu32(_mm256_unpacklo_epi32(m[2 * i], m[2 * i + 1]), _mm256_unpackhi_epi32(m[2 * i], m[2 * i + 1]));
        for (int i = 0; i < 2; ++i) m[i] = _mm256_max_epu32(_mm256_unpacklo_epi64(m[2 * i], m[2 * i + 1]), _mm256_unpackhi_epi64(m[2 * i], m[2 * i + 1]));
        const __m256i all = _mm256_max_epu32(_mm256_permute2x128_si256(m[0], m[1], 0x20), _mm256_permute2x128_si256(m[0], m[1], 0x31));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b), all);
    }
}
#else
inline void block_amaxes(const float (*v)[16], float* out) {
    for (int b = 0; b < NB; ++b) {
        uint32_t a = 0;
        for (int k = 0; k < 16; ++k) a = std::max(a, as_bits(v[b][k]) & 0x7fffffffu);
        out[b] = as_float(a);
    }
}
#endif

// ------------------------------------------------------------------------------------------------ values in registers
// LANES values are worked on at once: of one row, or one of each of LANES columns (two registers where one has 16 bytes only).
#if defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Octets __attribute__((vector_size(4 * LANES)));     // the bytes of four vectors of values

inline Floats all(float v) { return Floats{} + v; }
inline Words bits_of(Floats v) { return reinterpret_cast<Words>(v); }
inline Floats of_bits(Words v) { return reinterpret_cast<Floats>(v); }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline Floats smaller(Floats a, Floats b) { return reinterpret_cast<Floats>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b))); }      // b where a is NaN
inline Words larger(Words a, Words b) { return reinterpret_cast<Words>(_mm512_max_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b))); }
#elif defined(__AVX2__)
inline Floats smaller(Floats a, Floats b) { return reinterpret_cast<Floats>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b))); }      // b where a is NaN
inline Words larger(Words a, Words b) { return reinterpret_cast<Words>(_mm256_max_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b))); }
#else
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Words larger(Words a, Words b) { return a > b ? a : b; }
#endif
inline Floats magnitude(Floats v) { return of_bits(bits_of(v) & 0x7fffffffu); }
template <class V, class P> inline V read(const P* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline Floats load_lanes(const float* p) { return read<Floats>(p); }
#if defined(__AVX2__) && !(defined(__AVX512BW__) && defined(__AVX512VL__))
inline Floats load_lanes(const bf16* p) { return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16)); }
#else
inline Floats load_lanes(const bf16* p) { return of_bits(__builtin_convertvector(read<Halves>(p), Words) << 16); }
#endif
inline void store_lanes(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store_lanes(bf16* p, Floats v) { const Halves h = __builtin_convertvector(bits_of(v) >> 16, Halves); std::memcpy(p, &h, sizeof h); }    // exact values only

// The functions of numbers.h for LANES values.
inline Floats round_e4m3(Floats v) {
    const Floats c = smaller(v, all(448.0f)), small = (c + 24576.0f) - 24576.0f;
    const Words u = bits_of(c), normal = (u + 0x7ffffu + (u >> 20 & 1u)) & 0xfff00000u;
    return smaller(c < 0.015625f ? small : of_bits(normal), all(448.0f));
}
inline Floats e2m1_nearest(Floats a) {
    a = smaller(a, all(6.0f));
    const Floats magic = a < 2.0f ? all(6291456.0f) : (a < 4.0f ? all(12582912.0f) : all(25165824.0f));
    return (a + magic) - magic;
}

// Twice |y| rounded to the E2M1 grid: to the nearest of 0, 1, 2, 3, 4, 6, 8 and 12, or, by 8 random bits, to an integer from 0 to 15
// that on_grid rounds down to one of these. NaN gives 12.
inline Words binade_of(Floats a) { return larger(bits_of(a) & 0x7f800000u, Words{} + 0x40000000u); }       // at least that of 2 to 4, where steps are 1
inline Ints doubled(Floats y) {
    const Floats a = smaller(magnitude(y + y), all(12.0f)), magic = of_bits(binade_of(a) + ((22u << 23) + 0x400000u));     // 1.5 * 2^23 * step
    return __builtin_convertvector((a + magic) - magic, Ints);
}
inline Ints doubled(Floats y, Words random) {
    const Floats a = smaller(magnitude(y + y), all(12.0f)), unit = of_bits(binade_of(a) - (9u << 23));      // step / 256
    return __builtin_convertvector(a + __builtin_convertvector(reinterpret_cast<Ints>(random), Floats) * unit, Ints);
}
inline Octets on_grid(Octets n) { return n & (n > 7 ? Octets{} - 4 : (n > 3 ? Octets{} - 2 : Octets{} - 1)); }
// The values themselves, with their signs, for dequantized faces.
inline Floats grid_value(Floats y) { return of_bits(bits_of(e2m1_nearest(magnitude(y))) | (bits_of(y) & 0x80000000u)); }
inline Floats grid_value(Floats y, Words random) {
    const Floats a = smaller(magnitude(y), all(6.0f)), unit = of_bits(larger(bits_of(a) & 0x7f800000u, Words{} + 0x3f800000u) - (9u << 23));
    const Floats t = a + __builtin_convertvector(reinterpret_cast<Ints>(random), Floats) * unit;
    const Words big = bits_of(t) & 0xffc00000u, small = t < 0.5f ? Words{} : Words{} + 0x3f000000u;
    return of_bits((t < 1.0f ? small : big) | (bits_of(y) & 0x80000000u));
}

// Of bytes on that grid, with the bytes -1 for negative values and 0 for others: the bytes of a record, and codes.
inline Octets record_bytes(Octets n, Octets minus) { return ((n ^ minus) - minus) + 12; }
inline Octets codes_of(Octets n, Octets minus) {
    const Octets half = (n >> 1) + 2;                              // 4, 6, 8 of 4, 6, 8: codes 4, 5, 6; 12 gives 8 for 7
    return (n > 3 ? (half > 7 ? Octets{} + 7 : half) : n) | (minus & 8);
}

// The low bytes of four vectors: those of one lane as its word (columns), or all in their order (a row).
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512i packed(const Ints* q) {
    const __m512i* v = reinterpret_cast<const __m512i*>(q);
    return _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}
inline Octets column_bytes(const Ints* q) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return reinterpret_cast<Octets>(_mm512_shuffle_epi8(packed(q), order));
}
inline Octets row_bytes(const Ints* q) {
    return reinterpret_cast<Octets>(_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed(q)));
}
#elif defined(__AVX2__)
inline __m256i packed(const Ints* q) {
    const __m256i* v = reinterpret_cast<const __m256i*>(q);
    return _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
}
inline Octets column_bytes(const Ints* q) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return reinterpret_cast<Octets>(_mm256_shuffle_epi8(packed(q), order));
}
inline Octets row_bytes(const Ints* q) { return reinterpret_cast<Octets>(_mm256_permutevar8x32_epi32(packed(q), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))); }
#else
inline Octets column_bytes(const Ints* q) {
    Words all{};
    for (int i = 0; i < 4; ++i) all |= (reinterpret_cast<Words>(q[i]) & 255u) << (8 * i);
    return reinterpret_cast<Octets>(all);
}
inline Octets row_bytes(const Ints* q) {
    Octets all;
    for (int i = 0; i < 4; ++i) for (int j = 0; j < LANES; ++j) all[i * LANES + j] = int8_t(q[i][j]);
    return all;
}
#endif

// Conversions between widths, for which g++ makes scalar code of __builtin_convertvector.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline Words words_of(const uint8_t* p) { return reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline void low_bytes(Words w, uint8_t* out) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(w))); }
inline void halves_of(const uint64_t* p, Words& low, Words& high) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 8), even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    low = reinterpret_cast<Words>(_mm512_permutex2var_epi32(a, even, b));
    high = reinterpret_cast<Words>(_mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
}
inline void store_pairs(Words a, Words b, uint8_t* out) {          // a word of a, a word of b, ...
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), va = reinterpret_cast<__m512i>(a), vb = reinterpret_cast<__m512i>(b);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(va, low, vb)); _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi32(va, _mm512_add_epi32(low, _mm512_set1_epi32(8)), vb));
}
inline bool any_above(Words v, uint32_t bound) { return _mm512_cmpgt_epu32_mask(reinterpret_cast<__m512i>(v), _mm512_set1_epi32(int32_t(bound))) != 0; }
inline void even_bytes(Octets v, uint8_t* out) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(reinterpret_cast<__m512i>(v))); }
#elif defined(__AVX2__)
inline Words words_of(const uint8_t* p) { return reinterpret_cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline void low_bytes(Words w, uint8_t* out) {
    const __m256i v = reinterpret_cast<__m256i>(w), order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)), b = _mm256_shuffle_epi8(v, order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
}
inline void halves_of(const uint64_t* p, Words& low, Words& high) {
    const __m256 a = _mm256_loadu_ps(reinterpret_cast<const float*>(p)), b = _mm256_loadu_ps(reinterpret_cast<const float*>(p) + 8);
    low = reinterpret_cast<Words>(_mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
    high = reinterpret_cast<Words>(_mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}
inline void store_pairs(Words a, Words b, uint8_t* out) {          // a word of a, a word of b, ...
    const __m256i va = reinterpret_cast<__m256i>(a), vb = reinterpret_cast<__m256i>(b), low = _mm256_unpacklo_epi32(va, vb), high = _mm256_unpackhi_epi32(va, vb);
    __m256i* p = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(p, _mm256_permute2x128_si256(low, high, 0x20)); _mm256_storeu_si256(p + 1, _mm256_permute2x128_si256(low, high, 0x31));
}
inline bool any_above(Words v, uint32_t bound) { return _mm256_movemask_epi8(_mm256_cmpgt_epi32(reinterpret_cast<__m256i>(v), _mm256_set1_epi32(int32_t(bound)))) != 0; }      // below 2^31
inline void even_bytes(Octets v, uint8_t* out) {
    const __m256i low = _mm256_and_si256(reinterpret_cast<__m256i>(v), _mm256_set1_epi16(255));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
#else
inline Words words_of(const uint8_t* p) { Words w; for (int j = 0; j < LANES; ++j) w[j] = p[j]; return w; }
inline void low_bytes(Words w, uint8_t* out) { for (int j = 0; j < LANES; ++j) out[j] = uint8_t(w[j]); }
inline void halves_of(const uint64_t* p, Words& low, Words& high) { for (int j = 0; j < LANES; ++j) { low[j] = uint32_t(p[j]); high[j] = uint32_t(p[j] >> 32); } }
inline void store_pairs(Words a, Words b, uint8_t* out) { for (int j = 0; j < LANES; ++j) { const uint32_t pair[2] = {a[j], b[j]}; std::memcpy(out + 8 * j, pair, 8); } }
inline bool any_above(Words v, uint32_t bound) { bool any = false; for (int j = 0; j < LANES; ++j) any |= v[j] > bound; return any; }
inline void even_bytes(Octets v, uint8_t* out) { for (int j = 0; j < 2 * LANES; ++j) out[j] = uint8_t(v[2 * j]); }
#endif

// Writes the 16 bytes of each column, a word from each of four vectors, to out, out + step, ...
inline void store_columns(const Words* w, uint8_t* out, int64_t step) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m512i* v = reinterpret_cast<const __m512i*>(w);
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]), c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    const __m512i of[4] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), _mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d)};
    for (int j = 0; j < 4; ++j) {
        __m128i* p = reinterpret_cast<__m128i*>(out + j * step);
        const auto at = [&](int k) { return reinterpret_cast<__m128i*>(reinterpret_cast<uint8_t*>(p) + 4 * k * step); };
        _mm_storeu_si128(p, _mm512_castsi512_si128(of[j])); _mm_storeu_si128(at(1), _mm512_extracti32x4_epi32(of[j], 1));
        _mm_storeu_si128(at(2), _mm512_extracti32x4_epi32(of[j], 2)); _mm_storeu_si128(at(3), _mm512_extracti32x4_epi32(of[j], 3));
    }
#elif defined(__AVX2__)
    const __m256i* v = reinterpret_cast<const __m256i*>(w);
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]), c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    const __m256i of[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b), _mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d)};
    for (int j = 0; j < 4; ++j) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * step), _mm256_castsi256_si128(of[j]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (j + 4) * step), _mm256_extracti128_si256(of[j], 1));
    }
#else
    for (int j = 0; j < LANES; ++j) for (int k = 0; k < 4; ++k) { const uint32_t word = w[k][j]; std::memcpy(out + j * step + 4 * k, &word, 4); }
#endif
}

// Philox4x32-10 of LANES counters: 16 random bytes each.
struct Random { Words word[4]; };
struct Keys { uint32_t low[10], high[10]; };                       // of each round
Keys keys_of(uint64_t seed) {
    Keys k;
    for (uint32_t i = 0; i < 10; ++i) { k.low[i] = uint32_t(seed) + i * 0x9E3779B9u; k.high[i] = uint32_t(seed >> 32) + i * 0xBB67AE85u; }
    return k;
}
struct Product { Words high, low; };
inline Product wide_product(Words a, uint32_t k) {                // the halves of the 64-bit products
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m512i v = reinterpret_cast<__m512i>(a), factor = _mm512_set1_epi32(int32_t(k));
    const __m512i even = _mm512_mul_epu32(v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), factor);
    return {reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)), reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)))};
#elif defined(__AVX2__)
    const __m256i v = reinterpret_cast<__m256i>(a), factor = _mm256_set1_epi32(int32_t(k));
    const __m256i even = _mm256_mul_epu32(v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), factor);
    return {reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)), reinterpret_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa))};
#else
    Product p;
    for (int j = 0; j < LANES; ++j) { const uint64_t v = uint64_t(a[j]) * k; p.high[j] = uint32_t(v >> 32); p.low[j] = uint32_t(v); }
    return p;
#endif
}
// Of two vectors of counters at a time: a round waits for the one before, and the two do not wait for each other.
inline void philox(const uint64_t* index, uint32_t face, const Keys& keys, Random* out) {
    Words a[2], b[2], c[2], d[2];
    for (int n = 0; n < 2; ++n) {
        halves_of(index + n * LANES, a[n], b[n]);
        c[n] = Words{} + face; d[n] = Words{};
    }
    for (int round = 0; round < 10; ++round)
        for (int n = 0; n < 2; ++n) {
            const Product p0 = wide_product(a[n], 0xD2511F53u), p1 = wide_product(c[n], 0xCD9E8D57u);
            a[n] = p1.high ^ b[n] ^ keys.low[round]; c[n] = p0.high ^ d[n] ^ keys.high[round]; b[n] = p1.low; d[n] = p0.low;
        }
    for (int n = 0; n < 2; ++n) out[n] = {{a[n], b[n], c[n], d[n]}};
}

// Columns at, at + 1, ... of 16 rows into t; signs applied, rotated, times 1/4 (bf16: rounded to bf16). Columns from n on are zeros.
// WHOLE: no row is missing and no column. The largest magnitudes before all that, as bits, are collected in `plain`.
template <class T, bool RHT, bool WHOLE>
inline void load_tile(const T* const* rows, int64_t at, int n, Floats* t, Words& plain) {
    Words top = plain;
    const auto load_row = [&](int i) {
        Floats v{};
        if (WHOLE || (rows[i] && n == LANES)) v = load_lanes(rows[i] + at);
        else if (rows[i]) { T edge[LANES] = {}; std::memcpy(edge, rows[i] + at, size_t(n) * sizeof(T)); v = load_lanes(edge); }
        top = larger(top, bits_of(v) & 0x7fffffffu);
        return RHT && SIGN[i] < 0 ? of_bits(bits_of(v) ^ 0x80000000u) : v;    // -0.0 counts: signs first, of rows of zeros, too
    };
    if (!RHT) { for (int i = 0; i < 16; ++i) t[i] = load_row(i); plain = top; return; }
    const auto butterflies = [&](Floats& a, Floats& b, Floats& c, Floats& d) {              // two stages of the transform
        const Floats ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        a = ab + cd; c = ab - cd; b = a_b + c_d; d = a_b - c_d;
    };
    #pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        Floats a = load_row(i), b = load_row(i + 1), c = load_row(i + 2), d = load_row(i + 3);
        butterflies(a, b, c, d);
        t[i] = a; t[i + 1] = b; t[i + 2] = c; t[i + 3] = d;
    }
    plain = top;
    #pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        Floats v[4] = {t[i], t[i + 4], t[i + 8], t[i + 12]};
        butterflies(v[0], v[1], v[2], v[3]);
        #pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            v[k] = v[k] * 0.25f;
            if (sizeof(T) == 2) { const Words u = bits_of(v[k]); v[k] = of_bits((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u); }
            t[i + 4 * k] = v[k];
        }
    }
}

template <class T>
inline bool no_row_missing(const T* const* rows) { bool all_there = true; for (int i = 0; i < 16; ++i) all_there &= rows[i] != nullptr; return all_there; }
template <class T, bool RHT>
inline void load_tile(const T* const* rows, bool full, int64_t at, int n, Floats* t, Words& plain) {
    if (full && n == LANES) load_tile<T, RHT, true>(rows, at, n, t, plain);
    else load_tile<T, RHT, false>(rows, at, n, t, plain);
}

inline Words tile_amax(const Floats* t) {
    Words m{};
    for (int i = 0; i < 16; ++i) m = larger(m, bits_of(t[i]) & 0x7fffffffu);
    return m;
}
inline uint32_t lane_amax(Words m) {
    uint32_t top = 0;
    for (int j = 0; j < LANES; ++j) top = std::max(top, uint32_t(m[j]));
    return top;
}

template <class T>
uint32_t amax_flat(const T* p, int64_t n) {
    uint32_t acc[CHUNK] = {0};
    int64_t k = 0;
    for (; k + CHUNK <= n; k += CHUNK)
        for (int j = 0; j < CHUNK; ++j) { uint32_t a = as_bits(load(p + k + j)) & 0x7fffffffu; acc[j] = acc[j] > a ? acc[j] : a; }
    uint32_t m = 0;
    for (; k < n; ++k) m = std::max(m, as_bits(load(p + k)) & 0x7fffffffu);
    for (int j = 0; j < CHUNK; ++j) m = std::max(m, acc[j]);
    return m;
}

struct Operand {            // see native.py: the same fields in the same order
    const void* x; const int64_t* row_start;      // [G16 * 16 * L] offsets into x in elements, -1 = a row of zeros; nullptr: plain images
    int64_t images, L, Wp, C, groups;             // images of x itself, rows of an image, pixels of a row
    int64_t fold_images, fold_L;                  // images and rows of the columnwise operand (multiple of 16 images)
    void* row_dq; uint8_t* row_codes; uint8_t* row_scale; uint8_t* row_records;      // any may be nullptr
    void* col_dq; uint8_t* col_codes; uint8_t* col_scale; uint8_t* col_records;      // records: the operands of integer.cpp
    float* amax;                                  // [2]: rowwise, columnwise: written by amax, read by quantize
    float* observed;                              // [3], or nullptr: amaxes that quantize met in each face, saturated blocks
    int64_t seed; int32_t rht, stochastic, in_bf16, out_bf16, threads, want_row, want_col, error; float e4m3_max;   // error: 0 none, 1 MAE, 2 MSE: 4over6
    int32_t each_once;                            // row_start has every row of x once, beside rows of zeros

    // Whether both faces are made in one pass: then every row of x is a row of the columns.
    bool together() const { return want_row && want_col && (row_start == nullptr || each_once); }
};

// What one thread met while it quantized: amaxes as bits, and blocks whose scale exceeded 448 before rounding.
struct Seen { uint32_t row = 0, col = 0; int64_t saturated = 0; };
void merge(Seen& into, const Seen& from) { into.row = std::max(into.row, from.row); into.col = std::max(into.col, from.col); into.saturated += from.saturated; }

// ------------------------------------------------------------------------------------------------ rowwise
// NB blocks of 16 values rounded: 2 * |value|, and -1 for negative values.
struct Rounded { alignas(64) int8_t doubles[NB * 16], minus[NB * 16]; };

template <bool SR, class F>
inline void round_blocks(const float (*v)[16], const float* e, const uint8_t* random, Rounded& out) {
    for (int at = 0; at < NB * 16; at += 4 * LANES) {
        Ints n[4], minus[4];
        for (int i = 0; i < 4; ++i) {
            const int k = at + i * LANES;
            const Floats y = F::divided(load_lanes(v[0] + k), e[k / 16]);
            n[i] = SR ? doubled(y, words_of(random + k)) : doubled(y);
            minus[i] = reinterpret_cast<Ints>(y) >> 31;
        }
        const Octets bytes = row_bytes(n), signs = row_bytes(minus), rounded = SR ? on_grid(bytes) : bytes;
        std::memcpy(out.doubles + at, &rounded, sizeof rounded); std::memcpy(out.minus + at, &signs, sizeof signs);
    }
}
inline void write_codes(const Rounded& r, uint8_t* out) {          // NB * 8 bytes
    for (int at = 0; at < NB * 16; at += 4 * LANES) {
        const Words code = reinterpret_cast<Words>(codes_of(read<Octets>(r.doubles + at), read<Octets>(r.minus + at)));
        even_bytes(reinterpret_cast<Octets>(code | code >> 4), out + at / 2);
    }
}
// The values of one block times its scale, the first n of them.
template <bool SR, class F, class D>
inline void write_values(const float* v, float e, float s, const uint8_t* random, D* out, int n) {
    D edge[16], *to = n == 16 ? out : edge;
    for (int k = 0; k < 16; k += LANES) {
        const Floats y = F::divided(load_lanes(v + k), e);
        store_lanes(to + k, (SR ? grid_value(y, words_of(random + k)) : grid_value(y)) * s);
    }
    if (n < 16) std::memcpy(out, edge, size_t(n) * sizeof(D));
}

// A NaN has no sign: 16 values in which there is one lose the signs of NaNs.
inline void unsign_nans(float* v, int64_t step = 1) {
    for (int k = 0; k < 16; ++k) { const uint32_t u = as_bits(v[k * step]); if ((u & 0x7fffffffu) > INF_BITS) v[k * step] = as_float(u & 0x7fffffffu); }
}

// NB blocks of 16 values, in v: scales, rounding, stores of the first nb. n[b] values of block b are real, p[b] is where they go in the dequantized face.
// The first of them is block kb of the Kb of its segment: a pair of blocks that share a scale does not reach over its end.
template <class D, bool SR, class F>
inline void quantize_blocks(const float (*v)[16], const uint64_t* index, const Keys& keys, const F& S, D* const* p, const int* n, int nb, [[maybe_unused]] int64_t kb, [[maybe_unused]] int64_t Kb,
                            uint8_t* codes, uint8_t* scale, uint8_t* records, Seen* seen) {
    float s[NB], e[NB], amax[NB], without_nans[NB][16]; alignas(64) uint8_t random[NB * 16];
    block_amaxes(v, amax);
    if (F::PAIRS && S.pairs) for (int b = 0; b < nb; ++b) {
        if (kb % 2 == 0 && kb + 1 < Kb) amax[b] = amax[b + 1] = as_float(std::max(as_bits(amax[b]), as_bits(amax[b + 1])));
        kb = kb + 1 == Kb ? 0 : kb + 1;
    }
    uint32_t top = 0;
    for (int b = 0; b < NB; ++b) top = std::max(top, as_bits(amax[b]));
    if (seen) { seen->row = std::max(seen->row, top); for (int b = 0; b < NB; ++b) seen->saturated += S.saturates(amax[b]); }
    S.of_blocks(v, amax, s, e);
    if (top > INF_BITS) {
        std::memcpy(without_nans, v, sizeof without_nans);
        for (int b = 0; b < NB; ++b) unsign_nans(without_nans[b]);
        v = without_nans;
    }
    if (SR) for (int b = 0; b < NB; b += 2 * LANES) {
        Random r[2];
        philox(index + b, 0, keys, r);
        for (int i = 0; i < 2 && b + i * LANES < NB; ++i) store_columns(r[i].word, random + (b + i * LANES) * 16, 16);
    }
    if (p) for (int b = 0; b < nb; ++b) write_values<SR, F>(v[b], e[b], s[b], random + 16 * b, p[b], n[b]);
    Rounded r;
    if (records || codes) round_blocks<SR, F>(v, e, random, r);
    if (records) {
        alignas(64) uint8_t bytes[NB * 16];
        for (int at = 0; at < NB * 16; at += 4 * LANES) { const Octets o = record_bytes(read<Octets>(r.doubles + at), read<Octets>(r.minus + at)); std::memcpy(bytes + at, &o, sizeof o); }
        for (int b = 0; b < nb; ++b) { const float half = s[b] * 0.5f; std::memcpy(records + b * RECORD, bytes + b * 16, 16); std::memcpy(records + b * RECORD + 16, &half, 4); }
    }
    if (codes) {
        if (nb == NB) write_codes(r, codes);
        else { uint8_t all_codes[NB * 8]; write_codes(r, all_codes); std::memcpy(codes, all_codes, size_t(nb) * 8); }
    }
    if (scale) for (int b = 0; b < nb; ++b) scale[b] = S.byte(s[b]);
}

template <class T>
inline void read_floats(const T* p, int n, float* into) { for (int k = 0; k < n; ++k) into[k] = load(p + k); }

template <class T, class D, bool SR, class F>
void row_run(const Operand& q, const T* x, int64_t image, int64_t row, const F& S, const Keys& keys, Seen* seen) {
    const int64_t Cg = q.C / q.groups, Kb = (Cg + 15) / 16, segments = q.Wp * q.groups, total = segments * Kb, of_pixel = q.groups * Kb;
    const int64_t base = (image * q.L + row) * q.Wp * q.C, sbase = (image * q.L + row) * total;
    D* dq = q.row_dq ? static_cast<D*>(q.row_dq) + base : nullptr;
    const bool even = Cg % 16 == 0;
    float v[NB][16]; uint64_t index[std::max(NB, 2 * LANES)] = {}; D* p[NB]; int n[NB];
    int64_t seg = 0, kb = 0, in_pixel = 0;
    uint64_t pixel_index = uint64_t((row * q.Wp * q.images + image) * of_pixel);             // the Philox index of a pixel's first block
    uint8_t of_pairs[NB], *next_scale = q.row_scale + (image * q.L + row) * segments * ((Kb + 1) / 2);      // one byte for two blocks
    for (int64_t b0 = 0, step; b0 < total; b0 += step) {
        int nb = int(std::min<int64_t>(NB, total - b0));
        if (F::PAIRS && S.pairs && b0 + nb < total && (b0 + nb) % Kb % 2) --nb;      // leave the second block of a pair with the first
        step = F::PAIRS ? nb : NB;
        if (SR) for (int b = 0; b < nb; ++b) {
            index[b] = pixel_index + uint64_t(in_pixel);
            if (++in_pixel == of_pixel) { in_pixel = 0; pixel_index += uint64_t(q.images * of_pixel); }
        }
        if (dq || !even) for (int b = 0; b < nb; ++b) {
            const int64_t at = seg * Cg + kb * 16;
            n[b] = int(std::min<int64_t>(16, Cg - kb * 16));
            p[b] = dq + at;
            if (!even) for (int k = 0; k < 16; ++k) v[b][k] = k < n[b] ? load(x + at + k) : 0.0f;
            if (++kb == Kb) { kb = 0; ++seg; }
        }
        const float (*from)[16] = v;
        if (even && nb == NB && sizeof(T) == 4) from = reinterpret_cast<const float (*)[16]>(x + b0 * 16);
        else if (even && nb == NB) read_floats(x + b0 * 16, NB * 16, v[0]);
        else if (even) read_floats(x + b0 * 16, nb * 16, v[0]);
        for (int b = nb; b < NB; ++b) for (int k = 0; k < 16; ++k) v[b][k] = 0.0f;
        uint8_t* const scale = F::PAIRS && S.pairs ? of_pairs : q.row_scale + sbase + b0;
        quantize_blocks<D, SR>(from, index, keys, S, dq ? p : nullptr, n, nb, F::PAIRS ? b0 % Kb : 0, Kb,
                               q.row_codes ? q.row_codes + (sbase + b0) * 8 : nullptr, q.row_scale ? scale : nullptr, q.row_records ? q.row_records + (sbase + b0) * RECORD : nullptr, seen);
        if (F::PAIRS && S.pairs && q.row_scale) for (int b = 0; b < nb; ++b) if ((b0 + b) % Kb % 2 == 0) *next_scale++ = of_pairs[b];
    }
}

// ------------------------------------------------------------------------------------------------ columnwise
// `partner`: the rows of the block that shares its scales, or nullptr.
template <class T, class D, bool RHT, bool SR, class F>
void col_run(const Operand& q, const T* const* rows, [[maybe_unused]] const T* const* partner, int64_t g16, int64_t row, const F& S, const Keys& keys, Seen* seen) {
    const int64_t run = q.Wp * q.C, N16 = q.fold_images / 16, M16 = q.fold_L * q.Wp * N16, out = (g16 * q.fold_L + row) * run;
    int64_t w = 0, c = 0, ahead_w = 0, ahead_c = 0;                // pixel and channel of the first column, and of the next one whose index is wanted
    uint64_t counters[2 * LANES];                                  // the Philox indices of two vectors of columns
    const auto next_counters = [&] {
        const auto index = [&] { return uint64_t(ahead_c * M16 + (row * q.Wp + ahead_w) * N16 + g16); };
        for (int v = 0; v < 2 * LANES; v += LANES)
            if (ahead_c + LANES <= q.C) {                          // all of one pixel
                const uint64_t first = index();
                for (int j = 0; j < LANES; ++j) counters[v + j] = first + uint64_t(j) * uint64_t(M16);
                if ((ahead_c += LANES) == q.C) { ahead_c = 0; ++ahead_w; }
            } else for (int j = 0; j < LANES; ++j) { counters[v + j] = index(); if (++ahead_c == q.C) { ahead_c = 0; ++ahead_w; } }
    };
    const bool full = no_row_missing(rows), partner_full = F::PAIRS && partner && no_row_missing(partner); Words unused{};
    // One byte for two blocks is the first one's to write.
    uint8_t* const scales = F::PAIRS && S.pairs ? (q.col_scale && g16 % 2 == 0 ? q.col_scale + (g16 / 2 * q.fold_L + row) * run : nullptr) : (q.col_scale ? q.col_scale + out : nullptr);
    Random random[2]; bool second = true;                          // the random bytes of two vectors of columns; the second one is at hand
    for (int64_t at = 0; at < run; at += LANES) {
        const int n = int(std::min<int64_t>(LANES, run - at));
        Floats t[16];
        load_tile<T, RHT>(rows, full, at, n, t, unused);
        Words amax = tile_amax(t);
        if (F::PAIRS && partner) {
            Floats other[16];
            load_tile<T, RHT>(partner, partner_full, at, n, other, unused);
            amax = larger(amax, tile_amax(other));
        }
        if (seen) {
            seen->col = std::max(seen->col, lane_amax(amax));
            for (int j = 0; j < LANES; ++j) seen->saturated += S.saturates(as_float(amax[j]));
        }
        const Floats s = S.of_columns(t, amax), e = S.divisor(s);
        if (any_above(amax, INF_BITS)) for (int j = 0; j < LANES; ++j) unsign_nans(reinterpret_cast<float*>(t) + j, LANES);
        if (SR && (second = !second) == false) { next_counters(); philox(counters, 1, keys, random); }
        if (q.col_dq) for (int i = 0; i < 16; ++i) {
            const Floats y = F::divided(t[i], e), value = (SR ? grid_value(y, random[second].word[i / 4] >> (8 * (i % 4)) & 255u) : grid_value(y)) * s;
            D* p = static_cast<D*>(q.col_dq) + ((g16 * 16 + i) * q.fold_L + row) * run + at;
            if (n == LANES) store_lanes(p, value);
            else { D edge[LANES]; store_lanes(edge, value); std::memcpy(p, edge, size_t(n) * sizeof(D)); }
        }
        Words doubles[4], minus[4];                                // bytes of 4 images each
        if (q.col_records || q.col_codes) for (int k = 0; k < 4; ++k) {
            Ints bytes[4], signs[4];
            for (int i = 0; i < 4; ++i) {
                const Floats y = F::divided(t[4 * k + i], e);
                bytes[i] = SR ? doubled(y, random[second].word[k] >> (8 * i) & 255u) : doubled(y);
                signs[i] = reinterpret_cast<Ints>(y) >> 31;
            }
            const Octets packed_bytes = column_bytes(bytes);
            doubles[k] = reinterpret_cast<Words>(SR ? on_grid(packed_bytes) : packed_bytes);
            minus[k] = reinterpret_cast<Words>(column_bytes(signs));
        }
        if (q.col_records) {                                       // [row, pixel, N16, C, RECORD]
            Words bytes[4];
            for (int k = 0; k < 4; ++k) bytes[k] = reinterpret_cast<Words>(record_bytes(reinterpret_cast<Octets>(doubles[k]), reinterpret_cast<Octets>(minus[k])));
            float half[LANES];
            store_lanes(half, s * 0.5f);
            const auto record = [&] { return q.col_records + (((row * q.Wp + w) * N16 + g16) * q.C + c) * RECORD; };
            if (c + LANES <= q.C) {                                // of one pixel: they follow each other
                uint8_t* p = record();
                store_columns(bytes, p, RECORD);
                for (int j = 0; j < LANES; ++j) std::memcpy(p + j * RECORD + 16, half + j, 4);
                if ((c += LANES) == q.C) { c = 0; ++w; }
            } else {
                uint8_t columns[LANES * 16];
                store_columns(bytes, columns, 16);
                for (int j = 0; j < n; ++j) {
                    std::memcpy(record(), columns + 16 * j, 16); std::memcpy(record() + 16, half + j, 4);
                    if (++c == q.C) { c = 0; ++w; }
                }
            }
        }
        if (q.col_codes) {
            Words quarter[4];                                      // the codes of 4 images in 16 bits
            for (int k = 0; k < 4; ++k) {
                const Words code = reinterpret_cast<Words>(codes_of(reinterpret_cast<Octets>(doubles[k]), reinterpret_cast<Octets>(minus[k])));
                const Words pairs = (code | code >> 4) & 0x00ff00ffu;
                quarter[k] = (pairs | pairs >> 8) & 0xffffu;
            }
            const Words low = quarter[0] | quarter[1] << 16, high = quarter[2] | quarter[3] << 16;
            uint8_t *p = q.col_codes + (out + at) * 8, edge[LANES * 8];
            store_pairs(low, high, n == LANES ? p : edge);
            if (n < LANES) std::memcpy(p, edge, size_t(n) * 8);
        }
        if (scales) {
            uint8_t *p = scales + at, edge[LANES];
            low_bytes(S.bytes(s), n == LANES ? p : edge);
            if (n < LANES) std::memcpy(p, edge, size_t(n));
        }
    }
}

template <class T>
bool row_pointers(const Operand& q, int64_t g16, int64_t row, const T** rows) {
    const T* x = static_cast<const T*>(q.x);
    bool any = false;
    for (int i = 0; i < 16; ++i) {
        const int64_t image = g16 * 16 + i;
        int64_t offset;
        if (q.row_start) offset = q.row_start[image * q.fold_L + row];
        else offset = image < q.images ? (image * q.L + row) * q.Wp * q.C : -1;
        rows[i] = offset < 0 ? nullptr : x + offset;
        any |= offset >= 0;
    }
    return any;
}

template <class T, bool RHT>
void amax_operand(const Operand& q) {
    const int64_t run = q.Wp * q.C, N16 = q.fold_images / 16, items = N16 * q.fold_L, elements = q.images * q.L * run;
    uint32_t row_max = 0, col_max = 0;
    const bool together = q.together();
    if (q.want_row && !together) {
        const int64_t piece = 1 << 14, pieces = (elements + piece - 1) / piece;
        #pragma omp parallel for num_threads(q.threads) schedule(static) reduction(max : row_max)
        for (int64_t k = 0; k < pieces; ++k)
            row_max = std::max(row_max, amax_flat(static_cast<const T*>(q.x) + k * piece, std::min(piece, elements - k * piece)));
    }
    if (q.want_col) {
        #pragma omp parallel for num_threads(q.threads) schedule(static) reduction(max : row_max, col_max)
        for (int64_t item = 0; item < items; ++item) {
            const T* rows[16];
            if (!row_pointers<T>(q, item / q.fold_L, item % q.fold_L, rows)) continue;
            const bool full = no_row_missing(rows);
            Words m{}, plain{};
            for (int64_t at = 0; at < run; at += LANES) {
                Floats t[16];
                load_tile<T, RHT>(rows, full, at, int(std::min<int64_t>(LANES, run - at)), t, plain);
                m = larger(m, tile_amax(t));
            }
            if (together) row_max = std::max(row_max, lane_amax(plain));
            col_max = std::max(col_max, lane_amax(m));
        }
    }
    q.amax[0] = as_float(row_max);
    q.amax[1] = as_float(col_max);
}

template <class T, class D, bool RHT, bool SR, class F>
void quantize_operand(const Operand& q, const F& row_scale, const F& col_scale) {
    const int64_t N16 = q.fold_images / 16;
    const T* x = static_cast<const T*>(q.x);
    const Keys keys = keys_of(uint64_t(q.seed));
    const bool together = q.together();                            // the 16 rows are still in the cache
    Seen total;
    #pragma omp parallel num_threads(q.threads)
    {
        Seen own, *seen = q.observed ? &own : nullptr;
        if (q.want_col) {
            const int64_t items = N16 * q.fold_L;
            #pragma omp for schedule(static)
            for (int64_t item = 0; item < items; ++item) {
                const int64_t g16 = item / q.fold_L, row = item % q.fold_L;
                const T *rows[16], *others[16], **partner = nullptr;
                row_pointers<T>(q, g16, row, rows);
                if (F::PAIRS && col_scale.pairs && (g16 ^ 1) < N16) row_pointers<T>(q, g16 ^ 1, row, partner = others);
                col_run<T, D, RHT, SR>(q, rows, partner, g16, row, col_scale, keys, seen);
                if (together) for (int i = 0; i < 16; ++i) if (rows[i]) row_run<T, D, SR>(q, rows[i], q.row_start ? (rows[i] - x) / (q.Wp * q.C) : g16 * 16 + i, row, row_scale, keys, seen);
            }
        }
        if (q.want_row && !together) {
            const int64_t items = q.images * q.L;
            #pragma omp for schedule(static)
            for (int64_t item = 0; item < items; ++item)
                row_run<T, D, SR>(q, x + item * q.Wp * q.C, item / q.L, item % q.L, row_scale, keys, seen);
        }
        #pragma omp critical
        merge(total, own);
    }
    if (q.observed) { q.observed[0] = as_float(total.row); q.observed[1] = as_float(total.col); q.observed[2] = float(total.saturated); }
}

template <class T, class D, class F>
void quantize_typed(const Operand& q, const F& row, const F& col) {
    if (q.rht) { if (q.stochastic) quantize_operand<T, D, true, true>(q, row, col); else quantize_operand<T, D, true, false>(q, row, col); }
    else { if (q.stochastic) quantize_operand<T, D, false, true>(q, row, col); else quantize_operand<T, D, false, false>(q, row, col); }
}

// The unpacking kernels read the byte of a block's scale, whose codes are in 8 bytes, by value_of(byte, codes).
template <class D, class V>
void unpack_columns(const uint8_t* codes, const uint8_t* scale, D* out, int64_t groups16, int64_t run, int threads, V value_of) {
    const int64_t pieces = (run + CHUNK - 1) / CHUNK;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < groups16 * pieces; ++item) {
        const int64_t g = item / pieces, at = item % pieces * CHUNK;
        const int n = int(std::min<int64_t>(CHUNK, run - at));
        uint32_t lo[CHUNK] = {0}, hi[CHUNK] = {0}; float s[CHUNK] = {0};
        const uint32_t* p = reinterpret_cast<const uint32_t*>(codes) + (g * run + at) * 2;
        for (int j = 0; j < n; ++j) { lo[j] = p[2 * j]; hi[j] = p[2 * j + 1]; }
        for (int j = 0; j < n; ++j) s[j] = value_of(scale[g * run + at + j], codes + (g * run + at + j) * 8);
        for (int i = 0; i < 16; ++i) {
            const uint32_t* word = i < 8 ? lo : hi; const int shift = 4 * (i % 8);
            D* o = out + (g * 16 + i) * run + at;
            if (n == CHUNK) { for (int j = 0; j < CHUNK; ++j) store(o + j, e2m1_value(word[j] >> shift & 15u) * s[j]); }
            else { for (int j = 0; j < n; ++j) store(o + j, e2m1_value(word[j] >> shift & 15u) * s[j]); }
        }
    }
}

template <class D, class V>
void unpack_rows(const uint8_t* codes, const uint8_t* scale, D* out, int64_t segments, int64_t Cg, int threads, V value_of) {
    const int64_t Kb = (Cg + 15) / 16;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t seg = 0; seg < segments; ++seg)
        for (int64_t kb = 0; kb < Kb; ++kb) {
            const uint8_t* p = codes + (seg * Kb + kb) * 8;
            const float s = value_of(scale[seg * Kb + kb], p);
            const int n = int(std::min<int64_t>(16, Cg - kb * 16));
            float v[16];
            unpack_block(p, s, v);
            if (n == 16) { for (int k = 0; k < 16; ++k) store(out + seg * Cg + kb * 16 + k, v[k]); }
            else { for (int k = 0; k < n; ++k) store(out + seg * Cg + kb * 16 + k, v[k]); }
        }
}

struct Weight {
    const void* w; int64_t groups, Og, Cg, T, stride_o, stride_c, stride_t;
    void* dq; uint8_t* codes; uint8_t* scale; const float* amax;   // unpack: a factor for every value, or nullptr. dq [groups*Og, T, Cg]; codes [groups*Og, T, Kb*8]; scale [groups, Ob, T, Kb]
    int32_t in_bf16, out_bf16, threads, error; float e4m3_max;
};

// The largest magnitudes of 16x16 tiles as bits, [groups, Ob, T, Kb], or of 2 x 2 of them where those share a scale.
template <class W>
std::vector<uint32_t> tile_tops(const Weight& q) {
    const int64_t Ob = (q.Og + 15) / 16, Kb = (q.Cg + 15) / 16, items = q.groups * Ob * q.T;
    std::vector<uint32_t> tops(size_t(items * Kb), 0);
    const auto merge = [&](int64_t into, int64_t from) { tops[size_t(into)] = tops[size_t(from)] = std::max(tops[size_t(into)], tops[size_t(from)]); };
    #pragma omp parallel for num_threads(q.threads) schedule(static)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t t = item % q.T, ob = item / q.T % Ob, g = item / q.T / Ob;
        for (int64_t o = ob * 16; o < std::min(q.Og, ob * 16 + 16); ++o) {
            const W* p = static_cast<const W*>(q.w) + (g * q.Og + o) * q.stride_o + t * q.stride_t;
            for (int64_t c = 0; c < q.Cg; ++c) { uint32_t& top = tops[size_t(item * Kb + c / 16)]; top = std::max(top, as_bits(load(p + c * q.stride_c)) & 0x7fffffffu); }
        }
        for (int64_t kb = 0; kb + 1 < Kb; kb += 2) merge(item * Kb + kb, item * Kb + kb + 1);
    }
    for (int64_t g = 0; g < q.groups; ++g) for (int64_t ob = 0; ob + 1 < Ob; ob += 2)
        for (int64_t k = (g * Ob + ob) * q.T * Kb, end = k + q.T * Kb; k < end; ++k) merge(k, k + q.T * Kb);
    return tops;
}

template <class W, class D, class F>
void quantize_weight(const Weight& q, const F& S) {
    const int64_t Ob = (q.Og + 15) / 16, Kb = (q.Cg + 15) / 16, items = q.groups * Ob * Kb;
    std::vector<uint32_t> tops;
    if (F::PAIRS && S.pairs) tops = tile_tops<W>(q);
    #pragma omp parallel for num_threads(q.threads) schedule(static)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t kb = item % Kb, ob = item / Kb % Ob, g = item / Kb / Ob;
        const int no = int(std::min<int64_t>(16, q.Og - ob * 16)), nc = int(std::min<int64_t>(16, q.Cg - kb * 16));
        const W* w = static_cast<const W*>(q.w) + (g * q.Og + ob * 16) * q.stride_o + kb * 16 * q.stride_c;
        constexpr int TAPS = 32;
        float tile[TAPS][16][16];
        for (int64_t t0 = 0; t0 < q.T; t0 += TAPS) {
            const int nt = int(std::min<int64_t>(TAPS, q.T - t0));
            if (no < 16 || nc < 16) std::memset(tile, 0, sizeof(tile));
            for (int o = 0; o < no; ++o) {
                const W* p = w + o * q.stride_o + t0 * q.stride_t;
                if (q.stride_c == 1) { for (int t = 0; t < nt; ++t) for (int c = 0; c < nc; ++c) tile[t][o][c] = load(p + t * q.stride_t + c); }
                else { for (int c = 0; c < nc; ++c) for (int t = 0; t < nt; ++t) tile[t][o][c] = load(p + c * q.stride_c + t * q.stride_t); }
            }
            for (int t = 0; t < nt; ++t) {
                uint32_t top[16] = {0}, m = 0;
                for (int o = 0; o < 16; ++o)
                    for (int c = 0; c < 16; ++c) { uint32_t a = as_bits(tile[t][o][c]) & 0x7fffffffu; top[c] = top[c] > a ? top[c] : a; }
                for (int c = 0; c < 16; ++c) m = m > top[c] ? m : top[c];
                const int64_t place = ((g * Ob + ob) * q.T + t0 + t) * Kb + kb;
                if (F::PAIRS && S.pairs) m = tops[size_t(place)];
                const float s = S.of_tile(tile[t], as_float(m)), e = S.divisor(s);
                if (m > INF_BITS) for (int o = 0; o < 16; ++o) unsign_nans(tile[t][o]);
                float encode[NB]; Rounded r; uint8_t codes[NB * 8];
                std::fill(encode, encode + NB, e);
                if (q.codes) round_blocks<false, F>(tile[t], encode, nullptr, r);
                if (q.codes) write_codes(r, codes);
                for (int o = 0; o < no; ++o) {
                    const int64_t at = (g * q.Og + ob * 16 + o) * q.T + t0 + t;
                    if (q.dq) write_values<false, F>(tile[t][o], e, s, nullptr, static_cast<D*>(q.dq) + at * q.Cg + kb * 16, nc);
                    if (q.codes) std::memcpy(q.codes + (at * Kb + kb) * 8, codes + o * 8, 8);
                }
                if (!F::PAIRS || !S.pairs) { if (q.scale) q.scale[place] = S.byte(s); }
                else if (q.scale && ob % 2 == 0 && kb % 2 == 0) q.scale[((g * ((Ob + 1) / 2) + ob / 2) * q.T + t0 + t) * ((Kb + 1) / 2) + kb / 2] = S.byte(s);
            }
        }
    }
}


template <class D, class V>
void unpack_weight(const Weight& q, V value_of) {
    const float factor = q.amax ? *q.amax : 1.0f;
    const int64_t Ob = (q.Og + 15) / 16, Kb = (q.Cg + 15) / 16, rows = q.groups * q.Og;
    #pragma omp parallel for num_threads(q.threads) schedule(static)
    for (int64_t o = 0; o < rows; ++o)
        for (int64_t t = 0; t < q.T; ++t)
            for (int64_t kb = 0; kb < Kb; ++kb) {
                const int64_t at = o * q.T + t, g = o / q.Og, ob = o % q.Og / 16;
                const uint8_t* p = q.codes + (at * Kb + kb) * 8;
                const float s = value_of(q.scale[((g * Ob + ob) * q.T + t) * Kb + kb], p);
                const int n = int(std::min<int64_t>(16, q.Cg - kb * 16));
                float v[16];
                unpack_block(p, s, v);
                D* d = static_cast<D*>(q.dq) + at * q.Cg + kb * 16;
                if (n == 16) { for (int k = 0; k < 16; ++k) store_round(d + k, v[k] * factor); }
                else { for (int k = 0; k < n; ++k) store_round(d + k, v[k] * factor); }
            }
}

}  // namespace
