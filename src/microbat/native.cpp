// microbat's kernels for CPUs: quantize (transform, clip, scale, round, pack), dequantize, and the product of a few
// rows with a packed weight. Plain C symbols, no library but the C++ standard one; microbat/native.py calls them.
//
// A format is data: an element by its bits, largest value, smallest exponent and table of values; a scale by the way it
// is stored. The arithmetic is that of quantizers/kernel.py, bit for bit: roundings come from adding and taking away a
// power of two, exponents from the bits. Compile with -ffp-contract=off -fno-trapping-math, and
// without -ffast-math.
//
// Shapes: T rows (tokens), K last axis, N rows of the weight, G blocks along K, B block size.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VECTORIZED
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#include <immintrin.h>
#endif
#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE __forceinline
#endif

namespace {

enum ScaleKind : int32_t { E8M0 = 0, E4M3 = 1, BF16 = 2, FP32 = 3, NONE = 4 };
enum Level : int { PORTABLE = 0, WITH_AVX2 = 1, WITH_AVX512 = 2 };  // of products with floats
enum Rule : int32_t { FLOOR = 0, EVEN = 1, RCEIL = 2, CEIL = 3, ABSMAX = 4, FULL_RANGE = 5 };

constexpr uint32_t EXPONENT = 0x7F800000, MAGNITUDE = 0x7FFFFFFF;
constexpr float MIN_FLOAT_SCALE = 0x1p-9f;  // the smallest E4M3 subnormal
constexpr int LARGEST_MAP = 1024;           // numbers in a block of a map

INLINE uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

struct Bfloat16 { uint16_t bits; };
INLINE float load(float x) { return x; }
INLINE float load(Bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
INLINE void store(float& to, float x) { to = x; }
INLINE void store(Bfloat16& to, float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    to.bits = uint16_t((u & MAGNITUDE) > EXPONENT ? (u >> 16) | 0x40 : rounded);
}

}  // namespace

extern "C" {

// A number format, as native.py fills it in.
struct Format {
    int32_t bits, mantissa_bits, emin, emax, fixed_point, block;  // block 0: the whole row shares a scale
    int32_t scale, rule, bias;
    float max;
    float table[256];  // the value of every code
};

// What a block is clipped to, as shares of its extremes: [1 or T, G, 2]. Null: no clip.
struct Clip {
    const float* ratios;
    int64_t stride;  // numbers from one row's ratios to the next; 0 where all share them
};

// A block-diagonal map in factors: a block read row-major as V [g2, g1] goes to B_i V A_i. g1 = 0: no map.
struct Map {
    const float* a;  // [1 or G, g1, g1]
    const float* b;  // [1 or G, g2, g2]
    int32_t g1, g2;
    int64_t a_stride, b_stride;  // numbers from one block's factor to the next; 0 where all share it
};

}  // extern "C"

namespace {

// ---- threads: a pool that lives as long as the process; the caller works along -------------------------------------

class Pool {
  public:
    void run(int num_threads, int64_t num_tasks, const std::function<void(int64_t)>& task) {
        if (num_threads <= 1 || num_tasks <= 1 || !busy_.try_lock()) {  // nested or concurrent calls do their own work
            for (int64_t i = 0; i < num_tasks; ++i) task(i);
            return;
        }
        std::lock_guard<std::mutex> owner(busy_, std::adopt_lock);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (int(workers_.size()) < num_threads - 1) {
                workers_.emplace_back(&Pool::work, this, int(workers_.size()), generation_);
                workers_.back().detach();
            }
            task_ = &task, num_tasks_ = num_tasks, next_ = 0, helpers_ = pending_ = num_threads - 1, ++generation_;
        }
        wake_.notify_all();
        drain();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
    }

  private:
    void drain() {
        for (int64_t i; (i = next_.fetch_add(1)) < num_tasks_;) (*task_)(i);
    }

    void work(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= helpers_) continue;
            lock.unlock();
            drain();
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int64_t)>* task_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t num_tasks_ = 0;
    int helpers_ = 0, pending_ = 0;
    uint64_t generation_ = 0;
};

Pool* pool = new Pool;  // never destroyed: its threads may outlive static destructors

#if defined(__unix__) || defined(__APPLE__)
const int renewed_after_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // threads do not survive it
#endif

// ---- scales and rounding -------------------------------------------------------------------------------------------

INLINE float power_of_two(int32_t exponent) {  // -127 is the subnormal that E8M0's code 0 means
    return float_of(exponent <= -127 ? 1u << 22 : uint32_t(exponent + 127) << 23);
}

// The nearest value of a format with these three numbers, ties to even, saturating; NaN stays NaN.
INLINE float round_to(float x, float max, uint32_t min_binade, uint32_t room) {
    float magnitude = std::fabs(x);
    magnitude = magnitude > max ? max : magnitude;
    uint32_t binade = bits_of(magnitude) & EXPONENT;
    binade = binade < min_binade ? min_binade : binade;
    float shift = float_of(binade + room);
    return float_of(bits_of((magnitude + shift) - shift) | (bits_of(x) & ~MAGNITUDE));
}

struct Rounding {
    float max;
    uint32_t min_binade, room;
    explicit Rounding(const Format& f)
        : max(f.max), min_binade(uint32_t(f.emin + 127) << 23), room(uint32_t(23 - f.mantissa_bits) << 23) {}
    INLINE Rounding times(float scale, int32_t exponent) const {  // the same grid, that many times as wide
        Rounding r = *this;
        r.max *= scale, r.min_binade += uint32_t(exponent) << 23;
        return r;
    }
};

// The scale of a block in its own format, from its largest magnitude; a block with NaN or Inf has no scale but NaN.
INLINE float block_scale(uint32_t amax_bits, float outer, const Format& f) {
    float amax = float_of(amax_bits);
    if (f.scale != E8M0) {
        float wanted = (f.scale == E4M3 ? amax / outer : amax) / (f.rule == FULL_RANGE ? f.max + 0.5f : f.max);
        if (f.scale == FP32) return wanted;
        if (f.scale == BF16) {
            Bfloat16 rounded;
            store(rounded, wanted);
            return load(rounded);
        }
        float scale = round_to(wanted, 448.0f, uint32_t(127 - 6) << 23, 20u << 23);
        return scale < MIN_FLOAT_SCALE ? MIN_FLOAT_SCALE : scale;
    }
    if (amax_bits >= EXPONENT) return std::numeric_limits<float>::quiet_NaN();
    uint32_t mantissa = amax_bits & 0x7FFFFF;
    int32_t exponent = int32_t(amax_bits >> 23) - 127;
    if (f.rule == EVEN) {
        int32_t significant = f.fixed_point ? f.mantissa_bits - 1 : f.mantissa_bits;
        exponent = int32_t((amax_bits + (1u << (22 - significant))) >> 23) - 127;
    } else if (f.rule == RCEIL) {
        exponent += mantissa > (bits_of(f.max) & 0x7FFFFF);
    } else if (f.rule == CEIL) {
        exponent += mantissa > 0;
    }
    exponent -= f.emax;
    return power_of_two(exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
}

// Largest value above zero and smallest below it, both as bits of a magnitude: integers order as the floats do.
template <class In>
INLINE void extremes(const In* x, int64_t n, uint32_t& high, uint32_t& low) {
    int32_t most = 0, least = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t up = int32_t(bits_of(load(x[i]))), down = up ^ int32_t(0x80000000);
        most = up > most ? up : most;
        least = down > least ? down : least;
    }
    high = uint32_t(most), low = uint32_t(least);
}

struct Block {  // what a block's numbers are clipped to and divided by
    float low, high, scale, product, inverse;
};

template <class In>
INLINE uint32_t largest(const In* x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t magnitude = int32_t(bits_of(load(x[i])) & MAGNITUDE);
        most = magnitude > most ? magnitude : most;
    }
    return uint32_t(most);
}

INLINE Block block_of(float low, float high, uint32_t amax_bits, float outer, const Format& f) {
    Block b{low, high, block_scale(amax_bits, outer, f), 0, 0};
    b.product = f.scale == E4M3 ? b.scale * outer : b.scale;
    b.inverse = 1.0f / b.product;
    return b;
}

// The block between these two bounds: low <= 0 <= high.
INLINE Block between(float low, float high, float outer, const Format& f) {
    const uint32_t down = bits_of(-low) & MAGNITUDE, up = bits_of(high) & MAGNITUDE;
    return block_of(low, high, up > down ? up : down, outer, f);
}

template <class In>
INLINE Block measure(const In* x, int64_t n, const float* ratios, float outer, const Format& f) {
    if (!ratios) return block_of(0, 0, largest(x, n), outer, f);
    uint32_t high, low;
    extremes(x, n, high, low);
    return between(-float_of(low) * ratios[0], float_of(high) * ratios[1], outer, f);
}

// Element values of a block, before they are scaled back. POWER: the scale is a power of two, so its inverse is exact.
template <bool POWER, class In, class Put>
INLINE void round_block(const In* x, int64_t n, const Block& b, bool clips, const Rounding& r, Put put) {
    const Block c = b;
    const Rounding to = r;
    for (int64_t i = 0; i < n; ++i) {
        float v = load(x[i]);
        if (clips) v = v < c.low ? c.low : v > c.high ? c.high : v;
        v = POWER ? v * c.inverse : c.product == 0 ? 0.0f : v / c.product;
        put(i, round_to(v, to.max, to.min_binade, to.room));
    }
}

