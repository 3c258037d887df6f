// All kernels: one program, one PTX.
#include "device.cuh"
//
#include "args.cuh"
//
#include "blocks.cuh"
#include "embed.cuh"
#include "kv.cuh"
