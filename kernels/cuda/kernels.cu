// All kernels: one program, one PTX.
#include "device.cuh"
//
#include "args.cuh"
//
#include "activations.cuh"
#include "attention.cuh"
#include "blocks.cuh"
#include "dense.cuh"
#include "embed.cuh"
#include "experts.cuh"
#include "gemm.cuh"
#include "head.cuh"
#include "kv.cuh"
#include "low_rank.cuh"
#include "matrix.cuh"
#include "peak.cuh"
