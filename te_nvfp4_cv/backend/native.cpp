// CPU kernels of te_nvfp4_cv: NVFP4 quantization of convolution and linear operands, in one pass over memory each.
//
// Built at first use by native.py with the user's C++ compiler (no torch headers, no Python.h) and called through ctypes.
// Numerics: those of formats.py, bit for bit. Every float operation below is one IEEE fp32 rounding; the file is compiled
// with -ffp-contract=off and without -ffast-math. amax is taken on the integer image of |x|, so NaN > inf > finite.
//
// An operand is a row-major array of B images; an image is L rows of `run` = Wp * C contiguous values (Wp pixels, C channels).
// Rowwise blocks: 16 channels of one pixel and one group (the last block of a group may be shorter).
// Columnwise blocks: 16 images at one (row, pixel, channel); "images" may be folded strips, given by a table of row pointers.
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

// 16 values on the E2M1 grid, with their signs, to 8 bytes of codes; and 8 bytes to 16 values times a scale.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline void pack_block(const float* r, uint8_t* out) {
    const __m512i bits = _mm512_loadu_si512(r), magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x3f800000));
    __m512i code = _mm512_sub_epi32(_mm512_srli_epi32(magnitude, 22), _mm512_set1_epi32(252));
    code = _mm512_mask_blend_epi32(small, code, _mm512_maskz_set1_epi32(_mm512_cmpneq_epi32_mask(magnitude, _mm512_setzero_si512()), 1));
    code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(bits, 28), _mm512_set1_epi32(8)));
    const __m128i bytes = _mm512_cvtepi32_epi8(code), pairs = _mm_or_si128(bytes, _mm_srli_epi16(bytes, 4));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_cvtepi16_epi8(pairs));
}
inline void unpack_block(const uint8_t* data, float s, float* v) {
    const __m512 grid = _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f);
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
    const __m128i codes = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi16(0x0f0f));
    _mm512_storeu_ps(v, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), grid), _mm512_set1_ps(s)));
}
#else
#if defined(__AVX2__)
// The low 4 bits of a byte: 2 * |value|, which the table turns into a code. Bit 7: the sign.
inline __m128i signed_doubles(const float* r) {
    const __m256 keep = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), two = _mm256_set1_ps(2.0f);
    __m256i half[2];
    for (int h = 0; h < 2; ++h) {
        const __m256 v = _mm256_loadu_ps(r + 8 * h);
        const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 24), _mm256_set1_epi32(0x80));
        half[h] = _mm256_or_si256(_mm256_cvttps_epi32(_mm256_mul_ps(_mm256_and_ps(v, keep), two)), sign);
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void pack_block(const float* r, uint8_t* out) {
    const __m128i bytes = signed_doubles(r), table = _mm_setr_epi8(0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7, 0, 0, 0);
    const __m128i magnitude = _mm_shuffle_epi8(table, _mm_and_si128(bytes, _mm_set1_epi8(15)));
    const __m128i code = _mm_or_si128(magnitude, _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(8)));
    const __m128i pairs = _mm_maddubs_epi16(code, _mm_set1_epi16(0x1001));               // low code + 16 * high code
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(pairs, pairs));
}
#else
inline void pack_block(const float* r, uint8_t* out) {
    uint32_t c[16];
    for (int k = 0; k < 16; ++k) { const uint32_t u = as_bits(r[k]); c[k] = e2m1_code(as_float(u & 0x7fffffffu)) | (u >> 28 & 8u); }
    for (int k = 0; k < 8; ++k) out[k] = uint8_t(c[2 * k] | c[2 * k + 1] << 4);
}
#endif
#if defined(__AVX2__)
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
#endif
inline uint32_t sign_of(uint32_t bits) { return (bits & 0x7fffffffu) > INF_BITS ? 0u : bits & 0x80000000u; }   // NaN: none

