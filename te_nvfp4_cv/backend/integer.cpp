// Products of NVFP4 operands on integers: fprop, dgrad and wgrad of a convolution without dequantizing anything.
//
// Twice an E2M1 value is an integer from -12 to 12, so the products of a block of 16 sum exactly in an integer. A block adds
//     float(sum) * (scale of a * scale of b)
// to its fp32 accumulator. Sum and scales have 12 + 8 significant bits together, so that product is exact in fp32 and the
// addition is the one rounding of a block. Blocks are added in the order of the reference (tap, then block of channels; in
// wgrad pixel, then block of images), so the results are the reference's bit for bit, with any number of threads.
//
// Two layouts. Either side of every product is one of them:
//
//     record, 20 bytes    16 bytes 2 * value + 12, unsigned; the scale / 2 as fp32
//     panel, 384 bytes    16 columns of 16 values: 4 quads of 64 bytes, in each 4 values of column 0, 4 of column 1, ...: signed
//                         2 * value; then 16 x int32 start values -12 * (sum of the column), which undo the records' + 12;
//                         then 16 x fp32 scale / 2
//
// fprop and dgrad multiply records of an activation (one per pixel and 16 channels) by panels of a weight (16 output channels
// by 16 input channels, a panel per tap). wgrad multiplies records of dy (one per pixel, 16 images and channel) by panels of x.
#include "numbers.h"
#include <algorithm>
#include <memory>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int64_t RECORD = 20, PANEL = 384, STARTS = 256, SCALES = 320;
constexpr int CODES = 8;                                           // bytes of a packed block

// ------------------------------------------------------------------------------------------------ the loop
// ROWS records meet one panel: ROWS x 16 outputs stay in registers over all blocks of all segments.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr int ROWS = 8;
const char* const MACHINE = "avx512_vnni";
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int ROWS = 3;
#if defined(__AVXVNNI__)
const char* const MACHINE = "avx_vnni";
#else
const char* const MACHINE = "avx2";
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int ROWS = 4;
const char* const MACHINE = "neon_dotprod";
#else
constexpr int ROWS = 4;
const char* const MACHINE = "plain";
#endif

// A stretch of the contraction in which rows and panel advance by constant steps: `blocks` blocks from a[row] and b on.
// Addresses are numbers until Walk's offsets complete them: parts of them may be negative, which pointers must not be.
struct Segment { int64_t a[ROWS], b, blocks; };
// The steps of a stretch, in bytes, and what to add to the addresses of every segment.
struct Walk { int64_t a_step, b_step, a_offset, b_offset; };

inline const uint8_t* pointer(int64_t address) { return reinterpret_cast<const uint8_t*>(address); }
inline int32_t quad(const uint8_t* p) { int32_t v; std::memcpy(&v, p, 4); return v; }
inline float scale_of(const uint8_t* p) { float v; std::memcpy(&v, p + 16, 4); return v; }

