// What every native source of sgmim_fast starts from: the LibTorch stable ABI, and checks with one readable sentence.
//
// Users' mistakes are caught in Python, with ValueError and TypeError. The checks here are the last line of defence
// of a kernel that reads raw memory: they arrive in Python as a RuntimeError.
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
