// Quantization on a CUDA device: the bytes of ref.py, ggml_ref.py, fp4_ref.py and rotate_ref.py.
//
// NVRTC compiles it (cuda.py); a host compiler does too, to check it without a device (tests/kernels/cuda_host.h
// stands in for CUDA there). So it includes nothing, and what only a device has is inside #ifdef __CUDA_ARCH__. No
// operation is fused (--fmad=false) and division is IEEE's, so that arithmetic is that of NumPy.
//
// A thread works on eight numbers: 16 bytes of half floats, and whole bytes of codes of any width. What shares a scale
// lies in neighbouring lanes of a warp, which tell each other their largest number. Nothing else is shared, and all
// threads of a warp take each loop as often.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__

const int WARPS = 8;  // a block has 256 threads: cuda.py's THREADS
const u32 ALL = 0xFFFFFFFF;
const i32 INFINITE = 0x7F800000;
const u32 NOT_A_NUMBER = 0x7FC00000;
const u32 SIGN = 0x80000000;
enum Codes { INT, E4M3, E5M2 };
enum Zero { NONE, MIN, MIDDLE, INTEGER };
enum Rounding { HALF_EVEN, HALF_AWAY, TRUNC };
enum Kind { FLOAT32, FLOAT16, BFLOAT16 };

struct Half { u16 bits; };
struct Bfloat { u16 bits; };

// ---------------------------------------------------------------- floats

DEVICE u32 bits_of(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
#endif
}

DEVICE float float_of(u32 bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
#endif
}

DEVICE float widen(float x) { return x; }

DEVICE float widen(Bfloat x) { return float_of((u32)x.bits << 16); }

DEVICE float widen(Half x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    u32 size = (u32)(x.bits & 0x7FFF) << 13;
    float scaled = float_of(size) * 5192296858534827628530496329220096.0f;  // 2^112, right for subnormal ones too
    u32 wide = size >= 0x0F800000 ? size | INFINITE : bits_of(scaled);
    return float_of(wide | (u32)(x.bits & 0x8000) << 16);
#endif
}

// Half to even; what is too large becomes infinite, NaN the one of ref.NAN.
DEVICE float narrow(float x, float*) { return x == x ? x : float_of(NOT_A_NUMBER); }

DEVICE Half narrow(float x, Half*) {
    u16 bits;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    u32 size = bits_of(x) & ~SIGN;
    // Above 2^-14 the lowest 13 bits are rounded away; below, 0.5 has the step of the subnormals.
    u32 half = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    if (size < 0x38800000) half = bits_of(float_of(size) + 0.5f) - 0x3F000000;
    if (size >= 0x477FF000) half = 0x7C00;
    bits = (u16)(half | (bits_of(x) >> 16 & 0x8000));
#endif
    Half result = {x == x ? bits : (u16)0x7E00};
    return result;
}

DEVICE Bfloat narrow(float x, Bfloat*) {
    u32 bits = bits_of(x);
    Bfloat result = {x == x ? (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : (u16)0x7FC0};
    return result;
}

DEVICE float rounded_to(float x, int kind) {
    if (kind == FLOAT16) return widen(narrow(x, (Half*)0));
    if (kind == BFLOAT16) return widen(narrow(x, (Bfloat*)0));
    return x;
}

DEVICE float inverse_or_0(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

// ---------------------------------------------------------------- fp8

// The byte of a float, half to even, by integers: below the normal numbers a power of two has the step of the subnormal
// ones. NaN keeps its sign.
DEVICE u32 fp8_of(float x, int codes, bool saturate) {
    u32 bits = bits_of(x), size = bits & ~SIGN, code, limit = INFINITE;
    bool is_nan = size > limit;
    if (codes == E4M3) {
        if (saturate) limit = 0x43E00000;
        size = size > limit ? limit : size;
        code = (size + 0x7FFFF - (120u << 23) + (size >> 20 & 1)) >> 20;
        if (size < 0x3C800000) code = bits_of(float_of(size) + 16384.0f) - 0x46800000;
        code = code > 0x7E ? 0x7F : code;
    } else {
        if (saturate) limit = 0x47600000;
        size = size > limit ? limit : size;
        code = (size + 0xFFFFF - (112u << 23) + (size >> 21 & 1)) >> 21;
        if (size < 0x38800000) code = bits_of(float_of(size) + 128.0f) - 0x43000000;
        code = code > 0x7C ? 0x7C : code;
    }
    return (is_nan ? 0x7F : code) | (bits >> 24 & 0x80);
}

// The bytes of two numbers that are not NaN, the first lowest; too large ones become the largest.
DEVICE u32 two_fp8_of(float first, float second, int codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u16 both;
    if (codes == E4M3) asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(second), "f"(first));
    else asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(both) : "f"(second), "f"(first));
    return both;
#else
    return fp8_of(first, codes, true) | fp8_of(second, codes, true) << 8;
#endif
}

// E4M3 is an fp16 whose exponent is 8 too small, E5M2 the upper half of one.
DEVICE float number_of_fp8(u32 code, int codes) {
    Half half = {(u16)(codes == E4M3 ? (code & 0x80) << 8 | (code & 0x7F) << 7 : code << 8)};
    float x = widen(half) * (codes == E4M3 ? 256.0f : 1.0f);
    return (code & 0x7F) > (codes == E4M3 ? 0x7E : 0x7C) ? float_of(NOT_A_NUMBER) : x;
}

DEVICE void numbers_of_two_fp8(u32 both, int codes, float* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u32 halves;
    if (codes == E4M3) asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)both));
    else asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"((u16)both));
    Half first = {(u16)halves}, second = {(u16)(halves >> 16)};
    x[0] = widen(first), x[1] = widen(second);
#else
    x[0] = number_of_fp8(both & 0xFF, codes), x[1] = number_of_fp8(both >> 8 & 0xFF, codes);
#endif
}

// ---------------------------------------------------------------- memory, eight numbers at a time

template <class T> struct Eight { uint4 part[sizeof(T) / 2]; };

template <class T> DEVICE Eight<T> load(const T* x) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) eight.part[i] = ((const uint4*)x)[i];
    return eight;
}

DEVICE u32 word_of(const uint4& part, int i) {
    return i == 0 ? part.x : i == 1 ? part.y : i == 2 ? part.z : part.w;
}

