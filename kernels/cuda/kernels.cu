// All kernels: one program, one PTX.
#include "device.cuh"
//
#include "args.cuh"