// A block of 16 values: times e, rounded to the E2M1 grid with their signs, to the nearest or by 16 random bytes (from four words);
// its record (integer.cpp), 16 bytes 2 * value + 12 and then the scale / 2; and the largest |v| of each of NB blocks, on its bits.
constexpr int64_t RECORD = 20;
constexpr int NB = 16;                    // rowwise blocks worked on at once
#if defined(__AVX512BW__) && defined(__AVX512VL__)
typedef __m512 Values;
inline void store(float* p, Values v) { _mm512_storeu_ps(p, v); }
inline __m512 with_sign_of(__m512 y, __m512 magnitude) {           // a NaN has none
    const __m512i sign = _mm512_maskz_and_epi32(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), _mm512_castps_si512(y), _mm512_set1_epi32(int32_t(0x80000000u)));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude), sign));
}
inline Values rounded(const float* v, float e) {
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(v), _mm512_set1_ps(e)), a = _mm512_min_ps(_mm512_abs_ps(y), _mm512_set1_ps(6.0f));      // NaN gives 6
    __m512 magic = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_set1_ps(4.0f), _CMP_LT_OQ), _mm512_set1_ps(25165824.0f), _mm512_set1_ps(12582912.0f));
    magic = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_set1_ps(2.0f), _CMP_LT_OQ), magic, _mm512_set1_ps(6291456.0f));
    return with_sign_of(y, _mm512_sub_ps(_mm512_add_ps(a, magic), magic));
}
inline Values rounded(const float* v, float e, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(v), _mm512_set1_ps(e)), six = _mm512_set1_ps(6.0f), a = _mm512_min_ps(_mm512_abs_ps(y), six);
    __m512 unit = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_set1_ps(4.0f), _CMP_LT_OQ), _mm512_set1_ps(0.0078125f), _mm512_set1_ps(0.00390625f));
    unit = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_set1_ps(2.0f), _CMP_LT_OQ), unit, _mm512_set1_ps(0.001953125f));
    const __m512i random = _mm512_cvtepu8_epi32(_mm_setr_epi32(int(r0), int(r1), int(r2), int(r3)));
    const __m512 t = _mm512_add_ps(a, _mm512_mul_ps(_mm512_cvtepi32_ps(random), unit));
    const __m512 big = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(t), _mm512_set1_epi32(int32_t(0xffc00000u))));
    const __m512 small = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(0.5f), _CMP_GE_OQ), _mm512_set1_ps(0.5f));
    const __m512 r = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(1.0f), _CMP_LT_OQ), big, small);
    return with_sign_of(y, _mm512_min_ps(r, six));
}
inline void write_record(Values v, float s, uint8_t* out) {
    const __m512i doubles = _mm512_cvtps_epi32(_mm512_add_ps(v, v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_add_epi32(doubles, _mm512_set1_epi32(12))));
    const float half = s * 0.5f;
    std::memcpy(out + 16, &half, 4);
}
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
struct Values { __m256 half[2]; };
inline void store(float* p, Values v) { _mm256_storeu_ps(p, v.half[0]); _mm256_storeu_ps(p + 8, v.half[1]); }
inline __m256 with_sign_of(__m256 y, __m256 magnitude) {           // a NaN has none
    return _mm256_or_ps(magnitude, _mm256_and_ps(_mm256_and_ps(y, _mm256_set1_ps(-0.0f)), _mm256_cmp_ps(y, y, _CMP_ORD_Q)));
}
inline __m256 below(__m256 a, float bound, float then, __m256 otherwise) {
    return _mm256_blendv_ps(otherwise, _mm256_set1_ps(then), _mm256_cmp_ps(a, _mm256_set1_ps(bound), _CMP_LT_OQ));
}
inline Values rounded(const float* v, float e) {
    Values out;
    for (int h = 0; h < 2; ++h) {
        const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(v + 8 * h), _mm256_set1_ps(e));
        const __m256 a = _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), y), _mm256_set1_ps(6.0f));             // NaN gives 6
        const __m256 magic = below(a, 2.0f, 6291456.0f, below(a, 4.0f, 12582912.0f, _mm256_set1_ps(25165824.0f)));
        out.half[h] = with_sign_of(y, _mm256_sub_ps(_mm256_add_ps(a, magic), magic));
    }
    return out;
}
inline Values rounded(const float* v, float e, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    Values out;
    __m128i random = _mm_setr_epi32(int(r0), int(r1), int(r2), int(r3));
    for (int h = 0; h < 2; ++h, random = _mm_srli_si128(random, 8)) {
        const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(v + 8 * h), _mm256_set1_ps(e)), six = _mm256_set1_ps(6.0f);
        const __m256 a = _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), y), six);
        const __m256 unit = below(a, 2.0f, 0.001953125f, below(a, 4.0f, 0.00390625f, _mm256_set1_ps(0.0078125f)));
        const __m256 t = _mm256_add_ps(a, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(random)), unit));
        const __m256 big = _mm256_and_ps(t, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffc00000u))));
        const __m256 small = _mm256_and_ps(_mm256_set1_ps(0.5f), _mm256_cmp_ps(t, _mm256_set1_ps(0.5f), _CMP_GE_OQ));
        out.half[h] = with_sign_of(y, _mm256_min_ps(_mm256_blendv_ps(big, small, _mm256_cmp_ps(t, _mm256_set1_ps(1.0f), _CMP_LT_OQ)), six));
    }
    return out;
}
inline void write_record(Values v, float s, uint8_t* out) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_add_ps(v.half[0], v.half[0])), _mm256_cvtps_epi32(_mm256_add_ps(v.half[1], v.half[1])));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi8(bytes, _mm_set1_epi8(12)));
    const float half = s * 0.5f;
    std::memcpy(out + 16, &half, 4);
}
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
struct Values { float v[16]; };
inline void store(float* p, const Values& v) { std::memcpy(p, v.v, sizeof v.v); }
inline Values rounded(const float* v, float e) {
    Values out;
    for (int k = 0; k < 16; ++k) {
        const uint32_t u = as_bits(v[k] * e);
        out.v[k] = as_float(as_bits(e2m1_nearest(as_float(u & 0x7fffffffu))) | sign_of(u));
    }
    return out;
}
inline Values rounded(const float* v, float e, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const uint32_t random[4] = {r0, r1, r2, r3};
    Values out;
    for (int k = 0; k < 16; ++k) {
        const uint32_t u = as_bits(v[k] * e), byte = random[k / 4] >> (8 * (k % 4)) & 255u;
        out.v[k] = as_float(as_bits(e2m1_stochastic(as_float(u & 0x7fffffffu), byte)) | sign_of(u));
    }
    return out;
}
inline void write_record(const Values& v, float s, uint8_t* out) {
    for (int k = 0; k < 16; ++k) out[k] = uint8_t(int32_t(v.v[k] * 2.0f) + 12);
    const float half = s * 0.5f;
    std::memcpy(out + 16, &half, 4);
}
inline void block_amaxes(const float (*v)[16], float* out) {
    for (int b = 0; b < NB; ++b) {
        uint32_t a = 0;
        for (int k = 0; k < 16; ++k) a = std::max(a, as_bits(v[b][k]) & 0x7fffffffu);
        out[b] = as_float(a);
    }
}
#endif

struct Scale { float S_enc, S_dec, mult, amax, range; int error; };    // range: 6 E; error: 0 none, 1 MAE, 2 MSE
Scale make_scale(float amax, float e4m3_max, int error = 0) {
    float S = (e4m3_max * 6.0f) / amax;
    S = S < FLT_MAXIMUM ? S : FLT_MAXIMUM;                         // amax 0 or NaN: FLT_MAX, replaced below
    if (!(amax > 0.0f) || S == 0.0f) S = 1.0f;
    return {S, 1.0f / S, S * (1.0f / 6.0f), amax, e4m3_max * 6.0f, error};
}
inline float encode_of(float s, float S_dec) {
    float e = 1.0f / (s * S_dec);
    return e < FLT_MAXIMUM ? e : FLT_MAXIMUM;
}