DEVICE u32 raw(const Eight<float>& eight, int i) { return word_of(eight.part[i / 4], i % 4); }
DEVICE u32 raw(const Eight<Half>& eight, int i) { return word_of(eight.part[0], i / 2) >> i % 2 * 16 & 0xFFFF; }
DEVICE u32 raw(const Eight<Bfloat>& eight, int i) { return word_of(eight.part[0], i / 2) >> i % 2 * 16 & 0xFFFF; }

DEVICE float number(const Eight<float>& eight, int i) { return float_of(raw(eight, i)); }
DEVICE float number(const Eight<Half>& eight, int i) { Half x = {(u16)raw(eight, i)}; return widen(x); }
DEVICE float number(const Eight<Bfloat>& eight, int i) { return float_of(raw(eight, i) << 16); }

DEVICE u32 sign_of(const Eight<float>& eight, int i) { return raw(eight, i) >> 31; }
template <class T> DEVICE u32 sign_of(const Eight<T>& eight, int i) { return raw(eight, i) >> 15; }

// Of idle threads, which only lend their lane.
template <class T> DEVICE Eight<T> zeros_of() {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        uint4& part = eight.part[i];
        part.x = part.y = part.z = part.w = 0;
    }
    return eight;
}

DEVICE void store(float* out, const float* y) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 part;
        part.x = bits_of(narrow(y[4 * i], out)), part.y = bits_of(narrow(y[4 * i + 1], out));
        part.z = bits_of(narrow(y[4 * i + 2], out)), part.w = bits_of(narrow(y[4 * i + 3], out));
        ((uint4*)out)[i] = part;
    }
}

template <class T> DEVICE u32 pair(float first, float second) {
    return narrow(first, (T*)0).bits | (u32)narrow(second, (T*)0).bits << 16;
}

template <class T> DEVICE void store(T* out, const float* y) {
    uint4 part;
    part.x = pair<T>(y[0], y[1]), part.y = pair<T>(y[2], y[3]);
    part.z = pair<T>(y[4], y[5]), part.w = pair<T>(y[6], y[7]);
    *(uint4*)out = part;
}

// Eight codes: as many bytes as a code has bits.
DEVICE u64 load_codes(const u8* codes, int bits) {
    if (bits == 8) { uint2 both = *(const uint2*)codes; return both.x | (u64)both.y << 32; }
    if (bits == 4) return *(const u32*)codes;
    if (bits == 2) return *(const u16*)codes;
    return codes[0] | (u32)codes[1] << 8 | (u32)codes[2] << 16;
}

DEVICE void store_codes(u8* codes, u64 word, int bits) {
    if (bits == 8) { uint2 both; both.x = (u32)word, both.y = (u32)(word >> 32); *(uint2*)codes = both; }
    else if (bits == 4) *(u32*)codes = (u32)word;
    else if (bits == 2) *(u16*)codes = (u16)word;
    else codes[0] = (u8)word, codes[1] = (u8)(word >> 8), codes[2] = (u8)(word >> 16);
}

// ---------------------------------------------------------------- rules

// A rule on a shape. What of it is a choice is one number, as cuda.py's _options packs it: a template argument where the
// kernel is made for one rule, -1 where it takes any.
template <int FIXED> struct Plan {
    int options;
    i64 outer, length, inner, group;
    float divisor, floor;

    DEVICE int field(int at, int width) const { return (FIXED < 0 ? options : FIXED) >> at & ((1 << width) - 1); }
    DEVICE int bits() const { return field(0, 4); }
    DEVICE int codes() const { return field(4, 2); }
    DEVICE int zero() const { return field(6, 2); }
    DEVICE int rounding() const { return field(8, 2); }
    DEVICE int scale_kind() const { return field(10, 2); }
    DEVICE bool spans_zero() const { return field(12, 1); }
    DEVICE bool is_sum_rounded() const { return field(13, 1); }
    DEVICE bool is_division() const { return field(14, 1); }
    DEVICE bool is_stepwise() const { return field(15, 1); }
    DEVICE bool is_zero_hidden() const { return field(16, 1); }
    DEVICE int sign_bit() const { return field(17, 1) << (bits() - 1); }
    DEVICE float lowest() const { return (float)-sign_bit(); }
    DEVICE float highest() const { return (float)((1 << bits()) - 1 - sign_bit()); }
    DEVICE u32 mask() const { return (1u << bits()) - 1; }
};

struct Scale {
    float scale;
    float inverse;  // 0 where all codes are 0
    float zero;
};

struct Ends {
    i32 low, high;  // without zeros `high` is the largest size
};

// Bits of floats as integers in the order of the floats, NaN outermost; the way back too.
DEVICE i32 order(i32 bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }

template <class P> DEVICE Ends no_ends(const P& p) {
    Ends ends = {0x7FFFFFFF, p.zero() == NONE ? 0 : (i32)SIGN};
    return ends;
}

template <class P> DEVICE void include(Ends& ends, float x, const P& p) {
    i32 bits = (i32)bits_of(x);
    if (p.zero() == NONE) {
        bits &= 0x7FFFFFFF;
        ends.high = bits > ends.high ? bits : ends.high;
    } else {
        i32 key = order(bits);
        ends.low = key < ends.low ? key : ends.low;
        ends.high = key > ends.high ? key : ends.high;
    }
}

// Lanes whose numbers differ in the bits from `first` up to `last` have one group.
template <class P> DEVICE void share(Ends& ends, int first, int last, const P& p) {
    for (int step = first; step < last; step *= 2) {
        i32 high = __shfl_xor_sync(ALL, ends.high, step);
        ends.high = high > ends.high ? high : ends.high;
        if (p.zero() != NONE) {
            i32 low = __shfl_xor_sync(ALL, ends.low, step);
            ends.low = low < ends.low ? low : ends.low;
        }
    }
}

// As a whole number within two; to clamp first comes to the same and cannot overflow. A sum with 1.5 * 2^23 has no room
// for a fraction.
DEVICE i32 rounded(float x, float least, float most, int rounding) {
    x = x < least ? least : x;
    x = x > most ? most : x;
    if (rounding == HALF_EVEN) return (i32)(bits_of(x + 12582912.0f) - 0x4B400000);
    if (rounding == HALF_AWAY) return (i32)(x + float_of((bits_of(x) & SIGN) | 0x3F000000));
    return (i32)x;
}