// Adds the products of all segments to total [ROWS][16], or writes them there if it holds nothing yet (FRESH).
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
// zmm: 8 fp32 accumulators, 4 quads of the panel, and for the row at hand its int32 sum, a broadcast quad and a scale. The
// panel's start values and scales come from the L1 cache. Per row and block 4 vpdpbusd, 1 conversion, 1 product, 1 fma.
// Every loop over rows is unrolled by hand: with one that is not, g++ keeps c in memory between segments.
template <bool FRESH>
void multiply(const Segment* s, int64_t segments, const Walk& w, float* total) {
    __m512 c[ROWS];
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) c[r] = FRESH ? _mm512_setzero_ps() : _mm512_loadu_ps(total + 16 * r);
    for (; segments > 0; --segments, ++s) {
        const uint8_t *a[ROWS], *b = pointer(s->b + w.b_offset);
        for (int r = 0; r < ROWS; ++r) a[r] = pointer(s->a[r] + w.a_offset);
        int64_t at = 0;
        for (int64_t n = s->blocks; n > 0; --n, at += w.a_step, b += w.b_step) {
            const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64), b2 = _mm512_loadu_si512(b + 128), b3 = _mm512_loadu_si512(b + 192);
            #pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const uint8_t* p = a[r] + at;
                __m512i sum = _mm512_dpbusd_epi32(_mm512_loadu_si512(b + STARTS), _mm512_set1_epi32(quad(p)), b0);
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad(p + 4)), b1);
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad(p + 8)), b2);
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad(p + 12)), b3);
                const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scale_of(p)), _mm512_loadu_ps(b + SCALES));
                c[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, c[r]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(total + 16 * r, c[r]);
}
#elif defined(__AVX2__) && defined(__FMA__)
// ymm: 6 fp32 accumulators, 6 sums, 2 halves of a quad of the panel, a broadcast quad of a row, a product: all 16 registers.
// The empty asm statements keep the compiler from moving loads up across them, which would spill and cost a third of the speed.
template <bool FRESH>
void multiply(const Segment* s, int64_t segments, const Walk& w, float* total) {
    __m256 c[ROWS][2];
    for (int r = 0; r < ROWS; ++r) for (int h = 0; h < 2; ++h) c[r][h] = FRESH ? _mm256_setzero_ps() : _mm256_loadu_ps(total + 16 * r + 8 * h);
    for (; segments > 0; --segments, ++s) {
        const uint8_t *a[ROWS], *b = pointer(s->b + w.b_offset);
        for (int r = 0; r < ROWS; ++r) a[r] = pointer(s->a[r] + w.a_offset);
        int64_t at = 0;
        for (int64_t n = s->blocks; n > 0; --n, at += w.a_step, b += w.b_step) {
            __m256i sum[ROWS][2];
            const __m256i* panel = reinterpret_cast<const __m256i*>(b);
            #pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                const __m256i b0 = _mm256_loadu_si256(panel + 2 * k), b1 = _mm256_loadu_si256(panel + 2 * k + 1);
                #pragma GCC unroll 3
                for (int r = 0; r < ROWS; ++r) {
                    const __m256i v = _mm256_set1_epi32(quad(a[r] + at + 4 * k));
#if defined(__AVXVNNI__)
                    if (k == 0) for (int h = 0; h < 2; ++h) sum[r][h] = _mm256_loadu_si256(panel + 8 + h);
                    sum[r][0] = _mm256_dpbusd_avx_epi32(sum[r][0], v, b0);
                    sum[r][1] = _mm256_dpbusd_avx_epi32(sum[r][1], v, b1);
#else
                    const __m256i p0 = _mm256_maddubs_epi16(v, b0), p1 = _mm256_maddubs_epi16(v, b1);   // int16: at most 4 * 576
                    sum[r][0] = k ? _mm256_add_epi16(sum[r][0], p0) : p0;
                    sum[r][1] = k ? _mm256_add_epi16(sum[r][1], p1) : p1;
#endif
                    asm volatile("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
                }
            }
            #pragma GCC unroll 3
            for (int r = 0; r < ROWS; ++r) {
                const __m256 scale = _mm256_set1_ps(scale_of(a[r] + at));
                for (int h = 0; h < 2; ++h) {
#if !defined(__AVXVNNI__)
                    sum[r][h] = _mm256_add_epi32(_mm256_madd_epi16(sum[r][h], _mm256_set1_epi16(1)), _mm256_loadu_si256(panel + 8 + h));
#endif
                    const __m256 both = _mm256_mul_ps(scale, _mm256_loadu_ps(reinterpret_cast<const float*>(b + SCALES) + 8 * h));
                    c[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][h]), both, c[r][h]);
                }
                asm volatile("" : "+x"(c[r][0]), "+x"(c[r][1]));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) for (int h = 0; h < 2; ++h) _mm256_storeu_ps(total + 16 * r + 8 * h, c[r][h]);
}
#elif defined(__ARM_FEATURE_DOTPROD)
// v: 16 fp32 accumulators, 4 vectors of a quad of the panel, 4 sums, and the row's 16 bytes, whose quads sdot reads by lane.
// A record's bytes are at most 24, so they are the same numbers as signed ones.
template <bool FRESH>
void multiply(const Segment* s, int64_t segments, const Walk& w, float* total) {
    float32x4_t c[ROWS][4];
    for (int r = 0; r < ROWS; ++r) for (int h = 0; h < 4; ++h) c[r][h] = FRESH ? vdupq_n_f32(0.0f) : vld1q_f32(total + 16 * r + 4 * h);
    for (; segments > 0; --segments, ++s) {
        const uint8_t *a[ROWS], *b = pointer(s->b + w.b_offset);
        for (int r = 0; r < ROWS; ++r) a[r] = pointer(s->a[r] + w.a_offset);
        int64_t at = 0;
        for (int64_t n = s->blocks; n > 0; --n, at += w.a_step, b += w.b_step)
            for (int r = 0; r < ROWS; ++r) {
                const int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(a[r] + at));
                const float scale = scale_of(a[r] + at);
                for (int h = 0; h < 4; ++h) {
                    const int8_t* q = reinterpret_cast<const int8_t*>(b) + 16 * h;
                    int32x4_t sum = vld1q_s32(reinterpret_cast<const int32_t*>(b + STARTS) + 4 * h);
                    sum = vdotq_laneq_s32(sum, vld1q_s8(q), v, 0);
                    sum = vdotq_laneq_s32(sum, vld1q_s8(q + 64), v, 1);
                    sum = vdotq_laneq_s32(sum, vld1q_s8(q + 128), v, 2);
                    sum = vdotq_laneq_s32(sum, vld1q_s8(q + 192), v, 3);
                    const float32x4_t both = vmulq_n_f32(vld1q_f32(reinterpret_cast<const float*>(b + SCALES) + 4 * h), scale);
                    c[r][h] = vfmaq_f32(c[r][h], vcvtq_f32_s32(sum), both);
                }
            }
    }
    for (int r = 0; r < ROWS; ++r) for (int h = 0; h < 4; ++h) vst1q_f32(total + 16 * r + 4 * h, c[r][h]);
}
#else
// The same sums in plain C++, for every other processor.
template <bool FRESH>
void multiply(const Segment* s, int64_t segments, const Walk& w, float* total) {
    if (FRESH) std::fill(total, total + 16 * ROWS, 0.0f);
    for (; segments > 0; --segments, ++s)
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t *a = pointer(s->a[r] + w.a_offset), *b = pointer(s->b + w.b_offset);
            for (int64_t n = s->blocks; n > 0; --n, a += w.a_step, b += w.b_step) {
                int32_t sum[16]; float scale[16];
                std::memcpy(sum, b + STARTS, 64); std::memcpy(scale, b + SCALES, 64);
                for (int k = 0; k < 16; ++k)
                    for (int j = 0; j < 16; ++j) sum[j] += int32_t(a[k]) * int8_t(b[k / 4 * 64 + 4 * j + k % 4]);
                for (int j = 0; j < 16; ++j) total[16 * r + j] += float(sum[j]) * (scale_of(a) * scale[j]);
            }
        }
}
#endif

// ------------------------------------------------------------------------------------------------ layouts
constexpr int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};      // of a code: 2 * value

// What the bytes of scales are. of_columns gives the scales / 2 of a finished panel's columns: scale[j * step], 0 from `columns` on.
struct HalvesOfE4M3 {
    float half(uint8_t byte, const uint8_t*) const { return e4m3_value(byte) * 0.5f; }
    void of_columns(const uint8_t* scale, int64_t step, int columns, const uint8_t*, float* out) const {
        if (step == 0 && columns == 16) { std::fill(out, out + 16, e4m3_value(*scale) * 0.5f); return; }
        uint8_t bytes[16] = {0};
        if (step == 1 && columns == 16) std::memcpy(bytes, scale, 16);
        else for (int j = 0; j < columns; ++j) bytes[j] = scale[j * step];
        for (int j = 0; j < 16; ++j) {
            const uint32_t normal = (uint32_t(bytes[j]) << 20) + (119u << 23);
            const float small = float(int32_t(bytes[j])) * 0.0009765625f;     // below 8: subnormal in E4M3
            out[j] = bytes[j] < 8 ? small : as_float(normal);
        }
    }
};