INLINE uint32_t encode(float value, const Format& f) {
    uint32_t u = bits_of(value), magnitude = u & MAGNITUDE, sign = u >> 31;
    if (f.fixed_point) {
        float step = float_of(uint32_t(f.bias + 127) << 23);
        return uint32_t(int32_t(value * step)) & ((1u << f.bits) - 1);
    }
    uint32_t normal = (magnitude >> (23 - f.mantissa_bits)) - (uint32_t(126 + f.emin) << f.mantissa_bits);
    float unit = float_of(uint32_t(127 + f.mantissa_bits - f.emin) << 23);
    uint32_t subnormal = uint32_t(int32_t(float_of(magnitude) * unit));
    uint32_t code = magnitude < uint32_t(f.emin + 127) << 23 ? subnormal : normal;
    code = magnitude > EXPONENT ? (1u << (f.bits - 1)) - 1 : code;  // NaN, where a format has one
    return code | sign << (f.bits - 1);
}

INLINE int64_t packed_bytes(int64_t n, int bits) {
    return bits == 6 ? (n + 3) / 4 * 3 : bits == 4 ? (n + 1) / 2 : n * bits / 8;
}

INLINE void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
    auto at = [&](int64_t i) { return i < n ? uint32_t(codes[i]) : 0u; };
    if (bits == 4) {
        for (int64_t j = 0; j < n / 2; ++j) out[j] = uint8_t(codes[2 * j] | codes[2 * j + 1] << 4);
        if (n % 2) out[n / 2] = codes[n - 1];
    } else if (bits == 6) {
        for (int64_t j = 0; 4 * j < n; ++j) {
            uint32_t word = at(4 * j) | at(4 * j + 1) << 6 | at(4 * j + 2) << 12 | at(4 * j + 3) << 18;
            out[3 * j] = uint8_t(word), out[3 * j + 1] = uint8_t(word >> 8), out[3 * j + 2] = uint8_t(word >> 16);
        }
    } else {
        std::memcpy(out, codes, size_t(n));
    }
}

INLINE void unpack_codes(const uint8_t* in, int64_t n, int bits, uint8_t* codes) {
    if (bits == 4) {
        for (int64_t j = 0; j < n / 2; ++j) codes[2 * j] = in[j] & 15, codes[2 * j + 1] = in[j] >> 4;
        if (n % 2) codes[n - 1] = in[n / 2] & 15;
    } else if (bits == 6) {
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t* word = in + i / 4 * 3;
            codes[i] = (uint32_t(word[0] | word[1] << 8 | word[2] << 16) >> (i % 4 * 6)) & 63;
        }
    } else {
        std::memcpy(codes, in, size_t(n));
    }
}