template <class P> DEVICE Scale scale_of(Ends ends, const P& p) {
    const float nan = float_of(NOT_A_NUMBER);
    bool is_bad = ends.high >= INFINITE;
    float top = float_of((u32)order(ends.high)), bottom = 0.0f, width = top, zero = 0.0f;
    if (p.zero() != NONE) {
        is_bad = is_bad || ends.low <= order((i32)(SIGN | INFINITE));
        bottom = float_of((u32)order(ends.low));
        if (p.zero() == INTEGER && p.spans_zero()) {
            bottom = bottom < 0.0f ? bottom : 0.0f;
            top = top > 0.0f ? top : 0.0f;
        }
        if (p.is_stepwise()) bottom = rounded_to(bottom, p.scale_kind()), top = rounded_to(top, p.scale_kind());
        width = top - bottom;
        if (p.is_stepwise()) width = rounded_to(width, p.scale_kind());
    }
    float scale = width / p.divisor;
    scale = rounded_to(scale > p.floor ? scale : p.floor, p.scale_kind());
    if (p.zero() == MIN) zero = rounded_to(bottom, p.scale_kind()) + 0.0f;  // no negative zero
    if (p.zero() == MIDDLE) zero = rounded_to((bottom + top) * 0.5f, p.scale_kind()) + 0.0f;
    is_bad = is_bad || (i32)bits_of(scale) >= INFINITE || (i32)(bits_of(zero) & ~SIGN) >= INFINITE;
    float inverse = 1.0f / scale;
    bool is_used = (i32)bits_of(inverse) < INFINITE && !is_bad;
    if (p.zero() == INTEGER)
        zero = is_used ? (float)rounded(-bottom / scale, p.lowest(), p.highest(), p.rounding()) : 0.0f;
    else if (is_bad && p.zero() != NONE)
        zero = nan;
    Scale result = {is_bad ? nan : is_used ? scale : 0.0f, is_used ? inverse : 0.0f, zero};
    return result;
}

// The scale that is read: without the bits that hold a zero.
template <class P> DEVICE float kept(float scale, const P& p) {
    return p.is_zero_hidden() ? float_of(bits_of(scale) & ~15u) : scale;
}

template <class P> DEVICE float divided(float x, const Scale& s, const P& p) {
    if (p.zero() == MIN || p.zero() == MIDDLE) x = x - s.zero;
    if (p.is_stepwise()) return rounded_to(rounded_to(x, p.scale_kind()) / s.scale, p.scale_kind());
    return p.is_division() ? x / s.scale : x * s.inverse;
}

// The bits of one code, of a group whose codes are not all 0.
template <class P> DEVICE u32 integer_of(float x, const Scale& s, const P& p) {
    x = divided(x, s, p);
    i32 code;
    if (p.zero() != INTEGER) code = rounded(x, p.lowest(), p.highest(), p.rounding());
    else if (p.is_sum_rounded()) code = rounded(x + s.zero, p.lowest(), p.highest(), p.rounding());
    else code = rounded(x, p.lowest() - s.zero, p.highest() - s.zero, p.rounding()) + (i32)s.zero;
    return (u32)code & p.mask();
}

template <class P> DEVICE u32 code_of(float x, const Scale& s, const P& p) {
    if (!(s.inverse > 0.0f)) return 0;
    return p.codes() == INT ? integer_of(x, s, p) : fp8_of(divided(x, s, p), p.codes(), true);
}

template <class P> DEVICE float number_of(u32 code, float scale, float zero, const P& p) {
    if (p.codes() != INT) return number_of_fp8(code, p.codes()) * scale;
    float x = (float)((i32)(code ^ p.sign_bit()) - p.sign_bit());
    if (p.zero() == INTEGER) return (x - zero) * scale;
    if (p.zero() == NONE) return x * scale;
    x = x * scale;
    return (p.is_stepwise() ? rounded_to(x, p.scale_kind()) : x) + zero;
}

// Eight codes of one group, the first lowest.
template <class P> DEVICE u64 encode(const float* x, const Scale& s, const P& p) {
    u64 word = 0;
    if (!(s.inverse > 0.0f)) return word;
    if (p.codes() != INT) {
#pragma unroll
        for (int i = 0; i < 8; i += 2)
            word |= (u64)two_fp8_of(divided(x[i], s, p), divided(x[i + 1], s, p), p.codes()) << 8 * i;
        return word;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) word |= (u64)integer_of(x[i], s, p) << p.bits() * i;
    return word;
}

template <class P> DEVICE void decode(u64 word, float scale, float zero, const P& p, float* y) {
    if (p.codes() != INT) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            numbers_of_two_fp8((u32)(word >> 8 * i), p.codes(), y + i);
            y[i] = y[i] * scale, y[i + 1] = y[i + 1] * scale;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = number_of((u32)(word >> p.bits() * i) & p.mask(), scale, zero, p);
}

// ---------------------------------------------------------------- scales in memory

DEVICE void put(void* array, i64 at, float x, int kind) {
    if (kind == FLOAT16) ((Half*)array)[at] = narrow(x, (Half*)0);
    else if (kind == BFLOAT16) ((Bfloat*)array)[at] = narrow(x, (Bfloat*)0);
    else ((float*)array)[at] = narrow(x, (float*)0);
}

DEVICE float get(const void* array, i64 at, int kind) {
    if (kind == FLOAT16) return widen(((const Half*)array)[at]);
    if (kind == BFLOAT16) return widen(((const Bfloat*)array)[at]);
    return ((const float*)array)[at];
}

template <class P> DEVICE void put_scale(void* scales, void* zeros, i64 at, const Scale& s, const P& p) {
    if (p.is_zero_hidden()) {
        ((u32*)scales)[at] = (bits_of(s.scale) & ~15u) | (u32)s.zero;
        return;
    }
    put(scales, at, s.scale, p.scale_kind());
    if (p.zero() == INTEGER) ((u8*)zeros)[at] = (u8)s.zero;
    else if (p.zero() != NONE) put(zeros, at, s.zero, p.scale_kind());
}

template <class P> DEVICE Scale get_scale(const void* scales, const void* zeros, i64 at, const P& p) {
    Scale s = {get(scales, at, p.scale_kind()), 0.0f, 0.0f};
    if (p.is_zero_hidden()) s.zero = (float)(bits_of(s.scale) & 15), s.scale = kept(s.scale, p);
    else if (p.zero() == INTEGER) s.zero = (float)((const u8*)zeros)[at];
    else if (p.zero() != NONE) s.zero = get(zeros, at, p.scale_kind());
    return s;
}

// ---------------------------------------------------------------- groups of neighbours