// The bytes of another block format: a table of what they stand for, / 2.
struct HalvesOfTable {
    const float* halves;
    float half(uint8_t byte, const uint8_t* codes) const { return unless_of_zeros(halves[byte], codes); }
    void of_columns(const uint8_t* scale, int64_t step, int columns, const uint8_t* panel, float* out) const {
        for (int j = 0; j < 16; ++j) {
            int32_t any = 0;                                       // as unless_of_zeros, on what the panel holds already
            for (int k = 0; k < 256; k += 64) any |= quad(panel + k + 4 * j);
            const float half = j < columns ? halves[scale[j * step]] : 0.0f;
            out[j] = as_bits(half) - 1u < 0x7fffffu && !any ? 0.0f : half;
        }
    }
};

// Start values and scales of a panel whose quads are written.
template <class S>
inline void finish_panel(uint8_t* out, const uint8_t* scale, int64_t scale_step, int columns, S bytes) {
    float half[16];
    bytes.of_columns(scale, scale_step, columns, out, half);
#if defined(__AVX2__)
    for (int h = 0; h < 64; h += 32) {
        __m256i sum = _mm256_setzero_si256();
        for (int k = 0; k < 256; k += 64) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(12), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out + k + h))));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + STARTS + h), _mm256_madd_epi16(sum, _mm256_set1_epi16(-1)));
    }
#else
    int32_t start[16] = {0};
    for (int k = 0; k < 4; ++k)
        for (int j = 0; j < 16; ++j) {
            const int8_t* q = reinterpret_cast<const int8_t*>(out) + 64 * k + 4 * j;
            start[j] -= 12 * (int32_t(q[0]) + q[1] + q[2] + q[3]);
        }
    std::memcpy(out + STARTS, start, 64);
#endif
    std::memcpy(out + SCALES, half, 64);
}

#if defined(__AVX2__)
inline __m128i twice(const uint8_t* codes) {                       // 8 bytes of codes to 16 signed bytes
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
    const __m128i nibbles = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(TWICE)), nibbles);
}
#else
inline void twice(const uint8_t* codes, int8_t* out) { for (int k = 0; k < 16; ++k) out[k] = TWICE[codes[k / 2] >> (k % 2 * 4) & 15]; }
#endif

// One panel from the codes of its columns: column j is a packed block at codes + j * step. Columns from `columns` on are zeros.
template <class S>
inline void panel_of_columns(const uint8_t* codes, int64_t step, const uint8_t* scale, int64_t scale_step, int columns, uint8_t* out, S bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    if (step == CODES && columns == 16) {                          // columns side by side: 4 of them a register, then two steps of transposing
        const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(TWICE)));
        __m512i v[4];
        for (int i = 0; i < 4; ++i) {
            const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + i));
            v[i] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15)));
        }
        const __m512i low = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29), high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
        const __m512i a = _mm512_permutex2var_epi32(v[0], low, v[1]), b = _mm512_permutex2var_epi32(v[2], low, v[3]);
        const __m512i c = _mm512_permutex2var_epi32(v[0], high, v[1]), d = _mm512_permutex2var_epi32(v[2], high, v[3]);
        _mm512_storeu_si512(out, _mm512_shuffle_i64x2(a, b, 0x44)); _mm512_storeu_si512(out + 64, _mm512_shuffle_i64x2(a, b, 0xee));
        _mm512_storeu_si512(out + 128, _mm512_shuffle_i64x2(c, d, 0x44)); _mm512_storeu_si512(out + 192, _mm512_shuffle_i64x2(c, d, 0xee));
        finish_panel(out, scale, scale_step, columns, bytes);
        return;
    }
#endif
#if defined(__AVX2__)
    for (int j = 0; j < 16; j += 4) {                              // 4 columns: a 4 x 4 transpose of quads
        __m128i v[4];
        for (int i = 0; i < 4; ++i) v[i] = j + i < columns ? twice(codes + (j + i) * step) : _mm_setzero_si128();
        const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpacklo_epi32(v[2], v[3]), c = _mm_unpackhi_epi32(v[0], v[1]), d = _mm_unpackhi_epi32(v[2], v[3]);
        __m128i* o = reinterpret_cast<__m128i*>(out + 4 * j);
        _mm_storeu_si128(o, _mm_unpacklo_epi64(a, b)); _mm_storeu_si128(o + 4, _mm_unpackhi_epi64(a, b));
        _mm_storeu_si128(o + 8, _mm_unpacklo_epi64(c, d)); _mm_storeu_si128(o + 12, _mm_unpackhi_epi64(c, d));
    }
#else
    for (int j = 0; j < 16; ++j) {
        int8_t v[16] = {0};
        if (j < columns) twice(codes + j * step, v);
        for (int k = 0; k < 4; ++k) std::memcpy(out + 64 * k + 4 * j, v + 4 * k, 4);
    }
#endif
    finish_panel(out, scale, scale_step, columns, bytes);
}

// One panel from the codes of its rows: packed block k, at codes + k * step, holds element k of the 16 columns.
template <class S>
inline void panel_of_rows(const uint8_t* codes, int64_t step, int rows, const uint8_t* scale, int64_t scale_step, int columns, uint8_t* out, S bytes) {
    for (int k = 0; k < 16; k += 4) {
#if defined(__AVX2__)
        __m128i v[4];
        for (int i = 0; i < 4; ++i) v[i] = k + i < rows ? twice(codes + (k + i) * step) : _mm_setzero_si128();
        const __m128i a = _mm_unpacklo_epi8(v[0], v[1]), b = _mm_unpacklo_epi8(v[2], v[3]), c = _mm_unpackhi_epi8(v[0], v[1]), d = _mm_unpackhi_epi8(v[2], v[3]);
        __m128i* o = reinterpret_cast<__m128i*>(out + 16 * k);
        _mm_storeu_si128(o, _mm_unpacklo_epi16(a, b)); _mm_storeu_si128(o + 1, _mm_unpackhi_epi16(a, b));
        _mm_storeu_si128(o + 2, _mm_unpacklo_epi16(c, d)); _mm_storeu_si128(o + 3, _mm_unpackhi_epi16(c, d));
#else
        int8_t v[4][16] = {{0}};
        for (int i = 0; i < 4; ++i) if (k + i < rows) twice(codes + (k + i) * step, v[i]);
        for (int j = 0; j < 16; ++j) for (int i = 0; i < 4; ++i) out[16 * k + 4 * j + i] = uint8_t(v[i][j]);
#endif
    }
    finish_panel(out, scale, scale_step, columns, bytes);
}

