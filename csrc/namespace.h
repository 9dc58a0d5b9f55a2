// The namespace of the operators, which this file alone names for C++, as twilight_ops/_ops.py does for Python. A build
// for the Hugging Face Hub defines another.
#pragma once

#ifndef TWILIGHT_NAMESPACE
#define TWILIGHT_NAMESPACE twilight
#endif

#define TWILIGHT_STRING_(a) #a
#define TWILIGHT_STRING(a) TWILIGHT_STRING_(a)
#define TWILIGHT_NAMESPACE_NAME TWILIGHT_STRING(TWILIGHT_NAMESPACE)
