// What CUDA has by itself, for a host compiler: quant.cu as plain C++, run one warp after the other.
//
// The 32 threads of a warp are fibers. One that asks for a value of another lane waits until all that still run have
// asked too, as lanes of a device do. Block-wide barriers there are none.
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim, gridDim;

static int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

static int atomicMin(int* at, int x) {
    int old = *at;
    if (x < old) *at = x;
    return old;
}

static int atomicMax(int* at, int x) {
    int old = *at;
    if (x > old) *at = x;
    return old;
}

namespace warp {

static ucontext_t scheduler, fibers[32];
static char stacks[32][1 << 17];
static unsigned offered[32], first_thread;
static bool is_done[32];
static int lane;
static void (*work)();

static void wait() {
    swapcontext(&fibers[lane], &scheduler);
    threadIdx.x = first_thread + lane;
}

static void body() {
    work();
    is_done[lane] = true;
    swapcontext(&fibers[lane], &scheduler);
}

// All lanes of a warp, each up to its next question, until all have ended.
static void run(unsigned first) {
    first_thread = first;
    for (int i = 0; i < 32; i++) {
        is_done[i] = false;
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i];
        fibers[i].uc_stack.ss_size = sizeof stacks[i];
        makecontext(&fibers[i], body, 0);
    }
    for (bool is_running = true; is_running;) {
        is_running = false;
        for (lane = 0; lane < 32; lane++) {
            if (is_done[lane]) continue;
            threadIdx.x = first + lane;
            swapcontext(&scheduler, &fibers[lane]);
            is_running = is_running || !is_done[lane];
        }
    }
}

}  // namespace warp

// A lane that has ended answers no more: on a device that is undefined, so it is an error here.
static int __shfl_xor_sync(unsigned, int x, int step) {
    int other = warp::lane ^ step;
    warp::offered[warp::lane] = (unsigned)x;
    warp::wait();
    if (warp::is_done[other]) __builtin_trap();
    unsigned answer = warp::offered[other];
    warp::wait();
    return (int)answer;
}

static unsigned __shfl_xor_sync(unsigned mask, unsigned x, int step) {
    return (unsigned)__shfl_xor_sync(mask, (int)x, step);
}

static float __shfl_xor_sync(unsigned mask, float x, int step) {
    int bits;
    memcpy(&bits, &x, 4);
    bits = __shfl_xor_sync(mask, bits, step);
    memcpy(&x, &bits, 4);
    return x;
}

static void __syncwarp() { warp::wait(); }

// Arguments as cuLaunchKernel has them: the address of each.
template <class... A> struct Launch {
    static inline void (*kernel)(A...);
    static inline void** arguments;

    template <std::size_t... I> static void call(std::index_sequence<I...>) {
        kernel(*(std::remove_reference_t<A>*)arguments[I]...);
    }

    static void thread() { call(std::index_sequence_for<A...>()); }
};

template <class... A> void launch(void (*kernel)(A...), unsigned grid, unsigned block, void** arguments) {
    Launch<A...>::kernel = kernel;
    Launch<A...>::arguments = arguments;
    warp::work = Launch<A...>::thread;
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (unsigned first = 0; first < block; first += 32) warp::run(first);
}