INLINE int scale_bytes(int32_t kind) { return kind == NONE ? 0 : kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

INLINE void store_scale(uint8_t* to, int64_t g, float scale, const Format& f) {
    uint32_t u = bits_of(scale);
    if (f.scale == FP32) {
        std::memcpy(to + 4 * g, &scale, 4);
    } else if (f.scale == BF16) {
        uint16_t half = uint16_t(u >> 16);
        std::memcpy(to + 2 * g, &half, 2);
    } else if (f.scale == E8M0) {
        to[g] = uint8_t(std::isnan(scale) ? 255 : u >> 23);
    } else {
        uint32_t normal = (u >> 20) - (120u << 3);
        to[g] = uint8_t(std::isnan(scale) ? 127 : scale < 0x1p-6f ? uint32_t(scale * 512.0f) : normal);
    }
}

INLINE float load_scale(const uint8_t* from, int64_t g, int32_t kind) {
    if (kind == FP32) {
        float scale;
        std::memcpy(&scale, from + 4 * g, 4);
        return scale;
    }
    if (kind == BF16) {
        uint16_t half;
        std::memcpy(&half, from + 2 * g, 2);
        return float_of(uint32_t(half) << 16);
    }
    uint32_t code = from[g];
    if (kind == E8M0) return code == 255 ? std::numeric_limits<float>::quiet_NaN() : power_of_two(int32_t(code) - 127);
    if ((code & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
    return code < 8 ? float(code) * 0x1p-9f : float_of((code << 20) + (120u << 23));
}

// ---- quantize ------------------------------------------------------------------------------------------------------

template <bool POWER, int BLOCK, class In, class Out>
INLINE void fake_row(const In* x, int64_t width, const float* ratios, float outer, const Format& f, Out* out) {
    const Rounding rounding(f);
    const int64_t block = BLOCK ? BLOCK : f.block ? f.block : width;
    for (int64_t k = 0; k < width; k += block) {
        const int64_t n = BLOCK ? BLOCK : std::min(block, width - k);
        const Block b = measure(x + k, n, ratios ? ratios + k / block * 2 : nullptr, outer, f);
        Out* to = out + k;
        const float product = b.product;
        const int32_t exponent = int32_t(bits_of(b.scale) >> 23) - 127;
        if (POWER && exponent > -100 && exponent < 80) {  // nothing over- or underflows: round where the numbers are
            const Rounding here = rounding.times(b.scale, exponent);
            for (int64_t i = 0; i < n; ++i) {
                float v = load(x[k + i]);
                if (ratios) v = v < b.low ? b.low : v > b.high ? b.high : v;
                store(to[i], round_to(v, here.max, here.min_binade, here.room));
            }
            continue;
        }
        if (ratios)
            round_block<POWER>(x + k, n, b, true, rounding, [=](int64_t i, float v) { store(to[i], v * product); });
        else
            round_block<POWER>(x + k, n, b, false, rounding, [=](int64_t i, float v) { store(to[i], v * product); });
    }
}

template <class In>
INLINE void pack_row(const In* x, int64_t width, const float* ratios, float outer, const Format& f, uint8_t* codes,
                     uint8_t* scales) {
    const Rounding rounding(f);
    const int64_t block = f.block ? f.block : width;
    uint8_t buffer[64];
    for (int64_t k = 0; k < width; k += block) {
        const int64_t end = std::min(k + block, width);
        const Block b = measure(x + k, end - k, ratios ? ratios + k / block * 2 : nullptr, outer, f);
        for (int64_t at = k; at < end; at += 64) {  // a multiple of every packed word
            const int64_t n = std::min<int64_t>(64, end - at);
            auto put = [&](int64_t i, float v) { buffer[i] = uint8_t(encode(v, f)); };
            if (f.scale == E8M0)
                round_block<true>(x + at, n, b, ratios != nullptr, rounding, put);
            else
                round_block<false>(x + at, n, b, ratios != nullptr, rounding, put);
            pack_codes(buffer, n, f.bits, codes + packed_bytes(at, f.bits));
        }
        store_scale(scales, k / block, b.scale, f);
    }
}

template <class In>
INLINE void map_block(const In* x, const float* a, const float* b, const Map& m, float* out) {
    float half[LARGEST_MAP];
    for (int r = 0; r < m.g2; ++r) {
        float* row = half + r * m.g1;
        for (int c = 0; c < m.g1; ++c) row[c] = 0;
        for (int j = 0; j < m.g1; ++j)
            for (int c = 0; c < m.g1; ++c) row[c] += load(x[r * m.g1 + j]) * a[j * m.g1 + c];
    }
    for (int r = 0; r < m.g2; ++r)
        for (int c = 0; c < m.g1; ++c) {
            float sum = 0;
            for (int s = 0; s < m.g2; ++s) sum += b[r * m.g2 + s] * half[s * m.g1 + c];
            out[r * m.g1 + c] = sum;
        }
}

// The same sums in the same order, for the usual sizes: a block stays in registers of WIDE numbers.
template <int G1, int G2, int WIDE, class In>
INLINE void map_block(const In* x, const float* a, const float* b, float* out) {
#if defined(__GNUC__)
    typedef float Wide __attribute__((vector_size(WIDE * sizeof(float))));
    Wide half[G2][G1 / WIDE] = {};
    for (int j = 0; j < G1; ++j) {
        Wide row[G1 / WIDE];
        std::memcpy(row, a + j * G1, sizeof row);
        for (int r = 0; r < G2; ++r)
            for (int c = 0; c < G1 / WIDE; ++c) half[r][c] += load(x[r * G1 + j]) * row[c];
    }
    for (int r = 0; r < G2; ++r) {
        Wide row[G1 / WIDE] = {};
        for (int s = 0; s < G2; ++s)
            for (int c = 0; c < G1 / WIDE; ++c) row[c] += b[r * G2 + s] * half[s][c];
        std::memcpy(out + r * G1, row, sizeof row);
    }
#else
    map_block(x, a, b, Map{a, b, G1, G2, 0, 0}, out);
#endif
}

template <class In>
VECTORIZED void map_rows_of(const In* x, int64_t rows, int64_t width, const Map& m, float* out) {
    const int block = m.g1 * m.g2;
    for (int64_t g = 0; g * block < width; ++g) {
        const float *a = m.a + g * m.a_stride, *b = m.b + g * m.b_stride;
        for (int64_t t = 0; t < rows; ++t) {
            const In* from = x + t * width + g * block;
            float* to = out + t * width + g * block;
            if (m.g1 == 8 && m.g2 == 4)
                map_block<8, 4, 8>(from, a, b, to);
            else if (m.g1 == 8 && m.g2 == 2)
                map_block<8, 2, 8>(from, a, b, to);
            else if (m.g1 == 8 && m.g2 == 8)
                map_block<8, 8, 8>(from, a, b, to);
            else if (m.g1 == 16 && m.g2 == 1)
                map_block<16, 1, 8>(from, a, b, to);
            else if (m.g1 == 32 && m.g2 == 1)
                map_block<32, 1, 8>(from, a, b, to);
            else if (m.g1 == 64 && m.g2 == 1)
                map_block<64, 1, 8>(from, a, b, to);
            else
                map_block(from, a, b, m, to);
        }
    }
}

template <class In, class Out>
VECTORIZED void fake_rows(const In* x, int64_t rows, int64_t width, Clip clip, float outer, const Format& f, Out* out) {
    for (int64_t t = 0; t < rows; ++t) {
        const In* from = x + t * width;
        Out* to = out + t * width;
        const float* ratios = clip.ratios ? clip.ratios + t * clip.stride : nullptr;
        if (f.scale == E8M0 && f.block == 32 && width % 32 == 0)
            fake_row<true, 32>(from, width, ratios, outer, f, to);
        else if (f.scale == E4M3 && f.block == 16 && width % 16 == 0)
            fake_row<false, 16>(from, width, ratios, outer, f, to);
        else if (f.scale == E8M0)
            fake_row<true, 0>(from, width, ratios, outer, f, to);
        else
            fake_row<false, 0>(from, width, ratios, outer, f, to);
    }
}

template <class In>
VECTORIZED void pack_rows(const In* x, int64_t rows, int64_t width, Clip clip, float outer, const Format& f,
                          uint8_t* codes, uint8_t* scales) {
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    for (int64_t t = 0; t < rows; ++t)
        pack_row(x + t * width, width, clip.ratios ? clip.ratios + t * clip.stride : nullptr, outer, f, codes + t * packed_bytes(width, f.bits),
                 scales + t * groups * scale_bytes(f.scale));
}

constexpr int64_t ROWS_AT_ONCE = 8;  // so that a block's factors are used while they are near

// Do `f(x, first row, rows)` on slices of rows, mapped first where there is a map.
template <class In, class Work>
void on_rows(const In* x, int64_t rows, int64_t width, const Map& m, int threads, Work work) {
    const int64_t wanted = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, width));
    const int64_t slice = m.g1 ? ROWS_AT_ONCE : wanted;
    pool->run(threads, (rows + slice - 1) / slice, [&](int64_t i) {
        const int64_t first = i * slice, n = std::min(slice, rows - first);
        if (!m.g1) return work(x + first * width, first, n);
        thread_local std::vector<float> mapped;
        mapped.resize(size_t(ROWS_AT_ONCE * width));
        map_rows_of(x + first * width, n, width, m, mapped.data());
        work(mapped.data(), first, n);
    });
}

template <class In>
void quantize(const In* x, int64_t rows, int64_t width, const Map& m, Clip all, float outer, const Format& f, void* out,
              bool half, uint8_t* codes, uint8_t* scales, int threads) {
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    on_rows(x, rows, width, m, threads, [&](auto from, int64_t first, int64_t n) {
        const Clip clip{all.ratios ? all.ratios + first * all.stride : nullptr, all.stride};
        if (codes)
            pack_rows(from, n, width, clip, outer, f, codes + first * packed_bytes(width, f.bits),
                      scales + first * groups * scale_bytes(f.scale));
        else if (half)
            fake_rows(from, n, width, clip, outer, f, static_cast<Bfloat16*>(out) + first * width);
        else
            fake_rows(from, n, width, clip, outer, f, static_cast<float*>(out) + first * width);
    });
}

// ---- the gradient of quantizing ------------------------------------------------------------------------------------

constexpr int LANES = 16;  // sums that run side by side

INLINE float total(const float* lanes) {
    float sums[LANES];
    std::memcpy(sums, lanes, sizeof sums);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

// See quantizers/kernel.py, backward. `to` [n] and, where there are ratios, `grad_ratios` [2] are written.
template <bool POWER, class Grad, class In>
INLINE void backward_block(const Grad* grad, const In* x, int64_t n, const float* ratios, float outer, const Format& f,
                           In* to, float* grad_ratios) {
    const Rounding r(f);
    uint32_t high_bits, low_bits;
    extremes(x, n, high_bits, low_bits);
    const float largest = float_of(high_bits), smallest = -float_of(low_bits);
    const float low_share = ratios ? ratios[0] : 1.0f, high_share = ratios ? ratios[1] : 1.0f;
    const Block b = between(smallest * low_share, largest * high_share, outer, f);
    const float low = b.low, high = b.high, product = b.product, inverse = b.inverse, limit = product * f.max;
    float along[LANES] = {}, above[LANES] = {}, below[LANES] = {};
    auto add = [&](int64_t i, int lane) {
        const float v = load(x[i]), d = load(grad[i]), c = v < low ? low : v > high ? high : v;
        const float kept = std::fabs(c) <= limit ? d : 0.0f;
        const float unit = POWER ? c * inverse : product == 0 ? 0.0f : c / product;
        along[lane] += d * (round_to(unit, r.max, r.min_binade, r.room) * product) - kept * c;
        above[lane] += v > high ? kept : 0.0f;
        below[lane] += v < low ? kept : 0.0f;
    };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) add(i + lane, lane);
    for (int lane = 0; i < n; ++i, ++lane) add(i, lane);
    const float amax = high > -low ? high : -low, grad_amax = amax > 0 ? total(along) / amax : 0.0f;
    const float grad_high = total(above) + (high >= -low ? grad_amax : 0.0f);
    const float grad_low = total(below) - (high >= -low ? 0.0f : grad_amax);
    const float at_high = grad_high * high_share, at_low = grad_low * low_share;
    for (int64_t k = 0; k < n; ++k) {
        const float v = load(x[k]), c = v < low ? low : v > high ? high : v;
        float passed = std::fabs(c) <= limit && v == c ? load(grad[k]) : 0.0f;
        passed += v == largest ? at_high : 0.0f;
        passed += v == smallest ? at_low : 0.0f;
        store(to[k], passed);
    }
    if (ratios) grad_ratios[0] = grad_low * smallest, grad_ratios[1] = grad_high * largest;
}

template <bool POWER, int BLOCK, class Grad, class In>
INLINE void backward_row(const Grad* grad, const In* x, int64_t width, const float* ratios, float outer, const Format& f,
                         In* to, float* grad_ratios) {
    const int64_t block = BLOCK ? BLOCK : f.block ? f.block : width;
    for (int64_t k = 0, g = 0; k < width; k += block, ++g) {
        const int64_t n = BLOCK ? BLOCK : std::min(block, width - k);
        const float* own = ratios ? ratios + 2 * g : nullptr;
        backward_block<POWER>(grad + k, x + k, n, own, outer, f, to + k, ratios ? grad_ratios + 2 * g : nullptr);
    }
}

template <class Grad, class In>
VECTORIZED void backward_rows(const Grad* grad, const In* x, int64_t rows, int64_t width, Clip clip, float outer,
                              const Format& f, In* to, float* grad_ratios) {
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    for (int64_t t = 0; t < rows; ++t) {
        const Grad* given = grad + t * width;
        const In* from = x + t * width;
        const float* ratios = clip.ratios ? clip.ratios + t * clip.stride : nullptr;
        float* shares = ratios ? grad_ratios + 2 * t * groups : nullptr;
        if (f.scale == E8M0 && f.block == 32 && width % 32 == 0)
            backward_row<true, 32>(given, from, width, ratios, outer, f, to + t * width, shares);
        else if (f.scale == E4M3 && f.block == 16 && width % 16 == 0)
            backward_row<false, 16>(given, from, width, ratios, outer, f, to + t * width, shares);
        else if (f.scale == E8M0)
            backward_row<true, 0>(given, from, width, ratios, outer, f, to + t * width, shares);
        else
            backward_row<false, 0>(given, from, width, ratios, outer, f, to + t * width, shares);
    }
}

template <class Grad, class In>
void backward(const Grad* grad, const In* x, int64_t rows, int64_t width, Clip all, float outer, const Format& f, In* to,
              float* grad_ratios, int threads) {
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    const int64_t slice = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, width));
    pool->run(threads, (rows + slice - 1) / slice, [&](int64_t i) {
        const int64_t first = i * slice, n = std::min(slice, rows - first);
        const Clip clip{all.ratios ? all.ratios + first * all.stride : nullptr, all.stride};
        backward_rows(grad + first * width, x + first * width, n, width, clip, outer, f, to + first * width,
                      all.ratios ? grad_ratios + 2 * first * groups : nullptr);
    });
}

// ---- dequantize ----------------------------------------------------------------------------------------------------

