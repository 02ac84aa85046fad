// CPU kernels of the block formats beside NVFP4, by the templates of quantize.h: MXFP4 and NVFP4 with UE5M3 scales.
//
// They have no tensor scale, so a block's scale is known once its values are, and its byte alone stands for it. ops/block_scales.py
// specifies both. Values are packed, or records; unpacking reads bytes by a table of 256 scales, whatever the format is.
#include "quantize.h"

namespace {

// scale = 2^(floor(log2 amax) - 2) of 32 values (`pairs` of blocks: E8M0), or amax / 6 rounded to UE5M3 of 16 values.
struct OneByte {
    static constexpr bool PAIRS = true;
    bool pairs;

    // Of a scale of 0, which gives zeros: infinity. Dividing by a power of two is exact, so one division serves both.
    static Floats divided(Floats v, Floats by) { return v / by; }
    static Floats divided(Floats v, float by) { return v / by; }
    Floats divisor(Floats s) const { return s == 0.0f ? of_bits(Words{} + INF_BITS) : s; }
    float divisor(float s) const { return s == 0.0f ? as_float(INF_BITS) : s; }

    Floats of(Words amax) const {
        if (pairs) {
            const Words exponent = amax >> 23, byte = exponent > 2 ? exponent - 2 : Words{};
            // A byte of 0 is 2^-127, which is subnormal. A block of zeros gets the scale 0 in its place, with the same byte and the same values.
            const Words small = amax > 0 ? Words{} + 0x400000u : Words{};
            return of_bits(amax > INF_BITS ? Words{} + 0x7fc00000u : (byte > 0 ? byte << 23 : small));
        }
        const Floats v = of_bits(amax) / 6.0f, c = smaller(v, all(114688.0f)), small = (c + 96.0f) - 96.0f;       // 1.5 * 2^23 * 2^-17: the subnormal step
        const Words u = bits_of(c), normal = (u + 0x7ffffu + (u >> 20 & 1u)) & 0xfff00000u;
        return smaller(c < 0.00006103515625f ? small : of_bits(normal), all(114688.0f));
    }
    void of_blocks(const float (*)[16], const float* amax, float* s, float* e) const {
        for (int b = 0; b < NB; b += LANES) {
            const Floats scale = of(bits_of(load_lanes(amax + b)));
            store_lanes(s + b, scale); store_lanes(e + b, divisor(scale));
        }
    }
    Floats of_columns(const Floats*, Words amax) const { return of(amax); }
    float of_tile(const float (*)[16], float amax) const { return of(bits_of(all(amax)))[0]; }
    bool saturates(float) const { return false; }                  // not counted
    Words bytes(Floats s) const {
        const Words u = bits_of(s);
        if (pairs) return u >> 23;
        const Words normal = (u >> 20) - (112u << 3), small = reinterpret_cast<Words>(__builtin_convertvector(s * 131072.0f, Ints));
        return s < 0.00006103515625f ? small : normal;
    }
    uint8_t byte(float s) const { return uint8_t(bytes(all(s))[0]); }
};

struct Table {
    const float* scales;
    float operator()(uint8_t byte, const uint8_t* codes) const { return unless_of_zeros(scales[byte], codes); }
};

}  // namespace

extern "C" {

void format_quantize(const Operand* q, int32_t pairs) {            // no dequantized faces
    const OneByte S{pairs != 0};
    if (q->in_bf16) quantize_typed<bf16, float>(*q, S, S); else quantize_typed<float, float>(*q, S, S);
}

void format_quantize_weight(const Weight* q, int32_t pairs) {
    const OneByte S{pairs != 0};
    if (q->in_bf16) quantize_weight<bf16, float>(*q, S); else quantize_weight<float, float>(*q, S);
}

// For unpacking each piece of 16 values has its byte.

void format_unpack_columns(const uint8_t* codes, const uint8_t* scale, void* out, int64_t groups16, int64_t run, int32_t out_bf16, int32_t threads, const float* scales) {
    if (out_bf16) unpack_columns(codes, scale, static_cast<bf16*>(out), groups16, run, threads, Table{scales});
    else unpack_columns(codes, scale, static_cast<float*>(out), groups16, run, threads, Table{scales});
}

void format_unpack_rows(const uint8_t* codes, const uint8_t* scale, void* out, int64_t segments, int64_t Cg, int32_t out_bf16, int32_t threads, const float* scales) {
    if (out_bf16) unpack_rows(codes, scale, static_cast<bf16*>(out), segments, Cg, threads, Table{scales});
    else unpack_rows(codes, scale, static_cast<float*>(out), segments, Cg, threads, Table{scales});
}

void format_unpack_weight(const Weight* q, const float* scales) {
    if (q->out_bf16) unpack_weight<bf16>(*q, Table{scales}); else unpack_weight<float>(*q, Table{scales});
}

}  // extern "C"
