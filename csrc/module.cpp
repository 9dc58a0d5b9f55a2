// The Python module is empty: loading the library registers the kernels, which the other files do with
// STABLE_TORCH_LIBRARY_IMPL.
#include <Python.h>

#include "namespace.h"

#define TWILIGHT_CONCAT_(a, b) a##b
#define TWILIGHT_CONCAT(a, b) TWILIGHT_CONCAT_(a, b)

// What std::shared_ptr asks before it counts without atomics. glibc has it from 2.32 on, and binaries here load
// from 2.28 on.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

extern "C" __attribute__((visibility("default"))) PyObject* TWILIGHT_CONCAT(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TWILIGHT_STRING(TORCH_EXTENSION_NAME), nullptr, -1};
  return PyModule_Create(&definition);
}