#define RULE int options, i64 outer, i64 length, i64 inner, i64 group, float divisor, float floor
#define PLAN(FIXED) Plan<FIXED> p = {options, outer, length, inner, group, divisor, floor}
// Every eight numbers of `count`, with idle threads up to the end of the last warp.
#define EACH_EIGHT(v, count) \
    i64 v = (i64)blockIdx.x * blockDim.x + threadIdx.x; v - v % 32 < (count); v += (i64)gridDim.x * blockDim.x

// Groups of 8, 16, 32, 64, 128 or 256 numbers that fill the rows: a group is 1 to 32 lanes.
template <class T, class P> DEVICE Scale scale_row(const T* x, bool is_idle, int lanes, const P& p, float* y) {
    Eight<T> eight = is_idle ? zeros_of<T>() : load(x);
    Ends ends = no_ends(p);
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = number(eight, i), include(ends, y[i], p);
    share(ends, 1, lanes, p);
    return scale_of(ends, p);
}

template <class T, int FIXED>
__global__ void quantize_rows(const T* __restrict__ x, u8* __restrict__ codes, void* __restrict__ scales,
                              void* __restrict__ zeros, RULE) {
    PLAN(FIXED);
    const int lanes = (int)(p.group / 8), shift = 31 - __clz(lanes);
    const i64 count = p.outer * p.length / 8;
    for (EACH_EIGHT(v, count)) {
        bool is_idle = v >= count;
        float y[8];
        Scale s = scale_row(x + 8 * v, is_idle, lanes, p, y);
        if (is_idle) continue;
        store_codes(codes + v * p.bits(), encode(y, s, p), p.bits());
        if ((v & (lanes - 1)) == 0) put_scale(scales, zeros, v >> shift, s, p);
    }
}

template <class T, int FIXED>
__global__ void dequantize_rows(const u8* __restrict__ codes, const void* __restrict__ scales,
                                const void* __restrict__ zeros, T* __restrict__ out, RULE) {
    PLAN(FIXED);
    const int shift = 31 - __clz((int)(p.group / 8));
    const i64 count = p.outer * p.length / 8;
    for (EACH_EIGHT(v, count)) {
        if (v >= count) continue;
        Scale s = get_scale(scales, zeros, v >> shift, p);
        float y[8];
        decode(load_codes(codes + v * p.bits(), p.bits()), s.scale, s.zero, p, y);
        store(out + 8 * v, y);
    }
}

template <class T, int FIXED>
__global__ void fake_rows(const T* __restrict__ x, T* __restrict__ out, RULE) {
    PLAN(FIXED);
    const int lanes = (int)(p.group / 8);
    const i64 count = p.outer * p.length / 8;
    for (EACH_EIGHT(v, count)) {
        bool is_idle = v >= count;
        float y[8];
        Scale s = scale_row(x + 8 * v, is_idle, lanes, p, y);
        if (is_idle) continue;
        decode(encode(y, s, p), kept(s.scale, p), s.zero, p, y);
        store(out + 8 * v, y);
    }
}

// ---------------------------------------------------------------- groups of tokens, a channel each

// A warp has all tokens of a group, eight a thread, in eight neighbouring channels a thread: groups of 8, 16, 32, 64, 128
// or 256 tokens that fill the length, and a multiple of eight channels.
struct Place {
    i64 token;    // the thread's first, counted from the first of the array
    i64 channel;  // its first
    i64 group;    // counted likewise
    int subs;     // threads that share a channel: every (32 / subs)th lane
    bool is_idle, is_first;
};

template <class P> DEVICE Place place_of(i64 warp, const P& p) {
    int lane = threadIdx.x % 32, subs = (int)(p.group / 8), vectors = 32 / subs;
    i64 across = (p.inner / 8 + vectors - 1) / vectors;
    i64 vector = warp % across * vectors + lane % vectors;
    Place at = {warp / across * p.group + lane / vectors * 8, 8 * vector, warp / across, subs,
                vector >= p.inner / 8, lane < vectors};
    return at;
}

template <class P> DEVICE i64 warps_of(const P& p) {
    i64 vectors = 256 / p.group;
    return p.outer * (p.length / p.group) * ((p.inner / 8 + vectors - 1) / vectors);
}

#define EACH_WARP(w, count) \
    i64 w = (i64)blockIdx.x * WARPS + threadIdx.x / 32; w < (count); w += (i64)gridDim.x * WARPS

template <class T, class P>
DEVICE void scale_columns(const T* x, const Place& at, const P& p, Eight<T>* rows, Scale* s) {
    Ends ends[8];
#pragma unroll
    for (int t = 0; t < 8; t++)
        rows[t] = at.is_idle ? zeros_of<T>() : load(x + (at.token + t) * p.inner + at.channel);
#pragma unroll
    for (int c = 0; c < 8; c++) {
        ends[c] = no_ends(p);
#pragma unroll
        for (int t = 0; t < 8; t++) include(ends[c], number(rows[t], c), p);
        share(ends[c], 32 / at.subs, 32, p);
        s[c] = scale_of(ends[c], p);
    }
}

template <class T, class P> DEVICE u64 encode_column(const Eight<T>* rows, int c, const Scale& s, const P& p) {
    float y[8];
#pragma unroll
    for (int t = 0; t < 8; t++) y[t] = number(rows[t], c);
    return encode(y, s, p);
}

template <class T, int FIXED>
__global__ void quantize_columns(const T* __restrict__ x, u8* __restrict__ codes, void* __restrict__ scales,
                                 void* __restrict__ zeros, RULE) {
    PLAN(FIXED);
    const i64 count = warps_of(p);
    for (EACH_WARP(w, count)) {
        Place at = place_of(w, p);
        Eight<T> rows[8];
        Scale s[8];
        scale_columns(x, at, p, rows, s);
        if (at.is_idle) continue;
        u64 words[8];
#pragma unroll
        for (int c = 0; c < 8; c++) {
            words[c] = encode_column(rows, c, s[c], p);
            if (at.is_first) put_scale(scales, zeros, at.group * p.inner + at.channel + c, s[c], p);
        }
        u8* to = codes + at.token * p.bits() / 8 * p.inner + at.channel;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            if (b >= p.bits()) break;
            u64 row = 0;
#pragma unroll
            for (int c = 0; c < 8; c++) row |= (words[c] >> 8 * b & 0xFF) << 8 * c;
            store_codes(to + b * p.inner, row, 8);
        }
    }
}