template <class Out>
INLINE void dequantize_row(const uint8_t* codes, const uint8_t* scales, int64_t width, float outer, const Format& f,
                           Out* out) {
    const int64_t block = f.block ? f.block : width;
    uint8_t buffer[64];
    for (int64_t k = 0; k < width; k += block) {
        const int64_t end = std::min(k + block, width);
        float scale = load_scale(scales, k / block, f.scale);
        if (f.scale == E4M3) scale *= outer;
        for (int64_t at = k; at < end; at += 64) {
            const int64_t n = std::min<int64_t>(64, end - at);
            unpack_codes(codes + packed_bytes(at, f.bits), n, f.bits, buffer);
            for (int64_t i = 0; i < n; ++i) store(out[at + i], f.table[buffer[i]] * scale);
        }
    }
}

template <class Out>
VECTORIZED void dequantize_rows(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t width, float outer,
                                const Format& f, Out* out) {
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    for (int64_t n = 0; n < rows; ++n)
        dequantize_row(codes + n * packed_bytes(width, f.bits), scales + n * groups * scale_bytes(f.scale), width,
                       outer, f, out + n * width);
}

// ---- a few rows times a packed weight ------------------------------------------------------------------------------

// Portable: a weight row becomes float32 in a buffer that stays in the nearest cache, and meets every row of x there.
VECTORIZED void product_portable(const float* x, int64_t tokens, int64_t width, const uint8_t* codes,
                                 const uint8_t* scales, int64_t first, int64_t end, int64_t num_rows, float outer,
                                 const Format& f, float* out) {
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    thread_local std::vector<float> buffer;
    buffer.resize(size_t(width));
    float* row = buffer.data();
    for (int64_t n = first; n < end; ++n) {
        dequantize_row(codes + n * packed_bytes(width, f.bits), scales + n * groups * scale_bytes(f.scale), width, outer,
                       f, row);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* from = x + t * width;
            float sums[LANES] = {};
            int64_t k = 0;
            for (; k + LANES <= width; k += LANES)
                for (int i = 0; i < LANES; ++i) sums[i] += from[k + i] * row[k + i];
            float total = 0;
            for (; k < width; ++k) total += from[k] * row[k];
            for (int i = 0; i < LANES; ++i) total += sums[i];
            out[t * num_rows + n] = total;
        }
    }
}

#ifdef AVX512

// With AVX-512 BF16 every code becomes a BF16 number by a table in registers (each element of up to 8 bits is one
// exactly), and x the sum of up to three BF16 planes, exactly. A product of two is exact in float32. Lanes collect a
// block's products, meet its scale, and are added up at the row's end.
//
// A chunk is 64 bytes of codes; x lies in the order in which a chunk's codes come out of it.

constexpr int MAX_PLANES = 4;
constexpr int PREFETCH = 4096;  // bytes ahead: the processor's own prefetching stops at the end of a page

struct Planes {  // [plane][chunk][vector][32] in the order of the chunk
    std::vector<uint16_t> values;
    int64_t count = 0, size = 0;
    std::vector<int64_t> token;  // which row of x a plane belongs to
};

// Where number i of a chunk stands: vector and word within it.
inline int64_t place(int bits, int i) {
    if (bits == 4) return i % 4 * 32 + i / 4;  // nibble i % 4 of word i / 4
    if (bits == 16) return i;
    const int lane = i / 16, in_lane = i % 16;  // unpacking bytes to words works within 128 bits
    return in_lane / 8 * 32 + lane * 8 + in_lane % 8;
}

Planes split(const float* x, int64_t tokens, int64_t width, int bits) {
    const int chunk = 512 / bits;
    const int64_t chunks = (width + chunk - 1) / chunk;
    Planes p;
    p.size = chunks * chunk;
    std::vector<int> where(chunk);
    for (int i = 0; i < chunk; ++i) where[i] = int(place(bits, i));
    std::vector<float> rest(width);
    for (int64_t t = 0; t < tokens; ++t) {
        std::copy(x + t * width, x + (t + 1) * width, rest.begin());
        for (int term = 0; term < 3; ++term) {
            p.values.resize(size_t((p.count + 1) * p.size), 0);
            uint16_t* plane = p.values.data() + p.count * p.size;
            bool more = false;
            for (int64_t k = 0; k < width; ++k) {
                Bfloat16 part;
                store(part, rest[k]);
                plane[k / chunk * chunk + where[k % chunk]] = part.bits;
                rest[k] -= load(part);
                more |= rest[k] != 0;
            }
            p.token.push_back(t);
            ++p.count;
            if (!more) break;  // NaN and Inf leave NaN behind: never equal, three planes, the right answer
        }
    }
    return p;
}

struct Codes4 {
    static constexpr int BITS = 4, VECTORS = 4;
    __m512i table;
    AVX512 explicit Codes4(const Format& f) {
        uint16_t words[32];
        for (int i = 0; i < 32; ++i) words[i] = uint16_t(bits_of(f.table[i % 16]) >> 16);
        table = _mm512_loadu_si512(words);
    }
    AVX512 INLINE void decode(__m512i bytes, __m512bh out[VECTORS]) const {  // indices: the low 5 bits of a word
        out[0] = (__m512bh)_mm512_permutexvar_epi16(bytes, table);
        out[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
        out[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), table);
        out[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 12), table);
    }
};

struct Codes8 {
    static constexpr int BITS = 8, VECTORS = 2;
    __m512i low[4], high[4];  // the two bytes of each code's BF16 value, 64 codes a register
    AVX512 explicit Codes8(const Format& f) {
        uint8_t bytes[2][256];
        for (int i = 0; i < 256; ++i)
            for (int half = 0; half < 2; ++half) bytes[half][i] = uint8_t(bits_of(f.table[i]) >> (16 + 8 * half));
        for (int i = 0; i < 4; ++i) {
            low[i] = _mm512_loadu_si512(bytes[0] + 64 * i);
            high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
        }
    }
    AVX512 INLINE void decode(__m512i bytes, __m512bh out[VECTORS]) const {
        const __mmask64 upper = _mm512_movepi8_mask(bytes);
        const __m512i l = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low[0], bytes, low[1]),
                                                 _mm512_permutex2var_epi8(low[2], bytes, low[3]));
        const __m512i h = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(high[0], bytes, high[1]),
                                                 _mm512_permutex2var_epi8(high[2], bytes, high[3]));
        out[0] = (__m512bh)_mm512_unpacklo_epi8(l, h);
        out[1] = (__m512bh)_mm512_unpackhi_epi8(l, h);
    }
};

struct Numbers16 {  // BF16 already
    static constexpr int BITS = 16, VECTORS = 1;
    AVX512 explicit Numbers16(const Format&) {}
    AVX512 INLINE void decode(__m512i bytes, __m512bh out[VECTORS]) const { out[0] = (__m512bh)bytes; }
};

// The scales of a chunk's 16 lanes, from 16 / GROUP stored ones; GROUP lanes share one.
template <int GROUP>
struct ScalesE8M0 {
    static constexpr int BYTES = 16 / GROUP;
    __m512i spread;
    AVX512 explicit ScalesE8M0() {
        uint8_t index[64];
        for (int i = 0; i < 64; ++i) index[i] = uint8_t(i % 4 == 3 ? i / 4 / GROUP : 128);  // 128: a zero byte
        spread = _mm512_loadu_si512(index);
    }
    AVX512 INLINE __m512 load(const uint8_t* scales) const {
        std::conditional_t<BYTES == 4, uint32_t, uint16_t> bytes;
        std::memcpy(&bytes, scales, BYTES);
        const __m512i all = _mm512_set1_epi32(int(bytes));
        const __m512i subnormal = _mm512_set1_epi32(1 << 22);  // what code 0 means, and what makes a NaN of Inf
        const __m512i bits = _mm512_max_epi32(_mm512_srli_epi32(_mm512_shuffle_epi8(all, spread), 1), subnormal);
        const __mmask16 last = _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(EXPONENT));
        return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, last, bits, subnormal));
    }
};

template <int GROUP>
struct ScalesE4M3 {
    static constexpr int BYTES = 16 / GROUP;
    static_assert(BYTES == 8);
    __m512i index, low[2], high[2];
    AVX512 explicit ScalesE4M3() {
        uint8_t where[64], bytes[2][128];
        for (int i = 0; i < 64; ++i) where[i] = uint8_t(i / 4 / GROUP);
        for (int i = 0; i < 128; ++i) {
            const uint8_t code = uint8_t(i);
            for (int half = 0; half < 2; ++half)
                bytes[half][i] = uint8_t(bits_of(load_scale(&code, 0, E4M3)) >> (16 + 8 * half));
        }
        index = _mm512_loadu_si512(where);
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_loadu_si512(bytes[0] + 64 * i);
            high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
        }
    }
    AVX512 INLINE __m512 load(const uint8_t* scales) const {
        uint64_t bytes;
        std::memcpy(&bytes, scales, BYTES);
        const __m512i codes = _mm512_shuffle_epi8(_mm512_set1_epi64(int64_t(bytes)), index);
        const __m512i l = _mm512_maskz_permutex2var_epi8(0x4444444444444444u, low[0], codes, low[1]);
        return _mm512_castsi512_ps(_mm512_mask_blend_epi8(0x8888888888888888u, l,
                                                          _mm512_permutex2var_epi8(high[0], codes, high[1])));
    }
};

struct ScalesBF16 {  // 4 blocks of 4 lanes
    static constexpr int BYTES = 8;
    AVX512 INLINE __m512 load(const uint8_t* scales) const {
        const __m128i four = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
        const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        return _mm512_castsi512_ps(_mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(_mm_slli_epi32(four, 16))));
    }
};

