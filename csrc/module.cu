// The CUDA extension's entry point and launch plan are the CPU extensions'.
#include "module.cpp"
#include "plan.cpp"