template <class T, int FIXED>
__global__ void dequantize_columns(const u8* __restrict__ codes, const void* __restrict__ scales,
                                   const void* __restrict__ zeros, T* __restrict__ out, RULE) {
    PLAN(FIXED);
    const i64 count = warps_of(p);
    for (EACH_WARP(w, count)) {
        Place at = place_of(w, p);
        if (at.is_idle) continue;
        u64 words[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const u8* from = codes + at.token * p.bits() / 8 * p.inner + at.channel;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            if (b >= p.bits()) break;
            u64 row = load_codes(from + b * p.inner, 8);
#pragma unroll
            for (int c = 0; c < 8; c++) words[c] |= (row >> 8 * c & 0xFF) << 8 * b;
        }
        Scale s[8];
#pragma unroll
        for (int c = 0; c < 8; c++) s[c] = get_scale(scales, zeros, at.group * p.inner + at.channel + c, p);
#pragma unroll
        for (int t = 0; t < 8; t++) {
            float y[8];
#pragma unroll
            for (int c = 0; c < 8; c++)
                y[c] = number_of((u32)(words[c] >> p.bits() * t) & p.mask(), s[c].scale, s[c].zero, p);
            store(out + (at.token + t) * p.inner + at.channel, y);
        }
    }
}

template <class T, int FIXED>
__global__ void fake_columns(const T* __restrict__ x, T* __restrict__ out, RULE) {
    PLAN(FIXED);
    const i64 count = warps_of(p);
    for (EACH_WARP(w, count)) {
        Place at = place_of(w, p);
        Eight<T> rows[8];
        Scale s[8];
        scale_columns(x, at, p, rows, s);
        if (at.is_idle) continue;
#pragma unroll
        for (int t = 0; t < 8; t++) {
            float y[8];
#pragma unroll
            for (int c = 0; c < 8; c++)
                y[c] = number_of(code_of(number(rows[t], c), s[c], p), kept(s[c].scale, p), s[c].zero, p);
            store(out + (at.token + t) * p.inner + at.channel, y);
        }
    }
}

// ---------------------------------------------------------------- groups of any size, along any axis

// Three steps: the ends of each group, its scale, the codes. Threads that follow each other have neighbouring channels,
// or without channels neighbouring numbers.

template <class P> DEVICE i64 groups_of(const P& p) { return (p.length + p.group - 1) / p.group; }

template <class T>
__global__ void ends_any(const T* __restrict__ x, i32* low, i32* high, i64 parts, RULE) {
    PLAN(-1);
    const i64 groups = groups_of(p);
    for (i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x; k < p.outer * groups * parts * p.inner;
         k += (i64)gridDim.x * blockDim.x) {
        i64 channel = k % p.inner, part = k / p.inner % parts, row = k / p.inner / parts;
        i64 first = row % groups * p.group, end = first + p.group < p.length ? first + p.group : p.length;
        Ends ends = no_ends(p);
        for (i64 token = first + part; token < end; token += parts)
            include(ends, widen(x[(row / groups * p.length + token) * p.inner + channel]), p);
        atomicMin(low + row * p.inner + channel, ends.low);
        atomicMax(high + row * p.inner + channel, ends.high);
    }
}

// `used` has three fp32 a group: scale, reciprocal and zero.
__global__ void scale_any(const i32* low, const i32* high, Scale* used, void* scales, void* zeros, RULE) {
    PLAN(-1);
    const i64 count = p.outer * groups_of(p) * p.inner;
    for (i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x; k < count; k += (i64)gridDim.x * blockDim.x) {
        Ends ends = {low[k], high[k]};
        used[k] = scale_of(ends, p);
        if (scales) put_scale(scales, zeros, k, used[k], p);
    }
}

// Eight numbers of a channel that follow each other along the length, perhaps fewer at its end.
struct Unit {
    i64 outer, token, channel;
    int count;
};

template <class P> DEVICE Unit unit_of(i64 k, const P& p) {
    i64 units = (p.length + 7) / 8, token = k / p.inner % units * 8;
    Unit unit = {k / p.inner / units, token, k % p.inner, (int)(p.length - token < 8 ? p.length - token : 8)};
    return unit;
}

#define EACH_UNIT(k, p) \
    i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x; k < p.outer * ((p.length + 7) / 8) * p.inner; \
    k += (i64)gridDim.x * blockDim.x

template <class T>
__global__ void encode_any(const T* __restrict__ x, const Scale* __restrict__ used, u8* __restrict__ codes,
                           RULE) {
    PLAN(-1);
    const i64 packed = (p.length * p.bits() + 7) / 8;
    for (EACH_UNIT(k, p)) {
        Unit unit = unit_of(k, p);
        u64 word = 0;
        for (int i = 0; i < unit.count; i++) {
            i64 token = unit.token + i, group = unit.outer * groups_of(p) + token / p.group;
            float y = widen(x[(unit.outer * p.length + token) * p.inner + unit.channel]);
            word |= (u64)code_of(y, used[group * p.inner + unit.channel], p) << p.bits() * i;
        }
        for (int b = 0; 8 * b < unit.count * p.bits(); b++)
            codes[(unit.outer * packed + unit.token / 8 * p.bits() + b) * p.inner + unit.channel] = (u8)(word >> 8 * b);
    }
}

template <class T>
__global__ void decode_any(const u8* __restrict__ codes, const void* __restrict__ scales,
                           const void* __restrict__ zeros, T* __restrict__ out, RULE) {
    PLAN(-1);
    const i64 packed = (p.length * p.bits() + 7) / 8;
    for (EACH_UNIT(k, p)) {
        Unit unit = unit_of(k, p);
        u64 word = 0;
        for (int b = 0; 8 * b < unit.count * p.bits(); b++)
            word |= (u64)codes[(unit.outer * packed + unit.token / 8 * p.bits() + b) * p.inner + unit.channel] << 8 * b;
        for (int i = 0; i < unit.count; i++) {
            i64 token = unit.token + i, group = unit.outer * groups_of(p) + token / p.group;
            Scale s = get_scale(scales, zeros, group * p.inner + unit.channel, p);
            out[(unit.outer * p.length + token) * p.inner + unit.channel] =
                narrow(number_of((u32)(word >> p.bits() * i) & p.mask(), s.scale, s.zero, p), (T*)0);
        }
    }
}

template <class T>
__global__ void fake_any(const T* __restrict__ x, const Scale* __restrict__ used, T* __restrict__ out, RULE) {
    PLAN(-1);
    for (EACH_UNIT(k, p)) {
        Unit unit = unit_of(k, p);
        for (int i = 0; i < unit.count; i++) {
            i64 token = unit.token + i, group = unit.outer * groups_of(p) + token / p.group;
            i64 at = (unit.outer * p.length + token) * p.inner + unit.channel;
            Scale s = used[group * p.inner + unit.channel];
            out[at] = narrow(number_of(code_of(widen(x[at]), s, p), kept(s.scale, p), s.zero, p), (T*)0);
        }
    }
}