// 4over6: the two candidates for a block's scale, and the error of one element under a candidate.
inline float scale_to_6(float amax_b, const Scale& S) { return round_e4m3((amax_b / 6.0f) * S.S_enc); }
inline float scale_to_4(float amax_b, const Scale& S) { return round_e4m3(((amax_b / 6.0f) * S.S_enc) * 1.5f); }
inline float error_of(float v, float s, float e, const Scale& S) {
    const uint32_t u = as_bits(v * e);
    const float r = as_float(as_bits(e2m1_nearest(as_float(u & 0x7fffffffu))) | sign_of(u));
    const float d = ((r * s) * S.amax) / S.range - v;
    return S.error == 1 ? as_float(as_bits(d) & 0x7fffffffu) : d * d;
}

// ------------------------------------------------------------------------------------------------ columns in registers
// LANES columns are worked on at once: one vector register for each of the 16 images (two where the processor has 16 bytes only).
#if defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats all(float v) { return Floats{} + v; }
inline Words bits_of(Floats v) { return reinterpret_cast<Words>(v); }
inline Floats of_bits(Words v) { return reinterpret_cast<Floats>(v); }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }           // b where a is NaN
inline Words larger(Words a, Words b) { return a > b ? a : b; }
inline Floats magnitude(Floats v) { return of_bits(bits_of(v) & 0x7fffffffu); }
template <class V, class P> inline V read(const P* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline Floats load_lanes(const float* p) { return read<Floats>(p); }
inline Floats load_lanes(const bf16* p) { return of_bits(__builtin_convertvector(read<Halves>(p), Words) << 16); }
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
inline Floats e2m1_stochastic(Floats a, Words random) {
    a = smaller(a, all(6.0f));
    const Floats unit = a < 2.0f ? all(0.001953125f) : (a < 4.0f ? all(0.00390625f) : all(0.0078125f));
    const Floats t = a + __builtin_convertvector(reinterpret_cast<Ints>(random), Floats) * unit;
    const Floats big = of_bits(bits_of(t) & 0xffc00000u), small = t < 0.5f ? all(0.0f) : all(0.5f);
    return smaller(t < 1.0f ? small : big, all(6.0f));
}
inline Words e2m1_code(Floats r) {                                 // of values on the grid, without the sign
    const Words big = (bits_of(r) >> 22) - 252u, small = r < 0.5f ? Words{} : Words{} + 1u;
    return r < 1.0f ? small : big;
}
inline Words sign_of(Floats y) { return y == y ? bits_of(y) & 0x80000000u : Words{}; }         // NaN: none

// Philox4x32-10 of LANES counters: 16 random bytes each.
struct Random { Words word[4]; };
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
inline Random philox(const uint64_t* index, uint32_t face, uint64_t seed) {
    Words a{}, b{}, c = Words{} + face, d{};
    for (int j = 0; j < LANES; ++j) { a[j] = uint32_t(index[j]); b[j] = uint32_t(index[j] >> 32); }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Product p0 = wide_product(a, 0xD2511F53u), p1 = wide_product(c, 0xCD9E8D57u);
        a = p1.high ^ b ^ k0; c = p0.high ^ d ^ k1; b = p1.low; d = p0.low;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// Columns at, at + 1, ... of 16 rows into t; signs applied, rotated, times 1/4 (bf16: rounded to bf16). Columns from n on are zeros.
template <class T, bool RHT>
inline void load_tile(const T* const* rows, int64_t at, int n, Floats* t) {
    for (int i = 0; i < 16; ++i) {
        Floats v{};
        if (rows[i] && n == LANES) v = load_lanes(rows[i] + at);
        else if (rows[i]) { T edge[LANES] = {}; std::memcpy(edge, rows[i] + at, size_t(n) * sizeof(T)); v = load_lanes(edge); }
        t[i] = RHT && SIGN[i] < 0 ? of_bits(bits_of(v) ^ 0x80000000u) : v;    // -0.0 counts: signs first, of rows of zeros, too
    }
    if (!RHT) return;
    #pragma GCC unroll 4
    for (int stride = 1; stride < 16; stride *= 2)
        #pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            if (!(i & stride)) { const Floats a = t[i], b = t[i + stride]; t[i] = a + b; t[i + stride] = a - b; }
    for (int i = 0; i < 16; ++i) {
        t[i] = t[i] * 0.25f;
        if (sizeof(T) == 2) { const Words u = bits_of(t[i]); t[i] = of_bits((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u); }
    }
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
};

// What one thread met while it quantized: amaxes as bits, and blocks whose scale exceeded 448 before rounding.
struct Seen { uint32_t row = 0, col = 0; int64_t saturated = 0; };
void merge(Seen& into, const Seen& from) { into.row = std::max(into.row, from.row); into.col = std::max(into.col, from.col); into.saturated += from.saturated; }

// ------------------------------------------------------------------------------------------------ rowwise
// NB blocks of 16 values, in v: scales, rounding, stores. n[b] values of block b are real, p[b] is where they go in the dequantized face.
template <class D, bool SR>
inline void quantize_blocks(float (*v)[16], const uint64_t* index, uint64_t seed, const Scale& S, D* const* p, const int* n, int nb,
                            uint8_t* codes, uint8_t* scale, uint8_t* records, Seen* seen) {
    float s[NB], e[NB], amax[NB]; uint32_t random[4][NB];
    block_amaxes(v, amax);
    if (seen) for (int b = 0; b < NB; ++b) { seen->row = std::max(seen->row, as_bits(amax[b])); seen->saturated += amax[b] * S.mult > 448.0f; }
    if (S.error == 0) { for (int b = 0; b < NB; ++b) { s[b] = round_e4m3(amax[b] * S.mult); e[b] = encode_of(s[b], S.S_dec); } }
    else for (int b = 0; b < NB; ++b) {
        const float s6 = scale_to_6(amax[b], S), s4 = scale_to_4(amax[b], S), e6 = encode_of(s6, S.S_dec), e4 = encode_of(s4, S.S_dec);
        float d6[16], d4[16];
        for (int k = 0; k < 16; ++k) { d6[k] = error_of(v[b][k], s6, e6, S); d4[k] = error_of(v[b][k], s4, e4, S); }
        float sum6 = d6[0], sum4 = d4[0];
        for (int k = 1; k < 16; ++k) { sum6 += d6[k]; sum4 += d4[k]; }
        s[b] = sum4 < sum6 ? s4 : s6; e[b] = sum4 < sum6 ? e4 : e6;
    }
    if (SR) for (int b = 0; b < NB; b += LANES) {
        const Random r = philox(index + b, 0, seed);
        for (int k = 0; k < 4; ++k) std::memcpy(random[k] + b, &r.word[k], sizeof r.word[k]);
    }
    for (int b = 0; b < nb; ++b) {
        const Values r = SR ? rounded(v[b], e[b], random[0][b], random[1][b], random[2][b], random[3][b]) : rounded(v[b], e[b]);
        if (records) write_record(r, s[b], records + b * RECORD);
        if (p || codes) store(v[b], r);
    }
    if (p) for (int b = 0; b < nb; ++b) {
        const float sb = s[b];
        if (n[b] == 16) { D* o = p[b]; for (int k = 0; k < 16; ++k) store(o + k, v[b][k] * sb); }
        else { for (int k = 0; k < n[b]; ++k) store(p[b] + k, v[b][k] * sb); }
    }
    if (codes) for (int b = 0; b < nb; ++b) pack_block(v[b], codes + b * 8);
    if (scale) for (int b = 0; b < nb; ++b) scale[b] = e4m3_byte(s[b]);
}

template <class T, class D, bool SR>
void row_run(const Operand& q, const T* x, int64_t image, int64_t row, const Scale& S, Seen* seen) {
    const int64_t Cg = q.C / q.groups, Kb = (Cg + 15) / 16, segments = q.Wp * q.groups, total = segments * Kb;
    const int64_t base = (image * q.L + row) * q.Wp * q.C, sbase = (image * q.L + row) * total;
    D* dq = q.row_dq ? static_cast<D*>(q.row_dq) + base : nullptr;
    const bool even = Cg % 16 == 0;
    float v[NB][16]; uint64_t index[NB]; D* p[NB]; int n[NB];
    int64_t seg = 0, kb = 0, pixel = 0, group = 0;
    for (int64_t b0 = 0; b0 < total; b0 += NB) {
        const int nb = int(std::min<int64_t>(NB, total - b0));
        for (int b = 0; b < nb; ++b) {
            const int64_t at = seg * Cg + kb * 16;
            n[b] = int(std::min<int64_t>(16, Cg - kb * 16));
            p[b] = dq + at;
            if (SR) index[b] = uint64_t((((row * q.Wp + pixel) * q.images + image) * q.groups + group) * Kb + kb);
            if (!even) for (int k = 0; k < 16; ++k) v[b][k] = k < n[b] ? load(x + at + k) : 0.0f;
            if (++kb == Kb) { kb = 0; ++seg; if (++group == q.groups) { group = 0; ++pixel; } }
        }
        if (even && nb == NB) { for (int k = 0; k < NB * 16; ++k) (&v[0][0])[k] = load(x + b0 * 16 + k); }
        else if (even) { for (int k = 0; k < nb * 16; ++k) (&v[0][0])[k] = load(x + b0 * 16 + k); }
        for (int b = nb; b < NB; ++b) { index[b] = 0; n[b] = 0; for (int k = 0; k < 16; ++k) v[b][k] = 0.0f; }
        quantize_blocks<D, SR>(v, index, uint64_t(q.seed), S, dq ? p : nullptr, n, nb,
                               q.row_codes ? q.row_codes + (sbase + b0) * 8 : nullptr, q.row_scale ? q.row_scale + sbase + b0 : nullptr, q.row_records ? q.row_records + (sbase + b0) * RECORD : nullptr, seen);
    }
}

// ------------------------------------------------------------------------------------------------ columnwise
// 4over6 for columns: the scale whose squared or absolute errors have the smaller sum, images added in their order.
inline Floats error_of(Floats v, Floats s, Floats e, const Scale& S) {
    const Floats y = v * e, r = of_bits(bits_of(e2m1_nearest(magnitude(y))) | sign_of(y));
    const Floats d = ((r * s) * S.amax) / S.range - v;
    return S.error == 1 ? magnitude(d) : d * d;
}
inline Floats encode_of(Floats s, float S_dec) { return smaller(1.0f / (s * S_dec), all(FLT_MAXIMUM)); }
inline Floats four_over_six(const Floats* t, Floats amax, const Scale& S) {
    const Floats s6 = round_e4m3((amax / 6.0f) * S.S_enc), s4 = round_e4m3(((amax / 6.0f) * S.S_enc) * 1.5f);
    const Floats e6 = encode_of(s6, S.S_dec), e4 = encode_of(s4, S.S_dec);
    Floats sum6 = error_of(t[0], s6, e6, S), sum4 = error_of(t[0], s4, e4, S);
    for (int i = 1; i < 16; ++i) { sum6 = sum6 + error_of(t[i], s6, e6, S); sum4 = sum4 + error_of(t[i], s4, e4, S); }
    return sum4 < sum6 ? s4 : s6;
}

template <class T, class D, bool RHT, bool SR>
void col_run(const Operand& q, const T* const* rows, int64_t g16, int64_t row, const Scale& S, Seen* seen) {
    const int64_t run = q.Wp * q.C, N16 = q.fold_images / 16, M16 = q.fold_L * q.Wp * N16, out = (g16 * q.fold_L + row) * run;
    int64_t w = 0, c = 0;                                          // pixel and channel of the first column
    for (int64_t at = 0; at < run; at += LANES) {
        const int n = int(std::min<int64_t>(LANES, run - at));
        int64_t pixel[LANES], channel[LANES];
        for (int j = 0; j < LANES; ++j) { pixel[j] = w; channel[j] = c; if (j < n && ++c == q.C) { c = 0; ++w; } }
        Floats t[16];
        load_tile<T, RHT>(rows, at, n, t);
        const Words amax = tile_amax(t);
        if (seen) {
            seen->col = std::max(seen->col, lane_amax(amax));
            for (int j = 0; j < LANES; ++j) seen->saturated += as_float(amax[j]) * S.mult > 448.0f;
        }
        const Floats s = S.error ? four_over_six(t, of_bits(amax), S) : round_e4m3(of_bits(amax) * S.mult), e = encode_of(s, S.S_dec);
        Random random{};
        if (SR) {
            uint64_t index[LANES];
            for (int j = 0; j < LANES; ++j) index[j] = uint64_t(channel[j] * M16 + (row * q.Wp + pixel[j]) * N16 + g16);
            random = philox(index, 1, uint64_t(q.seed));
        }
        for (int i = 0; i < 16; ++i) {
            const Floats y = t[i] * e, a = magnitude(y);
            const Floats g = SR ? e2m1_stochastic(a, random.word[i / 4] >> (8 * (i % 4)) & 255u) : e2m1_nearest(a);
            t[i] = of_bits(bits_of(g) | sign_of(y));
        }
        if (q.col_dq) for (int i = 0; i < 16; ++i) {
            D* p = static_cast<D*>(q.col_dq) + ((g16 * 16 + i) * q.fold_L + row) * run + at;
            if (n == LANES) store_lanes(p, t[i] * s);
            else { D edge[LANES]; store_lanes(edge, t[i] * s); std::memcpy(p, edge, size_t(n) * sizeof(D)); }
        }
        if (q.col_records) {                                       // [row, pixel, N16, C, RECORD]: an image's byte is 2 * value + 12
            uint32_t record[5][LANES];
            for (int k = 0; k < 4; ++k) {
                Words bytes{};
                for (int i = 0; i < 4; ++i) bytes |= reinterpret_cast<Words>(__builtin_convertvector(t[4 * k + i] * 2.0f, Ints) + 12) << (8 * i);
                std::memcpy(record[k], &bytes, sizeof bytes);
            }
            store_lanes(reinterpret_cast<float*>(record[4]), s * 0.5f);
            for (int j = 0; j < n; ++j) {
                uint8_t* p = q.col_records + (((row * q.Wp + pixel[j]) * N16 + g16) * q.C + channel[j]) * RECORD;
                for (int k = 0; k < 5; ++k) std::memcpy(p + 4 * k, &record[k][j], 4);
            }
        }
        if (q.col_codes) {
            Words half[2] = {};
            for (int i = 0; i < 16; ++i) half[i / 8] |= (e2m1_code(magnitude(t[i])) | (bits_of(t[i]) >> 28 & 8u)) << (4 * (i % 8));
            uint32_t* p = reinterpret_cast<uint32_t*>(q.col_codes) + (out + at) * 2;
            for (int j = 0; j < n; ++j) { p[2 * j] = half[0][j]; p[2 * j + 1] = half[1][j]; }
        }
        if (q.col_scale) {
            const Words u = bits_of(s), normal = (u >> 20) - (120u << 3), small = reinterpret_cast<Words>(__builtin_convertvector(s * 512.0f, Ints));
            const Words bytes = s < 0.015625f ? small : normal;
            for (int j = 0; j < n; ++j) q.col_scale[out + at + j] = uint8_t(bytes[j]);
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
    if (q.want_row) {
        const int64_t piece = 1 << 14, pieces = (elements + piece - 1) / piece;
        #pragma omp parallel for num_threads(q.threads) schedule(static) reduction(max : row_max)
        for (int64_t k = 0; k < pieces; ++k)
            row_max = std::max(row_max, amax_flat(static_cast<const T*>(q.x) + k * piece, std::min(piece, elements - k * piece)));
    }
    if (q.want_col) {
        #pragma omp parallel for num_threads(q.threads) schedule(static) reduction(max : col_max)
        for (int64_t item = 0; item < items; ++item) {
            const T* rows[16];
            if (!row_pointers<T>(q, item / q.fold_L, item % q.fold_L, rows)) continue;
            Words m{};
            for (int64_t at = 0; at < run; at += LANES) {
                Floats t[16];
                load_tile<T, RHT>(rows, at, int(std::min<int64_t>(LANES, run - at)), t);
                m = larger(m, tile_amax(t));
            }
            col_max = std::max(col_max, lane_amax(m));
        }
    }
    q.amax[0] = as_float(row_max);
    q.amax[1] = as_float(col_max);
}

template <class T, class D, bool RHT, bool SR>
void quantize_operand(const Operand& q) {
    const int64_t N16 = q.fold_images / 16;
    const Scale row_scale = make_scale(q.amax[0], q.e4m3_max, q.error), col_scale = make_scale(q.amax[1], q.e4m3_max, q.error);
    const T* x = static_cast<const T*>(q.x);
    const bool together = q.want_row && q.want_col && q.row_start == nullptr;     // the 16 rows are still in the cache
    Seen total;
    #pragma omp parallel num_threads(q.threads)
    {
        Seen own, *seen = q.observed ? &own : nullptr;
        if (q.want_col) {
            const int64_t items = N16 * q.fold_L;
            #pragma omp for schedule(static)
            for (int64_t item = 0; item < items; ++item) {
                const int64_t g16 = item / q.fold_L, row = item % q.fold_L;
                const T* rows[16];
                row_pointers<T>(q, g16, row, rows);
                col_run<T, D, RHT, SR>(q, rows, g16, row, col_scale, seen);
                if (together) for (int i = 0; i < 16; ++i) if (rows[i]) row_run<T, D, SR>(q, rows[i], g16 * 16 + i, row, row_scale, seen);
            }
        }
        if (q.want_row && !together) {
            const int64_t items = q.images * q.L;
            #pragma omp for schedule(static)
            for (int64_t item = 0; item < items; ++item)
                row_run<T, D, SR>(q, x + item * q.Wp * q.C, item / q.L, item % q.L, row_scale, seen);
        }
        #pragma omp critical
        merge(total, own);
    }
    if (q.observed) { q.observed[0] = as_float(total.row); q.observed[1] = as_float(total.col); q.observed[2] = float(total.saturated); }
}

template <class T, class D>
void quantize_typed(const Operand& q) {
    if (q.rht) { if (q.stochastic) quantize_operand<T, D, true, true>(q); else quantize_operand<T, D, true, false>(q); }
    else { if (q.stochastic) quantize_operand<T, D, false, true>(q); else quantize_operand<T, D, false, false>(q); }
}

template <class D>
void unpack_columns(const uint8_t* codes, const uint8_t* scale, D* out, int64_t groups16, int64_t run, int threads) {
    const int64_t pieces = (run + CHUNK - 1) / CHUNK;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < groups16 * pieces; ++item) {
        const int64_t g = item / pieces, at = item % pieces * CHUNK;
        const int n = int(std::min<int64_t>(CHUNK, run - at));
        uint32_t lo[CHUNK] = {0}, hi[CHUNK] = {0}; float s[CHUNK] = {0};
        const uint32_t* p = reinterpret_cast<const uint32_t*>(codes) + (g * run + at) * 2;
        for (int j = 0; j < n; ++j) { lo[j] = p[2 * j]; hi[j] = p[2 * j + 1]; }
        for (int j = 0; j < n; ++j) s[j] = e4m3_value(scale[g * run + at + j]);
        for (int i = 0; i < 16; ++i) {
            const uint32_t* word = i < 8 ? lo : hi; const int shift = 4 * (i % 8);
            D* o = out + (g * 16 + i) * run + at;
            if (n == CHUNK) { for (int j = 0; j < CHUNK; ++j) store(o + j, e2m1_value(word[j] >> shift & 15u) * s[j]); }
            else { for (int j = 0; j < n; ++j) store(o + j, e2m1_value(word[j] >> shift & 15u) * s[j]); }
        }
    }
}

template <class D>
void unpack_rows(const uint8_t* codes, const uint8_t* scale, D* out, int64_t segments, int64_t Cg, int threads) {
    const int64_t Kb = (Cg + 15) / 16;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t seg = 0; seg < segments; ++seg)
        for (int64_t kb = 0; kb < Kb; ++kb) {
            const uint8_t* p = codes + (seg * Kb + kb) * 8;
            const float s = e4m3_value(scale[seg * Kb + kb]);
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

// One choice for a 16x16 tile: sums of each row in order, then a binary tree over the rows.
inline float four_over_six_tile(const float (*tile)[16], float amax_b, const Scale& S) {
    const float s6 = scale_to_6(amax_b, S), s4 = scale_to_4(amax_b, S), e6 = encode_of(s6, S.S_dec), e4 = encode_of(s4, S.S_dec);
    float sum6[16], sum4[16];
    for (int o = 0; o < 16; ++o)
        for (int c = 0; c < 16; ++c) {
            const float d6 = error_of(tile[o][c], s6, e6, S), d4 = error_of(tile[o][c], s4, e4, S);
            sum6[o] = c ? sum6[o] + d6 : d6; sum4[o] = c ? sum4[o] + d4 : d4;
        }
    for (int half = 8; half >= 1; half /= 2)
        for (int o = 0; o < half; ++o) { sum6[o] += sum6[o + half]; sum4[o] += sum4[o + half]; }
    return sum4[0] < sum6[0] ? s4 : s6;
}

template <class W, class D>
void quantize_weight(const Weight& q) {
    const int64_t Ob = (q.Og + 15) / 16, Kb = (q.Cg + 15) / 16, items = q.groups * Ob * Kb;
    const Scale S = make_scale(q.amax[0], q.e4m3_max, q.error);
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
                const float s = S.error ? four_over_six_tile(tile[t], as_float(m), S) : round_e4m3(as_float(m) * S.mult), e = encode_of(s, S.S_dec);
                for (int o = 0; o < no; ++o) {
                    float* r = tile[t][o];
                    store(r, rounded(r, e));
                    const int64_t at = (g * q.Og + ob * 16 + o) * q.T + t0 + t;
                    if (q.dq) {
                        D* d = static_cast<D*>(q.dq) + at * q.Cg + kb * 16;
                        if (nc == 16) { for (int c = 0; c < 16; ++c) store(d + c, r[c] * s); }
                        else { for (int c = 0; c < nc; ++c) store(d + c, r[c] * s); }
                    }
                    if (q.codes) pack_block(r, q.codes + (at * Kb + kb) * 8);
                }
                if (q.scale) q.scale[((g * Ob + ob) * q.T + t0 + t) * Kb + kb] = e4m3_byte(s);
            }
        }
    }
}


template <class D>
void unpack_weight(const Weight& q) {
    const float factor = q.amax ? *q.amax : 1.0f;
    const int64_t Ob = (q.Og + 15) / 16, Kb = (q.Cg + 15) / 16, rows = q.groups * q.Og;
    #pragma omp parallel for num_threads(q.threads) schedule(static)
    for (int64_t o = 0; o < rows; ++o)
        for (int64_t t = 0; t < q.T; ++t)
            for (int64_t kb = 0; kb < Kb; ++kb) {
                const int64_t at = o * q.T + t, g = o / q.Og, ob = o % q.Og / 16;
                const uint8_t* p = q.codes + (at * Kb + kb) * 8;
                const float s = e4m3_value(q.scale[((g * Ob + ob) * q.T + t) * Kb + kb]);
                const int n = int(std::min<int64_t>(16, q.Cg - kb * 16));
                float v[16];
                unpack_block(p, s, v);
                D* d = static_cast<D*>(q.dq) + at * q.Cg + kb * 16;
                if (n == 16) { for (int k = 0; k < 16; ++k) store_round(d + k, v[k] * factor); }
                else { for (int k = 0; k < n; ++k) store_round(d + k, v[k] * factor); }
            }
}

// out[i, c] = round(y[i, c] * alpha + bias[c]); out may be y.
template <class T, class U>
void scale_bias(const T* y, U* out, int64_t rows, int64_t C, float alpha, const float* bias, int threads) {
    const int64_t piece = std::max<int64_t>(1, 16384 / C), pieces = (rows + piece - 1) / piece;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < pieces; ++k) {
        const int64_t first = k * piece, last = std::min(rows, first + piece);
        if (!bias) { const int64_t at = first * C, n = (last - first) * C; for (int64_t j = 0; j < n; ++j) store_round(out + at + j, load(y + at + j) * alpha); }
        else for (int64_t i = first; i < last; ++i)
            for (int64_t c = 0; c < C; ++c) store_round(out + i * C + c, load(y + i * C + c) * alpha + bias[c]);
    }
}

// bit k of mask byte j: !(y[8j + k] <= 0), what ReLU's backward lets through. On the bits: y > 0, or NaN.
inline bool passes(const float* p) { uint32_t u = as_bits(*p); return (int32_t(u) > 0) | (u > 0xff800000u); }
inline bool passes(const bf16* p) { return (int16_t(p->u) > 0) | (p->u > 0xff80u); }

#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline uint32_t passes32(const bf16* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return _mm512_cmpgt_epi16_mask(v, _mm512_setzero_si512()) | _mm512_cmpgt_epu16_mask(v, _mm512_set1_epi16(int16_t(0xff80)));
}
inline uint32_t passes16(const float* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return _mm512_cmpgt_epi32_mask(v, _mm512_setzero_si512()) | _mm512_cmpgt_epu32_mask(v, _mm512_set1_epi32(int32_t(0xff800000u)));
}
inline uint32_t passes32(const float* p) { return passes16(p) | passes16(p + 16) << 16; }
inline void masked32(const uint16_t* dy, uint32_t word, uint16_t* dx) { _mm512_storeu_si512(dx, _mm512_maskz_loadu_epi16(word, dy)); }
inline void masked32(const uint32_t* dy, uint32_t word, uint32_t* dx) {
    _mm512_storeu_si512(dx, _mm512_maskz_loadu_epi32(__mmask16(word), dy));
    _mm512_storeu_si512(dx + 16, _mm512_maskz_loadu_epi32(__mmask16(word >> 16), dy + 16));
}
#else
template <class T> inline uint32_t passes32(const T* p) {
    uint32_t word = 0;
    for (int j = 0; j < 32; ++j) word |= uint32_t(passes(p + j)) << j;
    return word;
}
template <class U> inline void masked32(const U* dy, uint32_t word, U* dx) {
    for (int j = 0; j < 32; ++j) dx[j] = U(dy[j] & U(0u - (word >> j & 1u)));
}
#endif

