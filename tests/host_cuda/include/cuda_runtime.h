#pragma once
#include <cmath>

#include "cuda_runtime_api.h"