// ---------------------------------------------------------------- fp8 with a scale that is given

// `inverse` is the exact reciprocal of a power of two, for any other scale 0.
DEVICE float over(float x, float scale, float inverse) { return inverse > 0.0f ? x * inverse : x / scale; }

// NaN's sign is taken from its bits: a product may lose it.
template <class T> DEVICE u32 fp8_at(const T* x, i64 at, float scale, float inverse, int codes, bool saturate) {
    float y = widen(x[at]);
    u32 sign = (u32)(((const u8*)x)[(at + 1) * sizeof(T) - 1] & 0x80);
    return (fp8_of(over(y, scale, inverse), codes, saturate) & 0x7F) | sign;
}

template <class T, int CODES>
__global__ void encode_fp8(const T* __restrict__ x, u8* __restrict__ out, i64 size, float scale,
                           float inverse, int saturate) {
    for (EACH_EIGHT(v, (size + 7) / 8)) {
        if (8 * v + 8 > size || !saturate) {
            for (i64 i = 8 * v; i < 8 * v + 8 && i < size; i++)
                out[i] = (u8)fp8_at(x, i, scale, inverse, CODES, saturate);
            continue;
        }
        Eight<T> eight = load(x + 8 * v);
        u32 words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float a = number(eight, i), b = number(eight, i + 1);
            u32 both = two_fp8_of(over(a, scale, inverse), over(b, scale, inverse), CODES);
            if (a != a) both = (both & 0xFF00) | 0x7F | sign_of(eight, i) << 7;
            if (b != b) both = (both & 0x00FF) | 0x7F00 | sign_of(eight, i + 1) << 15;
            words[i / 4] |= both << i % 4 * 8;
        }
        store_codes(out + 8 * v, words[0] | (u64)words[1] << 32, 8);
    }
}

template <class T, int CODES>
__global__ void decode_fp8(const u8* __restrict__ codes, T* __restrict__ out, i64 size, float scale) {
    for (EACH_EIGHT(v, (size + 7) / 8)) {
        if (8 * v + 8 > size) {
            for (i64 i = 8 * v; i < size; i++) out[i] = narrow(number_of_fp8(codes[i], CODES) * scale, (T*)0);
            continue;
        }
        u64 word = load_codes(codes + 8 * v, 8);
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            numbers_of_two_fp8((u32)(word >> 8 * i), CODES, y + i);
            y[i] = y[i] * scale, y[i + 1] = y[i + 1] * scale;
        }
        store(out + 8 * v, y);
    }
}

// ---------------------------------------------------------------- ggml's blocks of 32

enum Ggml { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4 };  // GGML_TYPES

DEVICE constexpr int ggml_bits(int type) { return type == Q8_0 ? 8 : type == Q5_0 || type == Q5_1 ? 5 : 4; }
DEVICE constexpr int ggml_scales(int type) { return type == MXFP4 ? 1 : type == Q4_1 || type == Q5_1 ? 4 : 2; }
DEVICE constexpr int ggml_size(int type) { return ggml_scales(type) + ggml_bits(type) * 4; }

DEVICE i32 largest_of_four(i32 x) {
    i32 other = __shfl_xor_sync(ALL, x, 1);
    x = other > x ? other : x;
    other = __shfl_xor_sync(ALL, x, 2);
    return other > x ? other : x;
}

// With its sign, the first of a block's numbers that have this size.
DEVICE float first_of_size(const float* y, i32 size, int quarter) {
    i32 first = 64;  // twice its place, plus its sign
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        u32 bits = bits_of(y[i]);
        if ((i32)(bits & ~SIGN) == size) first = 2 * (8 * quarter + i) + (i32)(bits >> 31);
    }
    first = -largest_of_four(-first);
    return float_of((u32)size | (u32)(first & 1) << 31);
}

DEVICE float finite_or_0(float x) { return x - x == 0.0f ? x : 0.0f; }

DEVICE u32 half_away_of(float x) {
    x = finite_or_0(x);
    i32 whole = (i32)x;
    float rest = x - (float)whole;
    return (u32)(whole + (i32)(rest + rest)) & 0xFF;
}

DEVICE u32 cut(float x, float top) {
    x = finite_or_0(x);
    x = x < 0.0f ? 0.0f : x;
    return (u32)(x > top ? top : x);
}

// Of ggml's mxfp4, where of equally near numbers the smaller one is taken and NaN and -0.0 are 0.
DEVICE u32 e2m1_below(float x) {
    float a = x < 0.0f ? -x : x;
    u32 code = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f);
    return x < 0.0f && code ? code | 8 : code;
}

DEVICE void put_half(u8* block, float x) {
    u16 bits = narrow(x, (Half*)0).bits;
    block[0] = (u8)bits, block[1] = (u8)(bits >> 8);
}

DEVICE float get_half(const u8* block) {
    Half half = {(u16)(block[0] | (u32)block[1] << 8)};
    return widen(half);
}

// The bytes of a warp's eight blocks, or of fewer at the end of the array, 16 at a time where they lie right.
DEVICE void copy_bytes(const u8* from, u8* to, int count) {
    int lane = threadIdx.x % 32;
    int vectors = ((u64)from | (u64)to) % 16 == 0 ? count / 16 : 0;
    for (int i = lane; i < vectors; i += 32) ((uint4*)to)[i] = ((const uint4*)from)[i];
    for (int i = 16 * vectors + lane; i < count; i += 32) to[i] = from[i];
}