struct ScaleOfRow {
    static constexpr int BYTES = 0;  // the same one for every chunk
    AVX512 INLINE __m512 load(const uint8_t* scales) const { return _mm512_set1_ps(load_scale(scales, 0, FP32)); }
};

struct NoScale {
    static constexpr int BYTES = 0;
    AVX512 INLINE __m512 load(const uint8_t*) const { return _mm512_set1_ps(1.0f); }
};

template <int PLANES, class Codes, class Scales>
AVX512 INLINE void add_chunk(const uint16_t* x, int64_t plane_size, __m512i bytes, const uint8_t* scales,
                             const Codes& decoder, const Scales& scaler, __m512 total[PLANES]) {
    __m512bh values[Codes::VECTORS];
    decoder.decode(bytes, values);
    const __m512 scale = scaler.load(scales);
    for (int j = 0; j < PLANES; ++j) {
        __m512 sum = _mm512_setzero_ps();
        for (int v = 0; v < Codes::VECTORS; ++v)
            sum = _mm512_dpbf16_ps(sum, values[v], (__m512bh)_mm512_loadu_si512(x + j * plane_size + 32 * v));
        total[j] = _mm512_fmadd_ps(sum, scale, total[j]);
    }
}

// One row of the weight after the other, so that memory is read in one stream: several at once are a third slower.
template <int PLANES, class Codes, class Scales>
AVX512 void product_planes(const Planes& p, int64_t plane, int64_t width, const uint8_t* codes, const uint8_t* scales,
                           int64_t first, int64_t end, int64_t num_rows, float outer, const Format& f,
                           const Codes& decoder, const Scales& scaler, float* out) {
    const int64_t row_bytes = packed_bytes(width, f.bits);
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1;
    const int64_t row_scales = groups * scale_bytes(f.scale);
    for (int64_t n = first; n < end; ++n) {
        const uint16_t* x = p.values.data() + plane * p.size;
        const uint8_t *from = codes + n * row_bytes, *scale = scales + n * row_scales;
        __m512 total[PLANES];
        for (int j = 0; j < PLANES; ++j) total[j] = _mm512_setzero_ps();
        int64_t left = row_bytes, scales_left = row_scales;
        for (; left >= 64; left -= 64, from += 64, x += 512 / Codes::BITS) {
            _mm_prefetch(reinterpret_cast<const char*>(from + PREFETCH), _MM_HINT_T0);
            add_chunk<PLANES>(x, p.size, _mm512_loadu_si512(from), scale, decoder, scaler, total);
            scale += Scales::BYTES, scales_left -= Scales::BYTES;
        }
        if (left > 0) {
            const __m512i bytes = _mm512_maskz_loadu_epi8(~0ull >> (64 - left), from);
            uint8_t rest[16] = {};  // the scales of the lanes beyond the row are zero, as their x is
            std::copy(scale, scale + scales_left, rest);
            add_chunk<PLANES>(x, p.size, bytes, rest, decoder, scaler, total);
        }
        for (int j = 0; j < PLANES; ++j)
            out[p.token[size_t(plane + j)] * num_rows + n] += _mm512_reduce_add_ps(total[j]) * outer;
    }
}

template <class Codes, class Scales>
AVX512 void product_avx512(const Planes& p, int64_t width, const uint8_t* codes, const uint8_t* scales, int64_t first,
                           int64_t end, int64_t num_rows, float outer, const Format& f, float* out) {
    const Codes decoder(f);
    const Scales scaler{};
    for (int64_t plane = 0; plane < p.count; plane += MAX_PLANES) {
        const int64_t n = std::min<int64_t>(MAX_PLANES, p.count - plane);
        auto run = n == 1   ? product_planes<1, Codes, Scales>
                   : n == 2 ? product_planes<2, Codes, Scales>
                   : n == 3 ? product_planes<3, Codes, Scales>
                            : product_planes<4, Codes, Scales>;
        run(p, plane, width, codes, scales, first, end, num_rows, outer, f, decoder, scaler, out);
    }
}

using Product = void (*)(const Planes&, int64_t, const uint8_t*, const uint8_t*, int64_t, int64_t, int64_t, float,
                         const Format&, float*);

// The kernel for a format on this processor; null where there is none.
Product avx512_product_for(const Format& f) {
    static const bool capable = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (!capable) return nullptr;
    if (f.bits == 4 && f.scale == E8M0 && f.block == 32) return product_avx512<Codes4, ScalesE8M0<4>>;
    if (f.bits == 4 && f.scale == E4M3 && f.block == 16) return product_avx512<Codes4, ScalesE4M3<2>>;
    if (f.bits == 4 && f.scale == BF16 && f.block == 32) return product_avx512<Codes4, ScalesBF16>;
    if (f.bits == 8 && f.scale == E8M0 && f.block == 32) return product_avx512<Codes8, ScalesE8M0<8>>;
    if (f.bits == 16) return product_avx512<Numbers16, NoScale>;
    if (f.bits == 8 && f.scale == FP32 && f.block == 0) return product_avx512<Codes8, ScaleOfRow>;
    return nullptr;
}

// With AVX2 every code becomes a float32, exactly, and meets x, which is float32 as it came. 4 bits: two tables of bytes give
// BF16 words, and a word is the upper half of a float. Floats of 8 bits are halves but for their place, and become floats as
// halves do. Lanes collect a block's products, meet its scale, and are added up at the row's end.
//
// A chunk is 32 bytes of codes; x lies in the order in which a chunk's codes come out of it.

constexpr int MAX_TOKENS = 4;

struct Table4 {
    static constexpr int BITS = 4, VECTORS = 8;
    struct Raw { __m256i words[4]; };
    float unit = 1.0f;  // what a decoded number is to be multiplied by
    __m256i low, high;  // the two bytes of each code's BF16 value
    AVX2 explicit Table4(const Format& f) {
        uint8_t bytes[2][32];
        for (int i = 0; i < 32; ++i)
            for (int half = 0; half < 2; ++half) bytes[half][i] = uint8_t(bits_of(f.table[i % 16]) >> (16 + 8 * half));
        low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes[0]));
        high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes[1]));
    }
    // Looking up and interleaving work within 128 bits: a lane's half of 8 bytes, its nibble, odd or even, and its number.
    static int64_t place(int i) {
        const int byte = i / 2, lane = byte / 16, half = byte / 8 % 2;
        return ((half * 2 + i % 2) * 2 + byte % 2) * 8 + lane * 4 + byte % 8 / 2;
    }
    AVX2 INLINE Raw raw(const uint8_t* from) const {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), nibble = _mm256_set1_epi8(15);
        const __m256i even = _mm256_and_si256(bytes, nibble);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const __m256i l[2] = {_mm256_shuffle_epi8(low, even), _mm256_shuffle_epi8(low, odd)};
        const __m256i h[2] = {_mm256_shuffle_epi8(high, even), _mm256_shuffle_epi8(high, odd)};
        return {{_mm256_unpacklo_epi8(l[0], h[0]), _mm256_unpacklo_epi8(l[1], h[1]), _mm256_unpackhi_epi8(l[0], h[0]),
                 _mm256_unpackhi_epi8(l[1], h[1])}};
    }
    AVX2 INLINE __m256 values(const Raw& r, int v) const { return upper_halves(r.words[v / 2], v % 2); }
    AVX2 static INLINE __m256 upper_halves(__m256i words, int odd) {
        return _mm256_castsi256_ps(odd ? _mm256_and_si256(words, _mm256_set1_epi32(int(0xFFFF0000)))
                                       : _mm256_slli_epi32(words, 16));
    }
};

struct Words16 {  // BF16 already
    static constexpr int BITS = 16, VECTORS = 2;
    using Raw = __m256i;
    float unit = 1.0f;
    AVX2 explicit Words16(const Format&) {}
    static int64_t place(int i) { return i % 2 * 8 + i / 2; }
    AVX2 INLINE Raw raw(const uint8_t* from) const { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    AVX2 INLINE __m256 values(const Raw& words, int v) const { return Table4::upper_halves(words, v); }
};

template <int EXPONENT_BITS>
struct Halves8 {  // E5M2 or E4M3
    static constexpr int BITS = 8, VECTORS = 4;
    struct Raw { __m256i halves[2]; };
    float unit = EXPONENT_BITS == 5 ? 1.0f : 0x1p8f;  // a half's exponent has a bias of 15, that of E4M3 is 7
    AVX2 explicit Halves8(const Format&) {}
    static int64_t place(int i) { return i; }
    AVX2 INLINE Raw raw(const uint8_t* from) const { return {{halves(from), halves(from + 16)}}; }
    AVX2 INLINE __m256i halves(const uint8_t* from) const {
        const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        if (EXPONENT_BITS == 5) return _mm256_slli_epi16(words, 8);
        return _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(int16_t(0xBFFF)));  // the sign came twice
    }
    AVX2 INLINE __m256 values(const Raw& r, int v) const {
        return _mm256_cvtph_ps(v % 2 ? _mm256_extracti128_si256(r.halves[v / 2], 1)
                                     : _mm256_castsi256_si128(r.halves[v / 2]));
    }
};

