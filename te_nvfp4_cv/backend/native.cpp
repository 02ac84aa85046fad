// CPU kernels of te_nvfp4_cv: NVFP4 quantization, by the templates of quantize.h, and what layers do to results besides.
//
// Built at first use by native.py with the user's C++ compiler (no torch headers, no Python.h) and called through ctypes.
#include "quantize.h"
#include <vector>

namespace {

// The format NVFP4, as quantize.h wants one.
struct Scale {
    float S_enc, S_dec, mult, amax, range; int error;              // range: 6 E; error: 0 none, 1 MAE, 2 MSE
    static constexpr bool PAIRS = false, pairs = false;

    template <class E> static Floats divided(Floats v, E e) { return v * e; }
    inline float divisor(float s) const;
    inline Floats divisor(Floats s) const;
    inline void of_blocks(const float (*v)[16], const float* amax_b, float* s, float* e) const;
    inline Floats of_columns(const Floats* t, Words amax_b) const;
    inline float of_tile(const float (*tile)[16], float amax_b) const;
    bool saturates(float amax_b) const { return amax_b * mult > 448.0f; }
    uint8_t byte(float s) const { return e4m3_byte(s); }
    Words bytes(Floats s) const {
        const Words u = bits_of(s), normal = (u >> 20) - (120u << 3), small = reinterpret_cast<Words>(__builtin_convertvector(s * 512.0f, Ints));
        return s < 0.015625f ? small : normal;
    }
};
inline Scale make_scale(float amax, float e4m3_max, int error = 0) {
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

inline Words sign_of(Floats y) { return y == y ? bits_of(y) & 0x80000000u : Words{}; }         // NaN: none

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

float Scale::divisor(float s) const { return encode_of(s, S_dec); }
Floats Scale::divisor(Floats s) const { return encode_of(s, S_dec); }
void Scale::of_blocks(const float (*v)[16], const float* amax_b, float* s, float* e) const {
    const Scale& S = *this;
    if (error == 0) { for (int b = 0; b < NB; ++b) { s[b] = round_e4m3(amax_b[b] * S.mult); e[b] = encode_of(s[b], S.S_dec); } }
    else for (int b = 0; b < NB; ++b) {
        const float s6 = scale_to_6(amax_b[b], S), s4 = scale_to_4(amax_b[b], S), e6 = encode_of(s6, S.S_dec), e4 = encode_of(s4, S.S_dec);
        float d6[16], d4[16];
        for (int k = 0; k < 16; ++k) { d6[k] = error_of(v[b][k], s6, e6, S); d4[k] = error_of(v[b][k], s4, e4, S); }
        float sum6 = d6[0], sum4 = d4[0];
        for (int k = 1; k < 16; ++k) { sum6 += d6[k]; sum4 += d4[k]; }
        s[b] = sum4 < sum6 ? s4 : s6; e[b] = sum4 < sum6 ? e4 : e6;
    }
}
Floats Scale::of_columns(const Floats* t, Words amax_b) const { return error ? four_over_six(t, of_bits(amax_b), *this) : round_e4m3(of_bits(amax_b) * mult); }
float Scale::of_tile(const float (*tile)[16], float amax_b) const { return error ? four_over_six_tile(tile, amax_b, *this) : round_e4m3(amax_b * mult); }
struct E4M3 { float operator()(uint8_t byte, const uint8_t*) const { return e4m3_value(byte); } };

// The kernels of NVFP4 on one operand.
template <class T, class D>
void quantize_nvfp4(const Operand& q) { quantize_typed<T, D>(q, make_scale(q.amax[0], q.e4m3_max, q.error), make_scale(q.amax[1], q.e4m3_max, q.error)); }
template <class W, class D>
void quantize_nvfp4_weight(const Weight& q) { quantize_weight<W, D>(q, make_scale(q.amax[0], q.e4m3_max, q.error)); }

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
typedef uint64_t Chains __attribute__((vector_size(32)));          // a word of four chains; compilers make scalars of it where no unit has them
constexpr int FOURS = 4, CHAINS = 4 * FOURS;
constexpr int64_t DIGEST_CHUNK = 1 << 18;                          // bytes: chunks are independent, so threads change nothing

template <class V> inline V turned(V v, int by) { return v << by | v >> (64 - by); }

void digest_chunk(const uint8_t* p, int64_t bytes, uint64_t* out) {
    constexpr uint64_t P = 0x9E3779B97F4A7C15u, Q = 0xC2B2AE3D27D4EB4Fu;       // odd
    constexpr int64_t STEP = 8 * CHAINS;
    Chains a[FOURS], b[FOURS];                                     // stay in registers
    for (int i = 0; i < CHAINS; ++i) { a[i / 4][i % 4] = uint64_t(i + 1) * P; b[i / 4][i % 4] = ~(uint64_t(i + 1) * P); }
    const auto step = [&](const uint8_t* from) {
        for (int i = 0; i < FOURS; ++i) {
            Chains w; std::memcpy(&w, from + i * int64_t(sizeof w), sizeof w);
            a[i] = turned(a[i] + w, 19); b[i] = turned(b[i] ^ a[i], 37) + a[i];
        }
    };
    for (; bytes >= STEP; bytes -= STEP, p += STEP) step(p);
    if (bytes > 0) { uint8_t rest[STEP] = {0}; std::memcpy(rest, p, size_t(bytes)); step(rest); }
    out[0] = out[1] = 0;
    for (int i = 0; i < CHAINS; ++i)
        for (const uint64_t v : {a[i / 4][i % 4], b[i / 4][i % 4]}) { out[0] = turned((out[0] ^ v) * P, 31); out[1] = turned((out[1] + v) * Q, 29); }
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
    if (q->in_bf16) { if (q->out_bf16) quantize_nvfp4<bf16, bf16>(*q); else quantize_nvfp4<bf16, float>(*q); }
    else { if (q->out_bf16) quantize_nvfp4<float, bf16>(*q); else quantize_nvfp4<float, float>(*q); }
}

void nvfp4_unpack_columns(const uint8_t* codes, const uint8_t* scale, void* out, int64_t groups16, int64_t run, int32_t out_bf16, int32_t threads) {
    if (out_bf16) unpack_columns(codes, scale, static_cast<bf16*>(out), groups16, run, threads, E4M3());
    else unpack_columns(codes, scale, static_cast<float*>(out), groups16, run, threads, E4M3());
}

void nvfp4_unpack_rows(const uint8_t* codes, const uint8_t* scale, void* out, int64_t segments, int64_t Cg, int32_t out_bf16, int32_t threads) {
    if (out_bf16) unpack_rows(codes, scale, static_cast<bf16*>(out), segments, Cg, threads, E4M3());
    else unpack_rows(codes, scale, static_cast<float*>(out), segments, Cg, threads, E4M3());
}

void nvfp4_quantize_weight(const Weight* q) {
    if (q->in_bf16) { if (q->out_bf16) quantize_nvfp4_weight<bf16, bf16>(*q); else quantize_nvfp4_weight<bf16, float>(*q); }
    else { if (q->out_bf16) quantize_nvfp4_weight<float, bf16>(*q); else quantize_nvfp4_weight<float, float>(*q); }
}

void nvfp4_unpack_weight(const Weight* q) { if (q->out_bf16) unpack_weight<bf16>(*q, E4M3()); else unpack_weight<float>(*q, E4M3()); }

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