// Codes of a thread's eight numbers of a block, a byte each, and the scales by the first of its four threads.
template <int TYPE> DEVICE u64 encode_ggml(const float* y, u8* block, int quarter) {
    const float middle = (float)(1 << (ggml_bits(TYPE) - 1)), top = 2.0f * middle - 1.0f;
    i32 largest = 0;
    u64 codes = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        i32 size = (i32)(bits_of(y[i]) & ~SIGN);
        largest = size > largest ? size : largest;
    }
    largest = largest_of_four(largest);
    if (TYPE == MXFP4) {
        i32 exponent = 0;
        if (largest >= INFINITE) exponent = 0xFF;
        else if (largest > 0) exponent = (i32)floorf((float)log2((double)float_of((u32)largest))) + 125;
        exponent = exponent < 0 ? 0 : exponent;
        if (quarter == 0) block[0] = (u8)exponent;
        // 2^(127 - exponent) in two factors: with an infinity in the block it is 2^-128.
        float factor = float_of((u32)(254 - (exponent < 253 ? exponent : 253)) << 23);
        float rest = exponent == 0xFF ? 0.25f : 1.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) codes |= (u64)e2m1_below(y[i] * factor * rest) << 8 * i;
        return codes;
    }
    float d, minimum = 0.0f, plus = middle + 0.5f;
    if (TYPE == Q8_0) {
        d = float_of((u32)largest) / 127.0f;
    } else if (TYPE == Q4_0 || TYPE == Q5_0) {
        d = first_of_size(y, largest, quarter) / -middle;
    } else {
        i32 high = (i32)SIGN, low = (i32)SIGN;  // of the numbers, and of their negatives
#pragma unroll
        for (int i = 0; i < 8; i++) {
            i32 key = order((i32)bits_of(y[i]));
            high = key > high ? key : high;
            low = -1 - key > low ? -1 - key : low;
        }
        high = largest_of_four(high), low = -1 - largest_of_four(low);
        float first_zero = first_of_size(y, 0, quarter);
        minimum = float_of((u32)order(low));
        if (minimum == 0.0f) minimum = first_zero;
        if (largest > INFINITE) minimum = float_of(NOT_A_NUMBER);
        d = (float_of((u32)order(high)) - minimum) / top;
        plus = 0.5f;
    }
    float inverse = inverse_or_0(d);
    if (quarter == 0) {
        put_half(block, d);
        if (ggml_scales(TYPE) == 4) put_half(block + 2, minimum);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 code;
        if (TYPE == Q8_0) code = half_away_of(y[i] * inverse);
        else if (ggml_scales(TYPE) == 4) code = cut((y[i] - minimum) * inverse + plus, top);
        else code = cut(y[i] * inverse + plus, top);
        codes |= (u64)code << 8 * i;
    }
    return codes;
}

template <class T, int TYPE>
__global__ void quantize_ggml(const T* __restrict__ x, u8* __restrict__ out, i64 count) {
    __shared__ __align__(16) u8 stage[WARPS][(8 * ggml_size(TYPE) + 15) / 16 * 16];
    u8* mine = stage[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, quarter = lane % 4;
    u8* block = mine + lane / 4 * ggml_size(TYPE);
    for (EACH_EIGHT(v, count)) {
        Eight<T> eight = v < count ? load(x + 8 * v) : zeros_of<T>();
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = number(eight, i);
        u64 codes = encode_ggml<TYPE>(y, block, quarter);
        u8* to = block + ggml_scales(TYPE);
        if (TYPE == Q8_0) {
#pragma unroll
            for (int i = 0; i < 8; i++) to[8 * quarter + i] = (u8)(codes >> 8 * i);
        } else {
            if (ggml_bits(TYPE) == 5) {
                u32 fifth = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) fifth |= (u32)(codes >> (8 * i + 4) & 1) << i;
                to[quarter] = (u8)fifth;
                to += 4;
            }
            u32 low = (u32)codes & 0x0F0F0F0F, high = (u32)(codes >> 32) & 0x0F0F0F0F;
            low |= __shfl_xor_sync(ALL, low, 2) << 4, high |= __shfl_xor_sync(ALL, high, 2) << 4;
            if (quarter < 2) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    to[8 * quarter + i] = (u8)(low >> 8 * i), to[8 * quarter + 4 + i] = (u8)(high >> 8 * i);
            }
        }
        __syncwarp();
        i64 first = v / 32 * 8, blocks = count / 4 - first;
        copy_bytes(mine, out + first * ggml_size(TYPE), (int)(blocks < 8 ? blocks : 8) * ggml_size(TYPE));
        __syncwarp();
    }
}

// Twice the magnitude of an E2M1: the code, 1 more a code above 4, and 2 more above 6.
DEVICE float twice_e2m1(u32 code) {
    i32 m = (i32)(code & 7);
    return (float)(m + (m > 4 ? m - 4 : 0) + (m > 6 ? 2 * (m - 6) : 0));
}

template <class T, int TYPE>
__global__ void dequantize_ggml(const u8* __restrict__ blocks, T* __restrict__ out, i64 count) {
    __shared__ __align__(16) u8 stage[WARPS][(8 * ggml_size(TYPE) + 15) / 16 * 16];
    u8* mine = stage[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, quarter = lane % 4;
    const u8* block = mine + lane / 4 * ggml_size(TYPE);
    for (EACH_EIGHT(v, count)) {
        i64 first = v / 32 * 8, left = count / 4 - first;
        copy_bytes(blocks + first * ggml_size(TYPE), mine, (int)(left < 8 ? left : 8) * ggml_size(TYPE));
        __syncwarp();
        if (v < count) {
            const u8* from = block + ggml_scales(TYPE) + (ggml_bits(TYPE) == 5 ? 4 : 0);
            float d, minimum = 0.0f, y[8];
            if (TYPE == MXFP4) {
                u32 e = block[0];  // of half the scale: 2^(e - 128), below 2 subnormal
                d = float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23);
            } else {
                d = get_half(block);
                if (ggml_scales(TYPE) == 4) minimum = get_half(block + 2);
            }
            const float middle = TYPE == Q4_0 ? 8.0f : TYPE == Q5_0 ? 16.0f : 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (TYPE == Q8_0) {
                    y[i] = (float)(signed char)from[8 * quarter + i] * d;
                    continue;
                }
                u32 code = from[quarter % 2 * 8 + i] >> quarter / 2 * 4 & 15;
                if (ggml_bits(TYPE) == 5) code |= (u32)(block[ggml_scales(TYPE) + quarter] >> i & 1) << 4;
                if (TYPE == MXFP4) y[i] = (code > 8 ? -twice_e2m1(code) : twice_e2m1(code)) * d;
                else if (ggml_scales(TYPE) == 4) y[i] = (float)code * d + minimum;
                else y[i] = ((float)code - middle) * d;
            }
            store(out + 8 * v, y);
        }
        __syncwarp();
    }
}

// ---------------------------------------------------------------- nvfp4 and mxfp4

// Half to even; NaN is 0. The sign of a product with what is not negative is that of the number.
DEVICE u32 e2m1_of(float v, float x) {
    float a = v < 0.0f ? -v : v;
    u32 code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return v == v ? code | (bits_of(x) >> 28 & 8) : 0;
}

