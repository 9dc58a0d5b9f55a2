// The Python module is empty: loading the library registers the kernels, which the other files do with
// STABLE_TORCH_LIBRARY_IMPL.
#include <Python.h>

#define TWILIGHT_CONCAT_(a, b) a##b
#define TWILIGHT_CONCAT(a, b) TWILIGHT_CONCAT_(a, b)
#define TWILIGHT_STRING_(a) #a
#define TWILIGHT_STRING(a) TWILIGHT_STRING_(a)

extern "C" __attribute__((visibility("default"))) PyObject* TWILIGHT_CONCAT(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TWILIGHT_STRING(TORCH_EXTENSION_NAME), nullptr, -1};
  return PyModule_Create(&definition);
}