// Whether every pixel of either side reads the pixel of its own place: a 1x1 kernel of stride 1, without padding of any kind.
// Output padding makes the a side of a transposed convolution larger than the b side.
inline bool own_pixel(const int64_t* a, const int64_t* b, const int64_t* taps, const int64_t* stride, const int64_t* padding) {
    bool own = true;
    for (int axis = 0; axis < 3; ++axis) own = own && taps[axis] == 1 && stride[axis] == 1 && padding[axis] == 0 && a[axis] == b[axis];
    return own;
}

// ------------------------------------------------------------------------------------------------ fprop and dgrad
struct Kernel {             // see native.py: the same fields in the same order
    const uint8_t *codes, *scale; uint8_t* panels;                 // panels [groups, blocks of outputs, T, blocks of inputs, PANEL]
    int64_t groups, T, axis0, axis1;                               // axis0: of one group
    int32_t from_axis1, tiles, columnwise, threads;                // contract axis 1, or axis 0; scales of 16x16 tiles; which face the codes are
};

template <class S>
void expand_weight(const Kernel& w, S bytes) {
    const int64_t B0 = (w.axis0 + 15) / 16, B1 = (w.axis1 + 15) / 16, outs = w.from_axis1 ? B0 : B1, ins = w.from_axis1 ? B1 : B0;
    #pragma omp parallel for num_threads(w.threads) schedule(static)
    for (int64_t item = 0; item < w.groups * outs * w.T; ++item) {
        const int64_t t = item % w.T, out = item / w.T % outs, g = item / w.T / outs;
        for (int64_t in = 0; in < ins; ++in) {
            uint8_t* panel = w.panels + (item * ins + in) * PANEL;
            const int64_t b0 = w.from_axis1 ? out : in, b1 = w.from_axis1 ? in : out;
            const int n0 = int(std::min<int64_t>(16, w.axis0 - 16 * b0)), n1 = int(std::min<int64_t>(16, w.axis1 - 16 * b1));
            if (w.columnwise) {                                    // [G, Ob, T, axis 1, 8]: a column of the panel each
                const int64_t at = ((g * B0 + b0) * w.T + t) * w.axis1 + 16 * b1;
                panel_of_columns(w.codes + at * CODES, CODES, w.scale + at, 1, n1, panel, bytes);
                continue;
            }
            const int64_t row = g * w.axis0 + 16 * b0, step = w.T * B1;           // [axis 0, T, B1, 8]
            const uint8_t* codes = w.codes + ((row * w.T + t) * B1 + b1) * CODES;
            const uint8_t* scale = w.tiles ? w.scale + ((g * B0 + b0) * w.T + t) * B1 + b1 : w.scale + (row * w.T + t) * B1 + b1;
            if (w.from_axis1) panel_of_columns(codes, step * CODES, scale, w.tiles ? 0 : step, n0, panel, bytes);
            else panel_of_rows(codes, step * CODES, n0, scale, 0, n1, panel, bytes);
        }
    }
}

struct Data {               // see native.py: the same fields in the same order
    const uint8_t *x, *panels; const float *alpha, *bias; void* y;
    int64_t batch, groups, in_blocks, out_channels;                // of one group: blocks of inputs, output channels
    int64_t in[3], out[3], taps[3], stride[3], padding[3], dilation[3];
    int32_t to_b, out_bf16, threads;                               // to_b: out[i] reads in[i * stride - padding + tap * dilation]; else the reverse
};

// The outputs of one axis that read with the same taps: all of them, or those of one residue of the stride.
// Output i reads source first[i] + ahead[tap], which is padding outside of [0, size).
struct AxisClass {
    int64_t size; std::vector<int64_t> positions, first, taps, ahead;
    std::vector<uint8_t> inner;                                    // of each output: none of its taps reads padding
    bool inside(int64_t i, int64_t tap) const { const int64_t at = first[i] + ahead[tap]; return at >= 0 && at < size; }
};

std::vector<AxisClass> classes_of(const Data& d, int axis) {
    const int64_t s = d.stride[axis], p = d.padding[axis], step = d.dilation[axis];
    std::vector<AxisClass> classes(d.to_b ? 1 : s);
    for (int64_t c = 0; c < int64_t(classes.size()); ++c) {
        classes[c].size = d.in[axis];
        for (int64_t t = 0; t < d.taps[axis]; ++t)
            if (d.to_b) { classes[c].taps.push_back(t); classes[c].ahead.push_back(t * step); }
            else if ((t * step - c) % s == 0) { classes[c].taps.push_back(t); classes[c].ahead.push_back((c - t * step) / s); }
    }
    for (int64_t i = 0; i < d.out[axis]; ++i) {
        AxisClass& c = classes[d.to_b ? 0 : (i + p) % s];
        c.positions.push_back(i);
        c.first.push_back(d.to_b ? i * s - p : (i + p) / s);       // of an imagined tap that is 0 (its residue) ahead
        bool inner = true;
        for (size_t t = 0; t < c.taps.size(); ++t) inner = inner && c.inside(int64_t(c.first.size()) - 1, int64_t(t));
        c.inner.push_back(inner);
    }
    return classes;
}

constexpr int64_t SMALL = 1 << 15;                                 // bytes of panels that stay in the L1 cache beside everything else
constexpr int64_t CHUNK = 96;                                      // pixels that stay in the cache over all panels; a multiple of every ROWS

struct Tile { const Segment* segments; int64_t count, a_offset, pixel[ROWS]; };

// Finds the records that the outputs of one class read.
struct Reader {
    const Data& d; const AxisClass *z, *y, *x;
    int64_t pixel_bytes, taps, count;                              // bytes of a pixel's records; taps and outputs of the class
    std::vector<uint8_t> zeros;                                    // a pixel of padding
    std::vector<int64_t> whole;                                    // of each column: how many from it on read no padding
    std::vector<int64_t> ahead, number;                            // of each tap: bytes ahead of the first source, its number in the kernel
    std::vector<Segment> inner;                                    // a tile of neighbours in one row that read no padding, ahead of its first source
    int64_t column_bytes, a_step = RECORD;                         // from the sources of one output to those of the next one in its row; Walk's