struct Integers8 {
    static constexpr int BITS = 8, VECTORS = 4;
    using Raw = const uint8_t*;
    float unit;
    AVX2 explicit Integers8(const Format& f) : unit(f.table[1]) {}
    static int64_t place(int i) { return i; }
    AVX2 INLINE Raw raw(const uint8_t* from) const { return from; }
    AVX2 INLINE __m256 values(const Raw& from, int v) const {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * v));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
};

// E4M3 has one magnitude that is no number, and no half looks like it: such a row is found apart.
AVX2 bool has_nan(const Halves8<4>&, const uint8_t* codes, int64_t n) {
    uint8_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, uint8_t(codes[i] & 127));
    return most == 127;
}
template <class Codes>
INLINE bool has_nan(const Codes&, const uint8_t*, int64_t) { return false; }

// The scales of a chunk's 8 lanes, of which VECTORS in turn have different ones, from PER_CHUNK floats.
template <int PER_CHUNK>
struct Lanes {
    static constexpr int SCALES = PER_CHUNK, VECTORS = PER_CHUNK == 4 ? 2 : 1;
    AVX2 INLINE __m256 load(const float* scales, int vector) const {
        if (PER_CHUNK == 0) return _mm256_set1_ps(1.0f);
        if (PER_CHUNK == 1) return _mm256_set1_ps(*scales);
        if (PER_CHUNK == 2)
            return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(scales))),
                                        _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
        const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scales));
        return _mm256_permutevar_ps(all, vector ? _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3)
                                                : _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    }
};

// 8 stored scales as load_scale reads them.
AVX2 INLINE __m256 eight_scales(__m128i stored, int32_t kind) {
    if (kind == BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
    if (kind == E8M0) {
        const __m256i subnormal = _mm256_set1_epi32(1 << 22);  // what code 0 means, and what makes a NaN of Inf
        const __m256i bits = _mm256_max_epi32(_mm256_slli_epi32(_mm256_cvtepu8_epi32(stored), 23), subnormal);
        const __m256i last = _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(EXPONENT));
        return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(last, subnormal)));
    }
    const __m128i halves = _mm_slli_epi16(_mm_cvtepu8_epi16(stored), 7);  // 2^-8 times as large
    const __m128i nan = _mm_cmpeq_epi16(halves, _mm_set1_epi16(127 << 7));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(halves, nan)), _mm256_set1_ps(0x1p8f));
}

template <int32_t KIND>
AVX2 void floats_of_scales(const uint8_t* from, int64_t groups, float* to) {
    constexpr int BYTES = KIND == BF16 ? 2 : 1;
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        const __m128i* stored = reinterpret_cast<const __m128i*>(from + g * BYTES);
        _mm256_storeu_ps(to + g, eight_scales(BYTES == 2 ? _mm_loadu_si128(stored) : _mm_loadl_epi64(stored), KIND));
    }
    for (; g < groups; ++g) to[g] = load_scale(from, g, KIND);
}

template <int TOKENS, class Codes, class Scales>
AVX2 INLINE void add_chunk(const float* x, int64_t size, const uint8_t* from, const float* scales, const Codes& decoder,
                           const Scales& scaler, __m256 total[TOKENS]) {
    constexpr int ALIKE = Codes::VECTORS / Scales::VECTORS, CHAINS = TOKENS > 1 ? 1 : 2;  // a sum waits for its last term
    const auto raw = decoder.raw(from);
#pragma GCC unroll 2
    for (int g = 0; g < Scales::VECTORS; ++g) {
        __m256 sums[TOKENS][CHAINS];
#pragma GCC unroll 8
        for (int v = g * ALIKE; v < (g + 1) * ALIKE; ++v) {
            const __m256 values = decoder.values(raw, v);
            const int chain = v % CHAINS;
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) {
                const __m256 numbers = _mm256_loadu_ps(x + t * size + 8 * v);
                sums[t][chain] = v < g * ALIKE + CHAINS ? _mm256_mul_ps(values, numbers)
                                                        : _mm256_fmadd_ps(values, numbers, sums[t][chain]);
            }
        }
        const __m256 scale = scaler.load(scales, g);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            const __m256 sum = CHAINS == 1 ? sums[t][0] : _mm256_add_ps(sums[t][0], sums[t][CHAINS - 1]);
            total[t] = _mm256_fmadd_ps(sum, scale, total[t]);
        }
    }
}

AVX2 INLINE float sum_of_lanes(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int TOKENS, class Codes, class Scales>
AVX2 void product_tokens(const float* x, int64_t size, int64_t width, const uint8_t* codes, const uint8_t* scales,
                         int64_t first, int64_t end, int64_t num_rows, float outer, const Format& f, float* out) {
    const Codes decoder(f);
    const Scales scaler;
    const int64_t row_bytes = packed_bytes(width, f.bits), chunks = (row_bytes + 31) / 32;
    const int64_t groups = f.block ? (width + f.block - 1) / f.block : 1, row_scales = groups * scale_bytes(f.scale);
    const auto to_floats = f.scale == E8M0   ? floats_of_scales<E8M0>
                           : f.scale == E4M3 ? floats_of_scales<E4M3>
                                             : floats_of_scales<BF16>;
    std::vector<float> factors(size_t(chunks * Scales::SCALES));  // of lanes beyond the row zero, as their x is
    for (int64_t n = first; n < end; ++n) {
        const uint8_t* from = codes + n * row_bytes;
        if (Scales::SCALES) to_floats(scales + n * row_scales, groups, factors.data());
        __m256 total[TOKENS];
        for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_setzero_ps();
        const float *numbers = x, *factor = factors.data();
        int64_t left = row_bytes;
        for (; left >= 32; left -= 32, from += 32, numbers += 256 / Codes::BITS, factor += Scales::SCALES) {
            _mm_prefetch(reinterpret_cast<const char*>(from + PREFETCH), _MM_HINT_T0);
            add_chunk<TOKENS>(numbers, size, from, factor, decoder, scaler, total);
        }
        if (left > 0) {
            uint8_t rest[32] = {};
            std::copy(from, from + left, rest);
            add_chunk<TOKENS>(numbers, size, rest, factor, decoder, scaler, total);
        }
        float last = outer * decoder.unit;
        if (f.scale == FP32) last *= load_scale(scales, n, FP32);
        if (has_nan(decoder, codes + n * row_bytes, row_bytes)) last = std::numeric_limits<float>::quiet_NaN();
        for (int t = 0; t < TOKENS; ++t) out[t * num_rows + n] = sum_of_lanes(total[t]) * last;
    }
}

struct Avx2Product {
    int64_t (*place)(int);  // of a chunk's number
    void (*run[MAX_TOKENS])(const float*, int64_t, int64_t, const uint8_t*, const uint8_t*, int64_t, int64_t, int64_t, float,
                            const Format&, float*);  // for 1 token, 2, ...
};

template <class Codes, class Scales>
constexpr Avx2Product avx2_product{Codes::place,
                                   {product_tokens<1, Codes, Scales>, product_tokens<2, Codes, Scales>,
                                    product_tokens<3, Codes, Scales>, product_tokens<4, Codes, Scales>}};

// The kernel for a format on this processor; null where there is none.
const Avx2Product* avx2_product_for(const Format& f) {
    static const bool capable =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!capable) return nullptr;
    if (f.bits == 16) return &avx2_product<Words16, Lanes<0>>;
    if (f.bits == 4 && f.scale == E4M3 && f.block == 16) return &avx2_product<Table4, Lanes<4>>;
    if (f.bits == 4 && f.scale != FP32 && f.block == 32) return &avx2_product<Table4, Lanes<2>>;
    if (f.bits == 4 && f.scale == FP32 && f.block == 0) return &avx2_product<Table4, Lanes<0>>;
    if (f.bits == 8 && f.scale == E8M0 && f.block == 32)
        return f.fixed_point          ? &avx2_product<Integers8, Lanes<1>>
               : f.mantissa_bits == 2 ? &avx2_product<Halves8<5>, Lanes<1>>
                                      : &avx2_product<Halves8<4>, Lanes<1>>;
    if (f.bits == 8 && f.fixed_point && f.scale == FP32 && f.block == 0) return &avx2_product<Integers8, Lanes<0>>;
    return nullptr;
}

struct alignas(64) Floats { float values[16]; };  // a load across two lines of a cache takes twice as long

// x in the order of chunks: [token][size], whole chunks, zeros at the end.
std::vector<Floats> in_order(const float* x, int64_t tokens, int64_t width, int64_t size, int chunk, int64_t (*place)(int)) {
    std::vector<Floats> lines(size_t((tokens * size + 15) / 16));
    int64_t where[64];
    for (int i = 0; i < chunk; ++i) where[i] = place(i);
    for (int64_t t = 0; t < tokens; ++t) {
        float* out = lines.data()->values + t * size;
        for (int64_t k = 0; k < width; k += chunk)
            for (int i = 0; i < chunk && k + i < width; ++i) out[k + where[i]] = x[t * width + k + i];
    }
    return lines;
}

#endif

constexpr int64_t TASK_CODES = 1 << 18;  // weights a task takes; less is not worth waking a thread

// ---- integers times integers: sums of int32, exact; floats come at the end -----------------------------------------

// Activations as integers, one scale a token; weights of 8 or 4 bits with one scale a row, or of 4 bits with a BF16 scale for
// every 32. out = float(sum) * token's scale * row's scale, in this order; with groups the sums are float(group's sum) * scale,
// each product exact, in 16 lanes. The caller sees to it that a row's sum fits int32.

