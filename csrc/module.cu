// The CUDA extension's entry point is the CPU extensions'.
#include "module.cpp"
