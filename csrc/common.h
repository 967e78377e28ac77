// Included by every native source of sgmim_fast: the LibTorch stable ABI, and checks with readable messages.
//
// Python checks users' arguments and raises ValueError and TypeError. The checks here protect kernels, which use raw
// pointers, from any other caller; they raise RuntimeError in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

// SGMIM_CHECK(condition, parts of the message...)
#define SGMIM_CHECK(condition, ...)                            \
  do {                                                         \
    STD_TORCH_CHECK(condition, "sgmim_fast: ", ##__VA_ARGS__); \
  } while (false)