struct Integers {
    const uint8_t* codes;
    const float* scales;
    int64_t tokens, width;
    int32_t bits;
};

struct Weight {
    const uint8_t* codes;
    const uint8_t* scales;
    int64_t num_rows;
    const Format* format;
};

INLINE int8_t integer_of(uint8_t code, int bits) { return int8_t(uint8_t(code << (8 - bits))) >> (8 - bits); }

VECTORIZED void widen(const uint8_t* codes, int64_t width, int bits, int16_t* out) {
    uint8_t buffer[64];
    for (int64_t at = 0; at < width; at += 64) {
        const int64_t n = std::min<int64_t>(64, width - at);
        unpack_codes(codes + packed_bytes(at, bits), n, bits, buffer);
        for (int64_t i = 0; i < n; ++i) out[at + i] = integer_of(buffer[i], bits);
    }
}

// Portable: products of int16 added in pairs, an instruction of AVX2 that compilers find.
VECTORIZED void integers_portable(const int16_t* x, const Integers& in, const Weight& w, int64_t first, int64_t end,
                                  float* out) {
    const int64_t width = in.width, block = w.format->block ? w.format->block : width;
    const int64_t groups = (width + block - 1) / block;
    thread_local std::vector<int16_t> buffer;
    buffer.resize(size_t(width));
    int16_t* row = buffer.data();
    for (int64_t n = first; n < end; ++n) {
        widen(w.codes + n * packed_bytes(width, w.format->bits), width, w.format->bits, row);
        const uint8_t* scales = w.scales + n * groups * scale_bytes(w.format->scale);
        for (int64_t t = 0; t < in.tokens; ++t) {
            const int16_t* from = x + t * width;
            float total = 0;
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t last = std::min(width, (g + 1) * block);
                int32_t sum = 0;
                for (int64_t k = g * block; k < last; ++k) sum += int32_t(from[k]) * row[k];
                if (!w.format->block)
                    total = float(sum) * in.scales[t] * load_scale(scales, 0, FP32);
                else
                    total += float(sum) * load_scale(scales, g, w.format->scale);
            }
            out[t * w.num_rows + n] = w.format->block ? total * in.scales[t] : total;
        }
    }
}

#ifdef AVX512

// VNNI adds four products of an unsigned and a signed byte to each int32: the weight's integers are moved up by 128 or 8 to be
// unsigned, and what that adds, as many times the token's sum, is taken away at the end (with groups: at their start).
//
// A chunk is 64 bytes of codes; x lies in the order in which a chunk's codes come out of it.

constexpr int64_t TOKENS_AT_ONCE = 32;  // that stay in the second cache while rows go by

struct alignas(64) Line { int8_t values[64]; };  // a load across two lines of a cache takes twice as long

struct Arranged {  // [token][chunk][vector][64]
    std::vector<Line> lines;
    std::vector<int32_t> sums, offsets;  // of a token; of a lane of each chunk, [token][chunk][16], times -8
    int64_t size = 0, chunks = 0;
    const int8_t* token(int64_t t) const { return lines.data()->values + t * size; }
};

VECTORIZED void arrange_token(const uint8_t* codes, int64_t width, int bits, bool pairs, int8_t* to, int32_t& sum,
                              int32_t* offsets) {
    const int64_t chunk = pairs ? 128 : 64;
    uint8_t buffer[128];
    int8_t values[128];
    for (int64_t at = 0; at < width; at += chunk, to += chunk) {
        const int64_t n = std::min(chunk, width - at);
        std::memset(buffer, 0, sizeof buffer);
        unpack_codes(codes + packed_bytes(at, bits), n, bits, buffer);
        for (int i = 0; i < 128; ++i) values[i] = integer_of(buffer[i], bits);
        int32_t total = 0;
        for (int i = 0; i < 128; ++i) total += values[i];
        sum += total;
        if (!pairs) {
            std::memcpy(to, values, 64);
            continue;
        }
        for (int i = 0; i < 64; ++i) to[i] = values[2 * i], to[64 + i] = values[2 * i + 1];
        for (int lane = 0; offsets && lane < 16; ++lane, ++offsets)
            for (int i = 0; i < 8; ++i) *offsets -= 8 * values[8 * lane + i];
    }
}

Arranged arrange(const Integers& in, const Format& f) {
    Arranged x;
    const bool pairs = f.bits == 4;
    const int64_t chunk = pairs ? 128 : 64;
    x.chunks = (in.width + chunk - 1) / chunk, x.size = x.chunks * chunk;
    x.lines.resize(size_t(in.tokens * x.size / 64)), x.sums.resize(size_t(in.tokens));
    if (f.block) x.offsets.resize(size_t(in.tokens * x.chunks * 16));
    for (int64_t t = 0; t < in.tokens; ++t)
        arrange_token(in.codes + t * packed_bytes(in.width, in.bits), in.width, in.bits, pairs,
                      x.lines.data()->values + t * x.size, x.sums[size_t(t)],
                      f.block ? x.offsets.data() + t * x.chunks * 16 : nullptr);
    return x;
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

// The chunk's integers moved up, as many vectors as bytes hold.
template <int BITS>
VNNI INLINE void unsigned_integers(__m512i bytes, __m512i out[2]) {
    if (BITS == 8) {
        out[0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80)));
    } else {
        const __m512i low = _mm512_set1_epi8(15), moved = _mm512_set1_epi8(8);
        out[0] = _mm512_xor_si512(_mm512_and_si512(bytes, low), moved);
        out[1] = _mm512_xor_si512(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), moved);
    }
}

template <int BITS>
VNNI INLINE __m512i add_products(__m512i sum, const __m512i w[2], const int8_t* x) {
    sum = _mm512_dpbusd_epi32(sum, w[0], _mm512_loadu_si512(x));
    return BITS == 8 ? sum : _mm512_dpbusd_epi32(sum, w[1], _mm512_loadu_si512(x + 64));
}

// The sums over the lanes of four vectors.
VNNI INLINE __m128i sums_of_lanes(const __m512i v[4]) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// int32 sums of T tokens and R rows, one scale a row.
template <int BITS, int T, int R>
VNNI void tile_of_rows(const Arranged& x, const Integers& in, const Weight& w, int64_t t, int64_t n, float* out) {
    constexpr int CHUNK = 512 / BITS;
    constexpr uint32_t MOVED = BITS == 8 ? 128 : 8;
    const int64_t row_bytes = packed_bytes(in.width, BITS);
    const uint8_t* codes = w.codes + n * row_bytes;
    const int8_t* from = x.token(t);
    __m512i sums[T][R];
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[i][r] = _mm512_setzero_si512();
    for (int64_t c = 0; c < x.chunks; ++c) {
        const int64_t left = row_bytes - c * 64;
        const __mmask64 mask = left >= 64 ? ~0ull : ~0ull >> (64 - left);
        __m512i values[R][2];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            unsigned_integers<BITS>(_mm512_maskz_loadu_epi8(mask, codes + r * row_bytes + c * 64), values[r]);
        if (R == 1) _mm_prefetch(reinterpret_cast<const char*>(codes + c * 64 + PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sums[i][r] = add_products<BITS>(sums[i][r], values[r], from + i * x.size + c * CHUNK);
    }
    if constexpr (R == 4) {
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
            const __m128i moved = _mm_set1_epi32(int32_t(MOVED * uint32_t(x.sums[size_t(t + i)])));
            const __m128 four = _mm_cvtepi32_ps(_mm_sub_epi32(sums_of_lanes(sums[i]), moved));
            const __m128 scales = _mm_castsi128_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + 4 * n)));
            _mm_storeu_ps(out + (t + i) * w.num_rows + n, _mm_mul_ps(_mm_mul_ps(four, _mm_set1_ps(in.scales[t + i])), scales));
        }
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint32_t moved = MOVED * uint32_t(x.sums[size_t(t + i)]);  // what overflowed on the way comes back
            const int32_t sum = int32_t(uint32_t(_mm512_reduce_add_epi32(sums[i][r])) - moved);
            out[(t + i) * w.num_rows + n + r] = float(sum) * in.scales[t + i] * load_scale(w.scales, n + r, FP32);
        }
}