DEVICE float e2m1_number(u32 code) {
    float x = twice_e2m1(code) * 0.5f;
    return code & 8 ? -x : x;
}

DEVICE u32 e4m3_scale(float wanted) { return fp8_of(wanted < 448.0f ? wanted : 448.0f, E4M3, true); }

DEVICE float squared_error(const float* y, u32 scale, float g) {
    float factor = number_of_fp8(scale, E4M3) * g, inverse = inverse_or_0(factor), error = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float difference = e2m1_number(e2m1_of(y[i] * inverse, y[i])) * factor - y[i];
        error = error + difference * difference;
    }
    return error;
}

// A thread has the 16 numbers of a scale, because their squared errors are summed one after the other.
template <class T>
__global__ void quantize_nvfp4(const T* __restrict__ x, u8* __restrict__ codes, u8* __restrict__ scales,
                               i64 groups, float g, int four_over_six) {
    const float inverse_g = 1.0f / g;
    for (i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x; k < groups; k += (i64)gridDim.x * blockDim.x) {
        Eight<T> first = load(x + 16 * k), second = load(x + 16 * k + 8);
        float y[16];
        i32 top = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            y[i] = i < 8 ? number(first, i % 8) : number(second, i % 8);
            i32 size = (i32)(bits_of(y[i]) & ~SIGN);
            top = size > top ? size : top;
        }
        float largest = float_of((u32)top);
        u32 scale = e4m3_scale(inverse_g * (largest * 0.16666667163372039794921875f));
        if (four_over_six) {
            u32 other = e4m3_scale(inverse_g * (largest * 0.25f));
            if (squared_error(y, other, g) < squared_error(y, scale, g)) scale = other;
        }
        float inverse = inverse_or_0(number_of_fp8(scale, E4M3) * g);
        u64 word = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) word |= (u64)e2m1_of(y[i] * inverse, y[i]) << 4 * i;
        bool is_nan = top > INFINITE;
        scales[k] = (u8)(is_nan ? 0x7F : scale);
        store_codes(codes + 8 * k, is_nan ? 0 : word, 8);
    }
}

template <class T>
__global__ void quantize_mxfp4(const T* __restrict__ x, u8* __restrict__ codes, u8* __restrict__ scales,
                               i64 count) {
    for (EACH_EIGHT(v, count)) {
        Eight<T> eight = v < count ? load(x + 8 * v) : zeros_of<T>();
        float y[8];
        i32 top = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            y[i] = number(eight, i);
            i32 size = (i32)(bits_of(y[i]) & ~SIGN);
            top = size > top ? size : top;
        }
        top = largest_of_four(top);
        if (v >= count) continue;
        i32 exponent = (top >> 23) - 2;
        exponent = exponent < 0 ? 0 : exponent;
        float inverse = float_of((u32)(254 - exponent) << 23);  // 2^(127 - exponent)
        if (top >= INFINITE) exponent = 0xFF, inverse = float_of(NOT_A_NUMBER);
        u64 word = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) word |= (u64)e2m1_of(y[i] * inverse, y[i]) << 4 * i;
        store_codes(codes + 4 * v, word, 4);
        if (v % 4 == 0) scales[v / 4] = (u8)exponent;
    }
}

// `lanes` threads of eight numbers have a scale: 2 an e4m3 (nvfp4), 4 a power of two (mxfp4).
template <class T>
__global__ void dequantize_fp4(const u8* __restrict__ codes, const u8* __restrict__ scales,
                               T* __restrict__ out, i64 count, float g, int lanes) {
    for (EACH_EIGHT(v, count)) {
        if (v >= count) continue;
        u32 scale = scales[v / lanes];
        float factor;
        if (lanes == 2) {
            factor = number_of_fp8(scale & 0x7F, E4M3) * g;
            factor = scale & 0x80 ? -factor : factor;
        } else {
            factor = float_of(scale == 0 ? 0x00400000 : scale == 0xFF ? NOT_A_NUMBER : scale << 23);
        }
        u64 word = load_codes(codes + 4 * v, 4);
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = e2m1_number((u32)(word >> 4 * i) & 15) * factor;
        store(out + 8 * v, y);
    }
}

// ---------------------------------------------------------------- rotation

// The number with its sign changed where the lowest bit says so.
DEVICE float turned(float x, u32 bit) { return float_of(bits_of(x) ^ bit << 31); }

// Rows of 8, 16, ... 256 numbers: steps within a thread, then between lanes. A bit of the four words tells that a number
// of the row changes its sign.
template <class T>
__global__ void rotate_rows(const T* __restrict__ x, T* __restrict__ out, i64 count, int n, float scale,
                            int is_inverse, u64 signs0, u64 signs1, u64 signs2, u64 signs3) {
    for (EACH_EIGHT(v, count)) {
        Eight<T> eight = v < count ? load(x + 8 * v) : zeros_of<T>();
        const int lanes = n / 8, lane = (int)(v & (lanes - 1));
        const u64 word = lane < 8 ? signs0 : lane < 16 ? signs1 : lane < 24 ? signs2 : signs3;
        const u32 signs = (u32)(word >> 8 * (lane % 8)) & 0xFF;
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = turned(number(eight, i), is_inverse ? 0 : signs >> i);
#pragma unroll
        for (int width = 1; width < 8; width *= 2) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i & width) continue;
                float a = y[i], b = y[i + width];
                y[i] = a + b, y[i + width] = a - b;
            }
        }
        for (int step = 1; step < lanes; step *= 2) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float other = __shfl_xor_sync(ALL, y[i], step);
                y[i] = lane & step ? other - y[i] : y[i] + other;
            }
        }
        if (v >= count) continue;
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = turned(y[i] * scale, is_inverse ? signs >> i : 0);
        store(out + 8 * v, y);
    }
}

// Rows of any power of two, a step a launch, in a float array as large: `width` 0 begins, -1 ends.
template <class T>
__global__ void rotate_any(const T* __restrict__ x, const float* __restrict__ factors, float* wide,
                           T* __restrict__ out, i64 size, i64 n, i64 width) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += (i64)gridDim.x * blockDim.x) {
        if (width == 0) wide[i] = widen(x[i]) * factors[i % n];
        else if (width < 0) out[i] = narrow(wide[i] * factors[i % n], (T*)0);
        else if (!(i & width)) {
            float a = wide[i], b = wide[i + width];
            wide[i] = a + b, wide[i + width] = a - b;
        }
    }
}