template <class T>
void positive_mask(const T* y, uint8_t* mask, int64_t n, int threads) {
    const int64_t words = n / 32, piece = 1024, pieces = (words + piece - 1) / piece;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < pieces; ++k)
        for (int64_t w = k * piece; w < std::min(words, (k + 1) * piece); ++w) { const uint32_t word = passes32(y + w * 32); std::memcpy(mask + w * 4, &word, 4); }
    for (int64_t b = words * 4; b < (n + 7) / 8; ++b) {
        uint32_t byte = 0;
        for (int j = 0; j < 8 && b * 8 + j < n; ++j) byte |= uint32_t(passes(y + b * 8 + j)) << j;
        mask[b] = uint8_t(byte);
    }
}

template <class U>
void apply_mask(const U* dy, const uint8_t* mask, U* dx, int64_t n, int threads) {
    const int64_t words = n / 32, piece = 1024, pieces = (words + piece - 1) / piece;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < pieces; ++k)
        for (int64_t w = k * piece; w < std::min(words, (k + 1) * piece); ++w) { uint32_t word; std::memcpy(&word, mask + w * 4, 4); masked32(dy + w * 32, word, dx + w * 32); }
    for (int64_t i = words * 32; i < n; ++i) dx[i] = U(dy[i] & U(0u - (mask[i / 8] >> (i % 8) & 1u)));
}

