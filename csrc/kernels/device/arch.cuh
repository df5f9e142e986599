// What depends on the architecture, and the only file that spells PTX: everything else in csrc/kernels/ is C++ that
// nvcc compiles for the device and g++ for the emulator.
//
// One source serves sm_80 to sm_120: warp-level mma, ldmatrix and cp.async. Older ones lack the bfloat16 mma and
// cp.async, and are refused here rather than given an instruction that does nothing.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "routed_peft needs compute capability 8.0 or more: bfloat16 mma and cp.async"
#endif

#define RP_DEVICE __device__ __forceinline__
#define RP_UNROLL _Pragma("unroll")
#define RP_NO_UNROLL _Pragma("unroll 1")
// An unsigned char* to the block's dynamic shared memory.
#define RP_DYNAMIC_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
// A variable of shared memory, aligned for 16-byte accesses: RP_SHARED(float[kWarps], sums);
#define RP_SHARED(type, name) __shared__ __align__(16)::std::type_identity_t<type> name
#else
#include "emulator/emulator.h"
#include "emulator/instructions.h"

#define RP_DEVICE inline __attribute__((always_inline))
#define RP_UNROLL
#define RP_NO_UNROLL
#define RP_DYNAMIC_SMEM(name) unsigned char* const name = ::routed_peft::emulator::dynamic_shared()
#define RP_SHARED(type, name) \
  static char name##_key;     \
  auto& name = ::routed_peft::emulator::shared_variable<type>(&name##_key)
#endif

namespace routed_peft {

#ifdef __CUDACC__
using bfloat16 = __nv_bfloat16;
using half = __half;
#endif

// D [16, 8] += A [16, 16] B [16, 8] for bfloat16 or half, summed in float; the fragments are those of
// mma.m16n8k16.row.col.
template <class T>
RP_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  emulator::mma_16x8x16<T>(d, a, b0, b1);
#endif
}

// D [16, 8] += A [16, 8] B [8, 8] in TF32, summed in float; the fragments are those of mma.m16n8k8.row.col. Operands
// come from to_tf32: the instruction ignores the bits that TF32 lacks.
RP_DEVICE void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emulator::mma_tf32_16x8x8(d, a, b0, b1);
#endif
}

// The nearest TF32 number, ties away from zero, as the float it is.
RP_DEVICE uint32_t to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits & 0xFFFFE000u;
#else
  return emulator::to_tf32(value);
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane i brings the address of row i % 8 of matrix i / 8,
// 16-byte aligned, and gets elements (g, 2q) and (g, 2q + 1) of each, with g = lane / 4 and q = lane % 4.
RP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(smem_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#else
  emulator::ldmatrix_x4<false>(r, smem_row);
#endif
}

// The same of the transposed matrices: elements (2q, g) and (2q + 1, g).
RP_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(smem_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#else
  emulator::ldmatrix_x4<true>(r, smem_row);
#endif
}

// 16 bytes from global to shared memory, both 16-byte aligned, there once the group is waited for; where not valid, 16
// zero bytes, and global memory is not read.
RP_DEVICE void cp_async_16(void* smem, const void* gmem, bool valid) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(__cvta_generic_to_global(gmem)),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  emulator::cp_async_16(smem, gmem, valid);
#endif
}

// 16 bytes from global memory; `from` is 16-byte aligned, and nothing that this thread stores. Spelled out, for numbers
// of 16 bits that are taken apart behind a branch otherwise become halves of registers at once: then every load of a
// batch is waited for before the next one begins.
RP_DEVICE uint4 load_16(const void* from) {
#ifdef __CUDACC__
  uint4 bits;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(from)));
  return bits;
#else
  return *static_cast<const uint4*>(from);
#endif
}

// 16 bytes to global memory at once; `to` is 16-byte aligned. Spelled out, for the compiler has been seen to take such
// a store apart, and then each sector of an output is written four times.
RP_DEVICE void store_16(void* to, uint4 bits) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
               "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = bits;
#endif
}

// Asks for the 128 bytes around an address of global memory to be brought into L2.
RP_DEVICE void prefetch_to_l2([[maybe_unused]] const void* gmem) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(gmem)));
#endif
}

// Closes the group of this thread's copies since the last.
RP_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulator::Block::current().commit();
#endif
}

// Waits for this thread's groups but the last kLeft. Other threads see the copies only after a barrier.
template <int kLeft>
RP_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
#else
  emulator::Block::current().wait_for_copies(kLeft);
#endif
}

// The same for a number known only at run time; more than six are left as six.
RP_DEVICE void cp_async_wait_for(int left) {
  switch (left) {
    case 0:
      return cp_async_wait<0>();
    case 1:
      return cp_async_wait<1>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<3>();
    case 4:
      return cp_async_wait<4>();
    case 5:
      return cp_async_wait<5>();
    default:
      return cp_async_wait<6>();
  }
}

// A barrier of `threads` threads, whole warps; ids are 1 to 15, __syncthreads is 0.
RP_DEVICE void named_barrier(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier(id, threads);
#endif
}

// Kernel(params) on a grid. The emulator returns when the kernel is done, and throws what it finds wrong.
template <auto Kernel, class Params>
cudaError_t launch(dim3 grid, dim3 block, size_t smem, [[maybe_unused]] cudaStream_t stream, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096, "kernel parameters");
#ifdef __CUDACC__
  // The default limit of 48 KiB counts the kernel's static shared memory too. Always the device's most and never less:
  // another thread may be launching the same kernel with another size.
  if (smem > size_t{32} << 10) {
    static std::atomic<uint64_t> raised{0};  // bit i: for GPU i, which is asked once
    int device = 0, most = 0;
    cudaFuncAttributes kernel{};
    cudaError_t error = cudaGetDevice(&device);
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (error == cudaSuccess && (raised.load(std::memory_order_relaxed) & bit) == 0) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      if (error == cudaSuccess) error = cudaFuncGetAttributes(&kernel, Kernel);
      if (error == cudaSuccess) {
        most -= static_cast<int>(kernel.sharedSizeBytes);  // the limit is one for both kinds
        error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      }
      if (error == cudaSuccess) raised.fetch_or(bit, std::memory_order_relaxed);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch, whoever's it is, would be told of it
      return error;
    }
  }
  Kernel<<<grid, block, smem, stream>>>(params);
  return cudaGetLastError();
#else
  return emulator::launch<Kernel>(grid, block, smem, params);
#endif
}

}  // namespace routed_peft
