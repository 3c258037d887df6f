// All kernels: one program, one PTX.
#include "device.cuh"
//
#include "args.cuh"
//
#include "activations.cuh"
#include "attention.cuh"
#include "blocks.cuh"
#include "embed.cuh"
#include "kv.cuh"