// Float sums of T tokens and R rows of 4 bits, whose every 32 numbers, 4 lanes, have a BF16 scale.
template <int BITS, int T, int R>
VNNI void tile_of_groups(const Arranged& x, const Integers& in, const Weight& w, int64_t t, int64_t n, float* out) {
    static_assert(BITS == 4);
    const int64_t row_bytes = packed_bytes(in.width, BITS), groups = (in.width + 31) / 32;
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const int8_t* from = x.token(t);
    const int32_t* offsets = x.offsets.data() + t * x.chunks * 16;
    __m512 sums[T][R];
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[i][r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < x.chunks; ++c) {
        const int64_t left = row_bytes - c * 64, scales_left = std::min<int64_t>(4, groups - c * 4);
        const __mmask64 mask = left >= 64 ? ~0ull : ~0ull >> (64 - left);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            __m512i values[2];
            unsigned_integers<BITS>(_mm512_maskz_loadu_epi8(mask, w.codes + (n + r) * row_bytes + c * 64), values);
            const __m128i stored = _mm_maskz_loadu_epi16(__mmask8((1 << scales_left) - 1),
                                                         w.scales + ((n + r) * groups + c * 4) * 2);
            const __m128i four = _mm_slli_epi32(_mm_cvtepu16_epi32(stored), 16);
            const __m512 scale =
                _mm512_castsi512_ps(_mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(four)));
#pragma GCC unroll 4
            for (int i = 0; i < T; ++i) {
                __m512i sum = _mm512_loadu_si512(offsets + (i * x.chunks + c) * 16);
                sum = add_products<BITS>(sum, values, from + i * x.size + c * 128);
                sums[i][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[i][r]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            out[(t + i) * w.num_rows + n + r] = _mm512_reduce_add_ps(sums[i][r]) * in.scales[t + i];
}

template <int BITS, bool GROUPS, int T, int R>
VNNI INLINE void tile(const Arranged& x, const Integers& in, const Weight& w, int64_t t, int64_t n, float* out) {
    if constexpr (GROUPS)
        tile_of_groups<BITS, T, R>(x, in, w, t, n, out);
    else
        tile_of_rows<BITS, T, R>(x, in, w, t, n, out);
}

// Four tokens and four rows at a time: 16 sums, which stay in registers where loops are unrolled early, for 8 loads. Few tokens: row after row, one stream of memory.
template <int BITS, bool GROUPS>
VNNI void integers_vnni(const Arranged& x, const Integers& in, const Weight& w, int64_t first, int64_t end, float* out) {
    for (int64_t from = 0; from < in.tokens; from += TOKENS_AT_ONCE) {
        const int64_t to = std::min(in.tokens, from + TOKENS_AT_ONCE), rows = to - from < 4 ? first : end - (end - first) % 4;
        for (int64_t n = first; n < rows; n += 4) {
            int64_t t = from;
            for (; t + 4 <= to; t += 4) tile<BITS, GROUPS, 4, 4>(x, in, w, t, n, out);
            for (; t < to; ++t) tile<BITS, GROUPS, 1, 4>(x, in, w, t, n, out);
        }
        for (int64_t n = rows; n < end; ++n) {
            int64_t t = from;
            for (; t + 2 <= to; t += 2) tile<BITS, GROUPS, 2, 1>(x, in, w, t, n, out);
            for (; t < to; ++t) tile<BITS, GROUPS, 1, 1>(x, in, w, t, n, out);
        }
    }
}

using IntegerProduct = void (*)(const Arranged&, const Integers&, const Weight&, int64_t, int64_t, float*);

// The kernel for a weight's format on this processor; null where the portable one does the work.
IntegerProduct integer_product_for(const Format& f) {
    static const bool capable = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!capable) return nullptr;
    return f.block ? integers_vnni<4, true> : f.bits == 4 ? integers_vnni<4, false> : integers_vnni<8, false>;
}

#endif

}  // namespace

extern "C" {

// x [rows, width] float32, or BF16 where `half_in`, through the map and the clip onto the format's grid: as floats into
// `out` (BF16 where `half_out`), or, where `codes` is given, as packed codes and scales.
void microbat_quantize(const void* x, int half_in, int64_t rows, int64_t width, const Map* map, const float* ratios,
                       int64_t ratio_stride, float outer, const Format* format, void* out, int half_out, uint8_t* codes,
                       uint8_t* scales, int threads) {
    const Clip clip{ratios, ratio_stride};
    if (half_in)
        quantize(static_cast<const Bfloat16*>(x), rows, width, *map, clip, outer, *format, out, half_out, codes, scales,
                 threads);
    else
        quantize(static_cast<const float*>(x), rows, width, *map, clip, outer, *format, out, half_out, codes, scales,
                 threads);
}

// What a gradient of the floats that microbat_quantize writes is for x, into `to` [rows, width] of x's type, and for the ratios,
// where there are any, into `grad_ratios` [rows, G, 2].
void microbat_backward(const void* grad, int half_grad, const void* x, int half_in, int64_t rows, int64_t width,
                       const float* ratios, int64_t ratio_stride, float outer, const Format* format, void* to,
                       float* grad_ratios, int threads) {
    const Clip clip{ratios, ratio_stride};
    auto run = [&](auto* given, auto* from) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        backward(given, from, rows, width, clip, outer, *format, static_cast<In*>(to), grad_ratios, threads);
    };
    auto of = [&](auto* given) {
        half_in ? run(given, static_cast<const Bfloat16*>(x)) : run(given, static_cast<const float*>(x));
    };
    half_grad ? of(static_cast<const Bfloat16*>(grad)) : of(static_cast<const float*>(grad));
}

// Packed rows to floats [rows, width], BF16 where `half_out`.
void microbat_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t width, float outer,
                         const Format* format, void* out, int half_out, int threads) {
    const Format& f = *format;
    const int64_t slice = std::max<int64_t>(1, (1 << 16) / width), groups = f.block ? (width + f.block - 1) / f.block : 1;
    pool->run(threads, (rows + slice - 1) / slice, [&](int64_t i) {
        const int64_t first = i * slice, n = std::min(slice, rows - first);
        const uint8_t* c = codes + first * packed_bytes(width, f.bits);
        const uint8_t* s = scales + first * groups * scale_bytes(f.scale);
        if (half_out)
            dequantize_rows(c, s, n, width, outer, f, static_cast<Bfloat16*>(out) + first * width);
        else
            dequantize_rows(c, s, n, width, outer, f, static_cast<float*>(out) + first * width);
    });
}

// out [tokens, num_rows] = x [tokens, width] float32 times the packed weight [num_rows, width], transposed. 16 bits are
// BF16 numbers without scales, where the processor has instructions for them. `most`: the last Level to be used.
void microbat_product(const float* x, int64_t tokens, int64_t width, const uint8_t* codes, const uint8_t* scales,
                      int64_t num_rows, float outer, const Format* format, int most, float* out, int threads) {
    const Format& f = *format;
    const int64_t slice = (std::max<int64_t>(1, TASK_CODES / width) + 3) / 4 * 4;
    const int64_t tasks = (num_rows + slice - 1) / slice;
#ifdef AVX512
    const float last = f.scale == E4M3 ? outer : 1.0f;
    if (const Product product = most >= WITH_AVX512 ? avx512_product_for(f) : nullptr) {
        const Planes planes = split(x, tokens, width, f.bits);
        std::fill(out, out + tokens * num_rows, 0.0f);
        pool->run(threads, tasks, [&](int64_t i) {
            product(planes, width, codes, scales, i * slice, std::min(num_rows, (i + 1) * slice), num_rows, last, f, out);
        });
        return;
    }
    if (const Avx2Product* product = most >= WITH_AVX2 ? avx2_product_for(f) : nullptr) {
        const int chunk = 256 / f.bits;
        const int64_t size = (width + chunk - 1) / chunk * chunk;
        const std::vector<Floats> lines = in_order(x, tokens, width, size, chunk, product->place);
        pool->run(threads, tasks, [&](int64_t i) {
            for (int64_t t = 0; t < tokens; t += MAX_TOKENS)
                product->run[std::min<int64_t>(MAX_TOKENS, tokens - t) - 1](
                    lines.data()->values + t * size, size, width, codes, scales, i * slice, std::min(num_rows, (i + 1) * slice),
                    num_rows, last, f, out + t * num_rows);
        });
        return;
    }
#endif
    pool->run(threads, tasks, [&](int64_t i) {
        product_portable(x, tokens, width, codes, scales, i * slice, std::min(num_rows, (i + 1) * slice), num_rows,
                         outer, f, out);
    });
}

// out [tokens, num_rows]: integers [tokens, width], one float32 scale a token, times those of a packed weight, transposed.
// `portable`: as on processors without VNNI.
void microbat_integer_product(const uint8_t* x, const float* x_scales, int64_t tokens, int64_t width,
                              const Format* x_format, const uint8_t* codes, const uint8_t* scales, int64_t num_rows,
                              const Format* format, int portable, float* out, int threads) {
    const Integers in{x, x_scales, tokens, width, x_format->bits};
    const Weight w{codes, scales, num_rows, format};
    const int64_t slice = (std::max<int64_t>(1, TASK_CODES / width) + 3) / 4 * 4;
    const int64_t tasks = (num_rows + slice - 1) / slice;
    const auto share = [&](auto product, const auto& prepared) {
        pool->run(threads, tasks, [&](int64_t i) {
            product(prepared, in, w, i * slice, std::min(num_rows, (i + 1) * slice), out);
        });
    };
#ifdef AVX512
    if (const IntegerProduct product = portable ? nullptr : integer_product_for(*format))
        return share(product, arrange(in, *format));
#endif
    std::vector<int16_t> wide(size_t(tokens * width));
    for (int64_t t = 0; t < tokens; ++t)
        widen(x + t * packed_bytes(width, in.bits), width, in.bits, wide.data() + t * width);
    share(integers_portable, wide.data());
}

// The Level at which this processor multiplies by a format.
int microbat_product_level([[maybe_unused]] const Format* format) {
#ifdef AVX512
    if (avx512_product_for(*format)) return WITH_AVX512;
    if (avx2_product_for(*format)) return WITH_AVX2;
#endif
    return PORTABLE;
}

}  // extern "C"