// ------------------------------------------------------------------------------------------------ a digest of memory
// CHAINS chains of two 64-bit words. A step takes in one word of memory; it is a bijection of that word for a given chain, and of
// the chain for a given word, so one changed word always changes the digest. Sums and rotations only, which every vector unit has.
constexpr int CHAINS = 16;
constexpr int64_t DIGEST_CHUNK = 1 << 18;                          // bytes: chunks are independent, so threads change nothing

inline uint64_t turned(uint64_t v, int by) { return v << by | v >> (64 - by); }

void digest_chunk(const uint8_t* p, int64_t bytes, uint64_t* out) {
    constexpr uint64_t P = 0x9E3779B97F4A7C15u, Q = 0xC2B2AE3D27D4EB4Fu;       // odd
    uint64_t a[CHAINS], b[CHAINS], w[CHAINS];
    for (int i = 0; i < CHAINS; ++i) { a[i] = uint64_t(i + 1) * P; b[i] = ~a[i]; }
    const auto step = [&] {
        for (int i = 0; i < CHAINS; ++i) { a[i] = turned(a[i] + w[i], 19); b[i] = turned(b[i] ^ a[i], 37) + a[i]; }
    };
    for (; bytes >= int64_t(sizeof w); bytes -= int64_t(sizeof w), p += sizeof w) { std::memcpy(w, p, sizeof w); step(); }
    if (bytes > 0) { std::memset(w, 0, sizeof w); std::memcpy(w, p, size_t(bytes)); step(); }
    out[0] = out[1] = 0;
    for (int i = 0; i < CHAINS; ++i)
        for (const uint64_t v : {a[i], b[i]}) { out[0] = turned((out[0] ^ v) * P, 31); out[1] = turned((out[1] + v) * Q, 29); }
}