    Reader(const Data& data, const AxisClass& cz, const AxisClass& cy, const AxisClass& cx) : d(data), z(&cz), y(&cy), x(&cx) {
        pixel_bytes = d.groups * d.in_blocks * RECORD;
        taps = int64_t(z->taps.size() * y->taps.size() * x->taps.size());
        count = d.batch * int64_t(z->positions.size() * y->positions.size() * x->positions.size());
        zeros.assign(size_t(pixel_bytes), 12);
        for (int64_t k = 0; k < d.groups * d.in_blocks; ++k) std::memset(zeros.data() + k * RECORD + 16, 0, 4);
        for (size_t a = 0; a < z->taps.size(); ++a) for (size_t b = 0; b < y->taps.size(); ++b) for (size_t c = 0; c < x->taps.size(); ++c) {
            number.push_back((z->taps[a] * d.taps[1] + y->taps[b]) * d.taps[2] + x->taps[c]);
            ahead.push_back(((z->ahead[a] * d.in[1] + y->ahead[b]) * d.in[2] + x->ahead[c]) * pixel_bytes);
        }
        whole.assign(x->positions.size() + 1, 0);
        for (size_t i = x->positions.size(); i-- > 0;) whole[i] = x->inner[i] ? whole[i + 1] + 1 : 0;
        column_bytes = (d.to_b ? d.stride[2] : 1) * pixel_bytes;
        // A tap of one block needs no step of its own, so the step may lead from tap to tap, backwards in dgrad.
        if (d.in_blocks == 1 && x->taps.size() > 1) a_step = (x->ahead[1] - x->ahead[0]) * pixel_bytes;
        for (int64_t t = 0; t < taps; ++t) {
            // Taps whose records follow each other, as those of a row of the kernel mostly do, are one segment.
            if (t && number[t] == number[t - 1] + 1 && ahead[t] - ahead[t - 1] == a_step * d.in_blocks) { inner.back().blocks += d.in_blocks; continue; }
            inner.push_back(segment(t));
            for (int r = 0; r < ROWS; ++r) inner.back().a[r] = ahead[t] + r * column_bytes;
        }
    }

    Segment segment(int64_t t) const { Segment s; s.b = number[t] * d.in_blocks * PANEL; s.blocks = d.in_blocks; return s; }

    // Describes the tiles of outputs first to last - 1. Rows after the last one repeat it.
    void read(int64_t first, int64_t last, Tile* tile, std::vector<Segment>& own) const {
        const int64_t nx = int64_t(x->positions.size()), ny = int64_t(y->positions.size()), nz = int64_t(z->positions.size());
        const int64_t image_bytes = d.in[0] * d.in[1] * d.in[2] * pixel_bytes, column = d.to_b ? 1 : d.stride[2];
        own.resize(size_t(((last - first + ROWS - 1) / ROWS) * taps));
        Segment* s = own.data();
        int64_t ix = first % nx, iy = first / nx % ny, iz = first / nx / ny % nz, image = first / nx / ny / nz;
        const auto pixel = [&] { return ((image * d.out[0] + z->positions[iz]) * d.out[1] + y->positions[iy]) * d.out[2] + x->positions[ix]; };
        const auto source = [&] { return reinterpret_cast<int64_t>(d.x) + image * image_bytes + ((z->first[iz] * d.in[1] + y->first[iy]) * d.in[2] + x->first[ix]) * pixel_bytes; };
        const auto next = [&](int64_t n) { if ((ix += n) == nx) { ix = 0; if (++iy == ny) { iy = 0; if (++iz == nz) { iz = 0; ++image; } } } };
        for (int64_t m = first; m < last; m += ROWS, ++tile, s += taps) {
            if (whole[ix] >= ROWS && m + ROWS <= last && y->inner[iy] && z->inner[iz]) {       // neighbours in one row, no padding
                int64_t from = source(), to = pixel(), n = 0;
                for (; whole[ix + n] >= ROWS && m + n + ROWS <= last; n += ROWS, ++tile, s += taps) {
                    tile->segments = inner.data(); tile->count = int64_t(inner.size()); tile->a_offset = from;
                    for (int r = 0; r < ROWS; ++r) tile->pixel[r] = to + r * column;
                    from += ROWS * column_bytes; to += ROWS * column;
                }
                m += n - ROWS; --tile; s -= taps;                  // the loop's own steps follow
                next(n);
                continue;
            }
            tile->segments = s; tile->count = taps; tile->a_offset = 0;
            for (int64_t t = 0; t < taps; ++t) s[t] = segment(t);
            for (int r = 0; r < ROWS; ++r) {
                const int64_t base = source();
                tile->pixel[r] = pixel();
                for (int64_t t = 0; t < taps; ++t) s[t].a[r] = base + ahead[t];
                if (!whole[ix] || !y->inner[iy] || !z->inner[iz]) blank(s, r, iz, iy, ix);
                if (m + r + 1 < last) next(1);
            }
        }
    }

    // Lets row r of a tile's segments read zeros where its source is padding.
    void blank(Segment* s, int r, int64_t iz, int64_t iy, int64_t ix) const {
        for (size_t a = 0; a < z->taps.size(); ++a) for (size_t b = 0; b < y->taps.size(); ++b) for (size_t c = 0; c < x->taps.size(); ++c, ++s)
            if (!z->inside(iz, a) || !y->inside(iy, b) || !x->inside(ix, c)) s->a[r] = reinterpret_cast<int64_t>(zeros.data());
    }
};

// Writes 16 outputs: rounded to the nearest bf16, as store_round does one by one, which g++ leaves scalar.
inline void store_outputs(float* y, const float* v) {
#if defined(__AVX2__)
    for (int h = 0; h < 16; h += 8) _mm256_storeu_ps(y + h, _mm256_loadu_ps(v + h));       // g++ makes four halves of a memcpy
#else
    std::memcpy(y, v, 64);
#endif
}
inline void store_outputs(bf16* y, const float* v) {
#if defined(__AVX2__)
    __m256i half[2];
    for (int h = 0; h < 2; ++h) {
        const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v) + h), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
        const __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(int32_t(INF_BITS)));
        half[h] = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8));
