#pragma once
#include <Python.h>

// An empty Python module: importing it runs the op registrations of its shared library.
#define FASTKD_MODULE(name)                                         \
  PyMODINIT_FUNC PyInit_##name(void) {                              \
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, #name}; \
    return PyModuleDef_Init(&definition);                           \
  }