// 128 bits that depend on every byte; data of another length must be told apart by its length.
void digest(const uint8_t* data, int64_t bytes, uint64_t* out, int threads) {
    const int64_t chunks = (bytes + DIGEST_CHUNK - 1) / DIGEST_CHUNK;
    std::vector<uint64_t> parts(size_t(2 * chunks));
    #pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
    for (int64_t i = 0; i < chunks; ++i)
        digest_chunk(data + i * DIGEST_CHUNK, std::min(DIGEST_CHUNK, bytes - i * DIGEST_CHUNK), parts.data() + 2 * i);
    digest_chunk(reinterpret_cast<const uint8_t*>(parts.data()), 16 * chunks, out);
}

}  // namespace

extern "C" {

void nvfp4_digest(const uint8_t* data, int64_t bytes, uint64_t* out, int32_t threads) { digest(data, bytes, out, threads); }

int nvfp4_abi() { return 1; }

void nvfp4_amax(const Operand* q) {
    if (q->in_bf16) { if (q->rht) amax_operand<bf16, true>(*q); else amax_operand<bf16, false>(*q); }
    else { if (q->rht) amax_operand<float, true>(*q); else amax_operand<float, false>(*q); }
}

void nvfp4_quantize(const Operand* q) {
    if (q->in_bf16) { if (q->out_bf16) quantize_typed<bf16, bf16>(*q); else quantize_typed<bf16, float>(*q); }
    else { if (q->out_bf16) quantize_typed<float, bf16>(*q); else quantize_typed<float, float>(*q); }
}

void nvfp4_unpack_columns(const uint8_t* codes, const uint8_t* scale, void* out, int64_t groups16, int64_t run, int32_t out_bf16, int32_t threads) {
    if (out_bf16) unpack_columns(codes, scale, static_cast<bf16*>(out), groups16, run, threads);
    else unpack_columns(codes, scale, static_cast<float*>(out), groups16, run, threads);
}

void nvfp4_unpack_rows(const uint8_t* codes, const uint8_t* scale, void* out, int64_t segments, int64_t Cg, int32_t out_bf16, int32_t threads) {
    if (out_bf16) unpack_rows(codes, scale, static_cast<bf16*>(out), segments, Cg, threads);
    else unpack_rows(codes, scale, static_cast<float*>(out), segments, Cg, threads);
}

void nvfp4_quantize_weight(const Weight* q) {
    if (q->in_bf16) { if (q->out_bf16) quantize_weight<bf16, bf16>(*q); else quantize_weight<bf16, float>(*q); }
    else { if (q->out_bf16) quantize_weight<float, bf16>(*q); else quantize_weight<float, float>(*q); }
}

void nvfp4_unpack_weight(const Weight* q) { if (q->out_bf16) unpack_weight<bf16>(*q); else unpack_weight<float>(*q); }

void nvfp4_scale_bias(const void* y, void* out, int64_t rows, int64_t C, float alpha, const float* bias, int32_t in_bf16, int32_t out_bf16, int32_t threads) {
    if (in_bf16 && out_bf16) scale_bias(static_cast<const bf16*>(y), static_cast<bf16*>(out), rows, C, alpha, bias, threads);
    else if (in_bf16) scale_bias(static_cast<const bf16*>(y), static_cast<float*>(out), rows, C, alpha, bias, threads);
    else if (out_bf16) scale_bias(static_cast<const float*>(y), static_cast<bf16*>(out), rows, C, alpha, bias, threads);
    else scale_bias(static_cast<const float*>(y), static_cast<float*>(out), rows, C, alpha, bias, threads);
}

void nvfp4_positive_mask(const void* y, uint8_t* mask, int64_t n, int32_t is_bf16, int32_t threads) {
    if (is_bf16) positive_mask(static_cast<const bf16*>(y), mask, n, threads);
    else positive_mask(static_cast<const float*>(y), mask, n, threads);
}

void nvfp4_apply_mask(const void* dy, const uint8_t* mask, void* dx, int64_t n, int32_t is_16bit, int32_t threads) {
    if (is_16bit) apply_mask(static_cast<const uint16_t*>(dy), mask, static_cast<uint16_t*>(dx), n, threads);
    else apply_mask(static_cast<const uint32_t*>(dy), mask, static_cast<uint32_t*>(dx), n, threads);
}

}  // extern "C"