#else
    for (int j = 0; j < 16; ++j) store_round(y + j, v[j]);
#endif
}

// The first of a tile's outputs in row r.
template <class T>
inline T* outputs_of(const Data& d, const Tile& tile, int64_t r, int64_t channel) { return static_cast<T*>(d.y) + tile.pixel[r] * d.groups * d.out_channels + channel; }

// Rounds total * alpha + bias into the outputs of a tile, `columns` channels from `channel` on.
template <class T>
void store_tile(const Data& d, const Tile& tile, int64_t rows, int64_t channel, int columns, const float* total, float alpha) {
    float bias[16] = {0};
    if (d.bias) { if (columns == 16) std::memcpy(bias, d.bias + channel, 64); else std::memcpy(bias, d.bias + channel, size_t(columns) * 4); }
    for (int64_t r = 0; r < rows; ++r) {
        T* y = outputs_of<T>(d, tile, r, channel);
        const float* c = total + 16 * r;
        float v[16];
        if (d.bias) { for (int j = 0; j < 16; ++j) v[j] = c[j] * alpha + bias[j]; }
        else { for (int j = 0; j < 16; ++j) v[j] = c[j] * alpha; }         // no + 0, which would make 0 of -0
        if (columns == 16) store_outputs(y, v);
        else { for (int j = 0; j < columns; ++j) store_round(y + j, v[j]); }
    }
}

template <class T>
void data_product(Data d) {
    if (own_pixel(d.in, d.out, d.taps, d.stride, d.padding)) {
        d.in[2] = d.out[2] = d.batch * d.in[0] * d.in[1] * d.in[2];           // 1x1: every pixel reads itself, so all are one row
        d.in[0] = d.in[1] = d.out[0] = d.out[1] = d.batch = 1;
    }
    std::vector<AxisClass> axes[3];
    for (int axis = 0; axis < 3; ++axis) axes[axis] = classes_of(d, axis);
    std::vector<Reader> readers; std::vector<int64_t> starts{0};   // chunks before each class
    for (const AxisClass& z : axes[0]) for (const AxisClass& y : axes[1]) for (const AxisClass& x : axes[2]) {
        readers.emplace_back(d, z, y, x);
        starts.push_back(starts.back() + (readers.back().count + CHUNK - 1) / CHUNK);
    }
    const int64_t out_blocks = (d.out_channels + 15) / 16, panels = d.groups * out_blocks;
    const int64_t panel_bytes = d.taps[0] * d.taps[1] * d.taps[2] * d.in_blocks * PANEL;
    struct Outputs { int64_t group_bytes, panel, channel; int columns; };     // 16 output channels: where their operands are, and they
    std::vector<Outputs> outputs;
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t g = p / out_blocks, channel = g * d.out_channels + p % out_blocks * 16;
        outputs.push_back({g * d.in_blocks * RECORD, reinterpret_cast<int64_t>(d.panels) + p * panel_bytes, channel, int(std::min<int64_t>(16, (g + 1) * d.out_channels - channel))});
    }
    // A small image has too few chunks for the threads: then the output channels are divided, too.
    const int64_t chunks = starts.back(), parts = std::max<int64_t>(1, std::min(panels, 4 * int64_t(d.threads) / std::max<int64_t>(1, chunks)));
    const float alpha = *d.alpha;
    #pragma omp parallel num_threads(d.threads)
    {
        std::vector<Segment> own; Tile tiles[CHUNK / ROWS];
        #pragma omp for schedule(static)
        for (int64_t item = 0; item < chunks * parts; ++item) {
            const int64_t chunk = item / parts, part = item % parts;
            const size_t k = size_t(std::upper_bound(starts.begin(), starts.end(), chunk) - starts.begin() - 1);
            const int64_t first = (chunk - starts[k]) * CHUNK, last = std::min(readers[k].count, first + CHUNK);
            readers[k].read(first, last, tiles, own);
            const int64_t from = panels * part / parts, to = panels * (part + 1) / parts, tiles_here = (last - first + ROWS - 1) / ROWS;
            const auto one = [&](const Tile& tile, int64_t m, int64_t p) {
                const Outputs& o = outputs[size_t(p)];
                const Walk walk{readers[k].a_step, PANEL, tile.a_offset + o.group_bytes, o.panel};
                const int64_t rows = std::min<int64_t>(ROWS, last - m);
                for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(outputs_of<T>(d, tile, r, o.channel), 1);   // or the stores wait for memory
                float total[ROWS * 16];
                multiply<true>(tile.segments, tile.count, walk, total);
                store_tile<T>(d, tile, rows, o.channel, o.columns, total, alpha);
            };
            // Few panels stay in the cache anyway, and then writing whole pixels is kinder to memory.
            if ((to - from) * panel_bytes <= SMALL) { for (int64_t i = 0; i < tiles_here; ++i) for (int64_t p = from; p < to; ++p) one(tiles[i], first + i * ROWS, p); }
            else { for (int64_t p = from; p < to; ++p) for (int64_t i = 0; i < tiles_here; ++i) one(tiles[i], first + i * ROWS, p); }
        }
    }
}

// ------------------------------------------------------------------------------------------------ wgrad
struct WeightGradient {     // see native.py: the same fields in the same order
    const uint8_t *records, *codes, *scale;                        // dy: [pixels, N16, channels, RECORD]; x: [N16, pixels, channels, 8], [N16, pixels, channels]
    const float* alpha; void* dw;                                  // dw [axis 0, T, axis 1 of a group]
    int64_t n16, groups, record_channels, panel_channels;          // channels of dy and of x in one group
    int64_t a[3], b[3], taps[3], stride[3], padding[3], dilation[3];
    int32_t records_on_b, out_bf16, threads;                       // dy on the b side (a convolution), or on the a side (a transposed one)
};

// The panels' side of the contraction in steps: step (pixel * N16 + image block), pixels in row-major order. A 1x1 convolution's
// are cut into rows regardless of pixels, and the last row ends at `limit`.
struct Steps { int64_t total, image_blocks, limit; };

// Panels of x for a few rows of pixels at a time. A slab holds those of one position of the first axis, in slot `slab % slots`.
template <class S>
struct Slabs {
    const WeightGradient& w; S bytes; Steps all; int64_t steps, blocks, slots;         // steps of a slab; panels of a step
    std::unique_ptr<uint8_t[]> memory; int64_t start;              // not a vector, which would fill it with zeros: expand writes all that is read

    Slabs(const WeightGradient& q, S b, Steps a, int64_t slab_steps, int64_t kept) : w(q), bytes(b), all(a), steps(slab_steps), slots(kept) {
        blocks = w.groups * ((w.panel_channels + 15) / 16);
        memory.reset(new uint8_t[size_t(blocks * block_bytes() + 64)]);
        start = (reinterpret_cast<int64_t>(memory.get()) + 63) & ~int64_t(63);
    }
    int64_t block_bytes() const { return slots * steps * PANEL; }
    int64_t address(int64_t step) const { return start + (step / steps % slots * steps + step % steps) * PANEL; }      // of block 0

    // Writes the panels of one step for all channels.
    void expand(int64_t step) const {
        const int64_t pixels = all.total / all.image_blocks, channels = w.groups * w.panel_channels, of_group = (w.panel_channels + 15) / 16;
        const int64_t from = (step % all.image_blocks * pixels + step / all.image_blocks) * channels, to = address(step);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t c = block % of_group * 16, at = from + block / of_group * w.panel_channels + c;
            const int columns = int(std::min<int64_t>(16, w.panel_channels - c));
            panel_of_columns(w.codes + at * CODES, CODES, w.scale + at, 1, columns, reinterpret_cast<uint8_t*>(to + block * block_bytes()), bytes);
        }
    }
};

// The segments of one tap over rows [row0, row1) of b's first axis.
template <class S>
void tap_segments(const WeightGradient& w, const Slabs<S>& slabs, int64_t row0, int64_t row1, const int64_t* tap, std::vector<Segment>& out) {
    const int64_t s = w.stride[2], shift = tap[2] * w.dilation[2] - w.padding[2];
    const int64_t first = shift < 0 ? (s - 1 - shift) / s : 0, last = w.a[2] <= shift ? 0 : std::min(w.b[2], (w.a[2] - 1 - shift) / s + 1);
    const int64_t record_bytes = w.groups * w.record_channels * RECORD;
    const bool steady = s == 1 || w.n16 == 1;                      // then a whole row is one segment
    out.clear();
    if (first >= last) return;
    for (int64_t p0 = row0; p0 < row1; ++p0) {
        const int64_t a0 = p0 * w.stride[0] - w.padding[0] + tap[0] * w.dilation[0];
        if (a0 < 0 || a0 >= w.a[0]) continue;
        for (int64_t p1 = 0; p1 < w.b[1]; ++p1) {
            const int64_t a1 = p1 * w.stride[1] - w.padding[1] + tap[1] * w.dilation[1];
            if (a1 < 0 || a1 >= w.a[1]) continue;
            for (int64_t p2 = first; p2 < last; p2 = steady ? last : p2 + 1) {
                const int64_t on_b = ((p0 * w.b[1] + p1) * w.b[2] + p2) * w.n16, on_a = ((a0 * w.a[1] + a1) * w.a[2] + p2 * s + shift) * w.n16;
                const int64_t record = reinterpret_cast<int64_t>(w.records) + (w.records_on_b ? on_b : on_a) * record_bytes;
                Segment segment;
                for (int64_t r = 0; r < ROWS; ++r) segment.a[r] = record + std::min(r, w.record_channels - 1) * RECORD;
                segment.b = slabs.address(w.records_on_b ? on_a : on_b);
                segment.blocks = std::min((steady ? last - p2 : 1) * w.n16, slabs.all.limit - on_b);
                out.push_back(segment);
            }
        }
    }
}

inline int this_thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}
inline int thread_count() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Where the sums of one item belong: a tile of dy's channels, a tap, a block of x's channels. Counted up, since dividing costs as much as a short sum.
struct Item {
    const WeightGradient& w; int64_t tiles, taps, of_group;
    int64_t tile, tap, block, group = 0, channel = 0; int columns = 0;        // of x: the group, the first channel in it, and how many

    Item(const WeightGradient& q, int64_t number, int64_t tiles_, int64_t taps_, int64_t of_group_) : w(q), tiles(tiles_), taps(taps_), of_group(of_group_) {
        tile = number % tiles; tap = number / tiles % taps; block = number / tiles / taps;
        find_block();
    }
    void find_block() { group = block / of_group; channel = block % of_group * 16; columns = int(std::min<int64_t>(16, w.panel_channels - channel)); }
    void next() { if (++tile == tiles) { tile = 0; if (++tap == taps) { tap = 0; ++block; find_block(); } } }
    int64_t first_record() const { return std::max<int64_t>(0, std::min(tile * ROWS, w.record_channels - ROWS)); }
};

template <class T, class S>
void weight_product(WeightGradient w, S bytes) {
    const int64_t taps = w.taps[0] * w.taps[1] * w.taps[2], panel_pixels = w.records_on_b ? w.a[0] * w.a[1] * w.a[2] : w.b[0] * w.b[1] * w.b[2];
    Steps steps{panel_pixels * w.n16, w.n16, INT64_MAX};
    if (own_pixel(w.a, w.b, w.taps, w.stride, w.padding)) {
        steps.limit = steps.total;                                 // step meets step: cut all of them into rows of 64
        w.a[0] = w.b[0] = (steps.total + 63) / 64; w.a[1] = w.b[1] = w.n16 = 1; w.a[2] = w.b[2] = 64;
    }
    // A band of rows is long enough to keep the accumulators busy, and its panels short enough for the cache.
    const int64_t band = std::max<int64_t>(1, 64 / std::max<int64_t>(1, w.b[1] * w.b[2] * w.n16)), reach = (w.taps[0] - 1) * w.dilation[0];
    const int64_t slab_steps = (w.records_on_b ? w.a[1] * w.a[2] : w.b[1] * w.b[2]) * w.n16;
    const Slabs<S> slabs(w, bytes, steps, slab_steps, w.records_on_b ? (band - 1) * w.stride[0] + reach + 1 : band);
    const int64_t tiles = (w.record_channels + ROWS - 1) / ROWS, items = slabs.blocks * taps * tiles, of_group = slabs.blocks / w.groups;
    const bool far = (w.records_on_b ? 1 : w.stride[2]) != 1 && w.n16 == 1, near = w.records_on_b && w.stride[2] != 1 && w.n16 == 1;
    const int64_t a_step = w.groups * w.record_channels * RECORD * (far ? w.stride[2] : 1), b_step = PANEL * (near ? w.stride[2] : 1);
    const bool once = band >= w.b[0];                              // one band: sums go straight to dw
    std::vector<float> totals(once ? 0 : size_t(items * ROWS * 16), 0.0f);     // [panel block, tap, tile of dy's channels, ROWS, 16]
    const float alpha = *w.alpha;
    const auto row_of = [&](const Item& i, int64_t o) { return static_cast<T*>(w.dw) + ((i.group * w.record_channels + o) * taps + i.tap) * w.panel_channels + i.channel; };
    const auto store = [&](const Item& i, const float* total) {
        for (int64_t r = 0, o = i.first_record(); r < ROWS && o < w.record_channels; ++r, ++o) {
            float v[16];
            for (int j = 0; j < 16; ++j) v[j] = total[r * 16 + j] * alpha;
            T* const row = row_of(i, o);
            if (!w.records_on_b) for (int j = 0; j < i.columns; ++j) store_round(static_cast<T*>(w.dw) + ((i.group * w.panel_channels + i.channel + j) * taps + i.tap) * w.record_channels + o, v[j]);
            else if (i.columns == 16) store_outputs(row, v);
            else for (int j = 0; j < i.columns; ++j) store_round(row + j, v[j]);
        }
    };
    #pragma omp parallel num_threads(w.threads)
    {
        // A thread owns some of the sums for all pixels: the order of additions does not depend on the number of threads.
        const int64_t begin = items * this_thread() / thread_count(), end = items * (this_thread() + 1) / thread_count();
        std::vector<Segment> segments;
        int64_t expanded = 0;                                      // slabs
        for (int64_t row = 0; row < w.b[0]; row += band) {
            const int64_t next = std::min(w.b[0], row + band);
            int64_t from = row, to = next;                         // the slabs that these rows read
            if (w.records_on_b) { from = std::max<int64_t>(0, row * w.stride[0] - w.padding[0]); to = std::min(w.a[0], (next - 1) * w.stride[0] - w.padding[0] + reach + 1); }
            from = std::max(from, expanded);
            const int64_t to_step = std::min(steps.total, to * slab_steps);
            #pragma omp for schedule(static)
            for (int64_t step = from * slab_steps; step < to_step; ++step) slabs.expand(step);
            expanded = std::max(expanded, to);
            int64_t made = -1;                                     // the tap whose segments are at hand
            Item i(w, begin, tiles, taps, of_group);
            for (int64_t item = begin; item < end; ++item, i.next()) {
                if (i.tap != made) {
                    const int64_t tap[3] = {i.tap / w.taps[2] / w.taps[1], i.tap / w.taps[2] % w.taps[1], i.tap % w.taps[2]};
                    tap_segments(w, slabs, row, next, tap, segments);
                    made = i.tap;
                }
                const Walk walk{a_step, b_step, (i.group * w.record_channels + i.first_record()) * RECORD, i.block * slabs.block_bytes()};
                if (once) {
                    float total[ROWS * 16];
                    if (w.records_on_b) for (int64_t o = i.first_record(), r = 0; r < std::min<int64_t>(ROWS, w.record_channels); ++r) __builtin_prefetch(row_of(i, o + r), 1);     // or the stores wait for memory
                    multiply<true>(segments.data(), int64_t(segments.size()), walk, total);
                    store(i, total);
                } else multiply<false>(segments.data(), int64_t(segments.size()), walk, totals.data() + item * ROWS * 16);
            }
            #pragma omp barrier
        }
        if (!once) { Item i(w, begin, tiles, taps, of_group); for (int64_t item = begin; item < end; ++item, i.next()) store(i, totals.data() + item * ROWS * 16); }
    }
}

// Records from packed rowwise codes [segments, blocks, 8] and scales [segments, blocks].
template <class S>
void expand_records(const uint8_t* codes, const uint8_t* scale, uint8_t* records, int64_t blocks, int threads, S bytes) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
        uint8_t* out = records + i * RECORD;
        for (int k = 0; k < 16; ++k) out[k] = uint8_t(TWICE[codes[i * CODES + k / 2] >> (k % 2 * 4) & 15] + 12);
        const float half = bytes.half(scale[i], codes + i * CODES);
        std::memcpy(out + 16, &half, 4);
    }
}

}  // namespace

extern "C" {

const char* nvfp4_machine() { return MACHINE; }

void nvfp4_expand_weight(const Kernel* w) { expand_weight(*w, HalvesOfE4M3()); }

void nvfp4_expand_records(const uint8_t* codes, const uint8_t* scale, uint8_t* records, int64_t blocks, int32_t threads) {
    expand_records(codes, scale, records, blocks, threads, HalvesOfE4M3());
}

void nvfp4_data_product(const Data* d) { if (d->out_bf16) data_product<bf16>(*d); else data_product<float>(*d); }

void nvfp4_weight_product(const WeightGradient* w) { if (w->out_bf16) weight_product<bf16>(*w, HalvesOfE4M3()); else weight_product<float>(*w, HalvesOfE4M3()); }

// The same for scale bytes of another block format, by a table of 256 scales / 2. Records and panels have no bytes: nvfp4_data_product serves.

void format_expand_weight(const Kernel* w, const float* halves) { expand_weight(*w, HalvesOfTable{halves}); }

void format_expand_records(const uint8_t* codes, const uint8_t* scale, uint8_t* records, int64_t blocks, int32_t threads, const float* halves) {
    expand_records(codes, scale, records, blocks, threads, HalvesOfTable{halves});
}

void format_weight_product(const WeightGradient* w, const float* halves) {
    if (w->out_bf16) weight_product<bf16>(*w, HalvesOfTable{halves}); else weight_product<float>(*w, HalvesOfTable{halves});
}

}  // extern "C"
